"""How fast are the GPU kernels, beside what others offer and beside what the chip can do?

    python -m benchmarks.kernels                    # every chapter's cases
    python -m benchmarks.kernels bytes reductions   # some
    python -m benchmarks.kernels bytes --rounds 5
    python -m benchmarks.kernels --dry              # every function once, a process a chapter: compiles all at a time

A chapter's cases are in benchmarks/gpu/<chapter>.py: `cases()` yields a `Case`. Peers of a case take turns, each from a
cold L2 cache, each recorded as a CUDA graph where it can be, so that Python's time is not measured. What is written
down per peer: every sample, the median with p20 and p80, and the share of the roof that the case names.
"""
import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.record import record

CHAPTERS = sorted(p.stem for p in (Path(__file__).parent / "gpu").glob("*.py") if p.stem != "__init__")
NEEDED = {"copy": "GB/s", "read": "GB/s", "bf16": "TFLOP/s"}     # roofs that every run measures


@dataclass
class Case:
    "One question: who computes this, how fast?"
    label: str                      # "RMSNorm 16384 x 4096 bf16"
    peers: dict[str, Callable]      # name -> function without arguments; "ours" is measured against the others
    nbytes: float = 0               # that have to move, read and written
    flops: float = 0                # that have to be done
    roof: str = "copy"              # "copy", "read" (bytes) or "bf16" (FLOPs)
    goals: dict = field(default_factory=dict)   # {"copy": 0.95} share of a roof, {"eager": 1.3} times as fast as a peer
    graph: bool = True              # record as a CUDA graph; False where a peer waits for the host
    more: dict = field(default_factory=dict)    # whatever else explains the numbers (memory, errors)


class Recorded:
    "A function as a CUDA graph; as it is, where it cannot be recorded."
    def __init__(self, run, graph=True):
        for _ in range(3): run()                                 # compiled, libraries loaded, memory held
        torch.cuda.synchronize()
        self.run, self.graph = run, None
        if not graph: return
        made = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(made): self.kept = run()
        except Exception as e:
            print(f"    (not recorded: {type(e).__name__}: {str(e).splitlines()[0][:100]})")
            torch.cuda.synchronize()
        else: self.run, self.graph = made.replay, made


class Timer:
    "Seconds on the device from a cold L2: a large write goes before every sample."
    def __init__(self): self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, run, samples=1) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def roofs(timer) -> dict:
    "Rates measured on this card: copying and reading memory (bytes/s), a bf16 product (FLOP/s)."
    big = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)             # 1 GiB
    out, small = torch.empty_like(big), [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    rate = lambda amount, run: [amount / s for s in timer(run, 10)][2:]
    return {"copy": rate(2 * big.nbytes, lambda: out.copy_(big)), "read": rate(big.nbytes, read_all(big)),
            "bf16": rate(2 * 8192**3, lambda: torch.mm(*small))}


def read_all(x):
    "A function that reads every byte of x once and writes next to nothing: what decoding is measured against."
    from benchmarks.gpu.reading import read_sum
    return lambda: read_sum(x)


def measure(case, timer, rounds, seconds) -> dict:
    "Samples in seconds of every peer, taken in turns, forwards and backwards."
    ready = {}
    for name, run in case.peers.items():
        try: ready[name] = Recorded(run, case.graph)
        except Exception as e:
            if name == "ours": raise
            print(f"    {name}: {type(e).__name__}: {str(e).splitlines()[0][:150]}")
    once = sum(timer(peer.run)[0] for peer in ready.values())
    each = max(3, min(30, int(seconds / rounds / max(once, 1e-5))))
    samples = {name: [] for name in ready}
    for turn in range(rounds):
        for name in list(ready)[:: 1 if turn % 2 == 0 else -1]: samples[name] += timer(ready[name].run, each)
    return samples


def percentile(values, share): return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(case, samples, limits) -> dict:
    "What a case came to: medians, shares of its roofs, times as fast as each peer, goals."
    middle = {name: statistics.median(values) for name, values in samples.items()}
    amount = {"copy": case.nbytes, "read": case.nbytes}
    share = {name: {roof: amount.get(roof, case.flops) / m / statistics.median(limits[roof])
                    for roof in {case.roof, *(g for g in case.goals if g in limits)}} for name, m in middle.items()}
    faster = {name: m / middle["ours"] for name, m in middle.items() if name != "ours"}
    came = lambda g: share["ours"][g] if g in limits else faster.get(g)
    reached = {g: {"goal": goal, "reached": came(g)} for g, goal in case.goals.items()}
    return dict(nbytes=case.nbytes, flops=case.flops, roof=case.roof, seconds={
        name: dict(median=middle[name], p20=percentile(v, 0.2), p80=percentile(v, 0.8)) for name, v in samples.items()},
        share_of_roof=share, ours_times_as_fast_as=faster, goals=reached, **case.more)


def show(label, found):
    "One line a case: share of the roof and times as fast as the peers."
    roof = found["roof"]
    against = "  ".join(f"{name} {x:.2f}x" for name, x in found["ours_times_as_fast_as"].items())
    missed = " ".join(f"MISSED {g} {r['reached']} of {r['goal']}" for g, r in found["goals"].items()
                      if r["reached"] is None or r["reached"] < r["goal"])
    took, share = found["seconds"]["ours"]["median"] * 1e6, found["share_of_roof"]["ours"][roof]
    print(f"  {label:52} {took:9.1f} us  {share:.3f} of {roof}   {against}  {missed}", flush=True)


def run_chapter(name, timer, args):
    "Measure all cases of a chapter and write them down, also those before one that failed."
    print(f"{name}:", flush=True)
    start, limits = time.time(), roofs(timer)
    found, samples = {}, {f"roof: {k}": [x / (1e12 if k == "bf16" else 1e9) for x in v] for k, v in limits.items()}
    failed = []
    cases: Iterator[Case] = import_module(f"benchmarks.gpu.{name}").cases()
    while (case := next(cases, None)) is not None:
        try: times = measure(case, timer, args.rounds, args.seconds)
        except Exception as e:
            failed.append(f"{case.label}: {type(e).__name__}: {str(e)[:500]}")
            print("  FAILED", failed[-1], flush=True)
            continue
        found[case.label] = summary(case, times, limits)
        samples |= {f"{case.label}: {peer}": [s * 1e6 for s in v] for peer, v in times.items()}
        show(case.label, found[case.label])
        del case, times
        torch.cuda.empty_cache()
    units = {what: NEEDED[what[6:]] if what.startswith("roof: ") else "us" for what in samples}
    path = record(f"kernels_{name}", samples, units, cases=found, failed=failed, rounds=args.rounds)
    print(f"  {time.time() - start:.0f} s, written to {path.relative_to(path.parents[3])}", flush=True)
    return failed


def dry(name):
    "Call every function of a chapter once, so that it is compiled; say what fails."
    bad = 0
    for case in import_module(f"benchmarks.gpu.{name}").cases():
        for peer, run in case.peers.items():
            try: run(); torch.cuda.synchronize()
            except Exception as e:
                bad += peer.startswith("ours")
                print(f"{name}: {case.label}: {peer}: {type(e).__name__}: {str(e)[:300]}", flush=True)
    return bad


def dry_together(chapters):
    "The same for several chapters at a time, each in a process of its own."
    command = [sys.executable, "-m", "benchmarks.kernels", "--dry"]
    running = [subprocess.Popen([*command, name]) for name in chapters]
    sys.exit(sum(process.wait() != 0 for process in running))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", help=f"of {', '.join(CHAPTERS)}")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.4, help="for a case, about")
    parser.add_argument("--dry", action="store_true", help="call every function once; nothing is measured")
    args = parser.parse_args()
    chapters = args.chapters or [c for c in CHAPTERS if c != "reading"]
    if not torch.cuda.is_available(): sys.exit("torch sees no NVIDIA GPU here (llm-workbench doctor says why)")
    torch.manual_seed(0)
    timer, failed = Timer(), []
    if args.dry: dry_together(chapters) if len(chapters) > 1 else sys.exit(dry(chapters[0]))
    for name in chapters:
        try: failed += run_chapter(name, timer, args)
        except Exception as e:
            failed.append(f"{name}: {type(e).__name__}: {e}")
            print("  FAILED", failed[-1], flush=True)
        torch.cuda.empty_cache()
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
