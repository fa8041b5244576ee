"""From torch's eager ops to one call a token: what each rung is worth on this CPU, in one process.

    python -m benchmarks.ladder                    # the embedded model
    python -m benchmarks.ladder --no-compile       # without torch.compile, which takes minutes
    python -m benchmarks.ladder --only "one call"  # rungs whose name contains a word

The rungs take turns within each round and write the same number of tokens behind the same short prompt; the read
bandwidth is measured in every round. A share is the time of reading the weights once at the round's bandwidth, over the
time of a token. torch.compile compiles during its first tokens: that time is kept apart.
"""
import argparse
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from benchmarks.record import record
from llm_workbench.architecture.ops import TORCH
from llm_workbench.hardware.machine import read_bandwidth
from llm_workbench.inference.cpu_speed import token_bytes
from llm_workbench.kernels import cpu_prompt, packed_cpu
from llm_workbench.lobby import load

PROMPT = 64
KINDS = {"float32": dict(weights="dense"), "bfloat16": dict(weights="dense", dtype=torch.bfloat16),
         "int8": dict(weights="int8"), "int4_g32": dict(weights="int4_g32"), "Q4_1": dict(weights="stored")}


def rungs():
    "Decoders by name, from the slowest way to the fastest."
    kinds = {name: load(ops=cpu_prompt.CPU, **how).decoder for name, how in KINDS.items()}
    return {**{f"torch, {n}": kinds[n].with_ops(TORCH) for n in ("float32", "bfloat16", "int8")},
            **{f"C products, {n}": d.with_ops(packed_cpu.CPU) for n, d in kinds.items()},
            **{f"one call, {n}": d for n, d in kinds.items()}}


class Writer:
    "Writes tokens of one text and says how long each took."
    def __init__(self, decoder, forward=None, store="contiguous", **options):
        self.decoder, self.forward = decoder, forward or decoder
        self.new_cache = lambda: decoder.new_cache(store, **options)

    def write(self, n):
        "Seconds of each of n steps."
        tokens, cache, seconds = torch.randint(100, 40_000, (1, PROMPT)), self.new_cache(), []
        token = self.decoder(tokens, cache)[:, -1].argmax(-1, keepdim=True)
        for _ in range(n):
            start = time.perf_counter()
            token = self.forward(token, cache)[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
        return seconds


def writers(args):
    "Name: who writes, and the bytes of a token."
    found = {name: (Writer(d), token_bytes(d)) for name, d in rungs().items()}
    if args.compile:
        plain = load(weights="dense", ops=TORCH).decoder
        naive, still = (torch.compile(plain.forward, dynamic=dynamic) for dynamic in (None, False))
        found["torch.compile, float32"] = Writer(plain, naive), token_bytes(plain)
        static = Writer(plain, still, "static", batch=1, slots=256)
        found["torch.compile, float32, static cache"] = static, token_bytes(plain)
    return {name: pair for name, pair in found.items() if any(word in name for word in args.only)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--only", nargs="*", default=[""])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    who, samples, shares, compiling = writers(args), {}, {}, {}
    for name, (writer, _) in who.items():
        start = time.perf_counter()
        writer.write(args.tokens if "compile" in name else 2)
        if "compile" in name: compiling[name] = time.perf_counter() - start
        print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
    for i in range(args.rounds):
        bandwidth = read_bandwidth()
        samples.setdefault("read bandwidth", []).append(bandwidth / 1e9)
        names = [*who]
        for name in names[i % len(names):] + names[:i % len(names)]:
            s = statistics.median(who[name][0].write(args.tokens))
            samples.setdefault(f"decode, {name}", []).append(1 / s)
            shares.setdefault(name, []).append(who[name][1] / bandwidth / s)
        print(f"round {i + 1} of {args.rounds}", flush=True)
    units = {what: "GB/s" if "bandwidth" in what else "tokens/s" for what in samples}
    shares = {name: statistics.median(values) for name, values in shares.items()}
    out = record("ladder", samples, units, threads=args.threads, prompt_tokens=PROMPT, new_tokens=args.tokens,
                 shares=shares, compiling=compiling, bytes_of_a_token={n: b for n, (_, b) in who.items()})
    for name in who: print(f"{statistics.median(samples[f'decode, {name}']):7.1f} tokens/s, {shares[name]:.2f} {name}")
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
