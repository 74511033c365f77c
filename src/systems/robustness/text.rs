//! Texts as sequences of words, the stop words, and labelled sets of texts.

use crate::base::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

/// The word that an attack puts in the place of a word to measure how much the word matters. No vocabulary contains it, so that a model
/// takes it for the unknown word.
pub const UNK: &str = "[UNK]";

/// A text and the positions of its words. A word is a longest run of letters, digits and the marks `'`, `-`, `_`, `*` and `@`, without
/// marks at its beginning and end. Everything else is kept, so that a changed text has the spaces and punctuation of the original.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    source: String,
    spans: Vec<Range<usize>>,
}

const MARKS: [char; 5] = ['\'', '-', '_', '*', '@'];

impl Text {
    /// Splits a text into words.
    pub fn new(source: impl Into<String>) -> Text {
        let source = source.into();
        let (mut spans, mut start) = (Vec::new(), None);
        for (at, c) in source.char_indices().chain([(source.len(), ' ')]) {
            let inside = c.is_alphanumeric() || (start.is_some() && MARKS.contains(&c));
            match (inside, start) {
                (true, None) => start = Some(at),
                (false, Some(from)) => {
                    spans.push(from..from + source[from..at].trim_end_matches(MARKS).len());
                    start = None;
                }
                _ => {}
            }
        }
        Text { source, spans }
    }
    /// A text of these words, joined by single spaces.
    pub fn of_words<S: AsRef<str>>(words: &[S]) -> Text {
        Text::new(words.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" "))
    }
    /// The text as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }
    /// The words in their order.
    pub fn words(&self) -> impl ExactSizeIterator<Item = &str> {
        self.spans.iter().map(|s| &self.source[s.clone()])
    }
    /// Number of words.
    pub fn len(&self) -> usize {
        self.spans.len()
    }
    /// Whether the text has no word.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }
    /// The words together with the rest of the source: for each word (the part before it, the word), and then the part after the last.
    pub fn pieces(&self) -> (Vec<(&str, &str)>, &str) {
        let mut last = 0;
        let pieces = self.spans.iter().map(|s| {
            let before = &self.source[last..s.start];
            last = s.end;
            (before, &self.source[s.clone()])
        });
        let pieces = pieces.collect();
        (pieces, &self.source[last..])
    }
    /// The source with its words replaced by these, one for each.
    pub fn with_words<S: AsRef<str>>(&self, words: &[S]) -> String {
        let (pieces, end) = self.pieces();
        let mut out = String::with_capacity(self.source.len() + 16);
        for ((before, _), word) in pieces.iter().zip(words) {
            out.push_str(before);
            out.push_str(word.as_ref());
        }
        out + end
    }
}

/// Texts with the number of their class.
#[derive(Clone, Debug, Default)]
pub struct TextSet {
    /// The texts.
    pub texts: Vec<Text>,
    /// The class of each.
    pub labels: Vec<u32>,
    /// The names of the classes.
    pub classes: Vec<String>,
}

impl TextSet {
    /// A set of texts and labels. Fails if their numbers differ, if a label is not less than the number of classes, or if a text has no
    /// word.
    pub fn new(texts: Vec<Text>, labels: Vec<u32>, classes: Vec<String>) -> Result<TextSet> {
        let op = "text set";
        if texts.len() != labels.len() {
            return Err(Error::invalid(op, format!("{} texts have {} labels", texts.len(), labels.len())));
        }
        if let Some(i) = labels.iter().position(|&l| l as usize >= classes.len()) {
            let message = format!("text {i} has label {}, and there are {} classes, from 0", labels[i], classes.len());
            return Err(Error::invalid(op, message));
        }
        if let Some(i) = texts.iter().position(Text::is_empty) {
            let message = format!("text {i} ({:?}) has no word; leave it out", texts[i].source());
            return Err(Error::invalid(op, message));
        }
        Ok(TextSet { texts, labels, classes })
    }
    /// Number of texts.
    pub fn len(&self) -> usize {
        self.texts.len()
    }
    /// Whether there is no text.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }
    /// The texts at these indices.
    pub fn take(&self, indices: &[usize]) -> TextSet {
        TextSet {
            texts: indices.iter().map(|&i| self.texts[i].clone()).collect(),
            labels: indices.iter().map(|&i| self.labels[i]).collect(),
            classes: self.classes.clone(),
        }
    }
    /// The first `n` texts in an order that depends on each text and the seed alone.
    pub fn sample(&self, n: usize, seed: u64) -> TextSet {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by_key(|&i| (spread(hash(self.texts[i].source()) ^ spread(seed)), i));
        order.truncate(n);
        self.take(&order)
    }
    /// Three parts by a hash of the text: eight tenths, one tenth and one tenth. A text that occurs twice is kept only at its first
    /// position, so that no text is in two parts.
    pub fn split(&self) -> [TextSet; 3] {
        let mut seen = BTreeSet::new();
        let mut parts: [Vec<usize>; 3] = Default::default();
        for i in 0..self.len() {
            let words = self.texts[i].words().collect::<Vec<_>>().join(" ");
            let h = spread(hash(&words));
            if seen.insert(words) {
                parts[[0, 0, 0, 0, 0, 0, 0, 0, 1, 2][(h % 10) as usize]].push(i);
            }
        }
        parts.map(|p| self.take(&p))
    }
    /// Reads lines of `text,label`. A header line with these names may come first, and a text with commas or quotes must be in double
    /// quotes. `classes` gives the names of the classes; if it is empty, the labels of the file are used in their sorted order.
    pub fn read_csv(path: impl AsRef<Path>, classes: &[String]) -> Result<TextSet> {
        let path = path.as_ref();
        let text = read_utf8(path)?;
        let rows = csv(&text).map_err(|m| Error::format(path, m))?;
        let mut pairs = Vec::new();
        for (line, row) in rows {
            match &row[..] {
                [a, b] if pairs.is_empty() && a.trim() == "text" && b.trim() == "label" => {}
                [text, label] => pairs.push((line, text.clone(), label.trim().to_string())),
                _ => {
                    let message =
                        format!("line {line} has {} fields, not text,label; quote a text that has commas", row.len());
                    return Err(Error::format(path, message));
                }
            }
        }
        let names: BTreeSet<&String> = pairs.iter().map(|p| &p.2).collect();
        let classes: Vec<String> =
            if classes.is_empty() { names.into_iter().cloned().collect() } else { classes.to_vec() };
        let mut set = TextSet { classes, ..TextSet::default() };
        for (line, text, label) in pairs {
            let Some(class) = set.classes.iter().position(|c| *c == label) else {
                let message =
                    format!("line {line} has the label {label:?}; the classes are {}", set.classes.join(", "));
                return Err(Error::format(path, message));
            };
            let text = Text::new(text);
            if text.is_empty() {
                return Err(Error::format(path, format!("line {line} has a text without a word; leave it out")));
            }
            set.texts.push(text);
            set.labels.push(class as u32);
        }
        if set.is_empty() {
            return Err(Error::format(path, "has no text; give lines of text,label"));
        }
        Ok(set)
    }
}

/// The FNV-1a hash, which is the same on every machine and in every release.
pub(super) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Spreads every bit of a hash into the low ones.
pub(super) fn spread(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Reads a UTF-8 file, and unpacks it if it is gzip.
pub(super) fn read_utf8(path: &Path) -> Result<String> {
    let bytes = crate::data::read_maybe_gzip(path, 256 << 20)?;
    String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        let message = format!(
            "line {line} is not UTF-8; the file may be Windows-1252, as old Western files are: convert it with \
             `iconv -f windows-1252 -t utf-8`"
        );
        Error::format(path, message)
    })
}

/// Text of Windows-1252, the encoding of the film reviews, in which no byte is an error. Bytes that it leaves undefined become the
/// control character of the same number.
pub fn windows_1252(bytes: &[u8]) -> String {
    const HIGH: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘',
        '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
    ];
    bytes.iter().map(|&b| if (0x80..0xa0).contains(&b) { HIGH[b as usize - 0x80] } else { b as char }).collect()
}

/// A row of a CSV file with the number of its first line.
type Row = (usize, Vec<String>);

/// The rows of a CSV file as fields; empty lines are left out.
fn csv(text: &str) -> Result<Vec<Row>, String> {
    let (mut rows, mut row, mut field) = (Vec::new(), Vec::new(), String::new());
    let (mut quoted, mut was_quoted, mut line, mut begin) = (false, false, 1, 1);
    let mut chars = text.trim_start_matches('\u{feff}').chars().peekable();
    while let Some(c) = chars.next() {
        line += usize::from(c == '\n');
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' if quoted => quoted = false,
            _ if quoted => field.push(c),
            '"' if field.is_empty() => (quoted, was_quoted) = (true, true),
            ',' => row.push(std::mem::take(&mut field)),
            '\r' if chars.peek() == Some(&'\n') => {}
            '\n' => {
                if !row.is_empty() || !field.is_empty() || was_quoted {
                    row.push(std::mem::take(&mut field));
                    rows.push((begin, std::mem::take(&mut row)));
                }
                (begin, was_quoted) = (line, false);
            }
            _ => field.push(c),
        }
    }
    if quoted {
        return Err(format!("the quotes that open on line {begin} are never closed"));
    }
    if !row.is_empty() || !field.is_empty() {
        row.push(field);
        rows.push((begin, row));
    }
    Ok(rows)
}

/// The number of occurrences of each word.
pub(super) fn counts(texts: &[Text]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for word in texts.iter().flat_map(Text::words) {
        *counts.entry(word.to_lowercase()).or_insert(0) += 1;
    }
    counts
}

/// Whether a word, in lower case, is one of the function words that attacks do not change.
pub fn is_stop_word(word: &str) -> bool {
    STOP_WORDS.binary_search(&word).is_ok()
}

/// Function words of English that carry no opinion by themselves, sorted.
#[rustfmt::skip]
pub const STOP_WORDS: [&str; 150] = [
    "a", "about", "above", "after", "again", "against", "ain't", "all", "also", "am", "an", "and", "any", "are", "aren't", "as",
    "at", "be", "because", "been", "before", "being", "below", "between", "both", "but", "by", "can", "can't", "could",
    "couldn't", "d", "did", "didn't", "do", "does", "doesn't", "doing", "don't", "down", "during", "each", "either", "else",
    "few", "for", "from", "further", "had", "hadn't", "has", "hasn't", "have", "haven't", "having", "he", "her", "here",
    "hers", "herself", "him", "himself", "his", "how", "i", "if", "in", "into", "is", "isn't", "it", "it's", "its", "itself",
    "just", "ll", "m", "me", "mine", "my", "myself", "neither", "no", "nor", "not", "now", "of", "off", "on", "once", "only",
    "or", "other", "our", "ours", "ourselves", "out", "over", "own", "re", "s", "same", "she", "should", "shouldn't", "so",
    "some", "such", "t", "than", "that", "that's", "the", "their", "theirs", "them", "themselves", "then", "there", "these",
    "they", "this", "those", "through", "to", "too", "under", "until", "up", "ve", "very", "was", "wasn't", "we", "were",
    "weren't", "what", "when", "where", "which", "while", "who", "whom", "why", "will", "with", "won't", "would", "you",
    "your",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;

    #[test]
    fn words_and_what_stands_between_them() {
        let t = Text::new(" A well-made 'film', isn't it? -- 90 min. ");
        assert_eq!(t.words().collect::<Vec<_>>(), ["A", "well-made", "film", "isn't", "it", "90", "min"]);
        let words: Vec<String> = t.words().map(str::to_string).collect();
        assert_eq!(t.with_words(&words), t.source());
        assert_eq!(t.with_words(&["x"; 7]), " x x 'x', x x? -- x x. ");
        assert!(Text::new("").is_empty() && Text::new(" - ' .").is_empty());
        assert_eq!(Text::new("né ö").len(), 2);
    }
    #[test]
    fn stop_words_are_sorted_and_in_small_letters() {
        assert!(STOP_WORDS.is_sorted() && STOP_WORDS.iter().all(|w| w.to_lowercase() == **w));
        assert!(is_stop_word("the") && !is_stop_word("film"));
    }
    #[test]
    fn a_csv_file_is_read_and_its_faults_are_named() {
        let folder = Scratch::new("robustness-csv");
        let path = folder.join("a.csv");
        let read = |content: &[u8], classes: &[&str]| {
            std::fs::write(&path, content).unwrap();
            let classes: Vec<String> = classes.iter().map(|c| c.to_string()).collect();
            TextSet::read_csv(&path, &classes)
        };
        let fault = |content: &[u8], classes: &[&str]| read(content, classes).map(|_| ()).unwrap_err().to_string();
        let set = read(b"text,label\r\n\"good, \"\"really\"\"\",pos\r\n\nbad film,neg\n", &[]).unwrap();
        assert_eq!((set.texts[0].source(), &set.labels[..], set.classes.len()), ("good, \"really\"", &[1, 0][..], 2));
        assert!(fault(b"good,pos\nodd,maybe\n", &["neg", "pos"]).contains("line 2 has the label \"maybe\""));
        assert!(fault(b"good,pos\n...,pos\n", &[]).contains("line 2 has a text without a word"));
        assert!(fault(b"good,film,pos\n", &[]).contains("quote a text"));
        assert!(fault(b"good,pos\n\"caf\xe9\",pos\n", &[]).contains("Windows-1252"));
        assert!(fault(b"\"good,pos\n", &[]).contains("never closed"));
        assert!(fault(b"text,label\n", &[]).contains("no text"));
        assert_eq!(windows_1252(b"caf\xe9 \x93x\x94"), "café “x”");
    }
    #[test]
    fn a_split_keeps_each_text_once() {
        let texts: Vec<Text> = (0..300).map(|i| Text::new(format!("text number {}", i % 200))).collect();
        let n = texts.len();
        let set = TextSet::new(texts, vec![0; n], vec!["only".into()]).unwrap();
        let [train, validation, test] = set.split();
        assert_eq!(train.len() + validation.len() + test.len(), 200);
        assert!(train.len() > 140 && validation.len() > 8 && test.len() > 8);
        assert_eq!(set.sample(20, 1).texts, set.sample(20, 1).texts);
        assert!(TextSet::new(vec![Text::new("a")], vec![2], vec!["only".into()]).is_err());
        assert!(TextSet::new(vec![Text::new("!")], vec![0], vec!["only".into()]).is_err());
    }
}
