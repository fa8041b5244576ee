"`TransformersLM` against our `LM`: texts, draws, stop strings, scores, threads that end; wrong variants are rejected."
import gc
import itertools
import random
import threading

import pytest
import torch
from checks import same_text

from llm_workbench import Decoder
from llm_workbench.errors import ContextLengthError, InputError, SourceError
from llm_workbench.inference import transformers as chapter
from llm_workbench.inference.generation import LM
from llm_workbench.inference.sampling import Sampler
from llm_workbench.inference.transformers import TransformersLM, Words, ending_ids

PROMPTS = ["Hello", "One, two, three,", "안녕 👩‍🚀", "def f(x):\n    ", "<|im_start|>user\nhi<|im_end|>\n"]
N = 24


@pytest.fixture(scope="module")
def pair(lm, hf_tokenizer, random_llama):
    "The same small random model in transformers and in ours, with the embedded model's tokenizer."
    return TransformersLM(random_llama, hf_tokenizer, eos_ids=lm.tokenizer.eos_ids), LM(
        Decoder.from_transformers(random_llama), lm.tokenizer, lm.card)


def workers(): return [t for t in threading.enumerate() if t.name == "transformers.generate"]


# --- texts ------------------------------------------------------------------------------------------------------------

def writes_as_ours(theirs, ours):
    rng = random.Random(0)
    for prompt in PROMPTS:
        want = same_text(theirs, ours, prompt, N)
        end = want.tokens[N // 2]
        for eos in (theirs.words.eos_ids, [end]):                       # a token that does come ends the text
            theirs.words.eos_ids, before = eos, theirs.words.eos_ids
            ours.tokenizer.eos_ids, own = eos, ours.tokenizer.eos_ids
            try:
                got = theirs.generate(prompt, max_new_tokens=N)
                assert got == ours.generate(prompt, max_new_tokens=N), "the end token is seen elsewhere"
            finally: theirs.words.eos_ids, ours.tokenizer.eos_ids = before, own
        if len(want.text) < 4: continue
        at = rng.randrange(1, len(want.text) - 2)
        stop = [want.text[at:at + 3], "never comes"]
        got = theirs.generate(prompt, max_new_tokens=N, stop=stop)
        assert got == ours.generate(prompt, max_new_tokens=N, stop=stop), f"cut elsewhere at {stop}"
        assert "".join(theirs.stream(prompt, template=False, max_new_tokens=N, stop=stop)) == got.text


def draws_as_ours(theirs, ours):
    settings = [dict(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in
                itertools.product((0.7, 1.6), (None, 30), (None, 0.9), (None, 0.05))]
    for seed, how in enumerate(settings):
        torch.rand(seed)                                                # the process's generator must not matter
        want = ours.generate(PROMPTS[seed % 5], max_new_tokens=8, seed=seed, **how)
        assert theirs.generate(PROMPTS[seed % 5], max_new_tokens=8, seed=seed, **how) == want, f"other draws with {how}"


def test_texts(pair): writes_as_ours(*pair)
def test_draws(pair): draws_as_ours(*pair)


def test_two_streams_at_once_keep_their_seeds(pair):
    theirs, _ = pair
    how = [dict(max_new_tokens=12, temperature=1.0, seed=seed, template=False) for seed in (1, 2)]
    want = ["".join(theirs.stream("Hello", **h)) for h in how]
    both = [theirs.stream("Hello", **h) for h in how]
    got = ["".join(pieces) for pieces in zip(*itertools.zip_longest(*both, fillvalue=""))]
    assert got == want and want[0] != want[1]


def follows_only_the_call(theirs, ours):
    model = theirs.source
    want = ours.generate("Hello", max_new_tokens=N)
    wishes = dict(repetition_penalty=1.8, suppress_tokens=want.tokens[2:4], do_sample=True, temperature=3.0)
    kept = {k: getattr(model.generation_config, k) for k in wishes}
    try:
        for k, v in wishes.items(): setattr(model.generation_config, k, v)
        assert theirs.generate("Hello", max_new_tokens=N) == want, "the folder's wishes"
        assert model.generation_config.repetition_penalty == 1.8, "the given model was changed"
    finally:
        for k, v in kept.items(): setattr(model.generation_config, k, v)


@pytest.fixture(scope="module")
def wished(pair, random_llama):
    pair[0].source = random_llama
    return pair


def test_wishes_of_the_folder(wished): follows_only_the_call(*wished)


def test_the_real_model(lm, hf_model, hf_tokenizer):
    theirs = TransformersLM(hf_model, hf_tokenizer, eos_ids=lm.tokenizer.eos_ids)
    for prompt in ("The capital of France is", "안녕하세요"):
        assert theirs.generate(prompt, max_new_tokens=10) == lm.generate(prompt, max_new_tokens=10)
    assert theirs.chat("Who are you?", max_new_tokens=8) == lm.chat("Who are you?", max_new_tokens=8)
    assert ending_ids(hf_model, hf_tokenizer) == [2]


# --- threads ----------------------------------------------------------------------------------------------------------

def nobody_stays(theirs):
    passes = []
    hook = theirs.model.model.register_forward_hook(lambda *_: passes.append(1))
    try: _nobody_stays(theirs)
    finally: hook.remove()
    assert len(passes) < 100, f"{len(passes)} passes of the model for a dozen pieces: nobody told it to stop"


def _nobody_stays(theirs):
    theirs.stream("Hello", template=False, max_new_tokens=250)          # never read: never started
    assert not workers(), "a thread was started for nobody"
    for n in (1, 3):
        stream = theirs.stream("Hello", template=False, max_new_tokens=250)
        for _ in range(n): next(stream)
        assert len(workers()) == 1, "it was over too early for this test"
        stream.close()
        assert not workers(), "the thread goes on after close()"
    stream = theirs.stream("Hello", template=False, max_new_tokens=250)
    next(stream)
    del stream
    gc.collect()
    assert not workers(), "the thread goes on when the iterator is forgotten"
    with pytest.raises(ZeroDivisionError):
        for _ in theirs.stream("Hello", template=False, max_new_tokens=250): 1 / 0
    gc.collect()
    assert not workers(), "the thread goes on after an error of the reader"
    list(theirs.stream("Hello", template=False, max_new_tokens=3))
    assert not workers()


def errors_arrive(theirs):
    class Fails(torch.nn.Module):
        calls = 0
        def forward(self, x):
            self.calls += 1
            if self.calls == 4: raise RuntimeError("the fourth call")
            return x
    norm, theirs.model.model.norm = theirs.model.model.norm, torch.nn.Sequential(theirs.model.model.norm, Fails())
    got, stream = [], theirs.stream("Hello", template=False, max_new_tokens=9)
    done = threading.Event()
    def read():
        try:
            for piece in stream: got.append(piece)
        except RuntimeError as e: got.append(e)
        done.set()
    try:
        reader = threading.Thread(target=read, daemon=True)             # a reader that hangs must not hang this test
        reader.start()
        assert done.wait(3), "the reader waits for ever"
        assert isinstance(got[-1], RuntimeError) and len(got) > 1, "the error did not arrive, or what came before it"
        assert not workers()
    finally: theirs.model.model.norm = norm


def test_no_thread_stays(pair): nobody_stays(pair[0])
def test_errors_reach_the_reader(pair): errors_arrive(pair[0])


# --- scores -----------------------------------------------------------------------------------------------------------

PAIRS = [("The sky is", " blue"), ("The sky is ", "blue"), ("super", "market"), ("", "Hello there"),
         ("a", " b c d e f")]


def scores_as_ours(theirs, ours):
    for pair, a, b in zip(PAIRS, theirs.loglikelihood(PAIRS), ours.loglikelihood(PAIRS), strict=True):
        assert (a.tokens, a.greedy) == (b.tokens, b.greedy), pair
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4), pair
        assert a.total == pytest.approx(sum(b.logprobs), abs=1e-3), pair
    greedy = ours.generate("Hello", max_new_tokens=1).text
    assert theirs.loglikelihood([("Hello", greedy)])[0].greedy


def test_scores(pair): scores_as_ours(*pair)


def test_long_contexts_lose_their_beginning(pair):
    theirs, ours = pair
    long = ("word " * 400, "and so on")
    assert theirs.loglikelihood([long])[0].total == pytest.approx(ours.loglikelihood([long])[0].total, abs=1e-3)
    with pytest.raises(ContextLengthError, match="context of this model 256"): theirs.loglikelihood([("a", " b" * 300)])


# --- what is refused --------------------------------------------------------------------------------------------------

def test_bad_input(pair, tmp_path, random_llama):
    theirs, _ = pair
    for settings, words in ((dict(temperature=-1), "temperature"), (dict(top_k=0), "top_k"), (dict(seed="a"), "seed"),
                            (dict(stop=["a", ""]), "stop string"), (dict(max_new_tokens=0), "max_new_tokens")):
        for call in (theirs.generate, theirs.stream, theirs.chat):
            with pytest.raises(InputError, match=words): call("a", **{"max_new_tokens": 4, **settings})
    with pytest.raises(ContextLengthError, match="256"): theirs.stream("word " * 300)
    with pytest.raises(TypeError): theirs.stream("a", temprature=1)
    for bad in ("", [], 5, None, [[1]], [10**9]):
        with pytest.raises(InputError): theirs.generate(bad, max_new_tokens=4)
    with pytest.raises(InputError, match="chat template"): theirs.chat([{"role": "user"}, 7])
    for bad in ([("a",)], [("a", "")], [(1, "b")]):
        with pytest.raises((InputError, TypeError)): theirs.loglikelihood(bad)
    for source in (tmp_path / "no", "/no/where/at/all", tmp_path / "no.gguf", tmp_path):
        with pytest.raises(SourceError, match="not there|cannot open"): TransformersLM(source)
    with pytest.raises(InputError, match="tokenizer"): TransformersLM(random_llama)
    with pytest.raises(InputError, match="too late"): TransformersLM(random_llama, theirs.words.tokenizer, dtype="auto")
    with pytest.raises(InputError, match="end token"): Words(theirs.words.tokenizer, ["a"])


def test_a_folder_opens(pair, tmp_path, random_llama):
    theirs, _ = pair
    random_llama.save_pretrained(tmp_path)
    theirs.words.tokenizer.save_pretrained(tmp_path)
    again = TransformersLM(tmp_path, eos_ids=theirs.words.eos_ids, dtype=torch.float32)
    assert again.generate("Hello", max_new_tokens=8) == theirs.generate("Hello", max_new_tokens=8)


# --- mutants ----------------------------------------------------------------------------------------------------------

def filters_in_another_order(monkeypatch):
    "The temperature comes last, as in llama.cpp."
    right = chapter.processors
    def wrong(sampler, generators):
        made = right(sampler, generators)
        return [*made[1:-1], made[0], made[-1]] if made else made
    monkeypatch.setattr(chapter, "processors", wrong)


def the_seed_of_the_process(monkeypatch):
    right = chapter.processors
    monkeypatch.setattr(chapter, "processors", lambda sampler, generators: right(sampler, None))


def noise_before_the_filters(monkeypatch):
    right = chapter.processors
    def wrong(sampler, generators):
        made = right(sampler, generators)
        return [made[-1], *made[:-1]] if made else made
    monkeypatch.setattr(chapter, "processors", wrong)


def the_row_of_the_token_itself(monkeypatch):
    right = TransformersLM._scored
    def wrong(self, first, rest): return right(self, first + rest[:1], [*rest[1:], rest[-1]][:len(rest)])
    monkeypatch.setattr(TransformersLM, "_scored", wrong)


def the_stop_string_stays(monkeypatch): monkeypatch.setattr(chapter, "check_stop", lambda stop: ())


def nobody_tells_the_thread(monkeypatch):
    right = TransformersLM._write
    monkeypatch.setattr(TransformersLM, "_write", lambda self, *args: right(self, *args[:5], left=None))


def nobody_waits_for_the_thread(monkeypatch):
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: None)


def the_error_stays_in_the_thread(monkeypatch):
    right = TransformersLM._write
    def wrong(self, *args, **more):
        try: right(self, *args, **more)
        except RuntimeError: threading.Event().wait(4)
    monkeypatch.setattr(TransformersLM, "_write", wrong)


MUTANTS = [(filters_in_another_order, draws_as_ours), (the_seed_of_the_process, draws_as_ours),
           (noise_before_the_filters, draws_as_ours), (the_row_of_the_token_itself, scores_as_ours),
           (the_stop_string_stays, writes_as_ours), (nobody_tells_the_thread, nobody_stays),
           (nobody_waits_for_the_thread, nobody_stays), (the_error_stays_in_the_thread, errors_arrive)]


@pytest.mark.parametrize("mutant, check", MUTANTS, ids=lambda f: f.__name__)
def test_wrong_variants_are_rejected(pair, monkeypatch, mutant, check):
    mutant(monkeypatch)
    arguments = pair[:1] if check in (nobody_stays, errors_arrive) else pair
    with pytest.raises(AssertionError): check(*arguments)
    monkeypatch.undo()
    for thread in workers(): thread.join(20)


def test_a_model_with_its_own_wishes_is_rejected(wished, random_llama, hf_tokenizer, lm):
    naive = TransformersLM(random_llama, hf_tokenizer, eos_ids=lm.tokenizer.eos_ids)
    naive.model, naive.source = random_llama, random_llama              # not the copy without wishes
    with pytest.raises(AssertionError): follows_only_the_call(naive, wished[1])


def test_unknown_settings_of_a_sampler():
    assert chapter.processors(Sampler(temperature=0.0), None) == []
