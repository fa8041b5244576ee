"""Checks that a right implementation passes and a wrong one must fail.

Tests call them on the real code; tests/test_mutants.py calls them on known-wrong variants and expects a rejection.
Each returns its worst difference, so that failures and notes can say how far off something is.
"""
import random

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from llm_workbench import Decoder
from llm_workbench.files.gguf import GGUFFile
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.errors import WorkbenchError

TINY = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    attn_implementation="eager",
    pad_token_id=None,
)
CLASSES = dict(
    llama=(LlamaConfig, LlamaForCausalLM),
    mistral=(MistralConfig, MistralForCausalLM),
    mixtral=(MixtralConfig, MixtralForCausalLM),
)


def tiny(family="llama", seed=0, **changes):
    "A small transformers model with random weights that are large enough for mistakes to show."
    torch.manual_seed(seed)
    config, model = CLASSES[family]
    hf = model(config(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for p in hf.parameters(): p.mul_(3.0)
        hf.model.embed_tokens.weight.mul_(0.2)  # small enough for the norms' epsilon to matter
    return hf


def some_tokens(B=2, T=14, seed=1):
    return torch.randint(0, TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def worst(a, b): return (a.float() - b.float()).abs().max().item()


def gradients(model, loss, prefix=""):
    "By name; names of transformers without their beginning."
    model.zero_grad()
    loss.backward()
    return {n.removeprefix(prefix): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(got, want):
    "The largest difference, in units of the largest value of all."
    shared = got.keys() & want.keys()
    assert len(shared) > 15, "the two models name their parameters differently"
    scale = max(want[n].abs().max() for n in shared)
    return max(((got[n] - want[n]).abs().max() / scale).item() for n in shared)


@torch.inference_mode()
def matches_transformers(hf, change=lambda decoder: decoder, tolerance=1e-4):
    "Logits equal those of transformers, on text longer than a window."
    tokens = some_tokens()
    error = worst(change(Decoder.from_transformers(hf))(tokens), hf(tokens).logits)
    assert error <= tolerance, f"logits differ from transformers by {error:.1e}"
    return error


@torch.inference_mode()
def cached_is_uncached(decoder, make_cache=lambda decoder: decoder.new_cache(), tokens=None, tolerance=1e-3):
    "Feeding a prompt in two parts through a cache gives the logits of one pass, at every split."
    tokens = some_tokens() if tokens is None else tokens
    whole, errors = decoder(tokens), []
    for cut in range(1, tokens.shape[1]):
        cache = make_cache(decoder)
        errors.append(worst(torch.cat([decoder(tokens[:, :cut], cache), decoder(tokens[:, cut:], cache)], 1), whole))
    assert max(errors) <= tolerance, (
        f"cached differs from uncached by {max(errors):.1e}, first at split "
        f"{1 + next(i for i, e in enumerate(errors) if e > tolerance)}"
    )
    return max(errors)


@torch.inference_mode()
def ragged_is_single(decoder, make_cache=lambda decoder: decoder.new_cache(), tokens=None, tolerance=1e-3):
    "A batch of rows of unequal length, then three decode steps, equals each row alone."
    tokens = some_tokens(B=3, T=14) if tokens is None else tokens
    T = tokens.shape[1]
    counts, steps = torch.tensor([T - 3, 1, (T - 3) // 2]), 3
    cache = make_cache(decoder)
    batch = [decoder(tokens[:, : T - 3], cache, counts)] + [
        decoder(tokens[:, T - 3 + i : T - 2 + i], cache) for i in range(steps)
    ]
    errors = []
    for b, n in enumerate(counts.tolist()):
        alone = decoder(torch.cat([tokens[b:b + 1, :n], tokens[b:b + 1, T - 3:]], 1))[0]
        errors += [worst(batch[0][b, :n], alone[:n])] + [worst(batch[1 + i][b, 0], alone[n + i]) for i in range(steps)]
    assert max(errors) <= tolerance, f"a ragged batch differs from its rows alone by {max(errors):.1e}"
    return max(errors)


def gguf_refusals(path, bad_path, n, seed=0):
    """How many of `n` seeded mutations of a GGUF's header are refused; opening and reading everything works or raises
    a WorkbenchError."""
    good, header, rng, refusals = path.read_bytes(), GGUFFile(path).data_start, random.Random(seed), 0
    for _ in range(n):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            bad[rng.randrange(header)] = rng.choice([0, 1, 255, rng.randrange(256)])
        bad_path.write_bytes(bad)
        try:
            checkpoint = open_checkpoint(bad_path)
            for name in checkpoint.tensors: checkpoint.tensors[name]
        except WorkbenchError: refusals += 1
    return refusals


def same_text(theirs, ours, prompt, n):
    "The same greedy text from two models, whole, streamed and as a chat; returns our completion."
    want = ours.generate(prompt, max_new_tokens=n)
    assert theirs.generate(prompt, max_new_tokens=n) == want, "another greedy text"
    streamed = "".join(theirs.stream(prompt, template=False, max_new_tokens=n))
    assert streamed == want.text, "the stream is another text"
    if "<|" not in prompt: assert theirs.chat(prompt, max_new_tokens=6) == ours.chat(prompt, max_new_tokens=6)
    return want
