"""How fast is a step of supervised fine-tuning, and how much memory does it take, against TRL's SFTTrainer?

    python -m benchmarks.finetuning                      # SmolLM2: LoRA and all parameters, float32, two threads
    python -m benchmarks.finetuning --steps 8 --size 8

Every run is a process of its own. All are given the same texts in the same order (the bundled instructions, answers
learned), so their losses have to be the same: further apart than 1e-4 in the first step, or than 1 % later (each draws
its adapter), and nothing is written. Tokens are those of the texts, without filling. Memory is the highest resident
set of the process while it trains, in all and above what was resident before the first step.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.peer_process import memory
from benchmarks.record import record

RANK, RATE = 8, dict(lora=2e-4, full=2e-5)
RUNS = {  # name: (who, what learns, blocks computed again)
    f"{what}{', again' if again else ''}, {who}": (who, what, again)
    for what, kept in (("lora", (False, True)), ("full", (False,))) for again in kept for who in ("ours", "TRL")}


def texts(args):
    from llm_workbench import load
    from llm_workbench.finetuning.data import batch_at, example, instructions
    tokenizer = load().tokenizer
    all_ = [example(tokenizer, row["messages"]) for row in instructions("train")]
    return [batch_at(all_, args.size, 0, step) for step in range(args.steps)]


def watched(start):
    "Memory before, highest memory now; the highest starts anew here."
    if start: Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS" if start else "VmHWM")


def ours(args, what, again):
    from llm_workbench import load
    from llm_workbench.architecture.ops import TORCH
    from llm_workbench.finetuning.data import packed
    from llm_workbench.finetuning.lora import LoRAConfig, adapt
    from llm_workbench.finetuning.sft import Training, recomputed, train
    batches = texts(args)
    decoder = load(weights="dense", ops=TORCH.but(blocks=recomputed) if again else TORCH).decoder
    decoder = decoder.requires_grad_(True) if what == "full" else adapt(decoder, LoRAConfig(RANK, 2 * RANK))
    settings = Training(args.steps, lr=RATE[what], warmup=0, schedule="constant")
    before, log = watched(True), []
    train(decoder, lambda step: packed(batches[step]), settings, log=lambda _, m: log.append(m))
    return dict(loss=[m["loss"] for m in log], ends=[m["seconds"] for m in log], before=before, peak=watched(False))


def TRL(args, what, again):
    import transformers
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from llm_workbench.embedded import embedded_model
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    data = Dataset.from_list([dict(input_ids=e.ids, labels=e.labels) for batch in texts(args) for e in batch])
    path, ends = embedded_model(), []
    gguf = dict(gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **gguf,
                                                 quantization_config=GgufConfig(dequantize=True))
    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__): self.start, self.before = time.perf_counter(), watched(True)
        def on_step_end(self, *_, **__): ends.append(time.perf_counter() - self.start)
    clock = Clock()
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(folder, max_steps=args.steps, per_device_train_batch_size=args.size, max_length=None,
                           learning_rate=RATE[what], lr_scheduler_type="constant", warmup_steps=0, use_cpu=True,
                           bf16=False, gradient_checkpointing=again, train_sampling_strategy="sequential",
                           logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
        trainer = SFTTrainer(model, config, train_dataset=data, callbacks=[clock],
                             peft_config=lora if what == "lora" else None,
                             processing_class=AutoTokenizer.from_pretrained(path.parent, **gguf))
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return dict(loss=losses, ends=ends, before=clock.before, peak=watched(False))


def run(name, args):
    "One run in a process of its own."
    command = [sys.executable, "-m", "benchmarks.finetuning", "--run", name, "--steps", str(args.steps),
               "--size", str(args.size), "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{name}:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=8, help="texts of a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        who, what, again = RUNS[args.run]
        return print("\n" + json.dumps(globals()[who](args, what, again)))
    batches = texts(args)
    tokens = [sum(map(len, batch)) for batch in batches]
    filled = [max(map(len, batch)) * len(batch) for batch in batches]
    found = {name: [] for name in RUNS}
    for _ in range(args.rounds):
        for name in RUNS: found[name].append(run(name, args))
    samples, steps, ratios = {}, {}, {}
    for name, rounds in found.items():
        # the first step warms up
        samples[f"{name}, tokens/s"] = [n / (b - a) for r in rounds
                                        for n, a, b in zip(tokens[1:], r["ends"], r["ends"][1:])]
        samples[f"{name}, peak GB"] = [r["peak"] / 1e9 for r in rounds]
        samples[f"{name}, above before, GB"] = [(r["peak"] - r["before"]) / 1e9 for r in rounds]
        steps[name] = {"tokens/s": sum(tokens[1:]) * len(rounds) / sum(r["ends"][-1] - r["ends"][0] for r in rounds),
                       "peak, GB": statistics.median(samples[f"{name}, peak GB"]),
                       "above before, GB": statistics.median(samples[f"{name}, above before, GB"])}
        print(f"{name:18}", {k: round(v, 2) for k, v in steps[name].items()}, flush=True)
    for name in RUNS:
        if not name.endswith("ours"): continue
        other = name.replace("ours", "TRL")
        apart = [abs(a / b - 1) for a, b in zip(found[name][0]["loss"], found[other][0]["loss"])]
        if apart[0] > 1e-4 or max(apart) > 1e-2: sys.exit(f"{name}: losses are {apart} from TRL's: nothing compares")
        key = name.removesuffix(", ours")
        ratios[key] = {**{k: steps[name][k] / steps[other][k] for k in steps[name]}, "losses apart": max(apart)}
        print(f"{key:18} ours / TRL:", {k: float(f"{v:.3g}") for k, v in ratios[key].items()}, flush=True)
    out = record("finetuning", samples, "as named", steps=steps, ratios=ratios,
                 losses={name: rounds[0]["loss"] for name, rounds in found.items()},
                 settings=dict(steps=args.steps, texts=args.size, tokens=tokens, with_filling=filled, rank=RANK,
                               threads=args.threads, rounds=args.rounds))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
