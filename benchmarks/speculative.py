"""What do guesses gain, and what do they cost where they are useless?

    python -m benchmarks.speculative               # the embedded model, as its file stores it
    python -m benchmarks.speculative --weights dense --only drafts    # in float32, where a draft in four bits could pay

Plain and speculating decoding of the same prompt take turns, step by step in one process: whoever has written less goes
next, so that a slow moment of the machine hits both. Only the steps after the prompt are timed. A ratio is the time of
all plain steps over that of all speculating ones, for the same tokens (a difference between the two is recorded); it
stands beside what the formula gives for the passes that were made and the widths' measured times.
"""
import argparse
import os
import statistics
import time
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from benchmarks.record import record
from llm_workbench.inference.generation import Batch
from llm_workbench.inference.sampling import Sampler
from llm_workbench.inference.speculative import EarlyExit, PromptLookup, drafting, speculating
from llm_workbench.lobby import load

STORY = ("The old lighthouse keeper climbed the stairs every evening to light the lamp. One night in November a heavy "
         "storm broke the windows and put the flame out. He carried a lantern up by hand and stood in the rain until "
         "morning, and every ship came home safely.")
ORDER = ("Invoice 20391: 12 boxes of copper wire (SKU CW-4410), 3 pallets of roof tiles (SKU RT-0078), 40 litres of "
         "primer (SKU PR-9921). Deliver to Harbour Street 17, Gate B, before 9 March. Contact: Mira Okonkwo, "
         "+44 20 7946 0018.")
CODE = """def area(width, height):
    result = width * height
    return result

def volume(width, height, depth):
    result = width * height * depth
    return result

def surface(width, height, depth):
    return 2 * (width * height + width * depth + height * depth)
"""
COPY = {
    "repeat a story": f"Repeat the following text word for word:\n\n{STORY}",
    "correct the spelling": "Correct the spelling in this text, and change nothing else:\n\n"
                            + STORY.replace("keeper", "keepr"),
    "copy a message": f"Copy this message exactly:\n\n{ORDER}",
    "copy a program": f"Copy this program exactly:\n\n```python\n{CODE}```",
    "edit a program": f"Rewrite this program and add a docstring to each function:\n\n```python\n{CODE}```",
}
ELSEWHERE = {
    "explain": "Why is the sky blue?",
    "tell a story": "Write a short story about a dragon who is afraid of fire.",
    "give advice": "How can I sleep better at night?",
    "a program": "Write a Python function that checks whether a number is prime.",
}
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16)


def step_times(decoder, rounds, held=200):
    "Seconds of steps of each width, in turns, behind `held` tokens."
    cache, samples = decoder.new_cache(capacity=held + max(WIDTHS)), {w: [] for w in WIDTHS}
    ids = torch.randint(100, 40_000, (1, held), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder.hidden(ids, cache)
        for _ in range(rounds):
            for w in WIDTHS:
                start = time.perf_counter()
                decoder(ids[:, :w], cache)
                samples[w].append(time.perf_counter() - start)
                cache.truncate(held)
    return samples


class Timed:
    "A batch whose steps after the prompt are timed."
    def __init__(self, batch):
        self.batch, self.seconds, self.widths = batch, 0.0, []
        batch.step()

    @property
    def written(self): return sum(len(row.tokens) for row in self.batch.rows)

    def step(self):
        before = getattr(self.batch, "guessed", 0)
        start = time.perf_counter()
        self.batch.step()
        self.seconds += time.perf_counter() - start
        self.widths.append(1 + getattr(self.batch, "guessed", 0) - before)


def one_round(lm, make, prompts, new, **settings):
    "Both ways to write after the prompts, in turns."
    settings = dict(max_new_tokens=new, eos_ids=lm.tokenizer.eos_ids, **settings)
    both = [Timed(batch(lm.decoder, prompts, **settings)) for batch in (Batch, speculating(make)(Batch))]
    while running := [t for t in both if t.batch.running]: min(running, key=lambda t: t.written).step()
    return both


def measured(lm, make, prompts, args, times, **settings):
    "Ratios of the rounds, and what explains them."
    rounds = [one_round(lm, make, prompts, args.new, **settings) for _ in range(args.rounds)]
    plain, fast = rounds[-1]
    batch, B = fast.batch, len(prompts)
    found = dict(tokens=fast.written, passes=batch.passes, plain_passes=len(plain.widths) + 1, guessed=batch.guessed,
                 accepted=batch.accepted, refused=batch.refused,
                 identical=[r.tokens for r in plain.batch.rows] == [r.tokens for r in batch.rows])
    if B == 1 and not batch.proposer.cost:      # a step of the width that it had; with a draft, c would be an estimate
        found["by_formula"] = len(plain.widths) * times[1] / sum(times[w] for w in fast.widths)
    return [p.seconds / f.seconds for p, f in rounds], found


def cases_of(lm, args):
    "Name -> (proposer, prompts, settings of the batch)."
    ids = lambda text: lm.chat_ids(text)
    explain = [ids(ELSEWHERE["explain"])]
    drafts = {"first 10 layers": partial(EarlyExit, layers=10), "first 20 layers": partial(EarlyExit, layers=20),
              "int4_g32 copy": drafting(load(weights="int4_g32"), lm)} if args.only != "lookup" else {}
    cases = {f"draft: {name}": (make, explain, {}) for name, make in drafts.items()}
    if args.only == "drafts": return cases
    lookup = {f"copy: {name}": (PromptLookup, [ids(text)], {}) for name, text in COPY.items()}
    lookup |= {f"elsewhere: {name}": (PromptLookup, [ids(text)], {}) for name, text in ELSEWHERE.items()}
    lookup["elsewhere: explain, drawn"] = (PromptLookup, explain, dict(seed=0, sampler=Sampler(0.8, top_p=0.95)))
    lookup["copy: four rows"] = (PromptLookup, [ids(text) for text in list(COPY.values())[:4]], {})
    return lookup | cases


def goals_of(ratios):
    "The goals, and whether they are met."
    copy = [r for name, r in ratios.items() if name.startswith("copy") and "rows" not in name]
    other = [r for name, r in ratios.items() if name.startswith("elsewhere")]
    if not copy: return {}
    return {"copy-heavy, one row: median >= 2": [statistics.median(copy), statistics.median(copy) >= 2],
            "copy-heavy, one row: least >= 2": [min(copy), min(copy) >= 2],
            "elsewhere: median >= 0.97": [statistics.median(other), statistics.median(other) >= 0.97],
            "elsewhere: least >= 0.97": [min(other), min(other) >= 0.97]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64, help="tokens to write at most")
    parser.add_argument("--weights", default=None, help="as in llm_workbench.load")
    parser.add_argument("--only", choices=("lookup", "drafts"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = load(weights=args.weights)
    steps = step_times(lm.decoder, 3 * args.rounds)
    times = {w: statistics.median(t) for w, t in steps.items()}
    print("a step, in times of one token:", {w: round(t / times[1], 2) for w, t in times.items()}, flush=True)
    samples, found = {f"step of {w}": t for w, t in steps.items()}, {}
    for name, (make, prompts, settings) in cases_of(lm, args).items():
        samples[name], found[name] = measured(lm, make, prompts, args, times, **settings)
        print(f"{name:32} {statistics.median(samples[name]):5.2f}", found[name], flush=True)
    ratios = {name: statistics.median(samples[name]) for name in found}
    goals = goals_of(ratios)
    for goal, (value, met) in goals.items(): print(f"{goal:36} {value:5.2f} {'met' if met else 'MISSED'}")
    units = {name: "s" if name.startswith("step") else "times faster than plain" for name in samples}
    name = "_".join(["speculative", *[args.weights] * bool(args.weights), *["drafts"] * (args.only == "drafts")])
    out = record(name, samples, units, threads=args.threads, new_tokens=args.new, weights=args.weights or "as stored",
                 weight_bytes=lm.decoder.nbytes, cases=found, goals=goals, load_average=os.getloadavg()[0])
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
