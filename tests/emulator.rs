//! The emulator itself: good kernels give the right result under every schedule, and every planted bug is reported with
//! its place; a planted bug breaks the device.
#![cfg(feature = "emulator")]

use prismgrad::Result;
use prismgrad::device::cuda::{Block, Gpu, Launch, Stream};
use prismgrad::device::emulator::{Buffer as Buf, config, is_checked, last_report, launch, lock, reset};
use std::sync::Arc;

/// Kernel, grid, block, shared bytes, cooperative; arguments.
macro_rules! launch {
    ($name:expr, $grid:expr, $block:expr, $shared:expr, $coop:expr; $($a:expr),*) => {
        launch($name, $grid, $block, $shared, $coop, &[$(Arg::bytes(&$a)),*])
    };
}

trait Arg {
    fn bytes(&self) -> Vec<u8>;
}
impl<T: bytemuck::Pod> Arg for Buf<T> {
    fn bytes(&self) -> Vec<u8> {
        self.arg()
    }
}
impl Arg for i32 {
    fn bytes(&self) -> Vec<u8> {
        self.to_ne_bytes().to_vec()
    }
}
impl Arg for i64 {
    fn bytes(&self) -> Vec<u8> {
        self.to_ne_bytes().to_vec()
    }
}
impl Arg for f32 {
    fn bytes(&self) -> Vec<u8> {
        self.to_ne_bytes().to_vec()
    }
}

struct Rng(u64);
impl Rng {
    fn f(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    }
    fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f()).collect()
    }
}
fn bf(f: f32) -> u16 {
    let u = f.to_bits();
    ((u + 0x7fff + (u >> 16 & 1)) >> 16) as u16
}
fn unbf(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}
/// Each pair to within its own size times the tolerance; else how many are not.
fn agree(a: &[f32], b: &[f32], tol: f32) -> std::result::Result<(), String> {
    assert_eq!(a.len(), b.len());
    let mut bad = 0;
    let mut first = String::new();
    for i in 0..a.len() {
        if (a[i] - b[i]).abs() > tol * (1.0 + b[i].abs()) || (a[i] - b[i]).is_nan() {
            if bad == 0 {
                first = format!("[{i}] {} != {}", a[i], b[i]);
            }
            bad += 1;
        }
    }
    if bad == 0 { Ok(()) } else { Err(format!("{bad} of {} differ, first {first}", a.len())) }
}
fn seeds() -> Vec<(i64, i64)> {
    vec![(0, 0), (1, 0), (2, 0), (3, 50), (4, 7)]
}
fn with(s: (i64, i64)) {
    config("seed", s.0);
    config("preempt", s.1);
}

fn gemm_run(kernel: &str, m: usize, n: usize, k: usize) -> (Result<()>, Vec<f32>, Vec<f32>) {
    let mut r = Rng(7);
    let a: Vec<u16> = r.vec(m * k).iter().map(|x| bf(*x)).collect();
    let b: Vec<u16> = r.vec(k * n).iter().map(|x| bf(*x)).collect();
    let mut want = vec![0f32; m * n];
    for i in 0..m {
        for p in 0..k {
            let x = unbf(a[i * k + p]);
            for j in 0..n {
                want[i * n + j] += x * unbf(b[p * n + j]);
            }
        }
    }
    let (da, db, dc) = (Buf::from(&a).named("A"), Buf::from(&b).named("B"), Buf::<f32>::new(m * n).named("C"));
    let e = launch!(kernel, [(n / 64) as u32, (m / 64) as u32, 1], [128, 1, 1], 0, false; da, db, dc, m as i32, n as i32, k as i32);
    (e, dc.get(), want)
}
fn attn_run(bh: usize, t: usize) -> (Result<()>, Vec<f32>, Vec<f32>) {
    let d = 64;
    let mut r = Rng(9);
    let q: Vec<u16> = r.vec(bh * t * d).iter().map(|x| bf(*x * 2.0)).collect();
    let k: Vec<u16> = r.vec(bh * t * d).iter().map(|x| bf(*x * 2.0)).collect();
    let v: Vec<u16> = r.vec(bh * t * d).iter().map(|x| bf(*x)).collect();
    let scale = 0.125f32;
    let mut want = vec![0f32; bh * t * d];
    for h in 0..bh {
        for i in 0..t {
            let o = h * t * d;
            let s: Vec<f32> = (0..=i)
                .map(|j| (0..d).map(|c| unbf(q[o + i * d + c]) * unbf(k[o + j * d + c])).sum::<f32>() * scale)
                .collect();
            let m = s.iter().cloned().fold(f32::MIN, f32::max);
            let p: Vec<f32> = s.iter().map(|x| (x - m).exp()).collect();
            let l: f32 = p.iter().sum();
            for c in 0..d {
                want[o + i * d + c] = (0..=i).map(|j| p[j] * unbf(v[o + j * d + c])).sum::<f32>() / l;
            }
        }
    }
    let (dq, dk, dv, dob, dl) = (
        Buf::from(&q).named("q"),
        Buf::from(&k).named("k"),
        Buf::from(&v).named("v"),
        Buf::<u16>::new(q.len()).named("o"),
        Buf::<f32>::new(bh * t).named("lse"),
    );
    let e = launch!("attn_fwd", [(t / 64) as u32, bh as u32, 1], [128, 1, 1], 0, false; dq, dk, dv, dob, dl, t as i32, scale);
    (e, dob.get().iter().map(|x| unbf(*x)).collect(), want)
}

#[test]
fn vadd() {
    let _g = lock();
    for s in seeds() {
        with(s);
        let n = 1000usize;
        let mut r = Rng(1);
        let (a, b) = (r.vec(n), r.vec(n));
        let (da, db, dc) = (Buf::from(&a), Buf::from(&b), Buf::<f32>::new(n));
        launch!("vadd", [4, 1, 1], [256, 1, 1], 0, false; da, db, dc, n as i32).unwrap();
        agree(&dc.get(), &a.iter().zip(&b).map(|(x, y)| x + y).collect::<Vec<_>>(), 0.0).unwrap();
        let dh = Buf::<u16>::new(n);
        launch!("planted_cast_f32_bf16", [4, 1, 1], [256, 1, 1], 0, false; da, dh, n as i64).unwrap();
        assert_eq!(dh.get(), a.iter().map(|x| bf(*x)).collect::<Vec<_>>());
    }
}
#[test]
fn softmax() {
    let _g = lock();
    for s in seeds() {
        with(s);
        let (rows, cols) = (5usize, 700usize);
        let x = Rng(2).vec(rows * cols);
        let (dx, dy) = (Buf::from(&x), Buf::<f32>::new(rows * cols));
        launch!("softmax_rows", [rows as u32, 1, 1], [256, 1, 1], 0, false; dx, dy, cols as i32).unwrap();
        let mut want = vec![];
        for r in x.chunks(cols) {
            let m = r.iter().cloned().fold(f32::MIN, f32::max);
            let e: Vec<f32> = r.iter().map(|v| (v - m).exp()).collect();
            let l: f32 = e.iter().sum();
            want.extend(e.iter().map(|v| v / l));
        }
        agree(&dy.get(), &want, 1e-6).unwrap();
    }
}
#[test]
fn layernorm_backward() {
    let _g = lock();
    for s in seeds() {
        with(s);
        let (rows, cols) = (37usize, 200usize);
        let mut r = Rng(3);
        let (dy, x, g) = (r.vec(rows * cols), r.vec(rows * cols), r.vec(cols));
        let mut mean = vec![];
        let mut rstd = vec![];
        for row in x.chunks(cols) {
            let m = row.iter().sum::<f32>() / cols as f32;
            let v = row.iter().map(|a| (a - m) * (a - m)).sum::<f32>() / cols as f32;
            mean.push(m);
            rstd.push(1.0 / (v + 1e-5).sqrt());
        }
        let (mut wdx, mut wg, mut wb) = (vec![0f32; rows * cols], vec![0f32; cols], vec![0f32; cols]);
        for i in 0..rows {
            let xh: Vec<f32> = (0..cols).map(|c| (x[i * cols + c] - mean[i]) * rstd[i]).collect();
            let gg: Vec<f32> = (0..cols).map(|c| dy[i * cols + c] * g[c]).collect();
            let s1 = gg.iter().sum::<f32>() / cols as f32;
            let s2 = gg.iter().zip(&xh).map(|(a, b)| a * b).sum::<f32>() / cols as f32;
            for c in 0..cols {
                wdx[i * cols + c] = rstd[i] * (gg[c] - s1 - xh[c] * s2);
                wg[c] += dy[i * cols + c] * xh[c];
                wb[c] += dy[i * cols + c];
            }
        }
        let (ddy, dx, dg, dm, dr) = (Buf::from(&dy), Buf::from(&x), Buf::from(&g), Buf::from(&mean), Buf::from(&rstd));
        let (ox, og, ob) = (Buf::<f32>::new(rows * cols), Buf::from(&vec![0f32; cols]), Buf::from(&vec![0f32; cols]));
        launch!("layernorm_bwd", [6, 1, 1], [128, 1, 1], (2 * cols * 4) as u32, false; ddy, dx, dg, dm, dr, ox, og, ob, rows as i32, cols as i32).unwrap();
        agree(&ox.get(), &wdx, 1e-4).unwrap();
        agree(&og.get(), &wg, 1e-4).unwrap();
        agree(&ob.get(), &wb, 1e-4).unwrap();
    }
}
#[test]
fn gemm() {
    let _g = lock();
    for s in seeds() {
        with(s);
        let (e, got, want) = gemm_run("gemm_bf16", 128, 128, 128);
        e.unwrap();
        agree(&got, &want, 1e-4).unwrap();
    }
}
#[test]
fn attention() {
    let _g = lock();
    for s in [(0, 0), (5, 0), (6, 100)] {
        with(s);
        let (e, got, want) = attn_run(2, 128);
        e.unwrap();
        agree(&got, &want, 2e-2).unwrap();
    }
}
#[test]
fn mma_tiles() {
    let _g = lock();
    let mut r = Rng(4);
    let (a, b) = (r.vec(256), r.vec(128));
    let (da, db, c1, c2) = (Buf::from(&a), Buf::from(&b), Buf::<f32>::new(128), Buf::<f32>::new(128));
    launch!("mma_tiles", [1, 1, 1], [32, 1, 1], 0, false; da, db, c1, c2).unwrap();
    let mm = |k: usize| {
        let mut w = vec![0f32; 128];
        for i in 0..16 {
            for j in 0..8 {
                for p in 0..k {
                    w[i * 8 + j] += a[i * k + p] * b[p * 8 + j];
                }
            }
        }
        w
    };
    agree(&c1.get(), &mm(8), 3e-3).unwrap();
    agree(&c2.get(), &mm(16), 3e-3).unwrap();
}
#[test]
fn warp_ops() {
    let _g = lock();
    for s in seeds() {
        with(s);
        let d = Buf::<i32>::new(11 * 32);
        launch!("warp_ops", [1, 1, 1], [32, 1, 1], 0, false; d).unwrap();
        let o = d.get();
        for l in 0..32i32 {
            let w = [
                ((l + 1) & 31) * 10,
                if l == 0 { 0 } else { l - 1 },
                if (l & 15) + 2 > 15 { l } else { l + 2 },
                l ^ 3,
                0xaaaaaaaau32 as i32,
                2,
                (0..32).map(|x| x - 5).sum(),
                30,
                if l < 16 { l ^ 1 } else { l ^ 2 },
                (0x11111111u32 << (l & 3)) as i32,
                7,
            ];
            for k in 0..11 {
                assert_eq!(o[k * 32 + l as usize], w[k], "op {k} lane {l}");
            }
        }
    }
}
#[test]
fn other_good_kernels() {
    let _g = lock();
    for s in seeds() {
        with(s);
        let x: Vec<f32> = (0..512).map(|i| i as f32).collect();
        let d = Buf::from(&x);
        launch!("reverse256", [2, 1, 1], [256, 1, 1], 0, false; d).unwrap();
        agree(&d.get(), &(0..512).map(|i| (i / 256 * 256 + 255 - i % 256) as f32).collect::<Vec<_>>(), 0.0).unwrap();
        let (part, cnt, out) = (Buf::<f32>::new(5), Buf::from(&[0u32]), Buf::<f32>::new(1));
        launch!("sum_last_block", [5, 1, 1], [64, 1, 1], 0, false; d, part, cnt, out, 512i32).unwrap();
        assert_eq!(out.get()[0], 512.0 * 511.0 / 2.0);
        let (data, turn, last) = (Buf::<i32>::new(9), Buf::from(&[0u32]), Buf::<i32>::new(1));
        launch!("chain_of_blocks", [9, 1, 1], [32, 1, 1], 0, true; data, turn, last).unwrap();
        assert_eq!(last.get(), [256], "1 + the sum of all before, nine times");
        let y = Buf::<f32>::new(128);
        launch!("named_barriers", [1, 1, 1], [128, 1, 1], 0, false; y).unwrap();
        launch!("ok_syncwarp", [1, 1, 1], [32, 1, 1], 0, false; y).unwrap();
        let (gx, gy) = (Buf::<f32>::new(512), Buf::<f32>::new(512));
        launch!("grid_sync_test", [8, 1, 1], [64, 1, 1], 0, true; gx, gy, 512i32).unwrap();
        agree(&gy.get(), &(0..512).map(|i| (511 - i) as f32).collect::<Vec<_>>(), 0.0).unwrap();
    }
}
/// Every planted bug is an error that says what is wrong and where: file and line for those seen at an access or a
/// barrier, the kernel's name for all.
#[test]
fn planted_bugs_are_reported_with_their_place() {
    let _g = lock();
    if !is_checked() {
        panic!("built with PRISMGRAD_EMU=fast: these tests need the checks");
    }
    let x = Rng(5).vec(2048);
    let (dx, n, odd) = (Buf::from(&x).named("x"), 1000usize, 1001usize);
    let y = || Buf::<f32>::new(256).named("y");
    let (a, a2) = (Buf::from(&x[..n]).named("a"), Buf::from(&x[..odd]).named("a2"));
    let say = |name: &str, r: Result<()>, words: &[&str]| {
        let text = r.err().unwrap_or_else(|| panic!("{name} was not seen")).to_string();
        words.iter().for_each(|w| assert!(text.contains(w), "{name} ({w:?}): {text}"));
    };
    let one = |t: u32| ([1, 1, 1], [t, 1, 1]);
    let run = |k: &str, t: u32, shared: u32, args: &[Vec<u8>]| launch(k, one(t).0, one(t).1, shared, false, args);
    say(
        "too early",
        run("bug_missing_sync", 256, 0, &[dx.arg(), y().arg()]),
        &["race on", "bugs.cu:", "read", "write"],
    );
    say(
        "too late",
        run("bug_missing_sync_tail", 256, 0, &[dx.arg(), y().arg(), 4i32.bytes()]),
        &["race on", "bugs.cu:"],
    );
    for (kernel, verb) in [("bug_oob_read", "read"), ("bug_oob_write", "write")] {
        for (src, len) in [(&a, n), (&a2, odd)] {
            let c = Buf::<f32>::new(len).named("c");
            let r = launch!(kernel, [4, 1, 1], [256, 1, 1], 0, false; *src, c, len as i32);
            say(kernel, r, &["out of bounds", verb, "bugs.cu:", "past the end of buffer", "thread"]);
        }
    }
    say("before the start", run("bug_oob_before", 32, 0, &[y().arg()]), &["bug_oob_before", "bugs.cu:", "y"]);
    say("shared array", run("bug_shared_oob", 64, 0, &[y().arg()]), &["bug_shared_oob", "bugs.cu:"]);
    say("dynamic shared", run("bug_dyn_shared_oob", 128, 512, &[y().arg()]), &["bug_dyn_shared_oob", "shared"]);
    say(
        "divergent",
        run("bug_divergent_barrier", 64, 0, &[y().arg()]),
        &["barrier divergence", "bugs.cu:", "40 of 64"],
    );
    say("two barriers", run("bug_two_barriers", 64, 0, &[y().arg()]), &["bug_two_barriers", "bugs.cu:"]);
    say("deadlock", run("bug_barrier_vs_shfl", 64, 0, &[y().arg()]), &["deadlock", "__shfl_xor_sync", "bugs.cu:"]);
    say(
        "exited lanes",
        run("bug_shfl_exited", 64, 0, &[y().arg(), 50i32.bytes()]),
        &["bug_shfl_exited", "46 have returned", "prelude.cuh:"],
    );
    say("no __syncwarp", run("bug_missing_syncwarp", 32, 0, &[y().arg()]), &["race on", "bugs.cu:"]);
    let sum = Buf::from(&[0f32]).named("sum");
    say("plain +=", launch!("bug_non_atomic", [64, 1, 1], [64, 1, 1], 0, false; sum), &["race on", "bugs.cu:"]);
    say("ld_vec", run("bug_misaligned_vec", 32, 0, &[dx.arg(), y().arg()]), &["bug_misaligned_vec", "align"]);
    if !std::env::var("CXX").is_ok_and(|c| c.contains("clang")) {
        // clang leaves this check out; ld_vec has its own.
        say(
            "float4",
            run("bug_misaligned", 32, 0, &[dx.arg(), y().arg()]),
            &["misaligned access", "bugs.cu:", "16-byte"],
        );
    }
    say("inner dimension", run("bug_inner_dim", 32, 0, &[y().arg()]), &["index 33 is out of bounds", "bugs.cu:"]);
    let big = (i32::MAX / 2).bytes();
    say("index overflow", run("bug_int_overflow", 3, 0, &[y().arg(), big]), &["overflow", "bugs.cu:"]);
    say(
        "uninitialised",
        run("bug_uninit_shared", 64, 0, &[y().arg()]),
        &["no thread of the block has written", "bugs.cu:"],
    );
    let d = Buf::from(&x[..256]);
    say("stack", run("bug_stack", 32, 0, &[d.arg(), 40000i32.bytes()]), &["bug_stack", "stack"]);
    for kernel in ["bug_no_release", "bug_no_acquire"] {
        let (part, cnt, out) = (Buf::<f32>::new(5), Buf::from(&[0u32]), Buf::<f32>::new(1));
        let done = launch!(kernel, [5, 1, 1], [64, 1, 1], 0, false; dx, part, cnt, out, 512i32);
        say("a fence left out", done, &["race on", kernel, "basic.cu:"]);
    }
    let (data, turn, last) = (Buf::<i32>::new(9), Buf::from(&[0u32]), Buf::<i32>::new(1));
    let done = launch!("bug_chain_no_fence", [9, 1, 1], [32, 1, 1], 0, true; data, turn, last);
    say("a chain without fences", done, &["race on", "basic.cu:"]);
    say("wrong pair", run("bug_named_barriers", 128, 0, &[y().arg()]), &["race on", "bugs.cu:"]);
    say("no wait for cp.async", gemm_run("bug_gemm_no_wait", 128, 128, 128).0, &["cp.async", "gemm.cu:"]);
    say("refilled too early", gemm_run("bug_gemm_no_barrier", 128, 128, 128).0, &["race on", "gemm.cu:"]);
    // The emulator still works afterwards.
    let (e, got, want) = gemm_run("gemm_bf16", 64, 64, 64);
    e.unwrap();
    agree(&got, &want, 1e-4).unwrap();
}

/// y ← y + a·x on a stream of the driver.
fn axpy(gpu: &Arc<Gpu>, stream: Stream, x: &Block, y: &Block, n: usize) {
    let l = Launch::new(gpu, "device_check", "check_axpy_f32").unwrap().on(stream);
    l.grid_stride(n, 256).block(256).buf(x, 0).buf(y, 0).val(1f32).val(n as i64).run().unwrap();
}

/// A stream that should have waited for another's event reads what was there before; with the wait it is right.
#[test]
fn a_missing_event_wait_shows() {
    let _g = lock();
    let gpu = Gpu::open(0).unwrap();
    let n = 1000;
    for seed in [1, 2, 3] {
        config("seed", seed);
        config("check", 1);
        let run = |wait: bool| -> Vec<f32> {
            let (one, y, z) =
                (gpu.upload(&vec![1f32; n]).unwrap(), gpu.zeros(4 * n).unwrap(), gpu.zeros(4 * n).unwrap());
            gpu.synchronize().unwrap();
            // z ← z + y on the compute stream, where y is made on the copy stream (or the other way round).
            let (make, read) =
                if seed % 2 == 0 { (Stream::Compute, Stream::Copy) } else { (Stream::Copy, Stream::Compute) };
            axpy(&gpu, make, &one, &y, n);
            if wait {
                gpu.order(make, read).unwrap();
            }
            axpy(&gpu, read, &y, &z, n);
            gpu.synchronize_stream(read).unwrap();
            gpu.synchronize().unwrap();
            gpu.download(&z, 0, n).unwrap()
        };
        assert_eq!(run(true), vec![1f32; n], "seed {seed}");
        if seed % 2 == 1 {
            assert_eq!(run(false), vec![0f32; n], "seed {seed}: nothing was made before it was read");
        }
    }
}

/// Two operations on one buffer, one of them a write, that no event orders are named, whatever the schedule made of them.
#[test]
fn a_missing_event_wait_is_reported_with_its_place() {
    let _g = lock();
    let gpu = Gpu::open(0).unwrap();
    let n = 1000;
    let one = gpu.upload(&vec![1f32; n]).unwrap();
    for seed in [0, 1, 2, 3] {
        config("seed", seed);
        for copies in [false, true] {
            for wait in [true, false] {
                let (y, z) = (gpu.zeros(4 * n).unwrap(), gpu.zeros(4 * n).unwrap());
                gpu.synchronize().unwrap();
                axpy(&gpu, Stream::Copy, &one, &y, n);
                if wait {
                    gpu.order(Stream::Copy, Stream::Compute).unwrap();
                }
                let queued = if copies {
                    gpu.copy(&z, 0, &y, 0, 4 * n)
                } else {
                    let l = Launch::new(&gpu, "device_check", "check_axpy_f32").unwrap();
                    l.grid_stride(n, 256).block(256).buf(&y, 0).buf(&z, 0).val(1f32).val(n as i64).run()
                };
                let done = queued.and_then(|()| gpu.synchronize());
                if wait {
                    done.unwrap();
                    continue;
                }
                let e = done.expect_err(&format!("seed {seed}, copies {copies}: not seen")).to_string();
                for part in ["missing event wait", "kernel check_axpy_f32 on stream", "of buffer", "4096 bytes"] {
                    assert!(e.contains(part), "seed {seed}, {part}: {e}");
                }
                // Told from the one that ran second.
                let other = if copies { "copy of 4000 bytes" } else { "bytes 0 to 4000" };
                assert!(e.contains(other) && e.contains("reads") && e.contains("writes"), "seed {seed}: {e}");
                reset();
            }
        }
        // Reading together, and writing apart, is no conflict.
        let (y, z) = (gpu.zeros(4 * n).unwrap(), gpu.zeros(4 * n).unwrap());
        gpu.synchronize().unwrap();
        axpy(&gpu, Stream::Copy, &one, &y, n);
        axpy(&gpu, Stream::Compute, &one, &z, n);
        gpu.synchronize().unwrap();
        assert_eq!(gpu.download::<f32>(&y, 0, n).unwrap(), gpu.download::<f32>(&z, 0, n).unwrap());
    }
}

/// Memory given back to the driver while another stream still uses it is named.
#[test]
fn use_after_free_across_streams_is_reported() {
    let _g = lock();
    let gpu = Gpu::open(0).unwrap();
    config("seed", 1);
    let n = 64;
    let (x, y) = (Buf::from(&vec![1f32; n]).named("given back"), gpu.zeros(4 * n).unwrap());
    gpu.synchronize().unwrap();
    let at = u64::from_ne_bytes(x.arg().try_into().unwrap());
    let l = Launch::new(&gpu, "device_check", "check_axpy_f32").unwrap().on(Stream::Copy);
    l.grid_stride(n, 256).block(256).val(at).buf(&y, 0).val(1f32).val(n as i64).run().unwrap();
    drop(x);
    let e = gpu.synchronize().unwrap_err().to_string();
    assert!(e.contains("device_check.cu:") && e.contains("check_axpy_f32"), "{e}");
    assert!(last_report().contains("check_axpy_f32"), "{}", last_report());
    reset();
    assert_eq!(gpu.download::<f32>(&y, 0, n).unwrap().len(), n, "usable again");
}
