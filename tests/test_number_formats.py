"""Number formats against torch's casts, the gguf package and a plain search for the nearest number; then known-wrong
ways to decode and encode, which these comparisons must reject."""
import math
from dataclasses import replace

import pytest
import torch

from llm_workbench.errors import InputError
from llm_workbench.files.gguf import dequantize
from llm_workbench.quantization.number_formats import FLOATS, FloatFormat, decode, encode, round_to, values

NAMES = dict(fp16="float16", bf16="bfloat16", fp8_e5m2="float8_e5m2", fp8_e4m3="float8_e4m3fn", e8m0="float8_e8m0fnu")
TORCH = {name: getattr(torch, dtype) for name, dtype in NAMES.items() if hasattr(torch, dtype)}
LISTED = [f for f in FLOATS.values() if f.bits <= 16]
SMALL = [f for f in LISTED if f.bits <= 8]
BELOW_8 = [f for f in FLOATS.values() if f.top == "finite"]
ids = lambda f: f if isinstance(f, str) else f.name


def bits(x): return x.contiguous().view(torch.int32)
def same(a, b): return (bits(a) == bits(b)) | (a.isnan() & b.isnan())     # the sign of zero counts
def bytes_of(x): return x.view(torch.uint8).long() if x.element_size() == 1 else x.view(torch.int16).long() & 0xFFFF


def of_torch(codes, dtype):
    "The numbers that torch reads from codes."
    return codes.to(torch.int16 if dtype.itemsize == 2 else torch.uint8).view(dtype).float()


def hard_numbers(format, seed=0):
    "All float32 exponents and signs with random mantissas; the format's numbers, their ties, what is just beside them."
    g = torch.Generator().manual_seed(seed)
    fields = torch.arange(256).repeat_interleave(200)
    mantissas = torch.randint(2**23, (2, len(fields)), generator=g)
    noise = torch.cat([fields << 23 | mantissas[0], fields << 23 | mantissas[1] | -2**31]).int().view(torch.float32)
    listed = values(format)[:format.last + 1]
    ties = ((listed[1:].double() + listed[:-1]) / 2).float()
    beside = [t.nextafter(torch.full_like(t, to)) for t in (ties, listed) for to in (0.0, math.inf)]
    over = format.largest * torch.tensor([1 + 2**-format.mantissa / 4, 1 + 2**-format.mantissa / 2, 1.5, 3])
    special = torch.tensor([0.0, 2.0**-149, 2.0**-127, 2.0**-126, 3.4e38, math.inf, math.nan])
    positive = torch.cat([listed, ties, *beside, over, special])
    return torch.cat([noise, positive, -positive]) if format.signed else torch.cat([noise, positive]).abs()


def agrees_with_torch(name, decode=decode, encode=encode):
    "All bit patterns and many hard numbers: to the bit, except which of the NaNs."
    format, dtype = FLOATS[name], TORCH[name]
    codes = torch.arange(2**format.bits)
    wrong = ~same(decode(codes, format), of_torch(codes, dtype))
    assert not wrong.any(), f"{wrong.sum()} of {len(codes)} patterns of {name} decode to other numbers than torch's"
    x = hard_numbers(format)
    if name == "e8m0":  # there torch goes up from 2**-127 as soon as anything is above it
        x = x[(x <= 2.0**-127) | (x >= 1.5 * 2.0**-127) | x.isnan()]
    # what is beyond the last number is the library's choice for e4m3: ours follows what this torch does with infinity
    saturate = torch.tensor(math.inf).to(dtype).float().isfinite().item()
    ours, theirs = encode(x, format, saturate), bytes_of(x.to(dtype))
    nan = x.to(dtype).float().isnan()
    wrong = torch.where(nan, ~of_torch(ours, dtype).isnan(), ours != theirs)
    assert not wrong.any(), f"{wrong.sum()} of {len(x)} numbers: {name} of {x[wrong][0]} is {ours[wrong][0]} here"


@pytest.mark.parametrize("name", TORCH)
def test_every_pattern_and_many_hard_numbers_as_torch_has_them(name): agrees_with_torch(name)


def is_nearest(format, encode=encode):
    "Every hard number becomes the nearest of all numbers, searched plainly; of two equally near ones the even code."
    x = hard_numbers(format, seed=1)[::3]
    x = torch.cat([x[x.isfinite()], torch.tensor([0.0])])
    listed = values(format)[:format.last + 1].double()
    gaps = (x.double().abs().clamp(max=format.largest)[:, None] - listed).abs()
    least = gaps.amin(-1, keepdim=True)
    number = torch.arange(len(listed))
    even = torch.where(gaps == least, number % 2 * 1000 + number, 10**6).argmin(-1) if format.mantissa else \
        torch.where(gaps == least, number, -1).argmax(-1)        # no mantissa: up, as its one digit turns from 1 to 2
    ours = encode(x, format, saturate=True)
    want = even | (x.signbit().long() << format.bits - 1 if format.signed else 0)
    wrong = ours != want
    assert not wrong.any(), f"{format.name}: {x[wrong][0]} became code {ours[wrong][0]}, nearest is {want[wrong][0]}"


@pytest.mark.parametrize("format", SMALL, ids=ids)
def test_the_nearest_of_all_numbers(format): is_nearest(format)


def test_the_blocks_of_the_gguf_package():
    "MXFP4 and NVFP4 as llama.cpp stores them are products of our numbers, for every scale and every code."
    fp4, nibbles = values(FLOATS["fp4_e2m1"]), torch.arange(16, dtype=torch.uint8)
    both = nibbles | nibbles << 4                           # byte i holds weights i and i + 16 (NVFP4: i + 8)
    scales = torch.arange(255, dtype=torch.uint8)
    block = torch.cat([scales[:, None], both.expand(255, 16)], 1)                               # (255, 17)
    want = decode(scales, FLOATS["e8m0"])[:, None] * fp4.repeat(2)
    assert torch.equal(dequantize(block, "MXFP4"), want)
    scales = torch.arange(127, dtype=torch.uint8)
    block = torch.cat([scales[:, None].expand(127, 4), both.repeat(2).expand(127, 32)], 1)      # (127, 36)
    want = decode(scales, FLOATS["fp8_e4m3"])[:, None] * fp4[:8].repeat(2).repeat(4)
    want[:, 16:32] = want[:, 48:] = decode(scales, FLOATS["fp8_e4m3"])[:, None] * fp4[8:].repeat(2)
    assert torch.equal(dequantize(block, "NVFP4"), want)


@pytest.mark.parametrize("format", LISTED, ids=ids)
def test_codes_come_back_and_stand_in_the_order_of_the_numbers(format):
    listed, codes = values(format), torch.arange(2**format.bits)
    numbers = ~listed.isnan()
    assert torch.equal(encode(listed, format)[numbers], codes[numbers])
    assert same(round_to(listed, format), listed).all()
    assert (listed[:format.last + 1].diff() > 0).all()
    if format.signed: assert same(listed[2 ** (format.bits - 1):], -listed[:2 ** (format.bits - 1)]).all()


def test_fp32_is_what_it_is():
    x = hard_numbers(FLOATS["fp8_e5m2"])
    x = x[~x.isnan()]
    assert torch.equal(encode(x, FLOATS["fp32"]), bits(x).long() & 0xFFFFFFFF)
    assert same(round_to(x, FLOATS["fp32"]), x).all()


@pytest.mark.parametrize("count", range(2, 9))
def test_without_exponent_bits_it_is_a_whole_number(count):
    whole, most = FloatFormat("whole", 0, count - 1, 2 - count, "finite"), 2 ** (count - 1) - 1
    x = torch.cat([torch.randn(2000, generator=torch.Generator().manual_seed(0)) * most, torch.arange(-300, 300) / 2])
    assert torch.equal(round_to(x, whole), x.round().clamp(-most, most))


def test_too_large():
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf])
    for name, beyond in dict(fp16=math.inf, fp8_e5m2=math.inf, fp8_e4m3=math.nan).items():
        most = FLOATS[name].largest
        want = torch.tensor([beyond, -beyond, beyond, -beyond])
        assert torch.equal(round_to(x, FLOATS[name], saturate=True), torch.tensor([most, -most, most, -most]))
        assert torch.allclose(round_to(x, FLOATS[name]), want, equal_nan=True)
    assert round_to(x, FLOATS["fp4_e2m1"]).tolist() == [6, -6, 6, -6]
    assert round_to(torch.tensor([464.0, 464.1]), FLOATS["fp8_e4m3"]).nan_to_num(-1).tolist() == [448, -1]
    assert round_to(torch.tensor(math.nan), FLOATS["fp8_e4m3"], saturate=True).isnan(), "NaN is not a large number"


def test_shapes_and_dtypes():
    every = torch.arange(256)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert same(decode(every.to(dtype), FLOATS["fp8_e5m2"]), values(FLOATS["fp8_e5m2"])).all(), dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 0, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert round_to(x, FLOATS["fp8_e4m3"]).shape == (3, 0, 5)
        x = torch.linspace(-9, 9, 60).reshape(3, 4, 5).to(dtype)[:, ::2].requires_grad_()   # a view, with gradient
        y = round_to(x, FLOATS["fp4_e2m1"])
        assert y.dtype == dtype and y.shape == x.shape
        assert torch.equal(y.float(), round_to(x.float(), FLOATS["fp4_e2m1"]))
    assert round_to(torch.tensor(2.6), FLOATS["fp4_e2m1"]).item() == 3
    assert encode(torch.tensor([2.5 + 1e-12], dtype=torch.float64), FLOATS["fp4_e2m1"]).item() == 5, "rounded once only"


@pytest.mark.parametrize("call", [
    lambda: encode(torch.tensor([1.0, math.nan]), FLOATS["fp6_e3m2"]),
    lambda: encode(torch.tensor([1.0, -2.0]), FLOATS["e8m0"]),
    lambda: encode(torch.tensor([1, 2]), FLOATS["fp16"]),
    lambda: encode(torch.tensor([1j]), FLOATS["fp16"]),
    lambda: decode(torch.tensor([16]), FLOATS["fp4_e2m1"]),
    lambda: decode(torch.tensor([-1], dtype=torch.int8), FLOATS["fp8_e4m3"]),
    lambda: decode(torch.tensor([1.0]), FLOATS["fp16"]),
    lambda: values(FLOATS["fp32"]),
    lambda: FloatFormat("mine", 4, 3, 7, "inf"),
    lambda: FloatFormat("mine", 0, 0, 1, "finite"),
    lambda: FloatFormat("mine", 8, 0, 127, "ieee"),
    lambda: FloatFormat("mine", -1, 3, 1, "finite"),
    lambda: FloatFormat("mine", 9, 3, 255, "ieee"),
    lambda: FloatFormat("mine", 8, 3, 150, "ieee"),
])
def test_refused(call):
    with pytest.raises(InputError): call()


# --- known-wrong variants: each is a mistake that somebody made, and the comparisons above must reject it ------------

def tie_goes(away):
    "Ties away from zero, or towards it: the nudge is too small for anything that is not a tie."
    def wrong(x, format, saturate=False): return encode(x.double() * (1 + away * 2.0**-40), format, saturate)
    return wrong


def cut_off(x, format, saturate=False):
    code = encode(x, format, saturate)
    larger = (decode(code, format).abs() > x.abs()) & x.isfinite()
    return torch.where(larger, code - 1, code)


def rounded_twice(x, format, saturate=False): return encode(x.half().float(), format, saturate)
def flushed(x, format, saturate=False):
    return encode(torch.where(x.abs() < 2.0**format.emin, x * 0, x), format, saturate)
def other_overflow(x, format, saturate=False): return encode(x, format, not saturate)
def zero_without_sign(x, format, saturate=False): return encode(torch.where(x == 0, x.abs(), x), format, saturate)
def nan_is_a_number(x, format, saturate=False): return encode(x.nan_to_num(0, math.inf, -math.inf), format, saturate)


def carry_lost(x, format, saturate=False):
    "A mantissa that is rounded up beyond its last value starts again without telling the exponent."
    code = encode(x, format, saturate)
    up, empty = decode(code, format).abs() > x.abs(), code & (1 << format.mantissa) - 1 == 0
    carried = up & empty & x.isfinite() & (x.abs() >= format.smallest)
    return torch.where(carried, (code - (1 << format.mantissa)).clamp(min=0), code)


ENCODERS = {"half up": tie_goes(1), "half down": tie_goes(-1), "cut off": cut_off, "no subnormals": flushed,
            "the other overflow": other_overflow, "zero without a sign": zero_without_sign,
            "NaN becomes a number": nan_is_a_number, "carry lost": carry_lost}


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e5m2", "fp8_e4m3"])
@pytest.mark.parametrize("wrong", ENCODERS)
def test_wrong_encoders_are_rejected(name, wrong):
    with pytest.raises(AssertionError): agrees_with_torch(name, encode=ENCODERS[wrong])


@pytest.mark.parametrize("name", ["fp8_e5m2", "fp8_e4m3"])
def test_rounding_twice_is_rejected(name):
    with pytest.raises(AssertionError): agrees_with_torch(name, encode=rounded_twice)


@pytest.mark.parametrize("format", BELOW_8, ids=ids)
@pytest.mark.parametrize("wrong", [w for w in ENCODERS if w not in ("the other overflow", "NaN becomes a number")])
def test_wrong_encoders_of_few_bits_are_rejected(format, wrong):
    with pytest.raises(AssertionError): is_nearest(format, ENCODERS[wrong])


WRONG_FORMATS = {
    "bias one too large": lambda f: replace(f, bias=f.bias + 1),
    "bias one too small": lambda f: replace(f, bias=f.bias - 1),
    "a bit moved to the mantissa": lambda f: replace(f, exponent=f.exponent - 1, mantissa=f.mantissa + 1),
    "field 0 with a leading one": lambda f: replace(f, subnormals=False, bias=f.bias - 1),
    "the last field like the others": lambda f: replace(f, top="nan" if f.top == "ieee" else "finite"),
    "infinity in the last field": lambda f: replace(f, top="finite" if f.top == "ieee" else "ieee"),
}


@pytest.mark.parametrize("name", ["fp16", "fp8_e5m2", "fp8_e4m3"])
@pytest.mark.parametrize("wrong", WRONG_FORMATS)
def test_wrong_formats_are_rejected(name, wrong):
    change = WRONG_FORMATS[wrong]
    with pytest.raises(AssertionError):
        agrees_with_torch(name, decode=lambda codes, format: decode(codes, change(format)))
    with pytest.raises((AssertionError, InputError)):   # InputError: there is no code for NaN any more
        agrees_with_torch(name, encode=lambda x, format, saturate: encode(x, change(format), saturate))
