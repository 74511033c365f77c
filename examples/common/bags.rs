//! Bags of words, and softmax regression over them, as linear controls for the experiments on text.
#![allow(dead_code)]

use std::collections::HashMap;

/// The features of a row: their numbers and values.
pub type Bag = Vec<(u32, f32)>;

/// The words of a text: once whole, and once with all digits replaced by one character and with letters separated from other characters.
pub fn words(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let mut all: Vec<String> = text.split_whitespace().map(|w| format!("={w}")).collect();
    let class = |c: char| {
        if c.is_ascii_digit() {
            0
        } else if c.is_alphabetic() {
            1
        } else {
            2
        }
    };
    let (mut word, mut last) = (String::new(), 3);
    for c in text.chars().chain([' ']) {
        let kind = if c.is_whitespace() { 3 } else { class(c) };
        if kind != last || kind == 2 {
            if !word.is_empty() {
                all.push(std::mem::take(&mut word));
            }
            last = kind;
        }
        if kind < 3 {
            word.push(if kind == 0 { '0' } else { c });
        }
    }
    all
}

/// Numbers of words. Words that are new after [`Words::freeze`] have none.
#[derive(Default)]
pub struct Words {
    ids: HashMap<String, u32>,
    frozen: bool,
}

impl Words {
    /// Stops the numbering of new words.
    pub fn freeze(&mut self) {
        self.frozen = true;
    }
    pub fn len(&self) -> usize {
        self.ids.len()
    }
    fn id(&mut self, word: &str) -> Option<u32> {
        if let Some(&id) = self.ids.get(word) {
            return Some(id);
        }
        let id = self.ids.len() as u32;
        (!self.frozen).then(|| {
            self.ids.insert(word.to_string(), id);
            id
        })
    }
    /// The number of occurrences of each word, by the word's number.
    pub fn counts<'a>(&mut self, words: impl Iterator<Item = &'a str>) -> Vec<(u32, u32)> {
        let ids: Vec<u32> = words.filter_map(|w| self.id(w)).collect();
        sums(ids.into_iter().map(|id| (id, 1)))
    }
}

/// Adds up the counts of each word.
pub fn sums(counts: impl Iterator<Item = (u32, u32)>) -> Vec<(u32, u32)> {
    let mut all: Vec<(u32, u32)> = counts.collect();
    all.sort_unstable_by_key(|c| c.0);
    all.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        kept.1 += if same { next.1 } else { 0 };
        same
    });
    all
}

/// A bag of length 1. Each word has the logarithm of its count, and `first` is added to its number.
pub fn bag(counts: &[(u32, u32)], first: u32) -> Bag {
    let mut bag: Bag = counts.iter().map(|&(id, n)| (first + id, 1.0 + (n as f32).ln())).collect();
    let length = bag.iter().map(|f| f.1 * f.1).sum::<f32>().sqrt().max(1e-12);
    bag.iter_mut().for_each(|f| f.1 /= length);
    bag
}

/// Softmax regression, trained by AdaGrad (Duchi et al. 2011), one row at a time.
pub struct Linear {
    weights: Vec<f32>,
    classes: usize,
}

impl Linear {
    /// Trains on the rows in a different order in each epoch. A step is `rate` divided by the root of the sum of squared gradients so far.
    pub fn train(
        rows: &[&Bag],
        labels: &[u32],
        (features, classes): (usize, usize),
        epochs: usize,
        rate: f32,
        seed: u64,
    ) -> Linear {
        let n = (features + 1) * classes;
        let (mut weights, mut squares) = (vec![0f32; n], vec![1e-6f32; n]);
        let mut p = vec![0f32; classes];
        for epoch in 0..epochs {
            for i in order(rows.len(), seed + epoch as u64) {
                scores(&weights, rows[i], classes, &mut p);
                let top = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                p.iter_mut().for_each(|p| *p = (*p - top).exp());
                let sum: f32 = p.iter().sum();
                p.iter_mut().for_each(|p| *p /= sum);
                p[labels[i] as usize] -= 1.0;
                for &(f, x) in rows[i].iter().chain(&[(features as u32, 1.0)]) {
                    let at = f as usize * classes;
                    let both = weights[at..at + classes].iter_mut().zip(&mut squares[at..at + classes]);
                    both.zip(&p).for_each(|((w, s), p)| {
                        let g = x * p;
                        *s += g * g;
                        *w -= rate * g / s.sqrt();
                    });
                }
            }
        }
        Linear { weights, classes }
    }
    /// The class with the largest score.
    pub fn class(&self, row: &Bag) -> u32 {
        let mut p = vec![0f32; self.classes];
        scores(&self.weights, row, self.classes, &mut p);
        (0..self.classes).fold(0, |best, c| if p[c] > p[best] { c } else { best }) as u32
    }
}

fn scores(weights: &[f32], row: &Bag, classes: usize, out: &mut [f32]) {
    let last = weights.len() - classes;
    out.copy_from_slice(&weights[last..]);
    for &(f, x) in row {
        let at = f as usize * classes;
        out.iter_mut().zip(&weights[at..at + classes]).for_each(|(o, w)| *o += x * w);
    }
}

/// The numbers 0..n in an order that depends on the seed.
fn order(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for i in (1..n).rev() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        order.swap(i, ((state >> 33) as usize) % (i + 1));
    }
    order
}

/// Two scores: the share of right predictions over all rows (micro F1, since each row has one class), and the mean F1 over the classes that
/// occur (macro F1).
pub fn f1(found: &[u32], wanted: &[u32], classes: usize) -> (f64, f64) {
    let (mut hit, mut said, mut is) = (vec![0f64; classes], vec![0f64; classes], vec![0f64; classes]);
    for (&f, &w) in found.iter().zip(wanted) {
        said[f as usize] += 1.0;
        is[w as usize] += 1.0;
        if f == w {
            hit[f as usize] += 1.0;
        }
    }
    let there: Vec<usize> = (0..classes).filter(|&c| is[c] > 0.0).collect();
    let one = |c: usize| 2.0 * hit[c] / (said[c] + is[c]);
    let micro = hit.iter().sum::<f64>() / wanted.len().max(1) as f64;
    (micro, there.iter().map(|&c| one(c)).sum::<f64>() / there.len().max(1) as f64)
}
