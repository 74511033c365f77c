//! What the emulated device and a card must both do, to the bit: conversions of all 65,536 bf16 and f16 values, and the
//! tensor cores' instructions with the copies and loads that feed them. Expectations are computed here, so that either
//! device is held to the same numbers; on a card run it with `PRISMGRAD_ON_CARD=1`.

use half::{bf16, f16};
use prismgrad::device::cuda::{Gpu, Launch};
use prismgrad::device::emulator::{config, lock};
use prismgrad::{Array, DType, Device};
use std::sync::Arc;

fn gpu() -> (Device, Arc<Gpu>) {
    let device = Device::cuda(0).unwrap();
    let gpu = device.gpu().unwrap().clone();
    (device, gpu)
}

/// Equal bits, or both NaN.
fn same(got: &[f32], want: &[f32], what: &str) {
    let off = |(g, w): (&f32, &f32)| g.to_bits() != w.to_bits() && !(g.is_nan() && w.is_nan());
    let i = got.iter().zip(want).position(off);
    assert!(got.len() == want.len() && i.is_none(), "{what} at {i:?}: {:?}", i.map(|i| (got[i], want[i])));
}

#[test]
fn conversions_of_every_16_bit_value() {
    let _one = lock();
    let (device, _) = gpu();
    // Each value, and f32s around it: itself, the middle to its neighbour (a tie), and a little to either side of the middle.
    let every: Vec<u16> = (0..=u16::MAX).collect();
    for dtype in [DType::BF16, DType::F16] {
        let wide = |bits: u16| {
            if dtype == DType::BF16 { bf16::from_bits(bits).to_f32() } else { f16::from_bits(bits).to_f32() }
        };
        let round = |x: f32| if dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { f16::from_f32(x).to_f32() };
        let there = Array::from_bytes(bytemuck::cast_slice(&every), &[65_536], dtype).unwrap().to(&device).unwrap();
        let want: Vec<f32> = every.iter().map(|&b| wide(b)).collect();
        same(&there.cast(DType::F32).to_vec::<f32>().unwrap(), &want, &format!("{dtype} to f32"));
        let around: Vec<f32> = every
            .iter()
            .flat_map(|&b| {
                let (x, next) = (wide(b), wide(b.wrapping_add(1)));
                let middle = ((x as f64 + next as f64) / 2.0) as f32;
                let beside = |d: i32| f32::from_bits(middle.to_bits().wrapping_add_signed(d));
                [x, middle, beside(1), beside(-1)]
            })
            .collect();
        let want: Vec<f32> = around.iter().map(|&x| round(x)).collect();
        let got =
            Array::from_slice(&around, &[around.len()]).unwrap().to(&device).unwrap().cast(dtype).cast(DType::F32);
        same(&got.to_vec::<f32>().unwrap(), &want, &format!("f32 to {dtype}"));
    }
}

/// Runs `check_mma_*` on as many 16 × 16 times 16 × 8 products as there are.
fn mma(gpu: &Arc<Gpu>, name: &str, a: &[u16], b: &[u16]) -> Vec<f32> {
    let n = a.len() / 256;
    let (x, y, c) = (gpu.upload(a).unwrap(), gpu.upload(b).unwrap(), gpu.zeros(n * 128 * 4).unwrap());
    let launch = Launch::new(gpu, "device_check", name).unwrap().grid(n, 1, 1).block(32);
    launch.buf(&x, 0).buf(&y, 0).buf(&c, 0).run().unwrap();
    gpu.download(&c, 0, n * 128).unwrap()
}

#[test]
fn tensor_cores_read_every_value_where_it_belongs() {
    let _one = lock();
    let (_, gpu) = gpu();
    for (seed, (name, bf)) in [("check_mma_bf16", true), ("check_mma_f16", false)].into_iter().enumerate() {
        config("seed", seed as i64 + 1);
        let bits = |x: f32| if bf { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() };
        let wide = |b: u16| if bf { bf16::from_bits(b).to_f32() } else { f16::from_bits(b).to_f32() };
        // Every finite value times one: 128 in the left half of each A, then 128 in the right half, beside zeros.
        for right in [false, true] {
            let (mut a, mut b) = (vec![0u16; 512 * 256], vec![0u16; 512 * 128]);
            for v in 0..65_536usize {
                let (n, row, col) = (v / 128, v / 8 % 16, v % 8 + 8 * right as usize);
                if wide(v as u16).is_finite() {
                    a[n * 256 + row * 16 + col] = v as u16;
                }
            }
            (0..512).for_each(|n| (0..8).for_each(|j| b[n * 128 + (j + 8 * right as usize) * 8 + j] = bits(1.0)));
            let want: Vec<f32> = (0..=u16::MAX).map(|v| if wide(v).is_finite() { wide(v) } else { 0.0 }).collect();
            // A zero may come with either sign: it was added to zeros.
            let got: Vec<f32> = mma(&gpu, name, &a, &b).iter().map(|x| x + 0.0).collect();
            same(&got, &want.iter().map(|x| x + 0.0).collect::<Vec<f32>>(), name);
        }
        // Small integers: every product and sum is exact, so any misplaced fragment shows.
        let number = |i: usize, k: usize| ((i * 37 + k * 11 + i / 7) % 17) as f32 - 8.0;
        let a: Vec<u16> = (0..16 * 256).map(|i| bits(number(i, 1))).collect();
        let b: Vec<u16> = (0..16 * 128).map(|i| bits(number(i, 2))).collect();
        let dot = |i: usize| -> f32 {
            let (n, row, col) = (i / 128, i / 8 % 16, i % 8);
            (0..16).map(|k| wide(a[n * 256 + row * 16 + k]) * wide(b[n * 128 + k * 8 + col])).sum()
        };
        same(&mma(&gpu, name, &a, &b), &(0..16 * 128).map(dot).collect::<Vec<f32>>(), name);
    }
}

#[test]
fn tf32_fragments() {
    let _one = lock();
    let (_, gpu) = gpu();
    let a: Vec<f32> = (0..128).map(|i| ((i * 29 + 3) % 31) as f32 - 15.0).collect();
    let b: Vec<f32> = (0..64).map(|i| ((i * 23 + 5) % 37) as f32 / 16.0 - 1.0).collect();
    let (x, y, c) = (gpu.upload(&a).unwrap(), gpu.upload(&b).unwrap(), gpu.zeros(512).unwrap());
    let launch = Launch::new(&gpu, "device_check", "check_mma_tf32").unwrap().block(32);
    launch.buf(&x, 0).buf(&y, 0).buf(&c, 0).run().unwrap();
    let dot = |i: usize| (0..8).map(|k| a[i / 8 * 8 + k] * b[k * 8 + i % 8]).sum::<f32>();
    same(&gpu.download(&c, 0, 128).unwrap(), &(0..128).map(dot).collect::<Vec<f32>>(), "tf32");
}
