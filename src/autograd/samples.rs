//! The map from rows to samples.

use crate::array::Array;
use crate::base::{Error, Result};
use crate::device::Device;
use crate::device::cuda::Gpu;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

/// Maps rows to samples. A *sample* is the unit whose gradient is kept apart: a sequence, an image, a table, or all records of one user.
/// Layers see only rows; this map says to which sample each row belongs.
///
/// ```
/// use prismgrad::Samples;
/// let s = Samples::ragged(&[0, 2, 2, 5]).unwrap(); // three samples of 2, 0 and 3 rows
/// assert_eq!((s.count(), s.rows()), (3, 5));
/// assert_eq!(s.owner(4), 2);
/// ```
#[derive(Clone, Debug)]
pub enum Samples {
    /// `count` samples of `each` consecutive rows.
    Uniform {
        /// Number of samples.
        count: usize,
        /// Rows of each.
        each: usize,
    },
    /// Any number of rows per sample, in any order.
    Ragged(Arc<Ragged>),
}

/// The owner of each row, and the rows sorted by owner. A map that was made on a GPU stays there until the host reads it.
#[derive(Debug)]
pub struct Ragged {
    count: usize,
    rows: usize,
    host: OnceLock<Host>,
    on_gpu: Mutex<Option<(usize, Owners)>>,
}

#[derive(Debug)]
struct Host {
    owner: Vec<u32>,
    /// Rows sorted by owner, ascending within each owner; `None` if the rows are sorted already.
    order: Option<Vec<u32>>,
    offsets: Vec<usize>,
}

impl Ragged {
    fn from_host(count: usize, owner: Vec<u32>, order: Option<Vec<u32>>, offsets: Vec<usize>) -> Samples {
        let rows = owner.len();
        let host = OnceLock::from(Host { owner, order, offsets });
        Samples::Ragged(Arc::new(Ragged { count, rows, host, on_gpu: Mutex::default() }))
    }
    /// The map on the host. If it was made on a GPU, it is read back, which waits for the GPU.
    ///
    /// Panics if that read fails, as [`Array::to_f64`] does.
    fn host(&self) -> &Host {
        self.host.get_or_init(|| {
            let slot = self.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
            let read = || -> Result<Host> {
                let (_, there) = slot.as_ref().ok_or_else(|| Error::invalid("samples", "they are nowhere"))?;
                let ids = |a: &Option<Array>| a.as_ref().map(|a| a.to_vec::<u32>()).transpose();
                let offsets = there.offsets.as_ref().map(|o| o.to_vec::<i64>()).transpose()?.unwrap_or_default();
                let offsets = offsets.into_iter().map(|o| o as usize).collect();
                Ok(Host { owner: ids(&there.owner)?.unwrap_or_default(), order: ids(&there.order)?, offsets })
            };
            read().unwrap_or_else(|e| panic!("{e}"))
        })
    }
}

impl Samples {
    /// `count` samples of `each` consecutive rows.
    pub fn uniform(count: usize, each: usize) -> Samples {
        Samples::Uniform { count, each }
    }
    /// Sample `i` owns rows `offsets[i]..offsets[i + 1]`.
    pub fn ragged(offsets: &[usize]) -> Result<Samples> {
        if offsets.first() != Some(&0) || offsets.windows(2).any(|w| w[0] > w[1]) {
            return Err(Error::invalid("Samples::ragged", "offsets must begin with 0 and never fall"));
        }
        let owner =
            offsets.windows(2).enumerate().flat_map(|(i, w)| std::iter::repeat_n(i as u32, w[1] - w[0])).collect();
        Ok(Ragged::from_host(offsets.len() - 1, owner, None, offsets.to_vec()))
    }
    /// Row `r` belongs to sample `owner[r]`, one of `count` samples. Rows may come in any order (routed tokens, several records of one
    /// user), and a sample may have none.
    pub fn owners(owner: Vec<u32>, count: usize) -> Result<Samples> {
        if let Some(bad) = owner.iter().find(|&&o| o as usize >= count) {
            return Err(Error::invalid("Samples::owners", format!("owner {bad} of only {count} samples")));
        }
        let mut offsets = vec![0usize; count + 1];
        owner.iter().for_each(|&o| offsets[o as usize + 1] += 1);
        (0..count).for_each(|i| offsets[i + 1] += offsets[i]);
        let order = (!owner.is_sorted()).then(|| {
            let mut next = offsets.clone();
            let mut order = vec![0u32; owner.len()];
            for (row, &o) in owner.iter().enumerate() {
                order[next[o as usize]] = row as u32;
                next[o as usize] += 1;
            }
            order
        });
        Ok(Ragged::from_host(count, owner, order, offsets))
    }
    /// A map of `rows` rows that was made on a GPU; nothing is read back.
    pub(crate) fn of_gpu(gpu: &Arc<Gpu>, rows: usize, owners: Owners) -> Samples {
        let (count, on_gpu) = (owners.count, Mutex::new(Some((gpu.ordinal(), owners))));
        Samples::Ragged(Arc::new(Ragged { count, rows, host: OnceLock::new(), on_gpu }))
    }
    /// The map of a tensor whose dimension 0 is the sample axis and whose dimensions before the last `row_dims` count rows: `[B, T, d]`
    /// with `row_dims` = 1 is `B` samples of `T` rows.
    pub fn leading(shape: &[usize], row_dims: usize) -> Samples {
        let lead = &shape[..shape.len().saturating_sub(row_dims)];
        match lead.split_first() {
            Some((&b, rest)) => Samples::uniform(b, rest.iter().product()),
            None => Samples::uniform(1, 1),
        }
    }
    /// Number of samples.
    pub fn count(&self) -> usize {
        match self {
            Samples::Uniform { count, .. } => *count,
            Samples::Ragged(r) => r.count,
        }
    }
    /// Total number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Samples::Uniform { count, each } => count * each,
            Samples::Ragged(r) => r.rows,
        }
    }
    /// The sample that owns row `row`.
    pub fn owner(&self, row: usize) -> usize {
        match self {
            Samples::Uniform { each, .. } => row / each.max(&1),
            Samples::Ragged(r) => r.host().owner[row] as usize,
        }
    }
    /// The owner of every row.
    pub fn owner_ids(&self) -> Vec<u32> {
        match self {
            Samples::Uniform { count, each } => {
                (0..*count).flat_map(|i| std::iter::repeat_n(i as u32, *each)).collect()
            }
            Samples::Ragged(r) => r.host().owner.clone(),
        }
    }
    /// Whether the host can read the map without waiting for a GPU.
    pub(crate) fn is_on_host(&self) -> bool {
        match self {
            Samples::Uniform { .. } => true,
            Samples::Ragged(r) => r.host.get().is_some(),
        }
    }
    /// Whether both are the same map. Maps on a GPU are compared by handle only.
    pub(crate) fn is_same(&self, other: &Samples) -> bool {
        match (self, other) {
            (Samples::Uniform { count: a, each: b }, Samples::Uniform { count: c, each: d }) => (a, b) == (c, d),
            (Samples::Ragged(a), Samples::Ragged(b)) if Arc::ptr_eq(a, b) => true,
            (a, b) => a.rows() == b.rows() && a.is_on_host() && b.is_on_host() && a.owner_ids() == b.owner_ids(),
        }
    }
    /// Whether every sample's rows are consecutive, so that [`Samples::range`] gives rows.
    pub fn is_sorted(&self) -> bool {
        match self {
            Samples::Uniform { .. } => true,
            Samples::Ragged(r) => r.host().order.is_none(),
        }
    }
    /// Positions of sample `i` in [`Samples::order`]; these are the rows themselves if the samples are sorted.
    pub fn range(&self, i: usize) -> Range<usize> {
        match self {
            Samples::Uniform { each, .. } => i * each..(i + 1) * each,
            Samples::Ragged(r) => r.host().offsets[i]..r.host().offsets[i + 1],
        }
    }
    /// Rows sorted by sample, or `None` if they are sorted already.
    pub fn order(&self) -> Option<&[u32]> {
        match self {
            Samples::Uniform { .. } => None,
            Samples::Ragged(r) => r.host().order.as_deref(),
        }
    }
    /// The map in a GPU's memory; it is copied there once.
    pub(crate) fn on_gpu(&self, gpu: &Arc<Gpu>) -> Result<Owners> {
        let r = match self {
            Samples::Uniform { count, each } => {
                let (count, each) = (*count, *each);
                return Ok(Owners { each, count, longest: each, owner: None, offsets: None, order: None });
            }
            Samples::Ragged(r) => r,
        };
        let mut slot = r.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((ordinal, owners)) = &*slot
            && *ordinal == gpu.ordinal()
        {
            return Ok(owners.clone());
        }
        let device = Device::Cuda(gpu.clone());
        let there = match &*slot {
            // The stored copy is on another GPU.
            Some((_, there)) => there.clone(),
            None => {
                let (host, ids) = (r.host(), |v: &[u32]| Array::from_slice(v, &[v.len()]));
                let offsets: Vec<i64> = host.offsets.iter().map(|&o| o as i64).collect();
                Owners {
                    each: 0,
                    count: r.count,
                    longest: host.offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0),
                    owner: Some(ids(&host.owner)?),
                    offsets: Some(Array::from_slice(&offsets, &[offsets.len()])?),
                    order: host.order.as_deref().map(ids).transpose()?,
                }
            }
        };
        let to = |a: Option<Array>| a.map(|a| a.to(&device)).transpose();
        let owners = Owners { owner: to(there.owner)?, offsets: to(there.offsets)?, order: to(there.order)?, ..there };
        *slot = Some((gpu.ordinal(), owners.clone()));
        Ok(owners)
    }
    /// The map in which each row becomes `k` consecutive rows of the same sample (attention heads, unfolded pixels).
    pub fn repeat_rows(&self, k: usize) -> Result<Samples> {
        match self {
            Samples::Uniform { count, each } => Ok(Samples::uniform(*count, each * k)),
            Samples::Ragged(r) => {
                let owner = r.host().owner.iter().flat_map(|&o| std::iter::repeat_n(o, k)).collect();
                Samples::owners(owner, r.count)
            }
        }
    }
    /// The map of gathered rows: new row `j` is old row `rows[j]` (dispatch to experts, gathered nodes).
    pub fn select(&self, rows: &[u32]) -> Result<Samples> {
        let n = self.rows();
        if let Some(bad) = rows.iter().find(|&&r| r as usize >= n) {
            return Err(Error::invalid("Samples::select", format!("row {bad} of only {n}")));
        }
        Samples::owners(rows.iter().map(|&r| self.owner(r as usize) as u32).collect(), self.count())
    }
    /// The map of two blocks of rows in sequence (a parameter used twice).
    pub fn concat(&self, other: &Samples) -> Result<Samples> {
        let mut owner = self.owner_ids();
        owner.extend(other.owner_ids());
        Samples::owners(owner, self.count().max(other.count()))
    }
}

/// A map from rows to samples in a GPU's memory, in the form that kernels take.
#[derive(Clone, Debug)]
pub(crate) struct Owners {
    /// Rows of each sample where they are uniform; 0 otherwise.
    pub each: usize,
    /// Number of samples.
    pub count: usize,
    /// Rows of the largest sample.
    pub longest: usize,
    /// `[rows]` u32; `None` where uniform.
    pub owner: Option<Array>,
    /// `[count + 1]` i64; `None` where uniform.
    pub offsets: Option<Array>,
    /// `[rows]` u32, rows sorted by sample; `None` if they are sorted already.
    pub order: Option<Array>,
}
