//! Searches for NVIDIA's libraries: a file or folder named by an environment variable, the dynamic loader's path, the wheels of the active
//! Python environment, a CUDA toolkit.

use std::path::{Path, PathBuf};

/// A library to search for.
pub(crate) struct Wanted {
    /// The environment variable that names its file or folder.
    pub variable: &'static str,
    /// The start of its file name.
    pub start: &'static str,
    /// File names to try with the dynamic loader.
    pub names: &'static [&'static str],
    /// Folders of wheels that contain it, below a site-packages folder.
    pub wheels: &'static [&'static str],
}

/// Why it was not found.
pub(crate) enum Missing {
    /// The variable names something that is not this library.
    Named(String),
    /// It was found in none of the places; lists what was tried and failed, each after a semicolon.
    Nowhere(String),
}

impl Wanted {
    /// The first candidate that `load` accepts. If the environment variable is set, it is the only candidate. `beside` lists folders to try
    /// first.
    pub fn find<T>(
        &self,
        beside: &[PathBuf],
        load: impl Fn(&Path) -> std::result::Result<T, String>,
    ) -> std::result::Result<T, Missing> {
        if let Some(named) = std::env::var_os(self.variable).filter(|v| !v.is_empty()) {
            let (named, variable) = (PathBuf::from(named), self.variable);
            let file =
                if named.is_dir() { newest(&named, self.start) } else { Some(named.clone()).filter(|p| p.is_file()) };
            let Some(file) = file else {
                let what = self.start.trim_end_matches(".so");
                let why =
                    format!("{variable} is {}, which is neither {what} nor a folder that has it", named.display());
                return Err(Missing::Named(why));
            };
            return load(&file).map_err(|e| Missing::Named(format!("{variable}: {e}")));
        }
        for name in self.names {
            if let Ok(found) = load(Path::new(name)) {
                return Ok(found);
            }
        }
        let mut failed = String::new();
        // Running Python costs a process, so its folders come after those that are known without it.
        let places: [&dyn Fn() -> Vec<PathBuf>; 4] =
            [&|| beside.to_vec(), &|| self.environment_folders(), &toolkit_folders, &|| self.python_folders()];
        for folder in places.iter().flat_map(|place| place()) {
            if let Some(file) = newest(&folder, self.start) {
                match load(&file) {
                    Ok(found) => return Ok(found),
                    Err(e) => failed.push_str(&format!("; {e}")),
                }
            }
        }
        Err(Missing::Nowhere(failed))
    }

    fn environment_folders(&self) -> Vec<PathBuf> {
        let mut folders = vec![];
        if let Some(root) = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from) {
            let versions = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten();
            for site in versions.map(|v| v.path().join("site-packages")).filter(|p| p.is_dir()) {
                folders.extend(self.wheels.iter().map(|w| site.join(w)));
            }
        }
        folders.extend(std::env::var_os("CONDA_PREFIX").map(|p| PathBuf::from(p).join("lib")));
        folders
    }

    fn python_folders(&self) -> Vec<PathBuf> {
        let ask = "import site,sysconfig;p=sysconfig.get_paths();print('\\n'.join([p['purelib'],p['platlib'],site.getusersitepackages()]))";
        let answer =
            std::process::Command::new("python3").args(["-c", ask]).stdin(std::process::Stdio::null()).output();
        let Ok(answer) = answer else { return vec![] };
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        let sites = text.lines().flat_map(|site| self.wheels.iter().map(move |w| Path::new(site).join(w)));
        let mut folders: Vec<PathBuf> = sites.collect();
        folders.dedup();
        folders
    }
}

fn toolkit_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .flat_map(|p| ["lib64", "lib"].map(|l| PathBuf::from(&p).join(l)))
        .collect();
    folders.extend(["/usr/local/cuda/lib64", "/usr/local/cuda-13.0/lib64", "/opt/cuda/lib64"].map(PathBuf::from));
    folders
}

/// The file in a folder whose name starts with `start`; if there are several, the last by name.
pub(crate) fn newest(folder: &Path, start: &str) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(start)))
        .collect();
    found.sort();
    found.pop()
}
