//! Segments of consecutive rows of any length, and rows in groups.

use super::Samples;
use crate::array::Array;
use crate::array::cuda::{ids_below, on};
use crate::base::{DType, Error, Result};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::cuda::Gpu;
use crate::kernels::rows;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

/// Consecutive rows in segments: segment s is rows `offsets[s]..offsets[s + 1]`. The offsets are validated once; clones are handles.
///
/// ```
/// use prismgrad::ops::segment::Segments;
/// let s = Segments::new(&[0, 2, 2, 5]).unwrap(); // segments of 2, 0 and 3 rows
/// assert_eq!((s.count(), s.rows(), s.range(2)), (3, 5, 2..5));
/// assert!(Segments::new(&[0, 3, 2]).is_err());
/// ```
///
/// Segments that were made from ids on a GPU ([`Segments::of_sorted_ids`]) stay there: ops on that GPU read nothing back to the host.
#[derive(Clone, Debug)]
pub struct Segments(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    count: usize,
    rows: usize,
    host: OnceLock<Host>,
    on_gpu: Mutex<Option<SegmentsOnGpu>>,
}

#[derive(Debug)]
struct Host {
    offsets: Vec<usize>,
    ids: Arc<Vec<u32>>,
}

/// Segments in a GPU's memory.
#[derive(Clone, Debug)]
pub(crate) struct SegmentsOnGpu {
    /// `[S + 1]` i64.
    pub offsets: Array,
    /// `[N]` u32: the segment of each row.
    pub owner: Array,
}

impl SegmentsOnGpu {
    /// Number of segments.
    pub fn count(&self) -> usize {
        self.offsets.numel() - 1
    }
}

impl Segments {
    fn from_host(offsets: Vec<usize>) -> Segments {
        let lengths = offsets.windows(2).map(|w| w[1] - w[0]);
        let ids: Vec<u32> = lengths.enumerate().flat_map(|(s, n)| std::iter::repeat_n(s as u32, n)).collect();
        let (count, rows) = (offsets.len() - 1, ids.len());
        let host = OnceLock::from(Host { offsets, ids: Arc::new(ids) });
        Segments(Arc::new(Inner { count, rows, host, on_gpu: Mutex::default() }))
    }
    /// Segments from offsets `[S + 1]`, which start with 0 and never decrease.
    pub fn new(offsets: &[usize]) -> Result<Segments> {
        if offsets.first() != Some(&0) {
            return Err(Error::invalid("segments", format!("offsets must begin with 0, got {:?}", offsets.first())));
        }
        if let Some(i) = (1..offsets.len()).find(|&i| offsets[i] < offsets[i - 1]) {
            return Err(Error::invalid(
                "segments",
                format!("offsets must never fall: {} follows {} at position {i}", offsets[i], offsets[i - 1]),
            ));
        }
        Ok(Segments::from_host(offsets.to_vec()))
    }
    /// Segments from the number of rows of each.
    pub fn lengths(lengths: &[usize]) -> Segments {
        let ends = lengths.iter().scan(0, |at, &n| {
            *at += n;
            Some(*at)
        });
        Segments::from_host(std::iter::once(0).chain(ends).collect())
    }
    /// Segments from the segment of each row, `ids [N]` (u32) in ascending order and below `count`. Ids on a GPU stay there: a kernel
    /// computes the offsets, and nothing waits for it. There, an id that is not below `count` is replaced by 0 and reported as an error
    /// when the host next reads from the device; the order of the ids is not checked.
    pub fn of_sorted_ids(ids: &Array, count: usize) -> Result<Segments> {
        if ids.rank() != 1 || ids.dtype() != DType::U32 {
            let message = format!("the segment of each row must be [N] u32, got {:?} {}", ids.shape(), ids.dtype());
            return Err(Error::shape("segments", message));
        }
        if let Some(gpu) = ids.gpu() {
            let owner = ids_below(gpu, ids, count, &format!("segments: {count} segments"))?;
            return Segments::of_sorted_on(gpu, owner, count);
        }
        let ids = ids.to_vec::<u32>()?;
        if !ids.is_sorted() || ids.last().is_some_and(|&id| id as usize >= count) {
            let message = format!("the segments of the rows must rise and lie below {count}");
            return Err(Error::invalid("segments", message));
        }
        let mut lengths = vec![0; count];
        ids.iter().for_each(|&id| lengths[id as usize] += 1);
        Ok(Segments::lengths(&lengths))
    }
    /// Segments from the segment of each row on a GPU, sorted and below `count`.
    pub(crate) fn of_sorted_on(gpu: &Arc<Gpu>, owner: Array, count: usize) -> Result<Segments> {
        let (rows, offsets) = (owner.numel(), rows::cuda::run_starts(gpu, &owner, count)?);
        let on_gpu = Mutex::new(Some(SegmentsOnGpu { offsets, owner }));
        Ok(Segments(Arc::new(Inner { count, rows, host: OnceLock::new(), on_gpu })))
    }
    /// `count` segments of `each` rows.
    pub fn uniform(count: usize, each: usize) -> Segments {
        Segments::lengths(&vec![each; count])
    }
    /// The segments in a GPU's memory; they are copied there once.
    pub(crate) fn on_gpu(&self, gpu: &Arc<Gpu>) -> Result<SegmentsOnGpu> {
        let mut slot = self.0.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(there) = &*slot
            && there.offsets.gpu().is_some_and(|g| g.ordinal() == gpu.ordinal())
        {
            return Ok(there.clone());
        }
        let host = match &*slot {
            // The stored copy is on another GPU.
            Some(there) => SegmentsOnGpu { offsets: there.offsets.clone(), owner: there.owner.clone() },
            None => {
                let host = self.host();
                let offsets: Vec<i64> = host.offsets.iter().map(|&o| o as i64).collect();
                SegmentsOnGpu {
                    offsets: Array::from_slice(&offsets, &[offsets.len()])?,
                    owner: Array::from_slice(&host.ids, &[host.ids.len()])?,
                }
            }
        };
        let there = SegmentsOnGpu { offsets: on(gpu, &host.offsets)?, owner: on(gpu, &host.owner)? };
        *slot = Some(there.clone());
        Ok(there)
    }
    /// The segments on the CPU. Those that were made on a GPU are read back at the first call, which waits for it. This function cannot
    /// return an error, so if the GPU fails it panics with the GPU's message.
    fn host(&self) -> &Host {
        self.0.host.get_or_init(|| {
            let slot = self.0.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
            let read = || -> Result<Host> {
                let there = slot.as_ref().ok_or_else(|| Error::invalid("segments", "they are nowhere"))?;
                let offsets = there.offsets.to_vec::<i64>()?.into_iter().map(|o| o as usize).collect();
                Ok(Host { offsets, ids: Arc::new(there.owner.to_vec::<u32>()?) })
            };
            read().unwrap_or_else(|e| panic!("{e}"))
        })
    }
    /// The segment of each row, if it is available on the host without waiting for a GPU.
    pub(crate) fn known_ids(&self) -> Option<&[u32]> {
        self.0.host.get().map(|h| &h.ids[..])
    }
    /// Number of segments.
    pub fn count(&self) -> usize {
        self.0.count
    }
    /// Total number of rows.
    pub fn rows(&self) -> usize {
        self.0.rows
    }
    /// Rows of segment `s`.
    pub fn range(&self, s: usize) -> Range<usize> {
        let offsets = self.offsets();
        offsets[s]..offsets[s + 1]
    }
    /// The offsets, `[S + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.host().offsets
    }
    /// The segment of every row.
    pub fn ids(&self) -> &Arc<Vec<u32>> {
        &self.host().ids
    }
    /// The sample map in which each segment is a sample.
    pub fn samples(&self) -> Samples {
        // The offsets were validated at construction.
        Samples::ragged(self.offsets()).unwrap_or_else(|_| Samples::uniform(0, 0))
    }
    /// The row map of samples that consist of whole segments: `samples` maps segments to samples, the result maps rows.
    pub fn rows_of(&self, samples: &Samples) -> Result<Samples> {
        if samples.rows() != self.count() {
            return Err(Error::shape(
                "segments",
                format!("the samples map {} of {} segments", samples.rows(), self.count()),
            ));
        }
        Samples::owners(self.ids().iter().map(|&s| samples.owner(s as usize) as u32).collect(), samples.count())
    }
    pub(crate) fn expect_rows(&self, op: &'static str, rows: usize) -> Result<()> {
        if rows == self.rows() {
            return Ok(());
        }
        Err(Error::shape(op, format!("the offsets cover {} rows, the input has {rows}", self.rows())))
    }
    /// Number of segments in one parallel piece: about [`GRAIN`] elements of rows of `width`.
    pub(crate) fn grain(&self, width: usize) -> usize {
        let rows = (self.rows() / self.count().max(1)).max(1);
        (GRAIN / (rows * width.max(1))).max(1)
    }
    /// Runs `f(segment, its rows of out)` for every segment, in parallel pieces; `out` has `width` elements for each row.
    pub(crate) fn par_rows<T: Send>(&self, out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let (offsets, out) = (self.offsets(), Shared::new(out));
        par_chunks(self.count(), self.grain(width), |segments| {
            for s in segments {
                // SAFETY: segments are disjoint runs of rows, since offsets never fall.
                f(s, unsafe { out.slice(offsets[s] * width..offsets[s + 1] * width) });
            }
        });
    }
}

/// Rows in groups, in any order: the block of a grouped parameter to which each row belongs. Clones are handles.
#[derive(Clone, Debug)]
pub struct Groups {
    segments: Segments,
    /// Set if the rows of a group are not consecutive.
    scattered: Option<Arc<Scattered>>,
}

#[derive(Debug)]
struct Scattered {
    /// The group of each row.
    ids: Arc<Vec<u32>>,
    /// Rows sorted by group.
    order: Vec<u32>,
    /// Both, in a GPU's memory.
    on_gpu: Mutex<Option<(Array, Array)>>,
}

impl Groups {
    /// Groups in which the rows of segment e are those of group e.
    pub fn of_segments(segments: &Segments) -> Groups {
        Groups { segments: segments.clone(), scattered: None }
    }
    /// Groups from the group of each row, in any order, below `count`.
    pub fn of_ids(ids: Vec<u32>, count: usize) -> Result<Groups> {
        if let Some(bad) = ids.iter().find(|&&e| e as usize >= count) {
            return Err(Error::invalid("groups", format!("group {bad} of only {count}")));
        }
        let mut lengths = vec![0; count];
        ids.iter().for_each(|&e| lengths[e as usize] += 1);
        let segments = Segments::lengths(&lengths);
        if ids.is_sorted() {
            return Ok(Groups::of_segments(&segments));
        }
        let (mut next, mut order) = (segments.offsets().to_vec(), vec![0u32; ids.len()]);
        for (row, &e) in ids.iter().enumerate() {
            order[next[e as usize]] = row as u32;
            next[e as usize] += 1;
        }
        let scattered = Scattered { ids: Arc::new(ids), order, on_gpu: Mutex::default() };
        Ok(Groups { segments, scattered: Some(Arc::new(scattered)) })
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.segments.rows()
    }
    /// Number of groups.
    pub fn count(&self) -> usize {
        self.segments.count()
    }
    /// The group of every row.
    pub fn ids(&self) -> &Arc<Vec<u32>> {
        self.scattered.as_ref().map_or_else(|| self.segments.ids(), |s| &s.ids)
    }
    /// Whether the rows of every group are consecutive, and the groups in order.
    pub(crate) fn is_sorted(&self) -> bool {
        self.scattered.is_none()
    }
    /// Whether [`Groups::ids`] can return without waiting for a GPU.
    pub(crate) fn is_on_host(&self) -> bool {
        self.segments.0.host.get().is_some()
    }
    /// The groups in a GPU's memory: the group of every row `[N]`, the start of each group among the sorted rows `[count + 1]` i64, and the
    /// sorted rows `[N]` if they are not in order already.
    pub(crate) fn on_gpu(&self, gpu: &Arc<Gpu>) -> Result<(Array, Array, Option<Array>)> {
        let there = self.segments.on_gpu(gpu)?;
        let Some(scattered) = &self.scattered else { return Ok((there.owner, there.offsets, None)) };
        let mut slot = scattered.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
        let (ids, order) = match slot.take() {
            Some((ids, order)) => (on(gpu, &ids)?, on(gpu, &order)?),
            None => {
                let array = |v: &[u32]| on(gpu, &Array::from_slice(v, &[v.len()])?);
                (array(&scattered.ids)?, array(&scattered.order)?)
            }
        };
        *slot = Some((ids.clone(), order.clone()));
        Ok((ids, there.offsets, Some(order)))
    }
    /// The groups of gathered rows: new row j is old row `rows[j]`.
    pub(crate) fn select(&self, rows: &[u32]) -> Result<Groups> {
        let ids = self.ids();
        Groups::of_ids(rows.iter().map(|&r| ids[r as usize]).collect(), self.count())
    }
}
