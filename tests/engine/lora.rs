//! Low-rank adapters and training parts of a model, private or not.

use crate::common::distance::distance;
use crate::common::gpt::gpt;
use crate::common::privacy::{keyed, whole};
use crate::common::scratch::Scratch;
use crate::common::tokens::tokens;
use prismgrad::check;
use prismgrad::device_tests;
use prismgrad::models::Gpt;
use prismgrad::nn::{Ctx, LoraConfig};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::{PlainStep, PrivateStep};
use prismgrad::{Array, DType, Device, Param, no_grad};

fn train(model: &Gpt, private: bool, steps: u64) {
    let params = model.params().all();
    let (x, y) = tokens(4, 1);
    let schedule = Schedule::constant(1e-2);
    if private {
        let p = keyed(whole(4).noise_multiplier(0.5), 9);
        let mut step = PrivateStep::new(&params, p, AdamW::default(), schedule).unwrap();
        (0..steps).for_each(|t| drop(step.run(4, |_| model.losses(&x, &y, &Ctx::train(t))).unwrap()));
    } else {
        let mut step = PlainStep::new(&params, AdamW::default(), schedule).unwrap();
        (0..steps).for_each(|t| drop(step.run_one(|| model.losses(&x, &y, &Ctx::train(t))).unwrap()));
    }
}

fn logits(model: &Gpt) -> Vec<f64> {
    no_grad(|| model.forward(&tokens(2, 1).0, &Ctx::eval())).unwrap().array().to_f64()
}

fn base(model: &Gpt) -> Vec<(String, Vec<f64>)> {
    let all = model.params().all().into_iter().filter(|p| !p.name().contains("lora_"));
    all.map(|p| (p.name().to_string(), p.value().to_f64())).collect()
}

device_tests! {
    /// Untrained adapters change nothing; training moves them and nothing else; merging keeps the function, and unmerging the
    /// bits of the weights.
    fn adapters_train_merge_and_come_out_again(device) {
        for private in [false, true] {
            let mut model = gpt(2, true, DType::F32, device);
            let (before, weights) = (logits(&model), base(&model));
            assert_eq!(model.add_lora(&LoraConfig::new(2, 8.0, &["c_attn", "c_fc"])).unwrap(), 4);
            assert_eq!(logits(&model), before);
            let trained: Vec<Param> = model.params().all().into_iter().filter(|p| p.trainable()).collect();
            assert!(trained.len() == 8 && trained.iter().all(|p| p.name().contains(".lora_")), "two per layer");
            assert_eq!(trained[0].shape(), [2, 8]);
            assert_eq!(trained[1].shape(), [24, 2]);
            train(&model, private, 3);
            let after = logits(&model);
            assert!(distance(&after, &before) > 1e-3, "it has learnt something");
            assert_eq!(base(&model), weights, "the model itself is as it was");
            model.merge_lora().unwrap();
            assert!(distance(&logits(&model), &after) < 1e-4);
            assert_ne!(base(&model), weights);
            model.merge_lora().unwrap();
            assert!(distance(&logits(&model), &after) < 1e-4, "merged once");
            model.unmerge_lora().unwrap();
            assert_eq!((base(&model), logits(&model)), (weights, after));
        }
    }

    fn per_sample_gradients_of_adapters(device) {
        let mut model = gpt(2, true, DType::F64, device);
        model.add_lora(&LoraConfig::new(3, 3.0, &["c_attn", "c_proj", "c_fc"])).unwrap();
        // B away from zero, so that A has gradients, too.
        for p in model.params().all().iter().filter(|p| p.name().contains("lora_B")) {
            let value = Array::generate(p.shape(), DType::F64, |i| (i as f64 * 0.7).sin() * 0.3);
            p.set(value.to(device).unwrap()).unwrap();
        }
        let params: Vec<Param> = model.params().all().into_iter().filter(|p| p.trainable()).collect();
        assert_eq!(params.len(), 16);
        let (x, y) = tokens(3, 1);
        check::per_sample(&|| model.losses(&x, &y, &Ctx::eval()), &params, 1, 1e-9).unwrap();
    }
}

/// Files are PEFT's; what was saved is what is loaded, and the base model is saved without adapters.
#[test]
fn adapters_are_saved_under_pefts_names() {
    let dir = Scratch::new("lora");
    let mut model = gpt(2, true, DType::F32, &Device::Cpu);
    assert!(model.save_lora(&*dir).unwrap_err().to_string().contains("add_lora"));
    model.add_lora(&LoraConfig::new(2, 4.0, &["c_attn"])).unwrap();
    train(&model, true, 2);
    model.save_lora(&*dir).unwrap();
    let names: Vec<String> =
        prismgrad::io::load_arrays(dir.join("adapter_model.safetensors")).unwrap().into_iter().map(|a| a.0).collect();
    assert!(names.contains(&"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight".to_string()), "{names:?}");
    assert_eq!(names.len(), 4);
    let config = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        (&config["peft_type"], &config["r"], &config["fan_in_fan_out"]),
        (&"LORA".into(), &2.into(), &true.into())
    );
    let mut other = gpt(2, true, DType::F32, &Device::Cpu);
    other.load_lora(&*dir).unwrap();
    assert_eq!(logits(&other), logits(&model));
    model.save(&*dir).unwrap();
    let whole = prismgrad::io::load_arrays(dir.join("model.safetensors")).unwrap();
    assert!(whole.iter().all(|(n, _)| !n.contains("lora_")));
    let plain = Gpt::load(&*dir).unwrap();
    assert_eq!(logits(&plain), logits(&gpt(2, true, DType::F32, &Device::Cpu)));
    std::fs::remove_file(dir.join("adapter_model.safetensors")).unwrap();
    // Every way to fail leaves the model as it was, so that it trains on as before and takes adapters afterwards.
    let tensors = |shape: &[usize], layers: usize| {
        let name = |l: usize, m: &str| format!("base_model.model.transformer.h.{l}.attn.c_attn.lora_{m}.weight");
        let ab = |l: usize| {
            [(name(l, "A"), Array::zeros(&[2, 8], DType::F32)), (name(l, "B"), Array::zeros(shape, DType::F32))]
        };
        (0..layers).flat_map(ab).collect::<Vec<_>>()
    };
    let (weights, config) = (dir.join("adapter_model.safetensors"), dir.join("adapter_config.json"));
    let written = std::fs::read_to_string(&config).unwrap();
    type Wrong<'a> = (&'a str, Vec<(String, Array)>, String, &'a str);
    let cases: [Wrong; 5] = [
        ("no file", vec![], written.clone(), "adapter_model"),
        ("shape", tensors(&[24, 3], 2), written.clone(), "[24, 3]"),
        ("missing", tensors(&[24, 2], 1), written.clone(), "h.1.attn.c_attn"),
        ("no such layer", tensors(&[24, 2], 2), written.replace("c_attn", "q_proj"), "q_proj"),
        ("rank", tensors(&[24, 2], 2), written.replace("\"r\": 2", "\"r\": 0"), "rank 0"),
    ];
    for (what, file, text, why) in cases {
        if !file.is_empty() {
            prismgrad::io::save_arrays(&weights, &file, &[]).unwrap();
        }
        std::fs::write(&config, &text).unwrap();
        let mut failed = gpt(2, true, DType::F32, &Device::Cpu);
        failed.params().train_only(&["*.bias", "wte*"]).unwrap();
        let state = |m: &Gpt| {
            let all = m.params().all();
            let each = all.iter().map(|p| (p.name().to_string(), p.trainable(), p.value().to_f64()));
            (each.collect::<Vec<_>>(), logits(m))
        };
        let before = state(&failed);
        let e = failed.load_lora(&*dir).unwrap_err().to_string();
        assert!(e.contains(why), "{what}: {e}");
        assert_eq!(state(&failed), before, "{what}");
        assert!(failed.save_lora(&*dir).is_err(), "{what}: it has no adapters");
        assert_eq!(failed.add_lora(&LoraConfig::new(2, 4.0, &["c_attn"])).unwrap(), 2, "{what}");
    }
    // A loaded model draws initial values for what is added to it.
    let mut plain = plain;
    plain.add_lora(&LoraConfig::new(2, 4.0, &["c_attn"])).unwrap();
    let drawn = plain.params().get("h.0.attn.c_attn.lora_A.weight").unwrap();
    assert!(drawn.value().to_f64().iter().any(|x| *x != 0.0));
    let e =
        gpt(2, true, DType::F32, &Device::Cpu).add_lora(&LoraConfig::new(2, 4.0, &["q_proj"])).unwrap_err().to_string();
    assert!(e.contains("q_proj") && e.contains("c_attn"), "{e}");
    assert!(model.add_lora(&LoraConfig::new(2, 4.0, &["c_attn"])).is_err(), "twice");
    assert!(gpt(2, true, DType::F32, &Device::Cpu).add_lora(&LoraConfig::new(0, 4.0, &["c_attn"])).is_err());
}

/// Biases alone: everything else keeps its bits, private or not.
#[test]
fn biases_alone() {
    let model = gpt(2, true, DType::F32, &Device::Cpu);
    let trained = model.params().train_only(&["*.bias"]).unwrap();
    assert_eq!(trained, 2 * 6 + 1, "six in a block, one in the last norm");
    let before = base(&model);
    train(&model, true, 2);
    for ((name, a), (_, b)) in before.iter().zip(base(&model)) {
        assert_eq!(*a != b, name.ends_with(".bias"), "{name}");
    }
    assert!(model.params().train_only(&["*.bias", "nothing"]).unwrap_err().to_string().contains("nothing"));
}
