//! Writes what the crate must know about the kernel files of `cuda/`: their texts, the structs that are passed to kernels by
//! value, and the codes that both sides use. With the feature `emulator` it also compiles the kernels for the CPU, with checks,
//! into a shared object that answers to the name of the CUDA driver library. `PRISMGRAD_EMU=fast` leaves the checks out.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda");
    // Without optimisation, a loop compiled once more for wider vectors is no faster, and a fifth of the build.
    println!("cargo:rustc-check-cfg=cfg(optimised)");
    if env::var("OPT_LEVEL").is_ok_and(|level| level != "0") {
        println!("cargo:rustc-cfg=optimised");
    }
    tables::write();
    #[cfg(feature = "emulator")]
    emulator::build();
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env::var(name).unwrap())
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Kernel files of a folder, by name.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|x| x == "cu")).collect();
    files.sort();
    files
}

/// Tables made from the texts in `cuda/`, so that nothing is written down twice.
mod tables {
    use super::{folder, fs, read, sources};

    pub fn write() {
        let (cuda, out) = (folder("CARGO_MANIFEST_DIR").join("cuda"), folder("OUT_DIR"));
        let files = sources(&cuda);
        let rows: String = files
            .iter()
            .map(|f| format!("    ({:?}, include_str!({f:?})),\n", f.file_stem().unwrap().to_string_lossy()))
            .collect();
        fs::write(out.join("sources.rs"), format!("&[\n{rows}]\n")).unwrap();
        let mut layouts = String::new();
        for file in files.iter().chain([&cuda.join("prelude.cuh")]) {
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            let text = without_comments(&read(file));
            structs(&text, &name, &mut layouts);
            enums(&text, &name, &mut layouts);
            constants(&text, &name, &mut layouts);
        }
        fs::write(out.join("layouts.rs"), layouts).unwrap();
    }

    fn without_comments(text: &str) -> String {
        text.lines().map(|l| l.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
    }

    /// The Rust type of a plain C type.
    fn plain(c: &str) -> Option<&'static str> {
        Some(match c {
            "i64" => "i64",
            "u64" => "u64",
            "i32" => "i32",
            "u32" => "u32",
            "u8" => "u8",
            "float" => "f32",
            "double" => "f64",
            _ => return None,
        })
    }

    /// `struct X { … };` at the beginning of a line, if all of its fields are plain numbers and arrays of them.
    fn structs(text: &str, file: &str, out: &mut String) {
        for part in text.split("\nstruct ").skip(1) {
            let Some((name, rest)) = part.split_once('{') else { continue };
            let Some((body, _)) = rest.split_once("};") else { continue };
            let mut fields = String::new();
            let declarations = body.split(';').map(str::trim).filter(|d| !d.is_empty());
            let all = declarations.map(|d| declaration(d, &mut fields)).collect::<Option<Vec<()>>>();
            let name = name.trim();
            if all.is_some() && !name.contains(' ') {
                *out += &format!(
                    "/// `{name}` of `cuda/{file}`.\n#[repr(C)]\n#[derive(Clone, Copy, Debug, bytemuck::NoUninit, bytemuck::Zeroable)]\n\
                     #[allow(missing_docs)]\npub struct {name} {{\n{fields}}}\n"
                );
            }
        }
    }

    /// The fields of `type a, b[2], c[3][4]`.
    fn declaration(d: &str, fields: &mut String) -> Option<()> {
        let (kind, names) = d.split_once(char::is_whitespace)?;
        let kind = plain(kind)?;
        for name in names.split(',').map(str::trim) {
            let mut sizes = name.split('[');
            let name = sizes.next()?.trim();
            let sizes: Vec<&str> = sizes.map(|s| s.trim_end_matches(']')).collect();
            let whole = sizes.iter().rev().fold(kind.to_string(), |t, n| format!("[{t}; {n}]"));
            if !name.chars().all(|c| c.is_alphanumeric() || c == '_') {
                return None;
            }
            *fields += &format!("    pub {name}: {whole},\n");
        }
        Some(())
    }

    /// `constexpr int A_B = 12;` at the beginning of a line.
    fn constants(text: &str, file: &str, out: &mut String) {
        for line in text.lines().filter_map(|l| l.strip_prefix("constexpr int ")) {
            if let Some((name, value)) = line.trim_end().trim_end_matches(';').split_once(" = ") {
                *out += &format!("/// A number of `cuda/{file}`.\npub const {name}: usize = {value};\n");
            }
        }
    }

    /// `enum { A_B, A_C };` at the beginning of a line: codes from 0 on.
    fn enums(text: &str, file: &str, out: &mut String) {
        for part in text.split("\nenum {").skip(1) {
            let Some((names, _)) = part.split_once("};") else { continue };
            for (code, name) in names.split(',').map(str::trim).enumerate() {
                *out += &format!("/// A code of `cuda/{file}`.\npub const {name}: i32 = {code};\n");
            }
        }
    }
}

#[cfg(feature = "emulator")]
#[path = "cuda/emulator/compile.rs"]
mod compile;

#[cfg(feature = "emulator")]
mod emulator {
    use super::compile::Compiler;
    use super::{env, folder, read, sources};
    use std::path::PathBuf;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    fn done<T>(result: Result<T, String>) -> T {
        result.unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn build() {
        let root = folder("CARGO_MANIFEST_DIR");
        let (cuda, emulator) = (root.join("cuda"), root.join("cuda/emulator"));
        println!("cargo:rerun-if-env-changed=CXX");
        println!("cargo:rerun-if-env-changed=PRISMGRAD_EMU");
        let checked = env::var("PRISMGRAD_EMU").as_deref() != Ok("fast");
        let tool = cc::Build::new().cpp(true).warnings(false).get_compiler();
        // Instrumented by the compiler, but linked against the emulator's own hooks instead of a sanitizer's library.
        let mut flags = vec!["-O2"];
        if checked {
            let clang = tool.is_like_clang();
            flags = vec![
                "-O1",
                "-fsanitize=thread",
                "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
                "-ftrivial-auto-var-init=pattern",
                if clang { "-mllvm" } else { "--param" },
                if clang { "-tsan-instrument-func-entry-exit=0" } else { "tsan-instrument-func-entry-exit=0" },
            ];
        }
        let compiler = Compiler {
            path: tool.path().to_path_buf(),
            common: [
                "-std=c++17",
                "-gdwarf-4", // addr2line names the wrong file under DWARF 5
                "-fPIC",
                "-fno-strict-aliasing",
                "-ffp-contract=off",
                "-Wno-unknown-pragmas",
                "-DCUEMU",
                &format!("-I{}", cuda.display()),
                &format!("-I{}", emulator.display()),
            ]
            .map(String::from)
            .to_vec(),
            kernels: flags.into_iter().map(String::from).collect(),
            out: folder("OUT_DIR"),
        };
        let headers = read(&cuda.join("prelude.cuh")) + &read(&emulator.join("cuemu.h"));
        let mut files = sources(&cuda);
        files.extend(sources(&emulator.join("planted")));
        let units = Mutex::new(Vec::new());
        let next = AtomicUsize::new(0);
        let jobs = thread::available_parallelism().map_or(2, |n| n.get());
        thread::scope(|s| {
            for _ in 0..jobs {
                s.spawn(|| {
                    while let Some(f) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let planted = f.parent() != Some(&cuda);
                        let stem = f.file_stem().unwrap().to_string_lossy();
                        let stem = format!("{}{stem}", if planted { "planted_" } else { "" });
                        let object = done(compiler.kernel_file(f, &stem, &headers));
                        units.lock().unwrap().push((stem, object));
                    }
                });
            }
        });
        let mut units = units.into_inner().unwrap();
        units.sort();
        let mut registry = String::from("struct cuemu_Kernel;\n");
        for (stem, _) in &units {
            registry += &format!("extern \"C\" const cuemu_Kernel cuemu_tab_{stem}[];\n");
        }
        let names: String = units.iter().map(|(stem, _)| format!("cuemu_tab_{stem}, ")).collect();
        registry += &format!("extern \"C\" const cuemu_Kernel* const cuemu_tables[] = {{{names}nullptr}};\n");
        let mut objects: Vec<PathBuf> = units.into_iter().map(|u| u.1).collect();
        objects.push(done(compiler.object("registry", &registry, "", &["-O1".into()])));
        let mut fast: Vec<String> = vec!["-O3".into()];
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            fast.extend(["-mavx2".into(), "-mfma".into()]);
        }
        let own = headers + &read(&emulator.join("cuemu_api.h"));
        for name in ["runtime", "driver", "blas"] {
            let source = read(&emulator.join(format!("{name}.cpp")));
            objects.push(done(compiler.object(name, &source, &own, &fast)));
        }
        let library = compiler.out.join("libcuda.so");
        let mut args =
            ["-shared", "-Wl,-soname,libcuda.so", "-Wl,-Bsymbolic", "-pthread", "-o"].map(String::from).to_vec();
        args.push(library.display().to_string());
        args.extend(objects.iter().map(|o| o.display().to_string()));
        args.push("-ldl".into());
        done(compiler.run(&args));
        println!("cargo:rustc-env=PRISMGRAD_EMULATOR={}", library.display());
        // For kernels that come with a user's op, which are compiled at run time.
        println!("cargo:rustc-env=PRISMGRAD_EMULATOR_CXX={}", compiler.path.display());
        println!("cargo:rustc-env=PRISMGRAD_EMULATOR_COMMON={}", compiler.common.join("\u{1f}"));
        println!("cargo:rustc-env=PRISMGRAD_EMULATOR_KERNELS={}", compiler.kernels.join("\u{1f}"));
    }
}
