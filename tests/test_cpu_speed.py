"A memory of texts changes no token of any family; reasons and bytes are those of the decoder that is asked."
import random
from dataclasses import replace

import pytest
import torch
from checks import some_tokens
from models import SMALL, small_model

import llm_workbench as wb
from llm_workbench import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import InputError
from llm_workbench.inference import cpu_speed
from llm_workbench.inference.cpu_speed import Memory, Remembering, remembering, shared, token_bytes
from llm_workbench.inference.generation import Batch
from llm_workbench.inference.sampling import Sampler
from llm_workbench.inference.speculative import PromptLookup, speculating
from llm_workbench.kernels import cpu_prompt, fused_cpu, packed_cpu
from llm_workbench.kernels.fused_cpu import token_seconds, why_not_one_call
from llm_workbench.quantization.formats import quantize

FAMILIES = [(family, i) for family, variants in SMALL.items() for i in range(len(variants))]


def prompts(n=7, seed=0):
    "Texts that begin like earlier ones, in parts, wholly, and not at all."
    rng, texts = random.Random(seed), [some_tokens(1, 30, seed=seed)[0].tolist()]
    for i in range(n - 1):
        base = rng.choice(texts)
        fresh = some_tokens(1, rng.randrange(1, 12), seed=seed + i + 1)[0].tolist()
        texts.append(rng.choice([base[:rng.randrange(1, len(base))] + fresh, base, base + fresh, fresh]))
    return texts


def written(decoder, texts, batches, **settings):
    settings = dict(max_new_tokens=5) | settings
    out = []
    for text in texts:
        batch = batches(decoder, [text], **settings)
        for _ in batch.steps(): pass
        out.append((batch.rows[0].tokens, batch.rows[0].reason))
    return out


def same_texts(decoder, memory=None, of=Batch, texts=0, **settings):
    "Texts with a memory are those without one. Returns how many tokens were not read."
    memory, room = memory or Memory(least=2), max(2, decoder.config.max_position_embeddings - 12)
    texts = [text[:room] for text in prompts(seed=texts)]
    want = written(decoder, texts, of, **settings)
    assert written(decoder, texts, remembering(memory)(of), **settings) == want, "the memory changed a text"
    return memory.taken


@pytest.mark.parametrize("family,variant", FAMILIES, ids=lambda v: str(v))
def test_every_family(family, variant):
    decoder = Decoder.from_transformers(small_model(family, variant))
    kinds = {rope.rope.get("rope_type", "default") for rope in decoder.ropes.values()}
    taken = same_texts(decoder.double(), Memory(least=1), max_new_tokens=4)
    assert bool(taken) == (not kinds & {"dynamic", "longrope"}), "keys of another length of text, or none at all"


@pytest.mark.parametrize("seed", range(6))
def test_many_texts_and_memories_of_every_size(seed):
    decoder = Decoder.from_transformers(small_model("llama", 0)).double()
    for most in (1, 2, 5): assert same_texts(decoder, Memory(most, least=1 + seed), texts=seed) > 0


def test_draws_ends_and_guesses():
    decoder = Decoder.from_transformers(small_model("llama", 0)).double()
    warm = Sampler(temperature=0.9, top_k=20, repetition_penalty=1.3)
    assert same_texts(decoder, sampler=warm, seed=0) > 0
    assert same_texts(decoder, eos_ids=list(range(0, 97, 4))) > 0
    guess = speculating(PromptLookup, widest=4)
    want = written(decoder, prompts(), Batch, max_new_tokens=12)
    memory = Memory(least=2)
    assert written(decoder, prompts(), guess(remembering(memory)(Batch)), max_new_tokens=12) == want and memory.taken


def test_stop_strings_and_readers_who_leave(lm):
    memory = Memory(least=4)
    warm = replace(lm, batches=remembering(memory)(lm.batches))
    question = "The lighthouse stood at the edge of the sea, and every evening the keeper"
    settings = dict(max_new_tokens=12)
    want = lm.generate(question, **settings)
    stop = want.text[3:6]
    assert warm.generate(question, stop=stop, **settings) == lm.generate(question, stop=stop, **settings)
    assert warm.generate(question, **settings) == want and memory.taken
    longer = question + want.text + " and then"
    assert warm.generate(longer, **settings) == lm.generate(longer, **settings)
    stream = warm.stream(question, template=False, **settings)
    first = next(stream)
    assert not memory.kept, "two would write into one cache"
    assert warm.generate(question, **settings) == want                # while the other is being read
    assert first + "".join(stream) == want.text
    assert len(memory.kept) == 1
    stream = warm.stream(question, template=False, **settings)
    next(stream)
    stream.close()
    assert len(memory.kept) == 1 and warm.generate(question, **settings) == want


def test_batches_of_several_and_given_caches_take_nothing():
    decoder, memory = Decoder.from_transformers(small_model("llama", 0)), Memory(least=1)
    batches, text = remembering(memory)(Batch), prompts()[0]
    for how in (dict(prompts=[text, text]), dict(prompts=[text], cache=decoder.new_cache("static", batch=1, slots=64)),
                dict(prompts=[text], cache=decoder.new_cache())):
        batch = batches(decoder, max_new_tokens=3, **how)
        for _ in batch.steps(): pass
        assert not memory.kept and not memory.taken
    other = Decoder.from_transformers(small_model("llama", 1))
    written(decoder, [text], batches), written(other, [text], batches)
    assert not memory.taken, "a cache of another model"


def test_what_is_given_back_is_what_was_read():
    decoder, memory = Decoder.from_transformers(small_model("llama", 0)), Memory(most=2, least=1)
    text = prompts()[0]
    batch = remembering(memory)(Batch)(decoder, [text], max_new_tokens=4)
    for _ in batch.steps(): pass
    (_, ids, cache), = memory.kept
    assert ids == text + batch.rows[0].tokens[:3] and cache.lengths == len(ids), "the last token was never read"
    assert memory.take(decoder, text[:1]) is None and memory.take(decoder, [96, 95]) is None
    got, n = memory.take(decoder, text)
    assert got is cache and n == len(text) - 1 == cache.lengths and not memory.kept
    for i in range(3): memory.put(decoder, [i], decoder.new_cache())
    assert [ids for _, ids, _ in memory.kept] == [[1], [2]]


@pytest.mark.parametrize("held,prompt,n", [([], [1], 0), ([1], [1], 0), ([1, 2], [1], 0), ([1, 2], [1, 2, 3], 2),
                                           ([1, 9], [1, 2, 3], 1), ([1, 2, 3], [1, 2, 3], 2)])
def test_shared(held, prompt, n): assert shared(held, prompt) == n


class KeepsAll(Memory):
    def take(self, decoder, prompt):
        for i, (_, ids, cache) in enumerate(self.kept):
            if n := shared(ids, prompt):
                del self.kept[i]
                self.taken += n
                return cache, n                                            # not truncated


MUTANTS = {
    "the cache is not cut": lambda m: m.setattr(cpu_speed, "Memory", KeepsAll),
    "the last token counts as read": lambda m: m.setattr(cpu_speed, "shared", lambda held, prompt: next(
        (i for i in range(min(len(held), len(prompt))) if held[i] != prompt[i]), min(len(held), len(prompt)))),
    "one token too many": lambda m: m.setattr(cpu_speed, "shared", lambda held, prompt: min(
        shared(held, prompt) + 1, len(held), len(prompt) - 1)),
    "the answer is forgotten": lambda m: m.setattr(Remembering, "give_back", lambda self: self.memory.put(
        self.decoder, self.rows[0].prompt + [0] * (self.cache.lengths - len(self.rows[0].prompt)), self.cache)),
    "the cache stays with its batch": lambda m: m.setattr(Remembering, "steps", Batch.steps),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_memories_are_noticed(name, monkeypatch):
    MUTANTS[name](monkeypatch)
    decoder = Decoder.from_transformers(small_model("llama", 0)).double()
    with pytest.raises((AssertionError, InputError, IndexError, RuntimeError)):
        for seed in range(4): assert same_texts(decoder, cpu_speed.Memory(least=1), texts=seed) > 0
        test_what_is_given_back_is_what_was_read()


def test_reasons():
    llama = Decoder.from_transformers(small_model("llama", 0, changes=dict(
        hidden_size=64, intermediate_size=128, num_attention_heads=8, head_dim=16)), cpu_prompt.CPU)
    assert why_not_one_call(llama) == [] and why_not_one_call(llama.with_ops(fused_cpu.CPU)) == []
    assert why_not_one_call(quantize(llama, "int4_g32")) == []
    assert "cpu_prompt" in why_not_one_call(llama.with_ops(TORCH))[0]
    assert "cpu_prompt" in why_not_one_call(llama.with_ops(packed_cpu.CPU))[0]
    assert "rms_norm" in why_not_one_call(llama.with_ops(rms_norm=lambda *a: a[0]))[0]
    odd = Decoder.from_transformers(small_model("llama", 0), cpu_prompt.CPU)
    assert "q_proj" in why_not_one_call(odd)[0]
    for family, variant in FAMILIES:                             # as the kernel itself decides, and it says where
        decoder = Decoder.from_transformers(small_model(family, variant), cpu_prompt.CPU)
        unknown = [i for i, block in enumerate(decoder.layers) if fused_cpu.why_not(block)]
        said = why_not_one_call(decoder)
        assert bool(said) == bool(unknown)
        if unknown: assert f"layers {unknown[0]} to" in said[0]


def test_bytes_and_seconds():
    untied = Decoder.from_transformers(small_model("llama", 0), cpu_prompt.CPU)
    tied = untied.lm_head is untied.embed_tokens
    parameters = {p for p in untied.parameters()}
    looked_up = 0 if tied else untied.embed_tokens.weight.nbytes
    assert token_bytes(untied) == sum(p.nbytes for p in parameters) - looked_up
    assert 0 < token_seconds(untied, held=5, seconds=0.01) < 5
    with pytest.raises(InputError, match="held"): token_seconds(untied, 0)
