//! Secrets and logs of a run with two private phases: its noise keys are kept secret, and its logs of releases are never deleted.

use prismgrad::random::NoiseKey;
use prismgrad::{Error, Result};
use std::path::Path;

/// Two secret keys, which are stored beside the run until it is finished, so that a resumed run repeats its noise exactly.
pub fn keys(folder: &Path) -> Result<[NoiseKey; 2]> {
    let path = folder.join("noise.key");
    if let Ok(bytes) = std::fs::read(&path)
        && let Ok(bytes) = <[u8; 64]>::try_from(bytes)
    {
        let half = |i: usize| std::array::from_fn(|k| bytes[32 * i + k]);
        return Ok([NoiseKey::from_bytes(half(0)), NoiseKey::from_bytes(half(1))]);
    }
    let keys = [NoiseKey::from_os()?, NoiseKey::from_os()?];
    let bytes = [keys[0].to_bytes(), keys[1].to_bytes()].concat();
    // The file is readable only by its owner from the moment it is created.
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&path).and_then(|mut file| {
        std::io::Write::write_all(&mut file, &bytes)?;
        file.sync_all()
    });
    written.map_err(|e| Error::io("write the noise key", &path, e))?;
    Ok(keys)
}

/// Prepares an old folder for a new run, which has its own keys and logs. The old run's logs of private steps are renamed, because what
/// they record has been released; its key is removed.
pub fn set_aside(folder: &Path, phases: usize) -> Result<()> {
    let key = folder.join("noise.key");
    match std::fs::remove_file(&key) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", &key, e)),
        _ => {}
    }
    for phase in 1..=phases {
        let log = folder.join(format!("privacy-{phase}.jsonl"));
        if !log.exists() {
            continue;
        }
        let free = (1..).map(|n| folder.join(format!("privacy-{phase}.earlier-{n}.jsonl"))).find(|p| !p.exists());
        let kept = free.unwrap_or_else(|| log.with_extension("earlier"));
        std::fs::rename(&log, &kept).map_err(|e| Error::io("set aside", &log, e))?;
        println!(
            "an earlier run's log of private steps is kept as {}: what it released counts towards the records' total ε",
            kept.display()
        );
    }
    Ok(())
}
