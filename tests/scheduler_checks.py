"""Random traffic for a scheduler and its tables, with pages that remember what was written into them.

Every slot keeps the whole beginning of the text that wrote it (as a number), so a text that would attend to a foreign,
stale or unwritten key is noticed in the step in which it happens.
"""
import random

from llm_workbench.errors import Overloaded
from llm_workbench.serving.paged_kv import Tables
from llm_workbench.serving.scheduler import Clock, Job, Scheduler


class Traffic:
    "Texts that come, are written, guessed, forked, aborted and preempted, in steps that sometimes fail."
    def __init__(self, seed=0, tables=Tables, scheduler=Scheduler, pages=24, page=4, windows=(None,), rewind=4,
                 budget=16, most=6, queue=6, chunk=9, letters=3):
        self.random, self.clock, self.letters = random.Random(seed), Clock(), letters
        self.tables = tables(pages, page, windows, rewind)
        self.scheduler = scheduler(self.tables, budget=budget, most=most, queue=queue, chunk=chunk, patience=20,
                                   clock=self.clock)
        self.budget, self.most, self.chunk = budget, most, chunk
        self.content = {(w, p): [None] * page for w, pool in self.tables.pools.items() for p in range(len(pool.holders))}
        self.count = dict.fromkeys(("added", "refused", "steps", "failed", "aborted", "forked", "finished", "hits",
                                    "in flight", "guesses kept"), 0)
        self.beginnings = [self.some(self.random.randint(1, 14)) for _ in range(3)]
        self.names = 0

    def some(self, n): return [self.random.randrange(self.letters) for _ in range(n)]

    @property
    def jobs(self): return self.scheduler.running + self.scheduler.waiting

    def new(self, tokens, salt, room):
        r, self.names = self.random, self.names + 1
        return Job(self.names, tokens, len(tokens) + room, r.randint(0, 2), r.choice("abc"), salt)

    def add(self):
        r = self.random
        tokens = (r.choice(self.beginnings) if r.random() < 0.7 else []) + self.some(r.randint(1, 20))
        job = self.new(tokens, r.choice((None, "x")), r.randint(0, 40))
        waiting = len(self.scheduler.waiting)
        try: self.scheduler.add(job)
        except Overloaded as e:
            assert waiting >= self.scheduler.queue and e.retry_after >= 0
            self.count["refused"] += 1
        else: self.count["added"] += 1

    def abort(self):
        if self.jobs:
            self.scheduler.remove(self.random.choice(self.jobs))
            self.count["aborted"] += 1

    def fork(self):
        if not self.scheduler.running: return
        job = self.random.choice(self.scheduler.running)
        if not self.tables.fits(job.limit, self.chunk): return
        new = self.new(list(job.tokens), job.salt, 0)
        new.limit = job.limit
        self.scheduler.fork(job, new)
        self.count["forked"] += 1

    def step(self):
        r, s = self.random, self.scheduler
        before, running = s.preemptions, list(s.running)
        pieces = s.schedule()
        self.inspect(pieces, running, s.preemptions > before)
        s.check()
        if r.random() < 0.05 and pieces:                                    # leaves while it is being computed
            s.remove(r.choice(pieces)[0])
            self.count["in flight"] += 1
            s.check()
        self.clock.now += 1
        self.count["steps"] += 1
        if r.random() < 0.03:
            self.tables.copies.clear()
            s.dropped()
            self.count["failed"] += 1
        else: self.compute(pieces)

    def inspect(self, pieces, running, pressed):
        s = self.scheduler
        got = {job: n for job, n in pieces}
        assert len(got) == len(pieces), "a text was scheduled twice"
        assert sum(got.values()) <= self.budget, f"{sum(got.values())} tokens in a step of {self.budget}"
        assert all(1 <= n <= min(job.wanted, self.chunk) for job, n in pieces), "a piece is empty, or more than wanted"
        assert all(job in s.running for job in got), "a text that does not run was scheduled"
        assert len(s.running) <= self.most
        if running and running[0].wanted: assert running[0] in got, "the oldest of the running does not progress"
        still = [job for job in running if job in s.running and job.wanted]
        assert all(job in got for job in still if len(job.tokens) > job.computed), "a running text got no token"
        if pressed: assert all(job in running for job in got), "somebody was admitted although pages lacked"
        if s.waiting and not pieces: assert pressed, "texts wait, but nothing is done"

    def beginning(self, job, n):
        "What the slots of its first n tokens must hold."
        chain, last = [], job.salt
        for token in (job.tokens + job.guesses)[:n]: chain.append(last := hash((last, token)))
        return chain

    def compute(self, pieces):
        "One step of a model: copies, all keys, then every text looks at what it sees."
        tables, S = self.tables, self.tables.page
        for w, old, new in tables.copies: self.content[w, new] = list(self.content[w, old])
        tables.copies.clear()
        chains = {job: self.beginning(job, job.computed + n) for job, n in pieces}
        for job, n in pieces:
            for w, pages in tables.text(job.name).pages.items():
                for i in range(job.computed, job.computed + n): self.content[w, pages[i // S]][i % S] = chains[job][i]
        for job, n in pieces:
            for w, pages in tables.text(job.name).pages.items():
                for i in range(tables.first_seen(w, job.computed), job.computed + n):
                    assert pages[i // S] >= 0 and self.content[w, pages[i // S]][i % S] == chains[job][i], (
                        f"text {job.name} would attend to a wrong key at token {i}")
            tables.advance(job.name, n)
        done = [job for job, n in pieces if job in self.scheduler.running and self.write(job, job.computed + n)]
        self.scheduler.computed(pieces)
        for job in done: self.scheduler.remove(job)
        self.count["finished"] += len(done)

    def write(self, job, computed):
        "Append what the step yields: the guesses that are right, and one more token. Is the text at its end?"
        r, guessed = self.random, computed - len(job.tokens)
        if guessed < 0: return False                                        # the prompt is not read to its end
        kept = r.randint(0, guessed)
        self.count["guesses kept"] += kept
        self.tables.truncate(job.name, computed - (guessed - kept))
        if len(job.tokens) + kept >= job.limit: return True
        job.tokens += job.guesses[:kept] + self.some(1)
        job.guesses = self.some(r.randint(0, 4)) if r.random() < 0.5 else []
        return r.random() < 0.03

    def run(self, operations):
        "So many random operations, each checked, and an end at which every page is free."
        moves = [self.add] * 3 + [self.abort, self.fork] + [self.step] * 5
        for _ in range(operations):
            self.random.choice(moves)()
            self.scheduler.check()
        for _ in range(100_000):
            if not self.jobs: break
            self.step()
            self.scheduler.check()
        assert not self.jobs, "texts are left that never finish"
        for w, pool in self.tables.pools.items():
            assert pool.free == len(pool.holders), f"{len(pool.holders) - pool.free} pages of window {w} leaked"
        return self
