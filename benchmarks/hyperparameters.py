"""Which learning rate and rank? Some hundred small trainings, for the chapter on hyperparameters.

    python -m benchmarks.hyperparameters                     # all of it, one thread, about eight minutes
    python -m benchmarks.hyperparameters --seed 0 --part full --part lora      # the rest stays as it was recorded

A decoder that sorts digits upwards learns to sort them downwards: fully or by an adapter, with 54 steps of 32 lists.
A seed stands for the base's weights, the adapter's start and the order of the lessons. Recorded are losses on lists for
choosing (256; `small`: sixteen of them) and for reporting (512), and the former after 6, 18 and 54 steps.
"""
import argparse
import functools
import math
import time

import torch

from benchmarks.record import record, recorded
from llm_workbench.finetuning.data import batch_at, padded
from llm_workbench.finetuning.hyperparameters import Trial, sorter, sorting, student
from llm_workbench.finetuning.sft import Training, mean_loss

RATES = [3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1]
RANKS, SEEDS, RUNGS = (1, 4, 16), range(5), [6, 18, 54]
NOTHING = dict(rank=None, batch=32, steps=54, warmup=0.1)


def parts():
    "What each part runs: {part: settings}."
    plans = dict(
        full=[dict(way="full", lr=lr, seed=s) for s in SEEDS for lr in RATES],
        lora=[dict(way="lora", rank=r, lr=lr, seed=s) for s in SEEDS for r in RANKS for lr in RATES],
        rslora=[dict(way="rslora", rank=16, lr=lr, seed=s) for s in SEEDS for lr in RATES],
        warmup=[dict(way=way, rank=rank, lr=lr, seed=s, warmup=0)
                for s in SEEDS for way, rank, at in (("full", None, 2), ("lora", 4, 3)) for lr in RATES[at:at + 2]])
    return {part: [dict(part=part) | NOTHING | plan for plan in plan_of] for part, plan_of in plans.items()}


@functools.cache
def lessons(seed): return sorter(seed), sorting("train", 4000, seed, down=True)


@functools.cache
def exams():
    found = {split: sorting(split, n, 1, down=True) for split, n in (("validation", 256), ("test", 512))}
    return {name: [padded(some)] for name, some in (found | {"small": found["validation"][:16]}).items()}


def number(loss): return round(loss, 6) if math.isfinite(loss) else None     # JSON has no infinity


def run(plan):
    base, texts = lessons(plan["seed"])
    settings = Training(plan["steps"], lr=plan["lr"], warmup=plan["warmup"], seed=plan["seed"])
    def rows_of(step): return padded(batch_at(texts, plan["batch"], plan["seed"], step))
    start = time.perf_counter()
    trial = Trial(student(base, plan["way"], plan["rank"], seed=plan["seed"]), rows_of, settings, exams()["validation"])
    rungs = RUNGS if plan["steps"] == RUNGS[-1] else [plan["steps"]]
    curve = [trial.to(step) for step in rungs]
    seconds = time.perf_counter() - start
    others = {name: mean_loss(trial.decoder, exams()[name]) for name in ("test", "small")}
    return plan | dict(seconds=round(seconds, 3), curve=[number(x) for x in curve], validation=number(curve[-1]),
                       **{name: number(x) for name, x in others.items()})


def noted(part, done, threads):
    "Write runs beside those that the file has of other parts and seeds."
    try: old = recorded("hyperparameters")["runs"]
    except OSError: old = []
    seeds = {r["seed"] for r in done}
    runs = [r for r in old if r["part"] != part or r["seed"] not in seeds] + done
    seconds = {p: found for p in parts() if (found := [r["seconds"] for r in runs if r["part"] == p])}
    return record("hyperparameters", seconds, "seconds a run", rungs=RUNGS, threads=threads, runs=runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=parts(), action="append", help="several are given one by one")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for part, plans in parts().items():
        plans = [plan for plan in plans if plan["seed"] in (args.seed or SEEDS) and part in (args.part or parts())]
        if not plans: continue
        start, done = time.perf_counter(), [run(plan) for plan in plans]
        print(f"{part}: {len(done)} runs, {time.perf_counter() - start:.0f} s with their bases", flush=True)
        out = noted(part, done, args.threads)
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
