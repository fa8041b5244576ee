"Every weight format: what it promises about sizes and rows, whole decoders of all families in it, and damage."
import math
import random

import pytest
import torch
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.architecture.matrices import Linear, Matrix, Stack, swapped
from llm_workbench.architecture.ops import REFERENCE
from llm_workbench.errors import InputError, WorkbenchError
from llm_workbench.quantization.formats import FORMATS, PackedMatrix, PackedStack, packs, quantize
from llm_workbench.quantization import packing
from llm_workbench.quantization.packing import Packed

FAMILIES = sorted(SMALL)


def columns_for(format): return max(64, format.columns) * (3 if format.columns <= 64 else 1)


def packed_in(name, rows=6, seed=0):
    format = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(columns_for(format), generator=generator) + 0.1   # some block types cannot do without
    return format.pack(torch.randn(rows, columns_for(format), generator=generator) * 0.1, importance)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_keeps_its_promises(name):
    packed = packed_in(name)
    format, weight = packed.format, packed.unpack()
    assert packed.nbytes == format.nbytes(packed.shape)
    assert format.bits(packed.shape) == 8 * packed.nbytes / weight.numel()
    assert weight.dtype is torch.float32 and weight.shape == packed.shape and weight.isfinite().all()
    assert torch.equal(packed.unpack(torch.bfloat16), weight.bfloat16())
    for rows in ([4, 1, 1], slice(2, 5), torch.tensor([True, False, False, True, False, True])):
        assert torch.equal(packed[rows].unpack(), weight[rows]), "rows by indexing"


@pytest.mark.parametrize("name", FORMATS)
def test_in_pieces_or_at_once(name, monkeypatch):
    "Packing goes through a weight in pieces of rows; where it cannot, it takes the whole."
    format, generator = FORMATS[name], torch.Generator().manual_seed(2)
    weight = torch.randn(2, 5, columns_for(format), generator=generator)
    importance = torch.rand(weight.shape[-1], generator=generator) + 0.1
    whole = format._pack(weight, importance)
    calls, one = [], format._pack
    monkeypatch.setattr(format, "_pack", lambda piece, i: calls.append(len(piece)) or one(piece, i))
    monkeypatch.setattr(packing, "PIECE", 3 * weight.shape[-1])
    packed = format.pack(weight, importance)
    assert calls == ([3, 3, 3, 1] if format.by_rows(weight.shape) else [2])
    assert all(torch.equal(t, packed.tensors[n]) for n, t in whole.items())
    if not format.by_rows(weight.shape): return
    rows = weight.flatten(0, 1)
    with pytest.raises(InputError, match="rows"): format.gather(weight.shape, rows[:7].split(3), importance)
    rows[4, 3] = float("nan")
    with pytest.raises(InputError, match="NaN"): format.gather(weight.shape, rows.split(3), importance)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_is_its_matrices(name):
    format = FORMATS[name]
    weight = torch.randn(3, 4, columns_for(format), generator=torch.Generator().manual_seed(1))
    importance = torch.ones(weight.shape[-1])
    stack = format.pack(weight, importance)
    if not format.shared:
        for i in range(3): assert torch.equal(stack[i].unpack(), format.pack(weight[i], importance).unpack())
    assert torch.equal(stack[[2, 0]].unpack(), stack.unpack()[[2, 0]])
    assert stack[torch.empty(0, dtype=torch.long)].unpack().shape == (0, 4, weight.shape[-1])


def mutated(packed, rng):
    "The same with one thing about its tensors changed: missing, cut, of another type, or other bytes."
    tensors, shape, format = dict(packed.tensors), packed.shape, packed.format
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    some = t if t.ndim else t[None]
    kind = rng.choice(["missing", "short", "long", "dtype", "nested", "bytes", "shape", "empty"])
    if kind == "missing": del tensors[name]
    if kind == "short": tensors[name] = some[..., :-1]
    if kind == "long": tensors[name] = torch.cat([some, some])
    if kind == "dtype": tensors[name] = t.to(torch.int32 if t.dtype is not torch.int32 else torch.int64)
    if kind == "nested": tensors[name] = some[None]
    if kind == "empty": tensors[name] = some[:0]
    if kind == "shape":
        rows, columns = shape
        shape = rng.choice([(), (6,), (rows, columns, 1), (6, 0), (-6, columns), (6, columns + 1), (7, columns)])
    if kind == "bytes":
        raw = some.clone().contiguous().view(torch.uint8).view(-1)
        for _ in range(4): raw[rng.randrange(len(raw))] = rng.randrange(256)
        tensors[name] = raw.view(t.dtype).view(t.shape)
    return kind, Packed(format, shape, tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_layouts_end_in_our_errors(name):
    "Thousand changes: numbers for changed bytes, a named error for everything else, and never anything foreign."
    rng, packed = random.Random(name), packed_in(name)
    for _ in range(1000):
        kind, wrong = mutated(packed, rng)
        same = kind == "shape" and wrong.shape == (6, packed.shape[1] + 1)   # three values: 193 need the bytes of 192
        try: assert wrong.unpack().shape == wrong.shape and (kind == "bytes" or name == "ternary" and same), kind
        except WorkbenchError: assert kind != "bytes" or packed.format.shared


@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_cannot_be_packed_are_named(name):
    format, columns = FORMATS[name], columns_for(FORMATS[name])
    bad = torch.randn(4, columns)
    bad[1, 2] = math.nan
    wrong = [bad, torch.full((4, columns), math.inf), torch.randn(columns), torch.randn(0, columns), [[1.0]],
             torch.ones(4, columns, dtype=torch.int64)]
    for weight in wrong:
        with pytest.raises(InputError): format.pack(weight)
    for importance in (torch.ones(3), -torch.ones(columns), torch.full((columns,), math.nan)):
        with pytest.raises(InputError): format.pack(torch.randn(4, columns), importance)
    if format.columns > 1:
        with pytest.raises(InputError, match="multiple"): format.pack(torch.randn(4, columns + 1))


def dense_copy(decoder):
    "The same decoder with every packed matrix and stack unpacked."
    def make(name, module):
        if isinstance(module, PackedStack):
            new = Stack(1, 1, 1)
            new.weight, new.bias = torch.nn.Parameter(module.dense()), module.bias
            return new
        if not isinstance(module, PackedMatrix): return module
        new = Linear(1, 1, bias=False)
        new.weight, new.bias = torch.nn.Parameter(module.dense()), module.bias
        return new
    return swapped(decoder, make)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_packed(family):
    "A whole decoder in 8 bits without groups: logits of its own unpacked copy, cached and not, and what is packed."
    decoder = Decoder.from_transformers(small_model(family), REFERENCE)
    packed = quantize(decoder, FORMATS["ternary"] if family == "llama" else "int8")
    holders = [n for n, m in packed.named_modules() if isinstance(m, (PackedMatrix, PackedStack))]
    left = [n for n, m in packed.named_modules() if isinstance(m, (Matrix, Stack)) and n not in holders]
    assert holders and all(not packs(n, packed.get_submodule(n)) for n in left)
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    want = dense_copy(packed)(tokens)
    assert (packed(tokens) - want).abs().max() <= 1e-5 * want.abs().max()
    cache = packed.new_cache()
    parts = torch.cat([packed(part, cache) for part in tokens.split([4, 1, 4], 1)], 1)
    assert (parts - want).abs().max() <= 1e-4 * want.abs().max()
    changed = (want - decoder(tokens)).abs().max()
    assert changed > 0, "packing changed nothing: the decoder still multiplies by the old weights"
