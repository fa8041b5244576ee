"""Pages: a text in them gets what it would get alone, whatever its neighbours do, and no page is lost or held twice."""
import random

import pytest
import torch
from checks import worst
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.serving.paged_kv import PagedCache, Tables, page_bytes, paged_cache

CASES = [(family, i) for family, variants in SMALL.items() for i in range(len(variants))]
KINDS = [(None,), (None, 5), (1,), (3, None, 9)]


class Life:
    """Texts that come, write, fork, go back and go, and a memory of (window, page, slot) -> token beside the tables, in
    which every text must find what it wrote."""
    def __init__(self, tables, seed, names=6):
        self.tables, self.rng, self.names = tables, random.Random(seed), names
        self.memory, self.tokens, self.highest, self.new = {}, {}, {}, 0

    def write(self, name, n):
        tables, S, held = self.tables, self.tables.page, len(self.tokens[name])
        before = {other: (text.reserved, str(text.pages)) for other, text in tables.texts.items()}
        if not tables.reserve(name, held + n):
            assert before == {other: (text.reserved, str(text.pages)) for other, text in tables.texts.items()}
            return tables.close(name), self.tokens.pop(name)
        for w, old, new in tables.copies:
            for slot in range(S): self.memory[w, new, slot] = self.memory.get((w, old, slot))
        tables.copies.clear()
        n = self.rng.randint(0, n)                                    # a step may fail, or write less than was reserved
        for t in range(held, held + n):
            self.tokens[name].append(self.new)
            for w, pages in tables.texts[name].pages.items(): self.memory[w, pages[t // S], t % S] = self.new
            self.new += 1
        tables.advance(name, n)
        self.highest[name] = max(self.highest[name], held + n)

    def truncate(self, name, n):
        try: self.tables.truncate(name, n)
        except UnsupportedError: assert self.highest[name] - n > self.tables.rewind, "rewind was promised"
        else: self.tokens[name] = self.tokens[name][:n]

    def operation(self):
        rng, tables = self.rng, self.tables
        free = [name for name in range(self.names) if name not in self.tokens]
        name = rng.choice(list(self.tokens)) if self.tokens else None
        what = rng.choice(["open", "fork", "close", "truncate"] + ["write"] * 5) if self.tokens else "open"
        if what in ("open", "fork") and free:
            if what == "open": tables.open(free[0])
            else: tables.fork(name, free[0])
            self.tokens[free[0]] = list(self.tokens[name]) if what == "fork" else []
            self.highest[free[0]] = self.highest[name] if what == "fork" else 0
        if what == "close": tables.close(name), self.tokens.pop(name)
        if what == "truncate": self.truncate(name, max(0, len(self.tokens[name]) - rng.choice([0, 1, 2, 20])))
        if what == "write": self.write(name, rng.choice([1, 1, 1, 2, 7]))
        tables.check()
        if self.tokens: self.read(rng.choice(list(self.tokens)))

    def read(self, name):
        "A text finds its tokens, as far back as a layer looks, and holds no page for longer than it has to."
        tables, S, tokens = self.tables, self.tables.page, self.tokens[name]
        assert tables.texts[name].held == len(tokens), f"{name} holds {tables.texts[name].held}, wrote {len(tokens)}"
        for w, pages in tables.texts[name].pages.items():
            first = max(0, len(tokens) - (w - 1)) if w else 0
            for t in range(first, len(tokens)):
                assert self.memory[w, pages[t // S], t % S] == tokens[t], f"{name} reads another token at {t}"
            behind = max(0, first - tables.rewind) // S
            assert all(page == -1 for page in pages[:behind]), f"{name} keeps pages behind its window {w}"

    def run(self, operations):
        for _ in range(operations): self.operation()
        for name in list(self.tokens): self.tables.close(name)
        self.tables.check()
        assert all(pool.free == len(pool.holders) for pool in self.tables.pools.values()), "pages have leaked"


@pytest.mark.parametrize("seed", range(8))
def test_a_hundred_thousand_operations(seed):
    rng = random.Random(seed)
    windows, page, rewind = KINDS[seed % 4], rng.choice([1, 2, 4, 5]), rng.choice([0, 2, 7])
    Life(Tables(rng.choice([12, 25]), page, windows, rewind), seed).run(12_500)


class Twice(Tables):
    "A page is released twice."
    def close(self, name):
        for w, pages in self.text(name).pages.items():
            if pages and pages[-1] >= 0: self.pools[w].release(pages[-1])
        super().close(name)


class NoCopy(Tables):
    "A shared page is written by both."
    def _shared(self, w, pages, i): return False


class CopiesElsewhere(Tables):
    "The copy is noted the wrong way round."
    def reserve(self, name, n):
        before = len(self.copies)
        ok = super().reserve(name, n)
        self.copies[before:] = [(w, new, old) for w, old, new in self.copies[before:]]
        return ok


class Early(Tables):
    "A window lets go one page too early."
    def advance(self, name, n):
        super().advance(name, n)
        for w, pages in self.texts[name].pages.items():
            i = (self.texts[name].held - (w or 0)) // self.page
            if w and 0 <= i < len(pages) - 1 and pages[i] >= 0:
                self.pools[w].release(pages[i])
                pages[i] = -1


class Late(Tables):
    "A window lets nothing go."
    def advance(self, name, n): self.text(name).held += n


class StillHeld(Tables):
    "What was held is not reset."
    def truncate(self, name, n):
        held = self.text(name).held
        super().truncate(name, n)
        self.texts[name].held = self.texts[name].reserved = min(held, -(-n // self.page) * self.page)


class StillReserved(Tables):
    "A fork believes that the last page is its own."
    def fork(self, name, new):
        super().fork(name, new)
        for text in (self.texts[name], self.texts[new]): text.reserved = -(-text.held // self.page) * self.page


class Partly(Tables):
    "A text that finds too few pages keeps those that it found."
    def reserve(self, name, n):
        if enough := super().reserve(name, n): return enough
        super().reserve(name, self.text(name).reserved + 1)
        return False


class Keeps(Tables):
    "A closed text keeps its last page."
    def close(self, name):
        for pages in self.text(name).pages.values(): del pages[-1:]
        super().close(name)


@pytest.mark.parametrize("wrong",
                         [Twice, NoCopy, CopiesElsewhere, Early, Late, StillHeld, StillReserved, Partly, Keeps])
def test_wrong_tables_are_rejected(wrong):
    "By whatever comes first: the account of pages, what a text reads, or a length."
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(4): Life(wrong(12, 4, (None, 5)), seed).run(1_000)


def some(generator, n): return torch.randint(0, 97, (n,), generator=generator)


@torch.inference_mode()
def worst_life(decoder, cache, seed, steps=14, names=5):
    "Texts written in random pieces, with forks and steps back, in a cache that others have used: against each alone."
    rng, generator, texts, gaps = random.Random(seed), torch.Generator().manual_seed(seed), {}, []

    def done(name):
        tokens, outs = texts.pop(name)
        got = torch.cat(outs) if outs else torch.zeros(0)
        if len(got): gaps.append(worst(got, decoder(tokens[None])[0, :len(got)]))
        cache.close(name)

    for _ in range(steps):
        free = [name for name in range(names) if name not in texts]
        for name in free[:rng.randint(1, 2)]:
            other = rng.choice(list(texts)) if texts else None
            if other is not None and rng.random() < 0.6:              # the same beginning, another end of equal length
                tokens, outs = texts[other]
                at = sum(map(len, outs))
                cache.fork(other, name)
                texts[name] = torch.cat([tokens[:at], some(generator, len(tokens) - at)]), list(outs)
            else:
                texts[name] = some(generator, rng.randint(4, 20)), []
                cache.open(name, context=len(texts[name][0]))
        at = {name: sum(map(len, outs)) for name, (_, outs) in texts.items()}
        ready = [name for name, (tokens, _) in texts.items() if at[name] < len(tokens)]
        if ready:
            chosen = rng.sample(ready, rng.randint(1, len(ready)))
            pieces = [(name, min(rng.choice([1, 1, 1, 4, 9]), len(texts[name][0]) - at[name])) for name in chosen]
            row = torch.cat([texts[name][0][at[name]:at[name] + n] for name, n in pieces])[None]        # (1, N)
            for (name, _), out in zip(pieces, decoder(row, cache, pieces=pieces)[0].split([n for _, n in pieces])):
                texts[name][1].append(out)
        cache.tables.check()
        for name in list(texts):
            tokens, outs = texts[name]
            n = sum(map(len, outs))
            if n and rng.random() < 0.2:                              # one token back, and another one in its place
                try: cache.truncate(name, n - 1)
                except UnsupportedError: continue
                texts[name] = torch.cat([tokens[:n - 1], some(generator, len(tokens) - n + 1)]), [torch.cat(outs)[:-1]]
            elif n == len(tokens) or rng.random() < 0.1: done(name)
    for name in list(texts): done(name)
    return max(gaps)


@pytest.mark.parametrize("family,variant", CASES)
def test_every_family(family, variant, request):
    "In float64, since a router may flip on a tie."
    decoder = Decoder.from_transformers(small_model(family, variant)).double()
    cache, first = paged_cache(decoder, pages=60, page=3, rewind=2), CASES.index((family, variant))
    lives = 100 if request.config.getoption("--all-schedules", default=False) else 1
    gap = max(worst_life(decoder, cache, seed) for seed in range(first, first + lives))
    assert gap <= 1e-5, f"a text in pages differs from the text alone by {gap:.1e}"
    assert cache.nbytes == 60 * sum(page_bytes(decoder.config, 3, torch.float64).values())
    assert cache.lengths == {} and cache.tables.free == 60


class Behind(PagedCache):
    "Every key one slot behind its place."
    def _write(self, layer, slots, k, v): super()._write(layer, (slots + 1) % (60 * 3), k, v)


class NextTable(PagedCache):
    "Each text reads its neighbour's table."
    def begin(self, *args, **where):
        step, places = super().begin(*args, **where), {}
        def neighbours(w):
            if w not in places:
                places[w] = type(step).places(step, w)
                places[w].groups = [(table.roll(1, 0), inside) for table, inside in places[w].groups]
            return places[w]
        step.places = neighbours
        return step


class OneContext(PagedCache):
    "The length that the first text will have chooses the angles of all."
    def open(self, name, tokens=(), salt=None, context=None):
        self.first = getattr(self, "first", context)
        return super().open(name, tokens, salt, self.first)


class StaleCopies(PagedCache):
    "Copies are left for later."
    def _copy_pages(self): pass


@pytest.mark.parametrize("wrong,family,variant",
                         [(Behind, "llama", 0), (NextTable, "mistral", 0), (StaleCopies, "llama", 0),
                          (OneContext, "phi3", 1), (OneContext, "llama", 2)])
def test_wrong_caches_are_rejected(wrong, family, variant):
    decoder = Decoder.from_transformers(small_model(family, variant)).double()
    tables = paged_cache(decoder, pages=60, page=3, rewind=2).tables
    cache = wrong([decoder.config.window(i) for i in range(len(decoder.layers))], tables)
    assert max(worst_life(decoder, cache, seed) for seed in range(3)) > 1e-2, "texts that mix were not noticed"


@torch.inference_mode()
def same_step(cache, decoder):
    "A text that shares a page which another text fills in the very same step, later in the row."
    tokens = some(torch.Generator().manual_seed(0), 10)
    tables = cache.tables
    tables.open("a"), tables.reserve("a", 4), tables.open("b")
    for w, pages in tables.texts["a"].pages.items():
        tables.pools[w].hold(pages[0])
        tables.texts["b"].pages[w].append(pages[0])
    tables.texts["b"].held = tables.texts["b"].reserved = 4
    row = torch.cat([tokens[4:], tokens[:4]])[None]
    got = decoder(row, cache, pieces=[("b", 6), ("a", 4)])[0]
    tables.check()
    return worst(torch.cat([got[6:], got[:6]]), decoder(tokens[None])[0])


class OneByOne(PagedCache):
    "Keys are written when their text attends."
    def attend(self, step, layer, q, k, v, ops, **options):
        places, outs = step.places(self.windows[layer]), []
        whole, at = places.slots, 0
        for (name, n), group in zip(step.pieces, places.groups):
            part = slice(at, at + n)
            self._write(layer, whole[part], k[:, part], v[:, part])
            outs.append(ops.paged_attention(q[:, part], self.store[layer]["k"], self.store[layer]["v"], *group,
                                            **{o: options[o] for o in ("window", "softcap", "sinks", "scale")}))
            at += n
        return torch.cat(outs, 1)


def test_keys_of_a_step_are_written_before_anybody_reads(monkeypatch):
    # new pages hold what was in that memory before, perhaps the very keys of the first cache
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    decoder = Decoder.from_transformers(small_model("llama"))
    assert same_step(PagedCache([None] * 3, Tables(5, 4)), decoder) <= 1e-3
    assert same_step(OneByOne([None] * 3, Tables(5, 4)), decoder) > 1e-2


@torch.inference_mode()
def test_spans_see_each_other_in_both_directions():
    decoder = Decoder.from_transformers(small_model("gemma3_text")).double()
    tokens = some(torch.Generator().manual_seed(1), 12)[None]
    spans = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, 2, 2, 2, -1]])
    cache = paged_cache(decoder, pages=9, page=4)
    got = decoder(tokens, cache, pieces=[("a", 7), ("b", 5)], spans=spans)[0]
    alone = [decoder(tokens[:, part], spans=spans[:, part])[0] for part in (slice(0, 7), slice(7, 12))]
    assert worst(got, torch.cat(alone)) <= 1e-5 < worst(got, decoder(tokens, pieces=[7, 5])[0])


@pytest.mark.parametrize("family,dtype", [("llama", torch.bfloat16), ("llama", "int8"), ("mistral", "fp8"),
                                          ("deepseek_v2", "int8"), ("gemma2", "fp8")])
@torch.inference_mode()
def test_narrow_pages_are_close_and_as_small_as_promised(family, dtype):
    decoder = Decoder.from_transformers(small_model(family))
    cache, exact = (paged_cache(decoder, pages=20, page=4, dtype=kept) for kept in (dtype, None))
    row, pieces = some(torch.Generator().manual_seed(2), 16)[None], [("a", 5), ("b", 11)]
    gap = decoder(row, cache, pieces=pieces) - (want := decoder(row, exact, pieces=pieces))
    assert 0 < gap.norm() < 0.2 * want.norm()
    assert cache.nbytes == 20 * sum(page_bytes(decoder.config, 4, dtype).values()) < 0.55 * exact.nbytes
    for name in "ab": cache.fork(name, name * 2)
    one = torch.tensor([[3, 3, 5, 5]])                                # a copy of codes and scales reads as its original
    logits = decoder(one, cache, pieces=[("a", 1), ("aa", 1), ("b", 1), ("bb", 1)])[0]
    assert worst(logits[0], logits[1]) <= 1e-4 and worst(logits[2], logits[3]) <= 1e-4


def test_torch_ops_read_pages_as_the_reference_does():
    decoder = Decoder.from_transformers(small_model("mistral")).double().with_ops(TORCH)
    assert max(worst_life(decoder, paged_cache(decoder, pages=60, page=3), seed) for seed in range(3)) <= 1e-5


def test_memory_becomes_pages():
    decoder = Decoder.from_transformers(small_model("gemma3_text"))   # windows of 5 in most layers
    sizes = page_bytes(decoder.config, 4, torch.float32)
    same, by_need = (paged_cache(decoder, memory=10**6, page=4, context=n) for n in (None, 90))
    pages = lambda cache: {w: len(pool.holders) for w, pool in cache.tables.pools.items()}
    for cache in (same, by_need):
        used = sum(n * sizes[w] for w, n in pages(cache).items())
        assert 10**6 - sum(sizes.values()) < used <= 10**6
    assert len(set(pages(same).values())) == 1 and pages(by_need)[None] > 2 * pages(same)[None]
    assert pages(by_need)[5] == pytest.approx(pages(by_need)[None] / 10, abs=1)


@pytest.mark.parametrize("wrong", [dict(pages=0), dict(pages=4, page=0), dict(pages=4, windows=()),
                                   dict(pages=4, rewind=-1), dict(pages=4, windows=(0,)), dict(pages=2.5),
                                   dict(pages={None: 4}, windows=(None, 5))])
def test_tables_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError, match="1 or more|pages"): Tables(**wrong)


@pytest.mark.cuda
def test_on_a_gpu():
    decoder = Decoder.from_transformers(small_model("gemma2")).double()
    there = Decoder.from_transformers(small_model("gemma2")).double().cuda()
    row, pieces = some(torch.Generator().manual_seed(3), 16)[None], [("a", 5), ("b", 11)]
    with torch.inference_mode():
        want = decoder(row, paged_cache(decoder, pages=20, page=4), pieces=pieces)
        got = there(row.cuda(), paged_cache(there, pages=20, page=4), pieces=pieces)
    assert worst(got.cpu(), want) <= 1e-5
