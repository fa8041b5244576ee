"""Is the memory of a training step what `finetuning.memory.plan` says before it is run?

    python -m benchmarks.memory                     # sixteen kinds of training, about ten minutes on one thread
    python -m benchmarks.memory --only "QLoRA"      # those whose name holds this; nothing is written

Every kind is a process of its own: two steps of AdamW through `train_step`, in float32, as `train` takes them. What
is measured is the process' largest resident set during the second (VmHWM, forgotten before it) above the resident set
from before the model was there, after a model of a million numbers has trained a step in the same way, so that
libraries are loaded. Beside it stands what a `Watch` counts in the same step: torch's storages, without the allocator.
Weights are random, except those of the embedded model.

What is freed has to be gone from the resident set. By itself the C library keeps it: a tensor that is smaller than
its limit (128 KiB, and it grows up to 32 MiB) has its place in a heap, which only shrinks from its end. So in the
processes that are compared with the plan, whatever has a page or more is a mapping of its own
(MALLOC_MMAP_THRESHOLD_=4096) and goes back when it is freed. For two kinds more processes have a limit of 128 KiB, and
the C library as it comes, and say what that holds without use (mallinfo2) when the step begins.
"""
import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.peer_process import memory
from benchmarks.record import record

WIDE = dict(vocab_size=24_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=12,
            num_key_value_heads=4, head_dim=64)                                                    # 68 million numbers
DEEP = dict(vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=9, num_attention_heads=8,
            num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)                          # 45 million
SMOL = None                                                                                        # the embedded model
SHAPES = {"wide": WIDE, "deep": DEEP, "SmolLM2": SMOL}
CASES = {  # name: (shape, method, lengths, rank, blocks computed again)
    "full, wide, 300": ("wide", "full", [300], 8, False),
    "full, wide, 3 texts, again": ("wide", "full", [300, 100, 200], 8, True),
    "full, deep, 600": ("deep", "full", [600], 8, False),
    "LoRA, wide, 600": ("wide", "lora", [600], 8, False),
    "LoRA, wide, r = 64, 600, again": ("wide", "lora", [600], 64, True),
    "LoRA, deep, 3 texts": ("deep", "lora", [300, 200, 100], 16, False),
    "LoRA, deep, 700, again": ("deep", "lora", [700], 16, True),
    "QLoRA, wide, 600": ("wide", "qlora", [600], 8, False),
    "QLoRA, deep, 3 texts": ("deep", "qlora", [300, 200, 300], 16, False),
    "QLoRA, wide, r = 64, 600, again": ("wide", "qlora", [600], 64, True),
    "LoRA, SmolLM2, 256": ("SmolLM2", "lora", [256], 8, False),
    "QLoRA, SmolLM2, 512, again": ("SmolLM2", "qlora", [512], 16, True),
}
HELD_OUT = {  # measured only when planner and benchmark were done
    "full, SmolLM2, 2 texts, again": ("SmolLM2", "full", [120, 90], 8, True),
    "LoRA, SmolLM2, r = 32, 400, again": ("SmolLM2", "lora", [400], 32, True),
    "QLoRA, SmolLM2, 3 texts": ("SmolLM2", "qlora", [150, 40, 110], 8, False),
    "QLoRA, deep, r = 32, 900, again": ("deep", "qlora", [900], 32, True),
}
CASES |= HELD_OUT
def limited(limit): return {"MALLOC_MMAP_THRESHOLD_": limit, "MALLOC_TRIM_THRESHOLD_": limit, "MALLOC_ARENA_MAX": "1"}
GIVEN_BACK = limited("4096")
KEEPING = {"a page": GIVEN_BACK, "128 KiB": limited("131072"), "as it comes": {}}      # the C library's limit
KEPT = "LoRA, SmolLM2, 256", "QLoRA, SmolLM2, 512, again"                               # kinds for which all are run


@cache
def config_of(shape):
    from llm_workbench import ModelConfig, load
    return load().decoder.config if SHAPES[shape] is None else ModelConfig(max_position_embeddings=4096,
                                                                           **SHAPES[shape])


def decoder_of(config, method, rank, again):   # config: None: the embedded model
    "What is trained; nothing else of the making of it stays."
    from llm_workbench import Decoder, load
    from llm_workbench.architecture.ops import TORCH
    from llm_workbench.finetuning.lora import LoRAConfig, adapt
    from llm_workbench.finetuning.qlora import qlora
    from llm_workbench.finetuning.sft import recomputed
    ops, lora = TORCH.but(blocks=recomputed) if again else TORCH, LoRAConfig(rank, 2.0 * rank)
    decoder = Decoder(config, ops) if config else load(weights="dense", ops=ops).decoder
    if method == "full": return decoder.requires_grad_(True)
    return (adapt if method == "lora" else qlora)(decoder, lora)


def rows_of(lengths, vocabulary):
    from llm_workbench.finetuning.data import Example, packed
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (n,), generator=g).tolist() for n in lengths]
    return packed([Example(text, text) for text in texts])


class Malloc(ctypes.Structure):
    "What glibc's mallinfo2 fills."
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]


def unused():
    "Bytes that the C library holds and nobody uses. None where it is not glibc 2.33 or later."
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None: return None
    mallinfo2.restype = Malloc
    return mallinfo2().fordblks


def one_case(name):
    "A process of its own: what a step takes above what was there before the model."
    from llm_workbench import ModelConfig
    from llm_workbench.finetuning.lora import trainable
    from llm_workbench.finetuning.memory import Watch
    from llm_workbench.finetuning.sft import Training, adamw, token_loss, train_step
    shape, method, lengths, rank, again = CASES[name]
    def training(decoder, rows):
        params = trainable(decoder)
        settings = Training(3, lr=1e-5)
        optimizer = adamw(params.values(), settings)
        def step(i): return train_step(decoder, lambda _: rows, settings, token_loss, i, params, optimizer)
        return step, optimizer
    small = decoder_of(ModelConfig(1000, 256, 512, 1, 4, 2, 64), method, rank, again).train()
    training(small, rows_of([300], 1000))[0](0)
    del small
    config = config_of(shape) if SHAPES[shape] else None
    if config is None: config_of(shape)                               # the file and its tokenizer have been read
    gc.collect()
    before = memory("VmRSS")
    decoder = decoder_of(config, method, rank, again).train()
    rows = rows_of(lengths, decoder.config.vocab_size)
    step, optimizer = training(decoder, rows)
    step(0)
    optimizer.zero_grad()
    gc.collect()
    watch = Watch([*decoder.parameters(), *decoder.buffers(),
                   *(t for state in optimizer.state.values() for t in state.values())])
    Path("/proc/self/clear_refs").write_text("5")                     # the largest so far: forgotten
    held, start = unused(), time.perf_counter()
    with watch: step(1)
    print("\n" + json.dumps(dict(seconds=time.perf_counter() - start, resident=memory("VmHWM") - before,
                                 counted=watch.peak, unused=held)))


def planned(name):
    from llm_workbench.finetuning.lora import LoRAConfig
    from llm_workbench.finetuning.memory import plan
    shape, method, lengths, rank, again = CASES[name]
    return plan(config_of(shape), method, lengths, LoRAConfig(rank, 2.0 * rank), recompute=again)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one: return one_case(args.one)
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}
    def measure(name, env):
        command = [sys.executable, "-m", "benchmarks.memory", "--one", name]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode: sys.exit(f"{name}:\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])
    samples, cases, keeping = {}, {}, {}
    for name in (n for n in CASES if args.only in n):
        runs, p = [measure(name, plain | GIVEN_BACK) for _ in range(args.rounds)], planned(name)
        samples[name] = [run["resident"] for run in runs]
        measured = sorted(samples[name])[(len(runs) - 1) // 2]
        cases[name] = dict(planned=p.total, when=p.when, resident=measured, counted=runs[0]["counted"],
                           seconds=runs[0]["seconds"], unused=runs[0]["unused"], held_out=name in HELD_OUT,
                           parts={k: getattr(p, k) for k in ("weights", "gradients", "optimizer", "kept", "scratch")})
        print(f"{name:36} planned {p.total / 1e6:7.1f} MB ({p.when}), resident {measured / 1e6:7.1f} "
              f"({p.total / measured - 1:+.1%}), counted {runs[0]['counted'] / 1e6:7.1f} "
              f"({p.total / runs[0]['counted'] - 1:+.1%}), {runs[0]['seconds']:.1f} s a step", flush=True)
        if name not in KEPT: continue
        keeping[name] = {limit: {key: (runs[0] if env is GIVEN_BACK else measure(name, plain | env))[key]
                                 for key in ("resident", "unused")} for limit, env in KEEPING.items()}
        print(keeping[name], flush=True)
    if args.only: return
    shapes = {name: shape or "SmolLM2-135M-Instruct" for name, shape in SHAPES.items()}
    out = record("memory_plan", samples, "bytes", cases=cases, keeping=keeping, shapes=shapes, setup={
        name: dict(zip(("shape", "method", "lengths", "rank", "again"), case)) for name, case in CASES.items()})
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
