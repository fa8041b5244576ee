"""Every cache answers like no cache: at every split, in ragged batches, after failed calls, rewinds and reorderings;
broken caches are rejected."""
import inspect
import random
from collections import namedtuple
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
from llm_workbench.architecture.static_cache import StaticCache
from llm_workbench.errors import InputError, UnsupportedError

LIMIT = 1e-11  # in float64: rounding is near 1e-15, the smallest mistake is near 1e-2
SHOW = SimpleNamespace(attention=lambda q, k, v, **options: (k, v))      # answers with what it was handed
Heads = namedtuple("Heads", "K D Dv latent", defaults=[False])           # latent: the value is the first Dv of the key


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


class Tower:
    "Attention layers with random weights that differ in KV heads, head size and value size; with `sums` a state, too."
    def __init__(self, windows=(None, None), heads=(Heads(2, 8, 8), Heads(1, 12, 6)), C=16, H=4, ops=REFERENCE,
                 sums=False):
        g = torch.Generator().manual_seed(3)
        matrix = lambda m, n: torch.randn(m, n, generator=g, dtype=torch.float64) * m ** -0.5
        self.windows, self.heads, self.H, self.C, self.ops, self.sums = windows, heads, H, C, ops, sums
        self.weights = [
            (matrix(C, H * h.D), matrix(C, h.K * h.D), matrix(C, h.K * h.Dv), matrix(H * h.Dv, C)) for h in heads
        ]

    def running_sum(self, x, step, layer):
        "What a layer with a state does: it remembers the sum of the real tokens so far."
        state = step.state(layer, lambda: {"sum": x.new_zeros(len(x), 1, x.shape[2])})
        if step.counts is not None:
            x = x * (torch.arange(x.shape[1]) < torch.tensor(step.counts)[:, None])[..., None]
        sums = state["sum"] + x.cumsum(1)
        state["sum"] = sums[:, -1:].clone()
        return sums

    def __call__(self, x, cache, ops=None, **where):
        step = cache.begin(*x.shape[:2], x.device, **where)
        if self.sums: x = x + 0.1 * self.running_sum(x, step, len(self.heads))
        for layer, ((wq, wk, wv, wo), (K, D, Dv, latent)) in enumerate(zip(self.weights, self.heads)):
            tables = rope_tables(step.positions, inverse_frequencies(D), dtype=x.dtype)
            q, k = (rotate((x @ w).unflatten(-1, (-1, D)), *tables) for w in (wq, wk))
            v = None if latent else (x @ wv).unflatten(-1, (K, Dv))
            options = dict(value_dim=Dv if latent else None, window=self.windows[layer])
            out = step.attend(layer, q, k, v, ops or self.ops, **options)
            x = x + out.flatten(2) @ wo
        cache.commit(step)
        return x


LATENT = (Heads(1, 24, 16, latent=True), Heads(1, 12, 6, latent=True))
MIXED = (Heads(2, 8, 8), Heads(1, 24, 16, latent=True))


class GaveUp(Exception): "What an op raises that runs out of memory."

def fails_in(layer):
    calls = iter(range(100))
    def give_up(*args, **options):
        if next(calls) == layer: raise GaveUp
        return attention(*args, **options)
    return SimpleNamespace(attention=give_up)


def text(*shape): return torch.randn(*shape, dtype=torch.float64)
def as_list(lengths): return lengths if isinstance(lengths, int) else lengths.tolist()


def worst_split(new_cache, tower, T=21):
    x = text(2, T, tower.C)
    whole, worst = tower(x, NoCache()), 0.0
    for cuts in [*([n, T - n] for n in range(1, T)), [1] * T, [2, 9, 1, 1, 5, T - 18]]:
        cache = new_cache()
        parts = torch.cat([tower(part, cache) for part in x.split(cuts, 1)], 1)
        assert as_list(cache.lengths) in (T, [T, T])
        worst = max(worst, (parts - whole).abs().max().item())
    return worst


def fuzz(new_cache, tower, seed, n_steps=24, check_lengths=True):
    "Random steps, counts, failures, rewinds, row selections; largest difference from each row's whole text alone."
    rnd = random.Random(seed)
    torch.manual_seed(seed)
    rows, cache, worst = [text(0, tower.C) for _ in range(3)], new_cache(), 0.0
    for _ in range(n_steps):
        action = rnd.random()
        if action < 0.15 and len(rows[0]):
            keep = [rnd.randrange(len(rows)) for _ in range(rnd.randint(1, 4))]
            cache.select(keep)
            rows = [rows[b] for b in keep]
        elif action < 0.3 and len(rows[0]):
            lengths = [rnd.randint(max(0, len(r) - rnd.choice([1, 3, 12])), len(r)) for r in rows]
            try: cache.truncate(lengths)
            except UnsupportedError:                     # and nothing may have changed: the next steps check it
                assert isinstance(cache, SlidingCache) or tower.sums
            else: rows = [r[:n] for r, n in zip(rows, lengths)]
        elif action < 0.45:
            new = text(len(rows), rnd.choice([1, 2, 5, 13]), tower.C)
            counts = [rnd.randint(0, new.shape[1]) for _ in rows] if rnd.random() < 0.5 else None
            with pytest.raises(GaveUp): tower(new, cache, fails_in(rnd.randint(0, 1)), counts=counts)
        else:
            T = rnd.choice([1, 1, 1, 2, 5, 13])
            new = text(len(rows), T, tower.C)
            counts = [rnd.randint(0, T) for _ in rows] if rnd.random() < 0.5 else None
            out = tower(new, cache, counts=counts)
            for b, n in enumerate(counts or [T] * len(rows)):
                rows[b] = torch.cat([rows[b], new[b, :n]])
                if n: worst = max(worst, (out[b, :n] - tower(rows[b][None], NoCache())[0, -n:]).abs().max().item())
            want = [len(r) for r in rows]
            assert not check_lengths or as_list(cache.lengths) == (want[0] if len(set(want)) == 1 else want)
    return worst


def lossless(monkeypatch):
    "A quantizer that loses nothing leaves only the bookkeeping of groups and tails to be tested."
    monkeypatch.setattr(quantized_cache, "quantize_kv", lambda x, bits, dim: (x, x[..., :1], x[..., :1]))
    monkeypatch.setattr(quantized_cache, "dequantize_kv", lambda codes, scale, zero, bits, dtype: codes)


WINDOWS = [(None, None), (1, None), (5, 5), (20, 3), (21, 22), (100, 7)]

@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
def test_cached_is_uncached_at_every_split(windows, ops):
    tower = Tower(windows, ops=ops)
    assert worst_split(lambda: ContiguousCache(2, capacity=2), tower) < LIMIT
    for slack in (0, 2, 64):
        assert worst_split(lambda: SlidingCache(windows, slack=slack, capacity=3), tower) < LIMIT
    assert worst_split(lambda: QuantizedCache(2, residual=30), tower) < LIMIT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("windows", [(None, None), (4, None), (6, 3), (1, 1)])
@pytest.mark.parametrize("options", [{}, dict(heads=MIXED, sums=True)], ids=["keys", "latents and sums"])
def test_random_use(windows, seed, options, monkeypatch):
    tower = Tower(windows, **options)
    assert fuzz(lambda: ContiguousCache(2, capacity=1), tower, seed) < LIMIT
    for rewind, slack in ((0, 0), (2, 1), (12, 5), (0, 64)):
        assert fuzz(lambda: SlidingCache(windows, rewind=rewind, slack=slack, capacity=1), tower, seed) < LIMIT
    lossless(monkeypatch)
    for group, residual in ((4, 0), (3, 5), (1, 0), (8, 2)):
        assert fuzz(lambda: QuantizedCache(2, group=group, residual=residual, capacity=group), tower, seed) < LIMIT


# --- known-wrong caches: each must fail a check that its sound parent passes ------------------------------------------

class PositionReset(ContiguousCache):
    def begin(self, batch, n_tokens, device=None, **where):
        return super().begin(batch, n_tokens, device, **where, positions=torch.arange(n_tokens, device=device))

class CommitsTheWidth(ContiguousCache):
    def commit(self, step): step.counts = None; super().commit(step)

class KeepsFailedSteps(ContiguousCache):  # as if tokens were part of the past once they are written
    def begin(self, *args, **where):
        open_step = getattr(self, "open_step", None)
        if open_step is not None and not open_step.closed and open_step.counts is None: super().commit(open_step)
        self.open_step = super().begin(*args, **where)
        return self.open_step

class ForgetsToTruncate(ContiguousCache):
    def truncate(self, length): self._lengths.set(torch.as_tensor(length).tolist()); self._lengths.add(1)

class SelectsNothing(ContiguousCache):
    def select(self, rows):
        before = [dict(layer) for layer in self.store]
        super().select(rows)
        for layer, old in zip(self.store, before):
            for name in layer: layer[name] = old[name][[b % len(old[name]) for b in range(len(rows))]].clone()

class StatesStay(ContiguousCache):  # the states of the first rows, whichever rows were selected
    def select(self, rows):
        before = {layer: dict(state) for layer, state in self.states.items()}
        super().select(rows)
        for layer, state in self.states.items():
            for name, old in before[layer].items(): state[name] = old[[b % len(old) for b in range(len(rows))]]

class StatesAtOnce(ContiguousCache):  # a step that fails has changed the state already
    def begin(self, *args, **where):
        step = super().begin(*args, **where)
        step.states = self.states
        return step

class StatesOfOldTexts(ContiguousCache):  # a state is taken back by cutting the text alone
    def truncate(self, length):
        kept, self.states = self.states, {}
        super().truncate(length)
        self.states = kept

class TheOtherEndOfTheKey(ContiguousCache):
    def attend(self, step, layer, q, k, v, ops, *, value_dim=None, **options):
        other = SimpleNamespace(attention=lambda q, k, v, **o: ops.attention(q, k, k[..., -v.shape[-1]:], **o))
        return super().attend(step, layer, q, k, v, ops if v is not None else other, value_dim=value_dim, **options)

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
        valid = valid if not isinstance(valid, int) else min(valid, self.windows[layer])
        return k[:, -self.windows[layer]:], v[:, -self.windows[layer]:], valid

class TrimsByWidth(SlidingCache):  # takes the last columns of a padded prompt for the last tokens of each row
    def commit(self, step): self._width = step.n_tokens; super().commit(step)
    def _moved(self, by): super()._moved(self._width)

class DropsAtOnce(SlidingCache):  # makes room when a step begins: one that fails has lost keys
    def begin(self, batch, n_tokens, *args, **where):
        for w, held in self._held.items():
            if held.rows is None and held.value == w - 1 and n_tokens > 2:
                held.add(-1)
                for layer in self.store:
                    for name in layer: layer[name] = layer[name].roll(-1, 1)
        return super().begin(batch, n_tokens, *args, **where)

class KeepsStaleTail(QuantizedCache):  # packs groups without taking them out of the tail
    def _moved(self, by):
        before = [{name: layer[name].clone() for name in "kv" if name in layer} for layer in self.store]
        super()._moved(by)
        for layer, old in zip(self.store, before):
            for name in old: layer[name][:, :old[name].shape[1]] = old[name][:, :layer[name].shape[1]]

KEYS, ALL = {}, dict(heads=MIXED, sums=True)
BROKEN = [(PositionReset, KEYS), (CommitsTheWidth, KEYS), (KeepsFailedSteps, KEYS), (ForgetsToTruncate, KEYS),
          (SelectsNothing, KEYS), (StatesStay, ALL), (StatesAtOnce, ALL), (StatesOfOldTexts, ALL),
          (TheOtherEndOfTheKey, ALL), (OffByOneWindow, KEYS), (DropsOneMore, KEYS), (TrimsBeforeAttending, KEYS),
          (TrimsByWidth, KEYS), (DropsAtOnce, KEYS), (KeepsStaleTail, KEYS)]

@pytest.mark.parametrize("broken,options", BROKEN, ids=lambda c: getattr(c, "__name__", ""))
def test_broken_caches_are_rejected(broken, options):
    "Each mutant must fail at least one of the checks that its sound parent passes with the very same arguments."
    if issubclass(broken, SlidingCache): windows, build = (4, 4), lambda c: c((4, 4), slack=1)
    elif issubclass(broken, QuantizedCache): windows, build = (None, None), lambda c: c(2, group=4, residual=2)
    else: windows, build = (None, None), lambda c: c(2)
    tower, parent = Tower(windows, **options), broken.__mro__[1]
    limit = 0.3 if parent is QuantizedCache else LIMIT                     # 8 bits round; a stale tail is off by more

    def worst(cls):  # wrong answers only: neither an exception nor a wrong length counts as being caught
        return max(worst_split(lambda: build(cls), tower),
                   *(fuzz(lambda: build(cls), tower, seed, check_lengths=False) for seed in range(6)))

    assert worst(parent) < limit
    assert worst(broken) > 0.5


# --- one step ---------------------------------------------------------------------------------------------------------

STORES = {"contiguous": lambda: ContiguousCache(2, capacity=3), "sliding": lambda: SlidingCache([5, None], slack=2),
          "quantized": lambda: QuantizedCache(2, group=4, residual=2), "static": lambda: StaticCache(2, 2, 60)}

@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("past", [0, 3, 17])
@pytest.mark.parametrize("lost", [1, 6, 20])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_step_that_is_not_committed_changes_nothing(store, past, lost, layer):
    "The next answers are those of a cache that never failed."
    tower, x = Tower((5, None), heads=MIXED, sums=True), text(2, 24, 16)
    failed, sound = STORES[store](), STORES[store]()
    counts = [past, past // 2]
    for cache in (failed, sound):
        if past: tower(x[:, :past], cache, counts=counts)
    with pytest.raises(GaveUp): tower(text(2, lost, 16) + 5, failed, fails_in(layer), counts=[lost, lost // 2])
    seen = [(as_list(c.lengths), c.begin(2, 1).positions.tolist(), c.begin(2, 4).texts) for c in (failed, sound)]
    assert torch.equal(*(torch.as_tensor(s[2]) for s in seen)) and seen[0][:2] == seen[1][:2]
    for cache in (failed, sound): cache.truncate(cache.lengths)
    for part in (x[:, past:past + 1], x[:, past + 1:past + 5], x[:, past + 5:past + 7]):
        assert (tower(part, failed) - tower(part, sound)).abs().max() < LIMIT


@pytest.mark.parametrize("store", ["contiguous", "sliding", "quantized"])
def test_an_empty_cache_forgets_what_a_failed_call_left(store):
    tower = Tower((5, None))
    cache = STORES[store]()
    with pytest.raises(GaveUp): tower(text(3, 9, 16), cache, fails_in(1))
    x = text(2, 4, 16)
    assert torch.equal(tower(x, cache), tower(x, STORES[store]())), "another batch"
    assert cache.begin(2, 1).texts == 4, "the failed call has promised a length"
    cache = STORES[store]()
    k = torch.zeros(2, 3, 1, 8)
    cache.begin(2, 3).attend(0, k, k, k, REFERENCE, window=5)
    assert torch.equal(tower(x, cache), tower(x, STORES[store]())), "another dtype, other heads"


def test_a_step_is_closed_once_and_by_its_own_cache():
    cache, other = ContiguousCache(2), ContiguousCache(2)
    step = cache.begin(2, 3)
    with pytest.raises(InputError, match="another cache"): other.commit(step)
    cache.commit(step)
    with pytest.raises(InputError, match="closed"): cache.commit(step)
    assert (cache.lengths, other.lengths) == (3, 0)


@pytest.mark.parametrize("store", STORES)
def test_positions_of_its_own(store):
    "They only say where tokens stand: the cache goes on counting tokens."
    tower, x = Tower((5, None), ops=TORCH), text(2, 9, 16)
    positions = torch.tensor([[0, 1, 2, 2, 2, 3, 5, 7, 9], [4, 5, 6, 7, 8, 8, 8, 9, 10]])
    want, cache = tower(x, NoCache(), positions=positions), STORES[store]()
    assert (want - tower(x, NoCache())).abs().max() > 1e-2, "positions were ignored"
    if store == "quantized": cache = QuantizedCache(2, residual=20)
    parts = [tower(x[:, a:b], cache, positions=positions[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 9))]
    assert (torch.cat(parts, 1) - want).abs().max() < LIMIT
    assert as_list(cache.lengths) in (9, [9, 9])
    assert torch.as_tensor(cache.begin(2, 1).positions).unique().tolist() == [9]
    axes = torch.zeros(3, 2, 5, dtype=torch.long)
    assert cache.begin(2, 5, positions=axes).n_tokens == 5
    for wrong in (torch.zeros(2, 4), torch.zeros(4), torch.zeros(3, 1, 5), torch.zeros(2, 2, 5), torch.zeros(1, 5)):
        with pytest.raises(InputError, match="positions"): cache.begin(2, 5, positions=wrong)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("windows", [(None, None), (5, None)])
def test_spans_behind_a_ragged_past(store, windows):
    tower, x, counts = Tower(windows), text(2, 7, 16), [7, 2]
    cache = dict(contiguous=ContiguousCache(2), sliding=SlidingCache(windows, slack=0), static=StaticCache(2, 2, 30),
                 quantized=QuantizedCache(2, residual=30))[store]
    tower(x, cache, counts=counts)
    new, spans = text(2, 6, 16), torch.tensor([[-1, 3, 3, 3, -1, -1], [0, 0, 1, 1, 1, 1]])
    out = tower(new, cache, spans=spans)
    for b, n in enumerate(counts):
        whole, none = torch.cat([x[b, :n], new[b]])[None], torch.full((1, n), -1)
        alone = tower(whole, NoCache(), spans=torch.cat([none, spans[b:b + 1]], 1))[0, n:]
        assert (out[b] - alone).abs().max() < LIMIT, "spans are off"
        assert (alone - tower(whole, NoCache())[0, n:]).abs().max() > 1e-2
    for wrong in (spans[:1], spans[:, :5], spans[0]):
        with pytest.raises(InputError, match="spans"): cache.begin(2, 6, spans=wrong)


@pytest.mark.parametrize("windows", [(None, None), (6, 3)])
def test_a_value_inside_the_key(windows, monkeypatch):
    "Latent attention in every store: answers as without a cache, and no values are kept."
    tower = Tower(windows, heads=LATENT)
    lossless(monkeypatch)
    for new in (lambda: ContiguousCache(2, capacity=1), lambda: SlidingCache(windows, slack=1, rewind=2),
                lambda: QuantizedCache(2, group=4, residual=1)):
        assert worst_split(new, tower) < LIMIT
        for seed in range(2): assert fuzz(new, tower, seed) < LIMIT
        cache = new()
        tower(text(2, 11, 16), cache)
        assert all("k" in layer and not any(name.startswith("v") for name in layer) for layer in cache.store)
    assert worst_split(lambda: StaticCache(2, 2, 21), tower) < LIMIT


def test_a_value_inside_the_key_is_quantized_as_part_of_it():
    tower, x = Tower(heads=LATENT), text(2, 21, 16)
    whole, apart = tower(x, NoCache()), {}
    for bits in (8, 4):
        cache = QuantizedCache(2, bits, group=4, residual=2)
        parts = torch.cat([tower(x[:, :15], cache), tower(x[:, 15:], cache)], 1)
        apart[bits] = (parts - whole).abs().max().item()
        assert set(cache.store[0]) == {"k", "k_codes", "k_scale", "k_zero"}
    assert LIMIT < apart[8] < apart[4] < 1


# --- states -----------------------------------------------------------------------------------------------------------

def test_a_state_follows_its_row_and_cannot_go_back():
    tower, x, cache = Tower(sums=True), text(3, 9, 16), ContiguousCache(2)
    tower(x[:, :4], cache, counts=[4, 1, 3])
    cache.select([2, 0, 2])
    assert cache.states[2]["sum"].shape == (3, 1, 16) and as_list(cache.lengths) == [3, 4, 3]
    out = tower(x[[2, 0, 2], 4:6], cache)
    for b, (row, n) in enumerate(((2, 3), (0, 4), (2, 3))):
        alone = tower(torch.cat([x[row, :n], x[row, 4:6]])[None], NoCache())[0, n:]
        assert (out[b] - alone).abs().max() < LIMIT
    for length in (3, [5, 5, 5], 0):
        with pytest.raises(UnsupportedError, match="state"): cache.truncate(length)
    cache.truncate(cache.lengths)                                          # to where it stands: nothing to take back
    assert as_list(cache.lengths) == [5, 6, 5]
    with pytest.raises(InputError, match="3 rows and is given 2"): cache.begin(2, 1)
    assert cache.nbytes == sum(t.nbytes for layer in cache.store for t in layer.values()) + 3 * 16 * 8


def test_a_state_is_made_once_and_only_what_is_committed_stays():
    made, cache = [], ContiguousCache(1)
    def make(): made.append(1); return {"n": torch.zeros(2)}
    lost = cache.begin(2, 1)
    lost.state(0, make)["n"] = torch.ones(2)
    assert lost.state(0, make)["n"].tolist() == [1, 1] and len(made) == 1, "a step sees what it has put in"
    for want in ([1, 1], [2, 2]):
        step = cache.begin(2, 1)
        state = step.state(0, make)
        state["n"] = state["n"] + 1
        cache.commit(step)
        assert cache.states[0]["n"].tolist() == want
    assert len(made) == 2 and NoCache().begin(1, 1).state(0, make)["n"].tolist() == [0, 0]


# --- the rest of the old proofs ---------------------------------------------------------------------------------------

def test_ragged_row_is_the_row_alone_with_every_cache():
    lengths, windows = (23, 1, 9, 4), (5, None)
    tower = Tower(windows)
    prompts, new = [text(n, tower.C) for n in lengths], text(4, 15, tower.C)
    for cache in (ContiguousCache(2), SlidingCache(windows, slack=2), QuantizedCache(2, residual=40)):
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=7.0)
        first = tower(padded, cache, counts=torch.tensor(lengths))
        rest = torch.cat([tower(new[:, t:t + 1], cache) for t in range(15)], 1)
        for b, n in enumerate(lengths):
            alone = tower(torch.cat([prompts[b], new[b]])[None], NoCache())[0]
            gap = max((first[b, :n] - alone[:n]).abs().max(), (rest[b] - alone[n:]).abs().max())
            assert gap < LIMIT, (type(cache).__name__, b)
        assert cache.begin(4, 2).positions.tolist() == [[n + 15, n + 16] for n in lengths]


def feed(cache, k, v=None, ops=SHOW, windows=(None,)):
    "One step of the same keys in every layer; what the last layer answers."
    step = cache.begin(*k.shape[:2], k.device)
    for layer, window in enumerate(windows): out = step.attend(layer, k, k, k if v is None else v, ops, window=window)
    cache.commit(step)
    return out


def test_decoding_moves_no_data_and_reads_no_device_value():
    cache, seen = ContiguousCache(1, capacity=64), []
    for T in (10, *[1] * 54):
        k, _ = feed(cache, torch.zeros(1, T, 2, 8))
        seen.append((k.data_ptr(), k.shape[1]))
    assert len({p for p, _ in seen}) == 1 and seen[-1][1] == 64, "the keys handed to attention are a view of the store"
    sliding = SlidingCache([8], slack=50, capacity=99)
    for cache, window in ((ContiguousCache(1), None), (sliding, 8)):
        for T in (9, *[1] * 100):  # on "meta" a tensor has no values: reading one raises
            feed(cache, torch.empty(1, T, 2, 8, device="meta"), ops=REFERENCE, windows=[window])
        assert cache.lengths == 109
    assert sliding.store[0]["k"].shape[1] == 58


def test_sliding_memory_is_bounded_and_its_hints_are_checked():
    windows, T = [6, 6, None], 0
    cache = SlidingCache(windows, rewind=2, slack=4)
    for n in (40, 1, 1, 1, 9, 30, *[1] * 30):
        t = torch.zeros(2, n, 1, 4)
        feed(cache, t, ops=REFERENCE, windows=windows)
        T += n
        assert cache.store[0]["k"].shape[1] <= 6 + 2 + 4 and cache.store[2]["k"].shape[1] >= T
    for asked in (None, 7):
        with pytest.raises(InputError, match="keeps 6"):
            cache.begin(2, 1).attend(0, t, t, t, REFERENCE, window=asked)
    for bad in (0, -1):
        with pytest.raises(InputError, match="1 or more"): SlidingCache([bad])
    cache.truncate(T - 2)
    with pytest.raises(UnsupportedError, match="dropped keys"): cache.truncate(T - 20)
    assert cache.lengths == T - 2


def test_layers_may_differ():
    tower = Tower((None, None, None), heads=(Heads(4, 8, 8), Heads(1, 24, 16), Heads(2, 6, 10)))
    for new in (lambda: ContiguousCache(3), lambda: SlidingCache([None] * 3), lambda: QuantizedCache(3, residual=99)):
        assert worst_split(new, tower) < LIMIT


@pytest.mark.parametrize("counts", [[1], [1, 3], [-1, 0], [1, 1, 1], [], [1.5, 0], torch.tensor([1, 3])])
def test_wrong_counts(counts):
    for cache in (NoCache(), ContiguousCache(2)):
        with pytest.raises(InputError, match="counts"): cache.begin(2, 2, counts=counts)


def test_bad_input():
    cache, tower = ContiguousCache(2), Tower()
    tower(text(2, 3, 16), cache)
    with pytest.raises(InputError, match="another batch"): tower(text(1, 1, 16), cache)      # would broadcast silently
    t = torch.zeros(2, 1, 2, 8)
    with pytest.raises(InputError, match="float32"): cache.begin(2, 1).attend(0, t, t, t, REFERENCE)
    with pytest.raises(InputError, match="another model"):
        cache.begin(2, 1).attend(0, *3 * [text(2, 1, 3, 8)], REFERENCE)
    for length in (4, -1, [3, 4], [3], [-1, 0], [1.5, 2], torch.tensor([0, 4])):
        with pytest.raises(InputError, match="cannot truncate"): cache.truncate(length)
    for rows in ([], [2], [-1], [0.5], torch.tensor([True]), torch.tensor([True] * 3), torch.tensor([False] * 2)):
        with pytest.raises(InputError, match="cannot select"): cache.select(rows)
    assert cache.lengths == 3, "what is refused must change nothing"
    for wrong in (3, "fp4", "8", None):
        with pytest.raises(UnsupportedError, match="bits"): QuantizedCache(1, bits=wrong)
    with pytest.raises(InputError): QuantizedCache(1, keys="row")
    with pytest.raises(InputError): QuantizedCache(1, group=0)
    odd = torch.zeros(1, 1, 1, 7)
    with pytest.raises(UnsupportedError, match="odd"): feed(QuantizedCache(1, 4), odd)
    with pytest.raises(InputError, match="one per layer"): kv_bytes(3, 1, 8, 10, window=[4])


def test_the_promised_length_of_a_text_never_changes():
    told, untold, ragged = ContiguousCache(2), ContiguousCache(2), ContiguousCache(2)
    told.expect([20, 30])
    tower, x = Tower(), text(2, 9, 16)
    for part in x.split([4, 1, 4], 1):
        assert told.begin(2, 1).texts.tolist() == [[20], [30]]
        for cache in (told, untold): tower(part, cache)
    tower(x, ragged, counts=[9, 2])
    assert untold.begin(2, 5).texts == 4 and ragged.begin(2, 1).texts.tolist() == [[9], [2]]
    ragged.truncate([1, 2])
    ragged.select([1, 0, 0])
    assert ragged.begin(3, 1).texts.tolist() == [[2], [9], [9]]
    for wrong in (0, -3, [], [4, 0], [2.5]):
        with pytest.raises(InputError, match="1 or more tokens"): ContiguousCache(1).expect(wrong)
    with pytest.raises(InputError, match="before it begins"): untold.expect(40)
    cache = ContiguousCache(2)
    cache.expect([20, 30])
    with pytest.raises(InputError, match="2 rows and is given 3"): cache.begin(3, 1)
    none = NoCache()
    assert (none.begin(1, 7).texts, none.begin(1, 3).texts) == (7, 3), "every call without a past is a text of its own"


def test_truncate_and_select_keep_the_books():
    cache = ContiguousCache(2)
    Tower()(text(3, 6, 16), cache, counts=[6, 2, 4])
    cache.truncate(5); assert cache.lengths.tolist() == [5, 2, 4]
    cache.truncate(torch.tensor([5, 2, 0])); assert cache.lengths.tolist() == [5, 2, 0]
    cache.truncate(torch.tensor(5)); assert cache.lengths.tolist() == [5, 2, 0]
    cache.select(torch.tensor([True, False, True])); assert cache.lengths.tolist() == [5, 0]
    cache.select([0, 0]); assert cache.lengths == 5 and isinstance(cache.lengths, int)
    cache.truncate(0); assert cache.lengths == 0
    Tower()(text(4, 2, 16), cache); assert cache.lengths == 2, "an empty cache takes any batch"
    none = NoCache()
    none.truncate(0); none.select([1, 0]); none.commit(none.begin(1, 5))
    assert none.lengths == 0 and none.nbytes == 0 and none.begin(1, 2).positions.tolist() == [0, 1]


def test_row_lengths_are_ints_while_rows_agree():
    n = RowLengths()
    n.add(4); assert n.value == 4 and n.rows is None and n.per_row(3) == [4, 4, 4]
    n.add([1, 0]); assert n.value.tolist() == n.rows == [5, 4] and n.longest == 5
    n.add(2); assert n.value.tolist() == n.rows == [7, 6]
    n.add([0, 1]); assert n.value == 7 and n.rows is None
    n.set([1, 2])
    with pytest.raises(ValueError): n.add([1, 2, 3])


def test_bytes_by_formula_and_measured():
    assert kv_bytes(30, 3, 64, 1) == 23_040
    assert kv_bytes(32, 8, 128, 131_072) == 16 * 2 ** 30
    assert kv_bytes(1, 1, 576, 10, v_head_dim=512) == 10 * (576 + 512) * 2
    assert kv_bytes(2, 1, 8, 10, window=[4, None]) == 14 * 32 and kv_bytes(2, 1, 8, 10, window=4) == 8 * 32
    assert kv_bytes(2, 1, 8, 3, bits=4) == 2 * 3 * 8
    for dtype in (torch.float32, torch.bfloat16):
        cache = ContiguousCache(2, capacity=50)
        feed(cache, torch.zeros(3, 50, 2, 8, dtype=dtype), torch.zeros(3, 50, 2, 4, dtype=dtype), windows=[None] * 2)
        assert cache.nbytes == kv_bytes(2, 2, 8, 50, batch=3, bits=8 * dtype.itemsize, v_head_dim=4)
    for bits in (4, 8, "fp8"):
        cache = QuantizedCache(1, bits, group=16, residual=8, capacity=64)
        feed(cache, torch.zeros(2, 72, 3, 32, dtype=torch.bfloat16))
        packed = sum(kv_bytes(1, 3, 32, 64, 2, kv_bits(bits, share), v_head_dim=0) for share in (16, 32))
        assert cache.nbytes == packed + kv_bytes(1, 3, 32, 24, 2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [1, -1])
def test_quantize_stays_within_half_a_step(bits, dim):
    for offset, dtype in ((0, torch.float32), (20, torch.float32), (-300, torch.float32), (1, torch.bfloat16)):
        x = (torch.randn(3, 32, 2, 16) * 5 + offset).to(dtype)
        codes, scale, zero = quantize_kv(x, bits, dim)
        assert codes.dtype == torch.uint8 and codes.shape[-1] == 16 * bits // 8
        assert scale.shape[dim] == zero.shape[dim] == 1
        error = (dequantize_kv(codes, scale, zero, bits) - x.float()).abs()
        rounding = zero.float().abs() * 2 ** -11 + 2e-3        # zero is a float16: half a unit in its last place
        assert (error <= scale.float() * 0.55 + rounding).all()
    same = torch.full((1, 8, 1, 4), 3.0)
    assert torch.equal(dequantize_kv(*quantize_kv(same, bits, dim), bits), same)


def floats_are_floats(quantize=quantize_kv):
    "Codes are torch's own casts, no number is off by more than a sixteenth, and large ones do not become NaN."
    g = torch.Generator().manual_seed(0)
    for dim in (1, -1):
        for factor, dtype in ((1, torch.float32), (1e4, torch.float32), (1e-2, torch.float32), (3, torch.bfloat16)):
            x = (torch.randn(3, 32, 2, 16, generator=g).clamp(-6, 6) * factor).to(dtype)
            codes, scale, zero = quantize(x, "fp8", dim)
            assert codes.dtype == torch.float8_e4m3fn and codes.shape == x.shape and zero is None
            assert scale.dtype == torch.float16 and scale.shape[dim] == 1 and scale.numel() == x.numel() // x.shape[dim]
            back = dequantize_kv(codes, scale, zero, "fp8")
            smallest = torch.maximum(x.float().abs(), scale.float() * 2.0**-6)
            assert ((back - x.float()).abs() <= smallest * (1 / 16 + 1e-3)).all()      # NaN is not below anything
            assert codes.float().abs().amax(dim).min() >= 416, "the largest of a group is among the largest codes"
    assert dequantize_kv(*quantize(torch.zeros(1, 4, 1, 8), "fp8", 1), "fp8").eq(0).all()


def with_scale(change, cut=448.0):
    def quantize(x, bits, dim):
        scale = change(x.float(), dim).clamp_min(6e-8).half()
        return (x.float() / scale.float()).clamp(-cut, cut).to(torch.float8_e4m3fn), scale, None
    return quantize


WRONG_FLOATS = {
    "no scale": with_scale(lambda x, dim: torch.ones_like(x.amax(dim, keepdim=True))),
    "one scale for all": with_scale(lambda x, dim: x.abs().amax().expand(1, 1, 1, 1) / 448),
    "the largest, not its magnitude": with_scale(lambda x, dim: x.amax(dim, keepdim=True) / 448),
    "the range of e5m2": with_scale(lambda x, dim: x.abs().amax(dim, keepdim=True) / 57344),
    "the largest of another dimension": with_scale(lambda x, dim: x.abs().amax(2, keepdim=True) / 448),
    "cut at 240": with_scale(lambda x, dim: x.abs().amax(dim, keepdim=True) / 448, 240.0),
}

def test_floats(): floats_are_floats()


@pytest.mark.parametrize("name", WRONG_FLOATS)
def test_wrong_floats_are_rejected(name):
    with pytest.raises(AssertionError): floats_are_floats(WRONG_FLOATS[name])


@pytest.mark.parametrize("keys", ["token", "channel"])
def test_a_cache_of_floats(keys):
    "Ragged rows, rows chosen and texts taken back: what comes out is what was rounded, behind the exact tail."
    g = torch.Generator().manual_seed(2)
    k, v = torch.randn(2, 3, 29, 2, 8, generator=g)
    cache = QuantizedCache(1, "fp8", keys, group=4, residual=3)
    dim = 1 if keys == "channel" else -1
    def kept(x, dim, n):
        n = (n - 3) // 4 * 4
        past = dequantize_kv(*quantize_kv(x[:, :n].unflatten(1, (-1, 4)), "fp8", dim + (dim > 0)), "fp8")
        return torch.cat([past.flatten(1, 2), x[:, n:]], 1)
    feed(cache, k[:, :20], v[:, :20])
    step = cache.begin(3, 1)
    got_k, got_v, *_ = step.attend(0, k[:, 20:21], k[:, 20:21], v[:, 20:21], SHOW)
    assert torch.equal(got_k[:, :20], kept(k[:, :20], dim, 20)) and torch.equal(got_v[:, :20], kept(v[:, :20], -1, 20))
    cache.commit(step)
    cache.select([2, 0])
    got_k, *_ = cache.begin(2, 1).attend(0, k[:2, :1], k[:2, :1], v[:2, :1], SHOW)
    assert torch.equal(got_k[:, :20], kept(k[[2, 0], :20], dim, 20))
    cache.truncate(18)
    got_k, *_ = cache.begin(2, 1).attend(0, k[:2, :1], k[:2, :1], v[:2, :1], SHOW)
    assert torch.equal(got_k[:, :16], kept(k[[2, 0], :20], dim, 20)[:, :16])
    assert cache.store[0]["k_codes"].dtype == torch.float8_e4m3fn and "k_zero" not in cache.store[0]


def test_loud_channels_want_groups_along_tokens():
    q, k, v = torch.randn(1, 4, 2, 32), torch.randn(1, 128, 2, 32), torch.randn(1, 128, 2, 32)
    k[..., 3] += 20
    def error(keys):
        cache = QuantizedCache(1, 4, keys, residual=0)
        feed(cache, k, v)
        new = torch.zeros(1, 4, 2, 32)
        got = cache.begin(1, 4).attend(0, q, new, new, REFERENCE)
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
        step = ours.begin(2, b - a)
        for layer, window in enumerate((None, 8)):
            mine = step.attend(layer, k[:, a:b], k[:, a:b], v[:, a:b], SHOW, window=window)
            for t, m in zip(theirs[layer], mine): assert torch.equal(t, m.transpose(1, 2)), (layer, a, b)
        ours.commit(step)


def test_a_tiny_decoder_cannot_tell_its_caches_apart():
    from llm_workbench.architecture.decoder import Decoder
    from llm_workbench.architecture.layers import ModelConfig
    config = ModelConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6)
    decoder, tokens = Decoder(config).eval(), torch.randint(50, (2, 20))
    with torch.no_grad():
        for p in decoder.parameters(): p.copy_(torch.randn(p.shape) * (1 if p.ndim == 1 else 0.2))
        want = decoder(tokens)
        stores = {"contiguous": {}, "sliding": dict(slack=2), "quantized": dict(residual=32)}
        for store, options in stores.items():
            for split in range(1, 20):
                cache = decoder.new_cache(store, **options)
                got = torch.cat([decoder(tokens[:, :split], cache=cache), decoder(tokens[:, split:], cache=cache)], 1)
                assert (got - want).abs().max() < 1e-4, (store, split)
        padded, counts, cache = tokens.clone(), torch.tensor([11, 4]), SlidingCache([6, 6], slack=2)
        padded[1, 4:] = 0
        first, then = decoder(padded[:, :11], cache=cache, counts=counts), decoder(tokens[:, 11:14], cache=cache)
        for b, n in enumerate(counts.tolist()):
            alone = decoder(torch.cat([padded[b, :n], tokens[b, 11:14]])[None])[0]
            assert (torch.cat([first[b, :n], then[b]]) - alone).abs().max() < 1e-4


def test_every_cache_has_the_same_interface():
    for cls in (NoCache, ContiguousCache, SlidingCache, QuantizedCache, StaticCache):
        assert issubclass(cls, Cache)
        for name in ("begin", "commit", "attend", "expect", "truncate", "select"): assert callable(getattr(cls, name))
        for name in ("lengths", "nbytes"): assert isinstance(inspect.getattr_static(cls, name), property)
