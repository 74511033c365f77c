//! Conversion of tables to tokens.

use super::clean::{Part, clean, numbers};
use crate::base::{Error, Result};
use crate::data::{Table, Tokenizer};
use std::sync::Arc;

/// Limits on how much of a table the model reads; the default values are the paper's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLimits {
    /// Number of rows, from the top.
    pub rows: usize,
    /// Number of columns, from the left.
    pub columns: usize,
    /// Number of tokens of a cell, a header or the caption.
    pub tokens: usize,
    /// Number of words of each text, before it is cut into tokens.
    pub words: usize,
}

impl Default for TableLimits {
    fn default() -> Self {
        TableLimits { rows: 30, columns: 20, tokens: 64, words: 64 }
    }
}

/// Counts of what was shortened or left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cuts {
    /// Number of tables with more rows than the limit.
    pub rows: usize,
    /// Number of tables with more columns than the limit.
    pub columns: usize,
    /// Number of texts with more words or tokens than the limit.
    pub texts: usize,
    /// Number of rows at the top that repeat the headers and are left out.
    pub header_rows: usize,
}

/// A table as tokens. An empty list of tokens is a missing text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// Tokens of the caption.
    pub caption: Vec<u32>,
    /// Tokens of each column's header.
    pub headers: Vec<Vec<u32>>,
    /// Tokens of each cell, row by row.
    pub cells: Vec<Vec<u32>>,
}

/// Cleans tables and cuts them into tokens. Its vocabulary is that of a tokenizer, followed by five tokens of its own.
#[derive(Clone)]
pub struct TableTokenizer {
    inner: Arc<dyn Tokenizer>,
}

impl TableTokenizer {
    /// A table tokenizer over a tokenizer of words, such as a [`Bpe`](crate::data::bpe::Bpe) trained on the tables' texts.
    pub fn new(inner: impl Tokenizer + 'static) -> TableTokenizer {
        TableTokenizer { inner: Arc::new(inner) }
    }
    /// Number of tokens, including its own five.
    pub fn vocab(&self) -> usize {
        self.inner.vocab_size() + 5
    }
    fn own(&self, i: usize) -> u32 {
        (self.inner.vocab_size() + i) as u32
    }
    /// The token for a missing caption.
    pub fn missing_caption(&self) -> u32 {
        self.own(0)
    }
    /// The token for a missing header.
    pub fn missing_header(&self) -> u32 {
        self.own(1)
    }
    /// The token for a missing cell.
    pub fn missing_cell(&self) -> u32 {
        self.own(2)
    }
    /// The token of every row's hyperedge, which has no text.
    pub fn row(&self) -> u32 {
        self.own(3)
    }
    /// The token between the digits of a number and its power of ten.
    pub fn power(&self) -> u32 {
        self.own(4)
    }
    /// A text in the form in which a tokenizer should be trained on it: cleaned, with the digits of each number as a word of their own.
    pub fn learnable(text: &str) -> String {
        let text = clean(text);
        let part = |p: Part<'_>| match p {
            Part::Text(t) => format!(" {}", t.trim()),
            Part::Number(digits, _) => format!(" {digits}"),
        };
        numbers(&text).into_iter().map(part).collect()
    }
    /// The tokens of a text. Each word is encoded with a space before it. A number gives its digits, [`TableTokenizer::power`], and the
    /// power of ten. The result is empty for a missing text.
    pub fn text(&self, text: &str, limits: &TableLimits, cuts: &mut Cuts) -> Vec<u32> {
        let text = clean(text);
        let mut words = text.split(' ').filter(|w| !w.is_empty());
        let (mut ids, mut cut) = (Vec::new(), false);
        for word in words.by_ref().take(limits.words) {
            for part in numbers(word) {
                match part {
                    Part::Text(t) => ids.extend(self.inner.encode(&format!(" {t}"))),
                    Part::Number(digits, power) => {
                        ids.extend(self.inner.encode(&format!(" {digits}")));
                        ids.push(self.power());
                        ids.extend(self.inner.encode(&format!(" {power}")));
                    }
                }
            }
        }
        cut |= words.next().is_some() || ids.len() > limits.tokens;
        ids.truncate(limits.tokens);
        cuts.texts += usize::from(cut);
        ids
    }
    /// A table as tokens. Rows at the top that repeat the headers are left out, unless no row would be left.
    pub fn table(&self, table: &Table, limits: &TableLimits, cuts: &mut Cuts) -> Result<Encoded> {
        if limits.rows == 0 || limits.columns == 0 || limits.tokens == 0 || limits.words == 0 {
            return Err(Error::invalid("TableTokenizer", format!("{limits:?}; each must be at least 1")));
        }
        let columns = table.columns().min(limits.columns);
        cuts.columns += usize::from(columns < table.columns());
        let headers: Vec<String> = table.headers.iter().map(|h| clean(h)).collect();
        let repeats = |row: &Vec<String>| row.iter().zip(&headers).all(|(cell, header)| clean(cell) == *header);
        let first = table.rows.iter().take_while(|r| repeats(r)).count().min(table.rows.len().saturating_sub(1));
        cuts.header_rows += first;
        let rows = &table.rows[first..];
        cuts.rows += usize::from(rows.len() > limits.rows);
        let rows = &rows[..rows.len().min(limits.rows)];
        if rows.is_empty() || columns == 0 {
            return Err(Error::invalid("TableTokenizer", format!("{} has no cells", table.name)));
        }
        let mut encode = |text: &str| self.text(text, limits, cuts);
        Ok(Encoded {
            rows: rows.len(),
            columns,
            caption: encode(&table.caption),
            headers: table.headers[..columns].iter().map(|h| encode(h)).collect(),
            cells: rows.iter().flat_map(|r| &r[..columns]).map(|c| encode(c)).collect(),
        })
    }
}

impl Encoded {
    /// The same table without its caption.
    pub fn without_caption(mut self) -> Encoded {
        self.caption.clear();
        self
    }
    /// The same table without headers.
    pub fn without_headers(mut self) -> Encoded {
        self.headers.iter_mut().for_each(Vec::clear);
        self
    }
    /// The same table with rows and columns in another order; see [`Table::reordered`].
    pub fn reordered(&self, rows: &[usize], columns: &[usize]) -> Encoded {
        let cell = |r: usize, c: usize| self.cells[r * self.columns + c].clone();
        Encoded {
            rows: rows.len(),
            columns: columns.len(),
            caption: self.caption.clone(),
            headers: columns.iter().map(|&c| self.headers[c].clone()).collect(),
            cells: rows.iter().flat_map(|&r| columns.iter().map(move |&c| cell(r, c))).collect(),
        }
    }
}
