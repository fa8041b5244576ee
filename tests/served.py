"What the tests of the server share: a tiny model behind the real tokenizer, and requests without sockets."
import asyncio
import json
import time
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llm_workbench as wb
from llm_workbench import Decoder
from llm_workbench.inference.generation import LM
from llm_workbench.serving.engine import Engine, Runner
from llm_workbench.serving.openai_server import app

TALK = [dict(role="user", content="What is a river?")]


def tiny(context=512) -> LM:
    "Random weights, the embedded model's tokenizer and template."
    real = wb.load()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=real.decoder.config.vocab_size, hidden_size=32, intermediate_size=48, head_dim=16,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4,
                         max_position_embeddings=context, bos_token_id=None, eos_token_id=None,
                         tie_word_embeddings=True)
    decoder = Decoder.from_transformers(LlamaForCausalLM(config).eval()).requires_grad_(False)
    return LM(decoder, real.tokenizer, replace(real.card, name="Tiny Model"))


def made(lm, *, memory=2**24, most=8, queue=64, **settings):
    "A runner and an application around it."
    runner = Runner(Engine(lm, memory=memory, most=most, queue=queue))
    return runner, app(runner, lm, **settings)


class Call:
    "One request to an application, in this event loop: what it sends, as it comes."
    def __init__(self, app, path, body=None, method=None, headers=None, read=True, parts=None):
        self.app, self.sent, self.gone = app, [], asyncio.Event()
        self.read = asyncio.Event()                      # whether the client reads what it is sent
        if read: self.read.set()
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.parts = parts or [data]
        head = {"host": "localhost", **(headers or {})}
        self.scope = dict(type="http", method=method or ("GET" if body is None else "POST"), path=path,
                          raw_path=path.encode(), query_string=b"", root_path="", scheme="http", http_version="1.1",
                          client=("127.0.0.1", 5), server=("127.0.0.1", 80), asgi=dict(version="3.0"),
                          headers=[(k.lower().encode(), v.encode()) for k, v in head.items()])

    async def receive(self):
        if self.parts:
            return dict(type="http.request", body=self.parts.pop(0), more_body=bool(self.parts))
        await self.gone.wait()
        return dict(type="http.disconnect")

    async def send(self, message):
        await self.read.wait()
        self.sent.append(message)

    async def run(self):
        await self.app(self.scope, self.receive, self.send)
        return self

    @property
    def status(self): return self.sent[0]["status"]
    @property
    def headers(self): return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}
    @property
    def data(self): return b"".join(m.get("body", b"") for m in self.sent)
    @property
    def json(self): return json.loads(self.data)
    @property
    def events(self): return events_of(self.data)


def events_of(data: bytes) -> list:
    "The JSON of each event; comments are left out."
    texts = [e.partition("data: ")[2] for e in data.decode().split("\n\n") if "data: " in e]
    return [t if t == "[DONE]" else json.loads(t) for t in texts]


def ask(app, path, body=None, **more) -> Call: return asyncio.run(Call(app, path, body, **more).run())


def text_of(events) -> str:
    "What a stream's reader puts together."
    parts = [e["choices"][0] for e in events if isinstance(e, dict) and e.get("choices")]
    return "".join(p["text"] if "text" in p else p["delta"].get("content") or "" for p in parts)


def idle(runner, seconds=5.0) -> bool:
    "Whether soon nothing is left in the engine: no request, no text, no table of pages."
    until = time.monotonic() + seconds
    left = lambda: runner.open or runner.listeners or runner.engine.texts or runner.engine.cache.tables.texts
    while left() and time.monotonic() < until: time.sleep(0.01)
    return not left()
