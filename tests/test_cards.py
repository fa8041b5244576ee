"Licences, model cards and file names: what a model claims of itself, and that no claim can do harm."
import random
import subprocess
import sys

import gguf
import pytest

from llm_workbench.errors import CheckpointError, InputError
from llm_workbench.files.cards import (LICENCES, GGUFName, ModelCard, gguf_claims, licence_id, openness,
                                       parse_gguf_name, readme_claims)
from llm_workbench.files.gguf import Fields


# ---- licences

def test_licences_are_complete():
    assert {"apache-2.0", "mit", "llama2", "llama3.1", "gemma", "deepseek", "qwen", "cc-by-nc-4.0", "mnpl", "mrl",
            "falcon-180b-tii-license-1.0", "databricks-open-model-license"} <= set(LICENCES)
    for key, licence in LICENCES.items():
        assert key == key.lower() and licence.url.startswith("https://") and licence.in_short
        assert licence.commercial.startswith(("yes", "no"))
    assert {k for k, licence in LICENCES.items() if licence.osi} == {"apache-2.0", "mit"}


def test_cards_stand_below_the_readers():
    "Tokenizers and sources may import cards, never the other way round."
    code = ("import sys, llm_workbench.files.cards; "
            "print([m for m in ('text.tokenizers', 'families.sources') if 'llm_workbench.' + m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("licence,code,data,wanted", [
    ("apache-2.0", True, True, "open source AI"), ("MIT", True, False, "open weight"),
    ("mit", False, True, "open weight"), ("llama3.1", True, True, "restricted weight"),
    ("mrl", False, False, "restricted weight"), ("my-own", True, True, "unknown"), (None, True, True, "unknown"),
    ("", False, False, "unknown")])
def test_openness(licence, code, data, wanted): assert openness(licence, code, data) == wanted


# ---- cards

@pytest.mark.parametrize("name,custom,wanted", [
    ("Apache-2.0", None, "apache-2.0"), (" mit ", None, "mit"), ("other", "MNPL", "mnpl"), ("Other", None, "other"),
    (None, "MRL", "mrl"), (["other", "llama3.1"], "x", "llama3.1"), ([], None, None), ("", "", None),
    ([None], ["", "gemma"], "gemma"), (3, None, "3")])
def test_licence_id(name, custom, wanted): assert licence_id(name, custom) == wanted


def test_a_card_shows_what_it_has_and_nothing_else():
    card = ModelCard("Tiny", "here", licence="gemma", parameters=10, nbytes=5, file_type="Q4_0", languages=["en", "ko"])
    text = card._repr_markdown_()
    assert "4.00 bits per weight" in text and LICENCES["gemma"].in_short in text and "en, ko" in text
    assert not any(word in text for word in ("organization", "base models", "datasets", "context"))
    assert "not stated" in ModelCard("Tiny", "here")._repr_markdown_()


FIELDS = set(ModelCard.__dataclass_fields__)


@pytest.mark.parametrize("text", ["", "no block", "---\nlicense: [\n---\n", "---\n- 1\n---\n",
                                  "---\nlicense:\nlanguage:\n---\n", "\x00\xff"])
def test_a_broken_readme_claims_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text, encoding="latin1")
    claims = readme_claims(tmp_path / "README.md")
    assert not any(claims.values()) and claims == readme_claims(tmp_path / "none.md") and set(claims) < FIELDS


def test_readme_claims_are_those_of_the_hub_library(tmp_path):
    import huggingface_hub
    data = huggingface_hub.ModelCardData(license="other", license_name="Qwen-Research", license_link="LICENSE",
                                         language=["en", "de"], base_model=["a/b"], datasets=["x/y"], tags=["t"])
    (tmp_path / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n# Card\n")
    assert readme_claims(tmp_path / "README.md") == dict(
        name=None, licence="qwen-research", licence_link="LICENSE", languages=["en", "de"], base_models=["a/b"],
        datasets=["x/y"], tags=["t"])


def claimed(**general):
    return gguf_claims(Fields({f"general.{k.replace('__', '.')}": v for k, v in general.items()}, "demo.gguf"))


def test_gguf_claims():
    found = claimed(name="Tiny", license="other", license__name="MRL", license__link="https://x", file_type=15,
                    languages=["en"], tags=["a"], organization="Nobody", base_model__count=2, base_model__1__name="C",
                    base_model__0__repo_url="https://huggingface.co/a/b")
    assert found == dict(name="Tiny", organization="Nobody", licence="mrl", licence_link="https://x", tags=["a"],
                         file_type="Q4_K_M", languages=["en"], base_models=["a/b", "C"])
    assert set(found) < FIELDS and not any(claimed().values())
    assert claimed(file_type=10**6)["file_type"] == "" and claimed(file_type=0)["file_type"] == "F32"
    assert claimed(base_model__count=10**12)["base_models"] == [], "a count in the file must not become a loop"


@pytest.mark.parametrize("wrong", [dict(name=3), dict(license=["mit"]), dict(languages="en"), dict(file_type="four"),
                                   dict(file_type=-1), dict(tags=1.5), dict(base_model__count="two"),
                                   dict(organization=True)])
def test_claims_of_a_wrong_type_are_damage(wrong):
    with pytest.raises(CheckpointError, match="demo.gguf"): claimed(**wrong)


# ---- file names

SPECIFICATION = {  # examples of ggml's docs/gguf.md
    "Mixtral-8x7B-v0.1-KQ2.gguf": GGUFName("Mixtral", "8x7B", None, "v0.1", "KQ2"),
    "Grok-100B-v1.0-Q4_0-00003-of-00009.gguf": GGUFName("Grok", "100B", None, "v1.0", "Q4_0", None, (3, 9)),
    "Hermes-2-Pro-Llama-3-8B-v1.0-F16.gguf": GGUFName("Hermes-2-Pro-Llama-3", "8B", None, "v1.0", "F16"),
    "Hermes-2-Pro-Llama-3-8B-F16.gguf": GGUFName("Hermes-2-Pro-Llama-3", "8B", None, None, "F16"),
    "Phi-3-mini-3.8B-ContextLength4k-instruct-v1.0.gguf":
        GGUFName("Phi-3-mini", "3.8B-ContextLength4k", "instruct", "v1.0"),
    "mtp-Qwen3-27B-v1.0-Q4_K_M.gguf": GGUFName("Qwen3", "27B", None, "v1.0", "Q4_K_M", sidecar="mtp"),
    "mmproj-Qwen2-VL-7B-v1.0-F16.gguf": GGUFName("Qwen2-VL", "7B", None, "v1.0", "F16", sidecar="mmproj")}
WILD = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": GGUFName("SmolLM2", "135M", "Instruct", None, "Q4_1"),
    "llama-2-7b-chat.Q5_K_S.gguf": GGUFName("llama-2", "7b", "chat", None, "Q5_K_S"),
    "Meta-Llama-3.1-8B-Instruct-IQ4_XS.gguf": GGUFName("Meta-Llama-3.1", "8B", "Instruct", None, "IQ4_XS"),
    "mistral-7b-instruct-v0.2.Q4_K_M.gguf": GGUFName("mistral", "7b", "instruct", "v0.2", "Q4_K_M"),
    "gpt-oss-20b-mxfp4.gguf": GGUFName("gpt-oss", "20b", None, None, "mxfp4"),
    "Qwen3-30B-A3B-UD-Q4_K_XL.gguf": GGUFName("Qwen3", "30B-A3B", None, None, "UD-Q4_K_XL"),
    "Adapter-7B-v1.0-F16-LoRA.gguf": GGUFName("Adapter", "7B", None, "v1.0", "F16", "LoRA"),
    "gemma.gguf": GGUFName("gemma"), "-.gguf": GGUFName("-") }


@pytest.mark.parametrize("name", [*SPECIFICATION, *WILD])
def test_gguf_names(name):
    parsed = parse_gguf_name(f"some/folder/{name}")
    assert parsed == (SPECIFICATION | WILD)[name]
    if "v1.0" in name or "v0.1" in name: assert parsed.conventional


def test_unconventional_names():
    assert not parse_gguf_name("not-a-known-arrangement.gguf").conventional
    for bad in ("model.safetensors", ".gguf", "", "x.gguf.part"):
        with pytest.raises(InputError, match="gguf"): parse_gguf_name(bad)


def test_names_that_the_gguf_package_writes():
    rng = random.Random(0)
    for _ in range(200):
        base, size = rng.choice(["Demo", "Big Model", "Llama-3.2"]), rng.choice(["7B", "8x22B", "135M", "1.5B"])
        tune, version = rng.choice([None, "Chat", "Instruct-Deep"]), rng.choice(["v1.0", "v0.3.1"])
        output, holds = rng.choice(["Q4_K_M", "BF16", "IQ2_XXS", "TQ1_0"]), rng.choice([None, "LoRA", "vocab"])
        name = gguf.naming_convention(None, base, tune, version, size, output, holds) + ".gguf"
        assert parse_gguf_name(name) == GGUFName(base.replace(" ", "-"), size, tune, version, output, holds), name
