//! A private step takes losses that depend on their own records alone, and refuses others before anything is released.

mod common {
    pub mod gpt;
    pub mod records;
}

use prismgrad::ops::attention::{AttentionOptions, Span, attention};
use prismgrad::prelude::*;
use prismgrad::random::Rng;

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
    let coupled: [(&str, Coupled); 12] = [
        ("batch mean taken off", |x| x.sub(&x.mean(&[0], true)?)),
        ("batch norm", |x| {
            let x = x.sub(&x.mean(&[0], true)?)?;
            x.div(&x.square()?.mean(&[0], true)?.add_scalar(1e-5)?.sqrt()?)
        }),
        ("batch maximum taken off", |x| x.sub(&x.max(&[0], true)?)),
        ("softmax over the batch", |x| x.softmax(0)),
        ("contrastive logits", |x| {
            let logits = x.matmul(&x.transpose(0, 1)?)?;
            x.mul(&logits.mean(&[1], true)?)
        }),
        ("attention over the batch", |x| {
            let (b, d) = (x.shape()[0], x.shape()[1]);
            let as_sequence = x.reshape(&[1, b, 1, d])?;
            attention(&as_sequence, &as_sequence, &as_sequence, &AttentionOptions::new(Span::Full))?.reshape(&[b, d])
        }),
        ("mixup with the neighbour", |x| {
            let b = x.shape()[0];
            let next = Tensor::concat(&[&x.slice(0, 1..b)?, &x.slice(0, 0..1)?], 0)?;
            x.add(&next.mul_scalar(0.3)?)
        }),
        ("running sum over the batch", |x| x.cumsum(0)),
        ("scale by the size of the batch", |x| x.mul_scalar(1.0 / x.shape()[0] as f64)),
        ("distance to the first record", |x| x.sub(&x.slice(0, 0..1)?)),
        ("one scale for all", |x| x.div(&x.square()?.sum(&[], false)?.sqrt()?)),
        ("a place in the batch", |x| {
            let places = Array::generate(&[x.shape()[0], 1], DType::F32, |i| i as f64);
            x.mul(&Tensor::new(places))
        }),
    ];
    for (what, between) in coupled {
        let e = run(between).err().unwrap_or_else(|| panic!("{what} was accepted")).to_string();
        assert!(e.contains("record") && e.contains("depends on which other records"), "{what}: {e}");
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
        let model = common::gpt::gpt(2, tied, DType::F32, &Device::Cpu);
        step_of(model.params(), 1.0).run(64, |records| common::records::losses(&model, records)).unwrap();
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
                layer.forward(&features(records, D), &Ctx::eval())?.square()?.sum(&[1], false)
            })
            .unwrap();
        }
        seen
    };
    let one = masks(NoiseKey::from_bytes([1; 32]));
    assert_eq!(one[..2], [vec![1.0; 512], vec![1.0; 512]], "no dropout while the losses are compared");
    assert_eq!(one, masks(NoiseKey::from_bytes([1; 32])));
    let other = masks(NoiseKey::from_bytes([2; 32]));
    let outside = ones().dropout(0.5, 0).unwrap().array().to_f64();
    let all = [&one[2], &one[3], &other[2], &outside];
    for (i, a) in all.iter().enumerate() {
        for b in &all[..i] {
            let same = a.iter().zip(*b).filter(|(a, b)| a == b).count();
            assert!((150..360).contains(&same), "{same} of 512 equal");
        }
    }
}
