"The front door: what `load` picks, what it refuses, and what it costs to import."
import json
import subprocess
import sys

import pytest
import torch

import llm_workbench as wb
from llm_workbench import lobby
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import InputError, SourceError
from llm_workbench.kernels import cpu, cpu_prompt
from llm_workbench.quantization.formats import PackedMatrix

ABSENT = "xpu" if torch.backends.mps.is_available() else "mps"   # a device that this machine lacks


def test_the_fastest_ops_of_a_cpu_are_picked_and_named_ops_are_taken(lm):
    assert lm.decoder.ops is cpu_prompt.CPU and lobby.fastest_ops("cuda") is TORCH
    assert wb.load(ops=REFERENCE).decoder.ops is REFERENCE
    half = wb.load(dtype=torch.bfloat16)
    assert half.decoder.dtype is torch.bfloat16 and half.decoder.ops is cpu_prompt.CPU
    assert type(lm) is wb.LM and type(lm.decoder) is wb.Decoder


def kept(lm): return {m.format.name for m in lm.decoder.modules() if isinstance(m, PackedMatrix)}


def test_weights_are_kept_as_asked(lm):
    packed, dense = wb.load(), wb.load(weights="dense")
    assert kept(packed) == {"q4_1", "q8_0"} and not kept(dense) and not kept(wb.load(ops=TORCH))
    assert packed.decoder.nbytes < 98e6 and dense.decoder.nbytes > 500e6
    tokens = torch.tensor([packed.tokenizer.encode("The capital of Peru is")])
    with torch.no_grad(): a, b = packed.decoder(tokens), dense.decoder(tokens)
    assert (a - b).abs().max() < 1e-3 * b.abs().max(), "the same numbers, summed in another order"
    assert kept(wb.load(weights="stored", ops=TORCH)) == {"q4_1", "q8_0"}
    assert kept(wb.load(weights="int8", dtype=torch.bfloat16)) == {"int8"}


def test_without_a_compiler_a_warning_and_the_same_model(lm, monkeypatch):
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    cpu.compiled.cache_clear()
    with pytest.warns(UserWarning, match="C compiler"): plain = wb.load()
    assert plain.decoder.ops is TORCH
    monkeypatch.undo()
    question = dict(messages="What is the capital of Peru?", max_new_tokens=8)
    assert plain.chat(**question) == lm.chat(**question)


@pytest.mark.parametrize("settings, error, words", [
    (dict(weights="int4_g23"), InputError, "no weight format 'int4_g23'.* Did you mean 'int4_g32'"),
    (dict(weights=4), InputError, "no weight format 4"),
    (dict(device="gpu"), InputError, "'gpu' is no device"), (dict(device=None), InputError, "None is no device"),
    (dict(device=ABSENT), InputError, f"device '{ABSENT}' cannot be used here"),
    (dict(ops="fast"), InputError, "ops is 'fast'"), (dict(dtype="bf16"), InputError, "dtype is 'bf16'"),
    (dict(dtype=torch.int8), InputError, "dtype is torch.int8"),
    (dict(source="no/such/folder"), SourceError, "no/such/folder")])
def test_what_cannot_be_loaded_is_named(monkeypatch, settings, error, words):
    if "source" not in settings: monkeypatch.setattr(lobby, "open_checkpoint", lambda source: pytest.fail("work began"))
    with pytest.raises(error, match=words): wb.load(**settings)


def test_the_names_at_the_door_load_when_used():
    code = """
import json, sys, time
start = time.perf_counter()
import llm_workbench as wb
took, early = time.perf_counter() - start, [m for m in ("torch", "llm_workbench.lobby") if m in sys.modules]
print(json.dumps([took, early, [wb.load.__module__, wb.LM.__module__, wb.Decoder.__module__], sorted(wb.__dir__())]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, early, homes, names = json.loads(done.stdout)
    assert took < 0.3 and early == []
    assert homes == ["llm_workbench.lobby", "llm_workbench.inference.generation", "llm_workbench.architecture.decoder"]
    assert {"load", "LM", "Decoder", "ModelConfig", "errors"} <= set(names)
