"""Scales, zero points and rotations that keep what a decoder computes, for small models of all families; what they
gain; and known-wrong variants, which these checks must reject."""
import math
import os
from dataclasses import replace

import pytest
import torch

from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.quantization import awq
from llm_workbench.quantization.awq import (
    HalfQuadratic,
    best_power,
    groups,
    hadamard,
    output_error,
    random_rotation,
    rotated,
    scaled,
    scaled_inputs,
    smooth_scales,
)
from llm_workbench.quantization.calibration import collect
from llm_workbench.quantization.formats import quantize
from llm_workbench.quantization.round_to_nearest import Integers

TOKENS = torch.randint(0, 97, (2, 14), generator=torch.Generator().manual_seed(1))
CASES = [(kind, i) for kind in sorted(SMALL) for i in range(len(SMALL[kind]))]


def decoder_of(kind, variant=0):
    with torch.inference_mode(False): return Decoder.from_transformers(small_model(kind, variant)).double()


def random_scales(decoder, seed=0):
    g, modules = torch.Generator().manual_seed(seed), dict(decoder.named_modules())
    return {x.source: torch.randn(awq._width(x, modules), generator=g).mul(0.5).exp() for x in groups(decoder)[0]}


def relative(a, b): return ((a - b).norm() / b.norm()).item()


def keeps_the_function(decoder, other, bound):
    with torch.inference_mode(): off = relative(other(TOKENS), decoder(TOKENS))
    assert off < bound, off


@pytest.mark.parametrize("kind,variant", CASES)
def test_scaling_keeps_the_function(kind, variant):
    decoder = decoder_of(kind, variant)
    scales = random_scales(decoder)
    assert scales or kind in ("olmo2", "olmo3", "olmo")
    keeps_the_function(decoder, scaled(decoder, scales), 1e-5)
    found, skipped = groups(decoder)
    covered = [r for g in found for r in g.readers]
    assert len(covered) == len(set(covered)) and not set(covered) & set(skipped)
    names = {n for n, m in decoder.named_modules() if isinstance(m, (awq.Matrix, awq.Stack)) and n != "embed_tokens"}
    assert names <= set(covered) | set(skipped), "each matrix is scaled, or left with a reason"


def test_what_cannot_be_folded_has_a_reason():
    for kind, name, reason in (("olmo2", "q_proj", "no norm"), ("phi", "down_proj", "curve"),
                               ("dbrx", "o_proj", "clipped"),
                               ("gpt_oss", "experts.down_proj", "bounded"), ("olmo", "q_proj", "no weight")):
        _, skipped = groups(decoder_of(kind))
        assert any(n.endswith(name) and reason in r for n, r in skipped.items()), (kind, skipped)


def not_divided(monkeypatch): monkeypatch.setattr(awq, "_divided_norm", lambda norm, s: norm)
def rows_not_divided(monkeypatch):
    right = awq._rescaled
    monkeypatch.setattr(awq, "_rescaled", lambda old, divide, multiply: right(old, None, multiply))
def bias_not_divided(monkeypatch):
    right = awq._rescaled
    def wrong(old, divide, multiply):
        new = right(old, divide, multiply)
        new.bias = old.bias
        return new
    monkeypatch.setattr(awq, "_rescaled", wrong)
def offset_forgotten(monkeypatch):
    right = awq._divided_norm
    def wrong(norm, s):
        new = right(norm, s)
        new._parameters["weight"] = torch.nn.Parameter(norm.weight / s)
        return new
    monkeypatch.setattr(awq, "_divided_norm", wrong)
def heads_interleaved(monkeypatch):
    monkeypatch.setattr(awq.Group, "wide", lambda self, s: s.view(-1, self.dim).repeat(self.heads, 1).flatten()
                        if self.heads > 1 else s)
def router_forgotten(monkeypatch):
    right = awq._mlp_readers
    def wrong(mlp, name): return [n for n in right(mlp, name) if not n.endswith("mlp.gate")]
    monkeypatch.setattr(awq, "_mlp_readers", wrong)
def gate_divided(monkeypatch):
    "The gate's half in the place of the up half."
    right = awq._rescaled
    def wrong(old, divide, multiply):
        if divide is not None and divide.ndim > 1: divide = divide.roll(divide.shape[-1] // 2, -1)
        return right(old, divide, multiply)
    monkeypatch.setattr(awq, "_rescaled", wrong)


@pytest.mark.parametrize("kind,variant,mutant", [
    ("llama", 0, not_divided), ("llama", 0, rows_not_divided), ("llama", 1, bias_not_divided),
    ("gemma", 0, offset_forgotten),
    ("llama", 0, heads_interleaved), ("mixtral", 0, router_forgotten), ("mixtral", 0, gate_divided)])
def test_wrong_folds_are_rejected(kind, variant, mutant, monkeypatch):
    decoder = decoder_of(kind, variant)
    scales = random_scales(decoder)
    keeps_the_function(decoder, scaled(decoder, scales), 1e-5)
    mutant(monkeypatch)
    with pytest.raises(AssertionError): keeps_the_function(decoder, scaled(decoder, scales), 1e-5)


# --- what scales gain -------------------------------------------------------------------------------------------------

def correlated(rows=1500, I=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, I, generator=g) @ (torch.randn(I, I, generator=g) / I**0.5 + 0.3 * torch.eye(I))
    x[:, torch.randperm(I, generator=g)[:4]] *= 30
    return x, torch.randn(128, I, generator=g) * 0.05


def gains(search, format, factor=1.5):
    for seed in range(3):
        x, w = correlated(seed=seed)
        gram, sizes = x.T @ x / len(x), x.abs().mean(0)
        s = search([w], [gram], sizes, format, 10)
        plain, new = (output_error(w, format.pack(w * t).unpack() / t, gram) for t in (torch.ones(256), s))
        assert plain > factor * new, (plain, new)


@pytest.mark.parametrize("format", [Integers(4, 32), Integers(4, 128), Integers(4, 64, symmetric=False),
                                    Integers(3, 32)], ids=lambda f: f.name)
def test_the_search_gains(format): gains(best_power, format)


def test_wrong_searches_do_not():
    for wrong in (lambda w, g, sizes, f, n: 1 / best_power(w, g, sizes, f, n),
                  lambda w, g, sizes, f, n: torch.ones_like(sizes),
                  lambda w, g, sizes, f, n: best_power(w, g, sizes[torch.randperm(len(sizes))], f, n),
                  lambda w, g, sizes, f, n: awq.geometric(sizes, 3.0)):
        with pytest.raises(AssertionError): gains(wrong, Integers(4, 32))


def test_output_error_is_that_of_the_rows():
    x, w = correlated()
    off = Integers(3, 32).pack(w).unpack()
    want = ((w - off) @ x.T).square().sum(0).mean().item()
    assert math.isclose(output_error(w, off, x.T @ x / len(x)), want, rel_tol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v2", "cohere", "qwen2_moe"])
def test_inputs_after_scaling_need_no_new_text(kind):
    decoder = decoder_of(kind)
    inputs = collect(decoder, [TOKENS], keep=4)
    for scales in (awq.awq_scales(decoder, inputs, Integers(4, "row"), 4), smooth_scales(decoder, inputs, 0.5)):
        other = scaled(decoder, scales)
        keeps_the_function(decoder, other, 1e-5)
        want, got = collect(other, [TOKENS], keep=4), scaled_inputs(decoder, inputs, scales)
        for name in want:
            pairs = [(want[name], got[name])] if not isinstance(want[name], list) else zip(want[name], got[name])
            for a, b in pairs:
                for field in ("gram", "mean_abs", "largest", "sample"):
                    x, y = getattr(a, field), getattr(b, field)
                    atol = 1e-4 * x.abs().max().item() if x.numel() else 0
                    assert torch.allclose(x, y, rtol=1e-3, atol=atol), (name, field)


def test_awq_packs_and_beats_rounding_on_what_it_saw():
    decoder = decoder_of("mistral", 1)
    inputs, format = collect(decoder, [TOKENS]), Integers(3, "row", trials=4)
    plain, better = quantize(decoder, format), awq.awq(decoder, format, inputs)
    total = 0
    for name, i in inputs.items():
        total += output_error(decoder.get_submodule(name).dense().detach(), plain.get_submodule(name).dense(), i.gram)
    with torch.inference_mode():
        off = [relative(d(TOKENS), decoder(TOKENS)) for d in (plain, better)]
    assert total > 0 and off[1] < off[0]


def test_wrong_arguments():
    decoder = decoder_of("llama")
    inputs = collect(decoder, [TOKENS])
    name = "layers.1.mlp.down_proj"
    I = inputs[name].gram.shape[0]
    damaged = [replace(inputs[name], gram=torch.ones(I, I - 1)), replace(inputs[name], mean_abs=torch.ones(I + 1)),
               replace(inputs[name], gram=torch.full((I, I), math.nan)),
               replace(inputs[name], largest=torch.full((I,), math.inf)),
               [inputs[name]]]
    for bad in damaged:
        for call in (lambda i: awq.awq_scales(decoder, i, Integers(4, 2)), lambda i: smooth_scales(decoder, i)):
            with pytest.raises(InputError, match="layers.1.mlp.down_proj"): call({**inputs, name: bad})
    for alpha in (-0.1, 1.1, math.nan, "half", None):
        with pytest.raises(InputError, match="alpha"): smooth_scales(decoder, inputs, alpha)
    for trials in (0, 1.5):
        with pytest.raises(InputError): awq.awq_scales(decoder, inputs, "int4_g32", trials)
    good = random_scales(decoder)
    norm = "layers.0.attn_norm"
    for bad in ({"layers.0.attn_nrm": torch.ones(48)}, {norm: torch.ones(47)}, {norm: 1.0}, {norm: -good[norm]},
                {norm: torch.full((48,), math.nan)}):
        with pytest.raises(InputError): scaled(decoder, bad)
    with pytest.raises(InputError, match="lm_head"):
        awq.awq(decoder, Integers(4, 2), {n: i for n, i in inputs.items() if n != "lm_head"})


# --- HQQ --------------------------------------------------------------------------------------------------------------

def rms(format, w): return (format.pack(w).unpack() - w).square().mean().sqrt().item()


def published(format):
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    assert abs(rms(format, w) - 0.0862) < 1e-3, rms(format, w)


class SquaresOnly(HalfQuadratic):
    "Wrong: no step is taken."
    def __init__(self): super().__init__(4, 64, steps=1)


def test_half_quadratic_reaches_the_published_error():
    published(HalfQuadratic(4, 64))
    with pytest.raises(AssertionError): published(SquaresOnly())


def test_half_quadratic_as_the_library():
    "Codes, scales and zero points of hqq 0.2.8; it is looked for in HQQ_PATH, too, since it is no dependency."
    import sys
    if os.environ.get("HQQ_PATH"): sys.path.append(os.environ["HQQ_PATH"])
    core = pytest.importorskip("hqq.core.quantize", reason="the library hqq is not installed")
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    for bits in (8, 4, 3, 2):
        for optimize in (False, True):
            codes, meta = core.Quantizer.quantize(w, nbits=bits, group_size=64, axis=1, round_zero=False,
                                                  optimize=optimize, device="cpu", compute_dtype=torch.float32)
            theirs = core.Quantizer.dequantize(codes, meta).float().view_as(w)
            mine = HalfQuadratic(bits, 64, steps=20 if optimize else 0).pack(w).unpack()
            if not optimize:       # zero points are float16 here
                assert ((theirs - mine).abs() < 0.01).float().mean() > (0.95 if bits == 8 else 0.99), bits
            assert math.isclose((theirs - w).square().mean().item(), (mine - w).square().mean().item(), rel_tol=0.02)


def test_half_quadratic_on_odd_groups():
    sizes = torch.tensor([1, 1e-6, 1e4, 0, 1, 1]).view(-1, 1)
    w = torch.randn(6, 128, generator=torch.Generator().manual_seed(4)) * sizes
    w[4], w[5] = 2.5, torch.linspace(5, 6, 128)
    for bits in (2, 3, 4, 8):
        back = HalfQuadratic(bits, 64).pack(w).unpack()
        assert back.isfinite().all() and torch.equal(back[3:5], w[3:5])
        step = (w.view(6, 2, 64).amax(-1) - w.view(6, 2, 64).amin(-1)) / (2**bits - 1)
        assert ((back - w).view(6, 2, 64).abs().amax(-1)[[0, 2, 5]] <= 4 * step[[0, 2, 5]]).all()
    with pytest.raises(InputError): HalfQuadratic(4, 64).pack(w * 1e6)
    packed = HalfQuadratic(4, 32).pack(w)
    assert torch.equal(packed[[5, 0]].unpack(), packed.unpack()[[5, 0]])
    assert packed.nbytes == packed.format.nbytes(w.shape)


# --- rotations --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 8, 20, 48, 576])
def test_rotations_are_orthogonal(n):
    for R in (hadamard(n), random_rotation(n, torch.Generator().manual_seed(0))):
        assert torch.allclose(R @ R.T, torch.eye(n), atol=1e-5) and R.shape == (n, n)
    if n & (n - 1) == 0: assert torch.allclose(hadamard(n).abs(), torch.full((n, n), n**-0.5))


TURNS = ["llama", "mistral", "mixtral", "gemma", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2",
         "deepseek_v3", "phi3", "granite", "smollm3", "gpt_oss"]


@pytest.mark.parametrize("kind,variant", [(k, v) for k, v in CASES if k in TURNS])
def test_rotation_keeps_the_function(kind, variant):
    decoder = decoder_of(kind, variant)
    before = {n: t.clone() for n, t in decoder.state_dict().items()}
    other = rotated(decoder)
    keeps_the_function(decoder, other, 1e-4)
    assert not torch.allclose(other.embed_tokens.dense(), decoder.embed_tokens.dense(), atol=1e-2)
    assert all(torch.equal(t, before[n]) for n, t in decoder.state_dict().items()), "the old decoder changed"


@pytest.mark.parametrize("kind", sorted(set(SMALL) - set(TURNS)))
def test_what_cannot_be_rotated_is_named(kind):
    with pytest.raises(UnsupportedError): rotated(decoder_of(kind))


def weight_left_in_norm(monkeypatch): monkeypatch.setattr(awq, "_divided_norm", lambda norm, s: norm)
def writer_forgotten(monkeypatch):
    right = awq._writing
    monkeypatch.setattr(awq, "_writing", lambda d: [n for n in right(d) if n != "layers.1.mlp.down_proj"])
def wrong_side(monkeypatch):
    monkeypatch.setattr(awq, "_turned", lambda m, R: (R @ m.dense(torch.float32), m.bias))
def bias_not_turned(monkeypatch):
    right = awq._turned
    monkeypatch.setattr(awq, "_turned", lambda m, R: (right(m, R)[0], m.bias))


@pytest.mark.parametrize("mutant", [weight_left_in_norm, writer_forgotten, wrong_side, bias_not_turned])
def test_wrong_rotations_are_rejected(mutant, monkeypatch):
    decoder = decoder_of("llama", 1)
    with torch.no_grad(): decoder.layers[0].self_attn.o_proj.bias.normal_()
    mutant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)): keeps_the_function(decoder, rotated(decoder), 1e-4)


def test_no_rotation_of_nothing():
    for n in (0, -4, 2.0, None):
        with pytest.raises(InputError): hadamard(n)
