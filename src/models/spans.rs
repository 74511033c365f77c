//! Attention spans by layer, and their cost: full attention in a few layers and a narrow span in the others, as in MASFormer (Zhang et al.
//! 2023, "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer").

use super::GptConfig;
use crate::base::{Error, Result};
use crate::ops::attention::Span;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which layers of a model have full causal attention; the others have a sparse span. Layers are counted from the input.
///
/// As text: `full`, `sparse`, `bottom(2)`, `top(2)`, `middle(2)`, `spread(2)`, `first_middle_last`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// All layers are full.
    Full,
    /// No layer is full.
    Sparse,
    /// The first l layers.
    Bottom(usize),
    /// The last l layers.
    Top(usize),
    /// l neighbouring layers with as many layers before as after them (one fewer before, if the number is odd).
    Middle(usize),
    /// l layers at equal distances: of L layers, layer ⌊(2i + 1)·L/2l⌋ for i below l.
    Spread(usize),
    /// The first layer, the middle one ⌊L/2⌋, and the last.
    FirstMiddleLast,
    /// A list with the span of each layer.
    List(Vec<Span>),
}

impl Preset {
    /// Whether layer `i` of `layers` is full.
    fn is_full(&self, i: usize, layers: usize) -> bool {
        match *self {
            Preset::Full => true,
            Preset::Sparse | Preset::List(_) => false,
            Preset::Bottom(l) => i < l,
            Preset::Top(l) => i + l >= layers,
            Preset::Middle(l) => ((layers - l) / 2..(layers - l) / 2 + l).contains(&i),
            Preset::Spread(l) => (0..l).any(|k| (2 * k + 1) * layers / (2 * l) == i),
            Preset::FirstMiddleLast => i == 0 || i == layers / 2 || i + 1 == layers,
        }
    }
    /// The number of full layers, if the preset has it as a number.
    fn count(&self) -> Option<usize> {
        match *self {
            Preset::Bottom(l) | Preset::Top(l) | Preset::Middle(l) | Preset::Spread(l) => Some(l),
            _ => None,
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Preset::Full => f.write_str("full"),
            Preset::Sparse => f.write_str("sparse"),
            Preset::Bottom(l) => write!(f, "bottom({l})"),
            Preset::Top(l) => write!(f, "top({l})"),
            Preset::Middle(l) => write!(f, "middle({l})"),
            Preset::Spread(l) => write!(f, "spread({l})"),
            Preset::FirstMiddleLast => f.write_str("first_middle_last"),
            Preset::List(spans) => write!(f, "{spans:?}"),
        }
    }
}

impl FromStr for Preset {
    type Err = Error;
    fn from_str(text: &str) -> Result<Preset> {
        let unknown = || {
            let known = "full, sparse, bottom(l), top(l), middle(l), spread(l) and first_middle_last";
            Error::invalid("Preset", format!("{text:?} is no preset of spans; known are {known}"))
        };
        let (name, number) = match text.strip_suffix(')').and_then(|t| t.split_once('(')) {
            Some((name, l)) => (name, Some(l.parse().map_err(|_| unknown())?)),
            None => (text, None),
        };
        Ok(match (name, number) {
            ("full", None) => Preset::Full,
            ("sparse", None) => Preset::Sparse,
            ("bottom", Some(l)) => Preset::Bottom(l),
            ("top", Some(l)) => Preset::Top(l),
            ("middle", Some(l)) => Preset::Middle(l),
            ("spread", Some(l)) => Preset::Spread(l),
            ("first_middle_last", None) => Preset::FirstMiddleLast,
            _ => return Err(unknown()),
        })
    }
}

/// The span of each of `layers` layers: causal where the preset has a full layer, else `sparse`.
///
/// ```
/// use prismgrad::models::{Preset, spans};
/// use prismgrad::ops::attention::Span::{Block, Causal};
/// assert_eq!(spans(&Preset::Spread(2), 4, Block(64))?, [Block(64), Causal, Block(64), Causal]);
/// # Ok::<(), prismgrad::Error>(())
/// ```
pub fn spans(preset: &Preset, layers: usize, sparse: Span) -> Result<Vec<Span>> {
    let bad = |message: String| Err(Error::invalid("spans", message));
    if let Preset::List(list) = preset {
        if list.len() != layers {
            return bad(format!("{} spans for {layers} layers", list.len()));
        }
        list.iter().try_for_each(|s| s.validate())?;
        return Ok(list.clone());
    }
    sparse.validate()?;
    if let Some(l) = preset.count().filter(|l| *l > layers) {
        return bad(format!("{preset} asks for {l} full layers of {layers}"));
    }
    Ok((0..layers).map(|i| if preset.is_full(i, layers) { Span::Causal } else { sparse }).collect())
}

/// The cost of a model for one sequence of a given length, in f32.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SpanCost {
    /// Number of (query, key) pairs of one head, in each layer.
    pub pairs: Vec<u64>,
    /// FLOPs of a forward pass for scores and weighted sums of values: 4 · pairs · n_embd, summed over the layers. A backward pass takes
    /// 2.5 times as many.
    pub attention_flops: u64,
    /// FLOPs of all matrix products of a forward pass: attention, projections, hidden layers and the output head. A backward pass takes
    /// twice as many for all but attention.
    pub model_flops: u64,
    /// Bytes of keys and values for a generation of this length. Each layer holds as many positions as its span sees, at most all.
    pub cache_bytes: usize,
    /// Bytes that a training step without dropout keeps from its forward pass for its backward pass. They are linear in the number of
    /// tokens whatever the spans, since scores are never kept. A mixture of experts counts as an MLP of the experts that a token is sent
    /// to.
    pub activation_bytes: usize,
}

impl SpanCost {
    /// The shares of the FLOPs of the model `of` that this one saves: of attention alone, and of the whole model.
    pub fn saved(&self, of: &SpanCost) -> (f64, f64) {
        let share = |a: u64, b: u64| 1.0 - a as f64 / (b as f64).max(1.0);
        (share(self.attention_flops, of.attention_flops), share(self.model_flops, of.model_flops))
    }
}

/// The cost of a model of this configuration for a sequence of `tokens` tokens, by its spans.
pub fn span_cost(c: &GptConfig, tokens: usize) -> SpanCost {
    let (d, kv) = (c.n_embd as u64, (c.kv_heads() * c.head()) as u64);
    let spans: Vec<Span> = (0..c.n_layer).map(|i| c.span(i)).collect();
    let pairs: Vec<u64> = spans.iter().map(|s| s.pairs(tokens)).collect();
    let attention_flops = 4 * d * pairs.iter().sum::<u64>();
    // `met` is the number of weights that a token is multiplied by, and `kept` the number of elements that are kept per token.
    let (mut met, mut kept) = (c.vocab_size as u64 * d, 2 * d + 3 + c.vocab_size as u64);
    for i in 0..c.n_layer {
        let (feed, hidden) = match c.moe.as_ref().and_then(|m| m.get(i).copied().flatten()) {
            Some(moe) => (moe.active_params(c.n_embd) as u64, (moe.top_k * moe.hidden) as u64),
            None => {
                let hidden = c.n_inner.unwrap_or(4 * c.n_embd) as u64;
                (2 * d * hidden, hidden)
            }
        };
        met += d * (d + 2 * kv) + d * d + feed;
        // Inputs and outputs of both norms with their statistics, queries, keys, values, the output of attention, its log-sum-exp, and the
        // hidden layer before and after its activation.
        kept += 4 * d + 4 + (d + 2 * kv) + d + c.n_head as u64 + 2 * hidden;
    }
    let positions: usize = spans.iter().map(|s| s.reach().map_or(tokens, |r| r.min(tokens))).sum();
    SpanCost {
        pairs,
        attention_flops,
        model_flops: attention_flops + 2 * met * tokens as u64,
        cache_bytes: positions * 2 * kv as usize * 4,
        activation_bytes: kept as usize * tokens * 4,
    }
}
