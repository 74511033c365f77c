"""The attacks of docs/privacy.md on Opacus, measured.

    python3 -m venv venv && venv/bin/pip install torch opacus==1.6.0
    venv/bin/python benches/peers/opacus_attacks.py

Every line of output is one attack on a single private step with the clipping bound R = 1. It says how far one record changes the sum to
which noise is added, in multiples of R, or what the released numbers reveal. tests/engine/sensitivity.rs, tests/private/independence.rs and
tests/private/privacy.rs run the same attacks on Prismgrad. Losses are summed over the batch, so that no division hides the sensitivity.
"""

import json
import warnings

warnings.filterwarnings("ignore")
import torch
from torch import nn
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

torch.set_num_threads(2)


def clipped_sum(model, x, loss_of, batch):
    """The clipped sum of one step with noise 0, which is the sum that noise would be added to."""
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=batch,
        loss_reduction="sum",
    )
    loss_of(module, x).sum().backward()
    optimizer.pre_step()
    flat = torch.cat([p.grad.flatten() for p in module.parameters()]).clone()
    module.remove_hooks()
    return flat


def ghost_sum(model, x, y):
    module = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum")
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=len(x),
        loss_reduction="sum",
    )
    criterion = DPLossFastGradientClipping(module, optimizer, nn.MSELoss(reduction="sum"), loss_reduction="sum")
    loss = criterion(module(x).flatten(), y.flatten() / 2, shape=(len(x), x[0].numel()))
    loss.backward()
    optimizer.pre_step()
    flat = torch.cat([p.grad.flatten() for p in module.parameters()]).clone()
    module.remove_hooks()
    return flat


def cancelling_rows(scale, tries=60):
    """The worst of several records with two rows whose outer products nearly cancel; ghost norms are inner products in f32."""
    return max(cancelling_record(scale, seed) for seed in range(tries))


def cancelling_record(scale, seed):
    torch.manual_seed(seed)
    d = 128
    model = nn.Linear(d, d, bias=False)
    nn.init.zeros_(model.weight)
    u, v, w = (torch.nn.functional.normalize(torch.randn(d), dim=0) for _ in range(3))
    x = torch.stack([u * scale, u * scale + 0.5 * w])[None]
    # With weight 0 the gradient of the output is −y.
    y = torch.stack([v * scale, -v * scale])[None]
    norm = ghost_sum(model, x, y).norm().item()
    return norm if norm == norm else float("inf")


def moved(between, records=24):
    """The change of the clipped sum when one record is removed, for two linear layers with `between` after the first."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(between(self.a(x)))

    torch.manual_seed(2)
    model, x = Model(), torch.randn(records, 6)
    x[-1] *= 30.0
    loss = lambda m, x: m(x).square().sum(1)
    return (clipped_sum(model, x, loss, records) - clipped_sum(model, x[:-1], loss, records)).norm().item()


def loss_per_token(tokens=32):
    """Records of 32 tokens that the model treats as rows, each of which is clipped by itself."""
    torch.manual_seed(3)
    model = nn.Linear(8, 8)
    x = torch.randn(1, tokens, 8) + 3.0
    loss = lambda m, x: m(x.reshape(-1, 8)).square().sum(1)
    return clipped_sum(model, x, loss, 1).norm().item()


def tokens_from_low_bits(std=1.74, vocabulary=2000, width=32, batch=24, length=16):
    """The rows of an embedding that a batch used, found from the released gradient alone by elements that no rounded std·z can be."""
    torch.manual_seed(4)
    model = nn.Embedding(vocabulary, width)
    ids = torch.randint(0, vocabulary, (batch, length))
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=std,
        max_grad_norm=1.0,
        expected_batch_size=batch,
        loss_reduction="sum",
    )
    (module(ids) * torch.randn(batch, length, width)).sum().backward()
    optimizer.pre_step()
    released = next(module.parameters()).grad
    s = torch.tensor(std, dtype=torch.float32)
    z = released / s
    possible = torch.zeros_like(released, dtype=torch.bool)
    for step in (-2, -1, 0, 1, 2):
        bits = z.view(torch.int32) + step
        possible |= bits.view(torch.float32) * s == released
    touched = (~possible).any(1)
    truth = torch.zeros(vocabulary, dtype=torch.bool)
    truth[ids.flatten()] = True
    return (touched & truth).sum().item(), truth.sum().item(), (touched & ~truth).sum().item()


def noise_again():
    """Two steps on different data whose generators start in the same state, so that their difference has no noise."""

    def release(shift):
        torch.manual_seed(5)
        model = nn.Linear(6, 6)
        x = torch.linspace(-1, 1, 48).reshape(8, 6) + shift
        module = GradSampleModule(model, loss_reduction="sum")
        generator = torch.Generator().manual_seed(9)
        optimizer = DPOptimizer(
            torch.optim.SGD(module.parameters(), lr=1.0),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=8,
            loss_reduction="sum",
            generator=generator,
        )
        module(x).square().sum().backward()
        optimizer.pre_step()
        noised = torch.cat([p.grad.flatten() for p in module.parameters()])
        clean = torch.cat([p.summed_grad.flatten() for p in module.parameters()])
        return noised, clean

    (a, c), (b, d) = release(0.0), release(0.7)
    return ((a - b) - (c - d)).abs().max().item()


def not_finite():
    """One record with an infinite loss, and what is left of the sum over the other records."""
    torch.manual_seed(6)
    model, x = nn.Linear(6, 6), torch.randn(8, 6)
    x[0, 0] = float("inf")
    return clipped_sum(model, x, lambda m, x: m(x).square().sum(1), 8).isfinite().float().mean().item()


def main():
    out = []

    def line(attack, opacus, prismgrad):
        out.append({"attack": attack, "opacus": opacus, "prismgrad": prismgrad})
        print(f"{attack:62} {opacus:42} {prismgrad}", flush=True)

    def guarded(f):
        try:
            return f()
        except Exception as e:
            return f"refused: {type(e).__name__}"

    times = lambda x: x if isinstance(x, str) else "not a number" if x == float("inf") else f"{x:.4g} R"
    for scale in (1.0, 100.0, 1e4):
        line(f"two rows of norm {scale:g} that cancel, ghost clipping", times(guarded(lambda: cancelling_rows(scale))), "at most 1.00001 R")
    for name, between in {
        "nothing between the layers (control)": lambda x: x,
        "the batch's mean taken off by hand": lambda x: x - x.mean(0, keepdim=True),
        "the batch's maximum taken off": lambda x: x - x.max(0, keepdim=True).values,
        "softmax over the batch": lambda x: x.softmax(0),
        "attention between records": lambda x: (x @ x.T).softmax(1) @ x,
    }.items():
        line(name, times(guarded(lambda: moved(between))), "at most 1 R" if "control" in name else "refused, with the operation's name")
    line("a loss for each of 32 tokens", times(guarded(loss_per_token)), "refused: one loss per record")
    found, there, wrong = tokens_from_low_bits()
    line("tokens of a batch from the released gradient", f"{found} of {there}, {wrong} wrong", "none: sum and noise lie on one grid")
    line("the same generator under other data, difference − clean one", f"{noise_again():.1e}", "noise follows from a digest of the sum")
    line("share of the sum that survives one record without a finite loss", f"{not_finite():.2f}", "1.00, and the record is counted")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
