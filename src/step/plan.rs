//! The plan of a step: what is settled before it is first taken.
//!
//! Clipping groups and thresholds, when each parameter's factors are contracted, the buckets in which gradients are summed over
//! ranks, and, once the step was traced on a few samples, the order in which gradients are delivered and the memory it needs.

use super::core::Phases;
use super::flat::Flat;
use crate::autograd::Param;
use crate::base::{Error, Result};
use crate::device::Device;
use crate::privacy::{ClipFn, ClipStyle, Thresholds};
use std::fmt::{self, Write};
use std::ops::Range;

/// The clipping groups over the parameters of a step: who belongs where, and each group's share of the threshold.
#[derive(Clone, Debug, Default)]
pub(super) struct Clipping {
    pub clip: ClipFn,
    /// Threshold and number of members of each group.
    pub groups: Vec<(f64, usize)>,
    /// The group of each parameter.
    pub group_of: Vec<usize>,
    /// The most one sample can move the clipped sum.
    pub sensitivity: f64,
}

impl Clipping {
    /// Groups by `style`; thresholds that compose to R = `threshold`.
    pub fn new(
        style: &ClipStyle,
        clip: ClipFn,
        threshold: f64,
        split: &Thresholds,
        params: &[Param],
    ) -> Result<Clipping> {
        let names: Vec<&str> = params.iter().map(Param::name).collect();
        let group_of = style.groups(&names)?;
        let mut members = vec![0; group_of.iter().max().map_or(0, |m| m + 1)];
        group_of.iter().for_each(|&g| members[g] += 1);
        let groups = split.split(threshold, members.len())?.into_iter().zip(members).collect();
        let mut clipping = Clipping { clip, groups, group_of, sensitivity: 0.0 };
        clipping.compose();
        Ok(clipping)
    }
    fn compose(&mut self) {
        let square = |&(r, _): &(f64, usize)| self.clip.sensitivity(r).powi(2);
        self.sensitivity = self.groups.iter().map(square).sum::<f64>().sqrt();
    }
    /// Each group's threshold.
    pub fn thresholds(&self) -> Vec<f64> {
        self.groups.iter().map(|g| g.0).collect()
    }
    /// Sets each group's threshold, and the sensitivity that follows from them.
    pub fn set_thresholds(&mut self, thresholds: &[f64]) {
        self.groups.iter_mut().zip(thresholds).for_each(|(g, r)| g.0 = *r);
        self.compose();
    }
}

/// When a parameter's factors become a part of the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retain {
    /// On delivery: the factors are contracted and freed at once. Plain steps do this for every parameter.
    Sum,
    /// The samples' norms are taken on delivery, and the factors are kept until the norms of the whole clipping group are
    /// known.
    Factors,
    /// The factors are kept until the other members of the clipping group are delivered; norms and clipped sum are then one
    /// pass over them. One parameter of a group can have this, its largest matrix. It falls back to [`Retain::Factors`] where
    /// its gradient has no such pass: it is used more than once, or some samples of the microbatch are public.
    Fused,
}

impl fmt::Display for Retain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Retain::Sum => "sum",
            Retain::Factors => "factors",
            Retain::Fused => "fused",
        })
    }
}

/// One parameter in the plan.
#[derive(Clone, Debug)]
pub struct PlannedParam {
    /// Full name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its stretch of the flat gradient.
    pub range: Range<usize>,
    /// When its factors are contracted.
    pub retain: Retain,
    /// Its clipping group, in a private step.
    pub group: Option<usize>,
}

/// What a traced step is expected to need, for some number of samples in a microbatch.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// Samples of the microbatch.
    pub samples: usize,
    /// Indices of [`Plan::params`] in the order in which backward delivers their gradients.
    pub order: Vec<usize>,
    /// Bytes of the factors of each parameter, in the order of [`Plan::params`].
    pub factor_bytes: Vec<usize>,
    /// Most bytes of activations, factors and scratch that are in use at once.
    pub working_bytes: usize,
    /// Seconds of a forward and backward pass.
    pub seconds: f64,
}

/// What the last step took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement {
    /// Most bytes of activations, factors and scratch that were in use at once.
    pub working_bytes: usize,
    /// Seconds that each phase took on the host. On a GPU the work is only queued in this time.
    pub phases: Phases,
}

/// What is settled before the first step. [`Plan::explain`] prints it as a table.
#[derive(Clone, Debug)]
pub struct Plan {
    params: Vec<PlannedParam>,
    groups: Vec<(f64, usize)>,
    buckets: Vec<Range<usize>>,
    bytes: [(&'static str, usize); 3],
    pub(super) gathered: usize,
    pub(super) predicted: Option<Prediction>,
    pub(super) measured: Option<Measurement>,
}

/// Elements of the flat gradient that are summed over the ranks at once.
pub(super) const BUCKET: usize = 4 << 20;

impl Plan {
    /// The plan of a plain step, or of a private one with these clipping groups; `slots` buffers belong to the optimizer.
    pub(super) fn new(flat: &Flat, clipping: Option<&Clipping>, slots: usize) -> Plan {
        let groups = clipping.map_or(Vec::new(), |c| c.groups.clone());
        let fused = match clipping {
            Some(c) if groups.len() > 1 && matches!(flat.device(), Device::Cpu) => largest_matrices(flat, c),
            _ => Vec::new(),
        };
        let params = flat.params().iter().zip(flat.segments()).enumerate().map(|(i, (p, s))| PlannedParam {
            name: p.name().to_string(),
            shape: p.shape().to_vec(),
            range: s.range.clone(),
            retain: match clipping {
                None => Retain::Sum,
                Some(c) if fused.get(c.group_of[i]) == Some(&Some(i)) => Retain::Fused,
                Some(_) => Retain::Factors,
            },
            group: clipping.map(|c| c.group_of[i]),
        });
        let each = flat.numel() * flat.dtype().size();
        let buckets = |r: Range<usize>| {
            (0..r.len().div_ceil(BUCKET)).map(move |b| r.start + b * BUCKET..r.end.min(r.start + (b + 1) * BUCKET))
        };
        Plan {
            params: params.collect(),
            groups,
            buckets: flat.shared().into_iter().flat_map(buckets).collect(),
            bytes: [("parameters", each), ("gradients", each), ("optimizer", slots * each)],
            gathered: 0,
            predicted: None,
            measured: None,
        }
    }
    /// The bytes of parameters, gradients and the optimizer's buffers that this rank keeps of its own.
    pub(super) fn keeps(&mut self, bytes: [usize; 3]) {
        self.bytes.iter_mut().zip(bytes).for_each(|(b, own)| b.1 = own);
    }
    /// The bytes that stay from step to step on this rank: parameters, gradients, and the optimizer's buffers.
    pub fn bytes(&self) -> &[(&'static str, usize); 3] {
        &self.bytes
    }
    /// Where ranks share the parameters ([`Stage::Parameters`](super::Stage)), the most bytes of them that are gathered at once: those of
    /// the module in use, and as many again for the one on its way. They come on top of [`Plan::bytes`].
    pub fn gathered_bytes(&self) -> usize {
        self.gathered
    }
    /// The parameters, in the order of the flat gradient.
    pub fn params(&self) -> &[PlannedParam] {
        &self.params
    }
    /// Threshold and number of members of each clipping group; none in a plain step. Adaptive thresholds are here as they
    /// were at the start.
    pub fn groups(&self) -> &[(f64, usize)] {
        &self.groups
    }
    /// The stretches of the flat gradient that are summed over the ranks one after the other; placed parameters are in none.
    pub fn buckets(&self) -> &[Range<usize>] {
        &self.buckets
    }
    /// Bytes of parameters, gradients and optimizer buffers together.
    pub fn fixed_bytes(&self) -> usize {
        self.bytes.iter().map(|b| b.1).sum()
    }
    /// What the traced step is expected to need; `None` before `predict` was called.
    pub fn predicted(&self) -> Option<&Prediction> {
        self.predicted.as_ref()
    }
    /// What the last step took; `None` before the first.
    pub fn measured(&self) -> Option<&Measurement> {
        self.measured.as_ref()
    }
    /// The plan as a table: each parameter with its group and what is kept of it, then memory and time, predicted and measured.
    pub fn explain(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        let _ = self.write(&mut out);
        out
    }
    fn write(&self, f: &mut dyn Write) -> fmt::Result {
        let wide = self.params.iter().map(|p| p.name.len()).max().unwrap_or(0).max("parameter".len());
        writeln!(
            f,
            "{:wide$}  {:>16}  {:>10}  {:>5}  {:>9}  {:>7}  {:>11}  {:>9}",
            "parameter", "shape", "elements", "group", "threshold", "kept", "factors", "delivered"
        )?;
        for (i, p) in self.params.iter().enumerate() {
            let group = p.group.map_or("-".into(), |g| g.to_string());
            let threshold = p.group.map_or("-".into(), |g| format!("{:.4}", self.groups[g].0));
            let (factors, place) = match &self.predicted {
                None => ("-".into(), "-".into()),
                Some(t) => {
                    let place = t.order.iter().position(|&k| k == i).map_or("never".into(), |k| (k + 1).to_string());
                    (megabytes(t.factor_bytes[i]), place)
                }
            };
            let shape = format!("{:?}", p.shape);
            writeln!(
                f,
                "{:wide$}  {shape:>16}  {:>10}  {group:>5}  {threshold:>9}  {:>7}  {factors:>11}  {place:>9}",
                p.name,
                p.range.len(),
                p.retain
            )?;
        }
        writeln!(f, "\n{:32}  {:>12}  {:>12}", "memory", "predicted", "measured")?;
        for (what, bytes) in self.bytes {
            writeln!(f, "{what:32}  {:>12}  {:>12}", megabytes(bytes), megabytes(bytes))?;
        }
        if self.gathered > 0 {
            let bytes = megabytes(self.gathered);
            writeln!(f, "{:32}  {bytes:>12}  {:>12}", "gathered parameters, at most", "-")?;
        }
        let of = |x: Option<usize>| x.map_or("-".into(), megabytes);
        let (predicted, measured) =
            (self.predicted.as_ref().map(|p| p.working_bytes), self.measured.map(|m| m.working_bytes));
        writeln!(f, "{:32}  {:>12}  {:>12}", "activations, factors, scratch", of(predicted), of(measured))?;
        let all = |x: Option<usize>| of(x.map(|x| x + self.fixed_bytes()));
        writeln!(f, "{:32}  {:>12}  {:>12}", "together", all(predicted), all(measured))?;
        let time = |x: Option<f64>| x.map_or("-".into(), |s| format!("{:.2} ms", s * 1e3));
        writeln!(f, "\n{:32}  {:>12}  {:>12}", "time", "predicted", "measured")?;
        let m = self.measured.map(|m| m.phases);
        writeln!(
            f,
            "{:32}  {:>12}  {:>12}",
            "forward and backward",
            time(self.predicted.as_ref().map(|p| p.seconds)),
            time(m.map(|m| m.forward + m.backward))
        )?;
        for (what, seconds) in
            [("reduce", m.map(|m| m.reduce)), ("noise", m.map(|m| m.noise)), ("update", m.map(|m| m.update))]
        {
            writeln!(f, "{what:32}  {:>12}  {:>12}", "-", time(seconds))?;
        }
        match &self.predicted {
            Some(p) => writeln!(f, "\npredicted for microbatches of {} samples, from a trace of fewer", p.samples),
            None => writeln!(f, "\nnot traced yet: predict() runs a few samples, and fills in what is left out here"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f)
    }
}

/// Bytes in MB (10⁶).
fn megabytes(bytes: usize) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

/// The largest parameter of each clipping group with at least two dimensions, by index.
fn largest_matrices(flat: &Flat, clipping: &Clipping) -> Vec<Option<usize>> {
    let mut best: Vec<Option<usize>> = vec![None; clipping.groups.len()];
    for (i, p) in flat.params().iter().enumerate() {
        let slot = &mut best[clipping.group_of[i]];
        if p.shape().len() > 1 && slot.is_none_or(|b| flat.params()[b].numel() < p.numel()) {
            *slot = Some(i);
        }
    }
    best
}

/// What one traced microbatch showed: for each event of the backward pass, in order, the parameter delivered, the bytes of its
/// factors, and the most bytes in use since the event before.
#[derive(Clone, Debug, Default)]
pub(super) struct Trace {
    pub samples: usize,
    pub events: Vec<Event>,
    pub seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Event {
    /// The parameter delivered; `None` for an operation of the backward pass, and for the ends of both passes.
    pub param: Option<usize>,
    pub factor_bytes: usize,
    pub peak: usize,
}

impl Prediction {
    /// Two traces of the same step with different numbers of samples, continued in a straight line to `samples`: between two
    /// events the bytes in use are linear in the number of samples, and the peak is the largest of them.
    pub(super) fn from(a: &Trace, b: &Trace, samples: usize, params: usize) -> Result<Prediction> {
        let same = a.events.len() == b.events.len() && a.events.iter().zip(&b.events).all(|(x, y)| x.param == y.param);
        if !same {
            return Err(Error::invalid(
                "predict",
                format!(
                    "the graph of {} samples differs from that of {}; a plan needs a forward pass that does the same for any number",
                    a.samples, b.samples
                ),
            ));
        }
        let line = |x: f64, y: f64| {
            let slope = if a.samples == b.samples { 0.0 } else { (y - x) / (b.samples as f64 - a.samples as f64) };
            (y + slope * (samples as f64 - b.samples as f64)).max(0.0)
        };
        let bytes = |x: usize, y: usize| line(x as f64, y as f64).round() as usize;
        let mut prediction = Prediction {
            samples,
            order: a.events.iter().filter_map(|e| e.param).collect(),
            factor_bytes: vec![0; params],
            working_bytes: 0,
            seconds: line(a.seconds, b.seconds),
        };
        for (x, y) in a.events.iter().zip(&b.events) {
            prediction.working_bytes = prediction.working_bytes.max(bytes(x.peak, y.peak));
            if let Some(i) = x.param {
                prediction.factor_bytes[i] = bytes(x.factor_bytes, y.factor_bytes);
            }
        }
        Ok(prediction)
    }
}
