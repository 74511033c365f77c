//! Parameters that the ranks share (ZeRO stage 3). Each rank keeps its stretch. A unit of parameters is gathered when one of them is first
//! read, in the forward pass and again in the backward pass, and freed when the next unit is read.
//!
//! A unit is a run of parameters of one module, such as a block of a transformer. The order in which units are read is recorded in each
//! microbatch; in the next microbatch, the following unit is gathered in the background while the current one computes. Before each
//! collective of a microbatch the ranks exchange eight bytes that say which operation comes next: a rank without a microbatch of its own
//! then takes part in the others' collectives, and ranks that read their parameters in different orders get an error that says so.

use super::flat::Flat;
use crate::array::Array;
use crate::autograd::{Param, Source, WeakParam};
use crate::base::{DType, Error, Result};
use crate::device::cuda::{Tag, TagScope};
use crate::device::spans::{self, Kind};
use crate::dist::{Communicator, Pending, Shared};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// The next operation of a rank in a microbatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Any operation of the other ranks: this rank has no microbatch left.
    Idle,
    /// The end of the microbatch.
    End,
    /// A gather of the parameters of a unit.
    Gather(usize),
    /// A sum of a bucket of gradients.
    Reduce(usize),
}

impl Next {
    fn code(self) -> i64 {
        match self {
            Next::Idle => 0,
            Next::End => 1,
            Next::Gather(unit) => 2 + 2 * unit as i64,
            Next::Reduce(bucket) => 3 + 2 * bucket as i64,
        }
    }
    fn of(code: i64) -> Next {
        match code {
            0 => Next::Idle,
            1 => Next::End,
            c if c % 2 == 0 => Next::Gather((c as usize - 2) / 2),
            c => Next::Reduce((c as usize - 3) / 2),
        }
    }
    /// Agrees with the other ranks on the next operation, which an idle rank receives from them.
    pub fn agree(self, ranks: &dyn Communicator) -> Result<Next> {
        let all = ranks.all_gather("what comes next", &Array::from_slice(&[self.code()], &[1])?)?.to_vec::<i64>()?;
        let mut busy = all.iter().enumerate().filter(|c| *c.1 != 0);
        let Some((first, &code)) = busy.next() else { return Ok(Next::End) };
        if let Some((other, &odd)) = busy.find(|c| *c.1 != code) {
            let (a, b) = (Next::of(code), Next::of(odd));
            let why = format!(
                "rank {first} is at {a:?} and rank {other} at {b:?}: their forward passes read parameters in different orders"
            );
            ranks.abort(&why);
            return Err(Error::invalid("run", why));
        }
        Ok(Next::of(code))
    }
}

/// This rank's stretch of the parameters, and the gathered values of the others.
pub(super) struct Units {
    ranks: Shared,
    params: Vec<WeakParam>,
    /// The stretch of each parameter in the flat buffer.
    segments: Vec<Range<usize>>,
    /// The parameters of each unit, by index.
    units: Vec<Range<usize>>,
    names: Vec<String>,
    unit_of: HashMap<u64, usize>,
    stretches: Vec<Range<usize>>,
    dtype: DType,
    state: Mutex<State>,
}

struct State {
    /// This rank's stretch.
    own: Array,
    /// The gathered value of each parameter.
    given: Vec<Option<Array>>,
    /// The units that are currently gathered, the oldest first.
    here: Vec<usize>,
    /// The unit that is being gathered in the background.
    coming: Option<(usize, Pending)>,
    /// The units that were gathered in the last microbatch, in this order, and those gathered in this one so far; the same on every rank,
    /// whether it had a microbatch or took part in those of others.
    order: Vec<usize>,
    gathered: Vec<usize>,
    /// Whether a microbatch is in progress.
    busy: bool,
    /// Whether all units stay gathered until the next step.
    whole: bool,
    failed: Option<Error>,
}

/// The module of a parameter: its name up to and including the first number, or else up to the last dot.
fn module(name: &str) -> &str {
    let mut at = 0;
    for part in name.split('.') {
        at += part.len() + 1;
        if part.bytes().all(|b| b.is_ascii_digit()) && !part.is_empty() {
            return &name[..at - 1];
        }
    }
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

/// The parameters of each module, by index, and the modules' names.
pub(super) fn modules(params: &[&str]) -> (Vec<Range<usize>>, Vec<String>) {
    let (mut units, mut names) = (Vec::<Range<usize>>::new(), Vec::<String>::new());
    for (i, name) in params.iter().enumerate() {
        let module = module(name);
        match (units.last_mut(), names.last()) {
            (Some(unit), Some(last)) if last == module => unit.end = i + 1,
            _ => {
                units.push(i..i + 1);
                names.push(module.to_string());
            }
        }
    }
    (units, names)
}

impl Units {
    pub fn new(flat: &Flat, ranks: Shared, stretches: &[Range<usize>], own: Array) -> Units {
        let segments: Vec<Range<usize>> = flat.segments().iter().map(|s| s.range.clone()).collect();
        let params: Vec<&str> = flat.params().iter().map(Param::name).collect();
        let (units, names) = modules(&params);
        let of = |(u, r): (usize, &Range<usize>)| r.clone().map(move |i| (i, u)).collect::<Vec<_>>();
        let unit_of = units.iter().enumerate().flat_map(of).map(|(i, u)| (flat.params()[i].id(), u)).collect();
        let state = State {
            own,
            given: vec![None; segments.len()],
            here: Vec::new(),
            coming: None,
            order: Vec::new(),
            gathered: Vec::new(),
            busy: false,
            whole: false,
            failed: None,
        };
        Units {
            ranks,
            params: flat.params().iter().map(Param::downgrade).collect(),
            segments,
            units,
            names,
            unit_of,
            stretches: stretches.to_vec(),
            dtype: flat.dtype(),
            state: Mutex::new(state),
        }
    }
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
    fn own(&self) -> Range<usize> {
        self.stretches[self.ranks.rank()].clone()
    }
    /// The stretch of a unit in the flat buffer.
    fn range(&self, unit: usize) -> Range<usize> {
        let params = &self.units[unit];
        self.segments[params.start].start..self.segments[params.end - 1].end
    }
    /// Number of elements of the largest unit.
    pub fn largest(&self) -> usize {
        (0..self.units.len()).map(|u| self.range(u).len()).max().unwrap_or(0)
    }
    /// Copies values into this rank's stretch that were set from outside since their unit was gathered, or while it was not gathered.
    fn take_over(&self, state: &mut State, params: Range<usize>) -> Result<()> {
        for i in params {
            let Some(p) = self.params[i].upgrade() else { continue };
            let Some(value) = p.held() else { continue };
            if state.given[i].as_ref().is_some_and(|g| g.same_storage(&value)) {
                continue;
            }
            let (own, at) = (self.own(), &self.segments[i]);
            let (a, b) = (at.start.max(own.start), at.end.min(own.end));
            if a < b {
                let flat = value.contiguous().reshape(&[at.len()])?;
                state.own.write(a - own.start, &flat.slice(0, a - at.start..b - at.start)?)?;
            }
            state.given[i] = Some(value);
        }
        Ok(())
    }
    /// Frees a gathered unit.
    fn free(&self, state: &mut State, unit: usize) -> Result<()> {
        self.take_over(state, self.units[unit].clone())?;
        for i in self.units[unit].clone() {
            state.given[i] = None;
            if let Some(p) = self.params[i].upgrade() {
                p.release();
            }
        }
        state.here.retain(|u| *u != unit);
        Ok(())
    }
    fn free_all(&self, state: &mut State) -> Result<()> {
        state.here.clone().into_iter().try_for_each(|unit| self.free(state, unit))
    }
    /// Starts to gather a unit; all ranks do this, after they have agreed on it.
    fn begin(&self, state: &mut State, unit: usize) -> Result<Pending> {
        self.take_over(state, self.units[unit].clone())?;
        state.gathered.push(unit);
        let (what, own, parts) = self.part(state, unit)?;
        Ok(self.ranks.begin(move |ranks| {
            Next::Gather(unit).agree(ranks)?;
            ranks.all_gather_parts(&what, &own, &parts)
        }))
    }
    /// The arguments of a unit's gather: its description, this rank's part of it, and the number of elements of each rank's part.
    fn part(&self, state: &State, unit: usize) -> Result<(String, Array, Vec<usize>)> {
        let range = self.range(unit);
        let cut = |s: &Range<usize>| s.start.max(range.start)..s.end.min(range.end).max(s.start.max(range.start));
        let parts = self.stretches.iter().map(|s| cut(s).len()).collect();
        let (own, mine) = (self.own(), cut(&self.own()));
        let part = match mine.is_empty() {
            true => Array::zeros(&[0], self.dtype),
            // A copy: the stretch may be updated while the part is in transit.
            false => state.own.slice(0, mine.start - own.start..mine.end - own.start)?.copy(),
        };
        Ok((format!("parameters of {}", self.names[unit]), part, parts))
    }
    fn install(&self, state: &mut State, unit: usize, all: &Array) -> Result<()> {
        let start = self.range(unit).start;
        let _tag = TagScope::new(Tag::Parameter);
        for i in self.units[unit].clone() {
            let at = &self.segments[i];
            let Some(p) = self.params[i].upgrade() else { continue };
            if state.given[i].is_some() {
                // The value was set from outside, and it is what the owners sent.
                continue;
            }
            // The value gets its own memory, so that a handle to a small parameter does not keep the memory of the whole unit alive.
            let value = all.slice(0, at.start - start..at.end - start)?.copy().reshape(p.shape())?;
            p.set(value.clone())?;
            state.given[i] = Some(value);
        }
        state.here.push(unit);
        Ok(())
    }
    /// Gathers a unit if necessary, and starts to gather the one that follows it.
    fn bring(&self, state: &mut State, unit: usize) -> Result<()> {
        if let Some(e) = &state.failed {
            return Err(Error::invalid("run", e.to_string()));
        }
        if state.here.contains(&unit) {
            return Ok(());
        }
        let _phase = spans::span(Kind::Phase, "gather parameters");
        if !state.whole {
            self.free_all(state)?;
        }
        if let Some((u, pending)) = state.coming.take() {
            let all = pending.wait()?;
            if u == unit || state.whole {
                self.install(state, u, &all)?;
            }
        }
        if !state.here.contains(&unit) {
            let all = self.begin(state, unit)?.wait()?;
            self.install(state, unit, &all)?;
        }
        // While this microbatch gathers the same units as the last one, the next unit is known.
        let n = state.gathered.len();
        if state.busy
            && state.order.get(..n) == Some(&state.gathered[..])
            && let Some(&next) = state.order.get(n)
        {
            state.coming = Some((next, self.begin(state, next)?));
        }
        Ok(())
    }
    /// Starts a microbatch.
    pub fn start(&self) -> Result<()> {
        let mut state = self.lock();
        (state.busy, state.gathered) = (true, Vec::new());
        self.expect_here(&mut state)
    }
    fn expect_here(&self, state: &mut State) -> Result<()> {
        state.failed.take().map_or(Ok(()), Err)
    }
    /// Returns the error of a gather that failed since the microbatch began; its value was NaN.
    pub fn check(&self) -> Result<()> {
        let mut state = self.lock();
        self.expect_here(&mut state)
    }
    /// Ends the microbatch on every rank; the ranks agree on that after all other operations.
    pub fn end(&self) -> Result<()> {
        self.close()?;
        self.ranks.begin(|ranks| Next::End.agree(ranks)).wait()?;
        self.over()
    }
    /// Waits for a background gather, if there is one.
    fn close(&self) -> Result<()> {
        let mut state = self.lock();
        state.busy = false;
        let coming = state.coming.take();
        coming.map_or(Ok(()), |(_, pending)| pending.wait().map(drop))
    }
    /// Frees all units, so that every microbatch starts with nothing gathered on every rank.
    fn over(&self) -> Result<()> {
        let mut state = self.lock();
        state.order = std::mem::take(&mut state.gathered);
        self.free_all(&mut state)?;
        self.expect_here(&mut state)
    }
    /// Takes part in a microbatch of other ranks, or in the rest of it; `reduce` is called for each bucket that they sum.
    pub fn serve(&self, mut reduce: impl FnMut(usize) -> Result<()>) -> Result<()> {
        self.close()?;
        loop {
            match self.ranks.begin(|ranks| Next::Idle.agree(ranks)).wait()? {
                Next::Idle | Next::End => return self.over(),
                Next::Gather(unit) => {
                    let (what, own, parts) = {
                        let mut state = self.lock();
                        state.gathered.push(unit);
                        self.take_over(&mut state, self.units[unit].clone())?;
                        self.part(&state, unit)?
                    };
                    self.ranks.begin(move |ranks| ranks.all_gather_parts(&what, &own, &parts)).wait()?;
                }
                Next::Reduce(bucket) => reduce(bucket)?,
            }
        }
    }
    /// Gathers all units, which stay gathered until the parameters change. Every rank must call it.
    pub fn gather(&self) -> Result<()> {
        let mut state = self.lock();
        state.whole = true;
        (0..self.units.len()).try_for_each(|unit| self.bring(&mut state, unit))
    }
    /// Copies values that were set from outside into this rank's stretch, and frees all units.
    pub fn settle(&self) -> Result<()> {
        let mut state = self.lock();
        state.whole = false;
        self.take_over(&mut state, 0..self.params.len())?;
        (0..self.units.len()).try_for_each(|unit| self.free(&mut state, unit))
    }
    /// Changes this rank's stretch; gathered values become invalid.
    pub fn update(&self, f: impl FnOnce(&mut Array) -> Result<()>) -> Result<()> {
        self.settle()?;
        let mut state = self.lock();
        state.own.own()?;
        f(&mut state.own)
    }
}

impl Source for Units {
    fn fetch(&self, param: &Param) -> Array {
        let mut state = self.lock();
        // Another thread may have gathered it in the meantime.
        if let Some(value) = param.held() {
            return value;
        }
        let missing = || Array::full(param.shape(), f64::NAN, param.dtype());
        let Some(&unit) = self.unit_of.get(&param.id()) else { return missing() };
        match self.bring(&mut state, unit) {
            Ok(()) => param.held().unwrap_or_else(missing),
            Err(e) => {
                state.failed.get_or_insert(e);
                missing()
            }
        }
    }
}

/// Stores the parameters in units, of which this rank keeps its stretch.
pub(super) fn share(flat: &mut Flat, ranks: Shared, stretches: &[Range<usize>]) -> Result<Arc<Units>> {
    let own = {
        let _tag = TagScope::new(Tag::Parameter);
        flat.buffer().slice(0, stretches[ranks.rank()].clone())?.copy()
    };
    let units = Arc::new(Units::new(flat, ranks, stretches, own));
    flat.leave_to(units.clone());
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::{Next, module};

    #[test]
    fn a_module_ends_at_its_number() {
        assert_eq!(module("h.0.attn.c_attn.weight"), "h.0");
        assert_eq!(module("model.layers.11.mlp.weight"), "model.layers.11");
        assert_eq!(module("wte.weight"), "wte");
        assert_eq!(module("w"), "w");
    }

    #[test]
    fn codes_come_back() {
        for next in [Next::Idle, Next::End, Next::Gather(0), Next::Gather(7), Next::Reduce(0), Next::Reduce(5)] {
            assert_eq!(Next::of(next.code()), next);
        }
    }
}
