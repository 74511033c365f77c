//! GPT-2 (Radford et al. 2019), with an attention span and positions per layer, and a mixture of experts in any of them.
//!
//! Parameter names and shapes are those of Hugging Face's `GPT2LMHeadModel`, so its checkpoints load as they are.

use super::LanguageModel;
use super::generate::check_caches;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::io::{SafeTensors, TensorInfo};
use crate::kernels::Activation;
use crate::nn::{Ctx, Dropout, Init, KvCache, LayerNorm, Linear, LoraConfig, Params, Strict, TransformerBlock, take};
use crate::nn::{Moe, MoeConfig, MoeOut};
use crate::ops::attention::Span;
use crate::ops::embedding::embedding;
use crate::ops::linear::{Layout, linear};
use crate::ops::loss::{CrossEntropy, cross_entropy};
use crate::ops::rotary::RotaryTable;
use crate::{Param, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// How the positions of queries and keys enter a layer's attention, in addition to the table of learned positions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// They do not.
    None,
    /// Queries and keys are rotated by angles that depend on their positions (Su et al. 2021).
    Rotary,
    /// Scores decrease with the distance between query and key (ALiBi, Press et al. 2022).
    Alibi,
}

/// Sizes and options; serialised as Hugging Face's `config.json`, with additional fields that are left out where they have their defaults
/// (`spans`, `moe`, `n_head_kv`, `learned_positions`, `layer_positions`, `rope_theta`).
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct GptConfig {
    /// Always `gpt2`.
    pub model_type: String,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Length of the longest sequence.
    pub n_positions: usize,
    /// Width.
    pub n_embd: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// Number of attention heads.
    pub n_head: usize,
    /// Hidden width of the MLP; 4·n_embd if absent.
    pub n_inner: Option<usize>,
    /// `gelu_new` (tanh), `gelu` (erf), `relu`, `silu` or `tanh`.
    pub activation_function: String,
    /// Dropout after embedding.
    pub embd_pdrop: f64,
    /// Dropout of attention probabilities.
    pub attn_pdrop: f64,
    /// Dropout after attention and MLP.
    pub resid_pdrop: f64,
    /// ε of the norms.
    pub layer_norm_epsilon: f64,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// Whether the output head is the token embedding.
    pub tie_word_embeddings: bool,
    /// Attention span per layer; causal everywhere if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spans: Option<Vec<Span>>,
    /// Number of heads of keys and values, each of which serves equally many heads of queries; `n_head` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_head_kv: Option<usize>,
    /// Whether a learned vector for each position is added to the token's embedding.
    #[serde(skip_serializing_if = "is_true")]
    pub learned_positions: bool,
    /// How positions enter each layer's attention; [`Positions::None`] everywhere if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_positions: Option<Vec<Positions>>,
    /// Base of the rotary frequencies.
    #[serde(skip_serializing_if = "is_usual_base")]
    pub rope_theta: f64,
    /// The mixture of experts of each layer, `None` where it has an MLP; MLPs everywhere if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moe: Option<Vec<Option<MoeConfig>>>,
    /// Other fields of a file, such as `eos_token_id`. They are kept and written again. Options that would change the numbers are refused
    /// by [`GptConfig::validate`].
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

fn is_true(b: &bool) -> bool {
    *b
}

fn is_usual_base(base: &f64) -> bool {
    *base == 1e4
}

impl Default for GptConfig {
    /// GPT-2 small, 124 M parameters.
    fn default() -> Self {
        GptConfig {
            model_type: "gpt2".into(),
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: "gelu_new".into(),
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            resid_pdrop: 0.1,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            tie_word_embeddings: true,
            spans: None,
            n_head_kv: None,
            learned_positions: true,
            layer_positions: None,
            rope_theta: 1e4,
            moe: None,
            other: BTreeMap::new(),
        }
    }
}

impl GptConfig {
    /// A small model without dropout, with exact GELU, for `vocab` tokens and sequences of up to `positions`.
    pub fn small(vocab: usize, positions: usize, layers: usize, d: usize, heads: usize) -> GptConfig {
        GptConfig {
            vocab_size: vocab,
            n_positions: positions,
            n_layer: layers,
            n_embd: d,
            n_head: heads,
            activation_function: "gelu".into(),
            embd_pdrop: 0.0,
            attn_pdrop: 0.0,
            resid_pdrop: 0.0,
            ..GptConfig::default()
        }
    }
    /// The same configuration with rotary positions in every layer instead of the learned table.
    pub fn rotary(mut self) -> GptConfig {
        self.learned_positions = false;
        self.layer_positions = Some(vec![Positions::Rotary; self.n_layer]);
        self
    }
    /// The same configuration with a span for each layer, for instance from [`spans`](super::spans()).
    pub fn with_spans(mut self, spans: Vec<Span>) -> GptConfig {
        self.spans = Some(spans);
        self
    }
    /// The attention span of layer `i`.
    pub fn span(&self, i: usize) -> Span {
        self.spans.as_ref().and_then(|s| s.get(i).copied()).unwrap_or(Span::Causal)
    }
    /// How positions enter the attention of layer `i`.
    pub fn positions_of(&self, i: usize) -> Positions {
        self.layer_positions.as_ref().and_then(|p| p.get(i).copied()).unwrap_or(Positions::None)
    }
    /// The width of a head.
    pub(crate) fn head(&self) -> usize {
        self.n_embd / self.n_head.max(1)
    }
    /// The number of heads of keys and values.
    pub(crate) fn kv_heads(&self) -> usize {
        self.n_head_kv.unwrap_or(self.n_head)
    }
    fn activation(&self) -> Result<Activation> {
        Ok(match self.activation_function.as_str() {
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "gelu" => Activation::Gelu,
            "relu" => Activation::Relu,
            "silu" | "swish" => Activation::Silu,
            "tanh" => Activation::Tanh,
            other => {
                return Err(Error::invalid(
                    "GptConfig",
                    format!("activation_function {other:?}; known are gelu_new, gelu, relu, silu, tanh"),
                ));
            }
        })
    }
    /// The number of elements that the model has at least (biases and norms are left out); `None` if it overflows.
    fn parameters(&self) -> Option<usize> {
        let d = self.n_embd;
        let inner = self.n_inner.map_or_else(|| d.checked_mul(4), Some)?;
        let tokens = self.vocab_size.checked_mul(d)?.checked_mul(if self.tie_word_embeddings { 1 } else { 2 })?;
        let positions = if self.learned_positions { self.n_positions.checked_mul(d)? } else { 0 };
        // Sines and cosines of the rotations are kept as f32 and as f64.
        let turned = self.layer_positions.as_ref().is_some_and(|p| p.contains(&Positions::Rotary));
        let turns = if turned { self.n_positions.checked_mul(self.head())?.checked_mul(3)? } else { 0 };
        let mlp = d.checked_mul(inner)?.checked_mul(2)?;
        let attention = d.checked_mul(d)?.checked_mul(2)?;
        let layers = match &self.moe {
            None => attention.checked_add(mlp)?.checked_mul(self.n_layer)?,
            Some(_) => attention.checked_mul(self.n_layer)?,
        };
        let experts = self.moe.iter().flatten().try_fold(0usize, |sum, c| {
            let one = c.map_or(Some(mlp), |c| d.checked_mul(c.hidden)?.checked_mul(2)?.checked_mul(c.experts));
            sum.checked_add(one?)
        })?;
        tokens.checked_add(positions)?.checked_add(turns)?.checked_add(layers)?.checked_add(experts)
    }
    /// Fails for sizes with which no model can be made, and for options that are not supported.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_layer", self.n_layer),
            ("n_head", self.n_head),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, v)| *v == 0) {
            return Err(Error::invalid("GptConfig", format!("{name} is 0")));
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            return Err(Error::invalid(
                "GptConfig",
                format!("n_embd {} does not divide into n_head {} heads", self.n_embd, self.n_head),
            ));
        }
        let bad = |message: String| Err(Error::invalid("GptConfig", message));
        if self.model_type != "gpt2" {
            return bad(format!("model_type {:?}; this is gpt2", self.model_type));
        }
        // Options of GPT-2 that change the numbers, with the values that leave them unchanged.
        for (name, usual) in [
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
            ("is_encoder_decoder", false),
        ] {
            if let Some(v) = self.other.get(name).filter(|v| **v != Value::Bool(usual)) {
                return bad(format!("{name} is {v}, which is not there; it must be {usual}"));
            }
        }
        if let Some(v) = self.other.get("quantization_config").filter(|v| !v.is_null()) {
            return bad(format!("quantization_config is {v}; weights must not be quantised"));
        }
        for (name, p) in
            [("embd_pdrop", self.embd_pdrop), ("attn_pdrop", self.attn_pdrop), ("resid_pdrop", self.resid_pdrop)]
        {
            if !(0.0..1.0).contains(&p) {
                return bad(format!("{name} {p}; it must lie in [0, 1)"));
            }
        }
        for (name, x) in
            [("layer_norm_epsilon", self.layer_norm_epsilon), ("initializer_range", self.initializer_range)]
        {
            if !(x.is_finite() && x >= 0.0) {
                return bad(format!("{name} {x}; it must be 0 or more"));
            }
        }
        if self.parameters().is_none_or(|n| n > isize::MAX as usize / 8) {
            return bad(format!(
                "vocab_size {}, n_positions {}, n_embd {} and n_layer {} make a model that no memory holds",
                self.vocab_size, self.n_positions, self.n_embd, self.n_layer
            ));
        }
        if let Some(spans) = &self.spans {
            if spans.len() != self.n_layer {
                return bad(format!("{} spans for {} layers", spans.len(), self.n_layer));
            }
            spans.iter().try_for_each(|s| s.validate())?;
            if let Some(Span::Block(b)) = spans.iter().find(|s| matches!(s, Span::Block(b) if *b > self.n_positions)) {
                return bad(format!(
                    "blocks of {b} in sequences of {} positions; a causal layer is the same",
                    self.n_positions
                ));
            }
        }
        let kv = self.kv_heads();
        if kv == 0 || !self.n_head.is_multiple_of(kv) {
            return bad(format!("n_head {} cannot share n_head_kv {kv} heads of keys equally", self.n_head));
        }
        if let Some(positions) = &self.layer_positions {
            if positions.len() != self.n_layer {
                return bad(format!("{} entries of layer_positions for {} layers", positions.len(), self.n_layer));
            }
            if positions.contains(&Positions::Rotary) && !self.head().is_multiple_of(2) {
                return bad(format!("rotary positions for heads of {} elements; use an even size", self.head()));
            }
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return bad(format!("rope_theta {} must be positive", self.rope_theta));
        }
        if let Some(moe) = &self.moe {
            if moe.len() != self.n_layer {
                let message = format!("{} entries of moe for {} layers", moe.len(), self.n_layer);
                return Err(Error::invalid("GptConfig", message));
            }
            moe.iter().flatten().try_for_each(MoeConfig::validate)?;
        }
        self.activation().map(|_| ())
    }
}

/// What [`Gpt::forward_moe`] returns.
pub struct GptOut {
    /// `[B, T, vocab]`.
    pub logits: Tensor,
    /// The output of each layer's mixture of experts; `None` where the layer has an MLP.
    pub layers: Vec<Option<MoeOut>>,
}

/// Whether a parameter belongs to an adapter.
fn is_lora(name: &str) -> bool {
    name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")
}

/// The language model: token embeddings, blocks, a final norm and an output head.
pub struct Gpt {
    config: GptConfig,
    params: Params,
    wte: Param,
    wpe: Option<Param>,
    drop: Dropout,
    blocks: Vec<TransformerBlock>,
    ln_f: LayerNorm,
    head: Option<Param>,
    lora: Option<LoraConfig>,
}

impl LanguageModel for Gpt {
    fn vocabulary(&self) -> usize {
        self.config.vocab_size
    }
    fn positions(&self) -> usize {
        self.config.n_positions
    }
    fn layers(&self) -> usize {
        self.config.n_layer
    }
    fn forward_cached(&self, ids: &Array, caches: &mut [KvCache], past: usize, ctx: &Ctx) -> Result<Tensor> {
        Gpt::forward_cached(self, ids, caches, past, ctx)
    }
}

impl Gpt {
    /// A model with new parameters in f32. Initial values depend on `seed`.
    pub fn new(config: GptConfig, seed: u64) -> Result<Gpt> {
        Gpt::with_dtype(config, seed, DType::F32)
    }
    /// A model with new parameters of a dtype.
    pub fn with_dtype(config: GptConfig, seed: u64, dtype: DType) -> Result<Gpt> {
        Gpt::over(config, Params::new(seed, dtype))
    }
    /// A model whose parameters have names and shapes but no values. It takes no memory, and is meant for planning
    /// ([`zero_plan`](crate::step::zero_plan)).
    pub fn described(config: GptConfig) -> Result<Gpt> {
        Gpt::over(config, Params::described(DType::F32))
    }
    /// A model whose parameters are created in the store `params`.
    fn over(config: GptConfig, params: Params) -> Result<Gpt> {
        config.validate()?;
        let std = config.initializer_range;
        let init = Init::Normal { std };
        // Projections into the residual stream are scaled by 1/√(number of additions to it).
        let init_out = Init::Normal { std: std / (2.0 * config.n_layer as f64).sqrt() };
        let d = config.n_embd;
        let wte = params.at("wte").param("weight", &[config.vocab_size, d], init)?;
        let wpe = match config.learned_positions {
            true => Some(params.at("wpe").param("weight", &[config.n_positions, d], init)?),
            false => None,
        };
        let turns = (0..config.n_layer).any(|i| config.positions_of(i) == Positions::Rotary);
        let table = match turns {
            true => Some(RotaryTable::new(config.n_positions, config.head(), config.rope_theta)?),
            false => None,
        };
        let mut blocks = Vec::new();
        for i in 0..config.n_layer {
            let block = TransformerBlock::builder(d, config.n_head)
                .hidden(config.n_inner.unwrap_or(4 * d))
                .act(config.activation()?)
                .moe(config.moe.as_ref().and_then(|m| m[i]))
                .span(config.span(i))
                .kv_heads(config.n_head_kv)
                .rotary(table.clone().filter(|_| config.positions_of(i) == Positions::Rotary))
                .alibi(config.positions_of(i) == Positions::Alibi)
                .dropout(config.resid_pdrop)
                .attn_dropout(config.attn_pdrop)
                .eps(config.layer_norm_epsilon)
                .init(init)
                .init_out(init_out);
            blocks.push(block.build(&params.at("h").at(&i.to_string()))?);
        }
        let ln_f = LayerNorm::builder(d).eps(config.layer_norm_epsilon).build(&params.at("ln_f"))?;
        let head = if config.tie_word_embeddings {
            None
        } else {
            Some(params.at("lm_head").param("weight", &[config.vocab_size, d], init)?)
        };
        let drop = Dropout::new(&params.at("drop"), config.embd_pdrop)?;
        Ok(Gpt { config, params, wte, wpe, drop, blocks, ln_f, head, lora: None })
    }
    /// Sizes and options.
    pub fn config(&self) -> &GptConfig {
        &self.config
    }
    /// Whether the model has low-rank adapters.
    pub(crate) fn has_adapters(&self) -> bool {
        self.lora.is_some()
    }
    /// All parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }
    /// Logits `[B, T, vocab]` of token ids `[B, T]` (u32 or i64).
    pub fn forward(&self, ids: impl AsRef<Array>, ctx: &Ctx) -> Result<Tensor> {
        Ok(self.forward_moe(ids, ctx)?.logits)
    }
    /// Logits, and the outputs of the mixtures of experts.
    pub fn forward_moe(&self, ids: impl AsRef<Array>, ctx: &Ctx) -> Result<GptOut> {
        let (x, layers) = self.hidden(ids.as_ref(), 0, None, ctx)?;
        Ok(GptOut { logits: self.logits(&x, ctx)?, layers })
    }
    /// One loss per sequence, `[B]`: the mean cross-entropy of `targets [B, T]` (u32 or i64), in nats per token. While training, the losses
    /// of the mixtures of experts are added.
    pub fn losses(&self, ids: impl AsRef<Array>, targets: impl AsRef<Array>, ctx: &Ctx) -> Result<Tensor> {
        Ok(self.losses_moe(ids, targets, ctx)?.0)
    }
    /// [`Gpt::losses`], and the outputs of the mixtures of experts.
    pub fn losses_moe(
        &self,
        ids: impl AsRef<Array>,
        targets: impl AsRef<Array>,
        ctx: &Ctx,
    ) -> Result<(Tensor, Vec<Option<MoeOut>>)> {
        let GptOut { logits, layers } = self.forward_moe(ids, ctx)?;
        let mut losses = cross_entropy(&logits, targets, &CrossEntropy::default())?;
        for out in layers.iter().flatten().filter(|_| ctx.train) {
            losses = losses.add(&out.losses.cast(losses.dtype())?)?;
        }
        Ok((losses, layers))
    }
    /// Spreads the experts of every mixture over ranks ([`Moe::place`]).
    pub fn place_experts(&mut self, ranks: &crate::dist::Shared) -> Result<()> {
        self.blocks.iter_mut().filter_map(TransformerBlock::moe_mut).try_for_each(|moe| moe.place(ranks))
    }
    /// The mixture of experts of each layer, `None` where the layer has an MLP.
    pub fn moe(&self) -> Vec<Option<&Moe>> {
        self.blocks.iter().map(TransformerBlock::moe).collect()
    }
    /// Logits `[B, T, vocab]` of positions that continue those in `caches` (one per layer, empty at first).
    pub fn forward_cached(
        &self,
        ids: impl AsRef<Array>,
        caches: &mut [KvCache],
        past: usize,
        ctx: &Ctx,
    ) -> Result<Tensor> {
        let (x, _) = self.hidden(ids.as_ref(), past, Some(caches), ctx)?;
        self.logits(&x, ctx)
    }
    fn logits(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        let w = self.head.as_ref().unwrap_or(&self.wte);
        linear(x, w, Layout::OutIn, None, Activation::None, ctx.samples.as_ref())
    }
    fn hidden(
        &self,
        ids: &Array,
        past: usize,
        mut caches: Option<&mut [KvCache]>,
        ctx: &Ctx,
    ) -> Result<(Tensor, Vec<Option<MoeOut>>)> {
        let [b, t] = ids.shape()[..] else {
            return Err(Error::shape("Gpt", format!("token ids {:?}; they must be [B, T]", ids.shape())));
        };
        if past.saturating_add(t) > self.config.n_positions {
            return Err(Error::shape(
                "Gpt",
                format!(
                    "{} positions, the model has {}; shorten the input",
                    past.saturating_add(t),
                    self.config.n_positions
                ),
            ));
        }
        let s = ctx.samples.as_ref();
        let mut x = embedding(&self.wte, ids, None, s)?;
        if let Some(wpe) = &self.wpe {
            let positions = Array::arange(past + t, (DType::U32, &wpe.device()));
            let positions = positions.slice(0, past..past + t)?.expand(&[b, t])?;
            x = x.add(&embedding(wpe, positions, None, s)?)?;
        }
        let mut x = self.drop.forward(&ctx.activations(&x)?, ctx)?;
        let c = &self.config;
        check_caches(caches.as_deref(), c.n_layer, past, ([b, c.kv_heads(), c.head()], x.dtype()), |i| c.span(i))?;
        let mut layers = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            let (y, routed) = block.forward_moe(&x, caches.as_mut().map(|c| &mut c[i]), ctx)?;
            x = y;
            layers.push(routed);
        }
        Ok((self.ln_f.forward(&x, ctx)?, layers))
    }

    /// Freezes the model and gives low-rank adapters to the layers whose names end in one of the targets (`c_attn`, `c_proj`, `c_fc`). From
    /// then on only the adapters are trained. Returns the number of adapters.
    ///
    /// Fails if the model has adapters already, or if no layer has one of these names. A failure leaves the model as it was.
    pub fn add_lora(&mut self, c: &LoraConfig) -> Result<usize> {
        self.adapt(c, true, |_| Ok(()))
    }
    /// Adds adapters and calls `fill` with their parameters, whose values are drawn or zeros. If either fails, the model is as it was
    /// before: its parameters, its layers, and what is trained.
    fn adapt(&mut self, c: &LoraConfig, draw: bool, fill: impl FnOnce(&[Param]) -> Result<()>) -> Result<usize> {
        if self.lora.is_some() {
            return Err(Error::invalid("LoRA", "the model has adapters already; load it again for others"));
        }
        let before: Vec<(Param, bool)> = self.params.all().into_iter().map(|p| (p.clone(), p.trainable())).collect();
        let done = self.adapt_layers(c, draw).and_then(|adapted| {
            let new = &self.params.all()[before.len()..];
            new.iter().try_for_each(|p| p.to(&self.wte.device()))?;
            fill(new)?;
            Ok(adapted)
        });
        match done {
            Ok(_) => self.lora = Some(c.clone()),
            Err(_) => {
                self.params.truncate(before.len());
                self.blocks.iter_mut().flat_map(|b| b.linears_mut()).for_each(Linear::forget_adapter);
                before.iter().for_each(|(p, trained)| p.set_trainable(*trained));
            }
        }
        done
    }
    fn adapt_layers(&mut self, c: &LoraConfig, draw: bool) -> Result<usize> {
        c.validate()?;
        let params = self.params.drawing(draw);
        self.params.set_trainable(false);
        let mut adapted = 0;
        for l in self.blocks.iter_mut().flat_map(|b| b.linears_mut()) {
            let name = l.weight().name().to_string();
            let layer = name.rsplit_once('.').map_or("", |(layer, _)| layer);
            if c.target_modules.iter().any(|t| layer == t || layer.ends_with(&format!(".{t}"))) {
                l.adapt(&params, c)?;
                adapted += 1;
            }
        }
        if adapted == 0 {
            let what = format!(
                "no linear layer is called {:?}; a GPT has c_attn, c_proj and c_fc, and experts take no adapters",
                c.target_modules
            );
            return Err(Error::invalid("Gpt::add_lora", what));
        }
        Ok(adapted)
    }
    /// Adds the adapters to their weights, so that the model is as fast as without them and can be saved as a whole. If it fails, all
    /// weights are as they were. Checkpoints are refused until [`Gpt::unmerge_lora`].
    pub fn merge_lora(&mut self) -> Result<()> {
        self.each_adapter(true)
    }
    /// Undoes [`Gpt::merge_lora`]: all weights have their former bits again. If it fails, all of them stay as they were.
    pub fn unmerge_lora(&mut self) -> Result<()> {
        self.each_adapter(false)
    }
    fn each_adapter(&mut self, merge: bool) -> Result<()> {
        let mut changed = Vec::new();
        for l in self.blocks.iter_mut().flat_map(|b| b.linears_mut()) {
            if l.merged() == merge {
                continue;
            }
            match if merge { l.merge() } else { l.unmerge() } {
                Ok(()) => changed.push(l),
                Err(e) => {
                    // The layers changed so far are changed back.
                    let undo = |l: &mut &mut Linear| if merge { l.unmerge() } else { l.merge() };
                    return changed.iter_mut().try_for_each(undo).and(Err(e));
                }
            }
        }
        Ok(())
    }
    /// Writes only the adapters, in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.
    pub fn save_lora(&self, dir: impl AsRef<Path>) -> Result<()> {
        let (op, dir) = ("Gpt::save_lora", dir.as_ref());
        let Some(c) = &self.lora else {
            return Err(Error::invalid(op, "the model has no adapters; add_lora makes them"));
        };
        crate::io::create_folder(dir)?;
        crate::io::write_json(dir.join("adapter_config.json"), c)?;
        let all = self.params.all().into_iter().filter(|p| is_lora(p.name()));
        let named: Vec<(String, Array)> =
            all.map(|p| (format!("base_model.model.transformer.{}", p.name()), p.value())).collect();
        crate::io::save_arrays(dir.join("adapter_model.safetensors"), &named, &[("format", "pt")])
    }
    /// Adds the adapters that [`Gpt::save_lora`] or PEFT wrote, as [`Gpt::add_lora`] with the values of the file. If it fails, for example
    /// because of a missing file, another shape or a missing adapter, the model is as it was before.
    pub fn load_lora(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let c: LoraConfig = crate::io::read_json(dir.join("adapter_config.json"))?;
        let file = SafeTensors::open(dir.join("adapter_model.safetensors"))?;
        // Nothing is allocated for a rank that differs from the file's.
        let of = |t: &&TensorInfo| t.name.ends_with("lora_A.weight") && t.shape.first() != Some(&c.r);
        if let Some(t) = file.tensors().iter().find(of) {
            let message = format!("{} is {:?}, adapter_config.json says rank {}", t.name, t.shape, c.r);
            return Err(Error::format(file.path(), message));
        }
        if !file.tensors().iter().any(|t| t.name.ends_with("lora_A.weight")) {
            return Err(Error::format(file.path(), "has no adapter: no tensor is called ….lora_A.weight"));
        }
        let name = |n: &str| vec![format!("base_model.model.transformer.{n}")];
        self.adapt(&c, false, |adapters| take(adapters, &file, &name, Strict::AllowUnexpected).map(drop)).map(drop)
    }

    /// Writes `config.json` and `model.safetensors` into `dir`, each atomically. Adapters must be merged.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        crate::io::create_folder(dir)?;
        let json = serde_json::to_vec_pretty(&self.config)
            .map_err(|e| Error::invalid("Gpt::save", format!("config does not serialise: {e}")))?;
        crate::io::write_atomic(dir.join("config.json"), &json)?;
        let name = |n: &str| if n.starts_with("lm_head") { n.to_string() } else { format!("transformer.{n}") };
        let all = self.params.all().into_iter().filter(|p| !is_lora(p.name()));
        let named: Vec<(String, Array)> = all.map(|p| (name(p.name()), p.value())).collect();
        crate::io::save_arrays(dir.join("model.safetensors"), &named, &[("format", "pt")])
    }
    /// Reads a model that [`Gpt::save`] or Hugging Face's `save_pretrained` wrote.
    pub fn load(dir: impl AsRef<Path>) -> Result<Gpt> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read model configuration", &path, e))?;
        let config: GptConfig =
            serde_json::from_str(&text).map_err(|e| Error::format(&path, format!("not a GPT-2 configuration: {e}")))?;
        config.validate()?;
        let file = SafeTensors::open(dir.join("model.safetensors"))?;
        // A model is not allocated if the file is much too small for it. Tensors missing from a file of about the right size are named
        // below.
        let held: u128 = file.tensors().iter().map(|t| t.shape.iter().map(|&d| d as u128).product::<u128>()).sum();
        const SLACK: u128 = 16 << 20;
        if let Some(n) = config.parameters().filter(|&n| n as u128 > 4 * held + SLACK) {
            let message =
                format!("config.json describes a model of at least {n} parameters, the file has {held} numbers");
            return Err(Error::format(file.path(), message));
        }
        // No initial values are drawn, because every value is in the file.
        let params = Params::new(0, DType::F32);
        let mut model = Gpt::over(config, params.drawing(false))?;
        model.params = params;
        // Hugging Face's files contain causal masks beside the parameters.
        let name = |n: &str| vec![n.to_string(), format!("transformer.{n}")];
        take(&model.params.all(), &file, &name, Strict::AllowUnexpected)?;
        Ok(model)
    }
}
