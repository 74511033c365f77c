//! Where the time goes: spans of ops, layers and phases on the host, kernels on a GPU; a table, a Chrome trace, NVTX ranges.
//!
//! ```
//! use prismgrad::{Array, DType, Device, Tensor, profile};
//! let session = profile::start(&Device::Cpu)?;
//! let a = Tensor::new(Array::ones(&[64, 64], DType::F32));
//! a.matmul(&a)?;
//! let report = session.finish()?;
//! assert!(report.table().contains("matmul"));
//! # Ok::<(), prismgrad::Error>(())
//! ```
//!
//! Off, a span costs one relaxed load. On, two clock readings and a lock; on a GPU two events around every kernel, so that
//! kernels no longer overlap with their launches: look at shares, and take absolute times from an unprofiled run.
//!
//! With the feature `nvtx`, spans are NVTX ranges as well, seen by Nsight Systems and Nsight Compute.

use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::cuda::{Stream, TimedEvent};
pub use crate::device::spans::{Kind, Span, is_on, layer, span};
use crate::device::spans::{ON, State, state};
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

/// A profile being taken. Dropped without [`Session::finish`], it is given up.
pub struct Session {
    device: Device,
    /// The device's time when the session began.
    zero: Option<TimedEvent>,
    /// FLOP/s of a large product and bytes/s of a large copy, f32.
    ceilings: [f64; 2],
}

/// Begins a profile of this process; one at a time. Measures the device's ceilings first: a second on a CPU.
pub fn start(device: &Device) -> Result<Session> {
    if ON.load(Relaxed) {
        return Err(Error::invalid("profile", "a profile is being taken already; finish it first"));
    }
    let ceilings = measure(device)?;
    device.synchronize()?;
    let zero = device.gpu().map(|gpu| gpu.record_timed(Stream::Compute)).transpose()?;
    *state() = Some(State { began: Instant::now(), done: Vec::new(), ran: Vec::new() });
    ON.store(true, Relaxed);
    Ok(Session { device: device.clone(), zero, ceilings })
}

/// FLOP/s of a large f32 product and bytes/s of a large f32 copy: the best of some.
fn measure(device: &Device) -> Result<[f64; 2]> {
    let emulated = device.gpu().is_some_and(|gpu| gpu.is_emulated());
    let (n, m, times) = match device {
        Device::Cpu => (768, 16 << 20, 5),
        Device::Cuda(_) if emulated => (16, 1 << 10, 1),
        Device::Cuda(_) => (4096, 64 << 20, 10),
    };
    let a = crate::Tensor::new(Array::full(&[n, n], 0.5, (DType::F32, device)));
    let b = Array::full(&[if device.is_cpu() { 0 } else { m }], 0.5, (DType::F32, device));
    let best = |f: &dyn Fn() -> Result<()>| -> Result<f64> {
        let mut best = f64::INFINITY;
        for _ in 0..=times {
            device.synchronize()?;
            let t = Instant::now();
            f()?;
            device.synchronize()?;
            best = best.min(t.elapsed().as_secs_f64());
        }
        Ok(best)
    };
    let product = best(&|| a.matmul(&a).map(drop))?;
    let copy = match device {
        // Into memory that is there already: fresh pages cost more than the copy.
        Device::Cpu => {
            let (from, mut to) = (vec![1u8; 4 * m], vec![2u8; 4 * m]);
            let to = Shared::new(&mut to);
            best(&|| {
                par_chunks(4 * m, 1 << 18, |r| {
                    // SAFETY: chunks are disjoint.
                    unsafe { to.slice(r.clone()) }.copy_from_slice(&from[r]);
                });
                Ok(())
            })?
        }
        Device::Cuda(_) => best(&|| {
            drop(b.copy());
            Ok(())
        })?,
    };
    Ok([2.0 * (n * n * n) as f64 / product, 8.0 * m as f64 / copy])
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Line {
    /// Forwards, backwards, or a phase.
    pub kind: Kind,
    /// The op.
    pub name: String,
    /// How often.
    pub count: usize,
    /// Milliseconds of the host, without ops inside.
    pub host_ms: f64,
    /// Milliseconds of its kernels; 0 on a CPU.
    pub device_ms: f64,
    /// 10⁹ floating-point operations, as far as the op says.
    pub gflop: f64,
    /// 10⁹ bytes of memory it cannot avoid moving, as far as the op says.
    pub gbyte: f64,
    /// Rate over the measured ceiling: of FLOPs or of bytes, whichever is nearer.
    pub share: Option<f64>,
}

/// A finished profile.
pub struct Report {
    lines: Vec<Line>,
    events: Vec<serde_json::Value>,
    ceilings: [f64; 2],
    on_gpu: bool,
}

impl Drop for Session {
    fn drop(&mut self) {
        if ON.swap(false, Relaxed) {
            *state() = None;
        }
    }
}

impl Session {
    /// Ends the profile. Waits for the device.
    pub fn finish(self) -> Result<Report> {
        self.device.synchronize()?;
        ON.store(false, Relaxed);
        let Some(State { done, ran, .. }) = state().take() else {
            return Err(Error::invalid("profile", "the profile is gone"));
        };
        type Key = (Kind, String);
        let mut lines: HashMap<Key, Line> = HashMap::new();
        let line = |lines: &mut HashMap<Key, Line>, kind: Kind, name: &str, f: &dyn Fn(&mut Line)| {
            let new = || Line {
                kind,
                name: name.to_string(),
                count: 0,
                host_ms: 0.0,
                device_ms: 0.0,
                gflop: 0.0,
                gbyte: 0.0,
                share: None,
            };
            f(lines.entry((kind, name.to_string())).or_insert_with(new));
        };
        let mut events = Vec::new();
        for d in &done {
            line(&mut lines, d.kind, &d.name, &|l| {
                l.count += 1;
                l.host_ms += 1e3 * d.own;
                l.gflop += d.cost[0] / 1e9;
                l.gbyte += d.cost[1] / 1e9;
            });
            events.push(json!({
                "name": d.name, "cat": d.kind.name(), "ph": "X", "pid": 0, "tid": d.thread,
                "ts": 1e6 * d.start, "dur": 1e6 * d.length,
            }));
        }
        for r in &ran {
            let length = r.from.milliseconds_to(&r.to)? as f64;
            let at = match &self.zero {
                Some(zero) => zero.milliseconds_to(&r.from)? as f64,
                None => 0.0,
            };
            let (kind, name) = match &r.op {
                Some((kind, name)) => (*kind, name.as_ref()),
                None => (Kind::Phase, "outside any span"),
            };
            line(&mut lines, kind, name, &|l| l.device_ms += length);
            events.push(json!({
                "name": r.kernel, "cat": "kernel", "ph": "X", "pid": 1, "tid": 0, "ts": 1e3 * at, "dur": 1e3 * length,
                "args": {"op": name, "pass": kind.name()},
            }));
        }
        for (pid, name) in [(0, "host".to_string()), (1, self.device.to_string())] {
            events.push(json!({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}));
        }
        let on_gpu = self.device.is_cuda();
        let mut lines: Vec<Line> = lines.into_values().collect();
        let time = |l: &Line| if on_gpu { l.device_ms } else { l.host_ms };
        for l in &mut lines {
            let ms = if on_gpu { l.device_ms } else { l.host_ms };
            let share = (1e12 * l.gflop / ms / self.ceilings[0]).max(1e12 * l.gbyte / ms / self.ceilings[1]);
            l.share = (ms > 0.0 && share > 0.0).then_some(share);
        }
        let rank = |k: Kind| matches!(k, Kind::Phase | Kind::Layer) as u8;
        lines.sort_by(|a, b| {
            rank(a.kind).cmp(&rank(b.kind)).then(time(b).total_cmp(&time(a))).then(a.name.cmp(&b.name))
        });
        Ok(Report { lines, events, ceilings: self.ceilings, on_gpu })
    }
}

impl Report {
    /// The table's lines: ops by falling time, then phases and layers.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }
    /// The table as text.
    pub fn table(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let (head, total) = match self.on_gpu {
            true => ("device ms", self.lines.iter().map(|l| l.device_ms).sum::<f64>()),
            false => ("host ms", {
                let ops = self.lines.iter().filter(|l| matches!(l.kind, Kind::Forward | Kind::Backward));
                ops.map(|l| l.host_ms).sum::<f64>()
            }),
        };
        let [flops, bytes] = self.ceilings;
        // Writing to a string does not fail.
        let _ = writeln!(out, "ceilings: {:.1} GFLOP/s (f32 product), {:.1} GB/s (copy)", flops / 1e9, bytes / 1e9);
        let _ = writeln!(
            out,
            "{:<9} {:<24} {:>7} {head:>10} {:>6}{} {:>9} {:>8} {:>7}",
            "pass",
            "op",
            "count",
            "share",
            if self.on_gpu { "    host ms" } else { "" },
            "GFLOP",
            "GB",
            "ceiling"
        );
        for l in &self.lines {
            let ms = if self.on_gpu { l.device_ms } else { l.host_ms };
            let blank = |v: f64, digits: usize| if v > 0.0 { format!("{v:.digits$}") } else { String::new() };
            let part = match l.kind {
                Kind::Forward | Kind::Backward => format!("{:.1}%", 100.0 * ms / total.max(1e-12)),
                _ if self.on_gpu => format!("{:.1}%", 100.0 * ms / total.max(1e-12)),
                _ => String::new(),
            };
            let share = l.share.map_or(String::new(), |s| format!("{:.0}%", 100.0 * s));
            let _ = writeln!(
                out,
                "{:<9} {:<24} {:>7} {ms:>10.3} {part:>6}{} {:>9} {:>8} {share:>7}",
                l.kind.name(),
                l.name,
                l.count,
                if self.on_gpu { format!(" {:>10.3}", l.host_ms) } else { String::new() },
                blank(l.gflop, 2),
                blank(l.gbyte, 3),
            );
        }
        out
    }
    /// Writes a trace for `chrome://tracing` or Perfetto: host spans as process 0, kernels as process 1.
    pub fn save_trace(&self, path: impl AsRef<Path>) -> Result<()> {
        let text = serde_json::to_vec(&json!({"traceEvents": self.events, "displayTimeUnit": "ms"}))
            .map_err(|e| Error::invalid("profile", e.to_string()))?;
        crate::io::write_atomic(path.as_ref(), &text).map(|_| ())
    }
}
