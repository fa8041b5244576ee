"""NF4, FP4 and double quantization against bitsandbytes, bit for bit; then known-wrong variants, which these
comparisons must reject."""
import logging
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llm_workbench.errors import CheckpointError, InputError, UnsupportedError, WorkbenchError
from llm_workbench.quantization.formats import PackedMatrix
from llm_workbench.quantization.nf4 import (
    BLOCKS,
    CHUNK,
    FP4,
    NF4,
    Codebook,
    CodebookFormat,
    DoubleFormat,
    cells_of,
    codebook_format,
    dynamic_map,
    fp4,
    from_bitsandbytes,
    inverse,
    nf4,
    nf4_dq,
    normal_levels,
    quantize_scales,
    to_bitsandbytes,
)
from llm_workbench.quantization.packing import Packed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)     # it warns when its kernels on the hub are not there
bnb = pytest.importorskip("bitsandbytes.functional")

BOOKS = {"nf4": NF4, "fp4": FP4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def differing(a, b):
    "How many entries differ in any bit."
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.contiguous().view(bits) != b.contiguous().view(bits)).sum().item()


def unsigned(x):
    "`x` with -0 as 0: on some CPUs bitsandbytes gives the zero of FP4 a sign."
    return x + 0.0


def beside_middles(book, n=512, seed=0):
    "Blocks of 64 full of weights that stand midway between two levels, or one float beside, with arbitrary scales."
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, 1, generator=g) * 2 + 0.1
    scale[::4] = 1.0                                                             # here the middles are exact
    near = book.middles[torch.randint(15, (n, 64), generator=g)] * scale
    to = torch.tensor([-math.inf, 0, math.inf])[torch.randint(3, near.shape, generator=g)]
    near = torch.where(to == 0, near, near.nextafter(to))
    near[:, :1] = scale
    return near


def distributions(book=NF4, rows=64, columns=4096, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=g)
    sparse = normal * (torch.rand(rows, columns, generator=g) < 0.02)
    sparse[:4], sparse[4] = 0, -0.25
    return {"normal": normal, "uniform": torch.rand(rows, columns, generator=g) * 2 - 1, "heavy tails": normal**5,
            "tiny": normal * 1e-36, "subnormal": normal * 1e-42, "huge": normal * 1e30, "sparse and constant": sparse,
            "beside middles": beside_middles(book, rows * columns // 64, seed).view(rows, columns)}


def as_bitsandbytes(kind, w, G=64, quantize=None, dequantize=None):
    "Bytes, scales and unpacked weights are bitsandbytes'."
    book = BOOKS[kind]
    data, absmax = (quantize or Codebook.quantize)(book, w.reshape(-1, G))
    want, state = bnb.quantize_4bit(w, quant_type=kind, blocksize=G)
    wrong = differing(absmax, state.absmax)
    assert not wrong, f"{wrong} of {len(absmax)} scales differ"
    wrong = differing(data.flatten(), want.flatten())
    assert not wrong, f"{wrong} of {data.numel()} bytes differ"
    with torch.compiler.set_stance("force_eager"):          # bitsandbytes compiles its way for blocks of 2048 and more
        theirs = unsigned(bnb.dequantize_4bit(want, state))
    ours = (dequantize or Codebook.dequantize)(book, data, absmax, w.dtype).view(w.shape)
    tiny = theirs.abs().float() < 2.0**-126                 # subnormal bf16: flushed to zero by some processors
    if w.dtype == torch.bfloat16: ours, theirs = (torch.where(tiny, 0, x) for x in (ours, theirs))
    wrong = differing(ours, theirs)
    assert not wrong, f"{wrong} of {ours.numel()} unpacked weights differ"


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_distributions_in_all_dtypes(kind, dtype):
    for name, w in distributions(BOOKS[kind]).items():
        if (w := w.to(dtype)).isfinite().all(): as_bitsandbytes(kind, w)


@pytest.mark.parametrize("G", BLOCKS)
def test_all_block_sizes(G):
    for kind in BOOKS: as_bitsandbytes(kind, distributions(rows=16)["normal"], G)


def test_more_than_a_chunk_and_no_whole_number_of_chunks():
    w = torch.randn(2 * CHUNK // 64 + 3, 64, generator=torch.Generator().manual_seed(1))
    w[-1] = beside_middles(NF4, 1)
    as_bitsandbytes("nf4", w)
    as_bitsandbytes("fp4", torch.zeros(2 * CHUNK // 64 + 3, 64))                  # all of them unsure


# --- wrong ways -------------------------------------------------------------------------------------------------------

def simple(book, blocks, absmax=None, times=None, nearest=None):
    absmax = blocks.float().abs().amax(1) if absmax is None else absmax
    codes = (nearest or book.nearest)(times(blocks, absmax) if times else blocks.float() * inverse(absmax))
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax


def other_levels(book, levels): return lambda scaled: Codebook(levels).nearest(scaled)
def upper(book): return lambda x: book.order.to(torch.uint8)[torch.bucketize(x, book.middles, right=True)]


def in_the_table_only(book, blocks):
    absmax = blocks.float().abs().amax(1)
    codes = cells_of(book)[((blocks.float() * inverse(absmax)) * 2**15 + 2**15).int()] & 15
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax


def swapped_nibbles(book, blocks):
    data, absmax = simple(book, blocks)
    return data << 4 | data >> 4, absmax


EVEN = torch.linspace(-1, 1, 16)
WRONG_QUANTIZERS = {
    "midway goes up": lambda book, b: simple(book, b, nearest=upper(book)),
    "scale of the whole tensor": lambda book, b: simple(book, b, b.float().abs().max().expand(len(b)).contiguous()),
    "largest, not largest magnitude": lambda book, b: simple(book, b, b.float().amax(1)),
    "scale in bf16": lambda book, b: simple(book, b, b.float().abs().amax(1).bfloat16().float()),
    "divided": lambda book, b: simple(book, b, times=lambda b, a: b.float() / a.clamp(min=1e-38)[:, None]),
    "nibbles swapped": swapped_nibbles,
    "even levels": lambda book, b: simple(book, b, nearest=other_levels(book, EVEN)),
    "levels mirrored": lambda book, b: simple(book, b, nearest=other_levels(book, -book.levels.flip(0))),
    "no search for the unsure": in_the_table_only,
    "codes of rising levels": lambda book, b: simple(book, b, nearest=Codebook(book.levels.sort().values).nearest),
}


@pytest.mark.parametrize("name", WRONG_QUANTIZERS)
def test_wrong_quantizers_are_rejected(name):
    rejected = []
    for kind, book in BOOKS.items():
        for w in distributions(book).values():
            try: as_bitsandbytes(kind, w, quantize=WRONG_QUANTIZERS[name])
            except (AssertionError, InputError, IndexError): rejected.append(kind)
    needed = {"codes of rising levels": {"fp4"}, "levels mirrored": {"nf4"}}.get(name, set(BOOKS))
    assert set(rejected) >= needed, f"{name} passed as right"


def test_the_plain_way_passes():
    for kind, book in BOOKS.items():
        for w in distributions(book).values(): as_bitsandbytes(kind, w, quantize=simple)


def unpacked(book, data, absmax, dtype, levels=None, swap=False, early=False):
    data = data << 4 | data >> 4 if swap else data
    levels = book.levels if levels is None else levels
    values = levels[torch.stack([data >> 4, data & 15], -1).flatten(1).long()]
    return values.to(dtype) * absmax[:, None].to(dtype) if early else (values * absmax[:, None]).to(dtype)


WRONG_DEQUANTIZERS = {
    "nibbles swapped": lambda *a: unpacked(*a, swap=True),
    "rounded before the product": lambda *a: unpacked(*a, early=True),
    "levels to 4 digits": lambda book, *a: unpacked(book, *a, levels=(book.levels * 1e4).round() / 1e4),
    "levels of the other kind": lambda book, *a: unpacked(book, *a, levels=(NF4 if book is FP4 else FP4).levels),
}


@pytest.mark.parametrize("name", WRONG_DEQUANTIZERS)
def test_wrong_dequantizers_are_rejected(name):
    for kind in BOOKS:
        with pytest.raises(AssertionError, match="unpacked weights differ"):
            for dtype in (torch.bfloat16, torch.float32):
                w = distributions()["normal"].to(dtype)
                as_bitsandbytes(kind, w, dequantize=WRONG_DEQUANTIZERS[name])


def test_levels_and_map():
    assert not differing(normal_levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert not differing(FP4.levels, bnb.get_4bit_type("fp4", device="cpu"))
    assert not differing(dynamic_map(), bnb.create_dynamic_map())


# --- double quantization ----------------------------------------------------------------------------------------------

def scales_as_bitsandbytes(absmax, quantize=quantize_scales):
    "Mean and nested scales equal; at least 99.7 % of the codes equal, none more than a step off. Returns the share."
    codes, nested, offset = quantize(absmax)
    theirs, state = bnb.quantize_blockwise(absmax.flatten() - absmax.mean(), blocksize=256)
    assert not differing(offset, absmax.mean()), "another mean"
    assert not differing(nested, state.absmax), "other nested scales"
    gap = (codes.flatten().long() - theirs.long()).abs()
    share = (gap == 0).float().mean().item()
    assert share >= 0.997 and gap.max() <= 1, f"{share:.2%} of the codes equal, worst distance {gap.max()}"
    return share


def scales(seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(300, 9, 64, generator=g).abs().amax(-1)                 # no whole number of groups
    return {"normal": normal, "heavy": torch.rand(512, 9, generator=g)**8 * torch.randn(512, 9, generator=g).abs()**3,
            "all alike": torch.full((64, 8), 0.3), "one alike": torch.full((3, 1), 0.1), "zeros": torch.zeros(4, 64),
            "few": normal[:2], "tiny": normal * 1e-30, "subnormal": normal * 1e-41}


def test_scales_of_scales():
    shares = {name: scales_as_bitsandbytes(absmax) for name, absmax in scales().items()}
    assert min(shares.values()) > 0.9999, shares                                 # in fact all, with this processor


def levels_of(table, groups=256, mean=True, each_row=False):
    "A quantizer of scales with other levels, groups, or without taking off the mean."
    def quantize(absmax):
        offset = absmax.mean() if mean else torch.tensor(0.0)
        left = (absmax - offset) if each_row else (absmax - offset).view(1, -1)
        left = F.pad(left, (0, -left.shape[1] % groups)).view(-1, groups)
        nested = left.abs().amax(1)
        scaled = (left / nested[:, None]).nan_to_num(nan=-1)
        codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).flatten()
        return codes[:absmax.numel()].view(absmax.shape).to(torch.uint8), nested, offset
    return quantize


WRONG_SCALES = {
    "without the mean": levels_of(dynamic_map(), mean=False),
    "groups of 64": levels_of(dynamic_map(), groups=64),
    "groups that end with rows": levels_of(dynamic_map(), each_row=True),
    "even levels": levels_of(torch.linspace(-1, 1, 256)),
    "decades from the top": levels_of(-dynamic_map().flip(0)),
}


@pytest.mark.parametrize("name", WRONG_SCALES)
def test_wrong_quantizers_of_scales_are_rejected(name):
    with pytest.raises(AssertionError): scales_as_bitsandbytes(scales()["normal"], WRONG_SCALES[name])


@pytest.mark.parametrize("kind", BOOKS)
def test_any_state_unpacks_to_the_same_bits(kind):
    "Random codes of weights and of scales: also those that no quantizer would make."
    g = torch.Generator().manual_seed(3)
    for dtype in DTYPES:
        w = torch.randn(50, 576, generator=g).to(dtype)
        data, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=True)
        data = torch.randint(256, data.shape, dtype=torch.uint8, generator=g)
        state.absmax = torch.randint(256, state.absmax.shape, dtype=torch.uint8, generator=g)
        assert not differing(from_bitsandbytes(data, state).unpack(dtype), unsigned(bnb.dequantize_4bit(data, state)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_quantization_of_weights(dtype):
    w = torch.randn(70, 576, generator=torch.Generator().manual_seed(5)).to(dtype)
    for kind in BOOKS:
        for G in (32, 64):
            packed = codebook_format(kind, G, double=True).pack(w)
            data, state = to_bitsandbytes(packed, dtype)
            want, theirs = bnb.quantize_4bit(w, quant_type=kind, blocksize=G, compress_statistics=True)
            assert not differing(data, want) and state == theirs
            assert not differing(unsigned(bnb.dequantize_4bit(data, state)), packed.unpack(dtype))
    assert abs(nf4_dq.bits((4096, 4096)) - 4.127) < 1e-3 and nf4.bits((4096, 4096)) == 4.5


def rows_are_rows(format):
    "Some rows, some matrices and single ones, equal what the whole unpacks to."
    g = torch.Generator().manual_seed(6)
    for shape in ((70, 576), (3, 50, 320), (2, 3, 10, 64)):
        packed = format.pack(torch.randn(shape, generator=g))
        whole = packed.unpack()
        last = shape[0] - 1
        for rows in (slice(None), slice(1, None), [last, 0, last], torch.tensor([last, 1]),
                     torch.tensor([[last], [0]]), torch.arange(shape[0]) % 2 == 1, *([last] if len(shape) > 2 else [])):
            some = packed[rows]
            assert some.shape == whole[rows].shape and not differing(some.unpack(), whole[rows]), (shape, rows)


class Restarting(DoubleFormat):
    "Wrong: counts the groups from the first of the chosen rows."
    def rows(self, packed, rows):
        found = super().rows(packed, slice(None))
        codes, nested, offset = (packed.tensors[n] for n in ("absmax", "nested_absmax", "nested_offset"))
        some = codes[rows]
        group = torch.arange(some.numel()).view(some.shape) // 256
        absmax = dynamic_map()[some.int()] * nested[group] + offset
        return Packed(found.format, (*some.shape[:-1], packed.shape[-1]), {"data": packed.data[rows], "absmax": absmax})


def test_rows():
    for format in (nf4, fp4, nf4_dq, codebook_format("nf4", 32, double=True)): rows_are_rows(format)
    with pytest.raises(AssertionError): rows_are_rows(Restarting("nf4_dq", NF4))
    w = torch.randn(500, 64, generator=torch.Generator().manual_seed(7))
    matrix, ids = PackedMatrix(nf4_dq.pack(w)), torch.tensor([[499, 3], [3, 256]])
    assert not differing(matrix.rows(ids), matrix.dense()[ids])


# --- to bitsandbytes and back -----------------------------------------------------------------------------------------

def test_there_and_back_for_all_kinds_blocks_and_ways_of_storing():
    w = torch.randn(3, 4, 4096, generator=torch.Generator().manual_seed(8))
    for kind in BOOKS:
        for G in BLOCKS:
            for double in (False, True):
                for storage in (torch.uint8, torch.bfloat16, torch.float32):
                    data, state = bnb.quantize_4bit(w, blocksize=G, quant_type=kind, compress_statistics=double,
                                                    quant_storage=storage)
                    packed = from_bitsandbytes(data, state)
                    assert packed.format.name == codebook_format(kind, G, double).name and packed.shape == w.shape
                    again, state2 = to_bitsandbytes(packed)
                    assert state2 == state and torch.equal(again.view(-1), data.view(torch.uint8).view(-1))
    assert from_bitsandbytes(*to_bitsandbytes(nf4_dq.pack(w))).format is nf4_dq


def test_the_form_of_files():
    "What a checkpoint stores of one weight; and anything with the attributes of a QuantState will do."
    packed = nf4_dq.pack(torch.randn(8, 128))
    data, state = to_bitsandbytes(packed, torch.bfloat16)
    stored = state.as_dict(packed=True)
    read = bnb.QuantState.from_dict(dict(stored), torch.device("cpu"))
    assert read.dtype == torch.bfloat16 and not differing(from_bitsandbytes(data, read).unpack(), packed.unpack())
    plain = SimpleNamespace(**{n: getattr(read, n) for n in ("absmax", "shape", "code", "blocksize", "quant_type",
                                                             "offset", "state2")})
    assert not differing(from_bitsandbytes(data, plain).unpack(), packed.unpack())


def test_what_cannot_be_read_is_named():
    packed = nf4_dq.pack(torch.randn(8, 128))
    wrong = {
        "quant_type": ("af4", UnsupportedError), "blocksize": (48, UnsupportedError),
        "code": (torch.linspace(-1, 1, 16), UnsupportedError), "shape": (torch.Size((128 * 8,)), UnsupportedError),
        "absmax": (torch.zeros(15, dtype=torch.uint8), CheckpointError),
    }
    for name, (value, error) in wrong.items():
        data, state = to_bitsandbytes(packed)
        setattr(state, name, value)
        with pytest.raises(error): from_bitsandbytes(data, state)
    data, state = to_bitsandbytes(packed)
    state.code = None
    with pytest.raises(CheckpointError, match="quant_map"): from_bitsandbytes(data, state)
    data, state = to_bitsandbytes(packed)
    state.state2.blocksize = 128
    with pytest.raises(UnsupportedError, match="nested"): from_bitsandbytes(data, state)
    state.state2.blocksize, state.state2.code = 256, torch.linspace(-1, 1, 256)
    with pytest.raises(UnsupportedError, match="nested_quant_map"): from_bitsandbytes(data, state)
    with pytest.raises(CheckpointError): from_bitsandbytes(data[:-1], to_bitsandbytes(packed)[1])
    with pytest.raises(UnsupportedError):
        to_bitsandbytes(CodebookFormat("even", Codebook(EVEN)).pack(torch.randn(2, 64)))


def test_wrong_arguments():
    for levels in (torch.zeros(16), torch.ones(15), torch.full((16,), math.nan), EVEN * 2, EVEN.view(4, 4)):
        with pytest.raises(InputError): Codebook(levels)
    for block in (0, 48, 8192, 64.0 + 0.5, "64"):
        with pytest.raises(InputError): CodebookFormat("odd", NF4, block)
    for w in (torch.randn(2, 63), torch.randn(64), torch.full((2, 64), math.inf)):
        with pytest.raises(InputError): nf4.pack(w)


def test_mutations_of_layouts_end_in_our_own_errors():
    rng, w = random.Random(0), torch.randn(6, 256, generator=torch.Generator().manual_seed(9))
    for turn in range(400):
        format = rng.choice((nf4, fp4, nf4_dq))
        good = format.pack(w)
        name = rng.choice(list(good.tensors))
        tensor, shape = good.tensors[name], good.shape
        change = rng.randrange(5)
        if change == 0: tensor = tensor.flatten()[:rng.randrange(tensor.numel())]
        elif change == 1: tensor = tensor.to(rng.choice([d for d in (*DTYPES, torch.int8) if d != tensor.dtype]))
        elif change == 2: tensor = torch.cat([tensor.flatten(), tensor.flatten()])
        elif change == 3: shape = tuple(n + rng.choice((-1, 1, 64)) for n in shape)
        tensors = {n: tensor if n == name else t for n, t in good.tensors.items() if n != name or change != 4}
        damaged = Packed(format, shape, tensors)
        with pytest.raises(WorkbenchError): damaged.unpack()
        if format is nf4_dq and "data" in tensors:
            with pytest.raises(WorkbenchError): damaged[[5, 0]].unpack()


def test_in_inference_mode_from_doubles_and_with_gradients_off_limits():
    w = torch.randn(4, 128, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        packed = nf4_dq.pack(w)
        inside = packed.unpack(torch.bfloat16)
    assert not differing(nf4_dq.pack(w.float()).unpack(torch.bfloat16), inside.clone())
    assert not any(t.requires_grad for t in nf4.pack(w).tensors.values())
