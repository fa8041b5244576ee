"The C kernels for packed weights: layouts checked before addresses are taken, odd shapes, mixtures, fallbacks."
import random

import pytest
import torch

from checks import worst
from llm_workbench.architecture import matrices
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import CheckpointError, InputError
from llm_workbench.kernels import packed_cpu
from llm_workbench.kernels.packed_cpu import BLOCKS, CPU, ROWS
from llm_workbench.quantization.formats import FORMATS, PackedMatrix
from llm_workbench.quantization.packing import Packed


def packed_in(name, rows=24, blocks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return FORMATS[name].pack(torch.randn(rows, BLOCKS[name].items * blocks, generator=generator))


def used(monkeypatch):
    "The names of the kernels that run from now on."
    names, original = [], packed_cpu.compiled
    monkeypatch.setattr(packed_cpu, "compiled", lambda k, dtype: names.append(k.name) or original(k, dtype))
    return names


@pytest.mark.parametrize("name", BLOCKS)
@torch.inference_mode()
def test_products_and_unpacking_of_odd_shapes(name, monkeypatch):
    names, draw = used(monkeypatch), random.Random(name)
    torch.manual_seed(draw.randrange(99))
    for _ in range(6):
        packed = packed_in(name, draw.choice([1, 3, 17, 130]), draw.choice([1, 2, 5]), draw.randrange(99))
        rows = draw.choice([1, 2, ROWS - 1, ROWS, ROWS + 1, 40])
        shape = draw.choice([(rows,), (1, rows), (rows, 1)])
        dtype = draw.choice([torch.float32, torch.bfloat16])
        x, bias = torch.randn(*shape, packed.shape[1], dtype=dtype), draw.choice([None, torch.randn(packed.shape[0])])
        bias = None if bias is None else bias.to(dtype)
        want = matrices.linear(x.double(), packed.unpack(torch.float64), None if bias is None else bias.double())
        got = CPU.packed_linear(x, packed, bias)
        assert got.dtype is dtype and got.shape == want.shape
        # what cancels in a sum (a single number may be all of it) leaves the rounding of its parts
        parts = matrices.linear(x.double().abs(), packed.unpack(torch.float64).abs()).max()
        limit = (3e-6 if dtype is torch.float32 else 2e-2) * want.abs().max() + 1e-7 * parts
        assert worst(got.double(), want) <= limit
    assert len(names) >= 6, "a fallback was tested instead of the kernel"
    packed = packed_in(name)
    eye = torch.eye(packed.shape[1])
    assert torch.equal(packed_cpu._by_pieces(eye, packed, packed_cpu.plan(packed)).T, packed.unpack())


def damaged(packed, rng):
    "The same tensors, one of them cut, lengthened, of another type or missing."
    tensors, name = dict(packed.tensors), rng.choice(sorted(packed.tensors))
    t = tensors[name]
    kind = rng.choice(["short", "narrow", "type", "missing", "shape"])
    if kind == "short": tensors[name] = t[:-1].clone()
    elif kind == "narrow": tensors[name] = t[..., :-1].clone()
    elif kind == "type": tensors[name] = t.to(torch.int16)
    elif kind == "missing": del tensors[name]
    shape = (packed.shape[0] + 7, packed.shape[1]) if kind == "shape" else packed.shape
    return Packed(packed.format, shape, tensors)


@pytest.mark.parametrize("name", BLOCKS)
@torch.inference_mode()
def test_a_damaged_matrix_is_refused_every_time_and_wherever_it_stands(name):
    "An address says nothing of a length: what is not of the layout would be read past its end."
    rng, good = random.Random(name), packed_in(name)
    x = torch.randn(2, good.shape[1])
    for _ in range(10):
        bad = damaged(good, rng)
        for _ in range(2):
            with pytest.raises(CheckpointError): CPU.packed_linear(x, bad)
    for _ in range(10):
        bad = PackedMatrix.__new__(PackedMatrix)
        torch.nn.Module.__init__(bad)
        broken = damaged(good, rng)
        bad.__dict__.update(_packed=broken, format=broken.format, shape=broken.shape, names=(), _dtype=torch.float32)
        bad.bias = None
        for _ in range(2):
            with pytest.raises(CheckpointError): CPU.several(x, [PackedMatrix(good), bad], CPU)


@torch.inference_mode()
def test_several_matrices_of_different_formats_are_one_call(monkeypatch):
    names, draw = used(monkeypatch), random.Random(0)
    formats = [n for n in BLOCKS if 256 % BLOCKS[n].items == 0]
    for _ in range(20):
        chosen = [draw.choice(formats) for _ in range(draw.randint(1, 4))]
        made = [PackedMatrix(FORMATS[n].pack(torch.randn(draw.choice([1, 5, 64]), 256)),
                             draw.choice([None, "b"]) and torch.nn.Parameter(torch.zeros(0))) for n in chosen]
        for m in made:
            if m.bias is not None: m.bias = torch.nn.Parameter(torch.randn(m.shape[0]))
        x = torch.randn(draw.randint(1, ROWS), 256)
        names.clear()
        for got, want in zip(CPU.several(x, made, CPU), matrices.several(x, made, TORCH), strict=True):
            assert torch.allclose(got, want, atol=2e-4)
        assert len(names) == 1


def test_what_the_kernels_cannot_read_goes_the_plain_way(monkeypatch):
    names = used(monkeypatch)
    packed = packed_in("int4_g32", blocks=4)
    x = torch.randn(3, packed.shape[1])
    transposed = Packed(packed.format, packed.shape, {n: t.T.contiguous().T for n, t in packed.tensors.items()})
    unknown = FORMATS["int3_g32"].pack(torch.randn(5, packed.shape[1]))
    stack = FORMATS["int4_g32"].pack(torch.randn(2, 5, packed.shape[1]))
    with torch.inference_mode():
        for p in (transposed, unknown): assert torch.equal(CPU.packed_linear(x, p), matrices.packed_linear(x, p))
        for i in range(2): assert torch.allclose(CPU.packed_linear(x, stack[i]), x @ stack[i].unpack().T, atol=1e-4)
    wants_gradient = x.clone().requires_grad_()
    CPU.packed_linear(wants_gradient, packed).sum().backward()
    assert torch.allclose(wants_gradient.grad, packed.unpack().sum(0).expand_as(x), atol=1e-4)
    with torch.inference_mode(), pytest.raises((InputError, RuntimeError)): CPU.packed_linear(x[:, :-1], packed)
    assert len(names) == 4, "only the two matrices of the stack, and both passes of the gradient"
