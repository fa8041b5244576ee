"""The block types of llama.cpp against its C library: bytes written, numbers read, and wrong variants that must not
pass."""
import inspect
import subprocess
import sys

import pytest
import torch

from llm_workbench.errors import CheckpointError, InputError, UnsupportedError
from llm_workbench.quantization import gguf_blocks as blocks
from llm_workbench.quantization.gguf_blocks import (
    PACK, UNPACK, BlockFormat, block_type, c_dequantize, c_quantize, ggml_library, type_number)
from llm_workbench.quantization.packing import Packed

try: ggml_library()
except UnsupportedError as error: pytest.skip(str(error), allow_module_level=True)

USES_IMPORTANCE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")


def columns_of(kind): return 576 if block_type(kind).items <= 64 else 768     # no power of two


def distributions(columns, rows=26, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=g)
    sparse = normal * (torch.rand(rows, columns, generator=g) < 0.1)     # with -0
    sparse[::4], sparse[1], sparse[2] = 0, 0.37, -0.21
    sparse[3] = 0.5 * normal[3].sign()
    return {
        "normal": 0.02 * normal,
        "uniform": 2 * torch.rand(rows, columns, generator=g) - 1,
        "heavy": normal / (torch.rand(rows, columns, generator=g) + 1e-3) ** 2,
        "tiny": normal * 10.0 ** -torch.linspace(0, 44, rows)[:, None],
        "sparse": sparse,
        "ties": torch.randint(-16, 17, (rows, columns), generator=g) / 16,
        "one sign": normal.abs() + 1,
        "large": normal * 10.0 ** torch.linspace(0, 4, rows)[:, None],
    }


def importance_of(columns):
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(9)) ** 4
    importance[3], importance[64:100] = 0, 0
    return importance


def written_otherwise(kind, importance=None, seed=0):
    "Blocks that are not the C library's."
    format, columns = BlockFormat(kind.lower()), columns_of(kind)
    wrong = {}
    for name, w in distributions(columns, seed=seed).items():
        ours, theirs = format.pack(w, importance).data, c_quantize(w, kind, importance)
        n = (ours != theirs).view(-1, format.block.nbytes).any(1).sum().item()
        if n: wrong[name] = n
    return wrong


def read_otherwise(kind):
    "Weights that are not the C library's to the bit (any NaN is a NaN), in random bytes and every value of each byte."
    nbytes = block_type(kind).nbytes
    noise = torch.randint(256, (400, nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, nbytes)
    made = [c_quantize(w, kind).view(-1, nbytes) for w in distributions(columns_of(kind)).values()]
    data = torch.cat([noise, every, *made])
    ours, theirs = UNPACK[kind](data), c_dequantize(data, kind)
    return (~((ours.view(torch.int32) == theirs.view(torch.int32)) | ours.isnan() & theirs.isnan())).sum().item()


@pytest.mark.parametrize("kind", PACK)
def test_bytes_and_numbers_are_those_of_the_c_library(kind):
    assert written_otherwise(kind) == {}
    assert written_otherwise(kind, importance_of(columns_of(kind)), seed=1) == {}
    assert read_otherwise(kind) == 0


@pytest.mark.parametrize("kind", USES_IMPORTANCE)
def test_an_importance_changes_the_bytes(kind):
    w, format = distributions(576)["normal"], BlockFormat(kind.lower())
    assert not torch.equal(format.pack(w).data, format.pack(w, importance_of(576)).data)


# function, what stands in it, what a mistake would write, the type that shows it, whether an importance is needed
MUTANTS = [
    ("halves", "low | high << 4", "high | low << 4", "Q5_0", False),
    ("fp16_bytes", "x.to(torch.float16)", "x.to(torch.bfloat16)", "Q5_0", False),
    ("half_away", "x.sign() * (whole + (2 * (x.abs() - whole)).floor())", "x.round()", "Q2_0", False),
    ("_five_bits", "<< 4", "<< 3", "Q5_1", False),
    ("pack_q5_0", "16.5", "16", "Q5_0", False),
    ("pack_q5_0", "/ -16", "/ 16", "Q5_0", False),
    ("pack_q5_0", " + 0.0)", ")", "Q5_0", False),
    ("pack_q5_0", ".clamp(max=31)", ".clamp(max=30)", "Q5_0", False),
    ("pack_q5_1", "/ 31", "/ 30", "Q5_1", False),
    ("pack_q4_0", "w + 0.0", "w", "Q4_0", False),
    ("in_order", "for item in x.unbind(1)", "for item in x.flip(1).unbind(1)", "Q4_0", True),
    ("over", "torch.full_like(x, number) / x", "number / x", "Q5_1", True),
    ("nearest_int", "((x + 12582912.0).view(torch.int32) & 0x7fffff) - 0x400000", "half_away(x).int()", "Q4_1", True),
    ("search_scale", "*range(1, 10)", "*range(1, 9)", "Q4_0", True),
    ("search_scale", "wq * wq > best * qq", "wq * wq >= best * qq", "Q5_0", True),
    ("search_scale", "top.abs() < NOTHING", "top.abs() < 0", "Q5_0", True),
    ("search_scale_and_min", "steps: int = 36", "steps: int = 35", "Q4_1", True),
    ("search_scale_and_min", "torch.where(better, new_d, d), torch.where(better, new_m, m)",
     "torch.where(better, new_d, d), m", "Q4_1", True),
    ("search_scale_and_min", "torch.where(flat, 0, d)", "d", "Q4_1", True),
    ("search_scale_and_min", "found < best", "found <= best", "Q4_1", True),
    ("search_scale_and_min", "w.argmin(1, keepdim=True)).clamp(max=0)", "w.argmin(1, keepdim=True))", "Q5_1", True),
    ("search_scale_and_min", "w.gather(1, w.argmin(1, keepdim=True))", "w.amin(1, keepdim=True)", "Q5_1", True),
    ("search_scale_and_min", "torch.where(new_m > 0, sum_wq / sum_qq, new_d)", "new_d", "Q4_1", True),
    ("weigh_rows", "/ w.shape[1]", "/ 32", "Q4_0", True),
    ("weigh_rows", "importance * root(in_order(squares) / w.shape[1] + squares)", "importance.expand_as(w)", "Q4_1",
     True),
    ("nearest_value", "< table[above] - x", "<= table[above] - x", "IQ4_NL", False),
    ("pack_iq4_nl", "range(-7, 8)", "range(-6, 8)", "IQ4_NL", False),
    ("pack_iq4_nl", "counts = squares if", "counts = torch.ones_like(w) if", "IQ4_NL", False),
    ("pack_iq4_nl", "(2 / 32)", "(1 / 32)", "IQ4_NL", True),
    ("pack_iq4_nl", "top.abs() < NOTHING", "top.abs() < 0", "IQ4_NL", False),
    ("unpack_iq4_nl", "IQ4_VALUES", "(*IQ4_VALUES[:8], 0, *IQ4_VALUES[9:])", "IQ4_NL", False),
    ("nearest_fp4", "error < best", "error <= best", "MXFP4", False),
    ("pack_mxfp4", "- 2 + 127", "- 1 + 127", "MXFP4", False),
    ("pack_mxfp4", ".int() & 255", ".int().clamp(min=0)", "MXFP4", False),
    ("half_e8m0", "0x200000 << e.clamp(max=1)", "0x200000 << e.clamp(max=0)", "MXFP4", False),
    ("half_e8m0", "e - 1 << 23", "e << 23", "MXFP4", False),
    ("ue4m3", "codes == 0x7f", "codes == 0xff", "NVFP4", False),
    ("ue4m3", "mantissa / 512", "mantissa / 256", "NVFP4", False),
    ("to_ue4m3", "normal >> 3 >= 15", "normal >> 3 >= 16", "NVFP4", False),
    ("to_ue4m3", "(1 << 19)", "0", "NVFP4", False),
    ("to_ue4m3", "x * 512 + 0.5", "x * 512", "NVFP4", False),
    ("unpack_nvfp4", "torch.cat([codes & 15, codes >> 4], dim=2)",
     "torch.stack([codes & 15, codes >> 4], dim=3).flatten(2)", "NVFP4", False),
    ("pack_tq1_0", "+ 242", "", "TQ1_0", False),
    ("pack_tq1_0", "[81, 27, 9, 3, 1][:digits.shape[1]]", "[81, 27, 9, 3, 1][-digits.shape[1]:]", "TQ1_0", False),
    ("unpack_tq1_0", "(data * 3**j).int()", "(data.int() * 3**j)", "TQ1_0", False),
    ("_ternary", "finite(half_away(w * inverse(d)), 0)", "finite(half_away(w * inverse(d)), -1)", "TQ2_0", False),
    ("unpack_tq2_0", "_twos(data.device)", "_twos(data.device).flip(0)", "TQ2_0", False),
    ("pack_q1_0", "w >= 0", "w > 0", "Q1_0", False),
    ("pack_q1_0", "in_order(w.abs()) / 128", "w.abs().amax(1, keepdim=True)", "Q1_0", False),
    ("pack_q2_0", "), -1) + 1", "), 0) + 1", "Q2_0", False),
]


@pytest.mark.parametrize("function, stands, wrong, kind, weighted", MUTANTS, ids=[f"{m[0]}: {m[2]}" for m in MUTANTS])
def test_a_wrong_variant_is_noticed(function, stands, wrong, kind, weighted, monkeypatch):
    original = getattr(blocks, function)
    source = inspect.getsource(original)
    assert source.count(stands) == 1, f"{function} has changed: adapt this mutant"
    made = {}
    exec(source.replace(stands, wrong), dict(blocks.__dict__), made)
    mutant = type(original)(made[function].__code__, blocks.__dict__, function, made[function].__defaults__)
    monkeypatch.setattr(blocks, function, mutant)
    for table in (PACK, UNPACK, blocks.WEIGH):
        for name, f in table.items():
            if f is original: monkeypatch.setitem(table, name, mutant)
    importance = importance_of(columns_of(kind)) if weighted else None
    seeds = range(4 if weighted else 1)
    assert any(written_otherwise(kind, importance, seed) for seed in seeds) or read_otherwise(kind)


@pytest.mark.parametrize("kind", PACK)
def test_a_format_keeps_rows_stacks_and_types_of_numbers(kind):
    format = BlockFormat(kind.lower())
    w = torch.randn(3, 5, 2 * format.columns, generator=torch.Generator().manual_seed(2)).bfloat16()
    packed = format.pack(w)
    assert packed.data.dtype == torch.uint8 and packed.nbytes * 8 == format.bits(w.shape) * w.numel()
    assert format.bits(w.shape) == block_type(kind).bits
    whole = packed.unpack()
    assert whole.shape == w.shape and torch.equal(packed[1][[4, 0]].unpack(), whole[1][[4, 0]])
    assert torch.equal(packed.unpack(torch.float16), whole.half())
    assert torch.equal(packed.data.view(15, -1), c_quantize(w.float().view(15, -1), kind))


def test_parts_that_stay_in_the_cache_do_not_show():
    "A weight of many parts, and rows that are longer than a part."
    for shape in ((300, 640), (3, 65_536)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        packed = BlockFormat("q5_1").pack(w, torch.ones(shape[1]))
        assert torch.equal(packed.data, c_quantize(w, "Q5_1", torch.ones(shape[1])))
        assert torch.equal(packed.unpack(), c_dequantize(packed.data, "Q5_1"))


def test_functions_of_other_chapters_can_be_given():
    pack = lambda w, importance: torch.full((len(w), 144), 7 if importance is None else 8, dtype=torch.uint8)
    unpack = lambda data: data[:, :1].float().expand(-1, 256)
    format = BlockFormat("q4_k", pack, unpack)
    assert format.columns == 256 and format.pack(torch.ones(2, 512), torch.ones(512)).unpack().unique().tolist() == [8]
    reader = BlockFormat("iq2_xs", unpack=unpack)
    with pytest.raises(UnsupportedError, match="read here, not written"): reader.pack(torch.ones(1, 256))


def test_what_is_refused():
    for name in ("q4_9", "q4_k", "", "Q4_0x"):
        with pytest.raises(UnsupportedError): BlockFormat(name)
    with pytest.raises(UnsupportedError, match="Did you mean 'IQ4_NL'"): block_type("IQ4_NLL")
    with pytest.raises(InputError): c_quantize(torch.ones(2, 40), "Q8_0")
    with pytest.raises(InputError, match="importance"): c_quantize(torch.ones(1, 256), "IQ1_S")
    with pytest.raises(InputError): c_dequantize(torch.zeros(1, 35, dtype=torch.uint8), "Q8_0")
    with pytest.raises(InputError): BlockFormat("q8_0").pack(torch.tensor([[float("nan")] * 32] * 2))
    assert type_number("Q2_0") == 42 and block_type("Q2_0").bits == 2.25


@pytest.mark.parametrize("kind", PACK)
def test_damaged_tensors_end_in_our_errors(kind):
    format, g = BlockFormat(kind.lower()), torch.Generator().manual_seed(4)
    good = format.pack(torch.randn(4, 2 * format.columns, generator=g))
    n = lambda top: int(torch.randint(top, (), generator=g))
    for _ in range(100):
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


def test_without_the_library_it_says_so(monkeypatch):
    ggml_library.cache_clear()
    monkeypatch.setattr(blocks, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="doctor"): c_quantize(torch.ones(1, 32), "Q8_0")
    ggml_library.cache_clear()


def test_the_library_is_found_without_its_package():
    code = ("import sys; from llm_workbench.quantization.gguf_blocks import ggml_library, predict_bits; "
            "ggml_library(); assert 'llama_cpp' not in sys.modules and callable(predict_bits)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_gguf_package_agrees():
    gguf = pytest.importorskip("gguf")
    for kind in ("Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"):
        w = distributions(columns_of(kind))["normal"]
        packed = BlockFormat(kind.lower()).pack(w)
        number = gguf.GGMLQuantizationType[kind]
        assert (gguf.quants.quantize(w.numpy(), number) == packed.data.numpy()).all(), kind
        assert (gguf.quants.dequantize(packed.data.numpy(), number) == packed.unpack().numpy()).all(), kind
