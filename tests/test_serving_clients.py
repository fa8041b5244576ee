"Real clients over loopback: each receives what the engine writes, and each of their ways to ask has an answer."
import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from served import TALK, tiny

pytest.importorskip("fastapi", reason="FastAPI is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
from llm_workbench.inference.generators import EndpointLM
from llm_workbench.inference.ollama import OllamaLM
from llm_workbench.serving.openai_server import start

WEATHER = dict(name="weather", description="The weather in a city.", parameters=dict(
    type="object",
    properties=dict(city=dict(type="string", maxLength=8), days=dict(type="integer", minimum=1, maximum=9)),
    required=["city", "days"], additionalProperties=False))


@pytest.fixture(scope="module")
def lm(): return tiny(1024)


@pytest.fixture(scope="module")
def server(lm):
    with start(lm, memory=2**25, key="the-secret-key") as server: yield server


@pytest.fixture(scope="module")
def base(server): return server.url + "/v1"


@pytest.fixture(scope="module")
def want(lm): return lm.chat(TALK, max_new_tokens=16)


# OpenAI's SDK

@pytest.fixture(scope="module")
def sdk(): return pytest.importorskip("openai", reason="the openai package is not installed")


@pytest.fixture(scope="module")
def client(sdk, base):
    with sdk.OpenAI(base_url=base, api_key="the-secret-key") as client: yield client


ASK = dict(model="tiny-model", messages=TALK, temperature=0, max_tokens=16)


def test_openai_chat_whole_and_streamed(client, want):
    whole = client.chat.completions.create(**ASK)
    assert whole.choices[0].message.content == want and whole.usage.completion_tokens == 16 and whole._request_id
    *parts, last = client.chat.completions.create(**ASK, stream=True, stream_options=dict(include_usage=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == want
    assert parts[-1].choices[0].finish_reason == "length" and last.usage.completion_tokens == 16
    stop = want[-3:]                                               # the helper takes a cut answer for an error
    with client.chat.completions.stream(**ASK, stop=stop, logprobs=True, top_logprobs=3) as stream:
        kinds = [e.type for e in stream]
        done = stream.get_final_completion()
    assert done.choices[0].message.content == want[:want.index(stop)] and "content.delta" in kinds
    told = done.choices[0].logprobs.content
    assert told and all(len(t.top_logprobs) == 3 and t.logprob <= t.top_logprobs[0].logprob for t in told)


def test_openai_async_many_at_once(sdk, base, lm):
    prompts = [f"Question {i}" for i in range(6)]
    async def all_of_them():
        async with sdk.AsyncOpenAI(base_url=base, api_key="the-secret-key") as client:
            async def one(prompt):
                parts = await client.completions.create(model="tiny-model", prompt=prompt, temperature=0, max_tokens=8,
                                                        stream=True)
                return "".join([p.choices[0].text async for p in parts])
            return await asyncio.gather(*map(one, prompts))
    assert asyncio.run(all_of_them()) == [c.text for c in lm.generate(prompts, max_new_tokens=8)]


def test_openai_parse_and_tools(client):
    from pydantic import BaseModel, ConfigDict, Field

    class River(BaseModel):
        model_config = ConfigDict(extra="forbid")
        name: str = Field(max_length=6)
        length: int = Field(ge=1, le=999)
    parsed = client.chat.completions.parse(**ASK | dict(max_tokens=90, temperature=1), seed=1, response_format=River)
    assert isinstance(parsed.choices[0].message.parsed, River)
    tools = [dict(type="function", function=WEATHER)]
    named = dict(type="function", function=dict(name="weather"))
    asked = ASK | dict(max_tokens=90, tools=tools, tool_choice=named, parallel_tool_calls=False)
    call = client.chat.completions.create(**asked).choices[0]
    assert call.finish_reason == "tool_calls" and call.message.content is None
    [made] = call.message.tool_calls
    assert made.function.name == "weather" and json.loads(made.function.arguments).keys() == {"city", "days"}
    with client.chat.completions.stream(**asked | dict(tool_choice="required")) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.tool_calls[0].function.arguments == made.function.arguments and streamed.tool_calls[0].id
    back = [*TALK, dict(role="assistant", tool_calls=[made.model_dump()]),
            dict(role="tool", tool_call_id=made.id, content="dry")]
    assert client.chat.completions.create(**ASK | dict(messages=back, tools=tools)).choices
    assert client.chat.completions.create(**ASK, tools=tools, tool_choice="none").choices[0].message.tool_calls is None
    any_json = client.chat.completions.create(**ASK | dict(max_tokens=60), response_format=dict(type="json_object"))
    assert any_json.choices[0].message.content.lstrip().startswith("{")


def test_openai_responses(client, want, sdk):
    from pydantic import BaseModel, Field

    class Length(BaseModel):
        km: int = Field(ge=1, le=99)
    ask = dict(model="tiny-model", input=TALK, temperature=0)
    assert client.responses.create(**ask, max_output_tokens=16).output_text == want
    cut = client.responses.create(**ask, max_output_tokens=16)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    end = {str(0): 100}                                            # <|endoftext|>: the text ends at once
    with client.responses.stream(**ask, max_output_tokens=16, extra_body=dict(logit_bias=end)) as stream:
        kinds = [e.type for e in stream]
        assert stream.get_final_response().status == "completed"
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert client.responses.parse(**ask | dict(temperature=1), max_output_tokens=60, text_format=Length,
                                  extra_body=dict(seed=1)).output_parsed.km
    tool = dict(tools=[dict(type="function", **WEATHER)], tool_choice="required", parallel_tool_calls=False)
    with client.responses.stream(**ask, **tool, max_output_tokens=90) as stream:
        pieces = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
        [call] = stream.get_final_response().output
    assert call.arguments == pieces and json.loads(pieces).keys() == {"city", "days"}
    with pytest.raises(sdk.BadRequestError, match="keeps no conversations"):
        client.responses.create(**ask, previous_response_id="r")


def test_openai_lists_and_vectors(client, lm):
    assert [m.id for m in client.models.list()] == ["tiny-model"] == [client.models.retrieve("tiny-model").id]
    vectors = [e.embedding for e in client.embeddings.create(model="tiny-model", input=["a river", "tax law"]).data]
    assert torch.allclose(torch.tensor(vectors), lm.embed(["a river", "tax law"]), atol=1e-6)
    plain = client.embeddings.create(model="tiny-model", input="a river", encoding_format="float", dimensions=5)
    assert len(plain.data[0].embedding) == 5


def test_openai_errors_have_their_classes(sdk, base, client):
    for change, kind, code in ((dict(model="gpt-9"), sdk.NotFoundError, "model_not_found"),
                               (dict(max_tokens=2000), sdk.BadRequestError, "context_length_exceeded"),
                               (dict(temperature=9), sdk.BadRequestError, "invalid_value")):
        with pytest.raises(kind) as caught: client.chat.completions.create(**ASK | change)
        assert caught.value.code == code and caught.value.body["message"]
    with sdk.OpenAI(base_url=base, api_key="another-key") as stranger, pytest.raises(sdk.AuthenticationError):
        stranger.models.list()


def test_openai_tries_again_when_the_house_is_full_and_is_told_of_a_death_in_mid_stream(sdk, lm):
    with (start(lm, memory=2**25, most=1, queue=1) as small,
          sdk.OpenAI(base_url=small.url + "/v1", api_key="x") as client):
        step, go = small.runner.engine.step, threading.Event()
        small.runner.engine.step = lambda: (go.wait(0.4), step())[1]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(client.with_options(max_retries=6).chat.completions.create, **ASK | dict(max_tokens=2))
                     for _ in range(4)]
            assert all(a.result().choices[0].finish_reason == "length" for a in asked)
        go.set()
        left = iter([True] * 4)
        def dies():
            if next(left, None): return step()
            raise MemoryError
        small.runner.engine.step = dies
        with pytest.raises(sdk.APIError, match="has stopped"):
            for _ in client.chat.completions.create(**ASK, stream=True): pass
        with pytest.raises(sdk.InternalServerError) as dead:
            client.with_options(max_retries=0).chat.completions.create(**ASK)
        assert dead.value.status_code == 503


# Others

def test_ollama(server, lm, want):
    ollama = pytest.importorskip("ollama", reason="the ollama package is not installed")
    client = ollama.Client(server.url, headers=dict(Authorization="Bearer the-secret-key"))
    greedy = dict(temperature=0, num_predict=16, repeat_penalty=1)
    assert client.chat("tiny-model", TALK, options=greedy).message.content == want
    parts = list(client.chat("tiny-model", TALK, options=greedy, stream=True))
    assert "".join(p.message.content for p in parts) == want and parts[-1].done and parts[-1].eval_count == 16
    assert [m.model for m in client.list().models] == ["tiny-model:latest"]
    assert json.loads(client.generate("tiny-model", "A", format=dict(type="integer", maximum=9, minimum=1),
                                      options=greedy | dict(num_predict=40)).response) in range(1, 10)
    vectors = torch.tensor(client.embed("tiny-model", "a river").embeddings)
    assert torch.allclose(vectors, lm.embed("a river"), atol=1e-5)
    with pytest.raises(ollama.ResponseError): client.chat("other", TALK)


def test_ollama_streams_do_not_wait_for_each_other(lm):
    with start(lm, memory=2**25, name="m") as server:
        clients = [OllamaLM(server.url) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(lambda c: c.generate("a b c", max_new_tokens=24).text, clients))
        assert texts == [lm.generate("a b c", max_new_tokens=24).text] * 4


def test_our_own_client_scores_as_this_process_does(server, lm):
    there = EndpointLM(server.url + "/v1", "tiny-model", api_key="the-secret-key")
    assert there.generate("a b c", max_new_tokens=9).text == lm.generate("a b c", max_new_tokens=9).text
    pairs = [("The capital of France is", " Paris"), ("1 2 3", " 4 5 6")]
    for a, b in zip(there.loglikelihood(pairs), lm.loglikelihood(pairs)):
        assert abs(a.total - b.total) < 1e-3 and a.greedy == b.greedy


@pytest.mark.parametrize("batch", [1, 3])
def test_log_likelihoods_read_as_lm_eval_reads_them(client, lm, batch):
    "The requests and the arithmetic of lm_eval.models.openai_completions, for ids in batches."
    pairs = [("The capital of France is", " Paris"), ("a b", " c d e"), ("x", " y")]
    ids = [lm.pair_ids(*pair) for pair in pairs]
    own = lm.loglikelihood(pairs)
    for at in range(0, 3, batch):
        said = client.completions.create(model="tiny-model", prompt=[a + b for a, b in ids[at:at + batch]],
                                         temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
        for choice in sorted(said.choices, key=lambda c: c.index):
            k = at + choice.index
            n, told = len(ids[k][0]), choice.logprobs
            logprobs, tops = told.token_logprobs[n:-1], told.top_logprobs[n:-1]
            assert told.token_logprobs[0] is None and len(logprobs) == len(ids[k][1])
            assert abs(sum(logprobs) - own[k].total) < 1e-3
            assert all(p == max(top.values()) for p, top in zip(logprobs, tops)) == own[k].greedy


def test_langchain(base, want):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from pydantic import BaseModel, Field

    class River(BaseModel):
        "A river."
        name: str = Field(max_length=6)
        km: int = Field(ge=1, le=99)
    made = lambda **more: langchain.ChatOpenAI(base_url=base, api_key="the-secret-key", model="tiny-model", **more)
    model, long = made(temperature=0, max_tokens=16), made(temperature=1, seed=1, max_tokens=200)
    assert model.invoke(TALK).content == want
    assert "".join(part.content for part in model.stream(TALK, stream_usage=True)) == want
    assert isinstance(long.with_structured_output(River).invoke("A river?"), River)
    assert isinstance(long.with_structured_output(River, method="function_calling").invoke("A river?"), River)
    assert long.bind_tools([River], tool_choice="River").invoke("A river?").tool_calls[0]["name"] == "River"


def test_litellm(base, want):
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # without it, a price list is fetched
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    ask = ASK | dict(api_base=base, api_key="the-secret-key")
    for kind in ("hosted_vllm", "openai"):
        whole = litellm.completion(**ask | dict(model=f"{kind}/tiny-model"), seed=1, n=1, stop=["never"])
        assert whole.choices[0].message.content == want and whole.usage.completion_tokens == 16
        parts = litellm.completion(**ask | dict(model=f"{kind}/tiny-model"), stream=True)
        assert "".join(p.choices[0].delta.content or "" for p in parts) == want
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**ask | dict(model="hosted_vllm/tiny-model", max_tokens=5000))
