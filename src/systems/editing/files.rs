//! Checkpoints that are read tensor by tensor, and the checks that they can be merged.

use crate::base::{DType, Error, Result};
use crate::io::{self, ElementType, SafeTensors, TensorInfo};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The name of the index of a checkpoint with several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Files that define a model's tokens, where it has them.
const TOKENIZERS: [&str; 5] = ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"];

/// Entries of `config.json` that change the meaning of parameters without changing their shapes.
const MEANING: [&str; 10] = [
    "model_type",
    "n_head",
    "n_layer",
    "spans",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "num_local_experts",
    "tie_word_embeddings",
    "expert_order",
];

/// A model on disk.
pub(super) struct Checkpoint {
    path: PathBuf,
    /// The files, each with its name in the folder.
    pub(super) files: Vec<(String, SafeTensors)>,
    at: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Opens a safetensors file, or a folder with `model.safetensors`, with an index and its files, or with one safetensors file.
    pub(super) fn open(path: &Path) -> Result<Checkpoint> {
        if !path.exists() {
            let message = "there is no such file or folder; models of a hub have to be downloaded first";
            return Err(Error::format(path, message));
        }
        let (mut files, mut wanted) = (Vec::new(), None);
        if !path.is_dir() {
            files.push(("model.safetensors".to_string(), SafeTensors::open(path)?));
        } else if path.join(INDEX).exists() {
            #[derive(Deserialize)]
            struct Index {
                weight_map: BTreeMap<String, String>,
            }
            let index: Index = io::read_json(path.join(INDEX))?;
            let mut names: Vec<&String> = index.weight_map.values().collect();
            names.sort();
            names.dedup();
            for name in names {
                // The name must not lead out of the folder.
                if Path::new(name).file_name().is_none_or(|n| n != name.as_str()) {
                    return Err(Error::format(
                        path.join(INDEX),
                        format!("names the file '{name}', which is in no folder"),
                    ));
                }
                files.push((name.clone(), SafeTensors::open(path.join(name))?));
            }
            wanted = Some(index.weight_map);
        } else {
            files.push(("model.safetensors".to_string(), SafeTensors::open(the_only_file(path)?)?));
        }
        let mut at = BTreeMap::new();
        for (i, (name, file)) in files.iter().enumerate() {
            if file.metadata().get("format").is_some_and(|f| f == "distribution-vector") {
                return Err(Error::format(file.path(), "is a vector of a pool, not a model"));
            }
            for t in file.tensors() {
                if at.insert(t.name.clone(), i).is_some() {
                    return Err(Error::format(
                        file.path(),
                        format!("{} is in another file of the folder as well", t.name),
                    ));
                }
                if wanted.as_ref().is_some_and(|w| w.get(&t.name) != Some(name)) {
                    return Err(Error::format(path.join(INDEX), format!("does not say that {} is in {name}", t.name)));
                }
            }
        }
        if let Some(missing) = wanted.iter().flatten().map(|(n, _)| n).find(|n| !at.contains_key(*n)) {
            return Err(Error::format(
                path.join(INDEX),
                format!("names the tensor {missing}, which its file does not have"),
            ));
        }
        if at.is_empty() {
            return Err(Error::format(path, "has no tensors"));
        }
        Ok(Checkpoint { path: path.to_path_buf(), files, at })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder with the configuration and the tokenizer; `None` if the checkpoint is a single file.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.path.is_dir().then_some(&*self.path)
    }

    pub(super) fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.file(name)?.info(name)
    }

    fn file(&self, name: &str) -> Result<&SafeTensors> {
        match self.at.get(name) {
            Some(&i) => Ok(&self.files[i].1),
            None => Err(Error::format(&self.path, format!("has no tensor {name}"))),
        }
    }

    /// Reads the bytes of a tensor from byte `start` on, without conversion.
    pub(super) fn bytes(&self, name: &str, start: usize, buffer: &mut [u8]) -> Result<()> {
        self.file(name)?.read_part(name, start, buffer)
    }

    /// Reads the elements of a float tensor from element `start` on, until `out` is full. `raw` is a buffer for their bytes.
    ///
    /// # Errors
    /// If the file cannot be read, or has a value that is not finite.
    pub(super) fn values(&self, name: &str, start: usize, out: &mut [f32], raw: &mut Vec<u8>) -> Result<()> {
        let file = self.file(name)?;
        let dtype = float(file, file.info(name)?)?;
        let size = dtype.size();
        raw.resize(out.len() * size, 0);
        file.read_part(name, start * size, raw)?;
        match dtype {
            DType::BF16 => {
                let bits = |b: &[u8]| f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
                out.iter_mut().zip(raw.chunks_exact(2)).for_each(|(o, b)| *o = bits(b));
            }
            DType::F16 => {
                let value = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                out.iter_mut().zip(raw.chunks_exact(2)).for_each(|(o, b)| *o = value(b));
            }
            _ => {
                let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                out.iter_mut().zip(raw.chunks_exact(4)).for_each(|(o, b)| *o = value(b));
            }
        }
        // This has no branches: an exponent of ones means an infinity or a NaN.
        match out.iter().fold(false, |bad, x| bad | (x.to_bits() & 0x7f80_0000 == 0x7f80_0000)) {
            false => Ok(()),
            true => Err(Error::format(file.path(), format!("the tensor {name} has values that are not finite"))),
        }
    }

    /// Refuses a model whose parameters do not have the same meaning as this one's.
    pub(super) fn expect_relative(&self, other: &Checkpoint) -> Result<()> {
        let refused = |message: String| Err(Error::format(other.path(), format!("{message} {}", self.path.display())));
        let missing: Vec<&String> = self.at.keys().filter(|n| !other.at.contains_key(*n)).take(3).collect();
        let extra: Vec<&String> = other.at.keys().filter(|n| !self.at.contains_key(*n)).take(3).collect();
        if !missing.is_empty() || !extra.is_empty() {
            return refused(format!("lacks {missing:?} and has {extra:?} beside"));
        }
        for name in self.at.keys() {
            let (own, theirs) = (self.info(name)?, other.info(name)?);
            if own.shape != theirs.shape {
                return refused(format!("has {name} {:?}, which is {:?} in", theirs.shape, own.shape));
            }
            let (own_float, other_float) = (is_float(own.dtype), is_float(theirs.dtype));
            if own_float != other_float || (!own_float && own.dtype != theirs.dtype) {
                return refused(format!("has {name} in {}, which is {} in", theirs.dtype, own.dtype));
            }
        }
        let tag = |c: &Checkpoint| c.files.first().and_then(|f| f.1.metadata().get("expert_order").cloned());
        if tag(self) != tag(other) {
            return refused("has its experts in another order than".to_string());
        }
        let (Some(own), Some(theirs)) = (self.folder(), other.folder()) else { return Ok(()) };
        let (a, b) = (config(own)?, config(theirs)?);
        for key in MEANING {
            match (a.get(key), b.get(key)) {
                (Some(a), Some(b)) if a != b => {
                    return refused(format!("has {key} {b} in config.json, which is {a} in"));
                }
                _ => {}
            }
        }
        for file in TOKENIZERS {
            if let (Some(a), Some(b)) = (tokenizer(&own.join(file))?, tokenizer(&theirs.join(file))?)
                && a != b
            {
                return refused(format!("has another tokenizer ({file}) than"));
            }
        }
        Ok(())
    }
}

/// The safetensors file of a folder that has no index and no other safetensors file.
fn the_only_file(folder: &Path) -> Result<PathBuf> {
    let usual = folder.join("model.safetensors");
    if usual.exists() {
        return Ok(usual);
    }
    let entries = fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "safetensors"))
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (Some(_), false) => Err(Error::format(folder, format!("has several safetensors files and no {INDEX}"))),
        (None, _) => {
            let message = "has no safetensors file; a checkpoint in another format has to be converted first";
            Err(Error::format(folder, message))
        }
    }
}

pub(super) fn is_float(e: ElementType) -> bool {
    dtype_of(e).is_some()
}

fn dtype_of(e: ElementType) -> Option<DType> {
    match e {
        ElementType::F32 => Some(DType::F32),
        ElementType::BF16 => Some(DType::BF16),
        ElementType::F16 => Some(DType::F16),
        _ => None,
    }
}

/// The dtype of a float tensor. Refuses floats that are not supported; `None` for other element types, which are copied.
pub(super) fn merged_dtype(path: &Path, info: &TensorInfo) -> Result<Option<DType>> {
    match info.dtype {
        ElementType::BOOL
        | ElementType::U8
        | ElementType::I8
        | ElementType::I16
        | ElementType::U16
        | ElementType::I32
        | ElementType::U32
        | ElementType::I64
        | ElementType::U64 => Ok(None),
        other => match dtype_of(other) {
            Some(dtype) => Ok(Some(dtype)),
            None => Err(Error::format(
                path,
                format!("the tensor {} is {other}, which is not merged: f32, bf16 and f16 are", info.name),
            )),
        },
    }
}

fn float(file: &SafeTensors, info: &TensorInfo) -> Result<DType> {
    let not = || Error::format(file.path(), format!("the tensor {} is {}, no float", info.name, info.dtype));
    merged_dtype(file.path(), info)?.ok_or_else(not)
}

/// `config.json`, or null if there is none.
pub(super) fn config(folder: &Path) -> Result<Value> {
    let path = folder.join("config.json");
    if path.exists() { io::read_json(path) } else { Ok(Value::Null) }
}

/// The content of a tokenizer's file that defines tokens. For `tokenizer.json` these are only some of its parts, so that padding or
/// formatting may differ.
fn tokenizer(path: &Path) -> Result<Option<Vec<u8>>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    if path.extension().is_none_or(|e| e != "json") {
        return Ok(Some(bytes));
    }
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|e| Error::format(path, format!("not the expected JSON: {e}")))?;
    let told = match value.get("model") {
        Some(_) => {
            let parts = ["model", "added_tokens", "normalizer", "pre_tokenizer"];
            parts.iter().map(|p| value[*p].clone()).collect::<Vec<_>>().into()
        }
        None => value,
    };
    Ok(Some(told.to_string().into_bytes()))
}
