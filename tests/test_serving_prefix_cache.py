"The prefix cache against an oracle that remembers all, under random traffic, and with mistakes that others made."
import random

import pytest
from scheduler_checks import Traffic

from llm_workbench.errors import InputError
from llm_workbench.serving.paged_kv import Pool
from llm_workbench.serving.prefix_cache import PrefixTables
from llm_workbench.serving.scheduler import Clock, Job, Scheduler


@pytest.mark.parametrize("windows", [(None,), (None, 8), (8,), (3,)], ids=str)
def test_fifty_thousand_operations(windows):
    traffic = Traffic(10 + len(windows), PrefixTables, windows=windows).run(12_500)
    tables, count = traffic.tables, traffic.count
    assert min(count["added"], count["aborted"], count["forked"], count["finished"], count["refused"]) > 1000, count
    assert 0.05 < tables.hits / tables.queries < 0.9 and traffic.scheduler.preemptions > 500


def written(tables, name, tokens, salt=None, steps=99):
    "Open a text and compute it, in steps of so many tokens: how much of it was found."
    found = tables.open(name, tokens, salt)
    while (held := tables.text(name).held) < len(tokens):
        n = min(steps, len(tokens) - held)
        assert tables.reserve(name, held + n)
        tables.advance(name, n)
    return found


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_finds_exactly_what_was_written(seed, cuts):
    """Random texts of two letters and two salts, open at the same time, forked and grown; pages never lack. If texts are
    cut and written on from there, too, less may be found, but never another beginning."""
    r, page = random.Random(seed), 4
    tables, known, content, living = PrefixTables(20_000, page), set(), {}, {}
    def learn(name, tokens, salt):
        for n in range(page, len(tokens) + 1, page):
            beginning = salt, tuple(tokens[:n])
            known.add(beginning)
            content[tables.text(name).pages[None][n // page - 1]] = beginning
    for name in range(200):
        tokens, salt = [r.randrange(2) for _ in range(r.randint(1, 40))], r.choice((None, "x"))
        want = 0
        while want + page < len(tokens) and (salt, tuple(tokens[:want + page])) in known: want += page
        found = written(tables, name, tokens, salt, r.choice((3, 8, 99)))
        assert found <= want if cuts else found == want
        for i, number in enumerate(tables.text(name).pages[None][:found // page]):
            assert content[number] == (salt, tuple(tokens[:(i + 1) * page])), "another beginning was found"
        learn(name, tokens, salt)
        living[name] = tokens, salt
        other = r.choice(list(living))
        tokens, salt = living[other]
        move = r.random()
        if move < 0.3:
            if cuts:
                del tokens[r.randint(1, len(tokens)):]
                tables.truncate(other, len(tokens))
            tokens += [r.randrange(2) for _ in range(r.randint(1, 9))]
            assert tables.reserve(other, len(tokens))
            tables.advance(other, len(tokens) - tables.text(other).held)
            learn(other, tokens, salt)
        elif move < 0.5:
            tables.fork(other, (other, name))
            tables.text((other, name)).tokens = list(tokens)
            living[other, name] = tables.text((other, name)).tokens, salt
        elif move < 0.8:
            tables.close(other)
            del living[other]
        if name % 10 == 0: tables.check()


def test_the_page_that_rests_longest_goes_first_and_ends_before_beginnings():
    tables = PrefixTables(6, 2)
    for name, token in (("a", 1), ("b", 2), ("c", 3)): written(tables, name, [token] * 4)
    for name in "bac": tables.close(name)
    left = lambda: {t: len(tables.find([t] * 5)) for t in (1, 2, 3)}
    assert left() == {1: 2, 2: 2, 3: 2}
    seen = []
    for i in range(6):
        tables.open(i); tables.reserve(i, 2); tables.advance(i, 2)
        seen.append(left())
    assert seen == [{1: 2, 2: 1, 3: 2}, {1: 2, 2: 0, 3: 2}, {1: 1, 2: 0, 3: 2}, {1: 0, 2: 0, 3: 2},
                    {1: 0, 2: 0, 3: 1}, {1: 0, 2: 0, 3: 0}]
    tables.check()


def test_a_found_page_rests_anew():
    tables = PrefixTables(4, 2)
    for name, token in (("a", 1), ("b", 2)): written(tables, name, [token] * 4); tables.close(name)
    assert written(tables, "a again", [1] * 5, steps=1) == 4       # the fifth token takes a page of b
    tables.close("a again")
    written(tables, "c", [3] * 2)
    assert len(tables.find([1] * 5)) == 2 and len(tables.find([2] * 5)) == 0


def test_two_texts_that_wrote_the_same_keep_their_own_pages():
    "What an insertion into a radix tree once freed under a living text (use after free)."
    tables = PrefixTables(8, 2)
    for name in "ab": tables.open(name, [5, 6, 7, 8])
    for name in "ab": tables.reserve(name, 4); tables.advance(name, 4)
    pages = {name: tables.text(name).pages[None] for name in "ab"}
    assert not set(pages["a"]) & set(pages["b"]) and len(tables.nodes) == 4
    tables.close("a")
    assert tables.free == 6 and pages["b"] == tables.text("b").pages[None]
    assert tables.open("c", [5, 6, 7, 8, 9]) == 4 and tables.text("c").pages[None] == pages["b"], "the held pages serve"
    tables.check()


def test_a_neighbour_that_shares_a_page_of_the_same_step_outlives_the_one_who_fills_it():
    tables = PrefixTables(20, 4)
    scheduler = Scheduler(tables, clock=Clock())
    first, second = (Job(name, [1] * 9, 20) for name in "ab")
    for job in (first, second): scheduler.add(job)
    pieces = scheduler.schedule()
    assert [n for _, n in pieces] == [9, 1]
    scheduler.remove(first)                                    # its user has left; the step is computed all the same
    shared = tables.text("a").pages[None][:2]
    assert tables.text("b").pages[None][:2] == shared and len(tables.texts) == 2
    for job, n in pieces: tables.advance(job.name, n)
    scheduler.computed(pieces)
    assert [*tables.texts] == ["b"] and second.computed == 9 and all(tables.pools[None].holders[p] == 1 for p in shared)
    scheduler.check()


def test_guesses_are_not_known_before_they_are_sure():
    tables, tokens = PrefixTables(8, 4), [1] * 6
    tables.open("a", tokens); tables.reserve("a", 8); tables.advance("a", 8)           # two guesses behind six tokens
    assert len(tables.find([1] * 9)) == 1
    tokens += [1, 1, 2]                                            # they were right
    tables.reserve("a", 9)
    assert len(tables.find([1] * 9)) == 2
    tables.check()


def test_a_page_is_forgotten_when_it_is_written_again():
    tables, tokens = PrefixTables(8, 4), [1, 2, 3, 4, 5, 6, 7, 8]
    written(tables, "a", tokens)
    tables.truncate("a", 6)
    assert len(tables.find([1, 2, 3, 4, 5, 6, 7, 8, 9])) == 2, "nothing was written yet"
    tokens[6:] = [9, 9]
    tables.reserve("a", 8)
    assert len(tables.find([1, 2, 3, 4, 5, 6, 7, 8, 9])) == 1
    tables.advance("a", 2)
    assert len(tables.find([1, 2, 3, 4, 5, 6, 9, 9, 9])) == 2
    tables.check()


def test_a_shared_page_is_not_forgotten_when_one_of_its_texts_is_cut():
    tables, tokens = PrefixTables(8, 4), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    written(tables, "a", list(tokens)); written(tables, "b", list(tokens))
    tables.truncate("b", 6); tables.text("b").tokens = tokens[:6] + [0, 0]
    tables.reserve("b", 8)
    assert len(tables.copies) == 1 and len(tables.find(tokens)) == 2
    tables.check()


def test_an_empty_cache_keeps_nothing():
    "Nodes of texts, salts and pages that are gone do not pile up."
    tables = PrefixTables(4, 2)
    for i in range(200): written(tables, i, [i] * 5, salt=str(i)); tables.close(i)
    assert len(tables.nodes) <= 4 and len(tables.root.children) <= 3
    size = lambda node: 1 + sum(map(size, node.children.values()))
    assert size(tables.root) <= 10


def altered(**methods):
    "Tables with other methods, each given the right one first."
    class Altered(PrefixTables): pass
    for name, make in methods.items(): setattr(Altered, name, make(getattr(PrefixTables, name)))
    return Altered


def leaves_nothing(find): return lambda self, tokens, salt=None: find(self, [*tokens, 0], salt)
def ignores_the_salt(open):
    return lambda self, name, tokens=(), salt=None, context=None: open(self, name, tokens, None, context)

def without_parents(child): return lambda self, node, key: child(self, node if node is self.root else top(node), key)
def top(node):
    while node.parent and node.parent.parent: node = node.parent
    return node
def looks_without_parents(find):
    def wrong(self, tokens, salt=None):
        start, found = self.root.children.get(salt), []
        for i in range((len(tokens) - 1) // self.page):
            node = start and start.children.get(self._key(tokens, i))
            if not node or not all(node.pages.get(w) for w in self.pools): break
            found.append(node)
        return found
    return wrong

def takes_anything(init):
    def wrong(self, *options):
        init(self, *options)
        for pool in self.pools.values(): pool.__class__ = Robber
    return wrong

class Robber(Pool):
    "Wrong: the page with the smallest number, whoever holds it."
    def take(self):
        page = min(range(len(self.holders)), key=lambda page: (self.holders[page] > 1, page))
        self.unused.pop(page, None)
        self.taken(page)
        self.holders[page] += 1
        return page

def never_forgets(forget): return lambda self, w, page: None
def keeps_promises(withdraw): return lambda self, name: None
def keeps_cut_pages(back): return lambda self, text, known: None
def keeps_nodes(prune): return lambda self, node: None
def counts_guesses(reserve):
    def wrong(self, name, n):
        text = self.text(name)
        tokens = text.tokens
        if tokens: text.tokens = [*tokens, *[0] * (n - len(tokens))]
        try: return reserve(self, name, n)
        finally: text.tokens = tokens
    return wrong
def does_not_hold(open):
    def wrong(self, name, *about):
        found = open(self, name, *about)
        for w, pages in self.text(name).pages.items():
            for page in pages:
                if page >= 0: self.pools[w].release(page)
        return found
    return wrong
def sees_less(seen): return lambda self, w, n: n if w else seen(self, w, n)
def releases_nothing(close):
    def wrong(self, name):
        self._withdraw(name); self._move(self.text(name), None, 0)
        del self.texts[name]
    return wrong


MUTANTS = [("find", leaves_nothing), ("open", ignores_the_salt), ("find", looks_without_parents),
           ("__init__", takes_anything),
           ("forget", never_forgets), ("_withdraw", keeps_promises), ("_prune", keeps_nodes), ("open", does_not_hold),
           ("_seen", sees_less), ("close", releases_nothing)]

@pytest.mark.parametrize("name, mutant", MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_traffic_notices_mistakes(name, mutant):
    wrong = altered(**{name: mutant})
    with pytest.raises((AssertionError, InputError)):
        for seed in range(3): Traffic(seed, wrong, windows=(None, 8)).run(1500)


def beginnings_first(close):
    def wrong(self, name):
        for pages in self.text(name).pages.values(): pages.reverse()
        close(self, name)
    return wrong


SEEN_BY = [(test_finds_exactly_what_was_written, "_child", without_parents, dict(seed=0, cuts=False)),
           (test_finds_exactly_what_was_written, "open", ignores_the_salt, dict(seed=0, cuts=False)),
           (test_finds_exactly_what_was_written, "_back", keeps_cut_pages, dict(seed=0, cuts=True)),
           (test_a_page_is_forgotten_when_it_is_written_again, "forget", never_forgets, {}),
           (test_guesses_are_not_known_before_they_are_sure, "reserve", counts_guesses, {}),
           (test_an_empty_cache_keeps_nothing, "_prune", keeps_nodes, {}),
           (test_the_page_that_rests_longest_goes_first_and_ends_before_beginnings, "close", beginnings_first, {})]

@pytest.mark.parametrize("test, name, mutant, options", SEEN_BY, ids=lambda x: getattr(x, "__name__", ""))
def test_each_of_these_notices_a_mistake(monkeypatch, test, name, mutant, options):
    monkeypatch.setitem(globals(), "PrefixTables", altered(**{name: mutant}))
    with pytest.raises((AssertionError, InputError)): test(**options)
