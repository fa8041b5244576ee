"""A decoder written as a GGUF: llama.cpp must compute what the decoder does, for every architecture, our reader must
find the same model, and the bytes must be those of llama.cpp's own quantizer."""
import ctypes
import inspect
from math import prod

import gguf
import pytest
import torch

import llm_workbench as wb
from checks import TINY
from test_gguf_families import CASES, TOKENS, decoder_of, llama_cpp_logits, make, tensors_of
from llm_workbench.embedded import embedded_model
from llm_workbench.errors import CheckpointError, InputError, SourceError, UnsupportedError
from llm_workbench.families.loading import Decoder
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.families.table import read_config
from llm_workbench.files.gguf import GGUFFile
from llm_workbench.quantization import gguf_writing as writing
from llm_workbench.quantization.formats import quantize
from llm_workbench.quantization.gguf_sizes import predict_bytes, tensor_types
from llm_workbench.quantization.gguf_writing import gguf_metadata, gguf_parts, save_gguf, tokenizer_metadata

transformers = pytest.importorskip("transformers")
ROUNDED = {"gemma", "gemma2", "gemma3_text"}       # a GGUF holds 1 + w of their norms


def decoder_and_config(case):
    model, config = make(*CASES[case][:2])
    decoder = Decoder.from_checkpoint(config, model.state_dict())
    return model, config, decoder


def relative(a, b): return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_llama_cpp_computes_the_same(case, tmp_path):
    model, config, decoder = decoder_and_config(case)
    written = save_gguf(decoder, tmp_path / "m.gguf", "F32")
    file, oracle = GGUFFile(written.path), tensors_of(model.state_dict(), config)
    assert file.tensors.keys() == oracle.keys(), "names of the gguf package"
    for name, want in oracle.items():
        if name.startswith("rope_"): assert torch.allclose(file.load(name), want, rtol=1e-5)
        else: assert torch.equal(file.load(name), want), name
    again = open_checkpoint(written.path)
    for name, t in decoder.transformers_state().items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"): continue
        exact = config["model_type"] not in ROUNDED or "norm" not in name
        assert torch.equal(again.tensors[name], t) if exact else torch.allclose(again.tensors[name], t, atol=1e-6), name
    ours = decoder(TOKENS)
    assert (decoder_of(written.path)(TOKENS) - ours).abs().max() <= 1e-4
    if CASES[case][2]:
        cpp = llama_cpp_logits(written.path)
        assert relative(cpp, ours) <= 5e-3
        sure = ours.topk(2).values.diff(dim=-1).abs()[..., 0] > 1e-2 * cpp.abs().max()     # no ties
        assert torch.equal(cpp.argmax(-1)[sure], ours.argmax(-1)[sure]) and sure.sum() > 5
