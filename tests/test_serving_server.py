"""The server: every field honoured, every body answered, and nothing left behind by clients that leave, sleep or flood;
planted mistakes are noticed."""
import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import TALK, Call, ask, events_of, idle, made, text_of, tiny

from llm_workbench.errors import ContextLengthError, InputError, Overloaded, SourceError
from llm_workbench.serving import openai_protocol as protocol
from llm_workbench.serving import openai_server as chapter
from llm_workbench.serving.engine import Piece
from llm_workbench.serving.openai_protocol import Limits
from llm_workbench.serving.openai_server import Line, Server, start

pytest.importorskip("fastapi", reason="FastAPI is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def lm(): return tiny()


@pytest.fixture(scope="module")
def world(lm):
    runner, app = made(lm)
    yield runner, app
    runner.close()


@pytest.fixture
def app(world): return world[1]


# Fields

@pytest.mark.parametrize("asked, ours", [
    (dict(), dict()), (dict(temperature=1.3, seed=4), dict(temperature=1.3, seed=4)),
    (dict(temperature=2.0, seed=4, top_k=3), dict(temperature=2.0, seed=4, top_k=3)),
    (dict(temperature=2.0, seed=4, top_k=-1, top_p=0.5), dict(temperature=2.0, seed=4, top_p=0.5)),
    (dict(temperature=2.0, seed=4, min_p=0.3), dict(temperature=2.0, seed=4, min_p=0.3)),
    (dict(repetition_penalty=1.8), dict(repetition_penalty=1.8)),
    (dict(presence_penalty=2.0), dict(presence_penalty=2.0)),
    (dict(frequency_penalty=2), dict(frequency_penalty=2))], ids=str)
def test_every_setting_arrives(app, lm, asked, ours):
    want = lm.generate("a b c", max_new_tokens=10, **ours).text
    body = dict(prompt="a b c", max_tokens=10, temperature=0) | asked
    assert ask(app, COMPLETE, body).json["choices"][0]["text"] == want
    assert text_of(ask(app, COMPLETE, body | dict(stream=True)).events) == want


def test_texts_of_one_prompt_and_their_seeds(app, lm):
    body = dict(messages=TALK, n=3, seed=7, max_completion_tokens=6, max_tokens=99)
    choices = ask(app, CHAT, body).json["choices"]
    ids = lm.chat_ids(TALK)
    want = [lm.generate(ids, max_new_tokens=6, temperature=1.0, seed=7 + i).text for i in range(3)]
    assert [c["message"]["content"] for c in choices] == want and [c["index"] for c in choices] == [0, 1, 2]
    streams = {i: "" for i in range(3)}
    for e in ask(app, CHAT, body | dict(stream=True)).events[:-1]:
        streams[e["choices"][0]["index"]] += e["choices"][0]["delta"].get("content", "")
    assert list(streams.values()) == want


def test_bias_end_tokens_and_special_fields(app, lm):
    token = lm.tokenizer.encode(" river")[0]
    said = ask(app, COMPLETE, dict(prompt="a", max_tokens=3, logit_bias={str(token): 100}, temperature=0)).json
    assert said["choices"][0]["text"] == " river" * 3
    ends = {str(lm.tokenizer.eos_ids[0]): 100}
    said = ask(app, COMPLETE, dict(prompt="a", max_tokens=3, logit_bias=ends, temperature=0)).json
    assert said["choices"][0]["finish_reason"] == "stop" and said["choices"][0]["text"] == ""
    said = ask(app, COMPLETE, dict(prompt="a", max_tokens=3, logit_bias=ends, temperature=0, ignore_eos=True)).json
    assert said["choices"][0]["finish_reason"] == "length" and said["usage"]["completion_tokens"] == 3


def test_what_is_unknown_is_ignored_aloud(app, caplog):
    with caplog.at_level(logging.INFO, "llm_workbench.serving"):
        body = dict(messages=TALK, max_tokens=1, metadata={}, store=True, service_tier="auto", reasoning_effort="low")
        assert ask(app, CHAT, body | dict(new=1)).status == 200
    assert all(name in caplog.text for name in ("metadata", "store", "service_tier", "reasoning_effort", "new"))


def check_stream(events, want, stop=None):
    "A stream says each character once, none of a stop string, and ends as it must."
    assert events[-1] == "[DONE]" and all(isinstance(e, dict) for e in events[:-1])
    assert events[0]["choices"][0]["delta"]["role"] == "assistant" and len({e["id"] for e in events[:-1]}) == 1
    reasons = [e["choices"][0]["finish_reason"] for e in events[:-1] if e["choices"]]
    assert reasons[-1] and not any(reasons[:-1])
    assert text_of(events) == want and not (stop and stop in text_of(events))


def test_stop_strings_across_the_borders_of_chunks(app, lm, monkeypatch):
    plain = lm.generate(lm.chat_ids(TALK), max_new_tokens=40)
    words = lm.tokenizer.pieces(plain.tokens)
    plainly = lambda word: word.isascii() and len(word) > 1
    at = next(i for i in range(4, 38) if plainly(words[i]) and plainly(words[i + 1]))
    stop = words[at][-1] + words[at + 1][0]                        # its halves come in two tokens
    want = plain.text[:plain.text.index(stop)]
    body = dict(messages=TALK, temperature=0, max_tokens=40, stream=True, stop=["never", stop])
    check_stream(ask(app, CHAT, body).events, want, stop)
    assert ask(app, CHAT, body | dict(stream=False)).json["choices"][0]["finish_reason"] == "stop"
    full = body | dict(stop=None)
    check_stream(ask(app, CHAT, full).events, plain.text)
    put = Line.put
    mutants = dict(twice=lambda self, i, piece: (put(self, i, piece), put(self, i, piece)) if piece.reason is None
                   else put(self, i, piece),
                   lost=lambda self, i, piece: put(self, i, piece) if piece.reason or self.put_in % 3 else
                   setattr(self, "put_in", self.put_in + 1))
    for mutant in mutants.values():
        monkeypatch.setattr(Line, "put", mutant)
        with pytest.raises(AssertionError): check_stream(ask(app, CHAT, full).events, plain.text)
    monkeypatch.undo()
    monkeypatch.setattr(protocol.Choice, "take", lambda self, piece, take=protocol.Choice.take:
                        take(self, Piece(piece.index, lm.tokenizer.decode(piece.tokens), piece.tokens,
                                         reason=piece.reason)))
    with pytest.raises(AssertionError): check_stream(ask(app, CHAT, body).events, want, stop)     # each token as it is


def test_usage_comes_where_it_is_asked_for(app):
    body = dict(messages=TALK, max_tokens=4, stream=True, ignore_eos=True)
    plain = ask(app, CHAT, body).events
    assert not any("usage" in e for e in plain[:-1])
    *chunks, last, done = ask(app, CHAT, body | dict(stream_options=dict(include_usage=True))).events
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert all(c["usage"] is None for c in chunks)


# Bodies

WORDS = st.sampled_from(["", "a", "auto", "json_object", "\ud800"])
SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | WORDS
KEYS = st.sampled_from("role content type function name text schema json_schema format arguments 0".split())
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=6)
FIELDS = """model messages prompt input tokens temperature top_p n stop seed logprobs top_logprobs stream stream_options
response_format tools tool_choice logit_bias echo best_of suffix text max_completion_tokens chat_template_kwargs
continue_final_message instructions previous_response_id encoding_format dimensions add_special_tokens functions top_k
cache_salt priority options format""".split()
PATHS = [CHAT, COMPLETE, "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize", "/api/chat", "/api/generate",
         "/v1/nothing"]
SURE = dict(messages=st.just(TALK), prompt=st.just("a"), input=st.just("a"), options=st.just(dict(num_predict=2)))
GOOD = st.fixed_dictionaries(SURE, optional={f: VALUES for f in FIELDS if f not in SURE})


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PATHS), body=GOOD | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5) | VALUES)
def test_any_body_has_an_answer_in_the_protocols_shape(world, path, body):
    runner, app = world
    if isinstance(body, dict) and not path.startswith("/api"): body = dict(body, max_tokens=2, max_output_tokens=2)
    if isinstance(body, dict) and path.startswith("/api"):
        body = dict(body, model="tiny-model", options=dict(num_predict=2))
    call = ask(app, path, json.dumps(body).encode())
    allowed = (200, 400, 404, 501) if path.startswith("/api") else (200, 400, 404)
    assert call.status in allowed, (path, body, call.data)
    if call.status != 200 and not path.startswith("/api"):
        error = call.json["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        assert "internal" not in error["message"]
    else: assert b"internal error" not in call.data, (path, body, call.data)
    assert runner.alive


@pytest.mark.parametrize("body", [b"{", b"[]", b'"a"', b"1", b"\xff", b"[" * 100_000, b"", b'{"a":' * 5000, b"null"])
def test_what_is_no_object_is_refused(app, body):
    for path in (CHAT, COMPLETE, "/v1/responses", "/v1/embeddings", "/tokenize"):
        call = ask(app, path, body)
        assert call.status == 400 and call.json["error"]["message"], (path, call.data)


def test_bombs_are_refused(app):
    deep = b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", '
    deep += b'"json_schema": {"schema": ' + b'{"properties": {"a": ' * 450 + b"{}" + b"}}" * 450 + b"}}}"
    assert ask(app, CHAT, deep).status == 400
    many = {"type": "string", "minLength": 10**9}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    for schema in (many, wide):
        form = dict(type="json_schema", json_schema=dict(name="x", schema=schema))
        assert ask(app, CHAT, dict(messages=TALK, response_format=form, max_tokens=2)).status == 400
    for more in (dict(n=17), dict(stop=["x"] * 17), dict(stop="x" * 201), dict(logprobs=True, top_logprobs=21),
                 dict(priority=-1), dict(chat_template="{{ messages }}"), dict(max_tokens=10**9),
                 dict(chat_template_kwargs=dict(messages=[])),
                 dict(tools=[dict(type="function", function=dict(name=f"f{i}")) for i in range(129)])):
        assert ask(app, CHAT, dict(messages=TALK) | more).status == 400, more
    call = ask(app, COMPLETE, dict(prompt=["a"] * 20, n=16))
    assert call.status == 400 and "256" in call.json["error"]["message"]


def test_bodies_that_are_too_large_or_never_come(lm):
    runner, app = made(lm, limits=Limits(body=1000, stall=0.1))
    parts = [b"x" * 400] * 5                                       # says no length, and is read no further than needed
    call = Call(app, CHAT, parts=parts, body=b"")
    asyncio.run(call.run())
    assert call.status == 413 and len(call.parts) == 2 and call.headers["connection"] == "close"
    async def slow():
        call = Call(app, CHAT, b"")
        call.receive = asyncio.Event().wait
        return await call.run()
    assert asyncio.run(slow()).status == 408
    runner.close()


# The gate

def test_keys_and_what_they_keep_apart(lm):
    runner, app = made(lm, key=["first-key", "second-key"])
    body = dict(messages=[dict(role="user", content="a long story " * 30)], max_tokens=1)
    used = lambda key, **more: ask(app, CHAT, body | more, headers=dict(Authorization=f"Bearer {key}")).json["usage"]
    cached = lambda *a, **k: used(*a, **k)["prompt_tokens_details"]["cached_tokens"]
    assert cached("first-key") == 0 < cached("first-key")
    assert cached("second-key") == 0 < cached("second-key"), "a tenant sees by the time what another has asked"
    assert cached("first-key", cache_salt="mine") == 0
    for given in ("", "Bearer ", "Bearer first-ke", "first-key", "Bearer first-keys"):
        call = ask(app, CHAT, body, headers=dict(Authorization=given))
        assert call.status == 401 and call.json["error"]["code"] == "invalid_api_key", given
    assert ask(app, "/v1/models").status == 401 == ask(app, "/api/tags").status == ask(app, "/metrics").status
    assert ask(app, "/health").status == 200
    runner.close()
    for bad in ("", "short", ["long-enough", "ä" * 9]):
        with pytest.raises(InputError, match="key"): made(lm, key=bad if bad else [""])
    with pytest.raises(InputError, match="web page"): made(lm, origins=["*"])


def test_web_pages_must_be_named(lm, app):
    evil, good = dict(Origin="https://evil.example"), dict(Origin="http://localhost:3000")
    assert ask(app, CHAT, dict(messages=TALK, max_tokens=1), headers=evil).status == 403
    assert ask(app, "/v1/models", headers=dict(host="rebound.example")).status == 403
    assert ask(app, "/v1/models", headers=dict(host="[::1]:8000")).status == 200
    runner, open_to_one = made(lm, origins=[good["Origin"]])
    call = ask(open_to_one, CHAT, dict(messages=TALK, max_tokens=1), headers=good)
    assert call.status == 200 and call.headers["access-control-allow-origin"] == good["Origin"]
    assert ask(open_to_one, CHAT, dict(messages=TALK, max_tokens=1), headers=evil).status == 403
    before = dict(good, **{"Access-Control-Request-Method": "POST"})
    assert ask(open_to_one, CHAT, method="OPTIONS", headers=before).status == 200
    runner.close()


def test_a_request_has_a_name(app):
    assert ask(app, "/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = ask(app, "/health", headers={"x-request-id": "bad\tname"}).headers["x-request-id"]
    assert re.fullmatch(r"req_\w{32}", made)
    assert "x-request-id" in ask(app, CHAT, b"{").headers


def test_the_small_answers(app, lm, world):
    listed = ask(app, "/v1/models").json["data"]
    assert [m["id"] for m in listed] == ["tiny-model"] and listed[0]["max_model_len"] == 512
    assert ask(app, "/v1/models/tiny-model").json == listed[0]
    assert ask(app, "/v1/models/other").json["error"]["code"] == "model_not_found"
    for text in ("a <|im_end|> b", "naïve 🙂", ""):
        told = ask(app, "/tokenize", dict(prompt=text)).json
        assert told["tokens"] == lm.tokenizer.encode(text, special=True) and told["count"] == len(told["tokens"])
        assert ask(app, "/detokenize", dict(tokens=told["tokens"])).json == dict(prompt=text)
    assert ask(app, "/tokenize", dict(messages=TALK)).json["tokens"] == lm.chat_ids(TALK)
    assert ask(app, "/detokenize", dict(tokens=[10**9])).status == 400
    info = ask(app, "/tokenizer_info").json
    assert info["eos_token"] == lm.tokenizer.decode([lm.tokenizer.eos_id]) and info["chat_template"]
    assert ask(app, "/version").json["version"] and ask(app, "/").status == 200
    assert ask(app, "/nothing").status == 404 and ask(app, CHAT).status == 405
    assert ask(app, "/nothing").json["error"]["code"] == "unknown_url"
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    told = ask(app, "/metrics").data.decode()
    found = {f.name: f for f in parser.text_string_to_metric_families(told)}
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prompt_tokens",
            "vllm:generation_tokens", "vllm:time_to_first_token_seconds", "vllm:request_success"} <= found.keys()
    assert found["vllm:time_to_first_token_seconds"].type == "histogram"


# What goes wrong

def long(**more): return dict(messages=TALK, max_tokens=400, ignore_eos=True, stream=True) | more


def test_whoever_leaves_costs_no_more_than_a_step(lm):
    runner, app = made(lm)
    async def leaves(**more):
        call = Call(app, CHAT, long(**more))
        task = asyncio.ensure_future(call.run())
        while more.get("stream", True) and call.data.count(b"content") < 3 or not runner.open: await asyncio.sleep(0)
        call.gone.set()
        await asyncio.wait_for(task, 5)
        return call
    step, after = runner.engine.step, []
    def counting():
        if not runner.open: after.append(1)
        return step()
    runner.engine.step = counting
    for more in (dict(), dict(stream=False), dict(n=3)):
        written = runner.stats()["generation_tokens_total"]
        asyncio.run(leaves(**more))
        assert idle(runner, 5), "something of a client that has left is still there"
        assert runner.stats()["generation_tokens_total"] - written < 300
    assert runner.stats()["request_success_total"]["left"] == 5
    runner.close()


def test_whoever_leaves_while_the_request_is_prepared_leaves_nothing(lm, monkeypatch):
    runner, app = made(lm)
    begun, go = threading.Event(), threading.Event()
    submit = runner.submit
    def held(request, deliver):
        begun.set()
        go.wait(5)
        return submit(request, deliver)
    runner.submit = held
    async def cut():
        task = asyncio.ensure_future(Call(app, CHAT, long()).run())
        await asyncio.to_thread(begun.wait, 5)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError): await task
        go.set()
    asyncio.run(cut())
    assert idle(runner)
    runner.close()


def test_a_reader_who_sleeps_is_given_up_and_holds_up_nobody(lm):
    runner, app = made(lm, limits=Limits(unread=20, stall=30))
    async def both():
        asleep, awake = Call(app, CHAT, long(), read=False), Call(app, CHAT, long(max_tokens=30, stream=False))
        task = asyncio.ensure_future(asleep.run())
        await asyncio.wait_for(awake.run(), 20)
        assert awake.status == 200
        assert await asyncio.to_thread(idle, runner), "a client that does not read keeps its pages"
        assert runner.stats()["request_success_total"]["left"] == 1 and runner.stats()["generation_tokens_total"] < 300
        asleep.read.set()                                          # it wakes up: the end of what it hears is the reason
        await asyncio.wait_for(task, 5)
        return asleep
    asleep = asyncio.run(both())
    assert asleep.events[-1]["error"]["code"] == "slow_reader"
    runner.close()
    runner, app = made(lm, limits=Limits(stall=0.1))                # one who never wakes
    async def never():
        call = Call(app, CHAT, long(), read=False)
        call.read.clear()
        await asyncio.wait_for(call.run(), 5)
    asyncio.run(never())
    assert idle(runner)
    runner.close()


def test_an_engine_that_dies_is_told_to_everybody(lm):
    runner, app = made(lm)
    step, n = runner.engine.step, iter(range(10**9))
    def dies():
        if next(n) == 12: raise MemoryError("no room")
        return step()
    runner.engine.step = dies
    assert ask(app, "/health").status == 200
    async def all_of_them():
        calls = [Call(app, CHAT, long()), Call(app, CHAT, long(stream=False)),
                 Call(app, "/v1/responses", dict(input="a", ignore_eos=True, stream=True)),
                 Call(app, COMPLETE, dict(prompt="a", max_tokens=300, ignore_eos=True, stream=True))]
        await asyncio.wait_for(asyncio.gather(*[c.run() for c in calls]), 20)
        return calls
    streamed, whole, response, completion = asyncio.run(all_of_them())
    assert streamed.status == 200 and "stopped" in streamed.events[-1]["error"]["message"] and whole.status == 503
    assert response.events[-1]["type"] == "response.failed" and "error" in completion.events[-1]
    assert ask(app, "/health").status == 503 and ask(app, CHAT, long()).status == 503
    assert ask(app, "/api/chat", dict(model="tiny-model", messages=TALK)).status == 503


def test_a_full_house_says_when_to_come_back(lm):
    runner, app = made(lm, most=1, queue=1)
    go = threading.Event()
    step = runner.engine.step
    runner.engine.step = lambda: (go.wait(10), step())[1]
    async def crowd():
        calls = [Call(app, CHAT, dict(messages=TALK, max_tokens=2)) for _ in range(5)]
        tasks = [asyncio.ensure_future(c.run()) for c in calls]
        while sum(t.done() for t in tasks) < 3: await asyncio.sleep(0.01)
        go.set()
        await asyncio.gather(*tasks)
        return calls
    calls = asyncio.run(crowd())
    assert sorted(c.status for c in calls) == [200, 200, 429, 429, 429]
    full = next(c for c in calls if c.status == 429)
    assert int(full.headers["retry-after"]) >= 1 and full.json["error"]["code"] == "rate_limit_exceeded"
    many = ask(app, COMPLETE, dict(prompt=["a", "b", "c"], max_tokens=1))    # the third has no room: nothing stays
    assert many.status == 429 and idle(runner)
    runner.close()
    runner, app = made(lm, limits=Limits(open=0))
    assert ask(app, CHAT, long()).status == 429 and ask(app, "/health").status == 200
    runner.close()


def test_a_text_that_no_cache_holds_is_refused_before_it_waits(lm):
    runner, app = made(lm, memory=2**16)
    assert app.state.service.limits.context < 512
    call = ask(app, CHAT, long(max_tokens=450, stream=False))
    assert call.status == 400 and call.json["error"]["code"] == "context_length_exceeded"
    assert ask(app, CHAT, dict(messages=TALK, max_tokens=2)).status == 200
    runner.close()


def test_silence_is_filled_with_comments(lm, monkeypatch):
    runner, app = made(lm)
    step = runner.engine.step
    runner.engine.step = lambda: (time.sleep(0.3), step())[1]
    monkeypatch.setattr(chapter.Written, "silence", 0.05)
    monkeypatch.setattr(Line.next, "__defaults__", (0.05,))
    call = ask(app, CHAT, long(max_tokens=2))
    assert b": still here\n\n" in call.data and events_of(call.data)[-1] == "[DONE]"
    runner.close()


@pytest.mark.parametrize("error, status, code", [
    (ContextLengthError("x"), 400, "context_length_exceeded"), (Overloaded("x", 7.2), 429, "rate_limit_exceeded"),
    (SourceError("x"), 500, "internal_error"), (ZeroDivisionError("secret"), 500, "internal_error")])
def test_errors_of_all_kinds(error, status, code):
    told = protocol.refusal(error)
    assert (told.status, told.code) == (status, code) and "secret" not in str(told)
    assert status != 429 or told.headers["Retry-After"] == "8"


# Sockets

def test_draining_finishes_what_runs_and_refuses_the_rest(lm):
    server = start(lm, memory=2**24, name="m")
    step = server.runner.engine.step
    server.runner.engine.step = lambda: (time.sleep(0.02), step())[1]
    host = server.url.removeprefix("http://").split(":")
    def post(body):
        s = socket.create_connection(host, timeout=20)
        data = json.dumps(body).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        s.sendall(head % len(data) + data)
        return s
    stream = post(long(max_tokens=40))
    while b"content" not in (data := stream.recv(4096)): pass
    closing = threading.Thread(target=server.close)
    closing.start()
    while not server.service.draining: time.sleep(0.005)
    late = post(long())
    assert b" 503 " in late.recv(4096)
    while not data.endswith(b"0\r\n\r\n"): data += stream.recv(4096)
    assert b'"finish_reason":"length"' in data and b"data: [DONE]" in data
    closing.join(10)
    with pytest.raises(OSError): socket.create_connection(host, timeout=1)
    assert not server.thread.is_alive() and not server.runner.alive
    server.close()                                                 # twice does nothing


def test_ports_and_addresses(lm):
    with start(lm, memory=2**24) as server:
        port = int(server.url.rsplit(":")[-1])
        with pytest.raises(SourceError, match="listen"): start(lm, port=port, memory=2**24)
        assert threading.active_count() < 40
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 99999)):
        with pytest.raises(SourceError): start(lm, host, port, memory=2**24)
    runner, app = made(lm)
    with pytest.raises(InputError, match="give a key"): Server(app, "0.0.0.0")
    runner.close()
    with start(lm, "0.0.0.0", memory=2**24) as server:
        assert len(server.service.keys[0]) > 20 and server.service.keys[0] in chapter.greeting(server)


def test_the_command_serves_and_finishes_what_runs_when_told_to_leave():
    env = dict(os.environ, LLM_WORKBENCH_KEY="from-the-environment", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "llm_workbench.cli", "serve", "--port", "0", "--memory", "0.2"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        body = json.dumps(dict(messages=TALK, max_tokens=30, ignore_eos=True, stream=True)).encode()
        with socket.create_connection(url.removeprefix("http://").split(":"), timeout=30) as s:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer from-the-environment\r\n"
                      b"Content-Length: %d\r\n\r\n" % len(body) + body)
            data = b""
            while data.count(b'"content":') < 3: data += s.recv(4096)
            process.send_signal(signal.SIGTERM)
            while not data.endswith(b"0\r\n\r\n"): data += s.recv(4096)
        assert b"data: [DONE]" in data and b'"finish_reason":"length"' in data
        assert process.wait(20) == 0, process.stderr.read()
    finally: process.kill()
