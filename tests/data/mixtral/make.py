"""Writes the files beside it: a small Mixtral of random weights in both layouts, and what transformers makes of it.

    python3 -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==4.57.1 safetensors
    venv/bin/python tests/data/mixtral/make.py

`single/` is what `save_pretrained` writes. `stacked/` holds the same weights under the names of transformers 5, gate before up.
`golden.json` has logits, losses and each sample's squared gradient norm by parameter, in f64.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

here = pathlib.Path(__file__).parent
config = MixtralConfig(
    vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, rope_theta=1e4, num_local_experts=4, num_experts_per_tok=2,
    sliding_window=None, attn_implementation="eager",
)
torch.manual_seed(0)
model = MixtralForCausalLM(config).eval()
with torch.no_grad():
    for name, p in model.named_parameters():
        p.copy_(torch.randn_like(p) * 0.25 + (1.0 if "norm" in name else 0.0))
model.save_pretrained(here / "single")
for extra in (here / "single").iterdir():
    if extra.name not in ("config.json", "model.safetensors"):
        extra.unlink()

weights, stacked = load_file(here / "single" / "model.safetensors"), {}
for name, w in weights.items():
    if "block_sparse_moe" not in name:
        stacked[name] = w
for i in range(config.num_hidden_layers):
    old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
    stacked[f"{new}.gate.weight"] = weights[f"{old}.gate.weight"]
    all_of = lambda w: torch.stack([weights[f"{old}.experts.{e}.{w}.weight"] for e in range(config.num_local_experts)])
    stacked[f"{new}.experts.gate_up_proj"] = torch.cat([all_of("w1"), all_of("w3")], 1).contiguous()
    stacked[f"{new}.experts.down_proj"] = all_of("w2").contiguous()
(here / "stacked").mkdir(exist_ok=True)
save_file(stacked, here / "stacked" / "model.safetensors", metadata={"format": "pt"})
newer = json.loads((here / "single" / "config.json").read_text())
newer["rope_parameters"] = {"rope_theta": newer.pop("rope_theta"), "rope_type": "default"}
(here / "stacked" / "config.json").write_text(json.dumps(newer, indent=2) + "\n")

model = model.double()
ids = torch.randint(0, config.vocab_size, (3, 9))
targets = torch.randint(0, config.vocab_size, (3, 9))
parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
norms = {}
for b in range(3):
    model.zero_grad()
    logits = model(ids[b : b + 1]).logits
    torch.nn.functional.cross_entropy(logits[0], targets[b]).backward()
    for name, p in model.named_parameters():
        ours = name.removeprefix("model.")
        if ".experts." in ours:
            block, rest = ours.split(".block_sparse_moe.experts.")
            ours = f"{block}.moe.experts.{parts[rest.split('.')[1]]}.weight"
        ours = ours.replace("block_sparse_moe.gate", "moe.router")
        square = 0.0 if p.grad is None else float((p.grad**2).sum())
        norms.setdefault(ours, [0.0] * 3)[b] += square
with torch.no_grad():
    logits = model(ids).logits
losses = [float(torch.nn.functional.cross_entropy(logits[b], targets[b])) for b in range(3)]
text = model.generate(ids[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 4:]
golden = {
    "ids": ids.tolist(), "targets": targets.tolist(), "logits": [round(x, 9) for x in logits.flatten().tolist()],
    "losses": losses, "square_norms": norms, "greedy": text.tolist(),
}
(here / "golden.json").write_text(json.dumps(golden) + "\n")
