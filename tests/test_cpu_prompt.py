"Prompts on a CPU: attention with every option on shapes that hurt, one-pass kernels, products, and whole decoders."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernel_checks import as_accurate
from models import SMALL, small_model

from checks import some_tokens
from llm_workbench import Decoder
from llm_workbench.architecture import norms_and_mlps, ops, rope
from llm_workbench.architecture.attention import attention as reference
from llm_workbench.errors import InputError
from llm_workbench.kernels import cpu_prompt, fused_cpu, packed_cpu
from llm_workbench.quantization.activations import w8a8_linear
from llm_workbench.quantization.formats import FORMATS, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad(): yield


def counted(monkeypatch):
    "How often the kernel for prompts is called, from now on."
    calls, original = [], cpu_prompt.compiled
    def spy(kernel, dtype):
        if kernel is cpu_prompt.ATTENTION: calls.append(1)
        return original(kernel, dtype)
    monkeypatch.setattr(cpu_prompt, "compiled", spy)
    return calls


@settings(max_examples=60, deadline=None, derandomize=True)
@given(B=st.integers(1, 3), K=st.integers(1, 3), G=st.integers(1, 5), M=st.integers(1, 140), past=st.integers(0, 90),
       D=st.integers(1, 70), Dv=st.integers(1, 70), causal=st.booleans(),
       window=st.one_of(st.none(), st.integers(1, 150)), softcap=st.sampled_from([None, 0.5, 30.0]),
       sink=st.booleans(), ragged=st.booleans(),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_attention_of_any_shape(B, K, G, M, past, D, Dv, causal, window, softcap, sink, ragged, dtype, seed):
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    generator, n = torch.Generator().manual_seed(seed), M + past
    q, k, v = make(B, M, K * G, D), make(B, n, K, D), make(B, n, K, Dv)
    sinks = make(K * G) if sink else None
    lengths = torch.randint(0, n + 1, (B,), generator=generator) if ragged else None
    how = dict(causal=causal, window=window, softcap=softcap, lengths=lengths)
    want = reference(q.double(), k.double(), v.double(), sinks=None if sinks is None else sinks.double(), **how)
    with torch.no_grad():
        got, eager = (f(q, k, v, sinks=sinks, **how) for f in (cpu_prompt.attention, reference))
    as_accurate(got, want, eager, floor=4.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_views_of_a_cache_and_split_queries_are_read_where_they_are(dtype, monkeypatch):
    calls = counted(monkeypatch)
    both, store = torch.randn(2, 33, 12, 24).to(dtype), torch.randn(2, 128, 3, 48).to(dtype)
    q, k, v = both[:, :, :9], store[:, :100, :, :24], store[:, :100, :, 24:]
    want = reference(q.double(), k.double(), v.double())
    as_accurate(cpu_prompt.attention(q, k, v), want, reference(q, k, v))
    assert calls


def test_slots_behind_a_text_are_never_looked_at():
    q, k, v = torch.randn(2, 70, 4, 16), torch.randn(2, 200, 2, 16), torch.randn(2, 200, 2, 16)
    lengths = torch.tensor([71, 130])
    want = cpu_prompt.attention(q, k, v, lengths=lengths)
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = float("nan"), float("nan")
    assert torch.equal(cpu_prompt.attention(q, k, v, lengths=lengths), want)


def test_large_scores_and_a_nan_that_is_seen():
    q, k, v = 300 * torch.randn(1, 80, 2, 16), 300 * torch.randn(1, 80, 2, 16), torch.randn(1, 80, 2, 16)
    got, want = cpu_prompt.attention(q, k, v), reference(q.double(), k.double(), v.double())
    as_accurate(got, want, reference(q, k, v))
    v[0, 40, 0] = float("nan")
    got = cpu_prompt.attention(q, k, v)
    assert got[0, 40:, 0].isnan().all() and got[0, :, 1].isfinite().all(), "it stays in its head"


def test_what_it_does_not_take_goes_the_old_way(monkeypatch):
    calls = counted(monkeypatch)
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    spans = torch.tensor([[-1, 0, 0, 0, -1, -1]])
    assert torch.allclose(cpu_prompt.attention(q, k, v, spans=spans), reference(q, k, v, spans=spans), atol=1e-6)
    half = [t.half() for t in (q, k, v)]
    assert torch.equal(cpu_prompt.attention(*half), ops.fused_attention(*half))
    with pytest.raises(InputError, match="window"): cpu_prompt.attention(q, k, v, window=0)
    with torch.enable_grad():
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        cpu_prompt.attention(*given).square().sum().backward()
        other = [t.clone().requires_grad_() for t in (q, k, v)]
        reference(*other).square().sum().backward()
    assert all(torch.allclose(a.grad, b.grad, atol=1e-5) for a, b in zip(given, other))
    assert not calls and cpu_prompt.attention(q, k, v).shape == q.shape and calls


def test_every_thread_has_room():
    q, k, v = torch.randn(1, 300, 6, 32), torch.randn(1, 300, 2, 32), torch.randn(1, 300, 2, 32)
    before, want = torch.get_num_threads(), reference(q, k, v)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.allclose(cpu_prompt.attention(q, k, v), want, atol=1e-5)
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("T,H,D,R,F", [(300, 3, 40, 24, 61), (1000, 5, 64, 64, 128), (70, 9, 64, 2, 577)])
def test_passes(T, H, D, R, F, dtype):
    make = lambda *shape: torch.randn(*shape).to(dtype)
    x, w = make(2, T, F), make(F)
    as_accurate(cpu_prompt.rms_norm(x, w, 1e-5), norms_and_mlps.rms_norm(x.double(), w.double(), 1e-5),
                norms_and_mlps.rms_norm(x, w, 1e-5))
    heads, tables = make(2, T, H, D), (make(T, R), make(T, R))
    as_accurate(cpu_prompt.rotate(heads, *tables), rope.rotate(heads.double(), *(t.double() for t in tables)),
                rope.rotate(heads, *tables))
    gate, up = 5 * make(2, T, F), make(2, T, F)
    for name in ("swiglu", "geglu"):
        plain = getattr(norms_and_mlps, name)
        as_accurate(getattr(cpu_prompt, name)(gate, up), plain(gate.double(), up.double()), plain(gate, up), floor=2.0)


@pytest.mark.parametrize("native", [True, False])
def test_products_of_bfloat16(native, monkeypatch):
    monkeypatch.setattr(cpu_prompt, "multiplies_bf16", lambda: native)
    monkeypatch.setattr(cpu_prompt, "PIECE", 1000)
    for rows in (1, 8, 9, 70):
        x, w, b = torch.randn(2, rows, 96).bfloat16(), torch.randn(130, 96).bfloat16(), torch.randn(130).bfloat16()
        for bias in (None, b):
            wide = None if bias is None else bias.double()
            eager = torch.nn.functional.linear(x, w, bias)
            as_accurate(cpu_prompt.linear(x, w, bias), torch.nn.functional.linear(x.double(), w.double(), wide), eager)
        packed = FORMATS["int4_g32"].pack(w.float())
        want = torch.nn.functional.linear(x.double(), packed.unpack(torch.float32).double(), b.double())
        as_accurate(cpu_prompt.packed_linear(x, packed, b), want, packed_cpu.packed_linear(x, packed, b))


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_whole_numbers(vnni, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    for rows, ins, outs in ((9, 33, 1), (17, 64, 35), (64, 96, 48)):
        packed, x = FORMATS["int8"].pack(torch.randn(outs, ins)), torch.randn(1, rows, ins).to(dtype)
        want = w8a8_linear(x, packed)
        as_accurate(cpu_prompt.int8_linear(x, packed), want.double(), want)
    few = torch.randn(2, 96)
    assert torch.equal(cpu_prompt.int8_linear(few, packed), packed_cpu.packed_linear(few, packed))
    x[0, 3, 3] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity"): cpu_prompt.int8_linear(x, packed)


@pytest.mark.parametrize("family", SMALL)
def test_families_read_a_prompt_whole_and_in_pieces(family):
    for variant in range(len(SMALL[family])):
        plain = Decoder.from_transformers(small_model(family, variant), ops.REFERENCE)
        ours, tokens = plain.with_ops(cpu_prompt.CPU), some_tokens(2, 40)
        want = plain(tokens)
        bound = 5e-5 * want.abs().max()
        assert (ours(tokens) - want).abs().max() <= bound, variant
        for cut in (1, 17, 38):
            cache = ours.new_cache(capacity=4)
            cache.expect(40)
            got = torch.cat([ours(part, cache) for part in tokens.split([cut, 40 - cut], 1)], 1)
            assert (got - want).abs().max() <= bound, (variant, cut)


def test_few_rows_still_go_in_one_call_and_own_functions_are_heard(monkeypatch):
    calls, original = [], fused_cpu.Plan.run
    monkeypatch.setattr(fused_cpu.Plan, "run", lambda self, *a: calls.append(1) or original(self, *a))
    wide = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, head_dim=16)
    one = Decoder.from_transformers(small_model("llama", changes={**SMALL["llama"][0], **wide}), cpu_prompt.CPU)
    def step(d):
        cache = d.new_cache(capacity=32)
        d(some_tokens(1, 12), cache)
        return d(some_tokens(1, 1), cache)
    step(one)
    assert calls
    calls.clear()
    step(one.with_ops(swiglu=lambda gate, up: up))
    assert not calls


def test_int8_inputs_are_only_used_when_they_are_asked_for(monkeypatch):
    calls, original = [], cpu_prompt.int8_rows
    monkeypatch.setattr(cpu_prompt, "int8_rows", lambda *a: calls.append(1) or original(*a))
    plain = quantize(Decoder.from_transformers(small_model("llama"), cpu_prompt.CPU), "int8")
    tokens = some_tokens(1, 20)
    want = plain(tokens)
    assert not calls
    got = plain.with_ops(cpu_prompt.INT8)(tokens)
    assert calls and 0 < (got - want).abs().max() < 0.1 * want.abs().max()
