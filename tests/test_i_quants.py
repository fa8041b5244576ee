"""The codebook types of llama.cpp: numbers read as its C library reads them, blocks searched and written, and wrong
variants that must not pass."""
import inspect
import os
import subprocess
import sys

import pytest
import torch

from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.files.gguf import block_type
from llm_workbench.quantization import gguf_blocks
from llm_workbench.quantization import i_quants
from llm_workbench.quantization.gguf_blocks import c_dequantize, c_quantize, ggml_library
from llm_workbench.quantization.i_quants import PACK, UNPACK, codebook, needs_importance, search_iq2_xxs

try: ggml_library()
except UnsupportedError as error: pytest.skip(str(error), allow_module_level=True)

QUICK = ("IQ2_XXS", "IQ3_XXS", "IQ3_S")   # the library prepares long tables for the others: the chapter writes them


def distributions(rows=16, columns=768, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=g)
    sparse = normal * (torch.rand(rows, columns, generator=g) < 0.1)
    sparse[::4], sparse[1], sparse[2], sparse[3] = 0, 0.37, -0.21, 0.5 * normal[3].sign()
    return {
        "normal": 0.02 * normal,
        "uniform": 2 * torch.rand(rows, columns, generator=g) - 1,
        "heavy": normal / (torch.rand(rows, columns, generator=g) + 0.05) ** 2,
        "tiny": normal * 10.0 ** -torch.linspace(0, 40, rows)[:, None],
        "sparse": sparse,
    }


def importance_of(columns=768):
    return 0.01 + torch.rand(columns, generator=torch.Generator().manual_seed(9)) ** 4


def blocks_of(w, importance): return w.reshape(-1, 256), importance.expand_as(w).reshape(-1, 256)


def samples(kind):
    "Random blocks, and blocks in which all bytes are the same, for every byte."
    nbytes = block_type(kind).nbytes
    noise = torch.randint(256, (1500, nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return torch.cat([noise, torch.arange(256, dtype=torch.uint8)[:, None].expand(256, nbytes)])


def read_otherwise(kind, data):
    "Weights that are not the C library's to the bit (any NaN is a NaN)."
    ours, theirs = UNPACK[kind](data), c_dequantize(data, kind)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return (~((ours.view(torch.int32) == theirs.view(torch.int32)) | ours.isnan() & theirs.isnan())).sum().item()


@pytest.mark.parametrize("kind", UNPACK)
def test_random_bytes_are_read_as_the_c_library_reads_them(kind):
    data = samples(kind)
    assert read_otherwise(kind, data) == 0
    assert torch.equal(UNPACK[kind](data[5:6]).nan_to_num(), UNPACK[kind](data)[5:6].nan_to_num()), "one block alone"
    assert UNPACK[kind](data[:0]).shape == (0, 256)


@pytest.mark.parametrize("kind", UNPACK)
def test_the_gguf_package_agrees(kind):
    from gguf import GGMLQuantizationType, quants
    data = samples(kind)
    scale = slice(48, 56) if kind == "IQ1_M" else slice(0, 2)
    data[:, scale] = data[:, scale] & 0x37                                   # no infinity among the scales
    theirs = torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[kind]))
    assert theirs.isfinite().all() and torch.equal(UNPACK[kind](data), theirs)


@pytest.mark.parametrize("kind", QUICK)
def test_blocks_are_written_by_the_c_library_and_read_as_it_reads_them(kind):
    importance = importance_of()
    for name, w in distributions().items():
        w_blocks, i_blocks = blocks_of(w, importance)
        made = PACK[kind](w_blocks, i_blocks)
        assert torch.equal(made.view(len(w), -1), c_quantize(w, kind, importance)), name
        assert read_otherwise(kind, made) == 0, name
        if not needs_importance(kind):
            assert torch.equal(PACK[kind](w_blocks, None).view(len(w), -1), c_quantize(w, kind)), name


# function, what stands in it, what a mistake would write, a type that shows it
MUTANTS = [
    ("all_signs", "bits.sum(-1, keepdim=True, dtype=bits.dtype) & 1", "torch.zeros_like(bits[..., :1])", "IQ2_XXS"),
    ("all_signs", "& 1], -1)", "& 1 ^ 1], -1)", "IQ2_XS"),
    ("all_signs", "torch.cat([bits, bits.sum(-1, keepdim=True, dtype=bits.dtype) & 1], -1)",
     "torch.cat([bits.sum(-1, keepdim=True, dtype=bits.dtype) & 1, bits], -1)", "IQ3_XXS"),
    ("as_signs", "1 - 2.0 * bits", "2.0 * bits - 1", "IQ2_S"),
    ("number", "torch.arange(bits.shape[-1], device=bits.device)", "torch.arange(bits.shape[-1]).flip(0)", "IQ2_XS"),
    ("_signs_and_scale", "bits[..., :28].unflatten(-1, (4, 7))", "bits[..., 4:].unflatten(-1, (4, 7))", "IQ2_XXS"),
    ("unpack_iq2_xxs", "(l + 0.5)", "l", "IQ2_XXS"),
    ("unpack_iq2_xxs", "data[..., :4])", "data[..., 4:])", "IQ2_XXS"),
    ("unpack_iq3_xxs", "(l + 0.5) / 2", "(l + 0.5) / 4", "IQ3_XXS"),
    ("unpack_iq3_xxs", "(l + 0.5)", "l", "IQ3_XXS"),
    ("unpack_iq3_xxs", "blocks[:, 2:66], blocks[:, 66:]", "blocks[:, 34:], blocks[:, 2:34]", "IQ3_XXS"),
    ("unpack_iq2_xs", "number(words[..., :9])", "number(words[..., :8])", "IQ2_XS"),
    ("unpack_iq2_xs", "words[..., 9:]", "words[..., 8:15]", "IQ2_XS"),
    ("unpack_iq2_xs", "unpack_codes(blocks[:, 66:], 4)", "unpack_codes(blocks[:, 66:], 4).flip(1)", "IQ2_XS"),
    ("unpack_iq2_s", "d, low, signs, high, l", "d, signs, low, high, l", "IQ2_S"),
    ("unpack_iq2_s", "d, low, signs, high, l", "d, low, signs, l, high", "IQ2_S"),
    ("unpack_iq2_s", "<< 8", "<< 7", "IQ2_S"),
    ("unpack_iq3_s", "(1 + 2 * unpack_codes(l, 4))", "(unpack_codes(l, 4) + 0.5)", "IQ3_S"),
    ("unpack_iq3_s", "unpack_codes(high, 1)", "unpack_codes(high.flip(1), 1)", "IQ3_S"),
    ("unpack_iq1_s", "words[..., 15]", "1 - words[..., 15]", "IQ1_S"),
    ("unpack_iq1_s", "words[..., 12:15]", "words[..., 13:16]", "IQ1_S"),
    ("unpack_iq1_s", "words[..., :12].unflatten(-1, (4, 3))", "words[..., :12].unflatten(-1, (3, 4)).mT", "IQ1_S"),
    ("unpack_iq1_s", "[..., None, None] / 8", "[..., None, None] / 16", "IQ1_S"),
    ("unpack_iq1_m", "rest >> 3", "rest >> 2 & 1", "IQ1_M"),
    ("unpack_iq1_m", "rest & 7", "rest & 3", "IQ1_M"),
    ("unpack_iq1_m", "words[..., 12:].flatten(1)", "words[..., 12:].flip(1).flatten(1)", "IQ1_M"),
    ("unpack_iq1_m", "(2 * l + 1)", "(2 * l + 1).flip(1)", "IQ1_M"),
]


def mutant_of(function, stands, wrong, monkeypatch):
    "Put a wrong variant of a function into the module and its tables."
    original = getattr(i_quants, function)
    source = inspect.getsource(original)
    assert source.count(stands) == 1, f"{function} has changed: adapt this mutant"
    made = {}
    exec(source.replace(stands, wrong), dict(i_quants.__dict__), made)
    mutant = type(original)(made[function].__code__, i_quants.__dict__, function, original.__defaults__)
    monkeypatch.setattr(i_quants, function, mutant)
    for kind, f in UNPACK.items():
        if f is original: monkeypatch.setitem(UNPACK, kind, mutant)
    return mutant


@pytest.mark.parametrize("function, stands, wrong, kind", MUTANTS, ids=[f"{m[0]}: {m[2]}" for m in MUTANTS])
def test_a_wrong_reader_is_noticed(function, stands, wrong, kind, monkeypatch):
    mutant_of(function, stands, wrong, monkeypatch)
    assert read_otherwise(kind, samples(kind)) > 0


# --- the search -------------------------------------------------------------------------------------------------------

def ratios(search=None):
    "Squared error of the plain search against the C library's, weighted as the library weights it."
    search, found = search or i_quants.search_iq2_xxs, {}
    for what, importance in (("alike", torch.ones(768)), ("uneven", importance_of())):
        for name, w in distributions().items():
            if name == "tiny": continue                                      # less than a float16 can hold
            w, i = blocks_of(w, importance)
            counts = i * (w.square().mean(1, keepdim=True) + w.square()).sqrt()
            errors = [(counts * (UNPACK["IQ2_XXS"](made) - w).square()).sum().item()
                      for made in (search(w, i), PACK["IQ2_XXS"](w, i))]
            found[what, name] = errors[0] / errors[1]
    return found


def test_the_plain_search_leaves_no_more_error_than_the_c_library():
    assert max(ratios().values()) <= 1.0
    alike, uneven = ratios()["alike", "normal"], ratios()["uneven", "normal"]
    assert alike <= 0.96 and uneven <= 0.88, (alike, uneven)


@pytest.mark.parametrize("function, stands, wrong", [
    ("make_even", "minus = minus ^ torch", "_ = minus ^ torch"),             # an odd number stays odd
    ("make_even", "argmin", "argmax"),
    ("search_iq2_xxs", "- 2 * s * mg", "- s * mg"),
    ("search_iq2_xxs", "tries: int = 9", "tries: int = 1"),
    ("search_iq2_xxs", "c = c * importance.view_as(w)", "pass"),
    ("_iq2_xxs_bytes", "- 1).div(2)", "+ 1).div(2)"),
    ("_iq2_xxs_bytes", "d.float() * (2 * l + 1)", "d.float() * (l + 0.5)"),
    ("_iq2_xxs_bytes", "/ 31", "/ 15"),
    ("_iq2_xxs_bytes", "[..., :4]", "[..., 4:]"),
    ("_iq2_xxs_bytes", "minus[..., :7]", "minus[..., 1:]"),
])
def test_a_wrong_search_is_noticed(function, stands, wrong, monkeypatch):
    monkeypatch.setattr(i_quants, function, getattr(i_quants, function))
    source, made = inspect.getsource(getattr(i_quants, function)), {}
    assert source.count(stands) == 1, f"{function} has changed: adapt this mutant"
    exec(source.replace(stands, wrong), i_quants.__dict__, made)
    monkeypatch.setattr(i_quants, function, made[function])
    found = ratios()
    assert max(found.values()) > 1 or found["alike", "normal"] > 0.96 or found["uneven", "normal"] > 0.88, found


def test_the_search_keeps_its_head_in_odd_blocks():
    zero, one = torch.zeros(2, 256), torch.full((2, 256), -0.25)
    assert (UNPACK["IQ2_XXS"](search_iq2_xxs(zero)) == 0).all()
    both = search_iq2_xxs(one), PACK["IQ2_XXS"](one, torch.ones_like(one))
    ours, theirs = (UNPACK["IQ2_XXS"](made) for made in both)
    assert (ours - one).norm() <= (theirs - one).norm()
    for name, w in distributions().items():
        back = UNPACK["IQ2_XXS"](search_iq2_xxs(*blocks_of(w, importance_of())))
        assert back.isfinite().all(), name
    assert torch.equal(search_iq2_xxs(one, torch.ones_like(one)), search_iq2_xxs(one)), "None: all alike"


# --- what is refused --------------------------------------------------------------------------------------------------

def test_codebooks_are_those_of_the_types():
    for kind, shape in dict(IQ1_S=(2048, 8), IQ1_M=(2048, 8), IQ2_XXS=(256, 8), IQ2_XS=(512, 8), IQ2_S=(1024, 8),
                            IQ3_XXS=(256, 4), IQ3_S=(512, 4)).items():
        assert codebook(kind).shape == shape and codebook(kind).dtype == torch.float32


def test_types_that_need_an_importance_say_so():
    assert {kind for kind in UNPACK if needs_importance(kind)} == {"IQ1_S", "IQ2_XXS", "IQ2_XS"}
    for kind in ("IQ1_S", "IQ2_XXS", "IQ2_XS"):
        with pytest.raises(InputError, match=f"{kind} is only written with an importance"):
            PACK[kind](torch.ones(1, 256), None)


@pytest.mark.parametrize("kind", QUICK)
def test_numbers_that_would_end_the_process_are_refused(kind):
    w, i = blocks_of(distributions()["normal"], importance_of())
    for bad in (torch.nan, torch.inf, 1e18):
        wrong = w.clone()
        wrong[1, 7] = bad
        with pytest.raises(InputError, match="65504"): PACK[kind](wrong, i)
    for bad in (torch.nan, torch.inf, -1.0):
        wrong = i.clone()
        wrong[1, 7] = bad
        with pytest.raises(InputError, match="mean squares"): PACK[kind](w, wrong)


@pytest.mark.parametrize("kind", QUICK)
def test_an_importance_is_relative(kind):
    w, i = blocks_of(distributions()["normal"], importance_of())
    made = PACK[kind](w, i)
    for factor in (2.0**-120, 2.0**120): assert torch.equal(PACK[kind](w, i * factor), made), factor
    flat = torch.full_like(i, 1e38)                                          # whose sums are no float32
    assert torch.equal(PACK[kind](w, flat), PACK[kind](w, torch.full_like(i, 1e38 / 2**100)))
    for empty in (torch.zeros_like(i), torch.full_like(i, 1e-44)):
        assert UNPACK[kind](PACK[kind](w, empty)).isfinite().all()


def test_why_they_are_refused():
    "The C library ends the process when it is given such weights."
    code = ("import torch; from llm_workbench.quantization.gguf_blocks import c_quantize; torch.manual_seed(0); "
            "c_quantize(1e18 * torch.randn(8, 512), 'IQ3_XXS', torch.rand(512))")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True,
                           env={**os.environ, "GGML_NO_BACKTRACE": "1"})
    assert ended.returncode < 0


def test_without_the_library_it_says_so(monkeypatch):
    def missing(): raise UnsupportedError("llama-cpp-python is not built here")
    monkeypatch.setattr(i_quants, "ggml_library", missing)
    monkeypatch.setattr(gguf_blocks, "ggml_library", missing)
    for kind, i in (("IQ2_XXS", None), ("IQ3_S", torch.ones(1, 256))):
        with pytest.raises(UnsupportedError, match="not built"): PACK[kind](torch.ones(1, 256), i)
    assert UNPACK["IQ3_S"](samples("IQ3_S")).shape == (1756, 256), "reading needs no library"
