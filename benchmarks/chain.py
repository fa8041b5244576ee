"""Does every stage of the chain help, whatever the seed?

    python -m benchmarks.chain                # five seeds, one thread

The chain of nbs/10_finetuning/15_chain.ipynb, each time from another beginning and with other batches, on the same
held-out questions; for every stage the measure that it is for, before and after, and the exact p of the difference.
"""
import argparse
import time

import torch

from benchmarks.record import record
from llm_workbench.finetuning.chain import chain, mcnemar, world


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs, seconds = {}, {}
    for seed in args.seeds:
        start, here = time.perf_counter(), world()
        runs[seed] = [dict(stage=s.name, measure=s.measure, before=float(s.before.mean()), after=float(s.after.mean()),
                           p=mcnemar(s.before, s.after)) for s in chain(here, seed)]
        seconds[f"seed {seed}"] = [time.perf_counter() - start]
        for row in runs[seed]: print(seed, row, flush=True)
    out = record("chain", seconds, "seconds", runs=runs, settings=vars(args))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
