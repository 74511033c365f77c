"""Runs TextAttack 0.3.11 with the model, the texts and the candidates of `examples/robustness.rs`, and measures its time.

Set-up (Python 3.10 to 3.12; about 3 GB, because torch comes with CUDA):

    python3 -m venv ta && ta/bin/pip install torch 'transformers<5' 'datasets<4' 'huggingface_hub<1' textattack==0.3.11
    cargo run --release --example robustness -- --export target/robustness-export
    ta/bin/python benches/peers/textattack_verdicts.py target/robustness-export tests/data/robustness
    ta/bin/python benches/peers/textattack_verdicts.py target/robustness-export --time target/release/examples/robustness

The first call of the script writes verdicts and query counts, which tests/systems/robustness.rs compares with ours. The second one times both
programs in turn, in five rounds. Nothing of TextAttack is changed, except that equal importances are ordered by position: its own sort is
not stable, so that their order is not defined.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TA_CACHE_DIR", os.path.join(tempfile.gettempdir(), "ta-cache"))
# On import TextAttack would download a list of stop words; it gets ours instead.
EXPORT = json.loads((Path(sys.argv[1]) / "texts.json").read_text())
NLTK = Path(tempfile.mkdtemp()) / "corpora" / "stopwords"
NLTK.mkdir(parents=True)
(NLTK / "english").write_text("\n".join(EXPORT["stop_words"]) + "\n")
os.environ["NLTK_DATA"] = str(NLTK.parent.parent)

import numpy as np
import torch
from safetensors.torch import load_file
from textattack.attack import Attack
from textattack.constraints.pre_transformation import RepeatModification, StopwordModification
from textattack.goal_functions import UntargetedClassification
from textattack.goal_function_results import GoalFunctionResultStatus
from textattack.models.wrappers import ModelWrapper
from textattack.search_methods import GreedyWordSwapWIR
from textattack.search_methods import greedy_word_swap_wir
from textattack.shared import AttackedText
from textattack.transformations.word_swaps import WordSwap


class Stable(np.ndarray):
    """An array whose argsort keeps the order of equal elements."""

    def argsort(self, *args, **kwargs):
        return np.asarray(self).argsort(kind="stable")


class StableNumpy:
    """numpy, except that its arrays are sorted stably."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def array(*args, **kwargs):
        return np.array(*args, **kwargs).view(Stable)


greedy_word_swap_wir.np = StableNumpy()


class Bag(ModelWrapper):
    """The bag of embeddings: mean of the rows, a hidden layer with ReLU, the classes."""

    def __init__(self, folder):
        self.model = None
        self.tokenizer = None
        described = json.loads((folder / "model.json").read_text())
        self.ids = {w: i + 1 for i, w in enumerate(described["words"])}
        self.weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}

    def __call__(self, texts):
        rows = [[self.ids.get(w.lower(), 0) for w in AttackedText(t).words] for t in texts]
        ids = torch.tensor([i for r in rows for i in r])
        starts = torch.tensor([0] + [len(r) for r in rows]).cumsum(0)[:-1]
        w = self.weights
        with torch.no_grad():
            x = torch.nn.functional.embedding_bag(ids, w["table.weight"], starts, mode="mean")
            x = torch.relu(x @ w["hidden.weight"].T + w["hidden.bias"])
            return x @ w["out.weight"].T + w["out.bias"]


class Given(WordSwap):
    """The candidates of a file, by position in the original text."""

    def __init__(self):
        super().__init__()
        self.candidates = None

    def _get_replacement_words(self, word):
        raise NotImplementedError

    def _get_transformations(self, current_text, indices_to_modify):
        found = []
        for i in sorted(indices_to_modify):
            for candidate in self.candidates[i]:
                found.append(current_text.replace_word_at_index(i, candidate))
        return found


def attacker(model, stop_words, method):
    given = Given()
    attack = Attack(
        UntargetedClassification(model, query_budget=2000),
        [RepeatModification(), StopwordModification(stopwords=set(stop_words))],
        given,
        GreedyWordSwapWIR(wir_method=method),
    )
    return attack, given


METHODS = {"pwws": "weighted-saliency", "deepwordbug": "unk"}


def run(attack, given, name, text):
    given.candidates = text["candidates"][name]
    # A transformation's results are cached by text; candidates depend on the text alone, so cached results stay valid.
    result = attack.attack(text["text"], text["label"])
    after = result.perturbed_result
    broken = after.goal_status == GoalFunctionResultStatus.SUCCEEDED
    skipped = result.original_result.goal_status == GoalFunctionResultStatus.SKIPPED
    return ("wrong" if skipped else "broken" if broken else "stood", after.num_queries)


def main():
    folder = Path(sys.argv[1])
    data = EXPORT
    model = Bag(folder)
    torch.set_num_threads(2)
    if sys.argv[2] == "--time":
        ratios = {name: [] for name in METHODS}
        for _ in range(5):
            ours = json.loads(subprocess.run([sys.argv[3], "--timing", str(folder)], check=True, capture_output=True).stdout)
            for name, method in METHODS.items():
                attack, given = attacker(model, data["stop_words"], method)
                start = time.perf_counter()
                # A quarter of the texts is enough, because they run one after the other and take about the same time each.
                some = data["texts"][:50]
                for text in some:
                    run(attack, given, name, text)
                theirs = (time.perf_counter() - start) / len(some)
                ratios[name].append(theirs / ours[name])
                print(f"{name}: TextAttack {1e3 * theirs:.2f} ms a text, ours {1e3 * ours[name]:.4f} ms: {theirs / ours[name]:.0f} times", flush=True)
        for name, r in ratios.items():
            print(f"{name}: median ratio {sorted(r)[len(r) // 2]:.0f}, least {min(r):.0f}")
        return
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    found = {"textattack": version("textattack")}
    for name, method in METHODS.items():
        attack, given = attacker(model, data["stop_words"], method)
        found[name] = [run(attack, given, name, text) for text in data["texts"]]
        counts = {v: sum(1 for f in found[name] if f[0] == v) for v in ("wrong", "broken", "stood")}
        print(name, counts, sum(f[1] for f in found[name]), "queries")
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in found.items())
    (out / "textattack.json").write_text("{\n" + lines + "\n}\n")
    for name in ("model.safetensors", "model.json"):
        if (folder / name).resolve() != (out / name).resolve():
            shutil.copy(folder / name, out / name)


main()
