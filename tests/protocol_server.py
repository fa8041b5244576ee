"""A server without a model that does all that OpenAI's protocol asks, and can be broken in one named place.

The conformance check is tried on it: it must pass whole, and each of its BREAKS must cost it the row that looks there.
Its answers come from a hash of what was asked, its tokens are pieces of three characters."""
import hashlib
import json
import math
import random
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from endpoints import running

CONTEXT, MODEL = 4096, "quick"
WORDS = "red green blue amber violet ochre slate ivory coral umber".split()

# what is broken: the row of the table that must say so
BREAKS = {
    "models: another name": "models", "no role in the answer": "chat", "counts do not add up": "usage",
    "parts are refused": "content parts", "temperature 0 draws": "temperature 0", "max_tokens plus one": "max_tokens",
    "max_completion_tokens ignored": "max_completion_tokens", "the stream says a piece twice": "stream",
    "each chunk has its own id": "stream: form", "no [DONE]": "stream: form", "no usage in the stream": "stream: usage",
    "stop stays in the text": "stop", "stop only at a token's end": "stop: stream", "n ignored": "n",
    "seed ignored": "seed", "one seed for all": "seed: others", "one alternative too few": "logprobs",
    "logit_bias ignored": "logit_bias", "tool_choice ignored": "tools", "required ignored": "tools: required",
    "schema ignored": "json_schema", "json_object ignored": "json_object", "completions as chat": "completions",
    "ids read as text": "completions: ids", "only the first prompt": "completions: several",
    "no echo": "completions: echo", "no responses": "responses", "unknown fields refused": "unknown fields",
    "every model is fine": "error: model", "an error as a bare text": "error: JSON",
    "kinds are not looked at": "error: kind", "ranges are not looked at": "error: range",
    "a long prompt is cut": "error: too long", "every path is fine": "error: path", "keys are not looked at": "key",
    "ends when a client hangs up": "hang up", "one at a time, others refused": "at once",
}


class Refused(Exception):
    def __init__(self, status, message, code=None): self.status, self.body = status, dict(message=message, code=code)


def tokens_of(text): return re.findall(r"(?s).{1,3}", text)


def written(asked, draw, most, stop, broken, bias):
    "An answer of at most so many tokens, and why it ended."
    rng = random.Random(hashlib.sha256(f"{asked}{draw}".encode()).digest())
    words = " ".join(rng.choice(WORDS) for _ in range(60))
    if bias: words = "~" * 200
    tokens, reason = tokens_of(words)[:most], "length"
    text = "".join(tokens)
    for s in stop:
        if s in text and broken != "stop stays in the text":
            text, reason = text[:text.index(s)], "stop"
        elif s in text: reason = "stop"
    return text, reason


class Protocol:
    "Answers a request with an object, or with a list of chunks."
    def __init__(self, key, broken): self.key, self.broken, self.busy = key, broken, threading.Lock()

    def answer(self, path, body, headers):
        b = self.broken
        if self.key and b != "keys are not looked at" and headers.get("Authorization") != f"Bearer {self.key}":
            raise Refused(401, "Incorrect API key provided.")
        name = "other" if b == "models: another name" else MODEL
        if path == "/v1/models": return dict(object="list", data=[dict(id=name)])
        if path not in ("/v1/chat/completions", "/v1/completions", "/v1/responses") or \
                (b == "no responses" and path.endswith("responses")):
            if b == "every path is fine": return {}
            raise Refused(404, "Not Found")
        try: asked = json.loads(body)
        except ValueError: raise Refused(400, "This is not JSON.") from None
        self.look(asked)
        if path.endswith("responses"):
            text = self.texts(asked, asked["input"])[0][0]
            return dict(object="response", output=[dict(type="message", content=[dict(type="output_text", text=text)])])
        return self.chat(asked) if "chat" in path else self.complete(asked)

    def look(self, asked):
        b = self.broken
        if asked.get("model") != MODEL and b not in ("every model is fine", "models: another name"):
            raise Refused(404, f"The model {asked.get('model')!r} does not exist.", "model_not_found")
        if not isinstance(asked.get("temperature", 0), (int, float)) and b != "kinds are not looked at":
            raise Refused(400, "temperature is a number.")
        if (asked.get("max_tokens") or 1) < 1 and b != "ranges are not looked at":
            raise Refused(400, "max_tokens is at least 1.")
        if "no_such_field" in asked and b == "unknown fields refused": raise Refused(400, "Unknown field.")
        words = str(asked.get("messages", "")).count("word ")
        if words > CONTEXT and b != "a long prompt is cut":
            raise Refused(400, f"{words} tokens do not fit into the context of {CONTEXT}.", "context_length_exceeded")

    def texts(self, asked, prompt):
        "(text, reason) of each of the n answers."
        b = self.broken
        hot = isinstance(asked.get("temperature", 1), (int, float)) and asked.get("temperature", 1) > 0
        seed = None if b == "seed ignored" else 5 if b == "one seed for all" and "seed" in asked else asked.get("seed")
        most = max(1, asked.get("max_tokens") or asked.get("max_output_tokens") or
                   (asked.get("max_completion_tokens") if b != "max_completion_tokens ignored" else None) or 16)
        stop = asked.get("stop") or []
        bias = asked.get("logit_bias") if b != "logit_bias ignored" else None
        found = []
        for i in range(1 if b == "n ignored" else asked.get("n", 1)):
            draw = 0 if not hot and b != "temperature 0 draws" else random.random() if seed is None else seed + i
            found.append(written(prompt, draw, most + (b == "max_tokens plus one" and most == 3), stop, b, bias))
        return found

    def usage(self, prompt, texts):
        p, c = len(tokens_of(prompt)), sum(len(tokens_of(t)) for t, _ in texts)
        return dict(prompt_tokens=p, completion_tokens=c, total_tokens=p + c + (self.broken == "counts do not add up"))

    def chat(self, asked):
        b, content = self.broken, asked["messages"][-1]["content"]
        if isinstance(content, list):
            if b == "parts are refused": raise Refused(400, "content is a string.")
            content = "".join(p["text"] for p in content)
        texts = self.texts(asked, content)
        shape, choice = asked.get("response_format", {}).get("type"), asked.get("tool_choice")
        if shape == "json_schema" and b != "schema ignored": texts = [('{"city": "Rome", "year": 7}', "stop")]
        if shape == "json_object" and b != "json_object ignored": texts = [('{"colour": "red"}', "stop")]
        message = dict(role="assistant", content=texts[0][0])
        if b == "no role in the answer": message.pop("role")
        called = isinstance(choice, dict) and b != "tool_choice ignored"
        called |= choice == "required" and b != "required ignored"
        if called:
            call = dict(id="call_1", type="function", function=dict(name="paint", arguments='{"colour": "red"}'))
            message, texts = dict(role="assistant", content=None, tool_calls=[call]), [("", "tool_calls")]
        head = dict(id="chatcmpl-1", created=1, model=MODEL)
        if asked.get("stream"): return self.chunks(asked, content, texts[0], head)
        choices = [dict(index=i, message=dict(message, **({} if called else dict(content=t))), finish_reason=r,
                        logprobs=self.scores(t, asked) if asked.get("logprobs") else None)
                   for i, (t, r) in enumerate(texts)]
        return dict(head, object="chat.completion", choices=choices, usage=self.usage(content, texts))

    def scores(self, text, asked):
        k = asked.get("top_logprobs", 0) - (self.broken == "one alternative too few")
        def one(t): return dict(token=t, logprob=-0.5, bytes=list(t.encode()))
        return dict(content=[dict(one(t), top_logprobs=[one(t)] * k) for t in tokens_of(text)])

    def chunks(self, asked, content, answer, head):
        b, (text, reason) = self.broken, answer
        if b == "stop only at a token's end" and asked.get("stop"):
            text = "".join(tokens_of(text + "..")[:math.ceil(len(text) / 3)])
        head = dict(head, object="chat.completion.chunk")
        def chunk(i, delta, end=None):
            own = dict(id=f"chatcmpl-{i}") if b == "each chunk has its own id" else {}
            return dict(head, **{"choices": [dict(index=0, delta=delta, finish_reason=end)]}) | own
        pieces = tokens_of(text)
        if b == "the stream says a piece twice" and len(pieces) > 2: pieces.insert(1, pieces[1])
        found = [chunk(0, dict(role="assistant", content=""))]
        found += [chunk(i, dict(content=p)) for i, p in enumerate(pieces)] + [chunk(99, {}, reason)]
        if (asked.get("stream_options") or {}).get("include_usage") and b != "no usage in the stream":
            found.append(dict(head, choices=[], usage=self.usage(content, [answer])))
        return found + ([] if b == "no [DONE]" else ["[DONE]"])

    def complete(self, asked):
        b, prompt = self.broken, asked["prompt"]
        several = prompt if isinstance(prompt, list) and isinstance(prompt[0], str) else [prompt]
        if b == "only the first prompt": several = several[:1]
        choices = []
        for i, p in enumerate(several):
            text, reason = self.texts(asked, str(p))[0]
            choice = dict(index=i, text=text, finish_reason=reason, logprobs=None)
            if asked.get("logprobs") is not None:
                all_tokens = ([] if b == "no echo" or not asked.get("echo") else tokens_of(p)) + tokens_of(text)
                choice["logprobs"] = dict(tokens=all_tokens, token_logprobs=[None, *[-0.5] * (len(all_tokens) - 1)])
            choices.append(choice)
        ids = isinstance(prompt[0], int) and b != "ids read as text"
        usage = self.usage("xxx" * len(prompt) if ids else 2 * str(prompt), [(c["text"], "") for c in choices])
        kind = "chat.completion" if b == "completions as chat" else "text_completion"
        return dict(object=kind, choices=choices, usage=usage)


@contextmanager
def protocol_server(key=None, broken=None):
    "Serve it on the loopback; gives the address."
    protocol = Protocol(key, broken)
    state = dict(gone=False)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *args): pass
        def do_GET(self): self.do_POST()

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if broken == "ends when a client hangs up": threading.Event().wait(0.1)      # the news travels
            if state["gone"]: return setattr(self, "close_connection", True)
            alone = broken != "one at a time, others refused" or protocol.busy.acquire(blocking=False)
            try:
                if not alone: raise Refused(429, "Busy.")
                if broken == "one at a time, others refused": threading.Event().wait(0.05)
                self.say(200, protocol.answer(self.path, body, self.headers))
            except Refused as e:
                plain = broken == "an error as a bare text" and e.status == 400
                self.say(e.status, "Bad Request" if plain else dict(error=e.body))
            except OSError: state["gone"] = broken == "ends when a client hangs up"
            finally:
                if broken == "one at a time, others refused" and alone: protocol.busy.release()

        def say(self, status, found):
            self.send_response(status)
            if isinstance(found, list):
                self.send_header("Connection", "close")
                self.end_headers()
                for event in found:
                    self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
                    if broken == "ends when a client hangs up" and len(found) > 80: threading.Event().wait(0.01)
            else:
                data = json.dumps(found).encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        def handle_error(self, request, client_address): pass

    with running(Server, Handler) as url: yield url
