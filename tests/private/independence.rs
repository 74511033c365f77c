//! A private step takes losses that depend on their own records alone, and refuses others before anything is released.

use prismgrad::autograd::Segments;
use prismgrad::autograd::{Mixing, Owner};
use prismgrad::check::Gen;
use prismgrad::ops::attention::{AttentionOptions, Documents, Span, attention};
use prismgrad::ops::combine::combine;
use prismgrad::ops::embedding::{BagMode, embedding_bag};
use prismgrad::ops::grouped::grouped_linear;
use prismgrad::ops::linear::Layout;
use prismgrad::ops::route::{Choice, Gate, route};
use prismgrad::prelude::*;
use prismgrad::random::Rng;
use prismgrad::{GradHook, ParamGrad, Samples};
use std::collections::{BTreeMap, BTreeSet};

const RECORDS: usize = 60;
const D: usize = 6;

/// The features of these records; each depends on its record's number alone.
fn features(records: &[usize], width: usize) -> Tensor {
    let value = |i: usize| ((records[i / width] * 31 + i % width * 7) as f64 * 0.37).sin();
    Tensor::new(Array::generate(&[records.len(), width], DType::F32, value))
}

fn step_of(params: &Params, noise: f64) -> PrivateStep {
    let c = PrivacyConfig::target(1e3, 1e-4).records(RECORDS).expected_batch(16.0).steps(10).noise_multiplier(noise);
    let privacy = Privacy::new(c, NoiseKey::from_seed_for_tests(3)).unwrap();
    PrivateStep::new(&params.all(), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap()
}

type Coupled = fn(&Tensor) -> Result<Tensor>;

/// A linear layer, what the batch does to its outputs `[B, D]`, and a sum of squares: one loss per record.
fn run(between: Coupled) -> Result<PrivateStep> {
    let params = Params::new(1, DType::F32);
    let (a, b) = (Linear::new(&params.at("a"), D, D)?, Linear::new(&params.at("b"), D, D)?);
    let mut step = step_of(&params, 1.0);
    let before: Vec<Array> = params.all().iter().map(|p| p.value().copy()).collect();
    let taken = step.run(64, |records| {
        let h = between(&a.forward(&features(records, D), &Ctx::eval())?)?;
        b.forward(&h, &Ctx::eval())?.square()?.sum(&[1], false)
    });
    if let Err(e) = taken {
        for (p, b) in params.all().iter().zip(before) {
            assert_eq!(p.value().to_f64(), b.to_f64(), "a refused step has changed {}", p.name());
        }
        assert_eq!((step.steps(), step.privacy().steps()), (0, 0));
        return Err(e);
    }
    Ok(step)
}

#[test]
fn operations_that_mix_records_are_refused() {
    // The operation that the history shows to mix records; none where only the losses show it.
    let coupled: [(&str, &str, Coupled); 12] = [
        ("batch mean taken off", "sum", |x| x.sub(&x.mean(&[0], true)?)),
        ("batch norm", "sum", |x| {
            let x = x.sub(&x.mean(&[0], true)?)?;
            x.div(&x.square()?.mean(&[0], true)?.add_scalar(1e-5)?.sqrt()?)
        }),
        ("batch maximum taken off", "max", |x| x.sub(&x.max(&[0], true)?)),
        ("softmax over the batch", "softmax", |x| x.softmax(0)),
        ("contrastive logits", "matmul", |x| {
            let logits = x.matmul(&x.transpose(0, 1)?)?;
            x.mul(&logits.mean(&[1], true)?)
        }),
        ("attention over the batch", "attention", |x| {
            let (b, d) = (x.shape()[0], x.shape()[1]);
            let as_sequence = x.reshape(&[1, b, 1, d])?;
            attention(&as_sequence, &as_sequence, &as_sequence, &AttentionOptions::new(Span::Full))?.reshape(&[b, d])
        }),
        ("mixup with the neighbour", "", |x| {
            let b = x.shape()[0];
            let next = Tensor::concat(&[&x.slice(0, 1..b)?, &x.slice(0, 0..1)?], 0)?;
            x.add(&next.mul_scalar(0.3)?)
        }),
        ("running sum over the batch", "cumsum", |x| x.cumsum(0)),
        ("scale by the size of the batch", "", |x| x.mul_scalar(1.0 / x.shape()[0] as f64)),
        ("distance to the first record", "slice", |x| x.sub(&x.slice(0, 0..1)?)),
        ("one scale for all", "sum", |x| x.div(&x.square()?.sum(&[], false)?.sqrt()?)),
        ("a place in the batch", "", |x| {
            let places = Array::generate(&[x.shape()[0], 1], DType::F32, |i| i as f64);
            x.mul(&Tensor::new(places))
        }),
    ];
    for (what, op, between) in coupled {
        let e = run(between).err().unwrap_or_else(|| panic!("{what} was accepted")).to_string();
        match op {
            "" => assert!(e.contains("depends on which other records"), "{what}: {e}"),
            // The line is one of this file.
            _ => assert!(
                e.contains(&format!("the operation {op}, called at")) && e.contains("independence.rs:"),
                "{what}: {e}"
            ),
        }
    }
}

/// Records are followed in every batch, not in the first alone: what mixes them later is refused as well.
#[test]
fn what_mixes_records_later_is_refused() {
    let params = Params::new(1, DType::F32);
    let (a, b) = (Linear::new(&params.at("a"), D, D).unwrap(), Linear::new(&params.at("b"), D, D).unwrap());
    let mut step = step_of(&params, 1.0);
    let go = |step: &mut PrivateStep, mixes: bool| {
        step.run(64, |records| {
            let h = a.forward(&features(records, D), &Ctx::eval())?;
            let h = if mixes { h.sub(&h.mean(&[0], true)?)? } else { h };
            b.forward(&h, &Ctx::eval())?.square()?.sum(&[1], false)
        })
    };
    go(&mut step, false).unwrap();
    let values = || params.all().iter().flat_map(|p| p.value().to_f64()).collect::<Vec<f64>>();
    let before = values();
    let e = go(&mut step, true).expect_err("a later batch that mixes records is accepted").to_string();
    assert!(e.contains("the operation sum mixes records"), "{e}");
    assert_eq!((step.steps(), step.privacy().steps(), values()), (1, 1, before));
    assert!(step.last_gradient().to_f64().iter().all(|g| *g == 0.0));
    go(&mut step, false).unwrap();
}

/// A value that all losses share must not come from a layer over the records, whose factor tells them apart: the layer is refused by
/// its parameter, although no operation on the way asks for anything that contradicts itself.
#[test]
fn what_all_records_share_may_not_come_from_records() {
    let params = Params::new(1, DType::F32);
    let (a, b) = (Linear::new(&params.at("a"), D, D).unwrap(), Linear::new(&params.at("b"), D, D).unwrap());
    let e = step_of(&params, 1.0).run(64, |records| {
        let x = features(records, D);
        let shared = a.forward(&x, &Ctx::eval())?.mean(&[0], true)?;
        b.forward(&x, &Ctx::eval())?.mul(&shared)?.sum(&[1], false)
    });
    let e = e.expect_err("a mean over the records is accepted").to_string();
    assert!(e.contains("a.weight, in the operation linear") && e.contains("rows of other records"), "{e}");
}

/// A value that some records share and others do not is mixed by what shares it, also where its other factor is data.
#[test]
fn what_some_records_share_is_mixed() {
    let data = Tensor::new(Array::generate(&[2, 3, 4], DType::F64, |i| (i as f64 * 0.7).sin()));
    for (shape, pair) in [(vec![2, 3, 4], false), (vec![2, 1, 4], true), (vec![1, 3, 4], true)] {
        let x = Tensor::leaf(Array::generate(&shape, DType::F64, |i| (i as f64 * 0.3).cos()));
        let losses = x.mul(&data).unwrap().reshape(&[6, 4]).unwrap().sum(&[1], false).unwrap();
        let mut seen = Leaves::default();
        losses.backward_from(Array::full(&[6], 1.0, DType::F64), true, &mut seen).unwrap();
        assert_eq!(seen.mixes, pair, "{shape:?}");
    }
}

/// A sequence whose first axis is time, with as many steps as there are records.
#[test]
fn time_before_records_is_refused() {
    let params = Params::new(1, DType::F32);
    let layer = Linear::new(&params.at("a"), 3, 4).unwrap();
    let mut step = step_of(&params, 1.0);
    let e = step.run(64, |records| {
        let b = records.len();
        let x = features(records, 3 * b).reshape(&[b, b, 3])?.transpose(0, 1)?; // [T, B, 3]
        layer.forward(&x, &Ctx::eval())?.square()?.sum(&[0, 2], false)
    });
    let e = e.err().unwrap().to_string();
    assert!(e.contains("a.weight") || e.contains("a.bias") || e.contains("record"), "{e}");
}

/// The records as one sequence of as many positions.
fn in_one_sequence(x: &Tensor, options: AttentionOptions) -> Result<Tensor> {
    let n = x.shape()[0];
    let x = x.reshape(&[1, n, 1, D])?;
    attention(&x, &x, &x, &options)?.reshape(&[n, D])
}

/// Blocks and windows of one sequence are computed in common tiles: 0 · ∞ takes a record's infinity to the others. Documents are computed
/// each on its own.
#[test]
fn documents_keep_records_of_one_sequence_apart_and_spans_do_not() {
    for refused in [
        run(|x| in_one_sequence(x, AttentionOptions::new(Span::Block(1)))),
        run(|x| in_one_sequence(x, AttentionOptions::new(Span::Window(1)))),
    ] {
        let e = refused.err().expect("refused").to_string();
        assert!(e.contains("the operation attention") && e.contains("mixes records"), "{e}");
    }
    run(|x| {
        let documents = Some(Documents::packed_each(vec![(0..=x.shape()[0]).collect()]));
        in_one_sequence(x, AttentionOptions { documents, ..AttentionOptions::new(Span::Causal) })
    })
    .unwrap();
}

#[test]
fn layers_that_keep_records_apart_are_accepted() {
    run(|x| Ok(x.clone())).unwrap();
    run(|x| x.softmax(1)).unwrap();
    run(|x| x.sub(&x.mean(&[1], true)?)?.div(&x.square()?.sum(&[1], true)?.add_scalar(1e-5)?.sqrt()?)).unwrap();
    // Dropout: masks differ between places, but not because of other records.
    run(|x| x.dropout(0.5, 3)).unwrap();
    // Random augmentation: each call is another, which tells nothing about records.
    let (params, mut rng) = (Params::new(1, DType::F32), Rng::new(4));
    let layer = Linear::new(&params.at("a"), D, D).unwrap();
    let mut step = step_of(&params, 1.0);
    for _ in 0..2 {
        step.run(64, |records| {
            let shift: Vec<f32> = (0..records.len() * D).map(|_| rng.uniform() as f32).collect();
            let x = features(records, D).add(&Tensor::new(Array::from_slice(&shift, &[records.len(), D])?))?;
            layer.forward(&x, &Ctx::eval())?.square()?.sum(&[1], false)
        })
        .unwrap();
    }
    // A transformer with a tied head, a recurrent layer, group norm, a convolution.
    for tied in [false, true] {
        let model = crate::common::gpt::gpt(2, tied, DType::F32, &Device::Cpu);
        step_of(model.params(), 1.0).run(64, |records| crate::common::records::losses(&model, records)).unwrap();
    }
    let params = Params::new(1, DType::F32);
    let (read, keep) = (Linear::new(&params.at("ih"), 1, 5).unwrap(), Linear::new(&params.at("hh"), 5, 5).unwrap());
    step_of(&params, 1.0)
        .run(64, |records| {
            let (x, mut h) = (features(records, D), Tensor::zeros(&[records.len(), 5], DType::F32));
            for t in 0..D {
                let i = read.forward(&x.slice(1, t as isize as usize..t + 1)?, &Ctx::eval())?;
                h = i.add(&keep.forward(&h, &Ctx::eval())?)?.tanh()?;
            }
            h.square()?.sum(&[1], false)
        })
        .unwrap();
    let params = Params::new(1, DType::F32);
    let conv = Conv2d::new(&params.at("conv"), 1, 4, 3).unwrap();
    let norm = GroupNorm::new(&params.at("norm"), 2, 4).unwrap();
    step_of(&params, 1.0)
        .run(64, |records| {
            let x = features(records, 25).reshape(&[records.len(), 1, 5, 5])?;
            let h = norm.forward(&conv.forward(&x, &Ctx::eval())?, &Ctx::eval())?.tanh()?;
            h.square()?.sum(&[1, 2, 3], false)
        })
        .unwrap();
    // A record that is not finite is the step's to leave out.
    let params = Params::new(1, DType::F32);
    let layer = Linear::new(&params.at("a"), D, D).unwrap();
    let report = step_of(&params, 1.0)
        .run(64, |records| {
            let broken = Array::generate(&[records.len(), 1], DType::F32, |i| match records[i] % 3 {
                0 => f64::NAN,
                _ => 1.0,
            });
            let h = layer.forward(&features(records, D), &Ctx::eval())?.square()?.sum(&[1], true)?;
            h.mul(&Tensor::new(broken))?.sum(&[1], false)
        })
        .unwrap();
    assert!(report.non_finite().unwrap() > 0);
}

/// The masks of a step cannot be computed from what the caller gives: the same seed has other masks in another run, the same in the
/// same run, and none in the check.
#[test]
fn dropout_masks_follow_from_the_key() {
    let ones = || Tensor::new(Array::full(&[8, 64], 1.0, DType::F32));
    let masks = |key: NoiseKey| -> Vec<Vec<f64>> {
        let params = Params::new(1, DType::F32);
        let layer = Linear::new(&params.at("a"), D, D).unwrap();
        let c = PrivacyConfig::target(1e3, 1e-4).records(RECORDS).expected_batch(16.0).steps(10).noise_multiplier(1.0);
        let privacy = Privacy::new(c, key).unwrap();
        let mut step = PrivateStep::new(&params.all(), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
        let mut seen = Vec::new();
        for _ in 0..2 {
            step.run(64, |records| {
                seen.push(ones().dropout(0.5, 0)?.array().to_f64());
                // Another layer of the same step, whose seed is another one.
                seen.push(ones().dropout(0.5, 1)?.array().to_f64());
                layer.forward(&features(records, D), &Ctx::eval())?.square()?.sum(&[1], false)
            })
            .unwrap();
        }
        seen
    };
    let one = masks(NoiseKey::from_bytes([1; 32]));
    assert!(one[..4].iter().all(|m| *m == [1.0; 512]), "no dropout while the losses are compared");
    assert_eq!(one.len(), 8);
    assert_eq!(one, masks(NoiseKey::from_bytes([1; 32])));
    let other = masks(NoiseKey::from_bytes([2; 32]));
    let outside = ones().dropout(0.5, 0).unwrap().array().to_f64();
    let all = [&one[4], &one[5], &one[6], &one[7], &other[4], &outside];
    for (i, a) in all.iter().enumerate() {
        for b in &all[..i] {
            let same = a.iter().zip(*b).filter(|(a, b)| a == b).count();
            assert!((150..360).contains(&same), "{same} of 512 equal");
        }
    }
}

/// Gradients of the leaves, whose their elements are, and whether an operation was found to mix samples.
#[derive(Default)]
struct Leaves {
    grads: Vec<(u64, Array)>,
    owners: Vec<(u64, Owner)>,
    mixes: bool,
}

impl GradHook for Leaves {
    fn param(&mut self, _: &Param, _: ParamGrad) -> Result<()> {
        Ok(())
    }
    fn leaf(&mut self, id: u64, grad: Array) {
        self.grads.push((id, grad));
    }
    fn follows_samples(&self) -> bool {
        true
    }
    fn whose(&mut self, leaf: u64, owner: &Owner) {
        self.owners.push((leaf, owner.clone()));
    }
    fn mixing(&mut self, _: Mixing) -> Result<()> {
        self.mixes = true;
        Ok(())
    }
}

/// Where the history says whose a leaf's element is, it has no gradient from another sample's loss. Whether it says so of any.
fn agree(losses: &Tensor) -> (bool, Option<String>) {
    let (b, mut said) = (losses.numel(), false);
    for i in 0..b.min(4) {
        let seed = Array::generate(&[b], losses.dtype(), |j| (i == j) as u8 as f64);
        let mut found = Leaves::default();
        losses.backward_from(seed, true, &mut found).unwrap();
        for (id, owner) in &found.owners {
            let grad = found.grads.iter().find(|(leaf, _)| leaf == id).map(|(_, g)| g.to_f64()).unwrap_or_default();
            let Some(of) = owner.of_rows(grad.len(), grad.len(), b) else {
                said |= matches!(owner, Owner::All);
                continue;
            };
            said = true;
            for (e, (g, o)) in grad.iter().zip(&of).enumerate() {
                if *o as usize != i && *g != 0.0 {
                    let what = format!(
                        "element {e} is said to belong to sample {o} ({owner:?}) and has gradient {g} from sample {i}"
                    );
                    return (true, Some(what));
                }
            }
        }
    }
    (said, None)
}

/// For the cases of every op, with each dimension of the result as that of the samples.
#[test]
fn what_the_history_says_agrees_with_the_gradients() {
    let (mut said, mut asked, mut wrong) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    for op in prismgrad::ops::registry() {
        for (nth, case) in op.cases.iter().enumerate() {
            for seed in 0..12 {
                let case = case(&mut Gen::new(seed * 31 + nth as u64)).unwrap();
                let leaves: Vec<Tensor> = case
                    .inputs
                    .iter()
                    .map(|a| match a.dtype().is_float() {
                        true => Tensor::leaf(a.clone()),
                        false => Tensor::new(a.clone()),
                    })
                    .collect();
                let Ok(y) = (case.run)(&leaves) else { continue };
                if !y.requires_grad() || y.numel() < 2 || !y.dtype().is_float() {
                    continue;
                }
                // The samples along each dimension in turn.
                for d in 0..y.rank() {
                    let b = y.shape()[d];
                    if b < 2 {
                        continue;
                    }
                    let others: Vec<isize> = (0..y.rank()).filter(|&i| i != d).map(|i| i as isize).collect();
                    let losses =
                        if others.is_empty() { y.clone() } else { y.square().unwrap().sum(&others, false).unwrap() };
                    if leaves.iter().any(|l| l.requires_grad()) {
                        asked.insert(op.name);
                    }
                    let (known, bad) = agree(&losses);
                    if known {
                        said.insert(op.name);
                    }
                    if let Some(bad) = bad {
                        let what = format!("case {nth} seed {seed}, dimension {d} of {:?}: {bad}", y.shape());
                        wrong.entry(op.name).or_insert(what);
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Their cases end in a product with data, which says nothing; the next test is about them.
    let silent: Vec<_> = asked.difference(&said).copied().collect();
    assert_eq!(silent, ["embedding_bag", "grouped_linear"], "of these nothing is ever said");
}

/// Rows in bags, in groups, and on their way through a router.
#[test]
fn rows_in_bags_and_groups_are_followed() {
    let leaf = |shape: &[usize]| Tensor::leaf(Array::generate(shape, DType::F64, |i| (i as f64 * 0.7 + 0.2).sin()));
    let param = |shape: &[usize]| Param::new("w", Array::generate(shape, DType::F64, |i| (i as f64 * 0.3).cos()));
    let known = |y: Tensor, what: &str| {
        let (said, wrong) = agree(&y.square().unwrap().sum(&[1], false).unwrap());
        assert!(said && wrong.is_none(), "{what}: {wrong:?}");
    };
    let (bags, ids) = (Segments::lengths(&[2, 0, 3, 1]), Tensor::from_slice(&[0u32, 4, 1, 1, 2, 3], &[6]).unwrap());
    let y = embedding_bag(&param(&[5, 3]), &ids, &bags, BagMode::Mean, Some(&leaf(&[6])), None).unwrap();
    known(y, "bags");
    let (w, each) = (param(&[2, 3, 4]), Samples::uniform(5, 1));
    let sorted = Segments::lengths(&[2, 3]);
    known(grouped_linear(&leaf(&[5, 4]), &w, Layout::OutIn, None, Activation::Tanh, &sorted, &each).unwrap(), "groups");
    let choice = Choice { top_k: 2, gate: Gate::Softmax, renormalise: false };
    let (weights, routing) = route(&leaf(&[5, 2]), &choice, None).unwrap();
    let rows = routing.samples(&each).unwrap();
    let y = grouped_linear(&leaf(&[5, 4]), &w, Layout::OutIn, None, Activation::None, &routing, &rows).unwrap();
    known(combine(&y, &weights, &routing).unwrap(), "a router");
}

/// Random chains of operations of which some mix records: whatever the gradients show to be mixed, the history never calls separate,
/// and it finds most of it.
#[test]
fn chains_of_operations_are_never_called_separate_wrongly() {
    type Op = fn(&Tensor) -> Result<Tensor>;
    let ops: [(bool, Op); 20] = [
        (false, |x| x.tanh()),
        (false, |x| x.softmax(1)),
        (false, |x| x.cumsum(1)),
        (false, |x| x.sub(&x.mean(&[1], true)?)),
        (false, |x| x.div(&x.square()?.sum(&[1], true)?.add_scalar(1.0)?)),
        (false, |x| x.transpose(0, 1)?.sin()?.transpose(0, 1)),
        (false, |x| Ok(x.sort(1, false)?.0)),
        (false, |x| Tensor::concat(&[&x.slice(1, 2..4)?, &x.slice(1, 0..2)?], 1)),
        (false, |x| x.reshape(&[4, 2, 2])?.permute(&[2, 0, 1])?.exp()?.permute(&[1, 2, 0])?.reshape(&[4, 4])),
        (false, |x| x.unsqueeze(1)?.matmul(&x.unsqueeze(2)?)?.squeeze(2)?.mul(x)),
        (true, |x| x.softmax(0)),
        (true, |x| x.cumsum(0)),
        (true, |x| x.sub(&x.mean(&[0], true)?)),
        (true, |x| x.mul(&x.max(&[0], true)?)),
        (true, |x| x.mul(&x.sum_all()?)),
        (true, |x| x.transpose(0, 1)),
        (true, |x| x.matmul(&x.transpose(0, 1)?)?.matmul(x)),
        (true, |x| Ok(x.sort(0, false)?.0)),
        (true, |x| Tensor::concat(&[&x.slice(0, 1..4)?, &x.slice(0, 0..1)?], 0)),
        (true, |x| x.reshape(&[2, 2, 4])?.permute(&[1, 0, 2])?.reshape(&[4, 4])),
    ];
    let (mut rng, mut mixed, mut found, mut clean) = (Rng::new(11), 0, 0, 0);
    for round in 0..400 {
        let x = Tensor::leaf(Array::generate(&[4, 4], DType::F64, |i| ((round * 7 + i * 5) as f64 * 0.61).sin()));
        let chosen: Vec<usize> = (0..3)
            .map(|_| match rng.uniform() < 0.3 {
                true => 10 + rng.below(10) as usize,
                false => rng.below(10) as usize,
            })
            .collect();
        let y = chosen.iter().try_fold(x.clone(), |x, &o| ops[o].1(&x)).unwrap();
        let losses = y.square().unwrap().sum(&[1], false).unwrap();
        let (said, wrong) = agree(&losses);
        assert!(wrong.is_none(), "{chosen:?}: {wrong:?}");
        let mut seen = Leaves::default();
        losses.backward_from(Array::full(&[4], 1.0, DType::F64), true, &mut seen).unwrap();
        let mixes = chosen.iter().any(|&o| ops[o].0);
        mixed += mixes as usize;
        found += (mixes && seen.mixes) as usize;
        assert!(!seen.mixes || mixes, "{chosen:?} is refused and mixes nothing");
        clean += (!mixes && said) as usize;
    }
    assert!(mixed > 100 && found * 10 > mixed * 6, "{found} of {mixed} mixing chains were found");
    assert!(clean * 10 > (400 - mixed) * 8, "{clean} of {} chains that mix nothing are known to", 400 - mixed);
}
