"""`LlamaCppLM` against our `LM`: equal in float32, and within the noise of 8-bit inputs on the Q4_1 file.

Wrong variants are rejected."""
import math
import subprocess
import sys

import pytest
import torch
from checks import same_text

from llm_workbench import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import CheckpointError, ContextLengthError, InputError, SourceError, UnsupportedError
from llm_workbench.inference import llama_cpp as chapter
from llm_workbench.inference.generation import LM
from llm_workbench.inference.llama_cpp import KV_TYPES, LlamaCppLM, chain, kv_number, piece_of
from llm_workbench.inference.sampling import Sampler, min_p, temperature, top_k, top_p
from llm_workbench.quantization.gguf_writing import save_gguf

C = pytest.importorskip("llama_cpp", reason="llama.cpp is not here (it may still be being compiled)")
PROMPTS = ["Hello", "One, two, three,", "안녕 👩‍🚀", "def f(x):\n    ", "<|im_start|>user\nhi<|im_end|>\n"]
PAIRS = [("The sky is", " blue"), ("The sky is ", "blue"), ("The sky is", " full of clouds today"), ("super", "market"),
         ("", "Hello there"), ("a", " b c d e f"), ("The sky", " is green")]
PROSE = ("The old lighthouse stood at the end of a narrow path. Every evening the keeper climbed its stairs, lit the "
         "lamp and wrote down which ships had passed. Nobody ever read his book, but he did not mind; counting was his "
         "way of talking to the sea. One day in autumn a letter arrived, and it had no stamp.")
N = 24


@pytest.fixture(scope="module")
def tiny(lm, random_llama, tmp_path_factory):
    "A small random model as float32 GGUF in llama.cpp, with batches of 8 tokens, and in ours."
    ours = LM(Decoder.from_transformers(random_llama), lm.tokenizer, lm.card)
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    save_gguf(ours, path, "F32")
    theirs = LlamaCppLM(path, context=512, kv_type="f32", threads=2, n_batch=8, eos_ids=lm.tokenizer.eos_ids)
    yield theirs, ours
    theirs.close()


@pytest.fixture(scope="module")
def cpp(lm, gguf_path):
    model = LlamaCppLM(gguf_path, context=512, threads=2, eos_ids=lm.tokenizer.eos_ids)
    yield model
    model.close()


# --- texts, where nothing is rounded ----------------------------------------------------------------------------------

def writes_as_ours(theirs, ours):
    for prompt in PROMPTS:
        want = same_text(theirs, ours, prompt, N)
        if len(want.text) < 4: continue
        middle = len(want.text) // 2
        stop = ["never comes", want.text[middle - 1:middle + 2]]
        got = theirs.generate(prompt, max_new_tokens=N, stop=stop)
        assert got == ours.generate(prompt, max_new_tokens=N, stop=stop), f"cut elsewhere at {stop}"
    long = ours.tokenizer.encode(PROSE)                                   # several batches of the prompt
    assert theirs.generate(long, max_new_tokens=8) == ours.generate(long, max_new_tokens=8), "batches of a prompt"


def test_texts(tiny): writes_as_ours(*tiny)


def test_the_end_token_ends(tiny, lm):
    theirs, ours = tiny
    end = ours.generate("Hello", max_new_tokens=N).tokens[5]
    other = LlamaCppLM(theirs.llama, eos_ids=[end])
    done = other.generate("Hello", max_new_tokens=N)
    assert done.reason == "stop" and done.tokens[-1] == end and len(done.tokens) <= 6
    assert LlamaCppLM(theirs.llama).words.eos_ids == [0, 2, 4]


def repeats_its_draws(theirs):
    how = dict(max_new_tokens=10, temperature=1.0)
    first = theirs.generate("Hello", seed=3, **how)
    theirs.generate("Hello, you", seed=9, **how)                          # leaves another past behind
    assert theirs.generate("Hello", seed=3, **how) == first, "a seed must fix the text"
    assert len({tuple(theirs.generate("Hello", seed=s, **how).tokens) for s in range(5)}) == 5, "seeds do not matter"
    assert len({tuple(theirs.generate("Hello", **how).tokens) for _ in range(3)}) == 3, "without a seed all draw alike"


def test_seeds(tiny): repeats_its_draws(tiny[0])


def draws_from_our_distribution(theirs):
    "Chi-square of draws from one row of scores, for settings whose order matters."
    for seed, s in enumerate([Sampler(1.7, 25, 0.8), Sampler(0.6, None, 0.9, 0.02), Sampler(2.0, 12, None, 0.3)]):
        ids, n = theirs.prompt_ids("The old lighthouse"), 3000
        z = theirs._rows(ids, [], len(ids) - 1)
        p = temperature(z, s.temperature)
        if s.top_k is not None: p = top_k(p, s.top_k)
        if s.top_p is not None: p = top_p(p, s.top_p)
        if s.min_p is not None: p = min_p(p, s.min_p)
        p = p.softmax(-1)[0]
        made = chapter.chain(s, seed)
        try: draws = torch.tensor([C.llama_sampler_sample(made, theirs.llama.ctx, -1) for _ in range(n)])
        finally: C.llama_sampler_free(made)
        counts, may = torch.bincount(draws, minlength=len(p)), p > 0
        assert not counts[~may].any(), "a token came that the filters exclude"
        free, want = int(may.sum()) - 1, n * p[may]
        chi = float(((counts[may] - want) ** 2 / want).sum())
        assert free and chi < free + 6 * math.sqrt(2 * free) + 10, f"chi-square {chi:.0f} for {free} degrees of freedom"


def test_draws(cpp):
    draws_from_our_distribution(cpp)
    cpp.llama.reset()


# --- tokens and text --------------------------------------------------------------------------------------------------

def test_pieces_of_every_length(cpp, lm):
    ids = [*range(0, 49152, 97), *(i for i in range(49152) if len(lm.tokenizer.decode([i])) > 30)]
    for i in ids: assert piece_of(cpp.words.vocab, i).decode("utf-8", "replace") == lm.tokenizer.decode([i])
    text = "안녕 👩‍🚀 naïve\n" + " " * 70 + "-" * 90 + " end<|im_end|>"
    stream, ids = cpp.words.stream(), cpp.words.encode(text)
    assert ids == lm.tokenizer.encode(text, special=True)
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == text


def test_conversations(cpp, lm):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "안녕?"}]
    assert cpp.words.encode_chat(talk) == lm.tokenizer.encode_chat(talk)


# --- scores -----------------------------------------------------------------------------------------------------------

def scores_as_ours(theirs, ours):
    theirs.generate("something else before", max_new_tokens=3)
    for pair, a, b in zip(PAIRS, theirs.loglikelihood(PAIRS), ours.loglikelihood(PAIRS), strict=True):
        assert (a.tokens, a.greedy) == (b.tokens, b.greedy), pair
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3), pair
        assert a.total == pytest.approx(sum(b.logprobs), abs=5e-3), pair
    long = [("The", PROSE)]                                               # more than a batch of 8
    assert theirs.loglikelihood(long)[0].logprobs == pytest.approx(ours.loglikelihood(long)[0].logprobs, abs=1e-3)
    before = theirs.generate("Hello", max_new_tokens=4)
    assert before == ours.generate("Hello", max_new_tokens=4), "scoring leaves something in the cache"


def test_scores(tiny): scores_as_ours(*tiny)


def test_long_contexts_lose_their_beginning(tiny):
    theirs, ours = tiny
    assert theirs.context == 256                                          # asked for 512, trained with 256
    long = [("word " * 400, "and so on")]
    assert theirs.loglikelihood(long)[0].total == pytest.approx(ours.loglikelihood(long)[0].total, abs=5e-3)
    with pytest.raises(ContextLengthError, match="256"): theirs.loglikelihood([("a", " b" * 300)])


def rounded(x):
    "As llama.cpp's Q8_1: blocks of 32, 8 bits and a float16 scale."
    b = x.reshape(*x.shape[:-1], -1, 32)
    scale = b.abs().amax(-1, keepdim=True) / 127
    return (torch.where(scale > 0, b / scale, 0.0).round() * scale.half().float()).reshape(x.shape)


@pytest.fixture(scope="module")
def noise(lm):
    "What rounding inputs to 8 bits does to our own scores, root mean square in nats."
    ops = lambda x, weight, bias=None: TORCH.linear(rounded(x), weight, bias)
    eight = LM(lm.decoder.with_ops(TORCH).with_ops(linear=ops), lm.tokenizer, lm.card)
    a, b = (torch.tensor(m.loglikelihood([("The", PROSE)])[0].logprobs) for m in (lm, eight))
    return a, (a - b).pow(2).mean().sqrt().item()


def is_within_the_noise(cpp, noise):
    ours, rms = noise
    theirs = torch.tensor(cpp.loglikelihood([("The", PROSE)])[0].logprobs)
    d = theirs - ours
    assert d.pow(2).mean().sqrt() < 1.5 * rms, f"{d.pow(2).mean().sqrt():.3f} nats, 8-bit inputs explain {rms:.3f}"
    assert d.mean().abs() < 4 * d.std() / math.sqrt(len(d)), "a shift, not noise"


def test_scores_of_the_quantized_file(cpp, noise):
    assert 0.02 < noise[1] < 0.3
    is_within_the_noise(cpp, noise)


def test_greedy_text_of_the_quantized_file(cpp, lm, noise):
    "The same as ours until our lead is a matter of the noise."
    for prompt in ("The three primary colours are", "The capital of France is"):
        got, want = (m.generate(prompt, max_new_tokens=12).tokens for m in (cpp, lm))
        same = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), len(want))
        if same == len(want): continue
        ids = torch.tensor([lm.prompt_ids(prompt) + want[:same]])
        with torch.inference_mode(): z = lm.decoder(ids)[0, -1].log_softmax(-1)
        assert z[want[same]] - z[got[same]] < 6 * noise[1], "they part where our lead was large"


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_embeddings(cpp, lm, pool):
    texts = ["A cat sleeps.", PROSE + PROSE[::2] + PROSE, "The weather changes quickly in the mountains."]
    got, want = cpp.embed(texts, pool=pool), lm.embed(texts, pool=pool)
    assert torch.cosine_similarity(got, want, dim=-1).min() > 0.99 and got.norm(dim=-1) == pytest.approx(1, abs=1e-4)
    shorter = cpp.embed(texts[1][:-80], pool=pool)[0]
    assert torch.cosine_similarity(got[1], shorter, dim=-1) < 0.9999, "the end of a long text is not read"


# --- what is refused --------------------------------------------------------------------------------------------------

def test_bad_input(cpp, tmp_path, gguf_path):
    for settings, words in ((dict(temperature=-1), "temperature"), (dict(top_k=0), "top_k"), (dict(seed=2**32), "seed"),
                            (dict(stop=["a", ""]), "stop string"), (dict(max_new_tokens=0), "max_new_tokens")):
        for call in (cpp.generate, cpp.stream, cpp.chat):
            with pytest.raises(InputError, match=words): call("a", **settings)
    with pytest.raises(ContextLengthError, match="512"): cpp.stream("word " * 600)
    with pytest.raises(TypeError): cpp.stream("a", temprature=1)
    for bad in ("", [], 5, None, [[1]], [10**9]):
        with pytest.raises(InputError): cpp.generate(bad)
    for bad in ([5], [{"role": "user"}, 7]):
        with pytest.raises(InputError, match="chat template"): cpp.chat(bad)
    with pytest.raises(InputError, match="A pair is"): cpp.loglikelihood([("a", "")])
    for texts, words in (([""], "empty"), (["word " * 600], "512")):
        with pytest.raises((InputError, ContextLengthError), match=words): cpp.embed(texts)
    with pytest.raises(InputError, match="pooling"): cpp.embed("a", pool="max")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_path.read_bytes()[:5000])
    for source, error in ((tmp_path / "no.gguf", SourceError), (tmp_path, SourceError), (broken, CheckpointError)):
        with pytest.raises(error): LlamaCppLM(source)
    for settings in (dict(kv_type="q8"), dict(kv_type=8), dict(threads=0), dict(context=0), dict(context="a")):
        with pytest.raises(InputError): LlamaCppLM(gguf_path, **settings)
    with pytest.raises(InputError, match="too late"): LlamaCppLM(cpp.llama, n_batch=8)
    if not C.llama_supports_gpu_offload():
        with pytest.raises(UnsupportedError, match="without a GPU"): LlamaCppLM(gguf_path, gpu_layers=-1)


@pytest.mark.parametrize("name", KV_TYPES)
def test_every_cache_type_opens_and_writes(gguf_path, name):
    model = LlamaCppLM(gguf_path, context=64, kv_type=name, threads=2)
    assert model.generate("The capital of France is", max_new_tokens=1).text == " Paris"
    model.close()


def test_other_numbers_would_end_the_process(gguf_path):
    "Why `kv_number` has a list."
    code = f"import llama_cpp; llama_cpp.Llama({str(gguf_path)!r}, n_ctx=64, type_k=16, verbose=False)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode < 0
    with pytest.raises(InputError, match="q8_0"): kv_number("q8")


def test_without_llama_cpp(monkeypatch, gguf_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UnsupportedError, match="llama.cpp is not here"): LlamaCppLM(gguf_path)


# --- mutants ----------------------------------------------------------------------------------------------------------

def the_row_of_the_token_itself(m):
    right = LlamaCppLM._rows
    def wrong(self, ids, held, first):
        z = right(self, ids, held, first)
        return torch.cat([z[1:], z[-1:]])
    m.setattr(LlamaCppLM, "_rows", wrong)


def the_cache_keeps_what_differs(m):
    right = LlamaCppLM._rows
    m.setattr(LlamaCppLM, "_rows", lambda self, ids, held, first: right(self, ids, ids[:len(held)], first))


def the_last_row_of_a_batch(m):
    right = C.llama_get_logits_ith
    m.setattr(C, "llama_get_logits_ith", lambda ctx, i: right(ctx, -1))


def the_temperature_comes_last(m):
    def wrong(s, seed):
        made = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        if s.top_k is not None: C.llama_sampler_chain_add(made, C.llama_sampler_init_top_k(s.top_k))
        if s.top_p is not None: C.llama_sampler_chain_add(made, C.llama_sampler_init_top_p(s.top_p, 1))
        if s.min_p is not None: C.llama_sampler_chain_add(made, C.llama_sampler_init_min_p(s.min_p, 1))
        C.llama_sampler_chain_add(made, C.llama_sampler_init_temp(s.temperature))
        C.llama_sampler_chain_add(made, C.llama_sampler_init_dist(seed))
        return made
    m.setattr(chapter, "chain", wrong)


def min_p_is_forgotten(m):
    from dataclasses import replace
    m.setattr(chapter, "chain", lambda s, seed: chain(replace(s, min_p=None), seed))


def the_seed_is_forgotten(m): m.setattr(chapter, "chain", lambda s, seed: chain(s, 7))


def short_tokens_only(m):
    "The package's own way."
    right = chapter.piece_of
    m.setattr(chapter, "piece_of", lambda vocab, token: piece if len(piece := right(vocab, token)) <= 3 else b"")


def the_past_stays(m):
    m.setattr(LlamaCppLM, "_write", _without_reset(LlamaCppLM._write))


def _without_reset(write):
    def wrong(self, row, *args):
        reset, self.llama.reset = self.llama.reset, lambda: None
        try: yield from write(self, row, *args)
        finally: self.llama.reset = reset
    return wrong


MUTANTS = [(the_row_of_the_token_itself, scores_as_ours), (the_cache_keeps_what_differs, scores_as_ours),
           (the_last_row_of_a_batch, scores_as_ours), (the_temperature_comes_last, draws_from_our_distribution),
           (min_p_is_forgotten, draws_from_our_distribution), (the_seed_is_forgotten, repeats_its_draws),
           (short_tokens_only, writes_as_ours), (the_past_stays, writes_as_ours)]


@pytest.mark.parametrize("mutant, check", MUTANTS, ids=lambda f: f.__name__)
def test_wrong_variants_are_rejected(tiny, cpp, monkeypatch, mutant, check):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        if check is draws_from_our_distribution: check(cpp)
        elif check is repeats_its_draws: check(tiny[0])
        else: check(*tiny)
    monkeypatch.undo()
    for model in (tiny[0], cpp): model.llama.reset()


def test_wrong_rows_are_outside_the_noise(cpp, noise, monkeypatch):
    the_row_of_the_token_itself(monkeypatch)
    with pytest.raises(AssertionError): is_within_the_noise(cpp, noise)
    monkeypatch.undo()
    is_within_the_noise(cpp, noise)
