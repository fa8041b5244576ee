"""Checkpoints that other tools have quantized: every layout against the library that defines it or against plain
loops, whole models of several families, what is refused, and known-wrong readers that these comparisons must reject."""
import json
import logging
import math
import random
import warnings

import pytest
import torch
import wrappings as W
from models import EXPERTS, MLA, PLAIN, small_config, small_model

import llm_workbench as wb
from llm_workbench import Decoder
from llm_workbench.architecture.decoder import named_tensors
from llm_workbench.architecture.matrices import Matrix, Stack
from llm_workbench.errors import CheckpointError, UnsupportedError, WorkbenchError
from llm_workbench.families.loading import own_tensors
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.files.parts import LazyTensors, Part
from llm_workbench.files.safetensors import DTYPES
from llm_workbench.quantization import checkpoints
from llm_workbench.quantization.checkpoints import (
    METHODS,
    Grouped,
    PackedPart,
    as_wrapped,
    awq_codes,
    from_rows,
    gptq_zeros,
    plainest,
    rows_of,
    unwrapped,
)
from llm_workbench.quantization.formats import FORMATS, PackedMatrix, PackedStack
from llm_workbench.quantization.packing import Packed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def weight_of(O=64, I=96, seed=0):
    return torch.randn(O, I, generator=torch.Generator().manual_seed(seed)) * 0.1


def part_of(t): return Part(tuple(t.shape), NAMES[t.dtype], t.nbytes, lambda d: t if d is None else t.to(d), lambda: t)


def part(tensors, settings):
    "The part that a module's tensors become."
    return unwrapped(settings, {f"m.{leaf}": part_of(t) for leaf, t in tensors.items()}, "here")["m.weight"]


def reads(made, settings):
    "Whole, by rows and unpacked: what the loops say, to the bit; and the format of the whole."
    tensors, meant = made
    p = part(tensors, settings)
    packed = p.whole()
    plain = plainest(packed)
    assert torch.equal(packed.unpack(), meant) and torch.equal(plain.unpack(), meant)
    for dtype in (torch.float16, torch.bfloat16): assert torch.equal(p.read(dtype), meant.to(dtype))
    some = torch.tensor([5, 0, 5])
    assert torch.equal(packed[some].unpack(), meant[some]) and packed.nbytes == packed.format.nbytes(packed.shape)
    try: assert torch.equal(from_rows(p.type.format, p.shape, rows_of(packed)).unpack(), meant)
    except UnsupportedError: assert getattr(packed.format, "ordered", False)
    return plain.format


# --- GPTQ and AWQ, against loops --------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
def test_gptq(bits, symmetric, v1):
    weight, perm = weight_of(), torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    tensors, meant = W.gptq(weight[:32, :32], bits, 16, symmetric, v1, perm[:32] % 2)
    assert torch.equal(W.gptq_by_hand(tensors, bits, v1, 32, 32), meant), "the loops do not agree with the writer"
    for group, order, name in ((32, None, "_g32"), (None, None, "_row"), (32, perm, ""), (128, None, "_row")):
        made = W.gptq(weight, bits, group, symmetric, v1, order)
        format = reads(made, W.gptq_config(bits, group, symmetric, v1, order is not None))
        if order is not None: assert format.ordered
        elif (bits, name, symmetric) == (8, "_row", True): assert format is FORMATS["int8"]
        else: assert format.name == f"{'int' if symmetric else 'uint'}{bits}{name}"
        if format.name in FORMATS: assert format is FORMATS[format.name], "kernels know a format by its identity"
    reads(W.gptq(weight, bits, 32, symmetric, v1, g_idx=False), W.gptq_config(bits, 32, symmetric, v1))


def test_gptq_scales_of_other_types_and_a_last_group_that_is_short():
    weight = weight_of(32, 96)
    assert reads(W.gptq(weight, scale_dtype=torch.bfloat16), W.gptq_config()) is FORMATS["int4_g32"]
    assert isinstance(reads(W.gptq(weight, scale_dtype=torch.float32), W.gptq_config()), Grouped)
    assert isinstance(reads(W.gptq(weight, group=64), W.gptq_config(group=64)), Grouped)
    tiny, meant = W.gptq(weight * 1e-3, scale_dtype=torch.bfloat16)
    tiny["scales"] = (tiny["scales"].float() * 1e-7).bfloat16()           # below what float16 can hold
    packed = plainest(part(tiny, W.gptq_config()).whole())
    assert isinstance(packed.format, Grouped) and packed.unpack().abs().max() > 0


def test_dynamic_settings_of_gptqmodel():
    settings = W.gptq_config() | {"dynamic": {r"-:.*lm_head": {}, r"+:m\b": {"bits": 8, "group_size": 48}}}
    reads(W.gptq(weight_of(), 8, 48), settings)
    with pytest.raises(CheckpointError): reads(W.gptq(weight_of(), 4, 32), settings)


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_awq(group, symmetric):
    tensors, meant = W.awq(weight_of(16, 64), 32, symmetric)
    assert torch.equal(W.awq_by_hand(tensors, 32), meant), "the loops do not agree with the writer"
    format = reads(W.awq(weight_of(), group, symmetric), W.awq_config(group))
    assert format.name == f"{'int' if symmetric else 'uint'}4_{'g32' if group else 'row'}"


# --- compressed-tensors, FP8 and NVFP4, against loops -----------------------------------------------------------------

INTEGERS = [dict(bits=bits, symmetric=symmetric, strategy=strategy, packs=packs)
            for bits in (2, 3, 4, 5, 8) for symmetric in (True, False) for strategy in ("group", "channel", "tensor")
            for packs in ((True, False) if bits == 8 else (True,))]


def settings_of(bits=4, group=32, symmetric=True, strategy="group", packs=True, **more):
    return W.compressed_config("pack-quantized" if packs else "int-quantized", num_bits=bits, symmetric=symmetric,
                               strategy=strategy, group_size=group if strategy == "group" else None)


@pytest.mark.parametrize("case", INTEGERS, ids=lambda c: "-".join(map(str, c.values())))
def test_compressed_tensors(case):
    format = reads(W.compressed(weight_of(32, 64), **case), settings_of(**case))
    assert format.width == case["bits"] and format.symmetric == case["symmetric"]


def test_compressed_columns_in_an_order():
    "As llm-compressor wrote them until 2026: `weight_g_idx`."
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5)) // 32
    codes, scale, zero, which = W.rounded(weight_of(32, 64), 4, 32, True, order)
    tensors = dict(weight_packed=torch.tensor([W.stream(row, 4) for row in codes.tolist()], dtype=torch.int32),
                   weight_scale=scale, weight_shape=torch.tensor([32, 64]), weight_g_idx=order.int())
    assert reads((tensors, W.numbers(codes, scale, zero, which)), settings_of()).ordered


def test_compressed_rows_that_fill_no_whole_words():
    for bits, I in ((3, 50), (4, 9), (5, 33), (4, 36)):
        reads(W.compressed(weight_of(6, I), bits, strategy="channel"), settings_of(bits, strategy="channel"))


@pytest.mark.parametrize("shape", [(64, 96), (128, 128), (130, 300), (257, 129)], ids=str)
def test_fp8_blocks(shape):
    for block in ((128, 128), (64, 32), (1, 128)):
        made = W.fp8(weight_of(*shape), block)
        reads(made, W.fp8_config(block))
    reads(W.fp8(weight_of(*shape), (None, None)), W.fp8_config(None))
    assert reads(W.fp8(weight_of(*shape), scale_dtype=torch.bfloat16), W.fp8_config()) is FORMATS["fp8_block"]
    reads(W.fp8(weight_of(*shape), (128, 128), scale_dtype=torch.float8_e8m0fnu), W.fp8_config())
    reads(W.fp8(weight_of(*shape), (None, None), "weight_scale", torch.float8_e5m2), W.fp8_config(None))


@pytest.mark.parametrize("strategy, block", [("tensor", (None, None)), ("channel", (1, None)), ("group", (1, 32)),
                                             ("block", (64, 32))])
def test_float_quantized(strategy, block):
    made = W.fp8(weight_of(), block, "weight_scale", scale_dtype=torch.bfloat16)
    more = dict(block_structure=list(block)) if strategy == "block" else {}
    reads(made, W.compressed_config("float-quantized", num_bits=8, type="float", strategy=strategy,
                                    group_size=32 if strategy == "group" else None, **more))


NV = W.compressed_config("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)


def test_nvfp4(): assert reads(W.nvfp4(weight_of()), NV).bits((64, 1024)) < 4.54


# --- against the libraries --------------------------------------------------------------------------------------------

def test_compressed_tensors_by_its_own_library():
    pytest.importorskip("compressed_tensors", reason="pip install --no-deps compressed-tensors loguru")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    for case in INTEGERS:
        tensors, meant = W.compressed(weight_of(32, 64), **case)
        settings = settings_of(**case)
        weights = QuantizationArgs(**settings["config_groups"]["group_0"]["weights"])
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        theirs = BaseCompressor.get_value_from_registry(settings["format"]).decompress(tensors, scheme)["weight"]
        assert theirs.dtype is torch.bfloat16 and torch.equal(part(tensors, settings).read(torch.bfloat16), theirs)
    for strategy, block in (("tensor", (None, None)), ("channel", (1, None)), ("block", (64, 32))):
        tensors, _ = W.fp8(weight_of(), block, "weight_scale", scale_dtype=torch.bfloat16)
        more = dict(block_structure=list(block)) if strategy == "block" else {}
        settings = W.compressed_config("float-quantized", num_bits=8, type="float", strategy=strategy, group_size=None,
                                       **more)
        scheme = QuantizationScheme(targets=["Linear"],
                                    weights=QuantizationArgs(**settings["config_groups"]["group_0"]["weights"]))
        own = dict(tensors, weight_scale=tensors["weight_scale"].view(-1) if strategy == "tensor"
                   else tensors["weight_scale"])
        theirs = BaseCompressor.get_value_from_registry("float-quantized").decompress(own, scheme)["weight"]
        assert torch.equal(part(own, settings).read(torch.bfloat16), theirs)
    tensors, _ = W.nvfp4(weight_of())
    scheme = QuantizationScheme(targets=["Linear"],
                                weights=QuantizationArgs(**NV["config_groups"]["group_0"]["weights"]))
    theirs = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(tensors, scheme)["weight"]
    assert torch.equal(part(tensors, NV).read(theirs.dtype), theirs)


def test_awq_by_the_converter_of_compressed_tensors():
    pytest.importorskip("compressed_tensors", reason="pip install --no-deps compressed-tensors loguru")
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    tensors, meant = W.awq(weight_of())
    theirs = AutoAWQConverter(group_size=32).process({f"m.{leaf}": t for leaf, t in tensors.items()})
    again = {name.removeprefix("m."): t for name, t in theirs.items()}
    settings = W.compressed_config(symmetric=False)
    assert torch.equal(part(again, settings).read(torch.float32), part(tensors, W.awq_config()).read(torch.float32))


def test_fp8_by_transformers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    tensors, _ = W.fp8(weight_of(128, 192), (64, 64))
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.bfloat16)
    assert torch.equal(part(tensors, W.fp8_config((64, 64))).read(torch.bfloat16), theirs)


BNB = {"nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "fp4": dict(load_in_4bit=True),
       "nf4_dq": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                      bnb_4bit_quant_storage="bfloat16"),
       "int8": dict(load_in_8bit=True)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    changes = dict(hidden_size=128, intermediate_size=192, head_dim=32, num_attention_heads=4, num_hidden_layers=2)
    small_model("llama", changes=changes).save_pretrained(folder)
    W.tokenizer_of(folder)
    return folder


def loaded(folder, **settings):
    checkpoint = open_checkpoint(folder, unwrapped)
    return Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, keep=as_wrapped(), **settings)


def kinds(decoder): return {m.format.name for m in decoder.modules() if isinstance(m, (PackedMatrix, PackedStack))}


@torch.no_grad()
@pytest.mark.parametrize("kind", BNB)
def test_bitsandbytes_by_transformers(kind, llama, tmp_path):
    "Written by `save_pretrained`, read by both: weights to the bit, logits nearly."
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    config = BitsAndBytesConfig(**BNB[kind])
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    W.tokenizer_of(tmp_path)
    theirs, lm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), wb.load(tmp_path)
    assert kinds(lm.decoder) == {"grouped8_row_float32_x0.00787402" if kind == "int8" else kind}
    for layer, ours in zip(theirs.model.layers, lm.decoder.layers):
        for block in ("self_attn", "mlp"):
            for name, module in getattr(layer, block).named_children():
                if not hasattr(module, "weight"): continue
                want = dequantize_bnb_weight(module.weight, getattr(module, "state", None)) + 0.0  # no -0
                got = getattr(getattr(ours, block), name).dense(want.dtype)
                assert torch.equal(got.view(torch.int32), want.view(torch.int32)), name
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs.dequantize()                              # its own product rounds activations: 8 bits, or bfloat16 on a CPU
    want, dense = theirs(tokens).logits, wb.load(tmp_path, weights="dense").decoder
    assert (lm.decoder(tokens) - dense(tokens)).abs().max() <= 1e-4 * want.abs().max() and not kinds(dense)
    assert (lm.decoder(tokens) - want).abs().max() <= 1e-4 * want.abs().max()
    assert lm.decoder.nbytes < 0.6 * dense.nbytes and lm.card.parameters == wb.load(llama).card.parameters


def test_bitsandbytes_blocks_that_cross_rows(tmp_path):
    """Unpacked as one long row: the CPU kernel of bitsandbytes 0.50 begins a new block with each row, which its own
    quantizer does not, and gets such weights wrong."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    changes = dict(hidden_size=96, num_attention_heads=6, num_hidden_layers=1)
    small_model("llama", changes=changes).save_pretrained(tmp_path)
    for double in (False, True):
        config = BitsAndBytesConfig(**BNB["nf4"], bnb_4bit_use_double_quant=double)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(tmp_path / "packed")
        with pytest.warns(UserWarning, match="begin in one row") as seen: decoder = loaded(tmp_path / "packed")
        assert len(seen) == 1 and kinds(decoder) == {"nf4_dq" if double else "nf4"}         # down_proj: 64 columns
        theirs = model.model.layers[0].mlp.up_proj.weight
        state, shape = theirs.quant_state, theirs.quant_state.shape
        state.shape = torch.Size((shape.numel() // 64, 64))
        assert torch.equal(decoder.layers[0].mlp.up_proj.dense(), bnb.dequantize_4bit(theirs.data, state).view(shape))


LLM_COMPRESSOR = {"W4A16": "int4_g128", "W4A16_ASYM": "uint4_g128", "W8A8": "int8", "FP8_BLOCK": "fp8_block",
                  "FP8_DYNAMIC": "fp8", "NVFP4A16": "nvfp4"}


@torch.no_grad()
@pytest.mark.parametrize("scheme", LLM_COMPRESSOR)
def test_llm_compressor(scheme, llama, tmp_path):
    "Written by `oneshot`, read by both."
    pytest.importorskip("llmcompressor", reason="pip install --no-deps llmcompressor compressed-tensors loguru")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    changes = dict(hidden_size=128, intermediate_size=256, head_dim=32, num_attention_heads=4, num_hidden_layers=1)
    small_model("llama", changes=changes).bfloat16().save_pretrained(tmp_path / "base")
    W.tokenizer_of(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    model.save_pretrained(tmp_path / "packed", save_compressed=True)
    config = CompressedTensorsConfig(run_compressed=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16, quantization_config=config)
    decoder = loaded(tmp_path / "packed", dtype=torch.bfloat16)
    assert kinds(decoder) == {LLM_COMPRESSOR[scheme]}
    for block in ("self_attn", "mlp"):
        for name, module in getattr(theirs.model.layers[0], block).named_children():
            if isinstance(module, torch.nn.Linear):
                ours = getattr(getattr(decoder.layers[0], block), name)
                assert torch.equal(ours.dense(torch.bfloat16), module.weight)


# --- whole models -----------------------------------------------------------------------------------------------------

SHAPE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
MODELS = {
    "llama": ("llama", SHAPE), "tied": ("llama", dict(SHAPE, tie_word_embeddings=True)),
    "mixtral": ("mixtral", dict(SHAPE, **EXPERTS, sliding_window=None)), "phi3": ("phi3", SHAPE),
    "gpt_neox": ("gpt_neox", dict(SHAPE, num_key_value_heads=4, intermediate_size=96)),
    "deepseek_v3": ("deepseek_v3", dict(SHAPE, **dict(MLA, num_key_value_heads=4, kv_lora_rank=32, qk_rope_head_dim=8,
                                                      qk_nope_head_dim=24, v_head_dim=16, moe_intermediate_size=32,
                                                      num_hidden_layers=2),
                                        q_lora_rank=32, n_shared_experts=1, rope_parameters=PLAIN)),
}
WAYS = {
    "gptq": (lambda w: W.gptq(w), W.gptq_config()),
    "gptq3": (lambda w: W.gptq(w, 3, None, False, False), W.gptq_config(3, None, False, False)),
    "awq": (lambda w: W.awq(w), W.awq_config()),
    "compressed": (lambda w: W.compressed(w, symmetric=False), W.compressed_config(symmetric=False)),
    "int8": (lambda w: W.compressed(w, 8, strategy="channel", packs=False), settings_of(8, strategy="channel",
                                                                                        packs=False)),
    "fp8": (lambda w: W.fp8(w, (48, 32)), W.fp8_config((48, 32))), "nvfp4": (lambda w: W.nvfp4(w), NV),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Small models as transformers saves them, once."
    done = {}
    def get(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            family, changes = MODELS[name]
            small_model(family, changes=changes).save_pretrained(done[name])
        return done[name]
    return get


def linear(name, weight):
    words = ("proj.", "experts.", "query_key_value", "dense", "qkv", "gate_up", "kv_a_proj_with_mqa")
    return weight.ndim == 2 and any(w in name for w in words) and not any(n % 32 for n in weight.shape)


PAIRS = [("llama", way) for way in WAYS] + [
    ("mixtral", "gptq"), ("mixtral", "int8"), ("mixtral", "fp8"), ("mixtral", "nvfp4"), ("tied", "gptq3"),
    ("phi3", "awq"), ("phi3", "fp8"), ("gpt_neox", "gptq"), ("gpt_neox", "int8"), ("deepseek_v3", "fp8"),
    ("deepseek_v3", "compressed")]


@torch.no_grad()
@pytest.mark.parametrize("name, way", PAIRS)
def test_families(name, way, saved, tmp_path):
    "Stacks of experts, fused and split rows, biases, tied embeddings: weights to the bit, and nothing unpacked."
    make, settings = WAYS[way]
    meant = W.wrap(saved(name), tmp_path, make, settings, linear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = loaded(tmp_path)
    plain = W.wrap(saved(name), tmp_path / "dense", lambda w: None, {}, lambda name, weight: False)
    from safetensors.torch import save_file
    save_file({n: t.contiguous() for n, t in meant.items()}, tmp_path / "dense" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "dense")
    want = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors)
    got = named_tensors(decoder)
    for n, t in named_tensors(want).items(): assert torch.equal(got[n], t), n
    held = [m for m in decoder.modules() if isinstance(m, (PackedMatrix, PackedStack))]
    assert len(held) >= 4 and len(plain) and (name in ("llama", "tied") or any(len(m.shape) == 3 for m in held)
                                              or name in ("phi3", "gpt_neox"))
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(decoder(tokens), want(tokens), atol=1e-4 * want(tokens).abs().max())
    assert decoder.nbytes < 0.75 * want.nbytes


@torch.no_grad()
def test_load_with_every_setting_of_weights(saved, tmp_path):
    meant = W.wrap(saved("llama"), tmp_path, *WAYS["gptq"])
    name = "model.layers.0.mlp.up_proj.weight"
    for weights, found in ((None, {"int4_g32"}), ("stored", {"int4_g32"}), ("dense", set()), ("int8", {"int8"})):
        lm = wb.load(tmp_path, weights=weights)
        assert kinds(lm.decoder) == found
        if weights != "int8": assert torch.equal(lm.decoder.layers[0].mlp.up_proj.dense(), meant[name])
    half = wb.load(tmp_path, dtype=torch.bfloat16).decoder
    assert torch.equal(half.layers[0].mlp.up_proj.dense(), meant[name].bfloat16())
    assert "quantization_config" not in lm.decoder.source and lm.decoder.to_transformers() is not None
    with pytest.raises(UnsupportedError, match="llm_workbench.load"): open_checkpoint(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_columns_in_an_order_of_their_own(name, saved, tmp_path):
    "Packed where a matrix comes whole; one warning and numbers where its rows have to move."
    def make(weight):
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(2)) // 32
        return W.gptq(weight, order=order)
    meant = W.wrap(saved(name), tmp_path, make, W.gptq_config(desc_act=True), linear)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoder = loaded(tmp_path)
    assert [str(w.message) for w in seen if "order of its own" in str(w.message)] == [str(w.message) for w in seen]
    assert len(seen) == (0 if name == "llama" else 1)
    assert isinstance(decoder.layers[0].self_attn.o_proj, PackedMatrix)
    assert torch.equal(decoder.layers[0].self_attn.o_proj.dense(), meant["model.layers.0.self_attn.o_proj.weight"])
    if name == "phi3":
        assert torch.equal(decoder.layers[0].self_attn.q_proj.dense(),
                           meant["model.layers.0.self_attn.qkv_proj.weight"][:64])


def test_experts_in_layouts_that_do_not_go_together(saved, tmp_path):
    "One expert of another kind: the stack is unpacked with a warning, the rest stays packed."
    W.wrap(saved("mixtral"), tmp_path, *WAYS["gptq"], linear)
    settings = W.gptq_config() | {"dynamic": {r"+:.*experts\.1\.w1": {"bits": 8}}}
    def make(bits): return lambda w: W.gptq(w, bits)
    from safetensors.torch import load_file, save_file
    tensors, other = load_file(tmp_path / "model.safetensors"), tmp_path / "other"
    W.wrap(saved("mixtral"), other, make(8), settings, lambda name, w: "experts.1.w1" in name)
    eight = load_file(other / "model.safetensors")
    tensors |= {n: t for n, t in eight.items() if "experts.1.w1." in n}
    save_file(tensors, other / "model.safetensors")
    with pytest.warns(UserWarning, match="do not go into one tensor"): decoder = loaded(other)
    experts = decoder.layers[0].mlp.experts
    assert isinstance(experts.down_proj, PackedStack) and not isinstance(experts.gate_up_proj, PackedStack)


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = {
    "gptq": (W.gptq(weight_of(), order=torch.randperm(96, generator=torch.Generator().manual_seed(3)) // 32)[0],
             W.gptq_config()),
    "gptq3": (W.gptq(weight_of(), 3, 32, False)[0], W.gptq_config(3, 32, False)), "awq": (W.awq(weight_of())[0],
                                                                                         W.awq_config()),
    "compressed": (W.compressed(weight_of(), symmetric=False)[0], W.compressed_config(symmetric=False)),
    "int8": (W.compressed(weight_of(), 8, strategy="channel", packs=False)[0],
             settings_of(8, strategy="channel", packs=False)),
    "nvfp4": (W.nvfp4(weight_of())[0], NV), "fp8": (W.fp8(weight_of(130, 200))[0], W.fp8_config()),
}


def bitsandbytes_of(kind):
    "Tensors of a module by the library itself."
    bnb = pytest.importorskip("bitsandbytes.functional")
    if kind == "int8":
        codes, scale, _ = bnb.int8_vectorwise_quant(weight_of().half())
        return dict(weight=codes, SCB=scale, weight_format=torch.tensor(0, dtype=torch.uint8)), {}
    data, state = bnb.quantize_4bit(weight_of(64, 128), quant_type=kind[:3], compress_statistics="dq" in kind)
    named = {f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}
    return dict(weight=data, **named), dict(bnb_4bit_quant_type=kind[:3])


def good(name):
    if name in GOOD: return GOOD[name]
    tensors, settings = bitsandbytes_of(name)
    return tensors, settings | dict(quant_method="bitsandbytes")


EVERY = [*GOOD, "nf4", "fp4", "nf4_dq", "int8b"]


@pytest.mark.parametrize("changes, error, words", [
    (dict(quant_method="gptqq"), UnsupportedError, "Did you mean 'gptq'"),
    (dict(quant_method="exl9"), UnsupportedError, "gptq, awq"),
    (dict(quant_method=None), UnsupportedError, "quantizer"),
    (dict(quant_method="mxfp4"), UnsupportedError, "Mxfp4Config"),
    (dict(bits=8), CheckpointError, "scales has the shape"), (dict(bits=5), UnsupportedError, "bits is 5"),
    (dict(bits="4"), UnsupportedError, "bits is '4'"), (dict(group_size=64), CheckpointError, "scales has the shape"),
    (dict(group_size=0), CheckpointError, "group_size is 0"), (dict(group_size=None), CheckpointError, "group_size"),
    (dict(checkpoint_format="gptq_v2"), CheckpointError, "checkpoint_format"),
    (dict(checkpoint_format="gptq_v3"), UnsupportedError, "gptq_v3"),
    (dict(checkpoint_format="marlin"), UnsupportedError, "marlin"),
    (dict(pack_dtype="int16"), UnsupportedError, "int16"),
    (dict(modules_to_not_convert=["m"]), CheckpointError, "leaves 'm' alone"),
    (dict(dynamic={"(": {}}), CheckpointError, "no pattern")])
def test_settings_that_do_not_fit(changes, error, words):
    tensors, settings = GOOD["gptq"]
    with pytest.raises(error, match=words.replace("(", r"\(")): part(tensors, settings | changes).whole()


def test_other_settings_that_do_not_fit():
    def fails(name, error, words, **changes):
        tensors, settings = good(name)
        with pytest.raises(error, match=words): part(tensors, settings | changes).whole()
    fails("awq", UnsupportedError, "gemv", version="gemv")
    fails("awq", UnsupportedError, "bits is 8", bits=8)
    fails("awq", CheckpointError, "scales", group_size=64)
    fails("fp8", CheckpointError, "weight_scale_inv has the shape", weight_block_size=[64, 128])
    fails("fp8", CheckpointError, "tile", weight_block_size=[128])
    fails("fp8", CheckpointError, "tile", weight_block_size="128")
    fails("nf4", CheckpointError, "bnb_4bit_quant_type", bnb_4bit_quant_type="fp4")
    fails("compressed", CheckpointError, "targets", config_groups={})
    fails("compressed", CheckpointError, "targets", config_groups=[1])
    fails("compressed", UnsupportedError, "transform_config", transform_config={"r1": {}})
    fails("compressed", UnsupportedError, "sparsity_config", sparsity_config={"format": "sparse-24-bitmask"})
    fails("compressed", CheckpointError, "alone", ignore=["re:.*"])
    for weights in (dict(num_bits=16), dict(type="complex"), dict(strategy="diagonal")):
        fails("compressed", UnsupportedError, "quantization_config",
              config_groups=W.compressed_config(**weights)["config_groups"])
    group = W.compressed_config(symmetric=False)["config_groups"]["group_0"]
    narrow = dict(group, targets=["re:.*up"], weights=dict(group["weights"], num_bits=8))
    tensors, settings = GOOD["compressed"]
    settings = settings | dict(config_groups={"a": narrow, "b": group})
    assert part(tensors, settings).whole().format.width == 4, "the pattern is another matrix's"


def test_scales_and_columns_that_make_no_sense():
    for name, leaf in (("gptq", "scales"), ("awq", "scales"), ("compressed", "weight_scale"), ("nf4", "weight.absmax"),
                       ("fp8", "weight_scale_inv"), ("int8", "weight_scale")):
        tensors, settings = good(name)
        for value in (math.nan, math.inf):
            bad = tensors[leaf].clone()
            bad.view(-1)[1] = value
            wrong = dict(tensors, **{leaf: bad})
            with pytest.raises(CheckpointError, match="NaN or infinity"): part(wrong, settings).whole()
    tensors, settings = GOOD["gptq"]
    for value in (-1, 3, 2**31 - 1):
        order = tensors["g_idx"].clone()
        order[7] = value
        with pytest.raises(CheckpointError, match="belong to groups"):
            part(dict(tensors, g_idx=order), settings).read(torch.float32)
    tensors, settings = GOOD["nvfp4"]
    with pytest.raises(CheckpointError, match="zero"):
        part(dict(tensors, weight_global_scale=torch.zeros(1)), settings).whole()


def mutated(tensors, rng):
    "The same with one thing changed: missing, renamed, of another type or shape, or other bytes."
    name = rng.choice(sorted(tensors))
    t, rest = tensors[name], {n: t for n, t in tensors.items() if n != name}
    kind = rng.choice(["missing", "renamed", "dtype", "short", "long", "nested", "flat", "empty", "bytes", "far"])
    some = t if t.ndim else t[None]
    if kind == "missing": return rest
    if kind == "renamed": return rest | {rng.choice([name + "s", "extra", *sorted(tensors)]): t}
    if kind == "dtype": return rest | {name: t.view(torch.uint8) if rng.random() < 0.5 else t.float().to(
        rng.choice([torch.int32, torch.int8, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8]))}
    if kind == "short": return rest | {name: some[:-1] if rng.random() < 0.5 else some[..., :-1]}
    if kind == "long": return rest | {name: torch.cat([some, some], rng.choice([0, -1]))}
    if kind == "nested": return rest | {name: t[None]}
    if kind == "flat": return rest | {name: t.flatten()}
    if kind == "empty": return rest | {name: some[:0]}
    raw = some.clone().contiguous().view(torch.uint8).view(-1)
    for _ in range(4):
        raw[rng.randrange(len(raw))] = rng.choice([0, 255, rng.randrange(256)]) if kind == "bytes" else 255
    return rest | {name: raw.view(t.dtype).view(t.shape)}


@pytest.mark.parametrize("name", EVERY)
def test_damaged_layouts_end_in_our_errors(name):
    "A thousand changes for each method: numbers of the right shape, or an error of this project."
    tensors, settings = good("int8" if name == "int8b" else name) if name != "int8b" else (
        bitsandbytes_of("int8")[0], dict(quant_method="bitsandbytes"))
    rng, refused = random.Random(name), 0
    want = part(tensors, settings).read(torch.float32).shape
    for _ in range(1000):
        try:
            p = part(mutated(tensors, rng), settings)
            if not isinstance(p, PackedPart):                 # scales renamed to `weight`: numbers, of another shape
                assert p.shape != want and p.type in DTYPES
                continue
            packed = p.whole()
            assert packed.unpack().shape == p.shape == plainest(packed).unpack().shape
            if p.shape == want: rows_of(packed)
        except (WorkbenchError, KeyError) as error:
            assert not isinstance(error, KeyError) or error.args == ("m.weight",), "no weight is left to read"
            refused += 1
    assert 300 < refused < 1000


@pytest.mark.parametrize("seed", range(3))
def test_damaged_settings_end_in_our_errors(seed):
    rng = random.Random(seed)
    values = [None, True, False, -1, 0, 1, 3, 4, 7, 8, 64, 2**70, 0.5, "", "4", "gptq_v2", [], [1], [128, 128], {},
              {"a": 1}]
    for _ in range(400):
        tensors, settings = GOOD[rng.choice(list(GOOD))]
        settings = json.loads(json.dumps(settings))
        place = settings
        while (inner := [v for v in place.values() if isinstance(v, dict) and v]) and rng.random() < 0.7:
            place = inner[0]
        place[rng.choice([*place, "dynamic", "ignore", "format"])] = rng.choice(values)
        try: part(tensors, settings).read(torch.float32)
        except WorkbenchError: pass


def test_a_whole_checkpoint_is_refused_before_anything_is_built(saved, tmp_path):
    W.wrap(saved("llama"), tmp_path, *WAYS["gptq"])
    from safetensors.torch import load_file, save_file
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.0.mlp.up_proj.scales"
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="layers.0.mlp.up_proj.*scales is missing"): wb.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for settings, error in (({"quant_method": "gptq-from-the-future"}, UnsupportedError), ("gptq", UnsupportedError),
                            ([1], UnsupportedError), ({"bits": 4}, UnsupportedError)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(error): wb.load(tmp_path)


# --- known-wrong readers ----------------------------------------------------------------------------------------------

def field_by_field(words, bits, less_one):
    "Wrong: adds the one to each field, so what a borrow took from its neighbour is not given back."
    codes = gptq_zeros(words, bits, False)
    return codes + 1 & 2**bits - 1 if less_one else codes


def never_less_one(words, bits, less_one): return gptq_zeros(words, bits, False)
def in_order(words): return checkpoints.unpack_codes(checkpoints.in_bytes(words), 4)
def packed_order(words): return in_order(words).unflatten(-1, (-1, 8))[..., torch.tensor(W.AWQ)].flatten(-2)
def by_place(*args, order=None, **more): return GROUPED(*args[:5], None, *args[6:], **more)
def as_float16(packed):
    scale = packed.tensors["scale"].half()
    return Packed(checkpoints._integers(packed.format.width, packed.format.group or "row", not packed.format.zeros),
                  packed.shape, packed.tensors | {"scale": scale})


GROUPED = checkpoints.grouped
MUTANTS = {"fields": ("gptq_zeros", field_by_field), "v1 as v2": ("gptq_zeros", never_less_one),
           "awq in order": ("awq_codes", in_order), "awq's order backwards": ("awq_codes", packed_order),
           "columns by place": ("grouped", by_place)}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_readers_are_rejected(name, monkeypatch):
    monkeypatch.setattr(checkpoints, *MUTANTS[name])
    order = torch.randperm(96, generator=torch.Generator().manual_seed(4)) // 32
    with pytest.raises((AssertionError, CheckpointError)):
        reads(W.gptq(weight_of().abs(), symmetric=False), W.gptq_config(symmetric=False))       # zero points of 0
        reads(W.gptq(weight_of(), order=order), W.gptq_config())
        reads(W.awq(weight_of()), W.awq_config())


def test_a_scale_that_float16_would_round_is_not_rounded():
    made, settings = W.gptq(weight_of(), scale_dtype=torch.float32), W.gptq_config()
    packed = part(made[0], settings).whole()
    assert not torch.equal(as_float16(packed).unpack(), made[1]) and torch.equal(plainest(packed).unpack(), made[1])
