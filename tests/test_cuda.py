"What must hold on a GPU: the same model, the same answers. Skipped where torch sees no GPU; `make gpu` runs these."
import pytest
import torch
from checks import cached_is_uncached, some_tokens, worst
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.architecture.matrices import FEW, stack_linear
from llm_workbench.architecture.ops import REFERENCE, TORCH, grouped_linear
from llm_workbench.inference.generation import generate_tokens
from llm_workbench.inference.sampling import Sampler
from llm_workbench.kernels.cpu import CPU

pytestmark = pytest.mark.cuda


@pytest.fixture(params=SMALL)
def pair(request):
    "The same decoder on the CPU and on the GPU."
    torch.backends.cuda.matmul.allow_tf32 = False
    hf = small_model(request.param)
    return Decoder.from_transformers(hf), Decoder.from_transformers(hf).cuda()


@pytest.mark.parametrize("ops", [REFERENCE, TORCH, CPU], ids=["reference", "torch", "cpu-kernels-step-aside"])
@torch.inference_mode()
def test_logits_equal_the_cpu(pair, ops):
    cpu, gpu = pair
    assert worst(gpu.with_ops(ops)(some_tokens().cuda()).cpu(), cpu(some_tokens())) <= 1e-3


@pytest.mark.parametrize("store", ["contiguous", "sliding", "static"])
def test_caches_are_exact(pair, store):
    _, gpu = pair
    if store == "sliding" and not gpu.config.sliding_window: pytest.skip("this family has no window")
    options = dict(batch=2, slots=14) if store == "static" else {}
    cached_is_uncached(
        gpu, lambda d: d.new_cache(store, context=some_tokens().shape[1], **options), some_tokens().cuda()
    )


@torch.inference_mode()
def test_generation_equals_the_cpu(pair):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    cpu, gpu = (
        [row.tokens for row in list(generate_tokens(decoder, prompts, max_new_tokens=8))[-1]] for decoder in pair
    )
    assert cpu == gpu


def test_seeds_repeat(pair):
    _, gpu = pair
    draw = lambda: [
        r.tokens
        for r in list(generate_tokens(gpu, [[1, 2], [3]], max_new_tokens=8, sampler=Sampler(temperature=1.0), seed=3))[
            -1
        ]
    ]
    assert draw() == draw()


# ----------------------------------------------------------------------------------------- steps of fixed shape
def prepared(gpu, ops):
    "A decoder, a static cache behind prompts of 5 and 3 tokens, the same in a growing cache, and the next tokens."
    decoder, prompt = gpu.with_ops(ops), some_tokens(T=5).cuda()
    fixed, grows = decoder.new_cache("static", batch=2, slots=40), decoder.new_cache()
    for cache in (fixed, grows): decoder(prompt, cache, [5, 3])
    return decoder, fixed, grows, torch.randint(0, 97, (2, 1), device="cuda")


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
@torch.inference_mode()
def test_a_step_reads_nothing_back(pair, ops):
    decoder, fixed, _, token = prepared(pair[1], ops)
    sample = Sampler(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)
    pick = lambda: sample.pick(decoder(token, fixed)[:, -1]) if hasattr(sample, "pick") else decoder(token, fixed)
    # libraries are loaded, slots are reserved
    pick()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: pick()
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
@torch.inference_mode()
def test_a_recorded_step_equals_a_growing_cache(pair, ops):
    decoder, fixed, grows, token = prepared(pair[1], ops)
    first = token.clone()
    for _ in range(3): out = decoder(token, fixed)                                        # warm-up
    torch.cuda.synchronize()
    fixed.truncate([5, 3])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decoder(token, fixed)
        token.copy_(out[:, -1:].argmax(-1))
    token.copy_(first)
    for _ in range(16):
        asked = token.clone()
        graph.replay()
        assert worst(out, decoder(asked, grows)) <= 1e-3


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 1000])
@torch.inference_mode()
def test_grouped_products_equal_one_by_one(rows):
    x, weight = torch.randn(rows, 64, device="cuda").bfloat16(), torch.randn(7, 48, 64, device="cuda").bfloat16()
    which = torch.randint(0, 7, (rows,), device="cuda") % 5                               # two matrices get no row
    want = stack_linear(x.double().cpu(), weight.double().cpu(), which.cpu())
    assert worst(grouped_linear(x, weight, which).cpu(), want) <= 0.02 * want.abs().max()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: grouped_linear(x, weight, which)
    finally: torch.cuda.set_sync_debug_mode("default")
