//! The safetensors format: a JSON header with name, element type, shape and byte range of each tensor, then the bytes.
//!
//! Reading checks everything before it trusts anything: header length, JSON, doubled names, element types, shape
//! against size, and ranges that leave the file, overlap or leave holes. Tensors are read one at a time from the file,
//! so that opening a large file costs only its header; a file that shrinks while it is open gives an error, where a
//! memory map would kill the process.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Value, json};

use crate::base::{Error, Result};

/// Headers above this size are refused, as by the reference reader: they would only serve to exhaust memory.
const MAX_HEADER: u64 = 100_000_000;

macro_rules! element_types {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $size:literal;)*) => {
        /// Element types that the format knows.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ElementType { $($(#[$doc])* $variant,)* }

        impl ElementType {
            /// The name in the file, such as `BF16`.
            pub fn name(self) -> &'static str {
                match self { $(ElementType::$variant => $name,)* }
            }
            /// Bytes per element.
            pub fn size(self) -> usize {
                match self { $(ElementType::$variant => $size,)* }
            }
            /// The type with this name in the file.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(ElementType::$variant),)* _ => None }
            }
        }
    };
}

element_types! {
    /// One byte, 0 or 1.
    Bool = "BOOL", 1;
    /// Unsigned, 8 bits.
    U8 = "U8", 1;
    /// Signed, 8 bits.
    I8 = "I8", 1;
    /// Float, 5 bits of exponent, 2 of mantissa.
    F8E5M2 = "F8_E5M2", 1;
    /// Float, 4 bits of exponent, 3 of mantissa.
    F8E4M3 = "F8_E4M3", 1;
    /// Signed, 16 bits.
    I16 = "I16", 2;
    /// Unsigned, 16 bits.
    U16 = "U16", 2;
    /// IEEE half precision.
    F16 = "F16", 2;
    /// bfloat16.
    BF16 = "BF16", 2;
    /// Signed, 32 bits.
    I32 = "I32", 4;
    /// Unsigned, 32 bits.
    U32 = "U32", 4;
    /// IEEE single precision.
    F32 = "F32", 4;
    /// IEEE double precision.
    F64 = "F64", 8;
    /// Signed, 64 bits.
    I64 = "I64", 8;
    /// Unsigned, 64 bits.
    U64 = "U64", 8;
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor to be written: little-endian bytes in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry<'a> {
    /// Name, unique in the file.
    pub name: Cow<'a, str>,
    /// Element type.
    pub dtype: ElementType,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> Entry<'a> {
    /// An entry that borrows or owns its bytes.
    pub fn new(
        name: impl Into<Cow<'a, str>>,
        dtype: ElementType,
        shape: impl Into<Vec<usize>>,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        Entry { name: name.into(), dtype, shape: shape.into(), bytes: bytes.into() }
    }
}

/// What the header says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: ElementType,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// First byte, counted from the end of the header.
    pub start: u64,
    /// Size in bytes.
    pub bytes: usize,
}

/// An open safetensors file: its header has been read and checked, its tensors are read on demand.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    file: Mutex<File>,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
    data_start: u64,
}

impl SafeTensors {
    /// Opens a file and checks its header against its size.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Format`] naming the first thing that is wrong with it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let meta = file.metadata().map_err(|e| Error::io("read the size of", path, e))?;
        if meta.is_dir() {
            return Err(Error::format(path, "is a folder, not a safetensors file"));
        }
        let size = meta.len();
        let mut length = [0; 8];
        if size < 8 {
            let message = format!("{size} bytes are too few for a safetensors file; it was probably cut off");
            return Err(Error::format(path, message));
        }
        file.read_exact(&mut length).map_err(|e| Error::io("read", path, e))?;
        let header_size = u64::from_le_bytes(length);
        if header_size > MAX_HEADER || header_size > size - 8 {
            let message = format!(
                "its header claims {header_size} bytes, the file has {size}; this is not a safetensors file, or it was \
                 cut off"
            );
            return Err(Error::format(path, message));
        }
        let mut header = vec![0; header_size as usize];
        file.read_exact(&mut header).map_err(|e| Error::io("read", path, e))?;
        let (tensors, metadata) =
            parse_header(&header, size - 8 - header_size).map_err(|message| Error::format(path, message))?;
        let index = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let data_start = 8 + header_size;
        Ok(SafeTensors { path: path.to_path_buf(), file: Mutex::new(file), tensors, index, metadata, data_start })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors in the order of their bytes.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The free-form text pairs of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The header entry of a tensor.
    ///
    /// # Errors
    /// [`Error::Format`] with the closest names if there is no such tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        if let Some(&i) = self.index.get(name) {
            return Ok(&self.tensors[i]);
        }
        let last = name.rsplit('.').next().unwrap_or(name);
        let like: Vec<&str> =
            self.tensors.iter().map(|t| t.name.as_str()).filter(|n| n.ends_with(last)).take(3).collect();
        let hint = if like.is_empty() {
            format!("it holds {} tensors", self.tensors.len())
        } else {
            format!("it has {}", like.join(", "))
        };
        Err(Error::format(&self.path, format!("no tensor '{name}'; {hint}")))
    }

    /// Whether the file has a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Reads the bytes of one tensor: little-endian, row-major.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let info = self.info(name)?;
        let mut bytes = vec![0; info.bytes];
        self.read_at(info, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads one tensor into a buffer of exactly its size.
    pub fn read_into(&self, name: &str, buffer: &mut [u8]) -> Result<()> {
        let info = self.info(name)?;
        if buffer.len() != info.bytes {
            let message = format!("tensor '{name}' has {} bytes, the buffer {}", info.bytes, buffer.len());
            return Err(Error::invalid("SafeTensors::read_into", message));
        }
        self.read_at(info, buffer)
    }

    /// Reads every tensor, in file order.
    pub fn read_all(&self) -> Result<Vec<Entry<'static>>> {
        self.tensors
            .iter()
            .map(|t| Ok(Entry::new(t.name.clone(), t.dtype, t.shape.clone(), self.read(&t.name)?)))
            .collect()
    }

    fn read_at(&self, info: &TensorInfo, buffer: &mut [u8]) -> Result<()> {
        // A reader that panicked cannot have left the file in a bad state: every read seeks first.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.data_start + info.start)).and_then(|_| file.read_exact(buffer)).map_err(|e| {
            match e.kind() {
                io::ErrorKind::UnexpectedEof => {
                    Error::format(&self.path, format!("was cut off while open, inside tensor '{}'", info.name))
                }
                _ => Error::io("read", &self.path, e),
            }
        })
    }
}

/// Writes tensors and metadata to a file, atomically (see [`crate::io::write_atomic`]).
///
/// # Errors
/// [`Error::Invalid`] for a doubled name or bytes that do not fit the shape; [`Error::Io`] if the disk refuses.
pub fn write(path: impl AsRef<Path>, entries: &[Entry<'_>], metadata: &BTreeMap<String, String>) -> Result<()> {
    let plan = Plan::new(entries, metadata)?;
    super::write_atomic_with(path, |file| plan.write(file))
}

/// The header and the order of the tensors, checked before a byte is written.
pub(crate) struct Plan<'a> {
    header: Vec<u8>,
    order: Vec<&'a Entry<'a>>,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(entries: &'a [Entry<'a>], metadata: &BTreeMap<String, String>) -> Result<Self> {
        const OP: &str = "write safetensors";
        let mut order: Vec<&Entry<'_>> = entries.iter().collect();
        // Widest elements first keeps every tensor aligned; names make the file independent of the caller's order.
        order.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
        let mut header = serde_json::Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), json!(metadata));
        }
        let mut start = 0usize;
        for entry in &order {
            let name = entry.name.as_ref();
            if name == "__metadata__" {
                return Err(Error::invalid(OP, "the name '__metadata__' is reserved by the format"));
            }
            if byte_count(entry.dtype, &entry.shape) != Some(entry.bytes.len()) {
                let (dtype, shape, bytes) = (entry.dtype, &entry.shape, entry.bytes.len());
                let message = format!("tensor '{name}': {bytes} bytes do not fit {dtype} {shape:?}");
                return Err(Error::invalid(OP, message));
            }
            let end = start + entry.bytes.len();
            let value = json!({"dtype": entry.dtype.name(), "shape": entry.shape, "data_offsets": [start, end]});
            if header.insert(name.to_string(), value).is_some() {
                return Err(Error::invalid(OP, format!("two tensors are named '{name}'")));
            }
            start = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok(Plan { header, order })
    }

    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&(self.header.len() as u64).to_le_bytes())?;
        out.write_all(&self.header)?;
        self.order.iter().try_for_each(|entry| out.write_all(&entry.bytes))
    }
}

fn byte_count(dtype: ElementType, shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d))
}

/// A JSON object as pairs: `serde_json::Map` would swallow doubled names.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}

/// The checked header: tensors in the order of their bytes, and the metadata.
fn parse_header(header: &[u8], data: u64) -> Result<(Vec<TensorInfo>, BTreeMap<String, String>), String> {
    let text = std::str::from_utf8(header).map_err(|e| format!("its header is not UTF-8 text: {e}"))?;
    let pairs: Pairs = serde_json::from_str(text).map_err(|e| format!("its header is not valid JSON: {e}"))?;
    let mut tensors = Vec::with_capacity(pairs.0.len());
    let mut metadata = BTreeMap::new();
    for (name, value) in pairs.0 {
        if name == "__metadata__" {
            metadata = serde_json::from_value(value).map_err(|e| format!("its metadata are not text pairs: {e}"))?;
        } else {
            tensors.push(parse_tensor(name, &value, data)?);
        }
    }
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("tensor '{}' is there twice", pair[0]));
    }
    tensors.sort_by(|a, b| (a.start, a.bytes).cmp(&(b.start, b.bytes)).then_with(|| a.name.cmp(&b.name)));
    let mut end = 0;
    for tensor in &tensors {
        if tensor.start < end {
            return Err(format!("tensor '{}' overlaps the one before it", tensor.name));
        }
        if tensor.start > end {
            return Err(format!("{} unexplained bytes before tensor '{}'", tensor.start - end, tensor.name));
        }
        end += tensor.bytes as u64;
    }
    if end != data {
        return Err(format!("its tensors take {end} bytes, but {data} follow the header"));
    }
    Ok((tensors, metadata))
}

fn parse_tensor(name: String, value: &Value, data: u64) -> Result<TensorInfo, String> {
    let dtype = value["dtype"].as_str().ok_or_else(|| format!("tensor '{name}' has no dtype"))?;
    let dtype =
        ElementType::from_name(dtype).ok_or_else(|| format!("tensor '{name}' has the unknown dtype '{dtype}'"))?;
    let shape: Vec<usize> = value["shape"]
        .as_array()
        .and_then(|dims| dims.iter().map(|d| d.as_u64().and_then(|d| usize::try_from(d).ok())).collect())
        .ok_or_else(|| format!("tensor '{name}' has no valid shape"))?;
    let offsets = value["data_offsets"].as_array().map(Vec::as_slice);
    let (start, end) = match offsets {
        Some([a, b]) => a.as_u64().zip(b.as_u64()),
        _ => None,
    }
    .ok_or_else(|| format!("tensor '{name}' has no valid data_offsets"))?;
    if start > end || end > data {
        return Err(format!(
            "tensor '{name}' lies at bytes {start} to {end}, but {data} bytes follow the header; the file was probably \
             cut off"
        ));
    }
    let size = byte_count(dtype, &shape).ok_or_else(|| format!("tensor '{name}': shape {shape:?} is too large"))?;
    if size as u64 != end - start {
        return Err(format!("tensor '{name}': {dtype} {shape:?} needs {size} bytes, its range has {}", end - start));
    }
    Ok(TensorInfo { name, dtype, shape, start, bytes: size })
}

#[cfg(test)]
mod tests {
    use super::super::Scratch;
    use super::*;
    use std::fs;

    fn sample() -> Vec<Entry<'static>> {
        vec![
            Entry::new("b", ElementType::U8, [3], vec![1, 2, 3]),
            Entry::new("a.weight", ElementType::F32, [2, 2], (0..16).collect::<Vec<u8>>()),
            Entry::new("empty", ElementType::BF16, [0, 4], vec![]),
            Entry::new("scalar", ElementType::F64, [], 1.5f64.to_le_bytes().to_vec()),
        ]
    }

    /// A file made of a header text and data.
    fn raw(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn open_bytes(path: &Path, bytes: &[u8]) -> Result<SafeTensors> {
        fs::write(path, bytes).unwrap();
        SafeTensors::open(path)
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = Scratch::new("st");
        let path = folder.join("m.safetensors");
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        write(&path, &sample(), &metadata).unwrap();
        let file = SafeTensors::open(&path).unwrap();
        assert_eq!(file.metadata(), &metadata);
        assert_eq!(file.tensors().len(), 4);
        for entry in sample() {
            assert_eq!(file.read(&entry.name).unwrap(), *entry.bytes, "{}", entry.name);
            assert_eq!(file.info(&entry.name).unwrap().shape, entry.shape);
        }
        assert_eq!((file.data_start + file.info("a.weight").unwrap().start) % 4, 0);
        let error = file.read("c.weight").unwrap_err().to_string();
        assert!(error.contains("a.weight") && error.contains("m.safetensors"), "{error}");
        assert!(file.read_into("b", &mut [0; 2]).is_err());
        let mut reversed = sample();
        reversed.reverse();
        let again = folder.join("n.safetensors");
        write(&again, &reversed, &metadata).unwrap();
        assert_eq!(fs::read(&path).unwrap(), fs::read(&again).unwrap(), "the order of entries must not matter");
        assert_eq!(file.read_all().unwrap().len(), 4);
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let folder = Scratch::new("st-golden");
        let path = folder.join("g.safetensors");
        write(&path, &[Entry::new("x", ElementType::I16, [1, 2], vec![1, 0, 2, 0])], &BTreeMap::new()).unwrap();
        let header = r#"{"x":{"data_offsets":[0,4],"dtype":"I16","shape":[1,2]}}"#;
        let padded = format!("{header:<width$}", width = header.len().next_multiple_of(8));
        assert_eq!(fs::read(&path).unwrap(), raw(&padded, &[1, 0, 2, 0]));
    }

    #[test]
    fn wrong_entries_are_refused_before_anything_is_written() {
        let folder = Scratch::new("st-refuse");
        let path = folder.join("m.safetensors");
        let wrong = [
            vec![Entry::new("x", ElementType::F32, [2], vec![0; 7])],
            vec![Entry::new("x", ElementType::U8, [1], vec![0]), Entry::new("x", ElementType::U8, [1], vec![0])],
            vec![Entry::new("__metadata__", ElementType::U8, [1], vec![0])],
            vec![Entry::new("x", ElementType::F32, [usize::MAX, 2], vec![])],
        ];
        for entries in wrong {
            assert!(write(&path, &entries, &BTreeMap::new()).is_err());
            assert!(!path.exists());
        }
    }

    #[test]
    fn every_fault_is_named() {
        let folder = Scratch::new("st-fault");
        let path = folder.join("bad.safetensors");
        let one = |dtype: &str, shape: &str, range: &str| {
            format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{range}}}}}"#)
        };
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"x":{{"dtype":"U8","shape":[2],"data_offsets":{a}}},"y":{{"dtype":"U8","shape":[2],"data_offsets":{b}}}}}"#
            )
        };
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (vec![], "too few"),
            (vec![0; 7], "too few"),
            (u64::MAX.to_le_bytes().to_vec(), "claims"),
            (vec![0xff; 64], "claims"),
            (raw("", &[]), "JSON"),
            (raw("[1]", &[]), "JSON"),
            (raw("{\"a\"", &[]), "JSON"),
            (raw(&one("F12", "[1]", "[0,4]"), &[0; 4]), "unknown dtype"),
            (raw(&one("F32", "[-1]", "[0,4]"), &[0; 4]), "shape"),
            (raw(&one("F32", "[1.5]", "[0,4]"), &[0; 4]), "shape"),
            (raw(&one("F32", "[2]", "[0,4]"), &[0; 4]), "needs 8 bytes"),
            (raw(&one("F32", "[1]", "[4,0]"), &[0; 4]), "lies at"),
            (raw(&one("F32", "[1]", "[0,4]"), &[0; 3]), "cut off"),
            (raw(&one("F32", "[1]", "[0,4]"), &[0; 5]), "5 follow"),
            (raw(&one("F32", "[1]", "[0]"), &[0; 4]), "data_offsets"),
            (raw(&one("F32", "[4294967296,4294967296,16]", "[0,4]"), &[0; 4]), "too large"),
            (raw(&one("F32", "[1]", "[1,5]"), &[0; 5]), "unexplained"),
            (raw(&two("[0,2]", "[1,3]"), &[0; 3]), "overlaps"),
            (raw(&two("[0,2]", "[0,2]"), &[0; 2]), "overlaps"),
            (raw(&two("[0,2]", "[3,5]"), &[0; 5]), "unexplained"),
            (raw(&two("[0,2]", "[2,4]").replace("\"y\"", "\"x\""), &[0; 4]), "twice"),
            (raw(r#"{"__metadata__":{"a":1}}"#, &[]), "metadata"),
            (raw(r#"{"x":3}"#, &[]), "dtype"),
        ];
        for (bytes, expected) in cases {
            let error = open_bytes(&path, &bytes).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("bad.safetensors"), "{expected}: {error}");
        }
        assert!(SafeTensors::open(folder.path()).is_err());
        assert!(SafeTensors::open(folder.join("absent")).unwrap_err().to_string().contains("absent"));
        assert_eq!(open_bytes(&path, &raw("{}  ", &[])).unwrap().tensors().len(), 0);
    }

    #[test]
    fn no_damage_makes_it_panic() {
        let folder = Scratch::new("st-fuzz");
        let path = folder.join("f.safetensors");
        write(&path, &sample(), &BTreeMap::from([("k".into(), "v".into())])).unwrap();
        let good = fs::read(&path).unwrap();
        for end in 0..good.len() {
            assert!(open_bytes(&path, &good[..end]).is_err(), "cut to {end} bytes");
        }
        for position in 0..good.len() {
            for flip in [0x01, 0x10, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[position] ^= flip;
                // Damage to the data or to a name cannot be seen here; checkpoints carry checksums for that.
                if let Ok(file) = open_bytes(&path, &bytes) {
                    file.read_all().unwrap();
                }
            }
        }
    }

    #[test]
    fn a_file_that_shrinks_while_open_is_an_error() {
        let folder = Scratch::new("st-shrink");
        let path = folder.join("s.safetensors");
        write(&path, &sample(), &BTreeMap::new()).unwrap();
        let file = SafeTensors::open(&path).unwrap();
        let size = fs::metadata(&path).unwrap().len();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size - 1).unwrap();
        assert!(file.read("b").unwrap_err().to_string().contains("cut off"));
        assert!(file.read("a.weight").is_ok());
    }
}
