"""Writes tests/data/mergekit.safetensors: a small model, two models tuned from it, and mergekit's merges of them.

    python3 -m venv venv && venv/bin/pip install mergekit==0.1.5
    venv/bin/python benches/peers/mergekit_golden.py

Each method runs through mergekit's own entry point with its defaults, in float32, on folders on disk. Only one part is replaced: the random
mask of DARE is drawn here as the crate draws it (Philox of seed, model, tensor, element), so that what mergekit computes with a mask can be
compared: rescaling, election of signs, sums. Tensors are named CASE/NAME; base, a and b are the models.
"""

import json
import os
import tempfile
from importlib.metadata import version

import torch
from mergekit import sparsify
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import generalized_task_arithmetic as gta
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

SEED, WIDTH, HIDDEN, VOCAB = 7, 8, 12, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB, "hidden_act": "silu",
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH),
    LAYER + "input_layernorm.weight": (WIDTH,), LAYER + "post_attention_layernorm.weight": (WIDTH,),
    **{LAYER + f"self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"},
    **{LAYER + f"mlp.{p}_proj.weight": (HIDDEN, WIDTH) for p in ("gate", "up")},
    LAYER + "mlp.down_proj.weight": (WIDTH, HIDDEN),
}


def uniform(stream, index):
    """Element `index` of the crate's random stream: 53 bits of Philox 4x32-10 (Salmon et al. 2011)."""
    mask = 0xFFFFFFFF
    block = index // 2
    c, k = [block & mask, block >> 32, stream & mask, stream >> 32], [SEED & mask, SEED >> 32]
    for r in range(10):
        if r:
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
    h = 2 * (index % 2)
    return ((c[h] | c[h + 1] << 32) >> 11) / 2.0**53


def fnv(text):
    h = 0xCBF29CE484222325
    for b in text.encode():
        h = ((h ^ b) * 0x100000001B3) % 2**64
    return h


place = {"tensor": "", "model": 0}
merge_group = gta.GeneralizedTaskArithmeticMerge.merge_group


def named(self, group, /, **parameters):
    assert group.metadata.name in SHAPES, group.metadata
    place.update(tensor=group.metadata.name, model=0)
    return merge_group(self, group, **parameters)


def drawn(tensor, density, rescale_norm=None):
    stream = fnv(f"{place['model']}/{place['tensor']}")
    place["model"] += 1
    keep = [float(uniform(stream, i) < density) for i in range(tensor.numel())]
    return sparsify.rescaled_masked_tensor(tensor, torch.tensor(keep).reshape(tensor.shape), rescale_norm)


gta.GeneralizedTaskArithmeticMerge.merge_group = named
sparsify.bernoulli = drawn

CASES = {
    "linear": dict(merge_method="linear", weights=[0.7, 0.5]),
    "linear_plain": dict(merge_method="linear", weights=[0.7, 0.5], parameters={"normalize": False}),
    "task_arithmetic": dict(merge_method="task_arithmetic", weights=[0.7, -0.4], parameters={"lambda": 0.8}),
    "ties": dict(merge_method="ties", weights=[0.7, 0.5], densities=[0.3, 0.6]),
    "ties_plain": dict(merge_method="ties", weights=[1.0, 1.0], densities=[0.5, 0.5], parameters={"normalize": False, "lambda": 1.5}),
    "dare_linear": dict(merge_method="dare_linear", weights=[0.7, 0.5], densities=[0.4, 0.8]),
    "dare_ties": dict(merge_method="dare_ties", weights=[0.7, 0.5], densities=[0.4, 0.8]),
    "dare_ties_plain": dict(
        merge_method="dare_ties", weights=[0.7, 0.5], densities=[0.4, 0.8], parameters={"rescale": False, "normalize": True}
    ),
}


def main():
    torch.manual_seed(SEED)
    base = {n: torch.randn(s) * 0.3 for n, s in SHAPES.items()}
    models = {"base": base}
    for name in ("a", "b"):
        models[name] = {n: t + torch.randn(t.shape) * 0.05 for n, t in base.items()}
    golden = {f"{m}/{n}": t for m, tensors in models.items() for n, t in tensors.items()}
    recipes = {}
    with tempfile.TemporaryDirectory() as folder:
        for m, tensors in models.items():
            os.makedirs(f"{folder}/{m}")
            save_file(tensors, f"{folder}/{m}/model.safetensors", {"format": "pt"})
            with open(f"{folder}/{m}/config.json", "w") as f:
                json.dump(CONFIG, f)
        for case, c in CASES.items():
            densities = c.get("densities", [None, None])
            entries = []
            for m, w, d in zip("ab", c["weights"], densities):
                entries.append({"model": m, "parameters": {"weight": w, **({"density": d} if d else {})}})
            recipe = {"merge_method": c["merge_method"], "models": entries, "dtype": "float32"}
            if c["merge_method"] != "linear":
                recipe["base_model"] = "base"
            if "parameters" in c:
                recipe["parameters"] = c["parameters"]
            recipes[case] = recipe
            here = json.loads(json.dumps(recipe))
            for e in here["models"]:
                e["model"] = f"{folder}/{e['model']}"
            if "base_model" in here:
                here["base_model"] = f"{folder}/base"
            out = f"{folder}/out-{case}"
            run_merge(MergeConfiguration.model_validate(here), out, options=MergeOptions(copy_tokenizer=False, cuda=False))
            merged = {}
            for f in os.listdir(out):
                if f.endswith(".safetensors"):
                    merged.update(load_file(f"{out}/{f}"))
            assert merged.keys() == base.keys(), case
            golden.update({f"{case}/{n}": t.contiguous() for n, t in merged.items()})
    where = os.path.join(os.path.dirname(__file__), "..", "..", "tests", "data")
    os.makedirs(where, exist_ok=True)
    about = {"mergekit": version("mergekit"), "torch": torch.__version__, "seed": str(SEED), "recipes": json.dumps(recipes)}
    save_file(golden, os.path.join(where, "mergekit.safetensors"), about)


main()
