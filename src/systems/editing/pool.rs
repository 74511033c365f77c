//! A base and the distribution vectors of its sources.

use super::ledger::{Cost, Ledger};
use super::merge::{Merge, dare, ties};
use crate::array::Array;
use crate::autograd::Gradients;
use crate::base::{DType, Error, Result, hash};
use crate::device::Device;
use crate::io;
use crate::nn::Params;
use crate::{Param, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What must be equal for vectors to be added: the hash of a tokenizer, the order of experts, and anything else that changes the meaning of
/// parameters without changing their shapes.
pub type Tags = BTreeMap<String, String>;

/// A base model and the vectors of its sources, in f32. They are on the CPU unless [`VectorPool::to`] has moved them.
#[derive(Clone, Debug)]
pub struct VectorPool {
    base: Vec<(String, Array)>,
    tags: Tags,
    hash: String,
    device: Device,
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
    /// The differences, rounded to f32.
    values: Array,
    /// The rounding error of the elements that have one: (element, rest). Base, difference and rest add up to the source's value to the
    /// bit.
    rest: Vec<(u32, f32)>,
}

impl Difference {
    fn rest_at(&self, e: usize) -> f64 {
        self.rest.binary_search_by_key(&(e as u32), |r| r.0).map_or(0.0, |i| self.rest[i].1 as f64)
    }
    fn host(&self) -> Result<Vec<f32>> {
        self.values.to_vec::<f32>()
    }
    fn exact(&self) -> Result<Vec<f64>> {
        let mut all: Vec<f64> = self.host()?.iter().map(|&v| v as f64).collect();
        self.rest.iter().for_each(|&(e, r)| all[e as usize] += r as f64);
        Ok(all)
    }
}

/// How the vectors of a pool are related to each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Names of the sources, in the order of the other fields.
    pub sources: Vec<String>,
    /// Cosine of the angle between each pair of vectors.
    pub cosines: Vec<Vec<f64>>,
    /// The name of each layer, and the norm of each vector in it.
    pub norms: Vec<(String, Vec<f64>)>,
    /// For each source, the number of elements whose edit would be lost if the difference were taken between values rounded to bf16.
    pub lost_in_bf16: Vec<usize>,
}

/// A parameter's layer: its name without the last part.
fn layer_of(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(layer, _)| layer)
}

/// Values of all parameters, by name, on the CPU. f64 is refused, because f32 does not hold its differences.
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
    /// A pool without sources over the present values of `params`.
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
        Ok(VectorPool { base, tags, hash, device: Device::Cpu, sources: Vec::new(), ledger: Ledger::default() })
    }
    /// Moves base and vectors to a device. Weighted sums are then computed there, in one pass over each tensor; TIES and DARE choose their
    /// entries on the CPU.
    ///
    /// # Errors
    /// If the device has no room for them. The pool then stays where it was.
    pub fn to(&mut self, device: &Device) -> Result<()> {
        let base = self.base.iter().map(|(n, a)| Ok((n.clone(), a.to(device)?))).collect::<Result<Vec<_>>>()?;
        let there = |s: &Source| {
            let moved = |d: &Difference| Ok(Difference { values: d.values.to(device)?, rest: d.rest.clone() });
            Ok(Source { name: s.name.clone(), tensors: s.tensors.iter().map(moved).collect::<Result<_>>()? })
        };
        let sources = self.sources.iter().map(there).collect::<Result<Vec<_>>>()?;
        (self.base, self.sources, self.device) = (base, sources, device.clone());
        Ok(())
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
    /// The costs of sources and searches.
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
    /// Adds a new source: the difference between the present values of `tuned` and the base.
    ///
    /// # Errors
    /// If the name is taken, if names, shapes, dtypes or tags are not the base's, or if a value is not finite. Nothing is added then.
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
    /// Replaces the vector of a source. The cost of the old one stays in the ledger.
    ///
    /// # Errors
    /// Those of [`VectorPool::add`], and if there is no such source.
    pub fn replace(&mut self, name: &str, tuned: &Params, tags: Tags, cost: Cost) -> Result<()> {
        let i = self.place(name)?;
        self.sources[i] = self.difference(name, tuned, &tags)?;
        self.ledger.sources.push((name.to_string(), cost));
        Ok(())
    }
    /// Removes a source. Later merges are bit for bit those of a pool that never had it.
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
        let subtracted = |((_, b), (_, t)): (&(String, Array), &(String, Array))| self.subtract(b, t);
        let tensors = self.base.iter().zip(&tuned).map(subtracted).collect::<Result<Vec<_>>>()?;
        Ok(Source { name: name.to_string(), tensors })
    }
    /// `tuned` − `base`, element by element.
    fn subtract(&self, base: &Array, tuned: &Array) -> Result<Difference> {
        // 16-bit values are exact in f32.
        let (base, tuned) = (base.to(&Device::Cpu)?.cast(DType::F32), tuned.cast(DType::F32));
        let mut rest = Vec::new();
        let one = |(e, (b, t)): (usize, (&f32, &f32))| {
            let value = (*t as f64 - *b as f64) as f32;
            // The sum of base and value is close to the tuned value, so that the rest is computed without a loss that matters.
            let left = *t as f64 - (*b as f64 + value as f64);
            if left != 0.0 {
                rest.push((e as u32, left as f32));
            }
            value
        };
        let pairs = base.as_slice::<f32>()?.iter().zip(tuned.as_slice::<f32>()?);
        let values: Vec<f32> = pairs.enumerate().map(one).collect();
        Ok(Difference { values: Array::from_slice(&values, base.shape())?.to(&self.device)?, rest })
    }
    /// Fails unless names, shapes and dtypes are the base's.
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
    /// If the merge is not valid for this pool, or if `params` do not have the base's names, shapes and dtypes. Nothing is changed then.
    pub fn apply(&self, merge: &Merge, params: &Params) -> Result<()> {
        merge.check(self.len())?;
        let all = params.all();
        self.expect_alike("to be set", &all.iter().map(|p| (p.name().to_string(), p.value())).collect::<Vec<_>>())?;
        let moved = |(t, p): (usize, &Param)| self.merged(merge, t)?.to(&p.device());
        let merged = all.iter().enumerate().map(moved).collect::<Result<Vec<_>>>()?;
        all.iter().zip(merged).try_for_each(|(p, value)| p.set(value))
    }
    /// Tensor `t` of the merged model, in the base's dtype.
    fn merged(&self, merge: &Merge, t: usize) -> Result<Array> {
        let (name, base) = &self.base[t];
        let vectors: Vec<&Difference> = self.sources.iter().map(|s| &s.tensors[t]).collect();
        let Some(weights) = merge.weights(self.len(), layer_of(name)) else {
            let exact = vectors.iter().map(|v| v.exact()).collect::<Result<Vec<_>>>()?;
            let added = match merge {
                Merge::Ties { density, lambda, normalise } => ties(&exact, *density, *lambda, *normalise),
                Merge::Dare { density, lambda, seed } => {
                    let kept =
                        |(s, v): (&Source, Vec<f64>)| dare(&v, *density, *seed, hash(&format!("{}/{name}", s.name)));
                    let kept: Vec<Vec<f64>> = self.sources.iter().zip(exact).map(kept).collect();
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
        let out = combined(&wide, live.iter().map(|(w, v)| (*w, v.values.clone())))?;
        Ok(with_rests(out, &wide, &live)?.cast(base.dtype()))
    }
    /// ∂loss/∂wᵢ = ⟨∂loss/∂Θ, dᵢ⟩, from the gradients of a loss at some merged model, for gradient descent on the weights.
    ///
    /// # Errors
    /// If a gradient cannot be summed.
    pub fn weight_gradient(&self, gradients: &Gradients, params: &Params) -> Result<Vec<f64>> {
        let mut out = vec![0.0; self.len()];
        for (t, p) in params.all().iter().enumerate() {
            let Some(g) = gradients.param(p) else { continue };
            let g = g.sum()?.to_f64();
            for (o, s) in out.iter_mut().zip(&self.sources) {
                *o += g.iter().zip(s.tensors[t].host()?).map(|(g, v)| g * v as f64).sum::<f64>();
            }
        }
        Ok(out)
    }
    /// The angles between the vectors, their norms by layer, and what would be lost in bf16.
    ///
    /// # Errors
    /// If the vectors are on a device that cannot be read.
    pub fn diagnose(&self) -> Result<Diagnosis> {
        let n = self.len();
        let (mut inner, mut lost) = (vec![vec![0f64; n]; n], vec![0usize; n]);
        let mut norms: Vec<(String, Vec<f64>)> = Vec::new();
        let bf16 = |x: f64| half::bf16::from_f64(x).to_f64();
        for (t, (name, base)) in self.base.iter().enumerate() {
            let vectors = self.sources.iter().map(|s| s.tensors[t].host()).collect::<Result<Vec<_>>>()?;
            let dot = |i: usize, j: usize| -> f64 {
                vectors[i].iter().zip(&vectors[j]).map(|(&x, &y)| x as f64 * y as f64).sum()
            };
            if norms.last().is_none_or(|(layer, _)| layer != layer_of(name)) {
                norms.push((layer_of(name).to_string(), vec![0.0; n]));
            }
            for i in 0..n {
                (0..n).for_each(|j| inner[i][j] += dot(i, j));
                if let Some((_, sums)) = norms.last_mut() {
                    sums[i] += dot(i, i);
                }
                let edits = base.to_f64().into_iter().zip(self.sources[i].tensors[t].exact()?);
                lost[i] += edits.filter(|&(b, d)| d as f32 != 0.0 && bf16(b) == bf16(b + d)).count();
            }
        }
        norms.iter_mut().for_each(|(_, sums)| sums.iter_mut().for_each(|s| *s = s.sqrt()));
        let length = |i: usize| inner[i][i].sqrt();
        let cosine = |i: usize, j: usize| inner[i][j] / (length(i) * length(j)).max(f64::MIN_POSITIVE);
        Ok(Diagnosis {
            sources: self.names().iter().map(|n| n.to_string()).collect(),
            cosines: (0..n).map(|i| (0..n).map(|j| cosine(i, j)).collect()).collect(),
            norms,
            lost_in_bf16: lost,
        })
    }
    /// Writes each source's vector to `folder` as `NAME.safetensors`, with the base's hash, its tags and its cost.
    ///
    /// # Errors
    /// If a name is not a valid file name, or if a file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        crate::io::create_folder(folder)?;
        for s in &self.sources {
            if s.name.is_empty() || s.name.contains(['/', '\\']) || s.name.starts_with('.') {
                return Err(Error::invalid("VectorPool", format!("the source {:?} cannot name a file", s.name)));
            }
            let mut arrays = Vec::new();
            for ((name, _), d) in self.base.iter().zip(&s.tensors) {
                arrays.push((name.clone(), d.values.to(&Device::Cpu)?));
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
    /// Reads a vector that [`VectorPool::save`] wrote, as a new source with the name of the file.
    ///
    /// # Errors
    /// If the file is damaged, or belongs to another base or other tags. Nothing is added then.
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
            tensors.push(Difference { values: values.cast(DType::F32).to(&self.device)?, rest });
        }
        self.sources.push(Source { name: name.clone(), tensors });
        self.ledger.sources.push((name, cost));
        Ok(())
    }
}

/// base + Σ wᵢ·dᵢ, on the device of the arrays and outside the graph.
fn combined(base: &Array, terms: impl Iterator<Item = (f64, Array)>) -> Result<Array> {
    let terms: Vec<(f64, Tensor)> = terms.map(|(w, d)| (w, Tensor::new(d))).collect();
    let terms: Vec<(f64, &Tensor)> = terms.iter().map(|(w, d)| (*w, d)).collect();
    Ok(Tensor::new(base.clone()).add_scaled(&terms)?.into_array())
}

/// The merged tensor, with the rests of its vectors added where there are any.
fn with_rests(mut out: Array, base: &Array, live: &[(f64, &Difference)]) -> Result<Array> {
    let mut at: Vec<u32> = live.iter().flat_map(|(_, v)| v.rest.iter().map(|r| r.0)).collect();
    at.sort_unstable();
    at.dedup();
    if at.is_empty() {
        return Ok(out);
    }
    // The rests are added last, because beside a large base they would be rounded away.
    if !out.device().is_cuda() {
        let b = base.as_slice::<f32>()?;
        let values = live.iter().map(|(w, v)| Ok((*w, v.values.as_slice::<f32>()?))).collect::<Result<Vec<_>>>()?;
        let to = out.as_mut_slice::<f32>()?;
        for e in at.into_iter().map(|e| e as usize) {
            let sum = values.iter().fold(b[e] as f64, |s, (w, v)| s + w * v[e] as f64);
            to[e] = live.iter().fold(sum, |s, (w, v)| s + w * v.rest_at(e)) as f32;
        }
        return Ok(out);
    }
    let (device, n, m) = (out.device(), out.numel(), at.len());
    let picked = |a: &Array| Tensor::new(a.reshape(&[n])?).index_select(0, &ids(&at, &device)?).map(Tensor::into_array);
    let mut terms = live.iter().map(|(w, v)| Ok((*w, picked(&v.values)?))).collect::<Result<Vec<_>>>()?;
    for (w, v) in live {
        let rests: Vec<f32> = at.iter().map(|&e| v.rest_at(e as usize) as f32).collect();
        terms.push((*w, Array::from_slice(&rests, &[m])?.to(&device)?));
    }
    let few = Tensor::new(combined(&picked(base)?, terms.into_iter())?);
    let spread = |values: &Tensor| values.scatter_sum(0, &ids(&at, &device)?, n);
    let mask = spread(&Tensor::new(Array::ones(&[m], (DType::F32, &device))))?.cast(DType::U8)?;
    let whole = Tensor::new(out.reshape(&[n])?);
    Tensor::select(&mask, &spread(&few)?, &whole)?.into_array().reshape(base.shape())
}

fn ids(at: &[u32], device: &Device) -> Result<Array> {
    Array::from_slice(at, &[at.len()])?.to(device)
}

fn expect_finite(what: &str, values: &[(String, Array)]) -> Result<()> {
    match values.iter().find(|(_, a)| a.to_f64().iter().any(|x| !x.is_finite())) {
        None => Ok(()),
        Some((name, _)) => {
            Err(Error::invalid("VectorPool", format!("{what} has values in {name} that are not finite")))
        }
    }
}
