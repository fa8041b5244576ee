"""What does a constraint cost, does it hold, and what does llguidance do with the same schemas?

    python -m benchmarks.constrained            # the embedded model and tests/data/schemas.json
    python -m benchmarks.constrained --quick    # a few schemas, to see that it runs

Cost: the embedded model writes a text under each schema; the time spent in the mask is taken call by call and compared
with the rest of the step, for the first text of a constraint (its states are new) and for further ones. Both parts come
from the same steps, so a slow moment of the machine hits both. Validity: texts from random logits and from the model
at temperature 2, judged by jsonschema. llguidance, where it is installed (pip install llguidance), computes masks for
the very same tokens; the Python call that fills its bit mask is included.
"""
import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import jsonschema
import torch

from benchmarks.record import record
from llm_workbench.inference.constrained import trie_of
from llm_workbench.inference.generation import Row
from llm_workbench.inference.json_schemas import json_schema
from llm_workbench.lobby import load

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "schemas.json"
DRAFT_7 = ("tuple, draft 7", "nullable, OpenAPI")       # words that draft 2020-12 reads otherwise: not judged by it


class Timed:
    "A mask that notes the seconds of each call, and of what the decoder and the sampler do between two."
    def __init__(self, mask): self.mask, self.seconds, self.between, self.left = mask, [], [], None

    def __call__(self, rows, logits):
        start = time.perf_counter()
        if self.left is not None: self.between.append(start - self.left)
        out = self.mask(rows, logits)
        self.left = time.perf_counter()
        self.seconds.append(self.left - start)
        return out


def valid(schema, text):
    try: document = json.loads(text)
    except ValueError: return False
    return jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).is_valid(document)


def drawn(mask, limit, generator):
    "Tokens from random logits."
    row = Row([1], limit)
    while row.reason is None:
        token = int(mask([row], torch.randn(1, len(mask.strings), generator=generator)).argmax())
        row.tokens.append(token)
        row.reason = "stop" if token in mask.ends else "length" if len(row.tokens) >= limit else None
    return row


def written(lm, mask, schema, most=64, **settings):
    "A text of the model, and the mask that timed it."
    timed = Timed(mask)
    return lm.generate(f"JSON that fits {json.dumps(schema)}:\n", mask=timed, max_new_tokens=most, **settings), timed


class Peer:
    "llguidance over the vocabulary of the model."
    def __init__(self, tokenizer):
        import llguidance
        self.library, strings = llguidance, trie_of(tokenizer)[1]
        class Tokens:
            eos_token_id, bos_token_id = tokenizer.eos_ids[0], None
            special_token_ids = [i for i, text in enumerate(strings) if not text]
            tokens = [text or f"<special {i}>".encode() for i, text in enumerate(strings)]
            def __call__(self, text): return tokenizer.encode(text if isinstance(text, str) else bytes(text).decode())
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()))

    def masks(self, schema, tokens):
        "Seconds until the first mask is there, and of each further one; None where the schema is refused."
        start, seconds = time.perf_counter(), []
        text = self.library.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = self.library.LLMatcher(self.tokenizer, text, log_level=0)
        if matcher.get_error(): return None
        for token in tokens:
            matcher.compute_bitmask()
            seconds.append(time.perf_counter() - start)
            if not matcher.consume_token(token): break
            start = time.perf_counter()
        return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="take each n-th schema only")
    parser.add_argument("--texts", type=int, default=40, help="random texts for each schema")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm, schemas = load(), json.loads(DATA.read_text(encoding="utf-8"))["supported"]
    schemas = dict(list(schemas.items())[:4 if args.quick else None:args.every])
    try: peer, why = Peer(lm.tokenizer), None
    except ImportError as e: peer, why = None, str(e)
    generator = torch.Generator().manual_seed(0)
    names = ["compile", "decode step without its mask", "mask, first text", "mask, further texts",
             "share of a step, first text", "share of a step, further texts"]
    samples = {name: [] for name in names}
    if peer: samples |= {"llguidance: until its first mask": [], "llguidance: mask": []}
    counts = dict(schemas=len(schemas), texts=0, invalid=0, unfinished=0, refused_by_peer=[])
    for number, (name, schema) in enumerate(schemas.items(), 1):
        start = time.perf_counter()
        mask = json_schema(lm.tokenizer, schema)
        samples["compile"].append((time.perf_counter() - start) * 1e3)
        for which in ("first text", "further texts"):
            done, timed = written(lm, mask, schema, temperature=1.0, seed=int(which == "further texts"))
            if not timed.between: continue                     # a text of one token has no decode step
            step, cost = statistics.median(timed.between), statistics.mean(timed.seconds)
            samples["decode step without its mask"].append(step * 1e3)
            samples[f"mask, {which}"].append(cost * 1e3)
            samples[f"share of a step, {which}"].append(cost / step)
        if peer:
            found = peer.masks(schema, done.tokens)
            if found is None: counts["refused_by_peer"].append(name)
            else:
                samples["llguidance: until its first mask"].append(found[0] * 1e3)
                if found[1:]: samples["llguidance: mask"].append(statistics.mean(found[1:]) * 1e3)
        if name not in DRAFT_7:
            mask = json_schema(lm.tokenizer, schema, finish_within=100)
            torch.set_num_threads(1)                           # nothing is timed here
            for _ in range(args.texts):
                row = drawn(mask, 100, generator)
                text = b"".join(mask.strings[t] for t in row.tokens).decode(errors="replace")
                counts["texts"] += 1
                counts["unfinished"] += row.reason != "stop"
                counts["invalid"] += not valid(schema, text)
            torch.set_num_threads(args.threads)
            mask = json_schema(lm.tokenizer, schema, finish_within=100)
            hot = written(lm, mask, schema, most=104, temperature=2.0, seed=3)[0]
            counts["texts"] += 1
            counts["invalid"] += not valid(schema, hot.text)
        print(f"{number} of {len(schemas)}: {name}", flush=True)
    units = {name: "share" if name.startswith("share") else "ms" for name in samples}
    more = dict(threads=args.threads, counts=counts, vocabulary=lm.tokenizer.vocab_size,
                load_average=os.getloadavg())                  # above the number of cores: others disturbed
    if why: more["not measured"] = {"llguidance": why}
    elif peer: more["peer"] = f"llguidance {peer.library.get_version()}"
    for name, values in samples.items(): print(f"{name:36} {statistics.median(values):9.3f} {units[name]}")
    print(counts)
    if not args.quick: record("constrained", samples, units, **more)


if __name__ == "__main__":
    main()
