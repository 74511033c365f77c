//! The same bodies on the CPU, on the emulated CUDA device under four schedules (feature `emulator`), and on a card where
//! there is one: gradient checks, per-sample checks, checkpoints, mixed precision.

use crate::common::gpt::gpt;
use crate::common::privacy::{keyed, whole};
use crate::common::scratch::Scratch;
use crate::common::tokens::tokens;
use crate::common::values::values;
use prismgrad::array::ArrayArguments;
use prismgrad::autograd::Groups;
use prismgrad::check::{self, Gen};
use prismgrad::data::IGNORE;
use prismgrad::device::cuda::{CudaModule, Launch};
use prismgrad::device_tests;
use prismgrad::io::CheckpointFolder;
use prismgrad::models::Gpt;
use prismgrad::nn::Ctx;
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::ops::{Differentiable, registry};
use prismgrad::optim::{AdamW, Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle};
use prismgrad::step::{PlainStep, PrivateStep, TrainStep, clipped_gradient};
use prismgrad::train::state;
use prismgrad::{Array, DType, Device, Factor, Param, ParamGrad, Samples, Tensor};

fn private(params: &[Param]) -> PrivateStep {
    PrivateStep::new(params, keyed(whole(3), 9), AdamW::default(), Schedule::constant(1e-2)).unwrap()
}

/// Kernels that this crate does not have: `y = a·x`, reading `past` elements too far.
static TIMES: CudaModule = CudaModule::new(
    "times",
    "#include \"prelude.cuh\"
     static const float units[2] = {1.f, 1.f};
     extern \"C\" __global__ void times_f32(const float* x, float* y, float a, i64 n, i64 past) {
         i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
         if (i < n) y[i] = a * units[i % 2] * x[i + past];
     }",
);
/// Another kernel of the same name, and a kernel file's name of this crate.
static SOFTMAX: CudaModule = CudaModule::new(
    "softmax",
    "#include \"prelude.cuh\"
     extern \"C\" __global__ void times_f32(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + 1; }",
);

device_tests! {
    /// Labels of u32 and of i64 give the same losses and gradients, with each type's mark for rows that do not count.
    fn labels_of_both_types(device) {
        let logits = Array::generate(&[3, 4, 5], DType::F64, |i| (i as f64 * 0.7).sin()).to(device).unwrap();
        let run = |labels: Array, ignore_index: Option<i64>| {
            let x = Tensor::leaf(logits.clone());
            let options = CrossEntropy { ignore_index, ..CrossEntropy::default() };
            let losses = cross_entropy(&x, labels.to(device).unwrap(), &options).unwrap();
            let grads = losses.backward().unwrap();
            (losses.array().to_f64(), grads.of(&x).unwrap().to_f64())
        };
        let class = |i: usize| (i * 7 % 5) as i64;
        let signed = |mark: i64| {
            let labels: Vec<i64> = (0..12).map(|i| if i % 3 == 1 { mark } else { class(i) }).collect();
            Array::from_slice(&labels, &[3, 4]).unwrap()
        };
        let unsigned: Vec<u32> = (0..12).map(|i| if i % 3 == 1 { IGNORE } else { class(i) as u32 }).collect();
        let want = run(Array::from_slice(&unsigned, &[3, 4]).unwrap(), Some(-100));
        assert!(want.0.iter().all(|l| l.is_finite() && *l > 0.0));
        for mark in [-100, -1, 1 << 40] {
            assert_eq!(run(signed(mark), Some(mark)), want, "{mark}");
        }
        // Without a mark all rows count, and on a GPU a target that is no class is a loss of NaN.
        assert_ne!(run(signed(2), None), want);
        if device.is_cuda() {
            assert!(run(signed(-1), None).0.iter().all(|l| l.is_nan()));
            assert!(run(signed(1 << 40), Some(-100)).0.iter().all(|l| l.is_nan()));
        }
        let like = Tensor::new(logits.clone()).full_like(2.5);
        assert_eq!((like.device(), like.dtype(), like.shape()), (device.clone(), DType::F64, &[3, 4, 5][..]));
        assert_eq!(like.mean_all().unwrap().item().unwrap(), 2.5);
    }

    /// A user's kernel runs beside the crate's own; what does not fit it is refused in a sentence that names it.
    fn kernels_of_a_user(device) {
        let Some(gpu) = device.gpu() else { return };
        let x = Array::generate(&[3, 100], DType::F32, |i| i as f64).to(device).unwrap();
        let mut y = Array::zeros(&[3, 100], (DType::F32, device));
        let before = y.clone();
        let times = TIMES.kernel(gpu, "times_f32").unwrap();
        macro_rules! launch {
            () => {
                Launch::of(gpu, times).grid(2, 1, 1).block(256)
            };
        }
        launch!().input::<f32>(&x).output::<f32>(&mut y).val(2f32).val(300i64).val(0i64).run().unwrap();
        assert!(y.to_f64().iter().enumerate().all(|(i, y)| *y == 2.0 * i as f64));
        assert!(before.to_f64().iter().all(|x| *x == 0.0), "another handle of the output sees no change");
        let other = Launch::of(gpu, SOFTMAX.kernel(gpu, "times_f32").unwrap()).block(100);
        other.input::<f32>(&x).output::<f32>(&mut y).run().unwrap();
        assert_eq!(y.to_f64()[..3], [1.0, 2.0, 3.0]);
        assert_eq!(TIMES.kernel(gpu, "times_f32").unwrap().file(), "times");

        let refused = |e: prismgrad::Result<()>, why: &[&str]| {
            let e = e.unwrap_err().to_string();
            assert!(why.iter().all(|w| e.contains(w)), "{e} lacks one of {why:?}");
        };
        let few = launch!().input::<f32>(&x).output::<f32>(&mut y).val(2f32).run();
        refused(few, &["times_f32 (times.cu)", "5 parameters of [8, 8, 4, 8, 8]", "3 arguments of [8, 8, 4]"]);
        let wide = launch!().input::<f32>(&x).output::<f32>(&mut y).val(2f64).val(300i64).val(0i64).run();
        refused(wide, &["5 arguments of [8, 8, 8, 8, 8]"]);
        refused(launch!().input::<f64>(&x).run(), &["times_f32", "argument 0", "holds f32, not f64"]);
        let (turned, here) = (x.transpose(0, 1).unwrap(), x.to(&Device::Cpu).unwrap());
        refused(launch!().input::<f32>(&turned).run(), &["strided view"]);
        refused(launch!().input::<f32>(&x).input::<f32>(&here).run(), &["argument 1", "on the CPU"]);
        refused(TIMES.kernel(gpu, "divide_f32").map(drop), &["divide_f32 of times.cu", "no kernel of that name"]);
        static WRONG: CudaModule = CudaModule::new("wrong", "#include \"prelude.cuh\"\nextern \"C\" __global__ void f(flot* x) {}");
        refused(WRONG.kernel(gpu, "f").map(drop), &["compile wrong.cu", "flot"]);
        static NAMELESS: CudaModule = CudaModule::new("../x", "");
        refused(NAMELESS.kernel(gpu, "f").map(drop), &["\"../x\"", "letters, digits and underscores"]);
        // The emulated device says where a kernel has read outside of its buffers, in other texts than its own, too.
        #[cfg(feature = "emulator")]
        if gpu.is_emulated() && prismgrad::device::emulator::is_checked() {
            let x = Array::zeros(&[300], (DType::F32, device));
            let ran = launch!().input::<f32>(&x).output::<f32>(&mut y).val(2f32).val(300i64).val(1i64 << 34).run();
            let ran = ran.and_then(|()| gpu.synchronize());
            let report = prismgrad::device::emulator::last_report();
            assert!(report.contains("out of bounds") && report.contains("times.cu:5"), "{ran:?} {report}");
            prismgrad::device::emulator::reset();
        }
    }

    /// Every differentiable input and parameter of every op, against central differences; every query of every factor,
    /// against each sample alone.
    fn gradients_and_factors_of_every_op(device) {
        for op in registry() {
            if matches!(op.differentiable, Differentiable::No(_)) {
                continue;
            }
            for (k, make) in op.cases.iter().enumerate() {
                let seed = 40 + k as u64;
                let why = |e| -> ! { panic!("{} case {k} on {device}: {e}", op.name) };
                let case = make(&mut Gen::new(seed)).and_then(|c| c.to(device)).unwrap_or_else(|e| why(e));
                check::gradients(&case, seed, 1, 1e-6).unwrap_or_else(|e| why(e));
                if case.samples.is_some() && !case.params.is_empty() {
                    check::per_sample(&|| case.losses(seed), &case.params, seed, 1e-9).unwrap_or_else(|e| why(e));
                }
            }
        }
    }

    /// A parameter that two grouped products use as blocks of other shapes: norms and inner products are those of the sums.
    fn grouped_factors_of_other_widths(device) {
        let samples = Samples::uniform(3, 2);
        let array = |shape: &[usize], k: usize| {
            Array::generate(shape, DType::F64, |i| ((i * k % 13) as f64 - 5.0) / 7.0).to(device).unwrap()
        };
        let mut g = ParamGrad::new(Param::new("w", array(&[2, 12], 1)), 3);
        for (rd, cd) in [(2, 6), (3, 4)] {
            let (left, right, samples) = (array(&[6, rd], 5), array(&[6, cd], 3), samples.clone());
            let group = Groups::of_ids(vec![0, 1, 1, 1, 0, 0], 2).unwrap();
            g.push(Factor::GroupedOuter { left, right, group, samples }).unwrap();
        }
        let each = g.per_sample().unwrap().to_f64();
        let dot = |i: usize, j: usize| -> f64 { (0..24).map(|k| each[i * 24 + k] * each[j * 24 + k]).sum() };
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-10, "{got} for {want}");
        let (norms, gram) = (g.sample_sq_norms().unwrap(), g.gram(&g).unwrap().to_f64());
        for i in 0..3 {
            near(norms[i], dot(i, i));
            (0..3).for_each(|j| near(gram[i * 3 + j], dot(i, j)));
        }
    }

    /// What moves, fills, picks and compares, in every dtype: the same bits as on the CPU.
    fn arrays_of_every_dtype(device) {
        let there = |a: &Array| Tensor::new(a.to(device).unwrap());
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16, DType::I64, DType::U32, DType::U8] {
            let same = |what: &str, got: &Tensor, want: &Tensor| {
                assert_eq!((got.device(), got.dtype()), (device.clone(), want.dtype()), "{what} {dtype}");
                assert_eq!(got.array().to_bytes(), want.array().to_bytes(), "{what} {dtype}");
            };
            let x = Array::generate(&[37, 41], dtype, |i| (i * 7 % 101) as f64);
            let y = Array::generate(&[37, 41], dtype, |i| (i * 5 % 97) as f64);
            let (a, b, ga, gb) = (Tensor::new(x.clone()), Tensor::new(y.clone()), there(&x), there(&y));
            let turned = |t: &Tensor| Tensor::new(t.array().transpose(0, 1).unwrap().contiguous());
            same("transpose", &turned(&ga), &turned(&a));
            let many = |t: &Tensor| {
                let t = t.array().slice(0, 0..36).unwrap().contiguous().reshape(&[2, 18, 41]).unwrap();
                Tensor::new(t.transpose(1, 2).unwrap().contiguous())
            };
            same("transpose of many", &many(&ga), &many(&a));
            let cut = |t: &Tensor| Tensor::new(t.array().step(1, 3).unwrap().slice(0, 3..9).unwrap().copy());
            same("slice", &cut(&ga), &cut(&a));
            let mask = a.lt(&b).unwrap();
            same("compare", &ga.lt(&gb).unwrap(), &mask);
            if dtype.is_float() {
                let there = there(mask.array());
                let chosen = Tensor::select(&mask, &a, &b).unwrap();
                same("select", &Tensor::select(&there, &ga, &gb).unwrap(), &chosen);
                same("masked_fill", &ga.masked_fill(&there, 3.0).unwrap(), &a.masked_fill(&mask, 3.0).unwrap());
            }
            let full = |d: &Device| Tensor::new(Array::full(&[5, 3], 7.0, (dtype, d)));
            same("full", &full(device), &full(&Device::Cpu));
            let range = |d: &Device| Tensor::new(Array::arange(100, (dtype, d)));
            if !dtype.is_half() && dtype != DType::U8 {
                same("arange", &range(device), &range(&Device::Cpu));
            }
            let ids = Array::generate(&[37, 4], DType::U32, |i| (i * 3 % 41) as f64);
            let (i, gi) = (Tensor::new(ids.clone()), there(&ids));
            same("gather", &ga.gather(1, &gi).unwrap(), &a.gather(1, &i).unwrap());
            same("one_hot", &gi.one_hot(41, dtype).unwrap(), &i.one_hot(41, dtype).unwrap());
            let few = Array::generate(&[6], DType::I64, |i| (i * 5 % 37) as f64);
            let (i, gi) = (Tensor::new(few.clone()), there(&few));
            same("index_select", &ga.index_select(0, &gi).unwrap(), &a.index_select(0, &i).unwrap());
            for to in [DType::F32, DType::BF16, DType::I64, DType::U8] {
                same("cast", &ga.cast(to).unwrap(), &a.cast(to).unwrap());
            }
        }
    }

    fn every_parameter_of_a_gpt_per_sample(device) {
        let model = gpt(1, true, DType::F64, device);
        let (x, y) = tokens(3, 1);
        check::per_sample(&|| model.losses(&x, &y, &Ctx::eval()), &model.params().all(), 1, 1e-9).unwrap();
    }

    /// A checkpoint in the middle of a private run: what goes on from it ends in the bits of the run that was not cut.
    fn checkpoints_resume_bitwise(device) {
        let scratch = Scratch::new(&format!("devices-{device}").replace(':', "-"));
        let folder = CheckpointFolder::open(&*scratch).unwrap();
        let run = |from: u64, to: u64, model: &Gpt, step: &mut PrivateStep| {
            for t in from..to {
                let (x, y) = tokens(3, t as usize);
                step.run(3, |_| model.losses(&x, &y, &Ctx::train(t))).unwrap();
            }
        };
        let model = gpt(1, true, DType::F32, device);
        let mut step = private(&model.params().all());
        run(0, 2, &model, &mut step);
        state::save(&folder, 2, None, model.params(), &step, &7u32).unwrap();
        run(2, 4, &model, &mut step);
        let want = values(&model.params().all());
        let other = Gpt::with_dtype(model.config().clone(), 99, DType::F32).unwrap();
        other.params().to(device).unwrap();
        let mut step = private(&other.params().all());
        let checkpoint = folder.latest().unwrap().checkpoint.unwrap();
        assert_eq!(state::load::<u32>(&checkpoint, other.params(), &mut step).unwrap(), 7);
        run(2, 4, &other, &mut step);
        assert_eq!(values(&other.params().all()), want);
    }

    /// 16-bit activations over f32 parameters: the gradient is that of f32 to within rounding, the losses and the
    /// parameters are f32, and what each sample contributes stays within the threshold.
    fn mixed_precision_steps(device) {
        for (dtype, tolerance) in [(DType::BF16, 4e-2), (DType::F16, 5e-3)] {
            for style in [None, Some(ClipStyle::AllLayer), Some(ClipStyle::LayerWise)] {
                let run = |ctx: &Ctx| {
                    let model = gpt(1, true, DType::F32, device);
                    let params = model.params().all();
                    let (x, y) = tokens(4, 1);
                    let losses = model.losses(&x, &y, ctx).unwrap();
                    assert_eq!((losses.dtype(), params[0].dtype()), (DType::F32, DType::F32));
                    let loss = losses.array().to_f64().iter().sum::<f64>() / 4.0;
                    if let Some(style) = &style {
                        let sums = clipped_gradient(&losses, &params, style, ClipFn::Abadi, 0.5).unwrap();
                        return (loss, sums.iter().flat_map(Array::to_f64).collect::<Vec<f64>>());
                    }
                    let mut step = PlainStep::new(&params, Sgd::default(), Schedule::constant(0.1)).unwrap();
                    let report = step.run([()], |_| model.losses(&x, &y, ctx)).unwrap();
                    let gradient = step.last_gradient().to_f64();
                    // Losses may be of 16 bits, too.
                    let again = step.run([()], |_| model.losses(&x, &y, ctx)?.cast(dtype)).unwrap().loss().unwrap();
                    assert!(again < loss, "{dtype}: {again} after {loss}");
                    (report.loss().unwrap(), gradient)
                };
                let (loss, wide) = run(&Ctx::train(0));
                let (half_loss, half) = run(&Ctx::train(0).with_dtype(dtype));
                assert!((loss - half_loss).abs() < tolerance * loss, "{dtype} {style:?}: {half_loss}, in f32 {loss}");
                let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let apart: Vec<f64> = wide.iter().zip(&half).map(|(a, b)| a - b).collect();
                let off = norm(&apart) / norm(&wide);
                assert!(off > 0.0 && off < tolerance, "{dtype} {style:?}: the gradient is off by {off:.1e}");
                if style.is_some() {
                    // Four samples of at most 0.5.
                    assert!(norm(&half) <= 2.0 + 1e-5, "{dtype} {style:?}: {}", norm(&half));
                }
            }
        }
    }
}
