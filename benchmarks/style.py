"""Can the embedded model learn a manner in minutes on a CPU?

    python -m benchmarks.style                           # SmolLM2-135M-Instruct, LoRA of rank 8, two threads

It learns from the bundled answers of the topic "style" (one sentence, then "In short," and
the same again in a few words) and is asked the questions held out, before and after, greedily.
"""
import argparse
import os
import time
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.record import record
from llm_workbench import load
from llm_workbench.architecture.ops import TORCH
from llm_workbench.finetuning.data import batch_at, example, instructions, packed
from llm_workbench.finetuning.lora import LoRAConfig, adapt, merged
from llm_workbench.finetuning.sft import Training, mean_loss, train


def in_manner(answer): return answer.count("In short,") == 1 and len(answer.split("In short,")[0]) > 20


def answers(lm, questions, decoder):
    lm = replace(lm, decoder=decoder)
    return [lm.chat(q, max_new_tokens=60, temperature=0) for q in questions]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--size", type=int, default=4, help="texts of a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    lm = load(weights="dense")
    held = instructions("test", topic="style")
    texts, exam = ([example(lm.tokenizer, row["messages"]) for row in rows]
                   for rows in (instructions("train", topic="style"), held))
    questions = [next(m["content"] for m in row["messages"] if m["role"] == "user") for row in held]
    before = answers(lm, questions, lm.decoder)
    student = adapt(lm.decoder.with_ops(TORCH), LoRAConfig(8, 16))
    loss, start, log = [mean_loss(student, [packed(exam)])], time.perf_counter(), []
    def note(step, metrics):
        log.append(metrics["loss"])
        print(f"step {step + 1}: loss {metrics['loss']:.2f}, {metrics['seconds']:.0f} s", flush=True)
    train(student, lambda step: packed(batch_at(texts, args.size, 0, step)), Training(args.steps, lr=args.lr), log=note)
    minutes = (time.perf_counter() - start) / 60
    loss.append(mean_loss(student, [packed(exam)]))
    after = answers(lm, questions, merged(student).with_ops(lm.decoder.ops))
    told = [dict(question=q, before=b, after=a, wanted=row["messages"][-1]["content"])
            for q, b, a, row in zip(questions, before, after, held)]
    kept = [sum(map(in_manner, said)) for said in (before, after)]
    for row in told[:4]: print(*row.items(), sep="\n", end="\n\n")
    out = record("style", {"training loss": log}, "nats a token", loss=loss, in_manner=kept, minutes=minutes,
                 steps=args.steps, answers=told,
                 settings=dict(rank=8, lr=args.lr, texts=args.size, threads=args.threads))
    print(f"loss on held-out answers {loss[0]:.2f} -> {loss[1]:.2f}, in the manner {kept[0]} -> {kept[1]} of "
          f"{len(told)}; written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
