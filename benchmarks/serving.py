"""Many texts at a time: our engine and the engines that people use instead, on this CPU, in one run; then our server.

    make peers                                   # once: environments of the engines (tools/peers.py; vllm only by name)
    python -m benchmarks.serving                 # all that is there
    python -m benchmarks.serving --only ours transformers --rounds 3
    python -m benchmarks.serving --only server   # the server's own part
    python -m benchmarks.serving --dry           # short texts, one round, nothing is kept

Streams: prompts of 64 random tokens, 128 tokens written to each whatever they are, all asked for at the same moment;
what counts is the tokens written per second until the last one is there. Every engine is a process of its own
(benchmarks/serving_process.py, with the Python of its environment) that keeps its model; they take turns within each
round, in an order that turns, too. A task that would take an engine more than a minute is left out of every second
round. The server: the same requests by the engine's thread and through HTTP (what the server adds); the first token
behind 1,000 tokens that were seen before, and that were not; and twice as many requests as it can serve (what still
comes in time).
"""
import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import HOME, MODELS, Peer, measure_limits, spread
from benchmarks.record import record
from llm_workbench.embedded import embedded_model
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.hardware.machine import kv_bytes_per_token

ROOT = Path(__file__).parents[1]
FOLDER = MODELS / "transformers"
PEERS = {                                            # name: (engine, what it loads, slots)
    "ours bf16": ("ours", "bfloat16/dense", 32), "ours fp32": ("ours", "float32/dense", 32),
    "ours int4_g32": ("ours", "float32/int4_g32", 32), "ours Q4_1": ("ours", "float32/stored", 32),
    "transformers bf16": ("transformers", f"{FOLDER}/bfloat16", 32),
    "transformers fp32": ("transformers", f"{FOLDER}/float32", 32),
    "llama-server Q4_1": ("xllamacpp", str(embedded_model()), 8),
    "llama-server Q4_1, 32 slots": ("xllamacpp", str(embedded_model()), 32),
    "vllm bf16": ("vllm", f"{FOLDER}/bfloat16", 32), "vllm fp32": ("vllm", f"{FOLDER}/float32", 32),
}
ENVIRONMENTS = dict(xllamacpp="xllamacpp", vllm="vllm")
SERVER = "served bf16"
STREAMS, SIZE = (1, 8, 32), (64, 128)                # at a time; tokens of a prompt, tokens to write
GOALS = {                                            # what the project set itself: ours / theirs is to be at least ...
    **{f"{n} streams: ours bf16 / vllm bf16": goal for n, goal in zip(STREAMS, (1.0, 1.2, 1.2))},
    "8 streams: ours int4_g32 / vllm bf16": 2.0, "8 streams: ours Q4_1 / llama-server Q4_1": 2.0,
    **{f"{n} streams: ours {w} / transformers {w}": 5.0 for n in STREAMS[1:] for w in ("bf16", "fp32")},
}
PAIRS = [*GOALS, *(f"{n} streams: {pair}" for n in STREAMS for pair in (
    "ours fp32 / vllm fp32", "ours Q4_1 / vllm bf16", "ours bf16 / llama-server Q4_1",
    "ours int4_g32 / llama-server Q4_1", "ours Q4_1 / llama-server Q4_1, 32 slots"))]
SERVER_GOALS = {"through HTTP / engine": 0.97, "first token, warm / cold": 0.10, "goodput at 2x / at 1x": 0.90}
SLOW = 60                                            # seconds beyond which a task is asked for in every second round
HANGS = 240                                          # seconds for one answer
NOTE = ("One machine of two cores whose other work cannot be stopped: compare what stands in the same run, by ratios, "
        "and read p20 to p80 as the unrest of that hour. Clients of the server run on the same two cores.")


# --- one engine -------------------------------------------------------------------------------------------------------

def python_of(engine):
    "The Python of an engine's environment."
    return HOME / ENVIRONMENTS[engine] / "bin" / "python" if engine in ENVIRONMENTS else Path(sys.executable)


def absent(name):
    "Why an engine cannot be measured here, or None."
    engine, model, _ = PEERS[name]
    if not python_of(engine).exists(): return f"no environment {ENVIRONMENTS[engine]}: python tools/peers.py {engine}"
    if str(FOLDER) in model and not FOLDER.exists(): return "the folder of transformers is not written: make peers"


class Process(Peer):
    "A process that holds one model, and is asked as benchmarks/peers.py asks its own. Raises RuntimeError."
    def __init__(self, engine, model, slots, threads, context):
        script = Path(__file__).with_name("serving_process.py")
        command = [python_of(engine), "-P", script, engine, model, "--threads", threads, "--streams", slots,
                   "--context", context]
        own = {} if engine in ENVIRONMENTS else {"PYTHONPATH": str(ROOT)}
        spinning = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
        environment = {k: v for k, v in os.environ.items() if k not in spinning}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(list(map(str, command)), **pipes, env=environment | own | dict(
            OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1"))
        self.hello = self.answer()

    def ask(self, **request):
        "Less patience than for the start: there are servers that hang when many ask."
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], HANGS)[0]:
            self.process.kill()
            raise RuntimeError(f"it hangs: no answer in {HANGS} s")
        return self.answer()


class Run:
    "Samples of one run, by what was measured and by round; engines that fail leave it with their reason."
    def __init__(self, names, args):
        self.args, self.samples, self.seed, self.load, self.hello = args, {}, 0, [], {}
        self.reasons = {name: why for name in names if (why := absent(name))}
        self.names = [name for name in names if name not in self.reasons]
        self.pace, self.round = {}, 0

    def add(self, what, value): self.samples.setdefault(what, {})[len(self.samples.get(what, ())), self.round] = value

    def turns(self):
        "The engines in this round's order: nobody always follows the same neighbour."
        i = self.round % max(1, len(self.names))
        return self.names[i:] + self.names[:i]

    def fresh(self):
        self.seed += 1
        return self.seed

    def drop(self, name, error):
        self.reasons[name] = str(error)
        if name in self.names: self.names.remove(name)
        print(f"not measured: {name}: {error}", flush=True)


def streams_of(name, streams):
    "Those that the engine has slots for; the second llama-server stands there for the largest number alone."
    slots = PEERS[name][2]
    return [n for n in streams if n <= slots and (n > 8 or "slots" not in name)]


def measure_streams(run, streams, size):
    "All processes at once, one of them at work."
    tokens, new = size
    processes = {}
    for name in list(run.names):
        try:
            processes[name] = Process(*PEERS[name], run.args.threads, sum(size))
            run.hello[name] = processes[name].hello
            said = processes[name].ask(streams=1, tokens=16, new=8, seed=run.fresh())                  # warm-up
            run.pace[name] = said["seconds"] / 8
        except (RuntimeError, OSError) as e: run.drop(name, e)
    end = time.monotonic() + 60 * run.args.minutes
    for run.round in range(run.args.rounds):
        measure_limits(Plain(run))
        for n in streams:
            print(f"round {run.round + 1} of {run.args.rounds}: {n} streams", flush=True)
            for name in run.turns():
                if n not in streams_of(name, streams) or time.monotonic() > end: continue
                slow = run.pace[name] * n * new > SLOW
                if slow and run.round % 2: continue
                try: said = processes[name].ask(streams=n, tokens=tokens, new=new, seed=run.fresh())
                except (RuntimeError, OSError) as e:
                    run.drop(name, f"{n} streams: {e}")
                    continue
                run.pace[name] = said["seconds"] / (n * new)
                run.add(f"{n} streams, {name}", said["written"] / said["seconds"])
                if said["first"] is not None: run.add(f"first token, {n} streams, {name}", said["first"])
    for process in processes.values(): process.close()


class Plain:
    "A Run as `benchmarks.peers.measure_limits` wants it."
    def __init__(self, run): self.args, self.load, self.add = run.args, run.load, run.add


# --- our server -------------------------------------------------------------------------------------------------------

def measure_server(run, sizes):
    "What HTTP adds, what a known beginning saves, and what overload costs."
    from llm_workbench.serving.load import drive, over_http
    try:
        process = Process("served", PEERS["ours bf16"][1], 32, run.args.threads, 1300)
        run.hello[SERVER] = process.hello
        target = over_http(process.ask(address=True)["address"])
        for run.round in range(run.args.rounds):
            print(f"round {run.round + 1} of {run.args.rounds}: the server", flush=True)
            measure_overhead(run, process, target, sizes)
            said = process.ask(prefix=sizes["shared"], tokens=16, seed=1000 * run.fresh())
            for how in ("cold", "warm"): run.add(f"first token, {how}", said[how])
        measure_overload(run, process, lambda workload: drive(target, workload), sizes)
        process.close()
    except (RuntimeError, OSError, ImportError) as e: run.drop(SERVER, f"{type(e).__name__}: {e}")


def measure_overhead(run, process, target, sizes):
    "The same numbers of tokens by the engine's thread and through HTTP, in turns."
    from llm_workbench.serving.load import calls, drive
    tokens, new = sizes["size"]
    for n in sizes["streams"]:
        def engine():
            said = process.ask(streams=n, tokens=tokens, new=new, seed=run.fresh())
            return said["written"] / said["seconds"]
        def http():
            found = drive(target, calls(np.zeros(n), tokens, new, seed=run.fresh()))
            wrong = [r.error or r.reason for r in found.records if not r.done or r.tokens != new]
            if wrong: raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0]}")
            return n * new / found.seconds
        ways = {"engine": engine, "HTTP": http}
        for how in list(ways)[::1 if run.round % 2 else -1]: run.add(f"{n} streams by {how}", ways[how]())


def measure_overload(run, process, driven, sizes):
    "Capacity by a crowd; objectives from that; then goodput at once and twice the capacity, with a bounded queue."
    from llm_workbench.serving.load import arrivals, calls
    tokens, new, seconds = *sizes["short"], sizes["seconds"]
    def workload(rate, n): return calls(arrivals(rate, n, seed=run.fresh()), tokens, new, seed=run.fresh())
    def told(workload, slo=None):
        found = driven(workload)
        wrong = [r.error for r in found.records if r.error]
        if wrong: raise RuntimeError(f"{len(wrong)} requests failed under load: {wrong[0]}")
        return found.summary(slo)
    process.ask(queue=100_000)
    crowd = told(workload(np.inf, 2 * 32))
    capacity = crowd["requests/s"]
    slo = dict(ttft=max(2.0, 8 / capacity), tpot=2 * crowd["tpot p50"])
    queue = max(1, int(0.5 * slo["ttft"] * capacity))
    run.overload = dict(capacity=capacity, objectives=slo, queue=queue, tokens=tokens, new=new, seconds=seconds)
    for run.round in range(run.args.rounds):
        for load in (1, 2)[::1 if run.round % 2 else -1]:
            for name, limit in (("bounded", queue), ("endless", 100_000))[:1 if run.round else 2]:
                process.ask(queue=limit)
                found = told(workload(load * capacity, max(2, int(load * capacity * seconds))), slo)
                print(f"load {load}, {name} queue: {found['good/s']:.2f} of {load * capacity:.2f} requests/s in time")
                run.add(f"goodput at {load}x, {name} queue", found["good/s"])
                run.add(f"first token p99 at {load}x, {name} queue", found["ttft p99"])


# --- what follows from the samples ------------------------------------------------------------------------------------

def ratio(samples, a, b):
    "The median over the rounds in which both were measured, or None."
    by_round = [{at: value for (_, at), value in samples.get(what, {}).items()} for what in (a, b)]
    both = sorted(by_round[0].keys() & by_round[1].keys())
    return statistics.median(by_round[0][at] / by_round[1][at] for at in both) if both else None


def ratios_of(samples):
    "Ours / theirs for single rounds, and the server's own."
    found = {}
    for pair in PAIRS:
        task, ours, theirs = pair.split(": ")[0], *pair.split(": ")[1].split(" / ")
        found[pair] = ratio(samples, f"{task}, {ours}", f"{task}, {theirs}")
    for n in STREAMS:
        found[f"{n} streams: through HTTP / engine"] = ratio(samples, f"{n} streams by HTTP", f"{n} streams by engine")
    found["first token, warm / cold"] = ratio(samples, "first token, warm", "first token, cold")
    found["goodput at 2x / at 1x"] = ratio(samples, "goodput at 2x, bounded queue", "goodput at 1x, bounded queue")
    found["endless queue: goodput at 2x / at 1x"] = ratio(
        samples, "goodput at 2x, endless queue", "goodput at 1x, endless queue")
    return {what: value for what, value in found.items() if value is not None}


def goal_of(what):
    "(the ratio that was aimed at, whether more is better), or None."
    if what in GOALS: return GOALS[what], True
    for name, goal in SERVER_GOALS.items():
        if what.endswith(name) and not what.startswith("endless"): return goal, "cold" not in name


def unit_of(what):
    "What a sample is counted in."
    if what.startswith("first token"): return "s"
    if what.startswith("goodput"): return "requests/s"
    return {"read": "GB/s", "matr": "GFLOP/s"}.get(what[:4], "tokens/s")


def report(samples, ratios, reasons):
    "Medians, p20 to p80, ratios and goals on the screen."
    for what, values in samples.items():
        low, high = spread(values)
        print(f"{what:55} {statistics.median(values):9.3g} {unit_of(what):10} ({low:.3g} to {high:.3g})")
    for what, value in ratios.items():
        verdict, goal = "", goal_of(what)
        if goal: verdict = f"goal {goal[0]:.2f}: {'reached' if (value >= goal[0]) == goal[1] else 'missed'}"
        print(f"{what:60} {value:6.2f}  {verdict}")
    for name, why in reasons.items(): print(f"not measured: {name}: {why}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="of measuring streams: no task begins later")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD",
                        help="engines with one of these in their name; server: our server")
    parser.add_argument("--dry", action="store_true", help="short texts, one round; nothing is written")
    args = parser.parse_args()
    names = [n for n in PEERS if not args.only or any(word in n for word in args.only)]
    if not names and "server" not in args.only:
        sys.exit(f"no engine has {' or '.join(args.only)} in its name; there are {', '.join(PEERS)}, server")
    streams, size = STREAMS, SIZE
    sizes = dict(streams=STREAMS, size=SIZE, shared=1000, short=(64, 32), seconds=30)
    if args.dry:
        args.rounds, streams, size = 1, (1, 8, 32), (16, 4)
        sizes = dict(streams=(1, 8), size=(16, 8), shared=200, short=(16, 8), seconds=2)

    run = Run([] if args.only == ["server"] else names, args)
    run.overload = None
    if run.names: measure_streams(run, streams, size)
    if not args.only or "server" in args.only: measure_server(run, sizes)
    samples = {what: list(values.values()) for what, values in run.samples.items()}
    ratios = ratios_of(run.samples)
    report(samples, ratios, run.reasons)
    if args.dry: return
    lacking = [f"{n} streams" for n in streams
               if run.names and not any(w.startswith(f"{n} streams, ") for w in samples)]
    if lacking: sys.exit(f"nothing is kept: no sample of {', '.join(lacking)} (more --minutes, or a quieter machine)")
    out = record(
        "serving", samples, {what: unit_of(what) for what in samples}, threads=args.threads, streams=streams,
        tokens=dict(prompt=size[0], new=size[1]), server=sizes, overload=run.overload, note=NOTE,
        instructions=torch.backends.cpu.get_cpu_capability(), load_average=run.load,
        versions={name: hello["version"] for name, hello in run.hello.items()},
        weight_bytes={name: hello["weight_bytes"] for name, hello in run.hello.items()},
        cache_bytes_a_token=kv_bytes_per_token(open_checkpoint().config),
        spread={what: spread(values) for what, values in samples.items()}, ratios=ratios,
        goals={what: goal_of(what)[0] for what in ratios if goal_of(what)},
        rounds={what: [at for _, at in values] for what, values in run.samples.items()},
        **{"not measured": run.reasons} if run.reasons else {})
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
