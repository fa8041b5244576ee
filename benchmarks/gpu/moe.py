"Mixtures of experts: a block at prefill and in decoding, beside torch's grouped product and each part alone."
import torch

from benchmarks.gpu.matmul import without_hanging
from benchmarks.kernels import Case
from llm_workbench.architecture.matrices import Stack
from llm_workbench.architecture.moe import moe as plain_moe
from llm_workbench.architecture.moe import route as plain_route
from llm_workbench.architecture.norms_and_mlps import swiglu
from llm_workbench.architecture.ops import TORCH
from llm_workbench.kernels import moe as module
from llm_workbench.kernels.moe import MoEConfig, Tiles, experts, sort_by_expert

BF16 = torch.bfloat16
PREFILL = {
    "2 a multiprocessor": MoEConfig(Tiles(128, 64, 64, warps=4, stages=3, per_sm=2, flatten=False), Tiles(128, 128, 64, warps=4, stages=3, per_sm=2, split=2)),
    "4 stages": MoEConfig(Tiles(128, 128, 64, stages=4, flatten=False), Tiles(128, 256, 64, stages=3)),
    "flat": MoEConfig(Tiles(128, 128, 64), Tiles(128, 256, 64, split=2, stages=4)),
    "warps that load": MoEConfig(Tiles(128, 128, 64, flatten=False), Tiles(128, 256, 64, 4, 4, flatten=False, specialize=True)),
    "warps that load, sorted": MoEConfig(Tiles(128, 128, 64, 4, 4, flatten=False, specialize=True), Tiles(128, 256, 64, 4, 4, flatten=False, specialize=True)),
    "64 rows": MoEConfig(Tiles(64, 128, 64, warps=4, flatten=False), Tiles(64, 256, 64, warps=4))}
DECODE = {
    "3 a multiprocessor": MoEConfig(Tiles(16, 64, 64, warps=4, stages=3, per_sm=3, flatten=False), Tiles(16, 128, 64, warps=4, stages=3, per_sm=3)),
    "steps of 128": MoEConfig(Tiles(16, 64, 128, warps=4, stages=3, per_sm=2, flatten=False), Tiles(16, 128, 128, warps=4, stages=3, per_sm=2)),
    "narrow": MoEConfig(Tiles(16, 32, 128, warps=4, stages=4, per_sm=2, flatten=False), Tiles(16, 64, 128, warps=4, stages=4, per_sm=3)),
    "flat": MoEConfig(Tiles(16, 64, 64, warps=4, stages=4, per_sm=2), Tiles(16, 128, 64, warps=4, stages=4, per_sm=2, flatten=False))}


def block(T, E, k, C, F):
    "Tokens, the experts of one layer, and who goes where: uniformly."
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=BF16)
    stacks = [Stack(1, 1, 1).to("cuda", BF16).requires_grad_(False) for _ in range(2)]
    for stack, shape in zip(stacks, ((E, 2 * F, C), (E, C, F))): stack.weight = torch.nn.Parameter(make(*shape) * shape[-1] ** -0.5, False)
    weights, chosen = torch.randn(T, E, device="cuda").softmax(-1).topk(k, -1)
    return make(T, C), *stacks, chosen, weights / weights.sum(-1, keepdim=True)


def accuracy(args, run):
    "Relative error of the first tokens against float64, ours and torch's."
    x, gate_up, down, chosen, weights = args
    n = 4
    rows = []
    for t in range(n):
        g, u = (gate_up.weight[chosen[t]].double() @ x[t].double()).chunk(2, -1)
        h = swiglu(g, u)
        rows.append((weights[t].double()[:, None] * (down.weight[chosen[t]].double() @ h[..., None])[..., 0]).sum(0))
    want = torch.stack(rows)
    return {name: ((f()[:n].double() - want).norm() / want.norm()).item() for name, f in run.items()}


def whole(T, E, k, C, F, others, goals):
    args = block(T, E, k, C, F)
    x, gate_up, down, chosen, weights = args
    used = len(chosen.unique())
    ours = lambda config=None: experts(x, gate_up.weight, down.weight, chosen, weights, config)
    peers = {"ours": ours, "grouped_mm": torch.inference_mode()(lambda: plain_moe(*args, swiglu, TORCH))}
    peers |= {name: (lambda c=c: ours(c)) for name, c in without_hanging(others, "moe").items()}
    error = accuracy(args, {name: peers[name] for name in ("ours", "grouped_mm")})
    nbytes = 2 * (2 * T * C + used * 3 * C * F)
    return Case(f"experts T {T}, E {E} k {k}, C {C} F {F}", peers, flops=6 * T * k * C * F, nbytes=nbytes,
                roof="bf16" if T > 1000 else "read", goals=goals, more=dict(relative_error=error, experts_used=used))


def parts(T, E, k, C, F):
    "What each of the launches takes: sorting, the first product, the second, the sum."
    x, gate_up, down, chosen, weights = block(T, E, k, C, F)
    config = module.choose(T * k, E, 2)
    plan = sort_by_expert(chosen, E, config.up.m)
    h = module.first_product(x, gate_up.weight, plan, config.up)
    y = module.second_product(h, down.weight, plan, config.down)
    peers = {"ours": lambda: experts(x, gate_up.weight, down.weight, chosen, weights),
             "sorting": lambda: sort_by_expert(chosen, E, config.up.m),
             "gate and up": lambda: module.first_product(x, gate_up.weight, plan, config.up),
             "down": lambda: module.second_product(h, down.weight, plan, config.down),
             "sum": lambda: module.weighted_sum(y, plan, weights, x.dtype)}
    return Case(f"parts T {T}, E {E} k {k}, C {C} F {F}", peers, flops=6 * T * k * C * F, nbytes=2 * (2 * T * C + E * 3 * C * F),
                roof="bf16" if T > 1000 else "read")


def routing(T, E, k):
    "Softmax, choice and weights."
    torch.manual_seed(0)
    logits = torch.randn(T, E, device="cuda", dtype=BF16)
    return Case(f"routing T {T}, E {E} k {k}", {"ours": lambda: module.route(logits, k), "torch": lambda: plain_route(logits, k)},
                nbytes=T * (2 * E + 12 * k), goals={"torch": 2.0})


QWEN3 = dict(E=128, k=8, C=2048, F=768)          # Qwen3-30B-A3B
MIXTRAL = dict(E=8, k=2, C=4096, F=14336)


def cases():
    yield whole(32768, **QWEN3, others=PREFILL, goals={"grouped_mm": 1.5, "bf16": 0.57})
    yield whole(64, **QWEN3, others=DECODE, goals={"grouped_mm": 1.5, "read": 0.80})
    yield parts(32768, **QWEN3)
    yield parts(64, **QWEN3)
    yield routing(64, 128, 8)
    yield routing(32768, 128, 8)
    yield whole(1, **QWEN3, others={}, goals={"grouped_mm": 1.0})
    yield whole(1024, **QWEN3, others={}, goals={"grouped_mm": 1.5})
    yield whole(8192, **MIXTRAL, others={}, goals={"grouped_mm": 1.2})
