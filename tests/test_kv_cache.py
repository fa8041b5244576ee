"""Every cache answers like no cache: at every split, in ragged batches, after rewinds and reorderings; broken
caches are rejected."""
import inspect
import random
from types import SimpleNamespace

import pytest
import torch

from llm_workbench.architecture import quantized_cache
from llm_workbench.architecture.attention import attention
from llm_workbench.architecture.kv_cache import Cache, ContiguousCache, NoCache, RowLengths, kv_bytes
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.architecture.quantized_cache import QuantizedCache, dequantize_kv, kv_bits, quantize_kv
from llm_workbench.architecture.rope import inverse_frequencies, rope_tables, rotate
from llm_workbench.architecture.sliding_cache import SlidingCache
from llm_workbench.errors import InputError, UnsupportedError

OPS = SimpleNamespace(attention=attention)
LIMIT = 1e-11  # in float64: rounding is near 1e-15, the smallest mistake is near 1e-2


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


class Tower:
    "Attention layers with random weights; layers may differ in KV heads, head size and value size."
    def __init__(self, windows=(None, None), shapes=((2, 8, 8), (1, 12, 6)), C=16, H=4, attention=attention):
        g = torch.Generator().manual_seed(3)
        matrix = lambda m, n: torch.randn(m, n, generator=g, dtype=torch.float64) * m ** -0.5
        self.windows, self.shapes, self.H, self.C, self.attention = windows, shapes, H, C, attention
        self.weights = [
            (matrix(C, H * D), matrix(C, K * D), matrix(C, K * Dv), matrix(H * Dv, C)) for K, D, Dv in shapes
        ]

    def __call__(self, x, cache, counts=None):
        step = cache.begin(*x.shape[:2], x.device, counts=counts)
        ops = SimpleNamespace(attention=self.attention)
        for layer, ((wq, wk, wv, wo), (K, D, Dv)) in enumerate(zip(self.weights, self.shapes)):
            rope = rope_tables(step.positions, inverse_frequencies(D), dtype=x.dtype)
            q, k, v = ((x @ w).unflatten(-1, shape) for w, shape in ((wq, (self.H, D)), (wk, (K, D)), (wv, (K, Dv))))
            window = self.windows[layer]
            x = x + step.attend(layer, rotate(q, *rope), rotate(k, *rope), v, ops, window=window).flatten(2) @ wo
        cache.commit(step)
        return x


def one_step(cache, *layers, ops=OPS, window=None):
    "A step of given queries, keys and values, one triple a layer; the outputs."
    step = cache.begin(*layers[0][0].shape[:2], layers[0][0].device)
    windows = window if isinstance(window, tuple) else (window,) * len(layers)
    outs = [step.attend(i, *qkv, ops, window=w) for i, (qkv, w) in enumerate(zip(layers, windows))]
    cache.commit(step)
    return outs


def text(*shape): return torch.randn(*shape, dtype=torch.float64)


def worst_split(new_cache, stack, T=21):
    x = text(2, T, stack.C)
    whole, worst = stack(x, NoCache()), 0.0
    for cuts in [*([n, T - n] for n in range(1, T)), [1] * T, [2, 9, 1, 1, 5, T - 18]]:
        cache = new_cache()
        parts = torch.cat([stack(part, cache) for part in x.split(cuts, 1)], 1)
        assert cache.lengths == T
        worst = max(worst, (parts - whole).abs().max().item())
    return worst


def fuzz(new_cache, stack, seed, n_steps=24, check_lengths=True):
    """Random steps, ragged counts, rewinds and row selections; the largest difference from each row's whole text
    without a cache."""
    rnd = random.Random(seed)
    torch.manual_seed(seed)
    rows, cache, worst = [text(0, stack.C) for _ in range(3)], new_cache(), 0.0
    for _ in range(n_steps):
        action = rnd.random()
        if action < 0.15 and len(rows[0]):
            keep = [rnd.randrange(len(rows)) for _ in range(rnd.randint(1, 4))]
            cache.select(keep)
            rows = [rows[b] for b in keep]
        elif action < 0.35 and len(rows[0]):
            lengths = [rnd.randint(max(0, len(r) - rnd.choice([1, 3, 12])), len(r)) for r in rows]
            try: cache.truncate(lengths)
            except (InputError, UnsupportedError):
                assert isinstance(cache, SlidingCache)   # and nothing may have changed: the next steps check it
            else: rows = [r[:n] for r, n in zip(rows, lengths)]
        else:
            T = rnd.choice([1, 1, 1, 2, 5, 13])
            new = text(len(rows), T, stack.C)
            counts = [rnd.randint(0, T) for _ in rows] if rnd.random() < 0.5 else None
            out = stack(new, cache, None if counts is None else torch.tensor(counts))
            for b, n in enumerate(counts or [T] * len(rows)):
                rows[b] = torch.cat([rows[b], new[b, :n]])
                if n: worst = max(worst, (out[b, :n] - stack(rows[b][None], NoCache())[0, -n:]).abs().max().item())
            have = cache.lengths if isinstance(cache.lengths, int) else cache.lengths.tolist()
            want = [len(r) for r in rows]
            assert not check_lengths or have == (want[0] if len(set(want)) == 1 else want)
    return worst


WINDOWS = [(None, None), (1, None), (5, 5), (20, 3), (21, 22), (100, 7)]

@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
def test_cached_is_uncached_at_every_split(windows, ops):
    stack = Tower(windows, attention=ops.attention)
    assert worst_split(lambda: ContiguousCache(2, capacity=2), stack) < LIMIT
    for slack in (0, 2, 64): assert worst_split(lambda: SlidingCache(windows, slack=slack, capacity=3), stack) < LIMIT
    assert worst_split(lambda: QuantizedCache(2, residual=30), stack) < LIMIT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("windows", [(None, None), (4, None), (6, 3), (1, 1)])
def test_random_use(windows, seed, monkeypatch):
    stack = Tower(windows)
    assert fuzz(lambda: ContiguousCache(2, capacity=1), stack, seed) < LIMIT
    for rewind, slack in ((0, 0), (2, 1), (12, 5), (0, 64)):
        assert fuzz(lambda: SlidingCache(windows, rewind=rewind, slack=slack, capacity=1), stack, seed) < LIMIT
    # a quantizer that loses nothing leaves only the bookkeeping of groups and tails to be tested
    monkeypatch.setattr(quantized_cache, "quantize_kv", lambda x, bits, dim: (x, x[..., :1], x[..., :1]))
    monkeypatch.setattr(quantized_cache, "dequantize_kv", lambda codes, scale, zero, bits, dtype: codes)
    for group, residual in ((4, 0), (3, 5), (1, 0), (8, 2)):
        assert fuzz(lambda: QuantizedCache(2, group=group, residual=residual, capacity=group), stack, seed) < LIMIT


class PositionReset(ContiguousCache):
    def begin(self, batch, n_tokens, device=None, **where):
        return super().begin(batch, n_tokens, device, **where | dict(positions=torch.arange(n_tokens, device=device)))

class AdvanceByWidth(ContiguousCache):
    def commit(self, step):
        step.counts = None
        super().commit(step)

class ForgetsToTruncate(ContiguousCache):
    def truncate(self, length): self._lengths.set(torch.as_tensor(length).tolist()); self._lengths.add(1)

class SelectsNothing(ContiguousCache):
    def select(self, rows):
        before = [{n: t.clone() for n, t in layer.items()} for layer in self.store]
        super().select(rows)
        for layer, old in zip(self.store, before):
            for name in layer: layer[name] = old[name][[b % len(old[name]) for b in range(len(rows))]]

class OffByOneWindow(SlidingCache):
    def _append(self, layer, k, v):
        k, v, valid = super()._append(layer, k, v)
        lost = int(isinstance(valid, int) and k.shape[1] > self.windows[layer] - 1)
        return k[:, lost:], v[:, lost:], valid - lost if isinstance(valid, int) else valid

class DropsOneMore(SlidingCache):  # keeps window - 2 keys when it tidies up
    def _moved(self, by):
        kept = {w: n.longest for w, n in self._held.items()}
        super()._moved(by)
        for w, held in self._held.items():
            if held.rows is None and held.longest == w - 1 + self.rewind < kept[w] + 1 and held.value:
                held.add(-1)
                for layer, window in zip(self.store, self.windows):
                    if window == w:
                        for name in layer: layer[name] = layer[name].roll(-1, 1)

class TrimsBeforeAttending(SlidingCache):
    def _append(self, layer, k, v):
        k, v, valid = super()._append(layer, k, v)
        return (
            k[:, -self.windows[layer] :],
            v[:, -self.windows[layer] :],
            valid if not isinstance(valid, int) else min(valid, self.windows[layer]),
        )

class TrimsByWidth(SlidingCache):  # takes the last columns of a padded prompt for the last tokens of each row
    def commit(self, step):
        self._moved(step.n_tokens)
        self._lengths.add(step.n_tokens if step.counts is None else step.counts)

class KeepsStaleTail(QuantizedCache):  # packs groups without taking them out of the tail
    def _moved(self, by):
        before = [{name: layer[name].clone() for name in "kv"} for layer in self.store]
        super()._moved(by)
        for layer, old in zip(self.store, before):
            for name in old: layer[name][:, :old[name].shape[1]] = old[name][:, :layer[name].shape[1]]

BROKEN = [
    PositionReset,
    AdvanceByWidth,
    ForgetsToTruncate,
    SelectsNothing,
    OffByOneWindow,
    DropsOneMore,
    TrimsBeforeAttending,
    TrimsByWidth,
    KeepsStaleTail,
]

@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_broken_caches_are_rejected(broken):
    "Each mutant must fail at least one of the checks that its sound parent passes with the very same arguments."
    if issubclass(broken, SlidingCache): windows, build = (4, 4), lambda c: c((4, 4), slack=1)
    elif issubclass(broken, QuantizedCache): windows, build = (None, None), lambda c: c(2, group=4, residual=2)
    else: windows, build = (None, None), lambda c: c(2)
    stack, parent = Tower(windows), broken.__mro__[1]
    # 8 bits round; a stale tail is wrong by far more
    limit = 0.3 if parent is QuantizedCache else LIMIT

    def worst(cls):  # wrong answers only: neither an exception nor a wrong length counts as being caught
        return max(
            worst_split(lambda: build(cls), stack),
            *(fuzz(lambda: build(cls), stack, seed, check_lengths=False) for seed in range(3)),
        )

    assert worst(parent) < limit < 0.5 < worst(broken)


def test_ragged_row_is_the_row_alone_with_every_cache():
    lengths, windows = (23, 1, 9, 4), (5, None)
    stack = Tower(windows)
    prompts, new = [text(n, stack.C) for n in lengths], text(4, 15, stack.C)
    for cache in (ContiguousCache(2), SlidingCache(windows, slack=2), QuantizedCache(2, residual=40)):
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=7.0)
        first = stack(padded, cache, torch.tensor(lengths))
        steps = torch.cat([stack(new[:, t:t + 1], cache) for t in range(15)], 1)
        for b, n in enumerate(lengths):
            alone = stack(torch.cat([prompts[b], new[b]])[None], NoCache())[0]
            assert (first[b, :n] - alone[:n]).abs().max() < LIMIT and (steps[b] - alone[n:]).abs().max() < LIMIT, (
                type(cache).__name__,
                b,
            )
    assert cache.begin(4, 2).positions.tolist() == [[n + 15, n + 16] for n in lengths]


def test_decoding_moves_no_data_and_reads_no_device_value():
    cache, seen = ContiguousCache(1, capacity=64), []
    def look(q, k, v, **_): seen.append((k.data_ptr(), k.shape[1])); return q
    for T in (10, *[1] * 54): one_step(cache, 3 * (torch.zeros(1, T, 2, 8),), ops=SimpleNamespace(attention=look))
    assert len({p for p, _ in seen}) == 1 and seen[-1][1] == 64, "the keys handed to attention are a view of the store"
    sliding = SlidingCache([8], slack=50, capacity=99)
    for cache, window in ((ContiguousCache(1), None), (sliding, 8)):
        for T in (9, *[1] * 100):  # on "meta" a tensor has no values: reading one raises
            one_step(cache, 3 * (torch.empty(1, T, 2, 8, device="meta"),), window=window)
        assert cache.lengths == 109
    assert sliding.store[0]["k"].shape[1] == 58


def test_sliding_memory_is_bounded_and_its_hints_are_checked():
    cache, T = SlidingCache([6, 6, None], rewind=2, slack=4), 0
    for n in (40, 1, 1, 1, 9, 30, *[1] * 30):
        one_step(cache, *3 * (3 * (torch.zeros(2, n, 1, 4),),), window=(6, 6, None))
        T += n
        assert cache.store[0]["k"].shape[1] <= 6 + 2 + 4 and cache.store[2]["k"].shape[1] >= T
    for asked in (None, 7):
        with pytest.raises(InputError, match="keeps 6"): one_step(cache, 3 * (torch.zeros(2, 1, 1, 4),), window=asked)
    for bad in (0, -1):
        with pytest.raises(InputError, match="1 or more"): SlidingCache([bad])
    cache.truncate(T - 2)
    with pytest.raises(UnsupportedError, match="dropped keys"): cache.truncate(T - 20)
    assert cache.lengths == T - 2


def test_layers_may_differ_and_latents_work():
    # the second is MLA's shape: K = 1, Dv != D
    stack = Tower((None, None, None), shapes=((4, 8, 8), (1, 24, 16), (2, 6, 10)))
    for new in (lambda: ContiguousCache(3), lambda: SlidingCache([None] * 3), lambda: QuantizedCache(3, residual=99)):
        assert worst_split(new, stack) < LIMIT


def test_bad_input():
    cache, stack = ContiguousCache(2), Tower()
    stack(text(2, 3, 16), cache)
    for counts in ([1], [1, 3], [-1, 0]):
        with pytest.raises(InputError, match="counts"): cache.begin(2, 2, counts=torch.tensor(counts))
    with pytest.raises(InputError, match="another batch"):
        stack(text(1, 1, 16), cache)        # would broadcast silently
    with pytest.raises(InputError, match="float32"): one_step(cache, 3 * (torch.zeros(2, 1, 2, 8),))
    for length in (4, -1, [3, 4], [3], [-1, 0]):
        with pytest.raises(InputError, match="cannot truncate"): cache.truncate(length)
    for rows in ([], [2], [-1]):
        with pytest.raises(InputError, match="cannot select"): cache.select(rows)
    for bad in (dict(bits=3), dict(keys="row"), dict(group=0)):
        with pytest.raises((InputError, UnsupportedError)): QuantizedCache(1, **bad)
    with pytest.raises(UnsupportedError, match="odd"): one_step(QuantizedCache(1, 4), 3 * (torch.zeros(1, 1, 1, 7),))
    with pytest.raises(InputError, match="one per layer"): kv_bytes(3, 1, 8, 10, window=[4])


def test_a_step_that_is_not_committed_changes_nothing():
    "Also when it failed in the middle: lengths, contents and the bytes of what is held."
    for cache in (ContiguousCache(2), SlidingCache((4, 4), slack=1), QuantizedCache(2, group=4, residual=2)):
        stack = Tower((4, 4) if isinstance(cache, SlidingCache) else (None, None))
        x = text(2, 12, stack.C)
        stack(x[:, :7], cache)
        step = cache.begin(2, 3)
        q, kv = torch.zeros(2, 3, 4, 8).double(), torch.zeros(2, 3, 2, 8).double()
        step.attend(0, q, kv, kv, OPS, window=stack.windows[0])                # layer 1 is never reached
        assert cache.lengths == 7
        got, fresh = (
            stack(x[:, 7:], cache),
            type(cache)(
                *((stack.windows,) if isinstance(cache, SlidingCache) else (2,)),
                **(
                    {"slack": 1}
                    if isinstance(cache, SlidingCache)
                    else dict(group=4, residual=2)
                    if isinstance(cache, QuantizedCache)
                    else {}
                ),
            ),
        )
        stack(x[:, :7], fresh)
        assert torch.equal(got, stack(x[:, 7:], fresh)), type(cache).__name__


def test_a_layer_may_keep_a_state_instead_of_keys():
    "A running sum, selected with the rows, that cannot be taken back."
    cache = ContiguousCache(1)
    def run(x):                                                                # (B, T, C): the sum of everything so far
        step = cache.begin(*x.shape[:2])
        state = step.state(0, lambda: {"sum": torch.zeros(len(x), x.shape[-1])})
        out = state["sum"][:, None] + x.cumsum(1)
        state["sum"] = out[:, -1]
        cache.commit(step)
        return out
    x = torch.randn(3, 9, 4)
    first = run(x[:, :4])
    cache.select([2, 0])
    assert torch.allclose(run(x[[2, 0], 4:]), x.cumsum(1)[[2, 0], 4:], atol=1e-5) and torch.allclose(
        first, x.cumsum(1)[:, :4]
    )
    with pytest.raises(UnsupportedError, match="state"): cache.truncate(2)
    step = NoCache().begin(3, 4)
    assert step.state(0, lambda: {"sum": torch.ones(1)})["sum"] == 1, "without a past the state is always new"


@pytest.mark.parametrize(
    "make", [lambda: ContiguousCache(1), lambda: SlidingCache([None]), lambda: QuantizedCache(1, residual=99)])
def test_a_value_inside_the_key_is_kept_once(make):
    "Latent attention: the first numbers of a key are its value."
    q, k = torch.randn(2, 9, 4, 12), torch.randn(2, 9, 1, 12)
    want = attention(q, k, k[..., :8])
    cache, outs = make(), []
    for part in (slice(0, 5), slice(5, 9)):
        step = cache.begin(2, part.stop - part.start)
        outs.append(step.attend(0, q[:, part], k[:, part], None, OPS, value_dim=8))
        cache.commit(step)
    assert (torch.cat(outs, 1) - want).abs().max() < 1e-5 and not any(name.startswith("v") for name in cache.store[0])
    cache.select([1])
    cache.truncate(6)
    step = cache.begin(1, 3)
    assert (step.attend(0, q[1:, 6:], k[1:, 6:], None, OPS, value_dim=8) - want[1:, 6:]).abs().max() < 1e-5


def test_truncate_and_select_keep_the_books():
    cache = ContiguousCache(2)
    Tower()(text(3, 6, 16), cache, torch.tensor([6, 2, 4]))
    cache.truncate(5); assert cache.lengths.tolist() == [5, 2, 4]
    cache.truncate(torch.tensor([5, 2, 0])); assert cache.lengths.tolist() == [5, 2, 0]
    cache.select(torch.tensor([True, False, True])); assert cache.lengths.tolist() == [5, 0]
    cache.select([0, 0]); assert cache.lengths == 5 and isinstance(cache.lengths, int)
    cache.truncate(0); assert cache.lengths == 0
    none = NoCache()
    none.truncate(0); none.select([1, 0]); none.commit(none.begin(2, 5))
    assert none.lengths == 0 and none.nbytes == 0 and none.begin(1, 2).positions.tolist() == [0, 1]


def test_row_lengths_are_ints_while_rows_agree():
    n = RowLengths()
    n.add(4); assert n.value == 4 and n.rows is None and n.per_row(3) == [4, 4, 4]
    n.add([1, 0]); assert n.value.tolist() == n.rows == [5, 4] and n.longest == 5
    n.add(2); assert n.value.tolist() == n.rows == [7, 6]
    n.add([0, 1]); assert n.value == 7 and n.rows is None
    with pytest.raises(ValueError): n.set([1, 2]); n.add([1, 2, 3])


def test_bytes_by_formula_and_measured():
    assert kv_bytes(30, 3, 64, 1) == 23_040
    assert kv_bytes(32, 8, 128, 131_072) == 16 * 2 ** 30
    assert kv_bytes(1, 1, 576, 10, v_head_dim=512) == 10 * (576 + 512) * 2
    assert kv_bytes(2, 1, 8, 10, window=[4, None]) == 14 * 32 and kv_bytes(2, 1, 8, 10, window=4) == 8 * 32
    assert kv_bytes(2, 1, 8, 3, bits=4) == 2 * 3 * 8
    for dtype in (torch.float32, torch.bfloat16):
        cache, k = ContiguousCache(2, capacity=50), torch.zeros(3, 50, 2, 8, dtype=dtype)
        one_step(cache, *2 * ((k, k, k[..., :4].clone()),))
        assert cache.nbytes == kv_bytes(2, 2, 8, 50, batch=3, bits=8 * dtype.itemsize, v_head_dim=4)
    for bits in (4, 8):
        cache, t = (
            QuantizedCache(1, bits, group=16, residual=8, capacity=64),
            torch.zeros(2, 72, 3, 32, dtype=torch.bfloat16),
        )
        one_step(cache, (t, t, t))
        packed = sum(kv_bytes(1, 3, 32, 64, 2, kv_bits(bits, share), v_head_dim=0) for share in (16, 32))
        assert cache.nbytes == packed + kv_bytes(1, 3, 32, 24, 2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [1, -1])
def test_quantize_stays_within_half_a_step(bits, dim):
    for offset, dtype in ((0, torch.float32), (20, torch.float32), (-300, torch.float32), (1, torch.bfloat16)):
        x = (torch.randn(3, 32, 2, 16) * 5 + offset).to(dtype)
        codes, scale, zero = quantize_kv(x, bits, dim)
        assert (
            codes.dtype == torch.uint8
            and codes.shape[-1] == 16 * bits // 8
            and scale.shape[dim] == zero.shape[dim] == 1
        )
        error = (dequantize_kv(codes, scale, zero, bits) - x.float()).abs()
        # zero is a float16: half a unit in its last place
        rounding = zero.float().abs() * 2 ** -11 + 2e-3
        assert (error <= scale.float() * 0.55 + rounding).all()
    same = torch.full((1, 8, 1, 4), 3.0)
    assert torch.equal(dequantize_kv(*quantize_kv(same, bits, dim), bits), same)


def test_loud_channels_want_groups_along_tokens():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 2, 32), torch.randn(1, 128, 2, 32), torch.randn(1, 128, 2, 32)
    k[..., 3] += 20
    def error(keys):
        cache = QuantizedCache(1, 4, keys, residual=0)
        one_step(cache, (torch.cat([q] * 32, 1), k, v))
        new = torch.zeros(1, 4, 2, 32)
        got, = one_step(cache, (q, new, new))
        return (got - attention(q, torch.cat([k, new], 1), torch.cat([v, new], 1))).norm().item()
    assert error("channel") < 0.5 * error("token")


@pytest.mark.parametrize("T", [3, 8, 9, 20])
def test_contents_equal_transformers(T):
    from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
    full, sliding, ours = DynamicCache(), DynamicSlidingWindowLayer(sliding_window=8), SlidingCache([None, 8], slack=3)
    k, v = torch.randn(2, 2, T + 20, 3, 4)
    for a, b in [(0, T), *((t, t + 1) for t in range(T, T + 15)), (T + 15, T + 20)]:
        parts = k[:, a:b].transpose(1, 2), v[:, a:b].transpose(1, 2)
        theirs = full.update(*parts, 0), sliding.update(*parts)
        handed = []
        look = SimpleNamespace(attention=lambda q, k, v, **_: handed.append((k, v)) or q)
        one_step(ours, *2 * ((k[:, a:b], k[:, a:b], v[:, a:b]),), ops=look, window=(None, 8))
        for layer in range(2):
            for t, m in zip(theirs[layer], handed[layer]): assert torch.equal(t, m.transpose(1, 2)), (layer, a, b)


def test_a_tiny_decoder_cannot_tell_its_caches_apart():
    from llm_workbench.architecture.decoder import Decoder
    from llm_workbench.architecture.layers import ModelConfig
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
    )
    decoder, tokens = Decoder(config).eval(), torch.randint(50, (2, 20))
    with torch.no_grad():
        want = decoder(tokens)
        for new in (
            lambda: ContiguousCache(2),
            lambda: SlidingCache([6, 6], slack=2),
            lambda: QuantizedCache(2, residual=32),
        ):
            for split in range(1, 20):
                cache = new()
                got = torch.cat([decoder(tokens[:, :split], cache=cache), decoder(tokens[:, split:], cache=cache)], 1)
                assert (got - want).abs().max() < 1e-4, (type(cache).__name__, split)
        padded, counts, cache = tokens.clone(), torch.tensor([11, 4]), SlidingCache([6, 6], slack=2)
        padded[1, 4:] = 0
        first, then = decoder(padded[:, :11], cache=cache, counts=counts), decoder(tokens[:, 11:14], cache=cache)
        for b, n in enumerate(counts.tolist()):
            alone = decoder(torch.cat([padded[b, :n], tokens[b, 11:14]])[None])[0]
            assert (torch.cat([first[b, :n], then[b]]) - alone).abs().max() < 1e-4


def test_every_cache_has_the_same_interface():
    for cls in (NoCache, ContiguousCache, SlidingCache, QuantizedCache):
        assert issubclass(cls, Cache)
        for name in ("begin", "attend", "commit", "truncate", "select"): assert callable(getattr(cls, name))
        for name in ("lengths", "nbytes"): assert isinstance(inspect.getattr_static(cls, name), property)
