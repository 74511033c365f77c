//! YAML converted to JSON values.
#![allow(dead_code)]

use prismgrad::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;
use yaml_rust2::{Yaml, YamlLoader};

/// Parses a YAML text that must have one document. `path` names the file in errors.
pub fn parse(path: &Path, text: &str) -> Result<Value> {
    let bad = |message: String| Error::format(path, format!("is no YAML with one document: {message}"));
    let documents = YamlLoader::load_from_str(text).map_err(|e| bad(e.to_string()))?;
    match &documents[..] {
        [one] => value(one).map_err(bad),
        many => Err(bad(format!("{} are there", many.len()))),
    }
}

fn value(yaml: &Yaml) -> std::result::Result<Value, String> {
    Ok(match yaml {
        Yaml::Real(text) => {
            let number = text.parse::<f64>().ok().and_then(serde_json::Number::from_f64);
            number.map(Value::Number).ok_or_else(|| format!("'{text}' is not a number"))?
        }
        Yaml::Integer(i) => Value::from(*i),
        Yaml::String(s) => Value::from(s.as_str()),
        Yaml::Boolean(b) => Value::from(*b),
        Yaml::Null => Value::Null,
        Yaml::Array(items) => items.iter().map(value).collect::<std::result::Result<_, _>>()?,
        Yaml::Hash(entries) => {
            let mut out = Map::new();
            for (key, entry) in entries {
                let key = key.as_str().ok_or_else(|| format!("the name {key:?} is no text"))?;
                out.insert(key.to_string(), value(entry)?);
            }
            Value::Object(out)
        }
        Yaml::Alias(_) | Yaml::BadValue => return Err("it has a value that cannot be read".to_string()),
    })
}
