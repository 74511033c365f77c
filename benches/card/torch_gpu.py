"""Runs the cases of bench_cases with PyTorch on the card, in f32 with tf32 off. Prints one JSON line each (case, or case@compile)."""
import json, time
import torch, torch.nn.functional as F

torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(0)
dev = "cuda"


def bench(case, step, seconds=2.0):
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, begin = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        t = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - t))
    times.sort()
    line = dict(tool="torch", version=torch.__version__, case=case, median_ms=times[len(times) // 2], min_ms=times[0],
                reps=len(times), peak_device_mb=torch.cuda.max_memory_allocated() >> 20)
    print(json.dumps(line), flush=True)


class Block(torch.nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = torch.nn.LayerNorm(d), torch.nn.LayerNorm(d)
        self.qkv, self.proj = torch.nn.Linear(d, 3 * d), torch.nn.Linear(d, d)
        self.up, self.down = torch.nn.Linear(d, 4 * d), torch.nn.Linear(4 * d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Gpt(torch.nn.Module):
    def __init__(self, vocab, t, layers, d, heads, tied):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(vocab, d), torch.nn.Embedding(t, d)
        self.blocks = torch.nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.ln, self.head = torch.nn.LayerNorm(d), torch.nn.Linear(d, vocab, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, x, y):
        h = self.wte(x) + self.wpe.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.ln(h)).flatten(0, 1), y.flatten())


def gpt(name, vocab, t, layers, d, heads, tied):
    for how in ("", "@compile"):
        model = Gpt(vocab, t, layers, d, heads, tied).to(dev)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        x, y = torch.randint(vocab, (8, t), device=dev), torch.randint(vocab, (8, t), device=dev)
        run = torch.compile(model) if how else model

        def step():
            opt.zero_grad(set_to_none=True)
            run(x, y).backward()
            opt.step()

        try:
            bench(f"gpt/{name}{how}", step)
        except Exception as e:  # there may be no compiler or not enough memory; the other cases still run
            print(json.dumps(dict(tool="torch", case=f"skipped {name}{how}", median_ms=9e9, min_ms=9e9, why=str(e)[:200])))
        del model, opt
        torch.cuda.empty_cache()


for m, k, n in ((1024, 1024, 1024), (4096, 768, 3072), (2048, 256, 1024)):
    a, b = torch.rand(m, k, device=dev), torch.rand(k, n, device=dev)
    bench(f"gemm/{m}x{k}x{n}", lambda: a @ b, 1.0)
gpt("S", 512, 256, 4, 256, 4, False)
gpt("M", 4096, 256, 6, 384, 6, False)
gpt("124M", 50257, 1024, 12, 768, 12, True)
x, y = torch.rand(16384, 1024, device=dev), torch.rand(16384, 1024, device=dev)
w, b = torch.ones(1024, device=dev), torch.zeros(1024, device=dev)
for name, f in (("copy", lambda: x.clone()), ("add", lambda: x + y), ("gelu", lambda: F.gelu(x)), ("sum", lambda: x.sum()),
                ("softmax", lambda: x.softmax(-1)), ("layernorm", lambda: F.layer_norm(x, (1024,), w, b))):
    bench(f"elt/{name}", f, 0.5)
for name, f in (("gelu", F.gelu), ("softmax", lambda v: v.softmax(-1)), ("layernorm", lambda v: F.layer_norm(v, (1024,), w, b))):
    leaf = x.detach().requires_grad_()
    out = f(leaf)
    bench(f"elt/{name}_bwd", lambda: torch.autograd.grad(out, leaf, y, retain_graph=True), 0.5)
q, k, v, g = (torch.rand(1, 8, 2048, 64, device=dev, requires_grad=True) for _ in range(4))
bench("attn/causal_fwd", lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), is_causal=True), 0.5)
bench("attn/causal", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(g.detach()), 0.5)
