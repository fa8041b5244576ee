"""The embedded model in our decoder and in the engines that people use instead, on this CPU, in one run.

    make peers                                   # once: environments and model files of the engines (tools/peers.py)
    python -m benchmarks.peers                   # all that is there
    python -m benchmarks.peers --only ours openvino --rounds 3
    python -m benchmarks.peers --dry             # short texts, one round, nothing is kept

Every engine is a process of its own (benchmarks/peer_process.py, with the Python of its environment) that keeps its
model loaded and answers one request at a time; they take turns within each round, in an order that turns, too. Texts
are random tokens that nobody has seen before. Measured: reading 512 and 2,048 tokens (to the first new token), writing
after a short text and after 4,096 tokens (every second round), the start of a fresh process and its memory; and, as
limits of the same minutes, the read bandwidth and the rate of torch's matrix products. A task that would take a peer
more than a minute is left out, and said. Before that each engine continues one sentence greedily, which shows that it
runs the same model.
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

import torch

from benchmarks.record import record
from llm_workbench.embedded import embedded_model
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.hardware.machine import (
    Roofline, kv_bytes_per_token, matmul_flops, prefill_limit, read_bandwidth)

ROOT = Path(__file__).parents[1]
HOME, EMBEDDED = ROOT / ".venv-peers", str(embedded_model())
MODELS = HOME / "models"
ENGINES = dict(ours="", transformers="", openvino="openvino", xllamacpp="xllamacpp", onnxruntime="onnxruntime",
               ctranslate2="ctranslate2", mlx="mlx", vllm="vllm") | {"llama.cpp": ""}     # engine: its environment
OURS = {"fp32": ("float32/dense", None), "bf16": ("bfloat16/dense", None), "int8": ("float32/int8", None),
        "int4_g32": ("float32/int4_g32", None), "Q4_1": ("float32/stored", None),
        **{w: (f"float32/stored/{MODELS}/{w}.gguf", f"{w}.gguf") for w in ("Q8_0", "Q5_1")}}
PEERS = {                                            # "engine weights": (what it loads, the file of make peers in that)
    **{f"ours {w}": loads for w, loads in OURS.items()},
    **{f"ours {w} rounded": (f"{model}+rounded", file) for w, (model, file) in OURS.items() if "/dense" not in model},
    "transformers fp32": (f"{MODELS}/transformers/float32", "transformers"),
    "transformers bf16": (f"{MODELS}/transformers/bfloat16", "transformers"),
    "llama.cpp Q4_1": (EMBEDDED, None),
    **{f"llama.cpp {w}": (f"{MODELS}/{w}.gguf", f"{w}.gguf") for w in ("Q8_0", "Q5_1")},
    "xllamacpp Q4_1": (EMBEDDED, None),
    **{f"{engine} {w}": (f"{MODELS}/{engine}-{w}", f"{engine}-{w}")
       for engine, kinds in dict(openvino="fp16 int8 int4", onnxruntime="fp32 int4", ctranslate2="float32 int8").items()
       for w in kinds.split()},
    "mlx int4": (f"{MODELS}/mlx-int4", "mlx-int4"),
    "vllm fp32": (f"{MODELS}/transformers/float32", "transformers"),
}
PAIRS = (("ours bf16", "openvino fp16"), ("ours int8", "openvino int8"), ("ours int4_g32", "openvino int4"),
         ("ours Q4_1", "openvino int4"), ("ours Q4_1", "llama.cpp Q4_1"), ("ours Q8_0", "llama.cpp Q8_0"),
         ("ours Q5_1", "llama.cpp Q5_1"), ("ours fp32", "transformers fp32"), ("ours bf16", "transformers bf16"),
         ("ours Q4_1", "transformers fp32"), ("ours fp32", "onnxruntime fp32"), ("ours int4_g32", "onnxruntime int4"),
         ("ours fp32", "ctranslate2 float32"), ("ours int8", "ctranslate2 int8"),
         *((f"ours {w} rounded", f"llama.cpp {w}") for w in ("Q4_1", "Q8_0", "Q5_1")),
         ("ours int8 rounded", "openvino int8"), ("ours int4_g32 rounded", "openvino int4"),
         ("ours int8 rounded", "ctranslate2 int8"), ("ours int4_g32 rounded", "onnxruntime int4"),
         ("ours Q4_1 rounded", "transformers fp32"))
TASKS = {"prefill 512": (512, 1), "decode": (16, 65), "prefill 2048": (2048, 1), "decode after 4096": (4096, 33)}
LONG = ("prefill 2048", "decode after 4096")         # asked for in every second round only
PATIENCE = 600                                       # seconds for one answer
SLOW = 60                                            # seconds of reading beyond which a task is not asked for
START, SENTENCE = (64, 33), "The capital of France is"
NOTE = ("One machine of two cores whose other work cannot be stopped: compare what stands in the same run, by ratios, "
        "and read p20 to p80 as the unrest of that hour.")


# --- one engine -------------------------------------------------------------------------------------------------------

def python_of(name):
    "The Python of an engine's environment."
    environment = ENGINES[name.split()[0]]
    return HOME / environment / "bin" / "python" if environment else Path(sys.executable)


def absent(name):
    "Why a peer cannot be measured here, or None."
    file = PEERS[name][1]
    if not python_of(name).exists(): return f"no environment {ENGINES[name.split()[0]]}: make peers"
    if file and not (MODELS / file).exists(): return f"{file} is not written: make peers"


class Peer:
    "A process that holds one model. Raises RuntimeError with the last words of a process that ended or said no."
    def __init__(self, name, threads, context):
        script = Path(__file__).with_name("peer_process.py")
        command = [python_of(name), "-P", script, name.split()[0], PEERS[name][0], "--threads", threads,
                   "--context", context]
        spinning = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
        own = {"PYTHONPATH": str(ROOT)} if not ENGINES[name.split()[0]] else {}
        environment = {k: v for k, v in os.environ.items() if k not in spinning}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        threads_of = dict(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", OPENVINO_TELEMETRY_OPT_OUT="1")
        self.process = subprocess.Popen(list(map(str, command)), env=environment | threads_of | own, **pipes)
        self.hello = self.answer()

    def answer(self):
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
            raise RuntimeError(f"no answer in {PATIENCE} s")
        line = self.process.stdout.readline()
        if not line: raise RuntimeError(self.last_words())
        said = json.loads(line)
        if "error" in said: raise RuntimeError(said["error"])
        return said

    def last_words(self):
        lines = [line for line in self.process.communicate()[1].splitlines() if line.strip()]
        return f"it ended early: {lines[-1][:200] if lines else 'it said nothing'}"

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        if self.process.poll() is None: self.process.stdin.close()
        try: self.process.wait(30)
        except subprocess.TimeoutExpired: self.process.kill()


# --- measuring --------------------------------------------------------------------------------------------------------

class Run:
    "Samples of one run, by what was measured; peers that fail leave it with their reason."
    def __init__(self, names, args):
        self.args, self.samples, self.seed = args, {}, 0
        reasons = {name: absent(name) for name in names}
        self.reasons = {name: why for name, why in reasons.items() if why}
        self.names = [name for name in names if name not in self.reasons]
        self.hello, self.texts, self.load, self.pace = {}, {}, [], {}                          # pace: s to read a token

    def add(self, what, value): self.samples.setdefault(what, []).append(value)

    def drop(self, name, error):
        self.names.remove(name)
        self.reasons[name] = str(error)
        for what in [w for w in self.samples if w.endswith(f", {name}")]: del self.samples[what]
        print(f"not measured: {name}: {error}", flush=True)

    def turns(self, i):
        "The peers in this round's order: nobody always follows the same neighbour."
        return self.names[i % len(self.names):] + self.names[:i % len(self.names)] if self.names else []

    def takes(self, name, task, size):
        "Is this task quick enough for the peer? If not, the reason is kept."
        seconds = size[0] * self.pace[name]
        if seconds > SLOW: self.reasons[f"{task}, {name}"] = f"reading {size[0]:,} tokens would take {seconds:.0f} s"
        return seconds <= SLOW

    def ask(self, peer, size):
        "A request for a text that nobody has seen."
        self.seed += 1
        return peer.ask(tokens=size[0], new=size[1], seed=self.seed)


def measure_starts(run, tokenizer, size=START):
    "Fresh processes: seconds to the first token, memory after a text; in the first round a sentence, too."
    for i in range(run.args.starts):
        for name in run.turns(i):
            try:
                peer = Peer(name, run.args.threads, 1024)
                run.hello[name] = peer.hello
                if i == 0: run.texts[name] = continued(peer, tokenizer)
                pace = run.ask(peer, size)["first"] / size[0]
                run.pace[name] = min(pace, run.pace.get(name, pace))
                bytes_of = peer.ask(memory=True)
                peer.close()
            except (RuntimeError, OSError) as e:
                run.drop(name, e)
                continue
            run.add(f"start, {name}", peer.hello["first_token"])
            for which in ("peak", "settled"):
                if bytes_of[which]: run.add(f"{which} memory, {name}", bytes_of[which] / 2**20)
        print(f"starts: round {i + 1} of {run.args.starts}", flush=True)


def continued(peer, tokenizer):
    "How it goes on after SENTENCE, greedily."
    written = peer.ask(ids=tokenizer.encode(SENTENCE), new=12)["written"]
    return written if isinstance(written, str) else tokenizer.decode(written)


def measure_speed(run, tasks):
    "All processes at once, one of them at work; a task is for all peers or for none."
    longest = max(tokens + new for tokens, new in tasks.values()) + 16
    peers = {}
    for name in list(run.names):
        try:
            peers[name] = Peer(name, run.args.threads, longest)
            run.ask(peers[name], (16, 9))                                                      # warm-up
        except (RuntimeError, OSError) as e: run.drop(name, e)
    end = time.monotonic() + 60 * run.args.minutes
    for i in range(run.args.rounds):
        measure_limits(run)
        for task, size in tasks.items():
            if task in LONG and i % 2 or time.monotonic() > end: continue
            print(f"round {i + 1} of {run.args.rounds}: {task}", flush=True)
            for name in run.turns(i):
                if not run.takes(name, task, size): continue
                try: answer = run.ask(peers[name], size)
                except (RuntimeError, OSError) as e: run.drop(name, e)
                else: keep(run, task, name, size, answer)
    for name in list(run.names):
        peak = peers[name].ask(memory=True)["peak"]
        if peak: run.add(f"peak memory after all, {name}", peak / 2**20)
    for peer in peers.values(): peer.close()


def keep(run, task, name, size, answer):
    "Tokens per second of one answer."
    tokens, new = size
    if new == 1: run.add(f"{task}, {name}", tokens / answer["first"])
    else: run.add(f"{task}, {name}", (new - 1) / answer["rest"])


def measure_limits(run):
    "What the machine can do in this minute."
    threads = run.args.threads
    run.load.append(os.getloadavg()[0])
    run.add("read bandwidth", read_bandwidth(threads=threads) / 1e9)
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        run.add(f"matrix products, {short}", matmul_flops(dtype, threads=threads) / 1e9)


# --- what follows from the samples ------------------------------------------------------------------------------------

def spread(values):
    "The 20th and the 80th percentile."
    if len(values) == 1: return values * 2
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return [fifths[0], fifths[-1]]


def ratios_of(samples, tasks=TASKS):
    "Medians of ours / peer of single rounds, for pairs of about equal bytes or of the same arithmetic."
    found = {}
    for task in tasks:
        for a, b in PAIRS:
            ours, theirs = (samples.get(f"{task}, {name}", []) for name in (a, b))
            if ours and len(ours) == len(theirs):
                found[f"{task}: {a} / {b}"] = statistics.median(x / y for x, y in zip(ours, theirs))
    return found


def limits_of(medians, weight_bytes, config, tasks=TASKS):
    "Shares of the limits: decode of bandwidth / bytes (weights, and a 16-bit cache), prefill of the matrix products."
    shares, bandwidth = {}, medians["read bandwidth"] * 1e9
    flops = max(v for what, v in medians.items() if what.startswith("matrix products")) * 1e9
    for task, (tokens, new) in tasks.items():
        for name, nbytes in weight_bytes.items():
            speed = medians.get(f"{task}, {name}")
            if speed is None: continue
            step = nbytes + tokens * kv_bytes_per_token(config)
            limit = bandwidth / step if new > 1 else prefill_limit(config, Roofline(bandwidth, flops), tokens)
            shares[f"{task}, {name}"] = speed / limit
    return shares


def unit_of(what):
    "What a sample is counted in."
    kinds = {"read": "GB/s", "matr": "GFLOP/s", "star": "s", "peak": "MiB", "sett": "MiB"}
    return kinds.get(what[:4], "tokens/s")


def report(samples, shares, ratios, reasons):
    "Medians, p20 to p80 and shares on the screen."
    for what, values in samples.items():
        low, high = spread(values)
        share = f"{shares[what]:6.0%} of the limit" if what in shares else ""
        print(f"{what:36} {statistics.median(values):9.2f} {unit_of(what):9} ({low:.2f} to {high:.2f}){share}")
    for what, value in ratios.items(): print(f"{what:60} {value:6.2f}")
    for name, why in reasons.items(): print(f"not measured: {name}: {why}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="of measuring speed: no task begins later")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="peers with one of these in their name")
    parser.add_argument("--dry", action="store_true", help="short texts, one round; nothing is written")
    args = parser.parse_args()
    names = [n for n in PEERS if any(word in n for word in args.only) or not args.only and not n.startswith("vllm")]
    if not names: sys.exit(f"no peer has {' or '.join(args.only)} in its name; there are {', '.join(PEERS)}")
    tasks, size = TASKS, START
    if args.dry:
        args.rounds, args.starts, size = 1, 1, (32, 5)
        tasks = {task: (32, min(new, 5)) for task, (_, new) in TASKS.items()}

    checkpoint, run = open_checkpoint(), Run(names, args)
    measure_starts(run, checkpoint.tokenizer, size)
    measure_speed(run, tasks)
    medians = {what: statistics.median(values) for what, values in run.samples.items()}
    weight_bytes = {name: run.hello[name]["weight_bytes"] for name in run.names}
    shares = limits_of(medians, weight_bytes, checkpoint.config, tasks)
    ratios = ratios_of(run.samples, tasks)
    report(run.samples, shares, ratios, run.reasons)
    if args.dry: return
    lacking = [task for task in tasks if not any(what.startswith(f"{task}, ") for what in run.samples)]
    if lacking: sys.exit(f"nothing is kept: no sample of {', '.join(lacking)} (more --minutes, or a quieter machine)")
    out = record(
        "peers", run.samples, {what: unit_of(what) for what in run.samples}, threads=args.threads,
        tasks={t: dict(tokens=n, new=new) for t, (n, new) in tasks.items()}, note=NOTE,
        instructions=torch.backends.cpu.get_cpu_capability(), load_average=run.load,
        versions={name: run.hello[name]["version"] for name in run.names},
        spread={what: spread(values) for what, values in run.samples.items()},
        weight_bytes=weight_bytes, cache_bytes_a_token=kv_bytes_per_token(checkpoint.config),
        text_after=SENTENCE, texts={name: run.texts[name] for name in run.names}, ratios=ratios, limits=shares,
        **{"not measured": run.reasons} if run.reasons else {})
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
