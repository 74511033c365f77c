//! Attention against a dense masked reference, at sizes that cross every block boundary.

use crate::common::distance::distance;
use prismgrad::check::Gen;
use prismgrad::device_tests;
use prismgrad::nn::{Ctx, Params, TransformerBlock};
use prismgrad::ops::attention::{AttentionOptions, Documents, Span, attention, attention_qkv};
use prismgrad::{Array, DType, Tensor};

/// softmax(QKᵀ·scale + mask)·V and its gradients with the T × T matrix written out, by ordinary ops.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor, span: Span, offsets: &[usize]) -> Tensor {
    let ([b, t, h, d], [_, s, kv, _]) =
        (<[usize; 4]>::try_from(q.shape()).unwrap(), <[usize; 4]>::try_from(k.shape()).unwrap());
    let wide = |x: &Tensor| {
        x.unsqueeze(3)
            .unwrap()
            .expand(&[b, s, kv, h / kv, d])
            .unwrap()
            .reshape(&[b, s, h, d])
            .unwrap()
            .permute(&[0, 2, 1, 3])
            .unwrap()
    };
    let scores = q.permute(&[0, 2, 1, 3]).unwrap().matmul(&wide(k).transpose(-1, -2).unwrap()).unwrap();
    let scores = scores.mul_scalar(1.0 / (d as f64).sqrt()).unwrap();
    let doc = |p: usize| offsets.partition_point(|&x| x <= p);
    let mask = Array::generate(&[t, s], DType::U8, |i| {
        let (p, j) = (i / s + s - t, i % s);
        let seen = match span {
            Span::Full => true,
            Span::Causal => j <= p,
            Span::Window(w) => j <= p && j + w > p,
            Span::Block(n) => j <= p && j / n == p / n,
            Span::Sinks { .. } => unreachable!("tests/engine/spans.rs has them"),
        };
        !(seen && doc(p) == doc(j)) as u8 as f64
    });
    let scores = scores.masked_fill(&Tensor::new(mask), -1e30).unwrap();
    let p = scores.sub(&scores.logsumexp(&[-1], true).unwrap()).unwrap().exp().unwrap();
    p.matmul(&wide(v)).unwrap().permute(&[0, 2, 1, 3]).unwrap()
}

#[test]
fn agrees_with_a_dense_reference() {
    let mut g = Gen::new(7);
    let spans = [Span::Full, Span::Causal, Span::Window(37), Span::Block(50), Span::Window(1)];
    for (n, &span) in spans.iter().enumerate().flat_map(|x| [x, x]) {
        for (t, extra, d, kv, group) in
            [(130, 0, 20, 1, 2), (300, 0, 64, 2, 1), (33, 290, 16, 1, 1), (129, 1, 40, 1, 1)]
        {
            let s = t + extra;
            let (mut o, mut offsets) = (AttentionOptions::new(span), vec![0]);
            if extra == 0 && g.chance(0.5) {
                o.documents = Some(Documents::packed(&[0, t / 3, t / 3, t - 5, t]));
                offsets = vec![0, t / 3, t / 3, t - 5, t];
            }
            let inputs = [g.array(&[2, t, kv * group, d]), g.array(&[2, s, kv, d]), g.array(&[2, s, kv, d])];
            let w = Tensor::new(g.array(&[2, t, kv * group, d]));
            let run = |f: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor, dtype: DType| -> Vec<Vec<f64>> {
                let x: Vec<Tensor> = inputs.iter().map(|a| Tensor::leaf(a.cast(dtype))).collect();
                let y = f(&x[0], &x[1], &x[2]);
                let grads = y.mul(&w.cast(dtype).unwrap()).unwrap().backward().unwrap();
                std::iter::once(y.array().to_f64()).chain(x.iter().map(|x| grads.of(x).unwrap().to_f64())).collect()
            };
            let want = run(&|q, k, v| dense(q, k, v, o.span, &offsets), DType::F64);
            for (dtype, tol) in [(DType::F64, 1e-10), (DType::F32, 2e-4)] {
                let got = run(&|q, k, v| attention(q, k, v, &o).unwrap(), dtype);
                for (part, (g, w)) in ["out", "dq", "dk", "dv"].iter().zip(got.iter().zip(&want)) {
                    let worst = distance(g, w);
                    assert!(worst < tol, "{n} {span:?} T {t} S {s} D {d} {dtype} {part}: off by {worst:e}");
                }
            }
        }
    }
}

/// Values and gradients of `qkv [B, T, 3, H, D]` under documents, as bytes.
fn values_and_gradients(qkv: &Array, span: Span, documents: Option<Documents>) -> [Array; 2] {
    let x = Tensor::leaf(qkv.clone());
    let y = attention_qkv(&x, &AttentionOptions { documents, ..AttentionOptions::new(span) }).unwrap();
    let weights = Array::generate(&y.shape()[1..], y.dtype(), |i| (i as f64 * 0.37).cos());
    let weights = weights.to(&qkv.device()).unwrap();
    let grads = y.mul(&Tensor::new(weights)).unwrap().sum_all().unwrap().backward().unwrap();
    [y.array().clone(), grads.of(&x).unwrap().clone()]
}

device_tests! {
    /// Each sequence of a padded batch has the bits that it has alone, values and gradients; padding gives zeros, whatever it holds.
    fn padded_sequences_are_computed_as_if_alone(device) {
        let dtypes = [(DType::F32, 20), (DType::F64, 70), (DType::BF16, 64), (DType::F16, 16)];
        let spans = [Span::Full, Span::Causal, Span::Window(9), Span::Block(16)];
        for (i, (dtype, d)) in dtypes.into_iter().enumerate() {
            // All pairs on the CPU, one span for each dtype on the slower emulated device.
            for &span in if device.is_cpu() { &spans[..] } else { &spans[i..i + 1] } {
                let (t, lengths) = (75, [75, 1, 0, 70, 33]);
                let mut x = Array::generate(&[5, t, 3, 2, d], DType::F64, |i| (i as f64 * 0.7).sin()).cast(dtype);
                for (b, n) in lengths.into_iter().enumerate() {
                    let nan = Array::full(&[t - n, 3, 2, d], f64::NAN, dtype);
                    x.write((b * t + n) * 6 * d, &nan).unwrap();
                }
                let x = x.to(device).unwrap();
                let together = values_and_gradients(&x, span, Some(Documents::lengths(&lengths)));
                for (b, n) in lengths.into_iter().enumerate() {
                    let row = |a: &Array, r: std::ops::Range<usize>| {
                        a.slice(0, b..b + 1).unwrap().slice(1, r).unwrap().to_f64()
                    };
                    let one = x.slice(0, b..b + 1).unwrap().slice(1, 0..n).unwrap();
                    let alone = values_and_gradients(&one.contiguous(), span, None);
                    for (all, alone) in together.iter().zip(&alone) {
                        assert_eq!(row(all, 0..n), alone.to_f64(), "{dtype} {span:?} sequence {b} on {device}");
                        assert!(row(all, n..t).iter().all(|x| *x == 0.0), "{dtype} {span:?} padding of {b} on {device}");
                    }
                }
            }
        }
    }

    /// NaN in one packed document reaches no other, forward or backward; the others have the bits that they have without it. It may be
    /// in a query, a key, a value, or in the gradient that comes from above.
    fn a_nan_stays_in_its_document(device) {
        let (t, offsets) = (70, [0, 5, 37, 38, 70]);
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let (spans, each) = ([Span::Full, Span::Causal, Span::Window(40)], [0, 1, 2, 3]);
            let (spans, each) = if device.is_cpu() { (&spans[..], &each[..]) } else { (&spans[1..2], &each[1..3]) };
            for &span in spans {
                let documents = || Some(Documents::packed(&offsets));
                let clean = Array::generate(&[1, t, 3, 1, 12], DType::F64, |i| (i as f64 * 0.7).sin()).cast(dtype);
                let want = values_and_gradients(&clean.to(device).unwrap(), span, documents());
                for &document in each {
                    let (from, to) = (offsets[document], offsets[document + 1]);
                    for part in 0..3 {
                        let mut x = clean.copy();
                        x.write(((from + to) / 2 * 3 + part) * 12, &Array::full(&[12], f64::NAN, dtype)).unwrap();
                        let got = values_and_gradients(&x.to(device).unwrap(), span, documents());
                        for (got, want) in got.iter().zip(&want) {
                            let (got, want) = (got.to_f64(), want.to_f64());
                            let each = got.len() / t;
                            assert!(got[from * each..to * each].iter().any(|x| x.is_nan()), "it is in its own");
                            for p in (0..t).filter(|p| !(from..to).contains(p)) {
                                let r = p * each..(p + 1) * each;
                                assert_eq!(got[r.clone()], want[r], "{dtype} {span:?} {part} of {document}, position {p}");
                            }
                        }
                    }
                    // A gradient of NaN from above, as of a loss that overflowed.
                    let x = Tensor::leaf(clean.to(device).unwrap());
                    let options = AttentionOptions { documents: documents(), ..AttentionOptions::new(span) };
                    let y = attention_qkv(&x, &options).unwrap();
                    let mut seed = Array::ones(y.shape(), dtype);
                    seed.write(from * 12, &Array::full(&[12], f64::NAN, dtype)).unwrap();
                    let mut grads = prismgrad::Gradients::default();
                    y.backward_from(seed.to(device).unwrap(), false, &mut grads).unwrap();
                    let g = grads.of(&x).unwrap().to_f64();
                    let nan = |p: usize| g[p * 36..(p + 1) * 36].iter().any(|x| x.is_nan());
                    assert!((0..t).all(|p| !nan(p) || (from..to).contains(&p)) && nan(from), "{dtype} {span:?} {document}");
                }
            }
        }
    }

    /// A transformer block over a padded batch: outputs and gradients are those of the sequences one by one.
    fn a_block_over_padded_sequences(device) {
        let params = Params::new(3, DType::F64);
        let block = TransformerBlock::new(&params, 8, 2).unwrap();
        params.to(device).unwrap();
        let lengths = [7, 2, 5];
        let x = Array::generate(&[3, 7, 8], DType::F64, |i| (i as f64 * 0.3).sin()).to(device).unwrap();
        let gradients = |rows: &[usize], t: usize, ctx: &Ctx| {
            let mut part = Array::zeros(&[rows.len(), t, 8], (DType::F64, device));
            for (i, b) in rows.iter().enumerate() {
                part.write(i * t * 8, &x.slice(0, *b..b + 1).unwrap().slice(1, 0..t).unwrap()).unwrap();
            }
            let y = block.forward(&Tensor::new(part), ctx).unwrap();
            // Only positions that are no padding count.
            let kept = |i: usize| y.slice(0, i..i + 1).unwrap().slice(1, 0..lengths[rows[i]]).unwrap();
            let loss = |i: usize| kept(i).square().unwrap().sum_all().unwrap();
            let loss = (1..rows.len()).fold(loss(0), |sum, i| sum.add(&loss(i)).unwrap());
            let grads = loss.backward().unwrap();
            let all = params.all();
            let grads = all.iter().map(|p| grads.param(p).unwrap().sum().unwrap().to_f64());
            (grads.collect::<Vec<_>>(), (0..rows.len()).map(|i| kept(i).array().to_f64()).collect::<Vec<_>>())
        };
        let (got, values) = gradients(&[0, 1, 2], 7, &Ctx::eval().with_lengths(&lengths));
        let alone: Vec<_> = (0..3).map(|b| gradients(&[b], lengths[b], &Ctx::eval())).collect();
        for (b, (_, value)) in alone.iter().enumerate() {
            assert!(distance(&values[b], &value[0]) < 1e-12, "sequence {b}");
        }
        for (p, got) in got.iter().enumerate() {
            let sum: Vec<f64> = (0..got.len()).map(|i| alone.iter().map(|a| a.0[p][i]).sum()).collect();
            assert!(distance(got, &sum) < 1e-11, "{}", params.all()[p].name());
        }
        assert!(block.forward(&Tensor::new(x.clone()), &Ctx::eval().with_lengths(&[7, 2])).is_err(), "two lengths for three");
        assert!(block.forward(&Tensor::new(x.clone()), &Ctx::eval().with_lengths(&[8, 2, 5])).is_err(), "too long");
    }
}
