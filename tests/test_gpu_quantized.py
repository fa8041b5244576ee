"Products with packed weights: Triton everywhere, CUDA C++ where there is a GPU, both beside what the formats unpack."
import pytest
import torch
import torch.nn.functional as F

from llm_workbench.errors import InputError
from llm_workbench.kernels import quantized_weights as qw
from llm_workbench.quantization.formats import FORMATS
from llm_workbench.quantization.packing import Packed
from tests.kernel_checks import DEVICE, DTYPES, as_accurate, guarded, randn, rejects

pytestmark = pytest.mark.triton
READ = ["int8", "int8_g32", "int4_g32", "int4_g64", "int4_g128", "uint4_g32", "uint4_g128", "nf4", "fp4",
        "q8_0", "q4_0", "q4_1", "q4_k", "q6_k"]
cuda = pytest.mark.cuda


def packed_as(name, outs, ins, seed=0):
    "A matrix packed on the CPU, there where the kernels run."
    weight = torch.randn(outs, ins, generator=torch.Generator().manual_seed(seed))
    made = FORMATS[name].pack(weight)
    return Packed(made.format, made.shape, {n: t.to(DEVICE) for n, t in made.tensors.items()})


def check_product(product, name, outs, ins, rows, dtype, **other):
    packed, x = packed_as(name, outs, ins), randn(*rows, ins, dtype=dtype, seed=1)
    got = product(x, qw.prepare(packed), **other)
    want = x.double() @ packed.unpack(torch.float64).T
    as_accurate(got, want, F.linear(x, packed.unpack(dtype)))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_product_equals_the_unpacked_one(name, dtype):
    check_product(qw.gemv, name, 21, 768, (2,), dtype)


@pytest.mark.parametrize("shape", [(1, 32, ()), (3, 96, (1,)), (17, 1056, (3,)), (64, 2048, (2, 1))])
def test_triton_product_takes_odd_shapes(shape):
    outs, ins, rows = shape
    with guarded(qw): check_product(qw.gemv, "int4_g32", outs, ins, rows, torch.float32)


@cuda
@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_cuda_product_equals_the_unpacked_one(name, dtype, rows):
    for outs, ins in (1, 256), (21, 768), (512, 4096), (1000, 14336):
        with guarded(qw): check_product(qw.gemv_cuda, name, outs, ins, (rows,), dtype)


@cuda
@pytest.mark.parametrize("outs, ins", [(1, 32), (16, 96), (33, 1056), (15, 608)])
def test_cuda_product_takes_odd_shapes(outs, ins):
    for name in "int4_g32", "int8", "q8_0":
        for rows in (), (1,), (2, 3): check_product(qw.gemv_cuda, name, outs, ins, rows, torch.bfloat16)


@cuda
@pytest.mark.parametrize("config", [dict(WARPS=8, UNROLL=4, BLOCKS=2), dict(WARPS=4, UNROLL=2, BLOCKS=6), dict(WARPS=16, UNROLL=1, BLOCKS=2)])
def test_cuda_product_does_not_depend_on_the_configuration(config):
    for name in "int4_g128", "int4_g32", "int8":
        check_product(qw.gemv_cuda, name, 100, 3072, (1,), torch.bfloat16, **config)


@cuda
def test_a_cuda_kernel_with_another_offset_is_rejected():
    from dataclasses import replace
    def wrong(x, w): return qw.gemv_cuda(x, replace(w, zero=torch.full(w.scale.shape, 7, dtype=torch.uint8, device=w.scale.device)))
    assert rejects(check_product, wrong, "int4_g128", 64, 512, (1,), torch.bfloat16)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("rows", [(0,), (1, 1), (9,)])
def test_packed_linear_is_a_drop_in(name, rows):
    packed, x, bias = packed_as(name, 19, 256), randn(*rows, 256, seed=2), randn(19, seed=3)
    got, want = qw.packed_linear(x, packed, bias), F.linear(x, packed.unpack(), bias)
    as_accurate(got, want.double(), want, floor=64)


def test_a_format_without_a_kernel_is_unpacked():
    packed, x = packed_as("q5_k", 8, 256), randn(1, 256)
    assert qw.prepare(packed) is None
    assert torch.equal(qw.packed_linear(x, packed), F.linear(x, packed.unpack()))


def test_codes_read_the_other_way_round_are_rejected():
    from dataclasses import replace
    def swapped(x, w): return qw.gemv(x, replace(w, high=not w.high))
    assert rejects(check_product, swapped, "nf4", 16, 128, (1,), torch.float32)


def test_bad_inputs_are_named():
    w = qw.prepare(packed_as("int4_g32", 8, 64))
    for bad in (randn(2, 32), randn(2, 64).long(), randn(2, 64).double()):
        with pytest.raises(InputError, match="gemv takes"): qw.gemv(bad, w)
    if DEVICE == "cpu":
        with pytest.raises(InputError, match="CUDA device"): qw.gemv_cuda(randn(2, 64), w)
    else:
        with pytest.raises(InputError, match="8 rows"): qw.gemv_cuda(randn(9, 64).half(), w)
