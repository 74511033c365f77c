//! Products by cuBLASLt: what the crate asks of it, beside the CPU. The library is the emulator's stand-in, which the environment of this
//! process names.
#![cfg(feature = "emulator")]

mod common {
    pub mod close;
    pub mod skip;
}

use common::close::close;
use common::skip::skip;
use prismgrad::device::emulator::{config, lock, on_card};
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::{Array, DType, Device, Gradients, Param, Tensor};
use std::process::Command;

/// A large product, computed in an environment of its own.
#[test]
#[ignore = "another test runs it, in environments with and without the library"]
fn child() {
    let device = Device::cuda(0).unwrap();
    let ones = |r: usize, c: usize| Tensor::new(Array::full(&[r, c], 1.0, (DType::F32, &device)));
    for _ in 0..2 {
        let y = ones(256, 264).matmul(&ones(264, 256)).unwrap();
        assert!(y.array().to_f64().iter().all(|&x| x == 264.0));
    }
    println!("products by the library: {}", device.gpu().unwrap().counts().library_products);
}

/// Missing, turned off, or something else under its name: our own kernel computes, and one sentence says why where
/// somebody asked for the library.
#[test]
fn without_the_library() {
    if on_card() {
        return skip("a card's own library would be found");
    }
    let run = |library: &str| {
        let mut c = Command::new(std::env::current_exe().unwrap());
        c.args(["child", "--exact", "--ignored", "--nocapture"]).env("PRISMGRAD_CUBLASLT", library);
        let done = c.output().unwrap();
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        assert!(done.status.success(), "{}", text(&done.stdout));
        assert!(text(&done.stdout).contains("products by the library: 0"), "{}", text(&done.stdout));
        text(&done.stderr)
    };
    for quiet in ["", "off"] {
        assert!(!run(quiet).contains("prismgrad:"));
    }
    let nowhere = run("/nowhere/libcublasLt.so");
    assert_eq!(nowhere.matches("prismgrad: products are computed by our own kernels").count(), 1, "{nowhere}");
    assert!(nowhere.contains("neither libcublasLt nor a folder that has it"), "{nowhere}");
    let me = std::env::current_exe().unwrap();
    let other = run(me.to_str().unwrap());
    assert!(other.contains("PRISMGRAD_CUBLASLT: cannot load") || other.contains("is not a cuBLASLt"), "{other}");
}

#[test]
fn large_products_go_to_cublaslt_and_agree() {
    let _one = lock();
    if !on_card() {
        // SAFETY: nothing else in this process reads or writes the environment meanwhile: its other tests only start
        // processes of their own, and give those theirs.
        unsafe { std::env::set_var("PRISMGRAD_CUBLASLT", env!("PRISMGRAD_EMULATOR")) };
    }
    let device = Device::cuda(0).unwrap();
    let gpu = device.gpu().unwrap();
    if !gpu.uses_cublaslt().unwrap() {
        assert!(on_card(), "the stand-in agrees with our kernel");
        return skip("this machine has no cuBLASLt");
    }
    let values = |shape: &[usize], dtype: DType, k: usize| {
        Array::generate(shape, dtype, |i| ((i * 31 + k * 17) % 29) as f64 / 14.5 - 1.0)
    };
    for (seed, (dtype, tolerance)) in
        [(DType::F64, 1e-11), (DType::F32, 2e-4), (DType::BF16, 2e-2), (DType::F16, 4e-3)].into_iter().enumerate()
    {
        config("seed", seed as i64);
        let same = |what: &str, got: &Array, want: &Array| {
            close(&format!("{what} {dtype}"), &got.to_f64(), &want.to_f64(), tolerance);
        };
        // A layer with bias and activation, forwards and backwards, in both layouts of the weight.
        for layout in [Layout::OutIn, Layout::InOut] {
            let run = |device: &Device| {
                let shape = if layout == Layout::OutIn { [256, 264] } else { [264, 256] };
                let (w, b) = (Param::new("w", values(&shape, dtype, 1)), Param::new("b", values(&[256], dtype, 2)));
                w.to(device).unwrap();
                b.to(device).unwrap();
                let x = Tensor::leaf(values(&[4, 64, 264], dtype, 3).to(device).unwrap());
                let y = linear(&x, &w, layout, Some(&b), Activation::Tanh, None).unwrap();
                let mut grads = Gradients::default();
                let seed = values(&[4, 64, 256], dtype, 4).to(device).unwrap();
                y.backward_from(seed, false, &mut grads).unwrap();
                let sum = grads.param(&w).unwrap().sum().unwrap();
                (y.into_array(), grads.of(&x).unwrap().clone(), sum)
            };
            let (want, before) = (run(&Device::Cpu), gpu.counts().library_products);
            let got = run(&device);
            let products = gpu.counts().library_products - before;
            // Forwards, for the input, for the weight (in 16 bits its factors are f32: still a plain product).
            assert_eq!(products, 3, "{dtype} {layout:?}");
            same("y", &got.0, &want.0);
            same("dx", &got.1, &want.1);
            same("dw", &got.2, &want.2);
        }
        // Batches, one of them a view of which every second matrix is used.
        let (a, b) = (values(&[6, 128, 200], dtype, 5), values(&[3, 232, 200], dtype, 6));
        let view = |x: &Array, step: usize| x.step(0, step).unwrap().slice(0, 0..3).unwrap();
        let product = |device: &Device| {
            let at = |x: &Array| x.to(device).unwrap();
            let (a, b) = (view(&at(&a), 2), at(&b).transpose(1, 2).unwrap());
            Tensor::new(a).matmul(&Tensor::new(b)).unwrap().into_array()
        };
        let before = gpu.counts().library_products;
        same("batch", &product(&device), &product(&Device::Cpu));
        assert_eq!(gpu.counts().library_products, before + 1);
    }
}
