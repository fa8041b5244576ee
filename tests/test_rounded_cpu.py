"Products of rounded inputs: equal to exact products of what the inputs were rounded to, in every format and decoder."
import pytest
import torch
from checks import some_tokens
from hypothesis import given, settings, strategies as st
from models import SMALL, small_model

import llm_workbench as wb
from llm_workbench import Decoder
from llm_workbench.architecture import matrices
from llm_workbench.kernels import cpu_prompt, fused_cpu, packed_cpu, rounded_cpu
from llm_workbench.kernels.packed_cpu import ROWS
from llm_workbench.kernels.rounded_cpu import BLOCK, ROUNDED, WHOLE_BLOCKS, packed_linear, round_inputs
from llm_workbench.quantization.formats import FORMATS, PackedMatrix, quantize


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad(): yield


def error(x, packed, bias=None):
    "The largest difference from the definition, over the sum of the products' sizes."
    seen, weight = round_inputs(x).double(), packed.unpack().double()
    meant = seen @ weight.T + (0 if bias is None else bias.double())
    size = seen.abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    got = packed_linear(x, packed, bias)
    assert got.dtype == x.dtype and got.shape == meant.shape
    return ((got.double() - meant).abs() / size.clamp(min=1e-30)).max().nan_to_num(9).item()


@pytest.mark.parametrize("name", WHOLE_BLOCKS)
@settings(max_examples=12, deadline=None)
@given(outs=st.integers(1, 9), blocks=st.integers(1, 5), rows=st.integers(1, ROWS), seed=st.integers(0, 99))
def test_odd_shapes_of_every_format(name, outs, blocks, rows, seed):
    g = torch.Generator().manual_seed(seed)
    columns = blocks * packed_cpu.BLOCKS[name].items
    weight = torch.randn(outs, columns, generator=g) * 10 ** (4 * torch.rand(outs, 1, generator=g) - 2)
    x = torch.randn(rows, columns, generator=g) * 10 ** (6 * torch.rand(1, columns, generator=g) - 3)
    if seed % 3 == 0: x[:, :BLOCK] = 0                                       # a block of nothing
    bias = torch.randn(outs, generator=g) if seed % 2 else None
    assert error(x, FORMATS[name].pack(weight), bias) < 2e-6


@pytest.mark.parametrize("name", WHOLE_BLOCKS)
def test_the_largest_codes_do_not_overflow(name):
    "Every input is 127 steps, and weights are as large as their format makes them, of one sign and of both."
    for sign in (1, -1):
        weight = torch.full((3, 512), 1.0) * sign
        weight[1, ::2] *= -1
        weight[2] = torch.linspace(-1, 1, 512)
        x = torch.cat([torch.ones(1, 512), -torch.ones(1, 512)])
        assert error(x, FORMATS[name].pack(weight)) < 2e-6


def test_rounding_is_to_the_nearest_step_of_the_block():
    x = torch.randn(5, 7 * BLOCK) * torch.logspace(-6, 6, 7 * BLOCK)
    blocks, seen = x.view(5, 7, BLOCK), round_inputs(x).view(5, 7, BLOCK)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    assert ((seen - blocks).abs() <= 0.5001 * step).all()
    assert torch.equal(round_inputs(torch.zeros(2, 64)), torch.zeros(2, 64))
    assert torch.allclose(round_inputs(seen.flatten(1)), seen.flatten(1), rtol=1e-6)            # it stays what it is


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_lost(bad):
    x = torch.randn(3, 256)
    x[1, 70] = bad
    for name in WHOLE_BLOCKS:
        got = packed_linear(x, FORMATS[name].pack(torch.randn(4, 256)))
        assert not got[1].isfinite().any() and got[[0, 2]].isfinite().all(), name


def test_other_formats_and_many_rows_are_exact():
    for name in set(packed_cpu.BLOCKS) - set(WHOLE_BLOCKS):
        packed, x = FORMATS[name].pack(torch.randn(8, 512)), torch.randn(2, 512)
        assert torch.equal(packed_linear(x, packed), cpu_prompt.packed_linear(x, packed)), name
    packed = FORMATS["int4_g32"].pack(torch.randn(8, 512))
    many, few = torch.randn(ROWS + 1, 512), torch.randn(ROWS, 512)
    assert torch.equal(packed_linear(many, packed), cpu_prompt.packed_linear(many, packed))
    assert not torch.equal(packed_linear(few, packed), cpu_prompt.packed_linear(few, packed))


def test_formats_mixed_in_one_call():
    "Some round their inputs, some do not; each sees what it should."
    names = ["q4_1", "q6_k", "nf4", "int8", "q5_k"]
    trio = [PackedMatrix(FORMATS[n].pack(torch.randn(5 + i, 256)), torch.nn.Parameter(torch.randn(5 + i)))
            for i, n in enumerate(names)]
    for rows in (1, 3, ROWS):
        x = torch.randn(rows, 256)
        for name, m, got in zip(names, trio, rounded_cpu.several(x, trio, ROUNDED), strict=True):
            seen = round_inputs(x) if name in WHOLE_BLOCKS else x
            assert torch.allclose(got, matrices.packed_linear(seen, m.packed, m.bias), rtol=1e-4, atol=1e-4), name


WIDE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, head_dim=16)


def rounding(x, packed, bias=None):
    seen = round_inputs(x).to(x.dtype) if packed.format.name in WHOLE_BLOCKS else x
    return packed_cpu.packed_linear(seen, packed, bias)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("format", ["int4_g32", "int8", "q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_decoders_step_by_step(family, format, dtype, monkeypatch):
    "One call for a token, against the same rounding in front of every matrix, product by product."
    small = Decoder.from_transformers(small_model(family, changes={**SMALL[family][0], **WIDE}), packed_cpu.CPU)
    small = quantize(small, format).to(dtype)
    calls, run = [], fused_cpu.Plan.run
    monkeypatch.setattr(fused_cpu.Plan, "run", lambda self, *a: calls.append(a[-1]) or run(self, *a))
    one = small.with_ops(ROUNDED)
    plainly = small.with_ops(cpu_prompt.CPU.but(packed_linear=rounding, several=matrices.several))
    tokens, a, b = some_tokens(2, 12), one.new_cache(capacity=16), one.new_cache(capacity=16)
    for cache in (a, b): small.with_ops(cpu_prompt.CPU)(tokens[:, :5], cache, counts=[5, 3])     # the same past
    for part in tokens[:, 5:].split([1, 1, 2, 3], 1):
        got, want = one(part, a).float(), plainly(part, b).float()
        off, size = (got - want).abs(), want.abs().max()
        middle, most = (1e-4, 0.1) if dtype is torch.float32 else (0.02, 0.2)
        assert off.median() < middle * size and off.max() < most * size     # a code may round the other way
    assert len(calls) == 4 and all(inputs == rounded_cpu.rounded() for inputs in calls)
    assert fused_cpu.why_not_one_call(one) == []


def test_it_is_asked_for_and_loaded():
    lm, exact = wb.load(ops=ROUNDED), wb.load()
    assert {m.packed.format.name for m in lm.decoder.modules() if isinstance(m, PackedMatrix)} == {"q4_1", "q8_0"}
    assert exact.decoder.ops is not ROUNDED and fused_cpu.why_not_one_call(lm.decoder) == []
    prompt = "The capital of France is"
    assert lm.generate(prompt, max_new_tokens=3).text == exact.generate(prompt, max_new_tokens=3).text
    a, b = (m.loglikelihood([(prompt, " Paris")])[0].total for m in (lm, exact))
    assert abs(a - b) < 0.2
    fine = lm.decoder.with_ops(rms_norm=lambda x, w, eps: x)
    assert "rms_norm" in fused_cpu.why_not_one_call(fine)[0]


MUTANTS = [("ROUNDED_DOTS", "*rest += m * x.sums[b];", ""), ("ROUND", "after + r * ins", "after"),
           ("ROUNDED_DOTS", "x.scales[b]", "x.scales[0]"), ("ROUND", "rintf(from[i] * by)", "(from[i] * by)"),
           ("ROUNDED_DOTS", "b + 2 <= n", "b + 4 <= n"), ("ROUNDED_DOTS", "summed(one) + summed(two)", "summed(one)"),
           ("ROUND", "most > 0 ? 127 / most : 0", "126 / most"), ("ROUND", "i < 32; i++) sum", "i < 31; i++) sum")]


@pytest.mark.parametrize("where,right,wrong", MUTANTS)
def test_wrong_kernels_are_noticed(where, right, wrong, monkeypatch):
    source = getattr(rounded_cpu, where)
    assert right in source
    monkeypatch.setattr(rounded_cpu, where, source.replace(right, wrong))
    rounded_cpu.rounded.cache_clear(), packed_cpu.product.cache_clear()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 512, generator=g) * torch.logspace(-2, 2, 512)
    x[:, 64:96] = 0
    worst = max(error(x, FORMATS[name].pack(torch.randn(9, 512, generator=g))) for name in ("q4_1", "uint8_g64"))
    monkeypatch.undo()
    rounded_cpu.rounded.cache_clear(), packed_cpu.product.cache_clear()
    assert worst > 1e-5
