//! All trainable parameters in one buffer.

use super::units::Units;
use crate::array::Array;
use crate::autograd::Param;
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cuda::{Tag, TagScope};
use crate::optim::{FlatLayout, Segment};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Trainable parameters as views into one flat buffer, in the order given. Updates happen in place; an older handle on a value keeps that
/// value (the buffer is then copied once).
pub struct Flat {
    params: Vec<Param>,
    layout: FlatLayout,
    at: HashMap<u64, usize>,
    buffer: Array,
    /// The shared parameters, if ranks share them; the buffer is then empty.
    units: Option<Arc<Units>>,
}

impl Flat {
    /// Collects the trainable parameters among `params`, which must share a dtype, f32 or f64.
    pub fn new(params: &[Param]) -> Result<Flat> {
        let params: Vec<Param> = params.iter().filter(|p| p.trainable()).cloned().collect();
        let Some(first) = params.first() else {
            return Err(Error::invalid("step", "no trainable parameters"));
        };
        let dtype = first.dtype();
        if let Some(p) = params.iter().find(|p| p.dtype() != dtype || dtype.is_half() || !dtype.is_float()) {
            return Err(Error::dtype(
                "step",
                format!("{} is {}: trained parameters are all f32 or all f64", p.name(), p.dtype()),
            ));
        }
        let device = first.device();
        if let Some(p) = params.iter().find(|p| p.device() != device) {
            return Err(Error::device(
                "step",
                format!(
                    "{} is on {}, {} on {device}: move the whole model with .to()",
                    p.name(),
                    p.device(),
                    first.name()
                ),
            ));
        }
        if let Some(p) = params.iter().find(|p| p.value().shape() != p.shape()) {
            return Err(Error::invalid(
                "step",
                format!("{} has a shape and no value: it was described for a plan", p.name()),
            ));
        }
        let (mut segments, mut at, mut n) = (Vec::new(), HashMap::new(), 0);
        for (i, p) in params.iter().enumerate() {
            if at.insert(p.id(), i).is_some() {
                return Err(Error::invalid("step", format!("{} is listed twice", p.name())));
            }
            segments.push(Segment { range: n..n + p.numel(), decay: p.shape().len() > 1 });
            n += p.numel();
        }
        let _tag = TagScope::new(Tag::Parameter);
        let mut buffer = Array::zeros(&[n], (dtype, &device));
        for (p, s) in params.iter().zip(&segments) {
            buffer.write(s.range.start, &p.value())?;
        }
        let flat = Flat { params, layout: FlatLayout::new(segments, n), at, buffer, units: None };
        flat.attach()?;
        Ok(flat)
    }
    fn attach(&self) -> Result<()> {
        for (p, s) in self.params.iter().zip(self.layout.segments()) {
            p.set(self.buffer.slice(0, s.range.clone())?.reshape(p.shape())?)?;
        }
        Ok(())
    }
    /// Changes the buffer in place. Values that were set from outside since the last update are copied into it first. If ranks share the
    /// parameters, `f` receives this rank's stretch of them.
    pub(crate) fn update(&mut self, f: impl FnOnce(&mut Array, &FlatLayout) -> Result<()>) -> Result<()> {
        if let Some(units) = &self.units {
            return units.update(|own| f(own, &self.layout));
        }
        for (p, s) in self.params.iter().zip(self.layout.segments()) {
            let value = p.value();
            if !value.same_storage(&self.buffer.slice(0, s.range.clone())?) {
                self.buffer.write(s.range.start, &value)?;
            }
        }
        self.params.iter().for_each(Param::release);
        let done = self.buffer.own().and_then(|()| f(&mut self.buffer, &self.layout));
        self.attach()?;
        done
    }
    /// From now on the parameters are stored in `units`.
    pub(super) fn leave_to(&mut self, units: Arc<Units>) {
        for p in &self.params {
            p.set_source(units.clone());
            p.release();
        }
        self.buffer = Array::zeros(&[0], self.buffer.dtype());
        self.units = Some(units);
    }
    /// The shared parameters, if ranks share them.
    pub(super) fn units(&self) -> Option<&Arc<Units>> {
        self.units.as_ref()
    }
    /// The buffer of all parameters.
    pub(crate) fn buffer(&self) -> &Array {
        &self.buffer
    }
    /// The address of the buffer in a GPU's memory.
    pub(crate) fn address(&self) -> Result<u64> {
        self.buffer.address()
    }
    /// The trainable parameters, in flat order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }
    /// The position of each parameter.
    pub fn segments(&self) -> &[Segment] {
        self.layout.segments()
    }
    /// Index of a parameter in flat order.
    pub fn index(&self, p: &Param) -> Option<usize> {
        self.at.get(&p.id()).copied()
    }
    /// The stretch of one parameter.
    pub fn range(&self, p: &Param) -> Option<Range<usize>> {
        self.index(p).map(|i| self.layout.segments()[i].range.clone())
    }
    /// The stretches of the buffer that the ranks have in common: all except the placed parameters ([`Param::placed`]).
    pub(crate) fn shared(&self) -> Vec<Range<usize>> {
        let mut out: Vec<Range<usize>> = Vec::new();
        for (p, s) in self.params.iter().zip(self.layout.segments()) {
            match out.last_mut() {
                _ if p.placed() => {}
                Some(last) if last.end == s.range.start => last.end = s.range.end,
                _ => out.push(s.range.clone()),
            }
        }
        out
    }
    /// Number of trainable elements.
    pub fn numel(&self) -> usize {
        self.layout.segments().last().map_or(0, |s| s.range.end)
    }
    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.buffer.device()
    }
    /// The dtype of the parameters: f32 or f64.
    pub fn dtype(&self) -> DType {
        self.buffer.dtype()
    }
}
