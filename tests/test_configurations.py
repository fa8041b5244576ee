"""A configuration means what transformers' class means by it, and a wrong one is refused before anything is built.

Two properties over every family: a key that is missing is read as transformers reads it, in today's and in older
spellings; and every wrong value of every key ends in one error that names the key, the value and what would be right.
"""
import json
import math
import time

import pytest
import torch
from models import SIZES, SMALL
from transformers import AutoConfig

from llm_workbench import Decoder
from llm_workbench.errors import CheckpointError, UnsupportedError, WorkbenchError
from llm_workbench.families.configurations import KEYS
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.families.table import FAMILIES, family_of, read_config

CASES = [(family, i) for family, variants in SMALL.items() for i in range(len(variants))]


def small(family, variant):
    "What a file of this small model would hold."
    given = {**({} if family == "dbrx" else SIZES), **SMALL[family][variant]}
    return AutoConfig.for_model(family, **given).to_dict()


def names_in_files(family):
    "key -> its names in files, for every key that the family reads."
    reader = family_of(family).reader
    return {key: reader.names.get(key, (key,)) for key in reader.defaults}


def outcome(read):
    "A ModelConfig, or the kind of error."
    try: return read()
    except WorkbenchError as e: return type(e)


# ---------------------------------------------------------------------------------------------------- missing keys
def differences(family, variant):
    "Keys whose absence is read otherwise than transformers reads it."
    whole, wrong = small(family, variant), []
    for names in names_in_files(family).values():
        rest = {k: v for k, v in whole.items() if k not in names}
        if len(rest) == len(whole): continue
        try: theirs = AutoConfig.for_model(**rest).to_dict()
        except Exception: continue                                        # transformers itself cannot do without it
        ours, want = outcome(lambda: read_config(rest)), outcome(lambda: read_config(theirs))
        if ours != want: wrong.append((names[0], ours, want))
    return wrong


@pytest.mark.parametrize("family,variant", CASES)
def test_a_missing_key_means_what_transformers_means_by_it(family, variant):
    wrong = differences(family, variant)
    assert not wrong, [name for name, *_ in wrong]


@pytest.mark.parametrize("family", SMALL)
def test_a_file_that_says_nothing_is_the_model_that_transformers_makes_by_default(family):
    "Old files name their model_type and little else."
    if family in ("dbrx",): pytest.skip("its nested tables have defaults of their own, tested above")
    assert outcome(lambda: read_config(dict(model_type=family))) == outcome(
        lambda: read_config(AutoConfig.for_model(family).to_dict()))


def older(config):
    "The same configuration as releases before transformers 5 wrote it: rope_theta and rope_scaling."
    rope = config.get("rope_parameters")
    if not rope or "rope_type" not in rope: return None
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    scaling["type"] = scaling.pop("rope_type")
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    share = "rotary_pct" if config["model_type"] == "gpt_neox" else "partial_rotary_factor"
    if "partial_rotary_factor" in rope: old[share] = rope["partial_rotary_factor"]
    return old | dict(rope_theta=rope["rope_theta"], rope_scaling=None if scaling["type"] == "default" else scaling)


@pytest.mark.parametrize("family,variant", CASES)
def test_older_spellings_of_rope_mean_the_same(family, variant):
    config = small(family, variant)
    old = older(config)
    if old is None: pytest.skip("RoPE by layer type has no older spelling")
    assert read_config(old) == read_config(config)


def test_the_first_phi_3_files_are_read():
    "They call LongRoPE `su`."
    config = small("phi3", 1)
    old = older(config)
    old["rope_scaling"]["type"] = "su"
    assert read_config(old) == read_config(config)


# ---------------------------------------------------------------------------------------------------- wrong values
WRONG = ["2", "x", -1, -0.5, math.nan, math.inf, 1e40, 10**20, [], [1], ["x"], [None], {"a": 1}, True, 2.5]


def refused(config):
    "The error of a configuration, if there is one, and the seconds that it took."
    start = time.perf_counter()
    try: read_config(config)
    except (CheckpointError, UnsupportedError) as e: return e, time.perf_counter() - start
    return None, time.perf_counter() - start


def with_value(config, name, value):
    "The configuration with one value changed; a dot goes into a nested table."
    config = json.loads(json.dumps(config))
    *tables, leaf = name.split(".")
    inner = config
    for t in tables: inner = inner.setdefault(t, {})
    inner[leaf] = value
    return config


@pytest.mark.parametrize("family", SMALL)
def test_every_wrong_value_of_every_key_is_named(family):
    config, tried = small(family, 0), 0
    for key, names in names_in_files(family).items():
        for value in [v for v in WRONG if not KEYS[key].good(v)]:
            error, seconds = refused(with_value(config, names[0], value))
            assert error is not None, f"{names[0]} = {value!r} was accepted"
            assert names[0] in str(error), f"{names[0]} = {value!r}: the error does not name it: {error}"
            assert seconds < 1, f"{names[0]} = {value!r} took {seconds:.1f} s"
            if isinstance(error, CheckpointError): assert "should be" in str(error) and len(str(error)) < 400
            tried += 1
    assert tried > 200


@pytest.mark.parametrize("family,variant", CASES)
def test_wrong_entries_of_rope_parameters_are_named(family, variant):
    config = small(family, variant)
    rope = config.get("rope_parameters") or {}
    ladders = {f"rope_parameters.{name}": one for name, one in rope.items() if isinstance(one, dict)} or {
        "rope_parameters": rope
    }
    for where, ladder in ladders.items():
        for entry in ladder:
            for value in ("x", -1, math.nan, [], {"a": 1}):
                if entry == "rope_type" and value == "x": continue                        # valid, but not built
                if entry in ("short_factor", "long_factor") and value == []: value = [1.0]
                error, _ = refused(with_value(config, f"{where}.{entry}", value))
                assert isinstance(error, CheckpointError) and entry in str(error), (
                    f"{where}.{entry} = {value!r}: {error}"
                )
    if rope.get("rope_type", "default") != "default":
        for entry in set(rope) & {"factor", "low_freq_factor", "short_factor", "long_factor"}:
            gone = json.loads(json.dumps(config))
            del gone["rope_parameters"][entry]
            error, _ = refused(gone)
            # those follow from the contexts
            if not (entry == "factor" and rope["rope_type"] in ("yarn", "longrope")):
                assert isinstance(error, CheckpointError) and entry in str(error), f"without {entry}: {error}"


TOGETHER = [  # values that are right alone and wrong together: family, changes, the key that is named
    ("llama", dict(num_key_value_heads=4), "num_key_value_heads"),
    ("llama", dict(hidden_size=50, head_dim=None), "hidden_size"),
    ("llama", dict(head_dim=7), "head_dim"), ("mixtral", dict(num_experts_per_tok=6), "num_experts_per_tok"),
    ("deepseek_v3", dict(n_group=3), "n_group"), ("deepseek_v3", dict(topk_group=5), "topk_group"),
    ("deepseek_v3", dict(num_experts_per_tok=7), "num_experts_per_tok"),
    ("gemma2", dict(layer_types=["full_attention"]), "layer_types"),
    ("gpt_neox", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.01)),
     "partial_rotary"),
]


@pytest.mark.parametrize("family,changes,key", TOGETHER)
def test_values_that_do_not_fit_together_are_named(family, changes, key):
    error, _ = refused({**small(family, 0), **changes})
    assert isinstance(error, CheckpointError) and key in str(error), error


# ---------------------------------------------------------------------------------------- what a configuration claims
def a_folder(tmp_path, config, tensors):
    from llm_workbench.files.safetensors import save_safetensors
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_safetensors(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("layers", ["2", 0, -1, 20_000, 100_000_000, 2.5, None, [3]])
def test_layers_that_the_file_does_not_hold_are_refused_at_once(layers, tmp_path):
    "A wrong number of layers ended in a TypeError, took 17 seconds, or never ended."
    folder = a_folder(
        tmp_path, {**small("llama", 0), "num_hidden_layers": layers}, {"model.norm.weight": torch.ones(48)}
    )
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        checkpoint = open_checkpoint(folder)
        Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("key,value", [("vocab_size", 98), ("hidden_size", 96), ("num_hidden_layers", 2),
                                       ("num_hidden_layers", 9_000)])
def test_counts_must_be_those_of_the_tensors(key, value):
    from models import small_model
    hf = small_model("llama")
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=key):
        Decoder.from_checkpoint({**hf.config.to_dict(), key: value}, hf.state_dict())
    assert time.perf_counter() - start < 1


def test_an_unknown_family_suggests_the_nearest():
    with pytest.raises(UnsupportedError, match="Did you mean 'llama'"): read_config(dict(model_type="lama"))
    assert "llama" in FAMILIES
