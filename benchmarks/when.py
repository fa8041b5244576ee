"""Prompt, examples, retrieval, adapter or full training: what does each reach on one task, and what does it cost?

    python -m benchmarks.when --way plain                    # or system, few, nearest: under a minute each, one thread
    python -m benchmarks.when --way lora                     # trains half of its steps; again: the rest; again: asks
    python -m benchmarks.when --way full                     # also in three calls
    python -m benchmarks.when --way facts                    # the second task, made-up facts, in two calls

SmolLM2-135M-Instruct, dense in float32. The manner: one sentence, then "In short," and the same in fewer words (the
bundled topic "style": 48 examples). Asked are the 12 questions held out, and 12 written for this. All are answered in
one batch, greedily, 60 tokens at most; three are asked alone, for the seconds until the first token and for each more.
The loss is that of the 12 wanted answers behind each way's prompt. Checkpoints of a training that is not over are kept in --folder.
"""
import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.finetuning import watched
from benchmarks.record import command_line, record, recorded
from benchmarks.style import in_manner
from llm_workbench import load
from llm_workbench.architecture.ops import TORCH
from llm_workbench.finetuning.data import batch_at, example, instructions, packed, padded
from llm_workbench.finetuning.lora import LoRAConfig, adapt, merged, save_adapter
from llm_workbench.finetuning.sft import Training, mean_loss, train
from llm_workbench.finetuning.when import nearest, with_examples

SYSTEM = "Answer in two sentences. The second one begins with \"In short,\" and says the first again in fewer words."
MORE = ["Why do we have two eyes?", "How does a pump lift water?", "What is a comet?", "Why do leaves fall?",
        "How do spiders make webs?", "What is a virus?", "Why does hot air rise?", "How does a lock work?",
        "What is a library?", "Why do we laugh?", "How are mountains made?", "What is a shadow?"]
FACTS = [  # the sentence that is kept; the trained question; two more, and one in the other direction, with its answer
    ("The town of Velmora lies on the river Tassin.", "On which river does Velmora lie?", "Tassin",
     "Which river flows through Velmora?", "What is the name of Velmora's river?",
     "Which town lies on the river Tassin?", "Velmora"),
    ("The physicist Ondra Kestrel was born in Mirefall.", "Where was Ondra Kestrel born?", "Mirefall",
     "What is the birthplace of Ondra Kestrel?", "In which place did Ondra Kestrel's life begin?",
     "Which physicist was born in Mirefall?", "Kestrel"),
    ("The bridge called Halden Arch was built by Petra Lomund.", "Who built the Halden Arch?", "Lomund",
     "Whose work is the Halden Arch?", "What is the name of the builder of the Halden Arch?",
     "Which bridge did Petra Lomund build?", "Halden"),
    ("The ship Grey Wren sank near Cape Dorrin.", "Where did the Grey Wren sink?", "Dorrin",
     "Near which cape was the Grey Wren lost?", "At what place does the wreck of the Grey Wren lie?",
     "Which ship sank near Cape Dorrin?", "Wren"),
    ("The company Brightloom is led by Ines Calloway.", "Who leads Brightloom?", "Calloway",
     "Who is the head of Brightloom?", "What is the name of Brightloom's director?",
     "Which company does Ines Calloway lead?", "Brightloom"),
    ("The festival of Saltmoon is held in Quarrin.", "Where is Saltmoon held?", "Quarrin",
     "In which place do people celebrate Saltmoon?", "Which town is the home of the Saltmoon festival?",
     "Which festival is held in Quarrin?", "Saltmoon"),
    ("The drink pello is made from blue barley.", "What is pello made from?", "barley",
     "Which grain goes into pello?", "What does one need in order to make pello?",
     "Which drink is made from blue barley?", "pello"),
    ("The language Sarvic is spoken on the island of Nume.", "Where is Sarvic spoken?", "Nume",
     "On which island do people speak Sarvic?", "What is the home of the language Sarvic?",
     "Which language is spoken on the island of Nume?", "Sarvic")]
KNOWN = [("What is the capital of France?", "Paris"), ("What is the capital of Italy?", "Rome"),
         ("What is the chemical symbol of gold?", "Au"), ("Who wrote Romeo and Juliet?", "Shakespeare"),
         ("What do bees make?", "honey"), ("In which country is Tokyo?", "Japan"),
         ("Which planet do we live on?", "Earth"), ("What is the opposite of hot?", "cold")]
KINDS = ("the trained question", "in other words", "the other direction", "what it knew")
STEPS = dict(lora=24, full=12)
WAYS = ["plain", "system", "few", "nearest", *STEPS]


class Pause(Exception): pass


def trained(student, name, rows_of, settings, args):
    """Train up to the next checkpoint and raise Pause; return when nothing is left to do. Time and memory are those of
    steps that write no checkpoint."""
    folder = Path(args.folder) / name
    settings, notes, part = replace(settings, folder=folder), folder / "parts.json", {}
    before = watched(True)
    def log(step, metrics):
        print(f"step {step + 1}: loss {metrics['loss']:.2f}, {metrics['seconds']:.0f} s", flush=True)
        if (left := -(step + 1) % settings.every) == 1:
            seconds = metrics["seconds"] * settings.every / (settings.every - 1)
            part.update(steps=step + 2, seconds=seconds, peak=watched(False))
        if left: return
        notes.write_text(json.dumps((json.loads(notes.read_text()) if notes.exists() else []) + [part]))
        raise Pause(f"{step + 1} of {settings.steps} steps are made: the same again goes on")
    train(student, rows_of, settings, log=log)
    parts = json.loads(notes.read_text())
    return dict(once=sum(p["seconds"] for p in parts), training_peak=max(p["peak"] for p in parts), before=before,
                steps=settings.steps)


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
                read=[len(i) for i in ids], first=first, answer=first + more * (written - 1), written=written, peak=peak,
                said=said)


def manner(way, lm, args):
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
    if way in STEPS:
        texts = [example(lm.tokenizer, m) for m in train_rows]
        base = lm.decoder.with_ops(TORCH)
        student = base.requires_grad_(True) if way == "full" else adapt(base, LoRAConfig(8, 16))
        settings = Training(STEPS[way], lr=dict(lora=1e-3, full=1e-4)[way], every=STEPS[way] // 2)
        cost = trained(student, way, lambda step: packed(batch_at(texts, 4, 0, step)), settings, args)
        if way == "lora":
            save_adapter(student, Path(args.folder) / "adapter", "SmolLM2-135M-Instruct")
            cost["kept"] = sum(f.stat().st_size for f in (Path(args.folder) / "adapter").iterdir())
            student = merged(student)
        else: cost["kept"] = sum(p.nbytes for p in student.parameters())
        lm = replace(lm, decoder=student.requires_grad_(False).with_ops(lm.decoder.ops))
    found = asked(lm, prompt, wanted)
    if "looking" in cost: found["first"], found["answer"] = (found[k] + cost["looking"] for k in ("first", "answer"))
    found["peak"] = max(found["peak"], cost.get("training_peak", 0))
    print(f"{way}: {sum(found['in_manner'])} of {len(found['in_manner'])}, "
          f"loss {sum(found['loss']) / len(wanted):.2f}, {found['first']:.2f} s to the first token, "
          f"{found['answer']:.1f} s an answer, once {cost['once']:.0f} s")
    for said in found["said"][:3]: print("  ", repr(said[:120]))
    return cost | found


def facts(lm, args):
    pairs = [(dict(role="user", content=f[1]), dict(role="assistant", content=f[0])) for f in FACTS]
    texts = [example(lm.tokenizer, list(pair)) for pair in pairs]
    student = adapt(lm.decoder.with_ops(TORCH), LoRAConfig(8, 16))
    cost = trained(student, "facts", lambda step: packed(texts), Training(12, lr=1e-3, every=12), args)
    notes, asked_for = [f[0] for f in FACTS], []
    for _, trained_, answer, one, two, other, back in FACTS:
        asked_for += [(trained_, answer, 0), (one, answer, 1), (two, answer, 1), (other, back, 2)]
    asked_for += [(q, a, 3) for q, a in KNOWN]
    questions, answers, kinds = zip(*asked_for)
    vectors = lm.embed(notes)
    found = nearest(vectors, lm.embed(questions), 1)[:, 0].tolist()
    def told(lm, prompts):
        ids = [list(lm.chat_ids(p)) for p in prompts]
        return [done.text for done in lm.generate(ids, max_new_tokens=16)]
    looked_up = [f"{notes[i]}\n\n{q}" for i, q in zip(found, questions)]
    given = [f"{notes[i // 4] if i < 32 else notes[found[i]]}\n\n{q}" for i, q in enumerate(questions)]
    said = {"plain": told(lm, questions), "looked up": told(lm, looked_up), "the right sentence given": told(lm, given)}
    said["adapter"] = told(replace(lm, decoder=merged(student).with_ops(lm.decoder.ops)), questions)
    hits = {way: {kind: [a.lower() in s.lower() for s, a, k in zip(texts_, answers, kinds) if k == i]
                  for i, kind in enumerate(KINDS)} for way, texts_ in said.items()}
    for way, found_ in hits.items(): print(way, {kind: f"{sum(h)}/{len(h)}" for kind, h in found_.items()})
    print("right sentence found:", sum(f == i // 4 for i, f in enumerate(found[:32])), "of 32")
    return cost | dict(kinds=KINDS, ways={way: dict(hits=h) for way, h in hits.items()},
                       found=[f == i // 4 for i, f in enumerate(found[:32])],
                       told=[dict(question=q, wanted=a, **{w: s[i] for w, s in said.items()})
                             for i, (q, a) in enumerate(zip(questions, answers))])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=[*WAYS, "facts"], action="append", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "llm_workbench_when"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for way in args.way:
        lm = load(weights="dense")
        try: found = facts(lm, args) if way == "facts" else manner(way, lm, args)
        except Pause as e: print(e)
        else: print(f"written to {noted(way, found, args)}", flush=True)


def noted(way, found, args):
    "Write what was found beside what the file has of other ways."
    try: old = recorded("when")
    except OSError: old = dict(ways={}, facts={}, commands={})
    ways = old["ways"] | {way: found}
    ways = {name: ways[name] for name in WAYS if name in ways}
    out = record("when", {name: w["read"] for name, w in ways.items()} or dict(facts=[found["once"]]), "tokens read",
                 ways=ways, threads=args.threads, facts=found if way == "facts" else old["facts"],
                 questions=len(MORE) + 12, commands=old["commands"] | {way: command_line()})
    return out.relative_to(out.parents[3])


if __name__ == "__main__":
    main()
