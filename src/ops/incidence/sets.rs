//! The members of sets, stored in both orders.

use crate::array::Array;
use crate::array::cuda::on;
use crate::autograd::Segments;
use crate::base::{Error, Result};
use crate::device::Device;
use crate::device::cuda::Gpu;
use std::cmp::Ordering;
use std::sync::{Arc, Mutex};

/// The sources of each target: the nodes of each hyperedge, or, after [`Incidence::flipped`], the hyperedges of each node. The structure is
/// validated once; clones are handles.
///
/// ```
/// use prismgrad::ops::incidence::Incidence;
/// use prismgrad::ops::segment::Segments;
/// // Hyperedge 0 has the nodes 2 and 0, hyperedge 1 none, hyperedge 2 node 0.
/// let nodes_of = Incidence::new(&Segments::lengths(&[2, 0, 1]), vec![2, 0, 0], 3).unwrap();
/// assert_eq!((nodes_of.targets(), nodes_of.sources(), nodes_of.len()), (3, 3, 3));
/// let edges_of = nodes_of.flipped();
/// assert_eq!(edges_of.set(0), [0, 2]);
/// assert!(edges_of.set(1).is_empty());
/// ```
#[derive(Clone, Debug)]
pub struct Incidence {
    both: Arc<[Side; 2]>,
    /// The current direction: which of the two sides is the targets.
    side: usize,
}

/// The incidences sorted by target.
#[derive(Debug)]
pub(crate) struct Side {
    pub segments: Segments,
    /// The source of each incidence.
    members: Array,
    /// The position of each incidence in the other order.
    places: Array,
    on_gpu: Mutex<Option<(usize, Array, Array)>>,
}

impl Side {
    fn new(segments: Segments, members: &[u32], places: &[u32]) -> Result<Side> {
        let n = [members.len()];
        let (members, places) = (Array::from_slice(members, &n)?, Array::from_slice(places, &n)?);
        Ok(Side { segments, members, places, on_gpu: Mutex::default() })
    }
    pub fn members(&self) -> &[u32] {
        // The array was made from a slice of this type and is never changed.
        self.members.as_slice().unwrap_or(&[])
    }
    pub fn places(&self) -> &[u32] {
        self.places.as_slice().unwrap_or(&[])
    }
    /// Members and places in a GPU's memory; they are copied there once.
    pub fn on_gpu(&self, gpu: &Arc<Gpu>) -> Result<(Array, Array)> {
        let mut slot = self.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((ordinal, members, places)) = &*slot
            && *ordinal == gpu.ordinal()
        {
            return Ok((members.clone(), places.clone()));
        }
        let there = (on(gpu, &self.members)?, on(gpu, &self.places)?);
        *slot = Some((gpu.ordinal(), there.0.clone(), there.1.clone()));
        Ok(there)
    }
}

impl Incidence {
    /// Sets from the members of each target: `members[i]` for the rows i of a target's segment, below `sources`. A source may occur in a
    /// target's set several times.
    pub fn new(targets: &Segments, members: Vec<u32>, sources: usize) -> Result<Incidence> {
        let op = "incidence";
        targets.expect_rows(op, members.len())?;
        if let Some(i) = members.iter().position(|&m| m as usize >= sources) {
            let t = targets.ids()[i];
            let message = format!("member {} of set {t} is outside 0..{sources}", members[i]);
            return Err(Error::invalid(op, message));
        }
        if targets.count() > u32::MAX as usize || members.len() > u32::MAX as usize {
            return Err(Error::invalid(op, "sets and incidences are counted by 32 bits".to_string()));
        }
        // A counting sort: the incidences of one source stay in the order of the targets.
        let mut lengths = vec![0usize; sources];
        members.iter().for_each(|&m| lengths[m as usize] += 1);
        let other = Segments::lengths(&lengths);
        let mut next = other.offsets().to_vec();
        let (mut places, mut back, mut of) = (vec![0u32; members.len()], vec![0u32; members.len()], members.clone());
        for (i, (&m, &t)) in members.iter().zip(targets.ids().iter()).enumerate() {
            let at = next[m as usize];
            next[m as usize] += 1;
            (places[i], back[at], of[at]) = (at as u32, i as u32, t);
        }
        let sides = [Side::new(targets.clone(), &members, &places)?, Side::new(other, &of, &back)?];
        Ok(Incidence { both: Arc::new(sides), side: 0 })
    }
    /// The incidence with targets and sources exchanged.
    pub fn flipped(&self) -> Incidence {
        Incidence { both: self.both.clone(), side: 1 - self.side }
    }
    pub(crate) fn side(&self) -> &Side {
        &self.both[self.side]
    }
    /// Number of targets.
    pub fn targets(&self) -> usize {
        self.side().segments.count()
    }
    /// Number of sources.
    pub fn sources(&self) -> usize {
        self.both[1 - self.side].segments.count()
    }
    /// Number of incidences.
    pub fn len(&self) -> usize {
        self.members().len()
    }
    /// Whether there are no incidences.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The incidences of each target: segment t is its range in [`Incidence::members`].
    pub fn segments(&self) -> &Segments {
        &self.side().segments
    }
    /// The source of each incidence, sorted by target.
    pub fn members(&self) -> &[u32] {
        self.side().members()
    }
    /// The members of one target's set.
    pub fn set(&self, target: usize) -> &[u32] {
        &self.members()[self.segments().range(target)]
    }
    /// [`Incidence::members`] as an array on a device; it is copied there once.
    pub fn members_on(&self, device: &Device) -> Result<Array> {
        match device {
            Device::Cuda(gpu) => Ok(self.side().on_gpu(gpu)?.0),
            Device::Cpu => Ok(self.side().members.clone()),
        }
    }
    /// The same sets with members sorted by the values of the sources' rows, element by element, instead of by their numbers. Sums over
    /// them then have the same bits however nodes and hyperedges are numbered, since exchanging sources with equal rows makes no
    /// difference. `rows [sources, d]` is read to the host.
    pub fn by_values(&self, rows: &Array) -> Result<Incidence> {
        let op = "Incidence::by_values";
        let &[n, d] = rows.shape() else {
            return Err(Error::shape(op, format!("rows {:?} must be [{}, d]", rows.shape(), self.sources())));
        };
        if n != self.sources() {
            return Err(Error::shape(op, format!("{n} rows for {} sources", self.sources())));
        }
        let v = rows.to_f64();
        let row = |r: usize| &v[r * d..(r + 1) * d];
        let compare = |a: usize, b: usize| {
            let different = row(a).iter().zip(row(b)).map(|(x, y)| x.total_cmp(y)).find(|o| o.is_ne());
            different.unwrap_or(Ordering::Equal)
        };
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_by(|&a, &b| compare(a as usize, b as usize));
        let mut rank = vec![0u32; n];
        order.iter().enumerate().for_each(|(i, &r)| rank[r as usize] = i as u32);
        let mut members = self.members().to_vec();
        (0..self.targets()).for_each(|t| members[self.segments().range(t)].sort_by_key(|&m| rank[m as usize]));
        Incidence::new(self.segments(), members, n)
    }
}
