"Products of matrices: the ladder of the chapter in bfloat16, float8, few rows, each beside cuBLAS."
import statistics

import torch
import torch.nn.functional as F

from benchmarks.kernels import Case, Timer
from llm_workbench.kernels.matmul import Config, float8, matmul

BF16 = torch.bfloat16
LADDER = {   # the rungs of the chapter
    "rung 1: a tile a program": Config(128, 128, 64, stages=1, group=1, how="pointers"),
    "rung 2: grouped": Config(128, 128, 64, stages=1, how="pointers"),
    "rung 3: 3 stages": Config(128, 128, 64, stages=3, how="pointers"),
    "rung 3b: 3 stages, 128x256": Config(128, 256, 64, stages=3, how="pointers"),
    "rung 4: descriptors": Config(128, 256, 64, stages=3, how="tiles"),
    "rung 5: persistent": Config(128, 256, 64, stages=3),
    "rung 6: persistent, in halves": Config(128, 256, 64, stages=4, split=2)}
PEERS = {    # other cuts, so that the best is known
    "128x256x64 group 16": Config(128, 256, 64, stages=4, split=2, group=16),
    "128x256x64 group 4": Config(128, 256, 64, stages=4, split=2, group=4),
    "128x256x64 3 stages group 16": Config(128, 256, 64, stages=3, group=16),
    "128x256x128": Config(128, 256, 128, stages=2, split=2),
    "256x128x64 group 4": Config(256, 128, 64, stages=4, split=2, group=4),
    "256x128x64": Config(256, 128, 64, stages=4, split=2),
    "128x128x64, 2 a multiprocessor": Config(128, 128, 64, warps=4, stages=3, split=2, per_sm=2)}
FP8 = {"128x256x128 3 stages": Config(128, 256, 128, stages=3), "256x128x128": Config(256, 128, 128, stages=4, split=2),
       "128x256x128 3 stages group 16": Config(128, 256, 128, stages=3, group=16),
       "128x256x64": Config(128, 256, 64, stages=4, split=2),
       "128x256x128 group 16": Config(128, 256, 128, stages=4, split=2, group=16),
       "128x128x128, 2 a multiprocessor": Config(128, 128, 128, warps=4, stages=3, split=2, per_sm=2),
       "summed in float32": Config(128, 128, 128, stages=4, exact=True)}


def quickest(configs, run, samples=5):
    "The configuration with the smallest median, measured in turns from a cold L2. The table of the chapter follows it."
    timer, times = Timer(), {name: [] for name in configs}
    for _ in range(samples):
        for name, config in configs.items():
            if not times[name]: run(config)                               # compiled
            times[name] += timer(lambda: run(config))
    return min(times, key=lambda name: statistics.median(times[name]))


def pair(M, N, K):
    torch.manual_seed(0)
    return (torch.randn(n, K, device="cuda", dtype=BF16) for n in (M, N))


def bf16(M, N, K, others, **goals):
    x, w = pair(M, N, K)
    table = {"the table's": None} | others
    best = quickest(table, lambda c: matmul(x, w, config=c))
    peers = {"ours": lambda: matmul(x, w, config=table[best]), "cuBLAS": lambda: F.linear(x, w)}
    peers |= {name: (lambda c=c: matmul(x, w, config=c)) for name, c in table.items()}
    return Case(f"bfloat16 {M} x {N} x {K}", peers, flops=2 * M * N * K, nbytes=2 * (M * N + M * K + N * K),
                roof="bf16",
                goals=goals, more=dict(ours_is=best))


def fp8(n, by_row, others):
    x, w = pair(n, n, n)
    (x8, xs), (w8, ws) = float8(x, by_row), float8(w, by_row)
    ours = lambda config=None: matmul(x8, w8, x_scale=xs, w_scale=ws, config=config)
    scales = dict(scale_a=xs, scale_b=ws.t()) if by_row else dict(scale_a=xs.view(()), scale_b=ws.view(()))
    theirs = lambda fast: torch._scaled_mm(x8, w8.t(), **scales, out_dtype=BF16, use_fast_accum=fast)
    table = {"the table's": None} | others
    best = quickest({k: c for k, c in table.items() if not (c and c.exact)}, ours)
    own = quickest({"the table's": None} | PEERS, lambda c: matmul(x, w, config=c))
    peers = {"ours": lambda: ours(table[best]), "_scaled_mm": lambda: theirs(True),
             "_scaled_mm, exact sums": lambda: theirs(False),
             "own bf16": lambda: matmul(x, w, config=({"the table's": None} | PEERS)[own])}
    peers |= {name: (lambda c=c: ours(c)) for name, c in table.items()}
    some = slice(0, 256)
    want = (x8[some].double() * xs[some if by_row else slice(None)]) @ (w8.double() * ws).t()
    error = {"of bfloat16's rounding": ((want.to(BF16) - want).norm() / want.norm()).item()}
    for name in ("ours", "_scaled_mm", "_scaled_mm, exact sums", "summed in float32"):
        try: error[name] = ((peers[name]()[some] - want).norm() / want.norm()).item()
        except Exception as e: print(f"    {name}: {type(e).__name__}: {str(e)[:150]}")
    return Case(f"float8 {n}, {'a scale a row' if by_row else 'one scale'}", peers, flops=2 * n**3, nbytes=4 * n * n,
                roof="bf16", goals={"_scaled_mm": 0.9 if by_row else 1.0, "own bf16": 1.7},
                more=dict(relative_error=error, ours_is=best, own_bf16_is=own))


ONE = {f"{n} x {k}, {warps} warps": Config(1, n, k, warps, how="few")
       for n, k, warps in ((4, 1024, 4), (16, 256, 4), (4, 512, 2), (2, 2048, 4))}
FEW = {f"{n} x {k}, {stages} stages": Config(16, n, k, 4, stages, how="few")
       for n, k, stages in ((32, 128, 4), (16, 256, 4), (32, 256, 2))}


def few(M, N, K):
    x, w = pair(M, N, K)
    table = {"the table's": None} | (ONE if M == 1 else FEW)
    best = quickest(table, lambda c: matmul(x, w, config=c), 15)
    peers = {"ours": lambda: matmul(x, w, config=table[best]), "cuBLAS": lambda: F.linear(x, w)}
    peers |= {name: (lambda c=c: matmul(x, w, config=c)) for name, c in table.items()}
    return Case(f"few rows {M} x {N} x {K}", peers, nbytes=2 * (M * N + M * K + N * K), flops=2 * M * N * K,
                roof="read",
                goals={"cuBLAS": 1.0}, more=dict(ours_is=best))


def gradient(n):
    "What the backward pass multiplies: both sides transposed."
    x, g = pair(n, n, n)
    peers = {"ours": lambda: matmul(g.t(), x.t()), "cuBLAS": lambda: g.t() @ x}
    return Case(f"bfloat16 {n}, both transposed", peers, flops=2 * n**3, roof="bf16", goals={"cuBLAS": 0.9})


SHORT = {"128x128x64": Config(128, 128, 64, stages=4), "64x256x64": Config(64, 256, 64, warps=4, stages=4, split=2)}


def cases():
    yield bf16(8192, 8192, 8192, LADDER | PEERS, cuBLAS=0.93)
    yield fp8(8192, False, FP8)
    yield bf16(4096, 4096, 4096, PEERS, cuBLAS=0.93)
    yield fp8(8192, True, FP8)
    yield few(1, 8192, 28672)
    yield few(1, 4096, 4096)
    yield few(16, 4096, 14336)
    yield gradient(8192)
    yield bf16(512, 14336, 4096, SHORT)
