//! Tables whose hidden headers are to be predicted. The examples about tables share this.
#![allow(dead_code)]

use crate::bags::f1;
use prismgrad::data::{Bpe, CrateSources, TabFact, Table, shuffled};
use prismgrad::nn::{Ctx, Params};
use prismgrad::ops::loss::{CrossEntropy, Reduce, cross_entropy};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::PlainStep;
use prismgrad::systems::hytrel::{
    Cuts, Encoded, Head, HyTrel, HyTrelConfig, Sets, TableBatch, TableLimits, TableTokenizer, wide_pieces,
};
use prismgrad::train::Progress;
use prismgrad::{Array, DType, Result, Tensor, no_grad};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// Tables, the types of their columns, and their division into parts. Headers are hidden from every model: `encoded` has none.
pub struct Data {
    pub tables: Vec<Table>,
    pub tokenizer: TableTokenizer,
    pub encoded: Vec<Encoded>,
    /// The tables with headers, for pre-training.
    pub with_headers: Vec<Encoded>,
    /// The type of each column of each table; `None` where the header is too rare to be a type.
    pub labels: Vec<Vec<Option<u32>>>,
    pub types: Vec<String>,
    /// Training tables with at least one typed column.
    pub train: Vec<usize>,
    pub validation: Vec<usize>,
    pub test: Vec<usize>,
    /// All tables that are neither in validation nor in the test, with or without typed columns.
    pub pretrain: Vec<usize>,
    /// Whether these are Wikipedia's tables and not the substitute.
    pub real: bool,
    pub cuts: Cuts,
}

/// The template of a title, in which all digits are equal, so that "1982 season" and "1983 season" have the same template.
fn template(title: &str) -> String {
    title.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).collect()
}

/// The FNV-1a hash.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Tables that can be made on every machine: names and types of the functions, fields and imports of the crates on this disk.
fn of_sources() -> Result<Vec<Table>> {
    let mut tables = Vec::new();
    for document in CrateSources::new().max_bytes(4 << 20).load()?.documents {
        let (mut functions, mut fields, mut uses) = (Vec::new(), Vec::new(), Vec::new());
        for (i, line) in document.text.lines().map(str::trim).enumerate() {
            let cells = |parts: &[&str]| parts.iter().map(|p| p.trim().to_string()).collect::<Vec<_>>();
            if let Some((name, rest)) = line.strip_prefix("pub fn ").and_then(|l| l.split_once('(')) {
                let (arguments, result) = rest.rsplit_once(')').unwrap_or((rest, ""));
                let result = result.trim().trim_start_matches("->").trim_end_matches('{');
                functions.push(cells(&[name, arguments, result, &i.to_string()]));
            } else if let Some((path, item)) = line.strip_prefix("use ").and_then(|l| l.rsplit_once("::")) {
                uses.push(cells(&[path, item.trim_end_matches(';')]));
            } else if let Some((name, kind)) = line.strip_prefix("pub ").and_then(|l| l.split_once(": ")) {
                fields.push(cells(&[name, kind.trim_end_matches(',')]));
            }
        }
        let all: [(&[&str], Vec<Vec<String>>); 3] = [
            (&["function", "arguments", "result", "line"], functions),
            (&["field", "type"], fields),
            (&["module", "item"], uses),
        ];
        for (headers, rows) in all.into_iter().filter(|(_, rows)| rows.len() > 1) {
            let headers = headers.iter().map(|h| h.to_string()).collect();
            tables.push(Table::new(document.name.clone(), document.name.clone(), headers, rows)?);
        }
    }
    Ok(tables)
}

impl Data {
    /// Loads at most `most` tables. A header is a type if at least `often` training tables have it. The tables of one page, and of pages
    /// whose titles differ only by digits, are in one part; a tenth of the templates is for validation, and a tenth for the test.
    pub fn load(most: usize, often: usize, vocab: usize) -> Result<Data> {
        let (mut tables, real) = match TabFact::load() {
            Ok(set) => {
                let c = set.counts;
                println!(
                    "{} tables of Wikipedia pages; {} ragged, {} with equal headers, {} not UTF-8, {} empty ones left out",
                    c.read, c.ragged, c.repeated_headers, c.not_utf8, c.empty
                );
                (set.tables, true)
            }
            Err(e) => {
                eprintln!("{e}. Going on with tables made of the sources of crates");
                (of_sources()?, false)
            }
        };
        if tables.len() > most {
            let kept = shuffled(tables.len(), 1).into_iter().take(most);
            tables = kept.map(|i| tables[i].clone()).collect();
        }
        let tables: Vec<Table> =
            tables.iter().flat_map(|t| wide_pieces(t, TableLimits::default().columns, false)).collect();
        let part = |t: &Table| match t.caption.is_empty() {
            true => hash(&t.name) % 10,
            false => hash(&template(&t.caption)) % 10,
        };
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for t in tables.iter().filter(|t| part(t) > 1) {
            let headers: BTreeSet<String> = t.headers.iter().map(|h| h.to_lowercase()).collect();
            headers.into_iter().filter(|h| !h.is_empty()).for_each(|h| *counts.entry(h).or_default() += 1);
        }
        let types: Vec<String> = counts.into_iter().filter(|(_, n)| *n >= often).map(|(h, _)| h).collect();
        if types.len() < 2 {
            let message =
                format!("only {} headers occur in {often} tables; ask for fewer, or for more tables", types.len());
            return Err(prismgrad::Error::Invalid { op: "tables", message });
        }
        let label = |h: &String| types.binary_search(&h.to_lowercase()).ok().map(|i| i as u32);
        let labels: Vec<Vec<Option<u32>>> = tables.iter().map(|t| t.headers.iter().map(label).collect()).collect();
        let texts = tables.iter().filter(|t| part(t) > 1).take(4000).flat_map(|t| {
            let all = t.headers.iter().chain(t.rows.iter().take(12).flatten()).chain([&t.caption]);
            all.map(|c| TableTokenizer::learnable(c)).collect::<Vec<_>>()
        });
        let tokenizer = TableTokenizer::new(Bpe::train(texts, vocab)?);
        let (limits, mut cuts) = (TableLimits::default(), Cuts::default());
        let with_headers = tables.iter().map(|t| tokenizer.table(t, &limits, &mut cuts)).collect::<Result<Vec<_>>>()?;
        let encoded = with_headers.iter().map(|e| e.clone().without_headers()).collect();
        let (mut train, mut validation, mut test) = (Vec::new(), Vec::new(), Vec::new());
        for (i, t) in tables.iter().enumerate().filter(|(i, _)| labels[*i].iter().any(Option::is_some)) {
            match part(t) {
                0 => test.push(i),
                1 => validation.push(i),
                _ => train.push(i),
            }
        }
        let pretrain = (0..tables.len()).filter(|&i| part(&tables[i]) > 1).collect();
        Ok(Data {
            tables,
            tokenizer,
            encoded,
            with_headers,
            labels,
            types,
            train,
            validation,
            test,
            pretrain,
            real,
            cuts,
        })
    }
    /// The typed columns of tables: (table, column, type).
    pub fn columns(&self, of: &[usize]) -> Vec<(usize, usize, u32)> {
        let typed = |&t: &usize| {
            let all = self.labels[t].iter().enumerate();
            all.filter_map(move |(c, l)| Some((t, c, (*l)?))).collect::<Vec<_>>()
        };
        of.iter().flat_map(typed).collect()
    }
}

/// The sizes and the training of a model.
#[derive(Clone)]
pub struct Recipe {
    pub d: usize,
    pub layers: usize,
    pub sets: Sets,
    pub captions: bool,
    /// Number of steps, each with `batch` tables.
    pub steps: usize,
    pub batch: usize,
    pub lr: f64,
    pub seed: u64,
}

/// A model with a head for column types.
pub struct Typed {
    pub params: Params,
    pub model: HyTrel,
    pub head: Head,
    pub recipe: Recipe,
    pub seconds: f64,
}

impl Typed {
    /// A model with new values, except those of the encoder that `start` has.
    pub fn new(data: &Data, recipe: &Recipe, start: Option<&Params>) -> Result<Typed> {
        let params = Params::new(recipe.seed, DType::F32);
        let config = HyTrelConfig { d: recipe.d, layers: recipe.layers, ..HyTrelConfig::small(data.tokenizer.vocab()) };
        let model = HyTrel::new(&params.at("hytrel"), &config)?;
        let head = Head::new(&params.at("head"), (recipe.d, 2 * recipe.d, data.types.len()), 0.1)?;
        for p in params.all() {
            if let Some(old) = start.and_then(|s| s.get(p.name())) {
                p.set(old.value().copy())?;
            }
        }
        Ok(Typed { params, model, head, recipe: recipe.clone(), seconds: 0.0 })
    }
    fn batch(&self, data: &Data, tables: &[usize]) -> Result<TableBatch> {
        let shown: Vec<Encoded> = match self.recipe.captions {
            true => Vec::new(),
            false => tables.iter().map(|&t| data.encoded[t].clone().without_caption()).collect(),
        };
        let all: Vec<&Encoded> = match self.recipe.captions {
            true => tables.iter().map(|&t| &data.encoded[t]).collect(),
            false => shown.iter().collect(),
        };
        TableBatch::new(&all, &data.tokenizer, self.recipe.sets)
    }
    /// One loss per table, which is the sum over its typed columns.
    fn losses(&self, data: &Data, labels: &[Vec<Option<u32>>], tables: &[usize], ctx: &Ctx) -> Result<Tensor> {
        let (logits, of) = self.head.column_types(&self.model, &self.batch(data, tables)?, ctx)?;
        let targets: Vec<i64> =
            tables.iter().flat_map(|&t| labels[t].iter().map(|l| l.map_or(-100, i64::from))).collect();
        let options = CrossEntropy { samples: Some(of), reduce: Reduce::Sum, ..CrossEntropy::default() };
        cross_entropy(&logits, Array::from_slice(&targets, &[targets.len()])?, &options)
    }
    /// Trains on `train` with these labels. Returns the score on validation tables after each fifth of the steps.
    pub fn train(
        &mut self,
        data: &Data,
        labels: &[Vec<Option<u32>>],
        train: &[usize],
        what: &str,
    ) -> Result<Vec<(f64, f64)>> {
        let Recipe { steps, batch, lr, seed, .. } = self.recipe;
        let schedule = Schedule::cosine(lr, (steps / 20).max(1) as u64, steps.max(2) as u64);
        let mut step = PlainStep::new(&self.params.all(), AdamW { weight_decay: 0.02, ..AdamW::default() }, schedule)?;
        let mut progress = Progress::new(what, Some(steps as u64), 0);
        let (mut order, mut at, mut epoch, mut curve) = (Vec::new(), 0, 0, Vec::new());
        let some: Vec<usize> = data.validation.iter().copied().take(600).collect();
        for t in 0..steps {
            let mut tables = Vec::with_capacity(batch);
            while tables.len() < batch.min(train.len()) {
                if at == order.len() {
                    (order, at, epoch) = (shuffled(train.len(), 1000 * seed + epoch), 0, epoch + 1);
                }
                tables.push(train[order[at]]);
                at += 1;
            }
            let start = Instant::now();
            let report = step.run_one(|| self.losses(data, labels, &tables, &Ctx::train(t as u64)))?;
            self.seconds += start.elapsed().as_secs_f64();
            if (t + 1) % (steps / 5).max(1) == 0 {
                let (micro, _) = self.f1(data, &some)?;
                curve.push(((t + 1) as f64, micro));
                progress.set(t as u64 + 1, &[("loss", report.loss()?), ("validation", micro)]);
            }
        }
        progress.finish();
        Ok(curve)
    }
    /// The predicted type for each typed column of `tables`, in the order of [`Data::columns`].
    pub fn found(&self, data: &Data, tables: &[usize]) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        for part in tables.chunks(128) {
            let batch = self.batch(data, part)?;
            let best = no_grad(|| self.head.column_types(&self.model, &batch, &Ctx::eval()))?.0.argmax(-1)?;
            let best = best.array().to_f64();
            let labels = part.iter().flat_map(|&t| &data.labels[t]);
            found.extend(labels.zip(best).filter(|(l, _)| l.is_some()).map(|(_, b)| b as u32));
        }
        Ok(found)
    }
    /// Micro and macro F1 on the typed columns of `tables`.
    pub fn f1(&self, data: &Data, tables: &[usize]) -> Result<(f64, f64)> {
        let wanted: Vec<u32> = data.columns(tables).iter().map(|c| c.2).collect();
        Ok(f1(&self.found(data, tables)?, &wanted, data.types.len()))
    }
}
