"""Gradients through packed matrices against dense ones and bitsandbytes, what they keep, and AdamW in eight bits, with
the usual mistakes planted."""
import copy
import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F

from models import small_model
from llm_workbench import Decoder
from llm_workbench.architecture import matrices
from llm_workbench.architecture.matrices import PackedProduct, packed_linear, unpacked_back, unpacked_linear
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import InputError
from llm_workbench.finetuning import qlora as module
from llm_workbench.finetuning.lora import Adapted, LoRAConfig, adapt, adapter, trainable
from llm_workbench.finetuning.qlora import AdamW8bit, in_blocks, kept_bytes, qlora, sizes
from llm_workbench.kernels import packed_cpu
from llm_workbench.quantization.formats import FORMATS, PackedMatrix, PackedStack, quantize
from llm_workbench.quantization.nf4 import blockwise, codebook_format, to_bitsandbytes
from llm_workbench.quantization.packing import Packed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
NAMES = ("nf4", "nf4_dq", "fp4", "int8", "int4_g32", "uint4_g64", "int3_g32", "fp8", "q4_1", "q4_k", "iq4_nl", "mxfp4")


def apart(a, b): return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()


def example(name="nf4_dq", outs=70, ins=256, seed=0):
    "A matrix whose rows differ in size."
    g = torch.Generator().manual_seed(seed)
    return FORMATS[name].pack(torch.randn(outs, ins, generator=g) * torch.logspace(-1, 1, outs)[:, None])


# ---- the product

def check_product(op, packed, shape=(2, 9), dtype=torch.float32, limit=1e-5):
    "Results and gradients are those of the dense matrix, and nothing is kept for them."
    g, (outs, ins) = torch.Generator().manual_seed(1), packed.shape
    x, bias = torch.randn(*shape, ins, generator=g).to(dtype), torch.randn(outs, generator=g).to(dtype)
    grad = torch.randn(*shape, outs, generator=g).to(dtype)
    found = []
    for product in (op, lambda x, p, b: F.linear(x, p.unpack(dtype), b)):
        given = [t.clone().requires_grad_() for t in (x, bias)]
        with kept_bytes(*given) as kept: out = product(given[0], packed, given[1])
        if product is op: assert not kept(), f"{kept()} bytes are kept for the backward pass"
        found.append([out.detach(), *torch.autograd.grad(out, given, grad)])
    for what, got, want in zip(("results", "the gradient of x", "the gradient of the bias"), *found):
        assert got.dtype is dtype and got.shape == want.shape and apart(got, want) <= limit, what


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_dense_matrix(name, monkeypatch):
    ran, original = [], packed_cpu.compiled
    monkeypatch.setattr(packed_cpu, "compiled", lambda k, dtype: ran.append(k.name) or original(k, dtype))
    monkeypatch.setattr(packed_cpu, "PIECE", 256 * 9)                     # 70 rows in eight pieces, the last one short
    for op in (packed_linear, packed_cpu.packed_linear):
        for shape in ((2, 9), (40,), (3,), (), (1, 1)): check_product(op, example(name), shape)
        check_product(op, example(name), dtype=torch.bfloat16, limit=2e-2)
    unpacks = f"unpack {name.removesuffix('_dq')}"
    assert ran.count(unpacks) >= 6 or name not in {*packed_cpu.BLOCKS, "nf4_dq"}, "C kernels stepped aside"


def test_by_finite_differences_twice():
    packed = example("nf4", 6, 64)
    x, bias = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((2, 64), (6,)))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, b: packed_linear(x, packed, b).sin(), (x, bias))


def test_only_what_wants_a_gradient_is_computed(monkeypatch):
    packed, calls = example(), []
    def back(grad, packed): calls.append(1); return unpacked_back(grad, packed)
    monkeypatch.setattr(matrices, "unpacked_back", back)
    x, bias = torch.randn(3, 256), torch.randn(70, requires_grad=True)
    assert not packed_linear(x, packed).requires_grad
    packed_linear(x, packed, bias).sum().backward()
    assert not calls and torch.equal(bias.grad, torch.full((70,), 3.0))
    packed_linear(x.requires_grad_(), packed, bias.detach()).sum().backward()
    assert calls and x.grad is not None


def test_no_unpacked_matrix_is_alive_between_the_passes():
    def alive(op):
        packed, seen = example(), []
        class Watched:
            shape = packed.shape
            def unpack(self, dtype):
                weight = packed.unpack(dtype)
                seen.append(weakref.ref(weight))
                return weight
        out = op(torch.randn(3, 256, requires_grad=True), Watched())
        gc.collect()
        assert len(seen) == 1 and out.requires_grad
        return seen[0]() is not None
    assert not alive(packed_linear)
    assert alive(hides_the_dense), "one that hides from torch's hooks is found"


class HidesTheDense(torch.autograd.Function):
    "Wrong: kept where hooks do not look."
    @staticmethod
    def forward(ctx, x, packed):
        ctx.weight = packed.unpack(x.dtype)
        return F.linear(x, ctx.weight)
    @staticmethod
    def backward(ctx, grad): return grad @ ctx.weight, None

def hides_the_dense(x, packed, bias=None): return HidesTheDense.apply(x, packed)


def with_back(back): return lambda x, p, b=None: PackedProduct.apply(x, p, b, unpacked_linear, back)
def without_scales(grad, p):
    ones = Packed(FORMATS["nf4"], p.shape, {"data": p.data, "absmax": torch.ones_like(p[:].tensors["absmax"])})
    return grad @ ones.unpack(grad.dtype)
def without_mean(grad, p):
    if "nested_offset" not in p.tensors: return unpacked_back(grad, p)
    return unpacked_back(grad, Packed(p.format, p.shape, p.tensors | {"nested_offset": torch.zeros(())}))
def rounded_again(grad, p): return unpacked_back(grad, FORMATS["int4_g64"].pack(p.unpack()))
def the_wrong_way_round(grad, p): return grad @ p.unpack(grad.dtype).reshape(p.shape[::-1]).T
def one_piece_only(grad, p): return grad[..., :35] @ p.unpack(grad.dtype)[:35]

class ForgetsTheBias(PackedProduct):
    @staticmethod
    def backward(ctx, grad): return ctx.back(grad, ctx.packed), None, torch.zeros(grad.shape[-1]), None, None

class RoundsStraightThrough(PackedProduct):
    "Wrong: the gradient meant for the weights of a straight-through estimator, given to the input."
    @staticmethod
    def backward(ctx, grad):
        return grad.sum(-1, keepdim=True).expand(*grad.shape[:-1], ctx.packed.shape[1]), None, None, None, None

WRONG = {
    "codes rounded again": with_back(rounded_again), "scales forgotten in backward": with_back(without_scales),
    "transposed unpacking": with_back(the_wrong_way_round), "keeps the dense weight": unpacked_linear,
    "mean of the scales forgotten": with_back(without_mean), "only the first piece": with_back(one_piece_only),
    "bias without gradient": lambda x, p, b=None: ForgetsTheBias.apply(x, p, b, unpacked_linear, unpacked_back),
    "straight through": lambda x, p, b=None: RoundsStraightThrough.apply(x, p, b, unpacked_linear, unpacked_back)}

@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_products_are_rejected(mistake):
    check_product(with_back(unpacked_back), example())
    with pytest.raises((AssertionError, RuntimeError)): check_product(WRONG[mistake], example())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, shape", [("nf4", (64, 64)), ("nf4_dq", (130, 192)), ("fp4", (33, 320)),
                                         ("nf4_dq", (1, 64)), (("nf4", 128), (48, 256))], ids=str)
def test_equals_linear4bit(name, shape, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    format = FORMATS[name] if isinstance(name, str) else codebook_format(*name)
    packed = format.pack(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    data, state = to_bitsandbytes(packed, dtype)
    x = torch.randn(2, 12, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bias, found = torch.randn(shape[0]).to(dtype), []
    for product in (lambda x: bnb.matmul_4bit(x, data.t(), state, bias=bias), lambda x: packed_linear(x, packed, bias),
                    lambda x: packed_cpu.packed_linear(x, packed, bias)):
        given = x.clone().requires_grad_()
        out = product(given)
        found.append((out.detach(), *torch.autograd.grad(out.float().sin().sum(), given)))
    for ours in found[1:]:
        for got, want in zip(ours, found[0]): assert apart(got, want) <= (1e-6 if dtype is torch.float32 else 1e-2)


# ---- decoders

SMALL = dict(hidden_size=96, head_dim=16, intermediate_size=64)
FORMAT = codebook_format("nf4", 32, double=True)

@pytest.mark.parametrize("family, variant", [("llama", 0), ("llama", 1), ("qwen2", 0), ("gemma2", 0), ("mixtral", 0)])
@pytest.mark.parametrize("ops", [TORCH, packed_cpu.CPU], ids=["torch", "C"])
def test_a_decoder_learns_as_over_the_unpacked_base(family, variant, ops):
    dense = Decoder.from_transformers(small_model(family, variant, changes=SMALL)).with_ops(ops)
    config = LoRAConfig(r=3, alpha=6)
    small = qlora(dense, config, FORMAT, seed=3)
    packed = {n: m for n, m in small.named_modules() if isinstance(m, (PackedMatrix, PackedStack))}
    assert packed and all(n.startswith("layers.") for n in packed)
    with torch.no_grad():                                                # the same numbers, dense
        for name, m in packed.items(): dense.get_submodule(name.removesuffix(".base")).weight.copy_(m.dense())
    tokens, grads = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1)), []
    plain = adapt(dense, config, seed=3)
    for model in (small, plain):
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in trainable(model).values(): p.add_(torch.randn(p.shape, generator=g) * 0.05)
        F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        grads.append({n: p.grad for n, p in trainable(model).items()})
    assert grads[0].keys() == grads[1].keys() and max(apart(a, grads[1][n]) for n, a in grads[0].items()) < 2e-5


def test_a_step_keeps_what_it_keeps_over_a_dense_base():
    dense = Decoder.from_transformers(small_model("llama", 0, changes=SMALL))
    tokens, kept = torch.randint(0, 97, (1, 8)), {}
    models = {"dense": adapt(dense), "packed": qlora(dense, format=FORMAT)}
    models["obvious"] = models["packed"].with_ops(packed_linear=unpacked_linear)
    for name, model in models.items():
        held = [*model.parameters(), *model.buffers()]
        with kept_bytes(*held) as so_far: out = model(tokens)
        kept[name] = so_far()
        del out
    linears = sum(4 * m.base.shape[0] * m.base.shape[1] for m in models["packed"].modules() if isinstance(m, Adapted))
    assert kept["packed"] <= kept["dense"]
    assert kept["obvious"] >= kept["packed"] + 0.5 * linears                # the first matrices need no gradient of x


@pytest.mark.parametrize("family, variant", [("llama", 0), ("llama", 1), ("mixtral", 0)])
def test_sizes_are_those_of_the_decoder(family, variant):
    dense = Decoder.from_transformers(small_model(family, variant, changes=SMALL))
    config = LoRAConfig(r=3)
    found, small = sizes(dense.config, config, FORMAT), qlora(dense, config, FORMAT)
    packed = [m for m in small.modules() if isinstance(m, (PackedMatrix, PackedStack))]
    assert found.packed == sum(m.packed.nbytes for m in packed)
    assert found.adapter == sum(p.numel() for p in trainable(small).values())
    assert found.rest == sum(p.numel() for p in small.parameters() if not p.requires_grad)
    assert found.blocks + found.rest == sum(p.numel() for p in dense.parameters())


def test_kept_bytes_counts_each_storage_once():
    a, b = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    with kept_bytes() as kept: c = a * b
    assert kept() == 800
    with kept_bytes(a) as kept: c = a * b + a[:5].exp().sum() + (b.T * a).sum()
    assert kept() == 400 + 200 and c is not None
    del c
    assert kept() == 0, "what nobody can go back through any more is not kept"
    with kept_bytes() as kept, torch.no_grad(): c = a * b
    assert kept() == 0


# ---- AdamW in eight bits

def stepped(make, shapes=((130, 65), (60, 64), (4096,)), steps=6, dtype=torch.float32, between=lambda o, ps: o):
    "Weights and states after some steps; `between` may exchange the optimizer halfway."
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    optimizer = make(params)
    for step in range(steps):
        if step == steps // 2: optimizer = between(optimizer, params)
        for i, p in enumerate(params):
            p.grad = (torch.randn(p.shape, generator=g) * 10 ** (8 * torch.rand(p.shape, generator=g) - 8)).to(dtype)
            if i == 2 and step: p.grad = None                            # it learns once
        optimizer.step()
    return params, [optimizer.state[p] for p in params]


def check_adam(kind, dtype=torch.float32, **options):
    "Weights, codes and scales are those of bitsandbytes."
    bnb = pytest.importorskip("bitsandbytes")
    options = dict(lr=1e-2) | options
    (ours, mine), (theirs, other) = (stepped(lambda ps: k(ps, **options), dtype=dtype)
                                     for k in (kind, bnb.optim.AdamW8bit))
    for p, q, s, t in zip(ours, theirs, mine, other):
        assert apart(p.detach(), q.detach()) <= 1e-6, "weights"
        assert s["step"] == t["step"] and s.keys() == t.keys() - {"qmap1", "qmap2"}
        for key in s.keys() - {"step"}:
            same = torch.equal(s[key], t[key]) if p.numel() >= 4096 else apart(s[key], t[key]) < 1e-6
            assert s[key].dtype is t[key].dtype and same, key


@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.0), dict(betas=(0.8, 0.95), eps=1e-4, lr=1e-3),
                                     dict(dtype=torch.bfloat16)], ids=str)
def test_adam_equals_bitsandbytes(options): check_adam(AdamW8bit, **options)


MISTAKES = {
    "v with signs": lambda x, signed=True: blockwise(x),
    "m without": lambda x, signed=True: blockwise(x.abs(), False),
    "one scale for all": lambda x, signed=True: (lambda c, s: (c, s * 0 + s.max()))(*blockwise(x, signed)),
    "blocks of 128": lambda x, signed=True: blockwise(F.pad(x.flatten(), (128, 0)), signed),
    "rounded down": lambda x, signed=True: (lambda c, s: (c.clamp(min=1) - 1, s))(*blockwise(x, signed))}

@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_averages_are_rejected(mistake, monkeypatch):
    monkeypatch.setattr(module, "blockwise", MISTAKES[mistake])
    with pytest.raises((AssertionError, RuntimeError)): check_adam(AdamW8bit)


def test_wrong_steps_are_rejected():
    class DecaysTheGradient(AdamW8bit):
        def _update(self, p, group):
            p.grad = p.grad + group["weight_decay"] * p
            super()._update(p, group | dict(weight_decay=0.0))
    class Smaller(AdamW8bit):
        def _update(self, p, group): super()._update(p, group | dict(smallest=1))
    for wrong in (DecaysTheGradient, Smaller):
        with pytest.raises(AssertionError): check_adam(wrong)


def test_it_goes_on_where_it_was_stopped():
    def resumed(load):
        def between(old, params):
            new = AdamW8bit(params, lr=1e-2)
            load(new, copy.deepcopy(old.state_dict()))
            return new
        whole, halves = (stepped(lambda ps: AdamW8bit(ps, lr=1e-2), dtype=torch.bfloat16, between=b)
                         for b in (lambda o, ps: o, between))
        same = all(map(torch.equal, whole[0], halves[0]))
        return same and all(torch.equal(s[k], t[k]) for s, t in zip(whole[1], halves[1]) for k in s if k != "step")
    assert resumed(lambda new, state: new.load_state_dict(state))
    try: same = resumed(lambda new, state: torch.optim.Optimizer.load_state_dict(new, state))
    except IndexError: same = False
    assert not same, "torch's own makes floats of codes"


def test_a_closure_and_groups():
    a, b = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    optimizer = AdamW8bit([dict(params=[a], lr=0.1), dict(params=[b], lr=0.0, weight_decay=0.0)])
    def closure():
        optimizer.zero_grad()
        loss = (a.square() + b.square()).sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 8192 and not a.eq(1).any() and b.eq(1).all()


@pytest.mark.parametrize("wrong", [dict(lr=-1), dict(betas=(0.9, 1.0)), dict(eps=0), dict(weight_decay=-1),
                                   dict(lr=float("nan"))], ids=str)
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(InputError, match="give"): AdamW8bit([torch.nn.Parameter(torch.ones(3))], **wrong)


def test_what_cannot_be_packed_is_refused_before_the_work(monkeypatch):
    dense = Decoder.from_transformers(small_model("llama", 0))               # 48 columns
    with pytest.raises(InputError, match="48 columns"): qlora(dense)
    with pytest.raises(InputError, match="48"): sizes(dense.config)
    monkeypatch.setattr(module, "quantize", None)
    with pytest.raises(InputError, match="no matrix"): qlora(dense, LoRAConfig(targets=("q_prj",)))
    with pytest.raises(InputError, match="adapter already"): qlora(adapt(dense))
    with pytest.raises(InputError, match="as it is"): qlora(quantize(dense, "int8", in_blocks))
    assert adapter(adapt(quantize(dense, "int8", in_blocks)))
