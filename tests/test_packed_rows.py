"Several texts in one row without padding: every text gets the logits that it would get alone."
import random

import pytest
import torch
from checks import worst
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.architecture.kv_cache import ContiguousCache
from llm_workbench.architecture.packed_rows import PackedRows
from llm_workbench.errors import InputError

CASES = [(family, i) for family, variants in SMALL.items() for i in range(len(variants))]
TEXTS = 6


def random_texts(seed, most=20):
    "Some longer, some shorter than windows and trained lengths."
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    return [torch.randint(0, 97, (rng.randint(3, most),), generator=generator) for _ in range(TEXTS)]


def random_schedule(texts, seed):
    "Steps, each a list of (text, first token, number of tokens), until all texts are read."
    rng, at = random.Random(seed), [0] * len(texts)
    while waiting := [i for i, text in enumerate(texts) if at[i] < len(text)]:
        step = []
        for i in rng.sample(waiting, rng.randint(1, len(waiting))):
            n = min(rng.choice([1, 1, 2, 5]), len(texts[i]) - at[i])
            step.append((i, at[i], n))
            at[i] += n
        yield step


@torch.inference_mode()
def worst_schedule(decoder, seed, cache=None):
    "The largest difference between a text in a packed row and the text alone."
    texts, outs = random_texts(seed), {}
    cache = cache or decoder.new_cache("packed")
    for i, text in enumerate(texts): cache.open(i, context=len(text))
    for step in random_schedule(texts, seed):
        row = torch.cat([texts[i][start:start + n] for i, start, n in step])[None]                # (1, N)
        logits = decoder(row, cache, pieces=[(i, n) for i, _, n in step])[0]
        for (i, _, n), part in zip(step, logits.split([n for _, _, n in step])): outs.setdefault(i, []).append(part)
    return max(worst(torch.cat(outs[i]), decoder(text[None])[0]) for i, text in enumerate(texts))


@pytest.mark.parametrize("family,variant", CASES)
def test_random_schedules(family, variant, request):
    # in float32 a router may flip on a tie
    decoder = Decoder.from_transformers(small_model(family, variant)).double()
    # 5 x 45 variants > 200
    schedules = range(200 if request.config.getoption("--all-schedules", default=False) else 5)
    gap = max(worst_schedule(decoder, seed) for seed in schedules)
    assert gap <= 1e-5, f"a text in a packed row differs from the text alone by {gap:.1e}"


@pytest.mark.parametrize("family,variant", CASES)
def test_packed_training_examples(family, variant):
    "Without a past: logits and gradients of one packed row are those of the examples alone."
    decoder, texts = Decoder.from_transformers(small_model(family, variant)), random_texts(1)[:3]
    weight = next(decoder.layers[0].parameters())
    packed = decoder(torch.cat(texts)[None], pieces=[len(t) for t in texts])[0]
    alone = torch.cat([decoder(t[None])[0] for t in texts])
    gradients = [torch.autograd.grad(out.log_softmax(-1)[:, 0].mean(), [weight])[0] for out in (packed, alone)]
    assert worst(packed, alone) <= 1e-3 and worst(*gradients) <= 1e-4 * max(1, gradients[1].abs().max())


class SharedPast(PackedRows):
    "A wrong one: all texts in one cache."
    def open(self, name, context=None):
        self.texts[name] = next(iter(self.texts.values()), None) or self.make()


class FirstLength(PackedRows):
    "A wrong one: the length of the first text chooses the angles of all."
    def open(self, name, context=None):
        super().open(name, self.known if hasattr(self, "known") else context)
        self.known = context if not hasattr(self, "known") else self.known


@pytest.mark.parametrize("wrong,family,variant",
                         [(SharedPast, "llama", 0), (FirstLength, "phi3", 1), (FirstLength, "llama", 2)])
def test_wrong_packed_caches_are_rejected(wrong, family, variant):
    decoder = Decoder.from_transformers(small_model(family, variant))
    gap = max(worst_schedule(decoder, seed, wrong(lambda: ContiguousCache(len(decoder.layers)))) for seed in range(3))
    assert gap > 1e-2, "texts that mix were not noticed"


def test_texts_come_and_go():
    decoder = Decoder.from_transformers(small_model("llama"))
    cache, tokens = decoder.new_cache("packed"), torch.arange(5)[None]
    with torch.inference_mode():
        decoder(tokens, cache, pieces=[("a", 2), ("b", 3)])
        cache.close("a")
        assert cache.lengths == {"b": 3} and cache.nbytes > 0
        with pytest.raises(InputError, match="no text 'a'"): cache.close("a")


@pytest.mark.parametrize("pieces,message", [([("a", 2), ("a", 3)], "one piece"), ([("a", 2)], "do not fill a row of 5"),
                                            ([("a", 5), ("b", 0)], "1 or more"), ([], "do not fill")])
def test_pieces_that_do_not_fit_are_refused(pieces, message):
    decoder = Decoder.from_transformers(small_model("llama"))
    cache = decoder.new_cache("packed")
    with pytest.raises(InputError, match=message): decoder(torch.arange(5)[None], cache, pieces=pieces)
    assert cache.lengths == {}
    with pytest.raises(InputError, match="one row without padding"):
        decoder(torch.zeros(2, 5, dtype=torch.long), cache, pieces=[("a", 5)])
