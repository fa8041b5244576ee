"""FP8 formats: casts against the encoder that works on exponents and mantissas, scales and blocks against transformers'
reader and writer of such files; holders, files, damage; then known-wrong variants, which these checks must reject."""
import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import InputError, WorkbenchError
from llm_workbench.files.safetensors import SafetensorsFile
from llm_workbench.quantization.formats import FORMATS, PackedMatrix, PackedStack, quantize
from llm_workbench.quantization.fp8 import TINY, Float8, fp8, fp8_block, fp8_e5m2, fp8_tensor, mxfp8, scales_for, to_float8
from llm_workbench.quantization.number_formats import FLOATS, encode, values
from llm_workbench.quantization.packing import Format, Packed

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
KINDS = {"fp8_e4m3": E4M3, "fp8_e5m2": E5M2}
EVERY = [fp8, fp8_tensor, fp8_block, fp8_e5m2, mxfp8, Float8("odd", tile=(7, 5)), Float8("bf", tile=(None, 16), scale_dtype=torch.bfloat16)]
SHAPES = [(1, 1), (128, 128), (130, 257), (127, 129), (576, 200), (1, 300), (300, 1), (2, 129, 31), (3, 2, 5, 40)]


def noise(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def same(a, b): return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))
def as_bytes(t): return t.contiguous().view(-1).view(torch.uint8)


# --- the cast ---------------------------------------------------------------------------------------------------------

def hard(name):
    f = FLOATS[name]
    listed = values(f)[:f.last + 1]
    ties = ((listed[1:].double() + listed[:-1]) / 2).float()
    beside = [ties.nextafter(torch.full_like(ties, to)) for to in (0.0, math.inf)]
    x = torch.cat([listed, ties, *beside, torch.tensor([464.0, 465, 61440, 61439, 1e9, 3e38, math.inf, 1e-45])])
    return torch.cat([x, -x, torch.randint(-2**31, 2**31, (200_000,), generator=torch.Generator().manual_seed(1)).int()
                      .view(torch.float32)])


def as_the_encoder(cast, name, of):
    x = hard(name).to(of)
    x = x[~x.isnan()]
    wrong = cast(x, KINDS[name]).view(torch.uint8).long() != encode(x, FLOATS[name], saturate=True)
    assert not wrong.any(), f"{wrong.sum()} codes differ, the first for {x[wrong][0].item()!r}"


def cut_off(x, dtype):
    "Towards zero instead of to the nearest."
    got = to_float8(x, dtype)
    down = (got.view(torch.uint8).int() - (got.float().abs() > x.abs()).int()).to(torch.uint8)
    return down.view(dtype)


WRONG_CASTS = {
    "torch's cast alone": (lambda x, dtype: x.to(dtype), "fp8_e5m2"),
    "cut off": (cut_off, "fp8_e4m3"),
    "saturating at 240": (lambda x, dtype: x.clamp(-240, 240).to(dtype), "fp8_e4m3"),
    "without subnormals": (lambda x, dtype: torch.where(x.abs() < 2**-6, 0, x).clamp(-448, 448).to(dtype), "fp8_e4m3"),
    "by way of half": (lambda x, dtype: to_float8(x.half(), dtype), "fp8_e4m3"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cast(name, of):
    as_the_encoder(to_float8, name, of)
    assert to_float8(torch.tensor([math.nan, 1], dtype=of), KINDS[name]).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", WRONG_CASTS)
def test_wrong_casts_are_rejected(name):
    cast, of = WRONG_CASTS[name]
    with pytest.raises(AssertionError): as_the_encoder(cast, of, torch.float32)


# --- scales and tiles -------------------------------------------------------------------------------------------------

def by_hand(format, w):
    "Codes and scales of a matrix, tile by tile, and the weight that they stand for."
    (O, I), (r, c) = w.shape, (n or size for n, size in zip(format.tile, w.shape))
    codes, scales, back = torch.zeros(O, I, dtype=format.dtype), [], torch.zeros(O, I)
    for i in range(0, O, r):
        scales.append([])
        for j in range(0, I, c):
            tile = w[i:i + r, j:j + c].float()
            s = max(tile.abs().max().item() / torch.finfo(format.dtype).max, TINY)
            if format.scale_dtype == E8M0: s = 2.0 ** math.ceil(math.log2(s))
            s = torch.tensor(s).to(format.scale_dtype)
            codes[i:i + r, j:j + c] = to_float8(tile / s.float(), format.dtype)
            back[i:i + r, j:j + c] = codes[i:i + r, j:j + c].float() * s.float()
            scales[-1].append(s.float().item())
    return codes, torch.tensor(scales).to(format.scale_dtype), back


def packs_as_by_hand(format, seed=0):
    for shape in SHAPES:
        if shape[-1] % format.columns: continue
        w = noise(*shape, seed=seed) * (noise(*shape[:-1], 1, seed=1) * 3).exp()
        packed = format.pack(w)
        assert packed.unpack().shape == w.shape and packed.nbytes == format.nbytes(w.shape)
        flat, whole = w.view(-1, *w.shape[-2:]), packed.unpack().view(-1, *w.shape[-2:])
        for i, matrix in enumerate(flat):
            codes, scale, back = by_hand(format, matrix)
            got = {n: t.view(-1, *t.shape[-2:])[i] for n, t in packed.tensors.items()}
            assert same(got["scale"], scale), f"other scales for {shape}"
            assert same(got["data"], codes) and torch.equal(whole[i], back), f"other codes for {shape}"


class WholeTiles(Float8):
    "Wrong: the last tile of a row takes the scale of the one before."
    def _spread(self, scale, shape):
        out = super()._spread(scale, shape).clone()
        c = self.tile[1]
        if c and out.shape[-1] == shape[-1] and shape[-1] % c and shape[-1] > c:
            out[..., shape[-1] // c * c:] = out[..., shape[-1] // c * c - 1:shape[-1] // c * c]
        return out


class Transposed(Float8):
    "Wrong: scales of columns where rows belong."
    def _spread(self, scale, shape):
        return super()._spread(scale.mT, shape) if scale.shape[-1] == scale.shape[-2] else super()._spread(scale, shape)


class Divides(Float8):
    "Wrong: weight_scale_inv taken at its name."
    def _unpack(self, tensors, shape, dtype): return (tensors["data"].float() / self._spread(tensors["scale"], shape)).to(dtype)


class Unrounded(Float8):
    "Wrong: codes for the scale before it is rounded."
    def _pack(self, weight, importance):
        exact = scales_for(self._largest(weight), self.dtype)
        return {"data": to_float8(weight / self._spread(exact, weight.shape), self.dtype), "scale": exact.to(self.scale_dtype)}


class Mean(Float8):
    "Wrong: the mean of a padded tile."
    def _largest(self, weight): return super()._largest(weight) * 0.5


@pytest.mark.parametrize("format", EVERY, ids=repr)
def test_tiles(format): packs_as_by_hand(format)


MUTANTS = [WholeTiles("m", tile=(128, 128)), Transposed("m", tile=(128, 128)), Divides("m"), Mean("m"),
           Unrounded("m", tile=(1, 16), scale_dtype=torch.bfloat16)]

@pytest.mark.parametrize("format", MUTANTS, ids=lambda f: type(f).__name__)
def test_wrong_formats_are_rejected(format):
    with pytest.raises(AssertionError): packs_as_by_hand(format)


def test_scales():
    largest = torch.tensor([0.0, 1e-44, 448, 449, 447, 3e38])
    assert scales_for(largest, E4M3)[2:5].tolist() == [1, torch.tensor(449 / 448).item(), torch.tensor(447 / 448).item()]
    assert scales_for(largest, E4M3)[0] == TINY and scales_for(largest, E5M2)[-1].isfinite()
    powers = scales_for(largest, E4M3, E8M0).float()
    assert powers[2:5].tolist() == [1, 2, 1] and (powers * 448 >= largest).all() and (powers > 0).all()
    every = torch.arange(-126, 119).double().exp2().float()
    assert torch.equal(scales_for(every * 448, E4M3, E8M0).float(), every), "powers of two stay what they are"


# --- what others read and write ---------------------------------------------------------------------------------------

def transformers_ops(block, scale_fmt="float"):
    fp8s = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))
    return fp8s.Fp8Quantize(config), fp8s.Fp8Dequantize(config)


@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=str)
def test_as_transformers(shape):
    w = noise(*shape) * noise(*shape[:-1], 1, seed=2).abs()
    for format, block, fmt in ((fp8_block, (128, 128), "float"), (mxfp8, (1, 32), "ue8m0"), (fp8_tensor, shape[-2:], "float")):
        packed, (writer, reader) = format.pack(w), transformers_ops(block, fmt)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(reader._dequantize_one(packed.data, packed.tensors["scale"], dtype), packed.unpack(dtype))
        codes, scale = writer._quantize_one("a.weight", w).values()
        theirs = Packed(format, tuple(shape), {"data": codes, "scale": scale})
        assert torch.equal(reader._dequantize_one(codes, scale, torch.float32), theirs.unpack())
        off = (codes.view(torch.uint8).int() - packed.data.view(torch.uint8).int()).abs()
        assert off.max() <= 1 and off.sum() < 1e-3 * w.numel()
        assert torch.allclose(scale.float(), packed.tensors["scale"].float(), rtol=2e-7, atol=0)


def test_files(tmp_path):
    for format in EVERY:
        packed = format.pack(noise(130, 256))
        save_file(packed.tensors, tmp_path / "a.safetensors")
        file, theirs = SafetensorsFile(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
        for read in ({n: file[n].clone() for n in packed.tensors}, theirs):
            assert torch.equal(Packed(format, (130, 256), read).unpack(), packed.unpack())


# --- rows -------------------------------------------------------------------------------------------------------------

def rows_are_rows(format):
    for shape in ((300, 160), (3, 50, 96), (2, 3, 10, 64), (1, 32)):
        packed = format.pack(noise(*shape) * (noise(*shape[:-1], 1, seed=4) * 4).exp())
        whole, last = packed.unpack(), shape[0] - 1
        for rows in (slice(None), slice(1, None), slice(0, 0), [last, 0, last], torch.tensor([last, 0]),
                     torch.tensor([[last], [0]]), torch.arange(shape[0]) % 2 == 0, *([last] if len(shape) > 2 else [])):
            some = packed[rows]
            assert some.shape == whole[rows].shape and torch.equal(some.unpack(), whole[rows]), (shape, rows)
            if len(shape) == 2 and len(some.shape) == 2 and some.shape[0] > 2:
                assert torch.equal(some[[2, 0]].unpack(), whole[rows][[2, 0]]), "rows of rows"


class PlainRows(Float8):
    "Wrong: row 3 takes scale 3."
    def rows(self, packed, rows):
        return Packed(self, packed.data[rows].shape, {"data": packed.data[rows], "scale": packed.tensors["scale"][rows]})


class FirstBlocks(Float8):
    "Wrong: counts blocks from the first of the chosen rows."
    def rows(self, packed, rows):
        found = super().rows(packed, rows)
        if len(packed.shape) > 2: return found
        number = torch.arange(len(found.data)) // self.tile[0]
        return Packed(found.format, found.shape, {**found.tensors, "scale": packed.tensors["scale"][number]})


@pytest.mark.parametrize("format", EVERY, ids=repr)
def test_rows(format): rows_are_rows(format)


@pytest.mark.parametrize("wrong", [PlainRows, FirstBlocks])
def test_wrong_rows_are_rejected(wrong):
    with pytest.raises((AssertionError, IndexError, WorkbenchError)): rows_are_rows(wrong("m", tile=(128, 128)))


# --- in a model -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("format", EVERY, ids=repr)
def test_holders_keep_codes_and_scales(format):
    w = noise(48, 96)
    m = PackedMatrix(format.pack(w), torch.nn.Parameter(noise(48)))
    for to in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), copy.deepcopy):
        moved = to(PackedMatrix(format.pack(w), torch.nn.Parameter(noise(48))))
        assert all(same(moved.packed.tensors[n], t) for n, t in m.packed.tensors.items())
        assert torch.equal(moved.dense(torch.float32), m.dense())
    assert m.to(torch.bfloat16)(noise(2, 96).bfloat16(), TORCH).dtype == torch.bfloat16
    ids = torch.tensor([[3, 47], [0, 3]])
    assert torch.equal(m.rows(ids, torch.float32), m.dense(torch.float32)[ids])
    again = PackedMatrix(format.pack(noise(48, 96, seed=9)), torch.nn.Parameter(torch.zeros(48)))
    again.load_state_dict(m.state_dict())
    assert torch.equal(again.dense(torch.float32), m.dense(torch.float32))
    stack = PackedStack(format.pack(noise(5, 24, 64)))
    which = torch.tensor([4, 0, 4, 2])
    want = torch.einsum("ni,noi->no", noise(4, 64), stack.dense()[which])
    assert torch.allclose(stack(noise(4, 64), which, REFERENCE), want, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
def test_families_in_blocks(family):
    from models import small_model
    decoder = Decoder.from_transformers(small_model(family), REFERENCE)
    tokens = torch.arange(18).view(2, 9)
    want = decoder(tokens)
    for format in (fp8_block, "fp8", fp8_tensor):
        got = quantize(decoder, format)(tokens)
        assert 0 < (got - want).norm() < 0.3 * want.norm(), format


def test_among_the_formats():
    assert {"fp8", "fp8_tensor", "fp8_block", "fp8_e5m2", "mxfp8"} <= FORMATS.keys()
    assert fp8_block.bits((4096, 4096)) == 8 + 32 / 128**2 and mxfp8.bits((4096, 4096)) == 8.25
    assert isinstance(fp8, Format) and repr(fp8_block) == "<fp8_block>"


def test_wrong_arguments():
    for wrong in (dict(dtype=torch.float16), dict(dtype=E8M0), dict(tile=(0, 1)), dict(tile=(1.5, 2)), dict(tile=(1,)),
                  dict(tile=(-1, None)), dict(scale_dtype=torch.float16), dict(scale_dtype=E4M3)):
        with pytest.raises(InputError): Float8("wrong", **wrong)
    with pytest.raises(InputError, match="float32"): fp8.pack(torch.full((2, 2), 1e300, dtype=torch.float64))
    for w in (torch.full((2, 32), math.inf), torch.full((2, 32), math.nan), torch.ones(32), torch.ones(0, 32)):
        for format in EVERY[:5]:
            with pytest.raises(InputError): format.pack(w)


def test_damage_ends_in_our_errors():
    rng, w = random.Random(0), noise(130, 256)
    for _ in range(400):
        format = rng.choice(EVERY)
        good, change = format.pack(w), rng.randrange(5)
        name, shape = rng.choice(["data", "scale"]), good.shape
        tensor = good.tensors[name]
        if change == 0: tensor = tensor[:-1]
        if change == 1: tensor = tensor.float() if tensor.dtype != torch.float32 else tensor.double()
        if change == 2: tensor = torch.cat([tensor, tensor])
        if change == 3: shape = (shape[0] + rng.choice((-3, 1, 300)), shape[1])
        tensors = {n: tensor if n == name else t for n, t in good.tensors.items() if n != name or change != 4}
        damaged = Packed(format, shape, tensors)
        with pytest.raises(WorkbenchError): damaged.unpack()
        if format.tile[0] != 1 and "data" in tensors:
            with pytest.raises(WorkbenchError): damaged[[5, 0]].unpack()


def test_inference_mode_doubles_and_gradients():
    w = noise(4, 128).double().requires_grad_()
    with torch.inference_mode(): packed = fp8_block.pack(w)
    assert torch.equal(packed.unpack().clone(), fp8_block.pack(w.float()).unpack())
    assert not any(t.requires_grad for t in fp8_block.pack(w).tensors.values())
