//! The file `tokenizer.json` of Hugging Face's tools, for byte-level BPE.

use crate::base::Result;
use std::collections::HashMap;

use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Bpe, END_OF_TEXT, alphabet, printable};

/// The largest id that is read. Larger ids could only be meant to exhaust memory.
const MAX_ID: u64 = 1 << 24;
/// Names of the end-of-text token in other vocabularies.
const END_NAMES: [&str; 5] = [END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"];

/// The content of the file that [`Bpe::save`] writes.
#[derive(Serialize)]
pub(super) struct TokenizerFile<'a> {
    version: &'static str,
    truncation: Value,
    padding: Value,
    added_tokens: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Model<'a>,
}

#[derive(Serialize)]
struct Model<'a> {
    r#type: &'static str,
    dropout: Value,
    unk_token: Value,
    continuing_subword_prefix: Value,
    end_of_word_suffix: Value,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    #[serde(serialize_with = "vocabulary")]
    vocab: &'a Bpe,
    merges: Vec<(String, String)>,
}

pub(super) fn file(bpe: &Bpe) -> TokenizerFile<'_> {
    let added = |(id, name): &(u32, String)| {
        json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let level = |prefix: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true});
    let shown = |id: u32| show(bpe.tokens[id as usize].as_deref().unwrap_or(&[]));
    TokenizerFile {
        version: "1.0",
        truncation: Value::Null,
        padding: Value::Null,
        added_tokens: bpe.specials.iter().map(added).collect(),
        normalizer: Value::Null,
        pre_tokenizer: level(bpe.prefix_space),
        post_processor: level(bpe.prefix_space),
        decoder: level(bpe.prefix_space),
        model: Model {
            r#type: "BPE",
            dropout: Value::Null,
            unk_token: Value::Null,
            continuing_subword_prefix: Value::Null,
            end_of_word_suffix: Value::Null,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab: bpe,
            merges: bpe.merges.iter().map(|&(a, b)| (shown(a), shown(b))).collect(),
        },
    }
}

/// Writes the vocabulary in the order of its ids.
fn vocabulary<S: Serializer>(bpe: &&Bpe, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    for (id, token) in bpe.tokens.iter().enumerate() {
        let special = bpe.specials.iter().find(|(s, _)| *s as usize == id);
        match (special, token) {
            (Some((_, name)), _) => map.serialize_entry(name, &id)?,
            (None, Some(token)) => map.serialize_entry(&show(token), &id)?,
            (None, None) => {}
        }
    }
    map.end()
}

fn characters() -> impl Iterator<Item = (u8, char)> {
    let mut next = 0x100u32;
    alphabet().map(move |byte| {
        if printable(byte) {
            return (byte, char::from(byte));
        }
        next += 1;
        (byte, char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER))
    })
}

/// A token in the form that it has in the file.
fn show(token: &[u8]) -> String {
    let mut table = ['\0'; 256];
    characters().for_each(|(byte, c)| table[usize::from(byte)] = c);
    token.iter().map(|&b| table[usize::from(b)]).collect()
}

#[derive(Deserialize)]
struct Input {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: InputModel,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u64,
    content: String,
    special: bool,
}

#[derive(Deserialize)]
struct InputModel {
    #[serde(default)]
    r#type: Option<String>,
    vocab: HashMap<String, u64>,
    #[serde(default)]
    merges: Vec<InputMerge>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
}

/// Merges are pairs now; until 2024 they were text with a space between.
#[derive(Deserialize)]
#[serde(untagged)]
enum InputMerge {
    Pair(String, String),
    Text(String),
}

/// The first setting in the file that this tokenizer does not support.
fn unsupported(input: &Input) -> Option<String> {
    let model = &input.model;
    let level = &input.pre_tokenizer;
    let some = |text: &Option<String>| text.as_ref().is_some_and(|t| !t.is_empty());
    if model.r#type.as_deref().is_some_and(|t| t != "BPE") {
        return model.r#type.as_ref().map(|t| format!("a model of type {t}"));
    }
    if !input.normalizer.is_null() {
        return Some(format!("a normalizer ({})", input.normalizer["type"].as_str().unwrap_or("unknown")));
    }
    if level["type"] != "ByteLevel" {
        return Some(format!("the pre-tokenizer {}", level["type"].as_str().unwrap_or("none")));
    }
    if level["use_regex"] == false {
        return Some("use_regex = false".into());
    }
    if model.byte_fallback == Some(true) || model.ignore_merges == Some(true) {
        return Some("byte_fallback or ignore_merges".into());
    }
    if some(&model.continuing_subword_prefix) || some(&model.end_of_word_suffix) {
        return Some("prefixes or suffixes of words".into());
    }
    let plain = input.added_tokens.iter().find(|t| !t.special)?;
    Some(format!("the added token '{}', which is not special", plain.content))
}

pub(super) fn parse(text: &[u8]) -> Result<Bpe, String> {
    // The first pass without types finds out the kind of file, before details of another kind can cause an error.
    let value: Value = serde_json::from_slice(text).map_err(|e| format!("is not JSON: {e}"))?;
    if let Some(kind) = value["model"]["type"].as_str().filter(|k| *k != "BPE") {
        return Err(format!("asks for a model of type {kind}; only byte-level BPE in GPT-2's form is read"));
    }
    let input: Input = serde_json::from_value(value).map_err(|e| format!("is not a tokenizer.json: {e}"))?;
    if let Some(what) = unsupported(&input) {
        return Err(format!("asks for {what}; only byte-level BPE in GPT-2's form is read"));
    }
    let bytes_of: HashMap<char, u8> = characters().map(|(byte, c)| (c, byte)).collect();
    let special = |name: &str| input.added_tokens.iter().any(|t| t.content == name);
    let added = input.added_tokens.iter().map(|t| (t.content.as_str(), t.id));
    let vocab = &input.model.vocab;
    let largest = vocab.values().copied().chain(added.clone().map(|(_, id)| id)).max().unwrap_or(0);
    if largest > MAX_ID {
        return Err(format!("has the token id {largest}; ids up to {MAX_ID} are read"));
    }
    // Memory is allocated for every id, so a file of a few thousand bytes must not cause the allocation for a million ids.
    let most = 2 * (vocab.len() + input.added_tokens.len()) + 1024;
    if largest as usize > most {
        return Err(format!(
            "has the token id {largest} and {} tokens; ids up to {most} are read for so many",
            vocab.len() + input.added_tokens.len()
        ));
    }
    let mut tokens = vec![None; largest as usize + 1];
    for (name, &id) in vocab {
        let bytes: Option<Vec<u8>> =
            if special(name) { Some(Vec::new()) } else { name.chars().map(|c| bytes_of.get(&c).copied()).collect() };
        let bytes = bytes.ok_or_else(|| format!("the token '{name}' is not in byte-level form"))?;
        if tokens[id as usize].replace(bytes).is_some() {
            return Err(format!("two tokens have the id {id}"));
        }
    }
    added.clone().for_each(|(_, id)| tokens[id as usize] = Some(Vec::new()));
    let mut bytes = Box::new([0; 256]);
    for (byte, c) in characters() {
        let id = vocab.get(c.encode_utf8(&mut [0; 4]) as &str);
        bytes[usize::from(byte)] = *id.ok_or_else(|| format!("the vocabulary lacks the byte {byte:#04x}"))? as u32;
    }
    let id = |name: &str| {
        let found = vocab.get(name).map(|&id| id as u32);
        found.ok_or_else(|| format!("a merge uses '{name}', which is not in the vocabulary"))
    };
    let merge = |merge: &InputMerge| match merge {
        InputMerge::Pair(a, b) => Ok((id(a)?, id(b)?)),
        InputMerge::Text(text) => {
            let (a, b) = text.split_once(' ').ok_or_else(|| format!("the merge '{text}' is not a pair"))?;
            Ok((id(a)?, id(b)?))
        }
    };
    let merges = input.model.merges.iter().map(merge).collect::<Result<_, String>>()?;
    let specials: Vec<(u32, String)> = added.map(|(name, id)| (id as u32, name.to_string())).collect();
    let end = END_NAMES.iter().find_map(|name| specials.iter().find(|(_, s)| s == name));
    let end = end.ok_or_else(|| format!("has no end-of-text token; add one of {}", END_NAMES.join(", ")))?.0;
    let prefix_space = input.pre_tokenizer["add_prefix_space"] == true;
    Bpe::assemble(tokens, specials, bytes, merges, end, prefix_space)
}
