"Products of few rows against cuBLAS, and attention behind a static cache: the parts of a decode step, each from a cold cache."
import statistics

import torch
import torch.nn.functional as F

from benchmarks.kernels import Case, Recorded, Timer
from llm_workbench.kernels.decode_step import Work, attend, few_rows, greedy

# label: rows N (of each matrix), columns K, gated
MATRICES = {
    "8B qkv 6144 x 4096": ([4096, 1024, 1024], 4096, False), "8B o 4096 x 4096": ([4096], 4096, False),
    "8B gate+up 2 x 14336 x 4096": ([14336, 14336], 4096, True), "8B down 4096 x 14336": ([4096], 14336, False),
    "8B head 128256 x 4096": ([128256], 4096, False), "135M qkv 960 x 576": ([576, 192, 192], 576, False),
    "135M gate+up 2 x 1536 x 576": ([1536, 1536], 576, True), "135M down 576 x 1536": ([576], 1536, False)}
GOALS = {"8B gate+up 2 x 14336 x 4096": {"read": 0.9}, "8B down 4096 x 14336": {"read": 0.85}}
OTHERS = {   # configurations beside the table's, for one row: (BLOCK_N, BLOCK_K, warps)
    1: [(4, 512, 1), (8, 256, 1), (8, 1024, 4), (16, 512, 8), (4, 1024, 4), (2, 1024, 2)],
    # and for several: (BLOCK_N, BLOCK_K, stages, SPLIT, warps)
    32: [(64, 64, 6, 1, 4), (64, 128, 4, 2, 4), (64, 64, 6, 4, 4), (128, 64, 4, 2, 8), (64, 64, 8, 8, 4), (128, 128, 3, 4, 8)]}

TUNED = {1: ["8B qkv 6144 x 4096", "8B gate+up 2 x 14336 x 4096", "8B down 4096 x 14336", "135M down 576 x 1536"],
         32: ["8B o 4096 x 4096", "8B gate+up 2 x 14336 x 4096"]}


def config_of(M, other):
    if M == 1: return dict(zip(("BLOCK_N", "BLOCK_K", "num_warps"), other), AHEAD=0)
    return dict(zip(("BLOCK_N", "BLOCK_K", "num_stages", "SPLIT", "num_warps"), other), BLOCK_M=16 if M <= 16 else 32)


def tries(run, M, timer):
    "Microseconds of other configurations, quickly: what the table should say."
    found = {}
    for other in OTHERS[M]:
        try: found[str(other)] = round(statistics.median(timer(Recorded(lambda: run(config_of(M, other))).run, 9)) * 1e6, 2)
        except Exception as e: found[str(other)] = f"{type(e).__name__}: {str(e)[:80]}"
    return found


def product(label, M, timer):
    sizes, K, gated = MATRICES[label]
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02
    x, weights, work = make(M, K), [make(n, K) for n in sizes], Work("cuda")
    norm = make(K) if M == 1 else None                                           # part of the kernel for one row only
    out = torch.empty(M, sizes[0] if gated else sum(sizes), device="cuda", dtype=torch.bfloat16)
    ours = lambda config=None: few_rows(x, weights, norm=norm, gated=gated, out=out, work=work, config=config)
    whole = torch.cat(weights)
    peers = {"ours": ours, "F.linear": lambda: F.linear(x, whole)}
    if gated: peers["F.linear, silu, mul"] = lambda: F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1])
    nbytes = sum(w.nbytes for w in weights) + x.nbytes + out.nbytes
    others = tries(ours, M, timer) if label in TUNED[M] else {}
    return Case(f"{label}, {M} rows" if M > 1 else label, peers, nbytes, 2 * M * K * sum(sizes), "read",
                GOALS.get(label, {}), more=dict(other_configurations_us=others))


def attention(label, B, held, H, K, D):
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    slots = held + 256
    qkv, k, v = make(B, (H + 2 * K) * D), make(B, slots, K, D), make(B, slots, K, D)
    lengths, angles = torch.full((B,), held, device="cuda"), torch.rand(slots, D, device="cuda")
    cos, sin, work, out = angles.cos(), angles.sin(), Work("cuda"), make(B, H * D)
    q, filled = make(B, H, 1, D), [t[:, :held].transpose(1, 2).contiguous() for t in (k, v)]
    grouped = q.view(B, K, H // K, D)
    peers = {"ours": lambda: attend(qkv, cos, sin, lengths, k, v, H, by_position=True, out=out, work=work),
             "SDPA alone": lambda: F.scaled_dot_product_attention(grouped, *filled)}
    return Case(f"{label}: rotate, append, attend", peers, 2 * B * held * K * D * 2, 4 * B * held * H * D, "read")


def cases():
    timer = Timer()
    for label in MATRICES: yield product(label, 1, timer)
    for label in ("8B qkv 6144 x 4096", "8B o 4096 x 4096", "8B gate+up 2 x 14336 x 4096", "8B down 4096 x 14336"):
        yield product(label, 32, timer)
    yield attention("8B, 1 text of 544", 1, 544, 32, 8, 128)
    yield attention("8B, 1 text of 32768", 1, 32768, 32, 8, 128)
    yield attention("8B, 32 texts of 544", 32, 544, 32, 8, 128)
    yield attention("135M, 1 text of 544", 1, 544, 9, 3, 64)
    logits, work = torch.randn(1, 128256, device="cuda"), Work("cuda")
    yield Case("best of 128256, 1 row", {"ours": lambda: greedy(logits, work=work), "argmax": lambda: logits.argmax(-1)},
               logits.nbytes, 0, "read")
