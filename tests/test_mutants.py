"""Known-wrong variants, each a mistake that somebody shipped: the checks of this project must reject every one.

A mutant is a check called with something wrong plugged in. The same check passes with the right thing, so what is
rejected is the mistake and nothing else.
"""
from dataclasses import replace

import pytest
import torch

from llm_workbench import Decoder
from llm_workbench.architecture.attention import attention, visible
from llm_workbench.architecture.kv_cache import ContiguousCache
from llm_workbench.architecture.moe import moe
from llm_workbench.architecture.norms_and_mlps import rms_norm
from llm_workbench.architecture.rope import half_from_interleaved, rotate
from checks import cached_is_uncached, matches_transformers, ragged_is_single, tiny


def with_ops(**ops): return lambda decoder: decoder.with_ops(**ops)


# --- wrong primitives -----------------------------------------------------------------------------------------------

def rope_layout_swapped(x, cos, sin): return rotate(half_from_interleaved(x), cos, sin)
def rope_turned_backwards(x, cos, sin):
    # 9 query heads, then the keys
    return torch.cat([rotate(x[:, :, :9], cos, -sin), rotate(x[:, :, 9:], cos, sin)], 2)
def rope_on_queries_only(x, cos, sin): return torch.cat([rotate(x[:, :, :9], cos, sin), x[:, :, 9:]], 2)
def missing_scale(q, k, v, **options): return attention(q, k, v, **{**options, "scale": 1.0})
def norm_without_epsilon(x, weight, eps): return rms_norm(x, weight, 0.0)
def norm_epsilon_outside(x, weight, eps): return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def kv_heads_in_the_wrong_order(q, k, v, **options):
    "Tiles the KV heads (0 1 2 0 1 2 ...) instead of repeating each (0 0 0 1 1 1 ...)."
    n = q.shape[2] // k.shape[2]
    return attention(q, k.repeat(1, 1, n, 1), v.repeat(1, 1, n, 1), **options)


def mask_off_by_one(q, k, v, *, causal=True, window=None, **options):
    "Lets every query see one token of the future: key j <= i + 1."
    Tq, Tk = q.shape[1], k.shape[1]
    if Tk == 1: return attention(q, k, v, **options)
    seen = visible(Tq, Tk) | torch.eye(Tq, Tk, dtype=torch.bool).roll(Tk - Tq + 1, 1)
    n = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(n, 2), v.repeat_interleave(n, 2)
    return torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=seen[:, None]
    ).transpose(1, 2)


def window_off_by_one(q, k, v, *, window=None, **options):
    return attention(q, k, v, window=window and window + 1, **options)
def window_forgotten(q, k, v, *, window=None, **options): return attention(q, k, v, **options)


def router_softmax_before_top_k(decoder):
    "Softmax over all experts, top-k of it, and no renormalising: the chosen weights do not add up to one."
    for block in decoder.layers: block.mlp.options["normalise"] = False
    return decoder


def router_weights_ignored(x, gate_up, down, chosen, weights, *rest):
    return moe(x, gate_up, down, chosen, torch.full_like(weights, 1 / weights.shape[1]), *rest)
def gate_and_up_exchanged(gate, up): return up * torch.sigmoid(up) * gate


EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
WRONG_MODELS = {
    "RoPE layout swapped": ("llama", {}, with_ops(rotate=rope_layout_swapped)),
    "RoPE turned backwards for queries": ("llama", {}, with_ops(rotate=rope_turned_backwards)),
    "RoPE on queries only": ("llama", {}, with_ops(rotate=rope_on_queries_only)),
    "mask off by one": ("llama", {}, with_ops(attention=mask_off_by_one)),
    "KV heads in the wrong order": ("llama", {}, with_ops(attention=kv_heads_in_the_wrong_order)),
    "missing scale": ("llama", {}, with_ops(attention=missing_scale)),
    "norm without epsilon": ("llama", {}, with_ops(rms_norm=norm_without_epsilon)),
    "norm epsilon outside the root": ("llama", {}, with_ops(rms_norm=norm_epsilon_outside)),
    "gate and up exchanged": ("llama", {}, with_ops(swiglu=gate_and_up_exchanged)),
    "window off by one": ("mistral", dict(sliding_window=5), with_ops(attention=window_off_by_one)),
    "window forgotten": ("mistral", dict(sliding_window=5), with_ops(attention=window_forgotten)),
    "router softmax before top-k": ("mixtral", EXPERTS, router_softmax_before_top_k),
    "router weights ignored": ("mixtral", EXPERTS, with_ops(moe=router_weights_ignored)),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_wrong_model_is_rejected(name):
    family, changes, mistake = WRONG_MODELS[name]
    hf = tiny(family, **changes)
    matches_transformers(hf)
    with pytest.raises(AssertionError, match="differ from transformers"): matches_transformers(hf, mistake)


# --- wrong caches ---------------------------------------------------------------------------------------------------

class PositionsReset(ContiguousCache):
    "Every call counts positions from zero again."
    def begin(self, batch, n_tokens, device=None, **where):
        return super().begin(batch, n_tokens, device, **where | dict(positions=torch.arange(n_tokens, device=device)))


class AdvancesTooFar(ContiguousCache):
    "Ragged rows advance by the padded length: pads stay in the past."
    def commit(self, step):
        step.counts = None
        super().commit(step)


class TrimsBeforeAttending(ContiguousCache):
    "Forgets what lies outside the window of the *last* query before the earlier queries have seen it."
    def attend(self, step, layer, q, k, v, ops, *, window=None, **options):
        def trimmed(q, k, v, **options): return ops.attention(q, k[:, -window:], v[:, -window:], **options)
        return super().attend(
            step, layer, q, k, v, replace(ops, attention=trimmed) if window else ops, window=window, **options
        )


def test_cache_position_reset_is_rejected():
    decoder = Decoder.from_transformers(tiny())
    cached_is_uncached(decoder)
    with pytest.raises(AssertionError, match="cached differs"): cached_is_uncached(decoder, lambda d: PositionsReset(2))


def test_ragged_rows_that_advance_too_far_are_rejected():
    decoder = Decoder.from_transformers(tiny())
    ragged_is_single(decoder)
    with pytest.raises(AssertionError, match="ragged batch differs"):
        ragged_is_single(decoder, lambda d: AdvancesTooFar(2))


def test_trimming_before_attending_is_rejected():
    decoder = Decoder.from_transformers(tiny("mistral", sliding_window=5))
    for store in ("contiguous", "sliding"): cached_is_uncached(decoder, lambda d: d.new_cache(store))
    with pytest.raises(AssertionError, match="cached differs"):
        cached_is_uncached(decoder, lambda d: TrimsBeforeAttending(2))
