"""Tracking: what a kill, a full disk, a NaN and a failing tracker leave behind; mistakes that checks reject; and the
trackers' own files, where their environment is there."""
import json
import math
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_workbench.errors import InputError, SourceError, UnsupportedError
from llm_workbench.finetuning import tracking
from llm_workbench.finetuning.sft import Training
from llm_workbench.finetuning.tracking import (
    METRICS, SETTINGS, Average, Every, JsonLines, Live, Metered, Tracker, as_callback, both, compared, curves,
    fingerprint, numbers, open_run, read_run, read_runs, smoothed, whole_lines)

PLAIN = dict(loss=0.5, tokens=10, seconds=1.0)


def lines(path): return [json.loads(line) for line in path.read_text().splitlines()]
def steps(path): return [row["step"] for row in lines(path)]


# ---- a kill, and going on

SCRIPT = """
import sys
from llm_workbench.finetuning.tracking import JsonLines
log = JsonLines(sys.argv[1])
for step in range(int(sys.argv[2]), 10**6):
    log(step, dict(loss=1 / (step + 1), text="x" * (step % 4000)))
    print(step, flush=True)
"""

def killed(path, first, after):
    run = [sys.executable, "-c", SCRIPT, str(path), str(first)]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(after)]
        time.sleep(after % 7 / 1000)
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout if line.endswith("\n")]
    return told[-1]

def check_log(kind, tmp_path):
    "Steps 0 to 9, half a line as a crash leaves it, on from step 7, half a line again, step 14: each once, all whole."
    path = tmp_path / "log" / METRICS
    with kind(path) as log:
        for step in range(10): log(step, dict(loss=step + 0.5))
    with path.open("ab") as file: file.write(b'{"step": 10, "lo')
    with kind(path) as log:
        for step in range(7, 14): log(step, dict(loss=-step - 0.5))
    with path.open("ab") as file: file.write(b'{"step": 14, "lo')
    with kind(path) as log: log(14, dict(loss=-14.5))              # a checkpoint of the last step: nothing to replace
    assert steps(path) == list(range(15)), "a step is missing or there twice"
    assert [row["loss"] for row in lines(path)] == [i + 0.5 if i < 7 else -i - 0.5 for i in range(15)], "an old line"
    assert [row["part"] for row in lines(path)] == [(i >= 7) + (i >= 14) for i in range(15)]

def test_killed_at_any_moment_no_step_is_lost_or_twice(tmp_path):
    path, first = tmp_path / METRICS, 0
    for after in (1, 40, 333):
        told = killed(path, first, after)
        rows, end, wrong = whole_lines(path)
        assert [row["step"] for _, row in rows] == list(range(len(rows))) and len(rows) > told
        assert len(wrong) <= 1 and end <= path.stat().st_size
        first = told // 2
    JsonLines(path).close()
    assert steps(path) == list(range(len(rows))) and lines(path)[-1]["part"] == 2

class Doubled(JsonLines):
    "Goes on without cutting back."
    def rewind(self, step): self.part += self.begun

class KeepsTheHalf(JsonLines):
    "Opens the file and writes on, whatever it ends in."
    def __init__(self, path):
        before = path.read_bytes() if path.exists() else b""
        super().__init__(path)
        path.write_bytes(before)

class PassesOver(JsonLines):
    "Keeps the lines of weights that no longer exist."
    def write(self, step, metrics):
        if not self.steps or step > self.steps[-1][0]: super().write(step, metrics)

class OnePart(JsonLines):
    "Forgets that there was an interruption."
    def __init__(self, path):
        super().__init__(path)
        self.part = 0

def test_a_log_goes_on(tmp_path): check_log(JsonLines, tmp_path)

@pytest.mark.parametrize("mutant", [Doubled, KeepsTheHalf, PassesOver, OnePart])
def test_wrong_ways_to_go_on_are_rejected(mutant, tmp_path):
    with pytest.raises((AssertionError, ValueError)): check_log(mutant, tmp_path)

@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(0, 20)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_interruptions_leaves_what_survived(tmp_path_factory, parts):
    "Parts that begin at, make, and have cut off any number of steps or bytes; against a list that is cut back."
    path, want = tmp_path_factory.mktemp("log") / METRICS, []
    for first, n, cut in parts:
        first = min(first, len(want))
        with JsonLines(path) as log:
            for step in range(first, first + n): log(step, dict(value=len(want) + 100 * step))
            del want[first:]
            want += range(first, first + n)
        assert steps(path) == want
        whole, size = path.read_bytes(), path.stat().st_size
        path.write_bytes(whole[:max(0, size - cut)])
        want = [row["step"] for _, row in whole_lines(path)[0]]
        assert len(want) == whole[:max(0, size - cut)].count(b"\n")

def test_counts_of_processes_are_added_up(tmp_path):
    with open_run(tmp_path, {}) as log:
        for step in range(6): log(step, dict(tokens=10 * (step + 1), seconds=step + 1.0, loss=1.0))
    with open_run(tmp_path, {}) as log:                                # of steps 0 to 3 are 40 tokens
        for step in range(4, 8): log(step, dict(tokens=100 * (step - 3), seconds=step - 3.0, loss=1.0))
    found = read_run(tmp_path).metrics
    assert found.tokens.tolist() == [10, 20, 30, 40, 140, 240, 340, 440]
    assert found.seconds.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    with open_run(tmp_path, {}) as log:                                # from the beginning: nothing is left to add
        for step in range(2): log(step, PLAIN)
    again = read_run(tmp_path).metrics
    assert again.tokens.tolist() == [10, 10] and again.part.tolist() == [0, 0]

def test_in_one_process_a_part_begins_where_steps_go_back(tmp_path):
    log = JsonLines(tmp_path / METRICS)
    for step in (0, 1, 2, 1, 2, 2, 3): log(step, PLAIN)
    assert [(row["step"], row["part"]) for row in lines(tmp_path / METRICS)] == [(0, 0), (1, 1), (2, 2), (3, 2)]


# ---- values

def test_values_come_back_as_they_were(tmp_path):
    given = dict(a=0.1 + 0.2, b=1e-320, c=-0.0, d=math.nan, e=math.inf, f=-math.inf, g=2**60, h=True, i="words")
    with JsonLines(tmp_path / METRICS) as log: log(0, given)
    text = (tmp_path / METRICS).read_text()
    def strict(name): pytest.fail(f"{name} is not JSON")
    json.loads(text, parse_constant=strict)
    row = read_run(tmp_path / METRICS).metrics.iloc[0]
    for name, value in given.items():
        assert row[name] == value or math.isnan(value) and math.isnan(row[name]), name
        assert type(value) is not float or math.copysign(1, value) == math.copysign(1, row[name]) or value != value

def test_nan_as_python_writes_it_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "spoken", lambda value: value)
    monkeypatch.setattr(tracking.json, "dumps", lambda row, allow_nan, dumps=json.dumps: dumps(row))
    with pytest.raises(pytest.fail.Exception, match="not JSON"): test_values_come_back_as_they_were(tmp_path)

def test_numbers_of_libraries_become_pythons():
    given = dict(a=torch.tensor(2, dtype=torch.bfloat16, requires_grad=False), b=np.float64(1.5), c=np.int32(3),
                 d=torch.ones(1, 1, requires_grad=True), e=np.bool_(True), f=torch.tensor(4))
    found, wrong = numbers(given)
    assert found == dict(a=2.0, b=1.5, c=3, d=1.0, e=True, f=4) and not wrong
    assert all(type(v) in (int, float, bool) for v in found.values())
    assert numbers(dict(a=np.ones(2), b=torch.ones(0), c=object(), d=[1], e=1j)) == ({}, list("abcde"))


# ---- trackers that fail

class Broken(Tracker):
    def __init__(self, error, slow=0.0):
        super().__init__()
        self.error, self.slow, self.tries = error, slow, 0
    def write(self, step, metrics):
        self.tries += 1
        time.sleep(self.slow)
        metrics.clear()
        raise self.error

def check_guard(make_both, caplog):
    broken, seen, given = Broken(OSError(28, "No space left on device")), [], dict(PLAIN)
    log = make_both(broken, lambda step, metrics: seen.append((step, metrics)), None)
    for step in range(60):
        for one in getattr(log, "logs", ()): one.rests_until = -math.inf        # each step is tried
        log(step, given)
    log.close()
    assert given == PLAIN, "the caller's metrics were changed"
    assert seen == [(step, PLAIN) for step in range(60)], "the other tracker missed something"
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "step 0 is not written" in said[0] and "60 steps are missing" in said[1], said

def test_a_failing_tracker_is_said_once(caplog): check_guard(both, caplog)

def unguarded(*logs):
    class Bare(Tracker):
        def __call__(self, step, metrics):
            for log in logs:
                if log: log.write(step, metrics) if isinstance(log, Tracker) else log(step, metrics)
    return Bare()

def said_each_time(*logs):
    class Loud(Broken):
        def say(self, about, message): tracking.SAY.warning(message)
    return both(*(Loud(log.error) if isinstance(log, Broken) else log for log in logs))

@pytest.mark.parametrize("mutant", [unguarded, said_each_time])
def test_wrong_guards_are_rejected(mutant, caplog):
    with pytest.raises((AssertionError, OSError)): check_guard(mutant, caplog)

def test_a_slow_failure_takes_a_tenth_of_the_time_at_most():
    broken, start = Broken(TimeoutError(), slow=0.02), time.perf_counter()
    while time.perf_counter() - start < 0.5: broken(0, PLAIN)
    assert 2 <= broken.tries <= 4

def test_an_interrupt_by_hand_is_no_failure():
    with pytest.raises(KeyboardInterrupt): both(Broken(KeyboardInterrupt()))(0, PLAIN)

@pytest.mark.parametrize("step, metrics", [(0, None), (0.5, PLAIN), ("a", PLAIN), (None, PLAIN), (0, dict(step=1)),
                                           (0, dict(part=1))])
def test_wrong_calls_are_said_and_not_raised(step, metrics, tmp_path, caplog):
    log = JsonLines(tmp_path / METRICS)
    log(step, metrics)
    time.sleep(0.05)
    log(1, PLAIN)
    assert log.lost == 1 and len(caplog.records) == 1 and steps(tmp_path / METRICS) == [1]

def test_a_closing_that_fails_is_said(caplog):
    class Stuck(Tracker):
        def finish(self): raise ConnectionError("away")
    with both(Stuck()): pass
    assert "could not be closed" in caplog.text

def test_a_full_disk_costs_lines_and_no_half_ones(tmp_path, caplog):
    path, (soft, hard) = tmp_path / METRICS, resource.getrlimit(resource.RLIMIT_FSIZE)
    log = JsonLines(path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for step in range(40):
            log(step, PLAIN)
            time.sleep(0.002)
        during = path.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    time.sleep(0.01)
    log(40, PLAIN)                                                    # there is room again
    log.close()
    assert during.endswith(b"\n") and 10 < during.count(b"\n") < 40
    assert steps(path) == [*range(during.count(b"\n")), 40]
    assert log.lost == 40 - during.count(b"\n") and len(caplog.records) == 2


# ---- folders

def test_a_run_is_described_once_and_watched_over(tmp_path, caplog, monkeypatch):
    texts, training = [dict(ids=[1, 2])], Training(5, folder=tmp_path, seed=3)
    with open_run(tmp_path, training, texts, rank=8) as log: log(0, PLAIN)
    found = json.loads((tmp_path / SETTINGS).read_text())
    assert found["settings"]["seed"] == 3 and found["more"] == dict(rank=8) and found["data"] == fingerprint(texts)
    assert {"python", "torch"} <= found["versions"].keys() and found["began"]
    for settings_, data, rank, words in ((Training(5, seed=4), texts, 8, "seed = 3"), (training, texts, 4, "rank = 8"),
                                         (training, texts * 2, 8, "data = "), (training, None, 8, "data = ")):
        with pytest.raises(InputError, match=words): open_run(tmp_path, settings_, data, rank=rank)
    with pytest.raises(InputError, match="alpha = None"): open_run(tmp_path, training, texts, rank=8, alpha=1)
    assert steps(tmp_path / METRICS) == [0], "a refused run touches nothing"
    open_run(tmp_path, Training(5, folder="elsewhere", every=7, seed=3), fingerprint(texts), rank=8).close()
    assert not caplog.records
    monkeypatch.setattr(tracking, "versions", lambda: found["versions"] | dict(torch="9.9"))
    open_run(tmp_path, training, texts, rank=8).close()
    assert "torch" in caplog.text and "-> 9.9" in caplog.text

@pytest.mark.parametrize("harm", [b"", b"{}", b"[1]", b'{"settings": {}', b"\xff"])
def test_a_damaged_description_is_named(harm, tmp_path):
    open_run(tmp_path, {}).close()
    (tmp_path / SETTINGS).write_bytes(harm)
    for call in (lambda: open_run(tmp_path, {}), lambda: read_run(tmp_path)):
        with pytest.raises(SourceError, match=SETTINGS): call()

def test_damaged_lines_are_left_out_and_named(tmp_path, caplog):
    path = tmp_path / METRICS
    good = [b'{"step": 0, "loss": 1}\n', b'{"step": 1, "loss": "NaN"}\n', b'{"step": 2}\n']
    bad = [b"\x00" * 9 + b"\n", b"[]\n", b'{"loss": 1}\n', b'{"step": "a"}\n', b'{"step": 1.5}\n', b"\n"]
    path.write_bytes(good[0] + b"".join(bad[:3]) + good[1] + b"".join(bad[3:]) + good[2] + b"{")
    run = read_run(path)
    assert run.metrics.index.tolist() == [0, 1, 2] and math.isnan(run.metrics.loss[1]) and len(run.wrong) == 7
    with JsonLines(path) as log: log(3, PLAIN)
    assert [row["step"] for _, row in whole_lines(path)[0]] == [0, 1, 2, 3] and len(caplog.records) == 7

def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (lambda: JsonLines(tmp_path / "file" / METRICS), lambda: JsonLines(tmp_path), lambda:
                 open_run(tmp_path / "file", {}), lambda: read_run(tmp_path / "none"), lambda: read_runs(tmp_path)):
        with pytest.raises(SourceError): call()
    with pytest.raises(InputError, match="fingerprint"): fingerprint([object()])

def test_reading_while_it_is_written_and_before_the_first_step(tmp_path):
    log = open_run(tmp_path / "one", dict(lr=1))
    assert read_run(tmp_path / "one").metrics.empty
    empty = compared(read_runs(tmp_path) | {"other": read_run_of(tmp_path / "two", lr=2)})
    assert empty.loc["one", "steps"] == 0 and math.isnan(empty.loc["one", "loss"])
    log(0, PLAIN)
    assert len(read_run(tmp_path / "one").metrics) == 1

def read_run_of(folder, values=(1.0,), **settings_):
    with open_run(folder, settings_) as log:
        for step, value in enumerate(values): log(step, dict(loss=value, tokens=step))
    return read_run(folder)

def test_runs_are_compared_by_what_differs(tmp_path):
    for name, lr, end in (("a", 1e-3, 0.5), ("b/c", 1e-4, 0.2)):
        read_run_of(tmp_path / name, [3.0, end], lr=lr, seed=0, betas=[0.9, 0.99])
    runs = read_runs(tmp_path)
    table = compared(runs, keep=0)
    assert list(table.index) == ["b/c", "a"] and list(table.columns) == ["lr", "loss", "steps", "parts", "tokens"]
    assert table.loss.tolist() == [0.2, 0.5]
    with pytest.raises(InputError, match="'los'.*loss"): compared(runs, "los")
    axes = curves(runs).axes[0]
    assert [line.get_label() for line in axes.get_lines()[::2]] == ["a", "b/c"]


# ---- averages

def check_average(smooth):
    "Against pandas, which corrects for the beginning; a constant is itself; what is no number is passed over."
    values = pd.Series(np.random.default_rng(0).normal(3, 1, 200))
    values[[0, 5, 6, 100]] = math.nan
    for keep in (0.0, 0.5, 0.99):
        want = values.ewm(alpha=1 - keep, ignore_na=True).mean()
        assert np.allclose(smooth(values, keep), want, rtol=1e-10, equal_nan=True)
    assert np.allclose(smooth([2.0] * 5, 0.9), 2.0)

def test_the_average_is_that_of_pandas(): check_average(smoothed)

def from_zero(values, keep):
    total, found = 0.0, []
    for value in values:
        if math.isfinite(value): total = keep * total + (1 - keep) * value
        found.append(total)
    return found

def from_the_first(values, keep):
    total, found = None, []
    for value in values:
        if math.isfinite(value): total = value if total is None else keep * total + (1 - keep) * value
        found.append(math.nan if total is None else total)
    return found

def steps_counted_with_nan(values, keep):
    average, found = Average(keep), []
    for n, value in enumerate(values, 1):
        average.add(value)
        found.append(average.total / (1 - keep**n))
    return found

@pytest.mark.parametrize("mutant", [from_zero, from_the_first, steps_counted_with_nan])
def test_wrong_averages_are_rejected(mutant):
    with pytest.raises(AssertionError): check_average(mutant)

def test_bad_settings():
    for keep in (1, -0.1, math.nan):
        with pytest.raises(InputError, match="keep"): Average(keep)
    for n in (0, 1.5):
        with pytest.raises(InputError, match="n is"): Every(n, print)

def test_every_nth_line_has_the_loss_of_all_its_tokens():
    draw, found = np.random.default_rng(1), []
    losses, counts = draw.normal(2, 1, 23), draw.integers(1, 400, 23)
    with Every(5, lambda step, metrics: found.append((step, metrics))) as log:
        for i in range(23): log(i, dict(loss=losses[i], lr=i, tokens=int(counts[:i + 1].sum())))
    assert [step for step, _ in found] == [4, 9, 14, 19, 22]
    for step, metrics in found:
        part = slice(step // 5 * 5, step + 1)
        assert metrics["loss"] == pytest.approx(np.average(losses[part], weights=counts[part]))
        assert metrics["lr"] == step
    found.clear()
    log = Every(2, lambda step, metrics: found.append(metrics["loss"]))
    for step, loss, tokens in ((0, 1.0, 10), (1, 2.0, 40), (2, 1.0, 15), (3, 2.0, 20)):
        log(step, dict(loss=loss, tokens=tokens))
    assert found == [pytest.approx((10 + 2 * 30) / 40), pytest.approx((15 + 2 * 5) / 20)], "tokens counted anew"

def test_speed_and_time_left_are_of_the_window():
    found, clock = [], iter([0, 1, 2, 3, 13, 23, 33, 100])
    log = Metered(lambda step, metrics: found.append(metrics), 10, window=2, clock=lambda: next(clock))
    for step in range(7): log(step, dict(tokens=100 * (step + 1)))
    log(3, dict(tokens=100))
    assert [m.get("tokens/s") for m in found] == [None, 100, 100, 100, 200 / 11, 10, 10, None]
    assert [m.get("left") for m in found] == [None, 8, 7, 6, 5 * 5.5, 40, 30, None]
    assert all(m["memory"] > 1e6 for m in found)


# ---- watching

def test_without_a_front_end_there_are_ten_lines(capsys):
    for n in (3, 1000):
        with Live(n) as log:
            for step in range(n): log(step, dict(loss=math.nan if step == 1 else 2.0, left=75.0))
        said = capsys.readouterr().out.splitlines()
        assert len(said) == min(n, 10) and said[-1] == f"step {n}/{n}, loss 2.000, 1:15 left"

def test_the_picture_is_whole_svg():
    from xml.etree import ElementTree
    for values in ([1.0], [math.nan], [2.0] * 3, [1.0, math.inf, 0.5] * 400):
        log = Live(len(values), metric="a<b")
        for step, value in enumerate(values): log.write(step, {"a<b": value})
        root = ElementTree.fromstring(log.svg())
        points = next(e for e in root.iter() if e.tag.endswith("polyline")).get("points")
        assert len(points.split()) <= 300 and "nan" not in points and "inf" not in points

def test_a_front_end_gets_one_picture_that_changes(monkeypatch):
    "Through IPython's own display, with what it publishes caught."
    from IPython.core.displaypub import CapturingDisplayPublisher, DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    monkeypatch.setattr(tracking, "front_end", lambda: True)
    shell = InteractiveShell.instance()
    try:
        monkeypatch.setattr(shell, "display_pub", CapturingDisplayPublisher())
        assert isinstance(shell.display_pub, DisplayPublisher)
        with Live(40, seconds=0.005) as log:
            for step in range(40):
                log(step, dict(loss=1.0))
                time.sleep(0.001)
        sent = shell.display_pub.outputs
    finally: InteractiveShell.clear_instance()
    assert not log.said and len(sent) >= 3 and all("image/svg+xml" in one["data"] for one in sent)
    assert [one["update"] for one in sent] == [False] + [True] * (len(sent) - 1)
    assert len({one["transient"]["display_id"] for one in sent}) == 1
    assert sent[-1]["data"]["text/plain"].startswith("step 40/40")


# ---- trainers of transformers

def test_the_callback_merges_what_belongs_to_a_step_and_drops_the_summary():
    from transformers import TrainerState
    found = []
    callback, state = as_callback(lambda step, metrics: found.append((step, metrics))), TrainerState()
    callback.on_train_begin(None, state, None)
    for state.global_step, logs in ((1, dict(loss=3.0, grad_norm=torch.tensor(2.0), learning_rate=1e-3)),
                                    (1, dict(eval_loss=2.5)), (2, dict(loss=2.0)),
                                    (2, dict(train_runtime=1.0, train_loss=2.5))):
        callback.on_log(None, state, None, logs=logs)
        if "eval_loss" in logs: callback.on_step_begin(None, state, None)
    state.is_world_process_zero = False
    callback.on_log(None, state, None, logs=dict(loss=9.0))
    callback.on_train_end(None, state, None)
    callback.on_train_end(None, state, None)
    assert [(step, {k: v for k, v in m.items() if k != "seconds"}) for step, m in found] == [
        (0, dict(loss=3.0, norm=2.0, lr=1e-3, eval_loss=2.5)), (1, dict(loss=2.0))]


# ---- trackers of other people

def test_a_library_that_is_not_here_is_named(tmp_path, monkeypatch):
    for name in ("trackio", "mlflow", "wandb", "tensorboard"): monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("TRACKIO_DIR", "")
    for make in (lambda: tracking.Trackio(tmp_path, "a", "b"), lambda: tracking.MLflow(tmp_path / "a.db", "a", "b"),
                 lambda: tracking.WandB(tmp_path, "a", "b"), lambda: tracking.TensorBoard(tmp_path)):
        with pytest.raises(UnsupportedError, match="pip install"): make()

def test_the_module_needs_no_torch_and_no_pandas(root):
    code = "import sys, llm_workbench.finetuning.tracking; sys.exit(bool({'torch', 'pandas'} & sys.modules.keys()))"
    assert not subprocess.run([sys.executable, "-c", code], cwd=root).returncode

@pytest.mark.parametrize("kind", ["trackio", "wandb", "tensorboard"])      # mlflow takes half a minute: the benchmark
def test_what_trackers_keep_is_what_was_logged(kind, tmp_path):
    from benchmarks import tracking as bench
    if not bench.PYTHON.exists(): pytest.skip("no environment of trackers: python tools/peers.py tracking")
    bench.inside("write", kind, tmp_path, 0, 12, True)
    bench.inside("write", kind, tmp_path, 8, 20, True)
    kept = bench.inside("rows", kind, tmp_path)
    if kind == "wandb": kept = sorted(dict(kept).items())                # two files
    assert bench.apart(kept, bench.run_of(10_000)[:20]) <= (1e-7 if kind == "tensorboard" else 0)

def test_the_committed_result_says_what_the_chapter_says(root):
    for path in (root / "benchmarks" / "results").glob("*/tracking.json"):
        found = json.loads(path.read_text())["trackers"]
        assert found["lines of JSON"]["lost"] == 0 and found["lines of JSON"]["again"] == dict(twice=0, missing=0)
        assert all(row["apart"] <= (1e-7 if kind == "tensorboard" else 0) for kind, row in found.items())
