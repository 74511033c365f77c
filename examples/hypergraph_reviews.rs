//! A hypergraph of texts and words: film reviews are nodes, words are hyperedges, and only a few reviews have labels. It compares HGNN,
//! deep sets and set attention with networks that use only each review's own words.
//!
//! ```text
//! cargo run --release --example hypergraph_reviews
//! ```
//!
//! Writes `plots/accuracy` (`.svg` and `.png`) and `summary.json` to the run folder. The table of `docs/results/hypergraph.md` is of the
//! default run.

#[path = "common/args.rs"]
mod args;
#[path = "common/bags.rs"]
mod bags;
#[path = "common/study.rs"]
mod study;

use bags::{Bag, Linear, f1};
use prismgrad::data::{CrateSources, Hypergraph, shuffled};
use prismgrad::nn::hypergraph::{Aggregate, DeepSets, Hgnn, SetAttention, Structure};
use prismgrad::nn::{Ctx, Dropout, EmbeddingBag, Init, LayerNorm, Params};
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::random::Rng;
use prismgrad::step::PlainStep;
use prismgrad::systems::robustness::data::reviews;
use prismgrad::train::Progress;
use prismgrad::train::plot::BarChart;
use prismgrad::{Array, DType, Result, Tensor, no_grad};
use serde_json::{Value, json};
use std::time::Instant;
use study::interval;

const OPTIONS: &[args::Opt] = &[
    ("seeds", "3", "2", "random choices of the labelled reviews, the same for all methods; at least 2"),
    ("steps", "60", "4", "steps of each network, each over all reviews"),
    ("labels", "0.01", "0.01", "share of the reviews that have labels"),
    ("texts", "100000", "1500", "the most reviews that are used"),
    ("width", "32", "16", "width of the networks"),
    ("rate", "0.01", "0.01", "learning rate of the networks"),
];

/// Texts, their classes, and the hypergraph, in which a word is a hyperedge over the texts that contain it.
struct Data {
    labels: Vec<u32>,
    graph: Hypergraph,
    rewired: Hypergraph,
    real: bool,
}

impl Data {
    fn load(most: usize) -> Result<Data> {
        let (mut texts, mut labels, mut real) = (Vec::new(), Vec::new(), true);
        match reviews() {
            Ok(parts) => {
                for part in parts {
                    texts.extend(part.texts.iter().map(|t| t.source().to_string()));
                    labels.extend(part.labels);
                }
            }
            Err(e) => {
                eprintln!("{e}. Going on with lines of crate sources: is it a comment?");
                real = false;
                for document in CrateSources::new().max_bytes(1 << 20).load()?.documents {
                    for line in document.text.lines().filter(|l| l.len() > 50) {
                        let comment = line.trim_start().starts_with("//");
                        texts.push(line.trim_start_matches(['/', ' ', '!']).to_string());
                        labels.push(u32::from(comment));
                    }
                }
            }
        }
        let kept: Vec<usize> =
            shuffled(texts.len(), 3).into_iter().take(if real { most } else { most.min(10_000) }).collect();
        let texts: Vec<&String> = kept.iter().map(|&i| &texts[i]).collect();
        let labels = kept.iter().map(|&i| labels[i]).collect();
        let (graph, _) = Hypergraph::of_words(&texts, 5..=500)?;
        let rewired = graph.rewired(&mut Rng::new(5))?;
        Ok(Data { labels, graph, rewired, real })
    }
}

/// The kind of network.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Mlp,
    Hgnn,
    DeepSets,
    SetAttention,
}

/// Two rounds of message passing from nodes to hyperedges and back.
enum Layers {
    None,
    Hgnn(Box<[Hgnn; 2]>),
    DeepSets(Box<DeepSets>),
    SetAttention(Box<[SetAttention; 2]>),
}

/// The initial state of a review is the mean of the embeddings of its own words. Its state after message passing is concatenated with that;
/// a hidden layer and two logits follow.
struct Network {
    params: Params,
    embed: EmbeddingBag,
    layers: Layers,
    norm: LayerNorm,
    hidden: prismgrad::nn::Linear,
    out: prismgrad::nn::Linear,
    drop: Dropout,
}

impl Network {
    fn new(kind: Kind, words: usize, d: usize, seed: u64) -> Result<Network> {
        let params = Params::new(seed, DType::F32);
        let at = |name: &str| params.at(name);
        let layers = match kind {
            Kind::Mlp => Layers::None,
            Kind::Hgnn => Layers::Hgnn(Box::new([Hgnn::new(&at("a"), d, d)?, Hgnn::new(&at("b"), d, d)?])),
            Kind::DeepSets => {
                Layers::DeepSets(Box::new(DeepSets::builder(d, 2 * d).how(Aggregate::Mean).build(&at("a"))?))
            }
            Kind::SetAttention => {
                let layer = SetAttention::builder(d, 4).dropout(0.1);
                Layers::SetAttention(Box::new([layer.build(&at("a"))?, layer.build(&at("b"))?]))
            }
        };
        Ok(Network {
            embed: EmbeddingBag::builder(words, d).init(Init::Normal { std: 0.3 }).build(&at("embed"))?,
            norm: LayerNorm::new(&at("norm"), 2 * d)?,
            hidden: prismgrad::nn::Linear::new(&at("hidden"), 2 * d, d)?,
            out: prismgrad::nn::Linear::new(&at("out"), d, 2)?,
            drop: Dropout::new(&at("drop"), 0.5)?,
            layers,
            params,
        })
    }
    /// Logits of all reviews. `own` is the hypergraph whose words give the initial states, `s` the one for message passing.
    fn logits(&self, own: &Hypergraph, s: &Structure, ctx: &Ctx) -> Result<Tensor> {
        let words = own.structure().edges_of();
        let ids = Array::from_slice(words.members(), &[words.len()])?;
        let x = self.embed.forward_bags(ids, words.segments(), None, ctx)?;
        let h = match &self.layers {
            Layers::None => x.clone(),
            Layers::Hgnn(both) => {
                let [a, b] = &**both;
                let h = a.forward(&x, s, None, ctx)?.relu()?;
                b.forward(&self.drop.forward(&h, ctx)?, s, None, ctx)?
            }
            Layers::DeepSets(a) => a.forward(&x, s, ctx)?.0,
            Layers::SetAttention(both) => {
                let [a, b] = &**both;
                let e = a.forward(&x, s.nodes_of(), (s.nodes(), s.edges()), ctx)?.relu()?;
                b.forward(&e, s.edges_of(), (s.edges(), s.nodes()), ctx)?.relu()?
            }
        };
        let both = self.norm.forward(&Tensor::concat(&[&x, &h], 1)?, ctx)?;
        let h = self.hidden.forward_act(&both, prismgrad::ops::linear::Activation::Relu, ctx)?;
        self.out.forward(&self.drop.forward(&h, ctx)?, ctx)
    }
    /// Trains on the labelled reviews, and returns the accuracy on the others.
    fn accuracy(
        &self,
        data: &Data,
        s: &Structure,
        labelled: &[usize],
        rest: &[usize],
        (steps, lr): (u64, f64),
        what: &str,
    ) -> Result<f64> {
        let schedule = Schedule::cosine(lr, (steps / 10).max(1), steps.max(2));
        let mut step = PlainStep::new(&self.params.all(), AdamW { weight_decay: 0.01, ..AdamW::default() }, schedule)?;
        let ids: Vec<u32> = labelled.iter().map(|&i| i as u32).collect();
        let ids = Array::from_slice(&ids, &[ids.len()])?;
        let targets: Vec<u32> = labelled.iter().map(|&i| data.labels[i]).collect();
        let targets = Array::from_slice(&targets, &[targets.len()])?;
        let mut progress = Progress::new(what, Some(steps), 0);
        for t in 0..steps {
            let report = step.run_one(|| {
                let logits = self.logits(&data.graph, s, &Ctx::train(t))?.index_select(0, &ids)?;
                cross_entropy(&logits, &targets, &CrossEntropy::default())
            })?;
            if (t + 1) % (steps / 4).max(1) == 0 {
                progress.set(t + 1, &[("loss", report.loss()?)]);
            }
        }
        progress.finish();
        let best = no_grad(|| self.logits(&data.graph, s, &Ctx::eval()))?.argmax(-1)?.array().to_f64();
        let right = rest.iter().filter(|&&i| best[i] == f64::from(data.labels[i])).count();
        Ok(right as f64 / rest.len() as f64)
    }
}

/// The numbers of the labelled reviews, half of them from each class, and of the others.
fn chosen(data: &Data, share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let each = ((share * data.labels.len() as f64 / 2.0).round() as usize).max(2);
    let mut counts = [0; 2];
    shuffled(data.labels.len(), 100 + seed).into_iter().partition(|&i| {
        let count = &mut counts[data.labels[i] as usize];
        *count += 1;
        *count <= each
    })
}

/// Softmax regression on the reviews' words.
fn linear(data: &Data, labelled: &[usize], rest: &[usize]) -> f64 {
    let words = data.graph.structure().edges_of();
    let bag = |&i: &usize| -> Bag {
        let set = words.set(i);
        set.iter().map(|&w| (w, 1.0 / (set.len() as f32).sqrt())).collect()
    };
    let rows: Vec<Bag> = labelled.iter().map(bag).collect();
    let labels: Vec<u32> = labelled.iter().map(|&i| data.labels[i]).collect();
    let model = Linear::train(&rows.iter().collect::<Vec<_>>(), &labels, (data.graph.edges(), 2), 50, 0.1, 0);
    let found: Vec<u32> = rest.iter().map(|i| model.class(&bag(i))).collect();
    let wanted: Vec<u32> = rest.iter().map(|&i| data.labels[i]).collect();
    f1(&found, &wanted, 2).0
}

/// The verdict on the claim that a is above b, paired by seed.
fn verdict(claim: &str, a: &[f64], b: &[f64]) -> Value {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let (mean, half) = interval(&differences);
    let word = study::word(mean, half);
    println!("{claim}: {word} (difference {:.2} ± {:.2} points)", 100.0 * mean, 100.0 * half);
    json!({"claim": claim, "verdict": word, "difference": mean, "half_interval": half, "seeds": differences.len()})
}

fn run() -> Result<()> {
    let args = args::Args::parse("hypergraph_reviews", "Reviews as nodes, words as hyperedges, few labels.", OPTIONS);
    let whole = |name: &str, accepted: &str, range: std::ops::RangeInclusive<usize>| {
        args.get(name, accepted, |n: &usize| range.contains(n))
    };
    let seeds = whole("seeds", "a whole number from 2 to 10", 2..=10) as u64;
    let steps = whole("steps", "a whole number from 2 to 100000", 2..=100_000) as u64;
    let most = whole("texts", "a whole number from 500 to 1000000", 500..=1_000_000);
    let d = whole("width", "a multiple of 4 from 8 to 512", 8..=512);
    if d % 4 != 0 {
        args::fail(format!("--width cannot be {d}; give a multiple of 4, since there are four heads"));
    }
    let share = args.get("labels", "a share above 0 and below 0.5, such as 0.01", |s: &f64| *s > 0.0 && *s < 0.5);
    let lr = args.get("rate", "a positive number, such as 0.01", |r: &f64| r.is_finite() && *r > 0.0);
    let mut folder = args.folder(&json!({
        "seeds": seeds, "steps": steps, "texts": most, "width": d, "labels": share, "rate": lr,
    }))?;
    println!("about {} on two cores", if args.has("quick") { "20 seconds" } else { "3 minutes" });
    let start = Instant::now();
    let data = Data::load(most)?;
    println!(
        "{} texts, {} words as hyperedges, {} incidences",
        data.graph.nodes(),
        data.graph.edges(),
        data.graph.incidences()
    );
    let kinds = [Kind::Mlp, Kind::Hgnn, Kind::DeepSets, Kind::SetAttention];
    let name = |kind: Kind, rewired: bool| {
        let name = match kind {
            Kind::Mlp => "own words, a network",
            Kind::Hgnn => "HGNN",
            Kind::DeepSets => "deep sets",
            Kind::SetAttention => "set attention",
        };
        if rewired { format!("{name}, rewired") } else { name.to_string() }
    };
    let mut all: Vec<(String, Vec<f64>, f64)> = vec![("own words, linear".to_string(), Vec::new(), 0.0)];
    for (kind, rewired) in kinds.iter().flat_map(|&k| [(k, false), (k, true)]).filter(|a| *a != (Kind::Mlp, true)) {
        all.push((name(kind, rewired), Vec::new(), 0.0));
    }
    for seed in 0..seeds {
        let (labelled, rest) = chosen(&data, share, seed);
        all[0].1.push(linear(&data, &labelled, &rest));
        for row in &mut all[1..] {
            let kind = kinds.iter().copied().find(|&k| row.0.starts_with(&name(k, false))).unwrap_or(Kind::Mlp);
            let graph = if row.0.ends_with("rewired") { &data.rewired } else { &data.graph };
            let clock = Instant::now();
            let network = Network::new(kind, data.graph.edges(), d, seed)?;
            let what = format!("{}, seed {seed}", row.0);
            row.1.push(network.accuracy(&data, graph.structure(), &labelled, &rest, (steps, lr), &what)?);
            row.2 += clock.elapsed().as_secs_f64() / seeds as f64;
        }
    }
    let mut chart = BarChart::new(format!("Reviews with {} % of the labels", 100.0 * share)).label("accuracy, percent");
    for (i, (name, scores, seconds)) in all.iter().enumerate() {
        let (mean, half) = interval(scores);
        println!("{name:<24} {:.2} ± {:.2}  ({seconds:.1} s a run)", 100.0 * mean, 100.0 * half);
        chart = chart.bar_with_interval(name.clone(), 100.0 * mean, 100.0 * (mean - half), 100.0 * (mean + half));
        folder.log(i as u64, &json!({"method": name, "accuracy": scores, "seconds": seconds}))?;
    }
    chart.save(folder.plot("accuracy"))?;
    let of = |name: &str| all.iter().find(|r| r.0 == name).map_or(&[][..], |r| &r.1[..]);
    let mlp = of("own words, a network");
    let verdicts = vec![
        verdict("HGNN is above the network on own words", of("HGNN"), mlp),
        verdict("deep sets are above the network on own words", of("deep sets"), mlp),
        verdict("set attention is above the network on own words", of("set attention"), mlp),
        verdict("HGNN is above the linear model", of("HGNN"), of("own words, linear")),
        verdict("HGNN is above itself on the rewired hypergraph", of("HGNN"), of("HGNN, rewired")),
        verdict("deep sets are above themselves on the rewired hypergraph", of("deep sets"), of("deep sets, rewired")),
        verdict(
            "set attention is above itself on the rewired hypergraph",
            of("set attention"),
            of("set attention, rewired"),
        ),
        verdict(
            "HGNN on the rewired hypergraph is above the network on own words (must not hold)",
            of("HGNN, rewired"),
            mlp,
        ),
    ];
    // A planted defect: the model is trained on the reviews on which it is tested.
    let (_, rest) = chosen(&data, share, 0);
    let leak = linear(&data, &rest, &rest);
    let few = interval(of("own words, linear")).0;
    if leak < few + 0.15 {
        let message = format!(
            "trained on what is asked for, the linear model has {leak:.3}, without {few:.3}: a leak would not be seen"
        );
        return Err(prismgrad::Error::Invalid { op: "hypergraph_reviews", message });
    }
    folder.finish(&json!({
        "real_reviews": data.real, "nodes": data.graph.nodes(), "hyperedges": data.graph.edges(),
        "incidences": data.graph.incidences(), "planted_leak": leak,
        "methods": all.iter().map(|r| json!({"method": r.0, "accuracy": r.1, "seconds": r.2})).collect::<Vec<_>>(),
        "verdicts": verdicts, "tries": "one learning rate for every network", "seconds": start.elapsed().as_secs_f64(),
    }))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
