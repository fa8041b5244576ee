"""Guesses must not be seen in what is written: greedy and seeded texts stay the same, drawn ones their distribution.

Small models of several families, every cache that allows guesses, ragged batches whose rows accept differently, ends
and limits in the middle of accepted guesses. Named mistakes are rejected by the same checks.
"""
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from checks import tiny
from llm_workbench import Decoder
from llm_workbench.errors import InputError, WorkbenchError
from llm_workbench.inference import speculative
from llm_workbench.inference.generation import LM, Batch, Row
from llm_workbench.inference.sampling import Sampler
from llm_workbench.inference.speculative import (
    DraftModel, EarlyExit, Guess, NGrams, Pace, PromptLookup, Speculating, acceptance, best_length, drafting,
    expected_tokens, residual, speculating, speedup)
from models import small_model

PROMPTS = [[5], [1, 2, 3], [7] * 12, [9, 4], list(range(10, 28)), [3, 1]]
FAMILIES = ["llama", "mistral", "mixtral", "gemma2", "gemma3_text", "qwen3", "deepseek_v2", "gpt_oss"]
N = 20


def written(decoder, prompts=PROMPTS, batch=Batch, **settings):
    made = batch(decoder, prompts, **{"max_new_tokens": N, **settings})
    for _ in made.steps(): pass
    return [(row.tokens, row.reason) for row in made.rows]


class Scripted:
    "Guesses what would come, from a table of whole texts, and lies at places that differ from row to row."
    cost = 0.0
    def __init__(self, batch, texts): self.texts, self.rows = texts, list(batch.rows)
    def propose(self, rows, n):
        out = torch.full((len(rows), n), -1)
        for b, row in enumerate(rows):
            i, at = self.rows.index(row), len(row.tokens)
            guess = [t if (at + j) % (i + 3) else (t + 1) % 97 for j, t in enumerate(self.texts[i][at:at + n - i % 2])]
            out[b, :len(guess)] = torch.tensor(guess)
        return Guess(out, None)


class Lies:
    "Draws from distributions that have nothing to do with the model; some rows guess less than others."
    cost = 0.0
    def __init__(self, batch): self.vocabulary = batch.decoder.config.vocab_size
    def propose(self, rows, n):
        fixed = torch.randn(n, self.vocabulary, generator=torch.Generator().manual_seed(3)).softmax(-1)
        q = fixed.repeat(len(rows), 1, 1)
        tokens = torch.multinomial(q.flatten(0, 1), 1).view(len(rows), n)
        return Guess(tokens.masked_fill((torch.arange(len(rows)) % 3 == 0)[:, None] & (torch.arange(n) > 0), -1), q)


@pytest.fixture(scope="module")
def target(): return Decoder.from_transformers(tiny(seed=2))
@pytest.fixture(scope="module")
def small(): return Decoder.from_transformers(tiny(seed=5, num_hidden_layers=1))


def proposers(small, texts):
    return dict(lookup=PromptLookup, model=partial(DraftModel, draft=small), exit=partial(EarlyExit, layers=1),
                scripted=partial(Scripted, texts=texts))


# --- greedy: the same tokens ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_same_in_every_family_and_cache(family):
    decoder = Decoder.from_transformers(small_model(family))
    small = Decoder.from_transformers(small_model(family, seed=3))
    plain = written(decoder)
    free = [tokens for tokens, _ in plain]
    for name, make in proposers(small, free).items():
        batch = speculating(make, widest=64, cost=0.0)(Batch)
        assert written(decoder, batch=batch) == plain, name
        if name == "exit": continue
        longest = max(map(len, PROMPTS)) + N
        for store in (dict(store="sliding", rewind=7), dict(store="static", batch=len(PROMPTS), slots=longest)):
            cache = decoder.new_cache(context=[len(p) + N for p in PROMPTS], **store)
            assert written(decoder, batch=batch, cache=cache) == plain, (name, store)


@pytest.mark.parametrize("name", ["lookup", "model", "exit", "scripted"])
def test_ends_and_limits_fall_anywhere(target, small, name):
    free = [tokens for tokens, _ in written(target)]
    make = proposers(small, free)[name]
    batch = speculating(make, widest=64, cost=0.0)(Batch)
    for limit in (1, 2, 3, 6, 9):
        assert written(target, batch=batch, max_new_tokens=limit) == written(target, max_new_tokens=limit)
    for at in (1, 6):
        eos = [free[0][at], free[4][at + 1]]
        assert written(target, batch=batch, eos_ids=eos) == written(target, eos_ids=eos)
        lonely = [written(target, [p], batch, eos_ids=eos)[0] for p in PROMPTS]
        assert lonely == written(target, eos_ids=eos)


def test_accepted_guesses_save_passes(target):
    free = [tokens for tokens, _ in written(target)]
    make = partial(Scripted, texts=free)
    batch = speculating(make, widest=64, cost=0.0)(Batch)(target, PROMPTS, max_new_tokens=N)
    for _ in batch.steps(): pass
    assert batch.passes < N and 0 < batch.accepted < batch.guessed
    itself = speculating(partial(DraftModel, draft=target), most=4, widest=64, cost=0.0)(Batch)
    itself = itself(target, PROMPTS[:1], max_new_tokens=N)
    itself.proposer.cost = 0.0
    for _ in itself.steps(): pass
    assert itself.accepted == itself.guessed and itself.passes == N / 5, "the model refuses its own guesses"


def test_a_row_that_is_ended_by_the_consumer_leaves_the_others_alone(target, small):
    free = [tokens for tokens, _ in written(target)]
    for make in proposers(small, free).values():
        batch = speculating(make, widest=64, cost=0.0)(Batch)(target, PROMPTS, max_new_tokens=N)
        for rows in batch.steps():
            if len(rows[2].tokens) >= 4 and rows[2].reason is None: rows[2].reason = "stop"
        assert [r.tokens for r in rows if r is not rows[2]] == [f for i, f in enumerate(free) if i != 2]
        assert rows[2].tokens == free[2][:len(rows[2].tokens)]


# --- drawn without a distribution: the same tokens for a seed ---------------------------------------------------------

def no_twins(rows, logits):
    last = torch.tensor([(row.prompt + row.tokens)[-1] for row in rows])
    return logits.scatter(1, last[:, None], float("-inf"))

WARM = dict(temperature=0.9, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3)

@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(1.2, top_k=7), Sampler(1.0, min_p=0.05), Sampler(**WARM),
                                     Sampler(**{**WARM, "temperature": 0.0}),
                                     Sampler(torch.tensor([0.0, 0.5, 1.0, 1.5, 0.0, 0.8]))])
@pytest.mark.parametrize("mask", [None, no_twins])
def test_a_seed_gives_the_text_of_plain_decoding(target, sampler, mask):
    settings = dict(sampler=sampler, seed=11, mask=mask)
    plain = written(target, **settings)
    make = partial(Scripted, texts=[tokens for tokens, _ in plain])
    batch = speculating(make, widest=64, cost=0.0)(Batch)
    assert written(target, batch=batch, **settings) == plain
    eos = [plain[3][0][7], plain[0][0][4]]
    assert written(target, batch=batch, eos_ids=eos, **settings) == written(target, eos_ids=eos, **settings)
    if not isinstance(sampler.temperature, torch.Tensor):
        assert written(target, PROMPTS[1:2], speculating(PromptLookup)(Batch), **{**settings, "seed": 12}) == plain[1:2]


# --- drawn from a distribution: chi-square over all texts -------------------------------------------------------------

V, START, LENGTH, DRAWS = 4, [2], 3, 3000

@pytest.fixture(scope="module")
def little(): return Decoder.from_transformers(tiny(seed=4, vocab_size=V))
@pytest.fixture(scope="module")
def other(): return Decoder.from_transformers(tiny(seed=9, vocab_size=V, num_hidden_layers=1))


def exact(decoder, sampler, mask):
    texts = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for text, chance in texts.items():
            with torch.no_grad(): logits = decoder(torch.tensor([START + list(text)]))[:, -1]
            if mask: logits = mask([Row(START, LENGTH, list(text))], logits)
            counts = torch.bincount(torch.tensor(START + list(text)), minlength=V)[None].float()
            chances = sampler.adjust(logits, counts).softmax(-1)[0].tolist()
            longer |= {(*text, token): chance * p for token, p in enumerate(chances)}
        texts = longer
    return texts


def spreads(decoder, batch, sampler, mask=None, seed=0):
    "How many spreads chi-square lies above its degrees of freedom; infinite where something impossible came."
    torch.manual_seed(seed)
    chances = exact(decoder, sampler, mask)
    came = dict.fromkeys(chances, 0)
    for tokens, _ in written(decoder, [START] * DRAWS, batch, max_new_tokens=LENGTH, sampler=sampler, mask=mask):
        came[tuple(tokens)] += 1
    if any(came[t] for t, p in chances.items() if p < 1e-12): return float("inf")
    cells = [(came[t], p * DRAWS) for t, p in chances.items() if p * DRAWS >= 5]
    f = len(cells) - 1
    return (sum((c - e) ** 2 / e for c, e in cells) - f) / (2 * f) ** 0.5


SETTINGS = [(Sampler(1.0), None), (Sampler(2.0), None), (Sampler(1.5, top_k=2), None), (Sampler(1.5, top_p=0.8), None),
            (Sampler(2.0, min_p=0.2), None), (Sampler(1.5), no_twins),
            (Sampler(1.5, repetition_penalty=1.6, presence_penalty=0.8, frequency_penalty=0.9), None)]

@pytest.mark.parametrize("sampler, mask", SETTINGS)
def test_the_distribution_is_that_of_plain_decoding(little, other, sampler, mask):
    for make in (partial(DraftModel, draft=other), partial(EarlyExit, layers=1), Lies):
        batch = speculating(make, cost=0.0, widest=10**6)(Batch)
        assert spreads(little, batch, sampler, mask) < 5, make


def wrong(name, monkeypatch):
    "A known mistake, and the setting that shows it."
    sampler, mask, batch = Sampler(2.0), None, speculating(Lies, cost=0.0, widest=10**6)(Batch)
    if name == "accepts always": monkeypatch.setattr(speculative, "acceptance", lambda *a: (a[2] >= 0).float())
    if name == "draws again from p": monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    if name == "draws again from q": monkeypatch.setattr(speculative, "residual", lambda p, q: q + 1e-9)
    if name == "penalties before the step":
        sampler = Sampler(1.5, repetition_penalty=1.6, presence_penalty=0.8)
        batch.decide = lambda self, logits, said, *rest: Speculating.decide(self, logits, self.said, *rest)
    if name == "mask before the step":
        ruled = lambda self, logits, decided, going: Speculating.ruled(self, logits, decided[:, :0], going)
        mask, batch.ruled = no_twins, ruled
    if name == "keeps the refused": batch.cut = lambda self, lengths: None
    return batch, sampler, mask


@pytest.mark.parametrize("name", ["accepts always", "draws again from p", "draws again from q",
                                  "penalties before the step", "mask before the step", "keeps the refused"])
def test_a_mistake_is_noticed(little, name, monkeypatch):
    batch, sampler, mask = wrong(name, monkeypatch)
    assert spreads(little, batch, sampler, mask) > 5, "the test does not notice"


def test_acceptance_and_residual_give_p():
    generator = torch.Generator().manual_seed(0)
    for size in (2, 5, 40):
        p, q = ((torch.randn(30, size, generator=generator, dtype=torch.float64) * 3).softmax(-1) for _ in "pq")
        p[:, 0], q[:, 1] = 0, 0
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        kept = torch.stack([acceptance(p, q, torch.full((30,), t)).nan_to_num(0) for t in range(size)], 1) * q
        rest, refused = residual(p, q), 1 - kept.sum(-1, keepdim=True)
        assert torch.allclose(kept + refused * rest / rest.sum(-1, keepdim=True), p, atol=1e-12)
    assert torch.equal(residual(p, p), p) and acceptance(p, q, torch.full((30,), -1)).max() == 0


# --- proposers, pace, bad input ---------------------------------------------------------------------------------------

def test_the_index_reads_every_token_once(target):
    batch = Batch(target, PROMPTS, max_new_tokens=N)
    lookup, added = PromptLookup(batch), []
    for grams in lookup.grams.values():
        grams.extend = lambda tokens, grams=grams: (added.extend(tokens), NGrams.extend(grams, tokens))
    for _ in batch.steps(): lookup.propose(batch.rows, 5)
    assert len(added) == sum(len(row.prompt) + len(row.tokens) for row in batch.rows)


def test_the_formula():
    assert expected_tokens(1.0, 4) == 5 and expected_tokens(0.0, 4) == 1
    assert expected_tokens(0.5, 3) == pytest.approx((1 - 0.5**4) / 0.5)
    assert speedup(0.8, 3, 0.1) == pytest.approx(2.952 / 1.3)
    assert best_length(0.0, 0.1, 7) == 0 and best_length(0.9, 2.0, 7) == 0 and best_length(1.0, 0.0, 7) == 7


@pytest.mark.parametrize("cost", [0.05, 0.1, 0.3])
def test_useless_guesses_cost_little(cost):
    pace, lost = Pace(), 0.0
    for _ in range(256):
        n = pace.length(cost, 7)
        if n: pace.saw(n, 0, cost)
        lost += n * cost
    assert lost / 256 < 0.02
    pace.saw(1, 1, cost)
    for _ in range(70):
        if n := pace.length(cost, 7): pace.saw(n, n, cost)
    assert pace.length(cost, 7) >= 4, "good guesses must be used again, however long they were bad"


def test_rows_of_a_step_are_bounded(target):
    batch = speculating(PromptLookup, widest=8)(Batch)(target, [[1]] * 3, max_new_tokens=9)
    assert batch.lengths() == [1] * 3
    batch = speculating(PromptLookup, widest=8)(Batch)(target, [[1]] * 5, max_new_tokens=9)
    assert batch.lengths() == [0] * 5


def test_bad_scores_are_reported_with_their_row(target):
    def nothing(rows, logits):
        full = torch.tensor([len(row.tokens) > 5 and row.prompt == [9, 4] for row in rows])
        return logits.masked_fill(full[:, None], float("-inf"))
    texts = [tokens for tokens, _ in written(target)]
    for make in (partial(Scripted, texts=texts), PromptLookup):
        with pytest.raises(WorkbenchError, match="Row 3"):
            written(target, batch=speculating(make, widest=64, cost=0.0)(Batch), mask=nothing)


def with_vocabulary(*words):
    tokenizer = SimpleNamespace(vocabulary=words, pieces=lambda ids: [words[i] for i in ids])
    return LM(SimpleNamespace(), tokenizer, None)


def test_what_cannot_work_is_refused_before_the_model_runs(target, little, small):
    lookup = speculating(PromptLookup)(Batch)
    wrong = speculating(partial(DraftModel, draft=little))(Batch)
    bad = {
        "4 tokens and this one 97": lambda: written(target, batch=wrong),
        "rewind=7": lambda: written(target, batch=lookup, cache=target.new_cache("sliding")),
        "QuantizedCache": lambda: written(target, batch=lookup, cache=target.new_cache("quantized")),
        "SlidingCache": lambda: written(target, batch=speculating(partial(EarlyExit, layers=1))(Batch),
                                        cache=target.new_cache("sliding", rewind=7)),
        "between 1 and 1": lambda: written(target, batch=speculating(partial(EarlyExit, layers=2))(Batch)),
        "its own way to advance": lambda: speculating(PromptLookup)(lookup),
        "most is 0": lambda: speculating(PromptLookup, most=0),
        "cost is": lambda: speculating(PromptLookup, cost=-1),
        "longest is 1": lambda: written(target, batch=speculating(partial(PromptLookup, longest=1))(Batch)),
        "token 1 is 'c' to the draft": lambda: drafting(with_vocabulary("a", "c"), with_vocabulary("a", "b")),
        "has 1 tokens and the target's 2": lambda: drafting(with_vocabulary("a"), with_vocabulary("a", "b")),
    }
    for message, call in bad.items():
        with pytest.raises(InputError, match=message): call()
    short = Decoder.from_transformers(tiny(max_position_embeddings=16))
    with pytest.raises(InputError, match="context of the draft model is 16"):
        written(target, batch=speculating(partial(DraftModel, draft=short))(Batch))
