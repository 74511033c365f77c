//! Sums, means, norms, softmax and losses at the edges of f32 and of halves, beside f64. docs/numerics.md has the table that
//! `what_the_page_says` computes.

use half::f16;
use prismgrad::nn::{Ctx, LayerNorm, Params};
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::loss::{CrossEntropy, Reduce, binary_cross_entropy_with_logits, cross_entropy};
use prismgrad::{Array, DType, Param, Result, Tensor};

/// As many as public reports add up.
const MANY: usize = 1_392_640;

fn tenths() -> f64 {
    MANY as f64 * 0.1f32 as f64
}

fn bias_gradient(n: usize) -> Result<f64> {
    let w = Param::new("w", Array::zeros(&[1, 1], DType::F32));
    let b = Param::new("b", Array::zeros(&[1], DType::F32));
    let x = Tensor::new(Array::ones(&[1, n, 1], DType::F32));
    let y = linear(&x, &w, Layout::OutIn, Some(&b), Activation::None, None)?;
    y.mul_scalar(0.1)?.sum(&[1, 2], false)?.backward()?.param(&b).unwrap().sum()?.item()
}

/// The nearest f32, or the one beside it, at any number of threads.
#[test]
fn sums_of_millions_are_as_good_as_f32_allows() {
    let all = || -> Result<[f64; 6]> {
        let row = Tensor::new(Array::full(&[MANY], 0.1, DType::F32));
        let column = Tensor::new(Array::full(&[MANY, 1], 0.1, DType::F32));
        let running = |t: &Tensor, d: isize| -> Result<f64> { Ok(*t.cumsum(d)?.array().to_f64().last().unwrap()) };
        Ok([
            row.sum(&[], false)?.array().item()?,
            column.sum(&[0], false)?.array().item()?,
            row.mean(&[], false)?.array().item()? * MANY as f64,
            bias_gradient(MANY)?,
            running(&row, 0)?,
            running(&column, 0)?,
        ])
    };
    let on = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| all().unwrap())
    };
    let got = on(1);
    for x in got {
        assert!((x / tenths() - 1.0).abs() < 1.2e-7, "{got:?} against {}", tenths());
    }
    assert_eq!(got.map(f64::to_bits), on(4).map(f64::to_bits));
}

/// The sum of 100,000 ones is no f16, their mean is.
#[test]
fn means_of_halves_are_rounded_once() -> Result<()> {
    for (dtype, unit) in [(DType::F16, 1.0 / 1024.0), (DType::BF16, 1.0 / 128.0)] {
        let make = |shape: &[usize], f: fn(usize) -> f64| Tensor::leaf(Array::generate(shape, dtype, f));
        let near = |t: Tensor, want: f64| -> Result<()> {
            assert_eq!(t.dtype(), dtype);
            let got = t.array().to_f64();
            assert!(got.iter().all(|g| (g - want).abs() <= unit * want), "{dtype}: {:?} against {want}", &got[..1]);
            Ok(())
        };
        let ones = make(&[100_000], |_| 1.0);
        near(ones.mean(&[0], false)?, 1.0)?;
        near(make(&[100_000, 2], |_| 1.0).mean(&[0], false)?, 1.0)?;
        near(make(&[100_000], |i| (i % 2) as f64 * 4.0).var(&[0], false)?, 4.0)?;
        // The square of one deviation is no f16 either.
        near(make(&[1000], |i| if i == 7 { 1000.0 } else { 0.0 }).var(&[0], false)?, 999.0)?;
        near(make(&[1, 1, 400, 400], |_| 1.0).global_avg_pool()?, 1.0)?;
        near(make(&[1, 1, 400, 400], |_| 1.0).adaptive_avg_pool2d([1, 1])?, 1.0)?;
        let wide = make(&[1, 50_000], |_| 8.0);
        near(
            prismgrad::ops::loss::mse_loss(&wide, &Tensor::new(Array::zeros(&[1, 50_000], dtype)), Reduce::Mean)?
                .cast(dtype)?,
            64.0,
        )?;
        // The gradient of a mean is 1/n.
        let small = make(&[4, 2], |i| i as f64);
        let grads = small.mean(&[0], false)?.sum(&[0], true)?.backward()?;
        assert_eq!(grads.of(&small).unwrap().to_f64(), [0.25; 8]);
    }
    assert!(f16::from_f64(1e5).is_infinite());
    Ok(())
}

/// Largest error of `got` beside `want`, relative to the largest of `want`.
fn error(got: &Tensor, want: &Tensor) -> f64 {
    let (got, want) = (got.array().to_f64(), want.array().to_f64());
    let size = want.iter().fold(0f64, |m, w| m.max(w.abs())).max(1e-300);
    got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0f64, |m, e| if e.is_nan() { f64::NAN } else { m.max(e) })
        / size
}

type Op = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// Largest relative error of an op on f32 numbers, beside the same op on the same numbers in f64.
fn of(x: &Array, op: &Op) -> f64 {
    let run = |x: Array| op(&Tensor::leaf(x)).unwrap();
    error(&run(x.clone()), &run(x.cast(DType::F64)))
}

fn wave(shape: &[usize], f: impl Fn(f64) -> f64 + Sync) -> Array {
    Array::generate(shape, DType::F32, |i| f(((i * 7919) % 10_007) as f64 / 10_007.0))
}

fn gradient(losses: Tensor, x: &Tensor) -> Result<Tensor> {
    let grads = losses.backward()?;
    Ok(Tensor::new(grads.of(x).unwrap().clone()))
}

/// Every row of the page: what, its input, and the largest error allowed.
fn rows() -> Vec<(&'static str, Array, Op, f64)> {
    let sum: fn() -> Op = || Box::new(|x| x.sum(&[], false));
    let mean: fn() -> Op = || Box::new(|x| x.mean(&[], false));
    let norm: fn() -> Op = || {
        Box::new(|x| {
            let d = x.shape()[1];
            LayerNorm::new(&Params::new(0, x.dtype()), d)?.forward(x, &Ctx::eval())
        })
    };
    let entropy: fn() -> Op = || {
        Box::new(|x| {
            let targets = Array::generate(&[x.shape()[0]], DType::U32, |i| i as f64);
            let losses = cross_entropy(x, targets, &CrossEntropy::default())?;
            gradient(losses, x)
        })
    };
    let logits = |top: f64| wave(&[8, 1000], move |u| top * u);
    let bce: fn() -> Op = || {
        Box::new(|x| {
            let targets = Tensor::new(Array::zeros(x.shape(), x.dtype()));
            binary_cross_entropy_with_logits(x, &targets, Reduce::Sum)
        })
    };
    vec![
        ("sum of 1,392,640 tenths, as a row", Array::full(&[MANY], 0.1, DType::F32), sum(), 1.2e-7),
        (
            "sum of 1,392,640 tenths, as a column",
            Array::full(&[MANY, 1], 0.1, DType::F32),
            Box::new(|x| x.sum(&[0], false)),
            1.2e-7,
        ),
        ("sum of 1,000,000 values in [0, 1)", wave(&[1_000_000], |u| u), sum(), 1.2e-7),
        ("sum of 16,777,216 values in [0, 1)", wave(&[1 << 24], |u| u), sum(), 1.2e-7),
        ("mean of 1,000,000 values in [0, 1)", wave(&[1_000_000], |u| u), mean(), 1.2e-7),
        ("running sum of 1,048,576 values in [0, 1)", wave(&[1 << 20], |u| u), Box::new(|x| x.cumsum(0)), 1.2e-7),
        (
            "variance of 100,000 values around 1000, ±0.5",
            wave(&[100_000], |u| 999.5 + u),
            Box::new(|x| x.var(&[], false)),
            2e-6,
        ),
        ("layer norm, mean 0, spread 1", wave(&[8, 768], |u| u - 0.5), norm(), 1e-6),
        ("layer norm, values of 1e-30", wave(&[8, 768], |u| 1e-30 * (u - 0.5)), norm(), 1e-6),
        ("softmax of logits to 10", logits(10.0), Box::new(|x| x.softmax(-1)), 2e-6),
        ("softmax of logits to 10,000", logits(1e4), Box::new(|x| x.softmax(-1)), 2e-6),
        ("log-softmax of logits to 10,000", logits(1e4), Box::new(|x| x.log_softmax(-1)), 2e-7),
        ("log-sum-exp of 1,000,000 values", wave(&[1, 1_000_000], |u| u), Box::new(|x| x.logsumexp(&[1], false)), 2e-7),
        ("cross-entropy's gradient, logits to 10", logits(10.0), entropy(), 2.8e-7),
        ("cross-entropy's gradient, logits to 100", logits(100.0), entropy(), 2.4e-7),
        ("cross-entropy's gradient, logits to 1,000", logits(1e3), entropy(), 2.8e-7),
        ("cross-entropy's gradient, logits to 10,000", logits(1e4), entropy(), 2.4e-7),
        ("softplus at −20", Array::full(&[1], -20.0, DType::F32), Box::new(|x| x.softplus()), 5e-7),
        ("softplus at −30", Array::full(&[1], -30.0, DType::F32), Box::new(|x| x.softplus()), 5e-7),
        ("softplus at −80", Array::full(&[1], -80.0, DType::F32), Box::new(|x| x.softplus()), 1e-5),
        ("binary cross-entropy at −20, target 0", Array::full(&[1, 1], -20.0, DType::F32), bce(), 5e-7),
        ("binary cross-entropy at 30, target 0", Array::full(&[1, 1], 30.0, DType::F32), bce(), 1.2e-7),
    ]
}

#[test]
fn what_the_page_says() {
    let page =
        std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/numerics.md")).unwrap();
    for (what, x, op, most) in rows() {
        let e = of(&x, &op);
        println!("| {what} | {e:.1e} |");
        assert!(e <= most, "{what}: {e:e} is more than {most:e}");
        // A row of the page has the name and a figure that is no less than a tenth of what is found here, and no more than the limit.
        let row =
            page.lines().find(|l| l.starts_with(&format!("| {what} |"))).unwrap_or_else(|| panic!("no row for {what}"));
        let said: f64 = row.split('|').nth(2).unwrap().trim().parse().unwrap();
        assert!(said <= most && said >= 0.1 * e, "{what}: the page says {said:e}, this machine finds {e:e}");
    }
}

/// Rows of −∞ and powers of zero have the values that they have in the limit, and no gradient that is no number where there is one.
#[test]
fn infinite_rows_and_powers_of_zero() -> Result<()> {
    let none = Tensor::leaf(Array::full(&[2, 3], f64::NEG_INFINITY, DType::F32));
    assert_eq!(none.logsumexp(&[1], false)?.array().to_f64(), [f64::NEG_INFINITY; 2]);
    let half = Tensor::leaf(Array::from_slice(&[f32::NEG_INFINITY, 0.0, 0.0], &[1, 3])?);
    assert_eq!(half.softmax(-1)?.array().to_f64(), [0.0, 0.5, 0.5]);
    let zero = Tensor::leaf(Array::zeros(&[3], DType::F32));
    for (power, value, slope) in [(0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (2.0, 0.0, 0.0)] {
        let y = zero.powf(power)?;
        assert_eq!(y.array().to_f64(), [value; 3], "0^{power}");
        assert_eq!(gradient(y, &zero)?.array().to_f64(), [slope; 3], "the slope of x^{power} at 0");
    }
    Ok(())
}
