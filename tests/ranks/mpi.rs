//! Ranks as processes under `mpirun`: the same numbers as ranks that are threads, bit for bit, and faults that end everybody.
#![cfg(feature = "mpi")]

use crate::common::records::losses;
use crate::common::values::values;
use prismgrad::dist::{Communicator, Local, Mpi};
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::privacy::{ClipFn, ClipStyle};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, Stage, TrainStep};
use prismgrad::{Array, DType, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// What a rank under `mpirun` is to do.
const WHAT: &str = "PRISMGRAD_TEST_MPI";
const OUT: &str = "PRISMGRAD_TEST_MPI_OUT";

/// Whether `mpirun` is here; a machine that must have it fails without.
fn mpirun() -> bool {
    let here = Command::new("mpirun").arg("--version").output().is_ok_and(|o| o.status.success());
    assert!(here || std::env::var_os("PRISMGRAD_REQUIRE_ALL").is_none(), "no mpirun: apt-get install openmpi-bin");
    if !here {
        eprintln!("not tested: no mpirun on this machine");
    }
    here
}

/// Runs `as_a_rank` of this program as `n` processes.
fn launch(n: usize, what: &str, out: &Path) -> Output {
    Command::new("timeout")
        .args(["120", "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", &n.to_string()])
        .args(["-x", WHAT, "-x", OUT])
        .arg(std::env::current_exe().unwrap())
        // The folder is no test's name; it tells these processes from others.
        .args(["--exact", "mpi::as_a_rank", out.to_str().unwrap(), "--nocapture", "--test-threads", "1"])
        .env(WHAT, what)
        .env(OUT, out)
        .output()
        .unwrap()
}

/// Whether a process that was launched with this folder is still there a moment later.
fn orphans(out: &Path) -> bool {
    std::thread::sleep(Duration::from_millis(300));
    let found = std::fs::read_dir("/proc").unwrap().filter_map(|p| std::fs::read(p.ok()?.path().join("cmdline")).ok());
    let (folder, own) = (out.to_str().unwrap().to_string(), std::env::current_exe().unwrap());
    found
        .map(|c| String::from_utf8_lossy(&c).to_string())
        .any(|c| c.contains(&folder) && c.starts_with(own.to_str().unwrap()))
}

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("prismgrad-mpi-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// All collectives, with results that tell ranks and places apart.
fn collectives(r: &dyn Communicator) -> Result<Vec<f64>> {
    let (n, me) = (r.size(), r.rank() as f64);
    let mut out = Vec::new();
    // Sums in the order of the ranks: 1e16 + 1 − 1e16 depends on it.
    let x = Array::generate(&[3 * n], DType::F64, |i| [1e16, 1.0, -1e16, 1.0][(r.rank() + i) % 4] * (1.0 + i as f64));
    out.extend(r.all_reduce("x", &x)?.to_f64());
    out.extend(r.reduce_scatter("x", &x)?.to_f64());
    out.extend(r.all_gather("x", &Array::full(&[2], me, DType::F64))?.to_f64());
    let parts: Vec<usize> = (0..n).map(|r| 2 * r % 3).collect();
    out.extend(r.all_gather_parts("x", &Array::full(&[parts[r.rank()]], me, DType::F32), &parts)?.to_f64());
    out.extend(r.broadcast("x", &x, n - 1)?.to_f64());
    out.extend(r.all_to_all("x", &x)?.to_f64());
    let rows: Vec<usize> = (0..n).map(|to| (r.rank() + 2 * to) % 3).collect();
    let all = Array::generate(&[rows.iter().sum(), 2], DType::F64, |i| me * 100.0 + i as f64);
    let (got, counts) = r.all_to_all_rows("rows", &all, &rows)?;
    out.extend(got.to_f64());
    out.extend(counts.iter().map(|c| *c as f64));
    let parts: Vec<usize> = (0..n).map(|r| [2 * n, n, 0, 0][r]).collect();
    out.extend(r.reduce_scatter_parts("x", &x, &parts)?.to_f64());
    let group = r.split(r.rank() % 2)?;
    out.extend(group.all_reduce("x", &Array::full(&[1], me, DType::F64))?.to_f64());
    r.barrier()?;
    out.extend([r.traffic().calls as f64, r.traffic().bytes as f64]);
    Ok(out)
}

/// Six steps of a model at a stage, privately or not: parameters, and what was sent.
fn train(rank: Box<dyn Communicator>, stage: Stage, private: bool) -> Result<Vec<f64>> {
    let (me, n) = (rank.rank(), rank.size());
    let model = Gpt::with_dtype(GptConfig::small(17, 6, 1, 32, 2), 3, DType::F32)?;
    let (params, schedule) = (model.params().all(), Schedule::constant(1e-2));
    let sent = |s: &dyn TrainStep| s.ranks().map_or(0, |r| r.traffic().bytes) as f64;
    let mut out = Vec::new();
    if private {
        let c = PrivacyConfig::target(1e3, 1e-4).records(30).expected_batch(6.0).steps(50).noise_multiplier(1.0);
        let p = Privacy::new(c.style(ClipStyle::AllLayer).clip(ClipFn::Abadi), NoiseKey::from_bytes([7; 32]))?;
        let mut step = PrivateStep::new(&params, p, AdamW::default(), schedule)?.with_zero(rank, stage)?;
        for _ in 0..6 {
            step.run(2, |ids| losses(&model, ids))?;
        }
        out.push(sent(&step));
        out.extend(step.last_gradient().to_f64());
        step.gather_parameters()?;
    } else {
        let mut step = PlainStep::new(&params, AdamW::default(), schedule)?.with_zero(rank, stage)?;
        for t in 0..6 {
            let mine: Vec<usize> = (0..7).map(|i| i + 7 * t).filter(|i| i % n == me).collect();
            out.push(step.run(mine.chunks(2), |ids| losses(&model, ids))?.loss()?);
        }
        out.push(sent(&step));
        step.gather_parameters()?;
    }
    out.extend(values(&params));
    Ok(out)
}

const STAGES: [Stage; 4] = [Stage::Replicated, Stage::Optimizer, Stage::Gradients, Stage::Parameters];

/// What a rank does, and its result.
fn body(r: Box<dyn Communicator>) -> Result<Vec<Vec<f64>>> {
    let mut out = vec![collectives(&r)?];
    for stage in STAGES {
        for private in [false, true] {
            out.push(train(r.split(0)?, stage, private)?);
        }
    }
    Ok(out)
}

/// Not a test of its own: what `launch` runs under `mpirun`.
#[test]
fn as_a_rank() {
    let (Ok(what), Some(out)) = (std::env::var(WHAT), std::env::var_os(OUT)) else { return };
    let patience = Duration::from_secs(if what == "train" { 60 } else { 3 });
    let ranks = Mpi::world(patience).unwrap();
    let me = ranks.rank();
    let say = |text: String| std::fs::write(Path::new(&out).join(format!("rank{me}")), text).unwrap();
    if what == "train" {
        let results = body(Box::new(ranks)).unwrap();
        let bits: Vec<Vec<u64>> = results.iter().map(|r| r.iter().map(|x| x.to_bits()).collect()).collect();
        return say(serde_json::to_string(&bits).unwrap());
    }
    let x = Array::ones(&[1000], DType::F32);
    let mut said = String::new();
    for t in 0..4 {
        let odd = t == 2 && me == 1;
        if odd && what == "die" {
            say("dead".into());
            std::process::abort();
        }
        if odd && what == "stall" {
            say("stalled".into());
            std::thread::sleep(Duration::from_secs(5));
        }
        if odd && what == "abort" {
            ranks.abort("its data are torn");
        }
        let result = match what.as_str() {
            "shape" if odd => ranks.all_reduce("gradients", &Array::ones(&[1001], DType::F32)),
            "order" if odd => ranks.broadcast("gradients", &x, 0),
            _ => ranks.all_reduce("gradients", &x),
        };
        if let Err(e) = result {
            said = e.to_string();
            break;
        }
    }
    say(if said.is_empty() { "no error".into() } else { said });
    // As a program that ends with an error: after it has said so, and not before the others could.
    std::thread::sleep(Duration::from_millis(500));
    std::process::exit(1);
}

#[test]
fn processes_compute_what_threads_compute() {
    if !mpirun() {
        return;
    }
    for n in [2, 4] {
        let out = folder(&format!("train{n}"));
        let ran = launch(n, "train", &out);
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        let threads = Local::run(n, |rank| body(Box::new(rank)));
        for (r, want) in threads.into_iter().enumerate() {
            let got: Vec<Vec<u64>> =
                serde_json::from_str(&std::fs::read_to_string(out.join(format!("rank{r}"))).unwrap()).unwrap();
            for (i, (got, want)) in got.iter().zip(want.unwrap()).enumerate() {
                let got: Vec<f64> = got.iter().map(|b| f64::from_bits(*b)).collect();
                assert_eq!(got, want, "rank {r} of {n}, part {i}");
            }
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn faults_end_every_rank_within_the_deadline() {
    if !mpirun() {
        return;
    }
    for (what, expected) in [
        ("shape", "different paths"),
        ("order", "different paths"),
        ("stall", "nothing of ranks [1]"),
        ("abort", "rank 1 is gone: its data are torn"),
    ] {
        let (out, start) = (folder(what), Instant::now());
        let ran = launch(3, what, &out);
        let took = start.elapsed();
        assert!(!ran.status.success());
        assert!(took < Duration::from_secs(3 + 2 + 5), "{what}: {took:?}");
        assert!(!orphans(&out), "{what} left a process behind");
        for r in [0, 2] {
            let said = std::fs::read_to_string(out.join(format!("rank{r}"))).unwrap_or_default();
            assert!(said.contains(expected) && said.contains(&format!("rank {r} at")), "{what}, rank {r}: {said}");
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
    // A process that is killed: mpirun ends the others.
    let (out, start) = (folder("die"), Instant::now());
    assert!(!launch(3, "die", &out).status.success());
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(!orphans(&out), "a process outlived the one that died");
    std::fs::remove_dir_all(&out).unwrap();
}
