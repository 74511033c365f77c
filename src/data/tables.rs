//! Tables of text, each with a title, headers and rows of cells.

use crate::base::{Error, Result};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A table. Every row has as many cells as there are headers, which is at least one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// A name that no other table of the set has.
    pub name: String,
    /// Caption or title of the page; empty if there is none.
    pub caption: String,
    /// Headers of the columns; an empty string is a missing header.
    pub headers: Vec<String>,
    /// Cells by row; an empty string is a missing cell.
    pub rows: Vec<Vec<String>>,
}

/// Counts of what was found while reading a set of tables, in numbers of tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableCounts {
    /// Tables that were read.
    pub read: usize,
    /// Tables that were left out because they have no column or no row.
    pub empty: usize,
    /// Tables that have a row with more or fewer cells than there are headers. Such a row was cut, or filled up with missing cells.
    pub ragged: usize,
    /// Tables with two equal headers.
    pub repeated_headers: usize,
    /// Tables with bytes that are not UTF-8. These bytes became U+FFFD.
    pub not_utf8: usize,
}

impl Table {
    /// Makes a table. Fails without columns or rows, and for a row with another number of cells than headers.
    pub fn new(
        name: impl Into<String>,
        caption: impl Into<String>,
        headers: Vec<String>,
        rows: Vec<Vec<String>>,
    ) -> Result<Table> {
        let op = "Table::new";
        let name = name.into();
        if headers.is_empty() || rows.is_empty() {
            let message = format!("{name} has {} columns and {} rows; it needs one of each", headers.len(), rows.len());
            return Err(Error::invalid(op, message));
        }
        if let Some((i, row)) = rows.iter().enumerate().find(|(_, r)| r.len() != headers.len()) {
            let message = format!("row {i} of {name} has {} cells for {} headers", row.len(), headers.len());
            return Err(Error::invalid(op, message));
        }
        Ok(Table { name, caption: caption.into(), headers, rows })
    }
    /// Reads a table from text whose first line has the headers and whose cells are divided by `separator`, without quotes. Every row is
    /// cut or filled up to the number of headers. `None` without a header or a row. `counts` is updated.
    pub fn parse(name: &str, caption: &str, bytes: &[u8], separator: char, counts: &mut TableCounts) -> Option<Table> {
        let text = String::from_utf8_lossy(bytes);
        counts.not_utf8 += usize::from(std::str::from_utf8(bytes).is_err());
        let cells = |line: &str| -> Vec<String> { line.split(separator).map(|c| c.trim().to_string()).collect() };
        let mut lines = text.lines().filter(|l| !l.trim().is_empty());
        let headers = cells(lines.next().unwrap_or(""));
        let mut ragged = false;
        let rows: Vec<Vec<String>> = lines
            .map(|line| {
                let mut row = cells(line);
                ragged |= row.len() != headers.len();
                row.resize(headers.len(), String::new());
                row
            })
            .collect();
        if rows.is_empty() || headers.iter().all(String::is_empty) {
            counts.empty += 1;
            return None;
        }
        let mut named: Vec<&String> = headers.iter().filter(|h| !h.is_empty()).collect();
        named.sort();
        counts.repeated_headers += usize::from(named.windows(2).any(|w| w[0] == w[1]));
        counts.ragged += usize::from(ragged);
        counts.read += 1;
        Some(Table { name: name.to_string(), caption: caption.to_string(), headers, rows })
    }
    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.headers.len()
    }
    /// Cells of a column, from the top.
    pub fn column(&self, c: usize) -> impl Iterator<Item = &str> {
        self.rows.iter().map(move |r| r[c].as_str())
    }
    /// The same table with rows and columns in another order: new row i is old row `rows[i]`, new column j is old column `columns[j]`.
    pub fn reordered(&self, rows: &[usize], columns: &[usize]) -> Table {
        let row = |r: &Vec<String>| columns.iter().map(|&c| r[c].clone()).collect();
        Table {
            headers: columns.iter().map(|&c| self.headers[c].clone()).collect(),
            rows: rows.iter().map(|&r| row(&self.rows[r])).collect(),
            ..self.clone()
        }
    }
}

/// Tables of Wikipedia pages (Chen et al. 2020, TabFact), lower case, with the titles of their pages as captions.
#[derive(Clone, Debug)]
pub struct TabFact {
    /// All tables, by name.
    pub tables: Vec<Table>,
    /// The part of the set to which its authors assigned each table: training (0), validation (1) or test (2).
    pub part: Vec<u8>,
    /// Counts of what was found while reading.
    pub counts: TableCounts,
}

/// Where to get the tables, as a text for users who lack them.
pub const TABFACT_FROM: &str = "git clone --depth 1 https://github.com/wenhuchen/Table-Fact-Checking, into the folder that PRISMGRAD_DATA \
                                names";

impl TabFact {
    /// Reads the set from `tabfact-tables.tar.xz` or the folder `Table-Fact-Checking` in the folder that PRISMGRAD_DATA names. The archive
    /// is unpacked by the program `xz`.
    pub fn load() -> Result<TabFact> {
        if let Ok(path) = super::data_file("tabfact-tables.tar.xz") {
            return TabFact::of_files(&path, untar(&path, &unxz(&path)?)?);
        }
        let folder = std::env::var_os("PRISMGRAD_DATA").map(|f| PathBuf::from(f).join("Table-Fact-Checking"));
        match folder.filter(|f| f.is_dir()) {
            Some(folder) => {
                let mut files = BTreeMap::new();
                read_folder(&folder.join("data"), &mut files)?;
                TabFact::of_files(&folder, files)
            }
            None => {
                Err(Error::format("tabfact-tables.tar.xz", format!("not found. The tables are from: {TABFACT_FROM}")))
            }
        }
    }
    /// Reads the set from its files by path: `….csv` with cells divided by `#`, `table_to_page.json`, and the names of each part in
    /// `train_id.json`, `val_id.json` and `test_id.json`.
    fn of_files(path: &Path, files: BTreeMap<String, Vec<u8>>) -> Result<TabFact> {
        let json = |name: &str| -> Result<serde_json::Value> {
            let found = files.iter().find(|(n, _)| n.rsplit('/').next() == Some(name));
            let (_, bytes) = found.ok_or_else(|| Error::format(path, format!("{name} is missing; fetch it again")))?;
            serde_json::from_slice(bytes).map_err(|e| Error::format(path, format!("{name} is not JSON: {e}")))
        };
        let pages = json("table_to_page.json")?;
        let mut part = BTreeMap::new();
        for (i, name) in ["train_id.json", "val_id.json", "test_id.json"].into_iter().enumerate() {
            let ids = json(name)?;
            let ids = ids.as_array().ok_or_else(|| Error::format(path, format!("{name} is no list")))?;
            part.extend(ids.iter().filter_map(|id| Some((id.as_str()?.to_string(), i as u8))));
        }
        let mut set = TabFact { tables: Vec::new(), part: Vec::new(), counts: TableCounts::default() };
        for (file, bytes) in files.iter().filter(|(n, _)| n.ends_with(".csv")) {
            let name = file.rsplit('/').next().unwrap_or(file);
            let page = &pages[name];
            let caption = page.as_str().or_else(|| page[0].as_str()).unwrap_or("");
            let Some(&of) = part.get(name) else { continue };
            if let Some(table) = Table::parse(name, caption, bytes, '#', &mut set.counts) {
                set.tables.push(table);
                set.part.push(of);
            }
        }
        if set.tables.is_empty() {
            return Err(Error::format(path, format!("no table in it. The tables are from: {TABFACT_FROM}")));
        }
        Ok(set)
    }
}

/// The output of `xz` for a file, which may be at most 256 MB.
fn unxz(path: &Path) -> Result<Vec<u8>> {
    const LIMIT: u64 = 256 << 20;
    let mut child = Command::new("xz")
        .arg("-dc")
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| Error::io("unpack with the program xz (package xz-utils)", path, e))?;
    let mut bytes = Vec::new();
    if let Some(out) = child.stdout.take() {
        out.take(LIMIT + 1).read_to_end(&mut bytes).map_err(|e| Error::io("unpack", path, e))?;
    }
    if bytes.len() as u64 > LIMIT {
        let _ = child.kill();
        let _ = child.wait();
        return Err(Error::format(path, format!("holds more than {LIMIT} bytes")));
    }
    let status = child.wait().map_err(|e| Error::io("unpack", path, e))?;
    if !status.success() {
        return Err(Error::format(path, "is not a whole xz file; fetch it again"));
    }
    Ok(bytes)
}

/// The plain files of a tar archive, by path.
fn untar(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let cut = || Error::format(path, "the archive ends within a file; fetch it again");
    let text = |b: &[u8]| String::from_utf8_lossy(b.split(|&b| b == 0).next().unwrap_or(&[])).into_owned();
    let (mut files, mut at, mut long) = (BTreeMap::new(), 0, None);
    while let Some(head) = bytes.get(at..at + 512) {
        if head.iter().all(|&b| b == 0) {
            break;
        }
        let size = text(&head[124..136]);
        let size = usize::from_str_radix(size.trim(), 8)
            .map_err(|_| Error::format(path, format!("a file of '{size}' bytes; this is no tar archive")))?;
        let body = at + 512;
        let data = body.checked_add(size).and_then(|end| bytes.get(body..end)).ok_or_else(cut)?;
        match head[156] {
            b'0' | 0 => {
                let prefix = text(&head[345..500]);
                let short =
                    if prefix.is_empty() { text(&head[..100]) } else { format!("{prefix}/{}", text(&head[..100])) };
                files.insert(long.take().unwrap_or(short), data.to_vec());
            }
            // The GNU form of a path of more than 100 bytes: it is the content of an entry before the file's entry.
            b'L' => long = Some(text(data)),
            _ => long = None,
        }
        at = body + size.div_ceil(512) * 512;
    }
    Ok(files)
}

/// Reads the files of a set of tables below a folder.
fn read_folder(folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    let failed = |e| Error::io("read", folder, e);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.to_string_lossy().into_owned();
        if path.is_dir() {
            read_folder(&path, files)?;
        } else if name.ends_with(".csv") || name.ends_with(".json") {
            files.insert(name, std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_table_is_counted_or_said() {
        let mut counts = TableCounts::default();
        let table = Table::parse("t", "", b"a#b#a\n1#2\n3#4#5#6\n\n7#\xff#9\n", '#', &mut counts).unwrap();
        assert_eq!(table.rows, [["1", "2", ""], ["3", "4", "5"], ["7", "\u{fffd}", "9"]]);
        assert!(Table::parse("t", "", b"a#b\n", '#', &mut counts).is_none());
        assert!(Table::parse("t", "", b"", '#', &mut counts).is_none());
        let want = TableCounts { read: 1, empty: 2, ragged: 1, repeated_headers: 1, not_utf8: 1 };
        assert_eq!(counts, want);
        let row = |n: usize| vec![String::new(); n];
        assert!(Table::new("t", "", row(2), vec![]).unwrap_err().to_string().contains("0 rows"));
        let e = Table::new("t", "", row(2), vec![row(2), row(3)]).unwrap_err().to_string();
        assert!(e.contains("row 1 of t has 3 cells for 2 headers"), "{e}");
    }

    #[test]
    fn an_archive_is_read_and_a_cut_one_refused() {
        let mut tar = Vec::new();
        for (name, content) in [("data/a.csv", "x#y\n1#2\n"), ("b.json", "{}")] {
            let mut head = vec![0u8; 512];
            head[..name.len()].copy_from_slice(name.as_bytes());
            head[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
            head[156] = b'0';
            tar.extend(head);
            tar.extend(content.bytes());
            tar.resize(tar.len().div_ceil(512) * 512, 0);
        }
        tar.extend([0; 1024]);
        let files = untar(Path::new("x.tar"), &tar).unwrap();
        assert_eq!(files["data/a.csv"], b"x#y\n1#2\n");
        assert_eq!(files.len(), 2);
        let e = untar(Path::new("x.tar"), &tar[..515]).unwrap_err().to_string();
        assert!(e.contains("ends within a file"), "{e}");
    }
}
