//! Every kernel file compiles to machine code for every target, without a GPU, and takes the registers, spills and shared
//! memory that `cuda/resources.txt` says. Needs NVRTC: `pip install 'nvidia-cuda-nvrtc==13.0.*'`.

use crate::common::skip::skip;
use prismgrad::device::cuda::{kernels::compile_for, nvrtc::Nvrtc, sources::SOURCES};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

const TARGETS: [&str; 3] = ["sm_80", "sm_90", "sm_90a"];
const HEAD: &str = "\
# What each kernel takes, by target: registers a thread, bytes spilled (stores + loads), bytes of local stack, bytes of
# static shared memory. Compiled by NVRTC 13.0. To write it anew:
#   PRISMGRAD_WRITE_RESOURCES=1 cargo test --test house kernels_compile
";
/// Families that may not spill.
const NO_SPILLS: [&str; 4] = ["gemm", "attention", "norm", "factored"];

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Resources {
    registers: u32,
    spills: u32,
    stack: u32,
    shared: u32,
}

/// The compiler's own words: "Compiling entry function 'f' for 'sm_90'", then "Function properties for f", "0 bytes stack
/// frame, 0 bytes spill stores, 0 bytes spill loads", then "Used 12 registers, used 1 barriers, 64 bytes smem".
fn parse(log: &str) -> BTreeMap<String, Resources> {
    let mut found: BTreeMap<String, Resources> = BTreeMap::new();
    let mut name = None;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            name = rest.split_once('\'').map(|(n, _)| n.to_string());
        }
        let Some(kernel) = &name else { continue };
        // The number in the words before `what`.
        let number = |what: &str| -> Option<u32> {
            let before = &line[..line.find(what)?];
            before.split_whitespace().next_back()?.parse().ok()
        };
        let r = found.entry(kernel.clone()).or_default();
        if let Some(stack) = number(" bytes stack frame") {
            r.stack = stack;
            r.spills = number(" bytes spill stores").unwrap_or(0) + number(" bytes spill loads").unwrap_or(0);
        }
        if let Some(registers) = number(" registers") {
            r.registers = registers;
            r.shared = number(" bytes smem").unwrap_or(0);
        }
    }
    found
}

#[test]
fn the_compilers_words_are_understood() {
    let log = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'a' for 'sm_90'\n\
        ptxas info    : Function properties for a\n\
        \x20   16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
        ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem, 400 bytes cmem[0]\n\
        ptxas info    : Compiling entry function 'b' for 'sm_90'\n\
        ptxas info    : Function properties for b\n\
        \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 12 registers, used 0 barriers\n";
    let found = parse(log);
    assert_eq!(found["a"], Resources { registers: 64, spills: 12, stack: 16, shared: 512 });
    assert_eq!(found["b"], Resources { registers: 12, spills: 0, stack: 0, shared: 0 });
}

#[test]
fn kernels_compile_and_take_what_the_table_says() {
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => nvrtc,
        Err(e) => return skip(&format!("kernels were not compiled: {e}")),
    };
    let jobs: Vec<(&str, &str)> = TARGETS.iter().flat_map(|t| SOURCES.iter().map(|(file, _)| (*t, *file))).collect();
    let compile = |(target, file): &(&str, &str)| -> Result<BTreeMap<String, Resources>, String> {
        let start = Instant::now();
        let compiled = compile_for(file, target, &["--ptxas-options=-v"]).map_err(|e| format!("{target}: {e}"))?;
        println!("{target} {file} in {:.1} s, {} KiB", start.elapsed().as_secs_f32(), compiled.image.len() >> 10);
        let kernels = parse(&compiled.log);
        if compiled.image.starts_with(b"\x7fELF") && !kernels.is_empty() {
            Ok(kernels)
        } else {
            Err(format!("{target}: no kernels in {file}: {}", compiled.log))
        }
    };
    let found: Vec<Result<BTreeMap<String, Resources>, String>> = jobs.par_iter().map(compile).collect();
    let mut lines = vec![];
    let mut wrong = vec![];
    for ((target, file), kernels) in jobs.iter().zip(found) {
        let kernels = match kernels {
            Ok(kernels) => kernels,
            Err(e) => {
                wrong.push(e);
                continue;
            }
        };
        for (name, r) in kernels {
            lines.push(format!("{target} {file} {name} {} {} {} {}", r.registers, r.spills, r.stack, r.shared));
            if r.spills > 0 && NO_SPILLS.iter().any(|family| file.starts_with(family)) {
                wrong.push(format!("{target}: {name} spills {} bytes; no kernel of {file} may", r.spills));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/resources.txt");
    let text = format!("{HEAD}# target file kernel registers spills stack shared\n{}\n", lines.join("\n"));
    if std::env::var_os("PRISMGRAD_WRITE_RESOURCES").is_some() {
        std::fs::write(&path, text).unwrap();
        return;
    }
    if nvrtc.version() != (13, 0) {
        return skip(&format!(
            "everything compiles; NVRTC {:?} is not the table's 13.0, so numbers are not compared",
            nvrtc.version()
        ));
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let table: Vec<&str> = kept.lines().filter(|l| !l.starts_with('#')).collect();
    let gone = table.iter().filter(|l| !lines.iter().any(|n| n == *l)).map(|l| format!("- {l}"));
    let new = lines.iter().filter(|l| !table.contains(&l.as_str())).map(|l| format!("+ {l}"));
    let differ: Vec<String> = gone.chain(new).collect();
    assert!(
        differ.is_empty(),
        "cuda/resources.txt differs (target file kernel registers spills stack shared):\n{}\nif that is meant, write it anew: \
         PRISMGRAD_WRITE_RESOURCES=1 cargo test --test house kernels_compile",
        differ.join("\n")
    );
}
