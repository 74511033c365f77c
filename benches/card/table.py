"""Prints a table of a card's results: table.py FOLDER (with prismgrad.jsonl, torch.jsonl and card.txt)."""
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])


def lines(name):
    path = folder / name
    return [json.loads(l) for l in path.read_text().splitlines() if l.startswith("{")] if path.exists() else []


ours = {l["case"].removesuffix("/f32"): l for l in lines("prismgrad.jsonl")}
theirs = {}
for l in lines("torch.jsonl"):
    name, _, how = l["case"].partition("@")
    theirs.setdefault(name, {})[how or "eager"] = l
print(f"Card: {(folder / 'card.txt').read_text().strip()}\n")
print("f32 without tf32, ms: median (best). Ratio: ours over the best of PyTorch's.\n")
print("| case | Prismgrad | share of ceiling | PyTorch | ratio |\n|---|---|---|---|---|")
for name, l in ours.items():
    other = min(theirs.get(name, {}).items(), key=lambda x: x[1]["median_ms"], default=None)
    share = f"{l['ceiling_share']:.2f}" if "ceiling_share" in l else ""
    cells = [name, f"{l['median_ms']:.3f} ({l['min_ms']:.3f})", share, "", ""]
    if other:
        cells[3] = f"{other[1]['median_ms']:.3f} ({other[1]['min_ms']:.3f}) {other[0]}"
        cells[4] = f"{l['median_ms'] / other[1]['median_ms']:.2f}"
    print("| " + " | ".join(cells) + " |")
