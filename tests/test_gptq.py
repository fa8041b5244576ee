"GPTQ against Optimal Brain Surgeon with an inverse for every column, against llm-compressor, and against rounding."
import math

import pytest
import torch
from models import small_model

from llm_workbench import Decoder
from llm_workbench.architecture.matrices import Stack
from llm_workbench.architecture.ops import REFERENCE
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.quantization import gptq as module
from llm_workbench.quantization.calibration import collect
from llm_workbench.quantization.formats import quantize
from llm_workbench.quantization.gptq import damped, feedback, gptq, gptq_pack, spread_errors
from llm_workbench.quantization.round_to_nearest import Integers, to_codes

FORMATS = [Integers(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (32, 64, "row")
           for symmetric in (True, False)] + [Integers(5, 32), Integers(4, 128), Integers(4, "tensor"),
                                              Integers(3, 32, trials=6), Integers(4, 64, False, trials=6)]


def problem(rows=12, columns=128, seed=0, n=400, dtype=torch.float64):
    "A weight, and the Gram matrix of inputs that move together and differ in size."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, columns, generator=g, dtype=torch.float64) @ torch.randn(columns, columns, generator=g,
                                                                                dtype=torch.float64)
    x = x * torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)[torch.randperm(columns, generator=g)]
    return torch.randn(rows, columns, generator=g, dtype=torch.float64).to(dtype), (x.T @ x / n).to(dtype)


def loss(changed, W, G): return ((changed - W) @ G * (changed - W)).sum().item()


def surgeon(W, G, format, order, damp=0.05):
    "The rounded values by Optimal Brain Surgeon: a new inverse of what is left for every column."
    start = format.pack(W, G.diagonal() if format.trials else None).tensors
    group = format.group if isinstance(format.group, int) else W.shape[1]
    scale = start["scale"].double().expand(len(W), -1)
    zero = start["zero"].double() if "zero" in start else torch.full_like(scale, 2 ** (format.width - 1))
    left = G.diagonal().argsort(dim=0, descending=True, stable=True).tolist() if order else list(range(W.shape[1]))
    H, W = G + damp * G.diagonal().mean() * torch.eye(len(G)), W.clone()
    while left:
        j, inverse = left[0], torch.linalg.inv(H[left][:, left])
        s, z = scale[:, j // group], zero[:, j // group]
        error = W[:, j] - s * (to_codes(W[:, j], s, z, format.width) - z)
        W[:, left] -= (error / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return W


def differs_from_surgeon(format, order, columns=64):
    W, G = problem(columns=columns)
    got = gptq_pack(W, G, format, order=order).unpack(torch.float64)
    return (got - surgeon(W, G, format, order)).abs().max().item() > 1e-9


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_equals_the_surgeon(format, order):
    assert not differs_from_surgeon(format, order, 128 if format.group == 128 else 64)


def no_inverse(H): return torch.linalg.cholesky(H).mT
def forwards(H): return torch.linalg.cholesky(torch.linalg.inv(H))           # lower: the wrong half
def flipped(H): return feedback(H).flip(-2, -1)
def diagonal_only(H): return torch.diag_embed(feedback(H).diagonal(dim1=-2, dim2=-1))

def forgets_the_rest(columns, U, round_column, block=32):
    for start in range(0, columns.shape[-2], block):
        part = slice(start, start + block)
        spread_errors(columns[..., part, :], U[..., part, part], lambda j, w: round_column(start + j, w), block)

def spreads_unscaled(columns, U, round_column, block=32):
    return spread_errors(columns, U.triu(1) + torch.eye(U.shape[-1], dtype=U.dtype), round_column, block)

class LeavesOrder(module._Rounding):
    "Wrong: the codes stay in the order of rounding."
    def packed(self, shape):
        self.perm = torch.arange(self.perm.shape[-1]).expand_as(self.perm)
        return super().packed(shape)

class ScalesInOrder(module._Rounding):
    "Wrong: takes the first scale for the first column that is rounded, wherever it stands."
    def __call__(self, j, w):
        perm, self.perm = self.perm, torch.arange(self.perm.shape[-1]).expand_as(self.perm)
        try: return super().__call__(j, w)
        finally: self.perm = perm


MUTANTS = [("feedback", no_inverse), ("feedback", forwards), ("feedback", flipped), ("feedback", diagonal_only),
           ("spread_errors", forgets_the_rest), ("spread_errors", spreads_unscaled), ("_Rounding", LeavesOrder),
           ("_Rounding", ScalesInOrder), ("damped", lambda gram, damp: gram)]

@pytest.mark.parametrize("name, mutant", MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_the_surgeon_notices_mistakes(monkeypatch, name, mutant):
    monkeypatch.setattr(module, name, mutant)
    assert differs_from_surgeon(Integers(4, 32), True)


def gain(format, seed, dtype=torch.float32, **options):
    "How many times lower than that of rounding the output error is."
    W, G = problem(48, 256, seed, dtype=dtype)
    return loss(format.pack(W).unpack(dtype), W, G) / loss(gptq_pack(W, G, format, **options).unpack(dtype), W, G)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("format", [Integers(4, 32), Integers(4, 128), Integers(4, 64, False), Integers(4, "row")],
                         ids=repr)
def test_four_bits_on_inputs_that_move_together(format, seed):
    assert gain(format, seed, damp=0.01) >= 1.5
    assert all(gain(format, seed, **o) > 1 for o in (dict(order=False), dict(damp=0.3), dict(damp=3.0)))


@pytest.mark.parametrize("name, mutant", [("feedback", diagonal_only), ("feedback", flipped),
                                          ("spread_errors", forgets_the_rest)])
def test_the_gain_notices_mistakes(monkeypatch, name, mutant):
    monkeypatch.setattr(module, name, mutant)
    assert gain(Integers(4, 32), 0, damp=0.01) < 1.5


def test_inputs_that_do_not_move_together_give_rounding():
    W, _ = problem()
    G = torch.diag(torch.logspace(-3, 3, 128, dtype=torch.float64))
    for format in FORMATS:
        if not format.trials: assert torch.equal(gptq_pack(W, G, format).data, format.pack(W).data)


@pytest.mark.parametrize("format", [Integers(4, 32), Integers(3, 64, False), Integers(2, "row")], ids=repr)
def test_blocks_change_nothing(format):
    W, G = problem()
    want = gptq_pack(W, G, format, block=1)
    for block in (2, 7, 32, 100, 128, 1000):
        got = gptq_pack(W, G, format, block=block)
        assert torch.equal(got.data, want.data) and (got.unpack() - want.unpack()).abs().max() <= 1e-6
    if isinstance(format.group, int):
        wide, narrow = (gptq_pack(W, G, format, order=False, dynamic=True, block=b) for b in (128, format.group))
        assert all(torch.equal(wide.tensors[n], narrow.tensors[n]) for n in wide.tensors)


def test_dynamic_scales_are_those_of_the_weights_as_they_are():
    W, G = problem()
    for format in (Integers(3, 32), Integers(4, 64, False)):
        packed = gptq_pack(W, G, format, order=False, dynamic=True, block=format.group)
        static = format.pack(W)
        assert torch.equal(packed.tensors["scale"][:, 0], static.tensors["scale"][:, 0]), "nothing has moved yet"
        assert not torch.equal(packed.tensors["scale"][:, 1:], static.tensors["scale"][:, 1:])
        format.check(packed)
        assert loss(packed.unpack(), W, G) < loss(static.unpack(), W, G)


@pytest.mark.parametrize("format", [Integers(4, "row"), Integers(3, "row", False), Integers(4, "tensor")], ids=repr)
def test_order_does_not_depend_on_where_columns_stand(format):
    "Columns in another order of memory: the same rounded weights, moved along."
    W, G = problem()
    shuffle = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    moved = gptq_pack(W[:, shuffle], G[shuffle][:, shuffle], format).unpack()
    assert torch.equal(moved, gptq_pack(W, G, format).unpack()[:, shuffle])
    in_memory = gptq_pack(W[:, shuffle], G[shuffle][:, shuffle], format, order=False).unpack()
    assert not torch.equal(in_memory, gptq_pack(W, G, format, order=False).unpack()[:, shuffle])


def test_batches_are_their_members():
    problems = [problem(seed=s) for s in range(3)]
    W, G = (torch.stack(t) for t in zip(*problems))
    for format in (Integers(4, 32), Integers(3, 64, False), Integers(3, 32, trials=4)):
        for options in (dict(), dict(order=False), dict(order=False, dynamic=True, block=64)):
            together = gptq_pack(W, G, format, **options)
            format.check(together)
            for i in range(3):
                alone = gptq_pack(W[i], G[i], format, **options)
                assert all(torch.equal(together[i].tensors[n], alone.tensors[n]) for n in alone.tensors)


def test_factor():
    for n in (1, 5, 64):
        H = damped(problem(2, n)[1], 0.01)
        U = feedback(H)
        assert torch.equal(U, U.triu()) and torch.allclose(U.mT @ U @ H, torch.eye(n, dtype=H.dtype), atol=1e-8)


def test_inputs_that_were_never_seen():
    W, G = problem()
    dead = torch.zeros(128, dtype=torch.bool)
    dead[[0, 5, 77]] = True
    G[dead], G[:, dead] = 0, 0
    for damp in (0.0, 0.05):
        packed = gptq_pack(W, G, Integers(4, 32), damp=damp).unpack(torch.float64)
        assert torch.equal(packed[:, dead], Integers(4, 32).pack(W).unpack(torch.float64)[:, dead]), "to nearest"
        assert loss(packed, W, G) < loss(Integers(4, 32).pack(W).unpack(), W, G)
    nothing = torch.zeros_like(G)
    for format in FORMATS:
        if not format.trials: assert torch.equal(gptq_pack(W, nothing, format, damp=0.0).data, format.pack(W).data)


def test_few_rows_need_damping():
    W, G = problem(n=20)
    with pytest.raises(InputError, match="damp"): gptq_pack(W.float(), torch.ones(128, 128), Integers(4, 32), damp=0.0)
    for dtype in (torch.float32, torch.float64):
        packed = gptq_pack(W.to(dtype), G.to(dtype), Integers(4, 32)).unpack(torch.float64)
        assert packed.isfinite().all() and loss(packed, W, G) < loss(Integers(4, 32).pack(W).unpack(), W, G)


def spoiled(t, value):
    t = t.clone()
    t[0, 0] = value
    return t


W0, G0 = problem()
FOUR = Integers(4, 32)
WRONG = {
    "no whole numbers": (W0, G0, "nf4", {}, UnsupportedError),
    "groups": (W0[:, :90], G0[:90, :90], FOUR, {}, InputError),
    "NaN in G": (W0, spoiled(G0, math.nan), FOUR, {}, InputError),
    "infinity in G": (W0, spoiled(G0, math.inf), FOUR, {}, InputError),
    "a negative square": (W0, spoiled(G0, -1.0), FOUR, {}, InputError),
    "NaN in W": (spoiled(W0, math.nan), G0, FOUR, {}, InputError),
    "too small": (W0, G0[:64, :64], FOUR, {}, InputError),
    "not square": (W0, G0[:64], FOUR, {}, InputError),
    "whole numbers": (W0, G0.long(), FOUR, {}, InputError),
    "no matrix": (W0, None, FOUR, {}, InputError),
    "a batch": (W0[None], G0, FOUR, {}, InputError),
    "damp": (W0, G0, FOUR, dict(damp=-1.0), InputError),
    "damp NaN": (W0, G0, FOUR, dict(damp=math.nan), InputError),
    "block": (W0, G0, FOUR, dict(block=0), InputError),
    "dynamic in order": (W0, G0, FOUR, dict(dynamic=True), InputError),
    "dynamic rows": (W0, G0, Integers(4, "row"), dict(dynamic=True, order=False), InputError),
    "dynamic across blocks": (W0, G0, Integers(4, 64), dict(dynamic=True, order=False, block=32), InputError),
}

@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_said(case):
    W, G, format, options, error = case
    with pytest.raises(error): gptq_pack(W, G, format, **options)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v2", "gpt_oss", "gemma2"])
def test_a_whole_model_is_its_matrices(family):
    decoder = Decoder.from_transformers(small_model(family), REFERENCE)
    tokens = torch.randint(0, 97, (3, 14), generator=torch.Generator().manual_seed(0))
    inputs, format = collect(decoder, [tokens]), Integers(4, 2)
    before = decoder(tokens)
    packed = gptq(decoder, format, inputs)
    assert torch.equal(decoder(tokens), before), "the old decoder is as it was"
    for name, seen in inputs.items():
        old, new = decoder.get_submodule(name), packed.get_submodule(name)
        assert isinstance(seen, list) == isinstance(old, Stack) and new.format is format
        each = zip(seen, old.dense(), new.packed) if isinstance(seen, list) else [(seen, old.dense(), new.packed)]
        for i, w, p in each:
            want = gptq_pack(w, i.gram, format)
            same = (p.data == want.data).float().mean()      # batched products round differently now and then
            assert same > 0.97 and torch.equal(p.tensors["scale"], want.tensors["scale"]), name
    assert packed.nbytes == quantize(decoder, format).nbytes and packed(tokens).isfinite().all()


@torch.no_grad()
def test_a_model_in_which_something_is_missing_is_left_alone():
    decoder = Decoder.from_transformers(small_model("llama"), REFERENCE)
    inputs = collect(decoder, [torch.arange(9)])
    name = "layers.2.mlp.down_proj"
    lacking = {n: i for n, i in inputs.items() if n != name}
    with pytest.raises(InputError, match=name): gptq(decoder, Integers(4, 2), lacking)
    with pytest.raises(UnsupportedError): gptq(decoder, "ternary", inputs)
    with pytest.raises(InputError, match="32"): gptq(decoder, "int4_g32", inputs)
    inputs[name].gram[3, 3] = math.nan
    with pytest.raises(InputError, match="NaN"): gptq(decoder, Integers(4, 2), inputs)
    only = gptq(decoder, Integers(4, 2), inputs, choose=lambda n, m: n.endswith("up_proj"))
    assert {n for n, m in only.named_modules() if hasattr(m, "packed")} == {f"layers.{i}.mlp.up_proj" for i in range(3)}
    assert torch.equal(gptq(decoder, Integers(4, "tensor"), inputs, choose=lambda n, m: "o_proj" in n)
                       .layers[0].self_attn.o_proj.data,
                       gptq_pack(decoder.layers[0].self_attn.o_proj.weight.detach(),
                                 inputs["layers.0.self_attn.o_proj"].gram, Integers(4, "tensor")).data)


@pytest.mark.parametrize("order", ["static", None])
@pytest.mark.parametrize("bits, group", [(4, 32), (3, 64), (8, 128), (2, 32)])
def test_equals_llm_compressor(bits, group, order):
    "With the same scales not one rounded weight differs, and so the output error is the same."
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed here; it is an optional oracle")
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    W, G = problem(32, 256, dtype=torch.float32)
    ours = gptq_pack(W, G, Integers(bits, group), damp=0.01, order=order is not None)
    scale = ours.tensors["scale"].float()
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group,
                            actorder=order)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    theirs = quantize_weight(W[None].clone(), G[None].clone(), scale[None], zero[None], None, args)[0][0]
    assert loss(ours.unpack(), W, G) <= 1.02 * loss(theirs, W, G)
    assert ((ours.unpack() - theirs).abs() > 1e-4).float().mean() < 0.02, "rounding may tip over where sums differ"
