//! Numbers that make no sense are refused where they are given, by a sentence that has the number and says what is accepted. Every public
//! constructor and option that takes a float is walked with NaN, infinities and values outside of its range, every one that takes a size
//! with 0 and the largest number of all; none panics.

use crate::common::mixtral::mixtral;
use prismgrad::data::Hypergraph;
use prismgrad::dist::{Local, Simulated};
use prismgrad::models::{ExpertCounts, Gpt, GptConfig, Mixtral, MixtralConfig, Sampling, generate};
use prismgrad::nn::hypergraph::{DeepSets, Hgnn, HyperTrans, SetAttention};
use prismgrad::nn::{
    Balance, Conv1d, Conv2d, Ctx, Dropout, Embedding, EmbeddingBag, GroupNorm, Init, KvCache, LayerNorm, Linear,
    LoraConfig, Mlp, Moe, MoeConfig, MultiHeadAttention, Params, RmsNorm, SwiGlu, TransformerBlock, contrastive_loss,
};
use prismgrad::ops::attention::{AttentionOptions, Span, attention};
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::ops::norm::{group_norm, layer_norm, rms_norm};
use prismgrad::ops::rotary::RotaryTable;
use prismgrad::optim::{AdamW, Optimizer, Schedule, Sgd};
use prismgrad::privacy::audit::one_run;
use prismgrad::privacy::{Accountant, ClipFn, PoissonSampler, Thresholds, Weight};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep};
use prismgrad::systems::codeeval::mini::{Coder, Corpus, Training as MiniTraining};
use prismgrad::systems::codeeval::mitigate::rewrite;
use prismgrad::systems::codeeval::passk::bootstrap;
use prismgrad::systems::codeeval::{CodeModel, Draw};
#[cfg(feature = "sandbox")]
use prismgrad::systems::codeeval::{Limits, Sandbox};
use prismgrad::systems::editing::{Cost, Merge, Tags, VectorPool};
use prismgrad::systems::hytrel::{Corruption, Head, HyTrel, HyTrelConfig};
use prismgrad::systems::pruning::{assign, best_static_merge, spectral, train_routers};
use prismgrad::systems::robustness::evaluate::best_temperature;
use prismgrad::systems::robustness::{
    Answers, Attack, Batch, Calibrate, Classifier, Lens, ModelConfig, Neighbours, Pgd, Score, Served, Similarity,
    Synonyms, Text, TextModel, TextSet, Training, Vocabulary, WordVectors, reliability,
};
use prismgrad::{Array, DType, Param, Result, Samples, Tensor};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

const NAN: f64 = f64::NAN;
const INF: f64 = f64::INFINITY;

/// Shares such as a dropout: [0, 1).
const SHARE: &[f64] = &[NAN, INF, -INF, -0.1, 1.0, 7.0];
/// Scales such as an ε of a norm: 0 or more.
const SCALE: &[f64] = &[NAN, INF, -INF, -1e-9];
/// Positive numbers such as a learning rate.
const POSITIVE: &[f64] = &[NAN, INF, -INF, -1.0, 0.0];
/// What lies between 0 and 1 and is neither.
const BETWEEN: &[f64] = &[NAN, INF, -INF, -0.5, 0.0, 1.0, 2.0];
/// Rates in (0, 1] and weights in [0, 1].
const RATE: &[f64] = &[NAN, INF, -INF, -0.5, 1.5];

/// A number that is given somewhere: where, what takes it, what is fine, and what must be refused.
struct Number(&'static str, Box<dyn Fn(f64) -> Result<()>>, &'static [f64], &'static [f64]);

fn number(
    name: &'static str,
    fine: &'static [f64],
    wrong: &'static [f64],
    give: impl Fn(f64) -> Result<()> + 'static,
) -> Number {
    Number(name, Box::new(give), fine, wrong)
}

fn params() -> Params {
    Params::new(0, DType::F32)
}

fn ones(shape: &[usize]) -> Tensor {
    Tensor::new(Array::ones(shape, DType::F32))
}

fn target() -> PrivacyConfig {
    PrivacyConfig::target(3.0, 1e-5).records(1000).expected_batch(10.0).steps(10)
}

fn step(optimizer: impl Optimizer + 'static, schedule: Schedule) -> Result<()> {
    PlainStep::new(&[Param::new("w", Array::ones(&[2, 2], DType::F32))], optimizer, schedule).map(drop)
}

fn small() -> GptConfig {
    GptConfig::small(11, 8, 1, 8, 2)
}

fn layers() -> Vec<Number> {
    let moe = |c: MoeConfig| Moe::new(&params(), 4, &c).map(drop);
    let block = || TransformerBlock::builder(4, 2);
    let q = || ones(&[1, 3, 2, 4]);
    let attend = move |o: AttentionOptions| attention(&q(), &q(), &q(), &o).map(drop);
    vec![
        number("Dropout", &[0.0, 0.5], SHARE, |p| Dropout::new(&params(), p).map(drop)),
        number("Tensor::dropout", &[0.0, 0.5], SHARE, |p| ones(&[4]).dropout(p, 1).map(drop)),
        number("MultiHeadAttention.dropout", &[0.1], SHARE, |p| {
            MultiHeadAttention::builder(4, 2).dropout(p).build(&params()).map(drop)
        }),
        number("TransformerBlock.dropout", &[0.1], SHARE, move |p| block().dropout(p).build(&params()).map(drop)),
        number("TransformerBlock.attn_dropout", &[0.1], SHARE, move |p| {
            block().attn_dropout(p).build(&params()).map(drop)
        }),
        number("TransformerBlock.eps", &[0.0, 1e-5], SCALE, move |e| block().eps(e).build(&params()).map(drop)),
        number("SetAttention.dropout", &[0.1], SHARE, |p| {
            SetAttention::builder(4, 2).dropout(p).build(&params()).map(drop)
        }),
        number("HyperTrans.dropout", &[0.1], SHARE, |p| {
            HyperTrans::builder(4, 2).dropout(p).build(&params()).map(drop)
        }),
        number("LayerNorm.eps", &[0.0, 1e-5], SCALE, |e| LayerNorm::builder(4).eps(e).build(&params()).map(drop)),
        number("RmsNorm.eps", &[0.0, 1e-5], SCALE, |e| RmsNorm::builder(4).eps(e).build(&params()).map(drop)),
        number("GroupNorm.eps", &[0.0, 1e-5], SCALE, |e| GroupNorm::builder(2, 4).eps(e).build(&params()).map(drop)),
        number("layer_norm", &[0.0], SCALE, |e| layer_norm(&ones(&[2, 4]), None, None, e, None).map(drop)),
        number("rms_norm", &[0.0], SCALE, |e| rms_norm(&ones(&[2, 4]), None, e, None).map(drop)),
        number("group_norm", &[0.0], SCALE, |e| group_norm(&ones(&[2, 4]), 2, None, None, e).map(drop)),
        number("Init::Normal", &[0.0, 1.0], SCALE, |std| params().param("w", &[2], Init::Normal { std }).map(drop)),
        number("Init::Uniform", &[0.0, 1.0], SCALE, |bound| {
            params().param("w", &[2], Init::Uniform { bound }).map(drop)
        }),
        number("Linear.init", &[0.1], SCALE, |std| {
            Linear::builder(2, 3).init(Init::Normal { std }).build(&params()).map(drop)
        }),
        number("MoeConfig.capacity", &[1.25], POSITIVE, move |c| {
            moe(MoeConfig { capacity: Some(c), ..MoeConfig::new(4, 2, 8) })
        }),
        number("MoeConfig.jitter", &[0.0, 0.1], SHARE, move |jitter| {
            moe(MoeConfig { jitter, ..MoeConfig::new(4, 2, 8) })
        }),
        number("MoeConfig.z", &[0.0, 0.1], SCALE, move |z| moe(MoeConfig { z, ..MoeConfig::new(4, 2, 8) })),
        number("Balance::Batch", &[0.0, 0.1], SCALE, move |c| {
            moe(MoeConfig { balance: Balance::Batch(c), ..MoeConfig::new(4, 2, 8) })
        }),
        number("Balance::PerSample", &[0.1], SCALE, move |c| {
            moe(MoeConfig { balance: Balance::PerSample(c), ..MoeConfig::new(4, 2, 8) })
        }),
        number("Balance::Bias", &[0.1], SCALE, move |rate| {
            moe(MoeConfig { balance: Balance::Bias { rate }, ..MoeConfig::new(4, 2, 8) })
        }),
        number("AttentionOptions.scale", &[0.5, -0.5], &[NAN, INF, -INF], move |s| {
            attend(AttentionOptions { scale: Some(s), ..AttentionOptions::new(Span::Full) })
        }),
        number("AttentionOptions.dropout", &[0.1], SHARE, move |p| {
            attend(AttentionOptions { dropout: Some((p, 1)), ..AttentionOptions::new(Span::Full) })
        }),
        number("CrossEntropy.label_smoothing", &[0.0, 0.1], SHARE, |s| {
            let options = CrossEntropy { label_smoothing: s, ..CrossEntropy::default() };
            cross_entropy(&ones(&[2, 3]), Array::zeros(&[2], DType::U32), &options).map(drop)
        }),
        number("contrastive_loss", &[0.1], POSITIVE, |t| {
            contrastive_loss(&ones(&[2, 3]), &ones(&[2, 3]), t, &Samples::uniform(2, 1)).map(drop)
        }),
        number("RotaryTable.base", &[1e4], POSITIVE, |base| RotaryTable::new(4, 4, base).map(drop)),
        number("RotaryTable.frequencies", &[0.0, 1.0, -1.0], &[NAN, INF, -INF], |w| {
            RotaryTable::with_frequencies(4, &[1.0, w]).map(drop)
        }),
        number("LoraConfig.lora_alpha", &[8.0], &[NAN, INF, -INF], |alpha| {
            LoraConfig::new(2, alpha, &["c_attn"]).validate()
        }),
    ]
}

fn models() -> Vec<Number> {
    fn gpt(edit: impl Fn(&mut GptConfig, f64) + 'static) -> impl Fn(f64) -> Result<()> + 'static {
        move |x| {
            let mut c = small();
            edit(&mut c, x);
            Gpt::new(c, 0).map(drop)
        }
    }
    fn mix(edit: impl Fn(&mut MixtralConfig, f64) + 'static) -> impl Fn(f64) -> Result<()> + 'static {
        move |x| {
            let mut c = mixtral();
            edit(&mut c, x);
            Mixtral::new(c, 0).map(drop)
        }
    }
    let text = |s: Sampling| generate(&Gpt::new(small(), 0)?, &[1], 1, &s, None).map(drop);
    vec![
        number("GptConfig.embd_pdrop", &[0.1], SHARE, gpt(|c, x| c.embd_pdrop = x)),
        number("GptConfig.attn_pdrop", &[0.1], SHARE, gpt(|c, x| c.attn_pdrop = x)),
        number("GptConfig.resid_pdrop", &[0.1], SHARE, gpt(|c, x| c.resid_pdrop = x)),
        number("GptConfig.layer_norm_epsilon", &[0.0], SCALE, gpt(|c, x| c.layer_norm_epsilon = x)),
        number("GptConfig.initializer_range", &[0.0], SCALE, gpt(|c, x| c.initializer_range = x)),
        number("GptConfig.rope_theta", &[1e4], POSITIVE, gpt(|c, x| c.rope_theta = x)),
        number("MixtralConfig.rms_norm_eps", &[0.0], SCALE, mix(|c, x| c.rms_norm_eps = x)),
        number("MixtralConfig.initializer_range", &[0.0], SCALE, mix(|c, x| c.initializer_range = x)),
        number("MixtralConfig.rope_theta", &[1e6], POSITIVE, mix(|c, x| c.rope_theta = x)),
        number("MixtralConfig.router_aux_loss_coef", &[0.0], SCALE, mix(|c, x| c.router_aux_loss_coef = x)),
        number("MixtralConfig.router_jitter_noise", &[0.0], SHARE, mix(|c, x| c.router_jitter_noise = x)),
        number("Sampling.temperature", &[0.0, 0.8], SCALE, move |temperature| {
            text(Sampling { temperature, ..Sampling::default() })
        }),
        number("Sampling.top_p", &[0.5, 1.0], &[NAN, INF, -INF, 0.0, -0.5, 1.5], move |top_p| {
            text(Sampling { top_p, ..Sampling::default() })
        }),
    ]
}

fn training() -> Vec<Number> {
    let fixed = || Schedule::constant(0.1);
    let (warmup, total) = (1, 10);
    vec![
        number("Schedule::Constant", &[0.1], POSITIVE, |lr| step(Sgd::default(), Schedule::constant(lr))),
        number("Schedule::Cosine.lr", &[0.1], POSITIVE, move |lr| {
            step(Sgd::default(), Schedule::cosine(lr, warmup, total))
        }),
        number("Schedule::Cosine.floor", &[0.0, 1.0], &[NAN, INF, -INF, -5.0, 7.0], move |floor| {
            step(Sgd::default(), Schedule::Cosine { lr: 0.1, warmup, total, floor })
        }),
        number("Schedule::Linear", &[0.1], POSITIVE, move |lr| {
            step(Sgd::default(), Schedule::Linear { lr, warmup, total })
        }),
        number("Schedule::Switch.lr", &[0.1], POSITIVE, |lr| {
            step(Sgd::default(), Schedule::Switch { lr, then: 0.1, at: 3 })
        }),
        number("Schedule::Switch.then", &[0.1], POSITIVE, |then| {
            step(Sgd::default(), Schedule::Switch { lr: 0.1, then, at: 3 })
        }),
        number("Sgd.momentum", &[0.0, 0.9], SHARE, move |momentum| step(Sgd { momentum, ..Sgd::default() }, fixed())),
        number("Sgd.weight_decay", &[0.0, 0.1], SCALE, move |weight_decay| {
            step(Sgd { weight_decay, ..Sgd::default() }, fixed())
        }),
        number("AdamW.beta1", &[0.9], SHARE, move |beta1| step(AdamW { beta1, ..AdamW::default() }, fixed())),
        number("AdamW.beta2", &[0.99], SHARE, move |beta2| step(AdamW { beta2, ..AdamW::default() }, fixed())),
        number("AdamW.eps", &[1e-8], POSITIVE, move |eps| step(AdamW { eps, ..AdamW::default() }, fixed())),
        number("AdamW.weight_decay", &[0.0], SCALE, move |weight_decay| {
            step(AdamW { weight_decay, ..AdamW::default() }, fixed())
        }),
    ]
}

fn privacy() -> Vec<Number> {
    let key = || NoiseKey::from_seed_for_tests(1);
    let account = |sigma: f64, rate: f64| {
        let mut a = Accountant::new();
        a.record(sigma, rate, 10)?;
        Ok(a)
    };
    let adaptive = |quantile: f64, rate: f64, noise: f64| {
        target().clip(ClipFn::Abadi).thresholds(Thresholds::Adaptive { quantile, rate, noise }).check()
    };
    let audit = |delta: f64, confidence: f64| one_run(&[1.0, 0.0], &[true, false], 2, delta, confidence).map(drop);
    vec![
        number("PrivacyConfig.epsilon", &[1.0], POSITIVE, |e| PrivacyConfig { epsilon: e, ..target() }.check()),
        number("PrivacyConfig.delta", &[1e-6], BETWEEN, |d| PrivacyConfig { delta: d, ..target() }.check()),
        number("PrivacyConfig.expected_batch", &[1.0, 1000.0], &[NAN, INF, -INF, 0.0, -1.0, 1001.0], |b| {
            target().expected_batch(b).check()
        }),
        number("PrivacyConfig.max_grad_norm", &[1.0], POSITIVE, |r| target().max_grad_norm(r).check()),
        number("PrivacyConfig.noise_multiplier", &[1.0], POSITIVE, |s| target().noise_multiplier(s).check()),
        number("ClipFn::AutoS.gamma", &[0.01], POSITIVE, |gamma| target().clip(ClipFn::AutoS { gamma }).check()),
        number("Thresholds::Weighted", &[1.0], POSITIVE, |w| {
            Thresholds::Weighted(vec![1.0, w]).split(1.0, 2).map(drop)
        }),
        number("Thresholds::Adaptive.quantile", &[0.5], BETWEEN, move |x| adaptive(x, 0.2, 0.05)),
        number("Thresholds::Adaptive.rate", &[0.2], POSITIVE, move |x| adaptive(0.5, x, 0.05)),
        number("Thresholds::Adaptive.noise", &[0.05], POSITIVE, move |x| adaptive(0.5, 0.2, x)),
        number("Accountant::record.sigma", &[1.0], POSITIVE, move |s| account(s, 0.1).map(drop)),
        number("Accountant::record.rate", &[0.0, 1.0], RATE, move |q| account(1.0, q).map(drop)),
        number("Accountant::epsilon", &[1e-5], BETWEEN, move |d| account(1.0, 0.1)?.epsilon(d).map(drop)),
        number("Accountant::epsilon_rdp", &[1e-5], BETWEEN, move |d| account(1.0, 0.1)?.epsilon_rdp(d).map(drop)),
        number("Accountant::bracket", &[1e-5], BETWEEN, move |d| account(1.0, 0.1)?.bracket(d).map(drop)),
        number("Accountant::delta", &[1.0, 0.0], &[NAN], move |e| account(1.0, 0.1)?.delta(e).map(drop)),
        number("Accountant.interval", &[1e-3], &[NAN, INF, -INF, 0.0, -1.0, 1.0], move |h| {
            let mut a = account(1.0, 0.1)?;
            a.interval = h;
            a.epsilon(1e-5).map(drop)
        }),
        number("Accountant::epsilons.delta", &[1e-5], BETWEEN, |d| {
            Accountant::new().epsilons((1.0, 0.1), &[1, 5], d, 1e-3).map(drop)
        }),
        number("Accountant::epsilons.interval", &[1e-3], &[NAN, INF, -INF, 0.0, -1.0, 1.0], |h| {
            Accountant::new().epsilons((1.0, 0.1), &[1, 5], 1e-5, h).map(drop)
        }),
        number("Accountant::calibrate.epsilon", &[3.0], POSITIVE, |e| {
            Accountant::new().calibrate(e, 1e-5, 0.01, 1).map(drop)
        }),
        number("Accountant::calibrate.delta", &[], BETWEEN, |d| Accountant::new().calibrate(3.0, d, 0.01, 1).map(drop)),
        number("Accountant::calibrate.rate", &[], RATE, |q| Accountant::new().calibrate(3.0, 1e-5, q, 1).map(drop)),
        number("PoissonSampler", &[0.1, 1.0], &[NAN, INF, -INF, 0.0, -0.5, 1.5], move |q| {
            PoissonSampler::new(10, q, key()).map(drop)
        }),
        number("Weight::private", &[0.0, 1.0], RATE, |w| Weight::private(w).map(drop)),
        number("Weight::public", &[0.0, 1.0], RATE, |w| Weight::public(w).map(drop)),
        number("audit.delta", &[0.0, 0.1], SHARE, move |d| audit(d, 0.95)),
        number("audit.confidence", &[0.95], BETWEEN, move |c| audit(0.0, c)),
    ]
}

fn systems() -> Vec<Number> {
    let head =
        |dropout| HyTrel::new(&params(), &HyTrelConfig { vocab: 20, d: 8, layers: 1, heads: 2, dropout }).map(drop);
    let shown = |temperature| {
        let answers = Answers { classes: 2, labels: vec![0], probabilities: false, values: vec![1.0, 0.0] };
        reliability(&answers, &[0], temperature).map(drop)
    };
    vec![
        number("HyTrelConfig.dropout", &[0.1], SHARE, head),
        number("Corruption", &[0.15], SHARE, |rate| Corruption::new([].iter(), rate).map(drop)),
        number("Hypergraph::thinned", &[0.0, 1.0], RATE, |p| {
            Hypergraph::table(2, 2)?.thinned(p, &mut prismgrad::random::Rng::new(1)).map(drop)
        }),
        number("reliability", &[1.0], POSITIVE, shown),
        number("Head.dropout", &[0.5], SHARE, |p| Head::new(&params(), (8, 4, 2), p).map(drop)),
        number("Simulated.bandwidth", &[1e6, INF], &[NAN, -INF, -1.0, 0.0], |b| {
            Simulated::new(Local::group(1, Duration::ZERO).remove(0), Duration::ZERO, b).map(drop)
        }),
        number("train_routers", &[], POSITIVE, |lr| {
            let model = Mixtral::new(mixtral(), 0)?;
            train_routers(&model, 1, lr, |_, _| Ok(ones(&[1]))).map(drop)
        }),
        number("spectral", &[0.0, 0.5], SCALE, |s| spectral(&[1.0, s, s, 1.0], 2, 1, 1, 0).map(drop)),
        number("assign", &[-1.0, 0.5], &[NAN, INF, -INF], |c| assign(&[c], 1).map(drop)),
        number("best_static_merge.gate", &[0.0, 0.5], SCALE, |g| best_static_merge(&[(g, 0.5)], &[1.0]).map(drop)),
        number("best_static_merge.apart", &[0.0, 0.5], SCALE, |d| best_static_merge(&[(0.5, 0.5)], &[d]).map(drop)),
    ]
}

/// What combines models of several sources, over a pool of one source.
fn editing() -> Vec<Number> {
    fn merge(name: &'static str, fine: &'static [f64], wrong: &'static [f64], of: fn(f64) -> Merge) -> Number {
        number(name, fine, wrong, move |x| {
            let store = params();
            let w = store.param("layer.w", &[3], Init::Ones)?;
            let mut pool = VectorPool::new(&store, Tags::default())?;
            w.set(Array::from_slice(&[1.5f32, 2.0, 0.5], &[3])?)?;
            pool.add("source", &store, Tags::default(), Cost::default())?;
            pool.apply(&of(x), &store)
        })
    }
    const FACTOR: &[f64] = &[NAN, INF, -INF];
    const KEPT: &[f64] = &[NAN, INF, -INF, -0.5, 0.0, 1.5];
    vec![
        merge("Merge::Weights", &[0.0, -1.0, 2.0], FACTOR, |w| Merge::Weights(vec![w])),
        merge("Merge::Arithmetic", &[0.0, 0.3], FACTOR, Merge::Arithmetic),
        merge("Merge::PerLayer", &[0.0, 0.3], FACTOR, |w| Merge::PerLayer(vec![("layer".into(), vec![w])])),
        merge("Merge::Ties.density", &[0.5, 1.0], KEPT, |density| Merge::Ties {
            density,
            lambda: 1.0,
            normalise: true,
        }),
        merge("Merge::Ties.lambda", &[0.0, 1.0], FACTOR, |lambda| Merge::Ties {
            density: 0.5,
            lambda,
            normalise: true,
        }),
        merge("Merge::Dare.density", &[0.5, 1.0], KEPT, |density| Merge::Dare { density, lambda: 1.0, seed: 0 }),
        merge("Merge::Dare.lambda", &[0.0, 1.0], FACTOR, |lambda| Merge::Dare { density: 0.5, lambda, seed: 0 }),
    ]
}

/// Two words, each of which speaks for a class.
struct Words;

impl TextModel for Words {
    fn classes(&self) -> usize {
        2
    }
    fn logits(&self, batch: &Batch) -> Result<Vec<f32>> {
        let sign = |i: usize| if batch.get(i).contains(&"good") { 1.0 } else { -1.0 };
        Ok((0..batch.len()).flat_map(|i| [-sign(i), sign(i)]).collect())
    }
}

fn robustness() -> Vec<Number> {
    fn set() -> Result<TextSet> {
        let texts = vec![Text::new("a good film"), Text::new("a bad film")];
        TextSet::new(texts, vec![1, 0], vec!["bad".into(), "good".into()])
    }
    fn vectors() -> WordVectors {
        WordVectors::of_texts(&[Text::new("good film good film"), Text::new("bad film bad film")], 2, 0)
    }
    fn attack(edit: impl Fn(Attack, f64) -> Attack + 'static) -> impl Fn(f64) -> Result<()> + 'static {
        move |x| {
            let words = Synonyms::of_pairs([("good", "bad")]);
            edit(Attack::pwws(&words), x).run(&Served::new(&Words), &set()?).map(drop)
        }
    }
    let train = |edit: fn(&mut Training, f64)| {
        move |x: f64| {
            let set = set()?;
            let vocabulary = Vocabulary::of_texts(&set.texts, 1, 10);
            let model = Classifier::new(ModelConfig::bag(&set.classes), vocabulary, 0)?;
            let mut training = Training { epochs: 1, ..Training::default() };
            edit(&mut training, x);
            training.run(&model, &set, |_, _| {})
        }
    };
    let answers = || Answers { classes: 2, labels: vec![0], probabilities: false, values: vec![1.0, 0.0] };
    vec![
        number("Served.temperature", &[1e-4, 1e9], POSITIVE, |t| {
            Served::new(&Words).temperature(t).answer(&Batch::of_texts(&set()?.texts)).map(drop)
        }),
        number("Attack.max_changed", &[0.5, 1.0], &[NAN, INF, -INF, -0.5, 0.0, 1.5], attack(|a, x| a.max_changed(x))),
        number(
            "Attack.lens",
            &[0.5],
            POSITIVE,
            attack(|a, temperature| a.lens(Lens { score: Score::Margin, temperature })),
        ),
        number("Attack.similar", &[0.0, 0.9], RATE, |least| {
            let (words, near) = (Synonyms::of_pairs([("good", "bad")]), Similarity::new(vectors()));
            Attack::pwws(&words).similar(&near, least).run(&Served::new(&Words), &set()?).map(drop)
        }),
        number("best_temperature", &[1.0], POSITIVE, |near| {
            let words = Synonyms::of_pairs([("good", "bad")]);
            best_temperature(&Attack::pwws(&words), &Served::new(&Words), &set()?, near).map(drop)
        }),
        number("Neighbours", &[-1.0, 0.5, 1.0], &[NAN, INF, -INF, -1.5, 1.5], |least| {
            Neighbours::new(vectors(), 3, least).map(drop)
        }),
        number("Calibrate::Descent", &[0.01], POSITIVE, move |lr| {
            Calibrate::Descent { lr, steps: 3 }.fit(&answers(), &[0]).map(drop)
        }),
        number("Training.lr", &[1e-3], POSITIVE, train(|t, x| t.lr = x)),
        number("Training.temperature", &[0.5], POSITIVE, train(|t, x| t.temperature = x)),
        number("Training.label_smoothing", &[0.0, 0.1], SHARE, train(|t, x| t.label_smoothing = x)),
        number("Pgd.radius", &[0.0, 0.5], SCALE, train(|t, radius| t.pgd = Some(Pgd { steps: 2, radius }))),
    ]
}

fn code() -> Vec<Number> {
    fn coder() -> Result<(Coder, Vec<String>)> {
        let corpus = Corpus::new(4, 1, 0)?;
        let training = MiniTraining { width: 8, layers: 1, heads: 1, steps: 1, batch: 2, ..MiniTraining::default() };
        Ok((Coder::train(&corpus.train, &training, |_, _, _| {})?, corpus.train))
    }
    vec![
        number("mini::Training.rate", &[1e-3], POSITIVE, |rate| {
            let training = MiniTraining { width: 8, layers: 1, heads: 1, steps: 1, batch: 2, rate, seed: 0 };
            Coder::train(&Corpus::new(4, 1, 0)?.train, &training, |_, _, _| {}).map(drop)
        }),
        number("Draw.temperature", &[0.0, 0.8], SCALE, |temperature| {
            let (coder, programs) = coder()?;
            coder.complete(&programs[..1], &Draw { samples: 1, temperature, seed: 0 }).map(drop)
        }),
        number("rewrite.threshold", &[0.0, 0.9], RATE, |threshold| {
            let (coder, programs) = coder()?;
            rewrite(&coder, &programs[..1], threshold).map(drop)
        }),
        number("bootstrap", &[0.0, -1.0], &[NAN, INF, -INF], |x| bootstrap(&[x, 0.5], 10, 0).map(drop)),
        #[cfg(feature = "sandbox")]
        number("Limits.cpu_seconds", &[], POSITIVE, |cpu_seconds| {
            Sandbox::new(Limits { cpu_seconds, ..Limits::default() }).map(drop)
        }),
        #[cfg(feature = "sandbox")]
        number("Limits.wall_seconds", &[], &[NAN, -INF, -1.0, 0.0, 1.0], |wall_seconds| {
            Sandbox::new(Limits { wall_seconds, ..Limits::default() }).map(drop)
        }),
    ]
}

/// What a call does: an error's text, or nothing; a panic fails the test.
fn said(name: &str, give: impl FnOnce() -> Result<()>) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(give)) {
        Ok(done) => done.err().map(|e| e.to_string()),
        Err(_) => panic!("{name} panics"),
    }
}

#[test]
fn numbers_are_refused_where_they_are_given() {
    let all = [layers(), models(), training(), privacy(), systems(), editing(), robustness(), code()];
    let all = all.into_iter().flatten().collect::<Vec<_>>();
    let mut wrong = Vec::new();
    for Number(name, give, fine, bad) in &all {
        for &x in *fine {
            if let Some(e) = said(name, || give(x)) {
                wrong.push(format!("{name} = {x} is fine, but refused: {e}"));
            }
        }
        for &x in *bad {
            match said(&format!("{name} = {x}"), || give(x)) {
                None => wrong.push(format!("{name} = {x} is accepted")),
                Some(e) => {
                    let number = [format!("{x}"), format!("{x:e}"), format!("{x:?}")].iter().any(|n| e.contains(n));
                    let range = ["must", "between", "use ", "positive", "needs", "lies in", "without noise"]
                        .iter()
                        .any(|w| e.contains(w));
                    if !(number && range) {
                        wrong.push(format!("{name} = {x}: the sentence lacks the number or the range: {e}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} numbers:\n{}", wrong.len(), all.len(), wrong.join("\n"));
}

/// The privacy count of a private step has not moved when its optimizer is refused.
#[test]
fn an_optimizer_is_refused_before_a_private_step_is_counted() {
    let w = Param::new("w", Array::ones(&[2, 2], DType::F32));
    let privacy = Privacy::new(target(), NoiseKey::from_seed_for_tests(3)).unwrap();
    let wrong = AdamW { beta1: 1.5, ..AdamW::default() };
    let e = PrivateStep::new(&[w], privacy, wrong, Schedule::constant(0.1)).err().unwrap().to_string();
    assert!(e.contains("beta1 = 1.5") && e.contains("[0, 1)"), "{e}");
}

/// A size: where, what takes it, and whether 0 makes a layer (of nothing).
type Size = (&'static str, Box<dyn Fn(usize) -> Result<()>>, bool);

fn size(name: &'static str, zero: bool, give: impl Fn(usize) -> Result<()> + 'static) -> Size {
    (name, Box::new(give), zero)
}

fn sizes() -> Vec<Size> {
    let p = params;
    let moe = |c: MoeConfig, d: usize| Moe::new(&params(), d, &c).map(drop);
    let mut all = vec![
        size("Linear.d", true, move |n| Linear::new(&p(), n, 2).map(drop)),
        size("Linear.p", true, move |n| Linear::new(&p(), 2, n).map(drop)),
        size("Embedding.rows", true, move |n| Embedding::new(&p(), n, 2).map(drop)),
        size("Embedding.d", true, move |n| Embedding::new(&p(), 2, n).map(drop)),
        size("EmbeddingBag", true, move |n| EmbeddingBag::new(&p(), n, 2).map(drop)),
        size("LayerNorm", true, move |n| LayerNorm::new(&p(), n).map(drop)),
        size("RmsNorm", true, move |n| RmsNorm::new(&p(), n).map(drop)),
        size("GroupNorm.groups", false, move |n| GroupNorm::new(&p(), n, 4).map(drop)),
        size("GroupNorm.channels", true, move |n| GroupNorm::new(&p(), 1, n).map(drop)),
        size("Conv1d.cin", true, move |n| Conv1d::new(&p(), n, 2, 3).map(drop)),
        size("Conv2d.cout", true, move |n| Conv2d::new(&p(), 2, n, 3).map(drop)),
        size("Conv2d.kernel", true, move |n| Conv2d::new(&p(), 2, 2, n).map(drop)),
        size("Conv2d.groups", false, move |n| Conv2d::builder(2, 2, 3).groups(n).build(&p()).map(drop)),
        size("MultiHeadAttention.d", true, move |n| MultiHeadAttention::new(&p(), n, 1).map(drop)),
        size("MultiHeadAttention.heads", false, move |n| MultiHeadAttention::new(&p(), 4, n).map(drop)),
        size("MultiHeadAttention.kv_heads", false, move |n| {
            MultiHeadAttention::builder(4, 2).kv_heads(Some(n)).build(&p()).map(drop)
        }),
        size("Mlp.d", true, move |n| Mlp::new(&p(), n, 2).map(drop)),
        size("Mlp.hidden", true, move |n| Mlp::new(&p(), 2, n).map(drop)),
        size("SwiGlu.hidden", true, move |n| SwiGlu::new(&p(), 2, n).map(drop)),
        size("TransformerBlock.d", true, move |n| TransformerBlock::new(&p(), n, 1).map(drop)),
        size("TransformerBlock.heads", false, move |n| TransformerBlock::new(&p(), 4, n).map(drop)),
        size("Moe.d", false, move |n| moe(MoeConfig::new(4, 2, 8), n)),
        size("Moe.experts", false, move |n| moe(MoeConfig::new(n, 1, 8), 4)),
        size("Moe.top_k", false, move |n| moe(MoeConfig::new(4, n, 8), 4)),
        size("Moe.hidden", false, move |n| moe(MoeConfig::new(4, 2, n), 4)),
        size("Moe.shared", true, move |n| moe(MoeConfig { shared: n, ..MoeConfig::new(4, 2, 8) }, 4)),
        size("SetAttention.heads", false, move |n| SetAttention::new(&p(), 4, n).map(drop)),
        size("HyperTrans.heads", false, move |n| HyperTrans::new(&p(), 4, n).map(drop)),
        size("Hgnn", true, move |n| Hgnn::new(&p(), n, 2).map(drop)),
        size("DeepSets", true, move |n| DeepSets::new(&p(), 2, n).map(drop)),
        size("LoraConfig.r", false, |n| {
            let mut m = Gpt::new(small(), 0)?;
            m.add_lora(&LoraConfig::new(n, 8.0, &["c_attn"])).map(drop)
        }),
        size("RotaryTable.len", true, |n| RotaryTable::new(n, 4, 1e4).map(drop)),
        size("RotaryTable.dim", true, |n| RotaryTable::new(4, n & !1, 1e4).map(drop)),
    ];
    for (name, edit) in [
        ("GptConfig.vocab_size", (|c, n| c.vocab_size = n) as fn(&mut GptConfig, usize)),
        ("GptConfig.n_positions", |c, n| c.n_positions = n),
        ("GptConfig.n_positions, rotary", |c, n| {
            *c = c.clone().rotary();
            c.n_positions = n
        }),
        ("GptConfig.n_embd", |c, n| (c.n_embd, c.n_head) = (n, 1)),
        ("GptConfig.n_layer", |c, n| c.n_layer = n),
        ("GptConfig.n_head", |c, n| c.n_head = n),
        ("GptConfig.n_head_kv", |c, n| c.n_head_kv = Some(n)),
    ] {
        all.push(size(name, false, move |n| {
            let mut c = small();
            edit(&mut c, n);
            Gpt::new(c, 0).map(drop)
        }));
    }
    for (name, edit) in [
        ("MixtralConfig.vocab_size", (|c, n| c.vocab_size = n) as fn(&mut MixtralConfig, usize)),
        ("MixtralConfig.hidden_size", |c, n| c.hidden_size = n),
        ("MixtralConfig.intermediate_size", |c, n| c.intermediate_size = n),
        ("MixtralConfig.num_hidden_layers", |c, n| c.num_hidden_layers = n),
        ("MixtralConfig.num_attention_heads", |c, n| c.num_attention_heads = n),
        ("MixtralConfig.num_key_value_heads", |c, n| c.num_key_value_heads = n),
        ("MixtralConfig.head_dim", |c, n| c.head_dim = Some(n & !1)),
        ("MixtralConfig.max_position_embeddings", |c, n| c.max_position_embeddings = n),
        ("MixtralConfig.num_local_experts", |c, n| c.num_local_experts = ExpertCounts::Same(n)),
        ("MixtralConfig.num_experts_per_tok", |c, n| c.num_experts_per_tok = n),
    ] {
        all.push(size(name, false, move |n| {
            let mut c = mixtral();
            edit(&mut c, n);
            Mixtral::new(c, 0).map(drop)
        }));
    }
    all
}

#[test]
fn sizes_are_refused_where_they_are_given() {
    let mut wrong = Vec::new();
    for (name, give, zero) in &sizes() {
        if let (Some(e), true) = (said(&format!("{name} = 0"), || give(0)), zero) {
            wrong.push(format!("{name} = 0 is a layer of nothing, but refused: {e}"));
        }
        if !zero && said(&format!("{name} = 0"), || give(0)).is_none() {
            wrong.push(format!("{name} = 0 is accepted"));
        }
        for n in [usize::MAX, usize::MAX / 2 + 1, 1 << 61] {
            if said(&format!("{name} = {n}"), || give(n)).is_none() {
                wrong.push(format!("{name} = {n} is accepted"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Nothing, where something is needed.
#[test]
fn nothing_is_refused() {
    assert!(Span::Window(0).validate().is_err() && Span::Block(0).validate().is_err());
    assert!(Span::Window(usize::MAX).validate().is_ok(), "as wide as any sequence");
    assert!(target().records(0).check().is_err() && target().steps(0).check().is_err());
    let w = Param::new("w", Array::ones(&[1], DType::F32));
    let mut step = PlainStep::new(&[w], Sgd::default(), Schedule::constant(0.1)).unwrap();
    assert!(step.predict(0, |n| Ok(Tensor::zeros(&[n], DType::F32))).is_err());
    assert!(step.run([(); 0], |_| Ok(ones(&[1]))).is_err());
}

/// A cache that is asked to reserve more than there is takes what it needs.
#[test]
fn a_cache_reserves_no_more_than_it_can() {
    let m = Gpt::new(small(), 0).unwrap();
    let ids = Array::from_slice(&[1u32, 2], &[1, 2]).unwrap();
    let mut caches = vec![KvCache::reserving(usize::MAX); 1];
    m.forward_cached(&ids, &mut caches, 0, &Ctx::eval()).unwrap();
    assert_eq!(caches[0].seen(), 2);
    assert_eq!(
        Sampling::default().draw(&[], &mut prismgrad::random::Rng::new(0)),
        0,
        "nothing to draw from is no panic"
    );
}
