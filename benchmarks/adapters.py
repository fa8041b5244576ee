"""A hundred adapters over one base: how many tokens a second when all rows of a batch are written together, against
changing the adapter between texts, and (--peft) against peft's mixed batch?

    python -m benchmarks.adapters                       # SmolLM2, rank 8 in all seven matrices, two threads
    python -m benchmarks.adapters --adapters 16 --new 4

Every text has an adapter of its own and is 16 tokens long; timed is reading it and writing `--new` tokens behind it,
greedily, with a KV cache. "In turns" does one text after the other, each with its adapter; peft mixes by
`adapter_names`. Before anything is timed, the scores of all rows are compared: further apart than 1e-5 of the largest,
and nothing is written.
"""
import argparse
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.record import record
from llm_workbench import load
from llm_workbench.architecture.ops import TORCH
from llm_workbench.finetuning.lora import LoRAConfig, adapt, adapter, trainable
from llm_workbench.finetuning.many import many, using

PROMPT = 16


def customers(base, n, rank):
    out = {}
    for i in range(n):
        out[f"c{i}"] = new = adapt(base, LoRAConfig(rank, 2.0 * rank), i)
        g = torch.Generator().manual_seed(i)
        for p in trainable(new).values(): p.add_(0.02 * torch.randn(p.shape, generator=g))
    return out


def written(step, tokens, new):
    "Tokens that are written greedily behind `tokens`; step(tokens) -> scores of the last ones."
    out, following = [], tokens
    for _ in range(new):
        following = step(following)[:, -1].argmax(-1, keepdim=True)
        out.append(following)
    return torch.cat(out, 1)


def by_decoder(decoder, tokens, new):
    cache = decoder.new_cache()
    return written(lambda t: decoder.logits(decoder.hidden(t, cache)[:, -1:]), tokens, new)


def by_peft(model, tokens, new, names):
    past = [None]
    def step(t):
        out = model(t, past_key_values=past[0], use_cache=True, adapter_names=names, logits_to_keep=1)
        past[0] = out.past_key_values
        return out.logits
    return written(step, tokens, new)


def peft_model(base, adapted, rank):
    import peft
    hf = base.to_transformers()
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = None
    for name, decoder in adapted.items():
        if model is None: model = peft.get_peft_model(hf, config, adapter_name=name)
        else: model.add_adapter(name, config)
        mine = adapter(decoder)
        for key, p in model.named_parameters():
            if f".{name}." in key: p.data.copy_(mine[key.replace(f".{name}.", ".")])
    return model.eval()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--new", type=int, default=8, help="tokens that each text is continued by")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peft", action="store_true", help="also peft, which takes minutes to take in its adapters")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = load(weights="dense", ops=TORCH).decoder
    adapted = customers(base, args.adapters, args.rank)
    names, together = list(adapted), many(base, adapted)
    tokens = torch.randint(100, 40_000, (len(names), PROMPT), generator=torch.Generator().manual_seed(0))
    def mixed():
        with using(together, names): return by_decoder(together, tokens, args.new)
    def turns(): return torch.cat([by_decoder(adapted[n], tokens[i:i + 1], args.new) for i, n in enumerate(names)])
    peft = peft_model(base, adapted, args.rank) if args.peft else None
    with using(together, names): scores = together.logits(together.hidden(tokens)[:, -1])
    alone = torch.cat([adapted[n].logits(adapted[n].hidden(tokens[i:i + 1])[:, -1]) for i, n in enumerate(names)])
    others = [alone] + ([peft(tokens, adapter_names=names, logits_to_keep=1).logits[:, -1]] if peft else [])
    apart = max(((scores - other).abs().max() / other.abs().max()).item() for other in others)
    assert apart < 1e-5, f"scores are {apart:.0e} of the largest apart: nothing to compare"
    ways = {"one batch": mixed, "in turns": turns}
    if peft: ways["peft, one batch"] = lambda: by_peft(peft, tokens, args.new, names)
    samples = {name: [] for name in ways}
    for turn in range(args.rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            samples[name].append(len(names) * args.new / (time.perf_counter() - start))
            print(f"{name:20} {samples[name][-1]:8.1f} tokens/s", flush=True)
    best = {name: sorted(values)[len(values) // 2] for name, values in samples.items()}
    ratios = {f"one batch / {name}": best["one batch"] / best[name] for name in ways if name != "one batch"}
    out = record("adapters", samples, "tokens/s", ratios=ratios, apart=apart, settings=vars(args) | dict(prompt=PROMPT))
    print(ratios, f"scores {apart:.0e} apart; written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
