//! Hypergraphs, which consist of nodes and of hyperedges. A hyperedge is a set of nodes and has a kind.

use crate::Samples;
use crate::array::Array;
use crate::autograd::Segments;
use crate::base::{Error, Result};
use crate::nn::hypergraph::Structure;
use crate::ops::incidence::Incidence;
use crate::random::Rng;
use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;

/// Kinds of the hyperedges of a table.
pub mod kind {
    /// The whole table.
    pub const TABLE: u16 = 0;
    /// A column.
    pub const COLUMN: u16 = 1;
    /// A row.
    pub const ROW: u16 = 2;
    /// A node's own hyperedge, which has this node alone ([`super::Hypergraph::with_own_edges`]).
    pub const OWN: u16 = 3;
}

/// How a node that occurs twice in one hyperedge is treated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Repeats {
    /// It is an error, which names the node and the hyperedge.
    #[default]
    Refuse,
    /// The node is in the hyperedge once.
    Merge,
    /// The node counts twice.
    Keep,
}

/// A hypergraph, or a batch of them: which nodes each hyperedge has, in both orders, and of which kind it is. Clones are handles.
///
/// ```
/// use prismgrad::data::{Hypergraph, Repeats};
/// # fn main() -> prismgrad::Result<()> {
/// let triangle = Hypergraph::from_sets(3, &[vec![0, 1, 2], vec![2]], Repeats::Refuse)?;
/// let table = Hypergraph::table(2, 3)?; // 6 cells; the table, 3 columns, 2 rows
/// assert_eq!((table.nodes(), table.edges(), table.incidences()), (6, 6, 18));
/// let both = Hypergraph::batch(&[triangle, table])?;
/// assert_eq!((both.nodes(), both.edges(), both.samples()), (9, 8, 2));
/// assert_eq!(both.set(2), [3, 4, 5, 6, 7, 8]); // the table's first hyperedge, its nodes after the triangle's
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Hypergraph {
    structure: Structure,
    kinds: Vec<u16>,
}

impl Hypergraph {
    /// A hypergraph from (node, hyperedge) pairs in any order. A hyperedge may be empty, and a node may be in none. Fails for numbers
    /// outside the ranges and, with [`Repeats::Refuse`], for pairs that occur twice.
    pub fn from_pairs(nodes: usize, edges: usize, pairs: &[(u32, u32)], repeats: Repeats) -> Result<Hypergraph> {
        let mut sets = vec![Vec::new(); edges];
        for (i, &(node, edge)) in pairs.iter().enumerate() {
            let set = sets.get_mut(edge as usize).ok_or_else(|| {
                let message = format!("pair {i} names hyperedge {edge}; they are 0..{edges}");
                Error::invalid("Hypergraph::from_pairs", message)
            })?;
            set.push(node);
        }
        Hypergraph::from_sets(nodes, &sets, repeats)
    }
    /// A hypergraph from the nodes of each hyperedge.
    pub fn from_sets(nodes: usize, sets: &[Vec<u32>], repeats: Repeats) -> Result<Hypergraph> {
        let op = "hypergraph";
        // The last hyperedge in which each node occurred.
        let mut seen = vec![u32::MAX; nodes];
        let (mut members, mut lengths) = (Vec::new(), Vec::with_capacity(sets.len()));
        for (e, set) in sets.iter().enumerate() {
            let before = members.len();
            for &v in set {
                let last = seen.get_mut(v as usize).ok_or_else(|| {
                    Error::invalid(op, format!("hyperedge {e} has node {v}; the nodes are 0..{nodes}"))
                })?;
                let again = std::mem::replace(last, e as u32) == e as u32;
                match repeats {
                    Repeats::Refuse if again => {
                        let message =
                            format!("hyperedge {e} has node {v} twice; merge or keep repeats, or leave one out");
                        return Err(Error::invalid(op, message));
                    }
                    Repeats::Merge if again => {}
                    _ => members.push(v),
                }
            }
            lengths.push(members.len() - before);
        }
        let nodes_of = Incidence::new(&Segments::lengths(&lengths), members, nodes)?;
        Ok(Hypergraph { structure: Structure::whole(nodes_of)?, kinds: vec![0; sets.len()] })
    }
    /// A hypergraph from a dense incidence matrix `[nodes, edges]` of zeros and ones.
    pub fn from_dense(incidence: &Array) -> Result<Hypergraph> {
        let op = "Hypergraph::from_dense";
        let &[nodes, edges] = incidence.shape() else {
            let message = format!("an incidence {:?}; it must be [nodes, hyperedges]", incidence.shape());
            return Err(Error::shape(op, message));
        };
        let values = incidence.to_f64();
        let mut sets = vec![Vec::new(); edges];
        for (i, &x) in values.iter().enumerate() {
            let (v, e) = (i / edges, i % edges);
            match x {
                0.0 => {}
                1.0 => sets[e].push(v as u32),
                _ => return Err(Error::invalid(op, format!("{x} at node {v} and hyperedge {e}; 0 and 1 are allowed"))),
            }
        }
        Hypergraph::from_sets(nodes, &sets, Repeats::Refuse)
    }
    /// The hypergraph of a table. It has a node for each cell, row by row. Hyperedge 0 is the whole table; the columns follow, then the
    /// rows. Fails for a table without cells.
    pub fn table(rows: usize, columns: usize) -> Result<Hypergraph> {
        if rows == 0 || columns == 0 {
            let message = format!("a table of {rows} rows and {columns} columns has no cells");
            return Err(Error::invalid("Hypergraph::table", message));
        }
        let cell = |r: usize, c: usize| (r * columns + c) as u32;
        let mut members: Vec<u32> = (0..(rows * columns) as u32).collect();
        (0..columns).for_each(|c| members.extend((0..rows).map(|r| cell(r, c))));
        members.extend(0..(rows * columns) as u32);
        let lengths: Vec<usize> = std::iter::once(rows * columns)
            .chain(std::iter::repeat_n(rows, columns))
            .chain(std::iter::repeat_n(columns, rows))
            .collect();
        let nodes_of = Incidence::new(&Segments::lengths(&lengths), members, rows * columns)?;
        let repeat = |kind, n| std::iter::repeat_n(kind, n);
        let kinds = repeat(kind::TABLE, 1).chain(repeat(kind::COLUMN, columns)).chain(repeat(kind::ROW, rows));
        Ok(Hypergraph { structure: Structure::whole(nodes_of)?, kinds: kinds.collect() })
    }
    /// A hypergraph with texts as nodes and words as hyperedges. A word is a run of letters and digits in lower case, and is kept if the
    /// number of texts that contain it lies in `texts_with_it`. Also returns the word of each hyperedge, in alphabetical order.
    pub fn of_words<T: AsRef<str>>(
        texts: &[T],
        texts_with_it: RangeInclusive<usize>,
    ) -> Result<(Hypergraph, Vec<String>)> {
        let mut sets: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (i, text) in texts.iter().enumerate() {
            let text = text.as_ref().to_lowercase();
            for word in text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()) {
                let set = match sets.get_mut(word) {
                    Some(set) => set,
                    None => sets.entry(word.to_string()).or_default(),
                };
                if set.last() != Some(&(i as u32)) {
                    set.push(i as u32);
                }
            }
        }
        sets.retain(|_, set| texts_with_it.contains(&set.len()));
        let (words, sets): (Vec<String>, Vec<Vec<u32>>) = sets.into_iter().unzip();
        Ok((Hypergraph::from_sets(texts.len(), &sets, Repeats::Refuse)?, words))
    }
    /// Joins several hypergraphs into one, in which each is a sample. Nodes and hyperedges of each are numbered after those of the one
    /// before. A hypergraph without nodes or without hyperedges still counts as a sample.
    pub fn batch(graphs: &[Hypergraph]) -> Result<Hypergraph> {
        let (mut members, mut lengths, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
        let (mut nodes, mut edges) = (vec![0], vec![0]);
        for (i, g) in graphs.iter().enumerate() {
            if g.samples() != 1 {
                let message = format!("hypergraph {i} is a batch of {} already", g.samples());
                return Err(Error::invalid("Hypergraph::batch", message));
            }
            let first = nodes[i];
            members.extend(g.nodes_of().members().iter().map(|&v| v + first as u32));
            lengths.extend((0..g.edges()).map(|e| g.set(e).len()));
            kinds.extend(&g.kinds);
            nodes.push(first + g.nodes());
            edges.push(edges[i] + g.edges());
        }
        let nodes_of = Incidence::new(&Segments::lengths(&lengths), members, nodes[graphs.len()])?;
        let structure = Structure::new(nodes_of, Samples::ragged(&nodes)?, Samples::ragged(&edges)?)?;
        Ok(Hypergraph { structure, kinds })
    }
    /// The same hypergraph with a kind for each hyperedge.
    pub fn with_kinds(mut self, kinds: Vec<u16>) -> Result<Hypergraph> {
        if kinds.len() != self.edges() {
            let message = format!("{} kinds for {} hyperedges", kinds.len(), self.edges());
            return Err(Error::shape("Hypergraph::with_kinds", message));
        }
        self.kinds = kinds;
        Ok(self)
    }
    /// The same hypergraph with one more hyperedge for each node, which contains only this node. The new hyperedges come last, in the order
    /// of the nodes; in a batch, after the hyperedges of all samples.
    pub fn with_own_edges(&self) -> Result<Hypergraph> {
        let (n, s) = (self.nodes(), &self.structure);
        let members = s.nodes_of().members().iter().copied().chain(0..n as u32).collect();
        let lengths: Vec<usize> =
            (0..self.edges()).map(|e| self.set(e).len()).chain(std::iter::repeat_n(1, n)).collect();
        let owners = s.edges().owner_ids().into_iter().chain(s.nodes().owner_ids()).collect();
        let edges = Samples::owners(owners, self.samples())?;
        let nodes_of = Incidence::new(&Segments::lengths(&lengths), members, n)?;
        let kinds = self.kinds.iter().copied().chain(std::iter::repeat_n(kind::OWN, n)).collect();
        Ok(Hypergraph { structure: Structure::new(nodes_of, s.nodes().clone(), edges)?, kinds })
    }
    /// The same hypergraph without the incidences for which `keep(node, hyperedge)` is false. Nodes and hyperedges stay, even if empty.
    pub fn filtered(&self, mut keep: impl FnMut(u32, u32) -> bool) -> Result<Hypergraph> {
        let s = &self.structure;
        let (mut members, mut lengths) = (Vec::new(), vec![0; self.edges()]);
        for (&v, &e) in s.nodes_of().members().iter().zip(s.nodes_of().segments().ids().iter()) {
            if keep(v, e) {
                members.push(v);
                lengths[e as usize] += 1;
            }
        }
        let nodes_of = Incidence::new(&Segments::lengths(&lengths), members, self.nodes())?;
        let structure = Structure::new(nodes_of, s.nodes().clone(), s.edges().clone())?;
        Ok(Hypergraph { structure, kinds: self.kinds.clone() })
    }
    /// The same hypergraph with each incidence left out with probability `p`, except those of nodes' own hyperedges.
    pub fn thinned(&self, p: f64, rng: &mut Rng) -> Result<Hypergraph> {
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::invalid("Hypergraph::thinned", format!("probability {p}; it must lie in [0, 1]")));
        }
        self.filtered(|_, e| self.kinds[e as usize] == kind::OWN || rng.uniform() >= p)
    }
    /// A hypergraph with the same sizes of hyperedges and degrees of nodes, but other members. Pairs of incidences exchange their nodes, in
    /// ten times as many attempts as there are incidences, without making a node a member twice. It serves as a control: a model's gain
    /// from structure must disappear with it.
    pub fn rewired(&self, rng: &mut Rng) -> Result<Hypergraph> {
        let s = &self.structure;
        let mut members = s.nodes_of().members().to_vec();
        let of = s.nodes_of().segments().ids().clone();
        let (nodes, n) = (s.nodes().owner_ids(), members.len());
        let mut there: HashSet<(u32, u32)> = members.iter().copied().zip(of.iter().copied()).collect();
        let draw = |rng: &mut Rng| rng.below(n as u64) as usize;
        for _ in 0..10 * n {
            let (i, j) = (draw(rng), draw(rng));
            let (a, b) = ((members[i], of[i]), (members[j], of[j]));
            let (x, y) = ((b.0, a.1), (a.0, b.1));
            let same_sample = nodes[a.0 as usize] == nodes[b.0 as usize];
            if a.0 == b.0 || a.1 == b.1 || !same_sample || there.contains(&x) || there.contains(&y) {
                continue;
            }
            there.remove(&a);
            there.remove(&b);
            there.insert(x);
            there.insert(y);
            members.swap(i, j);
        }
        let nodes_of = Incidence::new(s.nodes_of().segments(), members, self.nodes())?;
        let structure = Structure::new(nodes_of, s.nodes().clone(), s.edges().clone())?;
        Ok(Hypergraph { structure, kinds: self.kinds.clone() })
    }
    /// The structure that layers use.
    pub fn structure(&self) -> &Structure {
        &self.structure
    }
    /// The nodes of each hyperedge.
    pub fn nodes_of(&self) -> &Incidence {
        self.structure.nodes_of()
    }
    /// The nodes of one hyperedge.
    pub fn set(&self, edge: usize) -> &[u32] {
        self.nodes_of().set(edge)
    }
    /// The kind of each hyperedge.
    pub fn kinds(&self) -> &[u16] {
        &self.kinds
    }
    /// The numbers of the hyperedges of a kind.
    pub fn of_kind(&self, kind: u16) -> Vec<u32> {
        (0..self.edges() as u32).filter(|&e| self.kinds[e as usize] == kind).collect()
    }
    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.nodes_of().sources()
    }
    /// Number of hyperedges.
    pub fn edges(&self) -> usize {
        self.nodes_of().targets()
    }
    /// Number of (node, hyperedge) pairs.
    pub fn incidences(&self) -> usize {
        self.nodes_of().len()
    }
    /// Number of hypergraphs in a batch; 1 otherwise.
    pub fn samples(&self) -> usize {
        self.structure.nodes().count()
    }
}
