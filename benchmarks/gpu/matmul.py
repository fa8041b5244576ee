"Products of matrices: the ladder of the chapter in bfloat16, float8, few rows, each beside cuBLAS."
import subprocess
import sys
from functools import cache
from pathlib import Path

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
    "rung 6: persistent, in halves": Config(128, 256, 64, stages=4, split=2),
    "rung 7: warps that load": Config(128, 256, 64, warps=4, stages=4, specialize=True)}
PEERS = {    # other cuts, so that the best is known
    "128x256x64 group 16": Config(128, 256, 64, stages=4, split=2, group=16),
    "warps that load, group 16": Config(128, 256, 64, warps=4, stages=4, specialize=True, group=16),
    "warps that load, 256x128": Config(256, 128, 64, warps=4, stages=4, specialize=True),
    "256x128x64": Config(256, 128, 64, stages=4, split=2),
    "128x128x64, 2 a multiprocessor": Config(128, 128, 64, warps=4, stages=3, split=2, per_sm=2)}
FP8 = {"128x256x128 3 stages": Config(128, 256, 128, stages=3), "warps that load": Config(128, 256, 128, warps=4, stages=4, specialize=True),
       "warps that load, 3 stages": Config(128, 256, 128, warps=4, stages=3, specialize=True),
       "128x256x128 group 16": Config(128, 256, 128, stages=4, split=2, group=16),
       "128x128x128, 2 a multiprocessor": Config(128, 128, 128, warps=4, stages=3, split=2, per_sm=2),
       "summed in float32": Config(128, 128, 128, stages=4, exact=True)}

PROBE = """
import torch
from llm_workbench.kernels.matmul import Config, matmul
from llm_workbench.kernels.moe import MoEConfig, Tiles, experts
make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.25
for M, N, K in ((1000, 1024, 1024), (8192, 8192, 512)):
    x, w = make(M, K), make(N, K)
    for tile in (128, 256, 64), (256, 128, 64):
        got = matmul(x, w, config=Config(*tile, warps=4, stages=4, specialize=True))
        torch.testing.assert_close(got, x @ w.t(), atol=0.5, rtol=0.02)
print("matmul", flush=True)
t, plain = Tiles(128, 128, 64, 4, 4, flatten=False, specialize=True), Tiles(128, 128, 64, flatten=False)
args = make(2000, 512), make(8, 512, 512), make(8, 512, 256), torch.randn(2000, 8, device="cuda").topk(2, -1).indices, torch.rand(2000, 2, device="cuda")
torch.testing.assert_close(experts(*args, MoEConfig(t, t)), experts(*args, MoEConfig(plain, plain)), atol=0.5, rtol=0.02)
print("moe", flush=True)
"""


@cache
def specialized() -> str:
    "Which kernels with warps of their own for loading do what they should on this GPU, tried in a process that may hang."
    try: done = subprocess.run([sys.executable, "-c", PROBE], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired as e: return f"{(e.stdout or b'').decode()} then it hung"
    return done.stdout + done.stderr[-300:]


def without_hanging(configs, kernel):
    "The configurations that can be measured."
    wanted = lambda c: getattr(c, "specialize", False) or any(getattr(getattr(c, part, None), "specialize", False) for part in ("up", "down"))
    if kernel in specialized().splitlines(): return configs
    print(f"    (left out: warps that load; {' '.join(specialized().split())[:300]})")
    return {name: c for name, c in configs.items() if not wanted(c)}


def pair(M, N, K):
    torch.manual_seed(0)
    return (torch.randn(n, K, device="cuda", dtype=BF16) for n in (M, N))


def bf16(M, N, K, others, **goals):
    x, w = pair(M, N, K)
    peers = {"ours": lambda: matmul(x, w), "cuBLAS": lambda: F.linear(x, w)}
    peers |= {name: (lambda c=c: matmul(x, w, config=c)) for name, c in without_hanging(others, "matmul").items()}
    return Case(f"bfloat16 {M} x {N} x {K}", peers, flops=2 * M * N * K, nbytes=2 * (M * N + M * K + N * K), roof="bf16", goals=goals)


def fp8(n, by_row, others):
    x, w = pair(n, n, n)
    (x8, xs), (w8, ws) = float8(x, by_row), float8(w, by_row)
    ours = lambda config=None: matmul(x8, w8, x_scale=xs, w_scale=ws, config=config)
    theirs = lambda fast: torch._scaled_mm(x8, w8.t(), scale_a=xs if by_row else xs.view(()), scale_b=ws.t() if by_row else ws.view(()),
                                           out_dtype=BF16, use_fast_accum=fast)
    peers = {"ours": ours, "_scaled_mm": lambda: theirs(True), "_scaled_mm, exact sums": lambda: theirs(False), "own bf16": lambda: matmul(x, w)}
    peers |= {name: (lambda c=c: ours(c)) for name, c in without_hanging(others, "matmul").items()}
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
                         for n, k, warps in ((4, 1024, 4), (16, 256, 4), (4, 512, 2))}
    else: peers |= {f"{n} x {k}, {s} stages": (lambda c=Config(16, n, k, 4, s, how="few"): matmul(x, w, config=c))
                    for n, k, s in ((32, 128, 4), (16, 256, 4))}
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
