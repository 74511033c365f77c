//! Whole stories of data, files and run folders, some of them told by a child process that is stopped, killed, or whose
//! disk is full. The child is this test program itself, started for one test with `PRISMGRAD_CHILD` set.

use crate::common::scratch::Scratch;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

#[cfg(feature = "bpe")]
use prismgrad::data::{Bpe, ByteTokenizer, CrateSources, IGNORE, Tokenizer};
use prismgrad::io::{CheckpointFolder, ElementType, Entry, SafeTensors, safetensors};
use prismgrad::train::{Existing, RunFolder, interrupt};
use serde_json::json;

/// A shell line in which `"$0" "$@"` is this program, told to run one test as the child.
fn child(test: &str, folder: &Path, shell: &str) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(shell).arg(env::current_exe().unwrap());
    command.args([&format!("io_data::{test}"), "--exact", "--nocapture", "--test-threads=1"]);
    command.env("PRISMGRAD_CHILD", folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn child_folder() -> Option<PathBuf> {
    env::var_os("PRISMGRAD_CHILD").map(PathBuf::from)
}

fn wait_for(what: impl Fn() -> bool) {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < Duration::from_secs(60), "the child did not get there");
        thread::sleep(Duration::from_millis(5));
    }
}

fn save(folder: &CheckpointFolder, step: u64, size: usize) -> prismgrad::Result<PathBuf> {
    folder.save(step, None, |w| {
        let bytes: Vec<u8> = (0..size).map(|i| (i as u64 * step) as u8).collect();
        w.tensors("model.safetensors", &[Entry::new("w", ElementType::U8, [size], bytes)], &BTreeMap::new())?;
        w.json("state.json", &json!({"step": step}))
    })
}

#[cfg(feature = "bpe")]
#[test]
fn from_crate_sources_to_samples() {
    let (train, held) = CrateSources::new().max_bytes(400_000).load().unwrap().split(0.1, 0);
    assert!(!held.documents.is_empty() && held.bytes() < train.bytes());
    let bpe = Bpe::train(train.texts(), 512).unwrap();
    assert_eq!(bpe.vocab_size(), 512);
    let (bpe_set, byte_set) = (train.tokenize(&bpe), train.tokenize(&ByteTokenizer));
    assert!(bpe_set.tokens().len() * 17 < byte_set.tokens().len() * 10, "at least 1.7 bytes per token");
    for (i, document) in train.documents.iter().enumerate() {
        assert_eq!(bpe.decode(bpe_set.document(i)).unwrap(), document.text);
    }
    let chunks = bpe_set.chunks(64).unwrap();
    let targets: usize = (0..chunks.len()).map(|i| chunks.target_count(i)).sum();
    assert_eq!(targets, bpe_set.tokens().len() - bpe_set.documents());
    let counted = (0..chunks.len()).flat_map(|i| chunks.sample(i).1).filter(|&t| t != IGNORE).count();
    assert_eq!(counted, targets);
    assert!(chunks.owners().is_sorted() && chunks.owner(0) == 0);
    let by_crate = chunks.with_owners(&train.top_folder_owners()).unwrap();
    assert!(by_crate.owners().iter().max() < Some(&(train.documents.len() as u32)));
}

/// Ctrl-C once: the run stops by itself. Twice: it is gone.
#[test]
#[cfg(unix)]
fn the_first_signal_asks_and_the_second_kills() {
    if let Some(folder) = child_folder() {
        interrupt::install().unwrap();
        interrupt::install().unwrap();
        fs::write(folder.join("ready"), "").unwrap();
        while !prismgrad::train::interrupted() {
            thread::sleep(Duration::from_millis(1));
        }
        fs::write(folder.join("asked"), "").unwrap();
        thread::sleep(Duration::from_secs(if folder.ends_with("patient") { 60 } else { 0 }));
        return;
    }
    let scratch = Scratch::new("it-signal");
    let cases = [("quick", "INT", Some(0)), ("patient", "INT", Some(130)), ("patient", "TERM", Some(143))];
    for (name, signal, code) in cases {
        let folder = scratch.join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let test = "the_first_signal_asks_and_the_second_kills";
        let mut process = child(test, &folder, "exec \"$0\" \"$@\"").spawn().unwrap();
        let id = process.id();
        let send = || {
            let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {id}")]).status();
            assert!(sent.unwrap().success());
        };
        wait_for(|| folder.join("ready").exists());
        send();
        wait_for(|| folder.join("asked").exists());
        if name == "patient" {
            send();
        }
        assert_eq!(process.wait().unwrap().code(), code, "{name} {signal}");
    }
}

/// A process killed at any point of its writing leaves a checkpoint that is whole, and metrics that can be cut to it.
#[test]
#[cfg(unix)]
fn kill_9_loses_nothing() {
    if let Some(folder) = child_folder() {
        let mut run = RunFolder::create(&folder, &json!({}), Existing::Resume, &[]).unwrap();
        let checkpoints = run.checkpoints().unwrap().keep_last(2);
        let start = checkpoints.latest().unwrap().checkpoint.map_or(0, |c| c.step());
        run.rewind(start).unwrap();
        for step in start + 1.. {
            run.log(step, &json!({"loss": 1})).unwrap();
            save(&checkpoints, step, 300_000).unwrap();
        }
    }
    let scratch = Scratch::new("it-kill");
    let folder = scratch.join("run");
    let mut reached = 0;
    for round in 0..6u64 {
        let mut process = child("kill_9_loses_nothing", &folder, "exec \"$0\" \"$@\"").spawn().unwrap();
        let newest = || {
            let names = fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten();
            names.filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok()).max().unwrap_or(0)
        };
        wait_for(|| newest() > reached);
        thread::sleep(Duration::from_micros(3000 + 1700 * round));
        process.kill().unwrap();
        process.wait().unwrap();
        let mut run = RunFolder::create(&folder, &json!({}), Existing::Resume, &[]).unwrap();
        let checkpoint = run.checkpoints().unwrap().latest().unwrap().checkpoint.unwrap();
        assert!(checkpoint.step() > reached, "progress is kept");
        reached = checkpoint.step();
        assert_eq!(checkpoint.tensors("model.safetensors").unwrap().read("w").unwrap().len(), 300_000);
        run.rewind(reached).unwrap();
        let logged: Vec<f64> = run.series("loss").unwrap().into_iter().map(|p| p.0).collect();
        assert_eq!(logged, (1..=reached).map(|s| s as f64).collect::<Vec<_>>());
        let mut left = fs::read_dir(folder.join("checkpoints")).unwrap().flatten();
        assert!(left.all(|e| !e.file_name().to_string_lossy().contains(".tmp-")), "cleaned up");
    }
}

/// With a limit on file size, writing fails in the middle of a file, as on a full disk.
#[test]
#[cfg(unix)]
fn a_full_disk_leaves_what_was_there() {
    if let Some(folder) = child_folder() {
        let checkpoints = CheckpointFolder::open(folder.join("checkpoints")).unwrap();
        let error = save(&checkpoints, 2, 10 << 20).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains("cannot write"), "{error}");
        let path = folder.join("m.safetensors");
        let entry = Entry::new("w", ElementType::U8, [10 << 20], vec![1; 10 << 20]);
        assert!(safetensors::write(&path, &[entry], &BTreeMap::new()).is_err());
        // Small files still fit: the program goes on.
        save(&checkpoints, 3, 100).unwrap();
        return;
    }
    let scratch = Scratch::new("it-full");
    let checkpoints = CheckpointFolder::open(scratch.join("checkpoints")).unwrap();
    save(&checkpoints, 1, 1000).unwrap();
    let path = scratch.join("m.safetensors");
    safetensors::write(&path, &[Entry::new("w", ElementType::U8, [1], vec![7])], &BTreeMap::new()).unwrap();
    // The signal must be ignored for the write to report the error.
    let limited = "trap '' XFSZ; ulimit -f 2048; exec \"$0\" \"$@\"";
    let status = child("a_full_disk_leaves_what_was_there", &scratch, limited).status().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(checkpoints.steps().unwrap(), [1, 3]);
    assert_eq!(checkpoints.at(1).unwrap().step(), 1);
    assert_eq!(SafeTensors::open(&path).unwrap().read("w").unwrap(), [7]);
    assert_eq!(fs::read_dir(scratch.join("checkpoints")).unwrap().count(), 2);
    assert_eq!(fs::read_dir(&*scratch).unwrap().count(), 2, "no temporary file stays");
}
