"""The types and sizes of GGUF files: what is predicted from a configuration against llama.cpp's own answer."""
import ctypes
import inspect
import re
from dataclasses import replace
from math import prod

import pytest
import torch

from models import small_config
from test_gguf_families import CASES as FILES
from test_gguf_families import make, metadata_of, tensors_of
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.files.gguf import block_type, write_gguf
from llm_workbench.quantization import gguf_sizes as sizes
from llm_workbench.quantization.gguf_sizes import (
    BASE, facts_of, gguf_shapes, is_matrix, predict_bits, predict_bytes, tensor_types, types_of)

transformers = pytest.importorskip("transformers")
WIDE = dict(hidden_size=256, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=19)
FALCON = dict(WIDE, bias=False, alibi=False)
LATENT = dict(num_key_value_heads=8, kv_lora_rank=256, q_lora_rank=256, qk_rope_head_dim=32, qk_nope_head_dim=32,
              v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, n_shared_experts=2,
              first_k_dense_replace=1, n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0)


def mixtral(experts, K): return dict(WIDE, num_local_experts=experts, num_experts_per_tok=2, num_key_value_heads=K)


CASES = {      # what decides about types: heads, layers, tied embeddings, experts, families, odd widths
    "4 queries a KV head": ("llama", WIDE),
    "2 queries a KV head": ("llama", dict(WIDE, num_key_value_heads=4)),
    "tied": ("llama", dict(WIDE, tie_word_embeddings=True)),
    "no shared heads, 32 layers": ("llama", dict(WIDE, num_key_value_heads=8, num_hidden_layers=32)),
    "80 layers": ("llama", dict(WIDE, num_hidden_layers=80)),
    "80 layers, no shared heads": ("llama", dict(WIDE, num_hidden_layers=80, num_key_value_heads=8)),
    "80 layers, Qwen": ("qwen2", dict(WIDE, num_hidden_layers=80, num_key_value_heads=4)),
    "80 layers, another family": ("qwen3", dict(WIDE, num_hidden_layers=80, head_dim=32)),
    "8 experts": ("mixtral", mixtral(8, 2)),
    "5 experts": ("mixtral", mixtral(5, 4)),
    "3 experts, no shared heads": ("mixtral", mixtral(3, 8)),
    "shared expert": ("qwen2_moe", dict(WIDE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256,
                                        shared_expert_intermediate_size=256)),
    "latent attention": ("deepseek_v2", dict(WIDE, **LATENT)),
    "gate and up in one": ("phi3", WIDE),
    "falcon": ("falcon", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon, one KV head": ("falcon", dict(FALCON, new_decoder_architecture=False, multi_query=True,
                                           parallel_attn=True)),
    "gemma 2": ("gemma2", dict(WIDE, head_dim=32, num_hidden_layers=20)),
    "gpt-oss": ("gpt_oss", dict(WIDE, num_local_experts=32, num_experts_per_tok=2, head_dim=32)),
    "columns of 32": ("llama", dict(WIDE, hidden_size=96, intermediate_size=320)),
    "columns of 16": ("llama", dict(WIDE, hidden_size=80)),
    "tied, columns of 32": ("llama", dict(WIDE, hidden_size=288, tie_word_embeddings=True)),
}
MIXTURES = [m for m in BASE if m not in ("F32", "BF16")]
LARGE = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q4_K_S", "IQ2_XS", "IQ3_XXS")     # where 80 layers are slow to ask for
WEIGHED = ("IQ3_XXS", "IQ4_NL", "IQ4_XS", "Q4_0", "Q5_0", "Q4_K_M")    # an importance changes some of these
NEWER = dict(MXFP4_MOE=38, Q1_0=40, Q2_0=41)      # not in every llama_cpp.py


def config_of(case):
    kind, changes = CASES[case]
    return changes | transformers.AutoConfig.for_model(**small_config(kind, changes=changes)).to_dict()


def written(config, path):
    "A model file of zeros."
    tensors = {name: torch.zeros(shape, dtype=torch.float16 if is_matrix(name, shape) else torch.float32)
               for name, shape in gguf_shapes(config).items()}
    write_gguf(path, {k: v for k, v in metadata_of(config).items() if v is not None}, tensors)
    return path


class Asked:
    "What llama_model_quantize would write, read from its log: a dry run."
    def __init__(self):
        self.c = pytest.importorskip("llama_cpp").llama_cpp
        self.said = []
        self.callback = self.c.llama_log_callback(lambda level, text, data: self.said.append(text.decode()))
        self.one = (self.c.llama_model_imatrix_data * 2)()       # of a tensor that is not there: only its being counts
        self.one[0].name, self.one[0].size, self.numbers = b"none", 1, (ctypes.c_float * 1)(1.0)
        self.one[0].data = self.numbers

    def __call__(self, path, mixture, importance):
        "Types by name, or None where it gives up."
        options = self.c.llama_model_quantize_default_params()
        options.ftype = NEWER.get(mixture) or getattr(self.c, f"LLAMA_FTYPE_MOSTLY_{mixture}")
        options.dry_run, options.nthread = True, 1
        if importance: options.imatrix = self.one
        self.said.clear()
        from llama_cpp._logger import llama_log_callback as usual   # ours must not be called when this object is gone
        self.c.llama_log_set(self.callback, ctypes.c_void_p())
        try: failed = self.c.llama_model_quantize(str(path).encode(), b"", ctypes.byref(options))
        finally: self.c.llama_log_set(usual, ctypes.c_void_p())
        if failed: return None
        found = re.findall(r"\[ *\d+/ *\d+\] (\S+) +- \[[^\]]*\], type = +(\S+), .*?MiB(?: ->.*?\((\w+)\))?",
                           "".join(self.said))
        return {name: (new or old).upper() for name, old, new in found}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    "llama.cpp's types for each case, mixture, and importance or not."
    asked, path, out = Asked(), tmp_path_factory.mktemp("sizes") / "m.gguf", {}
    for case in CASES:
        written(config_of(case), path)
        for mixture in MIXTURES:
            if "80 layers" in case and mixture not in LARGE: continue
            out[case, mixture, False] = asked(path, mixture, False)
            if mixture in WEIGHED or case == "tied":       # in one case all, to see that it makes no difference there
                out[case, mixture, True] = asked(path, mixture, True)
    return out


@pytest.fixture(scope="module")
def known():
    "Configuration and shapes of each case."
    return {case: (config, gguf_shapes(config)) for case in CASES for config in [config_of(case)]}


def disagreements(answers, known):
    "Cases, mixtures and tensors that are predicted otherwise, one after the other."
    facts = {case: facts_of(config, "F16") for case, (config, _) in known.items()}
    for (case, mixture, importance), theirs in answers.items():
        try: ours = types_of(known[case][1], replace(facts[case], mixture=mixture, importance=importance))
        except UnsupportedError: ours = None
        if ours != theirs:
            names = [n for n in ours if ours[n] != theirs.get(n)] if ours and theirs else ["raises"]
            yield case, mixture, importance, names[:3]


def test_every_type_is_llama_cpps(answers, known):
    assert sum(len(types or ()) for types in answers.values()) > 100_000
    assert list(disagreements(answers, known)) == []
    assert any(types is None for types in answers.values()), "widths that no type fits belong to it"


MUTANTS = [       # function, what stands in it, what a mistake would write
    ("more", "n // 8 or i >= 7", "n // 8 or i > 7"),
    ("more", "% 3 == 2", "% 3 == 1"),
    ("value_type", "f.queries >= 4", "f.queries > 4"),
    ("value_type", "f.experts >= 4", "f.experts >= 6"),
    ("value_type", "if i < 2 else", "if i < 3 else"),
    ("value_type", 'if i < 4: kind = "Q5_K"', 'if i < 3: kind = "Q5_K"'),
    ("value_type", "if f.large and", "if f.layers == 80 and"),
    ("value_type", "f.experts == 8", "f.experts >= 8"),
    ("value_type", '"IQ3_XXS" if f.importance', '"IQ3_XXS" if not f.importance'),
    ("down_type", "i < n // 8", "i < n // 4"),
    ("down_type", 'return "Q5_K" if i < n // 16', 'return "Q5_K" if i <= n // 16'),
    ("down_type", "if early and not f.importance", "if early"),
    ("down_type", "f.falcon and not more(i, n)", "f.falcon"),
    ("down_type", 'm[:-1] + "1"', "m"),
    ("outer_type", "f.falcon or ", ""),
    ("outer_type", 'm in TINY or m == "IQ3_XXS"', "m in TINY"),
    ("outer_type", 'kind == "Q8_0"', 'kind == "Q5_1"'),
    ("inner_type", '"MXFP4" if stack', '"MXFP4" if part.endswith("_exps")'),
    ("inner_type", 'part in ("attn_v", "attn_qkv")', 'part == "attn_v"'),
    ("inner_type", "f.falcon and m not in TINY", "f.falcon"),
    ("inner_type", '"Q5_K" if m in EIGHT', '"Q5_K" if m in TINY'),
    ("inner_type", 'part == "attn_k" and eight', 'part == "attn_q" and eight'),
    ("inner_type", '"IQ3_XXS": "IQ2_S"', '"IQ3_XXS": "IQ3_XXS"'),
    ("inner_type", '"ffn_gate", "ffn_up"', '"ffn_gate"'),
    ("fitting", '"F16" if columns % 32', '"F16" if columns % 64'),
    ("types_of", "f.tied or ", ""),
    ("types_of", "downs if f.mixture in TINY", "downs if f.mixture in ()"),
    ("is_matrix", '("_norm.weight", "ffn_gate_inp.weight")', '("_norm.weight",)'),
    ("is_matrix", 'name.endswith(".weight")', "True"),
    ("facts_of", 'arch == "llama" and H != K', 'arch == "llama"'),
    ("facts_of", 'arch in ("qwen2", "olmo") or ', ""),
]


@pytest.mark.parametrize("function, stands, wrong", MUTANTS, ids=[f"{m[0]}: {m[2]}" for m in MUTANTS])
def test_a_wrong_rule_is_noticed(function, stands, wrong, answers, known, monkeypatch):
    source, made = inspect.getsource(getattr(sizes, function)), {}
    assert source.count(stands) == 1, f"{function} has changed: adapt this mutant"
    exec(source.replace(stands, wrong), dict(sizes.__dict__), made)
    mutant = type(made[function])(made[function].__code__, sizes.__dict__, function, made[function].__defaults__)
    monkeypatch.setattr(sizes, function, mutant)
    for name in ("types_of", "facts_of"): monkeypatch.setitem(globals(), name, getattr(sizes, name))
    assert next(disagreements(answers, known), None)


@pytest.mark.parametrize("case", FILES)
def test_names_and_shapes_are_the_converters(case):
    kind, changes, _ = FILES[case]
    model, config = make(kind, changes)
    assert gguf_shapes(config) == {name: tuple(t.shape) for name, t in tensors_of(model.state_dict(), config).items()}


def test_bytes_and_bits_are_those_of_the_types():
    config = config_of("8 experts")
    shapes, types = gguf_shapes(config), tensor_types(config, "Q4_K_M")
    nbytes = sum(prod(s) // block_type(types[n]).items * block_type(types[n]).nbytes for n, s in shapes.items())
    assert predict_bytes(config, "Q4_K_M") == nbytes
    assert predict_bits(config, "Q4_K_M") == 8 * nbytes / sum(map(prod, shapes.values()))
    assert predict_bits(config, "F32") == 32 and set(tensor_types(config, "F32").values()) == {"F32"}
    assert set(tensor_types(config, "BF16").values()) == {"BF16", "F32"}


def test_what_is_refused():
    config = config_of("tied")
    with pytest.raises(UnsupportedError, match="Did you mean 'Q4_K_M'"): predict_bits(config, "Q4_KM")
    with pytest.raises(UnsupportedError, match="128"): tensor_types(config_of("columns of 32"), "Q1_0")
    with pytest.raises(UnsupportedError): predict_bits(dict(config, model_type="bert"), "Q4_K_M")
    with pytest.raises(InputError): gguf_shapes("config.json")
