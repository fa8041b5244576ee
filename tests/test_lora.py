"""Adapters against peft on models of many shapes, around every weight format, in peft's files and in llama.cpp's, with
the usual mistakes planted."""
import copy
import json
import math
import os
import shutil
import signal
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import small_model
from llm_workbench import Decoder
from llm_workbench.architecture.matrices import Linear, swapped
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import CheckpointError, InputError, SourceError, UnsupportedError
from llm_workbench.files.safetensors import SafetensorsFile, save_safetensors
from llm_workbench.finetuning import lora as module
from llm_workbench.finetuning.lora import (
    CONFIG, SEVEN, WEIGHTS, Adapted, LoRAConfig, adapt, adapter, count, gguf_tensors, load_adapter, merged,
    save_adapter, start_of, trainable, without, write_gguf_adapter)
from llm_workbench.quantization.formats import FORMATS, hold, quantize
from llm_workbench.quantization.gguf_writing import gguf_parts, save_gguf

warnings.filterwarnings("ignore", category=FutureWarning)
peft = pytest.importorskip("peft")
TOKENS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
KINDS = dict(lora={}, rslora=dict(rslora=True), dora=dict(dora=True), pissa=dict(init="pissa"))
# grouped heads, biases and tied weights, norms of queries, a plain MLP under other names, experts, a shared expert
FAMILIES = [("llama", 0), ("llama", 1), ("qwen2", 0), ("gemma2", 0), ("phi", 1), ("mixtral", 0), ("qwen2_moe", 0)]


def decoder_of(family="llama", variant=0): return Decoder.from_transformers(small_model(family, variant))


def moved(decoder, seed=0, by=0.05):
    "The adapter away from its start."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(decoder).values(): p.add_(torch.randn(p.shape, generator=g) * by)
    return decoder


def apart(a, b): return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def loss_of(logits): return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


# ---- peft

def by_peft(model, config, their_targets):
    init = True if config.init == "default" else config.init
    settings = peft.LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules=their_targets,
                               init_lora_weights=init, lora_dropout=config.dropout, use_rslora=config.rslora,
                               use_dora=config.dora, task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(model), settings)


def named(model):
    "What learns in a model of peft, by the names of its files."
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    return {n.removesuffix(".weight") if "magnitude" in n else n: p for n, p in named.items()}


def their_targets(decoder, config):
    return module.settings_of(adapt(decoder, config), None)["target_modules"]


CALM = 0.3


def stepped(both, mine, them, run, steps, optimizer):
    """Train two models side by side; relative differences of outputs and of gradients in the first step, and of what
    the steps made."""
    optimizers, found = [optimizer(t.values()) for t in (mine, them)], {}
    def all_apart(of): return apart(*(torch.cat([of(t[n]).flatten() for n in mine]) for t in (mine, them)))
    for step in range(steps):
        outs = []
        for model, optimizer in zip(both, optimizers):
            optimizer.zero_grad()
            torch.manual_seed(step)                          # of dropout
            outs.append(run(model))
        if not step: found = dict(outputs=apart(*outs), gradients=all_apart(lambda p: p.grad))
        for optimizer in optimizers: optimizer.step()
    return found | dict(adapter=all_apart(lambda p: p.detach()))


def check_peft(family, variant, steps=3, **changes):
    "A model's outputs, gradients and steps are peft's."
    model = small_model(family, variant)
    with torch.no_grad():                                    # calm: rounding is not what is compared here
        for p in model.parameters(): p.mul_(CALM if p.ndim > 1 else 1)
    base, config = Decoder.from_transformers(model), LoRAConfig(r=3, alpha=5.0, **changes)
    ours, other = adapt(base, config), by_peft(model, config, their_targets(base, config))
    mine, them = adapter(moved(ours)), named(other)
    assert mine.keys() == them.keys()
    with torch.no_grad():
        for name, p in mine.items(): them[name].copy_(p)
    ours.train(), other.train()
    def run(m):
        out = m(TOKENS) if m is ours else m(TOKENS).logits
        loss_of(out).backward()
        return out.detach()
    # Adam divides by a gradient's own size: what is nothing but rounding becomes a whole step. So it is compared in
    # double, below.
    found = stepped((ours, other), mine, them, run, steps, lambda params: torch.optim.SGD(params, lr=0.1))
    limit = 3e-6 if config.init == "pissa" else 1e-6         # peft rounds the remainder of PiSSA
    assert all(v <= limit for v in found.values()), found


def check_matrix(dtype=torch.float64, limit=1e-12, shape=(48, 30), bias=True, steps=3, **changes):
    "One adapted matrix is peft's, in double precision: the same formula, and no more."
    torch.manual_seed(0)
    inner = nn.Linear(*shape[::-1], bias)
    base, config = Linear(*shape[::-1], bias).requires_grad_(False), LoRAConfig(r=3, alpha=5.0, **changes)
    base.load_state_dict(inner.state_dict())
    init = True if config.init == "default" else config.init
    settings = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=["q_proj"], init_lora_weights=init,
                               use_dora=config.dora, lora_dropout=config.dropout, use_rslora=config.rslora)
    other = peft.inject_adapter_in_model(settings, nn.ModuleDict(dict(q_proj=inner))).q_proj
    ours, other = Adapted(base, config, *start_of(base, config, torch.Generator())).to(dtype), other.to(dtype)
    if config.init == "pissa":                               # peft keeps the remainder in float32
        other.base_layer.weight.data = base.dense(dtype) - config.scale * ours.B0 @ ours.A0
    mine, them = trainable(moved(ours)), named(other)
    short = dict(lora_A="A", lora_B="B", lora_magnitude_vector="magnitude")
    them = {short[n.split(".")[0]]: p for n, p in them.items()}
    x = torch.randn(2, 7, shape[1], dtype=dtype)
    with torch.no_grad():
        for name, p in mine.items(): them[name].copy_(p)
    ours.train(), other.train()
    def run(m):
        given = x.clone().requires_grad_()
        out = m(given, REFERENCE) if m is ours else m(given)
        out.sin().sum().backward()
        return torch.cat([out.detach().flatten(), given.grad.flatten()])
    found = stepped((ours, other), mine, them, run, steps, lambda params: torch.optim.AdamW(params, lr=1e-3))
    assert all(v <= limit for v in found.values()), found


CASES = [(*f, kind) for f in FAMILIES for kind in KINDS if f[0] in ("llama", "mixtral") or kind in ("lora", "dora")]

@pytest.mark.parametrize("family, variant, kind", CASES, ids=str)
def test_models_equal_peft(family, variant, kind): check_peft(family, variant, **KINDS[kind])


MIXED = [*KINDS.values(), dict(dropout=0.3), dict(dropout=0.3, dora=True), dict(dora=True, rslora=True),
         dict(dora=True, rslora=True, init="pissa", dropout=0.1)]

@pytest.mark.parametrize("changes", MIXED, ids=str)
def test_a_matrix_equals_peft(changes):
    for shape, bias in (((48, 30), True), ((5, 48), False), ((3, 3), True)):
        check_matrix(shape=shape, bias=bias, **changes)
        check_matrix(torch.float32, 1e-6, shape, bias, **changes)


def test_the_starts_are_peft_s():
    model = small_model("llama")
    base = Decoder.from_transformers(model)
    A = torch.cat([m.A.detach().flatten() * m.A.shape[1] ** 0.5 for m in module.find_adapted(adapt(base)).values()])
    assert A.abs().max() <= 1 and abs(A.std() - 3 ** -0.5) < 0.02, "uniform within 1 / sqrt(in)"
    gaussian = module.find_adapted(adapt(base, LoRAConfig(init="gaussian")))
    A = torch.cat([m.A.detach().flatten() * 8 for m in gaussian.values()])
    assert abs(A.std() - 1) < 0.03 and A.abs().max() > 3, "normal, 1 / r"
    mine = adapter(adapt(base, LoRAConfig(r=5, init="pissa")))
    them = named(by_peft(model, LoRAConfig(r=5, init="pissa"), list(SEVEN)))
    for name in mine:                                        # up to the sign of each direction
        assert torch.allclose(mine[name].abs(), them[name].abs(), atol=1e-4), name
    one, two, three = (adapter(adapt(base, seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one) and not all(torch.equal(one[n], three[n]) for n in one)


# ---- what an adapter is

def check_identity(family="llama", variant=0, exact=True, **changes):
    "At the start nothing changes; then everything learns, and nothing else."
    base = decoder_of(family, variant)
    before = base(TOKENS).detach()
    new = adapt(base, LoRAConfig(r=3, **changes))
    with torch.no_grad(): assert torch.equal(new(TOKENS), before) if exact else apart(new(TOKENS), before) < 1e-5
    names = {n.rpartition(".")[2] for n in trainable(new)}
    want = {"A", "B"} | ({"magnitude"} if changes.get("dora") else set())
    assert names == want, f"trainable: {sorted(trainable(new))[:3]}"
    optimizer = torch.optim.SGD(trainable(new).values(), lr=0.1)
    for step in range(2):
        loss_of(new(TOKENS)).backward()
        for name, p in trainable(new).items():
            waits = name.endswith("A") and not step and changes.get("init") != "pissa"       # B is still zero
            assert (p.grad.abs().max() > 0) != waits, f"gradient of {name} in step {step}"
        optimizer.step(), optimizer.zero_grad()
    assert apart(new(TOKENS), before) > 1e-3, "it learns"
    assert torch.equal(base(TOKENS), before) and all(p.requires_grad and p.grad is None for p in base.parameters())
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_identity_and_what_learns(kind): check_identity(exact=kind in ("lora", "rslora"), **KINDS[kind])


def check_eval(**changes):
    "Dropout only in training; what was in eval comes back in eval, and the other way round."
    base = decoder_of()
    new = moved(adapt(base, LoRAConfig(dropout=0.5, **changes)))
    with torch.no_grad():
        assert not new.training and torch.equal(new(TOKENS), new(TOKENS)), "random in eval"
        assert apart(merged(new)(TOKENS), new(TOKENS)) < 1e-5, "something is left out in eval"
        new.train()
        assert not torch.equal(new(TOKENS), new(TOKENS)), "nothing is left out in training"
    assert adapt(base.train()).layers[0].self_attn.q_proj.training


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_for_training(kind): check_eval(**KINDS[kind])


def packable():
    found = []
    for name, format in FORMATS.items():
        if name.startswith(("iq1", "iq2")): continue         # the library takes ten seconds to make their tables
        try: format.pack(torch.randn(2, 256))
        except (InputError, UnsupportedError): continue      # it needs an importance, or is only read
        found.append(name)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_pass_through_every_format(kind, bias):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    dense, x, to = Linear(256, 8, bias).requires_grad_(False), torch.randn(3, 256), torch.randn(3, 8)
    if bias: dense.bias.normal_(generator=g)
    for name in packable():
        base = hold(dense, FORMATS[name].pack(dense.dense()), torch.float32)
        config = LoRAConfig(r=2, **KINDS[kind])
        matrix = moved(Adapted(base, config, *start_of(base, config, g)))
        found = []
        for weight in (None, matrix.dense().detach()):
            inner = x.clone().requires_grad_()
            out = matrix(inner, REFERENCE) if weight is None else F.linear(inner, weight, dense.bias)
            (out * to).sum().backward()
            found.append((out.detach(), inner.grad))
        assert apart(found[0][0], found[1][0]) < 1e-5 and apart(found[0][1], found[1][1]) < 1e-5, name
        ids = torch.tensor([[3, 0], [7, 3]])
        assert torch.allclose(matrix.rows(ids), matrix.dense()[ids], atol=1e-5), name
        assert (matrix.dtype, matrix.device, matrix.bias) == (torch.float32, torch.device("cpu"), base.bias)


@pytest.mark.parametrize("format", ["int4_g32", "nf4", "q8_0"])
def test_a_packed_decoder_learns_in_all_its_layers(format):
    source = dict(model_type="llama", vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rope_parameters=dict(
                      rope_type="default", rope_theta=1e4))
    from llm_workbench.families.table import read_config
    torch.manual_seed(0)
    base = quantize(Decoder(read_config(source)), format)
    new = moved(adapt(base, LoRAConfig(r=2, dora=True)))
    loss_of(new(TOKENS)).backward()
    assert all(p.grad.abs().max() > 0 for p in trainable(new).values())
    assert count(new)[1] == count(base)[1] + count(new)[0] and count(base)[1] > 97 * 64
    with torch.no_grad():
        whole, cache = new(TOKENS), new.new_cache()
        parts = [new(TOKENS[:, :4], cache), new(TOKENS[:, 4:], cache)]
        assert apart(torch.cat(parts, 1), whole) < 1e-5
        assert apart(new.with_ops(TORCH)(TOKENS), whole) < 1e-5
        from llm_workbench.lobby import fastest_ops
        assert apart(new.with_ops(fastest_ops())(TOKENS), whole) < 1e-4, "the kernels leave an adapter to itself"


@torch.no_grad()
def test_sixteen_bits():
    base = decoder_of().to(torch.bfloat16)
    new = moved(adapt(base, LoRAConfig(r=3)))
    assert {p.dtype for p in trainable(new).values()} == {torch.float32}, "adapters are kept in float32, as by peft"
    assert new(TOKENS).dtype == torch.bfloat16 and merged(new).layers[0].self_attn.q_proj.dtype == torch.bfloat16
    assert apart(merged(new)(TOKENS).float(), new(TOKENS).float()) < 0.05


# ---- merging

def check_merge(family="llama", variant=0, **changes):
    new = moved(adapt(decoder_of(family, variant), LoRAConfig(r=3, **changes)))
    with torch.no_grad():
        want, plain = new(TOKENS), merged(new)
        assert apart(want, without(new)(TOKENS)) > 1e-2, "the adapter does something"
        assert apart(plain(TOKENS), want) <= 1e-5, "merged is not adapted"
    for twice in (merged, without, adapter):
        with pytest.raises(InputError, match="no adapter"): twice(plain)
    return new


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, variant", FAMILIES, ids=str)
def test_merged_is_adapted(family, variant, kind): check_merge(family, variant, **KINDS[kind])


@torch.no_grad()
def test_without_is_the_base_bit_for_bit():
    for kind in KINDS.values():
        base = decoder_of("qwen2")
        new = without(moved(adapt(base, LoRAConfig(r=3, **kind))))
        theirs, mine = dict(base.named_parameters()), dict(new.named_parameters())
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
        assert torch.equal(new(TOKENS), base(TOKENS)) and not trainable(new)


@torch.no_grad()
def test_merged_into_formats():
    matrix = Linear(64, 32).requires_grad_(False)
    packed = hold(matrix, FORMATS["int4_g32"].pack(matrix.dense()), torch.float32)
    holder = nn.ModuleDict(dict(q_proj=packed, o_proj=matrix))
    config = LoRAConfig(r=2)
    make = lambda name, m: Adapted(m, config, *start_of(m, config, torch.Generator()))
    new = moved(swapped(holder, make))
    for format, kinds in ((None, (Linear, Linear)), ("same", ("int4_g32", Linear)), ("q8_0", ("q8_0", "q8_0"))):
        for (name, old), kind in zip(new.items(), kinds):
            got = merged(new, format)[name]
            assert type(got) is Linear if kind is Linear else got.format.name == kind
            assert torch.equal(got.dense(), old.dense() if kind is Linear else FORMATS[kind].pack(old.dense()).unpack())
            assert torch.equal(got.bias, old.bias)
    with pytest.raises(InputError, match="int9"): merged(new, "int9")
    new.q_proj.B[0, 0] = math.nan
    with pytest.raises(InputError, match="NaN"): merged(new)


# ---- mistakes

def scaled_by_alpha(self): return self.alpha
def unstable_scale(self): return self.alpha / self.r
def both_zero(base, config, generator):
    A, B = start_of(base, config, generator)
    return torch.zeros_like(A), B
def attached(self, total, rows=slice(None)):
    total = self.summed(self.base.dense(self.A.dtype), rows)            # with its gradient
    return self.magnitude[rows] / total.norm(dim=-1)
def always_drops(self, x, ops):
    before, self.training = self.training, True
    try: return FORWARD(self, x, ops)
    finally: self.training = before
def base_learns(decoder): return swapped(decoder, lambda name, m: m)
def added_twice(self, dtype=None):
    once = DENSE(self, torch.float32)
    return (2 * once - self.base.dense(torch.float32)).to(dtype or self.dtype)
def keeps_the_start(self, base, rows=slice(None)): return base + self.config.scale * (self.B[rows] @ self.A)
def in_training(self, *args):
    INIT(self, *args)
    self.train()
FORWARD, DENSE, INIT = Adapted.forward, Adapted.dense, Adapted.__init__

MISTAKES = {
    "scale without the rank": (LoRAConfig, "scale", property(scaled_by_alpha), lambda: check_matrix()),
    "rsLoRA by the rank": (LoRAConfig, "scale", property(unstable_scale), lambda: check_matrix(rslora=True)),
    "A and B zero": (module, "start_of", both_zero, lambda: check_identity()),
    "norm not detached": (Adapted, "factors", attached, lambda: check_matrix(dora=True)),
    "norm not detached, in a model": (Adapted, "factors", attached, lambda: check_peft("llama", 0, dora=True)),
    "dropout in eval": (Adapted, "forward", always_drops, lambda: check_eval()),
    "born in training": (Adapted, "__init__", in_training, lambda: check_eval()),
    "base learns": (module, "frozen", base_learns, lambda: check_identity()),
    "merged twice": (Adapted, "dense", added_twice, lambda: check_merge()),
    "PiSSA's start is kept": (Adapted, "summed", keeps_the_start, lambda: check_merge(init="pissa")),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_noticed(monkeypatch, mistake):
    owner, name, wrong, check = mistake
    check()
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError): check()


# ---- what cannot be adapted

BAD = {
    "r": (dict(r=0), InputError), "r as text": (dict(r="8"), InputError), "r true": (dict(r=True), InputError),
    "alpha": (dict(alpha=math.nan), InputError), "alpha zero": (dict(alpha=0), InputError),
    "dropout": (dict(dropout=1.0), InputError), "init": (dict(init="olora"), InputError),
    "targets as text": (dict(targets="q_proj"), InputError), "no targets": (dict(targets=()), InputError),
    "unknown": (dict(targets=("q_porj",)), InputError),
    "embedding": (dict(targets=("embed_tokens",)), UnsupportedError),
    "experts": (dict(targets=("q_proj", "experts.down_proj")), UnsupportedError),
    "rank of PiSSA": (dict(r=99, init="pissa"), InputError),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_cannot_be_adapted_is_said(case):
    changes, error = case
    with pytest.raises(error): adapt(decoder_of("mixtral"), LoRAConfig(**changes))


def test_tied_heads_adapters_on_adapters_and_packing_over_them():
    tied, free = decoder_of("llama", 1), decoder_of("llama", 0)
    with pytest.raises(UnsupportedError, match="embedding"): adapt(tied, LoRAConfig(targets=("lm_head",)))
    new = adapt(free, LoRAConfig(targets=("lm_head",)))
    assert list(trainable(new)) == ["lm_head.A", "lm_head.B"] and type(new.embed_tokens) is Linear
    with pytest.raises(InputError, match="already"): adapt(new)
    with pytest.raises(InputError, match="merge"): quantize(new, "int8")
    packed = quantize(new, FORMATS["int8"], lambda name, m: name.endswith(".base"))
    assert isinstance(packed.lm_head, Adapted) and packed.lm_head.base.format.name == "int8"
    for call in (merged, without, adapter): pytest.raises(InputError, call, free)
    assert count(free) == (sum(p.numel() for p in free.parameters()),) * 2


# ---- files

FILES = [("llama", 1, kind) for kind in KINDS] + [("phi", 1, "dora"), ("phi", 1, "pissa"), ("mixtral", 0, "rslora")]

@pytest.mark.parametrize("family, variant, kind", FILES, ids=str)
def test_files_go_both_ways(family, variant, kind, tmp_path):
    model = small_model(family, variant)
    base, config = Decoder.from_transformers(model), LoRAConfig(r=3, alpha=5.0, dropout=0.1, **KINDS[kind])
    ours = moved(adapt(base, config))
    save_adapter(ours, tmp_path / "ours", "someone/base")
    settings = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert settings["base_model_name_or_path"] == "someone/base" and settings["inference_mode"] is True
    with torch.no_grad():
        want = ours(TOKENS)
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert apart(opened(TOKENS).logits, want) < 5e-6
        again = load_adapter(base, tmp_path / "ours")
        assert apart(again(TOKENS), want) < 5e-6 and again.layers[0].self_attn.q_proj.config.dropout == 0.1
        other = by_peft(model, config, settings["target_modules"]).eval()
        for i, p in enumerate(named(other).values()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
        other.save_pretrained(tmp_path / "theirs")
        assert apart(load_adapter(base, tmp_path / "theirs")(TOKENS), other(TOKENS).logits) < 5e-6
    assert set(trainable(again)) == set(trainable(adapt(base, config)))


@torch.no_grad()
def test_some_matrices_of_some_layers(tmp_path):
    model = small_model("llama")
    base = Decoder.from_transformers(model)
    ours = moved(adapt(base, LoRAConfig(r=2, targets=("layers.1.self_attn.q_proj", "v_proj", "lm_head"))))
    save_adapter(ours, tmp_path / "a")
    targets = json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"]
    assert sorted(targets) == ["lm_head", "model.layers.1.self_attn.q_proj", "v_proj"]
    again = load_adapter(base, tmp_path / "a")
    assert torch.equal(again(TOKENS), ours(TOKENS)) and trainable(again).keys() == trainable(ours).keys()
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")
    assert apart(opened(TOKENS).logits, ours(TOKENS)) < 1e-6
    for targets in ("all-linear", r".*\.(q|up)_proj"):                # a pattern and a word, as peft writes them
        other = by_peft(model, LoRAConfig(r=2), targets)
        for p in named(other).values(): p.add_(torch.randn(p.shape) * 0.05)
        other.save_pretrained(tmp_path / "b")
        assert apart(load_adapter(base, tmp_path / "b")(TOKENS), other(TOKENS).logits) < 1e-6
    packed = quantize(base, FORMATS["int8"])
    assert load_adapter(packed, tmp_path / "a").lm_head.base.format.name == "int8", "over packed matrices, too"


@torch.no_grad()
def test_fused_matrices_have_no_names_in_peft_s_files(tmp_path):
    model = small_model("phi3")
    base = Decoder.from_transformers(model)
    new = moved(adapt(base, LoRAConfig(targets=("q_proj", "down_proj"))))
    for refused in (lambda: adapter(new), lambda: save_adapter(new, tmp_path / "a"),
                    lambda: write_gguf_adapter(new, tmp_path / "a")):
        with pytest.raises(UnsupportedError, match="merge"): refused()
    assert not list(tmp_path.iterdir())
    assert apart(Decoder.from_transformers(merged(new).to_transformers())(TOKENS), new(TOKENS)) < 1e-5
    by_peft(model, LoRAConfig(), ["qkv_proj"]).save_pretrained(tmp_path / "b")
    with pytest.raises(CheckpointError, match="qkv_proj"): load_adapter(base, tmp_path / "b")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base, folder = decoder_of(), tmp_path_factory.mktemp("saved") / "a"
    save_adapter(moved(adapt(base, LoRAConfig(r=3, targets=("q_proj", "o_proj")))), folder)
    return base, folder


def settings(**changes):
    def spoil(folder): (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))
    return spoil

def tensors(change):
    def spoil(folder):
        found = {n: t.clone() for n, t in SafetensorsFile(folder / WEIGHTS).items()}
        save_safetensors(change(found), folder / WEIGHTS)
    return spoil

def cut(name): return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])
def gone(name): return lambda folder: (folder / name).unlink()
ONE = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"

SPOILED = {
    "no settings": (gone(CONFIG), SourceError), "no weights": (gone(WEIGHTS), SourceError),
    "cut settings": (cut(CONFIG), CheckpointError), "cut weights": (cut(WEIGHTS), CheckpointError),
    "rank": (settings(r=4), CheckpointError), "no rank": (settings(r="three"), CheckpointError),
    "alpha": (settings(lora_alpha=None), CheckpointError), "kind": (settings(peft_type="LOHA"), UnsupportedError),
    "no kind": (settings(peft_type=None), UnsupportedError), "dora": (settings(use_dora=True), CheckpointError),
    "whole matrices": (settings(modules_to_save=["lm_head"]), UnsupportedError),
    "ranks": (settings(rank_pattern={"q_proj": 4}), UnsupportedError), "bias": (settings(bias="all"), UnsupportedError),
    "changed base": (settings(init_lora_weights="olora"), UnsupportedError),
    "another start": (settings(init_lora_weights=["x"]), UnsupportedError),
    "random start": (settings(init_lora_weights="pissa_niter_4"), UnsupportedError),
    "pattern": (settings(target_modules="(q_proj"), CheckpointError),
    "more is meant": (settings(target_modules=["q_proj", "o_proj", "v_proj"]), CheckpointError),
    "pattern means more": (settings(target_modules=r".*_proj"), CheckpointError),
    "missing": (tensors(lambda t: {n: v for n, v in t.items() if n != ONE}), CheckpointError),
    "a layer is missing": (tensors(lambda t: {n: v for n, v in t.items() if "layers.1" not in n}), CheckpointError),
    "foreign": (tensors(lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2, 2)}), CheckpointError),
    "no such matrix": (tensors(lambda t: t | {ONE.replace("layers.1", "layers.9"): t[ONE]}), CheckpointError),
    "shape": (tensors(lambda t: t | {ONE: t[ONE].T.contiguous()}), CheckpointError),
    "NaN": (tensors(lambda t: t | {ONE: t[ONE] * math.nan}), CheckpointError),
    "whole numbers": (tensors(lambda t: t | {ONE: t[ONE].int()}), CheckpointError),
    "empty": (tensors(lambda t: {}), CheckpointError),
    "pickled": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), SourceError),
}


@pytest.mark.parametrize("case", SPOILED.values(), ids=SPOILED)
def test_spoiled_files_end_in_one_error(case, saved, tmp_path):
    spoil, error = case
    base, folder = saved
    shutil.copytree(folder, tmp_path / "a")
    load_adapter(base, tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(error) as e: load_adapter(base, tmp_path / "a")
    assert len(str(e.value)) > 20 and "\n" not in str(e.value)


def test_another_base_is_noticed_by_its_shapes(saved):
    with pytest.raises(CheckpointError, match="base"): load_adapter(decoder_of("qwen2"), saved[1])
    with pytest.raises(CheckpointError, match="base"): load_adapter(decoder_of("gpt_neox"), saved[1])


def test_saving_is_all_or_nothing(saved, tmp_path, monkeypatch):
    "Interrupted anywhere, the old adapter is still there, and nothing lies around."
    base, folder = saved[0], tmp_path / "a"
    old, new = (moved(adapt(base, LoRAConfig(r=r, targets=("q_proj",)))) for r in (2, 5))
    save_adapter(old, folder)
    (folder / "README.md").write_text("mine")
    for owner, name in ((module, "save_safetensors"), (module, "replace_file"), (module, "exchange"), (shutil, "copy2"),
                        (json, "dumps")):
        with monkeypatch.context() as m:
            m.setattr(owner, name, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt): save_adapter(new, folder)
        assert load_adapter(base, folder).layers[0].self_attn.q_proj.config.r == 2
        assert [p.name for p in tmp_path.iterdir()] == ["a"], name
    save_adapter(new, folder)
    assert load_adapter(base, folder).layers[0].self_attn.q_proj.config.r == 5
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"} and [*tmp_path.iterdir()] == [folder]
    with monkeypatch.context() as m:                                   # a system without an exchange
        m.setattr(module.ctypes, "CDLL", lambda *a: object())
        save_adapter(old, folder)
        assert load_adapter(base, folder).layers[0].self_attn.q_proj.config.r == 2 and [*tmp_path.iterdir()] == [folder]
    (folder / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="optimizer.pt"): save_adapter(new, folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"): save_adapter(new, tmp_path / "file")
    with pytest.raises(SourceError): save_adapter(new, tmp_path / "file" / "below")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving(saved, tmp_path):
    "A process that saves two adapters in turn is killed at eight moments: what is there is one of the two, whole."
    base, folder = saved[0], tmp_path / "a"
    both = [moved(adapt(base, LoRAConfig(r=r, alpha=r, targets=("q_proj",)))) for r in (2, 5)]
    save_adapter(both[0], folder)
    for i in range(8):
        if not (child := os.fork()):
            try:
                while True:
                    for one in both: save_adapter(one, folder)
            finally: os._exit(0)
        time.sleep(0.02 + 0.013 * i)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = load_adapter(base, folder)
        want = next(m for m in both if m.layers[0].self_attn.q_proj.config == found.layers[0].self_attn.q_proj.config)
        assert all(torch.equal(p, adapter(want)[n]) for n, p in adapter(found).items())


# ---- llama.cpp

def check_gguf(family, variant=0, **changes):
    "What a GGUF has of the merged model is what it has of the base, plus the product of the adapter's tensors."
    base = decoder_of(family, variant)
    new = moved(adapt(base, LoRAConfig(r=3, alpha=5.0, **changes)))
    before, after, parts = gguf_parts(base), gguf_parts(merged(new)), gguf_tensors(new)
    scale = module.find_adapted(new)["layers.0.self_attn.q_proj"].config.scale
    names = {n.removesuffix(".lora_a") for n in parts if n.endswith(".lora_a")}
    changed = {n for n in before if not torch.equal(before[n].read(torch.float32), after[n].read(torch.float32))}
    assert names == changed, "an adapter for what has changed"
    for name in names:
        want = before[name].read(torch.float32) + scale * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
        same = torch.allclose(after[name].read(torch.float32), want, atol=1e-5)
        assert same, f"{name} differs: its rows are in another order"


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GGUFS = [("llama", 0), ("llama", 1), ("qwen2", 0), ("gemma2", 0), ("granite", 0), ("smollm3", 0), ("olmo", 0),
         ("phi", 1), ("mixtral", 0), ("qwen3", 0), ("stablelm", 0), ("cohere", 0), ("qwen2_moe", 0), ("deepseek_v2", 1)]

@torch.no_grad()
@pytest.mark.parametrize("family, variant", GGUFS, ids=str)
def test_gguf_tensors(family, variant):
    check_gguf(family, variant, targets=ATTENTION if family != "deepseek_v2" else ("q_proj", "o_proj", "q_a_proj"))


def unturned(decoder):
    right, found = TENSORS(decoder), module.find_adapted(decoder)
    for i, x in ((i, x) for i in range(3) for x in "qk"):
        right[f"blk.{i}.attn_{x}.weight.lora_b"] = found[f"layers.{i}.self_attn.{x}_proj"].B.detach()
    return right
TENSORS = gguf_tensors

@torch.no_grad()
def test_rows_in_the_wrong_order_are_noticed(monkeypatch):
    monkeypatch.setitem(globals(), "gguf_tensors", unturned)
    with pytest.raises(AssertionError, match="order"): check_gguf("llama")


def llama_cpp_logits(path, lora=None):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), lora_path=lora and str(lora), logits_all=True, n_ctx=64, n_batch=64, n_threads=1,
                            n_threads_batch=1, type_k=0, type_v=0, verbose=False)
    model.eval(TOKENS[0].tolist())
    found = torch.tensor(model.scores[:TOKENS.shape[1]].copy())
    model.close()
    return found


IN_LLAMA_CPP = [("llama", 0, "lora"), ("llama", 1, "pissa"), ("qwen2", 0, "rslora"), ("qwen3", 1, "lora"),
                ("granite", 0, "rslora"), ("mixtral", 1, "pissa")]

@pytest.mark.parametrize("family, variant, kind", IN_LLAMA_CPP, ids=str)
@torch.no_grad()
def test_llama_cpp_computes_the_same(family, variant, kind, tmp_path):
    base = decoder_of(family, variant)
    new = moved(adapt(base, LoRAConfig(r=3, alpha=5.0, **KINDS[kind])))
    path = save_gguf(base, tmp_path / "base.gguf", "F32").path
    write_gguf_adapter(new, tmp_path / "lora.gguf")
    cpp, want = llama_cpp_logits(path, tmp_path / "lora.gguf"), new(TOKENS)[0]
    error, effect = apart(cpp, want), apart(base(TOKENS)[0], want)
    assert error < max(1e-5, 2 * apart(llama_cpp_logits(path), base(TOKENS)[0])) and effect > 100 * error


def test_what_a_gguf_adapter_cannot_say(tmp_path):
    base = decoder_of()
    lengths = adapt(base, LoRAConfig(dora=True))
    with pytest.raises(UnsupportedError, match="DoRA"): write_gguf_adapter(lengths, tmp_path / "a")
    homeless = Decoder(base.config)
    with pytest.raises(UnsupportedError, match="family"): write_gguf_adapter(adapt(homeless), tmp_path / "a")
    with pytest.raises(InputError): write_gguf_adapter(base, tmp_path / "a")
    assert adapter(adapt(homeless)).keys() == adapter(adapt(base)).keys(), "without a family, the names are Llama's"
    assert not list(tmp_path.iterdir())
