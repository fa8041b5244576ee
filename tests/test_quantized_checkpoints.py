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
    format = reads(W.awq(weight_of(), group, symmetric), W.awq_config(group))
    assert format.name == f"{'int' if symmetric else 'uint'}4_{'g32' if group else 'row'}"


# --- compressed-tensors, FP8 and NVFP4, against loops -------------------------------------------------------------------

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


def test_compressed_rows_that_fill_no_whole_words():
    for bits, I in ((3, 50), (4, 9), (5, 33), (4, 36)):
        reads(W.compressed(weight_of(6, I), bits, strategy="channel"), settings_of(bits, strategy="channel"))


@pytest.mark.parametrize("shape", [(64, 96), (128, 128), (130, 300), (257, 129)], ids=str)
def test_fp8_blocks(shape):
    for block in ((128, 128), (64, 32), (1, 128)):
        made = W.fp8(weight_of(*shape), block)
        reads(made, W.fp8_config(block))
    reads(W.fp8(weight_of(*shape), (None, None)), W.fp8_config(None))
    reads(W.fp8(weight_of(*shape), (128, 128), scale_dtype=torch.bfloat16), W.fp8_config())
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
    small_model("llama", changes=dict(hidden_size=128, intermediate_size=192, head_dim=32, num_attention_heads=4,
                                      num_hidden_layers=2)).save_pretrained(folder)
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
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32).save_pretrained(tmp_path)
    W.tokenizer_of(tmp_path)
    theirs, lm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), wb.load(tmp_path)
    assert kinds(lm.decoder) == {"grouped8_row_float32_x0.00787402" if kind == "int8" else kind}
    for layer, ours in zip(theirs.model.layers, lm.decoder.layers):
        for block in ("self_attn", "mlp"):
            for name, module in getattr(layer, block).named_children():
                if not hasattr(module, "weight"): continue
                want = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
                got = getattr(getattr(ours, block), name).dense(want.dtype)
                assert torch.equal(got.view(torch.int32), want.view(torch.int32)), name
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs.dequantize()                                # its own product rounds activations: 8 bits, or bfloat16 on a CPU
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
        assert len(seen) == 1 and kinds(decoder) == {"nf4"}              # down_proj has 64 columns and stays packed
        theirs = model.model.layers[0].mlp.up_proj.weight
        state, shape = theirs.quant_state, theirs.quant_state.shape
        state.shape = torch.Size((shape.numel() // 64, 64))
        assert torch.equal(decoder.layers[0].mlp.up_proj.dense(), bnb.dequantize_4bit(theirs.data, state).view(shape))


# --- whole models -----------------------------------------------------------------------------------------------------

SHAPE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
MODELS = {
    "llama": ("llama", SHAPE), "tied": ("llama", dict(SHAPE, tie_word_embeddings=True)),
    "mixtral": ("mixtral", dict(SHAPE, **EXPERTS, sliding_window=None)), "phi3": ("phi3", SHAPE),
    "gpt_neox": ("gpt_neox", dict(SHAPE, num_key_value_heads=4, intermediate_size=96)),
    "deepseek_v3": ("deepseek_v3", dict(SHAPE, **dict(MLA, num_key_value_heads=4, kv_lora_rank=32, qk_rope_head_dim=8,
                                                      qk_nope_head_dim=24, v_head_dim=16, moe_intermediate_size=32),
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
    return weight.ndim == 2 and any(w in name for w in words) and weight.shape[0] % 32 == 0 and weight.shape[1] % 32 == 0


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
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
    assert len(held) >= 8 and len(plain) and (name in ("llama", "tied") or any(len(m.shape) == 3 for m in held)
                                              or name in ("phi3", "gpt_neox"))
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(decoder(tokens), want(tokens), atol=1e-4 * want(tokens).abs().max())
    assert decoder.nbytes < 0.75 * want.nbytes
