"""Several ranks: every variant of every family, mistakes that the checks reject, models packed or adapted, edges; the
formulas against counts; routers under random loads; descriptions that cannot be."""
import random
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from benchmarks.replicas import FLEETS
from llm_workbench.architecture.layers import ModelConfig
from llm_workbench.errors import InputError, UnsupportedError, WorkbenchError
from llm_workbench.families.loading import Decoder
from llm_workbench.quantization.formats import PackedMatrix, quantize
from llm_workbench.serving import scale_out
from llm_workbench.serving.scale_out import (
    WAYS, Device, Fleet, Share, Summed, Vocabulary, by_load, by_prefix, cut, decode_step, model_of, played,
    prefix_key, ray_serve_config, sent, sharded, vllm_command)
from tests.models import SMALL, small_model

VARIANTS = [(family, i) for family, variants in SMALL.items() for i in range(len(variants))]


@cache
def decoder_of(family, variant=0): return Decoder.from_transformers(small_model(family, variant)).double()

@torch.inference_mode()
def logits_of(decoder, split=8):
    "Of two texts, cached: a prompt, then some tokens, then one at a time."
    tokens = torch.randint(decoder.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = decoder.new_cache()
    return torch.cat([decoder(tokens[:, a:b], cache) for a, b in ((0, split), (split, 10), (10, 11), (11, 12))], 1)

def check(decoder, ranks, make=sharded, experts="split"):
    "All ranks have the logits of one process, and the same bits; the largest difference."
    want = logits_of(decoder)
    found = played(ranks, lambda wire: logits_of(make(decoder, wire, experts)))
    assert all(torch.equal(found[0], other) for other in found), "ranks differ from each other"
    apart = ((found[0] - want).abs().max() / want.abs().max()).item()
    assert apart < 1e-11, f"{apart:.1e} from one process"
    return apart


@pytest.mark.parametrize("family, variant", VARIANTS, ids=lambda x: str(x))
def test_every_family_on_two_ranks(family, variant):
    decoder = decoder_of(family, variant)
    check(decoder, 2)
    if decoder.config.num_experts: check(decoder, 2, experts="own")

@pytest.mark.parametrize("family, variant, ranks", [("llama", 0, 1), ("gemma", 0, 3), ("falcon", 0, 5), ("phi", 0, 4),
                                                    ("deepseek_v2", 1, 5), ("llama", 1, 4), ("mixtral", 0, 4)])
def test_other_numbers_of_ranks(family, variant, ranks): check(decoder_of(family, variant), ranks)

def test_groups_of_unequal_number():
    "Three KV heads on two ranks, as the embedded model has them; sizes that nothing divides."
    sizes = dict(vocab_size=31, hidden_size=18, intermediate_size=23, num_hidden_layers=2, num_attention_heads=9,
                 num_key_value_heads=3, head_dim=4, attention_bias=True, output_bias=True, mlp_bias=True)
    for more in (dict(tie_word_embeddings=True, head_bias=True), dict(qk_norm="heads", norm="layer"),
                 dict(qk_norm="all")):
        torch.manual_seed(0)
        decoder = Decoder(ModelConfig(**sizes | more)).double()
        for p in decoder.parameters(): p.data.normal_(std=0.3)
        check(decoder, 2)
        check(decoder, 3)
        with pytest.raises(UnsupportedError, match="at most 3 ranks"):
            played(4, lambda wire, d=decoder: sharded(d, wire))


# ---- mistakes

@contextmanager
def replaced(where, **new):
    old = {name: vars(where)[name] for name in new}
    for name, value in new.items(): setattr(where, name, value)
    try: yield
    finally:
        for name, value in old.items(): setattr(where, name, value)

def cut_with_bias(matrix, *parts, bias=True): return cut(matrix, *parts)

def heads_of_neighbour(self, H, K):
    q, _ = HEADS(self, H, K)
    return q, HEADS(Share((self.rank + 1) % self.size, self.size), H, K)[1]

HEADS = Share.heads

def in_wrong_order(self, x, widths):
    x = GATHER(self, x, widths)
    return torch.cat(x.split(widths, -1)[::-1], -1)

GATHER = scale_out.Wire.gather

def other_embeddings(self, ids, dtype=None):
    "Tokens of other ranks get a row, too."
    return self.wire.sum(self.part.rows((ids - self.own.start).clamp(0, self.widths[self.wire.rank] - 1), dtype))

class Halved(torch.nn.Module):
    "Rows of gate and up as they lie, not of each."
    def __init__(self, half, share):
        super().__init__()
        def make(name, module):
            if name.endswith("gate_up_proj"): return cut(module, scale_out.ALL, share.of(module.dense().shape[1]),
                                                         scale_out.ALL)
            if name.endswith("down_proj"): return cut(module, scale_out.ALL, scale_out.ALL,
                                                      share.of(module.dense().shape[-1]), bias=share.rank == 0)
            return module
        self.part = scale_out.swapped(half, make)
    def forward(self, x, ops): return self.part(x, ops)

MUTANTS = {
    "all-reduce left out": ("llama", scale_out.Wire, dict(sum=lambda self, x: x)),
    "all-reduce that averages": ("llama", scale_out.Wire, dict(sum=lambda self, x: self.added(x) / self.size)),
    "KV heads of the neighbour": ("llama", Share, dict(heads=heads_of_neighbour)),
    "bias of every rank": ("phi", scale_out, dict(cut=cut_with_bias)),
    "head shards in the wrong order": ("llama", scale_out.Wire, dict(gather=in_wrong_order)),
    "embeddings of other ranks' tokens": ("llama", Vocabulary, dict(rows=other_embeddings)),
    "gate and up cut as one": ("mixtral", scale_out, dict(_term=lambda half, share, experts: Halved(half, share))),
    "norm of the own heads only": ("olmo2", scale_out.WholeNorm, dict(
        forward=lambda self, x, ops: self.norm(torch.cat([x, x], -1), ops)[..., self.parts[self.wire.rank]])),
}

@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_rejected(name):
    family, where, new = MUTANTS[name]
    with replaced(where, **new), pytest.raises(AssertionError, match="ranks differ|from one process"):
        check(decoder_of(family), 2)

def test_experts_of_the_neighbour_are_rejected():
    def shifted(self, x, which, ops):
        return OWN(self, x, (which + 1) % 5, ops)
    OWN = scale_out.OwnExperts.forward
    with replaced(scale_out.OwnExperts, forward=shifted), pytest.raises(AssertionError, match="from one process"):
        check(decoder_of("mixtral"), 2, experts="own")


# ---- other plugs

def test_shards_can_be_packed_and_packed_models_be_sharded():
    "The weights plug on top of shards: each rank packs its own part, and sums are still sums."
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32)
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(**sizes))
    packed = quantize(decoder, "int8_g32")
    def rank(wire):
        shard = quantize(sharded(decoder, wire), "int8_g32")
        assert any(isinstance(m, PackedMatrix) for m in shard.modules())
        assert isinstance(shard.layers[0].self_attn.o_proj, Summed) and isinstance(shard.lm_head, Vocabulary)
        return logits_of(shard)
    want = logits_of(packed)
    for got in played(2, rank): assert (got - want).abs().max() < 1e-4 * want.abs().max()      # the same codes
    for got in played(2, lambda wire: logits_of(sharded(packed, wire))):
        assert (got - want).abs().max() < 1e-4 * want.abs().max()

def test_shards_have_memory_of_their_own_and_leave_the_decoder_alone():
    decoder = decoder_of("llama")
    before = logits_of(decoder)
    def rank(wire):
        shard = sharded(decoder, wire)
        q = shard.layers[0].self_attn.q_proj.weight
        assert q.untyped_storage().nbytes() == q.nbytes
        for p in shard.layers[0].self_attn.parameters(): p.data.zero_()
        return shard.nbytes
    assert sum(played(2, rank)) < 1.05 * decoder.nbytes
    assert torch.equal(logits_of(decoder), before)

def test_wires_send_what_the_formula_says():
    for family, ranks in (("llama", 2), ("olmo2", 2), ("cohere", 2), ("falcon", 4), ("mixtral", 2)):
        decoder = decoder_of(family)
        def rank(wire, decoder=decoder):
            shard = sharded(decoder, wire)
            with torch.inference_mode(): shard(torch.zeros(3, 4, dtype=torch.int64))
            return wire.sent
        want = sum(sent(decoder.config, ranks, 12, 12, 8).values())
        assert played(ranks, rank) == pytest.approx([want] * ranks), family

def test_a_rank_that_fails_is_told_and_nobody_waits():
    def rank(wire):
        if wire.rank == 1: raise ZeroDivisionError("the second rank")
        return wire.sum(torch.ones(2))
    with pytest.raises(ZeroDivisionError, match="second rank"): played(3, rank)

@pytest.mark.parametrize("work, message", [
    (lambda wire: sharded(decoder_of("llama"), wire, "halves"), "experts is one of split, own"),
    (lambda wire: sharded(decoder_of("mixtral", 0), wire), "cannot be shared")])
def test_what_cannot_be_shared(work, message):
    with pytest.raises(WorkbenchError, match=message): played(7, work)

def test_shares_cover_everything_once():
    draw = random.Random(0)
    for _ in range(500):
        size, K = draw.randrange(1, 9), draw.choice([1, 2, 3, 4, 8])
        H = K * draw.randrange(1, 9)
        try: parts = [Share(r, size).heads(H, K) for r in range(size)]
        except WorkbenchError:
            assert size > K and (size % K or size // K > H // K)
            continue
        assert [h for q, _ in parts for h in range(q.start, q.stop)] == list(range(H))
        for q, kv in parts:                                            # whole groups, or a part of one
            assert {h // (H // K) for h in range(q.start, q.stop)} == set(range(kv.start, kv.stop))
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match="ranks count from 0"): Share(rank, size)


# ---- formulas

def test_more_devices_more_memory_and_what_must_not_depend_on_the_way():
    device = Device(1e15, 3e12, 80e9, 4e11, 1e-5)
    for family in ("llama", "mixtral", "deepseek_v3"):
        model = model_of(decoder_of(family).config)
        alone = [decode_step(model, device, way, 1, 8) for way in WAYS]
        assert all(s["seconds"] == pytest.approx(alone[0]["seconds"]) and s["waiting"] == 0 for s in alone)
        for way in WAYS:
            held = [decode_step(model, device, way, n, 64)["held"] for n in (1, 2, 4)]
            assert held == sorted(held, reverse=True), (family, way)
            step = decode_step(model, device, way, 4, 64)
            assert step["seconds"] == pytest.approx(step["computing"] + step["sending"] + step["waiting"])

def test_a_pipeline_waits_as_the_formula_of_its_bubble_says():
    model, device = model_of(decoder_of("llama").config), Device(1e30, 1e9, 0, 1e30, 0.0)
    for n in (2, 4, 8):
        for groups in (1, 2, 4, 16):
            step = decode_step(model, device, "pipeline", n, 64, 0, groups=groups)
            assert step["waiting"] / step["seconds"] == pytest.approx(max(0, 1 - groups / n))

@pytest.mark.parametrize("wrong", [dict(way="tensr"), dict(n=0), dict(batch=0)])
def test_steps_that_cannot_be(wrong):
    model, right = model_of(decoder_of("llama").config), dict(way="data", n=1, batch=1)
    with pytest.raises(InputError): decode_step(model, Device(1, 1, 1, 1, 1), **right | wrong)


# ---- routers

def spread(route, n=4, requests=2000, seed=0):
    "Half of all requests begin alike; the largest load ever, in units of the mean at that time."
    draw, load, open_, worst = random.Random(seed), {f"r{i}": 0 for i in range(n)}, [], 0.0
    for _ in range(requests):
        if len(open_) >= 40: load[open_.pop(draw.randrange(len(open_)))] -= 1
        tokens = [0 if draw.random() < 0.5 else draw.randrange(1, 200)] * 64
        name = route(tokens, load)[0]
        load[name] += 1
        open_.append(name)
        if len(open_) == 40: worst = max(worst, load[name] / (40 / n))
    return worst

def test_nobody_is_above_the_bound_and_a_router_without_one_is_found_out():
    for bound in (1.0, 1.25, 2.0): assert spread(lambda t, load, b=bound: by_prefix(t, load, bound=b)) <= bound + 0.1
    ignores_load = lambda tokens, load: by_prefix(tokens, dict.fromkeys(load, 0))
    assert spread(ignores_load) > 2.0

def test_every_order_names_everybody_and_only_keys_of_the_dead_move():
    load = {name: 0 for name in "abcde"}
    for i in range(300):
        order = by_prefix([i] * 64, load)
        assert sorted(order) == list("abcde")
        without = by_prefix([i] * 64, {k: 0 for k in load if k != order[0]})
        assert without == order[1:]
    assert by_load([1], dict(a=2, b=0, c=1)) == ["b", "c", "a"]

def test_keys_are_prefixes():
    text = list(range(200))
    assert prefix_key(text) == prefix_key(text[:128] + [9] * 50) != prefix_key([9, *text])
    assert prefix_key(text, salt="a") != prefix_key(text) and prefix_key(text[:31]) is None
    assert prefix_key(text[:40]) == prefix_key(text[:33])
    assert prefix_key([1, 23] * 16) != prefix_key([12, 3] * 16)
    with pytest.raises(InputError, match="share"): by_prefix(text, dict(a=0), bound=0.9)


# ---- the hand-over

@pytest.mark.parametrize("wrong, message", [
    (dict(tensor=0), "tensor is 0"), (dict(pipeline=True), "pipeline is True"),
    (dict(replicas=(0, 2)), "replicas is 0"), (dict(replicas=(3, 2)), "the larger one"),
    (dict(context="8k"), "context is '8k'")])
def test_fleets_that_cannot_be(wrong, message):
    with pytest.raises(InputError, match=message): Fleet("m", "org/m", **wrong)

def test_descriptions_say_the_same_to_both():
    for fleet in FLEETS:
        words, llm = vllm_command(fleet), ray_serve_config(fleet)["applications"][0]["args"]["llm_configs"][0]
        for name, value in llm["engine_kwargs"].items():
            at = words.index(f"--{name.replace('_', '-')}")
            assert value is True or words[at + 1] == str(value)
        assert ("ray" in words) == (fleet.pipeline > 1)
        assert ray_serve_config(fleet)["http_options"]["host"] == "127.0.0.1"
