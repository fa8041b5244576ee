"What must hold on a GPU: the same model, the same answers. Skipped where torch sees no GPU; `make gpu` runs these."
import pytest
import torch

from checks import cached_is_uncached, some_tokens, worst
from llm_workbench.architecture.decoder import Decoder
from llm_workbench.families.families import SMALL, small_model
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.kernels.cpu import CPU
from llm_workbench.inference.generation import generate_tokens
from llm_workbench.inference.sampling import Sampler

pytestmark = pytest.mark.cuda


@pytest.fixture(params=SMALL)
def pair(request):
    "The same decoder on the CPU and on the GPU."
    torch.backends.cuda.matmul.allow_tf32 = False
    hf = small_model(request.param)
    cpu = Decoder.from_transformers(hf)
    state = {k: v.cuda() for k, v in hf.state_dict().items()}
    return cpu, Decoder.from_checkpoint(hf.config.to_dict(), state, torch.float32, "cuda")


@pytest.mark.parametrize("ops", [REFERENCE, TORCH, CPU], ids=["reference", "torch", "cpu-kernels-step-aside"])
@torch.inference_mode()
def test_logits_equal_the_cpu(pair, ops):
    cpu, gpu = pair
    assert worst(gpu.with_ops(ops)(some_tokens().cuda()).cpu(), cpu(some_tokens())) <= 1e-3


@pytest.mark.parametrize("kind", ["contiguous", "sliding"])
def test_caches_are_exact(pair, kind):
    _, gpu = pair
    if kind == "sliding" and not gpu.config.sliding_window: pytest.skip("this family has no window")
    cached_is_uncached(gpu, lambda d: d.new_cache(kind, context=some_tokens().shape[1]), some_tokens().cuda())


@torch.inference_mode()
def test_generation_equals_the_cpu(pair):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    cpu, gpu = ([row.tokens for row in list(generate_tokens(decoder, prompts, max_new_tokens=8))[-1]] for decoder in pair)
    assert cpu == gpu


def test_seeds_repeat(pair):
    _, gpu = pair
    draw = lambda: [r.tokens for r in list(generate_tokens(gpu, [[1, 2], [3]], max_new_tokens=8, sampler=Sampler(temperature=1.0), seed=3))[-1]]
    assert draw() == draw()
