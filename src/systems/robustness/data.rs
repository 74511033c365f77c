//! The two public sets of the experiments, from the folder that `PRISMGRAD_DATA` names. Both are for research use.

use super::text::{Text, TextSet, read_utf8, windows_1252};
use crate::base::{Error, Result};
use crate::data::{data_file, read_maybe_gzip};

fn found(file: &str, from: &str) -> Result<std::path::PathBuf> {
    data_file(file).map_err(|e| Error::format(file, format!("{e}. It is {from}")))
}

/// Film reviews (Pang and Lee 2005): sentences of two classes, `negative` and `positive`, split into training, validation and test by a
/// hash of the sentence, each sentence once.
pub fn reviews() -> Result<[TextSet; 3]> {
    let from = "data/rt-polaritydata/rt-polarity.neg and .pos of github.com/dennybritz/cnn-text-classification-tf";
    let (mut texts, mut labels) = (Vec::new(), Vec::new());
    for (label, file) in ["rt-polarity.neg.gz", "rt-polarity.pos.gz"].into_iter().enumerate() {
        let bytes = read_maybe_gzip(found(file, from)?, 16 << 20)?;
        for line in windows_1252(&bytes).lines() {
            let text = Text::new(line.trim());
            if !text.is_empty() {
                texts.push(text);
                labels.push(label as u32);
            }
        }
    }
    Ok(TextSet::new(texts, labels, vec!["negative".into(), "positive".into()])?.split())
}

/// Tweets of six emotions (Saravia et al. 2018) in their published parts: training, validation, test.
pub fn emotion() -> Result<[TextSet; 3]> {
    let classes: Vec<String> = ["sadness", "joy", "love", "anger", "fear", "surprise"].map(String::from).to_vec();
    let part = |name: &str| -> Result<TextSet> {
        let from = format!("data/emotion/{name}.txt of github.com/niuzaisheng/AttExplainer");
        let path = found(&format!("emotion-{name}.txt.gz"), &from)?;
        let content = read_utf8(&path)?;
        let (mut texts, mut labels) = (Vec::new(), Vec::new());
        for (i, line) in content.lines().enumerate().filter(|(_, l)| *l != "text;label_name" && !l.is_empty()) {
            let row = line.rsplit_once(';').and_then(|(t, l)| Some((t, classes.iter().position(|c| c == l.trim())?)));
            let Some((text, label)) = row else {
                let message = format!("line {} is not text;label with one of {}", i + 1, classes.join(", "));
                return Err(Error::format(&path, message));
            };
            texts.push(Text::new(text));
            labels.push(label as u32);
        }
        TextSet::new(texts, labels, classes.clone())
    };
    Ok([part("train")?, part("val")?, part("test")?])
}
