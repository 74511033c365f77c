//! The plan of a step, which is determined before the first step.
//!
//! It contains the clipping groups and thresholds, the time at which each parameter's factors are contracted, and the buckets in which
//! gradients are summed over ranks. After the step was traced on a few samples, it also has the order in which gradients are delivered and
//! the memory that the step needs.

use super::core::Phases;
use super::flat::Flat;
use crate::autograd::Param;
use crate::base::{Error, Result};
use crate::device::Device;
use crate::privacy::{ClipFn, ClipStyle, Thresholds};
use std::fmt::{self, Write};
use std::ops::Range;

/// The clipping groups over the parameters of a step: the group of each parameter, and the threshold of each group.
#[derive(Clone, Debug, Default)]
pub(super) struct Clipping {
    pub clip: ClipFn,
    /// Threshold and number of members of each group.
    pub groups: Vec<(f64, usize)>,
    /// The group of each parameter.
    pub group_of: Vec<usize>,
    /// The largest norm of one sample's contribution to the clipped sum.
    pub sensitivity: f64,
}

impl Clipping {
    /// Groups according to `style`, with thresholds that compose to R = `threshold`.
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
    /// Sets each group's threshold and updates the sensitivity.
    pub fn set_thresholds(&mut self, thresholds: &[f64]) {
        self.groups.iter_mut().zip(thresholds).for_each(|(g, r)| g.0 = *r);
        self.compose();
    }
}

/// The time at which a parameter's factors are contracted into the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retain {
    /// On delivery: the factors are contracted and freed at once. Plain steps do this for every parameter.
    Sum,
    /// The samples' norms are computed on delivery, and the factors are kept until the norms of the whole clipping group are complete.
    Factors,
    /// The factors are kept until the other members of the clipping group are delivered; norms and clipped sum are then computed in one
    /// pass over them. One parameter of a group can use this, its largest matrix. It falls back to [`Retain::Factors`] if its gradient has
    /// no such pass: if it is used more than once, or if some samples of the microbatch are public.
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
    /// The time at which its factors are contracted.
    pub retain: Retain,
    /// Its clipping group, in a private step.
    pub group: Option<usize>,
}

/// The predicted needs of a step, for a number of samples per microbatch.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// Number of samples of the microbatch.
    pub samples: usize,
    /// Indices of [`Plan::params`] in the order in which backward delivers their gradients.
    pub order: Vec<usize>,
    /// Bytes of the factors of each parameter, in the order of [`Plan::params`].
    pub factor_bytes: Vec<usize>,
    /// The most bytes of activations, factors and scratch memory in use at once.
    pub working_bytes: usize,
    /// Seconds of a forward and backward pass.
    pub seconds: f64,
}

/// Measurements of the last step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement {
    /// The most bytes of activations, factors and scratch memory in use at once.
    pub working_bytes: usize,
    /// Seconds that each phase took on the host. On a GPU the work is only queued in this time.
    pub phases: Phases,
}

/// The plan of a step. [`Plan::explain`] prints it as a table.
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

/// Number of elements of the flat gradient that are summed over the ranks at once.
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
    /// Sets the bytes of parameters, gradients and optimizer buffers that this rank keeps.
    pub(super) fn keeps(&mut self, bytes: [usize; 3]) {
        self.bytes.iter_mut().zip(bytes).for_each(|(b, own)| b.1 = own);
    }
    /// The bytes that persist from step to step on this rank: parameters, gradients, and the optimizer's buffers.
    pub fn bytes(&self) -> &[(&'static str, usize); 3] {
        &self.bytes
    }
    /// If ranks share the parameters ([`Stage::Parameters`](super::Stage)), the most bytes of them that are gathered at once: those of the
    /// module in use, and of the next module, which is gathered in the background. They come on top of [`Plan::bytes`].
    pub fn gathered_bytes(&self) -> usize {
        self.gathered
    }
    /// The parameters, in the order of the flat gradient.
    pub fn params(&self) -> &[PlannedParam] {
        &self.params
    }
    /// Threshold and number of members of each clipping group; none in a plain step. Adaptive thresholds are listed with their initial
    /// values.
    pub fn groups(&self) -> &[(f64, usize)] {
        &self.groups
    }
    /// The stretches of the flat gradient that are summed over the ranks one after the other; they contain no placed parameters.
    pub fn buckets(&self) -> &[Range<usize>] {
        &self.buckets
    }
    /// Bytes of parameters, gradients and optimizer buffers together.
    pub fn fixed_bytes(&self) -> usize {
        self.bytes.iter().map(|b| b.1).sum()
    }
    /// The predicted needs of the step; `None` before `predict` was called.
    pub fn predicted(&self) -> Option<&Prediction> {
        self.predicted.as_ref()
    }
    /// Measurements of the last step; `None` before the first.
    pub fn measured(&self) -> Option<&Measurement> {
        self.measured.as_ref()
    }
    /// The plan as a table: each parameter with its group and how it is retained, then predicted and measured memory and time.
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

/// The trace of one microbatch: for each event of the backward pass, in order, the parameter delivered, the bytes of its factors, and the
/// most bytes in use since the previous event.
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
    /// A prediction from two traces of the same step with different numbers of samples, extrapolated linearly to `samples`: the bytes in
    /// use between two events are linear in the number of samples, and the peak is their maximum.
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
