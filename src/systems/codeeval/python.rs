//! A part of Python's lexer that finds operators outside strings and comments, and tells a binary operator from a unary one.
//!
//! The tokens are those of Python 3.11 (an f-string is one token). Indentation is not a token here: a line that is not blank begins
//! with its spaces.

use crate::base::{Error, Result};

/// The kind of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An identifier or a keyword.
    Name,
    /// A number.
    Number,
    /// A string of any form, prefix and quotes included.
    String,
    /// An operator or a delimiter.
    Op,
    /// A comment, up to the end of its line.
    Comment,
    /// The end of a logical line.
    Newline,
}

/// A token and its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// Its kind.
    pub kind: Kind,
    /// Its characters.
    pub text: &'a str,
    /// Its first byte in the text.
    pub start: usize,
    /// The line on which it starts, from 0.
    pub line: usize,
    /// Number of brackets around it.
    pub depth: usize,
}

/// Operators and delimiters, longest first.
const OPS: [&str; 47] = [
    "**=", "//=", ">>=", "<<=", "...", "!=", "==", "<=", ">=", "->", ":=", "+=", "-=", "*=", "/=", "%=", "&=", "|=",
    "^=", "@=", "**", "//", "<<", ">>", "+", "-", "*", "/", "%", "@", "&", "|", "^", "~", "<", ">", "(", ")", "[", "]",
    "{", "}", ",", ":", ".", ";", "=",
];

/// Words after which an operator has no left operand.
const KEYWORDS: [&str; 31] = [
    "and", "as", "assert", "async", "await", "break", "class", "continue", "def", "del", "elif", "else", "except",
    "finally", "for", "from", "global", "if", "import", "in", "is", "lambda", "nonlocal", "not", "or", "pass", "raise",
    "return", "try", "while", "yield",
];

/// The length of a string's prefix and quotes if one starts here: `rb"""` gives (2, 3).
fn string_start(rest: &str) -> Option<(usize, usize)> {
    let prefix = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
    let known = prefix <= 2 && rest[..prefix].bytes().all(|b| b"rRbBuUfF".contains(&b));
    let quotes = &rest.as_bytes()[prefix..];
    match quotes.first() {
        Some(q @ (b'"' | b'\'')) if known => {
            let triple = quotes.len() >= 3 && quotes[1] == *q && quotes[2] == *q;
            Some((prefix, if triple { 3 } else { 1 }))
        }
        _ => None,
    }
}

/// The tokens of a program.
///
/// # Errors
/// [`Error::Invalid`] with the line for a string that does not end, a bracket that does not match, or a character that starts no token of
/// Python. An open bracket at the end of the text is no error, because a prefix of a program may end anywhere.
pub fn tokens(text: &str) -> Result<Vec<Token<'_>>> {
    let bad = |line: usize, what: String| Error::invalid("python::tokens", format!("line {}: {what}", line + 1));
    let bytes = text.as_bytes();
    let (mut out, mut open): (Vec<Token>, Vec<u8>) = (Vec::new(), Vec::new());
    let (mut i, mut line) = (0, 0);
    while i < bytes.len() {
        let (rest, b) = (&text[i..], bytes[i]);
        let take = |kind, length: usize| Token { kind, text: &text[i..i + length], start: i, line, depth: open.len() };
        match b {
            b'\n' => {
                let blank =
                    out.last().is_none_or(|t| t.kind == Kind::Newline || (t.kind == Kind::Comment && alone(&out)));
                if open.is_empty() && !blank {
                    out.push(take(Kind::Newline, 1));
                }
                (i, line) = (i + 1, line + 1);
                continue;
            }
            b' ' | b'\t' | b'\r' | 0x0c => i += 1,
            b'\\' => match rest[1..].strip_prefix('\r').unwrap_or(&rest[1..]).starts_with('\n') {
                true => (i, line) = (i + 1 + rest[1..].find('\n').unwrap_or(0) + 1, line + 1),
                false => return Err(bad(line, "a backslash that does not end its line".into())),
            },
            b'#' => {
                let length = rest.find('\n').unwrap_or(rest.len());
                out.push(take(Kind::Comment, length));
                i += length;
            }
            _ if string_start(rest).is_some() => {
                let (prefix, quotes) = string_start(rest).unwrap_or((0, 1));
                let end = &rest.as_bytes()[prefix..prefix + quotes];
                let (body, mut j, mut lines) = (rest.as_bytes(), prefix + quotes, 0);
                loop {
                    match body.get(j) {
                        None => return Err(bad(line, "a string that does not end".into())),
                        Some(b'\n') if quotes == 1 => {
                            return Err(bad(line, "a string that does not end on its line".into()));
                        }
                        Some(b'\\') => {
                            lines += usize::from(body.get(j + 1) == Some(&b'\n'));
                            j += 2;
                        }
                        Some(_) if body[j..].starts_with(end) => break,
                        Some(c) => {
                            lines += usize::from(*c == b'\n');
                            j += 1;
                        }
                    }
                }
                out.push(take(Kind::String, j + quotes));
                (i, line) = (i + j + quotes, line + lines);
            }
            b'0'..=b'9' => i = push_number(text, i, &mut out, line, open.len()),
            b'.' if bytes.get(i + 1).is_some_and(u8::is_ascii_digit) => {
                i = push_number(text, i, &mut out, line, open.len());
            }
            b'_' | b'a'..=b'z' | b'A'..=b'Z' | 0x80.. => {
                let c = rest.chars().next().unwrap_or('_');
                if !(c == '_' || c.is_alphabetic()) {
                    return Err(bad(line, format!("the character {c:?} outside a string")));
                }
                let end = rest.find(|c: char| !(c == '_' || c.is_alphanumeric())).unwrap_or(rest.len());
                out.push(take(Kind::Name, end));
                i += end;
            }
            _ => {
                let Some(op) = OPS.iter().find(|op| rest.starts_with(**op)) else {
                    let c = rest.chars().next().unwrap_or('?');
                    return Err(bad(line, format!("the character {c:?} outside a string")));
                };
                if let Some(close) = [(b'(', b')'), (b'[', b']'), (b'{', b'}')].iter().find(|p| p.1 == b)
                    && open.pop() != Some(close.0)
                {
                    return Err(bad(line, format!("a {op} that closes nothing")));
                }
                out.push(Token { kind: Kind::Op, text: &text[i..i + op.len()], start: i, line, depth: open.len() });
                if b"([{".contains(&b) {
                    open.push(b);
                }
                i += op.len();
            }
        }
    }
    Ok(out)
}

/// Whether the last comment is alone on its line.
fn alone(out: &[Token]) -> bool {
    out.len() < 2 || out[out.len() - 2].kind == Kind::Newline || out[out.len() - 2].line < out[out.len() - 1].line
}

fn push_number<'a>(text: &'a str, i: usize, out: &mut Vec<Token<'a>>, line: usize, depth: usize) -> usize {
    let bytes = text.as_bytes();
    let hex = bytes[i] == b'0' && matches!(bytes.get(i + 1), Some(b'x' | b'X' | b'o' | b'O' | b'b' | b'B'));
    let mut j = i + if hex { 2 } else { 0 };
    while let Some(&b) = bytes.get(j) {
        let exponent = !hex && matches!(b, b'+' | b'-') && matches!(bytes[j - 1], b'e' | b'E');
        // `1if x else y` is legal: a number ends where no digit or letter of a number follows.
        let part = b.is_ascii_digit() || b == b'_' || (b == b'.' && !hex);
        let letter = if hex { b.is_ascii_hexdigit() } else { b"eEjJ".contains(&b) && !word_follows(bytes, j) };
        if !(part || letter || exponent) {
            break;
        }
        j += 1;
    }
    out.push(Token { kind: Kind::Number, text: &text[i..j], start: i, line, depth });
    j
}

/// Whether the `e` or `j` at `j` begins a word such as `else`.
fn word_follows(bytes: &[u8], j: usize) -> bool {
    bytes.get(j + 1).is_some_and(|b| b.is_ascii_alphabetic())
}

/// A binary operator of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operator<'a> {
    /// Its characters.
    pub text: &'a str,
    /// Its first byte in the text.
    pub start: usize,
    /// Its line, from 0.
    pub line: usize,
    /// The number, in the list of operators, of the first operator with the same characters in the chain of operands that this one
    /// continues; its own number if there is none. In `a + b - c + d` the second `+` continues the chain of the first.
    pub chain: usize,
}

/// Whether an operator after this token has a left operand.
fn ends_operand(t: &Token) -> bool {
    match t.kind {
        Kind::Name => !KEYWORDS.contains(&t.text),
        Kind::Number | Kind::String => true,
        Kind::Op => matches!(t.text, ")" | "]" | "}" | "..."),
        _ => false,
    }
}

/// The precedence of an operator: 2 for products, 1 for sums, 0 for tokens that end a chain of operands, `None` for tokens that belong to
/// an operand.
fn binding(t: &Token, binary: bool) -> Option<u8> {
    match (t.kind, t.text) {
        (Kind::Op, "*" | "/" | "//" | "%" | "@") if binary => Some(2),
        (Kind::Op, "+" | "-") if binary => Some(1),
        (Kind::Op, "**" | "." | "+" | "-" | "~" | "(" | ")" | "[" | "]" | "{" | "}" | "...") => None,
        (Kind::Op, _) | (Kind::Newline, _) => Some(0),
        (Kind::Name, word) if KEYWORDS.contains(&word) => Some(0),
        _ => None,
    }
}

/// The binary operators among `which`, in the order of the text. An augmented assignment is binary.
///
/// # Errors
/// Those of [`tokens`].
pub fn operators<'a>(text: &'a str, which: &[&str]) -> Result<Vec<Operator<'a>>> {
    let mut out: Vec<Operator> = Vec::new();
    // For each open bracket, the operators of the current chain with their precedence.
    let mut chains: Vec<Vec<(u8, usize)>> = vec![vec![]];
    let mut before: Option<Token> = None;
    for t in tokens(text)? {
        if t.kind == Kind::Comment {
            continue;
        }
        chains.resize(t.depth + 1, vec![]);
        let binary = before.as_ref().is_some_and(ends_operand);
        let binds = binding(&t, binary);
        let chain = &mut chains[t.depth];
        match binds {
            Some(0) => chain.clear(),
            Some(1) => chain.retain(|c| c.0 == 1),
            _ => {}
        }
        if t.kind == Kind::Op && binary && which.contains(&t.text) {
            let own = out.len();
            let first = chain.iter().map(|c| c.1).find(|&n: &usize| out[n].text == t.text);
            out.push(Operator { text: t.text, start: t.start, line: t.line, chain: first.unwrap_or(own) });
            if let Some(b @ 1..) = binds {
                chain.push((b, own));
            }
        }
        before = Some(t);
    }
    Ok(out)
}

/// The text without its blank lines.
pub fn without_blank_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines().filter(|l| !l.trim().is_empty()) {
        out.push_str(line);
        out.push('\n');
    }
    out
}

/// Where the completion of a function ends: at the first line outside strings and brackets that is not indented (a new function, an import,
/// a main guard). A generated text is cut there before it is run. A string that never ends is cut before its line.
///
/// Unlike stop words, this does not cut inside a string. The text must be what a model wrote after a prefix that ends with a line break.
pub fn cut_completion(text: &str) -> &str {
    let mut end = 0;
    let mut lines = text.split_inclusive('\n').peekable();
    let mut at = 0;
    while let Some(line) = lines.next() {
        let inside = at > end;
        if !inside && !line.trim().is_empty() && !line.starts_with([' ', '\t']) {
            break;
        }
        at += line.len();
        // The lines up to here are whole statements if they can be split into tokens and no bracket is open.
        if let Ok(all) = tokens(&text[..at]) {
            let open = all.last().is_some_and(|t| t.depth > 0 && !matches!(t.text, ")" | "]" | "}"))
                || all.last().is_some_and(|t| matches!(t.text, "(" | "[" | "{"));
            if !open || lines.peek().is_none() {
                end = at;
            }
        }
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [&str; 14] = ["+", "-", "*", "/", "<", ">", "<=", ">=", "==", "!=", "+=", "-=", "*=", "/="];

    fn found(text: &str) -> Vec<&str> {
        operators(text, &ALL).unwrap().into_iter().map(|o| o.text).collect()
    }

    #[test]
    fn binary_operators_outside_strings_and_comments() {
        assert_eq!(found("x = -a + b # c - d\n"), ["+"]);
        assert_eq!(found("def f(*args, a=-1, **kw) -> int:\n    return -1 if a < 2 else +a\n"), ["<"]);
        assert_eq!(found("s = 'a + b' + f\"{a + b}\" + r'\\\\' + '''x\n- y'''\n"), ["+", "+", "+"]);
        assert_eq!(found("x **= 2; y //= 3; z = a ** -b // c % d\n"), Vec::<&str>::new());
        assert_eq!(found("f(*a, -b)[i - 1] * -3\n"), ["-", "*"]);
        assert_eq!(found("x += 1\nx = a \\\n  - b\n"), ["+=", "-"]);
        assert_eq!(found("1e-5 - 1E+5 - 0x1e-5\n"), ["-", "-", "-"]);
        assert_eq!(found("return not -1\nx = lambda: -1\n"), Vec::<&str>::new());
        assert_eq!(found("y = 1if x>2else 3\n"), [">"]);
    }

    #[test]
    fn chains_of_equal_operators() {
        let chain = |text| operators(text, &ALL).unwrap().iter().map(|o| o.chain).collect::<Vec<_>>();
        assert_eq!(chain("a + b + c"), [0, 0]);
        assert_eq!(chain("a + b - c + d"), [0, 1, 0]);
        assert_eq!(chain("a * b + c * d"), [0, 1, 2]);
        assert_eq!(chain("a + b * c + d"), [0, 1, 0]);
        assert_eq!(chain("f(a + b) + c + d, e + f"), [0, 1, 1, 3]);
        assert_eq!(chain("a + b == c + d"), [0, 1, 2]);
        assert_eq!(chain("s * (s - a) * (s - b)"), [0, 1, 0, 3]);
    }

    #[test]
    fn lines_and_places() {
        let text = "a = '''x\ny'''\nb = [1,\n  2]\n\nc = a<b\n";
        let op = operators(text, &ALL).unwrap();
        assert_eq!((op.len(), op[0].line, &text[op[0].start..op[0].start + 1]), (1, 5, "<"));
        assert_eq!(without_blank_lines("a\n\n  \nb"), "a\nb\n");
    }

    #[test]
    fn what_does_not_lex_is_a_sentence() {
        let error = |t: &str| tokens(t).unwrap_err().to_string();
        assert!(error("x = 1\ny = 'abc\n").contains("line 2: a string that does not end on its line"));
        assert!(error("'''abc").contains("a string that does not end"));
        assert!(error("a)").contains("closes nothing"));
        assert!(error("a ? b").contains("'?'"));
        assert!(error("a \\ b").contains("backslash"));
        assert!(tokens("f(").is_ok());
    }

    #[test]
    fn completions_are_cut_at_the_next_statement_of_the_module() {
        assert_eq!(cut_completion("    return 1\n\ndef g():\n    pass\n"), "    return 1\n\n");
        assert_eq!(
            cut_completion("    s = '''\nx\n'''\n    return s\nprint(1)\n"),
            "    s = '''\nx\n'''\n    return s\n"
        );
        assert_eq!(cut_completion("    x = [\n1,\n]\n    return x"), "    x = [\n1,\n]\n    return x");
        assert_eq!(cut_completion("x = 1\n"), "");
        assert_eq!(cut_completion("    return 1\n    s = '''abc\n"), "    return 1\n");
    }
}
