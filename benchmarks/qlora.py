"""What does a training step through a four-bit matrix cost, in time against the dense one, and in memory?

    python -m benchmarks.qlora                       # two threads; about two minutes
    python -m benchmarks.qlora --rounds 3 --skip-model

One step: forward and backward to the input, 512 tokens, a matrix of SmolLM2-135M or of a model of a billion. All take
turns in one process, round after round, beside `bitsandbytes.nn.Linear4bit` with the same weights; a ratio is the
median of the ratios of single rounds. Then one step of the whole embedded model, each way of training it in a process
of its own: what torch keeps for the backward pass beyond what the model holds anyway, and the largest resident memory.
"""
import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import llm_workbench as wb
from benchmarks.peer_process import memory
from benchmarks.record import record
from llm_workbench.architecture.matrices import packed_linear, unpacked_linear
from llm_workbench.finetuning.data import Example, packed
from llm_workbench.finetuning.lora import LoRAConfig, adapt, trainable
from llm_workbench.finetuning.qlora import kept_bytes, qlora
from llm_workbench.finetuning.sft import token_loss
from llm_workbench.kernels import packed_cpu
from llm_workbench.quantization.formats import FORMATS
from llm_workbench.quantization.nf4 import to_bitsandbytes

TOKENS = 512
SHAPES = {"SmolLM2 q_proj": (576, 576), "SmolLM2 up_proj": (1536, 576), "SmolLM2 down_proj": (576, 1536),
          "1B q_proj": (2048, 2048), "1B k_proj": (512, 2048), "1B up_proj": (8192, 2048),
          "1B down_proj": (2048, 8192)}                               # (out, in); the second as in Llama-3.2-1B
WAYS = ("full", "LoRA, dense", "QLoRA, kept", "QLoRA, torch", "QLoRA, C")


def linear4bit(packed):
    "bitsandbytes' layer over the same bytes."
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as bnb
    data, state = to_bitsandbytes(packed)
    outs, ins = packed.shape
    layer = bnb.nn.Linear4bit(ins, outs, bias=False, compute_dtype=torch.float32, device="meta")
    layer.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)
    layer.quant_state = state
    return layer


def steps(weight):
    "The products that take turns, by name: x -> y."
    dense, calls = torch.nn.Parameter(weight, requires_grad=False), {}
    calls["dense"] = lambda x: F.linear(x, dense)
    for name in ("nf4", "nf4_dq", "int4_g64"):
        packed = FORMATS[name].pack(weight)
        calls[f"{name}, C"] = lambda x, p=packed: packed_cpu.packed_linear(x, p)
        if name == "int4_g64": continue
        calls[f"{name}, torch"] = lambda x, p=packed: packed_linear(x, p)
        calls[f"{name}, bitsandbytes"] = linear4bit(packed)
        if name == "nf4_dq": calls["nf4_dq, kept"] = lambda x, p=packed: unpacked_linear(x, p)
    return calls


def times(shape, rounds):
    "Seconds of a step by each product in every round, and the bytes that each keeps for the backward pass."
    torch.manual_seed(0)
    weight, kept = torch.randn(shape) * 0.02, {}
    calls = steps(weight)
    x, grad = torch.randn(TOKENS, shape[1], requires_grad=True), torch.randn(TOKENS, shape[0])
    found, grads = {name: [] for name in calls}, {}
    for turn in range(rounds + 1):                                    # the first is a warm-up
        for name, call in calls.items():
            x.grad = None
            start = time.perf_counter()
            call(x).backward(grad)
            if turn: found[name].append(time.perf_counter() - start)
            grads[name] = x.grad
    for name, call in calls.items():
        with kept_bytes(x, weight) as count: out = call(x)
        kept[name] = count()
    for name in ("nf4", "nf4_dq"):
        ours, theirs = grads[f"{name}, C"], grads[f"{name}, bitsandbytes"]
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), "another gradient: nothing to compare"
    return found, kept


def model_of(way):
    "The embedded model in float32, ready for one way of training."
    decoder, config = wb.load(weights="dense").decoder, LoRAConfig(r=16, alpha=32)
    if way == "full": return decoder.requires_grad_(True)
    if way == "LoRA, dense": return adapt(decoder, config)
    op = {"QLoRA, kept": unpacked_linear, "QLoRA, torch": packed_linear}.get(way, decoder.ops.packed_linear)
    return qlora(decoder, config).with_ops(packed_linear=op)


def one_model(way, threads):
    "A process of its own: two steps of AdamW with one text."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    decoder = model_of(way)
    optimizer = torch.optim.AdamW(trainable(decoder).values(), lr=1e-3 if way != "full" else 1e-5)
    ids = torch.randint(0, 49152, (TOKENS,)).tolist()
    rows = packed([Example(ids, ids)])
    gc.collect()
    held, seconds = memory("VmRSS"), []
    try: Path("/proc/self/clear_refs").write_text("5")                # the largest so far: forgotten
    except OSError: pass
    for step in range(2):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss, n = token_loss(decoder, rows)
        (loss / n).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak, there = memory("VmHWM"), [*decoder.parameters(), *decoder.buffers()]
    with kept_bytes(*there) as count: last, _ = token_loss(decoder, rows)
    kept = count()
    weights = sum(t.nbytes for t in {id(t): t for t in there}.values())
    learns = sum(p.numel() for p in trainable(decoder).values())
    print(json.dumps(dict(seconds=seconds[1], kept=kept, before=held, peak=peak, weights=weights, learns=learns,
                          losses=[loss.item() / n, last.item() / n])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-model", action="store_true")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return one_model(args.one, args.threads)
    torch.set_num_threads(args.threads)
    samples, ratios, kept, models = {}, {}, {}, {}
    for what, shape in SHAPES.items():
        found, of_each = times(shape, args.rounds)
        for name, values in found.items():
            key = f"{what}, {name}"
            samples[key], kept[key] = values, of_each[name]
            ratios[key] = statistics.median(a / b for a, b in zip(values, found["dense"]))
            print(f"{key:38} {statistics.median(values) * 1e3:8.1f} ms  {ratios[key]:5.2f} x dense  "
                  f"{kept[key] / 1e6:6.1f} MB kept", flush=True)
    for way in () if args.skip_model else WAYS:
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}        # what is freed goes back to the system
        command = [sys.executable, "-m", "benchmarks.qlora", "--one", way, "--threads", str(args.threads)]
        models[way] = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
        m = models[way]
        print(f"{way:14} {m['seconds']:5.1f} s, weights {m['weights'] / 1e6:5.0f} MB, kept {m['kept'] / 1e6:5.0f} MB, "
              f"peak {m['peak'] / 1e6:5.0f} MB", flush=True)
    out = record("qlora", samples, "s", ratios_to_dense=ratios, kept_for_backward=kept, models=models,
                 settings=dict(tokens=TOKENS, rounds=args.rounds, threads=args.threads, shapes=SHAPES))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
