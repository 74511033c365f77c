//! A batch of tables as one hypergraph.

use super::tokens::{Encoded, TableTokenizer};
use crate::array::Array;
use crate::autograd::{Samples, Segments};
use crate::base::{Error, Result};
use crate::data::Hypergraph;
use crate::data::hypergraph::kind;
use crate::nn::hypergraph::Structure;
use crate::random::Rng;

/// Which hyperedges contain their cells; the others are empty. By default all contain them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sets {
    /// The hyperedge of the whole table.
    pub table: bool,
    /// The hyperedges of the columns.
    pub columns: bool,
    /// The hyperedges of the rows.
    pub rows: bool,
}

impl Default for Sets {
    fn default() -> Self {
        Sets { table: true, columns: true, rows: true }
    }
}

/// A batch of tables, each of which is a sample. Hyperedges are ordered by table; for each table first its own, then those of the columns,
/// then those of the rows. The cells' own hyperedges come after those of all tables.
#[derive(Clone, Debug)]
pub struct TableBatch {
    graph: Hypergraph,
    structure: Structure,
    ids: Array,
    bags: Segments,
    shapes: Vec<(usize, usize)>,
    /// The first hyperedge and the first cell of each table.
    first: Vec<(usize, usize)>,
}

impl TableBatch {
    /// The tables as a hypergraph with `sets`, and their tokens.
    pub fn new(tables: &[&Encoded], tokenizer: &TableTokenizer, sets: Sets) -> Result<TableBatch> {
        let mut graphs = Vec::with_capacity(tables.len());
        let (mut shapes, mut first, mut at) = (Vec::new(), Vec::new(), (0, 0));
        for (i, t) in tables.iter().enumerate() {
            if t.headers.len() != t.columns || t.cells.len() != t.rows * t.columns {
                let message = format!(
                    "table {i} has {} headers and {} cells for {} rows and {} columns",
                    t.headers.len(),
                    t.cells.len(),
                    t.rows,
                    t.columns
                );
                return Err(Error::shape("TableBatch", message));
            }
            graphs.push(Hypergraph::table(t.rows, t.columns)?);
            shapes.push((t.rows, t.columns));
            first.push(at);
            at = (at.0 + 1 + t.rows + t.columns, at.1 + t.rows * t.columns);
        }
        let mut graph = Hypergraph::batch(&graphs)?;
        if sets != Sets::default() {
            let kinds = graph.kinds().to_vec();
            let kept = |k: u16| match k {
                kind::TABLE => sets.table,
                kind::COLUMN => sets.columns,
                _ => sets.rows,
            };
            graph = graph.filtered(|_, e| kept(kinds[e as usize]))?;
        }
        let graph = graph.with_own_edges()?;
        let (mut ids, mut lengths) = (Vec::new(), Vec::new());
        let mut text = |tokens: &[u32], missing: u32| {
            let tokens = if tokens.is_empty() { std::slice::from_ref(&missing) } else { tokens };
            ids.extend_from_slice(tokens);
            lengths.push(tokens.len());
        };
        for t in tables {
            text(&t.caption, tokenizer.missing_caption());
            t.headers.iter().for_each(|h| text(h, tokenizer.missing_header()));
            (0..t.rows).for_each(|_| text(&[], tokenizer.row()));
        }
        tables.iter().flat_map(|t| &t.cells).for_each(|c| text(c, tokenizer.missing_cell()));
        let ids = Array::from_slice(&ids, &[ids.len()])?;
        let structure = graph.structure().clone();
        Ok(TableBatch { graph, structure, ids, bags: Segments::lengths(&lengths), shapes, first })
    }
    /// The same batch with sums that do not depend on the order of rows and columns, to the bit; see [`Structure::by_values`].
    pub fn by_values(mut self) -> TableBatch {
        self.structure = self.structure.by_values();
        self
    }
    /// The same batch with each incidence left out with probability `p`, except those of the cells' own hyperedges. This is a view of the
    /// contrastive objective.
    pub fn thinned(&self, p: f64, rng: &mut Rng) -> Result<TableBatch> {
        let graph = self.graph.thinned(p, rng)?;
        Ok(TableBatch { structure: graph.structure().clone(), graph, ..self.clone() })
    }
    /// The hypergraph.
    pub fn graph(&self) -> &Hypergraph {
        &self.graph
    }
    /// The structure that the layers use.
    pub fn structure(&self) -> &Structure {
        &self.structure
    }
    /// The tokens of the texts: first those of the hyperedges that are not cells' own, then those of the cells.
    pub fn tokens(&self) -> (&Array, &Segments) {
        (&self.ids, &self.bags)
    }
    /// Number of tables.
    pub fn tables(&self) -> usize {
        self.shapes.len()
    }
    /// Number of rows and columns of a table.
    pub fn shape(&self, table: usize) -> (usize, usize) {
        self.shapes[table]
    }
    /// Number of hyperedges that are not cells' own.
    pub fn sets(&self) -> usize {
        self.graph.edges() - self.graph.nodes()
    }
    /// The hyperedge of each table.
    pub fn table_edges(&self) -> Vec<u32> {
        self.first.iter().map(|f| f.0 as u32).collect()
    }
    /// The hyperedge of each column of each table, and the number of the table.
    pub fn column_edges(&self) -> (Vec<u32>, Vec<u32>) {
        let of = |t: usize| (0..self.shapes[t].1).map(move |c| ((self.first[t].0 + 1 + c) as u32, t as u32));
        (0..self.tables()).flat_map(of).unzip()
    }
    /// The numbers of the cells of a table, as a range.
    pub fn cells_of(&self, table: usize) -> std::ops::Range<usize> {
        let (r, c) = self.shapes[table];
        self.first[table].1..self.first[table].1 + r * c
    }
    /// The map of cells to samples.
    pub fn cell_samples(&self) -> &Samples {
        self.structure.nodes()
    }
}
