//! Attacked texts beside their originals, for a browser and for a terminal.

use super::attack::{Found, Outcome};
use super::text::{Text, TextSet};
use std::fmt::Write as _;

/// A text with some words marked: `mark(word)` writes a changed word, and `plain(piece)` the rest.
fn marked(
    text: &Text,
    words: &[&str],
    changed: &[usize],
    mark: impl Fn(&str) -> String,
    plain: impl Fn(&str) -> String,
) -> String {
    let (pieces, end) = text.pieces();
    let mut out = String::new();
    for (i, ((before, _), word)) in pieces.iter().zip(words).enumerate() {
        out += &plain(before);
        out += &if changed.contains(&i) { mark(word) } else { plain(word) };
    }
    out + &plain(end)
}

fn outcome(found: &Found) -> &'static str {
    match found.outcome {
        Outcome::Broken => "broken",
        Outcome::Stood => "stood",
        Outcome::Unchangeable => "nothing to change",
        Outcome::WrongFromStart => "wrong from the start",
    }
}

/// A text and its attacked form in two lines for a terminal. Changed words are red and green if `colour` is set, and in brackets otherwise.
pub fn terminal(text: &Text, found: &Found, classes: &[String], label: u32, colour: bool) -> String {
    let mark = |code: u8| move |w: &str| if colour { format!("\x1b[{code}m{w}\x1b[0m") } else { format!("[{w}]") };
    let original: Vec<&str> = text.words().collect();
    let words: Vec<&str> = found.words.iter().map(String::as_str).collect();
    let name = |c: u32| classes.get(c as usize).map_or("?", String::as_str);
    let before = marked(text, &original, &found.changed, mark(31), str::to_string);
    let after = marked(text, &words, &found.changed, mark(32), str::to_string);
    format!(
        "{}, {} queries\n  {:<10} {before}\n  {:<10} {after}",
        outcome(found),
        found.queries,
        name(label),
        name(found.label)
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// An HTML page with every text beside its attacked forms. `columns` has the name of each attack and its results, one for each text of the
/// set. The page needs no other file.
pub fn html(title: &str, note: &str, set: &TextSet, columns: &[(&str, &[Found])]) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title>\n<style>\n\
         body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222 }}\n\
         table {{ border-collapse: collapse; width: 100% }}\n\
         th, td {{ border-bottom: 1px solid #ddd; padding: .5em; text-align: left; vertical-align: top }}\n\
         th {{ position: sticky; top: 0; background: #fff }}\n\
         del {{ background: #fbe0d0; text-decoration: none }} ins {{ background: #d3eee4; text-decoration: none; font-weight: 600 }}\n\
         small {{ color: #595959 }} .broken small {{ color: #a04000; font-weight: 600 }}\n\
         </style></head><body>\n<h1>{0}</h1>\n<p>{1}</p>\n<table><thead><tr><th>text</th>",
        escaped(title),
        escaped(note)
    );
    for (name, _) in columns {
        let _ = write!(out, "<th>{}</th>", escaped(name));
    }
    out += "</tr></thead><tbody>\n";
    for (i, (text, &label)) in set.texts.iter().zip(&set.labels).enumerate() {
        let name = |c: u32| set.classes.get(c as usize).map_or("?", String::as_str);
        // In the original, every word is marked that at least one attack changed.
        let mut changed: Vec<usize> = columns.iter().flat_map(|(_, f)| f[i].changed.iter().copied()).collect();
        changed.sort_unstable();
        let original: Vec<&str> = text.words().collect();
        let mark = |tag: &'static str| move |w: &str| format!("<{tag}>{}</{tag}>", escaped(w));
        let _ = write!(
            out,
            "<tr><td>{}<br><small>{}</small></td>",
            marked(text, &original, &changed, mark("del"), escaped),
            escaped(name(label))
        );
        for (_, found) in columns {
            let found = &found[i];
            let words: Vec<&str> = found.words.iter().map(String::as_str).collect();
            let class = if found.outcome == Outcome::Broken { " class=\"broken\"" } else { "" };
            let _ = write!(
                out,
                "<td{class}>{}<br><small>{}: read as {}, {} queries, {} words changed</small></td>",
                marked(text, &words, &found.changed, mark("ins"), escaped),
                outcome(found),
                escaped(name(found.label)),
                found.queries,
                found.changed.len()
            );
        }
        out += "</tr>\n";
    }
    out + "</tbody></table></body></html>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_words_are_marked_and_html_is_escaped() {
        let text = Text::new("a <good> film & more");
        let words: Vec<String> = ["a", "bad", "film", "more"].map(String::from).to_vec();
        let found = Found {
            outcome: Outcome::Broken,
            words,
            changed: vec![1],
            queries: 9,
            out_of_budget: false,
            label: 0,
            ties: 0,
            steps: 1,
        };
        let classes = vec!["no".to_string(), "yes".to_string()];
        let set = TextSet::new(vec![text.clone()], vec![1], classes.clone()).unwrap();
        let page = html("T", "n", &set, &[("PWWS", std::slice::from_ref(&found))]);
        assert!(page.contains("a &lt;<del>good</del>&gt; film &amp; more"), "{page}");
        assert!(page.contains("&lt;<ins>bad</ins>&gt;") && page.contains("read as no, 9 queries, 1 words changed"));
        let seen = terminal(&text, &found, &classes, 1, false);
        assert!(seen.contains("yes        a <[good]> film") && seen.contains("no         a <[bad]> film"), "{seen}");
        assert!(terminal(&text, &found, &classes, 1, true).contains("\x1b[32mbad\x1b[0m"));
    }
}
