"tools/peers.py and benchmarks/peers.py without a network and without engines: restarts, failures, turns, statistics."
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import peer_process  # noqa: E402
from benchmarks import peers as bench  # noqa: E402
from test_tools import load  # noqa: E402


@pytest.fixture
def tool(monkeypatch, tmp_path):
    "tools/peers.py with two small recipes; every step is noted in `said`, and fails where `fails` says so."
    module = load("peers")
    module.said, module.fails = [], set()
    monkeypatch.setattr(module, "ENVIRONMENTS", dict(
        one=module.Environment(("one==1",), "one", 0.001, ("extra",)),
        two=module.Environment(("two-x==2",), "two", 0.001, stands_in_for="two==2+cpu", by_default=False)))
    monkeypatch.setattr(module, "MODELS", {
        "folder": module.Model("", ("write", "{out}")), "m-one": module.Model("one", ("convert", "{folder}", "{out}"))})

    def run(title, command, log, environment=None):
        words = [str(c) for c in command]
        module.said.append(title)
        if title in module.fails: raise module.Failed(f"{title} failed (exit status 1): it was told to")
        if "--clear" in words:
            folder = Path(words[-1])
            if folder.exists(): module.shutil.rmtree(folder)
            info = folder / "lib" / "python3.11" / "site-packages" / "two_x-2.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text("Name: two-x\nVersion: 2\n\nName: stays\n")
        if words[0] in ("write", "convert"): Path(words[-1]).mkdir()
    monkeypatch.setattr(module, "run", run)
    module.home = tmp_path / "home"
    return module


# --- tools/peers.py ---------------------------------------------------------------------------------------------------
def test_everything_is_built_once(tool):
    assert tool.make([], tool.home) == []
    assert tool.built(tool.home, "one") and (tool.home / "models" / "m-one").is_dir()
    assert not (tool.home / "two").exists(), "that one is built only when it is asked for"
    tool.said.clear()
    assert tool.make([], tool.home) == [] and tool.said == []


def test_an_interrupted_step_is_done_again(tool):
    tool.fails = {"importing it"}
    failed = tool.make(["one"], tool.home)
    assert failed[0].startswith("one: importing it failed (exit status 1): it was told to (log: home/one.log)")
    assert failed[1].startswith("m-one: it needs one") and len(failed) == 2
    assert not tool.built(tool.home, "one"), "an environment counts only when the last step is done"
    tool.fails = set()
    assert tool.make(["one"], tool.home) == [] and tool.built(tool.home, "one")


def test_what_a_converter_left_half_written_does_not_count(tool):
    tool.make(["one"], tool.home)
    out = tool.home / "models" / "m-one"
    out.rename(out.with_name("m-one.partial"))
    (out.with_name("m-one.partial") / "half").touch()
    tool.make(["one"], tool.home)
    assert out.is_dir() and not (out / "half").exists() and not out.with_name("m-one.partial").exists()


def test_a_changed_recipe_is_built_again(tool):
    tool.make(["one"], tool.home)
    tool.ENVIRONMENTS["one"] = tool.Environment(("one==2",), "one", 0.001)
    assert not tool.built(tool.home, "one")
    tool.said.clear()
    tool.make(["one"], tool.home)
    assert "installing" in tool.said and tool.built(tool.home, "one")


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"packages": ["one==1"]}'])
def test_a_damaged_stamp_is_none(tool, stamp):
    (tool.home / "one").mkdir(parents=True)
    (tool.home / "one" / ".built.json").write_text(stamp)
    assert not tool.built(tool.home, "one")


def test_the_metadata_stand_in_changes_the_header_only(tool):
    assert tool.make(["two"], tool.home) == []
    found = tool.home / "two" / "lib" / "python3.11" / "site-packages" / "two-2.dist-info" / "METADATA"
    assert found.read_text() == "Name: two\nVersion: 2+cpu\n\nName: stays\n"


def test_a_full_disk_is_one_sentence_and_the_others_go_on(tool, monkeypatch):
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: Namespace(free=1e6))
    failed = tool.make(["one"], tool.home)
    assert "one: 0.0 GB of free disk are needed, but only 0.0 GB are free" in failed[0]
    assert (tool.home / "models" / "folder").is_dir(), "our own files need no environment"


def test_an_unknown_peer_is_named(tool):
    with pytest.raises(tool.Failed, match="there is no peer 'three'; there are one, two"):
        tool.make(["three"], tool.home)


@pytest.mark.parametrize("said, words", [
    ("Collecting x\nERROR: No matching distribution found for x\nhint: none", "ERROR: No matching distribution"),
    ("Traceback\n  File\nnncf.errors.InvalidGroupSizeError: group 128\n(channel size: 576)", "InvalidGroupSizeError"),
    ("something\nthe end", "the end"), ("", "it said nothing")])
def test_the_line_that_matters_is_found(tmp_path, said, words):
    log = tmp_path / "log"
    log.write_text(f"== before: pip\nERROR: of an earlier step\n== installing: pip\n{said}\n")
    assert words in load("peers").last_words(log)


def test_a_real_step_that_fails_says_so(tmp_path):
    tool = load("peers")
    with pytest.raises(tool.Failed, match=r"trying failed \(exit status 1\): ValueError: no"):
        tool.run("trying", (sys.executable, "-c", "raise ValueError('no')"), tmp_path / "log")


def test_no_environment_sees_another(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "x")
    found = load("peers").clean_environment()
    assert "PYTHONPATH" not in found and found["HF_HUB_OFFLINE"] == "1"


def test_every_package_is_pinned_and_every_model_has_an_environment():
    tool = load("peers")
    for name, e in tool.ENVIRONMENTS.items(): assert all("==" in p for p in e.packages), name
    assert all(model.environment in ("", *tool.ENVIRONMENTS) for model in tool.MODELS.values())
    assert ".venv-peers/" in (ROOT / ".gitignore").read_text().splitlines()


# --- benchmarks/peers.py ----------------------------------------------------------------------------------------------
def args(**more): return Namespace(**{**dict(threads=1, rounds=1, starts=1, minutes=9), **more})


def test_every_peer_has_an_engine_an_environment_and_a_file_that_is_written():
    tool = load("peers")
    for name, (_, file) in bench.PEERS.items():
        engine = name.split()[0]
        assert engine in peer_process.ENGINES and bench.ENGINES[engine] in ("", *tool.ENVIRONMENTS), name
        assert file is None or file in tool.MODELS, name
    assert {name for pair in bench.PAIRS for name in pair} <= set(bench.PEERS)


def test_peers_that_are_not_there_are_left_out_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "HOME", tmp_path)
    monkeypatch.setattr(bench, "MODELS", tmp_path / "models")
    run = bench.Run(["ours fp32", "openvino int8", "llama.cpp Q8_0"], args())
    assert run.names == ["ours fp32"]
    assert run.reasons == {"openvino int8": "no environment openvino: make peers",
                           "llama.cpp Q8_0": "Q8_0.gguf is not written: make peers"}


def test_turns_give_everybody_each_place_once():
    run = bench.Run([], args())
    run.names = ["a", "b", "c"]
    orders = [run.turns(i) for i in range(3)]
    assert all(sorted(column) == run.names for column in zip(*orders)) and run.turns(3) == run.turns(0)
    run.names = []
    assert run.turns(1) == []


def test_a_peer_that_fails_leaves_with_all_its_samples_and_no_others():
    run = bench.Run([], args())
    run.names = ["a", "ours a"]
    for name in run.names: run.add(f"decode, {name}", 1.0)
    run.drop("a", "it ended")
    assert run.names == ["ours a"] and run.samples == {"decode, ours a": [1.0]} and run.reasons == {"a": "it ended"}


def test_texts_are_never_repeated():
    run, asked = bench.Run([], args()), []
    class Peer:
        def ask(self, **request): asked.append(request["seed"])
    for _ in range(3): run.ask(Peer(), (4, 1))
    assert len(set(asked)) == 3 and peer_process.random_ids(9, 1) != peer_process.random_ids(9, 2)
    assert all(100 <= i < peer_process.VOCABULARY for i in peer_process.random_ids(99, 5))


def test_speed_of_reading_and_writing():
    run = bench.Run([], args())
    bench.keep(run, "prefill 512", "a", (512, 1), dict(first=2.0, rest=0.0))
    bench.keep(run, "decode", "a", (16, 65), dict(first=9.0, rest=4.0))
    assert run.samples == {"prefill 512, a": [256.0], "decode, a": [16.0]}


def test_slow_tasks_are_left_out_and_said():
    run = bench.Run([], args())
    run.pace["a"] = 0.1
    assert run.takes("a", "decode", (16, 65)) and not run.takes("a", "prefill 2048", (2048, 1))
    assert run.reasons == {"prefill 2048, a": "reading 2,048 tokens would take 205 s"}


def test_ratios_are_of_single_rounds_and_only_of_whole_pairs():
    a, b = bench.PAIRS[0]
    samples = {f"decode, {a}": [2.0, 4.0, 30.0], f"decode, {b}": [1.0, 4.0, 10.0], f"prefill 512, {a}": [1.0]}
    assert bench.ratios_of(samples) == {f"decode: {a} / {b}": 2.0}      # of 2, 1, 3; medians alone would give 1
    samples[f"decode, {b}"].pop()
    assert bench.ratios_of(samples) == {}


def test_limits_count_the_weights_and_the_cache():
    from llm_workbench.families.opening import open_checkpoint
    config = open_checkpoint().config
    medians = {"read bandwidth": 10.0, "matrix products, fp32": 100.0, "matrix products, bf16": 50.0,
               "decode, a": 50.0, "decode after 4096, a": 50.0, "prefill 512, a": 100.0}
    shares = bench.limits_of(medians, {"a": 100_000_000}, config)
    cache = 2 * 30 * 3 * 64 * 2                                          # bytes a token in 16 bits
    assert shares["decode, a"] == pytest.approx(50 * (1e8 + 16 * cache) / 1e10)
    assert shares["decode after 4096, a"] == pytest.approx(50 * (1e8 + 4096 * cache) / 1e10)
    assert 100 * 2 * 106e6 / 100e9 < shares["prefill 512, a"] < 100 * 2 * 160e6 / 100e9


def test_spread_is_from_the_20th_to_the_80th_percentile():
    assert bench.spread([0.0, 1, 2, 3, 4, 5]) == [1.0, 4.0] and bench.spread([7.0]) == [7.0, 7.0]


def test_a_process_answers_errors_and_dies_with_its_last_words(monkeypatch, tmp_path):
    script = tmp_path / "peer_process.py"
    script.write_text("import json, sys\nprint(json.dumps({'first_token': 1}), flush=True)\n"
                      "for line in sys.stdin:\n"
                      "  if 'die' in line: sys.exit('the last words')\n"
                      "  print(json.dumps({'error': 'no'} if 'bad' in line else {'first': 1}), flush=True)\n")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "peers.py"))
    peer = bench.Peer("ours fp32", 1, 64)
    assert peer.hello == {"first_token": 1} and peer.ask(tokens=1) == {"first": 1}
    with pytest.raises(RuntimeError, match="^no$"): peer.ask(bad=1)
    assert peer.ask(tokens=1) == {"first": 1}, "an error of one request is not the end"
    with pytest.raises(RuntimeError, match="it ended early: the last words"): peer.ask(die=1)
    peer.close()


def test_a_process_that_is_silent_is_given_up(monkeypatch, tmp_path):
    (tmp_path / "peer_process.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "peers.py"))
    monkeypatch.setattr(bench, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="no answer in 0.2 s"): bench.Peer("ours fp32", 1, 64)


def test_an_engine_that_writes_too_few_tokens_is_not_timed():
    class Lazy:
        def run(self, ids, new): return (1.0, 1.0), [5] * (new - 1)
    with pytest.raises(RuntimeError, match="3 tokens were written, not 4"):
        peer_process.answer(Lazy(), dict(tokens=3, new=4, seed=1))


def test_our_own_process_writes_what_the_model_writes():
    import subprocess

    from llm_workbench import load as open_model
    lm = open_model()
    ids = lm.tokenizer.encode(bench.SENTENCE)
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "peer_process.py"), "ours", "float32/stored"]
    done = subprocess.run(command, input=json.dumps(dict(ids=ids, new=6)), capture_output=True, text=True, cwd=ROOT,
                          env={**bench.os.environ, "PYTHONPATH": str(ROOT)})
    hello, said = map(json.loads, done.stdout.splitlines())
    batch = lm.batch([ids], max_new_tokens=6, stop_at_eos=False)
    for _ in batch.steps(): pass
    assert said["written"] == batch.rows[0].tokens and hello["weight_bytes"] == lm.decoder.nbytes
    assert 0 < hello["loaded"] < hello["first_token"]
