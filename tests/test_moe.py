"Mixture of experts beyond the lesson: parity under many shapes and types, degenerate routing, and mutants that the checks must reject."
import copy
import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llm_workbench.architecture import moe as module
from llm_workbench.architecture.moe import MoE, expert_load, load_balancing_loss, moe, route, update_bias
from llm_workbench.architecture.norms_and_mlps import linear, swiglu
from llm_workbench.errors import UnsupportedError

OPS = SimpleNamespace(linear=linear, moe=moe, swiglu=swiglu)
C, WIDTH = 32, 24
SHARED = dict(hidden_size=C, moe_intermediate_size=WIDTH)


def mixtral(): return MixtralSparseMoeBlock(MixtralConfig(hidden_size=C, intermediate_size=WIDTH)), dict(n_experts=8, top_k=2)


def olmoe():
    config = OlmoeConfig(hidden_size=C, intermediate_size=WIDTH, num_experts=16, num_experts_per_tok=4)
    return OlmoeSparseMoeBlock(config), dict(n_experts=16, top_k=4, normalise=False)


def qwen2(normalise=False):
    config = Qwen2MoeConfig(**SHARED, num_experts=12, num_experts_per_tok=4, shared_expert_intermediate_size=40, norm_topk_prob=normalise)
    return Qwen2MoeSparseMoeBlock(config), dict(n_experts=12, top_k=4, normalise=normalise, shared_intermediate_size=40, shared_gate=True)


def qwen3(normalise=True):
    config = Qwen3MoeConfig(**SHARED, num_experts=16, num_experts_per_tok=4, norm_topk_prob=normalise)
    return Qwen3MoeSparseMoeBlock(config), dict(n_experts=16, top_k=4, normalise=normalise)


def deepseek_v2(method="group_limited_greedy"):
    config = DeepseekV2Config(**SHARED, n_routed_experts=16, num_experts_per_tok=3, topk_method=method, n_group=4, topk_group=2, routed_scaling_factor=16.0)
    groups = dict(n_groups=4, top_groups=2) if method != "greedy" else {}
    return DeepseekV2Moe(config), dict(n_experts=16, top_k=3, normalise=False, scale=16.0, fp32=True, shared_intermediate_size=2 * WIDTH, **groups)


def deepseek_v3(normalise=True):
    config = DeepseekV3Config(**SHARED, n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=normalise)
    return DeepseekV3MoE(config), dict(n_experts=16, top_k=3, normalise=normalise, score="sigmoid", scale=2.5, n_groups=4, top_groups=2, fp32=True,
                                       correction_bias=True, shared_intermediate_size=WIDTH)


def glm4():
    config = Glm4MoeConfig(**SHARED, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1, n_shared_experts=1, routed_scaling_factor=1.5)
    return Glm4MoeMoE(config), dict(n_experts=16, top_k=4, score="sigmoid", scale=1.5, n_groups=1, top_groups=1, fp32=True, correction_bias=True,
                                    shared_intermediate_size=WIDTH)


BLOCKS = {"mixtral": mixtral, "olmoe": olmoe, "qwen2": qwen2, "qwen2 normalised": lambda: qwen2(True), "qwen3": qwen3, "qwen3 raw": lambda: qwen3(False),
          "deepseek_v2": deepseek_v2, "deepseek_v2 greedy": lambda: deepseek_v2("greedy"), "deepseek_v3": deepseek_v3,
          "deepseek_v3 raw": lambda: deepseek_v3(False), "glm4": glm4}


def pair(name, seed=0, spread=0.3):
    "A block of transformers with random weights and biases, and ours with the same state dict."
    theirs, options = BLOCKS[name]()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in itertools.chain(theirs.parameters(), theirs.buffers()): t.copy_(torch.randn(t.shape, generator=g) * spread)
    ours = MoE(C, WIDTH, **options)
    ours.load_state_dict(theirs.state_dict())   # strict: names and shapes must match
    return theirs, ours


def share(chosen, weights, E): return torch.zeros(len(chosen), E, dtype=weights.dtype).scatter(1, chosen, weights)


def every_expert(x, gate_up, down, chosen, weights, act=swiglu):
    "All experts on all tokens in fp64: the truth."
    x, gate_up, down = x.double(), gate_up.double(), down.double()
    gate, up = torch.einsum("nc,efc->enf", x, gate_up).chunk(2, -1)
    return torch.einsum("ne,enc->nc", share(chosen, weights.double(), len(gate_up)), torch.einsum("enf,ecf->enc", act(gate, up), down))


def random_layer(N, E, k, seed, dtype=torch.float32, C=C, width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g).to(dtype)
    x, gate_up, down = draw(N, C), draw(E, 2 * width, C) / C**0.5, draw(E, C, width) / width**0.5
    return x, gate_up, down, *route(draw(N, E), k)


# --- against transformers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1, C), (1, 37, C), (4, 16, C)])
def test_block_equals_transformers(name, shape):
    theirs, ours = pair(name, seed=len(name))
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    b = a.detach().clone().requires_grad_()
    want, got = theirs(a), ours(b, OPS)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= 1e-6 * want.abs().max(), f"{name}: outputs differ by {(got - want).abs().max():.1e}"
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (want * probe).mean().backward()
    (got * probe).mean().backward()
    named = dict(theirs.named_parameters())
    for label, t, o in [("x", a, b)] + [(n, named[n], p) for n, p in ours.named_parameters()]:
        assert (t.grad - o.grad).abs().max() <= 1e-6 * max(1.0, t.grad.abs().max().item()), f"{name}: gradient of {label} differs"


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("spread", [1e-4, 0.3, 5.0])   # nearly equal logits, usual ones, saturated ones
def test_router_equals_transformers(name, spread):
    theirs, ours = pair(name, seed=3, spread=spread)
    x = torch.randn(1000, C, generator=torch.Generator().manual_seed(4))
    logits, want_weights, want_chosen = theirs.gate(x)
    ours_logits, chosen, weights = ours.gate(x)
    E = logits.shape[-1]
    got, want = share(chosen, weights, E), share(want_chosen, want_weights, E)
    assert torch.equal(ours_logits, logits)
    assert torch.equal(chosen.sort().values, want_chosen.sort().values), f"{name}: other experts"
    assert (got - want).abs().max() <= 1e-6 * want.abs().max(), f"{name}: other weights"


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "deepseek_v2", "deepseek_v3"])
def test_bf16_chooses_the_same_experts_and_is_no_worse(name):
    theirs, ours = pair(name, seed=5)
    exact = copy.deepcopy(ours).double()
    x = torch.randn(1, 300, C, generator=torch.Generator().manual_seed(6)).bfloat16()
    bias = "e_score_correction_bias"                                   # kept in fp32 by transformers when it loads a model
    keep = {n: b.clone() for n, b in ours.named_buffers()}
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    for n, b in keep.items():
        if n.endswith(bias): theirs.gate.e_score_correction_bias, ours.gate.e_score_correction_bias = b, b
    want_chosen, chosen = theirs.gate(x[0])[2], ours.gate(x[0])[1]
    assert torch.equal(chosen.sort().values, want_chosen.sort().values)
    exact.load_state_dict({n: t.double() for n, t in ours.state_dict().items()})
    tokens = x[0].double()
    route_as_ours = lambda *_: (None, chosen, ours.gate(x[0])[2].double())   # the same experts, everything else exact
    exact.gate.forward = route_as_ours
    truth = exact(tokens[None], OPS)
    error = lambda y: (y.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    got, want = ours(x, OPS), theirs(x)
    assert got.dtype == torch.bfloat16
    assert error(got) <= 1.02 * error(want), f"bf16 error {error(got):.2%}, transformers {error(want):.2%}"
    assert error(got) < 0.01


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_and_gradient_equal_transformers(k, masked):
    g = torch.Generator().manual_seed(k)
    a = [torch.randn(60, 8, generator=g).mul(s).requires_grad_() for s in (0.1, 1.0, 6.0)]
    b = [t.detach().clone().requires_grad_() for t in a]
    mask = (torch.rand(4, 15, generator=g) < 0.6).long() if masked else None
    want, pooled = load_balancing_loss_func(tuple(a), 8, k, mask), torch.cat(b)
    got = load_balancing_loss(pooled, route(pooled, k)[0], 8, None if mask is None else mask.flatten().repeat(3))
    assert abs(got - want) <= 1e-6 * want
    want.backward()
    got.backward()
    for t, o in zip(a, b): assert torch.allclose(t.grad, o.grad, atol=1e-8)


def test_mixtral_layer_has_the_released_size():
    with torch.device("meta"): layer = MoE(4096, 14336, 8, 2)
    assert sum(p.numel() for p in layer.parameters()) == 8 * 3 * 4096 * 14336 + 8 * 4096
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "gate.weight": (8, 4096), "experts.gate_up_proj": (8, 28672, 4096), "experts.down_proj": (8, 4096, 14336)}


# --- the op ------------------------------------------------------------------------------------------------------------

def test_op_on_200_random_layers():
    g = torch.Generator().manual_seed(7)
    pick = lambda lo, hi: torch.randint(lo, hi + 1, (), generator=g).item()
    for seed in range(200):
        N, E = pick(0, 40), pick(1, 20)
        layer = random_layer(N, E, pick(1, E), seed, C=pick(1, 20), width=pick(1, 20))
        want = every_expert(*layer)
        got = moe(*layer)
        assert got.shape == want.shape and (N == 0 or (got - want).abs().max() <= 2e-6 * (1 + want.abs().max())), f"seed {seed}"


def test_only_chosen_experts_are_touched():
    x, gate_up, down, chosen, weights = random_layer(50, 8, 2, 0)
    used = torch.tensor([1, 4, 6])
    chosen = used[torch.stack([torch.arange(50) % 3, (torch.arange(50) + 1) % 3], -1)]
    poison = torch.ones(8, dtype=torch.bool)
    poison[used] = False
    gate_up[poison], down[poison] = float("nan"), float("nan")
    rows = []
    def act(gate, up): rows.append(len(gate)); return swiglu(gate, up)
    with FlopCounterMode(display=False) as counter: out = moe(x, gate_up, down, chosen, weights, act)
    assert out.isfinite().all() and len(rows) == 3 and sum(rows) == 100
    assert counter.get_total_flops() == 50 * 2 * 6 * C * WIDTH


def test_an_idle_expert_gets_zero_gradient_and_does_not_break_training():
    x, gate_up, down, chosen, weights = random_layer(20, 4, 1, 1)
    gate_up.requires_grad_()
    moe(x, gate_up, down, chosen.clamp(max=1), weights).sum().backward()
    assert (gate_up.grad[2:] == 0).all() and (gate_up.grad[0] != 0).any()
    assert MoE(C, WIDTH, 4, 2, shared_intermediate_size=8)(torch.zeros(0, 5, C), OPS).shape == (0, 5, C)


def test_order_of_tokens_and_of_experts_does_not_matter():
    x, gate_up, down, chosen, weights = random_layer(64, 8, 3, 2)
    out = moe(x, gate_up, down, chosen, weights)
    tokens = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(moe(x[tokens], gate_up, down, chosen[tokens], weights[tokens]), out[tokens], atol=1e-6)
    experts = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(moe(x, gate_up[experts], down[experts], experts.argsort()[chosen], weights), out, atol=1e-6)
    assert torch.allclose(moe(x, gate_up, down, chosen.flip(-1), weights.flip(-1)), out, atol=1e-6)


def test_a_token_alone_equals_the_token_in_a_batch():
    _, ours = pair("deepseek_v3", seed=8)
    x = torch.randn(3, 9, C)
    together = ours(x, OPS)
    for b, t in itertools.product(range(3), range(9)):
        assert torch.allclose(ours(x[b:b + 1, t:t + 1], OPS)[0, 0], together[b, t], atol=2e-5)


def test_k_equal_to_E_is_a_soft_mixture():
    x, gate_up, down, chosen, _ = random_layer(30, 6, 6, 3)
    logits = torch.randn(30, 6)
    chosen, weights = route(logits, 6)
    everyone = torch.arange(6).expand(30, 6)
    assert torch.allclose(moe(x, gate_up, down, chosen, weights), moe(x, gate_up, down, everyone, logits.softmax(-1)), atol=2e-6)


def test_one_expert_is_the_plain_mlp():
    x, gate_up, down, chosen, weights = random_layer(30, 1, 1, 4)
    gate, up = (x @ gate_up[0].T).chunk(2, -1)
    assert torch.allclose(moe(x, gate_up, down, chosen, weights), swiglu(gate, up) @ down[0].T, atol=1e-6) and (weights == 1).all()


def test_act_of_the_ops_table_is_used():
    layer, x = MoE(C, WIDTH, 4, 2, shared_intermediate_size=8), torch.randn(1, 5, C)
    silent = SimpleNamespace(linear=linear, moe=moe, swiglu=lambda gate, up: torch.zeros_like(gate))
    assert (layer(x, silent) == 0).all() and (layer(x, OPS) != 0).any()
    seen = []
    layer(x, SimpleNamespace(linear=linear, swiglu=swiglu, moe=lambda *args, **kw: (seen.append(args[3].shape), moe(*args, **kw))[1]))
    assert seen == [(5, 2)], "the layer must go through ops.moe"


# --- the router --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, dict(normalise=False), dict(score="sigmoid"), dict(score="sigmoid", n_groups=4, top_groups=2), dict(n_groups=4, top_groups=1)])
def test_ties_give_different_experts_of_equal_weight(options):
    chosen, weights = route(torch.zeros(100, 16), 4, **options)
    assert all(len(set(row)) == 4 for row in chosen.tolist()) and (weights == weights[0, 0]).all()


def test_extreme_logits_stay_finite():
    for value in (1e4, -1e4, -1e30):
        for options in ({}, dict(score="sigmoid"), dict(normalise=False)):
            assert route(torch.full((3, 8), value), 2, **options)[1].isfinite().all(), (value, options)
    assert (route(torch.full((3, 8), -1e4), 2, score="sigmoid")[1] == 0).all()   # all scores underflow: no expert, not NaN


def test_weights_come_back_in_fp32_or_better():
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        chosen, weights = route(torch.randn(4, 8).to(dtype), 2)
        assert weights.dtype == want and chosen.dtype == torch.int64


def test_groups_limit_the_choice_also_below_zero():
    logits, bias = torch.randn(500, 16), torch.full((16,), -3.0)      # scores plus bias are all negative
    chosen, weights = route(logits, 4, score="sigmoid", bias=bias, n_groups=4, top_groups=1)
    assert ((chosen // 4).amin(-1) == (chosen // 4).amax(-1)).all(), "experts outside the best group were chosen"
    assert torch.allclose(weights.sum(-1), torch.ones(500)), "the bias leaked into the weights"


def test_a_group_counts_by_its_best_or_by_its_two_best():
    logits = torch.tensor([[3.0, -9, -9, -9, 2.5, 2.5, -9, -9]])      # one star against two good ones
    assert route(logits, 2, n_groups=2, top_groups=1)[0].min() == 0
    assert route(logits, 2, score="sigmoid", n_groups=2, top_groups=1)[0].min() == 4


@pytest.mark.parametrize("k, options, words", [(2, dict(score="relu"), "relu"), (0, {}, "cannot choose 0"), (9, {}, "cannot choose 9 of 8"),
                                               (2, dict(n_groups=3, top_groups=1), "equal size"), (2, dict(n_groups=2), "top_groups"),
                                               (2, dict(n_groups=2, top_groups=3), "top_groups"), (3, dict(n_groups=4, top_groups=1), "cannot choose 3 of 2")])
def test_impossible_routing_is_refused(k, options, words):
    with pytest.raises(UnsupportedError, match=words): route(torch.zeros(1, 8), k, **options)


def test_load_counts_every_expert_and_the_bias_restores_balance():
    assert expert_load(torch.tensor([[0, 2], [2, 0]]), 4).tolist() == [2, 0, 2, 0]
    assert expert_load(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    g = torch.Generator().manual_seed(0)
    slope, bias, before = torch.linspace(2, -2, 8), torch.zeros(8), None
    for step in range(400):
        chosen, _ = route(torch.randn(512, 8, generator=g) + slope, 2, score="sigmoid", bias=bias)
        load = expert_load(chosen, 8)
        before = load if before is None else before
        bias = update_bias(bias, load, 0.01)
    assert before.max() > 2.5 * before.float().mean() and load.max() < 1.3 * load.float().mean()
    assert (bias.diff() > 0).all(), "favoured experts must end with the lower bias"


def test_correction_bias_is_state_but_no_parameter():
    layer = MoE(C, WIDTH, 8, 2, correction_bias=True)
    assert "gate.e_score_correction_bias" in layer.state_dict() and "gate.e_score_correction_bias" not in dict(layer.named_parameters())
    assert "gate.e_score_correction_bias" not in MoE(C, WIDTH, 8, 2).state_dict()


# --- mutants: a check that passes them is no check ---------------------------------------------------------------------

def check_against_transformers():
    for name in ("mixtral", "qwen2", "deepseek_v2", "deepseek_v3"):
        theirs, ours = pair(name, seed=9)
        x = torch.randn(2, 100, C, generator=torch.Generator().manual_seed(10))
        ops = SimpleNamespace(linear=linear, moe=module.moe, swiglu=swiglu)
        want, got = theirs(x), ours(x, ops)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name


def check_op():
    layer = random_layer(60, 8, 3, 11)
    assert torch.allclose(module.moe(*layer).double(), every_expert(*layer), atol=1e-5)


def check_work():
    x, gate_up, down, chosen, weights = random_layer(60, 8, 2, 12)
    with FlopCounterMode(display=False) as counter: module.moe(x, gate_up, down, chosen, weights)
    assert counter.get_total_flops() == 60 * 2 * 6 * C * WIDTH


MUTANTS = {   # name: (function, text to replace, replacement, the check that must notice)
    "softmax before top-k, not renormalised": ("route", "if normalise: weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)", "pass", check_against_transformers),
    "always renormalised": ("route", "if normalise: weights", "weights", check_against_transformers),
    "bias inside the weights": ("route", "weights = scores.gather(-1, chosen)", "weights = ranking.masked_fill(ranking.isinf(), 0).gather(-1, chosen)", check_against_transformers),
    "bias ignored": ("route", "scores if bias is None else scores + bias", "scores", check_against_transformers),
    "scale before normalising": ("route", "scores = wide.softmax(-1) if score == \"softmax\" else wide.sigmoid()", "scores = scale * (wide.softmax(-1) if score == \"softmax\" else wide.sigmoid()); scale = 1.0",
                                 check_against_transformers),
    "groups by their best expert only": ("route", "best=1 if score == \"softmax\" else 2", "best=1", check_against_transformers),
    "groups by their two best always": ("route", "best=1 if score == \"softmax\" else 2", "best=2", check_against_transformers),
    "groups ignored": ("route", "if n_groups is not None: ranking", "if False: ranking", check_against_transformers),
    "softmax for sigmoid": ("route", "wide.softmax(-1) if score == \"softmax\" else wide.sigmoid()", "wide.softmax(-1)", check_against_transformers),
    "worst experts chosen": ("route", "ranking.topk(top_k, -1)", "ranking.topk(top_k, -1, largest=False)", check_against_transformers),
    "gate and up exchanged": ("moe", "gate, up =", "up, gate =", check_op),
    "weight of the wrong choice": ("moe", "weights.flatten()[mine, None]", "weights[tokens, 0, None]", check_op),
    "results at the wrong tokens": ("moe", "tokens = mine // k", "tokens = mine % len(x)", check_op),
    "assignments not sorted by expert": ("moe", "chosen.flatten().argsort(stable=True)", "torch.arange(chosen.numel())", check_op),
    "the last expert wins": ("moe", "out.index_add_(0, tokens,", "out.index_copy_(0, tokens,", check_op),
    "weights forgotten": ("moe", " * weights.flatten()[mine, None]", "", check_op),
    "idle experts counted short": ("moe", "bincount(minlength=len(gate_up))", "unique(return_counts=True)[1]", None),
    "every expert on all tokens": ("moe", "for e, mine in", "for each in gate_up: F.linear(x, each)\n    for e, mine in", check_work),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_rejected(name, monkeypatch):
    function, old, new, check = MUTANTS[name]
    source = inspect.getsource(getattr(module, function))
    assert source.count(old) == 1, f"the mutant {name!r} does not fit the code any more"
    scope = dict(vars(module))
    exec(source.replace(old, new), scope)
    if check is None:   # idle experts: counts fall one place to the left
        def check():
            x, gate_up, down, chosen, weights = random_layer(30, 8, 2, 13)
            chosen = torch.tensor([2, 5]).expand(30, 2)
            assert torch.allclose(module.moe(x, gate_up, down, chosen, weights).double(), every_expert(x, gate_up, down, chosen, weights), atol=1e-5)
    check()                                                    # the true code passes
    monkeypatch.setattr(module, function, scope[function])
    with pytest.raises((AssertionError, RuntimeError)): check()
