"""A file's blocks can be had packed: rows that a layout only moves are moved as bytes, and everything else says why
not.

The oracle never moves a byte: the same numbers, unpacked first and then rearranged by the family's layout."""
from collections import Counter

import pytest
import torch
from models import SMALL, small_model
from test_gguf_families import CASES, make, metadata_of, tensors_of

from llm_workbench.errors import UnsupportedError
from llm_workbench.families.loading import own_tensors
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.files.gguf import block_types, dequantize, quantize, write_gguf
from llm_workbench.files.parts import LazyTensors, Part, is_blocks

# sizes that are whole blocks of 32 everywhere
WIDE = dict(hidden_size=96, intermediate_size=96, head_dim=16)
LATENT = dict(
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=24,
    v_head_dim=16,
    moe_intermediate_size=32,
    intermediate_size=96,
)
TYPES = ("Q4_0", "Q4_1", "Q8_0")


def widened(family, changes):
    "The same choices at sizes that are whole blocks."
    wide = dict(WIDE)
    if family in ("falcon", "gpt_neox", "phi", "stablelm", "granite", "olmo", "phi3", "phimoe", "qwen2", "qwen2_moe"):
        del wide["head_dim"]
    if family.startswith("deepseek"):
        wide = LATENT | dict(hidden_size=96) | (dict(q_lora_rank=32) if changes.get("q_lora_rank") else {})
    if family == "dbrx":
        ffn = dict(changes["ffn_config"], ffn_hidden_size=32, hidden_size=96)
        return dict(changes, d_model=96, ffn_config=ffn)
    more = {key: 32 for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in changes}
    keep = {k: v for k, v in changes.items() if k not in ("head_dim", "hidden_size", "intermediate_size")}
    if keep.get("rope_parameters", {}).get("rope_type") == "longrope":
        factors = dict(short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[1.0 + i for i in range(8)])
        keep["rope_parameters"] = keep["rope_parameters"] | factors
    return keep | wide | more


def blocks(shape): return len(shape) >= 2 and shape[-1] % 32 == 0


def compare(own, oracle, seen):
    "Each packed tensor, unpacked, against the oracle; those that cannot be had packed are counted."
    for name in own:
        want = oracle[name]
        try: type, data = own.packed(name)
        except UnsupportedError as e:
            assert "read it unpacked" in str(e) and name in str(e)
            seen["refused"] += 1
            continue
        got = dequantize(data, type) if is_blocks(type) else data
        assert torch.equal(got.float(), want.float()), f"{name}: packed rows were moved otherwise than numbers"
        seen["packed" if is_blocks(type) else "as stored"] += 1


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("family,variant", [(f, i) for f, variants in SMALL.items() for i in range(len(variants))])
def test_the_layouts_of_transformers_move_packed_rows(family, variant, type, record_property):
    hf = small_model(family, changes=widened(family, SMALL[family][variant]))
    state, parts, numbers, seen = hf.state_dict(), {}, {}, Counter()
    for name, t in state.items():
        stored = quantize(t.float(), type) if blocks(t.shape) else t
        numbers[name] = dequantize(stored, type) if blocks(t.shape) else t
        read = lambda dtype, n=numbers[name]: n if dtype is None else n.to(dtype)
        kind = type if blocks(t.shape) else "F32"
        parts[name] = Part(tuple(t.shape), kind, stored.nbytes, read, lambda s=stored: s)
    config = hf.config.to_dict()
    compare(own_tensors(config, LazyTensors(parts, "a model")), own_tensors(config, numbers), seen)
    for what, n in seen.items(): record_property(what, n)
    assert seen["packed"] > 10 and (seen["refused"] == 0 or family in ("gpt_oss", "dbrx")), seen


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_layouts_of_gguf_move_packed_rows(case, type, tmp_path, record_property):
    family, changes, _ = CASES[case]
    model, config = make(family, widened(family, changes))
    metadata = {k: v for k, v in metadata_of(config).items() if v is not None}
    tensors, seen = tensors_of(model.state_dict(), config), Counter()
    packed = {n: quantize(t, type) if blocks(t.shape) else t for n, t in tensors.items()}
    types = {n: type for n, t in tensors.items() if blocks(t.shape)}
    write_gguf(tmp_path / "packed.gguf", metadata, packed, types)
    write_gguf(
        tmp_path / "numbers.gguf", metadata, {n: dequantize(p, type) if n in types else p for n, p in packed.items()}
    )
    own, oracle = (open_checkpoint(tmp_path / f"{which}.gguf").tensors.own for which in ("packed", "numbers"))
    compare(own, oracle, seen)
    for what, n in seen.items(): record_property(what, n)
    assert seen["packed"] > 10, seen


def test_the_embedded_model_is_had_as_it_lies_in_the_file():
    "Every tensor of SmolLM2, packed, unpacks to what the decoder is loaded with."
    tensors = open_checkpoint().tensors.own
    kinds, seen = Counter(tensors.part(name).type for name in tensors), Counter()
    compare(tensors, {name: tensors.read(name, torch.float32) for name in tensors}, seen)
    assert seen["packed"] == sum(n for kind, n in kinds.items() if is_blocks(kind)) > 200 and "refused" not in seen
    assert set(kinds) <= set(block_types())
