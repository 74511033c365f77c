//! Division of texts into documents.

use prismgrad::data::Document;

/// Cuts a text into pieces of about 4 kB, so that some of them can be held out.
pub fn pieces(name: &str, text: &str) -> Vec<Document> {
    let (mut out, mut piece) = (Vec::new(), String::new());
    for line in text.lines() {
        piece.push_str(line);
        piece.push('\n');
        if piece.len() > 4096 {
            out.push(Document { name: format!("{name}/{}", out.len()), text: std::mem::take(&mut piece) });
        }
    }
    out
}
