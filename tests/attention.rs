//! Attention against a dense masked reference, at sizes that cross every block boundary.

mod common {
    pub mod distance;
}

use common::distance::distance;
use prismgrad::check::Gen;
use prismgrad::ops::attention::{AttentionOptions, Span, attention};
use prismgrad::{Array, DType, Tensor};
use std::sync::Arc;

/// softmax(QKᵀ·scale + mask)·V and its gradients with the T × T matrix written out, by ordinary ops.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor, o: &AttentionOptions) -> Tensor {
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
    let doc = |p: usize| o.documents.as_ref().map_or(0, |o| o.partition_point(|&x| x <= p));
    let mask = Array::generate(&[t, s], DType::U8, |i| {
        let (p, j) = (i / s + s - t, i % s);
        let seen = match o.span {
            Span::Full => true,
            Span::Causal => j <= p,
            Span::Window(w) => j <= p && j + w > p,
            Span::Block(n) => j <= p && j / n == p / n,
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
            let mut o = AttentionOptions::new(span);
            if extra == 0 && g.chance(0.5) {
                o.documents = Some(Arc::new(vec![0, t / 3, t / 3, t - 5, t]));
            }
            let inputs = [g.array(&[2, t, kv * group, d]), g.array(&[2, s, kv, d]), g.array(&[2, s, kv, d])];
            let w = Tensor::new(g.array(&[2, t, kv * group, d]));
            let run = |f: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor, dtype: DType| -> Vec<Vec<f64>> {
                let x: Vec<Tensor> = inputs.iter().map(|a| Tensor::leaf(a.cast(dtype))).collect();
                let y = f(&x[0], &x[1], &x[2]);
                let grads = y.mul(&w.cast(dtype).unwrap()).unwrap().backward().unwrap();
                std::iter::once(y.array().to_f64()).chain(x.iter().map(|x| grads.of(x).unwrap().to_f64())).collect()
            };
            let want = run(&|q, k, v| dense(q, k, v, &o), DType::F64);
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
