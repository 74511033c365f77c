//! Word vectors made from the given texts, for candidates by nearness and for the similarity of two texts.
//!
//! Published attacks use counter-fitted vectors and a sentence encoder, which are in no package. These are small substitutes: the positive
//! pointwise mutual information of a word with the 1,000 most frequent words around it (Levy and Goldberg 2014), projected at random to a
//! few dimensions, then moved towards synonyms (retrofitting, Faruqui et al. 2015).

use super::attack::Transformation;
use super::text::{Text, counts};
use super::words::Synonyms;
use crate::base::{Error, Result, philox};
use std::collections::HashMap;
use std::sync::OnceLock;

/// Vectors of length one, with a row for each word.
#[derive(Clone, Debug)]
pub struct WordVectors {
    words: Vec<String>,
    of: HashMap<String, usize>,
    size: usize,
    values: Vec<f32>,
    /// The frequency of each word, as a share of all words.
    share: Vec<f64>,
}

const CONTEXTS: usize = 1000;
const WINDOW: usize = 4;

impl WordVectors {
    /// Vectors of `size` elements for the words that occur in these texts at least twice.
    pub fn of_texts(texts: &[Text], size: usize, seed: u64) -> WordVectors {
        let counts = counts(texts);
        let total: usize = counts.values().sum();
        let mut frequent: Vec<(&String, usize)> =
            counts.iter().map(|(w, n)| (w, *n)).filter(|(_, n)| *n >= 2).collect();
        frequent.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        let words: Vec<String> = frequent.iter().map(|(w, _)| w.to_string()).collect();
        let of: HashMap<String, usize> = words.iter().enumerate().map(|(i, w)| (w.clone(), i)).collect();
        let mut pairs: HashMap<(u32, u32), u32> = HashMap::new();
        for text in texts {
            let ids: Vec<Option<usize>> = text.words().map(|w| of.get(&w.to_lowercase()).copied()).collect();
            for (i, word) in ids.iter().enumerate() {
                let around = &ids[i.saturating_sub(WINDOW)..(i + WINDOW + 1).min(ids.len())];
                for (word, context) in around.iter().filter_map(|c| Some((word.as_ref()?, c.as_ref()?))) {
                    if *context < CONTEXTS && context != word {
                        *pairs.entry((*word as u32, *context as u32)).or_insert(0) += 1;
                    }
                }
            }
        }
        let mut pairs: Vec<((u32, u32), u32)> = pairs.into_iter().collect();
        pairs.sort_unstable();
        let (mut by_word, mut by_context, mut all) = (vec![0u64; words.len()], vec![0u64; CONTEXTS], 0u64);
        for ((w, c), n) in &pairs {
            by_word[*w as usize] += u64::from(*n);
            by_context[*c as usize] += u64::from(*n);
            all += u64::from(*n);
        }
        let mut values = vec![0f32; words.len() * size];
        for ((w, c), n) in &pairs {
            let (w, c) = (*w as usize, *c as usize);
            let expected = by_word[w] as f64 * by_context[c] as f64 / all as f64;
            let weight = (f64::from(*n) / expected).ln().max(0.0) as f32;
            for (j, v) in values[w * size..(w + 1) * size].iter_mut().enumerate() {
                let sign = philox::bits(seed, c as u64, j as u64) & 1 == 0;
                *v += if sign { weight } else { -weight };
            }
        }
        let share = frequent.iter().map(|(_, n)| *n as f64 / total.max(1) as f64).collect();
        let mut vectors = WordVectors { words, of, size, values, share };
        vectors.normalise();
        vectors
    }
    /// The same vectors moved towards synonyms: ten times, each word's vector becomes the mean of what it was and of its synonyms' vectors.
    pub fn retrofitted(mut self, synonyms: &Synonyms) -> WordVectors {
        let first = self.values.clone();
        let near: Vec<Vec<usize>> = self
            .words
            .iter()
            .map(|w| synonyms.get(w).iter().filter_map(|s| self.of.get(s).copied()).collect())
            .collect();
        for _ in 0..10 {
            for (i, near) in near.iter().enumerate().filter(|(_, n)| !n.is_empty()) {
                let range = i * self.size..(i + 1) * self.size;
                let mut sum = first[range.clone()].to_vec();
                for &j in near {
                    let other = &self.values[j * self.size..(j + 1) * self.size];
                    sum.iter_mut().zip(other).for_each(|(s, o)| *s += o / near.len() as f32);
                }
                self.values[range].copy_from_slice(&sum);
                self.normalise_row(i);
            }
        }
        self
    }
    fn normalise(&mut self) {
        (0..self.words.len()).for_each(|i| self.normalise_row(i));
    }
    fn normalise_row(&mut self, i: usize) {
        let row = &mut self.values[i * self.size..(i + 1) * self.size];
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|v| *v /= norm);
        }
    }
    /// The vector of a word in lower case.
    pub fn get(&self, word: &str) -> Option<&[f32]> {
        self.of.get(word).map(|&i| &self.values[i * self.size..(i + 1) * self.size])
    }
    /// Number of words.
    pub fn len(&self) -> usize {
        self.words.len()
    }
    /// Whether there are no words.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// The nearest words of a word, by the cosine of their vectors.
#[derive(Clone, Debug)]
pub struct Neighbours {
    vectors: WordVectors,
    most: usize,
    least: f32,
    /// Of each word, the words near it, found when they are first needed: an attack asks for the same words again and again.
    near: Vec<OnceLock<Vec<usize>>>,
}

impl Neighbours {
    /// Neighbours that have a cosine of at least `least`, at most `most` for each word (TextFooler: 50 and 0.5).
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `least` lies in [−1, 1].
    pub fn new(vectors: WordVectors, most: usize, least: f64) -> Result<Neighbours> {
        if !(-1.0..=1.0).contains(&least) {
            return Err(Error::invalid("Neighbours", format!("a cosine of at least {least}; it must lie in [-1, 1]")));
        }
        let near = vec![OnceLock::new(); vectors.words.len()];
        Ok(Neighbours { vectors, most, least: least as f32, near })
    }
    /// The words near a word in lower case, the nearest first.
    pub fn get(&self, word: &str) -> Vec<&str> {
        let Some(&of) = self.vectors.of.get(word) else { return Vec::new() };
        let near = self.near[of].get_or_init(|| {
            let (own, size) = (self.vectors.get(word).unwrap_or_default(), self.vectors.size);
            let rows = self.vectors.values.chunks_exact(size.max(1)).enumerate();
            let mut near: Vec<(f32, usize)> =
                rows.map(|(i, row)| (dot(own, row), i)).filter(|(c, i)| *c >= self.least && *i != of).collect();
            near.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            near.into_iter().take(self.most).map(|(_, i)| i).collect()
        });
        near.iter().map(|&i| &self.vectors.words[i][..]).collect()
    }
}

impl Transformation for Neighbours {
    fn candidates(&self, words: &[&str], at: usize) -> Vec<String> {
        self.get(&words[at].to_lowercase()).into_iter().map(str::to_string).collect()
    }
}

/// The similarity of two texts around a word: 1 − angle/π between the sums of their words' vectors in a window of 15 words, each
/// weighted by 1e-3/(1e-3 + its share of all words) (Arora et al. 2017).
#[derive(Clone, Debug)]
pub struct Similarity {
    vectors: WordVectors,
}

impl Similarity {
    /// A similarity over these vectors. Words without a vector contribute nothing.
    pub fn new(vectors: WordVectors) -> Similarity {
        Similarity { vectors }
    }
    /// The similarity of the original and the present text with `candidate` at position `at`; 1 if there is nothing to compare.
    pub fn of(&self, original: &[&str], present: &[&str], at: usize, candidate: &str) -> f64 {
        let window = at.saturating_sub(7)..(at + 8).min(original.len());
        let sum = |word: &dyn Fn(usize) -> String| -> Vec<f64> {
            let mut sum = vec![0f64; self.vectors.size];
            for i in window.clone() {
                if let Some(&row) = self.vectors.of.get(&word(i)) {
                    let weight = 1e-3 / (1e-3 + self.vectors.share[row]);
                    let v = &self.vectors.values[row * self.vectors.size..(row + 1) * self.vectors.size];
                    sum.iter_mut().zip(v).for_each(|(s, v)| *s += weight * f64::from(*v));
                }
            }
            sum
        };
        let a = sum(&|i| original[i].to_lowercase());
        let b = sum(&|i| if i == at { candidate.to_lowercase() } else { present[i].to_lowercase() });
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let norms = (dot(&a, &a) * dot(&b, &b)).sqrt();
        // Rounding can make the cosine of equal texts larger than 1.
        if norms > 0.0 { 1.0 - (dot(&a, &b) / norms).clamp(-1.0, 1.0).acos() / std::f64::consts::PI } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_in_the_same_places_are_near() {
        let texts: Vec<Text> = (0..60)
            .map(|i| {
                let (noun, other) = if i % 2 == 0 { ("film", "tree") } else { ("movie", "rock") };
                Text::new(format!("i watched that long {noun} yesterday evening while the {other} stood outside alone"))
            })
            .collect();
        let vectors = WordVectors::of_texts(&texts, 64, 0);
        let cosine = |a: &str, b: &str| dot(vectors.get(a).unwrap(), vectors.get(b).unwrap());
        assert!(cosine("film", "movie") > cosine("film", "outside"));
        let near = Neighbours::new(vectors.clone(), 3, 0.1).unwrap();
        assert!(near.get("film").len() <= 3 && near.get("unheard").is_empty() && !near.get("film").contains(&"film"));
        let drawn = vectors.clone().retrofitted(&Synonyms::of_pairs([("film", "outside")]));
        let after = dot(drawn.get("film").unwrap(), drawn.get("outside").unwrap());
        assert!(after > cosine("film", "outside"));
        let similarity = Similarity::new(vectors);
        let words: Vec<&str> = texts[0].words().collect();
        assert!((similarity.of(&words, &words, 4, "film") - 1.0).abs() < 1e-6, "the same text, and no NaN");
        assert!(similarity.of(&words, &words, 4, "outside") < 1.0);
        assert_eq!(similarity.of(&["x"], &["x"], 0, "y"), 1.0);
    }
}
