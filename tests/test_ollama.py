"Ollama's protocol: fuzzed, interrupted, two clients at once, and the real client where it is installed."
import asyncio
import http.client
import json
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import llm_workbench as wb
from llm_workbench import Decoder
from llm_workbench.embedded import embedded_model
from llm_workbench.errors import InputError, Overloaded, SourceError, Unavailable, UnsupportedError, WorkbenchError
from llm_workbench.files.gguf import write_gguf
from llm_workbench.inference import ollama as chapter
from llm_workbench.inference.generation import LM
from llm_workbench.inference.modelfiles import DEFAULTS, Modelfile, ModelStore, parse_modelfile, settings_of
from llm_workbench.inference.ollama import Interrupted, OllamaApp, OllamaLM, seconds_of, serve, status_of

ROUTES = sorted({path for _, path in chapter.ROUTES} | {"/api/pull", "/v1/chat/completions", "/nothing",
                                                        "/api/blobs/x"})
GREEDY = dict(temperature=0, repeat_penalty=1, num_predict=12)
TALK = [dict(role="user", content="What is a river?")]


@pytest.fixture(scope="module")
def lm() -> LM:
    "A tiny decoder with random weights behind the embedded model's real tokenizer and template."
    real = wb.load()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=real.decoder.config.vocab_size, hidden_size=32, intermediate_size=48, head_dim=16,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4,
                         max_position_embeddings=256, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True)
    decoder = Decoder.from_transformers(LlamaForCausalLM(config).eval()).requires_grad_(False)
    return LM(decoder, real.tokenizer, replace(real.card, name="tiny"))


@pytest.fixture
def app(lm): return OllamaApp({"tiny": lm})


def asked(app, path, body, method="POST"):
    status, headers, pieces = app.handle(method, path, body)
    return status, list(pieces)


def text_of(lines): return "".join(p["message"]["content"] if "message" in p else p["response"] for p in lines)

@pytest.mark.parametrize("text, seconds", [
    ("5m", 300), ("1h30m", 5400), ("250ms", 0.25), ("0", 0), (0, 0), (7, 7), (1.5, 1.5), (10**400, 2**53),
                                           (-1, float("inf")), ("-1s", float("inf"))])
def test_keep_alive(text, seconds): assert seconds_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize("error, status", [
    (Overloaded("full"), 503), (Unavailable("gone"), 503), (InputError("no"), 400)])
def test_a_server_that_cannot_now_is_told_apart_from_a_wrong_request(error, status): assert status_of(error) == status


@pytest.mark.parametrize("text", ["", "5", "m", "1d", "5 m", "１m", None, True, [], float("nan")])
def test_bad_keep_alive(text):
    with pytest.raises(InputError, match="keep_alive"): seconds_of(text)


# Requests

TEXTS = st.sampled_from(["", "a", "tiny", "json", "5m"])
SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | TEXTS
KEYS = st.sampled_from(["role", "content", "stop"])
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(KEYS, v, max_size=2), max_leaves=4)
FIELDS = ["model", "prompt", "messages", "options", "stream", "raw", "system", "template", "images", "format", "think",
          "input", "context", "keep_alive", "from", "files", "source", "destination", "parameters", "license", "name",
          "dimensions", "truncate", "suffix", "tools", "verbose", "quantize", "adapters"]
GOOD = st.fixed_dictionaries(dict(model=st.just("tiny"), options=st.just(dict(num_predict=2))),
                             optional={f: VALUES for f in FIELDS[1:] if f != "options"})


@settings(max_examples=250, deadline=None)
@given(path=st.sampled_from(ROUTES), body=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5) | GOOD,
       method=st.sampled_from(["POST", "POST", "POST", "GET", "DELETE", "PUT"]))
def test_any_request_has_an_answer_and_only_our_errors(lm, path, body, method):
    status, pieces = asked(OllamaApp({"tiny": lm, "other": lm}), path, body, method)
    errors = [p["error"] for p in pieces if "error" in p]
    assert len(errors) == (status != 200) and status in (200, 400, 404, 501), (path, body, errors)
    assert all(e and "internal error" not in e for e in errors), (path, body, errors)
    json.dumps(pieces, allow_nan=False)


@pytest.mark.parametrize("body", [b"{", b"[]", b'"a"', b"1", b"\xff", b"[" * 100_000, [], "x", 5])
def test_what_is_no_object_is_refused(app, body):
    status, (answer,) = asked(app, "/api/chat", body)
    assert status == 400 and list(answer) == ["error"]


def check_answer(lines, want, elapsed):   # elapsed: nanoseconds around it
    *pieces, last = lines
    assert text_of(lines) == want and all(not p["done"] for p in pieces) and last["done"] is True
    durations = {k: v for k, v in last.items() if k.endswith(("_duration", "_count"))}
    assert len(durations) == 6 and all(type(v) is int and v >= 0 for v in durations.values())
    assert last["prompt_eval_duration"] + last["eval_duration"] <= last["total_duration"]
    assert elapsed / 20 < last["total_duration"] <= elapsed, "nanoseconds?"
    return durations


def test_streamed_whole_and_ours_are_the_same(app, lm):
    want = lm.generate(lm.chat_ids(TALK), max_new_tokens=12)
    for path, body in (("/api/chat", dict(messages=TALK)), ("/api/generate", dict(prompt=TALK[0]["content"]))):
        body = dict(body, model="tiny", options=GREEDY)
        start = time.perf_counter_ns()
        status, lines = asked(app, path, body)
        elapsed = time.perf_counter_ns() - start
        counts = check_answer(lines, want.text, elapsed)
        for wrong in (dict(total_duration=lines[-1]["total_duration"] // 1000), dict(done=1), dict(eval_duration=0.5),
                      dict(prompt_eval_duration=-1), dict(total_duration=0), dict(eval_duration=elapsed)):   # mutants
            with pytest.raises(AssertionError): check_answer([*lines[:-1], lines[-1] | wrong], want.text, elapsed)
        with pytest.raises(AssertionError): check_answer(lines[1:], want.text, elapsed)
        assert (counts["eval_count"], counts["prompt_eval_count"]) == (len(want.tokens), want.prompt_tokens)
        assert lines[-1]["done_reason"] == want.reason
        status, (whole,) = asked(app, path, body | dict(stream=False))
        assert text_of([whole]) == want.text and {k for k in whole} == {k for k in lines[-1]}
    assert lines[-1]["context"] == lm.chat_ids(TALK) + want.tokens
    more = dict(model="tiny", prompt="More.", context=lines[-1]["context"], options=GREEDY, stream=False)
    _, (whole,) = asked(app, "/api/generate", more)
    assert whole["response"] == lm.generate(lines[-1]["context"] + lm.chat_ids("More."), max_new_tokens=12).text
    as_it_is = dict(model="tiny", prompt="<|im_start|>", raw=True, options=GREEDY, stream=False)
    _, (whole,) = asked(app, "/api/generate", as_it_is)
    assert whole["response"] == lm.generate("<|im_start|>", max_new_tokens=12).text and "context" not in whole


def test_every_option_arrives(app, lm):
    for option, ours in ((dict(temperature=1.0, top_k=0, top_p=1, seed=5), dict(temperature=1.0, seed=5)),
                         (dict(temperature=1.5, top_k=3, top_p=1, seed=5), dict(temperature=1.5, top_k=3, seed=5)),
                         (dict(temperature=2.0, top_k=0, top_p=0.5, seed=1), dict(temperature=2.0, top_p=0.5, seed=1)),
                         (dict(temperature=2.0, top_k=0, top_p=1, min_p=0.2, seed=1),
                          dict(temperature=2.0, min_p=0.2, seed=1)),
                         (dict(repeat_penalty=1.8), dict(repetition_penalty=1.8)),
                         (dict(presence_penalty=2.0), dict(presence_penalty=2.0)),
                         (dict(frequency_penalty=2.0), dict(frequency_penalty=2.0))):
        body = dict(model="tiny", prompt="a b c", raw=True, stream=False, options=GREEDY | option)
        _, (answer,) = asked(app, "/api/generate", body)
        assert answer["response"] == lm.generate("a b c", **{"max_new_tokens": 12, **ours}).text, option
    plain = lm.generate("a b c", max_new_tokens=12).text
    _, (answer,) = asked(app, "/api/generate", dict(body, options=GREEDY | dict(stop=[plain[4:7]])))
    assert answer["response"] == plain[:plain.index(plain[4:7])] and answer["done_reason"] == "stop"
    _, (answer,) = asked(app, "/api/generate", dict(body, options=GREEDY | dict(num_ctx=6, num_predict=-1)))
    assert answer["prompt_eval_count"] + answer["eval_count"] == 6 and answer["done_reason"] == "length"
    status, (answer,) = asked(app, "/api/generate", dict(body, options=dict(num_ctx=2)))
    assert status == 400 and "num_ctx" in answer["error"]


def test_defaults_of_the_modelfile_are_under_those_of_the_request(app, lm):
    asked(app, "/api/create", {"model": "Fixed", "from": "tiny", "parameters": GREEDY, "system": "Be brief.",
                               "messages": [dict(role="user", content="a"), dict(role="assistant", content="b")]})
    front = [dict(role="system", content="Be brief."), dict(role="user", content="a"),
             dict(role="assistant", content="b")]
    other = [dict(role="system", content="x"), *TALK]
    for messages, want in ((TALK, front + TALK), (other, [other[0], *front[1:], *TALK])):
        _, (answer,) = asked(app, "/api/chat", dict(model="fixed", messages=messages, stream=False))
        assert answer["message"]["content"] == lm.chat(want, max_new_tokens=12)
    body = dict(model="fixed", messages=TALK, stream=False)
    _, (answer,) = asked(app, "/api/chat", body | dict(options=dict(num_predict=3)))
    assert answer["eval_count"] == 3
    _, (answer,) = asked(app, "/api/generate", dict(model="fixed", prompt="x", template="{{ .System }}|{{ .Prompt }}|",
                                                    stream=False))
    assert answer["response"] == lm.generate("Be brief.|a|b|x|", max_new_tokens=12).text
    assert asked(app, "/api/copy", dict(source="fixed", destination="twin"))[0] == 200
    assert asked(app, "/api/delete", dict(model="fixed"), "DELETE")[0] == 200
    assert {m["name"] for m in asked(app, "/api/tags", None, "GET")[1][0]["models"]} == {"tiny:latest", "twin:latest"}
    assert asked(app, "/api/delete", dict(model="fixed"), "DELETE")[0] == 404


@pytest.mark.parametrize("path, body, status, word", [
    ("/api/chat", dict(model="no"), 404, "not found"), ("/api/chat", {}, 400, "model is required"),
    ("/api/chat", dict(model="tiny", messages=[dict(role="user", content="a", images=["x"])]), 501, "images"),
    ("/api/chat", dict(model="tiny", messages=TALK, tools=[{}]), 501, "does not support tools"),
    ("/api/chat", dict(model="tiny", messages=TALK, think=True), 501, "does not support thinking"),
    ("/api/chat", dict(model="tiny", messages=TALK, format="xml"), 400, "invalid format"),
    ("/api/chat", dict(model="tiny", messages=TALK, format={}, keep_alive="x"), 400, "keep_alive"),
    ("/api/chat", dict(model="tiny", messages=TALK, format=dict(type="object")), 501, "constrained"),
    ("/api/generate", dict(model="tiny", prompt="a", suffix="b"), 501, "insert"),
    ("/api/generate", dict(model="tiny", prompt="a", raw=True, template="x"), 400, "raw mode"),
    ("/api/generate", dict(model="tiny", prompt="a", template="{{ $x }}"), 501, "Go template"),
    ("/api/generate", dict(model="tiny", prompt="a", options=dict(mirostat=1)), 501, "mirostat"),
    ("/api/embed", dict(model="tiny", input=[""]), 400, "input"), ("/api/show", dict(model="no"), 404, "not found"),
    ("/api/create", {"model": "x", "from": "no"}, 404, "not found"), ("/api/create", dict(model="x"), 400, "from"),
    ("/api/create", {"model": "x", "from": "tiny", "quantize": "q4_0"}, 501, "quantize"),
    ("/api/pull", dict(model="x"), 501, "registry"), ("/v1/completions", {}, 501, "serving"),
    ("/x", {}, 404, "not part")])
def test_errors_have_ollamas_form(app, path, body, status, word):
    got, (answer,) = asked(app, path, body)
    assert got == status and list(answer) == ["error"] and word in answer["error"]


def test_an_error_in_mid_stream_is_the_last_line(lm):
    class Fails(OllamaApp):
        def write(self, *args):
            for i, piece in enumerate(OllamaApp.write(self, *args)):
                if i == 3: raise WorkbenchError("out of paper")
                yield piece
    fails = Fails({"tiny": lm})
    body = dict(model="tiny", messages=TALK, options=GREEDY)
    status, lines = asked(fails, "/api/chat", body)
    assert status == 200 and lines[-1] == dict(error="out of paper") and len(lines) == 4
    assert asked(fails, "/api/chat", body | dict(stream=False)) == (400, [dict(error="out of paper")])
    with serve(fails) as server:
        pieces = []
        with pytest.raises(Interrupted, match="out of paper") as e:
            stream = OllamaLM(server.url, "tiny").stream("What is a river?", max_new_tokens=12)
            for piece in stream: pieces.append(piece)
    assert e.value.text == "".join(pieces) and pieces, "what had come is kept"


def test_format_by_argument(lm):
    digits = torch.tensor([lm.tokenizer.decode([i]) in list("0123456789") for i in range(lm.decoder.config.vocab_size)])
    seen = []
    def constrain(lm, form):
        seen.append(form)
        return lambda rows, logits: logits.masked_fill(~digits, float("-inf"))
    ruled = OllamaApp({"tiny": lm}, constrain=constrain)
    body = dict(model="tiny", messages=TALK, stream=False, options=GREEDY)
    for form in ("json", dict(type="integer")):
        _, (answer,) = asked(ruled, "/api/chat", body | dict(format=form))
        assert answer["message"]["content"].isdigit()
    assert seen == ["json", dict(type="integer")]


def test_vectors(app, lm):
    body = dict(model="tiny", input=["a cat", "word " * 400])
    _, (answer,) = asked(app, "/api/embed", body)
    got = torch.tensor(answer["embeddings"])
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(got[:1], lm.embed("a cat"), atol=1e-5, rtol=1e-4)
    status, (answer,) = asked(app, "/api/embed", body | dict(truncate=False))
    assert status == 400 and "context" in answer["error"]
    _, (answer,) = asked(app, "/api/embed", dict(model="tiny", input="a cat", dimensions=5))
    torch.testing.assert_close(torch.tensor(answer["embeddings"]), torch.nn.functional.normalize(got[:1, :5], dim=1))
    _, (answer,) = asked(app, "/api/embeddings", dict(model="tiny", prompt="a cat"))
    torch.testing.assert_close(torch.tensor(answer["embedding"]), got[0], atol=1e-5, rtol=1e-4)
    assert asked(app, "/api/embed", dict(model="tiny", input="a", dimensions=10**30))[0] == 200
    assert asked(app, "/api/embed", dict(model="tiny", input=[]))[1][0]["embeddings"] == []
    other = OllamaApp({"tiny": lm}, embed=lambda lm, rows: torch.ones(len(rows), 4))
    assert asked(other, "/api/embed", dict(model="tiny", input="x"))[1][0]["embeddings"] == [[0.5] * 4]


def test_loading_and_letting_go(lm, tmp_path):
    loads, store = [], ModelStore(tmp_path / "models")
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama"}, {})       # a store reads no weights
    def load(path):
        loads.append(path)
        return lm
    store.create("a", Modelfile(str(tmp_path / "a.gguf"), GREEDY))
    app = OllamaApp(store=store, load=load)
    names = lambda: [m["name"] for m in asked(app, "/api/ps", None, "GET")[1][0]["models"]]
    assert names() == []
    _, (answer,) = asked(app, "/api/generate", dict(model="a"))
    assert (answer["done_reason"], names(), len(loads)) == ("load", ["a:latest"], 1)
    _, lines = asked(app, "/api/generate", dict(model="a", prompt="x", keep_alive=-1))
    assert lines[-1]["load_duration"] >= 0 and len(loads) == 1 and app.loaded["a:latest"].expires == float("inf")
    _, (answer,) = asked(app, "/api/chat", dict(model="a", messages=[], keep_alive=0))
    assert (answer["done_reason"], names()) == ("unload", [])
    asked(app, "/api/generate", dict(model="a", prompt="x", keep_alive="50ms"))
    time.sleep(0.06)
    assert names() == [] and len(loads) == 2
    asked(app, "/api/generate", dict(model="a"))
    store.create("a", Modelfile("a", system="changed"))
    assert app.served("a").modelfile.system == "changed" and len(loads) == 4, "what was made anew is loaded anew"
    assert asked(app, "/api/show", dict(model="a"))[1][0]["model_info"]["general.architecture"] == "llama"


# Over HTTP

def raw(server, data: bytes, more=b"") -> bytes:
    with socket.create_connection(server.server_address, timeout=20) as s:
        s.sendall(data)
        if more: s.sendall(more)
        s.shutdown(socket.SHUT_WR)
        out = b""
        while piece := s.recv(65536): out += piece
    return out


def test_http_is_kept(app):
    with serve(app) as server:
        post = b"POST /api/show HTTP/1.1\r\nHost: x\r\n"
        assert b"Ollama is running" in raw(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw(server, b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b"\r\n\r\n")
        assert b" 400 " in raw(server, post + b"Content-Length: x\r\n\r\n{}")
        assert b" 413 " in raw(server, post + b"Content-Length: %d\r\n\r\n" % (chapter.MAX_BODY + 9),
                               b"x" * (chapter.MAX_BODY + 9))
        assert b" 403 " in raw(server, post + b"Origin: https://evil.example\r\nContent-Length: 2\r\n\r\n{}")
        local = post + b"Origin: http://localhost:3000\r\nContent-Length: 16\r\n\r\n"
        assert b" 200 " in raw(server, local + b'{"model":"tiny"}')
        chunked = post + b"Transfer-Encoding: chunked\r\n\r\n4\r\n{\"mo\r\n%x\r\ndel\":\"tiny\"}\r\n0\r\n\r\n" % 12
        assert b" 200 " in raw(server, chunked)
        for bad in (b"zz\r\n", b"-5\r\nabc", b"ffffffffffffffffffff\r\nabc"):
            assert b" 200 " not in raw(server, post + b"Transfer-Encoding: chunked\r\n\r\n" + bad)
        assert b" 200 " not in raw(server, post + b"Content-Length: 500\r\n\r\n{}")
        keep = http.client.HTTPConnection(*server.server_address)
        for _ in range(3):                                          # one connection, several requests
            keep.request("POST", "/api/chat", json.dumps(dict(model="tiny", messages=TALK, options=GREEDY)))
            assert keep.getresponse().read().splitlines()[-1].startswith(b'{"model"')
        keep.close()
        with pytest.raises(SourceError, match="Cannot listen"):
            with serve(app, port=server.server_address[1]): pass


def test_two_clients_at_once(app, lm):
    prompts, got = ["one", "two", "three", "four"], {}
    with serve(app) as server:
        def client(p): got[p] = OllamaLM(server.url, "tiny").chat(p, max_new_tokens=24)
        threads = [threading.Thread(target=client, args=(p,)) for p in prompts]
        for t in threads: t.start()
        for t in threads: t.join()
    assert got == {p: lm.chat(p, max_new_tokens=24) for p in prompts} and len(set(got.values())) > 1


class Slow(OllamaApp):
    "Counts pieces, and takes its time for each."
    made = 0
    def write(self, *args):
        for piece in OllamaApp.write(self, *args):
            self.made += 1
            time.sleep(0.02)
            yield piece


class Deaf(Slow):          # mutant: asks nobody, and makes all before it sends
    def handle(self, method, path, body=None, gone=None):
        status, headers, pieces = Slow.handle(self, method, path, body)
        return status, headers, iter(list(pieces))


def pieces_after_hang_up(app, stream):
    with serve(app) as server:
        body = json.dumps(dict(model="tiny", messages=TALK, stream=stream,
                               options=dict(GREEDY, num_predict=100))).encode()
        s = socket.create_connection(server.server_address)
        s.sendall(b"POST /api/chat HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        while app.made < 3: time.sleep(0.005)
        s.close()
        last = -1
        while last != app.made:
            last = app.made
            time.sleep(0.3)
    return app.made


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_pays_no_more(lm, stream):
    assert pieces_after_hang_up(Slow({"tiny": lm}), stream) < 20
    if stream: assert pieces_after_hang_up(Deaf({"tiny": lm}), stream) > 50


def test_the_end_of_a_server_ends_its_answers(lm):
    app, got = Slow({"tiny": lm}), []
    with serve(app) as server:
        def client():
            try: OllamaLM(server.url, "tiny").generate("a b c", max_new_tokens=200)
            except Interrupted as e: got.append(e.text)
            except Exception as e: got.append(e)
        thread = threading.Thread(target=client)
        thread.start()
        while app.made < 3: time.sleep(0.005)
    thread.join(20)
    assert app.made < 50 and len(got) <= 1


def fake(*answers: bytes):
    "A server that says what it is told, and hangs up."
    listener = socket.create_server(("127.0.0.1", 0))
    def run():
        for answer in answers:
            with listener.accept()[0] as c:
                c.recv(65536)
                c.sendall(answer)
    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("answer, kind, word", [
    (HEAD + b'1f\r\n{"response":"ab","done":false}\n\r\n', Interrupted, "after 2|2 characters"),
    (HEAD + b'1f\r\n{"response":"ab","done":false}\n\r\n0\r\n\r\n', Interrupted, "after 2"),
    (b"", SourceError, "does not answer"), (b"garbage\r\n\r\n", SourceError, "does not answer"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", SourceError, "no Ollama"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", SourceError, "no Ollama"),
    (b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\nhm", SourceError, "500"),
    (b'HTTP/1.1 404 X\r\nContent-Length: 16\r\n\r\n{"error":"gone!"}', SourceError, "gone")])
def test_a_server_that_fails_is_one_named_error(answer, kind, word):
    with pytest.raises(kind, match=word) as e: OllamaLM(fake(answer), "m").generate("x")
    if kind is Interrupted: assert e.value.text == "ab"


def test_bad_calls_of_the_client():
    for host in ("", "ftp://x", "http://", "http://a:b"):
        with pytest.raises(InputError, match="no address"): OllamaLM(host, "m")
    quiet = OllamaLM("127.0.0.1:9", "m")
    for call in (lambda: quiet.stream("a", temperature="hot"), lambda: quiet.generate(""),
                 lambda: quiet.stream("a", top_k=1.5)):
        with pytest.raises(InputError): call()
    for call in (lambda: quiet.generate([1]), lambda: quiet.loglikelihood([("a", "b")])):
        with pytest.raises(UnsupportedError): call()
    with pytest.raises(SourceError, match="is Ollama running"): quiet.chat("a")


def test_settings_said_in_full_leave_no_default_of_ollama():
    assert set(DEFAULTS) <= set(chapter.options_of())
    ours, most, _ = settings_of(chapter.options_of())
    assert most == 256 and ours["temperature"] == 0 and ours["repetition_penalty"] == 1 and ours["top_p"] is None


# The real client

@pytest.fixture
def client(): return pytest.importorskip("ollama", reason="the ollama client is not installed: pip install ollama")


def test_the_real_client(client, lm, tmp_path):
    want = lm.chat(TALK, max_new_tokens=12)
    with serve(OllamaApp({"tiny": lm}, store=ModelStore(tmp_path), load=lambda path: lm)) as server:
        c = client.Client(server.url)
        assert c.chat("tiny", TALK, options=GREEDY).message.content == want
        assert c.generate("tiny", TALK[0]["content"], options=GREEDY).response == want
        parts = list(c.chat("tiny", TALK, options=GREEDY, stream=True))
        assert "".join(p.message.content for p in parts) == want and parts[-1].done_reason == "length"

        async def asynchronous():
            a = client.AsyncClient(server.url)
            both = await asyncio.gather(a.chat("tiny", TALK, options=GREEDY),
                                        a.generate("tiny", "x", raw=True, options=GREEDY))
            digest = await a.create_blob(embedded_model())              # sent in chunks
            await a.create("big", files={"m.gguf": digest}, system="s", parameters=GREEDY)
            return both[0].message.content, both[1].response, "".join([p.message.content async for p in await a.chat(
                "tiny", TALK, options=GREEDY, stream=True)])
        assert asyncio.run(asynchronous()) == (want, lm.generate("x", max_new_tokens=12).text, want)
        assert {m.model for m in c.list().models} == {"tiny:latest", "big:latest"}
        shown = c.show("big")
        assert shown.details.quantization_level == "Q4_1" and shown.modelinfo["llama.block_count"] == 30
        assert parse_modelfile(shown.modelfile).system == "s" and shown.modified_at.tzinfo
        assert len(c.embed("tiny", ["a", "b"]).embeddings) == 2 and len(c.embeddings("tiny", "a").embedding) == 32
        assert c.ps().models[0].context_length == 256
        assert c.copy("big", "twin").status == "success" and c.delete("big").status == "success"
        with pytest.raises(client.ResponseError, match="not found") as e: c.show("big")
        assert e.value.status_code == 404
        with pytest.raises(client.ResponseError, match="images"): c.generate("tiny", "a", images=[b"x"])
        with pytest.raises(client.ResponseError, match="registry"): list(c.pull("llama3", stream=True))
        with pytest.raises(client.ResponseError, match="mismatch"):
            c._request_raw("POST", "/api/blobs/sha256:" + "0" * 64, content=b"abc")
