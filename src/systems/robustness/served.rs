//! Text classifiers, and the form in which they are served: the logits divided by a temperature, or probabilities, rounded or not.

use super::text::Text;
use crate::base::{DType, Error, Result};
use half::{bf16, f16};

/// Word sequences of any lengths, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Batch<'a> {
    words: Vec<&'a str>,
    ends: Vec<usize>,
}

impl<'a> Batch<'a> {
    /// A batch without sequences.
    pub fn new() -> Batch<'a> {
        Batch::default()
    }
    /// A batch with the words of each text as a sequence.
    pub fn of_texts(texts: &'a [Text]) -> Batch<'a> {
        let mut batch = Batch::new();
        texts.iter().for_each(|t| batch.push(t.words()));
        batch
    }
    /// Adds a sequence.
    pub fn push(&mut self, words: impl IntoIterator<Item = &'a str>) {
        self.words.extend(words);
        self.ends.push(self.words.len());
    }
    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.ends.len()
    }
    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
    /// The words of sequence i.
    pub fn get(&self, i: usize) -> &[&'a str] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.words[start..self.ends[i]]
    }
    /// The words of all sequences, one after the other.
    pub fn words(&self) -> &[&'a str] {
        &self.words
    }
    /// The number of words of each sequence.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.len()).map(|i| self.get(i).len()).collect()
    }
}

/// A classifier of texts. The logits of a sequence may depend only on its own words, so that results do not depend on the rest of the
/// batch.
pub trait TextModel {
    /// Number of classes.
    fn classes(&self) -> usize;
    /// The logits of each sequence, `[sequences, classes]`, row by row.
    fn logits(&self, batch: &Batch) -> Result<Vec<f32>>;
}

/// The form of a served model's answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Output {
    /// The logits, divided by the temperature.
    Logits,
    /// Their softmax, computed in f32 and then rounded to this dtype: f32, f16 or bf16.
    Probabilities(DType),
    /// Only the class.
    Labels,
}

/// A model in the form in which it is served.
pub struct Served<'a> {
    model: &'a dyn TextModel,
    temperature: f64,
    output: Output,
    second_softmax: bool,
}

/// The answers to a batch.
pub struct Answers {
    /// Number of classes.
    pub classes: usize,
    /// The class of each sequence, which is the first of the model's largest logits before anything is scaled or rounded.
    pub labels: Vec<u32>,
    /// Whether `values` are probabilities; logits otherwise.
    pub probabilities: bool,
    /// `[sequences, classes]`, row by row; empty if only classes are served.
    pub values: Vec<f64>,
}

impl Answers {
    /// The values of sequence i.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.classes..(i + 1) * self.classes]
    }
}

impl<'a> Served<'a> {
    /// A model that serves its logits unchanged.
    pub fn new(model: &'a dyn TextModel) -> Served<'a> {
        Served { model, temperature: 1.0, output: Output::Logits, second_softmax: false }
    }
    /// Divides the logits by this temperature: below 1 the model looks more confident than it is, above 1 less. No predicted class changes.
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }
    /// Sets the form of the answers; logits if not given.
    pub fn output(mut self, output: Output) -> Self {
        self.output = output;
        self
    }
    /// Applies a second softmax to the probabilities, like a tool that takes them for logits.
    pub fn second_softmax(mut self) -> Self {
        self.second_softmax = true;
        self
    }
    /// The temperature.
    pub fn served_temperature(&self) -> f64 {
        self.temperature
    }
    /// The form of the answers.
    pub fn served_output(&self) -> Output {
        self.output
    }
    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.model.classes()
    }
    /// The answers to a batch. Fails if the temperature is not positive, or if the model returns a value that is not finite.
    pub fn answer(&self, batch: &Batch) -> Result<Answers> {
        let op = "served model";
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::invalid(op, format!("temperature {} must be a positive number", self.temperature)));
        }
        let classes = self.model.classes();
        let logits = self.model.logits(batch)?;
        if classes < 2 || logits.len() != batch.len() * classes {
            let message = format!(
                "{} logits for {} texts and {classes} classes; give two or more each",
                logits.len(),
                batch.len()
            );
            return Err(Error::shape(op, message));
        }
        if let Some(at) = logits.iter().position(|l| !l.is_finite()) {
            let text: Vec<&str> = batch.get(at / classes).iter().take(12).copied().collect();
            let message = format!(
                "not evaluable: the model's logit of class {} is {} for the text {:?}; look for a division by zero or an overflow \
                 in the model",
                at % classes,
                logits[at],
                text.join(" ")
            );
            return Err(Error::invalid(op, message));
        }
        let labels = logits.chunks_exact(classes).map(first_largest).collect();
        let mut values: Vec<f64> = logits.iter().map(|&l| f64::from(l) / self.temperature).collect();
        let mut probabilities = false;
        match self.output {
            Output::Labels => values.clear(),
            Output::Logits => {}
            Output::Probabilities(dtype) => {
                values.chunks_exact_mut(classes).for_each(softmax_f32);
                round(&mut values, dtype)?;
                probabilities = true;
            }
        }
        if self.second_softmax {
            if !probabilities {
                values.chunks_exact_mut(classes).for_each(softmax_f32);
            }
            values.chunks_exact_mut(classes).for_each(softmax_f32);
            probabilities = true;
        }
        Ok(Answers { classes, labels, probabilities, values })
    }
}

/// The first position of the largest value.
pub(super) fn first_largest(row: &[f32]) -> u32 {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}

/// Softmax of one row in f32, the precision of common tools.
pub(super) fn softmax_f32(row: &mut [f64]) {
    let largest = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x as f32));
    let exp: Vec<f32> = row.iter().map(|x| (*x as f32 - largest).exp()).collect();
    let sum: f32 = exp.iter().sum();
    row.iter_mut().zip(&exp).for_each(|(x, e)| *x = f64::from(e / sum));
}

/// Softmax of one row in f64.
pub(super) fn softmax_f64(row: &mut [f64]) {
    let largest = row.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
    row.iter_mut().for_each(|x| *x = (*x - largest).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

fn round(values: &mut [f64], dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 => {}
        DType::F16 => values.iter_mut().for_each(|x| *x = f16::from_f64(*x).to_f64()),
        DType::BF16 => values.iter_mut().for_each(|x| *x = bf16::from_f64(*x).to_f64()),
        other => return Err(Error::dtype("served model", format!("probabilities cannot be served as {other}"))),
    }
    Ok(())
}
