//! Owners of elements: how samples are followed through the history, from the losses back to the parameters.
//!
//! Loss i belongs to sample i. From there the backward pass calls each rule ([`Rule::owners`](super::Rule::owners)) to find the sample to
//! which each element of its inputs must belong for that to be true. The results depend on shapes and indices alone, never on values. If
//! one element would have to belong to two samples, or the owners of a parameter's factor differ from those derived from the losses,
//! samples are mixed: then one sample influences the gradients of others, and clipping does not bound its effect.

use super::tensor::Node;
use super::{Factor, Samples};
use crate::array::shape::numel;
use crate::base::Error;
use smallvec::SmallVec;
use std::collections::HashMap;

/// The owners (samples) of the elements of one tensor.
#[derive(Clone, Debug)]
pub enum Owner {
    /// Every sample uses all elements: they must not depend on any sample.
    All,
    /// Element i, in row-major order, belongs to sample (i / run) mod the number of samples. `[B, T, d]` has runs of T·d elements,
    /// `[T, B, d]` runs of d.
    Every {
        /// Number of consecutive elements of one sample.
        run: usize,
    },
    /// Row r, of `width` consecutive elements, belongs to sample `samples.owner(r)`.
    Rows {
        /// The owners of the rows.
        samples: Samples,
        /// Elements of a row.
        width: usize,
    },
    /// One row for each choice of an expert by a router, in the router's order. A token has the owner that the elements of a `[tokens, 1]`
    /// tensor with the inner owner would have.
    Routed(Box<Owner>),
    /// An element belongs to several samples.
    Mixed,
    /// The operation does not declare owners.
    Unknown,
}

/// An operation that mixes samples.
#[derive(Clone, Debug)]
pub struct Mixing {
    /// Name of the operation.
    pub op: &'static str,
    /// Number of operations that this thread had recorded before it.
    pub place: u64,
    /// The parameter whose factor has other owners than those derived from the losses; `None` if the operation itself mixes samples.
    pub param: Option<String>,
}

impl Mixing {
    /// The error with which a private step refuses it. `line` is the line of the program that called the operation.
    pub(crate) fn refusal(&self, line: Option<&str>) -> Error {
        let op = format!("{}{}", self.op, line.map(|l| format!(", called at {l},")).unwrap_or_default());
        let what = match &self.param {
            None => format!("the operation {op} mixes records"),
            Some(p) => format!(
                "{p}, in the operation {op}, has rows of other records than the losses do: the first dimension has to be that of the \
                 records, unless a map of the rows says otherwise"
            ),
        };
        Error::privacy(format!(
            "{what}. Then one record moves the gradients of others, and clipping does not bound what it does. Make each loss a \
             function of its own record"
        ))
    }
}

/// The argument of [`Rule::owners`](super::Rule::owners): the owners of an operation's output.
pub struct Whose<'a> {
    /// Owners of the elements of the output.
    pub owner: &'a Owner,
    /// Number of samples.
    pub count: usize,
    /// Shape of the output.
    pub shape: &'a [usize],
    /// For each input, whether it has a history; inputs without one are data.
    pub history: &'a [bool],
}

/// A digit of the sample number that one dimension determines: (index / div) mod count.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Digit {
    dim: usize,
    div: usize,
    count: usize,
}

/// The digits of (i / run) mod count of a row-major shape, the fastest-varying first; `None` if runs do not end at the boundaries of
/// dimensions.
fn digits(shape: &[usize], run: usize, count: usize) -> Option<SmallVec<[Digit; 3]>> {
    let mut found: SmallVec<[Digit; 3]> = SmallVec::new();
    let (mut stride, end) = (1, run * count);
    for (dim, &n) in shape.iter().enumerate().rev() {
        let (lo, hi) = (stride.max(run), (stride * n).min(end));
        if lo < hi {
            let whole = lo.is_multiple_of(stride)
                && (hi == stride * n || (stride * n).is_multiple_of(hi))
                && hi.is_multiple_of(lo);
            if !whole {
                return None;
            }
            found.push(Digit { dim, div: lo / stride, count: hi / lo });
        }
        stride *= n;
    }
    let all: usize = found.iter().map(|d| d.count).product();
    (all == count).then_some(found)
}

/// The run whose digits for a shape are `digits`.
fn run_of(digits: &[Digit], shape: &[usize], count: usize) -> Option<usize> {
    let first = digits.first()?;
    let run = shape[first.dim + 1..].iter().product::<usize>() * first.div;
    let again = self::digits(shape, run, count)?;
    (again[..] == *digits).then_some(run)
}

impl Owner {
    /// The owner of rows of `width` elements with these samples.
    pub fn rows(samples: &Samples, width: usize) -> Owner {
        match samples {
            Samples::Uniform { each, .. } => Owner::Every { run: each * width },
            Samples::Ragged(_) => Owner::Rows { samples: samples.clone(), width },
        }
    }
    /// The owner, among `count` samples, of each of the `rows` equal stretches of a tensor of `numel` elements. `None` unless each stretch
    /// belongs to one sample that can be determined on the host.
    pub fn of_rows(&self, rows: usize, numel: usize, count: usize) -> Option<Vec<u32>> {
        let width = numel.checked_div(rows).filter(|w| w * rows == numel && *w > 0)?;
        match self {
            Owner::Every { run } if *run > 0 && run.is_multiple_of(width) => {
                Some((0..rows).map(|r| (r * width / run % count) as u32).collect())
            }
            Owner::Rows { samples, width: own } if *own > 0 && own.is_multiple_of(width) && samples.is_on_host() => {
                Some((0..rows).map(|r| samples.owner(r * width / own) as u32).collect())
            }
            _ => None,
        }
    }
    /// Combines two requirements on one tensor; [`Owner::Mixed`] if they differ.
    fn and(self, other: Owner, numel: usize, count: usize) -> Owner {
        match (&self, &other) {
            (Owner::Mixed, _) | (_, Owner::Unknown) => self,
            (_, Owner::Mixed) | (Owner::Unknown, _) => other,
            (Owner::All, Owner::All) => self,
            (Owner::Every { run: a }, Owner::Every { run: b }) if a == b => self,
            (Owner::Routed(a), Owner::Routed(b)) => match a.clone().and(*b.clone(), numel, count) {
                Owner::Mixed => Owner::Mixed,
                _ => self,
            },
            (Owner::Routed(_), _) => self,
            (_, Owner::Routed(_)) => other,
            (Owner::Rows { samples: a, width: v }, Owner::Rows { samples: b, width: w }) if v == w && a.is_same(b) => {
                self
            }
            (Owner::All, _) | (_, Owner::All) => Owner::Mixed,
            (a, b) => {
                let row = |o: &Owner| match o {
                    Owner::Every { run } => *run,
                    Owner::Rows { width, .. } => *width,
                    _ => 1,
                };
                let width = row(a).min(row(b)).max(1);
                match (a.of_rows(numel / width, numel, count), b.of_rows(numel / width, numel, count)) {
                    (Some(x), Some(y)) if x != y => Owner::Mixed,
                    (Some(_), Some(_)) => self,
                    // Runs that are not multiples of each other belong to two different axes.
                    _ if matches!((a, b), (Owner::Every { .. }, Owner::Every { .. })) => Owner::Mixed,
                    _ => self,
                }
            }
        }
    }
}

impl Whose<'_> {
    fn numel(&self) -> usize {
        numel(self.shape)
    }
    /// For an input of the output's shape, element for element.
    pub fn same(&self) -> Owner {
        self.owner.clone()
    }
    /// For an input with the same elements in the same row-major order.
    pub fn reshaped(&self) -> Owner {
        match self.owner {
            Owner::Routed(_) => Owner::Unknown,
            o => o.clone(),
        }
    }
    /// For an input of this shape, where dimension d of the output is the input's dimension `from(d)` with the same index; `from` is `None`
    /// for a dimension along which the input is constant. The remaining dimensions of the input are those that the operation sums or mixes.
    pub fn along(&self, input: &[usize], from: impl Fn(usize) -> Option<usize>) -> Owner {
        match self.owner {
            Owner::All => Owner::All,
            Owner::Every { run } => {
                let Some(own) = digits(self.shape, *run, self.count) else { return Owner::Unknown };
                let moved: SmallVec<[Digit; 3]> =
                    own.iter().filter_map(|d| from(d.dim).map(|dim| Digit { dim, ..*d })).collect();
                match moved.len() {
                    0 => Owner::All,
                    // Some samples share an element and others do not.
                    n if n < own.len() => Owner::Mixed,
                    // A dimension of another size is indexed differently.
                    _ if own.iter().zip(&moved).any(|(a, b)| self.shape[a.dim] != input[b.dim]) => Owner::Unknown,
                    _ => run_of(&moved, input, self.count).map_or(Owner::Unknown, |run| Owner::Every { run }),
                }
            }
            Owner::Rows { samples, width } => {
                let lead = self.lead(samples.rows(), *width);
                let Some(lead) = lead else { return Owner::Unknown };
                let own: SmallVec<[Option<usize>; 6]> = (0..lead).map(&from).collect();
                if own.iter().enumerate().all(|(i, d)| *d == Some(i) && input.get(i) == Some(&self.shape[i])) {
                    let width = input[lead..].iter().product();
                    return Owner::Rows { samples: samples.clone(), width };
                }
                let shared = own.iter().enumerate().all(|(i, d)| d.is_none() || self.shape[i] == 1);
                if shared { Owner::All } else { Owner::Unknown }
            }
            Owner::Routed(_) if from(0) == Some(0) && input.first() == self.shape.first() => self.same(),
            _ => Owner::Unknown,
        }
    }
    /// The number of leading dimensions that make up rows of `width` elements.
    fn lead(&self, rows: usize, width: usize) -> Option<usize> {
        (0..=self.shape.len()).rev().find(|&k| numel(&self.shape[..k]) == rows && numel(&self.shape[k..]) == width)
    }
    /// For an input that was broadcast to the output's shape.
    pub fn broadcast(&self, input: &[usize]) -> Owner {
        if input == self.shape {
            return self.same();
        }
        let new = self.shape.len() - input.len();
        self.along(input, |d| d.checked_sub(new).filter(|&i| input[i] == self.shape[d]))
    }
    /// For one factor of a product whose other factor is input `other`. Data may be zero wherever two samples would meet, as in a matrix or
    /// a mask that selects each sample's rows: where a factor would belong to all samples, the result is then unknown.
    pub fn times(&self, other: usize, owner: Owner) -> Owner {
        let data = self.history.get(other) == Some(&false);
        match owner {
            Owner::All if data && !matches!(self.owner, Owner::All) => Owner::Unknown,
            o => o,
        }
    }
    /// For an input of the output's shape, or one that differs along `dim` only, where every element along `dim` influences all elements of
    /// the output along it.
    pub fn mixing(&self, dim: usize, input: &[usize]) -> Owner {
        if let Owner::Every { run } = self.owner {
            match digits(self.shape, *run, self.count) {
                Some(own) if own.iter().any(|d| d.dim == dim) => return Owner::Mixed,
                _ => {}
            }
        }
        if let Owner::Rows { samples, width } = self.owner
            && self.lead(samples.rows(), *width).is_none_or(|lead| dim < lead)
        {
            return if self.shape[dim] == 1 { self.along(input, Some) } else { Owner::Unknown };
        }
        if matches!(self.owner, Owner::Routed(_)) && dim > 0 && dim + 1 == self.shape.len() {
            return self.same();
        }
        self.along(input, Some)
    }
    /// As [`Whose::mixing`], but unknown where the elements along `dim` that influence each other may still belong to one sample.
    pub fn picking(&self, dim: usize, input: &[usize]) -> Owner {
        match self.mixing(dim, input) {
            Owner::Mixed => Owner::Unknown,
            o => o,
        }
    }
    /// As [`Whose::along`] if samples are not separated by `dim`; unknown otherwise.
    pub fn apart_from(&self, dim: usize, input: &[usize], from: impl Fn(usize) -> Option<usize>) -> Owner {
        match self.mixing(dim, self.shape) {
            Owner::Every { .. } | Owner::All => self.along(input, from),
            _ => Owner::Unknown,
        }
    }
    /// The output viewed in another shape with the same elements in the same order: a dimension of size 1 removed or inserted.
    pub fn reading<'a>(&'a self, shape: &'a [usize]) -> Whose<'a> {
        Whose { shape, ..*self }
    }
    /// For an input of images or sequences along dimension 0, which are those of the output. Unknown if one of them holds several samples.
    pub fn images(&self, input: &[usize]) -> Owner {
        match self.by_leading(input) {
            Owner::Mixed => Owner::Unknown,
            o => o,
        }
    }
    /// The same for the planes of an image, `[B, C, …]`.
    pub fn planes(&self, input: &[usize]) -> Owner {
        match self.by_rows(numel(&input[..2]), numel(input)) {
            Owner::Mixed => Owner::Unknown,
            o => o,
        }
    }
    /// For an input whose dimension 0 is the output's: every element of a row of the input influences the whole row of the output (images,
    /// sequences).
    pub fn by_leading(&self, input: &[usize]) -> Owner {
        self.by_rows(self.shape.first().copied().unwrap_or(1), numel(input))
    }
    /// For an input of `to` elements in the same number of `rows` as the output: every element of a row influences the whole row of the
    /// output.
    pub fn by_rows(&self, rows: usize, to: usize) -> Owner {
        let (Some(width), Some(wide)) = (self.numel().checked_div(rows), to.checked_div(rows)) else {
            return self.owner.clone();
        };
        match self.owner {
            Owner::Every { run } if width > 0 && run.is_multiple_of(width) => Owner::Every { run: run / width * wide },
            // A sample has less than a row, and the elements of a row are mixed.
            Owner::Every { .. } if self.count > 1 && self.numel() > 0 => Owner::Mixed,
            Owner::Rows { samples, width: w } if width > 0 && w.is_multiple_of(width) => {
                Owner::Rows { samples: samples.clone(), width: w / width * wide }
            }
            Owner::All => Owner::All,
            Owner::Routed(_) if wide > 0 => self.same(),
            _ => Owner::Unknown,
        }
    }
    /// The owner of each of the output's `rows` equal stretches, if each has one that can be determined on the host.
    pub fn owners_of(&self, rows: usize) -> Option<Vec<u32>> {
        self.owner.of_rows(rows, self.numel(), self.count)
    }
    /// For an input of rows of `width` elements, where row r influences only the output's row `to[r]`; the output has `rows` rows.
    pub fn sent(&self, rows: usize, to: &[u32], width: usize) -> Owner {
        match (self.owner, self.owners_of(rows)) {
            (Owner::All, _) => Owner::All,
            (_, Some(of)) => {
                let ids = to.iter().map(|&r| of[r as usize]).collect();
                Samples::owners(ids, self.count).map_or(Owner::Unknown, |s| Owner::rows(&s, width))
            }
            _ => Owner::Unknown,
        }
    }
    /// For an input of `n` rows of `width` elements, of which row `from[r]` influences the output's row r. Rows that influence rows of two
    /// samples are [`Owner::Mixed`]; if a row influences no sample's row, the result is unknown.
    pub fn taken(&self, from: &[u32], n: usize, width: usize) -> Owner {
        match (self.owner, self.owners_of(from.len())) {
            (Owner::All, _) => Owner::All,
            (_, Some(of)) => {
                let mut ids = vec![u32::MAX; n];
                for (&r, &o) in from.iter().zip(&of) {
                    let id = &mut ids[r as usize];
                    if *id != u32::MAX && *id != o {
                        return Owner::Mixed;
                    }
                    *id = o;
                }
                Samples::owners(ids, self.count).map_or(Owner::Unknown, |s| Owner::rows(&s, width))
            }
            _ => Owner::Unknown,
        }
    }
    /// The owner of each of `tokens`, for which the output has one row each; handles [`Owner::Routed`].
    pub fn tokens(&self, tokens: usize) -> Owner {
        self.by_rows(tokens, tokens)
    }
    /// Whether a factor of this operation may have these samples.
    pub(super) fn fits(&self, factor: &Factor) -> bool {
        let samples = match factor {
            Factor::Dense { .. } => return true,
            Factor::PerSample { grads } => Samples::uniform(grads.shape()[0], 1),
            Factor::Outer { samples, .. }
            | Factor::RowSum { samples, .. }
            | Factor::ScaledRowSum { samples, .. }
            | Factor::Lookup { samples, .. }
            | Factor::GroupedOuter { samples, .. } => samples.clone(),
        };
        // A number of samples other than that of the losses is refused elsewhere.
        if samples.count() != self.count || self.numel() == 0 {
            return true;
        }
        match self.owner {
            Owner::All => false,
            Owner::Unknown | Owner::Mixed | Owner::Routed(_) => true,
            Owner::Every { run } if run * self.count == self.numel() && matches!(samples, Samples::Uniform { .. }) => {
                true
            }
            _ if !samples.is_on_host() => true,
            Owner::Rows { samples: own, .. } if own.is_same(&samples) => true,
            // The rows of a factor are those of the output if their number divides the output's elements; for a convolution they are not,
            // unless each image is one row.
            _ => match (self.owners_of(samples.rows()), samples) {
                (Some(own), samples) => own == samples.owner_ids(),
                (None, Samples::Uniform { .. }) => !matches!(self.owner, Owner::Every { .. }),
                _ => true,
            },
        }
    }
    pub(super) fn is_followed(&self) -> bool {
        !matches!(self.owner, Owner::Unknown | Owner::Mixed) && self.count > 1
    }
}

/// The owners of the values in the history during one backward pass.
pub(super) struct Following {
    count: usize,
    owners: HashMap<u64, Owner>,
    /// For values that all samples use: the name and position of the operation that reduced many elements to them, or of the last
    /// operation.
    shared: HashMap<u64, (&'static str, u64, bool)>,
    /// Whether every operation so far declared the owners of its inputs.
    pub complete: bool,
}

impl Following {
    /// Starts from a vector of losses.
    pub fn from(root: u64, count: usize) -> Following {
        Following { count, owners: [(root, Owner::Every { run: 1 })].into(), shared: HashMap::new(), complete: true }
    }
    /// The owner of a node's value, after all its uses have been visited.
    pub fn take(&mut self, id: u64) -> Owner {
        self.owners.remove(&id).unwrap_or(Owner::Unknown)
    }
    pub fn whose<'a>(&self, owner: &'a Owner, shape: &'a [usize], history: &'a [bool]) -> Whose<'a> {
        Whose { owner, count: self.count, shape, history }
    }
    /// Adds the owner that operation `op` (its name and its output's node) requires of an input. If it contradicts another use, returns the
    /// operation that mixes samples.
    pub fn ask(&mut self, op: (&'static str, &Node), input: &Node, owner: Owner) -> Option<(&'static str, u64)> {
        let (name, node) = op;
        // A value that was broadcast is not the cause of the mixing; the operation that reduced many elements to it is.
        let broadcast = numel(&input.shape) <= numel(&node.shape) && fits_by_broadcast(&input.shape, &node.shape);
        let mut found = (name, node.place, !broadcast);
        if matches!(owner, Owner::All) {
            if let Some(before) = self.shared.get(&node.id).filter(|before| before.2) {
                found = *before;
            }
            self.shared.insert(input.id, found);
        }
        self.complete &= !matches!(owner, Owner::Unknown | Owner::Mixed);
        let before = self.owners.remove(&input.id).unwrap_or(Owner::Unknown);
        let both = before.and(owner, numel(&input.shape), self.count);
        let mixed = matches!(both, Owner::Mixed);
        self.complete &= !mixed;
        self.owners.insert(input.id, if mixed { Owner::Unknown } else { both });
        let found = self.shared.get(&input.id).copied().unwrap_or(found);
        mixed.then_some((found.0, found.1))
    }
}

/// Whether the first shape broadcasts to the second.
fn fits_by_broadcast(from: &[usize], to: &[usize]) -> bool {
    from.len() <= to.len() && from.iter().rev().zip(to.iter().rev()).all(|(&f, &t)| f == t || f == 1)
}

/// Owners of one input.
pub(crate) fn one(owner: Owner) -> SmallVec<[Owner; 3]> {
    SmallVec::from_iter([owner])
}
