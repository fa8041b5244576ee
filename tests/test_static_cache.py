"A cache of fixed shape: a decode step is compiled once, for every family, and asks the host for nothing."
import pytest
import torch
from checks import cached_is_uncached, ragged_is_single, some_tokens, worst
from models import SMALL, small_model
from torch._dynamo.testing import CompileCounterWithBackend

from llm_workbench import Decoder
from llm_workbench.architecture.kv_cache import ContiguousCache
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import InputError, UnsupportedError

STEPS, B = 64, 2
# every family once, and a second variant where the length of a text decides over its angles
CASES = [(family, 0) for family in SMALL] + [("llama", 2), ("phi3", 1), ("mixtral", 1)]


def static(decoder, batch=B, slots=80): return decoder.new_cache("static", batch=batch, slots=slots)


def compiled_steps(decoder, cache, n_steps=STEPS):
    "How often a decode step was compiled, and the largest difference of its logits to a growing cache."
    torch._dynamo.reset()
    grows, generator = decoder.new_cache(), torch.Generator().manual_seed(0)
    draw = lambda T: torch.randint(0, decoder.config.vocab_size, (B, T), generator=generator)
    prompt = draw(5)
    for each in (cache, grows): decoder(prompt, each, [5, 3])                  # rows of unequal length
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda tokens: decoder(tokens, cache), fullgraph=True, backend=counter)
    gaps = [worst(step(tokens), decoder(tokens, grows)) for tokens in (draw(1) for _ in range(n_steps))]
    return counter.frame_count, max(gaps)


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
@pytest.mark.parametrize("family,variant", CASES)
@torch.inference_mode()
def test_a_step_is_compiled_once_and_without_a_break(family, variant, ops):
    decoder = Decoder.from_transformers(small_model(family, variant)).with_ops(ops)
    graphs, gap = compiled_steps(decoder, static(decoder))
    assert graphs == 1, (
        f"{graphs} graphs for {STEPS} steps: something depends on a number that the host reads or counts"
    )
    assert gap <= 1e-3, f"a compiled step differs from a growing cache by {gap:.1e}"


def test_a_cache_that_counts_on_the_host_is_noticed():
    "The test above has to fail for a cache whose shapes grow."
    decoder = Decoder.from_transformers(small_model("llama"))
    with torch.inference_mode():
        try: graphs, _ = compiled_steps(decoder, ContiguousCache(len(decoder.layers)))
        except Exception as e: assert "dynamo" in type(e).__module__.lower() or "torch" in type(e).__module__
        else: assert graphs > 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "phi3"])
def test_equal_to_no_cache_at_every_split_and_in_ragged_batches(family):
    decoder = Decoder.from_transformers(small_model(family))
    context = lambda make, n: lambda d: d.new_cache("static", context=n, **make)
    cached_is_uncached(decoder, context(dict(batch=2, slots=14), some_tokens().shape[1]))
    ragged_is_single(decoder, lambda d: d.new_cache("static", batch=3, slots=20))


def test_rows_are_cut_and_selected():
    decoder, tokens = Decoder.from_transformers(small_model("llama")), some_tokens(B=3, T=9)
    with torch.inference_mode():
        whole = decoder(tokens)
        cache = static(decoder, batch=3)
        decoder(tokens[:, :6], cache)
        cache.truncate(4)
        assert cache.lengths.tolist() == [4, 4, 4]
        cache.select([2, 0])
        rest = decoder(tokens[[2, 0], 4:], cache)
    assert worst(rest, whole[[2, 0], 4:]) <= 1e-4


def test_too_many_tokens_are_refused_before_anything_is_written():
    decoder = Decoder.from_transformers(small_model("llama"))
    cache = static(decoder, slots=6)
    with torch.inference_mode():
        decoder(some_tokens(T=5), cache)
        with pytest.raises(InputError, match="more slots"): decoder(some_tokens(T=2), cache)
        assert cache.lengths.tolist() == [5, 5]
        cache.truncate(2)
        decoder(some_tokens(T=4), cache)                                       # slots that were given back count again
    with pytest.raises(InputError, match="2 rows and is given 3"): decoder(some_tokens(B=3, T=1), cache)


def test_wrong_stores_and_options_are_named():
    decoder = Decoder.from_transformers(small_model("llama"))
    with pytest.raises(UnsupportedError, match="Did you mean 'static'"): decoder.new_cache("statc")
    with pytest.raises(InputError, match="bits"): decoder.new_cache("static", bits=4)
