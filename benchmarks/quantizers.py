"""How many weights a second do the quantizers make, and read back, against bitsandbytes and against writing memory?

    python -m benchmarks.quantizers                       # one matrix of 4096 x 4096, two threads; then every format
    python -m benchmarks.quantizers --size 1024 --rounds 3

All run in one process and take turns, round after round; a ratio is the median of the ratios of single rounds. What
is unpacked goes into new memory every time, as it does when a model is loaded, so the limit is measured that way too:
new memory filled with ones.
"""
import argparse
import logging
import statistics
import time

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb

from benchmarks.record import record
from llm_workbench.kernels import packed_cpu
from llm_workbench.quantization.formats import FORMATS as ALL
from llm_workbench.quantization.gguf_blocks import BlockFormat, c_quantize
from llm_workbench.quantization.i_quants import needs_importance
from llm_workbench.quantization.nf4 import fp4, nf4, nf4_dq

FORMATS = {"nf4": nf4, "fp4": fp4, "nf4_dq": nf4_dq}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peers(weight):
    "The functions that take turns on one weight, by (what, who)."
    calls = {}
    for name, format in FORMATS.items():
        options = dict(quant_type=name.removesuffix("_dq"), compress_statistics=name.endswith("_dq"))
        packed, theirs = format.pack(weight), bnb.quantize_4bit(weight, **options)
        same = torch.equal(packed.unpack(weight.dtype), bnb.dequantize_4bit(*theirs))
        assert same, f"{name} unpacks to other numbers than bitsandbytes: nothing to compare"
        calls[f"{name} quantize", "ours"] = lambda f=format: f.pack(weight)
        calls[f"{name} quantize", "ours in C"] = lambda f=format: packed_cpu.to_levels(weight, f)
        calls[f"{name} quantize", "bitsandbytes"] = lambda o=options: bnb.quantize_4bit(weight, **o)
        calls[f"{name} dequantize", "ours"] = lambda p=packed: p.unpack(weight.dtype)
        calls[f"{name} dequantize", "ours in C"] = lambda p=packed: packed_cpu.unpack(p, weight.dtype)
        calls[f"{name} dequantize", "bitsandbytes"] = lambda t=theirs: bnb.dequantize_4bit(*t)
    calls["write", "memory"] = lambda: torch.empty_like(weight).fill_(1)
    return calls


def measure(weight, rounds):
    "Million weights a second of every peer in every round."
    calls = peers(weight)
    speeds = {key: [] for key in calls}
    for turn in range(rounds + 1):                       # the first is a warm-up
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if turn: speeds[key].append(weight.numel() / 1e6 / (time.perf_counter() - start))
    return speeds


def every_format(rounds, seconds=0.5):
    "Million weights a second that each format packs and unpacks, by (what, name); ggml's library beside its types."
    weight, importance, speeds = torch.randn(4096, 768) * 0.02, torch.rand(768) + 0.1, {}
    for name, format in ALL.items():
        needs = isinstance(format, BlockFormat) and needs_importance(format.block.name)
        calls = {"quantize, ours": lambda w: format.pack(w, importance if needs else None)}
        if isinstance(format, BlockFormat):
            calls["quantize, ggml"] = lambda w: c_quantize(w, format.block.name, importance if needs else None)
        for what, call in calls.items():
            rows, spent = 8, 0.0
            while spent < seconds / 4 and rows < len(weight):                   # as many rows as half a second takes
                rows = min(len(weight), rows * 4)
                start = time.perf_counter()
                call(weight[:rows])
                spent = time.perf_counter() - start
            speeds[what, name] = timed(lambda: call(weight[:rows]), rows * 768, rounds)
        packed = format.pack(weight[:rows], importance if needs else None)
        ways = {"dequantize, ours": packed.unpack, "dequantize, C": lambda: packed_cpu.unpack(packed)}
        for what, call in ways.items():
            if what.endswith("C") and packed_cpu.plan(packed) is None: continue
            speeds[what, name] = timed(call, rows * 768, rounds)
        line = "  ".join(f"{what} {statistics.median(v):7.1f}" for (what, n), v in speeds.items() if n == name)
        print(f"{name:11} {format.bits((4096, 768)):6.3f} bits  {line}", flush=True)
    return speeds


def timed(call, weights, rounds):
    "Million weights a second in each round."
    found = []
    for turn in range(rounds + 1):                       # the first is a warm-up
        start = time.perf_counter()
        call()
        if turn: found.append(weights / 1e6 / (time.perf_counter() - start))
    return found


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    samples, ratios, shares = {}, {}, {}
    for short, dtype in DTYPES.items():
        speeds = measure((torch.randn(args.size, args.size) * 0.02).to(dtype), args.rounds)
        samples |= {f"{what} {short}, {who}": values for (what, who), values in speeds.items()}
        for what, who in speeds:
            if not who.startswith("ours"): continue
            ours, theirs, name = speeds[what, who], speeds[what, "bitsandbytes"], f"{what} {short}, {who}"
            ratio = ratios[name] = statistics.median(a / b for a, b in zip(ours, theirs))
            line = f"{name:34} {statistics.median(ours):7.0f} M weights/s   {ratio:5.2f} x bitsandbytes"
            if what.endswith("dequantize"):
                share = shares[name] = statistics.median(a / b for a, b in zip(ours, speeds["write", "memory"]))
                line += f"   {share:.2f} of writing new memory"
            print(line, flush=True)
    samples |= {f"{name} {what}": v for (what, name), v in every_format(min(args.rounds, 3)).items()}
    out = record("quantizers", samples, "million weights/s", ratios=ratios, shares_of_writing=shares,
                 settings=dict(size=args.size, rounds=args.rounds, threads=args.threads))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
