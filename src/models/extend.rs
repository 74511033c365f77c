//! Conversion of a trained model to other attention spans and to longer sequences.

use super::{Gpt, Positions};
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::ops::attention::Span;
use serde::{Deserialize, Serialize};

/// How positions are extended when a model is made for longer sequences. ALiBi and layers without positions need no change.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extend {
    /// A table of learned positions is repeated: position p takes the vector of p modulo the old length (Longformer, Beltagy et al. 2020).
    /// The base of rotary frequencies is multiplied by r^(D/(D − 2)), where r is the ratio of the lengths and D the width of a head. The
    /// slowest pair of a head then rotates over the new length as far as it did over the old, and the fastest pair as fast as before.
    Fit,
    /// New rows of a table of learned positions are initialised as in a new model, and the rotary base stays the same.
    Plain,
}

impl Gpt {
    /// The model with a span for each layer and for sequences of up to `positions` tokens. Weights stay as they are and no parameter is
    /// added, so that short further training can follow.
    ///
    /// Fails if the number of spans is not the number of layers, if a span has no width or a block is longer than the sequence, if there
    /// are fewer positions than before, or if the model has adapters.
    pub fn with_spans(self, spans: Vec<Span>, positions: usize, how: Extend) -> Result<Gpt> {
        let op = "Gpt::with_spans";
        let before = self.config().clone();
        let had = before.n_positions;
        if self.has_adapters() {
            return Err(Error::invalid(op, "the model has adapters; merge them, save it, and load it without them"));
        }
        if positions < had {
            let message =
                format!("{positions} positions for a model of {had}; a shorter sequence needs no other model");
            return Err(Error::invalid(op, message));
        }
        let mut config = before.with_spans(spans);
        config.n_positions = positions;
        let turns = (0..config.n_layer).any(|i| config.positions_of(i) == Positions::Rotary);
        if how == Extend::Fit && turns && positions > had {
            let (ratio, head) = (positions as f64 / had as f64, config.head() as f64);
            // With a single pair there is none to slow down: its frequency does not depend on the base.
            let exponent = if head > 2.0 { head / (head - 2.0) } else { 0.0 };
            config.rope_theta *= ratio.powf(exponent);
        }
        let device = self.params().all().first().map_or(Device::Cpu, |p| p.device());
        let dtype = self.params().all().first().map_or(DType::F32, |p| p.dtype());
        // Every parameter is overwritten below, except new rows of the table of positions.
        let new = Gpt::with_dtype(config, 0, dtype)?;
        new.params().to(&device)?;
        for p in new.params().all() {
            let Some(old) = self.params().get(p.name()) else {
                return Err(Error::invalid(op, format!("{} is not in the model", p.name())));
            };
            let value = old.value().copy();
            if old.shape() == p.shape() {
                p.set(value)?;
            } else {
                p.set(longer(&value, &p.value(), how == Extend::Fit)?)?;
            }
            p.set_trainable(old.trainable());
        }
        Ok(new)
    }
}

/// The rows of `table`, repeated to the length of `other`, or followed by the rows of `other`.
fn longer(table: &Array, other: &Array, repeat: bool) -> Result<Array> {
    let (had, rows, d) = (table.shape()[0], other.shape()[0], table.shape()[1]);
    let mut out = other.copy();
    let ends = if repeat { rows } else { had };
    for start in (0..ends).step_by(had) {
        let part = table.slice(0, 0..had.min(rows - start))?;
        out.write(start * d, &part)?;
    }
    Ok(out)
}
