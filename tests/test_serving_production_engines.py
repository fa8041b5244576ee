"One description, nine dialects: every word is known, nothing is lost, no secret is written, wrong variants fail."
import argparse
import ast
import copy
import json
import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from protocol_server import BREAKS, protocol_server

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
Draft202012Validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed").Draft202012Validator

from llm_workbench.errors import InputError, SourceError, UnsupportedError, WorkbenchError
from llm_workbench.serving import production_engines as m
from llm_workbench.serving.production_engines import CHECKS, Deployment, Launch, conformance, engines, launch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import record_arguments as recorder  # noqa: E402

SCHEMAS = json.loads((ROOT / "nbs" / "11_serving" / "deployment_schemas.json").read_text())
PLAIN = Deployment("org/model", weight_bytes=16e9)
GGUF = ("llama-server", "Ollama")
# what says more than the default, field by field
OTHER = dict(name="mine", context=4096, concurrent=7, dtype="bfloat16", quantization="awq", kv="fp8", tensor_parallel=2,
             pipeline_parallel=2, memory=0.8, prefix_cache=False, adapters=(("a", "/lora/a"), ("b", "/lora/b")),
             tools="hermes", revision="abc123", host="localhost", port=9123)
# what an engine has no word for, and is not refused because it has no such notion
NO_NOTION = {("llama-server", "memory"), ("Ollama", "memory"), ("TGI", "name"), ("TensorRT-LLM", "name"),
             ("MLC-LLM", "name")}


def accepted(started): return m.wrong_words(started.engine, started.words, started.env)
def words(started):
    return [*started.words, *(f"{k}={v}" for k, v in started.env.items()), *sum(started.files.items(), ())]


# --- from the description to the words --------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", engines())
def test_everything_that_can_be_said_is_said_in_known_words(engine):
    plain = launch(PLAIN, engine)
    assert accepted(plain) == []
    silent = set()
    for field, value in OTHER.items():
        try: other = launch(replace(PLAIN, **{field: value}), engine)
        except UnsupportedError as e:
            assert field in str(e) and engine in str(e)
            continue
        assert accepted(other) == [], field
        if words(other) == words(plain) and other.after == plain.after: silent.add((engine, field))
    assert silent <= NO_NOTION, f"the description says it, the command does not: {silent - NO_NOTION}"


@pytest.mark.parametrize("engine", engines())
def test_any_description_ends_in_known_words_or_in_a_sentence(engine):
    draw = random.Random(engine)
    for _ in range(60):
        more = {f: v for f, v in OTHER.items() if draw.random() < 0.3}
        more |= dict(context=draw.randrange(1, 10**6), concurrent=draw.randrange(1, 2000),
                     port=draw.randrange(1, 65536), name="x",
                     dtype=draw.choice(m.CHOICES["dtype"]), kv=draw.choice(m.CHOICES["kv"]),
                     key=draw.choice([None, "SERVE_KEY"]), model=draw.choice(["org/model", "/models/x", "x.gguf"]))
        try: started = launch(replace(PLAIN, **more), engine)
        except WorkbenchError as e: assert len(str(e)) > 20
        else: assert accepted(started) == [], started


@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("mutate", [
    lambda t: t.replace("--", "--new-", 1) if "--" in t else t.replace("OLLAMA_", "OLAMA_", 1),       # a renamed flag
    lambda t: t + " extra-word",                                                                      # a word too many
    lambda t: re.sub(r"\{(context|concurrent|slots|port)\}", "many", t),                              # no number
], ids=["renamed", "a word too many", "no number"])
def test_a_wrong_template_is_found(engine, mutate, monkeypatch):
    data = copy.deepcopy(engines())
    flags = data[engine]["flags"]
    field = next(f for f in ("context", "port", "host") if flags[f] and ";" not in flags[f]
                 and mutate(flags[f]) != flags[f])
    flags[field] = mutate(flags[field])
    monkeypatch.setattr(m, "engines", lambda: data)
    assert m.wrong_words(engine, (s := launch(PLAIN, engine)).words, s.env), flags[field]


@pytest.mark.parametrize("engine, field, value", [
    ("vLLM", "kv", {"fp8": "--kv-cache-dtype fp9"}), ("SGLang", "kv", {"fp8": "--kv-cache-dtype fp8"}),
    ("TGI", "dtype", {"bfloat16": "--dtype auto"}), ("llama-server", "kv", {"int8": "--cache-type-k int8"}),
    ("SGLang", "prefix_cache", {"False": "--disable-radix-cache=1"}),
    ("vLLM", "prefix_cache", {"False": "--no-prefix"}), ("Ollama", "kv", {"int8": "OLLAMA_KV_CACHE_TYPE=int8"}),
    ("MLC-LLM", "prefix_cache", {"False": "--prefix-cache-mode off"}),
])
def test_a_value_that_the_engine_does_not_know_is_found(engine, field, value, monkeypatch):
    data = copy.deepcopy(engines())
    data[engine]["flags"][field] = value
    monkeypatch.setattr(m, "engines", lambda: data)
    said = {"True": True, "False": False}.get(next(iter(value)), next(iter(value)))
    started = launch(replace(PLAIN, **{field: said}), engine)
    assert len(accepted(started)) == 1


def test_tritons_model_file_is_vllms_command():
    d = replace(PLAIN, tensor_parallel=2, kv="fp8", prefix_cache=False, context=4096, quantization="fp8")
    found = json.loads(launch(d, "Triton").files["/models/model/1/model.json"])
    known = {n for a in m.arguments()["vLLM"]["arguments"] for n in a["names"]}
    assert {f"--{k.replace('_', '-')}" for k in found} - {"--model"} <= known
    assert found["model"] == "org/model" and found["tensor_parallel_size"] == 2 and found["max_model_len"] == 4096
    assert found["enable_prefix_caching"] is False and found["gpu_memory_utilization"] == 0.9


# --- memory -----------------------------------------------------------------------------------------------------------
def caches(shares, d):
    "What each kind of engine makes of its share, in bytes of cache."
    weights = d.weight_bytes / d.gpus
    return dict(share=shares["share"] * d.gpu_bytes - weights - d.activation_bytes,
                static=shares["static"] * d.gpu_bytes - weights,
                free=shares["free"] * (d.gpu_bytes - weights - d.activation_bytes))


def all_the_same(memory_shares):
    for d in (PLAIN, replace(PLAIN, memory=0.5), replace(PLAIN, weight_bytes=141e9, tensor_parallel=4),
              replace(PLAIN, weight_bytes=60e9), replace(PLAIN, activation_bytes=10e9, gpu_bytes=48e9)):
        for kind, cache in caches(memory_shares(d), d).items():
            assert -1e-3 < (d.cache_bytes - cache) / d.gpu_bytes < 1.5e-3, (kind, d)


def test_every_engine_gets_the_same_cache(): all_the_same(m.memory_shares)


@pytest.mark.parametrize("wrong", [
    lambda d: dict.fromkeys(("share", "static", "free"), d.memory),
    lambda d: m.memory_shares(d) | dict(free=d.cache_bytes / d.gpu_bytes),
    lambda d: m.memory_shares(d) | dict(static=d.memory),
    lambda d: m.memory_shares(replace(d, activation_bytes=0)),
    lambda d: m.memory_shares(replace(d, tensor_parallel=1, gpu_bytes=d.gpu_bytes * d.gpus)),
], ids=["one number for all", "of all memory", "activations within", "no activations", "one large GPU"])
def test_wrong_conversions_are_rejected(wrong):
    with pytest.raises(AssertionError): all_the_same(wrong)


@pytest.mark.parametrize("change", [
    dict(context=0), dict(port=0), dict(port=70_000), dict(kv="fp16"), dict(dtype="bf16"), dict(weight_bytes=80e9),
    dict(key="sk-secret"), dict(name="a b"), dict(replicas=0), dict(memory=0.1)])
def test_descriptions_that_cannot_be_are_refused(change):
    with pytest.raises(InputError): replace(PLAIN, **change)


# --- the checker ------------------------------------------------------------------------------------------------------
GOOD = [("vLLM", "vllm serve org/model --max-model-len=4096 --port 8000"),
        ("vLLM", "vllm serve org/model --lora-modules a=/x b=/y --enable-lora"),
        ("vLLM", "vllm serve org/model --no-enable-prefix-caching --gpu-memory-utilization .9"),
        ("SGLang", "sglang serve --model-path M --context-length 128k --lora-paths a=/x b=/y"),
        ("llama-server", "/usr/bin/llama-server -m x.gguf -ngl all --parallel 4 -fa on --temp -1"),
        ("LMDeploy", "lmdeploy serve api_server M --tp 2 --allow-origins a b"),
        ("MLC-LLM", "mlc_llm serve M --allow-origins '[\"http://a\"]' --port $PORT")]
BAD = [("vLLM", "vllm serve org/model --max-model-length 4096"), ("vLLM", "vllm serve org/model --max-model-le 4096"),
       ("vLLM", "vllm serve org/model --port"), ("vLLM", "vllm serve org/model --port x"),
       ("vLLM", "vllm serve org/model --enforce-eager=1"), ("vLLM", "vllm serve org/model --enforce-eager 1"),
       ("vLLM", "vllm serve org/model --PORT 1"), ("vLLM", "vllm server org/model --port 1"),
       ("vLLM", "vllm serve org/model --port 1 --port 2"), ("vLLM", "vllm serve org/model --dtype bf16"),
       ("SGLang", "sglang serve --model-path M --tensor-parallel-size 2.0"),
       ("SGLang", "sglang serve --model-path M --tp-size 2 --tensor-parallel-size 2"),
       ("SGLang", "sglang serve --model-path M --mem-fraction-static 90%"),
       ("llama-server", "llama-server -m x.gguf -ctk int8"), ("llama-server", "llama-server x.gguf"),
       ("MLC-LLM", "mlc_llm serve M --allow-origins http://a"), ("Ollama", "ollama serve --port 11434")]


def judged(wrong_words):
    for engine, command in GOOD: assert wrong_words(engine, shlex.split(command)) == [], command
    for engine, command in BAD: assert wrong_words(engine, shlex.split(command)), command


def test_the_checker_knows_good_from_bad(): judged(m.wrong_words)


def by_names_only(engine, command):
    known = {n for a in m.arguments()[engine]["arguments"] for n in a["names"]}
    return [w for w in command if w.startswith("-") and w.partition("=")[0] not in known]

def by_beginnings(engine, command):
    "As argparse does it, unless told otherwise."
    known = {n for a in m.arguments()[engine]["arguments"] for n in a["names"]}
    def whole(w): return next((n for n in sorted(known) if n.startswith(w)), w) if w.startswith("--") else w
    return m.wrong_words(engine, list(map(whole, command)))

def without_values(engine, command):
    return [w for w in m.wrong_words(engine, command) if "cannot be" not in w]

def without_counting(engine, command):
    return [w for w in m.wrong_words(engine, command) if "alone" not in w and "twice" not in w]

def in_capitals_too(engine, command):
    return m.wrong_words(engine, [w.lower() if w.startswith("--") else w for w in command])


@pytest.mark.parametrize("wrong", [by_names_only, by_beginnings, without_values, without_counting, in_capitals_too])
def test_wrong_checkers_are_rejected(wrong):
    with pytest.raises(AssertionError): judged(wrong)


def test_the_record_is_whole():
    for engine, found in m.arguments().items():
        assert found["how"] in ("parser", "source", "notes") and found["version"] and found["recorded"] > "2026"
        names = [n for a in found["arguments"] for n in a["names"]]
        assert len(names) > 10 and all(a["takes"] in (*m.VALUES, "json", "flag") for a in found["arguments"])
        doubled = {n for n in names if names.count(n) > 1}
        assert len(doubled) <= 4, (engine, doubled)      # SGLang registers a few old spellings again


# --- the recorder -----------------------------------------------------------------------------------------------------
DEFINITIONS = """
parser.add_argument("model", type=str)
parser.add_argument("--port", "-p", type=int, default=8000)
parser.add_argument("--share", type=float)
parser.add_argument("--kind", choices=["a", "b"])
parser.add_argument("--eager", action="store_true")
parser.add_argument("--cache", action=argparse.BooleanOptionalAction)
parser.add_argument("--names", nargs="+", type=str)
parser.add_argument("--settings", type=json.loads)
parser.add_argument("--level", type=int, choices=[1, 2])
"""


def test_definitions_are_read_as_argparse_reads_them():
    parser = argparse.ArgumentParser(add_help=False)
    exec(DEFINITIONS, dict(parser=parser, argparse=argparse, json=json))
    read = [recorder.argparse_call(c) for c in recorder.calls(ast.parse(DEFINITIONS))]
    assert read[0] is None
    for a, found in zip(parser._actions[1:], read[1:], strict=True):
        assert set(a.option_strings) == set(found["names"])
        assert (found["takes"] == "flag") == (a.nargs == 0)
        assert found.get("many", False) == (a.nargs == "+")
        assert found.get("choices") == ([str(c) for c in a.choices] if a.choices else None)
        if a.nargs != 0: assert found["takes"] == {None: "str", "loads": "json"}.get(
            a.type and a.type.__name__, a.type and a.type.__name__)


@pytest.mark.parametrize("source, expected", [
    ('port: A[int, "The port."] = 1', dict(names=["--port"], takes="int")),
    ('x_y: A[Optional[float], "Text."] = None', dict(names=["--x-y"], takes="float")),
    ('on: A[bool, "Text."] = False', dict(names=["--on"], takes="flag")),
    ('tp: A[int, Arg(help="T", cli_name="--tp-size", aliases=["--tensor"])] = 1',
     dict(names=["--tp-size", "--tensor"], takes="int")),
    ('kind: A[Literal["a", "b"], "Text."] = "a"', dict(names=["--kind"], takes="str", choices=["a", "b"])),
    ('many: A[Optional[List[str]], "Text."] = None', dict(names=["--many"], takes="str", many=True)),
    ('old: A[str, Arg(help="Deprecated: gone.")] = ""', dict(names=["--old"], takes="str", deprecated=True)),
    ('kind: A[str, Arg(help="T", choices=CHOICES)] = "a"', dict(names=["--kind"], takes="str", choices=["x"])),
])
def test_fields_of_sglang_are_read(source, expected):
    assert recorder.field(ast.parse(source).body[0], dict(CHOICES=["x"])) == [expected]


def test_what_is_no_option_is_left_out():
    assert recorder.field(ast.parse('x: A[int, Arg(help="T", no_cli=True)] = 1').body[0], {}) == []


# --- shells, containers, clusters -------------------------------------------------------------------------------------
def run_with_stand_in(tmp_path, name, command, **env):
    "What a program of that name receives when a shell runs the command: its arguments and a variable."
    program = tmp_path / name
    program.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()


@pytest.mark.parametrize("engine", ["vLLM", "SGLang", "LMDeploy", "llama-server"])
def test_a_shell_hands_over_every_word_as_it_was_meant(engine, tmp_path):
    d = replace(PLAIN, key="SERVE_KEY", adapters=(("a", "/my lora's/$HOME \"x\""),))
    started = launch(d, engine)
    meant = ["a key's value" if w == "$SERVE_KEY" else w for w in started.words[1:]]
    name = started.words[0]
    assert run_with_stand_in(tmp_path, name, ["sh", "-c", started.shell()], SERVE_KEY="a key's value") == meant
    inner = m.exec_form(m.inside(d, engine).words)           # and in a container, where no shell is asked
    opened = [w.replace("127.0.0.1", "0.0.0.0") for w in meant]
    assert run_with_stand_in(tmp_path, name, inner, SERVE_KEY="a key's value") == opened


DEPLOYED = [e for e in engines() if engines()[e]["image"]]


def described(engine):
    return replace(PLAIN, key="SERVE_KEY" if engines()[engine]["key"] else None, name="Meta_Llama-3.1")


@pytest.mark.parametrize("engine", DEPLOYED)
def test_files_are_valid_open_no_door_and_hold_no_secret(engine, monkeypatch):
    monkeypatch.setenv("SERVE_KEY", "hunter2")
    d = described(engine)
    compose = m.compose(d, engine)
    assert not list(Draft202012Validator(SCHEMAS["compose"]["schema"]).iter_errors(compose))
    objects = m.kubernetes(d, engine)
    for o in objects:
        schema = SCHEMAS["kubernetes"]["kinds"][o["kind"]] | {"$defs": SCHEMAS["kubernetes"]["$defs"]}
        assert not list(Draft202012Validator(schema).iter_errors(o)), o["kind"]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", o["metadata"]["name"])
    texts = [m.dockerfile(d, engine), m.as_yaml(compose), m.as_yaml(*objects)]
    if not engines()[engine].get("files"):
        texts += [m.docker_run(d, engine), m.modal_file(d, engine), m.as_yaml(m.skypilot(d, engine))]
        assert f"-p 127.0.0.1:{d.port}:" in texts[3]
        ast.parse(texts[4])
    assert not any("hunter2" in t or ":latest" in t for t in texts)
    service = next(iter(compose["services"].values()))
    assert all(p.startswith("127.0.0.1:") for p in service["ports"])
    # JSON form of an entry point knows no variables: none may stand there without a shell
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", texts[0], re.M)[1])
    assert entry[0] == "/bin/sh" or not any("$" in w for w in entry)
    if d.key: assert any("SERVE_KEY" in str(x) for x in (compose, objects))


def test_a_deployment_listens_inside_and_not_outside():
    for engine in DEPLOYED:
        inside, outside = m.inside(described(engine), engine), launch(described(engine), engine)
        assert any("0.0.0.0" in w for w in words(inside)) and not any("0.0.0.0" in w for w in words(outside)), engine
    with pytest.raises(InputError): launch(replace(PLAIN, host="0.0.0.0"), "vLLM")
    assert launch(replace(PLAIN, host="0.0.0.0", key="SERVE_KEY"), "vLLM").words


def test_replicas_share_their_weights_and_scale_by_who_waits():
    one, many = m.kubernetes(PLAIN, "vLLM"), m.kubernetes(replace(PLAIN, replicas=2), "vLLM", most=5)
    assert [o["kind"] for o in one] == ["PersistentVolumeClaim", "Deployment", "Service"]
    assert one[0]["spec"]["accessModes"] == ["ReadWriteOnce"] and many[0]["spec"]["accessModes"] == ["ReadWriteMany"]
    scaler = many[3]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    with pytest.raises(UnsupportedError): m.kubernetes(PLAIN, "TensorRT-LLM", most=2)
    large = m.kubernetes(replace(PLAIN, tensor_parallel=4, weight_bytes=141e9), "vLLM")[1]["spec"]["template"]["spec"]
    assert large["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 4}


def test_yaml_comes_back_as_it_was():
    objects = m.kubernetes(described("SGLang"), "SGLang", most=3)
    assert list(yaml.safe_load_all(m.as_yaml(*objects))) == objects
    command = objects[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "$(SERVE_KEY)" in command and command[:2] == ["sglang", "serve"]


# --- conformance ------------------------------------------------------------------------------------------------------
def test_a_whole_server_passes_everything():
    with protocol_server("secret") as url: rows = conformance(url, "secret")
    assert [r.check for r in rows] == [c[0] for c in CHECKS]
    assert all(r.passed for r in rows), [r for r in rows if not r.passed]


def test_each_check_has_something_that_it_alone_must_find():
    assert set(BREAKS.values()) == {c[0] for c in CHECKS}


@pytest.mark.parametrize("broken", BREAKS)
def test_each_break_is_found_by_its_row(broken):
    row = [c for c in CHECKS if c[0] == BREAKS[broken]]
    with protocol_server("secret") as url: assert conformance(url, "secret", "quick", checks=row)[0].passed
    with protocol_server("secret", broken) as url: found = conformance(url, "secret", "quick", timeout=2, checks=row)
    assert found[0].passed is False, found


def test_no_failure_ends_the_others():
    def explode(w): raise KeyError("choices")
    checks = [("first", "", explode, None), ("second", "", lambda w: 1, lambda w, c: c == 1),
              ("third", "", lambda w: 1, lambda w, c: c["no"]), ("fourth", "", lambda w: 1, lambda w, c: None)]
    with protocol_server() as url: rows = conformance(url, checks=checks)
    assert [r.passed for r in rows] == [False, True, False, None] and "KeyError" in rows[0].came


def test_without_a_key_none_is_tried():
    with protocol_server() as url: row = conformance(url, checks=[c for c in CHECKS if c[0] == "key"])[0]
    assert row.passed is None


def test_nobody_there_and_no_address():
    with pytest.raises(SourceError, match="no model is served"): conformance("http://127.0.0.1:9")
    with pytest.raises(InputError): conformance("127.0.0.1:8000")
    with protocol_server("secret") as url, pytest.raises(SourceError): conformance(url, "wrong")


def test_a_launch_is_shown_on_lines():
    shown = Launch("x", ("serve", "a b", "--key", "$KEY"), {"E": "$KEY"}, {}, "then").shell()
    assert shown == "E=\"$KEY\" serve 'a b' \\\n    --key \"$KEY\"\nthen"


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_compose_leaves_dollars_to_whom_they_belong(engine):
    d = replace(PLAIN, key="SERVE_KEY", adapters=(("a", "/lora/$x"),))
    entry = m.compose(d, engine)["services"]["model"]["entrypoint"]
    assert all("$" not in w.replace("$$", "") for w in entry)
    assert [w.replace("$$", "$") for w in entry] == m.exec_form(m.inside(d, engine).words)
