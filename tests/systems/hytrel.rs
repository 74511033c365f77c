//! HyTrel: sizes, what rows and columns in another order change, batches, per-table gradients, objectives, private steps, bad input.

use crate::common::skip::skip;
use prismgrad::check;
use prismgrad::data::{Bpe, TabFact, Table, shuffled};
use prismgrad::nn::hypergraph::HyperTrans;
use prismgrad::nn::{Ctx, Params};
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::optim::{AdamW, Schedule, Sgd};
use prismgrad::random::{NoiseKey, Rng};
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep};
use prismgrad::systems::hytrel::{
    Corrupted, Corruption, Cuts, Detector, Encoded, Head, HyTrel, HyTrelConfig, Sets, TableBatch, TableLimits,
    TableTokenizer,
};
use prismgrad::{Array, DType, Result, Samples, Tensor, no_grad};
use std::sync::OnceLock;

/// Tables of Wikipedia pages where they are at hand; tables of words and numbers otherwise.
fn tables() -> &'static [Table] {
    static TABLES: OnceLock<Vec<Table>> = OnceLock::new();
    TABLES.get_or_init(|| match TabFact::load() {
        Ok(set) => shuffled(set.tables.len(), 1).into_iter().take(500).map(|i| set.tables[i].clone()).collect(),
        Err(_) => {
            skip("the tables are missing; made ones take their place");
            (0..500).map(made).collect()
        }
    })
}

fn made(i: u64) -> Table {
    let mut rng = Rng::new(i);
    let mut text = |n: u64| (0..1 + rng.below(n)).map(|_| format!("w{} ", rng.below(60))).collect::<String>();
    let (rows, columns) = (2 + i as usize % 9, 1 + i as usize % 6);
    let headers = (0..columns).map(|_| text(2)).collect();
    let rows = (0..rows).map(|_| (0..columns).map(|_| text(3)).collect()).collect();
    Table::new(format!("t{i}"), format!("table {i}"), headers, rows).unwrap()
}

fn tokenizer() -> &'static TableTokenizer {
    static TOKENIZER: OnceLock<TableTokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let texts = tables().iter().take(100).flat_map(|t| t.rows.concat());
        TableTokenizer::new(Bpe::train(texts.map(|t| TableTokenizer::learnable(&t)), 600).unwrap())
    })
}

fn encoded() -> &'static [Encoded] {
    static ENCODED: OnceLock<Vec<Encoded>> = OnceLock::new();
    ENCODED.get_or_init(|| {
        let encode = |t: &Table| tokenizer().table(t, &TableLimits::default(), &mut Cuts::default()).unwrap();
        tables().iter().map(encode).collect()
    })
}

fn model(dtype: DType, dropout: f64) -> (HyTrel, Params) {
    let params = Params::new(7, dtype);
    let config = HyTrelConfig { d: 16, layers: 2, heads: 2, dropout, vocab: tokenizer().vocab() };
    (HyTrel::new(&params.at("m"), &config).unwrap(), params)
}

fn batch(tables: &[&Encoded]) -> TableBatch {
    TableBatch::new(tables, tokenizer(), Sets::default()).unwrap()
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| if a.is_nan() || b.is_nan() { f64::NAN } else { m.max((a - b).abs()) })
}

#[test]
fn sizes_are_the_papers() {
    assert_eq!(HyTrelConfig::base().parameters(), 179_427_072);
    assert_eq!(HyTrelConfig { dropout: 0.0, ..HyTrelConfig::small(4101) }.parameters(), 446_528);
    let count = |c: &HyTrelConfig| {
        let params = Params::new(0, DType::F32);
        HyTrel::new(&params, c).unwrap();
        params.count()
    };
    for c in [HyTrelConfig::small(4101), HyTrelConfig { d: 24, layers: 3, heads: 3, ..HyTrelConfig::small(50) }] {
        assert_eq!(count(&c), c.parameters());
    }
    // A layer of the base size.
    let params = Params::new(0, DType::F32);
    HyperTrans::new(&params, 768, 12).unwrap();
    assert_eq!(params.count(), 12_998_400);
}

/// Cells, rows' and columns' states of one table in a batch, and the table's.
struct Seen {
    cells: Vec<f64>,
    columns: Vec<f64>,
    table: Vec<f64>,
}

fn seen(model: &HyTrel, tables: &[&Encoded], exact: bool) -> Vec<Seen> {
    let mut all = Vec::new();
    for part in tables.chunks(100) {
        let b = if exact { batch(part).by_values() } else { batch(part) };
        let s = no_grad(|| model.forward(&b, &Ctx::eval())).unwrap();
        let (cells, edges) = (s.cells.array().to_f64(), s.edges.array().to_f64());
        let d = model.config().d;
        let (first, (columns, of)) = (b.table_edges(), b.column_edges());
        for t in 0..part.len() {
            let r = b.cells_of(t);
            let own = columns.iter().zip(&of).filter(|(_, o)| **o == t as u32);
            let row = |e: u32| edges[e as usize * d..(e as usize + 1) * d].to_vec();
            all.push(Seen {
                cells: cells[r.start * d..r.end * d].to_vec(),
                columns: own.flat_map(|(&e, _)| row(e)).collect(),
                table: row(first[t]),
            });
        }
    }
    all
}

/// 500 tables, rows and columns in five other orders each: the table's state stays, the others go along. Two cells of a column exchanged
/// are another table.
#[test]
fn the_order_of_rows_and_columns_does_not_matter_and_nothing_else_is_like_it() {
    let (model, _) = model(DType::F32, 0.0);
    let d = 16;
    let originals: Vec<&Encoded> = encoded().iter().collect();
    for exact in [false, true] {
        let before = seen(&model, &originals, exact);
        // To the bit, one order for each is enough.
        for k in 0..if exact { 1 } else { 5 } {
            let orders: Vec<(Vec<usize>, Vec<usize>)> = originals
                .iter()
                .enumerate()
                .map(|(i, t)| (shuffled(t.rows, (10 * i + k) as u64), shuffled(t.columns, (7 * i + k) as u64)))
                .collect();
            let moved: Vec<Encoded> = originals.iter().zip(&orders).map(|(t, o)| t.reordered(&o.0, &o.1)).collect();
            let after = seen(&model, &moved.iter().collect::<Vec<_>>(), exact);
            for (i, (a, b)) in before.iter().zip(&after).enumerate() {
                let columns = originals[i].columns;
                let mut worst = far(&a.table, &b.table);
                for (r, &from_r) in orders[i].0.iter().enumerate() {
                    for (c, &from_c) in orders[i].1.iter().enumerate() {
                        let (old, new) = (from_r * columns + from_c, r * columns + c);
                        worst = worst.max(far(&a.cells[old * d..][..d], &b.cells[new * d..][..d]));
                    }
                }
                for (c, &from) in orders[i].1.iter().enumerate() {
                    worst = worst.max(far(&a.columns[from * d..][..d], &b.columns[c * d..][..d]));
                }
                assert!(if exact { worst == 0.0 } else { worst <= 1e-5 }, "table {i}, exact {exact}: {worst:.1e}");
            }
        }
    }
    let before = seen(&model, &originals, true);
    let mut edited: Vec<Encoded> = Vec::new();
    let mut which = Vec::new();
    for (i, t) in originals.iter().enumerate() {
        // Two unequal cells of a column in rows that differ elsewhere too: else exchanging them is a permutation.
        let cell = |r: usize, c: usize| &t.cells[r * t.columns + c];
        let pairs = (0..t.columns).flat_map(|c| (1..t.rows).map(move |r| (r, c)));
        let apart = |&(r, c): &(usize, usize)| {
            cell(0, c) != cell(r, c) && (0..t.columns).any(|k| k != c && cell(0, k) != cell(r, k))
        };
        if let Some((r, c)) = pairs.into_iter().find(apart) {
            let mut new = (*t).clone();
            new.cells.swap(c, r * t.columns + c);
            edited.push(new);
            which.push(i);
        }
    }
    assert!(which.len() > 300, "{} tables could be edited", which.len());
    let after = seen(&model, &edited.iter().collect::<Vec<_>>(), true);
    let moved = which.iter().zip(&after).filter(|(i, s)| far(&before[**i].table, &s.table) > 0.0).count();
    assert!(moved * 100 >= which.len() * 99, "{moved} of {} edits have moved the table's state", which.len());
}

#[test]
fn a_batch_is_its_tables_one_by_one() {
    let (model, _) = model(DType::F64, 0.0);
    let some: Vec<&Encoded> = encoded()[..12].iter().collect();
    let together = seen(&model, &some, false);
    for (t, want) in some.iter().zip(&together) {
        let alone = &seen(&model, &[t], false)[0];
        assert!(far(&alone.cells, &want.cells) < 1e-12 && far(&alone.columns, &want.columns) < 1e-12);
        assert!(far(&alone.table, &want.table) < 1e-12);
    }
}

/// Tables of few cells, so that the check of each table alone is quick.
fn few() -> Vec<Encoded> {
    encoded().iter().filter(|t| t.rows * t.columns <= 40 && t.columns > 1).take(4).cloned().collect()
}

fn corrupted(tables: &[Encoded]) -> Vec<Corrupted> {
    let corruption = Corruption::new(encoded().iter(), 0.3).unwrap();
    tables.iter().enumerate().map(|(i, t)| corruption.apply(t, 5, i as u64)).collect()
}

#[test]
fn each_tables_gradient_is_its_own() {
    let tables = few();
    let b = batch(&tables.iter().collect::<Vec<_>>());
    let d = 16;
    let (m, params) = model(DType::F64, 0.0);
    let head = Head::new(&params.at("head"), (d, 8, 3), 0.0).unwrap();
    let pairs = Head::new(&params.at("pairs"), (2 * d, 8, 3), 0.0).unwrap();
    let ctx = Ctx::eval();
    let ask = |logits: &Tensor, of: &Samples| {
        let targets: Vec<u32> = (0..logits.shape()[0] as u32).map(|i| i % 3).collect();
        let options = CrossEntropy { samples: Some(of.clone()), ..CrossEntropy::default() };
        cross_entropy(logits, Array::from_slice(&targets, &[targets.len()])?, &options)
    };
    let named = |part: &str| params.all().into_iter().filter(|p| p.name().starts_with(part)).collect::<Vec<_>>();
    let used = |losses: &dyn Fn() -> Result<Tensor>| {
        let grads = losses().unwrap().backward().unwrap();
        params.all().into_iter().filter(|p| grads.param(p).is_some()).collect::<Vec<_>>()
    };
    let check = |what: &str, losses: &dyn Fn() -> Result<Tensor>| {
        let report = check::per_sample(losses, &used(losses), 1, 1e-9).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(report.worst() < 1e-9);
    };
    check("column types", &|| {
        let (logits, of) = head.column_types(&m, &b, &ctx)?;
        ask(&logits, &of)
    });
    check("relations", &|| {
        let (logits, of) = pairs.relations(&m, &b, &ctx)?;
        ask(&logits, &of)
    });
    check("table types", &|| ask(&head.table_types(&m, &b, &ctx)?, &Samples::uniform(b.tables(), 1)));
    // A pair of tables is one sample, so that the encoder's samples are the pairs': only the head's own parameters are asked for.
    let similar = pairs.similarity(&m, &b, &ctx).unwrap();
    assert_eq!(similar.shape(), [b.tables() / 2, 3]);
    assert!(!named("pairs").is_empty());
    let detector = Detector::new(&params.at("detector"), d).unwrap();
    let broken = corrupted(&tables);
    let c = batch(&broken.iter().map(|c| &c.table).collect::<Vec<_>>());
    check("corruption", &|| detector.losses(&m, &c, &broken, &ctx));
}

/// The loss of a table does not depend on who else is in the batch, and is the mean over its own replaced texts plus that over its others.
#[test]
fn the_corruption_loss_is_its_formula() {
    let tables = few();
    let broken = corrupted(&tables);
    let (m, params) = model(DType::F64, 0.0);
    let detector = Detector::new(&params.at("detector"), 16).unwrap();
    let losses = |part: &[Corrupted]| {
        let b = batch(&part.iter().map(|c| &c.table).collect::<Vec<_>>());
        let logits = detector.logits(&m, &b, &Ctx::eval()).unwrap().array().to_f64();
        (detector.losses(&m, &b, part, &Ctx::eval()).unwrap().array().to_f64(), logits)
    };
    let (together, _) = losses(&broken);
    for (one, &want) in broken.iter().zip(&together) {
        let (loss, logits) = losses(std::slice::from_ref(one));
        assert!((loss[0] - want).abs() < 1e-12);
        let mean = |what: bool| {
            let all: Vec<f64> = logits
                .iter()
                .zip(&one.replaced)
                .filter(|(_, r)| **r == Some(what))
                .map(|(x, _)| if what { (1.0 + (-x).exp()).ln() } else { (1.0 + x.exp()).ln() })
                .collect();
            if all.is_empty() { 0.0 } else { all.iter().sum::<f64>() / all.len() as f64 }
        };
        assert!((loss[0] - mean(true) - mean(false)).abs() < 1e-10, "{} for {}", loss[0], mean(true) + mean(false));
    }
    // What was replaced differs from what was there, and missing texts stay missing.
    for (old, new) in tables.iter().zip(&broken) {
        let before: Vec<&Vec<u32>> = old.headers.iter().chain(&old.cells).collect();
        let after: Vec<&Vec<u32>> = new.table.headers.iter().chain(&new.table.cells).collect();
        for ((a, b), r) in before.iter().zip(&after).zip(&new.replaced) {
            match r {
                None => assert!(a.is_empty() && b.is_empty()),
                Some(replaced) => assert_eq!(a != b, *replaced),
            }
        }
    }
    let count = |what| broken.iter().flat_map(|c| &c.replaced).filter(|r| **r == Some(what)).count();
    assert!(count(true) > 5 && count(false) > count(true), "{} of {} replaced", count(true), count(false));
}

/// Both objectives and a fine-tuned head learn.
#[test]
fn training_lowers_the_losses() {
    let some: Vec<Encoded> = encoded()[..24].to_vec();
    let broken = corrupted(&some);
    let (plain, other) =
        (batch(&some.iter().collect::<Vec<_>>()), batch(&broken.iter().map(|c| &c.table).collect::<Vec<_>>()));
    for (what, goal) in [("corruption", 0.9), ("contrastive", 0.7), ("table types", 0.5)] {
        let (m, params) = model(DType::F32, 0.1);
        let detector = Detector::new(&params.at("detector"), 16).unwrap();
        let head = Head::new(&params.at("head"), (16, 16, 4), 0.1).unwrap();
        let targets: Vec<u32> = (0..24).map(|i| i % 4).collect();
        let losses = |ctx: &Ctx| match what {
            "corruption" => detector.losses(&m, &other, &broken, ctx),
            "contrastive" => m.contrastive_losses(&plain, ctx),
            _ => {
                let logits = head.table_types(&m, &plain, ctx)?;
                cross_entropy(&logits, Array::from_slice(&targets, &[24])?, &CrossEntropy::default())
            }
        };
        let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(3e-3)).unwrap();
        let run = |step: &mut PlainStep, t: u64| step.run_one(|| losses(&Ctx::train(t))).unwrap().loss().unwrap();
        let first = run(&mut step, 0);
        let last = (1..40).map(|t| run(&mut step, t)).last().unwrap();
        assert!(last < goal * first, "{what}: from {first:.3} to {last:.3}");
    }
}

#[test]
fn a_private_step_takes_corruption_and_refuses_the_contrastive_loss() {
    let some: Vec<Encoded> = encoded()[..40].to_vec();
    let broken = corrupted(&some);
    let private = |params: &Params| {
        let c = PrivacyConfig::target(8.0, 1e-3).records(40).expected_batch(8.0).steps(4);
        let privacy = Privacy::new(c, NoiseKey::from_seed_for_tests(1)).unwrap();
        PrivateStep::new(&params.all(), privacy, Sgd::default(), Schedule::constant(0.05)).unwrap()
    };
    let (m, params) = model(DType::F32, 0.1);
    let detector = Detector::new(&params.at("detector"), 16).unwrap();
    let mut step = private(&params);
    for t in 0..3 {
        let report = step
            .run(64, |records| {
                let part: Vec<Corrupted> = records.iter().map(|&r| broken[r].clone()).collect();
                let b = batch(&part.iter().map(|c| &c.table).collect::<Vec<_>>());
                detector.losses(&m, &b, &part, &Ctx::train(t))
            })
            .unwrap();
        assert!(report.epsilon > 0.0);
    }
    let (m, params) = model(DType::F32, 0.0);
    let mut step = private(&params);
    let before: Vec<Vec<f64>> = params.all().iter().map(|p| p.value().to_f64()).collect();
    let refused = step.run(64, |records| {
        let part: Vec<&Encoded> = records.iter().map(|&r| &some[r]).collect();
        m.contrastive_losses(&batch(&part), &Ctx::train(0))
    });
    let e = refused.map(drop).expect_err("it couples samples").to_string();
    assert!(e.contains("contrastive"), "{e}");
    let after: Vec<Vec<f64>> = params.all().iter().map(|p| p.value().to_f64()).collect();
    assert_eq!(before, after);
}

#[test]
fn what_does_not_fit_is_cut_counted_or_said() {
    let words = |n: usize| vec!["word"; n].join(" ");
    let row = |n: usize, text: &str| vec![text.to_string(); n];
    let headers: Vec<String> = (0..25).map(|i| format!("h{i}")).collect();
    let mut rows = vec![headers.clone()];
    rows.extend((0..40).map(|_| row(25, "x")));
    rows[3][2] = words(100);
    let wide = Table::new("wide", "title", headers, rows).unwrap();
    let mut cuts = Cuts::default();
    let e = tokenizer().table(&wide, &TableLimits::default(), &mut cuts).unwrap();
    assert_eq!((e.rows, e.columns, e.cells.len()), (30, 20, 600));
    assert_eq!(cuts, Cuts { rows: 1, columns: 1, texts: 1, header_rows: 1 });
    assert!(e.cells.iter().all(|c| c.len() <= 64));
    let limits = TableLimits { rows: 0, ..TableLimits::default() };
    assert!(tokenizer().table(&wide, &limits, &mut cuts).unwrap_err().to_string().contains("at least 1"));
    // Missing texts: the hyperedge and the cell stand for them.
    let empty = Table::new("e", "", row(2, ""), vec![row(2, "")]).unwrap();
    let e = tokenizer().table(&empty, &TableLimits::default(), &mut Cuts::default()).unwrap();
    let b = batch(&[&e]);
    let t = tokenizer();
    let want =
        [t.missing_caption(), t.missing_header(), t.missing_header(), t.row(), t.missing_cell(), t.missing_cell()];
    assert_eq!(b.tokens().0.to_vec::<u32>().unwrap(), want);
    let (m, params) = model(DType::F32, 0.0);
    assert!(m.forward(&b, &Ctx::eval()).unwrap().edges.array().to_f64().iter().all(|x| x.is_finite()));
    // Nothing at all, and all sets empty.
    let none = batch(&[]);
    assert_eq!(m.tables(&none, &Ctx::eval()).unwrap().shape(), [0, 16]);
    let bare = TableBatch::new(&[&e], tokenizer(), Sets { table: false, columns: false, rows: false }).unwrap();
    assert!(m.forward(&bare, &Ctx::eval()).unwrap().edges.array().to_f64().iter().all(|x| x.is_finite()));
    let broken = Encoded { headers: vec![], ..e.clone() };
    let said = TableBatch::new(&[&broken], tokenizer(), Sets::default()).unwrap_err().to_string();
    assert!(said.contains("table 0 has 0 headers"), "{said}");
    let head = Head::new(&params.at("h"), (32, 8, 2), 0.0).unwrap();
    let said = head.similarity(&m, &b, &Ctx::eval()).err().unwrap().to_string();
    assert!(said.contains("1 tables do not make pairs"), "{said}");
    assert!(Corruption::new([&e].into_iter(), 1.5).unwrap_err().to_string().contains("1.5"));
    assert!(m.attention(&b, 9).unwrap_err().to_string().contains("layer 9 of 2"));
    let maps = m.attention(&b, 1).unwrap();
    assert!((maps[0].iter().sum::<f64>() - 1.0).abs() < 1e-5, "{maps:?}");
    assert!((maps[2].iter().sum::<f64>() - 1.0).abs() < 1e-5, "{maps:?}");
    assert!(far(&maps[1], &[1.0, 1.0]) < 1e-5, "a column of one cell: {maps:?}");
}
