"Products of matrices: the ladder of the chapter in bfloat16, float8, few rows, each beside cuBLAS."
import torch
import torch.nn.functional as F

from benchmarks.kernels import Case
from llm_workbench.kernels.matmul import CONFIGS, Config, FLOAT8, float8, matmul

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
    "256x128x64": Config(256, 128, 64, stages=4, split=2),
    "128x128x64, 2 a multiprocessor": Config(128, 128, 64, warps=4, stages=3, split=2, per_sm=2),
    "128x128x128": Config(128, 128, 128, stages=3, split=2)}
FP8 = {"128x256x128 3 stages": Config(128, 256, 128, stages=3), "256x128x128 group 4": Config(256, 128, 128, stages=4, split=2, group=4),
       "128x256x128 group 16": Config(128, 256, 128, stages=4, split=2, group=16),
       "128x128x128, 2 a multiprocessor": Config(128, 128, 128, warps=4, stages=3, split=2, per_sm=2),
       "summed in float32": Config(128, 256, 128, stages=4, split=2, exact=True)}


def pair(M, N, K):
    torch.manual_seed(0)
    return (torch.randn(n, K, device="cuda", dtype=BF16) for n in (M, N))


def bf16(M, N, K, others, **goals):
    x, w = pair(M, N, K)
    peers = {"ours": lambda: matmul(x, w), "cuBLAS": lambda: F.linear(x, w)}
    peers |= {name: (lambda c=c: matmul(x, w, config=c)) for name, c in others.items()}
    return Case(f"bfloat16 {M} x {N} x {K}", peers, flops=2 * M * N * K, nbytes=2 * (M * N + M * K + N * K), roof="bf16", goals=goals)


def fp8(n, by_row, others):
    x, w = pair(n, n, n)
    (x8, xs), (w8, ws) = float8(x, by_row), float8(w, by_row)
    ours = lambda config=None: matmul(x8, w8, x_scale=xs, w_scale=ws, config=config)
    theirs = lambda fast: torch._scaled_mm(x8, w8.t(), scale_a=xs if by_row else xs.view(()), scale_b=ws.t() if by_row else ws.view(()),
                                           out_dtype=BF16, use_fast_accum=fast)
    peers = {"ours": ours, "_scaled_mm": lambda: theirs(True), "_scaled_mm, exact sums": lambda: theirs(False), "own bf16": lambda: matmul(x, w)}
    peers |= {name: (lambda c=c: ours(c)) for name, c in others.items()}
    some = slice(0, 256)
    want = (x8[some].double() * xs[some if by_row else slice(None)]) @ (w8.double() * ws).t()
    error = {name: ((run()[some] - want).norm() / want.norm()).item() for name, run in peers.items() if name != "own bf16"}
    error["of bfloat16's rounding"] = ((want.to(BF16) - want).norm() / want.norm()).item()
    del want
    return Case(f"float8 {n}, {'a scale a row' if by_row else 'one scale'}", peers, flops=2 * n**3, nbytes=4 * n * n, roof="bf16",
                goals={"_scaled_mm": 0.9 if by_row else 1.0, "own bf16": 1.7}, more=dict(relative_error=error))


def few(M, N, K):
    x, w = pair(M, N, K)
    peers = {"ours": lambda: matmul(x, w), "cuBLAS": lambda: F.linear(x, w)}
    if M == 1: peers |= {f"{n} x {k}, {warps} warps": (lambda c=Config(1, n, k, warps, how="few"): matmul(x, w, config=c))
                         for n, k, warps in ((4, 1024, 4), (16, 256, 4), (8, 1024, 8), (4, 512, 2))}
    else: peers |= {f"{n} x {k}, {s} stages": (lambda c=Config(16, n, k, 4, s, how="few"): matmul(x, w, config=c))
                    for n, k, s in ((32, 128, 4), (64, 128, 4), (16, 256, 4))}
    return Case(f"few rows {M} x {N} x {K}", peers, nbytes=2 * (M * N + M * K + N * K), flops=2 * M * N * K, roof="read", goals={"cuBLAS": 1.0})


def gradient(n):
    "What the backward pass multiplies: both sides transposed."
    x, g = pair(n, n, n)
    peers = {"ours": lambda: matmul(g.t(), x.t()), "cuBLAS": lambda: g.t() @ x}
    return Case(f"bfloat16 {n}, both transposed", peers, flops=2 * n**3, roof="bf16", goals={"cuBLAS": 0.9})


def cases():
    yield bf16(8192, 8192, 8192, LADDER | PEERS, cuBLAS=0.93)
    yield fp8(8192, False, FP8)
    yield bf16(4096, 4096, 4096, {k: v for k, v in PEERS.items() if "group" not in k}, cuBLAS=0.93)
    yield fp8(8192, True, {})
    yield few(1, 8192, 28672)
    yield few(1, 4096, 4096)
    yield few(16, 4096, 14336)
    yield gradient(8192)
    yield bf16(512, 14336, 4096, {"128x128x64": Config(128, 128, 64, stages=4), "64x256x64": Config(64, 256, 64, warps=4, stages=4, split=2)})
