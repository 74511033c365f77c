//! Several tables as one hypergraph.

use super::tokens::{Encoded, TableTokenizer};
use crate::array::Array;
use crate::autograd::{Samples, Segments};
use crate::base::{Error, Result};
use crate::data::Hypergraph;
use crate::data::hypergraph::kind;
use crate::nn::hypergraph::Structure;
use crate::random::Rng;

/// Which hyperedges have their cells; the others are empty. All of them by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sets {
    /// That of the whole table.
    pub table: bool,
    /// Those of the columns.
    pub columns: bool,
    /// Those of the rows.
    pub rows: bool,
}

impl Default for Sets {
    fn default() -> Self {
        Sets { table: true, columns: true, rows: true }
    }
}

/// A batch of tables: one sample each. Hyperedges come by table, in each the table's, the columns', the rows'; after all of them come the
/// cells' own.
#[derive(Clone, Debug)]
pub struct TableBatch {
    graph: Hypergraph,
    structure: Structure,
    ids: Array,
    bags: Segments,
    shapes: Vec<(usize, usize)>,
    /// Of each table, its first hyperedge and its first cell.
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
    /// The same with sums that do not depend on the order of rows and columns, to the bit; see [`Structure::by_values`].
    pub fn by_values(mut self) -> TableBatch {
        self.structure = self.structure.by_values();
        self
    }
    /// The same with each incidence left out with probability `p`, but for the cells' own hyperedges: a view of the contrastive objective.
    pub fn thinned(&self, p: f64, rng: &mut Rng) -> Result<TableBatch> {
        let graph = self.graph.thinned(p, rng)?;
        Ok(TableBatch { structure: graph.structure().clone(), graph, ..self.clone() })
    }
    /// The hypergraph.
    pub fn graph(&self) -> &Hypergraph {
        &self.graph
    }
    /// What the layers take.
    pub fn structure(&self) -> &Structure {
        &self.structure
    }
    /// Tokens of the texts: of the hyperedges that are not cells' own, then of the cells.
    pub fn tokens(&self) -> (&Array, &Segments) {
        (&self.ids, &self.bags)
    }
    /// Number of tables.
    pub fn tables(&self) -> usize {
        self.shapes.len()
    }
    /// Rows and columns of a table.
    pub fn shape(&self, table: usize) -> (usize, usize) {
        self.shapes[table]
    }
    /// Hyperedges that are not cells' own.
    pub fn sets(&self) -> usize {
        self.graph.edges() - self.graph.nodes()
    }
    /// The hyperedge of each table.
    pub fn table_edges(&self) -> Vec<u32> {
        self.first.iter().map(|f| f.0 as u32).collect()
    }
    /// The hyperedge of each column of each table, and whose it is.
    pub fn column_edges(&self) -> (Vec<u32>, Vec<u32>) {
        let of = |t: usize| (0..self.shapes[t].1).map(move |c| ((self.first[t].0 + 1 + c) as u32, t as u32));
        (0..self.tables()).flat_map(of).unzip()
    }
    /// The cells of a table: the first, and how many.
    pub fn cells_of(&self, table: usize) -> std::ops::Range<usize> {
        let (r, c) = self.shapes[table];
        self.first[table].1..self.first[table].1 + r * c
    }
    /// Whose cells.
    pub fn cell_samples(&self) -> &Samples {
        self.structure.nodes()
    }
}
