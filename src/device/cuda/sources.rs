//! The kernel sources, embedded in the binary. `build.rs` lists the files of `cuda/`.

/// The only header a kernel file includes.
pub const PRELUDE: (&str, &str) = ("prelude.cuh", include_str!("../../../cuda/prelude.cuh"));

/// Name (without `.cu`) and text of every kernel file.
pub static SOURCES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/sources.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_include_the_prelude_and_nothing_else() {
        for (name, text) in SOURCES {
            let includes: Vec<&str> = text.lines().filter(|l| l.trim_start().starts_with("#include")).collect();
            assert_eq!(includes, ["#include \"prelude.cuh\""], "{name}.cu");
        }
    }
}
