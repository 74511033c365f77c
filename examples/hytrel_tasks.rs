//! HyTrel fine-tuned on three tasks of tables, from scratch and after pre-training, beside simple baselines.
//!
//! ```text
//! cargo run --release --example hytrel_tasks
//! ```
//!
//! - `relation`: the header of a column, from the states of this column and of the first one. All headers are hidden, and the title is
//!   shown. The classes are the headers that enough training tables have.
//! - `table-type`: the template of the title, in which all digits are equal. The classes are the 20 most frequent templates, and titles and
//!   headers are hidden. The tables of one page are in one part.
//! - `similarity`: whether two halves are of one table. Titles are hidden and headers are shown. The first half of each of up to 1,000 test
//!   tables is matched with the second halves of all of them, among which are tables with the same headers.
//!
//! Pre-training detects replaced headers and cells, and sees no table of any task's test or validation. The null control trains on labels
//! that were dealt out anew among the training tables. Writes `plots/TASK` and `plots/losses_TASK` (`.svg` and `.png`) and `summary.json`
//! to the run folder. The table of `docs/results/hypergraph.md` is from `--seeds 3`.

#[path = "common/args.rs"]
mod args;
#[path = "common/bags.rs"]
mod bags;
#[path = "common/study.rs"]
mod study;
#[path = "common/tables.rs"]
mod tables;

use bags::{Bag, Linear, Words, bag, f1, sums, words};
use prismgrad::data::{Table, shuffled};
use prismgrad::nn::{Ctx, Params};
use prismgrad::ops::loss::{CrossEntropy, Reduce, binary_cross_entropy_with_logits, cross_entropy};
use prismgrad::systems::hytrel::{Cuts, Encoded, Head, HyTrel, HyTrelConfig, Sets, TableBatch, TableLimits, clean};
use prismgrad::train::RunFolder;
use prismgrad::train::plot::{BarChart, LineChart, Series};
use prismgrad::{Array, DType, Error, Result, Samples, Tensor, no_grad};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Instant;
use study::interval;
use tables::{Data, Pretraining, Recipe, descend, hash, start_from, template};

const OPTIONS: &[args::Opt] = &[
    ("task", "all", "all", "all, relation, table-type or similarity"),
    ("seeds", "1", "1", "runs of each trained model, paired by seed"),
    ("steps", "300", "40", "fine-tuning steps of 16 tables; the null control has a third"),
    ("pretrain", "400", "40", "pre-training steps of 16 tables"),
    ("tables", "20000", "1500", "the most tables that are used"),
    ("often", "150", "40", "a header is a class of `relation` if at least this many training tables have it"),
    ("width", "32", "32", "width of HyTrel"),
    ("rate", "0.002", "0.002", "learning rate of the networks"),
    ("seed", "0", "0", "the first seed"),
];
const TASKS: [&str; 3] = ["relation", "table-type", "similarity"];
const BATCH: usize = 16;
/// Number of templates that are classes, and the number of different titles that each must have, so that each part gets some.
const TEMPLATES: (usize, usize) = (20, 5);
const CANDIDATES: usize = 1000;

/// A model with a head for a task.
struct Tuned {
    params: Params,
    model: HyTrel,
    head: Head,
}

impl Tuned {
    /// A model with new values, except those of the encoder that `start` has.
    fn new(data: &Data, recipe: &Recipe, (states, classes): (usize, usize), start: Option<&Params>) -> Result<Tuned> {
        let params = Params::new(recipe.seed, DType::F32);
        let config = HyTrelConfig { d: recipe.d, layers: recipe.layers, ..HyTrelConfig::small(data.tokenizer.vocab()) };
        let model = HyTrel::new(&params.at("hytrel"), &config)?;
        let head = Head::new(&params.at("head"), (states * recipe.d, 2 * recipe.d, classes), 0.1)?;
        start_from(&params, start)?;
        Ok(Tuned { params, model, head })
    }
}

/// The name and both scores of a method.
type Named = (&'static str, [f64; 2]);

/// A task: its training records, the loss of a model, and the scores on the test.
trait Task {
    fn name(&self) -> &'static str;
    /// What there is to train and to test on.
    fn about(&self) -> String;
    /// The names of the two scores, and their values for a guess: the most frequent class of the training, or chance.
    fn scores(&self) -> [&'static str; 2];
    fn guess(&self) -> [f64; 2];
    /// The best share of right answers without a look at the table. The null control should not be above it.
    fn blind(&self) -> f64;
    /// Number of states that the head gets, and of classes.
    fn head(&self) -> (usize, usize);
    fn records(&self) -> usize;
    /// One loss per table. `dealt` says whether the labels are those of the null control.
    fn losses(&self, data: &Data, tuned: &Tuned, records: &[usize], dealt: bool, t: u64) -> Result<Tensor>;
    fn score(&self, data: &Data, tuned: &Tuned) -> Result<[f64; 2]>;
    /// Methods that are compared with HyTrel.
    fn baselines(&self, data: &Data) -> Vec<Named>;
    fn size(&self) -> Value;
}

/// The scores of always guessing the most frequent class of the training labels.
fn majority(train: &[u32], test: &[u32], classes: usize) -> [f64; 2] {
    let mut counts = vec![0; classes];
    train.iter().for_each(|&c| counts[c as usize] += 1);
    let best = (0..classes).max_by_key(|&c| counts[c]).unwrap_or(0) as u32;
    f1(&vec![best; test.len()], test, classes).into()
}

/// The share of the most frequent label.
fn most(labels: &[u32], classes: usize) -> f64 {
    let count = |c: usize| labels.iter().filter(|l| **l as usize == c).count();
    (0..classes).map(count).max().unwrap_or(0) as f64 / labels.len().max(1) as f64
}

/// The labels in another order.
fn dealt(labels: &[u32]) -> Vec<u32> {
    shuffled(labels.len(), 7).into_iter().map(|i| labels[i]).collect()
}

/// Softmax regression on bags.
fn linear(train: &[Bag], labels: &[u32], test: &[Bag], wanted: &[u32], (words, classes): (usize, usize)) -> [f64; 2] {
    let model = Linear::train(&train.iter().collect::<Vec<_>>(), labels, (words, classes), 6, 0.5, 0);
    let found: Vec<u32> = test.iter().map(|b| model.class(b)).collect();
    f1(&found, wanted, classes).into()
}

fn refused(message: impl Into<String>) -> Error {
    Error::Invalid { op: "hytrel_tasks", message: message.into() }
}

/// The labels of a table's columns.
type Labels = Vec<Option<u32>>;

/// The header class of each column except the first, from the pair of both.
struct Relation {
    train: Vec<usize>,
    test: Vec<usize>,
    /// The labels for training with the null control.
    dealt: HashMap<usize, Labels>,
    of: Vec<Labels>,
    classes: usize,
}

impl Relation {
    fn new(data: &Data) -> Result<Relation> {
        // The first column has no relation to itself.
        let mut of = data.labels.clone();
        of.iter_mut().for_each(|l| l[0] = None);
        let some = |part: &[usize]| -> Vec<usize> {
            part.iter().copied().filter(|&t| of[t].iter().any(Option::is_some)).collect()
        };
        let (train, test) = (some(&data.train), some(&data.test));
        if train.is_empty() || test.is_empty() {
            return Err(refused("no pair of columns to train or to test on; ask for more tables"));
        }
        let labels: Vec<u32> = train.iter().flat_map(|&t| of[t].iter().flatten().copied()).collect();
        let mut new = dealt(&labels).into_iter();
        let deal = |&t: &usize| (t, of[t].iter().map(|l| l.and_then(|_| new.next())).collect());
        let dealt = train.iter().map(deal).collect();
        Ok(Relation { train, test, dealt, of, classes: data.types.len() })
    }
    fn pairs(&self, tables: &[usize]) -> Vec<(usize, usize, u32)> {
        let of = |&t: &usize| {
            let all = self.of[t].iter().enumerate();
            all.filter_map(move |(c, l)| Some((t, c, (*l)?))).collect::<Vec<_>>()
        };
        tables.iter().flat_map(of).collect()
    }
    fn labels(&self, tables: &[usize]) -> Vec<u32> {
        self.pairs(tables).iter().map(|p| p.2).collect()
    }
}

impl Task for Relation {
    fn name(&self) -> &'static str {
        "relation"
    }
    fn scores(&self) -> [&'static str; 2] {
        ["micro F1", "macro F1"]
    }
    fn guess(&self) -> [f64; 2] {
        majority(&self.labels(&self.train), &self.labels(&self.test), self.classes)
    }
    fn blind(&self) -> f64 {
        most(&self.labels(&self.test), self.classes)
    }
    fn about(&self) -> String {
        let n = |t: &[usize]| format!("{} pairs of columns of {} tables", self.pairs(t).len(), t.len());
        format!("{} to train on, {} to test; {} classes", n(&self.train), n(&self.test), self.classes)
    }
    fn head(&self) -> (usize, usize) {
        (2, self.classes)
    }
    fn records(&self) -> usize {
        self.train.len()
    }
    fn losses(&self, data: &Data, tuned: &Tuned, records: &[usize], dealt: bool, t: u64) -> Result<Tensor> {
        let tables: Vec<usize> = records.iter().map(|&r| self.train[r]).collect();
        let batch: Vec<&Encoded> = tables.iter().map(|&t| &data.encoded[t]).collect();
        let batch = TableBatch::new(&batch, &data.tokenizer, Sets::default())?;
        let (logits, of) = tuned.head.relations(&tuned.model, &batch, &Ctx::train(t))?;
        let labels = |t: &usize| if dealt { &self.dealt[t][1..] } else { &self.of[*t][1..] };
        let targets: Vec<i64> = tables.iter().flat_map(labels).map(|l| l.map_or(-100, i64::from)).collect();
        let options = CrossEntropy { samples: Some(of), reduce: Reduce::Sum, ..CrossEntropy::default() };
        cross_entropy(&logits, Array::from_slice(&targets, &[targets.len()])?, &options)
    }
    fn score(&self, data: &Data, tuned: &Tuned) -> Result<[f64; 2]> {
        let mut found = Vec::new();
        for part in self.test.chunks(128) {
            let batch: Vec<&Encoded> = part.iter().map(|&t| &data.encoded[t]).collect();
            let batch = TableBatch::new(&batch, &data.tokenizer, Sets::default())?;
            let logits = no_grad(|| tuned.head.relations(&tuned.model, &batch, &Ctx::eval()))?.0;
            let best = logits.argmax(-1)?.array().to_f64();
            let labels = part.iter().flat_map(|&t| &self.of[t][1..]);
            found.extend(labels.zip(best).filter(|(l, _)| l.is_some()).map(|(_, b)| b as u32));
        }
        Ok(f1(&found, &self.labels(&self.test), self.classes).into())
    }
    fn baselines(&self, data: &Data) -> Vec<Named> {
        let mut ids = Words::default();
        let mut counted = HashMap::new();
        for (part, frozen) in [(&self.train, false), (&self.test, true)] {
            if frozen {
                ids.freeze();
            }
            for &t in part {
                let table = &data.tables[t];
                let mut count = |text: Vec<String>| ids.counts(text.iter().map(String::as_str));
                let mut all: Vec<_> =
                    (0..table.columns()).map(|c| count(table.column(c).flat_map(words).collect())).collect();
                all.push(count(words(&table.caption)));
                counted.insert(t, all);
            }
        }
        let n = ids.len() as u32;
        let bag_of = |&(t, c, _): &(usize, usize, u32), context: bool| {
            let all = &counted[&t];
            let mut row = bag(&all[c], 0);
            row.extend(bag(&all[0], n));
            if context {
                let others = (1..all.len() - 1).filter(|k| *k != c).flat_map(|k| all[k].iter().copied());
                row.extend(bag(&sums(others), 2 * n));
                row.extend(bag(&all[all.len() - 1], 3 * n));
            }
            row
        };
        let (train, test) = (self.pairs(&self.train), self.pairs(&self.test));
        let (labels, wanted) = (self.labels(&self.train), self.labels(&self.test));
        let score = |context: bool| {
            let of = |pairs: &[(usize, usize, u32)]| pairs.iter().map(|p| bag_of(p, context)).collect::<Vec<_>>();
            linear(&of(&train), &labels, &of(&test), &wanted, (4 * ids.len(), self.classes))
        };
        vec![("linear model of both columns", score(false)), ("linear model of all columns and the title", score(true))]
    }
    fn size(&self) -> Value {
        let n = |t: &[usize]| json!({"tables": t.len(), "pairs": self.pairs(t).len()});
        json!({"train": n(&self.train), "test": n(&self.test), "classes": self.classes})
    }
}

/// The template of the title, from cells alone.
struct TableType {
    train: Vec<usize>,
    test: Vec<usize>,
    /// Tables that are left for validation, which nothing here uses; pre-training does not see them either.
    spare: Vec<usize>,
    labels: HashMap<usize, u32>,
    dealt: Vec<u32>,
    classes: Vec<String>,
    shown: HashMap<usize, Encoded>,
}

impl TableType {
    fn new(data: &Data) -> Result<TableType> {
        let mut titles: BTreeMap<String, BTreeMap<&str, Vec<usize>>> = BTreeMap::new();
        for (i, t) in data.tables.iter().enumerate().filter(|(_, t)| !t.caption.is_empty()) {
            titles.entry(template(&t.caption)).or_default().entry(&t.caption).or_default().push(i);
        }
        let mut all: Vec<_> = titles.into_iter().filter(|(_, t)| t.len() >= TEMPLATES.1).collect();
        all.sort_by_key(|(name, t)| (std::cmp::Reverse(t.values().map(Vec::len).sum::<usize>()), name.clone()));
        all.truncate(TEMPLATES.0);
        if all.len() < 2 {
            let message = format!(
                "`table-type` needs two templates that {} titles have, and these tables have {}; it needs the tables of Wikipedia",
                TEMPLATES.1,
                all.len()
            );
            return Err(refused(message));
        }
        let (mut train, mut test, mut spare) = (Vec::new(), Vec::new(), Vec::new());
        let mut labels = HashMap::new();
        for (c, (_, titles)) in all.iter().enumerate() {
            let mut order: Vec<_> = titles.iter().collect();
            order.sort_by_key(|(title, _)| hash(title));
            for (k, (_, tables)) in order.into_iter().enumerate() {
                [&mut test, &mut spare, &mut train][(k % 5).min(2)].extend(tables);
                labels.extend(tables.iter().map(|&t| (t, c as u32)));
            }
        }
        let shown = labels.keys().map(|&t| (t, data.encoded[t].clone().without_caption())).collect();
        let dealt = dealt(&train.iter().map(|t| labels[t]).collect::<Vec<_>>());
        let classes = all.into_iter().map(|(name, _)| name).collect();
        Ok(TableType { train, test, spare, labels, dealt, classes, shown })
    }
    fn batch(&self, data: &Data, tables: &[usize]) -> Result<TableBatch> {
        TableBatch::new(&tables.iter().map(|t| &self.shown[t]).collect::<Vec<_>>(), &data.tokenizer, Sets::default())
    }
    fn of(&self, tables: &[usize]) -> Vec<u32> {
        tables.iter().map(|t| self.labels[t]).collect()
    }
}

impl Task for TableType {
    fn name(&self) -> &'static str {
        "table-type"
    }
    fn scores(&self) -> [&'static str; 2] {
        ["micro F1", "macro F1"]
    }
    fn guess(&self) -> [f64; 2] {
        majority(&self.of(&self.train), &self.of(&self.test), self.classes.len())
    }
    fn blind(&self) -> f64 {
        most(&self.of(&self.test), self.classes.len())
    }
    fn about(&self) -> String {
        format!("{} tables to train on, {} to test; {} classes", self.train.len(), self.test.len(), self.classes.len())
    }
    fn head(&self) -> (usize, usize) {
        (1, self.classes.len())
    }
    fn records(&self) -> usize {
        self.train.len()
    }
    fn losses(&self, data: &Data, tuned: &Tuned, records: &[usize], dealt: bool, t: u64) -> Result<Tensor> {
        let tables: Vec<usize> = records.iter().map(|&r| self.train[r]).collect();
        let targets = if dealt { records.iter().map(|&r| self.dealt[r]).collect() } else { self.of(&tables) };
        let logits = tuned.head.table_types(&tuned.model, &self.batch(data, &tables)?, &Ctx::train(t))?;
        cross_entropy(&logits, Array::from_slice(&targets, &[targets.len()])?, &CrossEntropy::default())
    }
    fn score(&self, data: &Data, tuned: &Tuned) -> Result<[f64; 2]> {
        let mut found = Vec::new();
        for part in self.test.chunks(128) {
            let batch = self.batch(data, part)?;
            let logits = no_grad(|| tuned.head.table_types(&tuned.model, &batch, &Ctx::eval()))?;
            found.extend(logits.argmax(-1)?.array().to_f64().into_iter().map(|b| b as u32));
        }
        Ok(f1(&found, &self.of(&self.test), self.classes.len()).into())
    }
    fn baselines(&self, data: &Data) -> Vec<Named> {
        let mut ids = Words::default();
        let mut bags = |tables: &[usize]| -> Vec<Bag> {
            let of = |&t: &usize| {
                let text: Vec<String> = data.tables[t].rows.iter().flatten().flat_map(|c| words(c)).collect();
                bag(&ids.counts(text.iter().map(String::as_str)), 0)
            };
            let all = tables.iter().map(of).collect();
            ids.freeze();
            all
        };
        let (train, test) = (bags(&self.train), bags(&self.test));
        let size = (ids.len(), self.classes.len());
        let score = linear(&train, &self.of(&self.train), &test, &self.of(&self.test), size);
        vec![("linear model of all cells", score)]
    }
    fn size(&self) -> Value {
        json!({"train": self.train.len(), "test": self.test.len(), "classes": self.classes})
    }
}

/// Tables whose halves are to be matched, with a table for each whose second half is a wrong match.
struct Matched {
    tables: Vec<usize>,
    wrong: Vec<usize>,
    /// Number of tables whose wrong match has the same headers.
    shared: usize,
}

/// Whether two halves are of one table.
struct Similarity {
    train: Vec<usize>,
    /// The table with the second half that is the match in the null control, for each of `train`.
    dealt: Vec<usize>,
    /// For each of `train`, the places in `train` of all tables with its headers.
    alike: Vec<Rc<Vec<usize>>>,
    validation: Matched,
    test: Matched,
    /// Both halves of each table, as text and as tokens.
    halves: HashMap<usize, ([Table; 2], [Encoded; 2])>,
}

/// For each table, the places of all tables with the same set of headers, itself among them.
fn alike(data: &Data, tables: &[usize]) -> Vec<Rc<Vec<usize>>> {
    let key = |t: &usize| data.tables[*t].headers.iter().map(|h| clean(h)).collect::<BTreeSet<String>>();
    let mut groups: HashMap<BTreeSet<String>, Vec<usize>> = HashMap::new();
    tables.iter().enumerate().for_each(|(i, t)| groups.entry(key(t)).or_default().push(i));
    let groups: HashMap<_, _> = groups.into_iter().map(|(key, all)| (key, Rc::new(all))).collect();
    tables.iter().map(|t| groups[&key(t)].clone()).collect()
}

impl Matched {
    /// At most [`CANDIDATES`] of the tables. Those that share their headers with others come first. The wrong match of a table has the same
    /// headers if there is one.
    fn new(data: &Data, mut tables: Vec<usize>) -> Matched {
        let shared: HashMap<usize, bool> =
            tables.iter().zip(alike(data, &tables)).map(|(&t, all)| (t, all.len() > 1)).collect();
        tables.sort_by_key(|t| (!shared[t], *t));
        tables.truncate(CANDIDATES);
        let n = tables.len();
        let groups = alike(data, &tables);
        let wrong = groups.iter().enumerate().map(|(i, all)| {
            let draw = hash(&data.tables[tables[i]].name) as usize;
            let same: Vec<usize> = all.iter().copied().filter(|&o| o != i).collect();
            if same.is_empty() { tables[(i + 1 + draw % (n - 1)) % n] } else { tables[same[draw % same.len()]] }
        });
        let shared = groups.iter().filter(|all| all.len() > 1).count();
        Matched { wrong: wrong.collect(), shared, tables }
    }
}

impl Similarity {
    fn new(data: &Data) -> Result<Similarity> {
        let (mut names, mut parts, mut halves) = (BTreeSet::new(), [vec![], vec![], vec![]], HashMap::new());
        let limits = TableLimits::default();
        for (t, table) in data.tables.iter().enumerate() {
            // Of a table that was cut into pieces, only the first is used.
            let n = table.rows.len().min(limits.rows);
            if n < 2 || !names.insert((&table.name, &table.headers[0], n)) {
                continue;
            }
            let columns: Vec<usize> = (0..table.columns()).collect();
            let rows: Vec<usize> = (0..n).collect();
            let (first, second) = rows.split_at(n.div_ceil(2));
            let text = [first, second].map(|rows| Table { caption: String::new(), ..table.reordered(rows, &columns) });
            let encoded = |k: usize| data.tokenizer.table(&text[k], &limits, &mut Cuts::default());
            let encoded = [encoded(0)?, encoded(1)?];
            halves.insert(t, (text, encoded));
            parts[data.parts[t].min(2) as usize].push(t);
        }
        if parts.iter().any(|p| p.len() < 2) {
            return Err(refused("not enough tables with two rows for `similarity`; ask for more tables"));
        }
        let [test, validation, train] = parts;
        Ok(Similarity {
            dealt: shuffled(train.len(), 7).into_iter().map(|i| train[i]).collect(),
            alike: alike(data, &train),
            train,
            validation: Matched::new(data, validation),
            test: Matched::new(data, test),
            halves,
        })
    }
    /// The places in `train` of the tables of a step: half of the records, a table with the same headers for each of them, and other
    /// records in place of those that have none.
    fn drawn(&self, records: &[usize], t: u64) -> Vec<usize> {
        let (some, rest) = records.split_at(records.len().div_ceil(2));
        let mut all = some.to_vec();
        for (k, &r) in some.iter().enumerate() {
            let draw = hash(&format!("{t} {r}")) as usize;
            let same = self.alike[r][draw % self.alike[r].len()];
            let other = [Some(same), rest.get(k).copied()].into_iter().flatten().find(|o| !all.contains(o));
            all.extend(other);
        }
        all
    }
    fn batch(&self, data: &Data, halves: &[(usize, usize)]) -> Result<TableBatch> {
        let halves: Vec<&Encoded> = halves.iter().map(|(t, half)| &self.halves[t].1[*half]).collect();
        TableBatch::new(&halves, &data.tokenizer, Sets::default())
    }
    /// The states of one half of each table, `[tables, d]`.
    fn states(&self, data: &Data, tuned: &Tuned, tables: &[usize], half: usize) -> Result<Tensor> {
        let states = |part: &[usize]| {
            let batch = self.batch(data, &part.iter().map(|&t| (t, half)).collect::<Vec<_>>())?;
            tuned.model.tables(&batch, &Ctx::eval())
        };
        let all = tables.chunks(128).map(|part| no_grad(|| states(part))).collect::<Result<Vec<_>>>()?;
        Tensor::concat(&all.iter().collect::<Vec<_>>(), 0)
    }
    /// The logits that the rows `i` of `a` and `j` of `b` match, as in [`Head::similarity`]. `of` maps pairs to samples.
    fn logits(
        tuned: &Tuned,
        (a, b): (&Tensor, &Tensor),
        pairs: &[(u32, u32)],
        of: &Samples,
        ctx: &Ctx,
    ) -> Result<Tensor> {
        let rows = |x: &Tensor, ids: Vec<u32>| x.index_select(0, Array::from_slice(&ids, &[ids.len()])?);
        let a = rows(a, pairs.iter().map(|p| p.0).collect())?;
        let b = rows(b, pairs.iter().map(|p| p.1).collect())?;
        tuned.head.logits(&Tensor::concat(&[&a.sub(&b)?.abs()?, &a.mul(&b)?], 1)?, of, ctx)
    }
    /// Both scores of a method, from the score of every test table's first half with every second half, and of the right and the wrong
    /// match of each validation table and of each test table. A match is called right if its score is at least the threshold that has the
    /// most right answers on the validation.
    fn judged(all: &[f64], validation: &[Vec<f64>; 2], test: &[Vec<f64>; 2]) -> [f64; 2] {
        let n = test[0].len();
        let first = all.chunks(n).enumerate().map(|(i, row)| match row.iter().any(|s| *s > row[i]) {
            true => 0.0,
            // Equal scores share the first place.
            false => 1.0 / row.iter().filter(|s| **s == row[i]).count() as f64,
        });
        let mut scored: Vec<(f64, i64)> = validation[0].iter().map(|&s| (s, 1)).collect();
        scored.extend(validation[1].iter().map(|&s| (s, -1)));
        scored.sort_by(|a, b| b.0.total_cmp(&a.0));
        let (mut best, mut threshold, mut sum) = (0, f64::INFINITY, 0);
        for (k, &(s, is)) in scored.iter().enumerate() {
            sum += is;
            if sum > best && scored.get(k + 1).is_none_or(|next| next.0 < s) {
                (best, threshold) = (sum, s);
            }
        }
        let right = test[0].iter().filter(|s| **s >= threshold).count();
        let right = right + test[1].iter().filter(|s| **s < threshold).count();
        [first.sum::<f64>() / n as f64, right as f64 / (2 * n) as f64]
    }
}

impl Task for Similarity {
    fn name(&self) -> &'static str {
        "similarity"
    }
    fn scores(&self) -> [&'static str; 2] {
        ["recall@1", "accuracy"]
    }
    fn guess(&self) -> [f64; 2] {
        [1.0 / self.test.tables.len() as f64, 0.5]
    }
    fn blind(&self) -> f64 {
        0.5
    }
    fn about(&self) -> String {
        let n = (self.train.len(), self.test.tables.len(), self.test.shared);
        format!("{} tables to train on, {} to test, of which {} have the headers of others", n.0, n.1, n.2)
    }
    fn head(&self) -> (usize, usize) {
        (2, 1)
    }
    fn records(&self) -> usize {
        self.train.len()
    }
    /// The first half of each table with the second halves of all. The right match has the same weight as all wrong ones together.
    fn losses(&self, data: &Data, tuned: &Tuned, records: &[usize], dealt: bool, t: u64) -> Result<Tensor> {
        let drawn = self.drawn(records, t);
        let n = drawn.len() as u32;
        let second = |r: usize| if dealt { self.dealt[r] } else { self.train[r] };
        let halves: Vec<_> = drawn.iter().flat_map(|&r| [(self.train[r], 0), (second(r), 1)]).collect();
        let ctx = &Ctx::train(t);
        let states = tuned.model.tables(&self.batch(data, &halves)?, ctx)?;
        let pairs: Vec<(u32, u32)> = (0..n * n).map(|p| (2 * (p / n), 2 * (p % n) + 1)).collect();
        let logits =
            Similarity::logits(tuned, (&states, &states), &pairs, &Samples::uniform(n as usize, n as usize), ctx)?;
        let is: Vec<f32> = (0..n * n).map(|p| if p / n == p % n { 1.0 } else { 0.0 }).collect();
        let weights: Vec<f32> = is.iter().map(|i| if *i > 0.0 { 1.0 } else { 1.0 / (n - 1).max(1) as f32 }).collect();
        let n = n as usize;
        let targets = Tensor::from_slice(&is, &[n * n, 1])?;
        let each = binary_cross_entropy_with_logits(&logits, &targets, Reduce::Sum)?;
        each.mul(&Tensor::from_slice(&weights, &[n * n])?)?.reshape(&[n, n])?.sum(&[1], false)
    }
    fn score(&self, data: &Data, tuned: &Tuned) -> Result<[f64; 2]> {
        let logits = |a: &Tensor, b: &Tensor, pairs: &[(u32, u32)]| -> Result<Vec<f64>> {
            let mut all = Vec::new();
            for part in pairs.chunks(10_000) {
                let of = Samples::uniform(part.len(), 1);
                let logits = no_grad(|| Similarity::logits(tuned, (a, b), part, &of, &Ctx::eval()))?;
                all.extend(logits.array().to_f64());
            }
            Ok(all)
        };
        let both = |m: &Matched| -> Result<_> {
            let (a, b) = (self.states(data, tuned, &m.tables, 0)?, self.states(data, tuned, &m.tables, 1)?);
            let wrong = self.states(data, tuned, &m.wrong, 1)?;
            let pairs: Vec<(u32, u32)> = (0..m.tables.len() as u32).map(|i| (i, i)).collect();
            Ok(([logits(&a, &b, &pairs)?, logits(&a, &wrong, &pairs)?], a, b))
        };
        let (test, a, b) = both(&self.test)?;
        let n = self.test.tables.len() as u32;
        let all = logits(&a, &b, &(0..n * n).map(|p| (p / n, p % n)).collect::<Vec<_>>())?;
        Ok(Similarity::judged(&all, &both(&self.validation)?.0, &test))
    }
    /// Cosines of bags of words. In the second baseline a word has the weight ln(n/k) if k of the n training halves have it.
    fn baselines(&self, _: &Data) -> Vec<Named> {
        let (mut ids, mut halves_with, mut counted) = (Words::default(), Vec::<f32>::new(), HashMap::new());
        let count = |t: usize, half: usize, ids: &mut Words| {
            let table = &self.halves[&t].0[half];
            let texts = table.headers.iter().chain(table.rows.iter().flatten());
            let text: Vec<String> = texts.flat_map(|text| words(text)).collect();
            ids.counts(text.iter().map(String::as_str))
        };
        for (&t, half) in self.train.iter().flat_map(|t| [(t, 0), (t, 1)]) {
            let words = count(t, half, &mut ids);
            halves_with.resize(ids.len(), 0.0);
            words.iter().for_each(|w| halves_with[w.0 as usize] += 1.0);
        }
        ids.freeze();
        for &t in self.validation.tables.iter().chain(&self.test.tables) {
            (0..2).for_each(|half| {
                counted.insert((t, half), count(t, half, &mut ids));
            });
        }
        let n = 2.0 * self.train.len() as f32;
        let score = |weighted: bool| {
            let of = |counts: &Vec<(u32, u32)>| {
                let mut row = bag(counts, 0);
                if weighted {
                    row.iter_mut().for_each(|f| f.1 *= (n / halves_with[f.0 as usize]).ln());
                    let length = row.iter().map(|f| f.1 * f.1).sum::<f32>().sqrt().max(1e-12);
                    row.iter_mut().for_each(|f| f.1 /= length);
                }
                row
            };
            let bags: HashMap<(usize, usize), Bag> = counted.iter().map(|(key, counts)| (*key, of(counts))).collect();
            let mut dense = vec![0f32; ids.len()];
            let mut cosines = |t: usize, others: &[usize]| -> Vec<f64> {
                bags[&(t, 0)].iter().for_each(|f| dense[f.0 as usize] = f.1);
                let with = |o: &usize| bags[&(*o, 1)].iter().map(|f| f64::from(f.1 * dense[f.0 as usize])).sum();
                let all = others.iter().map(with).collect();
                bags[&(t, 0)].iter().for_each(|f| dense[f.0 as usize] = 0.0);
                all
            };
            let all: Vec<f64> = self.test.tables.iter().flat_map(|&t| cosines(t, &self.test.tables)).collect();
            let mut both = |m: &Matched| {
                let pairs: Vec<Vec<f64>> = m.tables.iter().zip(&m.wrong).map(|(&t, &w)| cosines(t, &[t, w])).collect();
                [0, 1].map(|k| pairs.iter().map(|p| p[k]).collect())
            };
            Similarity::judged(&all, &both(&self.validation), &both(&self.test))
        };
        vec![("cosine of words", score(false)), ("cosine of words by rarity", score(true))]
    }
    fn size(&self) -> Value {
        json!({"train": self.train.len(), "candidates": self.test.tables.len(), "with_headers_of_others": self.test.shared})
    }
}

/// The scores of a method, one pair for each seed.
struct Row {
    name: &'static str,
    scores: Vec<[f64; 2]>,
    /// Seconds of all training steps of a network.
    seconds: Option<f64>,
}

impl Row {
    fn of(&self, k: usize) -> Vec<f64> {
        self.scores.iter().map(|s| s[k]).collect()
    }
    fn print(&self, names: [&str; 2]) {
        let of = |k: usize| match interval(&self.of(k)) {
            (mean, half) if half.is_finite() => format!("{:.2} ± {:.2}", 100.0 * mean, 100.0 * half),
            (mean, _) => format!("{:.2}", 100.0 * mean),
        };
        println!("  {:<42} {} {:<14} {} {}", self.name, names[0], of(0), names[1], of(1));
    }
}

/// The verdict on the claim that a is above b, paired by seed; a method without seeds counts the same for each.
fn above(claim: &str, a: &[f64], b: &[f64]) -> Value {
    let differences: Vec<f64> = a.iter().enumerate().map(|(i, a)| a - b[i.min(b.len() - 1)]).collect();
    study::verdict(claim, &differences)
}

/// Trains and scores all methods of a task, and writes its plots. `starts` are the pre-trained encoders, one for each recipe.
fn study_task(
    task: &dyn Task,
    data: &Data,
    recipes: &[Recipe],
    starts: &[Params],
    folder: &mut RunFolder,
) -> Result<Value> {
    let (name, names) = (task.name(), task.scores());
    println!("{name}: {}", task.about());
    let fixed = |name, scores| Row { name, scores: vec![scores], seconds: None };
    let arm = |name| Row { name, scores: Vec::new(), seconds: Some(0.0) };
    let clock = Instant::now();
    let mut rows: Vec<Row> = task.baselines(data).into_iter().map(|(name, scores)| fixed(name, scores)).collect();
    let (baselines, seconds) = (rows.len(), clock.elapsed().as_secs_f64());
    let guess = if name == "similarity" { "a guess" } else { "the most frequent class" };
    rows.push(fixed(guess, task.guess()));
    rows.extend([arm("HyTrel from scratch"), arm("HyTrel pre-trained"), arm("null: labels dealt out anew")]);
    let (scratch, pretrained, null) = (baselines + 1, baselines + 2, baselines + 3);
    let mut curves = Vec::new();
    for (recipe, start) in recipes.iter().zip(starts) {
        for k in scratch..=null {
            // The null control runs with the first seed alone.
            if k == null && !rows[k].scores.is_empty() {
                continue;
            }
            let start = (k == pretrained).then_some(start);
            let steps = if k == null { recipe.steps.div_ceil(3) } else { recipe.steps };
            let recipe = Recipe { steps, ..recipe.clone() };
            let tuned = Tuned::new(data, &recipe, task.head(), start)?;
            let what = format!("{name}: {}, seed {}", rows[k].name, recipe.seed);
            let order = (task.records(), 1000 * recipe.seed);
            let losses = |r: &[usize], t: u64| task.losses(data, &tuned, r, k == null, t);
            let (curve, seconds) = descend(&tuned.params.all(), &recipe, order, &what, losses)?;
            let score = task.score(data, &tuned)?;
            let at = 10 * TASKS.iter().position(|t| *t == name).unwrap_or(0) as u64 + k as u64;
            rows[k].scores.push(score);
            rows[k].seconds = rows[k].seconds.map(|s| s + seconds);
            if curves.len() < 3 {
                curves.push((rows[k].name, curve));
            }
            folder.log(
                100 * recipe.seed + at,
                &json!({
                    "task": name, "method": rows[k].name, "seed": recipe.seed, names[0]: score[0], names[1]: score[1],
                }),
            )?;
        }
    }
    rows.iter().for_each(|r| r.print(names));
    let mut verdicts = Vec::new();
    for k in 0..2 {
        for arm in [scratch, pretrained] {
            for baseline in &rows[..baselines] {
                let claim = format!("{name}: {} is above {}, {}", rows[arm].name, baseline.name, names[k]);
                verdicts.push(above(&claim, &rows[arm].of(k), &baseline.of(k)));
            }
        }
        let claim = format!("{name}: pre-training is above scratch, {}", names[k]);
        verdicts.push(above(&claim, &rows[pretrained].of(k), &rows[scratch].of(k)));
    }
    let mut chart = BarChart::new(format!("{name}: tables of unseen pages")).label(format!("{}, percent", names[0]));
    for row in &rows {
        let (mean, half) = interval(&row.of(0));
        let (mean, half) = (100.0 * mean, 100.0 * half);
        chart = match half.is_finite() {
            true => chart.bar_with_interval(row.name, mean, mean - half, mean + half),
            false => chart.bar(row.name, mean),
        };
    }
    chart.save(folder.plot(name))?;
    let mut chart =
        LineChart::new(format!("{name}: loss while fine-tuning, first seed")).x_label("step").y_label("nats");
    for (name, curve) in curves {
        chart = chart.series(Series::new(name, curve));
    }
    chart.save(folder.plot(&format!("losses_{name}")))?;
    let methods: Vec<Value> = rows
        .iter()
        .map(|r| json!({"method": r.name, names[0]: r.of(0), names[1]: r.of(1), "training_seconds": r.seconds}))
        .collect();
    // The share of right answers is the second score of `similarity`, and the first of the other tasks.
    let excess = rows[null].of(usize::from(name == "similarity"))[0] - task.blind();
    let works = excess < 0.05;
    println!(
        "{name}: the null control has {:+.2} points against the best blind answer, which is {}",
        100.0 * excess,
        if works { "chance" } else { "not chance" }
    );
    Ok(json!({
        "task": name, "size": task.size(), "methods": methods, "verdicts": verdicts, "null_above_blind": excess,
        "null_is_chance": works, "baseline_seconds": seconds,
    }))
}

fn run() -> Result<()> {
    let args =
        args::Args::parse("hytrel_tasks", "HyTrel fine-tuned on three tasks of tables, and simple baselines.", OPTIONS);
    let quick = args.has("quick");
    let wanted = args.choice("task", &[("all", None), (TASKS[0], Some(0)), (TASKS[1], Some(1)), (TASKS[2], Some(2))]);
    let seeds: u64 = args.get("seeds", "a whole number from 1 to 10", |n| (1..=10).contains(n));
    let seed: u64 = args.get("seed", "a whole number from 0 to 1000000", |n| *n <= 1_000_000);
    let steps: usize = args.get("steps", "a whole number from 10 to 1000000", |n| (10..=1_000_000).contains(n));
    let before: usize = args.get("pretrain", "a whole number from 10 to 1000000", |n| (10..=1_000_000).contains(n));
    let most: usize = args.get("tables", "a whole number from 200 to 1000000", |n| (200..=1_000_000).contains(n));
    let often: usize = args.get("often", "a whole number from 5 to 10000", |n| (5..=10_000).contains(n));
    let d: usize = args.get("width", "a multiple of 4 from 16 to 1024, since there are four heads", |d| {
        (16..=1024).contains(d) && d % 4 == 0
    });
    let lr = args.get("rate", "a positive number, such as 0.002", |r: &f64| r.is_finite() && *r > 0.0);
    let mut folder = args.folder(&json!({
        "task": args.text("task"), "seeds": seeds, "seed": seed, "steps": steps, "pretrain": before, "tables": most, "often": often,
        "width": d, "rate": lr,
    }))?;
    println!("about {} on two cores", if quick { "30 seconds" } else { "3 minutes for each seed" });
    let start = Instant::now();
    let data = Data::load(most, often, if quick { 1024 } else { 4096 }, true)?;
    // The tables of `table-type` that are not for training are left out of pre-training even if this task is not run.
    let (mut tasks, mut held): (Vec<Box<dyn Task>>, BTreeSet<usize>) = (Vec::new(), BTreeSet::new());
    let chosen = |k: usize| wanted.is_none_or(|w| w == k);
    if chosen(0) {
        tasks.push(Box::new(Relation::new(&data)?));
    }
    match TableType::new(&data) {
        Ok(task) => {
            held.extend(task.test.iter().chain(&task.spare));
            if chosen(1) {
                tasks.push(Box::new(task));
            }
        }
        Err(e) if wanted == Some(1) => return Err(e),
        Err(e) if wanted.is_none() => println!("{e}. This task is left out"),
        Err(_) => {}
    }
    if chosen(2) {
        tasks.push(Box::new(Similarity::new(&data)?));
    }
    let seen: Vec<usize> = data.pretrain.iter().copied().filter(|t| !held.contains(t)).collect();
    let recipe = Recipe { d, layers: 2, sets: Sets::default(), captions: true, steps, batch: BATCH, lr, seed };
    let recipes: Vec<Recipe> = (0..seeds).map(|i| Recipe { seed: seed + i, ..recipe.clone() }).collect();
    let (mut starts, mut notes) = (Vec::new(), Vec::new());
    for recipe in &recipes {
        let tables = seen.iter().map(|&t| data.with_headers[t].clone()).collect();
        let pretraining = Pretraining::new(&data, tables, &Recipe { steps: before, ..recipe.clone() })?;
        let what = format!("pre-training on {} tables, seed {}", seen.len(), recipe.seed);
        let (curve, seconds) =
            pretraining.train(&pretraining.params.all(), &what, |records, t| pretraining.losses(records, t))?;
        notes.push(json!({"seed": recipe.seed, "losses": curve, "seconds": seconds}));
        starts.push(pretraining.params);
    }
    let mut results = Vec::new();
    for task in &tasks {
        results.push(study_task(&**task, &data, &recipes, &starts, &mut folder)?);
    }
    folder.finish(&json!({
        "real_tables": data.real, "pretrain_tables": seen.len(), "pretraining": notes, "tasks": results,
        "tries": "one learning rate for every network, none for the baselines", "seconds": start.elapsed().as_secs_f64(),
    }))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
