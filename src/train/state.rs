//! A training step in a checkpoint: parameters, optimizer state, step count, and any other data of the run.
//!
//! A resumed private run repeats exactly the steps that it lost. Sampling and noise are functions of (key, step, element), so a repeated
//! step is the same release, and ε counted by step number is never below the true value.

use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::io::{Checkpoint, CheckpointFolder, Entry, arrays_of, entry};
use crate::nn::{Params, Strict, refuse_merged};
use crate::step::{PrivacyConfig, TrainStep};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Serialize, Deserialize)]
struct State<X> {
    steps: u64,
    /// Target of a private run and its noise multiplier. Both must be the same on resume.
    privacy: Option<(PrivacyConfig, f64)>,
    /// Names and sizes of the trained parameters, in the order of the optimizer's buffers.
    #[serde(default)]
    layout: Vec<(String, usize)>,
    extra: X,
}

fn layout(step: &impl TrainStep) -> Vec<(String, usize)> {
    step.flat().params().iter().map(|p| (p.name().to_string(), p.numel())).collect()
}

/// Writes a checkpoint, atomically. It is refused while adapters are merged into their weights, because they would count twice when it is
/// loaded.
///
/// `number` orders checkpoints of a run; `score` ranks them (lower is better). If several ranks take the steps together, every rank must
/// call it: sharded state is gathered, rank 0 writes, and the others return when it has finished. The run can be continued with any number
/// of ranks and any [`Stage`](crate::step::Stage).
pub fn save(
    folder: &CheckpointFolder,
    number: u64,
    score: Option<f64>,
    params: &Params,
    step: &impl TrainStep,
    extra: &impl Serialize,
) -> Result<()> {
    let privacy = step.accounting().map(|p| (p.config().clone(), p.noise_multiplier()));
    let state = State { steps: step.steps(), privacy, layout: layout(step), extra };
    let all = params.all();
    refuse_merged("state::save", &all)?;
    step.gather_parameters()?;
    let buffers = step.whole_state()?;
    let ranks = step.ranks().filter(|r| r.size() > 1);
    if let Some(ranks) = ranks.filter(|r| r.rank() > 0) {
        return match ranks.broadcast("checkpoint", &Array::zeros(&[1], DType::U8), 0)?.item()? {
            0.0 => Err(Error::invalid("save", format!("rank 0 could not write checkpoint {number}; it says why"))),
            _ => Ok(()),
        };
    }
    let written = folder.save(number, score, |w| {
        let model: Vec<Entry> = all.iter().map(|p| entry(p.name(), &p.value())).collect();
        w.tensors("model.safetensors", &model, &BTreeMap::new())?;
        let optimizer: Vec<Entry> = buffers.iter().map(|(n, a)| entry(n, a)).collect();
        w.tensors("optimizer.safetensors", &optimizer, &BTreeMap::new())?;
        w.json("state.json", &state)
    });
    if let Some(ranks) = ranks {
        ranks.broadcast("checkpoint", &Array::full(&[1], written.is_ok() as u8 as f64, DType::U8), 0)?;
    }
    written.map(drop)
}

/// Reads only the extra part of a checkpoint.
pub fn extra<X: DeserializeOwned>(checkpoint: &Checkpoint) -> Result<X> {
    checkpoint.json::<State<X>>("state.json").map(|s| s.extra)
}

/// Restores parameters and step from a checkpoint, and returns the extra part. A private run must have the same target and noise as before.
/// If it fails, parameters and step are as they were.
pub fn load<X: DeserializeOwned>(checkpoint: &Checkpoint, params: &Params, step: &mut impl TrainStep) -> Result<X> {
    let state: State<X> = checkpoint.json("state.json")?;
    let now = step.accounting().map(|p| (p.config().clone(), p.noise_multiplier()));
    if state.privacy != now {
        return Err(Error::privacy(format!(
            "{} was made under another privacy setting; resume with the same, or start a new run",
            checkpoint.path().display()
        )));
    }
    let here = layout(step);
    if !state.layout.is_empty() && state.layout != here {
        let at = (0..here.len().max(state.layout.len())).find(|&i| here.get(i) != state.layout.get(i)).unwrap_or(0);
        let said =
            |l: &[(String, usize)]| l.get(at).map_or("nothing".into(), |(n, size)| format!("{n} with {size} elements"));
        return Err(Error::invalid(
            "restore",
            format!(
                "{} has the optimizer's numbers of other parameters, or in another order: at place {at} it has {}, the step has {}; \
                 give the step the parameters in the order of the saved run",
                checkpoint.path().display(),
                said(&state.layout),
                said(&here)
            ),
        ));
    }
    let buffers: Vec<(String, Array)> = arrays_of(&checkpoint.tensors("optimizer.safetensors")?)?;
    let before: Vec<_> = params.all().into_iter().map(|p| (p.value(), p)).collect();
    load_params(checkpoint, params)?;
    if let Err(e) = step.restore(state.steps, &buffers) {
        before.into_iter().try_for_each(|(value, p)| p.set(value))?;
        return Err(e);
    }
    Ok(state.extra)
}

/// Restores only the parameters.
pub fn load_params(checkpoint: &Checkpoint, params: &Params) -> Result<()> {
    params.load_from(&checkpoint.tensors("model.safetensors")?, Strict::AllowUnexpected).map(drop)
}
