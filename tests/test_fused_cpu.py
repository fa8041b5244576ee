"A token in one call: every family, every split of a text, caches that grow, weights that move, and threads."
import gc
import threading
import weakref

import pytest
import torch
from models import SMALL, small_model

from checks import some_tokens
from llm_workbench import Decoder
from llm_workbench.architecture.layers import ModelConfig
from llm_workbench.architecture.ops import TORCH
from llm_workbench.kernels import cpu, fused_cpu, packed_cpu
from llm_workbench.quantization.formats import quantize

# sizes that the kernel reads: rows of whole blocks
WIDE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8)
FUSED = {  # variants whose blocks it knows, with the changes that make them wide
    ("llama", 0): dict(head_dim=16), ("llama", 1): {}, ("llama", 2): {}, ("mistral", 0): dict(head_dim=16),
    ("mistral", 1): {}, ("gemma", 0): dict(head_dim=16), ("gemma3_text", 0): dict(head_dim=16), ("qwen2", 0): {},
    ("qwen2", 1): {}, ("qwen3", 0): dict(head_dim=16), ("qwen3", 1): {}, ("phi3", 0): {}, ("granite", 0): {},
    ("smollm3", 0): {}, ("smollm3", 1): {}}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad(): yield


def decoder_of(family, variant=0):
    changes = {**SMALL[family][variant], **WIDE, **FUSED[family, variant]}
    return Decoder.from_transformers(small_model(family, changes=changes), packed_cpu.CPU)


def counted(monkeypatch):
    "How many calls are one call, from now on."
    calls, original = [], fused_cpu.Plan.run
    monkeypatch.setattr(fused_cpu.Plan, "run", lambda self, *a: calls.append(1) or original(self, *a))
    return calls


def close(got, want): return (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("family,variant", FUSED, ids=lambda v: str(v))
@pytest.mark.parametrize("format", [None, "int4_g32"])
def test_every_split_of_a_text(family, variant, format, monkeypatch):
    plain = decoder_of(family, variant)
    if format: plain = quantize(plain, format)
    assert fused_cpu.why_not(plain.layers[0]) is None
    one, calls = plain.with_ops(fused_cpu.CPU), counted(monkeypatch)
    tokens, want = some_tokens(1, 14), None
    want = plain(tokens)
    for cut in (1, 6, 13):
        for width in (1, 3):
            cache = one.new_cache(capacity=16)
            cache.expect(14)
            parts = [one(tokens[:, :cut], cache)]
            for at in range(cut, 14, width): parts.append(one(tokens[:, at:at + width], cache))
            assert close(torch.cat(parts, 1), want), (cut, width)
    assert calls, "the ordinary loop was tested instead of the kernel"


def test_families_that_it_does_not_know_go_the_ordinary_way(monkeypatch):
    calls = counted(monkeypatch)
    for family, variants in SMALL.items():
        for variant in range(len(variants)):
            if (family, variant) in FUSED: continue
            plain = Decoder.from_transformers(small_model(family, variant), packed_cpu.CPU)
            one, tokens = plain.with_ops(fused_cpu.CPU), some_tokens(1, 9)
            a, b = plain.new_cache(), one.new_cache()
            for part in tokens.split([6, 1, 2], 1): assert torch.equal(one(part, b), plain(part, a)), family
            assert all(fused_cpu.why_not(block) for block in one.layers), (family, variant)
    assert not calls


def test_ragged_texts_and_all_stores(monkeypatch):
    plain, calls = decoder_of("qwen3"), counted(monkeypatch)
    one, tokens = plain.with_ops(fused_cpu.CPU), some_tokens(3, 20)
    for store in ("contiguous", "sliding", "quantized", "static"):
        options = dict(batch=3, slots=32) if store == "static" else {}
        a, b = (d.new_cache(store, **options) for d in (plain, one))
        for cache, d in ((a, plain), (b, one)): d(tokens[:, :9], cache, counts=[9, 4, 7])
        for t in range(9, 14): assert close(one(tokens[:, t:t + 1], b), plain(tokens[:, t:t + 1], a)), store
        if store == "contiguous":
            for cache in (a, b): cache.select([2, 0]), cache.truncate([8, 10])
            for t in range(14, 17): assert close(one(tokens[:2, t:t + 1], b), plain(tokens[:2, t:t + 1], a))
    assert len(calls) == 8, "only the contiguous store is known"


def test_a_step_that_is_not_committed_and_a_cache_that_grows(monkeypatch):
    plain, calls = decoder_of("llama"), counted(monkeypatch)
    one, tokens = plain.with_ops(fused_cpu.CPU), some_tokens(1, 40)
    cache, want = one.new_cache(capacity=4), plain(tokens)
    got = [one(tokens[:, :3], cache)]
    for t in range(3, 40):
        if t == 20:                                                       # a step that is given up
            with pytest.MonkeyPatch.context() as m:
                m.setattr(cache, "commit", lambda step: None)
                one(tokens[:, :1], cache)
        got.append(one(tokens[:, t:t + 1], cache))
    assert close(torch.cat(got, 1), want)


def test_weights_that_move_or_change_are_noticed(monkeypatch):
    plain = decoder_of("llama")
    one, tokens = plain.with_ops(fused_cpu.CPU), some_tokens(1, 8)
    def step(d):
        cache = d.new_cache(capacity=16)
        d(tokens[:, :7], cache)
        return d(tokens[:, 7:], cache)
    before, calls = step(one), counted(monkeypatch)
    one.layers[1].mlp.down_proj.weight = torch.nn.Parameter(one.layers[1].mlp.down_proj.weight * 2)   # another object
    changed = step(one)
    assert not close(changed, before) and close(changed, step(one.with_ops(packed_cpu.CPU))) and calls
    one.layers[0].attn_norm.weight.mul_(3)                                                            # in place
    assert close(step(one), step(one.with_ops(packed_cpu.CPU)))
    one.double().float()                                                                              # other memory
    assert close(step(one), step(one.with_ops(packed_cpu.CPU)))
    calls.clear()
    handle = one.layers[0].self_attn.register_forward_hook(lambda module, args, out: out * 0)
    assert not close(step(one), before) and not calls, "a hook is heard"
    handle.remove()
    step(one)
    assert calls
    calls.clear()
    assert close(step(one.with_ops(rms_norm=lambda x, w, eps: x)), step(one.with_ops(packed_cpu.CPU).with_ops(
        rms_norm=lambda x, w, eps: x))) and not calls, "somebody's own function is used"


def test_threads_share_a_decoder():
    one = decoder_of("llama").with_ops(fused_cpu.CPU)
    texts = [some_tokens(1, 30, seed=s) for s in range(4)]
    want, got = [one(t) for t in texts], [None] * 4
    def work(i):
        with torch.no_grad():
            cache = one.new_cache(capacity=64)
            got[i] = torch.cat([one(texts[i][:, :5], cache)] + [one(texts[i][:, t:t + 1], cache)
                                                                for t in range(5, 30)], 1)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(close(g, w) for g, w in zip(got, want))


def test_nothing_is_kept_alive():
    one = decoder_of("llama").with_ops(fused_cpu.CPU)
    cache = one.new_cache(capacity=16)
    for part in some_tokens(1, 5).split([4, 1], 1): one(part, cache)
    layers, store = weakref.ref(one.layers), weakref.ref(cache.store[0]["k"])
    assert fused_cpu._plans[one.layers] is not None
    del cache
    gc.collect()
    assert store() is None
    del one
    gc.collect()
    assert layers() is None


# --- bfloat16 ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family,variant", FUSED, ids=lambda v: str(v))
def test_bfloat16_is_nearer_to_float32_than_the_ordinary_way(family, variant, monkeypatch):
    "The same rounded weights in float32 are the judge; ragged, several tokens at a time, biases and norms in bfloat16."
    wide = decoder_of(family, variant).bfloat16().float()
    half = decoder_of(family, variant).bfloat16()
    one, calls = half.with_ops(fused_cpu.CPU), counted(monkeypatch)
    tokens = some_tokens(2, 14)
    def logits(decoder):
        cache = decoder.new_cache(capacity=16)
        decoder(tokens[:, :6], cache, counts=[6, 3])
        return torch.cat([decoder(t, cache).float() for t in tokens[:, 6:].split([1, 1, 1, 3, 2], 1)], 1)
    exact, ordinary, got = map(logits, (wide, half, one))
    assert len(calls) == 5, "the ordinary loop was tested instead of the kernel"
    error = lambda z: (z - exact).square().mean().sqrt()
    assert error(got) < error(ordinary) < 0.1 * exact.abs().max()


def test_copies_of_bfloat16_vectors_are_made_again_when_they_are_written_to():
    one = decoder_of("qwen2").bfloat16().with_ops(fused_cpu.CPU)
    def step():
        cache = one.new_cache(capacity=16)
        one(some_tokens(1, 7), cache)
        return one(some_tokens(1, 1), cache).float()
    before = step()
    one.layers[0].attn_norm.weight.mul_(3)
    changed = step()
    assert not close(changed, before)
    one.layers[0].self_attn.q_proj.bias.add_(2)
    assert not close(step(), changed)


@pytest.mark.parametrize("mistake,right,wrong", [
    ("keys as they were before", "store(turned[d])", "store(k[d])"),
    ("values of the keys", "store(k[K * D + d])", "store(k[d])"),
    ("keys not rounded but cut", "return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "return bits >> 20 << 4")])
def test_wrong_caches_in_bfloat16(mistake, right, wrong, monkeypatch):
    source = fused_cpu.TOKEN if right in fused_cpu.TOKEN else cpu.PRELUDE
    assert right in source
    where = (fused_cpu, "TOKEN") if source is fused_cpu.TOKEN else (cpu, "PRELUDE")
    monkeypatch.setattr(*where, source.replace(right, wrong))
    fused_cpu.token.cache_clear(), cpu.compiled.cache_clear()
    judge = test_bfloat16_is_nearer_to_float32_than_the_ordinary_way
    with pytest.raises(AssertionError): judge("llama", 0, monkeypatch)
    monkeypatch.undo()
    fused_cpu.token.cache_clear(), cpu.compiled.cache_clear()


@pytest.mark.parametrize("head_dim,heads,groups", [(64, 6, 2), (128, 3, 1), (192, 4, 4), (80, 4, 2), (64, 5, 5)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_long_past(head_dim, heads, groups, dtype, monkeypatch):
    "Stretches and blocks of every size, among them the one key more or less; a window that begins inside one."
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=heads,
                 num_key_value_heads=groups, head_dim=head_dim, sliding_window=100,
                 layer_types=("full_attention", "sliding_attention"))
    kinds = dict(full_attention=dict(rope_type="default", rope_theta=1e4),
                 sliding_attention=dict(rope_type="default", rope_theta=1e2))
    plain, calls = Decoder(ModelConfig(**sizes, rope_parameters=kinds), TORCH).eval(), counted(monkeypatch)
    one = plain.with_ops(fused_cpu.CPU)
    for held in (1, 7, 31, 63, 64, 65, 127, 510, 511, 513, 1025, 1100):
        caches = [d.new_cache(capacity=held + 16, dtype=dtype) for d in (plain, one)]
        for cache in caches:
            plain(some_tokens(1, 1), cache)
            if held > 1: fused_cpu.made_up(cache, held - 1)
        more = some_tokens(1, 3)
        want, got = (d(more, cache) for d, cache in zip((plain, one), caches))
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), held
    assert len(calls) == 12


def test_a_cache_in_bfloat16_behind_layers_in_float32(monkeypatch):
    "What is written by one call and what the ordinary way writes are the same numbers, up to one rounding."
    plain, calls = decoder_of("llama"), counted(monkeypatch)
    caches = [d.new_cache(capacity=32, dtype=torch.bfloat16) for d in (plain, plain.with_ops(fused_cpu.CPU))]
    for d, cache in zip((plain, plain.with_ops(fused_cpu.CPU)), caches):
        for part in some_tokens(1, 12).split([6, 1, 2, 3], 1): d(part, cache)
    assert len(calls) == 3
    for a, b in zip(*(cache.store for cache in caches)):
        for name in "kv":
            assert a[name].dtype is b[name].dtype is torch.bfloat16
            assert (a[name].float() - b[name].float()).abs().max() <= 2 ** -7 * a[name].float().abs().max()
