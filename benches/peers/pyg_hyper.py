"""One layer of HyTrel in the scatter form of PyTorch Geometric, on the same input as the case `hyper/grid`.

    python3 -m venv venv && venv/bin/pip install torch torch_geometric
    venv/bin/python benches/peers/pyg_hyper.py [seconds]

256 tables of 11 x 6 cells, width 128, 4 heads: attention from cells to the hyperedges of tables, columns, rows and cells, fusion, and attention
back to the cells; forwards and backwards. Rows are gathered by incidence, and softmax and sums are scatters, as in the package. Prints one
JSON line in the format of `cargo run --release --example bench_cases -- hyper/grid`; run both in turn on one machine.
"""

import json
import os
import resource
import sys
import time

THREADS = int(os.environ.get("BENCH_THREADS", "2"))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
import torch
import torch_geometric
from torch import nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import softmax

torch.set_num_threads(THREADS)
torch.manual_seed(0)
TABLES, ROWS, COLUMNS, D, HEADS = 256, 11, 6, 128, 4


class SetAttention(MessagePassing):
    def __init__(self):
        super().__init__(aggr="sum", node_dim=0)
        self.key, self.value = nn.Linear(D, D), nn.Linear(D, D)
        self.seed = nn.Parameter(torch.randn(HEADS, D // HEADS) * 0.1)
        self.ln_0, self.ln_1, self.ln_f = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D, eps=1e-12)
        self.fc, self.proj = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x, pairs, targets):
        score = (self.key(x).view(-1, HEADS, D // HEADS) * self.seed).sum(-1)
        value = self.value(x).view(-1, HEADS, D // HEADS)
        o = self.propagate(pairs, x=(value, None), alpha=(F.leaky_relu(score, 0.2), None), size=(len(x), targets))
        u = self.ln_0((o + self.seed).view(-1, D))
        f = self.ln_f(u + self.proj(F.gelu(self.fc(u))))
        return self.ln_1(u + F.relu(f))

    def message(self, x_j, alpha_j, index, size_i):
        return x_j * softmax(alpha_j, index, num_nodes=size_i).unsqueeze(-1)


class HyperTrans(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_edges, self.to_nodes, self.fuse = SetAttention(), SetAttention(), nn.Linear(2 * D, D)

    def forward(self, x, e, pairs):
        m = F.relu(self.to_edges(x, pairs, len(e)))
        e = self.fuse(torch.cat([e, m], 1))
        return F.relu(self.to_nodes(e, pairs.flip(0), len(x))), e


def incidences():
    nodes, edges, cells, sets = [], [], ROWS * COLUMNS, 1 + ROWS + COLUMNS
    for t in range(TABLES):
        for r in range(ROWS):
            for c in range(COLUMNS):
                v = t * cells + r * COLUMNS + c
                nodes += [v] * 4
                edges += [t * sets, t * sets + 1 + c, t * sets + 1 + COLUMNS + r, TABLES * sets + v]
    return torch.tensor([nodes, edges]), TABLES * cells, TABLES * (sets + cells)


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    pairs, n, m = incidences()
    layer = HyperTrans()
    x, e = torch.randn(n, D, requires_grad=True), torch.randn(m, D, requires_grad=True)
    gx, ge = torch.randn(n, D), torch.randn(m, D)

    def step():
        layer.zero_grad(set_to_none=True)
        x.grad = e.grad = None
        torch.autograd.backward(layer(x, e, pairs), [gx, ge])

    for _ in range(3):
        step()
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 5:
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    times.sort()
    print(json.dumps({
        "tool": "pyg", "version": f"{torch_geometric.__version__}, torch {torch.__version__}", "case": "hyper/grid", "device": "cpu",
        "median_ms": times[len(times) // 2], "min_ms": times[0], "p90_ms": times[len(times) * 9 // 10], "reps": len(times),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "threads": THREADS,
        "tables_per_s": TABLES / times[len(times) // 2] * 1e3,
    }))


if __name__ == "__main__":
    main()
