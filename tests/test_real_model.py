"The embedded SmolLM2-135M-Instruct against transformers and llama.cpp."
from pathlib import Path

import pytest
import torch

from llm_workbench.architecture.ops import REFERENCE, TORCH
from checks import cached_is_uncached, ragged_is_single, worst

PROMPTS = ["Why is the sky blue?", "Write a short poem about rain.", "List three prime numbers.", "def fibonacci(n):",
           "Translate 'good morning' into French.", "What is the capital of Peru?",
           "Once upon a time, in a small village,", "Explain gravity to a child."]


@pytest.fixture(scope="module")
def prose_ids(lm):
    text = (Path(__file__).parent / "data" / "prose.txt").read_text()
    ids = torch.tensor([lm.tokenizer.encode(text)])
    assert ids.shape[1] >= 1000
    return ids


@pytest.fixture(scope="module")
def ours(lm, prose_ids):
    with torch.inference_mode(): return lm.decoder.with_ops(REFERENCE)(prose_ids)


def test_logits_equal_transformers(ours, hf_model, prose_ids, record_property):
    with torch.inference_mode(): theirs = hf_model(prose_ids).logits
    error = worst(ours, theirs)
    record_property("max_logit_difference", error)
    print(f"\n{prose_ids.shape[1]} tokens: largest logit difference to transformers {error:.1e}")
    assert error <= 2e-3


def test_fused_ops_equal_the_reference(lm, ours, prose_ids):
    with torch.inference_mode(): assert worst(lm.decoder.with_ops(TORCH)(prose_ids), ours) <= 2e-3


@pytest.fixture(scope="module")
def continuations(lm):
    "Token ids of the eight prompts in the chat template, and our greedy 128 tokens for each, written as one batch."
    ids = [lm.chat_ids(p) for p in PROMPTS]
    return list(zip(ids, lm.generate_ids(ids, max_new_tokens=128, stop_at_eos=False)))


def test_greedy_continuations_are_those_of_transformers(continuations, hf_model):
    "Every token is the one that transformers ranks first after the same prefix: its greedy continuation, in one pass."
    for prompt, (ids, ours) in zip(PROMPTS, continuations):
        assert len(ours) == 128
        with torch.inference_mode(): logits = hf_model(torch.tensor([ids + ours[:-1]])).logits
        theirs = logits[0, len(ids) - 1:].argmax(-1).tolist()
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), 128)
        assert ours == theirs, f"{prompt!r}: the first {same} of 128 tokens agree"


@pytest.mark.parametrize("number", [0, 4])
def test_greedy_continuation_equals_generate(continuations, hf_model, number):
    ids, ours = continuations[number]
    prompt = torch.tensor([ids])
    theirs = hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=128, min_new_tokens=128,
                               do_sample=False, eos_token_id=None)
    assert ours == theirs[0, len(ids):].tolist()


def test_cached_is_uncached_at_every_split(lm, prose_ids):
    error = cached_is_uncached(lm.decoder, tokens=prose_ids[:, :40])
    print(f"\ncached vs uncached, 39 splits: {error:.1e}")


def test_ragged_batch_is_single(lm, prose_ids):
    print(f"\nragged vs single: {ragged_is_single(lm.decoder, tokens=prose_ids[0, :60].view(3, 20)):.1e}")


def test_against_llama_cpp(ours, gguf_path, prose_ids):
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(gguf_path), n_ctx=2048, n_batch=512, logits_all=True, n_threads=2, verbose=False)
    llm.eval(prose_ids[0].tolist())
    theirs = torch.from_numpy(llm.scores[:prose_ids.shape[1]].copy())[None]
    agree = (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    p, q = theirs.log_softmax(-1), ours.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    print(f"\n{prose_ids.shape[1]} tokens against llama.cpp: top-1 agreement {agree:.2%}, mean KL {kl:.2e}")
    assert agree >= 0.96 and kl <= 5e-3
