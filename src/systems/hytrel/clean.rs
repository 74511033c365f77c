//! Cleaning of a table's text before it is cut into tokens.

use crate::data::Table;

/// Letters with a diacritical mark, and their replacement in ASCII.
const FOLDS: &[(&str, &str)] = &[
    ("àáâãäåāăą", "a"),
    ("çćĉċč", "c"),
    ("ďđð", "d"),
    ("èéêëēĕėęě", "e"),
    ("ĝğġģ", "g"),
    ("ĥħ", "h"),
    ("ìíîïĩīĭįı", "i"),
    ("ĵ", "j"),
    ("ķ", "k"),
    ("ĺļľŀł", "l"),
    ("ñńņňŋ", "n"),
    ("òóôõöøōŏő", "o"),
    ("ŕŗř", "r"),
    ("śŝşšș", "s"),
    ("ţťŧț", "t"),
    ("ùúûüũūŭůűų", "u"),
    ("ŵ", "w"),
    ("ýÿŷ", "y"),
    ("źżž", "z"),
    ("æ", "ae"),
    ("œ", "oe"),
    ("ß", "ss"),
    ("þ", "th"),
    ("–—−‐‑", "-"),
    ("‘’ʻʼ′", "'"),
    ("“”″", "\""),
    ("…", "..."),
    ("½", "1/2"),
    ("¼", "1/4"),
    ("²", "2"),
    ("³", "3"),
    ("\u{a0}\u{2009}\u{202f}", " "),
];

/// A text in lower-case ASCII with single spaces. Letters lose their diacritical marks, and other characters outside ASCII become spaces.
/// Wiki templates (`{{…}}`), pipes, and remains of table tags (`td`, `th`, `tr` at the start) are removed. A text that is empty or says
/// that it is missing becomes empty.
pub fn clean(text: &str) -> String {
    let mut ascii = String::with_capacity(text.len());
    for c in text.chars().flat_map(char::to_lowercase) {
        match FOLDS.iter().find(|(from, _)| !c.is_ascii() && from.contains(c)) {
            Some((_, to)) => ascii.push_str(to),
            // Marks that are characters of their own after their letter are dropped.
            None if ('\u{300}'..='\u{36f}').contains(&c) => {}
            None if c.is_ascii_graphic() => ascii.push(c),
            None => ascii.push(' '),
        }
    }
    while let Some(from) = ascii.find("{{") {
        let to = ascii[from..].find("}}").map_or(ascii.len(), |end| from + end + 2);
        ascii.replace_range(from..to, " ");
    }
    let ascii = ascii.replace('|', " ");
    let mut words: Vec<&str> = ascii.split_whitespace().collect();
    while words.first().is_some_and(|w| ["td", "th", "tr", "<td>", "<th>", "<tr>"].contains(w)) && words.len() > 1 {
        words.remove(0);
    }
    match words.as_slice() {
        [] | ["missing"] | ["nan"] | ["n/a"] | ["-"] => String::new(),
        words => words.join(" "),
    }
}

/// A part of a text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part<'a> {
    /// Text without digits.
    Text(&'a str),
    /// A number: its digits without the point and without zeros at either end, and the power of ten of the first digit.
    Number(String, i32),
}

/// Splits a text into numbers and the text between them. A number is a run of digits, with at most one point between digits; signs, commas
/// and currencies are text. `3.140` gives the digits 314 and the power 0, `1500` the digits 15 and the power 3, `0.05` the digit 5 and the
/// power −2.
pub fn numbers(text: &str) -> Vec<Part<'_>> {
    let bytes = text.as_bytes();
    let digits = |mut at: usize| {
        while bytes.get(at).is_some_and(u8::is_ascii_digit) {
            at += 1;
        }
        at
    };
    let (mut parts, mut at, mut from) = (Vec::new(), 0, 0);
    while at < bytes.len() {
        let whole = digits(at);
        if whole == at {
            at += 1;
            continue;
        }
        let end = if bytes.get(whole) == Some(&b'.') { digits(whole + 1) } else { whole };
        // A point without a digit after it ends a sentence.
        let end = if end == whole + 1 { whole } else { end };
        if from < at {
            parts.push(Part::Text(&text[from..at]));
        }
        let all: String = text[at..end].chars().filter(char::is_ascii_digit).collect();
        let significant = all.trim_start_matches('0');
        let power = (whole - at) as i32 - 1 - (all.len() - significant.len()) as i32;
        match significant.trim_end_matches('0') {
            "" => parts.push(Part::Number("0".to_string(), 0)),
            digits => parts.push(Part::Number(digits.to_string(), power)),
        }
        (at, from) = (end, end);
    }
    if from < bytes.len() {
        parts.push(Part::Text(&text[from..]));
    }
    parts
}

/// Splits a table of more than `columns` columns into several of at most that many, each with all rows. With `subject` each of them has the
/// first column.
pub fn wide_pieces(table: &Table, columns: usize, subject: bool) -> Vec<Table> {
    let all: Vec<usize> = (0..table.columns()).collect();
    if all.len() <= columns || columns < 1 + usize::from(subject) {
        return vec![table.clone()];
    }
    let rows: Vec<usize> = (0..table.rows.len()).collect();
    let (head, rest) = all.split_at(usize::from(subject));
    let piece = |part: &[usize]| table.reordered(&rows, &[head, part].concat());
    rest.chunks(columns - head.len()).map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_folded_and_debris_is_dropped() {
        assert_eq!(clean("  Åre–Ötztal | {{flag|SWE}} 2½ "), "are-otztal 21/2");
        assert_eq!(clean("td São Paulo\u{a0}FC"), "sao paulo fc");
        assert_eq!(clean("th"), "th");
        assert_eq!(clean("e\u{301}té {{open"), "ete");
        assert_eq!((clean("Missing"), clean(" – ")), (String::new(), String::new()));
    }

    #[test]
    fn numbers_become_digits_and_a_power_of_ten() {
        let number = |d: &str, p| Part::Number(d.to_string(), p);
        assert_eq!(numbers("3.140"), [number("314", 0)]);
        assert_eq!(numbers("1500"), [number("15", 3)]);
        assert_eq!(numbers("0.050"), [number("5", -2)]);
        assert_eq!(numbers("000"), [number("0", 0)]);
        let comma = [Part::Text("$"), number("1", 0), Part::Text(","), number("1265", 2)];
        assert_eq!(numbers("$1,126.50"), comma);
        assert_eq!(numbers("win 4."), [Part::Text("win "), number("4", 0), Part::Text(".")]);
        assert_eq!(numbers("1.2.3"), [number("12", 0), Part::Text("."), number("3", 0)]);
        assert!(numbers("").is_empty());
    }

    #[test]
    fn wide_tables_are_cut() {
        let row: Vec<String> = (0..7).map(|c| c.to_string()).collect();
        let table = Table::new("t", "", row.clone(), vec![row]).unwrap();
        let headers = |p: Vec<Table>| p.iter().map(|t| t.headers.concat()).collect::<Vec<_>>();
        assert_eq!(headers(wide_pieces(&table, 3, false)), ["012", "345", "6"]);
        assert_eq!(headers(wide_pieces(&table, 3, true)), ["012", "034", "056"]);
        assert_eq!(headers(wide_pieces(&table, 7, true)), ["0123456"]);
    }
}
