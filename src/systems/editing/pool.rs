//! A base and the distribution vectors of its sources.

use super::ledger::{Cost, Ledger};
use super::merge::{Merge, dare, ties};
use crate::Param;
use crate::array::Array;
use crate::autograd::Gradients;
use crate::base::{DType, Error, Result, hash};
use crate::device::Device;
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::io;
use crate::nn::Params;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What has to be equal for vectors to be added: the hash of a tokenizer, the order of experts, whatever else gives parameters their
/// meaning and does not show in their shapes.
pub type Tags = BTreeMap<String, String>;

/// A base model and the vectors of its sources, in f32.
#[derive(Clone, Debug)]
pub struct VectorPool {
    base: Vec<(String, Array)>,
    tags: Tags,
    hash: String,
    sources: Vec<Source>,
    pub(super) ledger: Ledger,
}

/// One source's vector.
#[derive(Clone, Debug)]
struct Source {
    name: String,
    tensors: Vec<Difference>,
}

/// Θᵢ − Θ of one tensor.
#[derive(Clone, Debug)]
struct Difference {
    /// Rounded to f32.
    values: Vec<f32>,
    /// What rounding has taken, where it has: (element, rest). Base, difference and rest add up to the source's value to the bit.
    rest: Vec<(u32, f32)>,
}

impl Difference {
    fn rest_at(&self, e: usize) -> f64 {
        self.rest.binary_search_by_key(&(e as u32), |r| r.0).map_or(0.0, |i| self.rest[i].1 as f64)
    }
    fn at(&self, e: usize) -> f64 {
        self.values[e] as f64 + self.rest_at(e)
    }
    fn exact(&self) -> Vec<f64> {
        let mut all: Vec<f64> = self.values.iter().map(|&v| v as f64).collect();
        self.rest.iter().for_each(|&(e, r)| all[e as usize] += r as f64);
        all
    }
}

/// How the vectors of a pool lie to each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Names of the sources, in the order of all that follows.
    pub sources: Vec<String>,
    /// Cosine of the angle between each two vectors.
    pub cosines: Vec<Vec<f64>>,
    /// Of each layer its name and the norm of each vector there.
    pub norms: Vec<(String, Vec<f64>)>,
    /// Of each source the elements whose edit would be lost if the difference were taken between values that were rounded to bf16.
    pub lost_in_bf16: Vec<usize>,
}

/// A parameter's layer: its name without the last part.
fn layer_of(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(layer, _)| layer)
}

/// Values of all parameters, by name, on the CPU. Not f64, whose differences f32 does not hold.
fn values(params: &Params) -> Result<Vec<(String, Array)>> {
    let value = |p: Param| match p.dtype() {
        DType::F64 => {
            let message =
                format!("{} is f64, and vectors are kept in f32: save the model in f32 and load it again", p.name());
            Err(Error::dtype("VectorPool", message))
        }
        _ => Ok((p.name().to_string(), p.value().to(&Device::Cpu)?.contiguous())),
    };
    params.all().into_iter().map(value).collect()
}

impl VectorPool {
    /// A pool without sources over the values that `params` have now.
    ///
    /// # Errors
    /// If there are no parameters, or some are f64 or not finite.
    pub fn new(params: &Params, tags: Tags) -> Result<VectorPool> {
        let base = values(params)?;
        if base.is_empty() {
            return Err(Error::invalid("VectorPool", "the base has no parameters"));
        }
        expect_finite("the base", &base)?;
        let mut crc = crc32fast::Hasher::new();
        for (name, a) in &base {
            crc.update(format!("{name} {:?} {} ", a.shape(), a.dtype()).as_bytes());
            crc.update(&a.to_bytes());
        }
        let hash = format!("{:08x}", crc.finalize());
        Ok(VectorPool { base, tags, hash, sources: Vec::new(), ledger: Ledger::default() })
    }
    /// Number of sources.
    pub fn len(&self) -> usize {
        self.sources.len()
    }
    /// Whether there are no sources.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }
    /// Names of the sources, in the order of their weights.
    pub fn names(&self) -> Vec<&str> {
        self.sources.iter().map(|s| s.name.as_str()).collect()
    }
    /// What sources and searches have cost.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }
    /// A hash of the base's names, shapes and values.
    pub fn base_hash(&self) -> &str {
        &self.hash
    }
    fn place(&self, name: &str) -> Result<usize> {
        self.sources
            .iter()
            .position(|s| s.name == name)
            .ok_or_else(|| Error::invalid("VectorPool", format!("no source {name:?}; there are {:?}", self.names())))
    }
    /// Takes the difference of the values that `tuned` have now, as a new source.
    ///
    /// # Errors
    /// If the name is taken, or names, shapes, dtypes or tags are not the base's, or a value is not finite; nothing is added then.
    pub fn add(&mut self, name: &str, tuned: &Params, tags: Tags, cost: Cost) -> Result<()> {
        if self.place(name).is_ok() {
            return Err(Error::invalid(
                "VectorPool",
                format!("there is a source {name:?} already: replace it, or choose another name"),
            ));
        }
        let source = self.difference(name, tuned, &tags)?;
        self.sources.push(source);
        self.ledger.sources.push((name.to_string(), cost));
        Ok(())
    }
    /// Puts another vector in the place of a source's, whose cost stays in the ledger.
    ///
    /// # Errors
    /// As [`VectorPool::add`], and if there is no such source.
    pub fn replace(&mut self, name: &str, tuned: &Params, tags: Tags, cost: Cost) -> Result<()> {
        let i = self.place(name)?;
        self.sources[i] = self.difference(name, tuned, &tags)?;
        self.ledger.sources.push((name.to_string(), cost));
        Ok(())
    }
    /// Takes a source out. What is merged from then on is bit for bit what a pool would merge that never had it.
    ///
    /// # Errors
    /// If there is no such source.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let i = self.place(name)?;
        self.sources.remove(i);
        Ok(())
    }
    fn difference(&self, name: &str, tuned: &Params, tags: &Tags) -> Result<Source> {
        if *tags != self.tags {
            let message = format!(
                "source {name:?} has the tags {tags:?}, the base {:?}: vectors of another tokenizer or another order of experts mean \
                 nothing here",
                self.tags
            );
            return Err(Error::invalid("VectorPool", message));
        }
        let tuned = values(tuned)?;
        self.expect_alike(name, &tuned)?;
        expect_finite(&format!("source {name:?}"), &tuned)?;
        let tensors =
            self.base.iter().zip(&tuned).map(|((_, b), (_, t))| subtract(b, t)).collect::<Result<Vec<_>>>()?;
        Ok(Source { name: name.to_string(), tensors })
    }
    /// The base's names, shapes and dtypes.
    fn expect_alike(&self, name: &str, other: &[(String, Array)]) -> Result<()> {
        let described = |(n, a): &(String, Array)| format!("{n} {:?} {}", a.shape(), a.dtype());
        let (own, theirs): (Vec<_>, Vec<_>) =
            (self.base.iter().map(described).collect(), other.iter().map(described).collect());
        let missing: Vec<&String> = own.iter().filter(|x| !theirs.contains(x)).take(3).collect();
        let extra: Vec<&String> = theirs.iter().filter(|x| !own.contains(x)).take(3).collect();
        match own == theirs {
            true => Ok(()),
            false => Err(Error::shape(
                "VectorPool",
                format!("source {name:?} is no relative of the base: it lacks {missing:?} and has {extra:?}"),
            )),
        }
    }
    /// Sets `params` to the merged model.
    ///
    /// # Errors
    /// If the merge makes no sense for this pool, or `params` are not the base's names, shapes and dtypes; nothing is changed then.
    pub fn apply(&self, merge: &Merge, params: &Params) -> Result<()> {
        merge.check(self.len())?;
        let all = params.all();
        self.expect_alike("to be set", &all.iter().map(|p| (p.name().to_string(), p.value())).collect::<Vec<_>>())?;
        let merged = (0..self.base.len()).map(|t| self.merged(merge, t)).collect::<Result<Vec<_>>>()?;
        for (p, value) in all.iter().zip(merged) {
            p.set(value.to(&p.device())?)?;
        }
        Ok(())
    }
    /// Tensor `t` of the merged model, in the base's dtype.
    fn merged(&self, merge: &Merge, t: usize) -> Result<Array> {
        let (name, base) = &self.base[t];
        let vectors: Vec<&Difference> = self.sources.iter().map(|s| &s.tensors[t]).collect();
        let Some(weights) = merge.weights(self.len(), layer_of(name)) else {
            let exact = || vectors.iter().map(|v| v.exact()).collect::<Vec<_>>();
            let added = match merge {
                Merge::Ties { density, lambda, normalise } => ties(&exact(), *density, *lambda, *normalise),
                Merge::Dare { density, lambda, seed } => {
                    let kept =
                        |(s, v): (&Source, Vec<f64>)| dare(&v, *density, *seed, hash(&format!("{}/{name}", s.name)));
                    let kept: Vec<Vec<f64>> = self.sources.iter().zip(exact()).map(kept).collect();
                    (0..base.numel()).map(|e| lambda * kept.iter().map(|v| v[e]).sum::<f64>()).collect()
                }
                _ => return Err(Error::invalid("merge", "no weights")),
            };
            let values = base.to_f64().into_iter().zip(added).map(|(b, a)| b + a);
            return Ok(Array::from_slice(&values.collect::<Vec<f64>>(), base.shape())?.cast(base.dtype()));
        };
        let live: Vec<(f64, &Difference)> = weights.into_iter().zip(vectors).filter(|(w, _)| *w != 0.0).collect();
        if live.is_empty() {
            return Ok(base.clone());
        }
        // One pass: n vectors and the base are read, the result is written.
        let wide = base.cast(DType::F32);
        let mut out = Array::uninit(base.shape(), DType::F32);
        let b = wide.as_slice::<f32>()?;
        let to = Shared::new(out.fresh_mut::<f32>());
        par_chunks(b.len(), GRAIN, |r| {
            // SAFETY: pieces are disjoint.
            let out = unsafe { to.slice(r.clone()) };
            let mut sums: Vec<f64> = b[r.clone()].iter().map(|&x| x as f64).collect();
            for (w, v) in &live {
                sums.iter_mut().zip(&v.values[r.clone()]).for_each(|(s, &d)| *s += w * d as f64);
            }
            out.iter_mut().zip(sums).for_each(|(o, s)| *o = s as f32);
        });
        for e in live.iter().flat_map(|(_, v)| v.rest.iter().map(|r| r.0 as usize)) {
            // The rests last: beside a large base they would be rounded away.
            let sum = live.iter().fold(b[e] as f64, |s, (w, v)| s + w * v.values[e] as f64);
            let sum = live.iter().fold(sum, |s, (w, v)| s + w * v.rest_at(e));
            // SAFETY: nobody else writes now.
            let one = unsafe { to.slice(e..e + 1) };
            one[0] = sum as f32;
        }
        Ok(out.cast(base.dtype()))
    }
    /// ∂loss/∂wᵢ = ⟨∂loss/∂Θ, dᵢ⟩ from the gradients of a loss at some merged model, for the weights to follow it.
    ///
    /// # Errors
    /// If a gradient cannot be summed.
    pub fn weight_gradient(&self, gradients: &Gradients, params: &Params) -> Result<Vec<f64>> {
        let mut out = vec![0.0; self.len()];
        for (t, p) in params.all().iter().enumerate() {
            let Some(g) = gradients.param(p) else { continue };
            let g = g.sum()?.to_f64();
            for (o, s) in out.iter_mut().zip(&self.sources) {
                let v = &s.tensors[t];
                *o += g.iter().enumerate().map(|(e, g)| g * v.values[e] as f64).sum::<f64>();
            }
        }
        Ok(out)
    }
    /// Angles between the vectors, their norms by layer, and what bf16 would lose of them.
    pub fn diagnose(&self) -> Diagnosis {
        let dot = |a: &Difference, b: &Difference| -> f64 {
            a.values.iter().zip(&b.values).map(|(&x, &y)| x as f64 * y as f64).sum()
        };
        let inner = |a: &Source, b: &Source| -> f64 { a.tensors.iter().zip(&b.tensors).map(|(a, b)| dot(a, b)).sum() };
        let norm: Vec<f64> = self.sources.iter().map(|s| inner(s, s).sqrt()).collect();
        let row = |i: usize| -> Vec<f64> {
            let cosine =
                |j: usize| inner(&self.sources[i], &self.sources[j]) / (norm[i] * norm[j]).max(f64::MIN_POSITIVE);
            (0..self.len()).map(cosine).collect()
        };
        let mut norms: Vec<(String, Vec<f64>)> = Vec::new();
        for (t, (name, _)) in self.base.iter().enumerate() {
            if norms.last().is_none_or(|(layer, _)| layer != layer_of(name)) {
                norms.push((layer_of(name).to_string(), vec![0.0; self.len()]));
            }
            if let Some((_, sums)) = norms.last_mut() {
                sums.iter_mut().zip(&self.sources).for_each(|(s, v)| *s += dot(&v.tensors[t], &v.tensors[t]));
            }
        }
        norms.iter_mut().for_each(|(_, sums)| sums.iter_mut().for_each(|s| *s = s.sqrt()));
        let lost = |s: &Source| -> usize {
            let of = |((_, b), d): (&(String, Array), &Difference)| {
                let bf16 = |x: f64| half::bf16::from_f64(x).to_f64();
                let edits = b.to_f64().into_iter().enumerate();
                edits.filter(|&(e, b)| d.values[e] != 0.0 && bf16(b) == bf16(b + d.at(e))).count()
            };
            self.base.iter().zip(&s.tensors).map(of).sum()
        };
        Diagnosis {
            sources: self.names().iter().map(|n| n.to_string()).collect(),
            cosines: (0..self.len()).map(row).collect(),
            norms,
            lost_in_bf16: self.sources.iter().map(lost).collect(),
        }
    }
    /// Writes each source's vector to `folder` as `NAME.safetensors`, with the base's hash, its tags and its cost.
    ///
    /// # Errors
    /// If a name is no file name, or a file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        for s in &self.sources {
            if s.name.is_empty() || s.name.contains(['/', '\\']) || s.name.starts_with('.') {
                return Err(Error::invalid("VectorPool", format!("the source {:?} cannot name a file", s.name)));
            }
            let mut arrays = Vec::new();
            for ((name, base), d) in self.base.iter().zip(&s.tensors) {
                arrays.push((name.clone(), Array::from_slice(&d.values, base.shape())?));
                if !d.rest.is_empty() {
                    let (at, rest): (Vec<u32>, Vec<f32>) = d.rest.iter().copied().unzip();
                    arrays.push((format!("{name}/at"), Array::from_slice(&at, &[at.len()])?));
                    arrays.push((format!("{name}/rest"), Array::from_slice(&rest, &[rest.len()])?));
                }
            }
            let cost =
                self.ledger.sources.iter().rev().find(|(n, _)| *n == s.name).map(|(_, c)| *c).unwrap_or_default();
            let bad =
                |e: serde_json::Error| Error::invalid("VectorPool", format!("tags and cost cannot be written: {e}"));
            let tags = serde_json::to_string(&self.tags).map_err(bad)?;
            let cost = serde_json::to_string(&cost).map_err(bad)?;
            let metadata = [("format", "distribution-vector"), ("base", &self.hash), ("tags", &tags), ("cost", &cost)];
            io::save_arrays(folder.join(format!("{}.safetensors", s.name)), &arrays, &metadata)?;
        }
        Ok(())
    }
    /// Reads a vector that [`VectorPool::save`] wrote, as a new source named after the file.
    ///
    /// # Errors
    /// If the file is of another base or other tags, or damaged; nothing is added then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let file = io::SafeTensors::open(path)?;
        let meta = |key: &str| file.metadata().get(key).cloned().unwrap_or_default();
        if meta("format") != "distribution-vector" {
            return Err(Error::format(path, "is no vector of a pool: VectorPool::save writes them"));
        }
        if meta("base") != self.hash {
            let message = format!("is a vector of the base {}, and this base is {}", meta("base"), self.hash);
            return Err(Error::format(path, message));
        }
        let bad = |e: serde_json::Error| Error::format(path, format!("its metadata cannot be read: {e}"));
        let tags: Tags = serde_json::from_str(&meta("tags")).map_err(bad)?;
        let cost: Cost = serde_json::from_str(&meta("cost")).map_err(bad)?;
        let name = path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if tags != self.tags {
            return Err(Error::format(path, format!("has the tags {tags:?}, and this base {:?}", self.tags)));
        }
        if self.place(&name).is_ok() {
            return Err(Error::invalid("VectorPool", format!("there is a source {name:?} already")));
        }
        let mut tensors = Vec::new();
        for (n, base) in &self.base {
            let values = io::array_of(&file, n)?;
            if values.shape() != base.shape() {
                return Err(Error::format(
                    path,
                    format!("{n} is {:?}, the base's is {:?}", values.shape(), base.shape()),
                ));
            }
            let rest = match file.contains(&format!("{n}/at")) {
                false => Vec::new(),
                true => {
                    let at = io::array_of(&file, &format!("{n}/at"))?.to_vec::<u32>()?;
                    let rest = io::array_of(&file, &format!("{n}/rest"))?.to_vec::<f32>()?;
                    let fits = at.len() == rest.len()
                        && at.windows(2).all(|w| w[0] < w[1])
                        && at.last().is_none_or(|&e| (e as usize) < base.numel());
                    if !fits {
                        return Err(Error::format(path, format!("the rest of {n} does not fit it")));
                    }
                    at.into_iter().zip(rest).collect()
                }
            };
            tensors.push(Difference { values: values.to_vec::<f32>()?, rest });
        }
        self.sources.push(Source { name: name.clone(), tensors });
        self.ledger.sources.push((name, cost));
        Ok(())
    }
}

/// `tuned` − `base`, element by element.
fn subtract(base: &Array, tuned: &Array) -> Result<Difference> {
    // 16-bit values are f32 values.
    let (base, tuned) = (base.cast(DType::F32), tuned.cast(DType::F32));
    let mut rest = Vec::new();
    let one = |(e, (b, t)): (usize, (&f32, &f32))| {
        let value = (*t as f64 - *b as f64) as f32;
        // Base and value nearly cancel all but the source, so that their sum loses nothing that matters to it.
        let left = *t as f64 - (*b as f64 + value as f64);
        if left != 0.0 {
            rest.push((e as u32, left as f32));
        }
        value
    };
    let values = base.as_slice::<f32>()?.iter().zip(tuned.as_slice::<f32>()?).enumerate().map(one).collect();
    Ok(Difference { values, rest })
}

fn expect_finite(what: &str, values: &[(String, Array)]) -> Result<()> {
    match values.iter().find(|(_, a)| a.to_f64().iter().any(|x| !x.is_finite())) {
        None => Ok(()),
        Some((name, _)) => {
            Err(Error::invalid("VectorPool", format!("{what} has values in {name} that are not finite")))
        }
    }
}
