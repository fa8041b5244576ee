"The landscape's data: every record sourced, every configuration real, every count as published, every claim decided."
import json
import re
import subprocess
import sys
from math import prod

import pytest

from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.files.cards import LICENCES
from llm_workbench.hardware.machine import dense_parameters, kv_bytes_per_token
from llm_workbench.landscape import models as F

MODELS = F.catalogue()["models"]
SIZED = [m for m in MODELS if m["config"]]
by_name = {m["name"]: m for m in MODELS}

# What the two guides name, by their own words: each must be in the data.
NAMED = """Llama 3 8B|Llama 3 70B|Llama 3.1 8B|Llama 3.1 70B|Llama 3.1 405B|Llama 3.2 1B|Llama 3.2 3B
Llama 3.2 11B Vision|Llama 3.2 90B Vision|Llama 3.3 70B|Mistral 7B v0.3|Mistral NeMo 12B|Mistral Small 3
Codestral 22B|Mixtral 8x7B|Mixtral 8x22B|Gemma 2 2B|Gemma 2 9B|Gemma 2 27B|CodeGemma 7B|PaliGemma 3B
Qwen2.5 0.5B|Qwen2.5 1.5B|Qwen2.5 3B|Qwen2.5 7B|Qwen2.5 14B|Qwen2.5 32B|Qwen2.5 72B|Qwen2.5-Coder 7B
Qwen2.5-Coder 14B|Qwen2.5-Coder 32B|Qwen2.5-Math 7B|Qwen2.5-Math 72B|QwQ 32B|Qwen2-VL 7B|Qwen2-VL 72B
DeepSeek-V2|DeepSeek-V3|DeepSeek-R1|DeepSeek-R1-Distill-Qwen-1.5B|DeepSeek-R1-Distill-Qwen-7B
DeepSeek-R1-Distill-Llama-8B|DeepSeek-R1-Distill-Qwen-14B|DeepSeek-R1-Distill-Qwen-32B
DeepSeek-R1-Distill-Llama-70B|DeepSeek-Coder-V2|DeepSeek-Coder 33B|Phi-3-mini|Phi-3-small|Phi-3-medium|Phi-4
Phi-4-mini|Command R+|Falcon 180B|Yi 34B|Orca 3|SOLAR 10.7B|OLMo 7B|OLMo 2 7B|Pythia 6.9B|Pythia 12B|DBRX
Snowflake Arctic|Hermes 3 8B|SuperNova 70B|Sparse Llama 8B|GPT-4|GPT-4o|o1|Claude|Claude 3.5|Gemini"""


def test_every_model_of_the_guides_is_there():
    missing = set(re.split(r"[|\n]", NAMED)) - by_name.keys()
    assert not missing


def test_records_are_whole():
    wrong = []
    for m in MODELS:
        name = m["name"]
        needed = {"name", "organisation", "hub", "release", "released", "licence", "open_data", "modality", "context",
                  "source", "config", "claims"}
        if needed - m.keys(): wrong.append(f"{name} lacks {needed - m.keys()}")
        if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", m["release"]): wrong.append(f"{name}: release {m['release']}")
        if not m["source"].startswith("https://"): wrong.append(f"{name}: source {m['source']}")
        if (m["licence"] in LICENCES) != m["released"]: wrong.append(f"{name}: licence {m['licence']}")
        if (m["config"] is None) != ("why" in m): wrong.append(f"{name}: sizes, or the reason why there are none")
        if m["released"] != bool(m["hub"]) or (not m["released"] and m["config"]):
            wrong.append(f"{name}: released, hub and sizes disagree")
        if m["config"] and not (m["context"] and m["published"] and m["published_by"]):
            wrong.append(f"{name}: context or count missing")
        if m["modality"] != ("vision" if "vision_config" in (m["config"] or {}) else "text"):
            wrong.append(f"{name}: modality {m['modality']}")
        for link in ("derived_from", "predecessor"):
            if link in m and by_name.get(m[link], dict(release="none"))["release"] > m["release"]:
                wrong.append(f"{name}: {link} {m[link]}")
        for claim in m["claims"]:
            if claim.keys() != {"guide", "section", "about", "says", "quote"}: wrong.append(f"{name}: {claim}")
            if claim["about"].startswith("licence") and claim["says"] not in LICENCES: wrong.append(f"{name}: {claim}")
            if str(claim["guide"]) not in F.catalogue()["guides"]: wrong.append(f"{name}: guide {claim['guide']}")
    assert not wrong, "\n".join(wrong)
    assert len(by_name) == len(MODELS), "a name twice"
    assert F.catalogue().keys() == {"guides", "models"}, "what licences say stands in files.cards"


@pytest.mark.parametrize("licence", LICENCES)
def test_licences_and_models_tell_the_same(licence):
    "A family that the table of licences gives as an example has a model under it, if the list has the family at all."
    wrong = {}
    for family in LICENCES[licence].families.split(", "):
        if "(" in family or family.startswith(("most ", "the first ")): continue  # a part of the family
        named = re.compile(rf"{re.escape(family)}(?![\w.])")
        found = {m["licence"] for m in MODELS if m["released"] and named.match(m["name"])}
        if found and licence not in found: wrong[family] = found
    assert not wrong


def test_lineage_has_no_circle():
    for m in MODELS:
        seen = []
        while m:
            assert m["name"] not in seen, seen
            seen.append(m["name"])
            m = by_name.get(m.get("derived_from") or m.get("predecessor"))


@pytest.mark.parametrize("model", [m for m in SIZED if m["config"]["model_type"] != "arctic"], ids=lambda m: m["name"])
def test_transformers_accepts_the_configuration(model):
    from transformers import AutoConfig
    settings = AutoConfig.for_model(**model["config"])
    assert settings.model_type == model["config"]["model_type"]
    parts = {"text_config": settings.get_text_config(), "vision_config": getattr(settings, "vision_config", None),
             None: settings}
    for part, values in parts.items():
        given = model["config"].get(part, {}) if part else model["config"]
        given = {k: v for k, v in given.items() if not isinstance(v, dict)}
        lost = {k: v for k, v in given.items() if k != "model_type" and getattr(values, k, None) != v}
        assert not lost, f"transformers reads other sizes: {lost}"


@pytest.mark.parametrize("name, total, active", [
    ("Llama 3.1 8B", 8_030_261_248, None), ("Llama 3.1 70B", 70_553_706_496, None),
    ("Llama 3.1 405B", 405_853_388_800, None), ("Mixtral 8x7B", 46_702_792_704, 12_879_925_248),
    ("Gemma 2 2B", 2_614_341_888, None), ("Pythia 12B", 11_846_072_320, None),
    ("Llama 3.2 1B", 1_235_814_400, None), ("SmolLM2 135M", 134_515_008, None), ("Qwen2.5 72B", 72_706_203_648, None)])
def test_known_counts(name, total, active):
    assert F.count_parameters(F.config_of(name)) == (total, active or total)


@pytest.mark.parametrize("name", [m["name"] for m in SIZED if m["config"]["model_type"] in ("llama", "mistral")])
def test_the_formula_of_the_hardware_part_counts_dense_llamas_alike(name):
    "One counts by arithmetic, the other by transformers' constructors: they must agree wherever both apply."
    config = F.config_of(name)
    assert F.count_parameters(config) == (dense_parameters(config),) * 2
    assert F.cache_bytes(config, 1) == kv_bytes_per_token(config)


def test_counts_are_the_published_ones():
    wrong = []
    for m in SIZED:
        total, active = F.count_parameters(m["config"])
        if abs(total / m["published"] - 1) > 0.01: wrong.append(f"{m['name']}: {total:,}, published {m['published']:,}")
        if abs(active / m.get("published_active", active) - 1) > 0.03: wrong.append(f"{m['name']}: {active:,} active")
        if (active < total) != ("published_active" in m):
            wrong.append(f"{m['name']}: a mixture needs a published active count")
    assert not wrong, "\n".join(wrong)


def test_arctic_is_what_its_makers_describe():
    "10B dense and 128 experts of 3.66B each (Snowflake, 2024)."
    shapes = F.parameter_shapes(F.config_of("Snowflake Arctic"))
    experts = sum(prod(s) for n, s in shapes.items() if ".experts." in n)
    dense = sum(map(prod, shapes.values())) - experts
    assert round(experts / 128 / 1e9, 2) == 3.66 and round(dense / 1e9) == 10


@pytest.mark.parametrize("name", ["Llama 3.1 8B", "Qwen2.5 7B", "Gemma 2 9B", "Phi-4", "Falcon 180B", "DBRX",
                                  "DeepSeek-V3", "Pythia 1B", "Llama 3.2 11B Vision", "Mistral 7B v0.1"])
def test_cache_follows_what_transformers_reads(name):
    "The same sum from transformers' settings object, which knows each family's defaults."
    from transformers import AutoConfig
    config, tokens = F.config_of(name), 6000
    text = AutoConfig.for_model(**config).get_text_config()
    places = ((text, "num_kv_heads"), (getattr(text, "attn_config", None), "kv_n_heads"), (text, "num_key_value_heads"),
              (text, "num_attention_heads"))
    K = next(heads for place, name in places if (heads := getattr(place, name, None)))
    D = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = text.kv_lora_rank + text.qk_rope_head_dim if hasattr(text, "kv_lora_rank") else 2 * K * D
    looking_at_images = getattr(text, "cross_attention_layers", None) or ()
    layers = [i for i in range(text.num_hidden_layers) if i not in looking_at_images]
    window = getattr(text, "sliding_window", None)
    one = "sliding_attention" if window else "full_attention"
    types = getattr(text, "layer_types", None) or [one] * text.num_hidden_layers
    kept = sum(min(tokens, window) if types[i] == "sliding_attention" else tokens for i in layers)
    assert F.cache_bytes(config, tokens) == 2 * per_token * kept
    assert F.cache_bytes(config, 1) == 2 * per_token * len(layers)


@pytest.mark.parametrize("format, bits", [("Q2_K", 3.1593), ("Q4_K_M", 4.8944), ("Q6_K", 6.5633), ("Q8_0", 8.5008)])
def test_gguf_sizes_of_llama_are_the_documented_ones(format, bits):
    "Bits per weight of Llama 3.1 8B in llama.cpp's tools/quantize/README.md."
    config = F.config_of("Llama 3.1 8B")
    assert F.weight_bytes(config, format) * 8 / F.count_parameters(config)[0] == pytest.approx(bits, abs=2e-4)


def test_every_model_has_a_size_in_every_format():
    for m in SIZED:
        total = F.count_parameters(m["config"])[0]
        for format in F.FILE_FORMATS:
            assert 2.5 <= F.weight_bytes(m["config"], format) * 8 / total <= 32, (m["name"], format)


def test_every_statement_is_decided_and_the_known_ones_rightly():
    claims = F.check_claims()
    assert len(claims) == sum(len(m["claims"]) for m in MODELS)
    assert set(claims.verdict) == {"right", "wrong", "unverifiable"}
    undecided = set(claims[claims.verdict == "unverifiable"].about)
    assert undecided <= {"quality", "published weights"}, undecided
    verdict = lambda model, quote: claims[(claims.model == model) & (claims.says == quote)].verdict.tolist()
    assert verdict("Mixtral 8x7B", "56B") == ["wrong"] and verdict("Mixtral 8x7B", "12.9B active") == ["right"]
    assert verdict("Mixtral 8x22B", "141B") == verdict("Llama 3.1 70B", "bfloat16 ~140 GB") == ["right"]
    assert verdict("Llama 3.1 70B", "Q2_K ~24 GB") == ["wrong"]
    assert verdict("Codestral 22B", "Apache 2.0 for base models") == ["wrong"]
    assert verdict("DeepSeek-R1", "DeepSeek model license") == verdict("Orca 3", "Orca 3 | Microsoft") == ["wrong"]


def test_table_has_a_row_for_every_model():
    table = F.models()
    assert list(table.index) == list(by_name) and table.parameters.notna().sum() == len(SIZED)
    assert table.loc["Mixtral 8x7B", "active"] < table.loc["Mixtral 8x7B", "parameters"]
    assert table.openness[["GPT-4", "Pythia 1B", "Mixtral 8x7B", "Llama 3.1 8B"]].tolist() == [
        "closed", "open source AI", "open weight", "restricted weight"]


def test_bad_input_names_what_is_there():
    with pytest.raises(InputError, match="Did you mean 'Llama 3.1 8B'"): F.find("llama 3.1 8b")
    with pytest.raises(InputError, match="models()"): F.find("no such thing at all")
    with pytest.raises(UnsupportedError, match="no weights"): F.config_of("Claude")
    with pytest.raises(InputError, match="Did you mean 'Q4_K_M'"): F.weight_bytes(F.config_of("SmolLM2 135M"), "q4km")
    with pytest.raises(UnsupportedError, match="no_family"): F.parameter_shapes(dict(model_type="no_family"))
    with pytest.raises(InputError, match="model_type"): F.parameter_shapes({})


def test_a_configuration_is_a_copy():
    F.config_of("DBRX")["ffn_config"]["moe_top_k"] = 1
    assert F.config_of("DBRX")["ffn_config"]["moe_top_k"] == 4


def test_looking_up_a_model_loads_neither_transformers_nor_pandas():
    code = ("import json, sys; from llm_workbench.landscape.models import config_of, cache_bytes; "
            "cache_bytes(config_of('DeepSeek-V3'), 10); "
            "print(json.dumps([m for m in ('transformers', 'pandas', 'matplotlib') if m in sys.modules]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
