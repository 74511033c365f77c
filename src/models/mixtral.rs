//! Mixtral (Jiang et al. 2024): a decoder of RMS norms, rotary positions, grouped queries and SwiGLU experts.
//!
//! It reads the two layouts in which Hugging Face's transformers write the model: with a tensor for each matrix of each expert
//! (`block_sparse_moe.experts.N.w1`, `w2`, `w3`), or with one for all experts of a layer (`mlp.experts.gate_up_proj`, gate first, and
//! `down_proj`). It writes the first, which every version reads.

use super::LanguageModel;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::io::{self, SafeTensors};
use crate::nn::{Balance, Ctx, Embedding, ExpertKind, Init, KvCache, Linear, Moe, MoeConfig, MoeOut, Params, RmsNorm};
use crate::ops::attention::{AttentionOptions, Span, attention};
use crate::ops::loss::{CrossEntropy, cross_entropy};
use crate::ops::rotary::{Pairing, RotaryTable};
use crate::{Param, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Sizes and options; serialised as Hugging Face's `config.json`.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct MixtralConfig {
    /// Always `mixtral`.
    pub model_type: String,
    /// Always `MixtralForCausalLM`.
    pub architectures: Vec<String>,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Hidden width of each expert.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of heads of queries.
    pub num_attention_heads: usize,
    /// Number of heads of keys and values; each serves equally many heads of queries.
    pub num_key_value_heads: usize,
    /// Width of a head; hidden_size/num_attention_heads if absent.
    pub head_dim: Option<usize>,
    /// Always `silu`.
    pub hidden_act: String,
    /// Length of the longest sequence.
    pub max_position_embeddings: usize,
    /// What the norms add to the mean square.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Options of the rotary positions in newer files, instead of `rope_theta`.
    #[serde(skip_serializing)]
    pub rope_parameters: Option<RopeParameters>,
    /// Number of positions that a query sees, including its own; all earlier ones if absent.
    pub sliding_window: Option<usize>,
    /// Number of experts of each layer: one number, or a list where the layers differ.
    pub num_local_experts: ExpertCounts,
    /// Number of experts for each token.
    pub num_experts_per_tok: usize,
    /// Coefficient of the balance loss, here [`Balance::PerSample`].
    pub router_aux_loss_coef: f64,
    /// Jitter of the router's logits while training.
    pub router_jitter_noise: f64,
    /// Whether the output head is the token embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// Other fields of a file, such as `eos_token_id`. They are kept and written again. Options that would change the numbers are refused
    /// by [`MixtralConfig::validate`].
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// How many experts the layers have.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
pub enum ExpertCounts {
    /// The same number in every layer.
    Same(usize),
    /// A number for each layer, as after a reduction by [`pruning`](crate::systems::pruning); readers that expect one number
    /// refuse such a file.
    PerLayer(Vec<usize>),
}

impl ExpertCounts {
    /// The counts `layers`, as one number if they are all equal.
    pub fn of(layers: &[usize]) -> ExpertCounts {
        match layers {
            [first, rest @ ..] if rest.iter().all(|n| n == first) => ExpertCounts::Same(*first),
            _ => ExpertCounts::PerLayer(layers.to_vec()),
        }
    }
    /// The number of experts of a layer; 0 if the list is too short.
    pub fn at(&self, layer: usize) -> usize {
        match self {
            ExpertCounts::Same(n) => *n,
            ExpertCounts::PerLayer(all) => all.get(layer).copied().unwrap_or(0),
        }
    }
    /// The number of experts, if every layer has the same; otherwise an error that lists the numbers.
    pub fn same(&self) -> Result<usize> {
        match self {
            ExpertCounts::Same(n) => Ok(*n),
            ExpertCounts::PerLayer(all) => match ExpertCounts::of(all) {
                ExpertCounts::Same(n) => Ok(n),
                _ => Err(Error::invalid(
                    "ExpertCounts",
                    format!(
                        "the layers have {all:?} experts: there is no one number for the model; ask for each layer's (at)"
                    ),
                )),
            },
        }
    }
}

/// Rotary options of newer files.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct RopeParameters {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// `default`; scaled variants are refused.
    pub rope_type: String,
    /// Other fields, which are refused where they would change the numbers.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl Default for RopeParameters {
    fn default() -> Self {
        RopeParameters { rope_theta: 1e6, rope_type: "default".into(), other: BTreeMap::new() }
    }
}

impl Default for MixtralConfig {
    /// Mixtral 8×7B, 46.7 billion parameters.
    fn default() -> Self {
        MixtralConfig {
            model_type: "mixtral".into(),
            architectures: vec!["MixtralForCausalLM".into()],
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 14336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: None,
            hidden_act: "silu".into(),
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            rope_parameters: None,
            sliding_window: None,
            num_local_experts: ExpertCounts::Same(8),
            num_experts_per_tok: 2,
            router_aux_loss_coef: 0.02,
            router_jitter_noise: 0.0,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            other: BTreeMap::new(),
        }
    }
}

impl MixtralConfig {
    fn head(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }
    /// Fails for sizes with which no model can be made.
    pub fn validate(&self) -> Result<()> {
        let bad = |message: String| Err(Error::invalid("MixtralConfig", message));
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("head_dim", self.head()),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, v)| *v == 0) {
            return bad(format!("{name} is 0"));
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return bad(format!(
                "hidden_size {} does not divide into {} heads",
                self.hidden_size, self.num_attention_heads
            ));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return bad(format!(
                "{} heads of queries cannot share {} heads of keys equally",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if self.model_type != "mixtral" || self.hidden_act != "silu" {
            return bad(format!(
                "model_type {:?} with {:?}; it must be mixtral with silu",
                self.model_type, self.hidden_act
            ));
        }
        // Options of this family of models that change the numbers, with the value that leaves them unchanged.
        for (name, usual) in [
            ("rope_scaling", Value::Null),
            ("partial_rotary_factor", json!(1.0)),
            ("attention_bias", json!(false)),
            ("mlp_bias", json!(false)),
            ("attention_dropout", json!(0.0)),
            ("norm_topk_prob", json!(true)),
            ("add_cross_attention", json!(false)),
            ("is_encoder_decoder", json!(false)),
            ("quantization_config", Value::Null),
        ] {
            // 0 and 0.0 are the same number.
            let same = |v: &Value| v.is_null() || *v == usual || (v.is_number() && v.as_f64() == usual.as_f64());
            if let Some(v) = self.other.get(name).filter(|v| !same(v)) {
                return bad(format!("{name} is {v}, which is not there; it must be {usual}, or left out"));
            }
        }
        if let Some(r) = &self.rope_parameters {
            if r.rope_type != "default" {
                return bad(format!("rope_type {:?}; only the default one is there", r.rope_type));
            }
            let unknown =
                |(name, v): &(&String, &Value)| !(v.is_null() || *name == "partial_rotary_factor" && **v == 1.0);
            if let Some((name, v)) = r.other.iter().find(unknown) {
                return bad(format!("{name} of rope_parameters is {v}, which the default rotation does not have"));
            }
        }
        if self.sliding_window == Some(0) {
            return bad(
                "sliding_window is 0; a query sees itself at least, so use 1 or more, or null for no window".into()
            );
        }
        let theta = self.rope_parameters.as_ref().map_or(self.rope_theta, |r| r.rope_theta);
        if !(theta.is_finite() && theta > 0.0) {
            return bad(format!("rope_theta {theta}; it must be positive"));
        }
        if !self.head().is_multiple_of(2) {
            return bad(format!("heads of {} elements cannot be turned in pairs; use an even head_dim", self.head()));
        }
        for (name, x) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("initializer_range", self.initializer_range),
            ("router_aux_loss_coef", self.router_aux_loss_coef),
        ] {
            if !(x.is_finite() && x >= 0.0) {
                return bad(format!("{name} {x}; it must be 0 or more"));
            }
        }
        if !(0.0..1.0).contains(&self.router_jitter_noise) {
            return bad(format!("router_jitter_noise {}; it must lie in [0, 1)", self.router_jitter_noise));
        }
        if self.numbers().is_none_or(|n| n > isize::MAX as usize / 8) {
            return bad(format!(
                "vocab_size {}, max_position_embeddings {}, hidden_size {}, intermediate_size {} and num_hidden_layers {} make a model \
                 that no memory holds",
                self.vocab_size,
                self.max_position_embeddings,
                self.hidden_size,
                self.intermediate_size,
                self.num_hidden_layers
            ));
        }
        if let ExpertCounts::PerLayer(all) = &self.num_local_experts
            && all.len() != self.num_hidden_layers
        {
            return bad(format!("{} numbers of experts for {} layers", all.len(), self.num_hidden_layers));
        }
        // Where all layers are equal, one layer is checked for all.
        let layers = match self.num_local_experts {
            ExpertCounts::Same(_) => 1,
            ExpertCounts::PerLayer(_) => self.num_hidden_layers,
        };
        (0..layers).try_for_each(|i| self.moe(i).validate())
    }
    /// The number of elements that the model has at least, in matrices and in the table of rotations; `None` if it overflows.
    fn numbers(&self) -> Option<usize> {
        let (d, head) = (self.hidden_size, self.head());
        let tokens = self.vocab_size.checked_mul(d)?.checked_mul(if self.tie_word_embeddings { 1 } else { 2 })?;
        // Sines and cosines are kept as f32 and as f64.
        let turns = self.max_position_embeddings.checked_mul(head)?.checked_mul(3)?;
        let heads = self.num_attention_heads.checked_add(self.num_key_value_heads)?.checked_mul(2)?;
        let attention = d.checked_mul(head)?.checked_mul(heads)?;
        let expert = d.checked_mul(self.intermediate_size)?.checked_mul(3)?;
        let layers = match &self.num_local_experts {
            ExpertCounts::Same(n) => {
                attention.checked_add(expert.checked_mul(*n)?)?.checked_mul(self.num_hidden_layers)?
            }
            ExpertCounts::PerLayer(all) => all
                .iter()
                .try_fold(0usize, |sum, n| sum.checked_add(attention)?.checked_add(expert.checked_mul(*n)?))?,
        };
        tokens.checked_add(turns)?.checked_add(layers)
    }
    /// The mixture of experts of a layer.
    pub fn moe(&self, layer: usize) -> MoeConfig {
        MoeConfig {
            expert: ExpertKind::SwiGlu,
            renormalise: true,
            jitter: self.router_jitter_noise,
            balance: Balance::PerSample(self.router_aux_loss_coef),
            ..MoeConfig::new(self.num_local_experts.at(layer), self.num_experts_per_tok, self.intermediate_size)
        }
    }
}

struct Block {
    input_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    post_norm: RmsNorm,
    moe: Moe,
}

/// The language model: token embeddings, blocks, a final norm and an output head.
pub struct Mixtral {
    config: MixtralConfig,
    params: Params,
    embed: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Option<Linear>,
    rotary: RotaryTable,
}

impl LanguageModel for Mixtral {
    fn vocabulary(&self) -> usize {
        self.config.vocab_size
    }
    fn positions(&self) -> usize {
        self.config.max_position_embeddings
    }
    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }
    fn forward_cached(&self, ids: &Array, caches: &mut [KvCache], past: usize, ctx: &Ctx) -> Result<Tensor> {
        Ok(self.run(ids, past, Some(caches), ctx)?.0)
    }
}

impl Mixtral {
    /// A model with new parameters in f32. Initial values depend on `seed`.
    pub fn new(config: MixtralConfig, seed: u64) -> Result<Mixtral> {
        Mixtral::with_dtype(config, seed, DType::F32)
    }
    /// A model with new parameters of a dtype.
    pub fn with_dtype(config: MixtralConfig, seed: u64, dtype: DType) -> Result<Mixtral> {
        Mixtral::over(config, Params::new(seed, dtype))
    }
    /// A model whose parameters are created in the store `params`.
    fn over(mut config: MixtralConfig, params: Params) -> Result<Mixtral> {
        config.validate()?;
        if let Some(r) = config.rope_parameters.take() {
            config.rope_theta = r.rope_theta;
        }
        let c = &config;
        let (d, head, init) = (c.hidden_size, c.head(), Init::Normal { std: c.initializer_range });
        let norm = RmsNorm::builder(d).eps(c.rms_norm_eps);
        let embed = Embedding::builder(c.vocab_size, d).init(init).build(&params.at("embed_tokens"))?;
        let mut blocks = Vec::new();
        for i in 0..c.num_hidden_layers {
            let at = params.at("layers").at(&i.to_string());
            let project = |name: &str, from, to| {
                Linear::builder(from, to).bias(false).init(init).build(&at.at("self_attn").at(name))
            };
            let (queries, keys) = (c.num_attention_heads * head, c.num_key_value_heads * head);
            blocks.push(Block {
                input_norm: norm.build(&at.at("input_layernorm"))?,
                q: project("q_proj", d, queries)?,
                k: project("k_proj", d, keys)?,
                v: project("v_proj", d, keys)?,
                o: project("o_proj", queries, d)?,
                post_norm: norm.build(&at.at("post_attention_layernorm"))?,
                moe: Moe::builder(d, &c.moe(i)).init(init).init_out(init).build(&at.at("moe"))?,
            });
        }
        let last = norm.build(&params.at("norm"))?;
        let head_layer = match c.tie_word_embeddings {
            true => None,
            false => Some(Linear::builder(d, c.vocab_size).bias(false).init(init).build(&params.at("lm_head"))?),
        };
        let rotary = RotaryTable::new(c.max_position_embeddings, head, c.rope_theta)?;
        Ok(Mixtral { params, embed, blocks, norm: last, head: head_layer, rotary, config })
    }
    /// Sizes and options.
    pub fn config(&self) -> &MixtralConfig {
        &self.config
    }
    /// All parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }
    /// The mixture of experts of each layer.
    pub fn moe(&self) -> Vec<&Moe> {
        self.blocks.iter().map(|b| &b.moe).collect()
    }
    /// Logits `[B, T, vocab]` of token ids `[B, T]` (u32).
    pub fn forward(&self, ids: impl AsRef<Array>, ctx: &Ctx) -> Result<Tensor> {
        Ok(self.forward_moe(ids, ctx)?.0)
    }
    /// Logits, and the output of each layer's mixture of experts.
    pub fn forward_moe(&self, ids: impl AsRef<Array>, ctx: &Ctx) -> Result<(Tensor, Vec<MoeOut>)> {
        self.run(ids.as_ref(), 0, None, ctx)
    }
    /// One loss per sequence, `[B]`: the mean cross-entropy of `targets [B, T]` (u32), in nats per token. While training, the balance
    /// losses are added.
    pub fn losses(&self, ids: impl AsRef<Array>, targets: impl AsRef<Array>, ctx: &Ctx) -> Result<Tensor> {
        let (logits, layers) = self.forward_moe(ids, ctx)?;
        let mut losses = cross_entropy(&logits, targets, &CrossEntropy::default())?;
        for out in layers.iter().filter(|_| ctx.train) {
            losses = losses.add(&out.losses.cast(losses.dtype())?)?;
        }
        Ok(losses)
    }
    fn run(
        &self,
        ids: &Array,
        past: usize,
        mut caches: Option<&mut [KvCache]>,
        ctx: &Ctx,
    ) -> Result<(Tensor, Vec<MoeOut>)> {
        let c = &self.config;
        let [b, t] = ids.shape()[..] else {
            return Err(Error::shape("Mixtral", format!("token ids {:?}; they must be [B, T]", ids.shape())));
        };
        if past.saturating_add(t) > c.max_position_embeddings {
            let (want, have) = (past.saturating_add(t), c.max_position_embeddings);
            let message = format!("{want} positions, the model has {have}; shorten the input");
            return Err(Error::shape("Mixtral", message));
        }
        let span = c.sliding_window.map_or(Span::Causal, Span::Window);
        let mut x = ctx.activations(&self.embed.forward(Tensor::new(ids.clone()), ctx)?)?;
        let like = ([b, c.num_key_value_heads, c.head()], x.dtype());
        super::generate::check_caches(caches.as_deref(), c.num_hidden_layers, past, like, |_| span)?;
        let mut layers = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            let h = block.input_norm.forward(&x, ctx)?;
            let heads = |l: &Linear, n: usize| l.forward(&h, ctx)?.reshape(&[b, t, n, c.head()]);
            let turn = |x: Tensor| x.rotary(&self.rotary, past, Pairing::Half);
            let q = turn(heads(&block.q, c.num_attention_heads)?)?;
            let k = turn(heads(&block.k, c.num_key_value_heads)?)?;
            let v = heads(&block.v, c.num_key_value_heads)?;
            let mut options = AttentionOptions::new(span);
            let (k, v) = match &mut caches {
                Some(caches) => caches[i].extend(k, v, &mut options)?,
                None => (k, v),
            };
            let a = attention(&q, &k, &v, &options)?;
            let a = a.reshape(&[b, t, c.num_attention_heads * c.head()])?;
            x = x.add(&block.o.forward(&a, ctx)?)?;
            let out = block.moe.forward(&block.post_norm.forward(&x, ctx)?, ctx)?;
            x = x.add(&out.output)?;
            layers.push(out);
        }
        let x = self.norm.forward(&x, ctx)?;
        let logits = match &self.head {
            Some(head) => head.forward(&x, ctx)?,
            None => {
                use crate::ops::linear::{Activation, Layout, linear};
                linear(&x, self.embed.weight(), Layout::OutIn, None, Activation::None, ctx.samples.as_ref())?
            }
        };
        Ok((logits, layers))
    }

    /// Writes `config.json` and `model.safetensors` into `dir`, each atomically, with a tensor for each matrix of each expert.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        io::create_folder(dir)?;
        io::write_json(dir.join("config.json"), &self.config)?;
        let mut named = Vec::new();
        for p in self.params.all() {
            for (e, name) in pieces(&p, Layout::Single).into_iter().enumerate() {
                let value = p.value().to(&crate::Device::Cpu)?;
                named.push((name, if is_stack(&p) { value.slice(0, e..e + 1)?.squeeze(0)? } else { value }));
            }
        }
        io::save_arrays(dir.join("model.safetensors"), &named, &[("format", "pt")])
    }
    /// Reads a model that [`Mixtral::save`] or Hugging Face's `save_pretrained` wrote, in either layout, in one file or several. Every
    /// tensor must be used exactly once; the error lists tensors that are missing, left over or of another shape.
    pub fn load(dir: impl AsRef<Path>) -> Result<Mixtral> {
        let dir = dir.as_ref();
        let config: MixtralConfig = io::read_json(dir.join("config.json"))?;
        config.validate()?;
        let files = Files::open(dir)?;
        // A model is not allocated if the files are much too small for it.
        let held: u128 = files.at.values().map(|(_, s)| s.iter().map(|&d| d as u128).product::<u128>()).sum();
        const SLACK: u128 = 16 << 20;
        if let Some(n) = config.numbers().filter(|&n| n as u128 > 4 * held + SLACK) {
            return Err(files
                .misfit(&[format!("config.json describes a model of at least {n} numbers, the files have {held}")]));
        }
        // No initial values are drawn, because every value is in the files.
        let params = Params::new(0, DType::F32);
        let mut model = Mixtral::over(config, params.drawing(false))?;
        model.params = params;
        model.take(&files)?;
        Ok(model)
    }
    /// Fills every parameter from the files.
    fn take(&self, files: &Files) -> Result<()> {
        let layout = match files.at.keys().any(|n| n.contains(".mlp.experts.")) {
            true => Layout::Stacked,
            false => Layout::Single,
        };
        let (all, mut wrong) = (self.params.all(), Vec::new());
        for layer in 0..self.config.num_hidden_layers {
            let said = self.config.num_local_experts.at(layer);
            if let Some(found) = files.experts(layer).filter(|&e| e != said) {
                return Err(
                    files.misfit(&[format!("it has {found} experts in layer {layer}, config.json says {said}")])
                );
            }
        }
        let mut left: BTreeSet<&str> = files.at.keys().map(String::as_str).collect();
        for p in &all {
            let want = shape(p, layout);
            for name in pieces(p, layout) {
                // In the stacked layout, gate and up share a tensor.
                match (left.remove(name.as_str()), files.at.get(&name)) {
                    (_, None) => wrong.push(format!("{name} is missing")),
                    (_, Some((_, got))) if *got != want => {
                        wrong.push(format!("{name} is {got:?}, the model's is {want:?}"));
                    }
                    _ => {}
                }
            }
        }
        wrong.extend(left.iter().map(|n| format!("{n} is in the file, but not in the model")));
        if !wrong.is_empty() {
            wrong.dedup();
            return Err(files.misfit(&wrong));
        }
        let mut shared: BTreeMap<String, Array> = BTreeMap::new();
        let values = all.iter().map(|p| {
            let names = pieces(p, layout);
            let value = match (is_stack(p), layout) {
                (true, Layout::Single) => {
                    let parts = names.iter().map(|n| files.read(n)).collect::<Result<Vec<Tensor>>>()?;
                    Tensor::stack(&parts.iter().collect::<Vec<_>>(), 0)?.into_array()
                }
                (true, Layout::Stacked) => match half(p) {
                    Some(half) => {
                        // The second of the two parameters removes the tensor from the map.
                        let whole = match shared.remove(&names[0]) {
                            Some(whole) => whole,
                            None => files.read(&names[0])?.into_array(),
                        };
                        let rows = p.shape()[1];
                        let part = whole.slice(1, half * rows..(half + 1) * rows)?.copy();
                        if half == 0 {
                            shared.insert(names[0].clone(), whole);
                        }
                        part
                    }
                    None => files.read(&names[0])?.into_array(),
                },
                (false, _) => files.read(&names[0])?.into_array(),
            };
            Ok((p, value.cast(p.dtype())))
        });
        // Everything is read before the first parameter changes.
        let values = values.collect::<Result<Vec<(&Param, Array)>>>()?;
        values.into_iter().try_for_each(|(p, v)| p.set(v))
    }
}

/// The layout of the experts in a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// A tensor for each matrix of each expert.
    Single,
    /// One tensor for the same matrix of all experts, with gate and up in one.
    Stacked,
}

/// Whether a parameter holds a matrix for each expert.
fn is_stack(p: &Param) -> bool {
    p.name().contains(".moe.experts.")
}

/// Which half of `gate_up_proj` a parameter is: 0 or 1; `None` if it is neither.
fn half(p: &Param) -> Option<usize> {
    match () {
        _ if p.name().ends_with("gate_proj.weight") => Some(0),
        _ if p.name().ends_with("up_proj.weight") => Some(1),
        _ => None,
    }
}

/// The names of the tensors in a file that make up a parameter.
fn pieces(p: &Param, layout: Layout) -> Vec<String> {
    let Some((block, part)) = p.name().split_once(".moe.") else {
        let name = p.name();
        return vec![if name.starts_with("lm_head") { name.to_string() } else { format!("model.{name}") }];
    };
    if part == "router.weight" {
        return vec![match layout {
            Layout::Single => format!("model.{block}.block_sparse_moe.gate.weight"),
            Layout::Stacked => format!("model.{block}.mlp.gate.weight"),
        }];
    }
    match layout {
        Layout::Stacked => {
            let name = if half(p).is_some() { "gate_up_proj" } else { "down_proj" };
            vec![format!("model.{block}.mlp.experts.{name}")]
        }
        Layout::Single => {
            let w = half(p).map_or("w2", |h| ["w1", "w3"][h]);
            (0..p.shape()[0]).map(|e| format!("model.{block}.block_sparse_moe.experts.{e}.{w}.weight")).collect()
        }
    }
}

/// The shape of each of the tensors that make up a parameter.
fn shape(p: &Param, layout: Layout) -> Vec<usize> {
    match (is_stack(p), layout) {
        (true, Layout::Single) => p.shape()[1..].to_vec(),
        (true, Layout::Stacked) if half(p).is_some() => vec![p.shape()[0], 2 * p.shape()[1], p.shape()[2]],
        _ => p.shape().to_vec(),
    }
}

/// The safetensors files of a folder, with the file and the shape of each tensor.
struct Files {
    files: Vec<SafeTensors>,
    at: BTreeMap<String, (usize, Vec<usize>)>,
}

impl Files {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.
    fn open(dir: &Path) -> Result<Files> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let index = dir.join("model.safetensors.index.json");
        let names: BTreeSet<String> = match index.exists() {
            true => io::read_json::<Index>(&index)?.weight_map.into_values().collect(),
            false => BTreeSet::from(["model.safetensors".to_string()]),
        };
        if let Some(n) = names.iter().find(|n| Path::new(n).file_name() != Some(n.as_ref())) {
            return Err(Error::format(&index, format!("{n:?} is no file of this folder")));
        }
        let files = names.iter().map(|n| SafeTensors::open(dir.join(n))).collect::<Result<Vec<_>>>()?;
        let mut at = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for t in file.tensors() {
                if at.insert(t.name.clone(), (i, t.shape.clone())).is_some() {
                    return Err(Error::format(file.path(), format!("{} is in two files of the folder", t.name)));
                }
            }
        }
        Ok(Files { files, at })
    }
    fn read(&self, name: &str) -> Result<Tensor> {
        let Some((file, _)) = self.at.get(name) else {
            return Err(self.misfit(&[format!("{name} is missing")]));
        };
        Ok(Tensor::new(io::array_of(&self.files[*file], name)?))
    }
    /// The number of experts of a layer, from the shapes or the names of its tensors; `None` if there are none.
    fn experts(&self, layer: usize) -> Option<usize> {
        let stacked = self.at.get(&format!("model.layers.{layer}.mlp.experts.down_proj"));
        if let Some((_, shape)) = stacked {
            return shape.first().copied();
        }
        let below = format!("model.layers.{layer}.block_sparse_moe.experts.");
        let names = self.at.keys().filter_map(|n| n.strip_prefix(&below)?.split('.').next()?.parse::<usize>().ok());
        names.max().map(|e| e.saturating_add(1))
    }
    fn misfit(&self, wrong: &[String]) -> Error {
        match self.files.first() {
            Some(f) => Error::format(f.path(), format!("does not fit the model: {}", wrong.join("; "))),
            None => Error::invalid("Mixtral::load", "the folder names no file"),
        }
    }
}
