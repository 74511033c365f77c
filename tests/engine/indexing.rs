//! Indexing, lookup, segments, convolution, pooling and rotary positions: known values, naive loops, errors, empties,
//! and the same bits at any number of threads.

use prismgrad::check::Gen;
use prismgrad::ops::conv::{Conv, conv1d, conv2d};
use prismgrad::ops::embedding::{BagMode, embedding, embedding_bag};
use prismgrad::ops::grouped::grouped_linear;
use prismgrad::ops::linear::{Activation, Layout};
use prismgrad::ops::pool::Window;
use prismgrad::ops::rotary::{Pairing, RotaryTable};
use prismgrad::ops::segment::Segments;
use prismgrad::{Array, DType, Param, Samples, Tensor};

fn t(v: &[f64], shape: &[usize]) -> Tensor {
    Tensor::from_slice(v, shape).unwrap()
}
fn ids(v: &[u32]) -> Tensor {
    Tensor::from_slice(v, &[v.len()]).unwrap()
}
/// A tensor holds these numbers, each to within its own size times the tolerance.
#[track_caller]
fn holds(got: &Tensor, want: &[f64], tolerance: f64) {
    let got = got.array().to_f64();
    assert_eq!(got.len(), want.len());
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "element {i}: {a} instead of {b}");
    }
}
/// The error's text; panics if there is none.
#[track_caller]
fn why<T>(r: prismgrad::Result<T>) -> String {
    match r {
        Ok(_) => panic!("should have failed"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn gather_scatter_select() {
    let x = t(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]);
    let index = Tensor::from_slice(&[2u32, 2, 0, 1], &[2, 2]).unwrap();
    holds(&x.gather(1, &index).unwrap(), &[3.0, 3.0, 4.0, 5.0], 0.0);
    holds(&x.index_select(-1, ids(&[2, 0])).unwrap(), &[3.0, 1.0, 6.0, 4.0], 0.0);
    holds(&x.index_select(0, ids(&[1])).unwrap(), &[4.0, 5.0, 6.0], 0.0);
    let src = t(&[10.0, 20.0, 30.0, 40.0], &[2, 2]);
    holds(&x.scatter_add(1, &index, &src).unwrap(), &[1.0, 2.0, 33.0, 34.0, 45.0, 6.0], 0.0);
    holds(&src.scatter_sum(1, &index, 3).unwrap(), &[0.0, 0.0, 30.0, 30.0, 40.0, 0.0], 0.0);
    // Signed indices, integers, and nothing at all.
    let signed = Tensor::from_slice(&[1i64], &[1]).unwrap();
    holds(&x.index_select(0, &signed).unwrap(), &[4.0, 5.0, 6.0], 0.0);
    holds(&ids(&[7, 8]).index_select(0, ids(&[1, 1])).unwrap(), &[8.0, 8.0], 0.0);
    assert_eq!(x.index_select(0, ids(&[])).unwrap().shape(), [0, 3]);
    holds(&ids(&[1, 0]).one_hot(3, DType::F32).unwrap(), &[0.0, 1.0, 0.0, 1.0, 0.0, 0.0], 0.0);
    let e = why(x.index_select(0, ids(&[0, 2])));
    assert!(e.contains("id 2 at position 1") && e.contains("0..2"), "{e}");
    let negative = Tensor::from_slice(&[-1i64], &[1]).unwrap();
    assert!(why(x.index_select(0, &negative)).contains("id -1"));
    assert!(why(x.gather(1, ids(&[0]))).contains("same sizes"));
    assert!(why(x.gather(1, t(&[0.0; 2], &[2, 1]))).contains("u32 or i64"));
    assert!(why(ids(&[3]).one_hot(3, DType::F32)).contains("3 classes"));
}

#[test]
fn embedding_padding_and_halves() {
    let table = Param::new("wte.weight", Array::arange(8, DType::F64).reshape(&[4, 2]).unwrap());
    let i = Tensor::from_slice(&[3u32, 0, 0, 1], &[2, 2]).unwrap();
    let y = embedding(&table, &i, Some(0), None).unwrap();
    holds(&y, &[6.0, 7.0, 0.0, 1.0, 0.0, 1.0, 2.0, 3.0], 0.0);
    let grads = y.backward().unwrap();
    let g = grads.param(&table).unwrap();
    holds(&g.sum().unwrap().into(), &[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0], 0.0);
    assert_eq!(g.sample_sq_norms().unwrap(), [2.0, 2.0]);
    assert_eq!(g.factors()[0].kind(), "lookup");
    let e = why(embedding(&table, ids(&[0, 9]), None, None));
    assert!(e.contains("id 9") && e.contains("wte.weight with 4 rows"), "{e}");
    assert!(why(embedding(&table, ids(&[0, 1]), None, Some(&Samples::uniform(1, 3)))).contains("3 rows"));
    // A 16-bit table is looked up as it is; its gradient is f32.
    let half = Param::new("w", table.value().cast(DType::BF16));
    let y = embedding(&half, &i, None, None).unwrap();
    assert_eq!(y.dtype(), DType::BF16);
    assert_eq!(y.backward().unwrap().param(&half).unwrap().sum().unwrap().dtype(), DType::F32);
}

#[test]
fn embedding_bags() {
    let table = Param::new("w", Array::from_slice(&[1.0, 2.0, 10.0, 20.0, 100.0, 200.0], &[3, 2]).unwrap());
    let bags = Segments::new(&[0, 2, 2, 5]).unwrap();
    let i = ids(&[0, 1, 2, 2, 1]);
    let sum = embedding_bag(&table, &i, &bags, BagMode::Sum, None, None).unwrap();
    holds(&sum, &[11.0, 22.0, 0.0, 0.0, 210.0, 420.0], 0.0);
    let mean = embedding_bag(&table, &i, &bags, BagMode::Mean, None, None).unwrap();
    holds(&mean, &[5.5, 11.0, 0.0, 0.0, 70.0, 140.0], 1e-12);
    let scale = t(&[1.0, 0.5, 2.0, 0.0, -1.0], &[5]);
    let scaled = embedding_bag(&table, &i, &bags, BagMode::Sum, Some(&scale), None).unwrap();
    holds(&scaled, &[6.0, 12.0, 0.0, 0.0, 190.0, 380.0], 1e-12);
    let grads = mean.backward().unwrap();
    let norms = grads.param(&table).unwrap().sample_sq_norms().unwrap();
    // Bag 0: rows 0 and 1 get ½ each; bag 1 is empty; bag 2: row 2 twice ⅓, row 1 once.
    let want = [4.0 * 0.25, 0.0, 2.0 * (4.0 / 9.0 + 1.0 / 9.0)];
    norms.iter().zip(want).for_each(|(a, b)| assert!((a - b).abs() < 1e-12, "{a} {b}"));
    assert!(why(embedding_bag(&table, ids(&[0]), &bags, BagMode::Sum, None, None)).contains("cover 5 rows"));
    let half = Param::new("h", table.value().cast(DType::F16));
    let y = embedding_bag(&half, &i, &bags, BagMode::Sum, None, None).unwrap();
    assert_eq!(y.dtype(), DType::F16);
    holds(&y, &[11.0, 22.0, 0.0, 0.0, 210.0, 420.0], 1e-3);
}

#[test]
fn segments() {
    let s = Segments::new(&[0, 2, 2, 5]).unwrap();
    let x = t(&[1.0, -1.0, 3.0, 3.0, 2.0], &[5]);
    holds(&x.segment_sum(&s).unwrap(), &[0.0, 0.0, 8.0], 0.0);
    holds(&x.segment_mean(&s).unwrap(), &[0.0, 0.0, 8.0 / 3.0], 1e-12);
    holds(&x.segment_max(&s).unwrap(), &[1.0, 0.0, 3.0], 0.0);
    let leaf = Tensor::leaf(x.array().clone());
    let g = leaf.segment_max(&s).unwrap().backward().unwrap();
    assert_eq!(g.of(&leaf).unwrap().to_f64(), [1.0, 0.0, 1.0, 0.0, 0.0], "the first of equal values");
    let p = x.segment_softmax(&s).unwrap();
    let e = std::f64::consts::E;
    let z = 2.0 * e + 1.0;
    holds(&p, &[e * e / (e * e + 1.0), 1.0 / (e * e + 1.0), e / z, e / z, 1.0 / z], 1e-12);
    holds(&p.segment_sum(&s).unwrap(), &[1.0, 0.0, 1.0], 1e-12);
    holds(&t(&[5.0, 6.0, 7.0], &[3]).segment_repeat(&s).unwrap(), &[5.0, 5.0, 7.0, 7.0, 7.0], 0.0);
    // Masked and empty segments stay finite.
    let inf = f64::NEG_INFINITY;
    holds(&t(&[inf, inf, 0.0, inf, 0.0], &[5]).segment_softmax(&s).unwrap(), &[0.0, 0.0, 0.5, 0.0, 0.5], 0.0);
    let none = Segments::new(&[0]).unwrap();
    assert_eq!(Tensor::zeros(&[0, 3], DType::F32).segment_sum(&none).unwrap().shape(), [0, 3]);
    assert!(why(Segments::new(&[1, 2])).contains("begin with 0"));
    assert!(why(Segments::new(&[])).contains("begin with 0"));
    assert!(why(Segments::new(&[0, 3, 2])).contains("2 follows 3 at position 2"));
    assert!(why(x.slice(0, 0..4).unwrap().segment_sum(&s)).contains("cover 5 rows, the input has 4"));
}

/// One output element at a time.
fn naive_conv(x: &Tensor, w: &Array, bias: &[f64], c: Conv) -> (Vec<usize>, Vec<f64>) {
    let (xs, ws) = (x.shape().to_vec(), w.shape().to_vec());
    let (xv, wv) = (x.array().to_f64(), w.to_f64());
    let size = |a: usize| (xs[2 + a] + 2 * c.padding[a] - c.dilation[a] * (ws[2 + a] - 1) - 1) / c.stride[a] + 1;
    let (oh, ow) = (size(0), size(1));
    let (cg, og) = (xs[1] / c.groups, ws[0] / c.groups);
    let mut y = Vec::new();
    for b in 0..xs[0] {
        for o in 0..ws[0] {
            for i in 0..oh {
                for j in 0..ow {
                    let mut sum = bias[o];
                    for k in 0..cg {
                        for ki in 0..ws[2] {
                            for kj in 0..ws[3] {
                                let r = (i * c.stride[0] + ki * c.dilation[0]) as isize - c.padding[0] as isize;
                                let s = (j * c.stride[1] + kj * c.dilation[1]) as isize - c.padding[1] as isize;
                                if r < 0 || s < 0 || r as usize >= xs[2] || s as usize >= xs[3] {
                                    continue;
                                }
                                let channel = o / og * cg + k;
                                let at = ((b * xs[1] + channel) * xs[2] + r as usize) * xs[3] + s as usize;
                                sum += xv[at] * wv[((o * cg + k) * ws[2] + ki) * ws[3] + kj];
                            }
                        }
                    }
                    y.push(sum);
                }
            }
        }
    }
    (vec![xs[0], ws[0], oh, ow], y)
}

#[test]
fn convolutions_match_naive_loops() {
    let mut g = Gen::new(5);
    for case in 0..60 {
        let groups = [1, 1, 2, 3][g.size(0, 3)];
        let (b, cin, cout) = (g.size(1, 3), groups * g.size(1, 3), groups * g.size(1, 3));
        let c = Conv {
            stride: [g.size(1, 3), g.size(1, 3)],
            padding: [g.size(0, 3), g.size(0, 3)],
            dilation: [g.size(1, 3), g.size(1, 3)],
            groups,
        };
        let k = [g.size(1, 3), g.size(1, 4)];
        let (h, w) = (g.size(1, 4) + c.dilation[0] * (k[0] - 1), g.size(1, 4) + c.dilation[1] * (k[1] - 1));
        let x = Tensor::new(g.array(&[b, cin, h, w]));
        let weight = g.array(&[cout, cin / groups, k[0], k[1]]);
        let bias: Vec<f64> = (0..cout).map(|_| g.normal()).collect();
        let (shape, want) = naive_conv(&x, &weight, &bias, c);
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::BF16, 0.2)] {
            let p = Param::new("weight", weight.cast(dtype));
            let q = Param::new("bias", Array::from_slice(&bias, &[cout]).unwrap().cast(dtype));
            let xd = x.cast(dtype).unwrap();
            let y = conv2d(&xd, &p, Some(&q), c, None).unwrap();
            assert_eq!((y.shape(), y.dtype()), (&shape[..], dtype), "case {case}");
            holds(&y, &want, tolerance);
            // Without history nothing is stored, and the values are the same.
            let plain = prismgrad::no_grad(|| conv2d(&xd, &p, Some(&q), c, None)).unwrap();
            assert_eq!(plain.array().to_f64(), y.array().to_f64());
        }
        if k[0] == 1 && h == 1 && c.padding[0] == 0 {
            let flat = Param::new("weight", weight.reshape(&[cout, cin / groups, k[1]]).unwrap());
            let y = conv1d(&x.reshape(&[b, cin, w]).unwrap(), &flat, None, c, None).unwrap();
            assert_eq!(y.shape(), [b, cout, shape[3]]);
        }
    }
}

#[test]
fn convolution_by_hand_and_errors() {
    let x = t(&[1.0, 2.0, 3.0, 4.0], &[1, 1, 4]);
    let w = Param::new("conv.weight", Array::from_slice(&[1.0, 10.0, 100.0], &[1, 1, 3]).unwrap());
    let c = Conv::default();
    holds(&conv1d(&x, &w, None, c, None).unwrap(), &[321.0, 432.0], 0.0);
    holds(&conv1d(&x, &w, None, c.padding(1).stride(2), None).unwrap(), &[210.0, 432.0], 0.0);
    holds(&conv1d(&x, &w, None, c.padding(2).dilation(2), None).unwrap(), &[310.0, 420.0, 31.0, 42.0], 0.0);
    assert_eq!(conv1d(&Tensor::zeros(&[0, 1, 4], DType::F64), &w, None, c, None).unwrap().shape(), [0, 1, 2]);
    let image = t(&[1.0, 2.0, 3.0, 4.0], &[1, 1, 2, 2]);
    let rows = image.unfold([2, 1], c).unwrap();
    holds(&rows, &[1.0, 3.0, 2.0, 4.0], 0.0);
    holds(&rows.fold([2, 2], [2, 1], c).unwrap(), &[1.0, 2.0, 3.0, 4.0], 0.0);
    assert!(why(conv1d(&x.slice(2, 0..2).unwrap(), &w, None, c, None)).contains("pad more"));
    assert!(why(conv1d(&x, &w, None, c.groups(2), None)).contains("groups"));
    assert!(why(conv1d(&x, &w, None, c.stride(0), None)).contains("at least 1"));
    assert!(why(conv2d(&x, &w, None, c, None)).contains("[B, C, H, W]"));
    assert!(why(conv1d(&x, &w, None, c, Some(&Samples::uniform(2, 1)))).contains("2 of 1 images"));
}

#[test]
fn pooling() {
    let v: Vec<f64> = (0..16).map(|i| ((i * 7) % 16) as f64).collect();
    let x = t(&v, &[1, 1, 4, 4]);
    // 0 7 14 5 / 12 3 10 1 / 8 15 6 13 / 4 11 2 9
    holds(&x.max_pool2d(2).unwrap(), &[12.0, 14.0, 15.0, 13.0], 0.0);
    holds(&x.avg_pool2d([2, 2]).unwrap(), &[5.5, 7.5, 9.5, 7.5], 0.0);
    holds(&x.max_pool2d(Window::new(3).stride(2).padding(1)).unwrap(), &[12.0, 14.0, 15.0, 15.0], 0.0);
    holds(&x.avg_pool2d(Window::new(3).padding(1)).unwrap(), &[22.0 / 9.0, 30.0 / 9.0, 38.0 / 9.0, 30.0 / 9.0], 1e-12);
    holds(&x.adaptive_avg_pool2d([1, 1]).unwrap(), &[7.5], 0.0);
    holds(&x.global_avg_pool().unwrap(), &[7.5], 0.0);
    holds(&x.adaptive_avg_pool2d([1, 3]).unwrap(), &[7.5, 8.5, 7.5], 1e-12);
    let s = t(&[1.0, 2.0, 3.0, 4.0, 5.0], &[1, 1, 5]);
    holds(&s.max_pool1d(2).unwrap(), &[2.0, 4.0], 0.0);
    holds(&s.avg_pool1d(Window::new(2).stride(1).padding(1)).unwrap(), &[0.5, 1.5, 2.5, 3.5, 4.5, 2.5], 0.0);
    holds(&s.adaptive_avg_pool1d(2).unwrap(), &[2.0, 4.0], 1e-12);
    // Negative values never lose to padding; ties go to the first.
    holds(
        &t(&[-3.0, -1.0], &[1, 1, 2]).max_pool1d(Window::new(2).stride(1).padding(1)).unwrap(),
        &[-3.0, -1.0, -1.0],
        0.0,
    );
    let leaf = Tensor::leaf(Array::ones(&[1, 1, 2, 2], DType::F64));
    let g = leaf.max_pool2d(Window::new(2).stride(1)).unwrap().backward().unwrap();
    assert_eq!(g.of(&leaf).unwrap().to_f64(), [1.0, 0.0, 0.0, 0.0]);
    assert!(why(x.max_pool2d(Window::new(2).stride(1).padding([2, 0]))).contains("half the kernel"));
    assert!(why(x.avg_pool2d(Window::new(5).stride(1))).contains("pad more"));
    assert!(why(s.max_pool2d(1)).contains("[B, C, H, W]"));
    assert!(
        why(Tensor::zeros(&[1, 1, 0, 3], DType::F32).max_pool2d(Window::new(2).stride(1).padding(1)))
            .contains("nothing to pool")
    );
}

#[test]
fn rotary_positions() {
    let table = RotaryTable::new(8, 4, 10000.0).unwrap();
    let x = t(&[1.0, 2.0, 3.0, 4.0], &[1, 1, 1, 4]);
    let (a, b) = (3.0f64, 3.0f64 * 0.01);
    let half = x.rotary(&table, 3, Pairing::Half).unwrap();
    let turn = |x: f64, y: f64, a: f64| (x * a.cos() - y * a.sin(), y * a.cos() + x * a.sin());
    let ((p, r), (q, s)) = (turn(1.0, 3.0, a), turn(2.0, 4.0, b));
    holds(&half, &[p, q, r, s], 1e-12);
    let ((p, q), (r, s)) = (turn(1.0, 2.0, a), turn(3.0, 4.0, b));
    holds(&x.rotary(&table, 3, Pairing::Interleaved).unwrap(), &[p, q, r, s], 1e-12);
    // Decoding one position at a time gives the rows of the whole.
    let mut g = Gen::new(3);
    let all = Tensor::new(g.array(&[2, 5, 3, 4]));
    let whole = all.rotary(&table, 0, Pairing::Half).unwrap();
    for i in 0..5 {
        let one = all.slice(1, i..i + 1).unwrap().rotary(&table, i, Pairing::Half).unwrap();
        assert_eq!(one.array().to_f64(), whole.slice(1, i..i + 1).unwrap().array().to_f64());
    }
    // Products of queries and keys depend on the distance only.
    let dot = |i: usize, j: usize| {
        let (q, k) = (x.rotary(&table, i, Pairing::Half).unwrap(), x.rotary(&table, j, Pairing::Half).unwrap());
        q.mul(&k).unwrap().sum(&[], false).unwrap().item().unwrap()
    };
    assert!((dot(1, 4) - dot(4, 7)).abs() < 1e-12);
    assert!(why(x.rotary(&table, 8, Pairing::Half)).contains("longer table"));
    assert!(why(RotaryTable::new(4, 3, 10000.0)).contains("even"));
    assert!(
        why(x.reshape(&[1, 1, 4]).unwrap().rotary(&table, 0, Pairing::Half)).contains("[batch, time, heads, size]")
    );
    assert_eq!(x.cast(DType::BF16).unwrap().rotary(&table, 0, Pairing::Half).unwrap().dtype(), DType::BF16);
}

#[test]
fn grouped_linear_is_a_linear_per_group() {
    let w = Param::new("experts", Array::from_slice(&[1.0, 2.0, 10.0, 20.0, 100.0, 200.0], &[3, 2, 1]).unwrap());
    let bias = Param::new("bias", Array::from_slice(&[0.5, 0.0, -1.0], &[3, 1]).unwrap());
    let groups = Segments::new(&[0, 1, 1, 3]).unwrap();
    let x = t(&[1.0, 1.0, 1.0, 0.0, 0.0, 1.0], &[3, 2]);
    let samples = Samples::owners(vec![1, 0, 1], 2).unwrap();
    let y = grouped_linear(&x, &w, Layout::InOut, Some(&bias), Activation::None, &groups, &samples).unwrap();
    holds(&y, &[3.5, 99.0, 199.0], 1e-12);
    let other = Segments::new(&[0, 3]).unwrap();
    assert!(
        why(grouped_linear(&x, &w, Layout::InOut, None, Activation::None, &other, &samples))
            .contains("1 groups for the 3")
    );
    assert!(
        why(grouped_linear(&x, &w, Layout::OutIn, None, Activation::None, &groups, &samples))
            .contains("rows must have 1")
    );
    let few = Samples::uniform(1, 2);
    assert!(why(grouped_linear(&x, &w, Layout::InOut, None, Activation::None, &groups, &few)).contains("map 2 rows"));
    let none = Segments::uniform(3, 0);
    let x = Tensor::zeros(&[0, 2], DType::F64);
    let y =
        grouped_linear(&x, &w, Layout::InOut, Some(&bias), Activation::None, &none, &Samples::uniform(2, 0)).unwrap();
    assert_eq!(y.shape(), [0, 1]);
}

/// Everything this file is about, forward and backward, as bits.
fn fingerprint() -> Vec<u64> {
    let mut g = Gen::new(11);
    let mut bits = Vec::new();
    let mut keep = |a: &Array| bits.extend(a.to_f64().iter().map(|x| x.to_bits()));
    let f = |a: Array| a.cast(DType::F32);
    // One id in three is the same, so that runs are long.
    let v: Vec<u32> = (0..6000).map(|i| if i % 3 == 0 { 7 } else { g.size(0, 99) as u32 }).collect();
    let i = Tensor::from_slice(&v, &[20, 300]).unwrap();
    let table = Param::new("w", f(g.array(&[100, 48])));
    let y = embedding(&table, &i, None, None).unwrap();
    let grads = y.square().unwrap().backward().unwrap();
    let pg = grads.param(&table).unwrap();
    keep(&pg.sum().unwrap());
    bits.extend(pg.sample_sq_norms().unwrap().iter().map(|x| x.to_bits()));
    let mut keep = |a: &Array| bits.extend(a.to_f64().iter().map(|x| x.to_bits()));
    let x = Tensor::leaf(f(g.array(&[6000, 40])));
    let s = Segments::lengths(&[0, 2500, 10, 3490]);
    let y = x.segment_softmax(&s).unwrap().mul(&x).unwrap().segment_sum(&s).unwrap();
    keep(y.array());
    keep(y.backward().unwrap().of(&x).unwrap());
    let image = Tensor::leaf(f(g.array(&[3, 4, 20, 20])));
    let (w, b) = (Param::new("w", f(g.array(&[6, 2, 3, 3]))), Param::new("b", f(g.array(&[6]))));
    let c = Conv::default().padding(1).stride(2).groups(2);
    let y = conv2d(&image, &w, Some(&b), c, None).unwrap().max_pool2d(2).unwrap();
    keep(y.array());
    let grads = y.backward().unwrap();
    keep(grads.of(&image).unwrap());
    keep(&grads.param(&w).unwrap().sum().unwrap());
    keep(&grads.param(&b).unwrap().sum().unwrap());
    let wide = Tensor::leaf(f(g.array(&[500, 300])));
    let rows: Vec<u32> = (0..4000).map(|_| g.size(0, 499) as u32).collect();
    let y = wide.index_select(0, ids(&rows)).unwrap().square().unwrap();
    keep(y.backward().unwrap().of(&wide).unwrap());
    bits
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let run = |n: usize| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(fingerprint);
    let one = run(1);
    assert_eq!(one, run(3));
    assert_eq!(one, run(4));
}

#[test]
fn sums_of_rows_match_f64() {
    // Wide and narrow rows, weights with zeros over non-finite rows: the two ways a row sum is cut up.
    use prismgrad::{Factor, ParamGrad};
    let mut g = Gen::new(2);
    for (n, p) in [(3000, 5), (2500, 1500), (1, 3000), (40, 700)] {
        let samples = Samples::uniform(n, 1);
        let mut v: Vec<f32> = (0..n * p).map(|_| g.normal() as f32).collect();
        let mut w: Vec<f64> = (0..n).map(|_| g.uniform()).collect();
        if n > 1 {
            v[p..2 * p].fill(f32::NAN);
            w[1] = 0.0;
        }
        let param = Param::new("b", Array::zeros(&[p], DType::F32));
        let mut pg = ParamGrad::new(param, n);
        pg.push(Factor::RowSum { grad: Array::from_slice(&v, &[n, p]).unwrap(), samples }).unwrap();
        let got = pg.weighted_sum(&w).unwrap().to_f64();
        for c in 0..p {
            let want: f64 = (0..n).filter(|&r| w[r] != 0.0).map(|r| w[r] * v[r * p + c] as f64).sum();
            assert!((got[c] - want).abs() < 1e-3 * (1.0 + want.abs()), "{n}x{p}: {} and {want}", got[c]);
        }
    }
}
