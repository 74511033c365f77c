//! Arrays as safetensors entries.

use super::safetensors;
use super::safetensors::{ElementType, Entry, SafeTensors};
use crate::array::Array;
use crate::base::{DType, Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// The element type in the file.
fn element(dtype: DType) -> ElementType {
    match dtype {
        DType::F32 => ElementType::F32,
        DType::F64 => ElementType::F64,
        DType::BF16 => ElementType::BF16,
        DType::F16 => ElementType::F16,
        DType::U32 => ElementType::U32,
        DType::I64 => ElementType::I64,
        DType::U8 => ElementType::U8,
    }
}

/// An array as a safetensors entry that owns its bytes.
pub fn entry<'a>(name: &'a str, a: &Array) -> Entry<'a> {
    Entry { name: name.into(), dtype: element(a.dtype()), shape: a.shape().to_vec(), bytes: a.to_bytes().into() }
}

/// Writes named arrays as one safetensors file, atomically.
pub fn save_arrays(path: impl AsRef<Path>, arrays: &[(String, Array)], metadata: &[(&str, &str)]) -> Result<()> {
    let entries: Vec<Entry> = arrays.iter().map(|(n, a)| entry(n, a)).collect();
    let metadata: BTreeMap<String, String> = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    safetensors::write(path, &entries, &metadata)
}

/// Reads every tensor of a safetensors file. An element type that has no [`DType`] is an error.
pub fn load_arrays(path: impl AsRef<Path>) -> Result<Vec<(String, Array)>> {
    arrays_of(&SafeTensors::open(path)?)
}

/// The dtype of a tensor's element type. Fails if there is none.
fn dtype_of(file: &SafeTensors, name: &str, element_type: ElementType) -> Result<DType> {
    let known = [DType::F32, DType::F64, DType::BF16, DType::F16, DType::U32, DType::I64, DType::U8];
    known
        .into_iter()
        .find(|&d| element(d) == element_type)
        .ok_or_else(|| Error::format(file.path(), format!("tensor {name} is {element_type}, which is not supported")))
}

/// Reads one tensor of an open file.
pub fn array_of(file: &SafeTensors, name: &str) -> Result<Array> {
    let info = file.info(name)?;
    let dtype = dtype_of(file, name, info.dtype)?;
    Array::from_bytes(&file.read(name)?, &info.shape, dtype)
}

/// Reads every tensor of an open file.
pub fn arrays_of(file: &SafeTensors) -> Result<Vec<(String, Array)>> {
    file.read_all()?
        .into_iter()
        .map(|e| {
            let dtype = dtype_of(file, &e.name, e.dtype)?;
            Ok((e.name.to_string(), Array::from_bytes(&e.bytes, &e.shape, dtype)?))
        })
        .collect()
}
