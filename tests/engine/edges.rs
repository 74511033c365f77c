//! Sizes, settings and files that make no sense are refused by a sentence, and change nothing.

#[path = "../../examples/common/secrets.rs"]
mod secrets;

use crate::common::mixtral::mixtral;
use crate::common::scratch::Scratch;
use prismgrad::data::{Bpe, Tokenizer};
use prismgrad::io::CheckpointFolder;
use prismgrad::models::{Gpt, GptConfig, Mixtral, MixtralConfig, Sampling, generate};
use prismgrad::nn::{Ctx, KvCache, LoraConfig, Params};
use prismgrad::optim::{Schedule, Sgd};
use prismgrad::step::{PlainStep, TrainStep};
use prismgrad::train::state;
use prismgrad::{Array, DType, Param, Result};
use serde_json::{Value, json};
use std::path::Path;

fn gpt() -> Gpt {
    Gpt::new(GptConfig { initializer_range: 0.3, ..GptConfig::small(23, 12, 2, 8, 2) }, 5).unwrap()
}

/// A saved model whose `config.json` was edited: what loading it says.
fn with(dir: &Path, name: &str, value: Value) -> Result<Gpt> {
    gpt().save(dir)?;
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config[name] = value;
    std::fs::write(&path, config.to_string()).unwrap();
    Gpt::load(dir)
}

fn says<T>(r: Result<T>, what: &[&str]) {
    let said = r.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(what.iter().all(|w| said.contains(w)), "{said:?} lacks one of {what:?}");
}

#[test]
fn settings_of_model_files_are_honoured_kept_or_refused() {
    let dir = Scratch::new("edges-config");
    for (name, value) in [
        ("scale_attn_by_inverse_layer_idx", json!(true)),
        ("scale_attn_weights", json!(false)),
        ("add_cross_attention", json!(true)),
        ("model_type", json!("llama")),
        ("quantization_config", json!({"bits": 4})),
    ] {
        says(with(&dir, name, value), &[name]);
    }
    for (name, value) in [("attn_pdrop", json!(1.5)), ("resid_pdrop", json!(-0.1)), ("layer_norm_epsilon", json!(-1.0))]
    {
        says(with(&dir, name, value), &[name]);
    }
    // What changes nothing is kept, and written again.
    let loaded = with(&dir, "eos_token_id", json!(7)).unwrap();
    loaded.save(&*dir).unwrap();
    assert_eq!(Gpt::load(&*dir).unwrap().config().other["eos_token_id"], 7);
    assert!(with(&dir, "scale_attn_weights", json!(true)).is_ok());
}

/// The same of Mixtral's.
#[test]
fn settings_of_mixtral_are_honoured_kept_or_refused() {
    let dir = Scratch::new("edges-mixtral");
    let config = MixtralConfig { initializer_range: 0.3, ..mixtral() };
    Mixtral::new(config, 1).unwrap().save(&*dir).unwrap();
    let path = dir.join("config.json");
    let written = std::fs::read_to_string(&path).unwrap();
    let with = |name: &str, value: Value| {
        let mut config: Value = serde_json::from_str(&written).unwrap();
        config[name] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let start = std::time::Instant::now();
        let done = Mixtral::load(&*dir);
        assert!(start.elapsed().as_secs_f64() < 5.0, "{name}");
        done
    };
    for (name, value) in [
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        ("partial_rotary_factor", json!(0.5)),
        ("attention_bias", json!(true)),
        ("attention_dropout", json!(0.1)),
        ("norm_topk_prob", json!(false)),
        ("quantization_config", json!({"bits": 4})),
        ("rope_type", json!({"rope_type": "yarn", "rope_theta": 1e4})),
        ("factor", json!({"rope_type": "default", "factor": 4.0})),
        ("sliding_window", json!(0)),
        ("model_type", json!("llama")),
        ("rms_norm_eps", json!(-1.0)),
        ("router_jitter_noise", json!(2.0)),
        ("rope_theta", json!(0.0)),
        ("initializer_range", json!(-0.1)),
        ("router_aux_loss_coef", json!(-0.1)),
    ] {
        let field = if ["rope_type", "factor"].contains(&name) { "rope_parameters" } else { name };
        says(with(field, value), &[name]);
    }
    for (name, value) in [
        ("vocab_size", json!(u64::MAX)),
        ("hidden_size", json!(1u64 << 62)),
        ("intermediate_size", json!(1u64 << 40)),
        ("num_hidden_layers", json!(100_000_000)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("num_local_experts", json!(1u64 << 40)),
        ("max_position_embeddings", json!(1_000_000_000_000u64)),
        ("head_dim", json!(1u64 << 40)),
    ] {
        assert!(with(name, value.clone()).is_err(), "{name} {value}");
    }
    // What changes nothing is taken, kept, and written again.
    for (name, value) in
        [("rope_scaling", Value::Null), ("attention_dropout", json!(0)), ("norm_topk_prob", json!(true))]
    {
        assert!(with(name, value).is_ok(), "{name}");
    }
    let loaded = with("eos_token_id", json!([2, 7])).unwrap();
    loaded.save(&*dir).unwrap();
    let again = Mixtral::load(&*dir).unwrap();
    assert_eq!(again.config().other["eos_token_id"], json!([2, 7]));
    // A setting that is honoured: another base turns differently.
    let ids = Array::from_slice(&[1u32, 5, 7, 2], &[1, 4]).unwrap();
    let logits = |m: &Mixtral| m.forward(&ids, &Ctx::eval()).unwrap().array().to_f64();
    let old = with("rope_theta", json!(100.0)).unwrap();
    let new = with("rope_parameters", json!({"rope_type": "default", "rope_theta": 100.0})).unwrap();
    assert_eq!(logits(&old), logits(&new));
    assert_ne!(logits(&old), logits(&again));
}

/// As the tokenizers library does: a space before every text that is not empty and does not begin with U+0020, whatever other blank it
/// begins with.
#[test]
fn a_prefix_space_is_added_before_every_other_blank() -> Result<()> {
    let dir = Scratch::new("edges-prefix");
    let path = dir.join("tokenizer.json");
    Bpe::train(["hello\thello\n hello"], 270)?.save(&path)?;
    let text = std::fs::read_to_string(&path).unwrap();
    let plain = Bpe::load(&path)?;
    std::fs::write(&path, text.replace("\"add_prefix_space\": false", "\"add_prefix_space\": true")).unwrap();
    let spaced = Bpe::load(&path)?;
    for text in ["\n", "\thello", "\u{3000}日本", "\u{a0}x", "hello", "\r\n x"] {
        assert_eq!(spaced.encode(text), plain.encode(&format!(" {text}")), "{text:?}");
        assert_ne!(spaced.encode(text), plain.encode(text), "{text:?}");
    }
    for text in ["", " ", " hello", "  \n"] {
        assert_eq!(spaced.encode(text), plain.encode(text), "{text:?}");
    }
    Ok(())
}

/// A new run in an old folder has fresh keys; what the old one released stays on record, under names that nothing overwrites.
#[test]
fn an_overwritten_private_run_has_new_keys_and_keeps_its_logs() -> Result<()> {
    let dir = Scratch::new("edges-secrets");
    let (first, log) = (secrets::keys(&dir)?, dir.join("privacy-1.jsonl"));
    assert_eq!(
        secrets::keys(&dir)?.map(|k| k.to_bytes()),
        first.clone().map(|k| k.to_bytes()),
        "a resumed run has its keys"
    );
    for round in 1..=2 {
        std::fs::write(&log, format!("round {round}\n")).unwrap();
        std::fs::write(dir.join("mine.txt"), "mine").unwrap();
        secrets::set_aside(&dir, 2)?;
        assert!(!log.exists() && !dir.join("noise.key").exists());
        let kept = std::fs::read_to_string(dir.join(format!("privacy-1.earlier-{round}.jsonl"))).unwrap();
        assert_eq!(kept, format!("round {round}\n"));
        let fresh = secrets::keys(&dir)?;
        assert!(fresh.iter().zip(&first).all(|(a, b)| a.to_bytes() != b.to_bytes()));
    }
    assert_eq!(std::fs::read_dir(&*dir).unwrap().count(), 4, "two logs, the key, and a file of others");
    Ok(())
}

#[test]
fn sizes_that_no_file_fills_are_refused_before_anything_is_allocated() {
    let dir = Scratch::new("edges-sizes");
    for (name, value) in [
        ("n_positions", json!(u64::MAX)),
        ("n_positions", json!(4611686018427387903u64)),
        ("n_positions", json!(1_000_000_000_000u64)),
        ("vocab_size", json!(u64::MAX / 8)),
        ("vocab_size", json!(24)),
        ("n_layer", json!(100_000_000)),
        ("n_embd", json!(1u64 << 40)),
        ("n_inner", json!(1u64 << 50)),
    ] {
        let start = std::time::Instant::now();
        assert!(with(&dir, name, value.clone()).is_err(), "{name} {value}");
        assert!(start.elapsed().as_secs_f64() < 5.0, "{name} {value}");
    }
    // Without a file as well.
    let huge = GptConfig { n_positions: usize::MAX, ..GptConfig::small(23, 12, 2, 8, 2) };
    says(Gpt::new(huge, 0), &["n_positions", "no memory"]);
}

/// Safe code reaches nothing outside a buffer: constructors that cannot return an error stop with a sentence.
#[test]
fn products_of_sizes_do_not_wrap() {
    let panics = |f: &(dyn Fn() + std::panic::RefUnwindSafe)| std::panic::catch_unwind(f).is_err();
    assert!(panics(&|| drop(Array::generate(&[usize::MAX, 8], DType::F32, |_| 1.0))));
    assert!(panics(&|| drop(Array::zeros(&[1 << 62, 4], DType::F32))));
    assert!(panics(&|| drop(Array::full(&[1 << 61], 1.0, DType::F64))));
    assert_eq!(Array::zeros(&[0, usize::MAX, usize::MAX], DType::F32).numel(), 0);
    let two = Array::zeros(&[2], DType::F32);
    says(Array::zeros(&[4], DType::F32).write(usize::MAX, &two), &["write"]);
    says(Array::from_slice(&[1f32; 8], &[usize::MAX, 8]), &["from_slice"]);
    says(Array::from_bytes(&[0; 8], &[1 << 62, 4], DType::F32), &[""]);
    says(two.reshape(&[1 << 63, 2]), &["reshape"]);
}

#[test]
fn text_out_of_numbers_that_are_none_is_an_error() {
    let m = gpt();
    m.params().all()[0].set(Array::full(&[23, 8], f64::NAN, DType::F32)).unwrap();
    for temperature in [0.0, 0.8] {
        says(generate(&m, &[1, 2], 4, &Sampling { temperature, ..Sampling::default() }, None), &["NaN"]);
    }
}

#[test]
fn caches_and_positions_that_do_not_fit_are_errors() {
    let m = gpt();
    let ids = Array::from_slice(&[1u32, 2, 3], &[1, 3]).unwrap();
    let mut caches = vec![KvCache::default(); 2];
    m.forward_cached(&ids, &mut caches, 0, &Ctx::eval()).unwrap();
    assert!(m.forward_cached(&ids, &mut caches, 0, &Ctx::eval()).is_err());
    assert!(m.forward_cached(&ids, &mut [], 0, &Ctx::eval()).is_err());
    assert!(m.forward_cached(&ids, &mut caches, 3, &Ctx::eval()).is_ok());
}

#[test]
fn options_of_adapters_that_change_the_numbers_are_refused() {
    let dir = Scratch::new("edges-lora");
    let write = |edit: &dyn Fn(&mut Value)| {
        let mut m = gpt();
        m.add_lora(&LoraConfig::new(4, 8.0, &["c_attn"])).unwrap();
        m.save_lora(&*dir).unwrap();
        let path = dir.join("adapter_config.json");
        let mut c: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        edit(&mut c);
        std::fs::write(path, c.to_string()).unwrap();
        let mut fresh = gpt();
        let trained = |m: &Gpt| m.params().all().iter().filter(|p| p.trainable()).count();
        let before = (fresh.params().all().len(), trained(&fresh));
        let done = fresh.load_lora(&*dir);
        if done.is_err() {
            assert_eq!((fresh.params().all().len(), trained(&fresh)), before, "a refused call changed the model");
        }
        done
    };
    says(write(&|c| c["alpha_pattern"] = json!({"h.0.attn.c_attn": 32})), &["alpha_pattern"]);
    says(write(&|c| c["rank_pattern"] = json!({"h.0.attn.c_attn": 2})), &["rank_pattern"]);
    says(write(&|c| c["use_rslora"] = json!(true)), &["use_rslora"]);
    says(write(&|c| c["bias"] = json!("all")), &["bias"]);
    // What PEFT writes without a meaning for the numbers.
    assert!(
        write(&|c| {
            c["alpha_pattern"] = json!({});
            c["modules_to_save"] = Value::Null;
            c["lora_dropout"] = json!(0.1);
            c["revision"] = json!("main");
        })
        .is_ok()
    );
}

/// Momentum goes by place in the flat buffer: another order of the parameters would give it to others.
#[test]
fn a_step_over_other_parameters_does_not_take_a_checkpoint() -> Result<()> {
    let dir = Scratch::new("edges-order");
    let folder = CheckpointFolder::open(dir.join("c"))?;
    let params = Params::new(0, DType::F64);
    let [a, b] = ["a", "b"].map(|n| params.param(n, &[2], prismgrad::nn::Init::Zeros).unwrap());
    let make = |p: &[Param]| PlainStep::new(p, Sgd { momentum: 0.9, weight_decay: 0.0 }, Schedule::constant(0.1));
    let mut step = make(&[a.clone(), b.clone()])?;
    step.run_one(|| a.per_sample(1)?.sum(&[1], false)?.sub(&b.per_sample(1)?.sum(&[1], false)?.mul_scalar(100.0)?))?;
    state::save(&folder, 1, None, &params, &step, &())?;
    let saved = folder.latest()?.checkpoint.unwrap();
    says(state::load::<()>(&saved, &params, &mut make(&[b.clone(), a.clone()])?), &["a with 2 elements", "order"]);
    says(state::load::<()>(&saved, &params, &mut make(std::slice::from_ref(&a))?), &["nothing"]);
    let mut again = make(&[a, b])?;
    state::load::<()>(&saved, &params, &mut again)?;
    assert_eq!(again.steps(), 1);
    Ok(())
}
