"The load driver in virtual time, its client against servers that misbehave, its numbers, and mutants of all three."
import asyncio
import json
import socketserver
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llm_workbench.errors import InputError, Overloaded
from llm_workbench.serving.load import (
    Call, Record, Run, VirtualTime, arrivals, calls, chats, dashboard, drive, in_process, in_time, interval, live,
    meets, over_http, quantile, read_metrics, scrape)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import serving as bench  # noqa: E402


def chair(seconds=1.0, pieces=1, each=1):
    "A server for one at a time: `pieces` of `each` tokens, `seconds` apart."
    lock = asyncio.Lock()
    async def target(call, record):
        async with lock:
            for _ in range(pieces):
                await asyncio.sleep(seconds)
                yield each
    return target


def full(times, retry_after=0.5, then=chair()):
    "A server that refuses so many times."
    left = [times]
    async def target(call, record):
        left[0] -= 1
        if left[0] >= 0: raise Overloaded("full", retry_after)
        async for n in then(call, record): yield n
    return target


def virtual(target, workload, **options): return drive(target, workload, clock=VirtualTime, **options)
def at(*times, **more): return [Call(t, [1], 1, **more) for t in times]


# --- the driver -------------------------------------------------------------------------------------------------------

def check_open_loop(drive):
    "Four come faster than they are served: each is sent when it is due, and counts from then."
    run = drive(chair(1.0, pieces=2), at(0.5, 0.75, 1.0, 2.0), clock=VirtualTime)
    assert [r.sent for r in run.records] == [0.5, 0.75, 1.0, 2.0], "requests were not sent when they were due"
    assert [r.ttft for r in run.records] == [1.0, 2.75, 4.5, 5.5], "time in the queue is not counted"
    assert [r.latency for r in run.records] == [2.0, 3.75, 5.5, 6.5] and run.seconds == 8.5


def check_retries(drive):
    "A refused client comes again when it was told to, and its waiting counts."
    record = drive(full(2), at(0.0), retries=2, clock=VirtualTime).records[0]
    assert (record.tries, record.reason, record.ttft) == (3, "stop", 2.0), "what was lost by refusals is not counted"
    record = drive(full(2), at(0.0), retries=1, clock=VirtualTime).records[0]
    assert (record.tries, record.reason, record.ended) == (2, "refused", 0.5), "it came more often than it may"


def test_open_loop(): check_open_loop(drive)
def test_retries(): check_retries(drive)


def one_after_another(target, workload, **options):
    "The closed loop in disguise: the next request waits for the last answer, and time counts from sending."
    return drive(target, workload, **options, clients=1)


def patient_in_secret(target, workload, retries=0, **options):
    "Time starts again with every try."
    run = drive(target, workload, retries=retries, **options)
    for r in run.records: r.arrived += 0.5 * (r.tries - 1)
    return run


def test_a_closed_loop_in_disguise_is_rejected():
    with pytest.raises(AssertionError, match="when they were due"): check_open_loop(one_after_another)


def test_forgotten_tries_are_rejected():
    with pytest.raises(AssertionError, match="lost by refusals"): check_retries(patient_in_secret)


def test_a_late_client_does_not_hide_the_waiting():
    "If our own loop is blocked, requests are sent late; they count from when they were due."
    async def blocking(call, record):
        if call.at == 0.0: time.sleep(0.3)
        yield 1
    run = drive(blocking, at(0.0, 0.05))
    assert run.records[1].sent > 0.25 and run.records[1].ttft > 0.2


def test_whatever_a_target_raises_is_kept_with_the_record():
    async def broken(call, record):
        yield 1
        raise ValueError("no such model")
    async def at_once(call, record):
        raise KeyError("x")
        yield
    run = virtual(broken, at(0.0))
    assert (run.records[0].reason, run.records[0].error) == ("error", "ValueError: no such model")
    assert virtual(at_once, at(0.0)).records[0].error == "KeyError: 'x'"
    assert run.summary()["error"] == 1 and np.isnan(run.summary()["good/s"]), "a run of no seconds has no rates"


def test_those_who_leave_close_the_stream_at_once():
    closed = []
    async def target(call, record):
        try:
            for _ in range(100):
                await asyncio.sleep(0.1)
                yield 2
        finally: closed.append(round(asyncio.get_running_loop().time(), 6))
    run = virtual(target, [Call(0.0, [1], 200, leaves=5), Call(0.0, [1], 200, patience=0.75)])
    assert [(r.reason, r.tokens, round(r.ended, 6)) for r in run.records] == [("left", 6, 0.3), ("left", 14, 0.75)]
    assert closed == [0.3, 0.75], "the stream must end when its reader goes, not later"


def test_slow_readers_rest_and_others_do_not_wait_for_them():
    async def target(call, record):
        for _ in range(3): yield 1
    run = virtual(target, [Call(0.0, [1], 3, rests=1.0), Call(0.0, [1], 3)])
    assert [r.ended for r in run.records] == [3.0, 0.0]


def test_an_empty_piece_is_no_first_token():
    async def target(call, record):
        yield 0
        await asyncio.sleep(1.0)
        yield 1
    assert virtual(target, at(0.0)).records[0].ttft == 1.0


def test_history_by_functions_and_coroutines_and_a_watch_that_fails():
    async def later():
        await asyncio.sleep(0.25)
        return dict(x=1)
    assert [t for t, _ in virtual(chair(), at(0.0), watch=lambda: dict(x=1), every=0.4).history] == [0.0, 0.4, 0.8]
    assert [t for t, _ in virtual(chair(), at(0.0), watch=later, every=0.5).history] == [0.0, 0.75]
    with pytest.raises(ZeroDivisionError): virtual(chair(), at(0.0), watch=lambda: 1 / 0)
    said = iter([dict(x=1)])
    assert len(virtual(chair(), at(0.0), watch=lambda: next(said), every=0.1).history) == 1, "what was seen is kept"


def test_a_chain_of_turns_breaks_where_one_fails():
    workload = [Call(0.0, [1], 1), Call(1.0, [1], 1, after=0), Call(1.0, [1], 1, after=1)]
    assert [r.arrived for r in virtual(chair(), workload).records] == [0.0, 2.0, 4.0]
    run = virtual(full(1), workload)
    assert [(r.reason, r.tries) for r in run.records] == [("refused", 1), ("left", 0), ("left", 0)]


# --- numbers ----------------------------------------------------------------------------------------------------------

def lumps(usage=None):
    return Record(Call(0.0, [1], 9), 1.0, 1.2, [(2.0, 1), (2.4, 4), (2.8, 4)], 2.8, "length", usage=usage)


def check_metrics(ttft, tpot, itl):
    r = lumps()
    assert np.isclose(ttft(r), 1.0), "the first token counts from arrival"
    assert np.isclose(tpot(r), 0.8 / 8), "the first token's time is no reading speed, and pieces are no tokens"
    assert np.isclose(itl(r).sum(), 0.8) and len(itl(r)) == 8, "gaps are between tokens"


def test_metrics(): check_metrics(*(lambda r, n=n: getattr(r, n) for n in ("ttft", "tpot", "itl")))


MUTANTS = {
    "counts from sending": dict(ttft=lambda r: r.pieces[0][0] - r.sent),
    "latency over all tokens": dict(tpot=lambda r: r.latency / r.tokens),
    "pieces as tokens": dict(tpot=lambda r: (r.latency - r.ttft) / (len(r.pieces) - 1)),
    "gaps of pieces": dict(itl=lambda r: np.diff([t for t, _ in r.pieces])),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_other_definitions_are_rejected(mutant):
    right = {n: lambda r, n=n: getattr(r, n) for n in ("ttft", "tpot", "itl")}
    with pytest.raises(AssertionError): check_metrics(**right | MUTANTS[mutant])


@pytest.mark.parametrize("usage", [1, 2, 3, 9, 20, 100])
def test_gaps_add_up_whatever_the_server_counts(usage):
    r = lumps(usage)
    assert r.tokens == usage and len(r.itl) == usage - 1
    assert usage == 1 or np.isclose(r.itl.sum(), r.latency - r.ttft)
    assert (r.itl >= 0).all()


def test_goodput_counts_everybody_who_asked():
    slow, fast = lumps(), Record(Call(0.0, [1], 2), 0.0, 0.0, [(0.1, 1), (0.2, 1)], 0.2, "stop")
    lost = Record(Call(0.0, [1], 1), reason="refused")
    told = Run([slow, fast, lost, lost], 4.0, []).summary(dict(ttft=0.5))
    assert (told["good/s"], told["good share"], told["requests/s"], told["refused"]) == (0.25, 0.25, 0.5, 2)
    assert meets(fast, dict(ttft=0.5, tpot=0.11, latency=0.2)) and not meets(fast, dict(tpot=0.09))
    assert meets(fast, None) and not meets(lost, {})


@pytest.mark.parametrize("wrong", [(0, 3), (-1, 3), (1.0, 0), (1.0, 3, 0.0), (np.nan, 3), (1.0, 3, -1)])
def test_arrivals_without_sense(wrong):
    with pytest.raises(InputError, match="above 0"): arrivals(*wrong)


@pytest.mark.parametrize("burstiness", [0.05, 0.5, 1.0, 4.0, np.inf])
def test_arrivals_keep_rate_order_and_seed(burstiness):
    times = arrivals(4.0, 200, burstiness, seed=3)
    assert np.isclose(times[-1], 50.0) and (np.diff(times) >= 0).all() and times[0] > 0
    assert (times == arrivals(4.0, 200, burstiness, seed=3)).all()
    assert burstiness == np.inf or (times != arrivals(4.0, 200, burstiness, seed=4)).any()


def test_bursts_follow_vllms_formula():
    "The same draws as numpy's legacy generator in `vllm bench serve`: gamma(shape, 1 / (rate * shape)), rescaled."
    rng = np.random.default_rng(7)
    delays = rng.gamma(shape=0.3, scale=1.0 / (5.0 * 0.3), size=50).cumsum()
    assert np.allclose(arrivals(5.0, 50, 0.3, seed=7), delays * (50 / 5.0) / delays[-1])


def test_workloads_are_the_same_for_the_same_seed():
    a, b = (calls(arrivals(1, 5), 4, 2, seed=9, shared=[1, 2]) for _ in range(2))
    assert a == b and a != calls(arrivals(1, 5), 4, 2, seed=10, shared=[1, 2])
    assert all(100 <= t < 49_152 for c in a for t in c.prompt[2:]) and len({tuple(c.prompt) for c in a}) == 5
    assert chats([0.0], 2, 3, 2, seed=1) == chats([0.0], 2, 3, 2, seed=1) != chats([0.0], 2, 3, 2, seed=2)


def test_intervals():
    assert interval([5.0], 50) == (5.0, 5.0, 5.0) and interval([1.0, np.nan, 1.0], 99) == (1.0, 1.0, 1.0)
    x = np.random.default_rng(0).normal(size=500)
    middle, low, high = interval(x, 50)
    assert low < middle < high and high - low < 0.35 and interval(x, 50) == (middle, low, high)
    wave = np.repeat(np.random.default_rng(0).normal(size=10), 50)          # neighbours alike: 10 observations, not 500
    alone, together = interval(wave, 50), interval(wave, 50, block=50)
    assert together[2] - together[1] > 2 * (alone[2] - alone[1])
    for values, block in (([], 1), ([1.0, 2.0], 3), ([1.0], 0), ([np.nan], 1)):
        with pytest.raises(InputError, match="blocks"): interval(values, 50, block)


def test_virtual_time_is_exact_and_notices_deadlocks():
    async def naps():
        loop, start = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        await asyncio.gather(*(asyncio.sleep(s) for s in (3600, 60, 86_400)))
        return loop.time() - start
    assert np.isclose(in_time(VirtualTime, naps), 86_400, rtol=1e-12)
    async def stuck(call, record):
        await asyncio.get_running_loop().create_future()
        yield 1
    with pytest.raises(RuntimeError, match="lasts for ever"): virtual(stuck, at(0.0))
    async def within(): return drive(chair(), at(0.0), clock=VirtualTime).seconds
    assert asyncio.run(within()) == 1.0, "in a loop that runs already, as a notebook's"


# --- an engine in this process ----------------------------------------------------------------------------------------

def test_in_process_closes_what_its_reader_leaves():
    said = SimpleNamespace(requests=[], closed=0)
    async def pieces(request):
        said.requests.append(request)
        try:
            for i in range(request.max_new_tokens):
                last = i + 1 == request.max_new_tokens
                yield SimpleNamespace(tokens=[7], reason="length" if last else None, cached=3, error=None)
        finally: said.closed += 1
    target = in_process(SimpleNamespace(pieces=pieces), sampling=dict(temperature=0.5))
    run = virtual(target, [Call(0.0, [1, 2], 4, more=dict(priority=2)), Call(0.0, [1], 4, leaves=2)])
    assert [(r.reason, r.tokens, r.cached) for r in run.records] == [("length", 4, 3), ("left", 2, 3)]
    assert said.closed == 2
    first = said.requests[0]
    assert (first.prompt, first.priority, first.stop_at_eos) == ([1, 2], 2, False)
    assert first.sampling == dict(temperature=0.5)


def test_an_engines_error_is_the_records():
    async def pieces(request):
        yield SimpleNamespace(tokens=[], reason="error", cached=0, error=Overloaded("full", 0.25))
    run = virtual(in_process(SimpleNamespace(pieces=pieces)), at(0.0), retries=1)
    assert (run.records[0].reason, run.records[0].tries, run.records[0].ended) == ("refused", 2, 0.25)


# --- HTTP -------------------------------------------------------------------------------------------------------------

@contextmanager
def canned(reply, seen=None):
    "A server that answers `reply`, bytes or a list of bytes and seconds of silence, to everybody."
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            head = b""
            while not head.endswith(b"\r\n\r\n"): head += self.rfile.read(1)
            size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if seen is not None: seen.append((head.decode(), self.rfile.read(size)))
            try:
                for part in reply if isinstance(reply, list) else [reply]:
                    if isinstance(part, bytes): self.wfile.write(part)
                    else: time.sleep(part)
            except OSError: seen.append("gone")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        try: yield f"http://127.0.0.1:{server.server_address[1]}"
        finally: server.shutdown()


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(**fields): return b"data: " + json.dumps(fields).encode() + b"\n\n"
def text(words, **more): return event(choices=[dict(index=0, text=words, finish_reason=None)], **more)
def usage(n, **more): return event(choices=[], usage=dict(completion_tokens=n, **more))
def chunks(data, size): return b"".join(b"%x\r\n%s\r\n" % (len(d), d) for d in (
    data[i:i + size] for i in range(0, len(data), size))) + b"0\r\n\r\n"


def asked(reply, call=None, seen=None, **options):
    "The record of one call."
    with canned(reply, seen) as url:
        return drive(over_http(f"{url}/v1", **options), [call or Call(0.0, [1, 2], 3)]).records[0]


LAST = event(choices=[dict(index=0, text=" three", finish_reason="length")])
STORY = text("one") + text(" two") + LAST + usage(3) + DONE


@pytest.mark.parametrize("reply", [CHUNKED + chunks(STORY, n) for n in (1, 7, 64, 10_000)] + [
    OK + b"\r\n" + STORY, OK + b"Content-Length: %d\r\n\r\n" % len(STORY) + STORY,
    OK + b"\r\n" + STORY.replace(b"\n", b"\r\n"), CHUNKED + chunks(b": ping\n\n" + STORY, 9),
    [CHUNKED, *(chunks(STORY, 5)[i:i + 50] for i in range(0, 2000, 50))], OK + b"\r\n" + STORY.rstrip(b"\n"),
    CHUNKED.replace(b"chunked\r\n", b"Chunked\r\nX:y\r\n") + chunks(STORY, 33)],
    ids=["1", "7", "64", "whole", "until closed", "by length", "crlf", "pings", "packets", "no last newline", "case"])
def test_streams_cut_anywhere(reply):
    r = asked(reply)
    assert (r.reason, r.tokens, [n for _, n in r.pieces], r.error) == ("length", 3, [1, 1, 1], "")


def test_what_is_sent():
    seen = []
    call = Call(0.0, [1, 2], 3, more=dict(priority=1))
    asked(CHUNKED + chunks(STORY, 99), call, seen, key="secret", model="m", ignore_eos=None)
    head, body = seen[0][0], json.loads(seen[0][1])
    assert head.startswith("POST /v1/completions HTTP/1.1\r\n") and "Authorization: Bearer secret\r\n" in head
    assert body == dict(model="m", prompt=[1, 2], max_tokens=3, temperature=0.0, stream=True, priority=1,
                        stream_options=dict(include_usage=True, continuous_usage_stats=True))
    messages = [dict(role="user", content="Hi")]
    asked(CHUNKED + chunks(STORY, 99), Call(0.0, messages, 3), seen)
    assert seen[1][0].startswith("POST /v1/chat/completions ") and json.loads(seen[1][1])["messages"] == messages


def test_tokens_are_counted_by_usage_where_it_is_told():
    running = text("a b c", usage=dict(completion_tokens=3)) + text(" d", usage=dict(completion_tokens=4))
    running += usage(4) + DONE
    assert [n for _, n in asked(CHUNKED + chunks(running, 40)).pieces] == [3, 1]
    packed = asked(CHUNKED + chunks(text("a b c") + text(" d e f") + usage(6) + DONE, 40))
    assert packed.tokens == 6 and len(packed.itl) == 5 and packed.reason == "stop"
    told = asked(CHUNKED + chunks(text("a") + usage(1, prompt_tokens_details=dict(cached_tokens=32)) + DONE, 40))
    assert told.cached == 32


def test_chat_deltas():
    def delta(reason=None, **fields): return event(choices=[dict(index=0, delta=fields, finish_reason=reason)])
    story = delta(role="assistant", content="") + delta(content="a") + delta(reasoning_content="b") + delta(
        tool_calls=[dict(index=0)]) + delta("tool_calls") + DONE
    r = asked(CHUNKED + chunks(story, 50), Call(0.0, [dict(role="user", content="x")], 9))
    assert [n for _, n in r.pieces] == [1, 1, 1] and r.reason == "tool_calls"


BROKEN = {
    "no end": (CHUNKED + chunks(text("a") + text("b"), 40), "broke off before"),
    "cut in a chunk": (CHUNKED + chunks(STORY, 64)[:100], "broke off: IncompleteReadError"),
    "closed at once": (b"", "broke off: IncompleteReadError"),
    "no HTTP": (b"hello\r\n\r\n", "broke off"),
    "chunks without sizes": (CHUNKED + b"xyz\r\nabc\r\n", "broke off: ValueError"),
    "an error in the stream": (CHUNKED + chunks(text("a") + event(error=dict(message="dead")), 99), "dead"),
    "no JSON": (CHUNKED + chunks(b"data: {oops\n\n", 99), "JSONDecodeError"),
    "refused for good": (b'HTTP/1.1 400 Bad Request\r\nContent-Length: 9\r\n\r\n{"error"}', "answers 400: {\"error\"}"),
    "not there": (b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(b"no model", 3), "404: no model"),
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_broken_answer_is_an_error_not_an_end(why):
    reply, said = BROKEN[why]
    r = asked(reply)
    assert r.reason == "error" and said in r.error, r


def test_nobody_there():
    r = drive(over_http("http://127.0.0.1:9/v1"), at(0.0)).records[0]
    assert r.reason == "error" and "broke off: ConnectionRefusedError" in r.error


@pytest.mark.parametrize("status", [429, 503])
def test_a_full_server_is_asked_again_when_it_says(status):
    reply = b"HTTP/1.1 %d Busy\r\nRetry-After: 0.2\r\nContent-Length: 4\r\n\r\nfull" % status
    with canned(reply) as url: r = drive(over_http(url), at(0.0), retries=2).records[0]
    assert (r.reason, r.tries) == ("refused", 3) and 0.4 <= r.ended < 2.0


def test_a_refusal_in_the_stream_is_a_refusal():
    error = event(error=dict(message="full", code="rate_limit_exceeded"))
    assert asked(CHUNKED + chunks(error, 99)).reason == "refused"
    assert asked(CHUNKED + chunks(event(error="full"), 99)).reason == "error"


def test_who_leaves_closes_the_connection():
    seen = []
    parts = [CHUNKED, *[b"%x\r\n%s\r\n" % (len(text("a")), text("a")), 0.02] * 200]
    r = asked(parts, Call(0.0, [1], 400, leaves=3), seen)
    for _ in range(100):
        if "gone" in seen: break
        time.sleep(0.02)
    assert r.reason == "left" and "gone" in seen, "the server still writes to a client that has gone"


# --- metrics and pictures ---------------------------------------------------------------------------------------------

PAGE = """# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="a",engine="0"} 3.0
vllm:num_requests_running{model_name="b \\"quoted\\"",engine="1"} 4.0
# TYPE generation_tokens counter
generation_tokens_total{model_name="a"} 120.0
# TYPE vllm:ttft_seconds histogram
vllm:ttft_seconds_bucket{le="0.1",model_name="a"} 2.0
vllm:ttft_seconds_bucket{le="1.0",model_name="a"} 6.0
vllm:ttft_seconds_bucket{le="+Inf",model_name="a"} 8.0
vllm:ttft_seconds_bucket{le="0.1",model_name="b"} 0.0
vllm:ttft_seconds_bucket{le="1.0",model_name="b"} 2.0
vllm:ttft_seconds_bucket{le="+Inf",model_name="b"} 2.0
vllm:ttft_seconds_count{model_name="a"} 8.0
vllm:ttft_seconds_sum{model_name="a"} 9.5
"""


def test_a_page_of_metrics():
    found = read_metrics(PAGE)
    assert found == {"num_requests_running": 7.0, "generation_tokens_total": 120.0, "ttft_seconds_count": 8.0,
                     "ttft_seconds": {0.1: 2.0, 1.0: 8.0, np.inf: 10.0}, "ttft_seconds_sum": 9.5}
    assert read_metrics("") == {}
    with canned(b"HTTP/1.1 200 OK\r\n\r\n" + PAGE.encode()) as url:
        assert in_time(asyncio.new_event_loop, scrape(f"{url}/metrics")) == found
        assert drive(chair(0.2), at(0.0), watch=scrape(url), every=1.0).history[0][1] == found


def check_quantile(quantile):
    h = {0.1: 2.0, 1.0: 8.0, 4.0: 8.0, np.inf: 10.0}
    assert np.isclose(quantile(h, 0.1), 0.05) and np.isclose(quantile(h, 0.5), 0.55), "on a line within the bucket"
    assert quantile(h, 0.95) == 4.0, "beyond the last bound nothing is known but that bound"
    assert np.isclose(quantile(h, 0.8), 1.0), "an empty bucket is passed over"
    assert (np.diff([quantile(h, q) for q in np.linspace(0, 1, 50)]) >= 0).all()


def test_quantile(): check_quantile(quantile)


def upper_bound(h, q): return next(b for b, n in sorted(h.items()) if n >= q * h[np.inf])


def test_the_upper_bound_is_no_quantile():
    with pytest.raises(AssertionError, match="on a line"): check_quantile(upper_bound)


@pytest.mark.parametrize("history", [
    [], [(0.0, {})], [(0.0, dict(num_requests_running=1)), (0.0, {}), (1.0, dict(other=2))]])
def test_a_dashboard_of_little(history):
    fig = dashboard(history, [Record(Call(0.0, [1], 1))])
    assert len(fig.axes) == 4
    fig.canvas.draw()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_live_picture_can_be_stopped_when_its_server_is_gone():
    image, stop = live(lambda: 1 / 0, every=0.01)
    time.sleep(0.1)
    stop()
    assert image.value == b""


# --- benchmarks/serving.py --------------------------------------------------------------------------------------------

def test_a_ratio_is_of_rounds_in_which_both_were_measured():
    samples = {"8 streams, ours bf16": {(0, 0): 100.0, (1, 1): 300.0, (2, 2): 500.0},
               "8 streams, vllm bf16": {(0, 0): 100.0, (1, 2): 250.0}}
    assert bench.ratio(samples, "8 streams, ours bf16", "8 streams, vllm bf16") == 1.5
    assert bench.ratios_of(samples) == {"8 streams: ours bf16 / vllm bf16": 1.5}
    assert bench.ratio(samples, "8 streams, ours bf16", "nobody") is None


def test_every_goal_is_of_engines_that_there_are():
    for goal in bench.GOALS:
        assert all(name in bench.PEERS for name in goal.split(": ")[1].split(" / ")), goal
    assert bench.goal_of("8 streams: through HTTP / engine") == (0.97, True)
    assert bench.goal_of("first token, warm / cold") == (0.10, False)
    assert bench.goal_of("endless queue: goodput at 2x / at 1x") is None
    assert bench.streams_of("llama-server Q4_1", (1, 8, 32)) == [1, 8]
    assert bench.streams_of("llama-server Q4_1, 32 slots", (1, 8, 32)) == [32]


def test_engines_that_are_not_there_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "HOME", tmp_path)
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "transformers")
    assert bench.absent("vllm bf16") == "no environment vllm: python tools/peers.py vllm"
    assert bench.absent("ours bf16") is None
