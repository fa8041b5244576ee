"Which engine runs here: asked of the machine, not of a table; known-wrong ways to answer are rejected."
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.inference import other_engines as m
from llm_workbench.inference.other_engines import ENGINES, Engine, Host

CPU, NVIDIA = Host("Linux", "x86_64", ("cpu",)), Host("Linux", "x86_64", ("cpu", "nvidia"))
FINE = Engine("Fine", "", "", ("cpu",), "pip install fine", "json")


def environment(home: Path, name: str, says: str) -> Path:
    "A Python of an environment that does what `says` (a shell line) tells it."
    python = home / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(0o755)
    return python


def judged(why_not, tmp_path):
    "What a correct `why_not` says of engines that run, that lack a device, that are not there and that crash."
    environment(tmp_path, "good", f'exec {sys.executable} "$@"')
    environment(tmp_path, "bad", "echo 'ImportError: libcuda.so.1: cannot open shared object file' >&2; exit 1")
    environment(tmp_path, "dead", "kill -ILL $$")
    assert why_not(FINE, CPU, tmp_path) is None
    assert why_not(replace(FINE, environment="good"), CPU, tmp_path) is None
    assert "computes on nvidia" in why_not(replace(FINE, devices=("nvidia",)), CPU, tmp_path)
    assert why_not(replace(FINE, devices=("nvidia",)), NVIDIA, tmp_path) is None
    assert "not installed" in why_not(replace(FINE, imports="no_such_engine"), CPU, tmp_path)
    assert "libcuda.so.1" in why_not(replace(FINE, environment="bad"), CPU, tmp_path)
    assert "signal 4" in why_not(replace(FINE, environment="dead"), CPU, tmp_path)
    assert "no program nothing-here" in why_not(replace(FINE, program="nothing-here"), CPU, tmp_path)
    assert why_not(replace(FINE, program="sh"), CPU, tmp_path) is None


def test_reasons_are_found_by_looking(tmp_path): judged(m.why_not, tmp_path)


# --- mutants ----------------------------------------------------------------------------------------------------------
def by_the_table_alone(engine, host, home):
    return None if set(engine.devices) & set(host.devices) else f"it computes on {' or '.join(engine.devices)}"

def by_all_devices(engine, host, home):
    "Wants every device that the engine knows, not one of them."
    if not set(engine.devices) <= set(host.devices): return "it computes on nvidia"
    return m.why_not(replace(engine, devices=("cpu",)), CPU, home)

def by_the_file_of_python(engine, host, home):
    "Takes an environment for an engine that works."
    if home and (home / engine.environment / "bin" / "python").exists() and engine.environment: return None
    return m.why_not(engine, host, home)

def in_this_python_only(engine, host, home): return m.why_not(replace(engine, environment=""), host, home)


@pytest.mark.parametrize("wrong", [by_the_table_alone, by_the_file_of_python, in_this_python_only])
def test_wrong_ways_to_answer_are_rejected(wrong, tmp_path):
    with pytest.raises((AssertionError, TypeError)): judged(wrong, tmp_path)


def test_one_of_several_devices_is_enough(tmp_path):
    both = replace(FINE, devices=("nvidia", "cpu"))
    assert m.why_not(both, CPU, tmp_path) is None
    assert by_all_devices(both, CPU, tmp_path) is not None      # the mutant that this case is for


# --- processes --------------------------------------------------------------------------------------------------------
def test_a_process_sees_nothing_of_this_environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    seen = m.run_python(Path(sys.executable), "import os, sys; print(os.environ.get('PYTHONPATH'), sys.path[0] == '')")
    assert seen.split() == ["None", "False"]


@pytest.mark.parametrize("code, words", [("raise ValueError('the last words')", "the last words"),
                                         ("import sys; sys.exit(3)", "exit status 3"),
                                         ("import os; os.abort()", "signal 6"), ("while True: pass", "no answer in")])
def test_what_ends_a_process_is_said(code, words):
    with pytest.raises(UnsupportedError, match=words): m.run_python(Path(sys.executable), code, seconds=3)


def test_the_home_of_the_peers_is_looked_for_upwards(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / ".venv-peers").mkdir()
    assert m.peers_home(inner) == tmp_path.resolve() / ".venv-peers"
    (inner / ".venv-peers").touch()                             # a file is none
    assert m.peers_home(inner) == tmp_path.resolve() / ".venv-peers"


# --- recipes and records ----------------------------------------------------------------------------------------------
def test_recipes_are_programs_and_filled_in():
    for engine in ENGINES.values():
        if not engine.recipe:
            with pytest.raises(UnsupportedError, match=engine.source): m.recipe_for(engine)
            continue
        text = m.recipe_for(engine, "MODEL", "Hello there")
        assert "{" + "model}" not in text and "{" + "prompt}" not in text and "MODEL" in text
        if engine.imports:
            compile(text, engine.name, "exec")
            assert f"import {engine.imports}" in text or f"from {engine.imports}" in text


def test_engines_name_environments_and_models_that_are_built():
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    try: import peers
    finally: sys.path.pop(0)
    for engine in ENGINES.values():
        if not engine.environment: continue
        assert peers.ENVIRONMENTS[engine.environment].imports == engine.imports, engine.name
        assert engine.model in peers.MODELS, engine.name


def test_without_a_model_the_reason_is_said(tmp_path):
    with pytest.raises(UnsupportedError, match="no model for OpenVINO GenAI: make peers writes it"):
        m.try_engine(ENGINES["OpenVINO GenAI"], tmp_path)
    with pytest.raises(UnsupportedError, match="no model"): m.try_engine(ENGINES["ExLlamaV3"], None)


def test_an_unknown_engine_is_named():
    with pytest.raises(InputError, match="Did you mean 'CTranslate2'"): m.engine_named("ctranslate")


# --- results ----------------------------------------------------------------------------------------------------------
RESULT = dict(
    tasks={"decode": {}, "decode after 4096": {}}, weight_bytes={"a": 2e6, "b": 1e6},
    samples={"decode, a": [1.0, 3.0, 2.0], "decode, b": [5.0], "decode after 4096, a": [9.0], "read bandwidth": [1.0]},
    spread={"decode, a": [1.4, 2.6], "decode, b": [5.0, 5.0], "decode after 4096, a": [9.0, 9.0]},
    limits={"decode, a": 0.5, "decode, b": 0.1, "decode after 4096, a": 0.2})


def test_speeds_are_medians_of_their_own_task_fastest_first():
    rows = m.engine_speeds(RESULT, "decode")
    found = [(r["engine"], r["speed"], r["low"], r["share"]) for r in rows]
    assert found == [("b", 5.0, 5.0, 0.1), ("a", 2.0, 1.4, 0.5)]
    assert [r["speed"] for r in m.engine_speeds(RESULT, "decode after 4096")] == [9.0]
    with pytest.raises(InputError, match="'prefill' was not measured; there are decode, decode after 4096"):
        m.engine_speeds(RESULT, "prefill")


def test_results_are_read_by_device(tmp_path):
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "peers.json").write_text(json.dumps(RESULT))
    (tmp_path / "box" / "decode.json").write_text("{}")
    assert list(m.peer_results(tmp_path)) == ["box"] and m.peer_results(tmp_path / "box") == {}
