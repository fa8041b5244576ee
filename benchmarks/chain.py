"""Does every stage of the chain help, whatever the seed?

    python -m benchmarks.chain                       # five seeds, one thread
    python -m benchmarks.chain --seeds 5 6 --more    # two more, beside those that are recorded

The chain of nbs/10_finetuning/15_chain.ipynb, each time from another beginning and with other batches, on the same
held-out questions; for every stage the measure that it is for, before and after, and the exact p of the difference.
"""
import argparse
import time

import torch

from benchmarks.record import record, recorded
from llm_workbench.finetuning.chain import chain, mcnemar, world


def run(seed):
    "The stages of one seed, and seconds."
    start, rows = time.perf_counter(), []
    for s in chain(world(), seed):
        rows.append(dict(stage=s.name, measure=s.measure, before=float(s.before.mean()), after=float(s.after.mean()),
                         p=mcnemar(s.before, s.after)))
        print(seed, rows[-1], flush=True)
    return rows, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--more", action="store_true", help="keep the seeds that are recorded already")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs, seconds = {}, {}
    for seed in args.seeds:
        runs[str(seed)], took = run(seed)
        seconds[f"seed {seed}"] = [took]
        old = recorded("chain") if args.more else {"runs": {}, "samples": {}}
        out = record("chain", old["samples"] | seconds, "seconds", runs=dict(sorted((old["runs"] | runs).items())),
                     settings=dict(threads=args.threads))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
