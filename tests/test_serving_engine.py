"""The engine: every text is what it would be alone, whatever happens around it; nothing is lost, nothing leaks; planted
mistakes are noticed."""
import asyncio
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.errors import ContextLengthError, InputError, Overloaded, UnsupportedError, WorkbenchError
from llm_workbench.finetuning.lora import LoRAConfig, adapt, trainable
from llm_workbench.finetuning.many import many, using
from llm_workbench.inference.generation import LM
from llm_workbench.serving import engine as module
from llm_workbench.serving.engine import Engine, Piece, Request, Runner, Text, Unavailable
from llm_workbench.serving.paged_kv import page_bytes

FAMILIES = [(family, i) for family, variants in SMALL.items() for i in range(len(variants))]
WARM = dict(temperature=0.9, top_p=0.95)


class Numbers:
    "A tokenizer whose tokens are numbers with a blank behind them."
    eos_ids = (5,)
    def stream(self): return SimpleNamespace(push=lambda token: f"{token} ", flush=lambda: "")


def model(family="llama", variant=0):
    "In float64, so that nothing hangs on a rounding."
    return LM(Decoder.from_transformers(small_model(family, variant)).double(), Numbers(), None)


@pytest.fixture(scope="module")
def llama(): return model()


def pages_of(lm, n, page=4): return n * sum(page_bytes(lm.decoder.config, page, lm.decoder.dtype).values())


def asked(seed, n=7, most=64, **more):
    "Requests of all kinds whose prompts sometimes begin alike."
    rng = random.Random(seed)
    beginnings = [[rng.randrange(97) for _ in range(12)] for _ in range(2)]
    def one(i):
        prompt = rng.choice([[], *beginnings]) + [rng.randrange(97) for _ in range(rng.randint(1, 16))]
        options = rng.choice([{}, WARM, dict(temperature=1.0, top_k=7), dict(temperature=.7, repetition_penalty=1.3)])
        return Request(prompt, rng.randint(1, min(14, most - len(prompt))), options, seed=100 * seed + i,
                       n=rng.choice([1, 1, 2]), stop=rng.choice([(), (" 4", "7 1"), ("9",)]),
                       priority=rng.randint(0, 1), tenant=rng.choice("ab"), **more)
    return [one(i) for i in range(n)]


def alone(lm, request):
    "The texts of a request through the ordinary loop, which knows no engine."
    settings = dict(max_new_tokens=request.max_new_tokens, stop=request.stop, temperature=0.0) | request.sampling
    return [lm.generate(request.prompt, seed=request.seed + i, **settings) for i in range(request.n)]


def served(engine, requests, rng):
    "The pieces of every text, of requests that come while others are being written."
    todo, pieces, ids = list(requests), {}, {}
    while todo or engine.busy:
        while todo and rng.random() < .5:
            ids[engine.add(todo[0])] = len(requests) - len(todo)
            todo.pop(0)
        for id, news in engine.step().items():
            for piece in news: pieces.setdefault((ids[id], piece.index), []).append(piece)
        engine.scheduler.check()
    return pieces


def differences(lm, requests, engine, seed=0):
    "Texts that are not what they are alone."
    pieces, wrong = served(engine, requests, random.Random(seed)), []
    for i, request in enumerate(requests):
        for j, want in enumerate(alone(lm, request)):
            mine = pieces[i, j]
            got = "".join(p.text for p in mine), [t for p in mine for t in p.tokens], mine[-1].reason
            if got != (want.text, want.tokens, want.reason) or any(p.reason for p in mine[:-1]): wrong.append((i, j))
    assert not any(any(pool.holders) for pool in engine.cache.tables.pools.values()), "pages are held by nobody"
    return wrong


@pytest.mark.parametrize("family, variant", FAMILIES)
def test_every_family_writes_what_it_writes_alone(family, variant):
    lm = model(family, variant)
    most = lm.decoder.config.max_position_embeddings
    requests = asked(3, 4, most) if most > 40 else [Request([3, 4, 5], 4, seed=1), Request([9, 8], 5, WARM, seed=2)]
    assert differences(lm, requests, Engine(lm, memory=pages_of(lm, 60), page=4, budget=11, most=4)) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [dict(pages=14, budget=6), dict(pages=40, budget=9, most=3),
                                     dict(pages=60, budget=64), dict(pages=24, budget=8, speculate=3)], ids=str)
def test_random_crowds(llama, seed, options):
    options = dict(most=5) | options
    engine = Engine(llama, memory=pages_of(llama, options.pop("pages")), page=4, **options)
    assert differences(llama, asked(seed), engine, seed) == []


def test_pages_that_lack_cost_steps_and_nothing_else(llama):
    engine = Engine(llama, memory=pages_of(llama, 9), page=4, budget=12, most=5)
    assert differences(llama, asked(1, 9), engine) == [] and engine.scheduler.preemptions > 0


def test_guesses_save_steps(llama):
    request = Request([1, 2, 3, 4] * 5, 40, stop_at_eos=False)
    plain, ahead = (Engine(llama, memory=pages_of(llama, 60), page=4, speculate=n) for n in (0, 4))
    assert plain.complete([request])[0][0].tokens == ahead.complete([request])[0][0].tokens
    assert ahead.counts["accepted_tokens"] > 0 and ahead.steps == plain.steps - ahead.counts["accepted_tokens"]


@pytest.mark.parametrize("kv", ["int8", "fp8", torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "mistral"])
def test_narrow_keys_are_the_same_in_a_crowd(family, kv):
    lm, requests = model(family), asked(2, 4)
    def run(requests): return Engine(lm, memory=pages_of(lm, 80), page=4, kv=kv, budget=64).complete(requests)
    single = [run([request])[0] for request in requests]
    assert [[t.tokens for t in texts] for texts in run(requests)] == [[t.tokens for t in texts] for texts in single]


def test_log_probabilities_of_prompt_and_text(llama):
    prompt = [7, 3, 9, 11, 2, 8, 1, 30]
    asked = [Request([*prompt, 12], 5, WARM, 4, prompt_logprobs=2, logprobs=3, stop_at_eos=False),
             Request([*prompt, 13], 4, logprobs=0), Request([*prompt, 14], 1, prompt_logprobs=0)]
    engine = Engine(llama, memory=pages_of(llama, 13), page=4, budget=4, most=3)      # tokens are computed twice
    found = {id: [] for id in map(engine.add, asked)}
    while engine.busy:
        for id, pieces in engine.step().items(): found[id] += pieces
    for request, pieces in zip(asked, found.values()):
        tokens = request.prompt + [t for p in pieces for t in p.tokens]
        want = llama.decoder(torch.tensor([tokens]))[0].log_softmax(-1)
        if request.prompt_logprobs is not None:
            first, *scores = pieces[0].prompt_logprobs
            assert (first.token, first.logprob) == (tokens[0], None) and [s.token for s in scores] == request.prompt[1:]
            for i, s in enumerate(scores):
                assert abs(s.logprob - want[i, s.token].item()) < 1e-5
                assert [t for t, _ in s.top] == want[i].topk(request.prompt_logprobs).indices.tolist()
        if request.logprobs is None: continue
        scores = [s for p in pieces for s in p.logprobs]
        assert [s.token for s in scores] == tokens[len(request.prompt):]
        for i, s in enumerate(scores, len(request.prompt) - 1):
            assert abs(s.logprob - want[i, s.token].item()) < 1e-5 and len(s.top) == request.logprobs


def test_rules_and_biases_are_of_one_text(llama):
    def only_40(rows, logits): return logits.where(torch.arange(97) == 40, -torch.inf)
    def broken(rows, logits): raise InputError("this rule is broken")
    def nothing(rows, logits): return torch.full_like(logits, -torch.inf)
    prompt = [4, 8, 15]
    free, ruled, biased, bad, none = (Request(prompt, 3, stop_at_eos=False, **more) for more in (
        {}, dict(mask=only_40), dict(bias={41: 1e4}), dict(mask=broken), dict(mask=nothing)))
    engine = Engine(llama, memory=pages_of(llama, 60), page=4)
    want = alone(llama, Request(prompt, 3, seed=0))[0].tokens
    texts, errors = {engine.add(r): [] for r in (free, ruled, biased, bad, none)}, {}
    while engine.busy:
        for id, pieces in engine.step().items():
            texts[id] += pieces[0].tokens
            if pieces[0].error: errors[id] = str(pieces[0].error)
    assert list(texts.values()) == [want, [40] * 3, [41] * 3, [], []]
    assert list(errors) == [3, 4] and "broken" in errors[3] and "nothing that may be written" in errors[4]


def test_each_text_has_its_adapter(llama):
    base, adapted = llama.decoder, {}
    for i, name in enumerate("ab"):
        adapted[name] = adapt(base, LoRAConfig(r=2, targets=("q_proj", "down_proj", "lm_head")), i).double()
        with torch.no_grad():
            g = torch.Generator().manual_seed(i)
            for p in trainable(adapted[name]).values(): p.add_(torch.randn(p.shape, generator=g) * .3)
    together = LM(many(base, adapted), Numbers(), None)
    engine = Engine(together, memory=pages_of(llama, 60), page=4, budget=9, adapters=using)
    requests = [Request([4, 8, 15, 16, 23, 42], 8, adapter=name, seed=i, prompt_logprobs=0)
                for i, name in enumerate(["a", None, "b", "a"])]
    got = [texts[0].tokens for texts in engine.complete(requests)]
    want = [alone(LM(adapted.get(r.adapter, base), Numbers(), None), r)[0].tokens for r in requests]
    assert got == want and len(set(map(tuple, got))) == 3
    with pytest.raises(UnsupportedError, match="'a'"): Engine(llama, memory=pages_of(llama, 60)).add(requests[0])


def test_beginnings_are_shared_within_a_salt_and_an_adapter_only(llama):
    engine, prompt = Engine(llama, memory=pages_of(llama, 60), page=4), list(range(20, 41))
    def cached(**more):
        id, pieces = engine.add(Request(prompt, 2, **more)), []
        while engine.busy: pieces += engine.step().get(id, [])
        return pieces[0].cached
    assert [cached(), cached(), cached(salt="x"), cached(salt="x"), cached(prompt_logprobs=0)] == [0, 20, 0, 20, 0]


def test_a_step_that_fails_loses_nothing(llama, monkeypatch):
    engine, request = Engine(llama, memory=pages_of(llama, 60), page=4), Request([4, 8, 15, 16, 23], 9, WARM, seed=3)
    want, forward, calls = alone(llama, request)[0].tokens, engine.forward, []
    def failing(pieces):
        calls.append(1)
        if len(calls) in (1, 4, 5): raise RuntimeError("out of memory")
        return forward(pieces)
    monkeypatch.setattr(engine, "forward", failing)
    tokens, id = [], engine.add(request)
    while engine.busy:
        try: tokens += [t for p in engine.step().get(id, []) for t in p.tokens]
        except RuntimeError: engine.scheduler.check()
    assert tokens == want


@pytest.mark.parametrize("bad, error, words", [
    (dict(prompt=[]), InputError, "empty"), (dict(prompt=[97]), InputError, "97"),
    (dict(prompt="text"), InputError, "ids"),
    (dict(max_new_tokens=0), InputError, "max_new_tokens"), (dict(max_new_tokens=62), ContextLengthError, "context"),
    (dict(sampling=dict(temperature=-1)), InputError, "temperature"), (dict(n=0), InputError, "n is 0"),
    (dict(logprobs=98), InputError, "logprobs"), (dict(stop=("",)), InputError, "stop string"),
    (dict(seed=-1), InputError, "seed"),
    (dict(bias={97: 1.0}), InputError, "bias")], ids=str)
def test_what_cannot_be_done_is_refused_when_it_comes(llama, bad, error, words):
    engine = Engine(llama, memory=pages_of(llama, 60), page=4)
    with pytest.raises(error, match=words): engine.add(Request(**dict(prompt=[1, 2, 3], max_new_tokens=4) | bad))
    assert not engine.busy and not engine.scheduler.waiting


def test_of_several_texts_all_are_taken_or_none(llama):
    engine = Engine(llama, memory=pages_of(llama, 60), page=4, most=1, queue=2)
    engine.add(Request([1, 2], 3))
    with pytest.raises(Overloaded): engine.add(Request([1, 2], 3, n=3))
    assert len(engine.scheduler.waiting) == len(engine.texts) == 1


# --- the thread -------------------------------------------------------------------------------------------------------

def runner(lm, **options): return Runner(Engine(lm, **dict(memory=pages_of(lm, 60), page=4) | options))
def held(runner): return sum(sum(pool.holders) for pool in runner.engine.cache.tables.pools.values())

def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(.005)


def test_many_threads_at_once(llama):
    requests, got = asked(5, 24), {}
    with runner(llama, most=6, budget=16) as run:
        def ask(i):
            for piece in run.stream(requests[i]): got.setdefault((i, piece.index), []).extend(piece.tokens)
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert held(run) == 0
    assert got == {(i, j): text.tokens for i, r in enumerate(requests) for j, text in enumerate(alone(llama, r))}


def test_who_leaves_frees_pages_within_a_step(llama):
    with runner(llama) as run:
        pieces = run.stream(Request([1, 2, 3], 60, stop_at_eos=False))
        next(pieces)
        assert held(run) > 0
        pieces.close()
        until(lambda: held(run) == 0 and not run.engine.busy)
        assert run.stats()["request_success_total"]["left"] == 1


def test_in_an_event_loop(llama):
    async def main():
        with runner(llama) as run:
            async def one(seed):
                return [t async for p in run.pieces(Request([1, 2, 3], 8, WARM, seed=seed)) for t in p.tokens]
            async def leave():
                pieces = run.pieces(Request([1, 2, 3], 60, stop_at_eos=False))
                async for piece in pieces: break
                await pieces.aclose()
            got, *_ = await asyncio.gather(asyncio.gather(*map(one, range(5))), leave())
            until(lambda: held(run) == 0)
            return got
    assert asyncio.run(main()) == [alone(llama, Request([1, 2, 3], 8, WARM, seed=seed))[0].tokens for seed in range(5)]


def test_a_flood_is_refused_at_once(llama):
    with runner(llama, most=2, queue=3) as run:
        blocked = threading.Event()
        run.call(blocked.wait)                                  # nothing moves
        kept = [run.stream(Request([1, 2, 3], 4)) for _ in range(5)]
        with pytest.raises(Overloaded) as e: run.submit(Request([1, 2, 3], 4), print)
        assert e.value.retry_after > 0
        blocked.set()
        assert all([list(pieces)[-1].reason for pieces in kept])
        assert list(run.stream(Request([1, 2, 3], 4)))[-1].reason


def test_a_listener_that_fails_is_alone_with_it(llama):
    with runner(llama) as run:
        def bad(piece): raise ValueError("no")
        run.submit(Request([1, 2, 3], 50, stop_at_eos=False), bad)
        assert list(run.stream(Request([4, 5], 4)))[-1].reason in ("stop", "length")
        until(lambda: not run.engine.busy)
        assert run.alive and not run.open


def test_the_death_of_an_engine_is_told_to_all(llama, monkeypatch):
    run = runner(llama)
    streams = [run.stream(Request([1, 2, 3], 60, stop_at_eos=False, n=2)) for _ in range(3)]
    for pieces in streams: next(pieces)
    def die(pieces): raise RuntimeError("the GPU fell off the bus")
    monkeypatch.setattr(run.engine, "forward", die)
    for pieces in streams:
        *_, last = pieces
        assert last.reason == "error" and "fell off" in str(last.error)
    assert not run.alive
    with pytest.raises(Unavailable, match="fell off"): run.submit(Request([1], 1), print)


def test_draining_finishes_what_was_begun(llama):
    run = runner(llama)
    pieces = run.stream(Request([1, 2, 3], 40, stop_at_eos=False))
    done = threading.Thread(target=run.drain)
    done.start()
    until(lambda: run.draining)
    with pytest.raises(Unavailable): run.submit(Request([1], 1), print)
    assert sum(len(p.tokens) for p in pieces) == 40
    done.join(10)
    run.close()
    assert not done.is_alive() and not run.thread.is_alive()


def test_closing_ends_what_is_open(llama):
    run = runner(llama)
    pieces = run.stream(Request([1, 2, 3], 60, stop_at_eos=False))
    next(pieces)
    run.close()
    *_, last = pieces
    assert last.reason == "error" and isinstance(last.error, Unavailable)


# --- planted mistakes -------------------------------------------------------------------------------------------------

def token_streamed_twice(self):
    piece = PIECE(self)
    self.told = max(0, self.told - 1)
    return piece

def stop_string_across_a_border(self, *args):
    INIT(self, *args)
    write = self.writer.write
    def careless():
        text = write() + self.writer.stop.flush()
        return text
    self.writer.write = careless

def generator_of_all(self, *args):
    INIT(self, *args)
    self.generator = SHARED

def guess_taken_without_a_look(self, texts, logits):
    CHOOSE(self, texts, logits)
    for text in texts:
        if text.job.guesses and text.row.reason is None: text.row.tokens[-1] = text.job.tokens[-1] = text.job.guesses[0]

def wrong_guess_kept(self, text, made): text.job.computed = min(text.job.computed, len(text.job.tokens) - 1)

def places_of_the_neighbour(self, due, hidden): return DECIDE(self, due, hidden.roll(1, 0))

PIECE, INIT, CHOOSE, DECIDE, SHARED = Text.piece, Text.__init__, Engine.choose, Engine.decide, torch.Generator()

@pytest.mark.parametrize("where, name, mutant", [
    (Text, "piece", token_streamed_twice), (Text, "__init__", stop_string_across_a_border),
    (Text, "__init__", generator_of_all), (Engine, "choose", guess_taken_without_a_look),
    (Engine, "settle", wrong_guess_kept),
    (Engine, "decide", places_of_the_neighbour)], ids=lambda x: getattr(x, "__name__", str(x)))
def test_mistakes_are_noticed(llama, where, name, mutant, monkeypatch):
    monkeypatch.setattr(where, name, mutant)
    make = lambda: Engine(llama, memory=pages_of(llama, 40), page=4, budget=9, speculate=3)
    try: wrong = [differences(llama, asked(seed), make(), seed) for seed in range(3)]
    except (AssertionError, WorkbenchError, IndexError): return
    assert any(wrong)
