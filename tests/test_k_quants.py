"""The super-block types of llama.cpp against its C library: bytes written with and without an importance, numbers read,
and wrong variants that must not pass."""
import inspect

import pytest
import torch

from llm_workbench.embedded import embedded_model
from llm_workbench.errors import CheckpointError, InputError, UnsupportedError
from llm_workbench.files.gguf import GGUFFile, block_type
from llm_workbench.quantization import k_quants
from llm_workbench.quantization.formats import FORMATS
from llm_workbench.quantization.gguf_blocks import (
    BlockFormat, c_dequantize, c_quantize, ggml_library, search_scale_and_min)
from llm_workbench.quantization.k_quants import (
    PACK, UNPACK, fit_lines, in_turn, six_bits, stripes, unsix_bits, unstripes, whole)
from llm_workbench.quantization.packing import Packed

try: ggml_library()
except UnsupportedError as error: pytest.skip(str(error), allow_module_level=True)

COLUMNS = 768
REAL = GGUFFile(embedded_model()).load("blk.3.ffn_down.weight")[:16, :COLUMNS].float()


def distributions(rows=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, COLUMNS, generator=g)
    sparse = normal * (torch.rand(rows, COLUMNS, generator=g) < 0.1)     # with -0
    sparse[::4], sparse[1], sparse[2], sparse[3] = 0, 0.37, -0.21, 0.5 * normal[3].sign()
    outlier = 0.001 * normal * (torch.arange(rows) % 2)[:, None]
    outlier[torch.arange(rows), torch.randint(COLUMNS, (rows,), generator=g)] = 3
    return {
        "normal": 0.02 * normal,
        "uniform": 2 * torch.rand(rows, COLUMNS, generator=g) - 1,
        "heavy": normal / (torch.rand(rows, COLUMNS, generator=g) + 1e-3) ** 2,
        "real": REAL[:rows],
        "sparse": sparse,
        "one outlier": outlier,
        "ties": torch.randint(-16, 17, (rows, COLUMNS), generator=g) / 16,
        "one sign": normal.abs() + 1,
        "negative": -normal.abs() - 1,
        "nearly constant": 1 + 1e-6 * normal,
        "tiny": normal * 10.0 ** -torch.linspace(0, 44, rows)[:, None],
        "huge": normal * 10.0 ** torch.linspace(0, 16, rows)[:, None],
    }


def importances(seed=9):
    g = torch.Generator().manual_seed(seed)
    uneven = torch.rand(COLUMNS, generator=g) ** 4
    uneven[3], uneven[64:100] = 0, 0
    some = torch.rand(COLUMNS, generator=g)
    return {"none": None, "ones": torch.ones(COLUMNS), "uneven": uneven, "zeros": torch.zeros(COLUMNS),
            "nearly all zero": some * (torch.rand(COLUMNS, generator=g) < 0.03),
            "far apart": 10.0 ** (-40 * torch.rand(COLUMNS, generator=g))}


def written_otherwise(kind, importance=None, seed=0, trials=None):
    "Blocks that are not the C library's."
    format, wrong = BlockFormat(kind.lower(), PACK[kind], UNPACK[kind]), {}
    for name, w in (trials or distributions(seed=seed)).items():
        ours, theirs = format.pack(w, importance).data, c_quantize(w, kind, importance)
        n = (ours != theirs).view(-1, format.block.nbytes).any(1).sum().item()
        if n: wrong[name] = n
    return wrong


def samples(kind):
    "Random blocks, and blocks in which all bytes are the same, for every byte."
    nbytes = block_type(kind).nbytes
    noise = torch.randint(256, (800, nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return torch.cat([noise, torch.arange(256, dtype=torch.uint8)[:, None].expand(256, nbytes)])


def read_otherwise(kind, data):
    "Weights that are not the C library's to the bit (any NaN is a NaN)."
    ours, theirs = UNPACK[kind](data), c_dequantize(data, kind)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return (~((ours.view(torch.int32) == theirs.view(torch.int32)) | ours.isnan() & theirs.isnan())).sum().item()


@pytest.mark.parametrize("kind", UNPACK)
def test_numbers_are_those_of_the_c_library(kind):
    data = samples(kind)
    assert read_otherwise(kind, data) == 0
    assert torch.equal(UNPACK[kind](data[5:6]).nan_to_num(), UNPACK[kind](data)[5:6].nan_to_num()), "one block alone"
    assert UNPACK[kind](data[:0]).shape == (0, 256)


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("given", importances())
def test_bytes_are_those_of_the_c_library(kind, given):
    assert written_otherwise(kind, importances()[given]) == {}


@pytest.mark.parametrize("kind", UNPACK)
def test_the_gguf_package_agrees(kind):
    gguf = pytest.importorskip("gguf")
    for importance in (None, importances()["uneven"]):
        made = c_quantize(distributions()["heavy"], kind, importance)
        theirs = gguf.quants.dequantize(made.numpy(), gguf.GGMLQuantizationType[kind])
        assert (UNPACK[kind](made.view(-1, block_type(kind).nbytes)).view(len(made), -1).numpy() == theirs).all()


# function, what stands in it, what a mistake would write, the type that shows it, the importance that does
MUTANTS = [
    ("stripes", "<< _places(bits, codes)", "<< _places(bits, codes).flip(0)", "Q6_K", "none"),
    ("unstripes", ">> _places(bits, data)", ">> _places(bits, data).flip(0)", "Q2_K", "none"),
    ("six_bits", "m[:, :4] | m[:, 4:] >> 4 << 6", "m[:, :4] | m[:, 4:] >> 4 << 4", "Q4_K", "none"),
    ("six_bits", "l[:, 4:] & 15 | m[:, 4:] << 4", "m[:, 4:] & 15 | l[:, 4:] << 4", "Q5_K", "none"),
    ("unsix_bits", "both & 15 | l >> 6 << 4", "both & 15 | m >> 6 << 4", "Q4_K", "none"),
    ("unsix_bits", "m & 63", "m & 15", "Q5_K", "none"),
    ("unpack_q5_k", "unstripes(blocks[:, 16:48], 1)", "unpack_codes(blocks[:, 16:48], 1)", "Q5_K", "none"),
    ("unpack_q3_k", "(l.float() - 32)", "l.float()", "Q3_K", "none"),
    ("unpack_q3_k", "q.float() - 4", "q.float() - 3", "Q3_K", "none"),
    ("unpack_q3_k", "unstripes(scales[:, 8:], 2, 4)", "unpack_codes(scales[:, 8:], 2)", "Q3_K", "none"),
    ("unpack_q6_k", ".contiguous().view(torch.int8)", ".int()", "Q6_K", "none"),
    ("unpack_q6_k", "4, 64)", "4, 32)", "Q6_K", "none"),
    ("unpack_iq4_xs", "4, 16)", "4, 32)", "IQ4_XS", "none"),
    ("_lines", ".sub_(dmin", ".add_(dmin", "Q4_K", "none"),
    ("in_turn", "terms[1:].unbind()", "terms[1:].flip(0).unbind()", "Q4_K", "uneven"),
    ("whole", ".sub_(12582912.0).clamp_(0, most)", ".sub_(12582912.0)", "Q2_K", "uneven"),
    ("fit_lines", "torch.where(better, new_m, m)", "m", "Q4_K", "none"),                # the minimum stays where it was
    ("fit_lines", "range(steps + 1)", "range(steps)", "Q4_K", "uneven"),
    ("fit_lines", "found < best", "found <= best", "Q4_K", "none"),
    ("fit_lines", "e.abs_() if absolute else e.square_()", "e.square_()", "Q2_K", "none"),
    ("fit_lines", "x.amin(0).clamp(max=0)", "x.amin(0)", "Q4_K", "none"),
    ("fit_lines", "torch.where(flat, 0, d), m", "d, m", "Q4_K", "none"),
    ("_line", "torch.where(m > 0, sum_qx / sum_qq, d)", "d", "Q2_K", "uneven"),
    ("weigh", "* times / 256", "/ 256", "Q4_K", "uneven"),
    ("weigh", "importance * root(in_turn(squares.T.contiguous())[:, None] * times / 256 + squares)", "importance",
     "Q3_K", "uneven"),
    ("largest_first", "over(top, most)", "over(top - 1, most)", "Q5_K", "none"),
    ("climb", "range(5)", "range(1)", "Q3_K", "none"),
    ("climb", "rest_qq / rest", "qq / xq", "Q3_K", "none"),
    ("climb", "new.remainder(256)", "new.clamp(min=0)", "Q4_K", "nearly all zero"),       # a byte without a sign
    ("climb", "q.remainder(256) if low is None else q.clone()", "q.clone()", "Q5_K", "nearly all zero"),
    ("search_scales", "*range(1, 5)", "*range(1, 4)", "Q4_K", "uneven"),
    ("search_scales", "found < best", "found > best", "Q2_K", "uneven"),
    ("_fit", "times)", "2)", "Q2_K", "uneven"),
    ("_fit", "x.abs() if n == 16 else root(in_order(x * x) / n) + x.abs()", "x.abs()", "Q4_K", "none"),
    ("_fit", "in_order(counts).view(len(w), -1).repeat(2, 1)", "torch.ones_like(s)", "Q4_K", "uneven"),
    ("_fit", "-0.9, 0.05, 36", "*tries", "Q4_K", "uneven"),
    ("_again", "torch.where(d == 0, q, ", "torch.where(d == 0, 0, ", "Q3_K", "none"),
    ("_again", "nearest_int((x + m) / d).clamp(low, high)", "q.int()", "Q6_K", "none"),   # no second choice of codes
    ("pack_q5_k", "l.clamp(max=63)", "l", "Q5_K", "nearly all zero"),
    ("pack_q6_k", "x * x if", "torch.ones_like(x) if", "Q6_K", "none"),
    ("pack_q6_k", "importance.reshape(-1, 16)", "weigh(w, importance).reshape(-1, 16)", "Q6_K", "uneven"),
    ("pack_q6_k", "over(-128, most)", "over(127, most)", "Q6_K", "none"),
    ("pack_q6_k", "clamp(max=127)", "clamp(max=126)", "Q6_K", "none"),
    ("pack_q3_k", "over(-32, most)", "over(31, most)", "Q3_K", "none"),
    ("pack_q3_k", "torch.where(most == 0, 0, 1 / inverse_scale)", "1 / inverse_scale", "Q3_K", "none"),
    ("_climbed", "q + most", "q", "Q3_K", "none"),
    ("largest", "s.abs().argmax", "s.argmax", "Q6_K", "none"),
    ("nearest_level", "floor_()", "round_()", "IQ4_XS", "none"),
    ("search_levels", "range(-7, 8)", "range(-6, 8)", "IQ4_XS", "none"),
    ("search_levels", "vv > 0, vx / vv, 0", "vv > 0, 1 / vv, 0", "IQ4_XS", "none"),
    ("pack_iq4_xs", "inverse(d * l)", "inverse(d.half().float() * l)", "IQ4_XS", "none"),  # rounded too early
    ("pack_iq4_xs", "weigh(w, importance)", "weigh(w, importance, 1)", "IQ4_XS", "uneven"),
]


def mutate(function, stands, wrong, monkeypatch):
    original = getattr(k_quants, function)
    source = inspect.getsource(original)
    assert source.count(stands) == 1, f"{function} has changed: adapt this mutant"
    made = {}
    exec(source.replace(stands, wrong), dict(k_quants.__dict__), made)
    mutant = type(original)(made[function].__code__, k_quants.__dict__, function, made[function].__defaults__)
    monkeypatch.setattr(k_quants, function, mutant)
    for table in (PACK, UNPACK):
        for name, f in table.items():
            if f is original: monkeypatch.setitem(table, name, mutant)


@pytest.mark.parametrize("function, stands, wrong, kind, given", MUTANTS, ids=[f"{m[0]}: {m[2]}" for m in MUTANTS])
def test_a_wrong_variant_is_noticed(function, stands, wrong, kind, given, monkeypatch):
    mutate(function, stands, wrong, monkeypatch)
    assert read_otherwise(kind, samples(kind)) or any(
        written_otherwise(kind, importances(seed)[given], seed) for seed in range(3))


def test_stripes_and_scales_come_back():
    g = torch.Generator().manual_seed(2)
    for bits, run in ((4, 64), (4, 32), (4, 16), (4, 8), (2, 32), (2, 4), (1, 32)):
        codes = torch.randint(2**bits, (5, 2 * run * 8 // bits), generator=g)
        assert torch.equal(unstripes(stripes(codes, bits, run), bits, run), codes)
    l, m = torch.randint(64, (2, 9, 8), generator=g, dtype=torch.uint8)
    assert torch.equal(torch.stack(unsix_bits(six_bits(l, m))), torch.stack([l, m]))
    assert torch.equal(in_turn(torch.tensor([[1e8], [1.0], [-1e8]])), torch.tensor([0.0])), "one after the other"
    assert whole(torch.tensor([0.5, 1.5, 2.5, -1.0, 99.0]), 15).tolist() == [0, 2, 2, 0, 15]


@pytest.mark.parametrize("most, first, step, steps", [(15, -1.0, 0.1, 20), (31, -0.5, 0.1, 15), (3, -0.9, 0.05, 36)])
def test_the_fast_search_is_the_plain_one(most, first, step, steps):
    g = torch.Generator().manual_seed(3)
    for w in distributions().values():
        x = w[:8].reshape(-1, 32)
        counts = torch.rand(x.shape, generator=g) ** 3
        plain = search_scale_and_min(x, counts, most, first, step, steps)
        ours = fit_lines(x, counts, most, first, step, steps)
        assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(ours, plain))


@pytest.mark.parametrize("kind", PACK)
def test_a_format_keeps_rows_stacks_and_types_of_numbers(kind):
    format, uneven = FORMATS[kind.lower()], importances()["uneven"]
    w = torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(4)).bfloat16()
    packed = format.pack(w, uneven)
    assert packed.nbytes * 8 == format.bits(w.shape) * w.numel() and format.bits(w.shape) == block_type(kind).bits
    full = packed.unpack()
    assert torch.equal(packed[1][[4, 0]].unpack(), full[1][[4, 0]])
    assert torch.equal(packed.data.view(15, -1), c_quantize(w.float().view(15, -1), kind, uneven))
    long = torch.randn(3, 2**15 + 256, generator=torch.Generator().manual_seed(5))
    assert torch.equal(format.pack(long).data, c_quantize(long, kind)), "rows longer than a part"


@pytest.mark.parametrize("kind", PACK)
def test_an_importance_lowers_the_error_that_it_weighs(kind):
    w, uneven = distributions()["normal"], importances()["uneven"]
    format = FORMATS[kind.lower()]
    plain, weighted = ((uneven * (format.pack(w, i).unpack() - w).square()).sum() for i in (None, uneven))
    assert weighted < plain


def test_what_is_refused():
    format = FORMATS["q4_k"]
    with pytest.raises(InputError): format.pack(torch.ones(2, 576))
    with pytest.raises(InputError): format.pack(torch.full((2, 256), torch.nan))
    with pytest.raises(InputError): format.pack(torch.ones(2, 512), torch.ones(256))


@pytest.mark.parametrize("kind", PACK)
def test_damaged_tensors_end_in_our_errors_or_in_the_library_s_numbers(kind):
    format, g = FORMATS[kind.lower()], torch.Generator().manual_seed(6)
    good = format.pack(torch.randn(4, 512, generator=g))
    n = lambda top: int(torch.randint(top, (), generator=g))
    for _ in range(80):
        data, shape = good.data.clone(), list(good.shape)
        change = n(5)
        if change == 0: data = data[:, :-1 - n(data.shape[1])]
        elif change == 1: data = data[:n(4)]
        elif change == 2: shape[n(2)] = n(3000) - 5
        elif change == 3: data = data.to((torch.int8, torch.float32, torch.int64)[n(3)])
        else: data[n(4), n(data.shape[1])] = n(256)
        try: numbers = Packed(format, tuple(shape), {"data": data}).unpack()
        except (CheckpointError, InputError): continue
        assert numbers.shape == tuple(shape) and (change == 4 or tuple(shape) == good.shape)
        theirs = c_dequantize(data, kind)
        assert torch.equal(numbers.isnan(), theirs.isnan()) and torch.equal(numbers.nan_to_num(), theirs.nan_to_num())
