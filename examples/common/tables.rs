//! Tables whose hidden headers are to be predicted. The examples about tables share this.
#![allow(dead_code)]

use crate::bags::f1;
use prismgrad::data::{Bpe, CrateSources, TabFact, Table, shuffled};
use prismgrad::nn::{Ctx, Params};
use prismgrad::ops::loss::{CrossEntropy, Reduce, cross_entropy};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::PlainStep;
use prismgrad::systems::hytrel::{
    Corrupted, Corruption, Cuts, Detector, Encoded, Head, HyTrel, HyTrelConfig, Sets, TableBatch, TableLimits,
    TableTokenizer, wide_pieces,
};
use prismgrad::train::Progress;
use prismgrad::{Array, DType, Param, Result, Tensor, no_grad};
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
    /// The part of each table, from 0 to 9: 0 is the test, 1 the validation.
    pub parts: Vec<u64>,
    /// Whether these are Wikipedia's tables and not the substitute.
    pub real: bool,
    pub cuts: Cuts,
}

/// The template of a title, in which all digits are equal, so that "1982 season" and "1983 season" have the same template.
pub fn template(title: &str) -> String {
    title.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).collect()
}

/// The FNV-1a hash.
pub fn hash(text: &str) -> u64 {
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
    /// Tables of more than 20 columns are cut into pieces, each of which begins with the first column if `subject` is true.
    pub fn load(most: usize, often: usize, vocab: usize, subject: bool) -> Result<Data> {
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
            tables.iter().flat_map(|t| wide_pieces(t, TableLimits::default().columns, subject)).collect();
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
        let parts: Vec<u64> = tables.iter().map(part).collect();
        let pretrain = (0..tables.len()).filter(|&i| parts[i] > 1).collect();
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
            parts,
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

/// Trains `params` by the recipe. `losses` gets the records of a step, which are drawn epoch by epoch in an order that depends on `salt`,
/// and the number of the step. Returns ten losses, one for each tenth of the steps, and the seconds.
pub fn descend(
    params: &[Param],
    recipe: &Recipe,
    (records, salt): (usize, u64),
    what: &str,
    mut losses: impl FnMut(&[usize], u64) -> Result<Tensor>,
) -> Result<(Vec<(f64, f64)>, f64)> {
    let Recipe { steps, batch, lr, .. } = *recipe;
    let schedule = Schedule::cosine(lr, (steps as u64 / 20).max(1), (steps as u64).max(2));
    let mut step = PlainStep::new(params, AdamW { weight_decay: 0.02, ..AdamW::default() }, schedule)?;
    let mut progress = Progress::new(what, Some(steps as u64), 0);
    let (mut order, mut at, mut epoch, mut curve, mut seconds) = (Vec::new(), 0, 0, Vec::new(), 0.0);
    for t in 0..steps as u64 {
        if at + batch > order.len() {
            (order, at, epoch) = (shuffled(records, salt + epoch), 0, epoch + 1);
        }
        let some = &order[at..(at + batch).min(order.len())];
        at += batch;
        let clock = Instant::now();
        let report = step.run_one(|| losses(some, t))?;
        seconds += clock.elapsed().as_secs_f64();
        if (t + 1) % (steps as u64 / 10).max(1) == 0 {
            let loss = report.loss()?;
            curve.push(((t + 1) as f64, loss));
            progress.set(t + 1, &[("loss", loss)]);
        }
    }
    progress.finish();
    Ok((curve, seconds))
}

/// An encoder and a detector of replaced texts, with the tables without labels on which they train.
pub struct Pretraining<'a> {
    pub params: Params,
    pub model: HyTrel,
    pub detector: Detector,
    pub corruption: Corruption,
    pub tables: Vec<Encoded>,
    data: &'a Data,
    recipe: Recipe,
}

impl Pretraining<'_> {
    /// An encoder and a detector with new values. 15 % of the texts will be replaced.
    pub fn new<'a>(data: &'a Data, tables: Vec<Encoded>, recipe: &Recipe) -> Result<Pretraining<'a>> {
        let params = Params::new(recipe.seed, DType::F32);
        let config = HyTrelConfig { d: recipe.d, layers: recipe.layers, ..HyTrelConfig::small(data.tokenizer.vocab()) };
        Ok(Pretraining {
            model: HyTrel::new(&params.at("hytrel"), &config)?,
            detector: Detector::new(&params.at("detector"), recipe.d)?,
            corruption: Corruption::new(tables.iter(), 0.15)?,
            params,
            tables,
            data,
            recipe: recipe.clone(),
        })
    }
    pub fn batch(&self, all: &[&Encoded]) -> Result<TableBatch> {
        TableBatch::new(all, &self.data.tokenizer, Sets::default())
    }
    /// The records with replaced texts. In each round, other texts are replaced.
    pub fn broken(&self, records: &[usize], round: u64) -> Vec<Corrupted> {
        let seed = 1000 * self.recipe.seed + round;
        records.iter().map(|&r| self.corruption.apply(&self.tables[r], seed, r as u64)).collect()
    }
    /// One loss of the detection per record.
    pub fn losses(&self, records: &[usize], t: u64) -> Result<Tensor> {
        let broken = self.broken(records, t);
        let batch = self.batch(&broken.iter().map(|c| &c.table).collect::<Vec<_>>())?;
        self.detector.losses(&self.model, &batch, &broken, &Ctx::train(t))
    }
    /// Trains `params` on the tables with these losses; see [`descend`].
    pub fn train(
        &self,
        params: &[Param],
        what: &str,
        losses: impl FnMut(&[usize], u64) -> Result<Tensor>,
    ) -> Result<(Vec<(f64, f64)>, f64)> {
        descend(params, &self.recipe, (self.tables.len(), 77 * self.recipe.seed), what, losses)
    }
}

/// Gives parameters the values of those with the same names in `start`.
pub fn start_from(params: &Params, start: Option<&Params>) -> Result<()> {
    for p in params.all() {
        if let Some(old) = start.and_then(|s| s.get(p.name())) {
            p.set(old.value().copy())?;
        }
    }
    Ok(())
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
        start_from(&params, start)?;
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
