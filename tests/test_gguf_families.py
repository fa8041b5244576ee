"""Every architecture of GGUF that the workbench reads: a tiny random model of transformers, written in the layout
of llama.cpp's converter, must come back with the logits of transformers, and llama.cpp, reading the same file,
must agree: so the layout is llama.cpp's and not only our idea of it."""
import json
import re

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_safetensors

from checks import gguf_refusals
from models import EXPERTS, LINEAR, LONG, MLA, PLAIN, SMALL, YARN, small_config, small_model
from llm_workbench.architecture.moe import MoE
from llm_workbench.architecture.norms_and_mlps import LayerNorm
from llm_workbench.families.gguf_layouts import GGUF, GGUF_NAMES
from llm_workbench.families.loading import Decoder
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.families.table import read_config, supported, transformers_name
from llm_workbench.files.gguf import write_gguf
from llm_workbench.files.safetensors import save_safetensors
from llm_workbench.errors import CheckpointError, UnsupportedError
from llm_workbench.quantization.gguf_writing import gguf_metadata

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()
TOKENS = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(1))


# ---- the writer: what convert_hf_to_gguf.py does to names, layouts and configuration

ARCHITECTURE = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "falcon": "falcon",
    "gpt_neox": "gptneox",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "dbrx": "dbrx",
    "stablelm": "stablelm",
    "granite": "granite",
    "smollm3": "smollm3",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "arctic": "arctic",
}
# their converters derive from LlamaModel or copy its permutation
PERMUTED = {"llama", "granite", "smollm3", "olmo", "arctic"}


def permute(w, heads): return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def converted(name, t, c, architecture):
    "The (name, tensor) pairs that the converter makes of one tensor of a transformers model with configuration c."
    H, K = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
    layer, leaf = re.match(r"(.*?layers\.\d+\.)?(.*)", name).groups()
    if "experts.gate_up_proj" in name:
        cut = (lambda x: (x[..., ::2], x[..., 1::2])) if architecture == "gpt-oss" else (lambda x: x.chunk(2, 1))
        for part, piece in zip(("gate", "up"), cut(t)):
            if "bias" in name: yield f"{layer}mlp.experts.{part}_proj.bias", piece
            else:
                turned = piece.transpose(1, 2) if architecture == "gpt-oss" else piece
                yield f"{layer}mlp.experts.{part}_proj.weight", turned
    elif name.endswith("experts.down_proj_bias"): yield f"{layer}mlp.experts.down_proj.bias", t
    elif name.endswith("experts.down_proj"):
        yield f"{layer}mlp.experts.down_proj.weight", t.transpose(1, 2) if architecture == "gpt-oss" else t
    elif ".ffn.experts.mlp." in name:      # DBRX
        t = t.view(c["ffn_config"]["moe_num_experts"], c["ffn_config"]["ffn_hidden_size"], c["d_model"])
        yield name + ".weight", t.transpose(1, 2) if name.endswith("w2") else t
    elif architecture.startswith("gemma") and name.endswith("norm.weight"): yield name, t + 1
    elif architecture in PERMUTED and "q_proj" in name: yield name, permute(t, H)
    elif architecture in PERMUTED and "k_proj" in name: yield name, permute(t, K)
    # Falcon, GPT-NeoX: per KV head its queries, key, value -> all queries, all keys, all values
    elif "query_key_value" in name:
        K = H if architecture == "gptneox" else c["num_kv_heads"] if c["new_decoder_architecture"] else 1
        groups = t.view(K, H // K + 2, t.shape[0] // (H + 2 * K), *t.shape[1:])
        yield name, torch.cat([x.flatten(0, 2) for x in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])
    elif "kv_b_proj" in name:              # DeepSeek: halves apart, the one for the keys transposed
        k, v = t.view(H, -1, t.shape[-1]).split([c["qk_nope_head_dim"], c["v_head_dim"]], 1)
        yield from [(name.replace("kv_b", "k_b"), k.transpose(1, 2)), (name.replace("kv_b", "v_b"), v)]
    elif leaf.endswith("e_score_correction_bias"): yield f"{layer}mlp.gate.e_score_correction.bias", t
    elif leaf == "self_attn.sinks": yield name + ".weight", t
    else: yield name, t


def stacked_norms(state):
    "StableLM: one norm per head -> one tensor."
    out = {}
    for name, t in state.items():
        if m := re.fullmatch(r"(.+_layernorm)\.norms\.(\d+)\.weight", name):
            out.setdefault(f"{m[1]}.weight", []).append(t)
        else: out[name] = t
    return {n: torch.stack(t) if isinstance(t, list) else t for n, t in out.items()}


def name_map(architecture, layers):
    """The table of the gguf package. Making the one of arctic changes a dictionary of the class, and with it every
    later table: put back."""
    before = dict(gguf.TensorNameMap.block_mappings_cfg)
    try: return gguf.get_tensor_name_map({n: a for a, n in gguf.MODEL_ARCH_NAMES.items()}[architecture], layers)
    finally:
        gguf.TensorNameMap.block_mappings_cfg.clear()
        gguf.TensorNameMap.block_mappings_cfg.update(before)


def tensors_of(state, c):
    architecture = ARCHITECTURE[c["model_type"]]
    table = name_map(architecture, c["num_hidden_layers"])
    out, rope = {}, c.get("rope_parameters") or {}
    for name, t in stacked_norms(state).items():
        if name == "lm_head.weight" and c.get("tie_word_embeddings"): continue
        for new, piece in converted(name, t, c, architecture):
            found = table.get_name(new, try_suffixes=(".weight", ".bias"))
            assert found, f"the gguf package has no name for {new}"
            out[found] = piece.contiguous().float()
    if rope.get("rope_type") == "llama3":
        scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**c), "cpu")[0]
        out["rope_freqs.weight"] = rope["rope_theta"] ** (-torch.arange(len(scaled)) / len(scaled)) / scaled
    if rope.get("rope_type") == "longrope":
        for which in ("long", "short"): out[f"rope_factors_{which}.weight"] = torch.tensor(rope[f"{which}_factor"])
    return out


def metadata_of(c):
    "What the package writes for a transformers configuration, and a vocabulary that llama.cpp accepts."
    words = ["<unk>", "</s>", "<|endoftext|>", "\n", *(f"t{i}" for i in range(4, 97))]
    vocabulary = {
        "model": "gpt2",
        "pre": "default",
        "tokens": words,
        "token_type": [1] * 97,
        "merges": ["t 4"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return gguf_metadata(c) | {"general.name": "Tiny"} | {f"tokenizer.ggml.{k}": v for k, v in vocabulary.items()}


def to_gguf(state, config, path, tensors=None, **changes):
    metadata = metadata_of(config)
    for key, value in changes.items(): metadata[f"{metadata['general.architecture']}.{key.replace('__', '.')}"] = value
    write_gguf(
        path,
        {k: v for k, v in metadata.items() if v is not None},
        tensors_of(state, config) if tensors is None else tensors,
    )
    return path


# ---- the models

_V3 = dict(MLA, q_lora_rank=18, n_shared_experts=1)
# llama.cpp ranks groups by their best two experts, DeepSeek-V2 by their best one
_ONE = dict(n_group=1, topk_group=1)
_LONG_PHI = dict(
    original_max_position_embeddings=8,
    sliding_window=None,
    rope_parameters=dict(LONG, original_max_position_embeddings=8),
)
# id -> (family, changes to its small configuration, llama.cpp computes the same); it tells DeepSeek-V2-Lite by its
CASES = {
    # 27 layers and looks for Command R+'s norms of queries and keys from 64 layers on
    "llama, rope_freqs": ("llama", SMALL["llama"][0], True),
    "llama, biases, linear": ("llama", SMALL["llama"][1], True),
    "mistral, YaRN": ("mistral", SMALL["mistral"][1], True),
    "mixtral": ("mixtral", dict(EXPERTS, sliding_window=None), True),
    "qwen2": ("qwen2", {}, True),
    "qwen2, tied, YaRN": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN), True),
    "qwen3, YaRN": ("qwen3", SMALL["qwen3"][0], True),
    "qwen2_moe": ("qwen2_moe", dict(SMALL["qwen2_moe"][0], mlp_only_layers=[]), True),
    "qwen3_moe": ("qwen3_moe", dict(SMALL["qwen3_moe"][0], decoder_sparse_step=1), True),
    "gemma": ("gemma", SMALL["gemma"][0], True),
    "gemma2": ("gemma2", dict(SMALL["gemma2"][0], query_pre_attn_scalar=16), True),
    "gemma3": (
        "gemma3_text",
        dict(
            SMALL["gemma3_text"][0],
            query_pre_attn_scalar=16,
            rope_parameters=dict(full_attention=dict(LINEAR, rope_theta=1e6), sliding_attention=PLAIN),
        ),
        True,
    ),
    "phi2": ("phi", dict(SMALL["phi"][0], intermediate_size=192), True),
    "phi3, partial rotation": (
        "phi3",
        dict(
            sliding_window=64,
            original_max_position_embeddings=64,
            rope_parameters=dict(PLAIN, partial_rotary_factor=0.75),
        ),
        True,
    ),
    "phi3, longrope": ("phi3", _LONG_PHI, True),
    "phimoe": ("phimoe", dict(EXPERTS, attention_bias=True, lm_head_bias=True, sliding_window=None), False),
    "phimoe, longrope": (
        "phimoe",
        dict(
            EXPERTS,
            attention_bias=True,
            lm_head_bias=True,
            original_max_position_embeddings=32,
            sliding_window=None,
            rope_parameters=dict(
                LONG, original_max_position_embeddings=32, short_mscale=1.2**0.5, long_mscale=1.2**0.5
            ),
        ),
        False,
    ),
    "cohere": ("cohere", {}, True),
    "cohere2": ("cohere2", SMALL["cohere2"][0], True),
    "cohere, QK norms": (
        "cohere",
        dict(use_qk_norm=True, logit_scale=0.25, num_hidden_layers=64, hidden_size=24, intermediate_size=16),
        True,
    ),
    "falcon 7B": ("falcon", dict(SMALL["falcon"][0], tie_word_embeddings=False), True),
    "falcon 40B": ("falcon", SMALL["falcon"][1], True),
    "falcon 2": ("falcon", SMALL["falcon"][2], True),
    "gpt_neox": ("gpt_neox", SMALL["gpt_neox"][0], True),
    "gpt_neox, sequential": (
        "gpt_neox",
        dict(use_parallel_residual=False, rope_parameters=dict(PLAIN, partial_rotary_factor=1.0)),
        True,
    ),
    "olmo, clipped": ("olmo", SMALL["olmo"][0], True),
    "olmo2": ("olmo2", {}, True),
    "olmo3": ("olmo3", SMALL["olmo3"][0], True),
    "dbrx": ("dbrx", SMALL["dbrx"][0], True),
    "stablelm": ("stablelm", {}, True),
    "stablelm, per-head norms": ("stablelm", SMALL["stablelm"][1], True),
    "granite": ("granite", SMALL["granite"][0], True),
    "smollm3": ("smollm3", dict(num_hidden_layers=4, rope_parameters=YARN), True),
    "gpt_oss": ("gpt_oss", SMALL["gpt_oss"][0], True),
    "gpt_oss, ramp of YaRN": (
        "gpt_oss",
        dict(
            SMALL["gpt_oss"][0],
            head_dim=32,
            rope_parameters=dict(  # llama.cpp rounds the borders of the ramp
                rope_type="yarn",
                rope_theta=150_000.0,
                factor=32.0,
                beta_fast=8.0,
                beta_slow=1.0,
                original_max_position_embeddings=128,
                truncate=False,
            ),
        ),
        False,
    ),
    "deepseek_v2 lite": (
        "deepseek_v2",
        dict(SMALL["deepseek_v2"][0], **_ONE, num_hidden_layers=27, first_k_dense_replace=20),
        True,
    ),
    "deepseek_v2": ("deepseek_v2", dict(SMALL["deepseek_v2"][1], **_ONE, topk_method="greedy"), True),
    "deepseek_v2, groups": ("deepseek_v2", SMALL["deepseek_v2"][1], False),
    "deepseek_v3, YaRN": ("deepseek_v3", SMALL["deepseek_v3"][0], True),
    "deepseek_v3": ("deepseek_v3", dict(_V3, rope_parameters=PLAIN), True),
}


def make(kind, changes):
    model = small_model(kind, changes=changes)
    config = model.config.to_dict()
    # dbrx has other names for these
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"):
        config.setdefault(key, getattr(model.config, key))
    return model, config


def llama_cpp_logits(path, tokens=TOKENS):
    "What llama.cpp computes from a file, with a cache in float32."
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(
        str(path),
        logits_all=True,
        n_ctx=64,
        n_batch=64,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        use_mmap=False,
        verbose=False,
    )
    llama.eval(tokens[0].tolist())
    logits = torch.tensor(np.array(llama.scores[:tokens.shape[1]]))
    llama.close()
    return logits[None]


def decoder_of(path):
    checkpoint = open_checkpoint(path)
    return Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors)


@pytest.mark.parametrize("case", CASES)
def test_gguf_is_the_model(case, tmp_path, record_property):
    kind, changes, agree = CASES[case]
    model, config = make(kind, changes)
    path = to_gguf(model.state_dict(), config, tmp_path / "m.gguf")
    with torch.no_grad(): theirs, ours = model(TOKENS).logits, decoder_of(path)(TOKENS)
    difference = (ours - theirs).abs().max().item()
    record_property("to transformers", difference)
    assert difference <= 1e-4, f"{difference:.1e} from transformers"
    if agree:
        cpp = llama_cpp_logits(path)
        relative = ((cpp - ours).abs().max() / cpp.abs().max()).item()
        record_property("to llama.cpp", relative)
        # its GELU is a table of 16-bit numbers
        assert relative <= 5e-3, f"{relative:.1e} from llama.cpp, of the largest logit"


def test_every_architecture_has_a_case():
    assert {ARCHITECTURE[kind] for kind, _, _ in CASES.values()} | {"arctic"} == set(GGUF)
    models = {kind for kind, _, _ in CASES.values()} | {"arctic"}
    assert models == set(supported()), "a family of the decoder that has no GGUF"


@pytest.mark.parametrize("case", CASES)
def test_configuration_is_transformers(case, tmp_path):
    "transformers takes the configuration that was read as its own, and it says what the model's says."
    kind, changes, _ = CASES[case]
    model, config = make(kind, changes)
    read = open_checkpoint(to_gguf(model.state_dict(), config, tmp_path / "m.gguf")).config
    if kind == "mistral":
        # without a window it cannot be told from a Llama, and computes the same
        read["model_type"] = kind
    again = transformers.AutoConfig.for_model(**read).to_dict()
    lost = {
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "architectures",
        "transformers_version",
        "initializer_range",
        "attention_dropout",
        "rope_parameters",
        "use_cache",
        "router_aux_loss_coef",
        "output_router_logits",
        "max_window_layers",
        "sliding_window",
        "layer_types",
        "original_max_position_embeddings",
        "num_key_value_heads",
        "multi_query",
        "head_dim",
        "topk_method",
        "hidden_activation",
        "router_jitter_noise",
        "input_jitter_noise",
    }
    if kind == "falcon":
        lost |= {"intermediate_size", "num_kv_heads"}       # not a key of its own; not used with one KV head
    for name, rope in {
        "": config.get("rope_parameters") or {},
        **{k: v for k, v in (config.get("rope_parameters") or {}).items() if isinstance(v, dict)},
    }.items():
        theirs = again["rope_parameters"][name] if name else again["rope_parameters"]
        for key in rope.keys() & {
            "rope_type",
            "rope_theta",
            "factor",
            "partial_rotary_factor",
            "original_max_position_embeddings",
            "truncate",
            "mscale_all_dim",
        }:
            if key == "original_max_position_embeddings" and rope["rope_type"] == "default": continue
            if rope["rope_type"] == "llama3" and key != "rope_theta":
                continue           # five divisors are too few to tell Llama 3's form
            default = 1.0 if key == "partial_rotary_factor" else None
            assert theirs.get(key, default) == pytest.approx(rope[key]), (
                f"rope {name} {key}: {theirs.get(key)}, the model has {rope[key]}"
            )
    for key, value in model.config.to_dict().items():
        if key in lost or value in (None, 0, 0.0, False) or isinstance(value, dict): continue
        assert again.get(key) == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), (
            f"{key}: {again.get(key)}, the model has {value}"
        )


@torch.no_grad()
def test_phimoe_in_llama_cpp_is_another_model(tmp_path):
    """llama.cpp computes Phi-3.5-MoE with RMSNorm and Mixtral's router (src/models/phi3.cpp), not LayerNorm and
    sparsemixer: with its choices ours agrees."""
    model, config = make(*CASES["phimoe"][:2])
    path = to_gguf(model.state_dict(), config, tmp_path / "m.gguf")
    ours, cpp = decoder_of(path), llama_cpp_logits(path)
    distance = lambda: ((cpp - ours(TOKENS)).abs().max() / cpp.abs().max()).item()
    assert distance() > 0.1
    for module in ours.modules():
        if isinstance(module, MoE): module.options = dict(score="softmax", normalise=True)
        if isinstance(module, LayerNorm):
            module.forward = lambda x, ops, m=module: ops.rms_norm(x, m.weight, m.eps) + m.bias
    assert distance() <= 5e-3


@torch.no_grad()
def test_arctic(tmp_path):
    """transformers has no Arctic: our decoder, whose block is checked against its description, is written and read
    back; llama.cpp computes the same."""
    config = dict(
        model_type="arctic",
        vocab_size=97,
        hidden_size=48,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        moe_layer_frequency=1,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    )
    torch.manual_seed(0)
    model = Decoder(read_config(config)).eval()
    for p in model.parameters(): p.copy_(torch.randn_like(p) * 0.3)
    model.source = config
    state, want = model.transformers_state(), model(TOKENS)
    renamed = {}
    for name, t in state.items():      # the gguf package knows the names of its release
        name = re.sub(
            r"residual_mlp\.(gate|up|down)_proj",
            lambda m: "residual_mlp.w" + {"gate": "1", "down": "2", "up": "3"}[m[1]],
            name,
        )
        if name.endswith("experts.gate_up_proj"):
            layer = name.replace("model.", "").removesuffix("block_sparse_moe.experts.gate_up_proj")
            renamed |= {
                f"{layer}feed_forward.experts.{w}.weight": piece for w, piece in zip(("w1", "w3"), t.chunk(2, 1))
            }
        elif name.endswith("experts.down_proj"):
            renamed[
                name.replace("model.", "").replace(
                    "block_sparse_moe.experts.down_proj", "feed_forward.experts.w2.weight"
                )
            ] = t
        else: renamed[name] = t
    path = to_gguf(renamed, config, tmp_path / "m.gguf", rope__dimension_count=8)
    assert (decoder_of(path)(TOKENS) - want).abs().max() <= 1e-4
    cpp = llama_cpp_logits(path)
    assert (cpp - want).abs().max() <= 5e-3 * cpp.abs().max()
    hub = {}                           # and its safetensors, with one tensor per expert
    for name, t in renamed.items():
        if m := re.fullmatch(r"layers\.(\d+)\.feed_forward\.experts\.(w\d)\.weight", name):
            hub |= {
                f"model.layers.{m[1]}.block_sparse_moe.experts.{e}.{m[2]}.weight": w.contiguous()
                for e, w in enumerate(t)
            }
        else: hub[name] = t
    (tmp_path / "hub").mkdir()
    save_safetensors(hub, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    assert (
        set(open_checkpoint(tmp_path / "hub").tensors) == set(state)
        and (decoder_of(tmp_path / "hub")(TOKENS) - want).abs().max() <= 1e-4
    )


# ---- folders

@pytest.mark.parametrize("kind,variant", [(kind, v) for kind in SMALL for v in range(len(SMALL[kind]))])
@torch.no_grad()
def test_folder_is_the_model(kind, variant, tmp_path):
    "The names that transformers writes to disk, which are not always those in memory."
    model = small_model(kind, variant)
    model.save_pretrained(tmp_path)
    assert (decoder_of(tmp_path)(TOKENS) - model(TOKENS).logits).abs().max() <= 1e-4


def test_folder_leaves_out_what_transformers_ignores(tmp_path):
    "DeepSeek-V3 is published with a 62nd layer that predicts the token after next; old files hold buffers."
    model = small_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    state = load_safetensors(tmp_path / "model.safetensors")
    more = {
        "model.layers.61.eh_proj.weight": torch.ones(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_safetensors(dict(state) | more, tmp_path / "model.safetensors")
    assert not {"model.layers.61.eh_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & set(
        open_checkpoint(tmp_path).tensors
    )
    with torch.no_grad(): assert (decoder_of(tmp_path)(TOKENS) - model(TOKENS).logits).abs().max() <= 1e-4


# ---- other writers and older files

def as_is(tensors, config): return tensors, {}

def one_kv_b(tensors, config):
    "DeepSeek before May 2025: kv_b whole, full heads."
    out, H = {}, config["num_attention_heads"]
    for name, t in tensors.items():
        if "attn_v_b" in name: continue
        if "attn_k_b" in name:
            out[name.replace("k_b", "kv_b")] = torch.cat(
                [t.transpose(1, 2), tensors[name.replace("k_b", "v_b")]], 1
            ).flatten(0, 1)
        else: out[name] = t
    head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return out, dict(
        attention__head_count_kv=H,
        attention__key_length=head,
        attention__value_length=config["v_head_dim"],
        attention__key_length_mla=None,
        attention__value_length_mla=None,
    )

def one_qkv(tensors, config):
    "Phi-2 of 2023, and today's converter with --fuse-qkv."
    out = {}
    for name, t in tensors.items():
        if m := re.fullmatch(r"(blk\.\d+\.)attn_q\.(weight|bias)", name):
            out[f"{m[1]}attn_qkv.{m[2]}"] = torch.cat([tensors[f"{m[1]}attn_{x}.{m[2]}"] for x in "qkv"])
        elif not re.search(r"attn_[kv]\.", name): out[name] = t
    return out, {}

def three_qkv(tensors, config):
    "A fused tensor taken apart."
    out, D = {}, config["hidden_size"] // config["num_attention_heads"]
    for name, t in tensors.items():
        if "attn_qkv" not in name: out[name] = t; continue
        parts = t.split([config["num_attention_heads"] * D] + [config["num_key_value_heads"] * D] * 2)
        out |= {name.replace("qkv", x): part.contiguous() for x, part in zip("qkv", parts)}
    return out, {}

def one_gate_up(tensors, config):
    "Today's converter with --fuse-gate-up-exps."
    out = {n: t for n, t in tensors.items() if not re.search("ffn_(gate|up)_exps", n)}
    return out | {
        n.replace("gate", "gate_up"): torch.cat([t, tensors[n.replace("gate", "up")]], 1)
        for n, t in tensors.items()
        if "ffn_gate_exps" in n
    }, {}

def flat_gate(tensors, config):
    "Qwen 1.5 MoE of 2024: no widths, a gate without its dimension of 1."
    keys = dict(expert_feed_forward_length=None, expert_shared_feed_forward_length=None)
    return {n: t.flatten() if "inp_shexp" in n else t for n, t in tensors.items()}, keys

def expert_by_expert(tensors, config):
    out = {}
    for name, t in tensors.items():
        out |= (
            {name.replace("_exps.", f".{e}."): x.contiguous() for e, x in enumerate(t)}
            if "_exps" in name
            else {name: t}
        )
    return out, {}


@pytest.mark.parametrize("case,change", [("deepseek_v3, YaRN", one_kv_b), ("deepseek_v2", one_kv_b), ("phi2", one_qkv),
                                         ("llama, biases, linear", one_qkv), ("qwen2", one_qkv),
                                         ("phi3, longrope", three_qkv), ("mixtral", one_gate_up),
                                         ("dbrx", one_gate_up), ("gpt_oss", as_is), ("qwen2_moe", flat_gate),
                                         ("qwen3_moe", one_gate_up), ("mixtral", expert_by_expert),
                                         ("phimoe", expert_by_expert)])
@torch.no_grad()
def test_other_layouts(case, change, tmp_path):
    model, config = make(*CASES[case][:2])
    tensors, keys = change(tensors_of(model.state_dict(), config), config)
    path = to_gguf(None, config, tmp_path / "m.gguf", tensors, **keys)
    assert (decoder_of(path)(TOKENS) - model(TOKENS).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("case,key,value", [("phi3, longrope", "rope__scaling__attn_factor", 1.5),
                                            ("mistral, YaRN", "rope__scaling__yarn_attn_factor", 1.3)])
def test_attention_factor_of_the_file_is_used(case, key, value, tmp_path):
    model, config = make(*CASES[case][:2])
    read = open_checkpoint(to_gguf(model.state_dict(), config, tmp_path / "m.gguf", **{key: value})).config[
        "rope_parameters"
    ]
    assert read["attention_factor"] == value


def test_mistral_window_is_kept(tmp_path):
    "llama.cpp's converter drops Mistral's window; a file that has it is read with it."
    model, config = make("mistral", SMALL["mistral"][0])
    path = to_gguf(model.state_dict(), config, tmp_path / "m.gguf")
    with torch.no_grad(): assert (decoder_of(path)(TOKENS) - model(TOKENS).logits).abs().max() <= 1e-4


def test_gpt_oss_experts_in_mxfp4(tmp_path):
    "The releases hold their experts in 4 bits: read, they are what the gguf package unpacks."
    from gguf.quants import dequantize, quantize
    model, config = make("gpt_oss", dict(SMALL["gpt_oss"][0], hidden_size=64, intermediate_size=32))
    tensors, kind = tensors_of(model.state_dict(), config), gguf.GGMLQuantizationType.MXFP4
    types = {n: "MXFP4" for n in tensors if n.endswith("_exps.weight")}
    write_gguf(tmp_path / "m.gguf", metadata_of(config), tensors, types)
    gate, up = (
        torch.tensor(dequantize(quantize(tensors[f"blk.1.ffn_{x}_exps.weight"].numpy(), kind), kind))
        for x in ("gate", "up")
    )
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    fused = checkpoint.tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(fused[..., ::2], gate.transpose(1, 2)) and torch.equal(fused[..., 1::2], up.transpose(1, 2))
    assert (
        checkpoint.card.file_type == "MXFP4"
        or checkpoint.tensors.part("model.layers.1.mlp.experts.down_proj").type == "MXFP4"
    )
    decoder_of(tmp_path / "m.gguf")


def test_gemma_norms_are_shifted_before_rounding(tmp_path):
    "1 + w rounded to bfloat16 has lost w: the difference is taken in float32."
    model, config = make("gemma", SMALL["gemma"][0])
    checkpoint, name = (
        open_checkpoint(to_gguf(model.state_dict(), config, tmp_path / "m.gguf")),
        "model.layers.0.input_layernorm.weight",
    )
    read, want = checkpoint.tensors.read(name, torch.bfloat16), model.state_dict()[name]
    assert read.dtype == torch.bfloat16 and (read.float() - want).abs().max() < 0.01 * want.abs().max()
    assert ((1 + want).bfloat16() - 1 - want).abs().max() > (read.float() - want).abs().max()


def test_slices_keep_no_more_memory_than_they_need(tmp_path):
    model, config = make(*CASES["qwen2"][:2])
    tensors, _ = one_qkv(tensors_of(model.state_dict(), config), config)
    checkpoint = open_checkpoint(to_gguf(None, config, tmp_path / "m.gguf", tensors))
    for name, t in checkpoint.tensors.items():
        assert t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes, name
    assert checkpoint.tensors.parameters == sum(p.numel() for p in model.parameters()) == checkpoint.card.parameters
    assert abs(checkpoint.tensors.nbytes - 4 * checkpoint.tensors.parameters) < 64


# ---- names and refusals

@pytest.mark.parametrize("architecture", GGUF)
def test_names_are_those_of_the_gguf_package(architecture):
    "Every transformers name of the table leads, by the gguf package, to the GGUF name beside it."
    table = name_map(architecture, 2)
    spelled = lambda n: re.sub(
        r"residual_mlp\.(gate|up|down)_proj",
        lambda m: "residual_mlp.w" + {"gate": "1", "down": "2", "up": "3"}[m[1]],
        n,
    )
    # renamed by their converters
    special = {
        "arctic": {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"},
        "phimoe": {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"},
    }
    checked = 0
    c = read_config(
        small_config(GGUF[architecture].model_type) if architecture != "arctic" else dict(model_type="arctic")
    )
    names = GGUF_NAMES | {
        f"blk.{i}.{of}": f"layers.{i}.{into}"
        for i in range(2)
        for of, into in GGUF[architecture].block_names(c).items()
        if "." not in of
    }
    for ours, into in names.items():
        theirs = transformers_name(into, c, GGUF[architecture].model_type)
        found = table.get_name(spelled(theirs))
        if found is None or ours.rpartition(".")[2] in special.get(architecture, ()):
            continue       # not a tensor of this architecture
        assert found == ours, f"{theirs}: {ours} here, {found} in the gguf package"
        checked += 1
    assert checked >= 3 + 2 * 4


@pytest.mark.parametrize("name,near", [("qwen3next", "qwen3"), ("gemma4", "gemma"), ("deepseek3", "deepseek2"),
                                       ("mamba", ""), ("gptj", "gpt")])
def test_unknown_architecture_names_the_nearest(name, near, tmp_path):
    write_gguf(tmp_path / "m.gguf", {"general.architecture": name}, {"token_embd.weight": torch.ones(3, 2)})
    with pytest.raises(UnsupportedError, match=f"{name!r}.*(Did you mean|nearest are).*{near}" if near else repr(name)):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("case,keys,kind,word", [
    ("deepseek_v2", dict(attention__kv_lora_rank=None), CheckpointError, "kv_lora_rank"),
    ("deepseek_v2", dict(rope__dimension_count=1000), CheckpointError, "1000 of 20 dimensions"),
    ("deepseek_v2", dict(attention__value_length_mla=3), CheckpointError, "shape|fit"),
    ("olmo3", dict(attention__sliding_window_pattern=[True]), CheckpointError, "4 layers"),
    ("gpt_neox", dict(use_parallel_residual=3), CheckpointError, "use_parallel_residual"),
    ("falcon 40B", dict(attention__head_count_kv=3), CheckpointError, "shape|fit"),
    ("falcon 40B", dict(attention__head_count_kv=5), CheckpointError, "num_kv_heads is 5"),
    ("stablelm, per-head norms", dict(attention__head_count=5), CheckpointError, "divisor of the 5 query heads"),
    ("gemma3", dict(attention__sliding_window="x"), CheckpointError, "sliding_window"),
    ("dbrx", dict(expert_count="x"), CheckpointError, "expert_count"),
    ("phi3, longrope", dict(rope__dimension_count=6), CheckpointError, "rope_factors"),
    ("granite", dict(logit_scale=float("inf")), CheckpointError, "logit_scale")])
def test_damaged(case, keys, kind, word, tmp_path):
    model, config = make(*CASES[case][:2])
    path = to_gguf(model.state_dict(), config, tmp_path / "m.gguf", **keys)
    with pytest.raises(kind, match=word): decoder_of(path)


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "falcon 40B", "stablelm, per-head norms"])
def test_mutated_headers_raise_only_our_errors(case, tmp_path):
    model, config = make(*CASES[case][:2])
    path = to_gguf(model.state_dict(), config, tmp_path / "m.gguf")
    assert gguf_refusals(path, tmp_path / "bad.gguf", 60) > 10
