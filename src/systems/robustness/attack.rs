//! Greedy word-substitution attacks, which run on all texts in parallel.
//!
//! 1. *Importance*: each word that may be changed is replaced by the unknown word (or left out), and the text is scored.
//! 2. *Search*: the words are visited from the most to the least important. Of a word's candidates the best one is taken if its score is
//!    **strictly** higher than the present one. The search ends when the model predicts another class, when no words or no queries are
//!    left, or when a limit on the changes is reached.
//!
//! The strict rule makes a badly calibrated model seem robust: where all candidates have the same score, no change is ever made. Of equal
//! importances, and of equal candidates, the first is taken.
//!
//! - PWWS (Ren et al. 2019): a word's importance is softmax(saliency) × the best score among its synonyms.
//! - TextFooler (Jin et al. 2020), without its taggers and encoders: importance by leaving words out; candidates are near words of a vector
//!   space.
//! - DeepWordBug (Gao et al. 2018), as black-box tools run it: importance by the unknown word; four small misspellings of each word.

use super::score::{Lens, Precision, Score};
use super::served::{Answers, Batch, Served};
use super::text::{Text, TextSet, UNK, hash, is_stop_word, spread};
use super::vectors::{Neighbours, Similarity};
use super::words::{Synonyms, WordClasses};
use crate::base::{Error, Result, philox};

/// A source of candidates for the replacement of a word.
pub trait Transformation: Sync {
    /// Candidates for word `at` of an original text, in a fixed order.
    fn candidates(&self, words: &[&str], at: usize) -> Vec<String>;
}

impl Transformation for Synonyms {
    fn candidates(&self, words: &[&str], at: usize) -> Vec<String> {
        self.get(&words[at].to_lowercase()).to_vec()
    }
}

/// Four misspellings of a word: two neighbouring letters swapped, a letter replaced, one left out, one added. The letters are drawn for
/// each text, word and place, so that a text has the same candidates with the same seed, in every batch.
#[derive(Clone, Copy, Debug)]
pub struct Misspellings {
    /// The seed.
    pub seed: u64,
}

impl Transformation for Misspellings {
    fn candidates(&self, words: &[&str], at: usize) -> Vec<String> {
        let letters: Vec<char> = words[at].chars().collect();
        let n = letters.len() as u64;
        let stream = spread(hash(&words.join(" "))) ^ at as u64;
        let below = |i: u64, n: u64| philox::bits(self.seed, stream, i) % n.max(1);
        let letter = |i: u64| (b'a' + below(i, 26) as u8) as char;
        let mut found = Vec::with_capacity(4);
        if n >= 2 {
            let (mut swapped, i) = (letters.clone(), below(0, n - 1) as usize);
            swapped.swap(i, i + 1);
            found.push(swapped);
        }
        let mut replaced = letters.clone();
        replaced[below(1, n) as usize] = letter(2);
        found.push(replaced);
        if n >= 2 {
            let mut shorter = letters.clone();
            shorter.remove(below(3, n) as usize);
            found.push(shorter);
        }
        let mut longer = letters.clone();
        longer.insert(below(4, n + 1) as usize, letter(5));
        found.push(longer);
        found.into_iter().map(|w| w.into_iter().collect()).collect()
    }
}

/// How the words of a text are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Importance {
    /// The score with the unknown word in the word's place.
    Unknown,
    /// The score without the word.
    Delete,
    /// PWWS: the softmax, over the words, of the score with the unknown word, times the best score among the word's candidates.
    Saliency,
}

/// An attack: its candidates, the order of words, its limits and its score.
#[derive(Clone)]
pub struct Attack<'a> {
    name: &'static str,
    transformation: &'a dyn Transformation,
    importance: Importance,
    budget: usize,
    max_changed: f64,
    max_edits: usize,
    classes: Option<&'a WordClasses>,
    similarity: Option<(&'a Similarity, f64)>,
    lens: Lens,
    batch: usize,
}

/// How an attack on a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The model had the class wrong before anything was changed, so there was no search.
    WrongFromStart,
    /// The model predicts another class for a changed text.
    Broken,
    /// The model still predicts the right class.
    Stood,
    /// No word may be changed (only stop words, or no candidates), so the right class stays.
    Unchangeable,
}

/// The result of an attack on a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// How the attack ended.
    pub outcome: Outcome,
    /// The words at the end; the original words where nothing was changed.
    pub words: Vec<String>,
    /// The positions of the changed words, in the order of the search.
    pub changed: Vec<usize>,
    /// Number of texts that the model was queried with, including the original.
    pub queries: usize,
    /// Whether some candidates were not tried because the budget was spent.
    pub out_of_budget: bool,
    /// The predicted class of the text at the end.
    pub label: u32,
    /// Number of search steps in which the best candidate had exactly the present score.
    pub ties: usize,
    /// Number of search steps.
    pub steps: usize,
}

impl Found {
    /// The text at the end, with the spaces and punctuation of the original.
    pub fn text(&self, original: &Text) -> Text {
        Text::new(original.with_words(&self.words))
    }
}

impl<'a> Attack<'a> {
    /// An attack made of its parts. By default it leaves stop words alone, has a budget of 2,000 queries, no limit on the share of changed
    /// words, the score of common tools (probability in f32), and batches of 4,096 texts.
    pub fn new(name: &'static str, transformation: &'a dyn Transformation, importance: Importance) -> Attack<'a> {
        Attack {
            name,
            transformation,
            importance,
            budget: 2000,
            max_changed: 1.0,
            max_edits: usize::MAX,
            classes: None,
            similarity: None,
            lens: Lens::new(Score::Probability(Precision::F32)),
            batch: 4096,
        }
    }
    /// PWWS with these synonyms.
    pub fn pwws(synonyms: &'a Synonyms) -> Attack<'a> {
        Attack::new("PWWS", synonyms, Importance::Saliency)
    }
    /// DeepWordBug: misspellings, with an edit distance of at most 30 in a text.
    pub fn deep_word_bug(misspellings: &'a Misspellings) -> Attack<'a> {
        Attack { max_edits: 30, ..Attack::new("DeepWordBug", misspellings, Importance::Unknown) }
    }
    /// An attack like TextFooler: up to 50 near words of a vector space, where the changed text must stay near the original (0.8408, the
    /// threshold of the published attack; its sentence encoder is replaced by [`Similarity`]).
    pub fn text_fooler(neighbours: &'a Neighbours, similarity: &'a Similarity) -> Attack<'a> {
        Attack {
            similarity: Some((similarity, 0.8408)),
            ..Attack::new("TextFooler-like", neighbours, Importance::Delete)
        }
    }
    /// Sets the number of queries per text, including the original.
    pub fn budget(mut self, queries: usize) -> Self {
        self.budget = queries;
        self
    }
    /// Sets the score that the attack maximises, on the served logits without a temperature; probability in f32 if not given.
    pub fn score(self, score: Score) -> Self {
        self.lens(Lens::new(score))
    }
    /// Sets the score that the attack maximises, with a temperature of the attacker.
    pub fn lens(mut self, lens: Lens) -> Self {
        self.lens = lens;
        self
    }
    /// Sets the largest share of the words of a text that may be changed.
    pub fn max_changed(mut self, share: f64) -> Self {
        self.max_changed = share;
        self
    }
    /// Sets the largest sum of edit distances between the changed words and the originals.
    pub fn max_edits(mut self, edits: usize) -> Self {
        self.max_edits = edits;
        self
    }
    /// Restricts candidates to words that can have a word class of the original.
    pub fn same_class(mut self, classes: &'a WordClasses) -> Self {
        self.classes = Some(classes);
        self
    }
    /// Requires a similarity of at least `least` between the changed text and the original.
    pub fn similar(mut self, similarity: &'a Similarity, least: f64) -> Self {
        self.similarity = Some((similarity, least));
        self
    }
    /// Sets the number of texts in a call of the model. Results do not depend on it.
    pub fn batch_size(mut self, texts: usize) -> Self {
        self.batch = texts;
        self
    }
    /// The name of the attack.
    pub fn name(&self) -> &'static str {
        self.name
    }
    /// The score that the attack maximises.
    pub fn served_lens(&self) -> Lens {
        self.lens
    }
    /// The candidates for word `at` of a text: those of the transformation, without the word itself, without repetitions, and only those
    /// with a fitting word class. A capital first letter is kept.
    pub fn candidates(&self, words: &[&str], at: usize) -> Vec<String> {
        let word = words[at];
        let small = word.to_lowercase();
        if is_stop_word(&small) {
            return Vec::new();
        }
        let capital = word.chars().next().is_some_and(char::is_uppercase);
        let mut found: Vec<String> = Vec::new();
        for candidate in self.transformation.candidates(words, at) {
            let fits = self.classes.is_none_or(|c| c.fit(&small, &candidate));
            let candidate = if capital { capitalised(&candidate) } else { candidate };
            // A candidate that is not a single word would change the number of words.
            let single = Text::new(&candidate[..]);
            let single = single.words().next() == Some(&candidate[..]) && single.len() == 1;
            if fits && single && candidate != word && !found.contains(&candidate) {
                found.push(candidate);
            }
        }
        found
    }
    /// Attacks every text of a set against a served model. Fails if the model returns no scores, or values that are not finite.
    pub fn run(&self, served: &Served, set: &TextSet) -> Result<Vec<Found>> {
        self.check(served)?;
        if let Some(&label) = set.labels.iter().find(|l| **l as usize >= served.classes()) {
            let message =
                format!("a text has the label {label}, and the model has {} classes, from 0", served.classes());
            return Err(Error::invalid("attack", message));
        }
        let mut searches: Vec<Search> =
            set.texts.iter().zip(&set.labels).map(|(t, &l)| Search::new(self, t, l)).collect();
        let mut scratch = Vec::new();
        loop {
            // The queries of all texts, as (search, query) pairs, in batches.
            let asked: Vec<(usize, usize)> = searches
                .iter()
                .enumerate()
                .flat_map(|(s, search)| (0..search.questions.len()).map(move |q| (s, q)))
                .collect();
            if asked.is_empty() {
                break;
            }
            let mut scores: Vec<Vec<(f64, u32)>> =
                searches.iter().map(|s| Vec::with_capacity(s.questions.len())).collect();
            for part in asked.chunks(self.batch.max(1)) {
                let mut batch = Batch::new();
                part.iter().for_each(|&(s, q)| searches[s].put(&searches[s].questions[q], &mut batch));
                let answers = served.answer(&batch)?;
                for (i, &(s, _)) in part.iter().enumerate() {
                    let score = self.lens.score(&answers, i, searches[s].label, &mut scratch);
                    scores[s].push((score, answers.labels[i]));
                }
            }
            for (search, scores) in searches.iter_mut().zip(&scores).filter(|(s, _)| !s.questions.is_empty()) {
                search.take(self, scores);
            }
        }
        Ok(searches.into_iter().map(Search::end).collect())
    }
    /// For each lens and each text, the scores of the changeable words replaced by the unknown word, minus the score of the text. The order
    /// of a search is made of these. A text has an empty list if the model is wrong from the start.
    pub fn importances(&self, served: &Served, set: &TextSet, lenses: &[Lens]) -> Result<Vec<Vec<Vec<f64>>>> {
        self.check(served)?;
        let mut out = Vec::with_capacity(set.len());
        let mut scratch = Vec::new();
        for (text, &label) in set.texts.iter().zip(&set.labels) {
            let words: Vec<&str> = text.words().collect();
            let places = (0..words.len()).filter(|&at| !is_stop_word(&words[at].to_lowercase()));
            let mut batch = Batch::new();
            batch.push(words.iter().copied());
            for at in places {
                batch.push(words.iter().enumerate().map(|(i, w)| if i == at { UNK } else { w }));
            }
            let answers = served.answer(&batch)?;
            let right = answers.labels[0] == label;
            let mut of = |lens: &Lens| -> Vec<f64> {
                let scores: Vec<f64> = (0..batch.len()).map(|i| lens.score(&answers, i, label, &mut scratch)).collect();
                scores[1..].iter().map(|s| s - scores[0]).collect()
            };
            out.push(if right { lenses.iter().map(&mut of).collect() } else { Vec::new() });
        }
        Ok(out)
    }
    fn check(&self, served: &Served) -> Result<()> {
        if served.served_output() == super::served::Output::Labels {
            let message = "not evaluable: the model serves classes alone, which give a search nothing to climb; serve logits or \
                           probabilities to this evaluation";
            return Err(Error::invalid("attack", message));
        }
        if !(self.lens.temperature.is_finite() && self.lens.temperature > 0.0) {
            let message = format!("the attacker's temperature {} must be a positive number", self.lens.temperature);
            return Err(Error::invalid("attack", message));
        }
        if self.budget == 0 || !(self.max_changed > 0.0 && self.max_changed <= 1.0) {
            let message = format!(
                "a budget of {} queries and a share of {} changed words; there must be at least one query, and the share must lie in (0, 1]",
                self.budget, self.max_changed
            );
            return Err(Error::invalid("attack", message));
        }
        if let Some((_, least)) = self.similarity.filter(|(_, least)| !(0.0..=1.0).contains(least)) {
            let message = format!("a similarity of at least {least}; it must lie in [0, 1]");
            return Err(Error::invalid("attack", message));
        }
        Ok(())
    }
}

fn capitalised(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}

/// The edit distance: the smallest number of letters to be replaced, left out or added (Levenshtein).
pub(super) fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let best = (corner + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = std::mem::replace(&mut row[j + 1], best);
        }
    }
    row[b.len()]
}

/// A query to the model: the present text with at most one change.
enum Question {
    /// Without a change.
    Present,
    /// Without the word at a position.
    Without(usize),
    /// With another word at a position.
    With(usize, String),
}

/// The stage of the search that the answers are for.
#[derive(PartialEq)]
enum Stage {
    Start,
    Importance,
    Greedy,
    Done,
}

/// The search for one text.
struct Search<'t> {
    text: &'t Text,
    original: Vec<&'t str>,
    words: Vec<String>,
    label: u32,
    stage: Stage,
    questions: Vec<Question>,
    /// Positions that may be changed, with their candidates.
    places: Vec<(usize, Vec<String>)>,
    /// Indices of `places`, with the most important first, and the number that have been visited.
    order: Vec<usize>,
    visited: usize,
    score: f64,
    edits: usize,
    found: Found,
    budget: usize,
}

impl<'t> Search<'t> {
    fn new(attack: &Attack, text: &'t Text, label: u32) -> Search<'t> {
        let original: Vec<&str> = text.words().collect();
        let candidates = |at| (at, attack.candidates(&original, at));
        // As in the published attacks, a word without candidates is ordered among the others and skipped in the search.
        let places = (0..original.len()).filter(|&at| !is_stop_word(&original[at].to_lowercase())).map(candidates);
        let places: Vec<(usize, Vec<String>)> = places.collect();
        let words: Vec<String> = original.iter().map(|w| w.to_string()).collect();
        let found = Found {
            outcome: Outcome::Stood,
            words: Vec::new(),
            changed: Vec::new(),
            queries: 0,
            out_of_budget: false,
            label,
            ties: 0,
            steps: 0,
        };
        let mut search = Search {
            text,
            original,
            words,
            label,
            stage: Stage::Start,
            questions: Vec::new(),
            places,
            order: Vec::new(),
            visited: 0,
            score: 0.0,
            edits: 0,
            found,
            budget: attack.budget,
        };
        search.ask(vec![Question::Present]);
        search
    }
    /// Sets the next queries, as many of them as the budget allows.
    fn ask(&mut self, mut questions: Vec<Question>) {
        let left = self.budget - self.found.queries;
        if questions.len() > left {
            questions.truncate(left);
            self.found.out_of_budget = true;
        }
        self.found.queries += questions.len();
        self.questions = questions;
    }
    /// Adds the words of a query to a batch.
    fn put<'s>(&'s self, question: &'s Question, batch: &mut Batch<'s>) {
        let words = || self.words.iter().map(String::as_str);
        match question {
            Question::Present => batch.push(words()),
            Question::Without(at) => batch.push(words().enumerate().filter(|(i, _)| i != at).map(|(_, w)| w)),
            Question::With(at, new) => batch.push(words().enumerate().map(|(i, w)| if i == *at { new } else { w })),
        }
    }
    /// Processes the answers to the queries and sets the next ones, or ends.
    fn take(&mut self, attack: &Attack, answers: &[(f64, u32)]) {
        match self.stage {
            Stage::Start => {
                (self.score, self.found.label) = answers[0];
                if self.found.label != self.label {
                    self.found.outcome = Outcome::WrongFromStart;
                    return self.stop();
                }
                if self.places.iter().all(|(_, c)| c.is_empty()) {
                    self.found.outcome = Outcome::Unchangeable;
                }
                self.ask_importance(attack);
                if self.questions.is_empty() {
                    self.stop();
                }
            }
            Stage::Importance => {
                self.order_places(attack, answers);
                self.next(attack);
            }
            Stage::Greedy => {
                self.step(answers);
                if self.stage == Stage::Greedy {
                    self.next(attack);
                }
            }
            Stage::Done => {}
        }
    }
    fn ask_importance(&mut self, attack: &Attack) {
        self.stage = Stage::Importance;
        let places = self.places.iter().map(|p| p.0);
        let mut questions: Vec<Question> = match attack.importance {
            Importance::Delete => places.map(Question::Without).collect(),
            _ => places.map(|at| Question::With(at, UNK.to_string())).collect(),
        };
        if attack.importance == Importance::Saliency {
            for (at, candidates) in &self.places {
                questions.extend(self.allowed(attack, *at, candidates).map(|c| Question::With(*at, c.clone())));
            }
        }
        self.ask(questions);
    }
    /// Orders the positions by the answers. Positions that the budget did not reach come last.
    fn order_places(&mut self, attack: &Attack, answers: &[(f64, u32)]) {
        let n = self.places.len();
        let mut importance: Vec<f64> = (0..n).map(|i| answers.get(i).map_or(f64::NEG_INFINITY, |a| a.0)).collect();
        if attack.importance == Importance::Saliency {
            let mut best = vec![f64::NEG_INFINITY; n];
            for (question, answer) in self.questions.iter().zip(answers).skip(n) {
                let Question::With(at, _) = question else { continue };
                let i = self.places.partition_point(|p| p.0 < *at);
                best[i] = best[i].max(answer.0);
            }
            match attack.lens.score {
                // As in common tools, this uses scores and not differences of scores. A word without candidates has 0.
                Score::Probability(_) => {
                    best.iter_mut().filter(|b| b.is_infinite()).for_each(|b| *b = 0.0);
                }
                // Other scores have no natural zero, so differences are used. Those of the margin are divided by the largest, so that no
                // temperature changes the order.
                other => {
                    let gain = |s: &mut f64| *s = if s.is_finite() { *s - self.score } else { 0.0 };
                    importance.iter_mut().chain(&mut best).for_each(gain);
                    let largest = importance.iter().fold(0f64, |m, s| m.max(s.abs()));
                    if other == Score::Margin && largest > 0.0 {
                        importance.iter_mut().chain(&mut best).for_each(|s| *s /= largest);
                    }
                }
            }
            // This is computed in f32, as in the published attack.
            let known = importance.iter().filter(|s| s.is_finite());
            let largest = known.fold(f32::NEG_INFINITY, |m, s| m.max(*s as f32));
            let exp: Vec<f32> = importance.iter().map(|s| (*s as f32 - largest).exp()).collect();
            let sum: f32 = exp.iter().sum();
            importance = exp.iter().zip(&best).map(|(e, b)| f64::from(e / sum) * b).collect();
        }
        self.order = (0..n).collect();
        self.order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]));
    }
    /// The candidates at a position of the present text that the limits of the attack allow.
    fn allowed<'s>(
        &'s self,
        attack: &'s Attack,
        at: usize,
        candidates: &'s [String],
    ) -> impl Iterator<Item = &'s String> {
        let room = ((self.found.changed.len() + 1) as f64) <= (attack.max_changed * self.words.len() as f64).max(1.0);
        let present: Vec<&str> = self.words.iter().map(String::as_str).collect();
        candidates.iter().filter(move |c| {
            let near =
                |(similarity, least): (&Similarity, f64)| similarity.of(&self.original, &present, at, c) >= least;
            room && (attack.max_edits == usize::MAX
                || self.edits + edit_distance(self.original[at], c) <= attack.max_edits)
                && attack.similarity.is_none_or(near)
        })
    }
    /// Queries the candidates of the next position that has any.
    fn next(&mut self, attack: &Attack) {
        self.stage = Stage::Greedy;
        while self.visited < self.order.len() && self.found.queries < self.budget {
            let (at, candidates) = &self.places[self.order[self.visited]];
            let questions: Vec<Question> =
                self.allowed(attack, *at, candidates).map(|c| Question::With(*at, c.clone())).collect();
            self.visited += 1;
            if !questions.is_empty() {
                return self.ask(questions);
            }
        }
        self.found.out_of_budget |= self.visited < self.order.len();
        self.stop();
    }
    /// Takes the best candidate if it is strictly better.
    fn step(&mut self, answers: &[(f64, u32)]) {
        let best = (1..answers.len()).fold(0, |best, i| if answers[i].0 > answers[best].0 { i } else { best });
        let (score, label) = answers[best];
        self.found.steps += 1;
        self.found.ties += usize::from(score == self.score);
        if score > self.score {
            let Question::With(at, word) = self.questions.swap_remove(best) else { return };
            self.edits += edit_distance(self.original[at], &word);
            self.words[at] = word;
            self.found.changed.push(at);
            (self.score, self.found.label) = (score, label);
            if label != self.label {
                self.found.outcome = Outcome::Broken;
                self.stop();
            }
        }
    }
    fn stop(&mut self) {
        self.questions.clear();
        self.stage = Stage::Done;
    }
    fn end(self) -> Found {
        debug_assert_eq!(self.text.len(), self.words.len());
        Found { words: self.words, ..self.found }
    }
}

/// The share of texts whose right class is still predicted after an attack, over all texts (those wrong from the start count as wrong) and
/// over those that were right at first.
pub fn accuracy_under_attack(found: &[Found]) -> (f64, f64) {
    let stood = found.iter().filter(|f| matches!(f.outcome, Outcome::Stood | Outcome::Unchangeable)).count() as f64;
    let right = found.iter().filter(|f| f.outcome != Outcome::WrongFromStart).count() as f64;
    (stood / found.len().max(1) as f64, if right > 0.0 { stood / right } else { 0.0 })
}

/// The answers to all texts of a set, in batches.
pub(super) fn answers(served: &Served, texts: &[Text], batch: usize) -> Result<Answers> {
    let mut all = Answers { classes: served.classes(), labels: Vec::new(), probabilities: false, values: Vec::new() };
    for part in texts.chunks(batch.max(1)) {
        let answers = served.answer(&Batch::of_texts(part))?;
        all.labels.extend(answers.labels);
        all.values.extend(answers.values);
        all.probabilities = answers.probabilities;
    }
    Ok(all)
}
