//! Mixtral beside Hugging Face's transformers: `tests/data/mixtral/make.py` wrote the files and the golden numbers.

use crate::common::mixtral::mixtral;
use crate::common::scratch::Scratch;
use prismgrad::io::{load_arrays, save_arrays};
use prismgrad::models::{Mixtral, MixtralConfig, Sampling, generate};
use prismgrad::nn::Ctx;
use prismgrad::{Array, check};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/mixtral")
}

#[derive(serde::Deserialize)]
struct Golden {
    ids: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
    logits: Vec<f64>,
    losses: Vec<f64>,
    square_norms: BTreeMap<String, Vec<f64>>,
    greedy: Vec<u32>,
}

fn golden() -> Golden {
    serde_json::from_str(&std::fs::read_to_string(data().join("golden.json")).unwrap()).unwrap()
}

fn ids(rows: &[Vec<u32>]) -> Array {
    Array::from_slice(&rows.concat(), &[rows.len(), rows[0].len()]).unwrap()
}

fn near(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}, element {i}: {g}, not {w}");
    }
}

#[test]
fn both_layouts_give_transformers_numbers() {
    let g = golden();
    let (x, y) = (ids(&g.ids), ids(&g.targets));
    for layout in ["single", "stacked"] {
        let model = Mixtral::load(data().join(layout)).unwrap();
        near(&model.forward(&x, &Ctx::eval()).unwrap().array().to_f64(), &g.logits, 1e-5, layout);
        let losses = model.losses(&x, &y, &Ctx::eval()).unwrap();
        near(&losses.array().to_f64(), &g.losses, 1e-5, "losses");
        let grads = losses.backward().unwrap();
        let all = model.params().all();
        assert_eq!(all.len(), g.square_norms.len());
        for p in &all {
            let want = &g.square_norms[p.name()];
            near(&grads.param(p).unwrap().sample_sq_norms().unwrap(), want, 1e-4, p.name());
        }
        // With a cache, token by token.
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let text = generate(&model, &g.ids[0][..4], g.greedy.len(), &greedy, None).unwrap();
        assert_eq!(text, g.greedy, "{layout}");
    }
}

#[test]
fn what_is_written_is_what_transformers_wrote() {
    let folder = Scratch::new("mixtral-write");
    Mixtral::load(data().join("stacked")).unwrap().save(&*folder).unwrap();
    let sorted = |path: PathBuf| {
        let mut all = load_arrays(path).unwrap();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all.into_iter().map(|(n, a)| (n, a.shape().to_vec(), a.to_f64())).collect::<Vec<_>>()
    };
    assert!(sorted(folder.join("model.safetensors")) == sorted(data().join("single/model.safetensors")));
    let again = Mixtral::load(&*folder).unwrap();
    assert_eq!(again.config().rope_theta, 1e4);
}

/// In f64, per sample, with the balance loss of training.
#[test]
fn per_sample_gradients_are_those_of_each_sample_alone() {
    let config =
        MixtralConfig { sliding_window: Some(3), initializer_range: 0.3, tie_word_embeddings: true, ..mixtral() };
    let model = Mixtral::with_dtype(config, 3, prismgrad::DType::F64).unwrap();
    let (x, y) = (ids(&[vec![1, 5, 7, 2, 9], vec![3, 3, 8, 11, 0]]), ids(&[vec![5, 7, 2, 9, 1], vec![3, 8, 11, 0, 4]]));
    check::per_sample(&|| model.losses(&x, &y, &Ctx::train(0)), &model.params().all(), 1, 1e-9).unwrap();
}

/// Changes a file's tensors and its configuration.
type Change<'a> = &'a dyn Fn(&mut Vec<(String, Array)>, &mut serde_json::Value);

#[test]
fn a_file_that_does_not_fit_is_told_by_name() {
    let edit = |layout: &str, change: Change| {
        let folder = Scratch::new("mixtral-edit");
        let from = data().join(layout);
        let mut tensors = load_arrays(from.join("model.safetensors")).unwrap();
        let mut config = serde_json::from_str(&std::fs::read_to_string(from.join("config.json")).unwrap()).unwrap();
        change(&mut tensors, &mut config);
        save_arrays(folder.join("model.safetensors"), &tensors, &[]).unwrap();
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        Mixtral::load(&*folder).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let says = |got: String, words: &[&str]| {
        words.iter().for_each(|w| assert!(got.contains(w), "{got:?} does not mention {w:?}"));
    };
    let at = |t: &[(String, Array)], name: &str| t.iter().position(|(n, _)| n.contains(name)).unwrap();
    says(edit("single", &|t, _| drop(t.remove(at(t, "experts.2.w3")))), &["experts.2.w3.weight is missing"]);
    says(
        edit("single", &|t, _| {
            let (a, b) =
                (at(t, "layers.1.block_sparse_moe.experts.0.w1"), at(t, "layers.1.block_sparse_moe.experts.0.w2"));
            let (one, two) = (t[a].1.clone(), t[b].1.clone());
            (t[a].1, t[b].1) = (two, one);
        }),
        &["experts.0.w1.weight is [16, 20], the model's is [20, 16]", "experts.0.w2.weight is [20, 16]"],
    );
    says(
        edit("stacked", &|t, _| {
            t.push(("model.layers.0.mlp.experts.extra".into(), Array::zeros(&[1], prismgrad::DType::F32)))
        }),
        &["mlp.experts.extra is in the file, but not in the model"],
    );
    says(edit("stacked", &|t, _| drop(t.remove(at(t, "gate_up_proj")))), &["gate_up_proj is missing"]);
    for layout in ["single", "stacked"] {
        says(
            edit(layout, &|_, c| c["num_local_experts"] = 8.into()),
            &["it has 4 experts in layer 0, config.json says 8"],
        );
    }
    says(edit("single", &|_, c| c["num_experts_per_tok"] = 5.into()), &["top_k 5 of 4 experts"]);
    says(edit("single", &|_, c| c["num_key_value_heads"] = 3.into()), &["4 heads of queries", "3 heads of keys"]);
    says(edit("single", &|_, c| c["hidden_act"] = "gelu".into()), &["gelu", "silu"]);
    assert_eq!(edit("single", &|_, _| ()), "");
}
