//! The kernel sources, carried inside the binary. One line per file of `cuda/`; a test fails when one is missing.

/// The only header a kernel file includes.
pub const PRELUDE: (&str, &str) = ("prelude.cuh", include_str!("../../../cuda/prelude.cuh"));

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../cuda/", $name, ".cu")))),*]
    };
}

/// Name (without `.cu`) and text of every kernel file.
#[rustfmt::skip] // one line per file
pub static SOURCES: &[(&str, &str)] = sources![
    "attention",
    "attention_mma",
    "binary",
    "conv",
    "device_check",
    "embedding",
    "factored",
    "gemm",
    "gemm_grouped",
    "index",
    "loss",
    "move",
    "norm",
    "optim",
    "random",
    "reduce",
    "rotary",
    "segment",
    "softmax",
    "sort",
    "step",
    "unary",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_file_is_in_the_table() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .filter_map(|e| e.unwrap().file_name().to_str().unwrap().strip_suffix(".cu").map(String::from))
            .collect();
        files.sort();
        let mut table: Vec<&str> = SOURCES.iter().map(|(name, _)| *name).collect();
        table.sort();
        assert_eq!(files, table, "add the file to SOURCES in src/device/cuda/sources.rs");
    }

    #[test]
    fn kernel_files_include_the_prelude_and_nothing_else() {
        for (name, text) in SOURCES {
            let includes: Vec<&str> = text.lines().filter(|l| l.trim_start().starts_with("#include")).collect();
            assert_eq!(includes, ["#include \"prelude.cuh\""], "{name}.cu");
        }
    }
}
