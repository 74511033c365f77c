//! Damaged files: every reader is given small valid files with changes at random, such as a file from a stranger or a bad disk has. It may
//! refuse them or take them, but not panic, abort, hang, or take more memory than four times the file and 64 MiB.
//!
//! `PRISMGRAD_FUZZ_SECONDS` says how long each reader is tried (2 by default), `PRISMGRAD_FUZZ_SEED` where the changes begin. What is being
//! read lies in the system's temporary folder, so that it is still there after an abort.

mod common {
    pub mod mixtral;
    pub mod scratch;
}

use common::scratch::Scratch;
use prismgrad::data::{Bpe, Folder, Table, TableCounts, Tokenizer, images};
use prismgrad::io::{CheckpointFolder, SafeTensors, load_arrays, save_arrays};
use prismgrad::models::{Gpt, GptConfig, Mixtral, MixtralConfig};
use prismgrad::nn::{Ctx, Init, LoraConfig, Params, Strict};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::privacy::StepLog;
use prismgrad::step::{PlainStep, TrainStep};
use prismgrad::train::{Existing, RunFolder, state};
use prismgrad::{Array, DType, Result, Tensor};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One reader at a time: memory is counted for the process.
static ALONE: Mutex<()> = Mutex::new(());

/// A change; places are shares of the length in 2⁻¹⁶.
#[derive(Clone, Debug)]
enum Change {
    Flip(u16, u8),
    Cut(u16),
    Insert(u16, Vec<u8>),
    Remove(u16, u16),
    Copy(u16, u16, u16),
    /// The number that stands nearest after the place becomes another word.
    Number(u16, usize),
    /// The eight bytes there, little-endian.
    Word(u16, u64),
}

/// What takes the place of a number in a text.
const WORDS: &[&str] = &[
    "0",
    "1",
    "2",
    "3",
    "7",
    "64",
    "255",
    "256",
    "65535",
    "65536",
    "1000000",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-1",
    "-0",
    "0.5",
    "1e-320",
    "1e308",
    "1e999",
    "-1e999",
    "null",
    "true",
    "\"\"",
    "\"x\"",
    "[]",
    "{}",
    "[[[[[[[[",
    "NaN",
];

fn change() -> impl Strategy<Value = Change> {
    let big = prop_oneof![
        Just(0u64),
        Just(1),
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 40),
        Just(u32::MAX as u64),
        any::<u64>()
    ];
    prop_oneof![
        3 => (any::<u16>(), any::<u8>()).prop_map(|(p, b)| Change::Flip(p, b)),
        1 => any::<u16>().prop_map(Change::Cut),
        1 => (any::<u16>(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(p, b)| Change::Insert(p, b)),
        1 => (any::<u16>(), any::<u16>()).prop_map(|(p, n)| Change::Remove(p, n)),
        1 => (any::<u16>(), any::<u16>(), any::<u16>()).prop_map(|(a, b, c)| Change::Copy(a, b, c)),
        6 => (any::<u16>(), 0..WORDS.len()).prop_map(|(p, w)| Change::Number(p, w)),
        1 => (any::<u16>(), big).prop_map(|(p, w)| Change::Word(p, w)),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    let n = bytes.len();
    let at = |p: u16| (p as usize * n) >> 16;
    match change {
        Change::Flip(p, b) if n > 0 => bytes[at(*p)] ^= b,
        Change::Cut(p) => bytes.truncate(at(*p)),
        Change::Insert(p, new) => drop(bytes.splice(at(*p)..at(*p), new.iter().copied())),
        Change::Remove(p, q) => drop(bytes.drain(at(*p.min(q))..at(*p.max(q)))),
        Change::Copy(p, q, to) => {
            let part = bytes[at(*p.min(q))..at(*p.max(q))].to_vec();
            let part = &part[..part.len().min(4096)];
            drop(bytes.splice(at(*to)..at(*to), part.iter().copied()));
        }
        Change::Number(p, word) => {
            let from = at(*p);
            let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit).map(|i| from + i) else { return };
            let end = bytes[start..]
                .iter()
                .position(|b| !(b.is_ascii_digit() || b".eE+-".contains(b)))
                .map_or(n, |i| start + i);
            drop(bytes.splice(start..end, WORDS[*word].bytes()));
        }
        Change::Word(p, word) if n >= 8 => {
            let from = at(*p).min(n - 8);
            bytes[from..from + 8].copy_from_slice(&word.to_le_bytes());
        }
        _ => {}
    }
}

/// All files of a folder and the folders in it, by path.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, at: &Path, all: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(root, &path, all),
                false => {
                    let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
                    all.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
    }
    let mut all = BTreeMap::new();
    walk(folder, folder, &mut all);
    all
}

fn put(folder: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in files {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

fn seconds() -> f64 {
    std::env::var("PRISMGRAD_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2.0)
}

/// Tries a reader on changed copies of what `make` writes into a folder. `read` gets the folder; whether the files are taken or refused is
/// its own affair. `mend` may put checksums right, so that changes get past them.
fn fuzz(
    name: &str,
    make: impl Fn(&Path),
    mend: impl Fn(&mut BTreeMap<String, Vec<u8>>),
    read: impl Fn(&Path) -> Result<()>,
) {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let folder = Scratch::new(&format!("fuzz-{name}"));
    make(&folder);
    let good = files(&folder);
    read(&folder).unwrap_or_else(|e| panic!("{name}: the files as they were written are refused: {e}"));
    let seed: u64 = std::env::var("PRISMGRAD_FUZZ_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..8 + name.len().min(24)].copy_from_slice(&name.as_bytes()[..name.len().min(24)]);
    let config = Config { failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let cases = (any::<prop::sample::Index>(), prop::collection::vec(change(), 1..4));
    let attempt = |(which, changes): &(prop::sample::Index, Vec<Change>)| -> (String, Option<String>, bool) {
        let mut now = good.clone();
        let file = now.keys().nth(which.index(good.len())).unwrap().clone();
        changes.iter().for_each(|c| apply(now.get_mut(&file).unwrap(), c));
        mend(&mut now);
        let _ = std::fs::remove_dir_all(&*folder);
        put(&folder, &now);
        let size: usize = now.values().map(Vec::len).sum();
        let (start, before) = (Instant::now(), NOW.load(Ordering::Relaxed));
        PEAK.store(before, Ordering::Relaxed);
        let done = catch_unwind(AssertUnwindSafe(|| read(&folder)));
        let (took, most) = (start.elapsed(), PEAK.load(Ordering::Relaxed).saturating_sub(before));
        let wrong = match &done {
            Err(e) => {
                let text = e.downcast_ref::<String>().cloned().or(e.downcast_ref::<&str>().map(|s| s.to_string()));
                Some(format!("a panic: {}", text.unwrap_or_default()))
            }
            Ok(_) if took > Duration::from_secs(10) => Some(format!("{took:?}")),
            Ok(_) if most > 4 * size + (64 << 20) => Some(format!("{most} bytes of memory for {size} bytes of files")),
            Ok(_) => None,
        };
        (file, wrong, matches!(done, Ok(Ok(()))))
    };
    let (begin, mut tried, mut taken) = (Instant::now(), 0u64, 0u64);
    while begin.elapsed().as_secs_f64() < seconds() {
        let mut tree = cases.new_tree(&mut runner).unwrap();
        let case = tree.current();
        let (mut file, wrong, fine) = attempt(&case);
        (tried, taken) = (tried + 1, taken + fine as u64);
        let Some(mut wrong) = wrong else { continue };
        // Fewer and smaller changes that do the same.
        let (mut least, mut more) = (case, tree.simplify());
        while more {
            let now = tree.current();
            more = match attempt(&now) {
                (f, Some(w), _) => {
                    (file, wrong, least) = (f, w, now);
                    tree.simplify()
                }
                _ => tree.complicate(),
            };
        }
        let _ = attempt(&least);
        let text = String::from_utf8_lossy(&std::fs::read(folder.join(&file)).unwrap_or_default()).into_owned();
        panic!("{name}, after {tried} tries: {wrong}; {file} with {:?}:\n{text:.2000}", least.1);
    }
    println!("{name}: {tried} changed copies, {taken} taken, {} refused", tried - taken);
    assert!(tried > 0);
}

fn nothing(_: &mut BTreeMap<String, Vec<u8>>) {}

fn gpt() -> GptConfig {
    GptConfig { initializer_range: 0.3, ..GptConfig::small(23, 12, 1, 8, 2) }
}

/// One pass over a model that was taken: its settings have to make sense to the end.
fn pass(forward: impl Fn(&Array) -> Result<Tensor>, vocabulary: usize, positions: usize) {
    let ids = Array::from_slice(&[1u32, 2][..positions.min(2)], &[1, positions.min(2)]).unwrap();
    if vocabulary > 2 {
        let _ = prismgrad::no_grad(|| forward(&ids));
    }
}

#[test]
fn safetensors() {
    let make = |dir: &Path| {
        let arrays: Vec<(String, Array)> = [DType::F32, DType::BF16, DType::I64, DType::U8]
            .into_iter()
            .enumerate()
            .map(|(i, d)| (format!("a.{i}"), Array::generate(&[i, 3], d, |k| k as f64)))
            .collect();
        save_arrays(dir.join("x.safetensors"), &arrays, &[("format", "pt")]).unwrap();
        trained().0.save(dir.join("m.safetensors")).unwrap();
    };
    fuzz("safetensors", make, nothing, |dir| {
        trained().0.load(dir.join("m.safetensors"), Strict::Yes)?;
        let file = SafeTensors::open(dir.join("x.safetensors"))?;
        for t in file.tensors() {
            file.read(&t.name)?;
        }
        load_arrays(dir.join("x.safetensors")).map(drop)
    });
}

#[test]
fn models() {
    let mixtral = || MixtralConfig { sliding_window: Some(4), ..common::mixtral::mixtral() };
    let make = |dir: &Path| {
        let span = prismgrad::ops::attention::Span::Window(3);
        Gpt::new(gpt().with_spans(vec![span]), 1).unwrap().save(dir.join("gpt")).unwrap();
        Gpt::new(gpt().rotary(), 1).unwrap().save(dir.join("rotary")).unwrap();
        let dir = dir.join("mixtral");
        Mixtral::new(mixtral(), 1).unwrap().save(&dir).unwrap();
        let file = "model.safetensors";
        let names = load_arrays(dir.join(file)).unwrap().into_iter().map(|(n, _)| n);
        let map: BTreeMap<String, &str> = names.map(|n| (n, file)).collect();
        let index = serde_json::json!({ "weight_map": map });
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    fuzz("models", make, nothing, |dir| {
        for name in ["gpt", "rotary"] {
            let m = Gpt::load(dir.join(name))?;
            pass(|ids| m.forward(ids, &Ctx::eval()), m.config().vocab_size, m.config().n_positions);
        }
        let m = Mixtral::load(dir.join("mixtral"))?;
        pass(|ids| m.forward(ids, &Ctx::eval()), m.config().vocab_size, m.config().max_position_embeddings);
        Ok(())
    });
}

#[test]
fn adapters() {
    let make = |dir: &Path| {
        let mut m = Gpt::new(gpt(), 1).unwrap();
        m.add_lora(&LoraConfig::new(2, 4.0, &["c_attn", "c_fc"])).unwrap();
        m.save_lora(dir).unwrap();
    };
    fuzz("adapters", make, nothing, |dir| {
        let mut m = Gpt::new(gpt(), 1)?;
        m.load_lora(dir)?;
        pass(|ids| m.forward(ids, &Ctx::eval()), 23, 12);
        m.merge_lora()
    });
}

#[test]
fn tokenizers() {
    const TEXT: &str = "fn main() { let main = 1; } the main thing\u{3000}日本 it's";
    let make = |dir: &Path| Bpe::train([TEXT], 280).unwrap().save(dir.join("tokenizer.json")).unwrap();
    fuzz("tokenizer", make, nothing, |dir| {
        let bpe = Bpe::load(dir.join("tokenizer.json"))?;
        let ids = bpe.encode(TEXT);
        assert!(ids.iter().all(|&id| (id as usize) < bpe.vocab_size()), "an id outside of the vocabulary");
        let _ = bpe.decode(&ids);
        bpe.save(dir.join("again.json"))
    });
}

fn trained() -> (Params, PlainStep) {
    let params = Params::new(0, DType::F32);
    let w = params.param("w", &[3, 2], Init::Ones).unwrap();
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(0.1)).unwrap();
    step.run_one(|| w.per_sample(2)?.sum(&[1, 2], false)).unwrap();
    (params, step)
}

#[test]
fn checkpoints() {
    let make = |dir: &Path| {
        let (params, step) = trained();
        state::save(&CheckpointFolder::open(dir).unwrap(), 1, Some(0.5), &params, &step, &vec![1u32, 2]).unwrap();
    };
    // Sizes and checksums are put right in half of the cases where the manifest can still be read.
    let mend = |files: &mut BTreeMap<String, Vec<u8>>| {
        if files.values().flatten().fold(0u8, |sum, b| sum.wrapping_add(*b)).is_multiple_of(2) {
            return;
        }
        let Some(name) = files.keys().find(|n| n.ends_with("manifest.json")).cloned() else { return };
        let Ok(mut manifest) = serde_json::from_slice::<serde_json::Value>(&files[&name]) else { return };
        let Some(records) = manifest.get_mut("files").and_then(|f| f.as_array_mut()) else { return };
        for r in records {
            let of = r["name"].as_str().and_then(|n| files.iter().find(|(f, _)| f.ends_with(&format!("/{n}"))));
            if let (Some((_, bytes)), true) = (of, r.is_object()) {
                r["bytes"] = bytes.len().into();
                r["crc32"] = crc32fast::hash(bytes).into();
            }
        }
        files.insert(name, manifest.to_string().into_bytes());
    };
    let read = |dir: &Path| {
        let latest = CheckpointFolder::open(dir)?.latest()?;
        let Some(c) = latest.checkpoint else { return Err(prismgrad::Error::invalid("fuzz", "none")) };
        c.step();
        let _ = state::extra::<Vec<u32>>(&c);
        let (params, mut step) = trained();
        let before = (params.all()[0].value().to_bytes(), step.steps());
        let done = state::load::<Vec<u32>>(&c, &params, &mut step).map(drop);
        if done.is_err() {
            assert_eq!(
                (params.all()[0].value().to_bytes(), step.steps()),
                before,
                "a refused checkpoint changed something"
            );
        }
        done
    };
    fuzz("checkpoints", make, mend, read);
}

#[test]
fn run_folders() {
    let config = || serde_json::json!({"lr": 0.1, "layers": [1, 2], "name": "x"});
    let make = |dir: &Path| {
        let mut run = RunFolder::create(dir, &config(), Existing::Refuse, &[]).unwrap();
        (1..4).for_each(|i| run.log(i, &serde_json::json!({"loss": 1.0 / i as f64})).unwrap());
        run.finish(&serde_json::json!({"loss": 0.3})).unwrap();
        let mut log = StepLog::open(dir.join("privacy.jsonl"), "key".into()).unwrap();
        (0..3).for_each(|i| log.write(i, Some(format!("{i:x}")), 1.0, 0.1).unwrap());
    };
    fuzz("runs", make, nothing, |dir| {
        let log = StepLog::open(dir.join("privacy.jsonl"), "key".into())?;
        let mut all = prismgrad::privacy::Accountant::new();
        log.history(None).into_iter().try_for_each(|(sigma, rate)| all.record(sigma, rate, 1))?;
        let mut run = RunFolder::create(dir, &config(), Existing::Resume, &[])?;
        run.series("loss")?;
        run.rewind(2)?;
        run.checkpoints()?.latest().map(drop)
    });
}

#[test]
fn data_files() {
    let make = |dir: &Path| {
        std::fs::write(dir.join("t.csv"), "name#year#points\na#1990#3\nb#1991#4 (5)\nc##\n").unwrap();
        std::fs::create_dir(dir.join("texts")).unwrap();
        std::fs::write(dir.join("texts/t.txt"), "a text\nof two lines\n").unwrap();
        let mut images = vec![0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3];
        images.extend(0..18);
        std::fs::write(dir.join("images"), images).unwrap();
        std::fs::write(dir.join("labels"), [0, 0, 8, 1, 0, 0, 0, 2, 7, 1]).unwrap();
    };
    fuzz("data", make, nothing, |dir| {
        let bytes = std::fs::read(dir.join("t.csv")).unwrap();
        for separator in ['#', ',', '日'] {
            if let Some(t) = Table::parse("t", "", &bytes, separator, &mut TableCounts::default()) {
                assert!(t.rows.iter().all(|r| r.len() == t.columns()), "a ragged table");
                t.column(0).count();
            }
        }
        let set = images::idx(dir.join("images"), dir.join("labels"))?;
        set.shuffled(1).split(0.5);
        set.tensors(&(0..set.len()).collect::<Vec<_>>())?;
        Folder::new(dir.join("texts")).load().map(drop)
    });
}
