//! A call that returns an error has changed nothing: each fallible method that changes something is made to fail at each of its stages,
//! and the whole state is compared before and after.

use crate::common::mixtral::mixtral;
use crate::common::scratch::Scratch;
use prismgrad::io::{Checkpoint, CheckpointFolder, ElementType, Entry, load_arrays, save_arrays};
use prismgrad::models::{Gpt, GptConfig, Mixtral};
use prismgrad::nn::hypergraph::{HyperTrans, SetAttention};
use prismgrad::nn::{
    Conv2d, Ctx, GroupNorm, Init, KvCache, LayerNorm, Linear, LoraConfig, Mlp, Moe, MoeConfig, MultiHeadAttention,
    Params, Strict, SwiGlu, TransformerBlock,
};
use prismgrad::ops::attention::Span;
use prismgrad::optim::{AdamW, Schedule, Sgd};
use prismgrad::privacy::{ClipFn, Thresholds};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, TrainStep};
use prismgrad::train::{Existing, RunFolder, state};
use prismgrad::{Array, DType, Param, Result, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Names, values, and what is trained.
type Store = Vec<(String, bool, Vec<u8>)>;

fn store(params: &Params) -> Store {
    params.all().iter().map(|p| (p.name().to_string(), p.trainable(), p.value().to_bytes())).collect()
}

/// Steps, buffers, and of a private step its count and thresholds.
type Whole = (u64, Vec<(String, Vec<u8>)>, Option<(u64, Vec<f64>)>);
/// Named arrays, as a file has them.
type Named = Vec<(String, Array)>;
/// What becomes of a checkpoint's file, by its name and bytes.
type Change<'a> = dyn Fn(&str, Vec<u8>) -> Option<Vec<u8>> + 'a;

/// A step as a checkpoint sees it.
fn whole(step: &impl TrainStep) -> Whole {
    let buffers = step.state().into_iter().map(|(n, a)| (n.to_string(), a.to_bytes())).collect();
    (step.steps(), buffers, step.accounting().map(|p| (p.steps(), p.thresholds())))
}

/// Every file below a folder.
fn files(at: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(at).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => drop(all.insert(path.display().to_string(), std::fs::read(&path).unwrap())),
        }
    }
    all
}

fn gpt() -> Gpt {
    Gpt::new(GptConfig { initializer_range: 0.3, ..GptConfig::small(23, 12, 2, 8, 2) }, 5).unwrap()
}

fn says<T>(what: &str, r: Result<T>, why: &str) {
    let said = r.err().unwrap_or_else(|| panic!("{what} is no failure")).to_string();
    assert!(said.contains(why), "{what}: {said:?} lacks {why:?}");
}

#[test]
fn layers_that_cannot_be_made_leave_no_parameters() {
    type Make = fn(&Params) -> Result<()>;
    // A name that is taken stops each layer after its first parameters; a wrong option stops it later still.
    let taken: [(&str, &str, Make); 10] = [
        ("Linear", "bias", |p| Linear::new(p, 2, 3).map(drop)),
        ("LayerNorm", "bias", |p| LayerNorm::new(p, 4).map(drop)),
        ("GroupNorm", "bias", |p| GroupNorm::new(p, 2, 4).map(drop)),
        ("Conv2d", "bias", |p| Conv2d::new(p, 1, 2, 3).map(drop)),
        ("MultiHeadAttention", "c_proj.bias", |p| MultiHeadAttention::new(p, 4, 2).map(drop)),
        ("Mlp", "c_proj.bias", |p| Mlp::new(p, 4, 2).map(drop)),
        ("SwiGlu", "down_proj.weight", |p| SwiGlu::new(p, 4, 2).map(drop)),
        ("Moe", "experts.down_proj.weight", |p| {
            let c = MoeConfig { expert: prismgrad::nn::ExpertKind::SwiGlu, ..MoeConfig::new(4, 2, 8) };
            Moe::new(p, 4, &c).map(drop)
        }),
        ("SetAttention", "ln_1.bias", |p| SetAttention::new(p, 4, 2).map(drop)),
        ("HyperTrans", "to_nodes.ln_1.bias", |p| HyperTrans::new(p, 4, 2).map(drop)),
    ];
    for (name, last, make) in taken {
        let params = Params::new(0, DType::F32);
        make(&params).unwrap();
        assert!(params.get(last).is_some(), "{name} has {last}");
        let params = Params::new(0, DType::F32);
        params.param(last, &[1], Init::Ones).unwrap();
        let before = store(&params);
        says(name, make(&params), last);
        assert_eq!(store(&params), before, "{name}");
        make(&params.at("elsewhere")).unwrap();
    }
    let params = Params::new(0, DType::F32);
    says("dropout", TransformerBlock::builder(4, 2).dropout(1.5).build(&params), "1.5");
    assert!(params.all().is_empty(), "{:?}", params.all());
}

#[test]
fn parameters_are_loaded_all_or_none() -> Result<()> {
    let dir = Scratch::new("whole-params");
    let path = dir.join("m.safetensors");
    let make = || {
        let params = Params::new(3, DType::F32);
        Linear::new(&params.at("a"), 3, 2)?;
        Linear::new(&params.at("b"), 2, 2)?;
        Ok(params)
    };
    let params: Params = make()?;
    let good = |p: &Param| Array::full(p.shape(), 7.0, DType::F32);
    let named = |edit: &dyn Fn(&mut Named)| {
        let mut all: Vec<_> = params.all().iter().map(|p| (p.name().to_string(), good(p))).collect();
        edit(&mut all);
        save_arrays(&path, &all, &[]).unwrap();
    };
    let before = store(&params);
    type Edit = fn(&mut Vec<(String, Array)>);
    let edits: [(&str, Edit); 4] = [
        ("missing", |a| drop(a.pop())),
        ("is in the file", |a| a.push(("more".into(), Array::zeros(&[1], DType::F32)))),
        ("[9]", |a| a[3].1 = Array::zeros(&[9], DType::F32)),
        ("no float", |a| a[3].1 = Array::zeros(&[2], DType::I64)),
    ];
    for (why, edit) in edits {
        named(&edit);
        says(why, params.load(&path, Strict::Yes), why);
        assert_eq!(store(&params), before, "{why}");
    }
    // The last tensor's bytes are cut off.
    named(&|_| {});
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    says("cut", params.load(&path, Strict::Yes), "m.safetensors");
    says("pattern", params.train_only(&["a.*", "nothing*"]), "nothing*");
    says("set", params.all()[0].set(Array::zeros(&[1], DType::F32)), "a.weight");
    says("save as integers", params.save_as(&path, Some(DType::U8)), "u8");
    assert_eq!(store(&params), before);
    assert_eq!(std::fs::read(&path).unwrap().len(), bytes.len() - 1, "a refused save leaves the file");
    Ok(())
}

/// A cache that fits no more is refused before the first layer has added to its own.
#[test]
fn caches_grow_in_all_layers_or_in_none() -> Result<()> {
    let spans = vec![Span::Causal, Span::Window(4)];
    let m = Gpt::new(GptConfig { initializer_range: 0.3, ..GptConfig::small(23, 12, 2, 8, 2) }.with_spans(spans), 5)?;
    let ids = |t: &[u32], b: usize| Array::from_slice(&t.repeat(b), &[b, t.len()]);
    let filled = |b: usize| -> Result<Vec<KvCache>> {
        let mut caches = vec![KvCache::default(); 2];
        m.forward_cached(ids(&[1, 2, 3], b)?, &mut caches, 0, &Ctx::eval())?;
        Ok(caches)
    };
    let (one, two) = (filled(1)?, filled(2)?);
    let swapped = {
        let other = Gpt::new(GptConfig::small(23, 12, 2, 8, 2), 5)?;
        let mut caches = vec![KvCache::default(); 2];
        other.forward_cached(ids(&[1, 2, 3], 1)?, &mut caches, 0, &Ctx::eval())?;
        caches
    };
    let mix = |first: &[KvCache], second: &[KvCache]| vec![first[0].clone(), second[1].clone()];
    let next =
        |caches: &mut [KvCache], past: usize, t: &[u32]| m.forward_cached(ids(t, 1)?, caches, past, &Ctx::eval());
    let want = next(&mut one.clone(), 3, &[4, 5])?.array().to_f64();
    let cases: [(&str, Vec<KvCache>, usize, &[u32]); 6] = [
        ("one layer and one batch", mix(&one, &two), 3, &[4]),
        ("span", mix(&one, &swapped), 3, &[4]),
        ("2 positions are said", one.clone(), 2, &[4]),
        ("1 caches", one[..1].to_vec(), 3, &[4]),
        ("14 positions", one.clone(), 3, &[1; 11]),
        ("99", one.clone(), 3, &[99]),
    ];
    for (why, mut caches, past, t) in cases {
        let seen: Vec<_> = caches.iter().map(|c| (c.seen(), c.len(), c.capacity_bytes())).collect();
        says(why, next(&mut caches, past, t), why);
        assert_eq!(caches.iter().map(|c| (c.seen(), c.len(), c.capacity_bytes())).collect::<Vec<_>>(), seen, "{why}");
        if past == 3 && caches.len() == 2 && why != "span" && why != "one layer and one batch" {
            assert_eq!(next(&mut caches, 3, &[4, 5])?.array().to_f64(), want, "{why}: goes on as if nothing had been");
        }
    }
    let mut halves = one.clone();
    let bf16 = Ctx { dtype: Some(DType::BF16), ..Ctx::eval() };
    says("dtype", m.forward_cached(ids(&[4], 1)?, &mut halves, 3, &bf16), "bf16");
    assert_eq!(next(&mut halves, 3, &[4, 5])?.array().to_f64(), want);
    Ok(())
}

#[test]
fn adapters_are_added_whole_and_merged_states_are_not_confused() -> Result<()> {
    let dir = Scratch::new("whole-lora");
    let mut m = gpt();
    let ids = Array::from_slice(&[1u32, 5, 7, 2], &[1, 4])?;
    let logits = |m: &Gpt| m.forward(&ids, &Ctx::eval()).unwrap().array().to_f64();
    m.params().train_only(&["*.bias"])?;
    let (before, said) = (store(m.params()), logits(&m));
    let c = |targets: &[&str]| LoraConfig::new(2, 8.0, targets);
    let mut third = c(&["c_attn", "c_fc"]);
    third.other.insert("use_dora".into(), true.into());
    for (why, config) in
        [("q_proj", c(&["q_proj"])), ("rank 0", LoraConfig::new(0, 8.0, &["c_attn"])), ("use_dora", third)]
    {
        says(why, m.add_lora(&config), why);
        assert_eq!((store(m.params()), logits(&m)), (before.clone(), said.clone()), "{why}");
    }
    // The name of the second layer's adapter is taken: the first layer's goes away again.
    let clash = m.params().param("h.1.attn.c_attn.lora_B.weight", &[1], Init::Ones)?;
    let with = store(m.params());
    says("clash", m.add_lora(&c(&["c_attn"])), "lora_B");
    assert_eq!((store(m.params()), logits(&m)), (with, said.clone()));
    drop(clash);

    let mut m = gpt();
    m.add_lora(&c(&["c_attn", "c_fc"]))?;
    for p in m.params().all().iter().filter(|p| p.name().contains("lora_B")) {
        p.set(Array::generate(p.shape(), DType::F32, |i| (i as f64 * 0.7).sin() * 0.3))?;
    }
    let (adapted, said) = (store(m.params()), logits(&m));
    says("second set", m.add_lora(&c(&["c_proj"])), "already");
    assert_eq!((store(m.params()), logits(&m)), (adapted.clone(), said.clone()));

    let folder = CheckpointFolder::open(dir.join("c"))?;
    let step = |m: &Gpt| PlainStep::new(&m.params().all(), Sgd::default(), Schedule::constant(0.1));
    let mut taken = step(&m)?;
    state::save(&folder, 1, None, m.params(), &taken, &())?;
    let saved = folder.latest()?.checkpoint.unwrap();
    m.merge_lora()?;
    let merged = store(m.params());
    assert_ne!(merged, adapted);
    let on_disk = files(&dir);
    says("checkpoint", state::save(&folder, 2, None, m.params(), &taken, &()), "unmerge");
    says("parameters", m.params().save(dir.join("p.safetensors")), "unmerge");
    says("resume", state::load::<()>(&saved, m.params(), &mut taken), "unmerge");
    says("load", m.params().load(saved.file("model.safetensors")?, Strict::Yes), "unmerge");
    assert_eq!((store(m.params()), files(&dir)), (merged, on_disk));
    // A model in one piece can be written, and is the same model.
    m.save(dir.join("m"))?;
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(near(&logits(&Gpt::load(dir.join("m"))?), &said));
    m.unmerge_lora()?;
    assert_eq!((store(m.params()), logits(&m)), (adapted, said.clone()));
    state::save(&folder, 2, None, m.params(), &step(&m)?, &())?;
    let mut other = gpt();
    other.add_lora(&c(&["c_attn", "c_fc"]))?;
    let mut resumed = PlainStep::new(&other.params().all(), Sgd::default(), Schedule::constant(0.1))?;
    state::load::<()>(&folder.latest()?.checkpoint.unwrap(), other.params(), &mut resumed)?;
    assert_eq!(logits(&other), said, "the adapters count once");
    Ok(())
}

/// A parameter, and a plain step over it that has been taken once.
fn plain(seed: u64) -> (Params, PlainStep) {
    let params = Params::new(seed, DType::F32);
    let w = params.param("w", &[2, 3], Init::Uniform { bound: 1.0 }).unwrap();
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(0.1)).unwrap();
    step.run_one(|| w.per_sample(1)?.square()?.sum(&[1, 2], false)).unwrap();
    (params, step)
}

fn adaptive() -> PrivacyConfig {
    let c = PrivacyConfig::target(1e3, 1e-3).records(20).expected_batch(20.0).steps(100).noise_multiplier(1.0);
    c.clip(ClipFn::Abadi).thresholds(Thresholds::Adaptive { quantile: 0.5, rate: 0.2, noise: 5.0 })
}

fn losses(w: &Param, n: usize) -> Result<Tensor> {
    w.per_sample(n)?.square()?.sum(&[1, 2], false)
}

fn private(config: PrivacyConfig) -> (Params, PrivateStep) {
    let params = Params::new(1, DType::F32);
    let w = params.param("w", &[2, 3], Init::Uniform { bound: 1.0 }).unwrap();
    let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(4)).unwrap();
    let mut step =
        PrivateStep::new(&params.all(), privacy, Sgd { momentum: 0.9, weight_decay: 0.0 }, Schedule::constant(0.1))
            .unwrap();
    (0..2).for_each(|_| drop(step.run(20, |r| losses(&w, r.len())).unwrap()));
    (params, step)
}

/// A checkpoint whose files were changed; its manifest fits them.
fn changed(from: &Checkpoint, folder: &CheckpointFolder, number: u64, change: &Change) -> Checkpoint {
    folder
        .save(number, None, |w| {
            from.files().try_for_each(|f| match change(f, from.bytes(f)?) {
                Some(bytes) => w.bytes(f, &bytes),
                None => Ok(()),
            })
        })
        .unwrap();
    folder.at(number).unwrap()
}

#[test]
fn a_checkpoint_is_taken_whole() -> Result<()> {
    let dir = Scratch::new("whole-state");
    let folder = CheckpointFolder::open(dir.join("c"))?.keep_last(99);
    let (params, step) = plain(1);
    state::save(&folder, 1, None, &params, &step, &7u32)?;
    let good = folder.at(1)?;
    let arrays = |edit: &dyn Fn(&mut Named), bytes: &[u8]| {
        let path = dir.join("edit.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let mut all = load_arrays(&path).unwrap();
        edit(&mut all);
        save_arrays(&path, &all, &[]).unwrap();
        std::fs::read(&path).unwrap()
    };
    type Edit<'a> = (&'a str, &'a str, &'a dyn Fn(Vec<u8>) -> Option<Vec<u8>>);
    let text = |b: Vec<u8>, from: &str, to: &str| Some(String::from_utf8(b).unwrap().replace(from, to).into_bytes());
    let edits: [Edit; 10] = [
        ("no 'state.json'", "state.json", &|_| None),
        ("state.json", "state.json", &|b| text(b, "\"steps\": 1", "\"steps\": -1")),
        ("state.json", "state.json", &|b| text(b, "\"extra\": 7", "\"extra\": \"seven\"")),
        ("other parameters", "state.json", &|b| text(b, "\"w\"", "\"v\"")),
        ("no 'model.safetensors'", "model.safetensors", &|_| None),
        ("w is [1]", "model.safetensors", &|b| Some(arrays(&|a| a[0].1 = Array::zeros(&[1], DType::F32), &b))),
        ("no 'optimizer.safetensors'", "optimizer.safetensors", &|_| None),
        ("no exp_avg_sq", "optimizer.safetensors", &|b| Some(arrays(&|a| a.retain(|(n, _)| n != "exp_avg_sq"), &b))),
        ("exp_avg_sq is [1]", "optimizer.safetensors", &|b| {
            let cut = |a: &mut Vec<(String, Array)>| {
                a.iter_mut().filter(|(n, _)| n == "exp_avg_sq").for_each(|(_, a)| *a = Array::zeros(&[1], DType::F32))
            };
            Some(arrays(&cut, &b))
        }),
        ("optimizer.safetensors", "optimizer.safetensors", &|mut b| {
            b.truncate(b.len() - 1);
            Some(b)
        }),
    ];
    let (here, mut fresh) = plain(2);
    let before = (store(&here), whole(&fresh));
    for (i, (why, file, edit)) in edits.iter().enumerate() {
        let bad = changed(&good, &folder, 10 + i as u64, &|f, b| if f == *file { edit(b) } else { Some(b) });
        says(why, state::load::<u32>(&bad, &here, &mut fresh), why);
        assert_eq!((store(&here), whole(&fresh)), before, "{why} in {file}");
    }
    assert_eq!(state::load::<u32>(&good, &here, &mut fresh)?, 7);
    assert_eq!((store(&here), whole(&fresh)), (store(&params), whole(&step)));
    Ok(())
}

/// What a private step counts, its thresholds and its buffers come from one checkpoint, or stay.
#[test]
fn an_accountant_is_restored_whole() -> Result<()> {
    let dir = Scratch::new("whole-private");
    let folder = CheckpointFolder::open(dir.join("c"))?;
    let (params, step) = private(adaptive());
    state::save(&folder, 2, None, &params, &step, &())?;
    let good = folder.at(2)?;
    let (here, mut fresh) = private(adaptive());
    let saved: Vec<(String, Array)> = step.state().into_iter().map(|(n, a)| (n.to_string(), a)).collect();
    let before = (store(&here), whole(&fresh));
    assert!(before.1.2.is_some());
    type Edit = fn(&mut Vec<(String, Array)>);
    let edits: [(&str, Edit); 6] = [
        ("thresholds", |a| a.retain(|(n, _)| !n.contains("threshold"))),
        ("threshold of NaN", |a| set(a, "threshold", f64::NAN)),
        ("threshold of -1", |a| set(a, "threshold", -1.0)),
        ("private steps", |a| set(a, "private", f64::NAN)),
        ("private steps", |a| set(a, "private", -3.0)),
        ("momentum_buffer", |a| a.retain(|(n, _)| !n.contains("momentum"))),
    ];
    for (why, edit) in edits {
        let mut state = saved.clone();
        edit(&mut state);
        says(why, fresh.restore(9, &state), why);
        assert_eq!((store(&here), whole(&fresh)), before, "{why}");
    }
    let (other, mut under) = private(adaptive().noise_multiplier(2.0));
    let before = (store(&other), whole(&under));
    says("setting", state::load::<()>(&good, &other, &mut under), "another privacy setting");
    assert_eq!((store(&other), whole(&under)), before);
    state::load::<()>(&good, &here, &mut fresh)?;
    assert_eq!(whole(&fresh), whole(&step));
    // The log of steps: a step that fails leaves it, and the parameters, as they were.
    let log = dir.join("log.jsonl");
    let params = Params::new(1, DType::F32);
    let w = params.param("w", &[2, 3], Init::Ones)?;
    let privacy =
        Privacy::new(PrivacyConfig { thresholds: Thresholds::Equal, ..adaptive() }, NoiseKey::from_seed_for_tests(4))?;
    let mut step = PrivateStep::new(&params.all(), privacy.log_to(&log)?, Sgd::default(), Schedule::constant(0.1))?;
    let before = (store(&params), whole(&step), std::fs::read(&log).unwrap());
    for (why, n) in [("forward", None), ("record", Some(1)), ("records", Some(0))] {
        let fails = step.run(20, |r| match n {
            None => Err(prismgrad::Error::invalid("test", "no forward pass today")),
            Some(n) => losses(&w, (r.len() * n).saturating_sub(n)),
        });
        assert!(fails.is_err(), "{why}");
        assert_eq!((store(&params), whole(&step), std::fs::read(&log).unwrap()), before, "{why}");
    }
    step.run(20, |r| losses(&w, r.len()))?;
    assert!(std::fs::read(&log).unwrap().len() > before.2.len());
    Ok(())
}

fn set(all: &mut [(String, Array)], name: &str, x: f64) {
    let one = all.iter_mut().find(|(n, _)| n.contains(name)).unwrap_or_else(|| panic!("no {name}"));
    one.1 = Array::full(one.1.shape(), x, DType::F64);
}

#[test]
fn a_plain_step_that_fails_is_not_taken() -> Result<()> {
    let (params, mut step) = plain(1);
    let w = params.all()[0].clone();
    let before = (store(&params), whole(&step));
    let bad = |step: &mut PlainStep, f: &dyn Fn() -> Result<Tensor>| step.run([(), ()], |_| f()).map(drop);
    says("forward", bad(&mut step, &|| Err(prismgrad::Error::invalid("test", "stop"))), "stop");
    says("a scalar", bad(&mut step, &|| losses(&w, 1)?.sum_all()), "one loss per sample");
    says("NaN", bad(&mut step, &|| losses(&w, 2)?.mul_scalar(f64::NAN)), "sample 0");
    // The second microbatch fails after the first has been summed.
    let mut count = 0;
    let second = step.run([(), ()], |_| {
        count += 1;
        if count == 2 { Err(prismgrad::Error::invalid("test", "late")) } else { losses(&w, 1) }
    });
    says("late", second.map(drop), "late");
    assert_eq!((store(&params), whole(&step)), before);
    Ok(())
}

#[test]
fn checkpoints_on_disk_outlive_failed_ones() -> Result<()> {
    let dir = Scratch::new("whole-disk");
    let folder = CheckpointFolder::open(dir.join("c"))?.keep_last(2);
    let entry = |x: u8| Entry::new("w", ElementType::U8, [4], vec![x; 4]);
    let save = |n: u64| folder.save(n, None, |w| w.tensors("m.safetensors", &[entry(n as u8)], &BTreeMap::new()));
    (7..=9).try_for_each(|n| save(n).map(drop))?;
    let before = files(&dir);
    assert_eq!(folder.steps()?, [8, 9]);
    let late = folder.save(9, None, |w| {
        w.tensors("m.safetensors", &[entry(0)], &BTreeMap::new())?;
        w.bytes("m.safetensors", b"twice")
    });
    says("twice", late, "taken");
    says(
        "size",
        folder.save(10, None, |w| {
            w.tensors("x", &[Entry::new("x", ElementType::F32, [2], vec![0; 7])], &BTreeMap::new())
        }),
        "x",
    );
    assert_eq!(files(&dir), before);
    // A run that began anew writes lower numbers: its checkpoint stays, whatever the rule says of old ones.
    save(1)?;
    assert!(folder.at(1).is_ok(), "the checkpoint that was just written is gone; there are {:?}", folder.steps()?);
    Ok(())
}

#[test]
fn nothing_but_a_run_is_overwritten() -> Result<()> {
    let dir = Scratch::new("whole-run");
    // A folder with a model in it is no run.
    gpt().save(dir.join("model"))?;
    let before = files(&dir);
    for existing in [Existing::Refuse, Existing::Resume, Existing::Overwrite] {
        says("a model", RunFolder::create(dir.join("model"), &1, existing, &[]), "no run has written");
        assert_eq!(files(&dir), before, "{existing:?}");
    }
    says("an empty path", RunFolder::create("", &1, Existing::Refuse, &[]), "empty path");
    says("an empty path", CheckpointFolder::open(""), "empty path");
    says("an empty path", gpt().save(""), "empty path");
    // A run is; what others have put beside its files stays.
    let run = RunFolder::create(dir.join("run"), &1, Existing::Refuse, &[])?;
    run.checkpoints()?.save(1, None, |w| w.bytes("x", b"x"))?;
    drop(run);
    let others = ["notes.txt", "checkpoints/mine.bin", "plots/data.csv", "noise.key"];
    others.iter().for_each(|n| std::fs::write(dir.join("run").join(n), "mine").unwrap());
    std::fs::write(dir.join("run/plots/loss.svg"), "old").unwrap();
    let before = files(&dir);
    says(
        "another configuration",
        RunFolder::create(dir.join("run"), &2, Existing::Resume, &[]),
        "another configuration",
    );
    says("a run", RunFolder::create(dir.join("run"), &2, Existing::Refuse, &[]), "unfinished run");
    assert_eq!(files(&dir), before);
    let run = RunFolder::create(dir.join("run"), &2, Existing::Overwrite, &[])?;
    assert!(run.checkpoints()?.steps()?.is_empty() && !dir.join("run/plots/loss.svg").exists());
    assert!(others.iter().all(|n| std::fs::read(dir.join("run").join(n)).is_ok_and(|b| b == b"mine")));
    Ok(())
}

#[test]
fn models_that_do_not_load_leave_their_folder() -> Result<()> {
    let dir = Scratch::new("whole-models");
    Mixtral::new(mixtral(), 1)?.save(&*dir)?;
    let index = dir.join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "../../outside.safetensors"}}"#).unwrap();
    let before = files(&dir);
    says("outside", Mixtral::load(&*dir), "no file of this folder");
    assert_eq!(files(&dir), before);
    Ok(())
}
