"""A small server that speaks OpenAI's protocol over a model of ours: for clients to be tried on.

The tests and the chapter of the endpoints use it. It is right as it stands, and can be broken in one place."""
import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

DIE = object()      # among the pieces of an answer: the connection ends here, without a word


@contextmanager
def running(Server, Handler):
    "The address of a server in a thread of its own, which ends with the context."
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(answer):
    """Serve `answer(path, body, headers) -> (status, pieces)` at the address that this gives.

    A piece is an object, sent as one event; or bytes, sent as they are; or seconds of silence; or DIE."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *args): pass
        def do_GET(self): self.do_POST()

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, pieces = answer(self.path, json.loads(body) if body else None, self.headers)
            self.send_response(status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for piece in pieces:
                    if piece is DIE: return setattr(self, "close_connection", True)
                    if isinstance(piece, (int, float)): time.sleep(piece)
                    else: self.chunk(piece if isinstance(piece, bytes) else event(piece))
                self.wfile.write(b"0\r\n\r\n")
            except OSError: self.close_connection = True       # who asked has gone

        def chunk(self, data):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        def handle_error(self, request, client_address):
            if not isinstance(sys.exc_info()[1], OSError): super().handle_error(request, client_address)   # else: gone

    with running(Server, Handler) as url: yield url


def event(part): return f"data: {json.dumps(part, ensure_ascii=False)}\n\n".encode()
def plain(part): return [json.dumps(part).encode()]
def error(status, message, **more): return status, plain(dict(error=dict(message=message, **more)))


def pieces_of(tokenizer, ids):
    "The text that each token brings: nothing, where it ends within a character."
    stream = tokenizer.stream()
    return [stream.push(t) for t in ids]


@torch.inference_mode()
def scores(lm, ids, shift=0):
    "The field `logprobs` of a text: each token by the row in front of it, or `shift` rows further on."
    z = lm.decoder(torch.tensor([ids]))[0].float().log_softmax(-1)                       # (T, V)
    rows = [z[i - 1 + shift] for i in range(1, len(ids))]
    words = pieces_of(lm.tokenizer, ids)
    return dict(tokens=words, token_logprobs=[None, *[r[t].item() for r, t in zip(rows, ids[1:])]],
                top_logprobs=[None, *[{lm.tokenizer.decode([int(r.argmax())]): r.max().item()} for r in rows]],
                text_offset=[len("".join(words[:i])) for i in range(len(words))])


def openai_like(lm, model="small", key=None, *, shift=0, echoes=True, usage=True, seen=None):
    "The function that answers for `lm`. `seen` is a list that gets every request."
    def answer(path, body, headers):
        if seen is not None: seen.append((path, body, headers))
        if key and headers.get("Authorization") != f"Bearer {key}": return error(401, "Incorrect API key provided.")
        if path == "/v1/models": return 200, plain(dict(data=[dict(id=model)]))
        if path not in ("/v1/completions", "/v1/chat/completions"): return error(404, "Not Found")
        if body["model"] != model: return error(404, f"The model {body['model']} does not exist.")
        chat = "messages" in body
        ids = lm.chat_ids(body["messages"]) if chat else lm.prompt_ids(body["prompt"])
        if len(ids) + body["max_tokens"] > lm.decoder.config.max_position_embeddings:
            return error(400, "The prompt is too long.", code="context_length_exceeded")
        return (streamed if body.get("stream") else whole)(body, ids, chat)

    def settings(body):
        names = dict(max_tokens="max_new_tokens", temperature="temperature", top_k="top_k", top_p="top_p", seed="seed")
        return {ours: body[theirs] for theirs, ours in names.items() if theirs in body}

    def counts(prompt, written): return dict(prompt_tokens=prompt, completion_tokens=written) if usage else None

    def whole(body, ids, chat):
        done = lm.generate(ids, stop=body.get("stop", ()), **settings(body))
        text, all_ids = done.text, [*ids, *done.tokens]
        if body.get("echo") and echoes: text, first = body["prompt"] + text, 0
        else: first = len(ids)
        found = scores(lm, all_ids, shift if first == 0 else 0) if body.get("logprobs") is not None else None
        choice = dict(index=0, text=text, finish_reason=done.reason,
                      logprobs=found and {k: v[first:] for k, v in found.items()})
        return 200, plain(dict(object="text_completion", choices=[choice], usage=counts(len(ids), len(done.tokens))))

    def streamed(body, ids, chat):
        def parts():
            batch = lm.batch([ids], **settings(body))
            for (row,), (piece,) in lm.texts(batch, body.get("stop", ())):
                said = dict(delta=dict(content=piece)) if chat else dict(text=piece)
                if piece: yield dict(choices=[dict(index=0, **said)])
            yield dict(choices=[dict(index=0, **(dict(delta={}) if chat else dict(text="")), finish_reason=row.reason)])
            if usage: yield dict(choices=[], usage=counts(len(ids), len(row.tokens)))
            yield b": the end\n\ndata: [DONE]\n\n"
        return 200, parts()
    return answer
