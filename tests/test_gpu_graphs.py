"A recorded step: the same tokens as the ordinary way, its reasons, and what generation makes of it."
import copy
import gc
import weakref

import pytest
import torch
from kernel_checks import DEVICE, as_accurate
from models import small_model

from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import InputError, WorkbenchError
from llm_workbench.inference.generation import Batch, generate_tokens
from llm_workbench.inference.sampling import Sampler
from llm_workbench.kernels import decode_step, graphs
from llm_workbench.kernels.decode_step import STEP, FusedBlocks
from llm_workbench.kernels.graphs import RecordedStep, recorded, take_step, why_not_fused
from llm_workbench.kernels.launching import triton

pytestmark = pytest.mark.triton
PROMPTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]          # three texts take a step for four
# interpreted, prompts would take long: they go through torch
OURS = STEP if DEVICE == "cuda" else TORCH.but(blocks=FusedBlocks(TORCH))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(graphs, "ON_A_CPU", True)
    if DEVICE == "cpu":      # fewer and larger programs: the interpreter takes its time for each
        whole = lambda N, K, gated, itemsize: dict(
            BLOCK_N=64, BLOCK_K=max(16, triton.next_power_of_2(K)), AHEAD=0, FIRST=0, num_warps=4)
        monkeypatch.setattr(decode_step, "gemv_config", whole)
    graphs._idle.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.set_num_threads(before)


def decoder_of(family="llama", variant=0, ops=OURS, dtype=torch.float32, **changes):
    hf = small_model(family, variant, changes=changes or None)
    return Decoder.from_transformers(hf).to(DEVICE, dtype).with_ops(ops)


def small_llama(ops=OURS):
    return decoder_of(ops=ops, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=16)


def written(decoder, batch=Batch, n=3, prompts=PROMPTS, **settings):
    made = batch(decoder, prompts, max_new_tokens=n, **settings)
    for _ in made.steps(): pass
    return [row.tokens for row in made.rows], made


@pytest.mark.parametrize("ops,texts", [(OURS, 1), (OURS, 2), (TORCH, 2)], ids=["fused", "fused, two texts", "torch"])
@torch.inference_mode()
def test_a_step_equals_a_growing_cache(ops, texts):
    decoder = small_llama(ops)
    grows, step = decoder.new_cache(), RecordedStep(decoder, texts, slots=40)
    assert (step.why_not_fused is None) == (ops is OURS)
    tokens = torch.randint(0, 97, (texts, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    first = decoder.with_ops(REFERENCE)(tokens, grows, [5, 3][:texts])
    step.load(grows)
    step.tokens.copy_(tokens[:, :1])
    asked = step.tokens.clone()
    for _ in range(2 if DEVICE == "cpu" else 16):
        want = decoder.with_ops(REFERENCE)(asked, grows)[:, -1]
        chosen = step.run().clone()
        assert (step.logits - want).abs().max() <= 1e-4 * want.abs().max()
        assert torch.equal(chosen, want.argmax(-1)) and torch.equal(step.tokens[:, 0], chosen)
        asked = step.tokens.clone()
    assert first.shape[0] == texts and step.cache._lengths.rows == grows._lengths.per_row(texts)


@pytest.mark.parametrize("settings", [
    {}, dict(sampler=Sampler(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01), seed=3),
    dict(sampler=Sampler(temperature=0.0, repetition_penalty=1.3)),
    dict(sampler=Sampler(temperature=torch.tensor([0.0, 1.0, 0.7]), top_k=torch.tensor([1, 5, 50])), seed=1),
    dict(mask=lambda rows, logits: logits.index_fill(1, torch.arange(40, device=logits.device), -torch.inf)),
], ids=["greedy", "sampled", "penalty", "per-row", "mask"])
def test_generation_writes_the_same(settings):
    want, _ = written(small_llama(TORCH), **settings)
    got, batch = written(small_llama(), recorded(Batch), **settings)
    assert got == want and batch.why_not is None and batch.played.batch == 4


def test_rows_end_at_different_times():
    want, _ = written(small_llama(TORCH), n=5)
    eos = [want[0][1], want[1][3]]
    want, _ = written(small_llama(TORCH), n=5, eos_ids=eos)
    got, _ = written(small_llama(), recorded(Batch), n=5, eos_ids=eos)
    assert got == want and len({len(t) for t in got}) > 1


def test_the_same_step_serves_the_next_batch_and_keeps_no_model_alive():
    decoder = small_llama()
    _, first = written(decoder, recorded(Batch), n=2)
    other, second = written(decoder, recorded(Batch), n=3, prompts=[[9, 8], [3], [1, 2, 3, 4, 5]])
    assert first.played is second.played and first.played.decoder is None
    assert other == written(small_llama(TORCH), n=3, prompts=[[9, 8], [3], [1, 2, 3, 4, 5]])[0]
    both = [recorded(Batch)(decoder, PROMPTS, max_new_tokens=3) for _ in range(2)]      # at the same time
    for _ in range(3): states = [[list(r.tokens) for r in b.step()] for b in both]
    assert both[0].played is not both[1].played and states[0] == states[1]
    gone = weakref.ref(decoder)
    del decoder, first, second, both
    gc.collect()
    assert gone() is None and not len(graphs._idle)


def test_a_batch_that_is_left_gives_its_step_back():
    decoder = small_llama()
    rows = generate_tokens(decoder, PROMPTS, batch=recorded(Batch), max_new_tokens=9)
    for _ in range(2): next(rows)
    rows.close()
    del rows
    gc.collect()
    assert sum(map(len, graphs._idle[decoder].values())) == 1
    step = take_step(decoder, 3, 20)
    assert step.decoder is decoder and not graphs._idle[decoder][4, 256]
    graphs.give_back(step)
    decoder.layers[0].mlp.up_proj.weight = torch.nn.Parameter(decoder.layers[0].mlp.up_proj.weight.clone())
    assert take_step(decoder, 3, 20) is not step, "a graph reads weights where they were"


def test_reasons(monkeypatch):
    decoder = small_llama()
    given = recorded(Batch)(decoder, PROMPTS, max_new_tokens=2, cache=decoder.new_cache("quantized", bits=8))
    assert given.why_not == "a QuantizedCache"
    assert written(decoder, recorded(Batch), n=2, prompts=[[1]] * 33)[1].why_not.startswith("33 texts")
    stretched = decoder_of("llama", 2)
    assert "dynamic" in recorded(Batch)(stretched, PROMPTS, max_new_tokens=2).why_not
    with pytest.raises(InputError, match="dynamic"): RecordedStep(stretched)
    assert written(stretched, recorded(Batch), n=2)[0] == written(stretched, n=2)[0]
    assert "its ops" in why_not_fused(small_llama(TORCH))
    monkeypatch.setattr(graphs, "ON_A_CPU", False)
    if DEVICE == "cpu": assert "no GPU" in recorded(Batch)(decoder, PROMPTS, max_new_tokens=2).why_not


@torch.inference_mode()
def test_bad_input_and_bad_weights():
    decoder = small_llama()
    step = RecordedStep(decoder, 1, slots=4)
    for _ in range(4): step.run()
    with pytest.raises(InputError, match="slots are taken"): step.run()
    long = decoder.new_cache()
    decoder(torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), long)
    with pytest.raises(InputError, match="there is room for"): step.load(long)
    with pytest.raises(InputError, match="texts and slots"): RecordedStep(decoder, 0)
    decoder.lm_head.weight.fill_(torch.nan)
    with pytest.raises(WorkbenchError, match="no finite best token"): written(decoder, recorded(Batch), n=3)


@pytest.mark.cuda
@pytest.mark.parametrize("texts,dtype,early", [
    (1, torch.float32, True), (1, torch.bfloat16, True), (8, torch.bfloat16, False), (8, torch.bfloat16, True)],
    ids=str)
@torch.inference_mode()
def test_recorded_on_a_gpu(texts, dtype, early):
    "The graph plays what the kernels compute one by one, across blocks of the cache."
    decoder = decoder_of(dtype=dtype, hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=8,
                         max_position_embeddings=512)
    prompt = torch.randint(0, 97, (texts, 56), device=DEVICE)
    cache = decoder.new_cache()
    decoder.with_ops(REFERENCE)(prompt, cache)
    steps = [RecordedStep(decoder, texts, slots=200, graph=graph, early=early and graph) for graph in (True, False)]
    assert steps[0].play.graph is not None and steps[0].why_not_fused is None
    for step in steps:
        step.load(cache)
        step.tokens.fill_(1)
    exact, seen = copy.deepcopy(decoder).double().with_ops(REFERENCE), []
    past = exact.new_cache()
    exact(prompt, past)
    for _ in range(16):
        asked = steps[0].tokens.clone()
        a, b = (step.run() for step in steps)
        assert torch.equal(a, b) and torch.equal(steps[0].logits, steps[1].logits)
        plain = decoder.with_ops(REFERENCE)(asked, cache)[:, -1].float()
        seen.append((steps[0].logits.clone(), exact(asked, past)[:, -1], plain))
        if dtype is torch.float32: assert (steps[0].logits - plain).abs().max() <= 1e-3 * plain.abs().max()
    ours, want, theirs = map(torch.stack, zip(*seen))              # two narrow results are judged by float64, not by
    as_accurate(ours, want, theirs)                                # each other
    mean = lambda x: (x - want).abs().mean()
    assert mean(ours) <= 1.5 * mean(theirs) + 1e-5 * want.abs().max()


@pytest.mark.cuda
@torch.inference_mode()
def test_recording_reads_nothing_back():
    step = RecordedStep(small_llama(), 2, slots=20, graph=False)
    step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: step.run()
    finally: torch.cuda.set_sync_debug_mode("default")
