//! How a kernel file becomes machine code for the emulated device: it is compiled as C++, with a table of its kernels at the end.
//! `build.rs` does this for the files of `cuda/`, and the emulated device, at run time, for the text that comes with a user's op.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The host's C++ compiler, as it is called for kernel files.
pub struct Compiler {
    /// The program.
    pub path: PathBuf,
    /// Options of every call: language, includes.
    pub common: Vec<String>,
    /// Options for kernel files: optimisation, and the instrumentation that the checks need.
    pub kernels: Vec<String>,
    /// Where its results are kept, by the hash of what they were made from.
    pub out: PathBuf,
}

/// 64 bits of these texts, in order.
pub fn hash(parts: &[&str]) -> String {
    let mut h = DefaultHasher::new();
    parts.hash(&mut h);
    format!("{:016x}", h.finish())
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

impl Compiler {
    /// What it writes to standard output; what it says where it fails.
    pub fn run(&self, args: &[String]) -> Result<Vec<u8>, String> {
        let done = Command::new(&self.path).args(&self.common).args(args).output();
        let done =
            done.map_err(|e| format!("{} cannot be started: {e}; install a C++ compiler", self.path.display()))?;
        match done.status.success() {
            true => Ok(done.stdout),
            false => {
                Err(format!("{} {}\n{}", self.path.display(), args.join(" "), String::from_utf8_lossy(&done.stderr)))
            }
        }
    }

    /// The object file of `source` under `flags`, made unless one of the same contents is there.
    pub fn object(&self, name: &str, source: &str, headers: &str, flags: &[String]) -> Result<PathBuf, String> {
        let key = hash(&[source, headers, &flags.join(" "), &self.common.join(" "), &self.path.to_string_lossy()]);
        let object = self.out.join(format!("{name}-{key}.o"));
        if !object.exists() {
            // Processes that compile the same at once write files of their own.
            let own = format!("{name}-{key}-{}", std::process::id());
            let (file, part) = (self.out.join(format!("{own}.cpp")), self.out.join(format!("{own}.part")));
            write(&file, source)?;
            let mut args = flags.to_vec();
            args.extend(["-c".into(), file.display().to_string(), "-o".into(), part.display().to_string()]);
            self.run(&args)?;
            let _ = fs::remove_file(file);
            fs::rename(part, &object).map_err(|e| format!("{}: {e}", object.display()))?;
        }
        Ok(object)
    }

    /// The object file of a kernel file, with the table of its kernels under the name `cuemu_tab_{stem}`.
    pub fn kernel_file(&self, path: &Path, stem: &str, headers: &str) -> Result<PathBuf, String> {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let key = hash(&[&read(path)?, headers]);
        let table = self.out.join(format!("{stem}-{key}.table"));
        if !table.exists() {
            let args = ["-DCUEMU_SCAN", "-E", "-P", "-x", "c++"].map(String::from);
            let seen = self.run(&[&args[..], &[path.display().to_string()]].concat())?;
            let rows: String = kernels(&String::from_utf8_lossy(&seen))
                .iter()
                .map(|(name, bound)| format!("  CUEMU_KERNEL({name}, \"{file}\", {bound}),\n"))
                .collect();
            write(&table, &rows)?;
        }
        let source = format!(
            "// {key}\n#include \"{}\"\nextern \"C\" const cuemu_Kernel cuemu_tab_{stem}[] = {{\n{}  {{nullptr}}}};\n",
            path.display(),
            read(&table)?
        );
        self.object(stem, &source, headers, &self.kernels)
    }
}

/// Names of the kernels in preprocessed text (with -DCUEMU_SCAN, which leaves __global__ as it is), with the literal of
/// __launch_bounds__ if there is one.
fn kernels(text: &str) -> Vec<(String, u32)> {
    let mut out = vec![];
    let mut rest = text;
    while let Some(p) = rest.find("__global__") {
        rest = &rest[p + "__global__".len()..];
        let (mut s, mut bound) = (rest, 0);
        while let Some(open) = s.find('(') {
            let before = s[..open].trim_end();
            let from = before.rfind(|c: char| !c.is_alphanumeric() && c != '_').map_or(0, |i| i + 1);
            let word = &before[from..];
            if word == "__launch_bounds__" {
                let close = open + s[open..].find(')').unwrap_or(0);
                bound = s[open + 1..close].split(',').next().and_then(|n| n.trim().parse().ok()).unwrap_or(0);
                s = &s[close + 1..];
                continue;
            }
            out.push((word.to_string(), bound));
            break;
        }
    }
    out
}
