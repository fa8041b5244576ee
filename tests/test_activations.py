"""Products with eight-bit activations: exact sums, scales where they belong, LLM.int8 against bitsandbytes' kernels,
FP8 against the plain product; then known-wrong variants, which these checks must reject."""
import gc
import logging
import math
import random

import pytest
import torch
import torch.nn.functional as F

from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE
from llm_workbench.errors import InputError, UnsupportedError, WorkbenchError
from llm_workbench.quantization.activations import (
    StaticScales,
    fp8_linear,
    fp8_product,
    int8_codes,
    int8_rows,
    int_product,
    llm_int8,
    scaled_product,
    w8a8_linear,
)
from llm_workbench.quantization.formats import FORMATS, quantize
from llm_workbench.quantization.fp8 import fp8, fp8_e5m2, fp8_tensor, to_float8
from llm_workbench.quantization.packing import Packed
from llm_workbench.quantization.round_to_nearest import Integers
from models import small_model

INT8 = FORMATS["int8"]
SHAPES = [(1, 1, 1), (1, 64, 96), (5, 63, 33), (17, 576, 40), (32, 130, 7)]     # tokens, inputs, outputs


def noise(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def error(got, want): return ((got.double() - want.double()).norm() / want.double().norm()).item()


def inputs(N, I, seed=0):
    "Tokens of very different sizes, one silent, one channel loud."
    x = noise(N, I, seed=seed) * (noise(N, 1, seed=seed + 1) * 2).exp()
    x[:, I // 2] *= 8
    if N > 2: x[2] = 0
    return x


def by_hand(x, packed):
    "W8A8 in float64, token by token."
    w, rows = packed.unpack().double(), []
    for token in x.float():
        s = max(token.abs().max().item() / 127, 2.0**-126)
        s = torch.tensor(s).float()
        rows.append((token / s).round().clamp(-127, 127).double() * s.double() @ w.T)
    return torch.stack(rows)


# --- whole numbers ----------------------------------------------------------------------------------------------------

def w8a8_is_right(linear):
    for N, I, O in SHAPES:
        packed, x, bias = INT8.pack(noise(O, I, seed=3) * noise(O, 1, seed=4)), inputs(N, I), noise(O, seed=5)
        assert error(linear(x, packed, None), by_hand(x, packed)) < 1e-6, "not the product of the codes"
        assert torch.allclose(linear(x, packed, bias), linear(x, packed, None) + bias)
        alone = torch.stack([linear(token, packed, None) for token in x])
        assert torch.equal(alone, linear(x, packed, None)), "a token depends on the others"
        assert linear(x.view(N, 1, 1, I), packed, None).shape == (N, 1, 1, O)


def variant(rows=int8_rows, codes=int8_codes, product=int_product, scaled=lambda y, sx, sw: y * sx * sw.T):
    def linear(x, packed, bias=None):
        (cx, sx), (cw, sw) = rows(x.reshape(-1, x.shape[-1])), codes(packed)
        out = scaled(product(cx, cw), sx, sw).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    return linear


def cut_off(x):
    s = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126)
    return (x / s).trunc().to(torch.int8), s


def wrapped(a, b): return (a.long() @ b.long().T + 2**15) % 2**16 - 2**15


WRONG = {
    "codes from 0 to 255": variant(codes=lambda p: (p.data.int(), p.tensors["scale"].float()),
                                   product=lambda a, b: a.int() @ b.T),
    "one scale for all tokens": variant(rows=lambda x: int8_rows(x, x.abs().max().clamp(min=1e-30) / 127)),
    "cut off": variant(rows=cut_off),
    "sums in int16": variant(product=wrapped),
    "without the scale of the weight": variant(scaled=lambda y, sx, sw: y * sx),
    "without the scale of the tokens": variant(scaled=lambda y, sx, sw: y * sw.T),
    "128 steps": variant(rows=lambda x: int8_rows(x, (x.abs().amax(-1, keepdim=True) / 128).clamp(min=2.0**-126))),
    "bias forgotten": lambda x, packed, bias=None: w8a8_linear(x, packed),
    "activations in floats": lambda x, packed, bias=None: F.linear(x, packed.unpack(), bias),
}


def test_w8a8(): w8a8_is_right(w8a8_linear)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_products_are_rejected(name):
    with pytest.raises((AssertionError, RuntimeError)): w8a8_is_right(WRONG[name])


def test_sums_are_exact():
    g = torch.Generator().manual_seed(0)
    for N, I, O in (*SHAPES, (3, 20_000, 5)):
        a, b = (torch.randint(-128, 128, (n, I), generator=g, dtype=torch.int8) for n in (N, O))
        assert torch.equal(int_product(a, b).long(), a.long() @ b.long().T)
    most = torch.full((1, 131_071), -128, dtype=torch.int8)
    assert int_product(most, most).item() == 128 * 128 * 131_071 < 2**31
    assert int_product(a[:0], b).shape == (0, 5)
    with pytest.raises(InputError, match="int32"): int_product(*torch.zeros(2, 1, 2**17, dtype=torch.int8))


def test_dtypes_scales_and_empty_rows():
    packed, x = INT8.pack(noise(24, 64)), inputs(6, 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = w8a8_linear(x.to(dtype), packed, noise(24).to(dtype))
        assert got.dtype == dtype and got.isfinite().all()
    for linear, weight in ((w8a8_linear, packed), (llm_int8(), packed), (fp8_linear, fp8.pack(noise(24, 64)))):
        assert linear(x[:0], weight).shape == (0, 24) and linear(x[2], weight).eq(0).all(), "a silent token"
    tensor = Integers(8, "tensor").pack(noise(24, 64))
    assert error(w8a8_linear(x, tensor), by_hand(x, tensor)) < 1e-6
    codes, scale = int8_rows(torch.tensor([[1e-44, 0]]))
    assert scale.isfinite().all() and codes.abs().max() <= 127
    assert int8_rows(torch.tensor([[300.0, 1]]), torch.tensor(1.0))[0].tolist() == [[127, 1]], "cut, not wrapped"


# --- static scales ----------------------------------------------------------------------------------------------------

def test_static_scales():
    scales, x = StaticScales(), inputs(20, 64)
    one, two = INT8.pack(noise(24, 64)), INT8.pack(noise(24, 64, seed=8))
    assert torch.equal(scales.watch(x[:10], one), x[:10] @ one.unpack().T)
    scales.watch(x[10:], one)
    scales.watch(x / 4, two)
    for packed, most in ((one, x.abs().max()), (two, x.abs().max() / 4)):
        assert scales.largest[packed] == most
        s = most / 127
        want = ((x / s).round().clamp(-127, 127) * s) @ packed.unpack().T
        assert error(scales.linear(x, packed), want) < 1e-5
    with pytest.raises(InputError, match="never watched"): scales.linear(x, INT8.pack(noise(24, 64)))
    del one, packed
    gc.collect()
    assert len(scales.largest) == 1, "scales of a weight that is gone are gone"
    for wrong in (0.0, -1.0, math.nan, math.inf):
        scales.largest[two] = torch.tensor(wrong)
        with pytest.raises(InputError, match="no scale"): scales.linear(x, two)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3"])
def test_ops_in_decoders(family):
    "The same decoder with another op: close to its own float product, and not the same."
    decoder = Decoder.from_transformers(small_model(family), REFERENCE)
    tokens, static = torch.arange(18).view(2, 9), StaticScales()
    eight, floats = quantize(decoder, "int8"), quantize(decoder, "fp8")
    eight.with_ops(packed_linear=static.watch)(tokens)
    for packed, op in ((eight, w8a8_linear), (eight, static.linear), (eight, llm_int8(2.0)), (floats, fp8_linear)):
        if op == static.linear and family == "mixtral":
            with pytest.raises(InputError, match="stack"): packed.with_ops(packed_linear=op)(tokens)
            continue
        want, got = packed(tokens), packed.with_ops(packed_linear=op)(tokens)
        assert got.isfinite().all() and 0 < error(got, want) < 1.0


# --- LLM.int8 ---------------------------------------------------------------------------------------------------------

def bnb_product(x, weight, threshold):
    "bitsandbytes' codes of a weight in our format, and its product by its own layer."
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    out = layer(x.half()).float()
    tensors = {"data": layer.state.CB.view(torch.uint8) ^ 128, "scale": (layer.state.SCB / 127).half()[:, None]}
    return out, Packed(INT8, tuple(weight.shape), tensors)


def outlying(N=40, I=192, columns=(3, 77, 150), size=30.0, seed=0):
    "Tokens of a bell curve below 5; a few columns are loud, one of them in a single token."
    x = noise(N, I, seed=seed).clamp(-5, 5)
    x[:, list(columns[:-1])] *= size
    x[N // 2, columns[-1]] = 50
    return x


def as_bitsandbytes(make):
    "Within 0.01 of bitsandbytes at several thresholds, and of the floats where W8A8 is not."
    w = noise(64, 192, seed=1) * 0.05
    for x in (outlying(), outlying(size=3.0, seed=2), noise(40, 192, seed=3).clamp(-5, 5)):
        for threshold in (6.0, 3.0):
            theirs, packed = bnb_product(x, w, threshold)
            off = error(make(threshold)(x, packed), theirs)
            assert off <= 0.01, f"{off:.2%} from bitsandbytes"
    x, packed = outlying(), INT8.pack(w)
    loud = (x.abs() >= 6).any(0)
    alone = x[:, loud] @ packed.unpack()[:, loud].T
    rest = w8a8_linear(x.masked_fill(loud, 0), packed)
    assert error(make(6.0)(x, packed), alone + rest) < 1e-5, "not the sum of both parts"


def decomposed(loud_of=lambda x, t: (x.abs() >= t).any(0), clean=True, twice=False, floats=True):
    def make(threshold):
        def linear(x, packed, bias=None):
            loud = loud_of(x, threshold)
            cx, sx = int8_rows(x.masked_fill(loud, 0) if clean and not twice else x)
            if clean is False and not twice: cx = cx.masked_fill(loud, 0)
            cw, sw = int8_codes(packed)
            out = int_product(cx, cw) * sx * sw.T
            return out + x[:, loud] @ (cw[:, loud].float() * sw).T if floats else out
        return linear
    return make


WRONG_SPLITS = {
    "no columns apart": lambda threshold: w8a8_linear,
    "columns dropped": decomposed(floats=False),
    "columns counted twice": decomposed(twice=True),
    "scales that know the outliers": decomposed(clean=False),
    "columns whose mean is large": decomposed(loud_of=lambda x, t: x.abs().mean(0) >= t),
    "only positive outliers": decomposed(loud_of=lambda x, t: (x >= t).all(0)),
}


def test_llm_int8(): as_bitsandbytes(llm_int8)


@pytest.mark.parametrize("name", WRONG_SPLITS)
def test_wrong_decompositions_are_rejected(name):
    with pytest.raises(AssertionError): as_bitsandbytes(WRONG_SPLITS[name])


def test_the_limits_of_a_threshold():
    x, packed = outlying(), INT8.pack(noise(64, 192))
    assert torch.equal(llm_int8(1e9)(x, packed), w8a8_linear(x, packed)), "nothing is loud"
    assert error(llm_int8(1e-30)(x, packed), x @ packed.unpack().T) < 1e-6, "everything is"
    for wrong in (0, 0.0, -6.0, math.nan, math.inf):
        with pytest.raises(InputError, match="threshold"): llm_int8(wrong)


# --- FP8 --------------------------------------------------------------------------------------------------------------

def fp8_is_right(linear):
    for N, I, O in SHAPES:
        for format in (fp8, fp8_tensor):
            packed, x = format.pack(noise(O, I, seed=3) * noise(O, 1, seed=4)), inputs(N, I)
            s = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-126)
            want = (to_float8(x / s).double() * s.double()) @ packed.unpack().double().T
            assert error(linear(x, packed), want) < 1e-5
            assert torch.allclose(linear(x * 2.0**20, packed), linear(x, packed) * 2.0**20), "beyond 448 all alike"


def both_scales(c, s, packed): return (c.float() @ packed.data.float().T) * s * packed.tensors["scale"].T
def fp8_variant(scale, multiply=both_scales):
    return lambda x, packed: multiply(to_float8(x / scale(x)), scale(x), packed)


def largest(x): return (x.abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-126)


WRONG_FP8 = {
    "no scale for tokens": fp8_variant(lambda x: torch.ones(len(x), 1)),
    "the range of e5m2": fp8_variant(lambda x: largest(x) * 448 / 57344),
    "half of the largest": fp8_variant(lambda x: largest(x) / 2),
    "the weight's scale forgotten": fp8_variant(largest, lambda c, s, packed: c.float() @ packed.data.float().T * s),
    "the scale of tokens twice": fp8_variant(largest, lambda c, s, packed: c.float() @ packed.unpack().T * s * s),
}


def test_fp8(): fp8_is_right(fp8_linear)


@pytest.mark.parametrize("name", WRONG_FP8)
def test_wrong_fp8_products_are_rejected(name):
    with pytest.raises(AssertionError): fp8_is_right(WRONG_FP8[name])


def test_torchs_product_is_the_plain_one():
    for N, I, O in SHAPES:
        args = to_float8(noise(N, I)), to_float8(noise(O, I, seed=1)), noise(N, 1).abs(), noise(1, O).abs()
        assert error(scaled_product(*args), fp8_product(*args)) < 1e-5


# --- what is refused --------------------------------------------------------------------------------------------------

OPS = {"w8a8": w8a8_linear, "llm_int8": llm_int8(), "fp8": fp8_linear, "static": None}

@pytest.mark.parametrize("name", OPS)
def test_bad_inputs_are_named(name):
    packed = (fp8 if name == "fp8" else INT8).pack(noise(24, 64))
    static = StaticScales()
    static.watch(noise(3, 64), packed)
    op, x = OPS[name] or static.linear, noise(3, 64)
    for bad in (math.nan, math.inf, -math.inf):
        wrong = x.clone()
        wrong[1, 5] = bad
        with pytest.raises(InputError, match="NaN or infinity"): op(wrong, packed)
    for wrong in (x[:, :63], x.int(), torch.tensor(1.0), x.T):
        with pytest.raises(InputError): op(wrong, packed)
    if name == "static": return
    wrong = "int8" if name == "fp8" else "fp8"
    for other in ("int8_g32", "int4_g32", "nf4", "q8_0", "fp8_block", "fp8_e5m2", "mxfp8", wrong):
        with pytest.raises(UnsupportedError, match="need a weight in"): op(x, FORMATS[other].pack(noise(24, 64)))
    assert fp8_e5m2.dtype == torch.float8_e5m2


def test_damage_ends_in_our_errors():
    rng, x = random.Random(0), noise(3, 64)
    for _ in range(200):
        name = rng.choice(["w8a8", "llm_int8", "fp8"])
        good = (fp8 if name == "fp8" else INT8).pack(noise(24, 64))
        of, change = rng.choice(["data", "scale"]), rng.randrange(4)
        t = good.tensors[of]
        if change == 0: t = t[:-1]
        if change == 1: t = torch.cat([t, t])
        if change == 2: t = t.double()
        tensors = {n: t if n == of else u for n, u in good.tensors.items() if n != of or change != 3}
        with pytest.raises(WorkbenchError): OPS[name](x, Packed(good.format, good.shape, tensors))


# --- on a GPU ---------------------------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize("shape", [*SHAPES, (64, 256, 128), (16, 64, 32)], ids=str)
def test_on_a_gpu(shape):
    N, I, O = shape
    x, w = inputs(N, I), noise(O, I, seed=3)
    def there(packed): return Packed(packed.format, packed.shape, {n: t.cuda() for n, t in packed.tensors.items()})
    eight, float8 = INT8.pack(w), fp8.pack(w)
    codes = int8_rows(x)[0], int8_codes(eight)[0]
    assert torch.equal(int_product(*(c.cuda() for c in codes)).cpu(), int_product(*codes))
    assert error(w8a8_linear(x.cuda(), there(eight)).cpu(), w8a8_linear(x, eight)) < 1e-4
    assert error(llm_int8()(x.cuda(), there(eight)).cpu(), llm_int8()(x, eight)) < 1e-3
    assert error(fp8_linear(x.cuda(), there(float8)).cpu(), fp8_linear(x, float8)) < 0.01    # bfloat16 comes out
