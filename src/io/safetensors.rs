//! The safetensors format: a JSON header with name, element type, shape and byte range of each tensor, then the bytes.
//!
//! The `safetensors` crate defines the format: its element types, the entries of a header, and which ranges and sizes are valid. This
//! module adds error messages and what the crate does not do. The crate accepts duplicate names, of which the last one is used; and it
//! reads from one slice and writes into one vector. This module reads tensors one at a time, so that opening a large file reads only its
//! header, and writes them without a second copy. A file that shrinks while it is open gives an error, where a memory map would kill the
//! process.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ::safetensors::tensor::{Metadata, TensorInfo as Described};
use serde::de::{self, Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::{RawValue, Value};

use crate::base::{Error, Result};

/// The element types of the format.
pub use ::safetensors::Dtype as ElementType;

/// Headers above this size are refused, as by the reference reader: larger ones could only be meant to exhaust memory.
const MAX_HEADER: u64 = 100_000_000;

/// The name in a header that is not a tensor's.
const METADATA: &str = "__metadata__";

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
    /// An entry with bytes that are borrowed or owned.
    pub fn new(
        name: impl Into<Cow<'a, str>>,
        dtype: ElementType,
        shape: impl Into<Vec<usize>>,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        Entry { name: name.into(), dtype, shape: shape.into(), bytes: bytes.into() }
    }
}

/// The header's entry for one tensor.
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

/// An open safetensors file. Its header has been read and checked; its tensors are read when a method is called.
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
    /// [`Error::Io`] if the file cannot be read, [`Error::Format`] that names the first fault in it.
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

    /// All tensors in the order of their bytes in the file.
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

    /// Reads a part of one tensor, from byte `start` of it on, until the buffer is full.
    ///
    /// # Errors
    /// If there is no such tensor, or if the part extends beyond its end.
    pub fn read_part(&self, name: &str, start: usize, buffer: &mut [u8]) -> Result<()> {
        let info = self.info(name)?;
        match start.checked_add(buffer.len()) {
            Some(end) if end <= info.bytes => {
                self.read_at(&TensorInfo { start: info.start + start as u64, ..info.clone() }, buffer)
            }
            _ => {
                let message =
                    format!("{} bytes from {start} on, of tensor '{name}' with {} bytes", buffer.len(), info.bytes);
                Err(Error::invalid("SafeTensors::read_part", message))
            }
        }
    }

    /// Reads every tensor, in file order.
    pub fn read_all(&self) -> Result<Vec<Entry<'static>>> {
        self.tensors
            .iter()
            .map(|t| Ok(Entry::new(t.name.clone(), t.dtype, t.shape.clone(), self.read(&t.name)?)))
            .collect()
    }

    fn read_at(&self, info: &TensorInfo, buffer: &mut [u8]) -> Result<()> {
        // A reader that panicked cannot have left the file in a bad state, because every read seeks first.
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
/// [`Error::Invalid`] for a duplicate name or bytes that do not fit the shape; [`Error::Io`] if writing fails.
pub fn write(path: impl AsRef<Path>, entries: &[Entry<'_>], metadata: &BTreeMap<String, String>) -> Result<()> {
    let plan = Plan::new(entries, metadata)?;
    super::write_atomic_with(path, |file| plan.write(file))
}

/// Writes tensors whose bytes are made piece by piece, so that no tensor has to be in memory as a whole. Atomic, as [`write()`].
///
/// `tensors` has the name, element type and shape of each. `fill` is called once for each, with its name and a function that takes the next
/// piece of its bytes (little-endian, row-major).
///
/// # Errors
/// Those of [`write()`], those that `fill` returns, and an error if `fill` gives more or fewer bytes than the shape has.
pub fn write_pieces(
    path: impl AsRef<Path>,
    tensors: &[(String, ElementType, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
    mut fill: impl FnMut(&str, &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let bytes = |(name, dtype, shape): &(String, ElementType, Vec<usize>)| {
        let bits = shape.iter().try_fold(dtype.bitsize(), |n, &d| n.checked_mul(d));
        bits.map(|bits| bits / 8).ok_or_else(|| {
            Error::invalid("write safetensors", format!("tensor '{name}': shape {shape:?} is too large"))
        })
    };
    let mut order = tensors
        .iter()
        .map(|t| Ok(Planned { name: &t.0, dtype: t.1, shape: &t.2, bytes: bytes(t)? }))
        .collect::<Result<Vec<_>>>()?;
    order.sort_by(|a, b| in_file(a, b));
    let header = header(&order, metadata)?;
    let mut failed = None;
    let written = super::write_atomic_with(path, |out| {
        write_header(&header, out)?;
        for t in &order {
            let mut given = 0;
            let mut sink = |piece: &[u8]| {
                given += piece.len();
                out.write_all(piece).map_err(|e| Error::io("write", path, e))
            };
            let result = fill(t.name, &mut sink).and_then(|()| match given == t.bytes {
                true => Ok(()),
                false => {
                    let message = format!("tensor '{}' has {} bytes, and {given} were given", t.name, t.bytes);
                    Err(Error::invalid("write safetensors", message))
                }
            });
            if let Err(e) = result {
                failed = Some(e);
                return Err(io::Error::other("stopped"));
            }
        }
        Ok(())
    });
    match failed {
        Some(e) => Err(e),
        None => written,
    }
}

/// A tensor of a header that is to be written.
struct Planned<'a> {
    name: &'a str,
    dtype: ElementType,
    shape: &'a [usize],
    bytes: usize,
}

/// The order of tensors in a file. With the widest elements first every tensor is aligned. Sorting by name makes the file independent of
/// the caller's order.
fn in_file(a: &Planned, b: &Planned) -> Ordering {
    b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(b.name))
}

/// Makes the header for tensors that are in the order of their bytes.
fn header(order: &[Planned], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let refused = |message: String| Error::invalid("write safetensors", message);
    let mut names = HashSet::new();
    let mut start = 0;
    let mut described = Vec::with_capacity(order.len());
    for &Planned { name, dtype, shape, bytes } in order {
        if name == METADATA {
            return Err(refused(format!("the name '{METADATA}' is reserved by the format")));
        }
        if !names.insert(name) {
            return Err(refused(format!("two tensors are named '{name}'")));
        }
        let data_offsets = (start, start + bytes);
        start = data_offsets.1;
        described.push((name.to_string(), Described { dtype, shape: shape.to_vec(), data_offsets }));
    }
    let checked = check(&described).map_err(refused)?;
    drop(described);
    // The header is converted to a JSON value first, so that names are sorted whatever order the crate uses.
    let mut header = serde_json::to_value(checked).map_err(|e| refused(e.to_string()))?;
    if !metadata.is_empty() {
        header[METADATA] = serde_json::json!(metadata);
    }
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() as u64 > MAX_HEADER {
        return Err(refused(format!("a header of {} bytes, which no reader accepts", header.len())));
    }
    Ok(header)
}

fn write_header(header: &[u8], out: &mut impl Write) -> io::Result<()> {
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header)
}

/// The header and the order of the tensors, which are checked before anything is written.
pub(crate) struct Plan<'a> {
    header: Vec<u8>,
    order: Vec<&'a Entry<'a>>,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(entries: &'a [Entry<'a>], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let described =
            |e: &'a Entry<'a>| Planned { name: &e.name, dtype: e.dtype, shape: &e.shape, bytes: e.bytes.len() };
        let mut order: Vec<&Entry<'_>> = entries.iter().collect();
        order.sort_by(|a, b| in_file(&described(a), &described(b)));
        let header = header(&order.iter().map(|e| described(e)).collect::<Vec<_>>(), metadata)?;
        Ok(Plan { header, order })
    }

    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_header(&self.header, out)?;
        self.order.iter().try_for_each(|entry| out.write_all(&entry.bytes))
    }
}

/// A JSON object whose names must all be different; a map would silently keep the last of two.
struct Object<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<T>, A::Error> {
                let mut object = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if object.contains_key(&name) {
                        return Err(de::Error::custom(format!("'{name}' is there twice")));
                    }
                    object.insert(name, map.next_value()?);
                }
                Ok(Object(object))
            }
        }
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

/// Checks the header. Returns the tensors in the order of their bytes, and the metadata.
fn parse_header(header: &[u8], data: u64) -> Result<(Vec<TensorInfo>, BTreeMap<String, String>), String> {
    let text = std::str::from_utf8(header).map_err(|e| format!("its header is not UTF-8 text: {e}"))?;
    let object: Object<&RawValue> =
        serde_json::from_str(text).map_err(|e| format!("its header is not valid JSON of tensors: {e}"))?;
    let mut tensors = Vec::with_capacity(object.0.len());
    let mut metadata = Object(BTreeMap::new());
    for (name, value) in object.0 {
        if name == METADATA {
            metadata =
                serde_json::from_str(value.get()).map_err(|e| format!("its metadata are not text pairs: {e}"))?;
        } else {
            let tensor = parse_tensor(value.get(), data).map_err(|e| format!("tensor '{name}' {e}"))?;
            tensors.push((name, tensor));
        }
    }
    // The sort is stable: of tensors without elements, the first by name comes first.
    tensors.sort_by_key(|(_, t)| t.data_offsets);
    let end = check(&tensors)?.data_len() as u64;
    if end != data {
        return Err(format!("its tensors take {end} bytes, but {data} follow the header"));
    }
    let info = |(name, t): (String, Described)| {
        let (start, end) = t.data_offsets;
        TensorInfo { name, dtype: t.dtype, shape: t.shape, start: start as u64, bytes: end - start }
    };
    Ok((tensors.into_iter().map(info).collect(), metadata.0))
}

/// Reads a tensor's entry field by field: the crate's own reader would also accept an array as the entry, and its errors do not name the
/// wrong field.
fn parse_tensor(text: &str, data: u64) -> Result<Described, String> {
    fn field<T: DeserializeOwned>(entry: &BTreeMap<String, Value>, name: &str) -> Result<T, String> {
        let value = entry.get(name).ok_or_else(|| format!("has no {name}"))?;
        T::deserialize(value).map_err(|e| format!("has no valid {name}: {e}"))
    }
    let entry: Object<Value> =
        serde_json::from_str(text).map_err(|e| format!("is not given by one dtype, shape and data_offsets: {e}"))?;
    let dtype: String = field(&entry.0, "dtype")?;
    let dtype = ElementType::deserialize(Value::from(dtype.as_str()))
        .map_err(|_| format!("has the unknown dtype '{dtype}'"))?;
    let tensor = Described { dtype, shape: field(&entry.0, "shape")?, data_offsets: field(&entry.0, "data_offsets")? };
    let (start, end) = tensor.data_offsets;
    if start > end || end as u64 > data {
        return Err(format!(
            "lies at bytes {start} to {end}, but {data} bytes follow the header; the file was probably cut off"
        ));
    }
    Ok(tensor)
}

/// The header of these tensors, which must be in the order of their bytes, or a message that says why the format does not allow it.
fn check(tensors: &[(String, Described)]) -> Result<Metadata, String> {
    for (name, Described { dtype, shape, .. }) in tensors {
        // This is stricter than the crate: strides must not overflow either, even if a dimension is 0.
        if shape.iter().try_fold(dtype.bitsize(), |n, &d| n.checked_mul(d.max(1))).is_none() {
            return Err(format!("tensor '{name}': shape {shape:?} is too large"));
        }
    }
    Metadata::new(None, tensors.to_vec()).map_err(|error| {
        // The crate's error does not always say which tensor it is about, nor what was found there.
        let mut end = 0;
        for (name, Described { dtype, shape, data_offsets: (start, stop) }) in tensors {
            if *start < end {
                return format!("tensor '{name}' overlaps the one before it");
            }
            if *start > end {
                return format!("{} unexplained bytes before tensor '{name}'", start - end);
            }
            let (bits, there) = (shape.iter().product::<usize>() * dtype.bitsize(), stop - start);
            if bits % 8 != 0 {
                return format!("tensor '{name}': {dtype} {shape:?} does not fill its last byte");
            }
            if bits / 8 != there {
                return format!("tensor '{name}': {dtype} {shape:?} needs {} bytes, {there} are there", bits / 8);
            }
            end = *stop;
        }
        error.to_string()
    })
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
    fn pieces_make_the_same_file_and_parts_are_read() {
        let folder = Scratch::new("st-pieces");
        let (whole, pieces) = (folder.join("whole.safetensors"), folder.join("pieces.safetensors"));
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        write(&whole, &sample(), &metadata).unwrap();
        let described: Vec<_> = sample().iter().map(|e| (e.name.to_string(), e.dtype, e.shape.clone())).collect();
        let made = |sink: &mut dyn FnMut(&[u8]) -> Result<()>, name: &str, most: usize| {
            let entry = sample().into_iter().find(|e| e.name == name).unwrap();
            entry.bytes.chunks(3).take(most).try_for_each(sink)
        };
        write_pieces(&pieces, &described, &metadata, |name, sink| made(sink, name, usize::MAX)).unwrap();
        assert_eq!(fs::read(&whole).unwrap(), fs::read(&pieces).unwrap());
        // One piece is missing, and then there is an error while writing: the old file stays.
        let short = write_pieces(&pieces, &described, &metadata, |name, sink| made(sink, name, 1)).unwrap_err();
        assert!(short.to_string().contains("3 were given"), "{short}");
        let own = write_pieces(&pieces, &described, &metadata, |_, _| Err(Error::invalid("test", "no more")));
        assert!(own.unwrap_err().to_string().contains("no more"));
        assert_eq!(fs::read(&whole).unwrap(), fs::read(&pieces).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        let file = SafeTensors::open(&pieces).unwrap();
        let mut part = [0; 5];
        file.read_part("a.weight", 11, &mut part).unwrap();
        assert_eq!(part, [11, 12, 13, 14, 15]);
        assert!(file.read_part("a.weight", 12, &mut part).unwrap_err().to_string().contains("16 bytes"));
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let folder = Scratch::new("st-golden");
        let path = folder.join("g.safetensors");
        write(&path, &[Entry::new("x", ElementType::I16, [1, 2], vec![1, 0, 2, 0])], &BTreeMap::new()).unwrap();
        let header = r#"{"x":{"data_offsets":[0,4],"dtype":"I16","shape":[1,2]}}"#;
        let padded = format!("{header:<width$}", width = header.len().next_multiple_of(8));
        assert_eq!(fs::read(&path).unwrap(), raw(&padded, &[1, 0, 2, 0]));
        let metadata: BTreeMap<String, String> = (0..12).map(|i| (format!("k{i}"), "v".into())).collect();
        write(&path, &sample(), &metadata).unwrap();
        let text = String::from_utf8_lossy(&fs::read(&path).unwrap()[8..]).into_owned();
        let keys: Vec<String> = metadata.keys().map(|k| format!(r#""{k}":"v""#)).collect();
        let start = format!(r#"{{"__metadata__":{{{}}},"a.weight":{{"data_offsets":[8,24]"#, keys.join(","));
        assert!(text.starts_with(&start), "names in order, the same bytes every time: {text}");
    }

    #[test]
    fn the_crate_reads_what_we_write_and_we_read_what_it_writes() {
        let folder = Scratch::new("st-crate");
        let path = folder.join("c.safetensors");
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        write(&path, &sample(), &metadata).unwrap();
        let bytes = fs::read(&path).unwrap();
        let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.len(), 4);
        for entry in sample() {
            assert_eq!(theirs.tensor(&entry.name).unwrap().data(), &*entry.bytes);
        }
        let written = ::safetensors::serialize(theirs.tensors(), Some(metadata.clone().into_iter().collect())).unwrap();
        let file = open_bytes(&folder.join("d.safetensors"), &written).unwrap();
        assert_eq!(file.metadata(), &metadata);
        for entry in sample() {
            assert_eq!(file.read(&entry.name).unwrap(), *entry.bytes);
        }
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
            vec![Entry::new("x", ElementType::F32, [usize::MAX, 2, 0], vec![])],
            vec![Entry::new("x", ElementType::F4, [3], vec![0; 1])],
        ];
        for entries in wrong {
            assert!(write(&path, &entries, &BTreeMap::new()).unwrap_err().to_string().contains(&*entries[0].name));
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
            // The crate accepts this, and this module refuses it.
            (raw(r#"{"x":["F32",[1],[0,4]]}"#, &[0; 4]), "tensor 'x' is not given by one dtype"),
            (raw(&one("F32", "[1]", "[0,4]").replace("\"F32\"", r#"{"F32":null}"#), &[0; 4]), "no valid dtype"),
            (raw(&one("F32", "[1]", "[0,4]").replace("\"shape\"", r#""dtype":"U8","shape""#), &[0; 4]), "twice"),
            (raw(r#"{"__metadata__":{"a":"1","a":"2"}}"#, &[]), "'a' is there twice"),
            (raw(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]), "twice"),
            (raw(r#"{"__metadata__":null}"#, &[]), "metadata"),
            (raw(&one("U8", "[0,9223372036854775808,4]", "[0,0]"), &[]), "too large"),
            (raw(&one("F32", "[1]", "[0,4,4]"), &[0; 4]), "data_offsets"),
            (raw(&one("F32", "[18446744073709551616]", "[0,4]"), &[0; 4]), "shape"),
            (raw(&one("F32", "[1]", "[0,18446744073709551615]"), &[0; 4]), "lies at"),
            (raw(&one("F4", "[3]", "[0,1]"), &[0; 1]), "last byte"),
            (raw(&"[".repeat(100_000), &[]), "JSON"),
            (raw(&format!(r#"{{"x":{}}}"#, "[".repeat(100_000)), &[]), "JSON"),
            (raw(r#"{"x":{"dtype":"F32","shape":[1]}}"#, &[0; 4]), "has no data_offsets"),
            (raw("{\"\u{0}", &[]), "JSON"),
            ([2u64.to_le_bytes().as_slice(), &[0xc3, 0x28]].concat(), "UTF-8"),
            ((MAX_HEADER + 1).to_le_bytes().to_vec(), "claims"),
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
                // Damage to the data or to a name is not detected here; checkpoints have checksums for that.
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
