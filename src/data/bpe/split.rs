//! GPT-2's cut of a text into pieces, inside which merges happen, without a regular-expression engine:
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`

use unicode_properties::{GeneralCategoryGroup, UnicodeGeneralCategory};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Space,
    Letter,
    Number,
    Other,
}

fn class(c: char) -> Class {
    if c.is_ascii() {
        return match c {
            'a'..='z' | 'A'..='Z' => Class::Letter,
            '0'..='9' => Class::Number,
            '\t'..='\r' | ' ' => Class::Space,
            _ => Class::Other,
        };
    }
    match c.general_category_group() {
        GeneralCategoryGroup::Letter => Class::Letter,
        GeneralCategoryGroup::Number => Class::Number,
        _ if c.is_whitespace() => Class::Space,
        _ => Class::Other,
    }
}

/// The pieces of a text, which give the text when joined.
pub(super) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let first = rest.chars().next()?;
        let (piece, after) = rest.split_at(first_piece(rest, first));
        rest = after;
        Some(piece)
    })
}

/// The length of the first piece of a text that starts with `first`.
fn first_piece(text: &str, first: char) -> usize {
    if first == '\'' {
        let contraction = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].iter().find(|c| text.starts_with(**c));
        if let Some(contraction) = contraction {
            return contraction.len();
        }
    }
    // One space may precede a word, a number or a run of signs.
    let lead = usize::from(first == ' ');
    let body = &text[lead..];
    if let Some(kind) = body.chars().next().map(class).filter(|&k| k != Class::Space) {
        return lead + run(body, kind);
    }
    let spaces = run(text, Class::Space);
    if spaces == text.len() {
        return spaces;
    }
    // The last of several spaces before other characters belongs to the next piece. A single space is a piece.
    match text[..spaces].char_indices().next_back() {
        Some((last, _)) if last > 0 => last,
        _ => spaces,
    }
}

/// The number of bytes of the longest run of characters of one class at the beginning of a text.
fn run(text: &str, kind: Class) -> usize {
    text.char_indices().find(|&(_, c)| class(c) != kind).map_or(text.len(), |(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_those_of_the_expression() {
        // Expected values were computed with Python's `regex` module and the expression above.
        let cases: [(&str, &[&str]); 8] = [
            ("it's we'll don'T", &["it", "'s", " we", "'ll", " don", "'", "T"]),
            ("a  b\n\n  c \n", &["a", " ", " b", "\n\n ", " c", " \n"]),
            ("    let x=10;", &["   ", " let", " x", "=", "10", ";"]),
            ("\tx\t y", &["\t", "x", "\t", " y"]),
            ("x²½ Ⅷ ٣", &["x", "²½", " Ⅷ", " ٣"]),
            ("हिन्दी", &["ह", "ि", "न", "्", "द", "ी"]),
            (" 's", &[" '", "s"]),
            ("日本\u{3000}語。\u{a0}!", &["日本", "\u{3000}", "語", "。", "\u{a0}", "!"]),
        ];
        for (text, expected) in cases {
            assert_eq!(pieces(text).collect::<Vec<_>>(), expected, "{text:?}");
        }
        assert_eq!(pieces("").count(), 0);
    }
}
