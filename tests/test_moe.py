"Mixture of experts beyond the lesson: parity under many shapes and types, degenerate routing, rejected mutants."
import copy
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (DeepseekV2Config, DeepseekV3Config, Glm4MoeConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig,
                          Qwen3MoeConfig)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llm_workbench.architecture import moe as module
from llm_workbench.architecture.matrices import Linear, Stack, linear, several, stack_linear, swapped
from llm_workbench.architecture.moe import (MoE, clamped_swiglu, expert_load, load_balancing_loss, moe, route,
                                            update_bias)
from llm_workbench.architecture.norms_and_mlps import swiglu
from llm_workbench.errors import InputError

OPS = SimpleNamespace(linear=linear, several=several, stack_linear=stack_linear, route=route, moe=moe, swiglu=swiglu)
C, WIDTH = 32, 24
SHARED = dict(hidden_size=C, moe_intermediate_size=WIDTH)


def mixtral():
    return MixtralSparseMoeBlock(MixtralConfig(hidden_size=C, intermediate_size=WIDTH)), dict(n_experts=8, top_k=2)


def olmoe():
    config = OlmoeConfig(hidden_size=C, intermediate_size=WIDTH, num_experts=16, num_experts_per_tok=4)
    return OlmoeSparseMoeBlock(config), dict(n_experts=16, top_k=4, normalise=False)


def qwen2(normalise=False):
    config = Qwen2MoeConfig(**SHARED, num_experts=12, num_experts_per_tok=4, shared_expert_intermediate_size=40,
                            norm_topk_prob=normalise)
    return Qwen2MoeSparseMoeBlock(config), dict(n_experts=12, top_k=4, normalise=normalise, shared_intermediate_size=40,
                                                shared_gate=True)


def qwen3(normalise=True):
    config = Qwen3MoeConfig(**SHARED, num_experts=16, num_experts_per_tok=4, norm_topk_prob=normalise)
    return Qwen3MoeSparseMoeBlock(config), dict(n_experts=16, top_k=4, normalise=normalise)


def deepseek_v2(method="group_limited_greedy"):
    config = DeepseekV2Config(**SHARED, n_routed_experts=16, num_experts_per_tok=3, topk_method=method, n_group=4,
                              topk_group=2, routed_scaling_factor=16.0)
    groups = dict(n_groups=4, top_groups=2) if method != "greedy" else {}
    return DeepseekV2Moe(config), dict(n_experts=16, top_k=3, normalise=False, scale=16.0, fp32=True,
                                       shared_intermediate_size=2 * WIDTH, **groups)


def deepseek_v3(normalise=True):
    config = DeepseekV3Config(**SHARED, n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2,
                              routed_scaling_factor=2.5, norm_topk_prob=normalise)
    return DeepseekV3MoE(config), dict(n_experts=16, top_k=3, normalise=normalise, score="sigmoid", scale=2.5,
                                       n_groups=4, top_groups=2, fp32=True, correction_bias=True,
                                       shared_intermediate_size=WIDTH)


def glm4():
    config = Glm4MoeConfig(**SHARED, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1,
                           n_shared_experts=1, routed_scaling_factor=1.5)
    return Glm4MoeMoE(config), dict(n_experts=16, top_k=4, score="sigmoid", scale=1.5, n_groups=1, top_groups=1,
                                    fp32=True, correction_bias=True, shared_intermediate_size=WIDTH)


BLOCKS = {"mixtral": mixtral, "olmoe": olmoe, "qwen2": qwen2, "qwen2 normalised": lambda: qwen2(True), "qwen3": qwen3,
          "qwen3 raw": lambda: qwen3(False), "deepseek_v2": deepseek_v2,
          "deepseek_v2 greedy": lambda: deepseek_v2("greedy"), "deepseek_v3": deepseek_v3,
          "deepseek_v3 raw": lambda: deepseek_v3(False), "glm4": glm4}


def ours_from(theirs):
    "The tensors of a block of transformers by our names."
    names = {"gate.e_score_correction_bias": "e_score_correction_bias"}
    for stack in ("experts.gate_up_proj", "experts.down_proj"):
        names |= {stack: stack + ".weight", stack + "_bias": stack + ".bias"}
    return {names.get(name, name): tensor for name, tensor in theirs.items()}


def pair(name, seed=0, spread=0.3):
    "A block of transformers with random weights and biases, and ours with the same numbers."
    theirs, options = BLOCKS[name]()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in itertools.chain(theirs.parameters(), theirs.buffers()):
            t.copy_(torch.randn(t.shape, generator=g) * spread)
    ours = MoE(C, WIDTH, **options)
    ours.load_state_dict(ours_from(theirs.state_dict()))   # strict: names and shapes must match
    return theirs, ours


def share(chosen, weights, E):                                                # -> (N, E)
    return torch.zeros(len(chosen), E, dtype=weights.dtype).scatter(1, chosen, weights)


def every_expert(x, gate_up, down, chosen, weights, act=swiglu):
    "All experts on all tokens in fp64: the truth."
    x, gate_up, down = x.double(), gate_up.double(), down.double()
    gate, up = torch.einsum("nc,efc->enf", x, gate_up).chunk(2, -1)
    out = torch.einsum("enf,ecf->enc", act(gate, up), down)
    return torch.einsum("ne,enc->nc", share(chosen, weights.double(), len(gate_up)), out)


class Given(Stack):
    "A stack over tensors that are there already."
    def __init__(self, weight, bias=None):
        nn.Module.__init__(self)
        self.__dict__.update(weight=weight, bias=bias)     # not parameters: gradients flow to where they came from


def chosen_only(x, gate_up, down, chosen, weights, act=swiglu, op=moe, ops=OPS):
    "The op on plain tensors."
    return op(x, Given(gate_up), Given(down), chosen, weights, act, ops)


def random_layer(N, E, k, seed, dtype=torch.float32, C=C, width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g).to(dtype)
    x, gate_up, down = draw(N, C), draw(E, 2 * width, C) / C**0.5, draw(E, C, width) / width**0.5
    return x, gate_up, down, *route(draw(N, E), k)


# --- against transformers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1, C), (1, 37, C), (4, 16, C)])
def test_block_equals_transformers(name, shape):
    theirs, ours = pair(name, seed=len(name))
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    b = a.detach().clone().requires_grad_()
    want, got = theirs(a), ours(b, OPS)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= 1e-6 * want.abs().max(), f"{name}: differs by {(got - want).abs().max():.1e}"
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (want * probe).mean().backward()
    (got * probe).mean().backward()
    named = ours_from(dict(theirs.named_parameters()))
    for label, t, o in [("x", a, b)] + [(n, named[n], p) for n, p in ours.named_parameters()]:
        differ = (t.grad - o.grad).abs().max()
        assert differ <= 1e-6 * max(1.0, t.grad.abs().max().item()), f"{name}: gradient of {label} differs"


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("spread", [1e-4, 0.3, 5.0])   # nearly equal logits, usual ones, saturated ones
def test_router_equals_transformers(name, spread):
    theirs, ours = pair(name, seed=3, spread=spread)
    x = torch.randn(1000, C, generator=torch.Generator().manual_seed(4))
    logits, want_weights, want_chosen = theirs.gate(x)
    ours_logits, chosen, weights = ours.choose(x, OPS)
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
    bias = ours.e_score_correction_bias                     # kept in fp32 by transformers when it loads a model
    bias = None if bias is None else bias.clone()
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    if bias is not None: theirs.gate.e_score_correction_bias, ours.e_score_correction_bias = bias, bias
    _, chosen, weights = ours.choose(x[0], OPS)
    assert torch.equal(chosen.sort().values, theirs.gate(x[0])[2].sort().values)
    exact.load_state_dict({n: t.double() for n, t in ours.state_dict().items()})
    exact.choose = lambda tokens, ops: (None, chosen, weights.double())     # the same experts, all else exact
    truth = exact(x.double(), OPS)
    error = lambda y: (y.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    got, want = ours(x, OPS), theirs(x)
    assert got.dtype == torch.bfloat16
    assert error(got) <= 1.02 * error(want), f"bf16 error {error(got):.2%}, transformers' {error(want):.2%}"
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
        "gate.weight": (8, 4096), "experts.gate_up_proj.weight": (8, 28672, 4096),
        "experts.down_proj.weight": (8, 4096, 14336)}


# --- the op ---------------------------------------------------------------------------------------------------------

def test_op_on_200_random_layers():
    g = torch.Generator().manual_seed(7)
    pick = lambda lo, hi: torch.randint(lo, hi + 1, (), generator=g).item()
    for seed in range(200):
        N, E = pick(0, 40), pick(1, 20)
        layer = random_layer(N, E, pick(1, E), seed, C=pick(1, 20), width=pick(1, 20))
        want = every_expert(*layer)
        got = chosen_only(*layer)
        assert got.shape == want.shape, f"seed {seed}"
        assert N == 0 or (got - want).abs().max() <= 2e-6 * (1 + want.abs().max()), f"seed {seed}"


def test_only_chosen_experts_are_touched():
    x, gate_up, down, chosen, weights = random_layer(50, 8, 2, 0)
    used = torch.tensor([1, 4, 6])
    chosen = used[torch.stack([torch.arange(50) % 3, (torch.arange(50) + 1) % 3], -1)]
    poison = torch.ones(8, dtype=torch.bool)
    poison[used] = False
    gate_up[poison], down[poison] = float("nan"), float("nan")
    rows, asked = [], []
    def act(gate, up): rows.append(len(gate)); return swiglu(gate, up)
    spy = SimpleNamespace(stack_linear=lambda *args: asked.append(args[2]) or stack_linear(*args))
    with FlopCounterMode(display=False) as counter: out = chosen_only(x, gate_up, down, chosen, weights, act, ops=spy)
    assert out.isfinite().all() and rows == [100]
    assert [set(which.tolist()) for which in asked] == [{1, 4, 6}] * 2
    assert counter.get_total_flops() == 50 * 2 * 6 * C * WIDTH


def test_an_idle_expert_gets_zero_gradient_and_does_not_break_training():
    x, gate_up, down, chosen, weights = random_layer(20, 4, 1, 1)
    gate_up.requires_grad_()
    chosen_only(x, gate_up, down, chosen.clamp(max=1), weights).sum().backward()
    assert (gate_up.grad[2:] == 0).all() and (gate_up.grad[0] != 0).any()
    assert MoE(C, WIDTH, 4, 2, shared_intermediate_size=8)(torch.zeros(0, 5, C), OPS).shape == (0, 5, C)


def test_order_of_tokens_and_of_experts_does_not_matter():
    x, gate_up, down, chosen, weights = random_layer(64, 8, 3, 2)
    out = chosen_only(x, gate_up, down, chosen, weights)
    tokens = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = chosen_only(x[tokens], gate_up, down, chosen[tokens], weights[tokens])
    assert torch.allclose(shuffled, out[tokens], atol=1e-6)
    experts = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    renumbered = chosen_only(x, gate_up[experts], down[experts], experts.argsort()[chosen], weights)
    assert torch.allclose(renumbered, out, atol=1e-6)
    assert torch.allclose(chosen_only(x, gate_up, down, chosen.flip(-1), weights.flip(-1)), out, atol=1e-6)


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
    mixture = chosen_only(x, gate_up, down, torch.arange(6).expand(30, 6), logits.softmax(-1))
    assert torch.allclose(chosen_only(x, gate_up, down, chosen, weights), mixture, atol=2e-6)


def test_one_expert_is_the_plain_mlp():
    x, gate_up, down, chosen, weights = random_layer(30, 1, 1, 4)
    gate, up = (x @ gate_up[0].T).chunk(2, -1)
    assert (weights == 1).all()
    assert torch.allclose(chosen_only(x, gate_up, down, chosen, weights), swiglu(gate, up) @ down[0].T, atol=1e-6)


def test_act_of_the_ops_table_is_used():
    layer, x = MoE(C, WIDTH, 4, 2, shared_intermediate_size=8), torch.randn(1, 5, C)
    silent = SimpleNamespace(**{**vars(OPS), "swiglu": lambda gate, up: torch.zeros_like(gate)})
    assert (layer(x, silent) == 0).all() and (layer(x, OPS) != 0).any()
    seen = []
    layer(x, SimpleNamespace(**{**vars(OPS), "moe": lambda *args: (seen.append(args[3].shape), moe(*args))[1]}))
    assert seen == [(5, 2)], "the layer must go through ops.moe"


# --- the layer asks its matrices ------------------------------------------------------------------------------------

class Sum(nn.Module):
    "Stands in for a matrix or a stack that is the sum of two."
    def __init__(self, first, second): super().__init__(); self.first, self.second = first, second
    def forward(self, *asked): return self.first(*asked) + self.second(*asked)


def scaled(module, factor):
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters(): p.mul_(factor)
    return twin


ASKING = {"mixtral": dict(), "gpt-oss": dict(bias=True, act=clamped_swiglu),
          "deepseek": dict(fp32=True, score="sigmoid", shared_intermediate_size=8),
          "qwen": dict(shared_intermediate_size=8, shared_gate=True)}


@pytest.mark.parametrize("name", ASKING)
def test_every_matrix_is_asked_and_none_is_read(name):
    torch.manual_seed(0)
    layer, x = MoE(C, WIDTH, 6, 2, **ASKING[name]), torch.randn(2, 30, C)
    with torch.no_grad():
        for p in layer.parameters(): p.normal_(std=0.3)
    places = [place for place, part in layer.named_modules() if isinstance(part, (Linear, Stack))]
    assert len(places) == {"mixtral": 3, "gpt-oss": 3, "deepseek": 6, "qwen": 7}[name]
    for place in places:
        def sums(a, b): return lambda at, part: Sum(scaled(part, a), scaled(part, b)) if at == place else part
        assert torch.equal(swapped(layer, sums(0.5, 0.5))(x, OPS), layer(x, OPS)), f"somebody reads {place}"
        silent = swapped(layer, sums(1, -1))(x, OPS)
        assert not torch.allclose(silent, layer(x, OPS), atol=1e-3), f"nobody asks {place}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp32", [False, True])
def test_a_router_keeps_its_bias_in_float32(fp32, dtype):
    layer = MoE(C, WIDTH, 6, 2, bias=True, fp32=fp32)
    with torch.no_grad(): layer.gate.bias.copy_(torch.tensor([0, 30.0, 0, 0, 20.0, 0]))
    layer, tokens = layer.to(dtype), torch.randn(50, C).to(dtype)
    logits, chosen, _ = layer.choose(tokens, OPS)
    wide = torch.float32 if fp32 else dtype
    want = F.linear(*(t.to(wide) for t in (tokens, layer.gate.weight, layer.gate.bias)))
    assert logits.dtype is wide and torch.equal(logits, want)
    assert (chosen == torch.tensor([1, 4])).all()


def test_a_step_is_one_graph():
    layer = MoE(C, WIDTH, 6, 2, shared_intermediate_size=8)
    step = torch.compile(lambda x: layer(x, OPS), fullgraph=True, backend="eager")
    for seed in range(3):
        x = torch.randn(4, 1, C, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(step(x), layer(x, OPS), atol=1e-6)


# --- the router -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, dict(normalise=False), dict(score="sigmoid"),
                                     dict(score="sigmoid", n_groups=4, top_groups=2),
                                     dict(n_groups=4, top_groups=1)])
def test_ties_give_different_experts_of_equal_weight(options):
    chosen, weights = route(torch.zeros(100, 16), 4, **options)
    assert all(len(set(row)) == 4 for row in chosen.tolist()) and (weights == weights[0, 0]).all()


def test_extreme_logits_stay_finite():
    for value in (1e4, -1e4, -1e30):
        for options in ({}, dict(score="sigmoid"), dict(normalise=False)):
            assert route(torch.full((3, 8), value), 2, **options)[1].isfinite().all(), (value, options)
    assert (route(torch.full((3, 8), -1e4), 2, score="sigmoid")[1] == 0).all()   # all underflow: no expert, not NaN


def test_weights_come_back_in_fp32_or_better():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        chosen, weights = route(torch.randn(4, 8).to(dtype), 2)
        assert weights.dtype == torch.promote_types(dtype, torch.float32) and chosen.dtype == torch.int64


def test_groups_limit_the_choice_also_below_zero():
    logits, bias = torch.randn(500, 16), torch.full((16,), -3.0)      # scores plus bias are all negative
    chosen, weights = route(logits, 4, score="sigmoid", bias=bias, n_groups=4, top_groups=1)
    assert ((chosen // 4).amin(-1) == (chosen // 4).amax(-1)).all(), "experts outside the best group were chosen"
    assert torch.allclose(weights.sum(-1), torch.ones(500)), "the bias leaked into the weights"


def test_a_group_counts_by_its_best_or_by_its_two_best():
    logits = torch.tensor([[3.0, -9, -9, -9, 2.5, 2.5, -9, -9]])      # one star against two good ones
    assert route(logits, 2, n_groups=2, top_groups=1)[0].min() == 0
    assert route(logits, 2, score="sigmoid", n_groups=2, top_groups=1)[0].min() == 4


@pytest.mark.parametrize("k, options, words", [
    (2, dict(score="relu"), "relu"), (2, dict(score="sigmod"), "'sigmoid'?"), (0, {}, "cannot choose 0"),
    (9, {}, "cannot choose 9 of 8"),
    (9, dict(score="sparsemixer"), "cannot choose 9 of 8"), (2, dict(n_groups=3, top_groups=1), "equal size"),
    (2, dict(n_groups=2), "top_groups"), (2, dict(n_groups=2, top_groups=3), "top_groups"),
    (3, dict(n_groups=4, top_groups=1), "cannot choose 3 of 2")])
def test_impossible_routing_is_refused(k, options, words):
    with pytest.raises(InputError, match=words): route(torch.zeros(1, 8), k, **options)


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
    assert "e_score_correction_bias" in layer.state_dict()
    assert "e_score_correction_bias" not in dict(layer.named_parameters())
    assert "e_score_correction_bias" not in MoE(C, WIDTH, 8, 2).state_dict()


# --- mutants: a check that passes them is no check ------------------------------------------------------------------

def plain_route(logits, top_k, *, score="softmax", normalise=True, bias=None, scale=1.0, n_groups=None, top_groups=None,
                group_best=None, bias_in_weights=False, bias_in_choice=True, scale_first=False, always_softmax=False,
                worst=False):
    "`route` as a loop over tokens; the options from `group_best` on make it wrong."
    chosen, weights = [], []
    for row in logits.double():
        scores = row.softmax(-1) if score == "softmax" or always_softmax else row.sigmoid()
        ranking = scores if bias is None or not bias_in_choice else scores + bias.double()
        groups = ranking.view(n_groups or 1, -1)
        worth = groups.sort(-1, descending=True).values[:, :group_best or (1 if score == "softmax" else 2)].sum(-1)
        is_open = set(worth.sort(descending=True).indices[:top_groups or 1].tolist())
        allowed = [e for e in range(len(row)) if e // groups.shape[1] in is_open]
        best = sorted(allowed, key=lambda e: ranking[e].item(), reverse=not worst)[:top_k]
        mine = (ranking if bias_in_weights else scores)[best]
        if scale_first: mine = mine * scale
        if normalise: mine = mine / mine.sum()
        chosen.append(torch.tensor(best))
        weights.append(mine if scale_first else mine * scale)
    return torch.stack(chosen), torch.stack(weights).float()


def without(**options): return lambda logits, k, **given: route(logits, k, **{**given, **options})


def only_last(weights): return torch.cat([torch.zeros_like(weights[:, :-1]), weights[:, -1:]], -1)


def every_expert_too(x, gate_up, down, *rest):
    for each in gate_up.dense(): F.linear(x, each)
    return moe(x, gate_up, down, *rest)


def copies_one_below_the_other(x, gate_up, down, chosen, weights, act, ops):
    "Row r of the N * k rows holds token r % N rather than r // k."
    (N, k), n = chosen.shape, torch.arange(len(x))
    parts = [(x[(n * k + j) % N], chosen[:, j:j + 1], weights[:, j:j + 1]) for j in range(k)]
    return sum(moe(rows, gate_up, down, one, weight, act, ops) for rows, one, weight in parts)


def unsorted(x, weight, which, bias=None): return stack_linear(x, weight, which.sort().values, bias)


def check_against_transformers(op=moe):
    for name in ("mixtral", "qwen2", "deepseek_v2", "deepseek_v3"):
        theirs, ours = pair(name, seed=9)
        x = torch.randn(2, 50, C, generator=torch.Generator().manual_seed(10))
        want, got = theirs(x), ours(x, SimpleNamespace(**{**vars(OPS), "moe": op}))
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name


def check_op(op=moe):
    layer = random_layer(60, 8, 3, 11)
    assert torch.allclose(chosen_only(*layer, op=op).double(), every_expert(*layer), atol=1e-5)


def check_work(op=moe):
    layer = random_layer(60, 8, 2, 12)
    with FlopCounterMode(display=False) as counter: chosen_only(*layer, op=op)
    assert counter.get_total_flops() == 60 * 2 * 6 * C * WIDTH


def check_idle(op=moe):
    x, gate_up, down, _, weights = random_layer(30, 8, 2, 13)
    layer = x, gate_up, down, torch.tensor([2, 5]).expand(30, 2), weights
    assert torch.allclose(chosen_only(*layer, op=op).double(), every_expert(*layer), atol=1e-5)


ROUTERS = {
    "softmax before top-k, not renormalised": without(normalise=False),
    "always renormalised": without(normalise=True),
    "bias inside the weights": partial(plain_route, bias_in_weights=True),
    "bias ignored": partial(plain_route, bias_in_choice=False),
    "scale before normalising": partial(plain_route, scale_first=True),
    "groups by their best expert only": partial(plain_route, group_best=1),
    "groups by their two best always": partial(plain_route, group_best=2),
    "groups ignored": without(n_groups=None),
    "softmax for sigmoid": partial(plain_route, always_softmax=True),
    "worst experts chosen": partial(plain_route, worst=True),
}
MUTANTS = {   # the op, and the check that must notice
    "gate and up exchanged": (lambda *a: moe(*a[:5], lambda gate, up: a[5](up, gate), a[6]), check_op),
    "weight of the wrong choice": (lambda *a: moe(*a[:4], a[4][:, :1].expand_as(a[4]), *a[5:]), check_op),
    "results at the wrong tokens": (lambda *a: moe(*a).roll(1, 0), check_op),
    "copies one below the other": (copies_one_below_the_other, check_op),
    "assignments not sorted by expert": (lambda *a: moe(*a[:6], SimpleNamespace(stack_linear=unsorted)), check_op),
    "the last expert wins": (lambda *a: moe(*a[:4], only_last(a[4]), *a[5:]), check_op),
    "weights forgotten": (lambda *a: moe(*a[:4], torch.ones_like(a[4]), *a[5:]), check_op),
    "idle experts counted short": (lambda *a: moe(*a[:3], a[3].unique(return_inverse=True)[1], *a[4:]), check_idle),
    "every expert on all tokens": (every_expert_too, check_work),
}


def test_the_right_ones_pass(monkeypatch):
    for check in (check_against_transformers, check_op, check_work, check_idle): check()
    monkeypatch.setattr(OPS, "route", plain_route)
    check_against_transformers()


@pytest.mark.parametrize("name", ROUTERS)
def test_wrong_router_is_rejected(name, monkeypatch):
    monkeypatch.setattr(OPS, "route", ROUTERS[name])
    with pytest.raises(AssertionError): check_against_transformers()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_rejected(name):
    op, check = MUTANTS[name]
    with pytest.raises(AssertionError): check(op)
