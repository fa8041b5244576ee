"Endpoints that are right, wrong, slow and dead; scores through echo; the table of all generators."
import importlib.util
import inspect
import json
import math
import re
import sys
import time
from types import SimpleNamespace

import pytest
from endpoints import DIE, error, event, openai_like, plain, serving

from llm_workbench.errors import (ContextLengthError, InputError, Interrupted, SourceError, UnsupportedError,
                                  WorkbenchError)
from llm_workbench.inference import generators
from llm_workbench.inference.generation import Completion, LogLikelihood
from llm_workbench.inference.generators import EndpointLM, Generator, compare_generators, request_of

WORDS = ("Cafés", " are", " nice 😀", ".")


def tokens_of(text): return re.findall(r" ?[^ ]+| +", text)


def scripted(seen=None, *, chunk=None, end=(dict(choices=[dict(text="", finish_reason="length")]), b"data: [DONE]\n\n"),
             change=lambda scores, first: scores):
    "An endpoint without a model: it writes WORDS, and scores the i-th of a text by -i/8, by 1 less if not greedy."
    def scores(tokens):
        values = [None, *[-i / 8 - (len(t) % 2) for i, t in enumerate(tokens) if i]]
        tops = [None, *[{t: v} if len(t) % 2 == 0 else {"other": v + 1} for t, v in zip(tokens[1:], values[1:])]]
        return dict(tokens=tokens, token_logprobs=values, top_logprobs=tops)

    def answer(path, body, headers):
        if seen is not None: seen.append((path, body))
        if body is None: return 200, plain(dict(data=[dict(id="m")]))
        if body.get("stream"):
            key = "delta" if "messages" in body else "text"
            parts = [dict(choices=[{key: dict(content=w) if key == "delta" else w}]) for w in WORDS]
            sent = b"".join(map(event, parts))
            if chunk: parts = [sent[i:i + chunk] for i in range(0, len(sent), chunk)]
            return 200, [*parts, *end]
        prompt = tokens_of(body["prompt"])
        every = scores([*prompt, *(" Paris", " is")][:len(prompt) + body["max_tokens"]])
        first = 0 if body.get("echo") else len(prompt)
        found = change({k: v[first:] for k, v in every.items()}, first)
        return 200, plain(dict(choices=[dict(text="", logprobs=found)], usage=dict(prompt_tokens=len(prompt))))
    return answer


def streams(made):
    "A whole answer, in any portions; a part of one, wherever it ends; a stop string that the server does not know."
    for chunk in (None, 1, 2, 7, 1000):
        with serving(scripted(chunk=chunk)) as base:
            lm = made.EndpointLM(base, "m")
            assert lm.generate("x").text == lm.chat("x") == "".join(WORDS), chunk
            assert list(lm.stream("x", template=False)) == list(WORDS)
    with serving(scripted()) as base:
        done = made.EndpointLM(base, "m").generate("x", stop=["q", "e nice"])
        assert (done.text, done.reason) == ("Cafés ar", "stop")
        assert made.EndpointLM(base, "m").generate("x", stop="😀.\n").text == "".join(WORDS)
    for end in ([DIE], [dict(error=dict(message="out of memory"))], [b"data: {\n\n"], []):
        with serving(scripted(end=end)) as base:
            with pytest.raises(Interrupted) as found: made.EndpointLM(base, "m").generate("x", stop="😀.\n")
            assert found.value.text == "".join(WORDS), end
            assert len(end) == 0 or not isinstance(end[0], dict) or "out of memory" in str(found.value)
    ping = [b": ping\n\nevent: message\nid: 1\n", dict(choices=[dict(text="!", finish_reason="stop")])]
    with serving(scripted(end=ping)) as base:
        done = made.EndpointLM(base, "m").generate("x")
        assert (done.text, done.reason, done.written) == ("".join(WORDS) + "!", "stop", None)


def scores(made):
    "Every token of the continuation, no token of the context, none that came behind; known to the last digit."
    with serving(scripted()) as base:
        lm = made.EndpointLM(base, "m", prefix="<end>")
        pairs = [("one two", " four"), ("one two ", "four"), ("one two", " four seven 10"), ("", " at the end"),
                 ("a", " bb")]
        found = lm.loglikelihood(pairs)
        want = [[-1.25], [-1.25], [-1.25, -0.375, -1.5], [-1.125, -0.25, -0.375], [-1.125]]
        assert [f.logprobs for f in found] == want
        assert [f.total for f in found] == [sum(w) for w in want]
        assert not any(f.greedy for f in found) and lm.loglikelihood([("one", " abc abc")])[0].greedy
        assert lm.loglikelihood([]) == []
        with pytest.raises(InputError, match="border"): lm.loglikelihood([("one tw", "o")])
        with pytest.raises(InputError, match="A pair"): lm.loglikelihood([("one", "")])
    wrong = {"ignores `echo`": lambda s, first: dict(s, token_logprobs=[None] * len(s["tokens"])) if first == 0 else s,
             "shifted": lambda s, first: dict(s, token_logprobs=[v and v - 2 for v in s["token_logprobs"]])
             if first == 0 else s,
             "gives no scores": lambda s, first: dict(content=[]),
             "other tokens": lambda s, first: dict(s, tokens=[t.upper() for t in s["tokens"]]) if first == 0 else s}
    for words, change in wrong.items():
        with serving(scripted(change=change)) as base:
            lm = made.EndpointLM(base, "m")
            with pytest.raises(UnsupportedError, match=words): lm.loglikelihood([("one", " two")])


class Stand:
    "A generator with a clock of its own."
    name = "stand-in"
    def __init__(self, texts, tokens=5, streamed=None): self.texts, self.n, self.streamed = texts, tokens, streamed
    def generate(self, prompt, **settings): return Completion(self.texts.get(prompt, ""), "stop", [0] * self.n, 1)
    def chat(self, messages, **settings): return ""
    def loglikelihood(self, pairs): return [LogLikelihood(-1.5, True, [0], [-1.5]) for _ in pairs]
    def stream(self, messages, *, template=True, **settings):
        for piece in (self.streamed or self.texts).get(messages, ""):
            if isinstance(piece, Exception): raise piece
            yield piece


def table(made, monkeypatch):
    "Same or not, where, how fast by a clock that ticks once a look, and what became of those that failed."
    ticks = iter(range(10 ** 9))
    monkeypatch.setattr(made.time, "perf_counter", lambda: float(next(ticks)))
    texts = {"a": "abcde", "b": "xyz"}
    found = made.compare_generators(
        {"one": Stand(texts), "same": Stand(texts), "other": Stand(texts | {"b": "xy"}),
         "odd": Stand(texts, streamed=texts | {"a": "abcdX"}), "none": Stand(texts, tokens=0),
         "broken": Stand(texts, streamed={"a": ["ab", SourceError("gone")], "b": "xyz"}),
         "late": Stand(texts, streamed={"a": [*"abcde", SourceError("gone")], "b": "xyz"})}, ["a", "b"])
    assert list(found["same text"]) == [True, True, False, False, True, False, False]
    assert found.loc["other", "first difference"] == "prompt 2, character 2: 'z' / ''"
    assert found.loc["odd", "first difference"] == "prompt 1, character 4: 'e' / 'X'"
    assert "different texts" in found.loc["odd", "note"] and "SourceError: gone" in found.loc["broken", "note"]
    assert found.attrs["runs"]["broken"][0].text == "ab"
    assert found.loc["one", "first token, s"] == 1
    assert found.loc["one", "tokens/s"] == (1 + 2) / 2                           # 4 in 4 s, 4 in 2 s
    assert math.isnan(found.loc["none", "tokens/s"]) and math.isnan(found.loc["one", "weights, MB"])
    assert set(found["log-likelihood"]) == {-1.5}


def test_streams(): streams(generators)
def test_scores(): scores(generators)
def test_table(monkeypatch): table(generators, monkeypatch)


MUTANTS = {
    "the border is a token late": (scores, "slice(at, len(echo.tokens))", "slice(at + 1, len(echo.tokens))"),
    "what was written is part of the text": (scores, 'or [])[:n] for k', 'or [])[:n + 1] for k'),
    "a space at the end stays where it is": (scores, '.rstrip(" ")', '.rstrip("")'),
    "every token is the likeliest": (scores, "value >= max(top.values())", "True"),
    "a sum over characters": (scores, "math.fsum(values)", "math.fsum(values) / len(rest)"),
    "scores are believed": (scores, "if not apart <= APART", "if False"),
    "scores of a prompt may be missing": (scores, "or None in values[1:]", ""),
    "an early end is an end": (streams, "if not answer.reason: raise SourceError", "if False: raise SourceError"),
    "what had come is lost": (streams, "answer.text + strings.flush())", "'')"),
    "an error in the stream is skipped": (streams, 'if part.get("error"): raise', "if False: raise"),
    "stop strings are the server's": (streams, "StopStrings(stop), False", "StopStrings(()), False"),
    "what may begin a stop string is lost": (streams, "if rest := strings.flush(): yield", "if False: yield"),
    "comments are garbage": (streams, ', b":")', ")"),
    "the first token is part of the pace": (table, "(written - 1) / (last", "written / (last"),
    "a beginning is the same text": (table, "min(len(a), len(b)))", "None)"),
    "a failure is the same text": (table, "not different and not any(run.note for run in runs)", "not different"),
    "what failed is not kept": (table, "Exception as e: run.note", "Exception as e: run.text = ''; run.note"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_variants_are_rejected(name, tmp_path, monkeypatch):
    check, right, wrong = MUTANTS[name]
    source = inspect.getsource(generators)
    assert source.count(right) == 1 or name == "a space at the end stays where it is", right
    source = source.replace(right, wrong).replace("from ..", "from llm_workbench.")
    path = tmp_path / "wrong.py"
    path.write_text(source.replace("from .", "from llm_workbench.inference."), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong_generators", path)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "wrong_generators", made)                # dataclasses look their module up
    spec.loader.exec_module(made)
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(*(made, monkeypatch)[:len(inspect.signature(check).parameters)])


def test_through_a_port_as_directly(lm):
    seen = []
    with serving(openai_like(lm, key="sesame", seen=seen)) as base:
        far = EndpointLM(base, api_key="sesame")
        assert isinstance(far, Generator) and isinstance(lm, Generator) and far.model == "small"
        for prompt in ("The capital of France is", "ä 😀"):
            near, done = lm.generate(prompt, max_new_tokens=5), far.generate(prompt, max_new_tokens=5)
            assert (done.text, done.reason, done.prompt_tokens, done.written) == (
                near.text, near.reason, near.prompt_tokens, len(near.tokens))
        settings = dict(max_new_tokens=5, temperature=1.0, top_k=40, seed=7)
        assert far.chat("Hi", **settings) == lm.chat("Hi", **settings)
        pairs = [("The sky is", " blue"), ("One 😀", " 😀 two")]
        for mine, theirs in zip(lm.loglikelihood(pairs), far.loglikelihood(pairs), strict=True):
            assert abs(mine.total - theirs.total) < 2e-2 and mine.greedy == theirs.greedy
    assert all(headers["Authorization"] == "Bearer sesame" for _, _, headers in seen)


def test_the_small_server_is_one_for_the_real_client_too(lm):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with serving(openai_like(lm)) as base:
        client = openai.OpenAI(base_url=base + "/v1", api_key="none")
        parts = client.completions.create(model="small", prompt="Snow is", max_tokens=4, temperature=0, stream=True)
        text = "".join(p.choices[0].text for p in parts if p.choices)
        assert text == EndpointLM(base).generate("Snow is", max_new_tokens=4).text
        answer = client.chat.completions.create(model="small", messages=[dict(role="user", content="Hi")], max_tokens=4,
                                                temperature=0, stream=True)
        text = "".join(p.choices[0].delta.content or "" for p in answer if p.choices)
        assert text == EndpointLM(base).chat("Hi", max_new_tokens=4)


def test_llama_cpp_python_is_refused(gguf_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    llama = llama_cpp.Llama(str(gguf_path), n_ctx=64, logits_all=True, verbose=False)
    def answer(path, body, headers):
        body.pop("model")
        return 200, [json.dumps(llama.create_completion(**body), default=float).encode()]
    with serving(answer) as base, pytest.raises(UnsupportedError, match="shifted"):
        EndpointLM(base, "m").loglikelihood([("The sky is", " blue")])
    assert 0.9 < 1e6 * generators.memory_of(SimpleNamespace(llama=llama)) / gguf_path.stat().st_size < 1.0


REFUSALS = {
    "key": (error(401, "Incorrect API key provided: s3cret"), InputError, "refuses the key"),
    "context": (error(400, "too long", code="context_length_exceeded"), ContextLengthError, "too long"),
    "context, vLLM": (error(400, "maximum context length is 512", type="BadRequestError"), ContextLengthError, "512"),
    "context, llama.cpp": (error(400, "too long", type="exceed_context_size_error"), ContextLengthError, "too long"),
    "a setting": ((422, plain(dict(detail="top_p is wrong"))), InputError, "top_p is wrong"),
    "busy": (error(429, "later"), SourceError, "status 429: later"),
    "broken": ((500, [b"<html>Oops</html>"]), SourceError, "Oops"),
    "elsewhere": ((302, [b""]), SourceError, "status 302"),
    "no such thing": (error(405, "no"), UnsupportedError, "has no /v1/completions"),
    "a list": ((400, [b"[1]"]), InputError, "status 400"),
    "a page": ((200, [b"<html>Sign in</html>"]), SourceError, "<html>"),
    "no event": ((200, [dict(choices=5)]), SourceError, "instead of a piece"),
    "no text": ((200, [dict(choices=[dict(text=[1])])]), SourceError, "instead of a piece"),
    "a number": ((200, [b"data: 5\n\n"]), SourceError, "instead of a JSON object"),
    "deep": ((200, [b"data: " + b"[" * 100_000 + b"\n\n"]), SourceError, "instead of a JSON object"),
    "half a character": ((200, [b'data: {"choices": "\xc3\n\n']), SourceError, "instead of a JSON object"),
    "nothing": ((200, []), SourceError, "without a word"),
    "dead": ((200, [DIE]), SourceError, "without a word"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_is_one_clear_error(name):
    answer, kind, words = REFUSALS[name]
    with serving(lambda *_: answer) as base:
        with pytest.raises(kind, match=words) as found: EndpointLM(base, "m", api_key="s3cret").generate("x")
    assert type(found.value) is kind and "s3cret" not in str(found.value)


def test_a_model_or_a_path_that_is_not_there():
    def only_models(path, body, headers):
        return (200, plain(dict(data=[dict(id="llama")]))) if path == "/v1/models" else error(404, "?")
    with serving(only_models) as base:
        with pytest.raises(InputError, match="no model 'lama'; it has llama. Did you mean 'llama'"):
            EndpointLM(base, "lama").generate("x")
        with pytest.raises(UnsupportedError, match="has no /v1/completions"): EndpointLM(base, "llama").generate("x")
        with pytest.raises(UnsupportedError, match="has no /v2/models"): EndpointLM(base + "/v2")
    with serving(lambda *_: (200, plain(dict(data=[dict(id="a"), dict(id="b")])))) as base:
        with pytest.raises(InputError, match="the models a, b: name one"): EndpointLM(base)
    with serving(lambda *_: (200, plain(dict(data=5)))) as base:
        with pytest.raises(SourceError, match="lists no models"): EndpointLM(base)
    with pytest.raises(SourceError, match="is the server running"): EndpointLM(base)


def test_silence_ends():
    for pieces, kind in (([5], SourceError), ([dict(choices=[dict(text="Hi")]), 5], Interrupted)):
        with serving(lambda *_: (200, pieces)) as base:
            start = time.perf_counter()
            with pytest.raises(kind, match="not a byte in 0.2 s"): EndpointLM(base, "m", timeout=0.2).generate("x")
            assert time.perf_counter() - start < 3


def test_who_stops_reading_hangs_up():
    sent, hung = [], []
    def parts():
        try:
            for i in range(1000):
                sent.append(i)
                yield dict(choices=[dict(text="word " * 2000)])
                yield 0.001
        finally: hung.append(True)
    with serving(lambda *_: (200, parts())) as base:
        reader = EndpointLM(base, "m").stream("x", template=False)
        next(reader)
        reader.close()
        end = time.time() + 5
        while not hung and time.time() < end: time.sleep(0.01)
    assert hung and len(sent) < 1000


def test_what_is_said():
    assert request_of() == dict(max_tokens=256, temperature=0.0, top_p=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    assert request_of(stop=list("abcdef"))["stop"] == list("abcd") and request_of(top_k=3, min_p=0.1)["min_p"] == 0.1
    seen = []
    with serving(scripted(seen)) as base:
        EndpointLM(base, "m").generate([1, 2], seed=3)
        EndpointLM(base + "/v1/", "m").chat([dict(role="user", content="Hi")])
    (one, first), (two, second) = seen
    assert (one, first["prompt"], first["seed"]) == ("/v1/completions", [1, 2], 3)
    assert (two, second["messages"]) == ("/v1/chat/completions", [dict(role="user", content="Hi")])


def test_bad_input_before_anything_is_sent():
    lm = EndpointLM("http://127.0.0.1:9", "m")
    for call in (lambda: lm.generate(""), lambda: lm.generate([]), lambda: lm.generate(5), lambda: lm.generate(["a"]),
                 lambda: lm.generate("x", temperature=-1), lambda: lm.generate("x", max_new_tokens=0),
                 lambda: lm.stream("x", seed="a"), lambda: lm.stream([dict(content={1})]),
                 lambda: lm.stream([math.nan]), lambda: EndpointLM("localhost:80", "m"), lambda: EndpointLM(None, "m"),
                 lambda: EndpointLM("http://a:99999", "m"), lambda: EndpointLM("http://a", "m", api_key="a\r\nb"),
                 lambda: EndpointLM("http://me:s3cret@a", "m"), lambda: compare_generators({}, ["x"]),
                 lambda: compare_generators({"a": lm}, []), lambda: compare_generators({"a": lm}, "x"),
                 lambda: compare_generators({"a": 5}, ["x"])):
        with pytest.raises(InputError) as found: call()
        assert "s3cret" not in str(found.value)
