"""What is reached without training, by an instruction, fixed examples or the nearest ones, and what does it cost?

    python -m benchmarks.when                                # all four, one thread, five minutes
    python -m benchmarks.when --way few                      # one; the others stay as they were recorded

SmolLM2-135M-Instruct, dense in float32. The manner: one sentence, then "In short," and the same in fewer words (the
bundled topic "style": 48 examples). Asked are the 12 questions held out, and 12 written for this. All are answered in
one batch, greedily, 60 tokens at most; three are asked alone, for the seconds until the first token and for each more.
The loss is that of the 12 wanted answers behind each way's prompt. `benchmarks.style` trains an adapter for the same.
"""
import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.finetuning import watched
from benchmarks.record import command_line, record, recorded
from benchmarks.style import in_manner
from llm_workbench import load
from llm_workbench.finetuning.data import example, instructions, padded
from llm_workbench.finetuning.sft import mean_loss
from llm_workbench.finetuning.when import nearest, with_examples

SYSTEM = "Answer in two sentences. The second one begins with \"In short,\" and says the first again in fewer words."
MORE = ["Why do we have two eyes?", "How does a pump lift water?", "What is a comet?", "Why do leaves fall?",
        "How do spiders make webs?", "What is a virus?", "Why does hot air rise?", "How does a lock work?",
        "What is a library?", "Why do we laugh?", "How are mountains made?", "What is a shadow?"]
WAYS = ["plain", "system", "few", "nearest"]


def alone(lm, ids):
    "Seconds until the first token, and for each token more."
    def timed(new):
        start = time.perf_counter()
        lm.generate_ids([ids], max_new_tokens=new, stop_at_eos=False)
        return time.perf_counter() - start
    first = timed(1)
    return first, (timed(9) - first) / 8


def asked(lm, prompt, wanted):
    "What the model says with prompt(question) -> messages; the loss of the answers that are wanted."
    questions = [*wanted, *MORE]
    ids = [list(lm.chat_ids(prompt(q))) for q in questions]
    watched(True)
    done = lm.generate(ids, max_new_tokens=60)
    peak, said, written = watched(False), [d.text for d in done], sum(len(d.tokens) for d in done) / len(done)
    first, more = (sum(x) / 3 for x in zip(*(alone(lm, i) for i in ids[:3])))
    rows = [example(lm.tokenizer, prompt(q) + [dict(role="assistant", content=a)], "last") for q, a in wanted.items()]
    return dict(in_manner=[bool(in_manner(s)) for s in said], loss=[mean_loss(lm.decoder, [padded([r])]) for r in rows],
                read=[len(i) for i in ids], first=first, answer=first + more * (written - 1), written=written,
                peak=peak, said=said)


def manner(way, lm):
    train_rows, held = ([r["messages"] for r in instructions(s, topic="style")] for s in ("train", "test"))
    wanted = {m[0]["content"]: m[1]["content"] for m in held}
    assert not set(MORE) & ({m[0]["content"] for m in train_rows} | set(wanted)), "a question is known already"
    prompt, cost = lambda q: with_examples([], q), dict(once=0.0, kept=0)
    if way == "system": prompt, cost["kept"] = lambda q: with_examples([], q, SYSTEM), len(SYSTEM)
    if way == "few":
        prompt = lambda q: with_examples(train_rows[:3], q)
        cost["kept"] = len(json.dumps(train_rows[:3]))
    if way == "nearest":
        start = time.perf_counter()
        vectors = lm.embed([m[0]["content"] for m in train_rows])
        cost = dict(once=time.perf_counter() - start, kept=vectors.nbytes + len(json.dumps(train_rows)))
        start = time.perf_counter()
        for q in [*wanted][:3]: lm.embed(q)
        cost["looking"] = (time.perf_counter() - start) / 3
        prompt = lambda q: with_examples([train_rows[i] for i in nearest(vectors, lm.embed(q))[0]], q)
    found = asked(lm, prompt, wanted)
    if "looking" in cost: found["first"], found["answer"] = (found[k] + cost["looking"] for k in ("first", "answer"))
    print(f"{way}: {sum(found['in_manner'])} of {len(found['in_manner'])}, "
          f"loss {sum(found['loss']) / len(wanted):.2f}, {found['first']:.2f} s to the first token, "
          f"{found['answer']:.1f} s an answer, once {cost['once']:.0f} s")
    for said in found["said"][:3]: print("  ", repr(said[:120]))
    return cost | found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, action="append", help="several are given one by one")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = load(weights="dense")
    for way in args.way or WAYS: print(f"written to {noted(way, manner(way, lm), args.threads)}", flush=True)


def noted(way, found, threads):
    "Write what was found beside what the file has of other ways."
    try: old = recorded("when")
    except OSError: old = dict(ways={}, commands={})
    ways = old["ways"] | {way: found}
    ways = {name: ways[name] for name in WAYS if name in ways}
    out = record("when", {name: w["read"] for name, w in ways.items()}, "tokens read", ways=ways, threads=threads,
                 questions=len(MORE) + 12, commands=old["commands"] | {way: command_line()})
    return out.relative_to(out.parents[3])


if __name__ == "__main__":
    main()
