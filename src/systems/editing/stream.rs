//! Merges of models on disk that do not fit into memory.
//!
//! A tensor is read in pieces of 2¹⁸ elements from the base and from all models together, so that memory holds a few such pieces and never
//! a whole tensor. Some methods need extra passes over the files first. TIES counts magnitudes twice to find where it cuts (first by the
//! upper, then by the lower 16 bits of each), and rescaling to the old norm sums magnitudes once. Differences are taken in f32 and added up
//! in f64; the result is rounded once.

use super::files::{Checkpoint, INDEX, config, is_float, merged_dtype};
use super::merge::Mix;
use super::recipe::{Recipe, Rescale};
use crate::base::{DType, Error, Result, hash};
use crate::device::cpu::par::{GRAIN, par_units};
use crate::io::safetensors::write_pieces;
use crate::io::{self, ElementType};
use crate::random::philox;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The file name of the recipe, beside the result.
const RECIPE: &str = "merge.json";

/// Number of elements that are read at a time.
const PIECE: usize = 1 << 18;

/// Files that belong to a model: those with one of these names, or whose name begins with the part before the `*`.
const COMPANIONS: [&str; 10] = [
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "spiece.model",
    "sentencepiece*",
    "preprocessor_config.json",
];

/// What [`merge_files`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Merged {
    /// Tensors that were merged.
    pub tensors: usize,
    /// Number of elements in these tensors.
    pub elements: u64,
    /// Number of tensors of integers and masks, which are copied from the base.
    pub copied: usize,
    /// Bytes read from all models. Bytes that were read twice count twice.
    pub read: u64,
    /// Bytes of tensors written.
    pub written: u64,
    /// Seconds on the clock.
    pub seconds: f64,
}

/// Merges safetensors checkpoints into the folder `out`, piece by piece.
///
/// The result has the names, files and index of the base (or of the first model, if there is no base), its configuration and tokenizer, and
/// `merge.json` with the recipe. It appears as a whole or not at all. `progress` gets the number of bytes written so far and the total.
///
/// # Errors
/// If the recipe is not valid; if a file cannot be read or is damaged; if a model has other tensors, shapes, experts or tokens than the
/// base; if a value is not finite or becomes so in the result's element type; or if `out` exists and `replace` is not set. Only the result
/// of an earlier merge is replaced. On an error nothing is written.
pub fn merge_files(recipe: &Recipe, out: &Path, replace: bool, mut progress: impl FnMut(u64, u64)) -> Result<Merged> {
    let start = Instant::now();
    recipe.check()?;
    let reference = Checkpoint::open(recipe.reference()?)?;
    let models = recipe.models.iter().map(|m| Checkpoint::open(&m.path)).collect::<Result<Vec<_>>>()?;
    models.iter().try_for_each(|m| reference.expect_relative(m))?;
    for c in models.iter().chain([&reference]) {
        expect_apart(out, c.path())?;
    }
    expect_own(out)?;
    let method = recipe.method;
    let sum: f64 = recipe.models.iter().map(|m| m.weight).sum();
    let merging = Merging {
        recipe,
        reference: &reference,
        models: &models,
        mix: Mix { elect: method.elects(), normalise: recipe.normalise, lambda: recipe.lambda },
        differences: method != super::Method::Linear,
        sum,
    };
    let mut done = Merged::default();
    io::write_folder(out, replace, |folder| {
        merging.write(folder, &mut done, &mut progress)?;
        companions(recipe, &reference, folder)
    })?;
    done.seconds = start.elapsed().as_secs_f64();
    Ok(done)
}

/// Refuses a result that would replace a model that is read.
fn expect_apart(out: &Path, model: &Path) -> Result<()> {
    let real = |p: &Path| p.canonicalize().unwrap_or_else(|_| p.to_path_buf());
    match real(model).starts_with(real(out)) {
        false => Ok(()),
        true => {
            let message = format!("{} would take the place of {}, which is read", out.display(), model.display());
            Err(Error::invalid("merge", message))
        }
    }
}

/// Refuses to replace a folder that was not made by a merge.
fn expect_own(out: &Path) -> Result<()> {
    let Ok(mut entries) = fs::read_dir(out) else { return Ok(()) };
    match entries.next().is_none() || out.join(RECIPE).exists() {
        true => Ok(()),
        false => {
            let message =
                format!("{} is there already, and is no result of a merge: it has no {RECIPE}", out.display());
            Err(Error::invalid("merge", message))
        }
    }
}

/// A merge in progress.
struct Merging<'a> {
    recipe: &'a Recipe,
    reference: &'a Checkpoint,
    models: &'a [Checkpoint],
    mix: Mix,
    /// Whether the base is subtracted from the models and added at the end.
    differences: bool,
    /// The sum of all weights.
    sum: f64,
}

/// Which entries of one tensor of one model are kept, and their factor.
#[derive(Clone, Copy)]
struct Kept {
    rule: Entries,
    scale: f64,
}

#[derive(Clone, Copy)]
enum Entries {
    All,
    /// Those whose magnitude has larger bits than `bits`, and the next `ties` entries with the same bits.
    Largest {
        bits: u32,
        ties: usize,
    },
    /// Those that are drawn at random.
    Drawn {
        stream: u64,
    },
}

/// One model's elements in the present piece.
struct Lane<'a> {
    model: &'a Checkpoint,
    kept: Kept,
    density: f64,
    values: Vec<f32>,
    raw: Vec<u8>,
}

impl Merging<'_> {
    fn write(&self, folder: &Path, done: &mut Merged, progress: &mut impl FnMut(u64, u64)) -> Result<()> {
        // Everything that could be refused for its type is checked before anything is written.
        let mut shards = Vec::new();
        let (mut whole, mut places) = (0, BTreeMap::new());
        for (file_name, file) in &self.reference.files {
            let mut described = Vec::new();
            for t in file.tensors() {
                let dtype = match merged_dtype(file.path(), t)? {
                    Some(own) => element(self.recipe.dtype.unwrap_or(own)),
                    None => t.dtype,
                };
                whole += (t.shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64;
                places.insert(t.name.clone(), file_name.clone());
                described.push((t.name.clone(), dtype, t.shape.clone()));
            }
            shards.push((file_name, described));
        }
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        for (file_name, described) in &shards {
            let types: BTreeMap<&str, ElementType> = described.iter().map(|d| (d.0.as_str(), d.1)).collect();
            write_pieces(folder.join(file_name), described, &metadata, |name, sink| {
                let mut counted = |piece: &[u8]| {
                    sink(piece)?;
                    done.written += piece.len() as u64;
                    progress(done.written, whole);
                    Ok(())
                };
                let dtype = types.get(name).copied().unwrap_or(ElementType::F32);
                match is_float(dtype) {
                    true => {
                        let (elements, read) = self.tensor(name, dtype, &mut counted)?;
                        done.tensors += 1;
                        done.elements += elements as u64;
                        done.read += read;
                    }
                    false => {
                        let bytes = self.reference.info(name)?.bytes;
                        let mut piece = Vec::new();
                        for at in (0..bytes).step_by(4 * PIECE) {
                            piece.resize((bytes - at).min(4 * PIECE), 0);
                            self.reference.bytes(name, at, &mut piece)?;
                            counted(&piece)?;
                        }
                        done.copied += 1;
                        done.read += bytes as u64;
                    }
                }
                Ok(())
            })?;
        }
        if self.reference.folder().is_some_and(|f| f.join(INDEX).exists()) {
            io::write_json(folder.join(INDEX), &json!({"metadata": {"total_size": whole}, "weight_map": places}))?;
        }
        Ok(())
    }

    /// Merges one tensor, and hands over the result piece by piece. Returns the number of elements and of bytes read.
    fn tensor(
        &self,
        name: &str,
        dtype: ElementType,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<(usize, u64)> {
        let n: usize = self.reference.info(name)?.shape.iter().product();
        let (mut lanes, mut read) = (Vec::new(), 0);
        for (i, model) in self.models.iter().enumerate() {
            let density = self.recipe.models[i].density;
            let mut lane =
                Lane { model, kept: Kept { rule: Entries::All, scale: 1.0 }, density, values: vec![], raw: vec![] };
            let passes = self.prepare(&mut lane, i, name, n)?;
            let own = |c: &Checkpoint| c.info(name).map(|t| t.bytes as u64);
            let base = if self.differences { own(self.reference)? } else { 0 };
            read += (passes + 1) * own(model)? + passes * base + if i == 0 { base } else { 0 };
            lanes.push(lane);
        }
        let weights: Vec<f64> = self.recipe.models.iter().map(|m| m.weight).collect();
        let factors: Vec<f64> = weights.iter().zip(&lanes).map(|(w, l)| w * l.kept.scale).collect();
        let linear_divisor = if self.mix.normalise { self.sum } else { 1.0 };
        let (mut base, mut raw, mut out, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for start in (0..n).step_by(PIECE) {
            let len = PIECE.min(n - start);
            base.resize(len, 0.0);
            if self.differences {
                self.reference.values(name, start, &mut base, &mut raw)?;
            }
            lanes.par_iter_mut().try_for_each(|lane| {
                lane.values.resize(len, 0.0);
                lane.model.values(name, start, &mut lane.values, &mut lane.raw)?;
                if self.differences {
                    lane.values.iter_mut().zip(&base).for_each(|(v, b)| *v -= b);
                }
                lane.kept.take(&mut lane.values, start, lane.density, self.recipe.seed);
                Ok::<(), Error>(())
            })?;
            out.resize(len, 0f32);
            par_units(&mut out, 1, GRAIN, |r, out| {
                for (o, e) in out.iter_mut().zip(r) {
                    let at = |i: usize| lanes[i].values[e] as f64;
                    *o = match self.differences {
                        true => base[e] as f64 + self.mix.added(&factors, &weights, at),
                        false => (0..lanes.len()).map(|i| weights[i] * at(i)).sum::<f64>() / linear_divisor,
                    } as f32;
                }
            });
            encode(&out, dtype, &mut bytes);
            if !finite(&bytes, dtype) {
                let message = format!("{name} is not finite in {dtype} once it is merged: choose another element type");
                return Err(Error::invalid("merge", message));
            }
            sink(&bytes)?;
        }
        Ok((n, read))
    }

    /// Determines which entries of a model's tensor are kept. Returns how often the tensor was read for this.
    fn prepare(&self, lane: &mut Lane, number: usize, name: &str, n: usize) -> Result<u64> {
        let method = self.recipe.method;
        if lane.density >= 1.0 || n == 0 || !(method.trims() || method.draws()) {
            return Ok(0);
        }
        let mut passes = 0;
        lane.kept.rule = match method.trims() {
            true => {
                passes += 2;
                let keep = (lane.density * n as f64) as usize;
                cut(keep, |count| {
                    self.walk(lane, name, n, |_, values| values.iter().for_each(|v| count(v.abs().to_bits())))
                })?
            }
            // The stream depends on a model's number and not its path, so that moving files changes nothing.
            false => Entries::Drawn { stream: hash(&format!("{number}/{name}")) },
        };
        lane.kept.scale = match self.recipe.rescale {
            Rescale::No => 1.0,
            Rescale::Density => 1.0 / lane.density,
            Rescale::Norm => {
                passes += 1;
                let (mut before, mut after) = (0.0, 0.0);
                let (mut kept, density, seed) = (lane.kept, lane.density, self.recipe.seed);
                let sum = |v: &[f32]| v.iter().map(|x| x.abs() as f64).sum::<f64>();
                self.walk(lane, name, n, |start, values| {
                    before += sum(values);
                    kept.take(values, start, density, seed);
                    after += sum(values);
                })?;
                // A sum that is nearly 0 is not rescaled.
                if before < 1e-7 || after < 1e-7 { 1.0 } else { before / after }
            }
        };
        Ok(passes)
    }

    /// Reads the differences of a tensor once, piece by piece.
    fn walk(&self, lane: &Lane, name: &str, n: usize, mut f: impl FnMut(usize, &mut [f32])) -> Result<()> {
        let (mut base, mut values, mut raw) = (Vec::new(), Vec::new(), Vec::new());
        for start in (0..n).step_by(PIECE) {
            let len = PIECE.min(n - start);
            values.resize(len, 0.0);
            lane.model.values(name, start, &mut values, &mut raw)?;
            if self.differences {
                base.resize(len, 0.0);
                self.reference.values(name, start, &mut base, &mut raw)?;
                values.iter_mut().zip(&base).for_each(|(v, b)| *v -= b);
            }
            f(start, &mut values);
        }
        Ok(())
    }
}

impl Kept {
    /// Sets the entries that are not kept to 0. `values` begin at element `start` of the tensor.
    fn take(&mut self, values: &mut [f32], start: usize, density: f64, seed: u64) {
        match &mut self.rule {
            Entries::All => {}
            Entries::Largest { bits, ties } => values.iter_mut().for_each(|v| {
                let own = v.abs().to_bits();
                if own == *bits && *ties > 0 {
                    *ties -= 1;
                } else if own <= *bits {
                    *v = 0.0;
                }
            }),
            Entries::Drawn { stream } => values.iter_mut().enumerate().for_each(|(i, v)| {
                if philox::uniform(seed, *stream, (start + i) as u64) >= density {
                    *v = 0.0;
                }
            }),
        }
    }
}

/// The cut at which the `keep` largest magnitudes are kept. `read` goes through all magnitudes as the bits of positive floats, whose order
/// is that of the numbers.
fn cut(keep: usize, mut read: impl FnMut(&mut dyn FnMut(u32)) -> Result<()>) -> Result<Entries> {
    let mut left = keep;
    // The bin of the smallest entry that is kept, counted from the top.
    let mut bin = |counts: &[u64]| -> usize {
        for (i, &count) in counts.iter().enumerate().rev() {
            if left as u64 <= count {
                return i;
            }
            left -= count as usize;
        }
        0
    };
    let mut counts = vec![0u64; 1 << 16];
    read(&mut |b| counts[(b >> 16) as usize] += 1)?;
    let high = bin(&counts) as u32;
    counts.fill(0);
    read(&mut |b| {
        if b >> 16 == high {
            counts[(b & 0xffff) as usize] += 1;
        }
    })?;
    let low = bin(&counts) as u32;
    Ok(Entries::Largest { bits: high << 16 | low, ties: left })
}

fn element(dtype: DType) -> ElementType {
    match dtype {
        DType::BF16 => ElementType::BF16,
        DType::F16 => ElementType::F16,
        _ => ElementType::F32,
    }
}

/// Values as little-endian bytes.
fn encode(values: &[f32], dtype: ElementType, out: &mut Vec<u8>) {
    out.clear();
    match dtype {
        ElementType::BF16 => values.iter().for_each(|&v| out.extend(half::bf16::from_f32(v).to_le_bytes())),
        ElementType::F16 => values.iter().for_each(|&v| out.extend(half::f16::from_f32(v).to_le_bytes())),
        _ => values.iter().for_each(|&v| out.extend(v.to_le_bytes())),
    }
}

/// Whether no exponent is that of an infinity or a NaN.
fn finite(bytes: &[u8], dtype: ElementType) -> bool {
    let all_ones = |mask: u8, low: u8| move |b: &[u8]| b[b.len() - 1] & mask == mask && b[b.len() - 2] & low == low;
    match dtype {
        ElementType::F16 => !bytes.chunks_exact(2).any(all_ones(0x7c, 0)),
        ElementType::BF16 => !bytes.chunks_exact(2).any(all_ones(0x7f, 0x80)),
        _ => !bytes.chunks_exact(4).any(all_ones(0x7f, 0x80)),
    }
}

/// Copies the configuration and the tokenizer, and writes the recipe.
fn companions(recipe: &Recipe, reference: &Checkpoint, folder: &Path) -> Result<()> {
    io::write_json(folder.join(RECIPE), recipe)?;
    let Some(from) = reference.folder() else { return Ok(()) };
    let entries = fs::read_dir(from).map_err(|e| Error::io("list", from, e))?;
    let files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.is_file()).collect();
    for path in files {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let goes_along = COMPANIONS.iter().any(|c| match c.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == *c,
        });
        if goes_along {
            let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            io::write_atomic(folder.join(name), &bytes)?;
        }
    }
    let mut config = config(from)?;
    if let Value::Object(entries) = &mut config {
        let name = recipe.dtype.map(|d| match d {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        });
        for key in ["torch_dtype", "dtype"] {
            if let (Some(entry), Some(name)) = (entries.get_mut(key), name) {
                *entry = name.into();
            }
        }
        io::write_json(folder.join("config.json"), &config)?;
    }
    Ok(())
}
