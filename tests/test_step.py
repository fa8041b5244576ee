"What a call of the decoder can be told: embeddings for tokens, positions of its own, spans that see each other."
import pytest
import torch
from checks import some_tokens, worst
from models import small_model

from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import InputError


@pytest.fixture(params=["llama", "gemma2", "deepseek_v3", "cohere2"])
def decoder(request): return Decoder.from_transformers(small_model(request.param))


@torch.inference_mode()
def test_embeddings_in_place_of_tokens(decoder):
    tokens = some_tokens()
    assert torch.equal(decoder.hidden(decoder.embed(tokens)), decoder.hidden(tokens))
    cache = decoder.new_cache(context=14)
    parts = [decoder(decoder.embed(tokens[:, :5]), cache), decoder(tokens[:, 5:], cache)]
    assert worst(torch.cat(parts, 1), decoder(tokens)) <= 1e-3


@torch.inference_mode()
def test_positions_of_its_own_equal_transformers():
    hf = small_model("llama")
    decoder, tokens = Decoder.from_transformers(hf), some_tokens()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 9, 11, 12]] * 2)
    want = hf(tokens, position_ids=positions, attention_mask=torch.ones(2, 1, 14, 14).tril().log()).logits
    assert worst(decoder(tokens, positions=positions), want) <= 1e-4
    assert worst(decoder(tokens), want) > 1e-2, "positions were ignored"


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@torch.inference_mode()
def test_spans_equal_transformers_with_their_mask(family, ops):
    hf = small_model(family)
    if getattr(hf.config, "sliding_window", None):
        hf.config.sliding_window = 64                                     # only the spans shall matter
    decoder = Decoder.from_transformers(hf).with_ops(ops)
    tokens = some_tokens()
    spans = torch.full((2, 14), -1)
    spans[0, 3:8] = 0
    spans[1, 1:4], spans[1, 9:14] = 0, 1
    same = (spans[:, :, None] == spans[:, None]) & (spans >= 0)[:, :, None]
    seen = torch.ones(14, 14, dtype=torch.bool).tril() | same                                      # (B, T, T)
    mask = torch.zeros(2, 1, 14, 14).masked_fill(~seen[:, None], float("-inf"))
    masks = {kind: mask for kind in ("full_attention", "sliding_attention")} if family == "gemma2" else mask
    want = hf(tokens, attention_mask=masks).logits
    assert worst(decoder(tokens, spans=spans), want) <= 1e-4
    assert worst(decoder(tokens), want) > 1e-2, "spans were ignored"


@torch.inference_mode()
def test_spans_behind_a_past(decoder):
    "An image in the second call sees itself and everything before it."
    tokens, spans = some_tokens(B=1), torch.full((1, 14), -1)
    spans[0, 6:11] = 3
    whole = decoder(tokens, spans=spans)
    cache = decoder.new_cache(context=14)
    parts = [decoder(tokens[:, :5], cache), decoder(tokens[:, 5:], cache, spans=spans[:, 5:])]
    assert worst(torch.cat(parts, 1), whole) <= 1e-3


@pytest.mark.parametrize("store", ["contiguous", "sliding", "quantized", "static"])
@torch.inference_mode()
def test_a_step_that_fails_on_the_way_leaves_every_store_as_it_was(store):
    decoder, tokens = Decoder.from_transformers(small_model("mistral")), some_tokens()
    options = dict(batch=2, slots=40) if store == "static" else {}
    cache = decoder.new_cache(store, context=14, **options)
    first = decoder(tokens[:, :6], cache)
    def fail(*args, **kwargs): raise RuntimeError("out of memory, say")
    calls = iter(range(100))
    broken = decoder.with_ops(
        attention=lambda *args, **o: fail() if next(calls) == 1 else decoder.ops.attention(*args, **o)
    )
    with pytest.raises(RuntimeError): broken(tokens[:, 6:9], cache)
    lengths = cache.lengths if isinstance(cache.lengths, int) else cache.lengths.tolist()
    assert lengths in (6, [6, 6])
    again = decoder(tokens[:, 6:], cache)
    fresh = decoder.new_cache(store, context=14, **options)
    want = torch.cat([decoder(tokens[:, :6], fresh), decoder(tokens[:, 6:], fresh)], 1)
    assert worst(torch.cat([first, again], 1), want) <= 1e-5


@pytest.mark.parametrize("counts", [[3], [3, 9], [3, -1], [3.5, 2]])
def test_counts_that_do_not_fit_are_refused(counts):
    decoder = Decoder.from_transformers(small_model("llama"))
    with pytest.raises(InputError, match="counts"): decoder(some_tokens(T=5), decoder.new_cache(), counts)
