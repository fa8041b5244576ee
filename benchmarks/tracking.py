"""What trackers cost, what they keep of a run, what a kill takes from them, and what they make of a step made again.

    python tools/peers.py tracking       # their environment, once
    python -m benchmarks.tracking        # 200 steps of eight metrics each, twice
    python -m benchmarks.tracking mlflow --steps 60 --repeats 1     # only this one; the others' recorded results stay

Everything is written by the adapters of llm_workbench.finetuning.tracking, in processes of that environment, and read
back from the trackers' own files.
"""
import argparse
import json
import math
import os
import random
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-peers" / "tracking" / "bin" / "python"
KINDS = ("lines of JSON", "trackio", "mlflow", "wandb", "tensorboard")
ANSWER = "answer: "
ODD = {"nan": math.nan, "infinity": math.inf, "-infinity": -math.inf}


def run_of(steps):
    "The same run for all of them: eight metrics a step."
    draw = random.Random(0)
    return [dict(loss=3 / (1 + i / 50) + draw.random() / 3, norm=draw.expovariate(1), lr=1e-3 * (1 - i / steps),
                 tokens=37 * (i + 1), seconds=0.1 * i + draw.random() / 100, memory=1.5e9 + i, left=0.1 * (steps - i),
                 speed=draw.gauss(370, 10)) for i in range(steps)]


# --- in the trackers' environment -------------------------------------------------------------------------------------

def opened(kind, folder):
    from llm_workbench.finetuning import tracking as t
    if kind == KINDS[0]: return t.JsonLines(folder / "metrics.jsonl")
    if kind == "trackio": return t.Trackio(folder, "bench", "one", dict(lr=1e-3))
    if kind == "mlflow": return t.MLflow(folder / "mlflow.db", "bench", "one", dict(lr=1e-3))
    if kind == "wandb": return t.WandB(folder, "bench", "one", dict(lr=1e-3))
    return t.TensorBoard(folder)


def cost(kind, folder, steps):
    "Seconds to begin and to end, microseconds of each call, CPU of this process for a step; and a last, odd step."
    start = time.perf_counter()
    log = opened(kind, folder)
    begun, cpu, calls = time.perf_counter() - start, time.process_time(), []
    for step, metrics in enumerate(run_of(steps)):
        at = time.perf_counter()
        log(step, metrics)
        calls.append(round(1e6 * (time.perf_counter() - at), 1))
    log(steps, ODD)
    at = time.perf_counter()
    log.close()
    ended, cpu = time.perf_counter() - at, time.process_time() - cpu
    assert not log.said, log.said
    return dict(begin=begun, end=ended, calls=calls, cpu=1e3 * cpu / steps)


def write(kind, folder, first, last, filtered):
    "A hundred steps a second, each told through the pipe after it was logged."
    metrics, log = run_of(10_000), opened(kind, folder)
    if not filtered and hasattr(log, "last"): log.last = -1
    for step in range(first, last):
        log(step, metrics[step])
        print(step, flush=True)
        time.sleep(0.01)
    log.close()


def rows(kind, folder):
    "(step, metrics) as they stand in the files, in the order of writing."
    if kind == KINDS[0]:
        from llm_workbench.finetuning.tracking import heard
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(row.pop("step"), {k: heard(v) for k, v in row.items() if k != "part"}) for row in found]
    if kind == "trackio":
        from llm_workbench.finetuning.tracking import heard
        found = sqlite3.connect(folder / "bench.db").execute("SELECT step, metrics FROM metrics ORDER BY id")
        return [(step, {k: heard(v) for k, v in json.loads(metrics).items()}) for step, metrics in found]
    if kind == "mlflow":
        found, table = {}, sqlite3.connect(folder / "mlflow.db").execute(
            "SELECT step, timestamp, key, value, is_nan FROM metrics ORDER BY rowid")
        for step, when, key, value, nan in table: found.setdefault((step, when), {})[key] = math.nan if nan else value
        return [(step, metrics) for (step, _), metrics in found.items()]
    if kind == "wandb":
        return [row for path in sorted(folder.rglob("*.wandb")) for row in wandb_rows(path)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events, found = EventAccumulator(str(folder), size_guidance=dict(scalars=0)).Reload(), {}
    for tag in events.Tags()["scalars"]:
        for i, e in enumerate(events.Scalars(tag)): found.setdefault((i, e.step), {})[tag] = e.value
    return [(step, metrics) for (_, step), metrics in found.items()]


def wandb_rows(path):
    "History of a .wandb file: LevelDB's form of a log (blocks of 32 KB, records cut at their ends), of protobuf."
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole = path.read_bytes(), 7, b""                  # 7: the file's own head
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, n, kind = struct.unpack_from("<IHB", data, at)        # checksum, length, 1 whole, 2 first, 3 middle, 4 last
        if not kind or at + 7 + n > len(data): return
        whole, at = whole + data[at + 7:at + 7 + n], at + 7 + n
        if kind in (2, 3): continue
        record, whole = Record.FromString(whole), b""
        if not record.HasField("history"): continue
        items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        step = record.history.step.num if record.history.HasField("step") else items["_step"]
        yield step, {k: float(v) if isinstance(v, str) else v for k, v in items.items() if k[0] != "_"}


ROLES = dict(cost=cost, write=write, rows=rows)


# --- from outside -----------------------------------------------------------------------------------------------------

def command(role, kind, folder, *more):
    script = str(Path(__file__).resolve())
    return [str(PYTHON), "-P", script, "--inside", role, kind, str(folder), *map(json.dumps, more)]


def environment():
    sys.path.insert(0, str(ROOT / "tools"))
    from peers import clean_environment
    return clean_environment() | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", WANDB_MODE="offline")


def inside(role, kind, folder, *more):
    "What a role answers, among all that trackers print."
    done = subprocess.run(command(role, kind, folder, *more), env=environment(), cwd=folder, text=True,
                          capture_output=True)
    if done.returncode: sys.exit(f"{kind}, {role}: {done.stderr[-1500:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith(ANSWER))[len(ANSWER):])


def killed(kind, folder, after=150):
    "Let it write, and kill it with all processes that it began when `after` steps are told; the last step told."
    import psutil
    with subprocess.Popen(command("write", kind, folder, 0, 10_000, True), env=environment(), cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        told = [line for line, _ in zip((l for l in process.stdout if l.strip().isdigit()), range(after))]
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]: one.kill()
        told += [line for line in process.stdout if line.strip().isdigit() and line.endswith("\n")]
    return int(told[-1])


def size(folder): return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def apart(kept, given):
    "The largest relative difference of a value from what was logged; None where steps or names are not the same."
    if [step for step, _ in kept] != list(range(len(given))): return None
    if any(k.keys() != g.keys() for (_, k), g in zip(kept, given)): return None
    return max(abs(k[name] - g[name]) / max(abs(g[name]), 1e-300) for (_, k), g in zip(kept, given) for name in g)


def measured(kind, steps, repeats, place):
    "Everything about one tracker; the samples of its calls."
    calls, begins, ends, cpus = [], [], [], []
    for i in range(repeats):
        folder = place / f"{kind} {i}"
        folder.mkdir()
        one = inside("cost", kind, folder, steps)
        calls += one["calls"]
        begins.append(one["begin"]), ends.append(one["end"]), cpus.append(one["cpu"])
    (*kept, (_, found)), room = inside("rows", kind, folder), size(folder)
    result = dict(steps=steps, begin=begins, end=ends, cpu=cpus, bytes=room, apart=apart(kept, run_of(steps)),
                  odd={name: str(found.get(name)) for name in ODD})
    folder = place / f"{kind} killed"
    folder.mkdir()
    told = killed(kind, folder)
    there = [step for step, _ in inside("rows", kind, folder)]
    result |= dict(told=told + 1, lost=len(set(range(told + 1)) - set(there)))
    for filtered, name in ((True, "again"), (False, "again, unfiltered")):          # two more parts of the same run
        first = told - 20 if filtered else told
        inside("write", kind, folder, first, told + 21 if filtered else told + 41, filtered)
        there = [step for step, _ in inside("rows", kind, folder)]
        result[name] = dict(twice=len(there) - len(set(there)), missing=max(there) + 1 - len(set(there)))
    return result, calls


def main():
    if sys.argv[1:2] == ["--inside"]:
        role, kind, folder, *more = sys.argv[2:]
        answer = ROLES[role](kind, Path(folder), *map(json.loads, more))
        return print("\n" + ANSWER + json.dumps(answer))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    args = parser.parse_args()
    if not PYTHON.exists(): sys.exit("the trackers' environment is not there: python tools/peers.py tracking")
    from benchmarks.record import record, recorded
    ask = "import json; from importlib.metadata import version as v; print(json.dumps({n: v(n) for n in %r}))"
    versions = json.loads(subprocess.run([PYTHON, "-c", ask % (KINDS[1:],)], capture_output=True, text=True,
                                         env=environment(), check=True).stdout)
    found, samples = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for kind in args.kinds:
            found[kind], samples[kind] = measured(kind, args.steps, args.repeats, Path(place))
            print(f"{kind}: {sorted(samples[kind])[len(samples[kind]) // 2]:.0f} us a step;", found[kind], flush=True)
    try: old = recorded("tracking") if len(found) < len(KINDS) else {}
    except OSError: old = {}
    found, samples = ({kind: both[kind] for kind in KINDS if kind in both}
                      for both in (old.get("trackers", {}) | found, old.get("samples", {}) | samples))
    out = record("tracking", samples, "microseconds a step, in the call", trackers=found, versions=versions,
                 settings=dict(metrics=len(run_of(1)[0])))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
