"Products with packed weights in Triton and CUDA C++, interpreted and emulated where there is no GPU."
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_workbench.errors import InputError
from llm_workbench.kernels import quantized_weights as qw
from llm_workbench.kernels.launching import Launch, resources
from llm_workbench.quantization.formats import FORMATS
from llm_workbench.quantization.nf4 import NF4, CodebookFormat
from llm_workbench.quantization.packing import Packed
from tests.kernel_checks import DEVICE, as_accurate, guarded, randn, rejects

pytestmark = pytest.mark.triton
READ = ["int8", "int8_g32", "int4_g32", "int4_g64", "int4_g128", "uint4_g32", "uint4_g128", "nf4", "fp4",
        "q8_0", "q4_0", "q4_1", "q4_k", "q6_k"]
SOME = ["int4_g32", "int4_g128", "nf4", "int8"]
TYPED = [(n, torch.bfloat16) for n in READ] + [(n, d) for n in SOME for d in (torch.float16, torch.float32)]
cuda = pytest.mark.cuda
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="emulates what the GPU runs itself")


@cache
def pool(name, columns=256):
    "A few packed rows on the device, of whose blocks large matrices are put together."
    made = FORMATS[name].pack(torch.randn(64, columns, generator=torch.Generator().manual_seed(0)))
    return {n: t.to(DEVICE) for n, t in made.tensors.items()}


def packed_as(name, outs, ins, seed=0):
    "A matrix in a format, there where the kernels run."
    source, shape = torch.Generator().manual_seed(seed), (outs, ins)
    if ins % 256:
        made = FORMATS[name].pack(torch.randn(shape, generator=source))
        return Packed(made.format, shape, {n: t.to(DEVICE) for n, t in made.tensors.items()})
    which = torch.randint(64, (outs, ins // 256), generator=source).to(DEVICE)
    rows = {n: which[:, 0] if name == "int8" and n == "scale" else which for n in pool(name)}
    return Packed(FORMATS[name], shape, {n: t[rows[n]].reshape(outs, -1) for n, t in pool(name).items()})


def check_product(product, name, outs, ins, rows, dtype, **other):
    packed, x = packed_as(name, outs, ins), randn(*rows, ins, dtype=dtype, seed=1)
    got = product(x, qw.prepare(packed), **other)
    want = x.double() @ packed.unpack(torch.float32).double().T
    as_accurate(got, want, F.linear(x, packed.unpack(dtype)))


# Codes and scales

@pytest.mark.parametrize("name", READ)
def test_codes_are_unpacked_exactly(name):
    packed = packed_as(name, 37, 768)
    w, want = qw.prepare(packed), packed.unpack()
    assert torch.equal(qw.dense(w), want)
    with guarded(qw): got = qw.unpack(w)
    if w.least is None or DEVICE == "cpu": assert torch.equal(got, want)
    else: as_accurate(got, want.double(), want)                        # a GPU adds and multiplies in one step
    if DEVICE == "cpu": assert torch.equal(qw.unpack(w, torch.float16), packed.unpack(torch.float16))


def test_all_bytes_of_a_block_are_unpacked_exactly():
    for name, at in ("q4_0", 2), ("q4_1", 4), ("q8_0", 2), ("q4_k", 4), ("q6_k", 0):
        data = torch.arange(256, dtype=torch.uint8).repeat(FORMATS[name].layout((1, 256 * 8))["data"][0][-1])
        data = data.view(256, -1).clone()
        scale = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
        for block in data.view(256, -1, qw.BLOCKS[name][0]).unbind(1):
            if name == "q6_k": block[:, 208:210] = scale
            else: block[:, :2] = scale
            if name in ("q4_1", "q4_k"): block[:, 2:4] = scale
        packed = Packed(FORMATS[name], (256, 256 * 8), {"data": data})
        assert torch.equal(qw.dense(qw.prepare(packed)), packed.unpack())


# Triton

@pytest.mark.parametrize("name, dtype", TYPED, ids=str)
def test_triton_gemv(name, dtype):
    check_product(qw.gemv, name, 21, 768, (2,), dtype)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 34), st.integers(1, 3), st.sampled_from(["int4_g32", "int8", "uint8_g32"]))
def test_triton_gemv_of_ragged_shapes(outs, groups, rows, name):
    if name == "uint8_g32": name = "int8_g32"
    with guarded(qw): check_product(qw.gemv, name, outs, 32 * groups, (rows,), torch.float32)


def test_triton_gemv_with_narrow_loads():
    for name in "int4_g32", "nf4", "q4_k": check_product(qw.gemv, name, 9, 512, (1,), torch.bfloat16, wide=False)


@pytest.mark.parametrize("name, dtype", TYPED, ids=str)
def test_triton_gemm(name, dtype):
    check_product(qw.gemm, name, 70, 512, (11,), dtype)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 130), st.integers(1, 10), st.integers(1, 40), st.sampled_from(["int4_g32", "int4_g128", "int8"]))
def test_triton_gemm_of_ragged_shapes(outs, groups, rows, name):
    ins = groups * max(32, FORMATS[name].columns)
    with guarded(qw): check_product(qw.gemm, name, outs, ins, (rows,), torch.float32)


def test_numbers_far_from_one():
    for scale in 1e-30, 1e30:
        packed, x = packed_as("int4_g32", 16, 64), randn(1, 64, scale=scale)
        want = x.double() @ packed.unpack().double().T
        for product in qw.gemv, qw.gemm:
            as_accurate(product(x, qw.prepare(packed)), want, F.linear(x, packed.unpack()))
    x = randn(2, 64, dtype=torch.bfloat16)
    x[1, 3] = float("inf")
    for product in qw.gemv, qw.gemm: assert product(x, qw.prepare(packed))[0].isfinite().all()


def test_x_that_is_not_contiguous():
    packed, x = packed_as("int4_g32", 16, 64), randn(64, 12)
    want = F.linear(x.T, packed.unpack())
    for product, rows in (qw.gemv, 8), (qw.gemm, 12):
        as_accurate(product(x.T[:rows], qw.prepare(packed)), want[:rows].double(), want[:rows], floor=64)


def test_codes_read_the_other_way_round_are_rejected():
    for product in qw.gemv, qw.gemm:
        def swapped(x, w): return product(x, replace(w, high=not w.high))
        assert rejects(check_product, swapped, "nf4", 16, 128, (1,), torch.float32)


def test_scales_of_the_next_group_are_rejected():
    for product in qw.gemv, qw.gemm:
        def shifted(x, w): return product(x, replace(w, scale=w.scale.roll(1, 1)))
        assert rejects(check_product, shifted, "int4_g32", 16, 128, (1,), torch.bfloat16)


# CUDA C++

EMULATED = [("int4_g32", torch.bfloat16, 1, 1120), ("int4_g128", torch.float16, 1, 1152),
            ("nf4", torch.bfloat16, 2, 832),
            ("int8", torch.bfloat16, 3, 672), ("q4_k", torch.bfloat16, 1, 512), ("q6_k", torch.float16, 5, 256)]


@ON_CPU
@pytest.mark.parametrize("name, dtype, rows, ins", EMULATED, ids=str)
def test_cuda_gemv_emulated(name, dtype, rows, ins):
    with guarded(qw): check_product(qw.gemv_cuda, name, 18, ins, (rows,), dtype)


@ON_CPU
def test_wrong_variants_of_the_cuda_gemv_are_rejected(monkeypatch):
    wrong = {"places of x": ("0x5410", "0x7632"), "rows of a": ("a[i / 2][i % 2 * 2 + h] = nibbles",
                                                                "a[i / 2][h * 2 + i % 2] = nibbles")}
    for old, new in wrong.values():
        assert old in qw.KERNEL
        monkeypatch.setattr(qw, "GEMV", qw.LANES + qw.HELPERS + qw.KERNEL.replace(old, new))
        assert rejects(check_product, qw.gemv_cuda, "int4_g32", 16, 128, (1,), torch.bfloat16)


ON_GPU = ([(n, torch.bfloat16, 1) for n in READ] + [(n, torch.float16, 1) for n in SOME]
          + [(n, torch.bfloat16, r) for n in SOME for r in (2, 3, 5)] + [(n, torch.bfloat16, 8)
                                                                         for n in ("q4_k", "q6_k", "uint4_g32")])


@cuda
@pytest.mark.parametrize("name, dtype, rows", ON_GPU, ids=str)
def test_cuda_gemv(name, dtype, rows):
    for outs, ins in (1, 256), (21, 768), (512, 4096), (1000, 14336), (6200, 1024):
        with guarded(qw): check_product(qw.gemv_cuda, name, outs, ins, (rows,), dtype)


@cuda
@pytest.mark.parametrize("outs, ins", [(1, 32), (16, 96), (33, 1056), (15, 608)])
def test_cuda_gemv_of_odd_shapes(outs, ins):
    for name in "int4_g32", "int8":
        for rows in (), (1,), (2, 2): check_product(qw.gemv_cuda, name, outs, ins, rows, torch.bfloat16)


@cuda
@pytest.mark.parametrize("config", [dict(WARPS=8, UNROLL=4, BLOCKS=2), dict(WARPS=4, UNROLL=2, BLOCKS=6),
                                    dict(WARPS=16, UNROLL=1, BLOCKS=1)])
def test_cuda_gemv_does_not_depend_on_the_configuration(config):
    for name in "int4_g128", "int4_g32": check_product(qw.gemv_cuda, name, 100, 3072, (1,), torch.bfloat16, **config)


@cuda
@pytest.mark.parametrize("name", ["int4_g128", "nf4", "int8", "q4_k"])
def test_triton_products_at_real_shapes(name):
    check_product(qw.gemv, name, 4096, 14336, (1,), torch.bfloat16)
    for rows in 16, 64, 200: check_product(qw.gemm, name, 1024, 4096, (rows,), torch.bfloat16)


@cuda
def test_another_block_size_of_nf4():
    format = CodebookFormat("nf4_b4096", NF4, 4096)
    packed = format.pack(torch.randn(64, 8192)).tensors
    packed = Packed(format, (64, 8192), {n: t.cuda() for n, t in packed.items()})
    x = randn(1, 8192, dtype=torch.bfloat16)
    as_accurate(qw.gemv_cuda(x, qw.prepare(packed)), x.double() @ packed.unpack().double().T,
                F.linear(x, packed.unpack(torch.bfloat16)))


# The plug

@pytest.mark.parametrize("name", SOME + ["q4_k"])
@pytest.mark.parametrize("rows", [(0,), (1, 1), (9,), (70,)])
def test_packed_linear_is_a_drop_in(name, rows):
    packed, x, bias = packed_as(name, 19, 256), randn(*rows, 256, seed=2), randn(19, seed=3)
    got, want = qw.packed_linear(x, packed, bias), F.linear(x, packed.unpack(), bias)
    as_accurate(got, want.double(), want, floor=64)


def test_what_no_kernel_reads_goes_to_the_plain_function():
    packed, x = packed_as("q5_k", 8, 256), randn(1, 256)
    assert qw.prepare(packed) is None
    assert torch.equal(qw.packed_linear(x, packed), F.linear(x, packed.unpack()))
    packed, x = packed_as("int4_g32", 8, 256), randn(1, 256).requires_grad_()
    qw.packed_linear(x, packed).sum().backward()
    assert x.grad is not None


def test_weights_are_prepared_once():
    packed = packed_as("q4_0", 8, 256)
    assert qw.prepared(packed) is qw.prepared(packed)
    packed = packed_as("int4_g32", 8, 256)
    assert qw.prepared(packed).data.data_ptr() == packed.data.data_ptr()     # no copy of what lies right


@pytest.mark.parametrize("name", ["int4_g32", "uint4_g32", "nf4", "q4_k"])
def test_the_custom_op_passes_opcheck(name):
    w = qw.prepare(packed_as(name, 8, 256))
    args = (randn(2, 256), w.data, w.scale, w.zero, w.least, w.levels, w.kind, 256, w.group, w.high)
    torch.library.opcheck(torch.ops.llm_workbench.packed_product.default, args,
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    as_accurate(qw.packed_product(*args), args[0].double() @ qw.dense(w).double().T, F.linear(args[0], qw.dense(w)))


def test_bad_inputs_are_named():
    w = qw.prepare(packed_as("int4_g32", 8, 64))
    for product, name in (qw.gemv, "gemv"), (qw.gemm, "gemm"), (qw.gemv_cuda, "gemv_cuda"):
        for bad in randn(2, 32), randn(2, 64).long(), randn(2, 64).double():
            with pytest.raises(InputError, match=f"{name} takes"): product(bad, w)
    with pytest.raises(InputError, match="not in float32"): qw.gemv_cuda(randn(2, 64), w)
    with pytest.raises(InputError, match="8 rows of x at most"): qw.gemv_cuda(randn(9, 64).half(), w)
    narrow = qw.prepare(FORMATS["int8"].pack(torch.randn(2, 8)))
    with pytest.raises(InputError, match="multiple of 32"):
        qw.gemv_cuda(randn(1, 8).half(), replace(narrow, data=narrow.data.to(DEVICE), scale=narrow.scale.to(DEVICE)))


# The compiler

def launches():
    module = "llm_workbench.kernels.quantized_weights:"
    for name in "int4_g128", "q4_k", "nf4", "int8":
        w = qw.prepare(FORMATS[name].pack(torch.randn(2, 256)))
        scale = {torch.float16: "*fp16", torch.float32: "*fp32"}[w.scale.dtype]
        tensors = ["*u8", scale, "*u8", scale, "*fp32" if w.levels is not None else scale]
        sizes, flags = ["i32:16"] * 3, qw._flags(w)
        n, k, warps = qw.GEMV_BLOCKS[w.kind]
        yield Launch(module + "gemv_kernel", ["*bf16", *tensors, "*bf16", *sizes],
                     flags | dict(WIDE=True, BLOCK_N=n, BLOCK_K=k), warps)
        yield Launch(module + "unpack_kernel", [*tensors, "*bf16", *sizes], flags | dict(BLOCK_N=4, BLOCK_B=512))
        for n, m, b, warps, stages in [qw.GEMM_BLOCKS[16], qw.GEMM_BLOCKS[128]] if name in ("int4_g128", "nf4") else []:
            yield Launch(module + "gemm_kernel", ["*bf16", *tensors, "*bf16", "i32", *sizes],
                         flags | dict(BLOCK_N=n, BLOCK_M=m, BLOCK_B=b), warps, stages)


@ON_CPU
def test_triton_kernels_compile_for_hopper_without_spills():
    table = resources(*launches())
    assert (table.spills == 0).all() and (table["stack"] == 0).all() and (table.shared <= 227 * 1024).all()
    assert (table.wgmma[table.index == "gemm_kernel"] > 0).all()
