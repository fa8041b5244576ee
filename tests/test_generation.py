"""The generation loop, stop strings and streaming: equal to transformers, to the row alone, and to the definition.

Two small models: a random Llama (close scores, an oracle in transformers), and a scripted one that writes a given text
with a tokenizer whose tokens cut characters and stop strings at awkward places. Wrong variants are rejected.
"""
import random

import pytest
import torch

from checks import tiny
from llm_workbench import Decoder
from llm_workbench.architecture.decoder import STORES
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.architecture.packed_rows import PackedRows
from llm_workbench.errors import ContextLengthError, InputError, WorkbenchError
from llm_workbench.inference import generation
from llm_workbench.inference.generation import LM, Batch, StopStrings, generate_tokens, next_logits, padded
from llm_workbench.inference.sampling import Sampler, token_counts

PROMPTS = [[5], [1, 2, 3], [7] * 20, [9, 4], list(range(10, 40)), [3, 1]]
N = 24


def tokens_of(decoder, prompts, make=Batch, **settings):
    batch = make(decoder, prompts, **{"max_new_tokens": N, **settings})
    for _ in batch.steps(): pass
    return [row.tokens for row in batch.rows]


@pytest.fixture(scope="module")
def oracle():
    """Our tiny decoder, an end token that some rows meet, and what transformers writes for each prompt alone.

    Three times: freely, with the end token, with a repetition penalty."""
    hf = tiny(seed=2, vocab_size=97)
    def write(prompt, eos=None, **settings):
        ids = torch.tensor([prompt])
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N, do_sample=False, eos_token_id=eos,
                          pad_token_id=0, **settings)
        return out[0, len(prompt):].tolist()
    free = [write(p) for p in PROMPTS]
    eos = next(t for t in free[0][5:15] if t not in free[0][:5])
    stopped, penalised = [write(p, eos) for p in PROMPTS], [write(p, repetition_penalty=1.4) for p in PROMPTS]
    return Decoder.from_transformers(hf), eos, free, stopped, penalised


# --- the loop against transformers ------------------------------------------------------------------------------------

def per_row(**settings): return {name: torch.tensor(values) for name, values in settings.items()}


def alone(decoder, seed=None, eos=(), **settings):
    "What each prompt gives by itself; a tensor among the settings has one for each."
    take = lambda value, i: value[i].item() if isinstance(value, torch.Tensor) else value
    return [tokens_of(decoder, [p], sampler=Sampler(**{k: take(v, i) for k, v in settings.items()}), eos_ids=eos,
                      seed=None if seed is None else seed + i)[0] for i, p in enumerate(PROMPTS)]


OF_EACH = per_row(
    temperature=[0.0, 1.0, 0.5, 2.0, 1.0, 0.8], top_k=[5, 90, 3, 40, 9, 97], top_p=[1.0, 0.9, 0.5, 0.99, 0.8, 0.95],
    min_p=[0.0, 0.05, 0.1, 0.0, 0.2, 0.01], repetition_penalty=[1.3, 1.0, 2.0, 1.1, 1.4, 1.0],
    frequency_penalty=[0.0, -0.5, 0.3, 0.0, 0.2, 0.1])


def the_loop_is_right(oracle, make=Batch):
    decoder, eos, free, stopped, penalised = oracle
    write = lambda **settings: tokens_of(decoder, PROMPTS, make, **settings)
    assert write() == free, "tokens differ from transformers.generate"
    batch = make(decoder, PROMPTS, max_new_tokens=N, eos_ids=[eos])
    for _ in batch.steps(): pass
    assert [row.tokens for row in batch.rows] == stopped, "tokens differ from transformers.generate with an end token"
    want = ["stop" if w[-1] == eos else "length" for w in stopped]
    assert [row.reason for row in batch.rows] == want and "stop" in want, "wrong finish reasons"
    penalty = dict(temperature=0.0, repetition_penalty=1.4)
    assert write(sampler=Sampler(**penalty)) == penalised, "tokens differ from transformers with a repetition penalty"
    for frequency in (0.3, -0.5):  # below 0: what was written is favoured, so pads taken for tokens would show
        penalty["frequency_penalty"] = frequency
        assert write(sampler=Sampler(**penalty)) == alone(decoder, **penalty), "penalties depend on the batch"
    assert write(seed=3, sampler=Sampler(), eos_ids=[eos]) == alone(decoder, 3, [eos]), "draws depend on the batch"
    of_each = write(seed=3, sampler=Sampler(**OF_EACH), eos_ids=[eos])
    assert of_each == alone(decoder, 3, [eos], **OF_EACH), "settings per row depend on the batch"


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
def test_the_loop_equals_transformers(oracle, ops): the_loop_is_right((oracle[0].with_ops(ops), *oracle[1:]))


class NoticedLate(Batch):
    "The end token counts one step late."
    def write(self, row, tokens):
        super().write(row, tokens)
        if row.reason == "stop": row.reason = None
        if len(row.tokens) > 1 and row.tokens[-2] in self.eos: row.reason = "stop"


class NoEnd(Batch):
    def __init__(self, *args, **settings): super().__init__(*args, **{**settings, "eos_ids": ()})


class FirstRowDecides(Batch):
    def take(self, tokens):
        super().take(tokens)
        for row in self.standing[1:]:
            if row.reason == "stop": row.reason = None


class OneTooMany(Batch):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        for row in self.rows: row.limit += 1


class AtTheLastPad(Batch):
    def scores(self):
        return self.decoder.logits(self.decoder.hidden(self.waiting, self.cache, self.counts)[:, -1])


class CountsForgotten(Batch):
    def scores(self): return next_logits(self.decoder, self.waiting, self.cache)


class Leaves(Batch):
    "Leaves correctly and then spoils one thing; `stay` are the places that the remaining rows had."
    def leave(self, rows):
        before, stay = vars(self).copy(), [i for i in range(len(self.standing)) if i not in rows]
        super().leave(rows)
        if rows and stay: self.spoil(before, stay)


class TokensMixedUp(Leaves):
    def spoil(self, before, stay): self.waiting = before["waiting"][:len(stay)]


class GeneratorsMixedUp(Leaves):
    def spoil(self, before, stay): self.generators = before["generators"] and before["generators"][:len(stay)]


class SettingsMixedUp(Leaves):
    def spoil(self, before, stay): self.sampler = before["sampler"].select(range(len(stay)))


class TablesMixedUp(Leaves):
    def spoil(self, before, stay): self.said = None if self.said is None else before["said"][:len(stay)]


class CacheMixedUp(Batch):
    def leave(self, rows):
        cache, left = self.cache, len(self.standing) - len(set(rows))
        class First:
            def select(self, rows): cache.select(range(left))
        self.cache = First()
        super().leave(rows)
        self.cache = cache


class PadsAreSaid(Batch):
    def __init__(self, decoder, prompts, **settings):
        super().__init__(decoder, prompts, **settings)
        if self.said is not None: self.said = token_counts(padded(prompts, 0), decoder.config.vocab_size)


class OnlyThePromptIsSaid(Batch):
    def take(self, tokens):
        said = None if self.said is None else self.said.clone()
        super().take(tokens)
        self.said = said


MUTANTS = [NoticedLate, NoEnd, FirstRowDecides, OneTooMany, AtTheLastPad, CountsForgotten, TokensMixedUp,
           GeneratorsMixedUp, SettingsMixedUp, TablesMixedUp, CacheMixedUp, PadsAreSaid, OnlyThePromptIsSaid]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda c: c.__name__)
def test_wrong_loop_is_rejected(oracle, mutant):
    with pytest.raises(AssertionError): the_loop_is_right(oracle, mutant)


def test_one_row_of_seeded_rows_with_settings_of_their_own_ends_early(oracle):
    "Everything that a row has leaves with it."
    decoder, _, free, *_ = oracle
    settings = dict(sampler=Sampler(temperature=torch.tensor([0.0, 1.0, 0.7])), seed=1)
    end = free[0][2]
    got = tokens_of(decoder, PROMPTS[:3], eos_ids=[end], **settings)
    assert len(got[0]) == free[0].index(end) + 1 < N
    for i in range(3):
        sampler = Sampler(temperature=settings["sampler"].temperature[i].item())
        assert got[i] == tokens_of(decoder, [PROMPTS[i]], eos_ids=[end], sampler=sampler, seed=1 + i)[0]


@torch.inference_mode()
def test_ragged_logits_equal_the_row_alone(oracle):
    decoder, worst = oracle[0], 0.0
    counts = torch.tensor([len(p) for p in PROMPTS])
    batch, alone = decoder.new_cache(), [decoder.new_cache() for _ in PROMPTS]
    new = next_logits(decoder, padded(PROMPTS, 0), batch, counts)
    for step in range(10):
        inputs = tokens[:, None] if step else [torch.tensor([p]) for p in PROMPTS]
        single = torch.cat([next_logits(decoder, own, cache) for own, cache in zip(inputs, alone)])
        worst = max(worst, (new - single).abs().max().item())
        assert torch.equal(new.argmax(-1), single.argmax(-1))
        tokens = new.argmax(-1, keepdim=True)
        new = next_logits(decoder, tokens, batch)
    assert worst <= 1e-3, f"a row in a ragged batch differs from the row alone by {worst:.1e}"


def test_padding_value_does_not_matter(oracle):
    decoder, counts = oracle[0], torch.tensor([len(p) for p in PROMPTS])
    a, b = (next_logits(decoder, padded(PROMPTS, value), decoder.new_cache(), counts) for value in (0, 50))
    assert torch.equal(a, b), "pads reach the scores"


class Texts(PackedRows):
    "Texts named by their place in the batch."
    def select(self, rows): self.texts = {i: self.texts[r] for i, r in enumerate(rows)}


class PackedBatch(Batch):
    "The same loop without padding: the tokens of all rows stand side by side in one."
    def scores(self):
        B, T = self.waiting.shape
        counts = [T] * B if self.counts is None else self.counts
        tokens = torch.cat([row[:n] for row, n in zip(self.waiting, counts)])          # (N,)
        hidden = self.decoder.hidden(tokens[None], self.cache, pieces=list(enumerate(counts)))
        return self.decoder.logits(hidden[0, torch.tensor(counts).cumsum(0) - 1])


@pytest.mark.parametrize("store", STORES)
def test_every_store_serves_the_same_loop(oracle, store):
    decoder, eos, _, stopped, _ = oracle
    options = dict(static=dict(batch=len(PROMPTS), slots=max(map(len, PROMPTS)) + N), quantized=dict(bits=8))
    make = PackedBatch if store == "packed" else Batch
    new = lambda: Texts(decoder.new_cache) if store == "packed" else decoder.new_cache(store, **options.get(store, {}))
    got = tokens_of(decoder, PROMPTS, make, eos_ids=[eos], cache=new())
    if store == "quantized": assert all(got) and sum(a[0] == b[0] for a, b in zip(got, stopped)) > 3    # it rounds
    else: assert got == stopped
    settings = dict(seed=3, sampler=Sampler(**OF_EACH), eos_ids=[eos])
    drawn = tokens_of(decoder, PROMPTS, make, cache=new(), **settings)
    if store != "quantized": assert drawn == tokens_of(decoder, PROMPTS, **settings)


def test_rows_that_are_over_stay_in_a_static_batch(oracle):
    "Its shape never changes; what they write is thrown away."
    decoder, eos, _, stopped, _ = oracle
    cache = decoder.new_cache("static", batch=len(PROMPTS), slots=64)
    batch = Batch(decoder, PROMPTS, max_new_tokens=N, eos_ids=[eos], cache=cache)
    batch.step()
    keys = cache.store[0]["k"].data_ptr(), cache.lengths.data_ptr()
    for _ in batch.steps(): assert batch.waiting.shape == (len(PROMPTS), 1) and len(batch.standing) == len(PROMPTS)
    assert keys == (cache.store[0]["k"].data_ptr(), cache.lengths.data_ptr())
    assert len(batch.running) == 0 and [row.tokens for row in batch.rows] == stopped
    with pytest.raises(InputError, match="this cache has 2 rows and is given 6"):
        tokens_of(decoder, PROMPTS, cache=decoder.new_cache("static", batch=2))


# --- several tokens a step, and rules for what may be written ---------------------------------------------------------

class Guessing(Batch):
    "Greedy speculative decoding: `guess` proposes tokens, one pass checks them, and the wrong ones are taken back."
    width, passes = 3, 0

    def advance(self):
        self.passes += 1
        if self.waiting.shape[1] > 1 or self.counts is not None: return super().advance()  # the prompts
        with torch.inference_mode():
            guesses = torch.tensor([self.guess(row) for row in self.standing])             # (B, width)
            held = self.cache.lengths + 0                                           # a static cache changes it in place
            self.logits = self.decoder(torch.cat([self.waiting, guesses], 1), self.cache)  # (B, width + 1, V)
            best = self.logits.argmax(-1)                                                  # what follows each of them
            right = (best[:, :-1] == guesses).cumprod(1).sum(1)                        # (B,) guesses before a wrong one
            self.cache.truncate((held + 1 + right).tolist())
            return best.masked_fill(torch.arange(self.width + 1) > right[:, None], -1)

    def guess(self, row):
        "What is known to come, with a mistake in one of two."
        known, at = self.known[self.rows.index(row)], len(row.tokens)
        coming = (known[at:at + self.width] + [0] * self.width)[:self.width]
        return [t if (at + i) % 5 else (t + 1) % 97 for i, t in enumerate(coming)]


@pytest.mark.parametrize("store", ["contiguous", "static"])
def test_several_tokens_may_be_decided_in_one_step(oracle, store):
    decoder, eos, free, stopped, _ = oracle
    options = dict(batch=len(PROMPTS), slots=64) if store == "static" else {}
    prompts = [p[:8] for p in PROMPTS] if store == "static" else PROMPTS
    class Knowing(Guessing): known = tokens_of(decoder, prompts)
    batch = Knowing(decoder, prompts, max_new_tokens=N, eos_ids=[eos], cache=decoder.new_cache(store, **options))
    for _ in batch.steps(): pass
    assert [row.tokens for row in batch.rows] == tokens_of(decoder, prompts, eos_ids=[eos]), "guessing changed the text"
    longest = max(len(row.tokens) for row in batch.rows)
    assert batch.passes < 0.6 * longest, f"{batch.passes} passes for {longest} tokens: the right guesses were not used"


def test_a_guess_beyond_the_end_is_cut(oracle):
    "An end token, or the limit, in the middle of what a step decided."
    decoder, _, free, *_ = oracle
    class Sure(Guessing):
        known = free
        def guess(self, row): return (free[self.rows.index(row)][len(row.tokens):] + [0] * 3)[:3]
    assert tokens_of(decoder, PROMPTS, Sure, max_new_tokens=11) == [f[:11] for f in free]
    for at in range(1, 9):
        want = [f[:f.index(free[0][at]) + 1] if free[0][at] in f else f for f in free]
        assert tokens_of(decoder, PROMPTS, Sure, eos_ids=[free[0][at]]) == want


def test_only_digits_where_a_mask_allows_nothing_else(oracle):
    decoder, _, free, *_ = oracle
    digits, seen = torch.arange(97) < 10, []
    def mask(rows, logits):
        seen.append([len(row.tokens) for row in rows])
        return logits.masked_fill(~digits, float("-inf"))
    for settings in ({}, dict(sampler=Sampler(2.0, top_k=50, top_p=0.99), seed=0)):
        got = tokens_of(decoder, PROMPTS, mask=mask, **settings)
        assert all(t < 10 for tokens in got for t in tokens) and len({t for tokens in got for t in tokens}) > 3
    assert seen[:3] == [[0] * 6, [1] * 6, [2] * 6]
    def all_but_one(rows, logits):
        free_here = torch.tensor([row.prompt == [5] for row in rows])[:, None]
        return logits.where(digits | free_here, float("-inf"))
    got = tokens_of(decoder, PROMPTS, mask=all_but_one)
    assert got[0] == free[0] and all(t < 10 for tokens in got[1:] for t in tokens), "a rule belongs to its row"


@pytest.mark.parametrize("wrong", [lambda rows, logits: None, lambda rows, logits: logits[0], lambda rows, logits: 5])
def test_a_mask_that_returns_something_else_is_named(oracle, wrong):
    with pytest.raises(InputError, match="mask gave .* it must return logits"):
        tokens_of(oracle[0], PROMPTS, mask=wrong)


def test_a_mask_that_leaves_nothing_is_named_with_its_row(oracle):
    def nothing_for_the_third(rows, logits):
        third = torch.tensor([row.prompt == PROMPTS[2] and len(row.tokens) > 0 for row in rows])
        return logits.masked_fill(third[:, None], float("-inf"))
    with pytest.raises(WorkbenchError, match="Row 2 .*-inf"):
        tokens_of(oracle[0], PROMPTS, mask=nothing_for_the_third, eos_ids=[oracle[2][0][0]])   # row 0 is gone by then


@pytest.mark.parametrize("bad", [[6], [-1], [0.5], ["a"], [True], 3, "0", [None]])
def test_a_row_that_is_not_there_cannot_leave(oracle, bad):
    batch = Batch(oracle[0], PROMPTS, max_new_tokens=N)
    batch.step()
    with pytest.raises(InputError, match="a row that leaves"): batch.leave(bad)
    assert len(batch.standing) == 6


def test_rows_may_be_sent_away_between_steps(oracle):
    decoder, _, free, *_ = oracle
    batch = Batch(decoder, PROMPTS, max_new_tokens=N)
    for n, rows in enumerate(batch.steps()):
        if n == 3: batch.leave([4, 0, 0])
        if n == 5: batch.leave([])
    assert [len(row.tokens) for row in rows] == [4, N, N, N, 4, N] and [row.reason for row in rows][::4] == ["left"] * 2
    assert [row.tokens for row in rows] == [f[:len(row.tokens)] for f, row in zip(free, rows)]
    batch = Batch(decoder, PROMPTS[:2], max_new_tokens=N)
    batch.leave([0, 1])
    assert not batch.running and list(batch.steps()) == []
    with pytest.raises(InputError, match="No row is running"): batch.step()


def test_consumer_may_end_rows_and_grad_mode_is_left_alone(oracle):
    decoder, _, free, *_ = oracle
    for rows in generate_tokens(decoder, PROMPTS, max_new_tokens=10):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        if len(rows[2].tokens) == 3: rows[2].reason = "stop"
    assert [row.tokens for row in rows] == [f[:3 if i == 2 else 10] for i, f in enumerate(free)]


def test_one_token_per_row_and_step_reaches_the_decoder(oracle, monkeypatch):
    "After the prompt every step sends one token per running row, and rows that are over are not computed."
    decoder, eos, _, stopped, _ = oracle
    shapes, hidden, head = [], type(decoder).hidden, []
    def noted(self, tokens, *args):
        shapes.append(tuple(tokens.shape))
        return hidden(self, tokens, *args)
    monkeypatch.setattr(type(decoder), "hidden", noted)
    handle = decoder.lm_head.register_forward_hook(lambda m, args, out: head.append(tuple(args[0].shape[:-1])))
    tokens_of(decoder, PROMPTS, eos_ids=[eos])
    handle.remove()
    running = [sum(len(w) > step for w in stopped) for step in range(max(map(len, stopped)))]
    want = [(len(PROMPTS), max(map(len, PROMPTS)))] + [(n, 1) for n in running[1:]]
    assert shapes == want, "more work than one token per running row"
    assert head == [(n,) for n in running], "the output matrix must see one position per row"


@pytest.mark.parametrize("prompts, n, error, words", [
    ([[1, 2], []], 5, InputError, "Prompt 1 is empty"), ([], 5, InputError, "no prompt"),
    ([[1] * 60], 10, ContextLengthError, "at most 4"), ([[1] * 64], 1, ContextLengthError, "by at least 1 token"),
    ([[1] * 90], 1, ContextLengthError, "by at least 27"), ([[1]], 0, InputError, "max_new_tokens is 0.* at least 1"),
    ([[1]], 2.5, InputError, "max_new_tokens is 2.5.*whole number"), ([[1]], "5", InputError, "max_new_tokens is '5'"),
    ([[1]], True, InputError, "max_new_tokens"), ([[1, 97]], 5, InputError, "holds token 97, outside of 0 to 96"),
    ([[-1]], 5, InputError, "holds token -1, outside"), ([[1.0]], 5, InputError, "Prompt 0 holds 1.0"),
    (["hello"], 5, InputError, "Prompt 0 is a text, 'hello': give its token ids"),
    ("hello", 5, InputError, "list of prompts"), (None, 5, InputError, "list of prompts"),
    ([1, 2, 3], 5, InputError, "Prompt 0 is 1: give a list of prompts"), (5, 5, InputError, "list of prompts"),
    ([["a"]], 5, InputError, "Prompt 0 holds 'a'"), ([None], 5, InputError, "Prompt 0 is None")])
def test_bad_input_raises_at_the_call(oracle, monkeypatch, prompts, n, error, words):
    monkeypatch.setattr(type(oracle[0]), "hidden", lambda *a: pytest.fail("work started before the input was checked"))
    with pytest.raises(error, match=words): generate_tokens(oracle[0], prompts, max_new_tokens=n)


@pytest.mark.parametrize("settings, words", [
    (dict(seed="a"), "seed is 'a'"), (dict(seed=1.5), "seed is 1.5"), (dict(seed=2**64), "seed is"),
    (dict(seed=-1), "seed is -1"), (dict(seed=True), "seed is True"),
    (dict(eos_ids=["x"]), "end token is 'x'"), (dict(eos_ids=5), "end token is 5"),
    (dict(eos_ids="ab"), "end token is 'ab'"),
    (dict(sampler=Sampler(temperature=torch.tensor([1.0, 2.0]))), "temperature has 2 settings for 1 rows")])
def test_bad_settings_raise_at_the_call(oracle, settings, words):
    with pytest.raises(InputError, match=words): generate_tokens(oracle[0], [[1]], **{"max_new_tokens": 5, **settings})


def test_prompts_may_be_tensors(oracle):
    want = tokens_of(oracle[0], [[1, 2, 3], [9, 4, 7]])
    for same in (torch.tensor([[1, 2, 3], [9, 4, 7]]), [torch.tensor([1, 2, 3]), (9, 4, 7)]):
        assert tokens_of(oracle[0], same) == want


def test_the_whole_context_can_be_used(oracle):
    assert [len(t) for t in tokens_of(oracle[0], [[1] * 40, [2] * 10], max_new_tokens=24)] == [24, 24]


def test_nan_weights_are_named(oracle):
    broken = Decoder.from_transformers(tiny(seed=2))
    with torch.no_grad(): broken.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(WorkbenchError, match="nan"): tokens_of(broken, PROMPTS[:2])


# --- text: a scripted model and a tokenizer that cuts where it hurts --------------------------------------------------

class Pieces:
    "A tokenizer over given byte strings; id 0 is the end token."
    eos_ids, eos_id = [0], 0
    def __init__(self, pieces): self.pieces = [b"<end>", *pieces]
    def encode(self, text, special=False): return [1 + self.pieces[1:].index(letter.encode()) for letter in text]
    def encode_chat(self, messages, **kw): return self.encode("".join(m["content"] for m in messages))
    def decode(self, ids): return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def stream(self):
        import codecs
        decoder, pieces = codecs.getincrementaldecoder("utf-8")("replace"), self.pieces
        class Stream:
            def push(self, id): return decoder.decode(pieces[id])
            def flush(self): return decoder.decode(b"", True)
        return Stream()


class Script(torch.nn.Module):
    "Writes the given tokens after any one-token prompt: a decoder whose scores depend on the position alone."
    def __init__(self, script, vocab):
        super().__init__()
        self.script, self.vocab, self.device = script, vocab, torch.device("cpu")
        self.config = type("Config", (), dict(max_position_embeddings=1000, vocab_size=vocab))

    def new_cache(self, context=None):
        class Count:
            at = 0
            def select(self, rows): pass
        return Count()

    def hidden(self, tokens, cache, counts=None):
        cache.at += 1
        return torch.full((*tokens.shape, 1), float(self.script[cache.at - 1]))

    def logits(self, last): return torch.nn.functional.one_hot(last[:, 0].long(), self.vocab).float()


def scripted(text, rng, end=True, alphabet="ab안👩"):
    "An LM that writes `text` in random pieces of its UTF-8 bytes, and perhaps the end token after it."
    data, pieces = text.encode(), []
    while data:
        n = rng.randint(1, 5)
        pieces.append(data[:n])
        data = data[n:]
    vocab = [c.encode() for c in alphabet] + sorted(set(pieces))
    tokenizer = Pieces(vocab)
    script = [1 + vocab.index(p) for p in pieces] + ([0] if end else [])
    return LM(Script(script, len(vocab) + 1), tokenizer, None), len(script)


def first_stop(text, stops):
    "The definition: letter by letter until some stop string is complete; cut before the longest that ends there."
    for end in range(1, len(text) + 1):
        ended = [len(s) for s in stops if text[:end].endswith(s)]
        if ended: return text[:end - max(ended)], True
    return text, False


def text_is_the_definition(rounds=300):
    rng = random.Random(1)
    for _ in range(rounds):
        text = "".join(rng.choices("ab안👩", (4, 4, 1, 1), k=rng.randint(1, 20)))
        stops = ["".join(rng.choices("ab안", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        lm, n = scripted(text, rng, end=rng.random() < 0.7)
        want, stopped = first_stop(text, stops)
        done = lm.generate([1], max_new_tokens=n, stop=stops)
        ended = stopped or lm.decoder.script[-1] == 0
        assert done.text == want, f"{text!r} with stops {stops}: {done.text!r} instead of {want!r}"
        assert done.reason == ("stop" if ended else "length"), f"{text!r} with stops {stops}: reason {done.reason}"
        pieces = list(lm.stream([{"role": "user", "content": "a"}], max_new_tokens=n, stop=stops))
        assert "".join(pieces) == want == lm.chat("a", max_new_tokens=n, stop=stops), "streamed pieces are not the text"
        assert all(pieces), "an empty piece was streamed"
        assert not any("\ufffd" in p for p in pieces), "a character was split"


def test_text_is_the_definition(): text_is_the_definition()


class OnlyAtTheEnd(StopStrings):
    "Looks only whether the newest piece ends with a stop string."
    def push(self, text):
        self.found = self.found or next((s for s in self.stop if text.endswith(s)), None)
        return "" if self.found else text


class KeepsTheStopString(StopStrings):
    def push(self, text):
        done, shown = self.found, super().push(text)
        return shown + self.found if self.found and not done else shown


class HoldsTooLittle(StopStrings):
    def push(self, text):
        shown = super().push(text)
        shown, self.held = shown + self.held[:-1], self.held[-1:]
        return shown


class ForgetsWhatItHeld(StopStrings):
    def flush(self): return ""


class FirstInTheList(StopStrings):
    "Takes the stop string that comes first in the list, not the one that is complete first."
    def push(self, text):
        if self.found: return ""
        for s in self.stop:
            if s in self.held + text: self.stop = (s,); break
        return super().push(text)


WRONG_STOPS = [OnlyAtTheEnd, KeepsTheStopString, HoldsTooLittle, ForgetsWhatItHeld, FirstInTheList]


@pytest.mark.parametrize("mutant", WRONG_STOPS, ids=lambda c: c.__name__)
def test_wrong_stop_condition_is_rejected(monkeypatch, mutant):
    monkeypatch.setattr(generation, "StopStrings", mutant)
    with pytest.raises(AssertionError): text_is_the_definition()


def test_invalid_bytes_become_replacement_characters():
    lm = LM(Script([1, 2, 3], 4), Pieces([b"a", b"\xf0\x9f", b"b"]), None)
    assert lm.generate([1], max_new_tokens=3).text == "a\ufffdb"
    assert lm.generate([1], max_new_tokens=2).text == "a\ufffd", "bytes of an unfinished character must not vanish"


@pytest.mark.parametrize("settings, words", [
    (dict(stop=["b", ""]), "stop string is empty"), (dict(stop=[1]), "stop string is 1"),
    (dict(stop=5), "stop string is 5"), (dict(stop=[b"a"]), "stop string is b'a'"),
    (dict(temperature=-1), "temperature is -1"), (dict(temperature="hot"), "temperature is 'hot'"),
    (dict(top_p=2), "top_p is 2: it must be a number between 0 and 1"), (dict(top_k=0), "top_k is 0"),
    (dict(seed="a"), "seed is 'a'"), (dict(max_new_tokens=2.5), "max_new_tokens is 2.5")])
def test_wrong_settings_are_refused_at_the_call(settings, words):
    lm, _ = scripted("abab", random.Random(0))
    for call in (lm.generate, lm.stream, lm.chat):
        with pytest.raises(InputError, match=words): call("a", **settings)


def test_unknown_settings_and_prompts_of_a_wrong_type_are_refused():
    lm, _ = scripted("abab", random.Random(0))
    with pytest.raises(TypeError): lm.stream("a", temprature=1)
    with pytest.raises(InputError, match="empty"): lm.generate("")
    for bad in (5, None, 1.5, b"a", {}, [], [""], [[]]):
        with pytest.raises(InputError, match="[Pp]rompt"): lm.generate(bad)
    for bad in ([1, "a"], [[1], 2], [[["a"]]]):
        with pytest.raises(InputError, match="Prompt"): lm.generate(bad)


def test_interrupt_leaves_nothing_behind(oracle, monkeypatch):
    decoder, _, free, *_ = oracle
    hidden, calls = type(decoder).hidden, []
    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return hidden(self, *args)
    monkeypatch.setattr(type(decoder), "hidden", interrupted)
    with pytest.raises(KeyboardInterrupt): tokens_of(decoder, PROMPTS)
    assert not torch.is_inference_mode_enabled()
    assert tokens_of(decoder, PROMPTS) == free, "an interrupted call changed the next one"


def test_abandoned_stream_leaves_nothing_behind(oracle):
    decoder, _, free, *_ = oracle
    steps = generate_tokens(decoder, PROMPTS, max_new_tokens=N)
    next(steps), next(steps)
    steps.close()
    assert tokens_of(decoder, PROMPTS) == free


# --- the real model ---------------------------------------------------------------------------------------------------

def test_real_model_batch_equals_alone_and_stream_equals_chat(lm):
    questions = ["Why is the sky blue?", "안녕하세요! 한국어로 인사해 주세요.", "Write one emoji.",
                 "What is the capital of Peru?"]
    ids = [lm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
    batch = lm.generate(ids, max_new_tokens=16)
    for row, prompt, question in zip(batch, ids, questions):
        assert row == lm.generate(prompt, max_new_tokens=16), f"{question!r}: another answer in company than alone"
        pieces = list(lm.stream(question, max_new_tokens=16))
        assert "".join(pieces) == row.text, f"{question!r}: the streamed pieces are not the answer"
        if not row.text.endswith("\ufffd"): assert not any("\ufffd" in p for p in pieces), "a character was split"
    assert lm.chat(questions[0], max_new_tokens=16) == batch[0].text
    warm = dict(max_new_tokens=8, temperature=0.8, top_p=0.9)
    alone = [lm.generate(p, seed=5 + i, **warm) for i, p in enumerate(ids[:2])]
    assert lm.generate(ids[:2], seed=5, **warm) == alone


def test_real_model_refuses_a_prompt_beyond_its_context(lm):
    with pytest.raises(ContextLengthError, match="8192"): lm.stream("word " * 9000)
