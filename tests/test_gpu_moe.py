"Experts in Triton: the sorting, both products, the sum, every routing that hurts, and what is handed on."
import importlib.util
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, as_accurate, guarded, randn, rejects

from llm_workbench.architecture.matrices import Stack
from llm_workbench.architecture.matrices import stack_linear as plain_stack_linear
from llm_workbench.architecture.moe import clamped_swiglu
from llm_workbench.architecture.moe import moe as plain_moe
from llm_workbench.architecture.moe import route as plain_route
from llm_workbench.architecture.norms_and_mlps import swiglu
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import InputError
from llm_workbench.kernels import moe as module
from llm_workbench.kernels.launching import Launch, resources
from llm_workbench.kernels.moe import (CONFIGS, MoEConfig, Tiles, compiled_as, experts, grouped, launch_route, moe,
                                       moe_op, plain_experts, route, sort_by_expert, stack_linear, why_plain)

pytestmark = pytest.mark.triton
SMALL = {"tall": MoEConfig(Tiles(64, 16, 32, 4, 2, flatten=False), Tiles(64, 32, 32, 4, 2)),
         "tall, in halves": MoEConfig(Tiles(64, 32, 32, 4, 2), Tiles(64, 64, 32, 4, 2, split=2, flatten=False)),
         "low": MoEConfig(Tiles(16, 32, 32, 4, 2, flatten=False), Tiles(16, 64, 32, 4, 2))}


def block(N=20, E=5, k=2, C=72, F=40, dtype=torch.float32, seed=0, chosen=None):
    "Tokens, experts, who goes where and with which weight."
    x, gate_up = randn(N, C, dtype=dtype, seed=seed), randn(E, 2 * F, C, dtype=dtype, seed=seed + 1, scale=C ** -0.5)
    down = randn(E, C, F, dtype=dtype, seed=seed + 2, scale=F ** -0.5)
    if chosen is None: chosen = randn(N, E, seed=seed + 3).topk(k, -1).indices
    return x, gate_up, down, chosen, randn(*chosen.shape, seed=seed + 4).softmax(-1)


def agrees(args, config=None):
    x, gate_up, down, chosen, weights = args
    want = plain_experts(x.double(), gate_up.double(), down.double(), chosen, weights.double())
    with guarded(module): got = experts(*args, config)
    return as_accurate(got, want, plain_experts(*args))


# --- routing ---------------------------------------------------------------------------------------------------------

def routes(logits, k, **options):
    wide = options | ({"bias": options["bias"].double()} if "bias" in options else {})
    want, weights = plain_route(logits.double(), k, **wide)
    with guarded(module): got, mine = launch_route(logits, k, **options)
    assert torch.equal(got, want), "other experts"
    return as_accurate(mine, weights, plain_route(logits, k, **options)[1])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("N,E,k", [(7, 5, 2), (3, 128, 8), (1, 1, 1), (4, 60, 4)])
def test_routing(N, E, k, score, normalise):
    shuffled = lambda i: torch.randperm(E, generator=torch.Generator().manual_seed(i))
    logits = torch.stack([shuffled(i) for i in range(N)]).to(DEVICE) * 0.1
    for dtype in (torch.float32, torch.bfloat16) if E < 100 else (torch.float32,):
        routes(logits.to(dtype), k, score=score, normalise=normalise)
    if E > 1: routes(logits, k, score=score, bias=randn(E), scale=2.5)


def test_routing_at_the_edges():
    logits = randn(5, 6)
    assert torch.equal(route(torch.zeros(2, 6, device=DEVICE), 3)[0],
                       torch.arange(3, device=DEVICE).expand(2, 3))    # of equals the first
    routes(logits * 1e4, 1)
    routes(logits * 10, 2)
    routes(torch.full((9, 12), 7.0, device=DEVICE)[::2, 1:7] + logits, 3)
    assert route(logits - 200, 2, score="sigmoid", scale=3.0)[1].eq(0).all()   # all scores underflow: zero, and no NaN
    assert route(logits[:0], 2)[0].shape == (0, 2)
    for bad in (dict(top_k=7), dict(top_k=0), dict(top_k=2, score="tanh"), dict(top_k=2, bias=randn(5))):
        with pytest.raises(InputError): launch_route(logits, **bad)


# --- experts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", SMALL)
def test_every_way(way, dtype):
    agrees(block(N=70, C=136, dtype=dtype), SMALL[way])


@pytest.mark.parametrize("N,E,k,C,F", [(1, 1, 1, 8, 8), (1, 8, 2, 16, 8), (3, 130, 3, 8, 16), (40, 3, 3, 24, 56),
                                       (130, 2, 1, 8, 8)])
def test_as_it_chooses(N, E, k, C, F):
    agrees(block(N, E, k, C, F, dtype=torch.bfloat16))
    agrees(block(N, E, k, C, F))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(N=st.integers(1, 50), E=st.integers(1, 9), k=st.integers(1, 4), C=st.integers(1, 6), F=st.integers(1, 6),
       seed=st.integers(0, 99))
def test_any_shape(N, E, k, C, F, seed):
    agrees(block(N, E, min(k, E), 8 * C, 8 * F, torch.float16, seed), SMALL[["tall", "low"][seed % 2]])


ROUTINGS = {"all to one": lambda N, E: torch.full((N, 2), 3),
            "one expert without tokens": lambda N, E: torch.arange(2 * N).view(N, 2) % (E - 1),
            "the first and the last": lambda N, E: torch.tensor([0, E - 1]).expand(N, 2).contiguous(),
            "a tile and one more": lambda N, E: torch.cat([torch.zeros(17, 2), torch.ones(N - 17, 2)]).long(),
            "the same twice": lambda N, E: torch.arange(N)[:, None].expand(N, 2) % E,
            "int32": lambda N, E: (torch.arange(2 * N).view(N, 2) % E).int(),
            "not contiguous": lambda N, E: (torch.arange(2 * N).view(2, N) % E).t()}


@pytest.mark.parametrize("name", ROUTINGS)
def test_routings_that_hurt(name):
    chosen = ROUTINGS[name](40, 5).to(DEVICE)
    x, gate_up, down, _, weights = block(40, 5, chosen=chosen)
    for way in ("tall", "low"): agrees((x, gate_up, down, chosen, weights), SMALL[way])


def sorts(N=300, E=6, k=3, block_m=16):
    chosen = randn(N, E).topk(k, -1).indices
    with guarded(module): plan = sort_by_expert(chosen, E, block_m)
    flat, count = chosen.flatten(), chosen.flatten().bincount(minlength=E)
    tiles = -(-count // block_m)
    start = (tiles.cumsum(0) - tiles) * block_m
    assert plan.n_tiles.item() == tiles.sum(), "tiles"
    assert torch.equal(plan.expert[:plan.n_tiles.item()].long(),
                       torch.arange(E, device=DEVICE).repeat_interleave(tiles)), "map"
    assert torch.equal(plan.end[:E].long(), start + count), "ends"
    order = flat.argsort(stable=True)
    rank = torch.arange(len(flat), device=DEVICE) - (count.cumsum(0) - count)[flat[order]]
    assert torch.equal(plan.place[order].long(), start[flat[order]] + rank), "places"
    assert torch.equal(plan.rows[plan.place.long()].long(), torch.arange(len(flat), device=DEVICE) // k), "tokens"


@pytest.mark.parametrize("N,E,k,block_m", [(300, 6, 3, 16), (1, 1, 1, 16), (33, 40, 2, 64), (1400, 100, 3, 64)])
def test_sorting(N, E, k, block_m):
    sorts(N, E, k, block_m)


def test_strided_and_offset_inputs():
    x, gate_up, down, chosen, weights = block(20)
    wide = torch.full((20, 144), float("nan"), device=DEVICE)
    wide[:, 3:75] = x
    for other in (wide[:, 3:75], x.t().contiguous().t()):
        agrees((other, gate_up, down, chosen, weights.t().contiguous().t()))


def test_infinity_stays_with_its_token():
    args = block(20, dtype=torch.float16)
    args[0][3, 5] = float("inf")
    got = experts(*args)
    others = [i for i in range(20) if i != 3]
    assert not got[3].isfinite().all() and got[others].isfinite().all()


def test_large_gates_do_not_overflow():
    x, gate_up, down, chosen, weights = block(20)
    agrees((x * 1e4, gate_up, down, chosen, weights))
    agrees((torch.zeros_like(x), gate_up, down, chosen, weights))


def test_twice_the_same():
    args = block(60, 4, dtype=torch.bfloat16)
    assert torch.equal(experts(*args), experts(*args))


def test_no_tokens():
    x, gate_up, down, chosen, weights = block()
    assert experts(x[:0], gate_up, down, chosen[:0], weights[:0]).shape == (0, 72)


# --- the op and the drop-in -------------------------------------------------------------------------------------------

def stacks(gate_up, down, bias=False):
    made = []
    for weight in (gate_up, down):
        stack = Stack(len(weight), weight.shape[2], weight.shape[1], bias).to(weight)
        stack.weight = torch.nn.Parameter(weight, False)
        made.append(stack)
    return made


def test_drop_in_equals_the_plain_form():
    x, gate_up, down, chosen, weights = block()
    pair = stacks(gate_up, down)
    for act, ops in ((swiglu, TORCH), (lambda g, u: swiglu(g, u), None)):
        ops = ops or TORCH.but(swiglu=act)
        assert why_plain(x, *pair, act, ops) is None
        torch.testing.assert_close(moe(x, *pair, chosen, weights, act, ops),
                                   plain_moe(x, *pair, chosen, weights, act, ops), atol=1e-5, rtol=1e-5)


HANDED_ON = {"packed": lambda a: dict(gate_up=SimpleNamespace()),
             "biases": lambda a: dict(down=stacks(a[1], a[2], True)[1]),
             "not SwiGLU": lambda a: dict(act=clamped_swiglu), "gradient": lambda a: dict(x=a[0].requires_grad_()),
             "float64": lambda a: dict(x=a[0].double()),
             "16 bytes": lambda a: dict(gate_up=stacks(a[1][..., :70], a[2])[0]),
             "one piece": lambda a: dict(gate_up=stacks(a[1].mT.contiguous().mT, a[2])[0])}


@pytest.mark.parametrize("says", HANDED_ON)
def test_what_is_handed_on(says):
    args = block()
    given = dict(x=args[0], gate_up=stacks(*args[1:3])[0], down=stacks(*args[1:3])[1], act=swiglu, ops=TORCH)
    assert says in why_plain(**{**given, **HANDED_ON[says](args)})


def test_handed_on_is_computed_with_the_activation_and_the_gradient(monkeypatch):
    x, gate_up, down, chosen, weights = block()
    pair = stacks(gate_up, down)
    monkeypatch.setattr(module, "experts", lambda *a: pytest.fail("the kernel was called"))
    got = moe(x, *pair, chosen, weights, clamped_swiglu, TORCH)
    assert torch.equal(got, plain_moe(x, *pair, chosen, weights, clamped_swiglu, TORCH))
    moe(x.requires_grad_(), *pair, chosen, weights, swiglu, TORCH).sum().backward()
    assert x.grad.isfinite().all()


def test_opcheck():
    torch.library.opcheck(moe_op, block())


def test_inside_compile():
    x, gate_up, down, chosen, weights = block()
    pair = stacks(gate_up, down)
    run = torch.compile(lambda x: moe(x, *pair, chosen, weights, swiglu, TORCH) * 2, backend="aot_eager",
                        fullgraph=True)
    with torch.no_grad(): assert torch.equal(run(x), experts(x, gate_up, down, chosen, weights) * 2)


def test_plain_where_kernels_do_not_run(monkeypatch):
    args = [t.cpu() for t in block()]
    monkeypatch.setattr(module, "interpreting", lambda: False)
    monkeypatch.setattr(module, "experts", lambda *a: pytest.fail("the kernel was called"))
    assert torch.equal(moe(args[0], *stacks(*args[1:3]), *args[3:], swiglu, TORCH), plain_experts(*args))


BAD = {"float16 or bfloat16": dict(x=randn(20, 72, dtype=torch.float64)),
       "alike": dict(down=randn(5, 72, 40).half()), "down (E, C, F)": dict(down=randn(5, 72, 32)),
       "(20, k)": dict(weights=randn(20, 3)), "as integers": dict(chosen=torch.zeros(20, 2, device=DEVICE)),
       "contiguous": dict(gate_up=randn(5, 72, 80).mT), "one device": dict(x=torch.empty(20, 72, device="meta")),
       "rows are multiples": dict(gate_up=randn(5, 80, 70), down=randn(5, 70, 40), x=randn(20, 70))}


@pytest.mark.parametrize("says", BAD)
def test_bad_input(says):
    given = dict(zip(("x", "gate_up", "down", "chosen", "weights"), block()))
    with pytest.raises(InputError) as error: experts(**{**given, **BAD[says]})
    assert says in str(error.value), error.value


# --- known wrong variants ---------------------------------------------------------------------------------------------

WRONG = {
    "a part is not added to those before it": ("place_kernel", "p < part", "p <= part", "sorts"),
    "an expert's rows do not begin with a tile": ("place_kernel", "(total + BLOCK_M - 1) // BLOCK_M ",
                                                  "total // BLOCK_M ", "sorts"),
    "unstable rank": ("place_kernel", "tl.cumsum(mine, 0) - 1", "tl.sum(mine, 0)[None, :] - tl.cumsum(mine, 0)",
                      "sorts"),
    "gate and up exchanged": ("gate_up_kernel", "(-gate)) * up)", "(-up)) * up)", "tall"),
    "the first expert for all": ("down_kernel", "tl.load(expert_ptr + m) * C", "tl.load(expert_ptr) * C", "tall"),
    "slots instead of tokens": ("gate_up_kernel", "token[:, None] * stride_x", "(token[:, None] // 2) * stride_x",
                                "low"),
    "the same expert again": ("route_kernel", "tl.where(mine, float(\"-inf\"), ranking)", "ranking", "route"),
    "the bias in the weights": ("route_kernel", "tl.where(mine, scores, 0.0)", "tl.where(mine, ranking, 0.0)", "route"),
    "unweighted": ("combine_kernel", "total += weight *", "total += ", "low"),
    "weights of the first expert": ("combine_kernel", "+ j * stride_wk", "+ 0 * stride_wk", "low"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_variants_are_rejected(mistake, monkeypatch, tmp_path):
    name, right, instead, way = WRONG[mistake]
    source = "@triton.jit\n" + inspect.getsource(getattr(module, name).fn).removeprefix("@triton.jit\n")
    assert right in source, f"{name} has no {right!r}"
    path = tmp_path / "wrong_kernels.py"
    path.write_text("from llm_workbench.kernels.launching import tl, triton\n\n" + source.replace(right, instead))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setattr(module, name, getattr(made, name))
    if way == "route": assert rejects(routes, randn(5, 6), 3, bias=randn(6, seed=1))
    else: assert rejects(sorts) if way == "sorts" else rejects(agrees, block(40), SMALL[way])


# --- what the compiler makes of it -----------------------------------------------------------------------------------

def test_compiled_for_sm_90():
    launches = [each for m in (16, 128) for each in compiled_as(CONFIGS[2][m], torch.bfloat16)]
    launches += compiled_as(CONFIGS[4][16], torch.float32)
    table = resources(*launches)
    assert (table["stack"] == 0).all() and (table.spills == 0).all(), table
    assert (table.shared <= 227 * 1024).all() and (table.tma > 0).all(), table
    assert (table[~table.index.str.contains("fp32")].wgmma > 0).all(), table


def test_the_small_kernels_compiled_for_sm_90():
    sorting = dict(CHUNK=1024, BLOCK=128, EXPERTS=128)
    launches = [
        Launch("count_kernel", ["*i64", "*i32", "i32:16"], sorting),
        Launch("place_kernel", ["*i64", *["*i32"] * 6, *["i32:16"] * 3],
               dict(TOP_K=8, BLOCK_M=128, PARTS=16, TILES=16, **sorting), 8),
        Launch("combine_kernel", ["*bf16", "*i32", "*fp32", "*bf16", *["i32:16"] * 4],
               dict(stride_wk=1, TOP_K=8, BLOCK_C=1024, WIDE=False)),
        *[Launch("route_kernel", ["*bf16", "*i64", "*fp32", *["i32:16"] * 3, "fp32"],
                 dict(bias_ptr=None, TOP_K=8, SIGMOID=False, NORMALISE=True, BLOCK_T=b, EXPERTS=128, SLOTS=8), b)
          for b in (1, 4)]]
    table = resources(*(replace(x, kernel=f"{module.__name__}:{x.kernel}", label=x.kernel) for x in launches))
    assert (table["stack"] == 0).all() and (table.spills == 0).all() and (table.shared <= 227 * 1024).all(), table
    assert table.wide_loads["combine_kernel"] > 0, table


# --- on a GPU ---------------------------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 64, 500, 3000])
def test_real_shapes(N, dtype):
    agrees(block(N, 128, 8, 1024, 384, dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("m", CONFIGS[2])
def test_every_configuration_of_the_table(m):
    agrees(block(300, 8, 2, 520, 392, torch.bfloat16), CONFIGS[2][m])


@pytest.mark.cuda
def test_in_a_graph_with_another_routing():
    "The host asks nothing: what was recorded for one routing computes another."
    args = block(64, 16, 4, 256, 128, torch.bfloat16)
    for _ in range(2): experts(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = experts(*args)
    other = block(64, 16, 4, 256, 128, torch.bfloat16, seed=7)
    for old, new in zip(args, other): old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, experts(*other))


# --- one matrix of a stack for each row ------------------------------------------------------------------------------

def grouped_agrees(N=20, S=5, O=24, C=72, dtype=torch.float32, bias=True, which=None, run=None, config=None):
    x, w = randn(N, C, dtype=dtype), randn(S, O, C, dtype=dtype, seed=1, scale=C ** -0.5)
    b = randn(S, O, dtype=dtype, seed=2) if bias else None
    if which is None: which = torch.randint(S, (N,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    double = lambda t: None if t is None else t.double()
    want = plain_stack_linear(x.double(), w.double(), which, double(b))
    with guarded(module): got = (run or grouped)(x, w, which, b, **({"config": config} if config else {}))
    return as_accurate(got, want, plain_stack_linear(x, w, which, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,S,O,C", [(1, 1, 1, 8), (20, 5, 24, 72), (33, 3, 70, 40), (7, 60, 17, 16)])
def test_grouped(N, S, O, C, dtype):
    grouped_agrees(N, S, O, C, dtype)
    grouped_agrees(N, S, O, C, dtype, bias=False)


@pytest.mark.parametrize("config", [SMALL["tall"].up, SMALL["low"].up])
def test_grouped_tiles(config):
    grouped_agrees(150, 3, 40, 72, torch.bfloat16, config=config)
    grouped_agrees(67, 4, 40, 72, which=torch.full((67,), 2, device=DEVICE), config=config)      # all to one matrix


def test_grouped_refuses_what_it_does_not_take():
    x, w, which = randn(6, 16), randn(3, 8, 16), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    wrong = {"throughout": (x.half(), w, which), "1024 matrices": (x[:, :8], w, which),
             "integers": (x, w, which.float()), "a bias": (x, w, which, x),
             "16 bytes": (x[:, :15].contiguous(), w[:, :, :15].contiguous(), which)}
    for said, args in wrong.items():
        with pytest.raises(InputError, match=said): grouped(*args)


def test_stack_linear_hands_on_what_has_no_kernel():
    x, w, which = randn(4, 3, 16), randn(3, 8, 16), torch.tensor([2, 0, 1, 1], device=DEVICE)
    assert torch.equal(stack_linear(x, w), plain_stack_linear(x, w))                               # a matrix a place
    rows = randn(4, 16).double()
    assert torch.equal(stack_linear(rows, w.double(), which), plain_stack_linear(rows, w.double(), which))
    w.requires_grad_(True)
    stack_linear(rows.float(), w, which).sum().backward()
    assert w.grad is not None and not w.grad[0].equal(w.grad[1])


def test_wrong_grouped_products_are_rejected():
    wrong = {"bias of the first": lambda x, w, which, b: grouped(x, w, which, b[:1].expand_as(b)),
             "order of the sorted rows": lambda x, w, which, b: grouped(x, w, which, b)[which.argsort(stable=True)],
             "the next matrix": lambda x, w, which, b: grouped(x, w, (which + 1) % len(w), b)}
    for name, run in wrong.items(): assert rejects(grouped_agrees, run=run), name


def test_routers_that_have_no_kernel_are_handed_on():
    logits = randn(5, 8)
    for options in (dict(score="sigmoid", n_groups=4, top_groups=2), dict(score="sparsemixer")):
        for got, want in zip(route(logits, 2, **options), plain_route(logits, 2, **options)):
            assert torch.equal(got, want)
    assert route(logits.double(), 2)[1].dtype == torch.float64
    asked = logits.clone().requires_grad_(True)
    route(asked, 2)[1][:, 0].sum().backward()
    assert asked.grad.any()
    with pytest.raises(InputError): route(logits, 9)
