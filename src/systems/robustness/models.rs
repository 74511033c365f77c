//! Two small classifiers of texts: a bag of embeddings with one hidden layer, and an encoder of two transformer blocks.

use super::served::{Batch, TextModel};
use super::text::{Text, TextSet, counts};
use crate::autograd::no_grad;
use crate::base::{DType, Result};
use crate::io::{read_json, write_json};
use crate::kernels::Activation;
use crate::nn::{Ctx, Embedding, EmbeddingBag, Init, LayerNorm, Linear, Params, Strict, TransformerBlock};
use crate::ops::attention::Documents;
use crate::ops::segment::Segments;
use crate::{Array, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// A closed list of words. Id 0 is the unknown word.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    words: Vec<String>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    /// The words, in lower case, that occur in these texts at least `least` times, the most frequent first; at most `most` of them.
    pub fn of_texts(texts: &[Text], least: usize, most: usize) -> Vocabulary {
        let mut counts: Vec<(String, usize)> = counts(texts).into_iter().filter(|(_, n)| *n >= least).collect();
        counts.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        counts.truncate(most);
        Vocabulary::of_words(counts.into_iter().map(|(w, _)| w).collect())
    }
    /// A vocabulary of these words, with ids from 1.
    pub fn of_words(words: Vec<String>) -> Vocabulary {
        let ids = words.iter().enumerate().map(|(i, w)| (w.clone(), i as u32 + 1)).collect();
        Vocabulary { words, ids }
    }
    /// The id of a word; 0 if the vocabulary does not have it.
    pub fn id(&self, word: &str) -> u32 {
        match self.ids.get(word) {
            Some(&id) => id,
            None if word.chars().any(char::is_uppercase) => self.ids.get(&word.to_lowercase()).copied().unwrap_or(0),
            None => 0,
        }
    }
    /// Number of ids, including the unknown word's.
    pub fn len(&self) -> usize {
        self.words.len() + 1
    }
    /// Whether it has only the unknown word.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }
    /// The words of the ids from 1.
    pub fn words(&self) -> &[String] {
        &self.words
    }
}

/// The architecture of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// The mean of the words' embeddings, a hidden layer with ReLU, and the classes.
    Bag,
    /// Embeddings and positions, two pre-norm blocks with four heads, the mean over the words, and the classes.
    Encoder,
}

/// The most words that the encoder reads; later words are left out.
pub const MAX_WORDS: usize = 64;

/// Sizes of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Bag or encoder.
    pub architecture: Architecture,
    /// Width of the embeddings.
    pub width: usize,
    /// Width of the hidden layer; for the encoder, that of each block.
    pub hidden: usize,
    /// Names of the classes.
    pub classes: Vec<String>,
}

impl ModelConfig {
    /// A bag of embeddings of width 64 with 64 hidden units.
    pub fn bag(classes: &[String]) -> ModelConfig {
        ModelConfig { architecture: Architecture::Bag, width: 64, hidden: 64, classes: classes.to_vec() }
    }
    /// An encoder of width 64 with 128 hidden units in each block.
    pub fn encoder(classes: &[String]) -> ModelConfig {
        ModelConfig { architecture: Architecture::Encoder, width: 64, hidden: 128, classes: classes.to_vec() }
    }
}

enum Net {
    Bag { table: EmbeddingBag, hidden: Linear },
    Encoder { table: Embedding, positions: Embedding, blocks: Vec<TransformerBlock>, norm: LayerNorm },
}

/// A small classifier with its vocabulary.
pub struct Classifier {
    config: ModelConfig,
    vocabulary: Vocabulary,
    params: Params,
    net: Net,
    out: Linear,
}

/// The content of the file beside the parameters.
#[derive(Serialize, Deserialize)]
struct Described {
    model: ModelConfig,
    words: Vec<String>,
}

impl Classifier {
    /// A model whose initial values depend on `seed`.
    pub fn new(config: ModelConfig, vocabulary: Vocabulary, seed: u64) -> Result<Classifier> {
        let params = Params::new(seed, DType::F32);
        let (v, d) = (vocabulary.len(), config.width);
        let small = Init::Normal { std: 0.1 };
        let table = Embedding::builder(v, d).init(small).build(&params.at("table"))?;
        let (net, top) = match config.architecture {
            Architecture::Bag => {
                let table = EmbeddingBag::tied(table.weight().clone(), crate::ops::embedding::BagMode::Mean)?;
                (Net::Bag { table, hidden: Linear::new(&params.at("hidden"), d, config.hidden)? }, config.hidden)
            }
            Architecture::Encoder => {
                let positions = Embedding::builder(MAX_WORDS, d).init(small).build(&params.at("positions"))?;
                let block = |i: usize| {
                    TransformerBlock::builder(d, 4).hidden(config.hidden).build(&params.at(&format!("block.{i}")))
                };
                let blocks = (0..2).map(block).collect::<Result<_>>()?;
                (Net::Encoder { table, positions, blocks, norm: LayerNorm::new(&params.at("norm"), d)? }, d)
            }
        };
        let out = Linear::new(&params.at("out"), top, config.classes.len())?;
        Ok(Classifier { config, vocabulary, params, net, out })
    }
    /// Writes the model to a folder: `model.safetensors`, and `model.json` with the sizes and the vocabulary.
    pub fn save(&self, folder: impl AsRef<Path>, dtype: Option<DType>) -> Result<()> {
        let folder = folder.as_ref();
        crate::io::create_folder(folder)?;
        self.params.save_as(folder.join("model.safetensors"), dtype)?;
        let described = Described { model: self.config.clone(), words: self.vocabulary.words.clone() };
        write_json(folder.join("model.json"), &described)
    }
    /// Reads a folder that [`Classifier::save`] wrote.
    pub fn load(folder: impl AsRef<Path>) -> Result<Classifier> {
        let folder = folder.as_ref();
        let described: Described = read_json(folder.join("model.json"))?;
        let model = Classifier::new(described.model, Vocabulary::of_words(described.words), 0)?;
        model.params.load(folder.join("model.safetensors"), Strict::Yes)?;
        Ok(model)
    }
    /// Sizes and classes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
    /// The vocabulary.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }
    /// Ids and lengths of word sequences, for the encoder cut to [`MAX_WORDS`]. A sequence without words becomes one unknown word.
    pub(super) fn ids<'w>(&self, sequences: impl Iterator<Item = &'w [&'w str]>) -> (Vec<u32>, Vec<usize>) {
        let most = if self.config.architecture == Architecture::Encoder { MAX_WORDS } else { usize::MAX };
        let (mut ids, mut lengths) = (Vec::new(), Vec::new());
        for words in sequences {
            ids.extend(words.iter().take(most).map(|w| self.vocabulary.id(w)));
            if words.is_empty() {
                ids.push(0);
            }
            lengths.push(words.len().clamp(1, most));
        }
        (ids, lengths)
    }
    /// The embeddings `[words, width]` of ids.
    pub(super) fn embed(&self, ids: &[u32], lengths: &[usize], ctx: &Ctx) -> Result<Tensor> {
        let ctx = ctx.with_samples(Segments::lengths(lengths).samples());
        let weight = match &self.net {
            Net::Bag { table, .. } => table.weight(),
            Net::Encoder { table, .. } => table.weight(),
        };
        Embedding::tied(weight.clone())?.forward(Array::from_slice(ids, &[ids.len()])?, &ctx)
    }
    /// The logits `[sequences, classes]` of embeddings `[words, width]`.
    pub(super) fn on_embeddings(&self, x: &Tensor, lengths: &[usize], ctx: &Ctx) -> Result<Tensor> {
        let segments = Segments::lengths(lengths);
        match &self.net {
            Net::Bag { hidden, .. } => {
                let x = hidden.forward_act(&x.segment_mean(&segments)?, Activation::Relu, ctx)?;
                self.out.forward(&x, ctx)
            }
            Net::Encoder { positions, blocks, norm, .. } => {
                let rows = lengths.iter().sum::<usize>();
                let at: Vec<u32> = lengths.iter().flat_map(|n| 0..*n as u32).collect();
                let by_row = ctx.with_samples(segments.samples());
                let mut x = x.add(&positions.forward(Array::from_slice(&at, &[rows])?, &by_row)?)?;
                // The sequences become documents of one long sequence, so that there is no padding.
                x = x.reshape(&[1, rows, self.config.width])?;
                let packed = by_row.with_documents(Documents::packed(segments.offsets()));
                for block in blocks {
                    x = block.forward(&x, &packed)?;
                }
                let x = norm.forward(&x.reshape(&[rows, self.config.width])?, &by_row)?;
                self.out.forward(&x.segment_mean(&segments)?, ctx)
            }
        }
    }
    /// The logits `[sequences, classes]` of ids.
    pub(super) fn forward(&self, ids: &[u32], lengths: &[usize], ctx: &Ctx) -> Result<Tensor> {
        if let Net::Bag { table, hidden } = &self.net {
            let ids = Array::from_slice(ids, &[ids.len()])?;
            let x = table.forward_bags(ids, &Segments::lengths(lengths), None, ctx)?;
            return self.out.forward(&hidden.forward_act(&x, Activation::Relu, ctx)?, ctx);
        }
        self.on_embeddings(&self.embed(ids, lengths, ctx)?, lengths, ctx)
    }
    /// The predicted class of each text.
    pub fn predict(&self, texts: &[Text]) -> Result<Vec<u32>> {
        let served = super::served::Served::new(self);
        Ok(super::attack::answers(&served, texts, 1024)?.labels)
    }
    /// The share of texts whose predicted class is right.
    pub fn accuracy(&self, set: &TextSet) -> Result<f64> {
        let right = self.predict(&set.texts)?.iter().zip(&set.labels).filter(|(p, l)| p == l).count();
        Ok(right as f64 / set.len().max(1) as f64)
    }
}

impl TextModel for Classifier {
    fn classes(&self) -> usize {
        self.config.classes.len()
    }
    fn logits(&self, batch: &Batch) -> Result<Vec<f32>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let (ids, lengths) = self.ids((0..batch.len()).map(|i| batch.get(i)));
        no_grad(|| self.forward(&ids, &lengths, &Ctx::eval()))?.array().to_vec::<f32>()
    }
}
