"""The generation loop, stop strings and streaming: equal to transformers, to the row alone, and to the definition;
wrong variants are rejected.

Two small models: a random Llama (close scores, an oracle in transformers), and a scripted one that writes a given
text with a tokenizer whose tokens cut characters and stop strings at awkward places."""
import random

import pytest
import torch

from checks import tiny
from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import ContextLengthError, InputError, WorkbenchError
from llm_workbench.inference import generation
from llm_workbench.inference.generation import LM, Batch, StopStrings, generate_tokens, next_logits, padded
from llm_workbench.inference.sampling import Sampler, token_counts

PROMPTS = [[5], [1, 2, 3], [7] * 20, [9, 4], list(range(10, 40)), [3, 1]]
N = 24


def tokens_of(decoder, prompts, **settings):
    for rows in generate_tokens(decoder, prompts, **{"max_new_tokens": N, **settings}): pass
    return [row.tokens for row in rows]


@pytest.fixture(scope="module")
def oracle():
    """Our tiny decoder, an end token that some rows meet, and what transformers writes for each prompt alone: freely,
    with the end token, with a penalty."""
    hf = tiny(seed=2, vocab_size=97)
    def write(prompt, eos=None, **settings):
        ids = torch.tensor([prompt])
        return hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=N,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            **settings,
        )[0, len(prompt) :].tolist()
    free = [write(p) for p in PROMPTS]
    eos = next(t for t in free[0][5:15] if t not in free[0][:5])
    return (
        Decoder.from_transformers(hf),
        eos,
        free,
        [write(p, eos) for p in PROMPTS],
        [write(p, repetition_penalty=1.4) for p in PROMPTS],
    )


# --- the loop against transformers ----------------------------------------------------------------------------------

def greedy_equals_transformers(oracle, batch=Batch):
    decoder, eos, free, stopped, penalised = oracle
    of = lambda prompts, **settings: tokens_of(decoder, prompts, batch=batch, **settings)
    alone = lambda **settings: [tokens_of(decoder, [p], **settings)[0] for p in PROMPTS]
    assert of(PROMPTS) == free, "tokens differ from transformers.generate"
    assert of(PROMPTS, eos_ids=[eos]) == stopped, "tokens differ from transformers.generate with an end token"
    for rows in generate_tokens(decoder, PROMPTS, max_new_tokens=N, eos_ids=[eos], batch=batch): pass
    want = ["stop" if w[-1] == eos else "length" for w in stopped]
    assert [row.reason for row in rows] == want and "stop" in want, "wrong finish reasons"
    assert of(PROMPTS, sampler=Sampler(temperature=0.0, repetition_penalty=1.4)) == penalised, "penalties differ"
    for frequency in (0.3, -0.5):  # below 0: what was written is favoured, so pads taken for tokens would show
        strict = dict(sampler=Sampler(temperature=0.0, repetition_penalty=1.4, frequency_penalty=frequency))
        assert of(PROMPTS, **strict) == alone(**strict), "penalties depend on the batch"
    warm = dict(sampler=Sampler(), eos_ids=[eos])
    lonely = [tokens_of(decoder, [p], seed=3 + i, **warm)[0] for i, p in enumerate(PROMPTS)]
    assert of(PROMPTS, seed=3, **warm) == lonely, "draws depend on the batch"
    settings = Sampler(temperature=torch.linspace(0.4, 1.6, len(PROMPTS)), top_k=torch.arange(3, 3 + len(PROMPTS)),
                       repetition_penalty=torch.linspace(1.0, 1.5, len(PROMPTS)))
    lonely = [
        tokens_of(decoder, [p], seed=3 + i, eos_ids=[eos], sampler=settings.select([i]))[0]
        for i, p in enumerate(PROMPTS)
    ]
    assert of(PROMPTS, seed=3, eos_ids=[eos], sampler=settings) == lonely, "a row's settings did not stay with it"


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
def test_greedy_equals_transformers(oracle, ops): greedy_equals_transformers((oracle[0].with_ops(ops), *oracle[1:]))


# each a mistake in one method; the rest is the real class
class NoticesTheEndLate(Batch):
    def over(self, row):
        if len(row.tokens) > 1 and row.tokens[-2] in self.eos: return "stop"
        return "length" if len(row.tokens) == self.max_new_tokens else None


class IgnoresTheEnd(Batch):
    def over(self, row): return "length" if len(row.tokens) == self.max_new_tokens else None


class AsksTheFirstRow(Batch):
    def over(self, row): return super().over(self.rows[0])


class OneTooMany(Batch):
    def __init__(self, decoder, rows, sampler, cache, max_new_tokens, *rest):
        super().__init__(decoder, rows, sampler, cache, max_new_tokens + 1, *rest)


class ForgetsTheCounts(Batch):
    def choose(self):
        self.counts = None
        return super().choose()


class MixesTokens(Batch):
    def leave(self, gone):
        tokens = self.tokens
        super().leave(gone)
        self.tokens = tokens[:len(self.rows)]


class KeepsTheFirstCaches(Batch):
    def leave(self, gone):
        select, self.cache.select = self.cache.select, lambda stay: select(range(len(stay)))
        super().leave(gone)
        self.cache.select = select


class KeepsTheFirst(Batch):
    "What a row has of its own stays where it was when a row leaves."
    def leave(self, gone):
        before = getattr(self, self.what)
        super().leave(gone)
        n = len(self.rows)
        if before is not None and n:
            setattr(self, self.what, before.select(range(n)) if self.what == "sampler" else before[:n])


class MixesGenerators(KeepsTheFirst): what = "generators"
class MixesSettings(KeepsTheFirst): what = "sampler"
class MixesCounts(KeepsTheFirst): what = "seen"


class CountsPads(Batch):
    def __init__(self, *args):
        super().__init__(*args)
        if self.seen is not None: self.seen = token_counts(padded([r.prompt for r in self.rows], 0), self.seen.shape[1])


class CountsThePromptOnly(Batch):
    def choose(self):
        seen = self.seen
        chosen = super().choose()
        self.seen = seen
        return chosen


MISTAKES = [
    NoticesTheEndLate,
    IgnoresTheEnd,
    AsksTheFirstRow,
    OneTooMany,
    ForgetsTheCounts,
    MixesTokens,
    KeepsTheFirstCaches,
    MixesGenerators,
    MixesSettings,
    MixesCounts,
    CountsPads,
    CountsThePromptOnly,
]


@pytest.mark.parametrize("wrong", MISTAKES)
def test_wrong_loop_is_rejected(oracle, wrong):
    with pytest.raises((AssertionError, InputError, RuntimeError, IndexError)):
        greedy_equals_transformers(oracle, wrong)


# --- what a later engine asks of a step -----------------------------------------------------------------------------

def test_a_mask_decides_what_is_possible(oracle):
    allowed = torch.tensor([3, 50, 96])
    asked = []
    def mask(rows, logits):
        asked.append(len(rows))
        return torch.full_like(logits, -torch.inf).index_copy(1, allowed, logits[:, allowed])
    tokens = tokens_of(oracle[0], PROMPTS, mask=mask)
    assert {t for row in tokens for t in row} <= set(allowed.tolist()) and asked == [len(PROMPTS)] * N
    nothing = lambda rows, logits: torch.full_like(logits, -torch.inf)
    with pytest.raises(WorkbenchError, match="Row 0"): tokens_of(oracle[0], PROMPTS, mask=nothing)


class KnowsTheFuture(Batch):
    "Proposes what the model will write, and every third time something else; keeps what holds. One row, greedy."
    future, calls = [], 0
    def choose(self):
        row, k = self.rows[0], len(self.rows[0].tokens)
        guess = self.future[k:k + 3] if k else []
        if guess and k % 3 == 0: guess = [*guess[:1], (guess[-1] + 1) % 97]
        tokens = torch.cat([self.tokens, torch.tensor([guess], dtype=torch.int64)], 1)
        best = self.decoder(tokens, self.cache)[0, -len(guess) - 1:].argmax(-1).tolist()
        hold = next((i for i, g in enumerate(guess) if g != best[i]), len(guess))
        self.cache.truncate(len(row.prompt) + k + hold)
        self.tokens, KnowsTheFuture.calls = torch.tensor([[best[hold]]]), KnowsTheFuture.calls + 1
        return [best[:hold + 1]]


@torch.inference_mode()
@pytest.mark.parametrize("store", ["contiguous", "static"])
def test_a_step_may_write_several_tokens(oracle, store):
    decoder, eos, free, stopped, _ = oracle
    for prompt, text, ended in zip(PROMPTS, free, stopped):
        KnowsTheFuture.future, KnowsTheFuture.calls = text, 0
        cache = decoder.new_cache(store, **({"slots": 64} if store == "static" else {}))
        assert (
            tokens_of(decoder, [prompt], batch=KnowsTheFuture, cache=cache) == [text] and KnowsTheFuture.calls < N - 4
        )
        assert tokens_of(decoder, [prompt], batch=KnowsTheFuture, eos_ids=[eos]) == [ended], (
            "tokens behind the end were kept"
        )


def test_rows_that_are_not_there_cannot_leave(oracle):
    decoder = oracle[0]
    for rows in generate_tokens(decoder, PROMPTS, max_new_tokens=2): pass
    batch = Batch(decoder, rows, Sampler(temperature=0.0), decoder.new_cache(), 4)
    for gone in ([len(rows)], [-1], ["a"]):
        with pytest.raises(InputError, match="no row"): batch.leave(gone)
    assert len(batch.rows) == len(rows)


@torch.inference_mode()
def test_ragged_logits_equal_the_row_alone(oracle):
    decoder, worst = oracle[0], 0.0
    counts = torch.tensor([len(p) for p in PROMPTS])
    batch, alone = decoder.new_cache(), [decoder.new_cache() for _ in PROMPTS]
    new = next_logits(decoder, padded(PROMPTS, 0), batch, counts)
    for step in range(10):
        single = torch.cat(
            [
                next_logits(decoder, torch.tensor([p]) if step == 0 else t[None], c)
                for p, t, c in zip(PROMPTS, tokens if step else counts, alone)
            ]
        )
        worst = max(worst, (new - single).abs().max().item())
        assert torch.equal(new.argmax(-1), single.argmax(-1))
        tokens = new.argmax(-1, keepdim=True)
        new = next_logits(decoder, tokens, batch)
    assert worst <= 1e-3, f"a row in a ragged batch differs from the row alone by {worst:.1e}"


def test_padding_value_does_not_matter(oracle):
    decoder, counts = oracle[0], torch.tensor([len(p) for p in PROMPTS])
    a, b = (next_logits(decoder, padded(PROMPTS, value), decoder.new_cache(), counts) for value in (0, 50))
    assert torch.equal(a, b), "pads reach the scores"


@pytest.mark.parametrize("store", ["sliding", "quantized", "static"])
def test_other_caches_serve_the_same_loop(oracle, store):
    decoder, eos, _, stopped, _ = oracle
    options = dict(batch=len(PROMPTS), slots=64) if store == "static" else {}
    got = tokens_of(decoder, PROMPTS, eos_ids=[eos], cache=decoder.new_cache(store, **options))
    assert [len(g) > 0 for g in got] == [True] * len(PROMPTS)
    if store != "quantized": assert got == stopped


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
    monkeypatch.setattr(
        type(decoder),
        "hidden",
        lambda self, tokens, *a, **kw: (shapes.append(tuple(tokens.shape)), hidden(self, tokens, *a, **kw))[1],
    )
    handle = decoder.lm_head.register_forward_hook(lambda m, args, out: head.append(tuple(args[0].shape[:-1])))
    tokens_of(decoder, PROMPTS, eos_ids=[eos])
    handle.remove()
    running = [sum(len(w) > step for w in stopped) for step in range(max(map(len, stopped)))]
    assert shapes == [(len(PROMPTS), max(map(len, PROMPTS)))] + [(n, 1) for n in running[1:]], (
        "more work than one token per running row"
    )
    assert head == [(n,) for n in running], "the output matrix must see one position per row"


@pytest.mark.parametrize("prompts, n, error, words", [
    ([[1, 2], []], 5, ContextLengthError, "Prompt 1 is empty"), ([], 5, ContextLengthError, "no prompt"),
    ([[1] * 60], 10, ContextLengthError, "at most 4"),
    ([[1] * 64], 1, ContextLengthError, "by at least 1 token"), ([[1] * 90], 1, ContextLengthError, "by at least 27"),
    ([[1]], 0, InputError, "at least 1"),
    ([[1, 97]], 5, InputError, "outside"), ([[-1]], 5, InputError, "outside"), (["a text"], 5, InputError, "encode it"),
    ([["a"]], 5, InputError, "outside"), ([[1]], 2.5, InputError, "max_new_tokens is 2.5"),
    ([[1]], "9", InputError, "'9'")])
def test_bad_input_raises_at_the_call(oracle, monkeypatch, prompts, n, error, words):
    monkeypatch.setattr(type(oracle[0]), "hidden", lambda *a: pytest.fail("work started before the input was checked"))
    with pytest.raises(error, match=words): generate_tokens(oracle[0], prompts, max_new_tokens=n)


@pytest.mark.parametrize("seed", ["a", 1.5, -1, True])
def test_a_seed_that_is_none_is_refused(oracle, seed):
    with pytest.raises(InputError, match="seed is"): generate_tokens(oracle[0], PROMPTS, max_new_tokens=5, seed=seed)


def test_the_whole_context_can_be_used(oracle):
    assert [len(t) for t in tokens_of(oracle[0], [[1] * 40, [2] * 10], max_new_tokens=24)] == [24, 24]


def test_nan_weights_are_named(oracle):
    broken = Decoder.from_transformers(tiny(seed=2))
    with torch.no_grad(): broken.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(WorkbenchError, match="NaN"): tokens_of(broken, PROMPTS[:2])


# --- text: a scripted model and a tokenizer that cuts where it hurts ------------------------------------------------

class Pieces:
    "A tokenizer over given byte strings; id 0 is the end token."
    eos_ids, eos_id = [0], 0
    def __init__(self, pieces): self.pieces = [b"<end>", *pieces]
    def encode(self, text, special=False):
        return [1 + self.pieces[1:].index(text[i:i + 1].encode()) for i in range(len(text))]
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
        assert all(pieces) and not any("\ufffd" in p for p in pieces), (
            "a character was split, or an empty piece was streamed"
        )


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


@pytest.mark.parametrize("mutant", [OnlyAtTheEnd, KeepsTheStopString, HoldsTooLittle, ForgetsWhatItHeld,
                                    FirstInTheList])
def test_wrong_stop_condition_is_rejected(monkeypatch, mutant):
    monkeypatch.setattr(generation, "StopStrings", mutant)
    with pytest.raises(AssertionError): text_is_the_definition()


def test_invalid_bytes_become_replacement_characters():
    lm = LM(Script([1, 2, 3], 4), Pieces([b"a", b"\xf0\x9f", b"b"]), None)
    assert lm.generate([1], max_new_tokens=3).text == "a\ufffdb"
    assert lm.generate([1], max_new_tokens=2).text == "a\ufffd", "bytes of an unfinished character must not vanish"


def test_empty_stop_string_and_unknown_settings_are_refused():
    lm, n = scripted("abab", random.Random(0))
    for call in (lm.generate, lm.stream, lm.chat):
        with pytest.raises(InputError, match="empty"): call("a", stop=["b", ""])
    with pytest.raises(InputError, match="temperature"): lm.generate("a", temperature=-1)
    with pytest.raises(TypeError): lm.stream("a", temprature=1)
    with pytest.raises(ContextLengthError, match="empty"): lm.generate("")


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


# --- the real model -------------------------------------------------------------------------------------------------

def test_real_model_batch_equals_alone_and_stream_equals_chat(lm):
    questions = ["Why is the sky blue?", "안녕하세요! 한국어로 인사해 주세요.", "Write one emoji.", "What is the capital of Peru?"]
    ids = [lm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
    batch = lm.generate(ids, max_new_tokens=16)
    for row, prompt, question in zip(batch, ids, questions):
        assert row == lm.generate(prompt, max_new_tokens=16), f"{question!r}: another answer in company than alone"
        pieces = list(lm.stream(question, max_new_tokens=16))
        assert "".join(pieces) == row.text, f"{question!r}: the streamed pieces are not the answer"
        if not row.text.endswith("\ufffd"): assert not any("\ufffd" in p for p in pieces), "a character was split"
    assert lm.chat(questions[0], max_new_tokens=16) == batch[0].text
    drawn = lm.generate(ids[:2], max_new_tokens=8, temperature=0.8, top_p=0.9, seed=5)
    assert drawn == [
        lm.generate(p, max_new_tokens=8, temperature=0.8, top_p=0.9, seed=5 + i) for i, p in enumerate(ids[:2])
    ]


def test_real_model_refuses_a_prompt_beyond_its_context(lm):
    with pytest.raises(ContextLengthError, match="8192"): lm.stream("word " * 9000)
