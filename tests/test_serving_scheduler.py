"The scheduler under random traffic: no page leaks, nobody stands still, nobody attends to a wrong key."
import pytest
from scheduler_checks import Traffic

from llm_workbench.errors import InputError, Overloaded
from llm_workbench.serving.paged_kv import Tables
from llm_workbench.serving.scheduler import Clock, Job, Scheduler, Visit, simulate


@pytest.mark.parametrize("windows", [(None,), (None, 8), (8,), (3,)], ids=str)
def test_fifty_thousand_operations(windows):
    traffic = Traffic(seed=len(windows), windows=windows).run(12_500)
    count = traffic.count
    assert min(count["added"], count["aborted"], count["forked"], count["finished"], count["refused"]) > 1000, count
    assert count["failed"] > 100 and count["in flight"] > 100 and traffic.scheduler.preemptions > 500, count


LIMITS = [dict(budget=6, most=6), dict(budget=64, chunk=64), dict(chunk=1), dict(most=1), dict(queue=1),
          dict(page=1, pages=70), dict(page=64, pages=2)]

@pytest.mark.parametrize("change", LIMITS, ids=str)
def test_other_limits(change): Traffic(seed=5, windows=(None, 6), **change).run(1000)


def altered(**methods):
    "A scheduler with other methods, each given the right one first."
    class Altered(Scheduler): pass
    for name, make in methods.items(): setattr(Altered, name, make(getattr(Scheduler, name)))
    return Altered


def keeps_its_position(admit):
    def wrong(self, job, left):
        right = self.tables.open
        self.tables.open = lambda *about: max(right(*about), min(job.charged, len(job.tokens) - 1))
        try: return admit(self, job, left)
        finally: del self.tables.open
    return wrong

def one_more(schedule):
    def wrong(self):
        self.budget += 1
        try: return schedule(self)
        finally: self.budget -= 1
    return wrong

def twice(schedule):
    def wrong(self):
        pieces = schedule(self)
        return pieces + pieces[:1]
    return wrong

def keeps_pages(remove):
    def wrong(self, job): (self.running if job in self.running else self.waiting).remove(job)
    return wrong

def at_once(remove):
    def wrong(self, job):
        flying, self._flying = self._flying, []
        try: remove(self, job)
        finally: self._flying = [other for other in flying if other is not job]
    return wrong

def admits_all_the_same(slots):
    def wrong(self, job, n, hungry):
        before = self.preemptions
        n = slots(self, job, n, hungry)
        self.preemptions = before
        return n
    return wrong

def robs_the_first(slots):
    def wrong(self, job, n, hungry):
        self.running.reverse()
        try: return slots(self, job, n, hungry)
        finally: self.running.reverse()
    return wrong

def forgets_the_failure(dropped):
    def wrong(self):
        for job in self._flying: job.computed = self.tables.text(job.name).held + 1
        self._flying, self._left = [], []
    return wrong

def whole_pieces(schedule):
    def wrong(self):
        chunk, self.chunk = self.chunk, self.budget
        try: return schedule(self)
        finally: self.chunk = chunk
    return wrong

def first_takes_all(slots):
    return lambda self, job, n, hungry: slots(self, job, min(job.sure, self.chunk, n + len(hungry)), hungry)


MUTANTS = [("_admit", keeps_its_position), ("schedule", one_more), ("schedule", twice), ("remove", keeps_pages),
           ("remove", at_once), ("_slots", admits_all_the_same), ("_slots", robs_the_first),
           ("dropped", forgets_the_failure), ("schedule", whole_pieces), ("_slots", first_takes_all)]

@pytest.mark.parametrize("name, mutant", MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_traffic_notices_mistakes(name, mutant):
    wrong = altered(**{name: mutant})
    with pytest.raises((AssertionError, InputError)):
        for seed in range(3): Traffic(seed, scheduler=wrong).run(1500)


@pytest.mark.parametrize("most", range(1, 9))
def test_every_size_comes_to_its_end(most):
    "Limits up to the last slot of the last page, prompts up to the limit, alone and in company; no step is empty."
    for pages, page, budget in ((1, 1, 8), (2, 2, 8), (3, 2, 9), (2, 4, 16)):
        for limit in range(1, pages * page + 1):
            for prompt in range(1, limit + 1):
                scheduler = Scheduler(Tables(pages, page), budget=budget, most=most, clock=Clock())
                visits = [Visit(0.0, [1] * prompt, [1] * max(1, limit - prompt), dict(limit=limit)) for _ in range(3)]
                log = simulate(scheduler, visits, lambda N: 1.0)
                assert all(pieces for *_, pieces in log) and scheduler.tables.free == pages
                assert all(len(visit.times) == len(visit.answer) for visit in visits)


def crowd(n, prompt, answer, start=0.0, every=0.0, **options):
    return [Visit(start + i * every, [0] * prompt, [0] * answer, options) for i in range(n)]


def played(visits, scheduler=Scheduler, pages=200, **options):
    "The same day for every scheduler: a step takes a second."
    options = dict(budget=16, most=4, queue=1000, clock=Clock()) | options
    simulate(scheduler(Tables(pages, 4), **options), visits, lambda N: 1.0)


def wait_behind_urgent_ones(scheduler=Scheduler):
    late = crowd(1, 8, 8, start=10.0, priority=2)
    played(crowd(200, 8, 8, every=1.0) + late, scheduler, patience=30)
    return late[0].first

def wait_of_a_large_one(scheduler=Scheduler):
    large = crowd(1, 60, 8, start=5.0)
    played(crowd(200, 8, 8, every=2.0) + large, scheduler, pages=20)
    return large[0].first

def share_of_the_modest(scheduler=Scheduler):
    "Of the tokens written in the first 400 steps, those of a tenant with short texts beside one with long texts."
    visits = crowd(300, 8, 8, tenant="modest") + crowd(60, 40, 40, tenant="greedy")
    played(visits, scheduler)
    early = [visit for visit in visits if visit.times[-1] < 400]
    size = lambda name: sum(len(v.prompt) + len(v.answer) for v in early if v.options["tenant"] == name)
    return size("modest") / max(1, size("greedy"))

def wait_beside_one_who_slept(scheduler=Scheduler):
    "A tenant that was away for long sends a hundred texts: the one who was here all the time is not shut out."
    here = crowd(150, 8, 8, every=4.0, tenant="here")
    played(here + crowd(100, 8, 8, start=400.0, tenant="slept") + crowd(1, 8, 8, tenant="slept"), scheduler)
    return max(visit.first for visit in here)


def never(promote): return lambda self: None
def promotes_the_newest(promote):
    def wrong(self):
        for job in self.waiting: job.arrived = -job.arrived
        if self.waiting: self._promoted = self.clock()
    return wrong

def lets_others_pass(order): return lambda self, job: (len(job.tokens), *order(self, job))
def free_of_charge(charge): return lambda self, job, n: None
def pauses_earn(enter):
    def wrong(self, job):
        new = job.tenant not in {other.tenant for other in self.waiting + self.running}
        before = dict(self.served)
        enter(self, job)
        if new: self.served[job.tenant] = before.get(job.tenant, 0)
    return wrong

FAIR = [(wait_behind_urgent_ones, 0, 60, "_promote", never),
        (wait_behind_urgent_ones, 0, 60, "_promote", promotes_the_newest),
        (wait_of_a_large_one, 0, 60, "_order", lets_others_pass),
        (share_of_the_modest, 0.7, 1.4, "_charge", free_of_charge),
        (wait_beside_one_who_slept, 0, 60, "_enter", pauses_earn)]

@pytest.mark.parametrize("measure, low, high, name, mutant", FAIR, ids=lambda x: getattr(x, "__name__", ""))
def test_nobody_starves(measure, low, high, name, mutant):
    assert low <= measure() <= high
    wrong = measure(altered(**{name: mutant}))
    assert not low <= wrong <= high, f"{mutant.__name__} was not noticed: {wrong}"


def test_a_full_queue_says_when_to_come_back():
    scheduler = Scheduler(Tables(100, 4), most=1, queue=1, clock=Clock())
    jobs = [Job(i, [0] * 8, 24) for i in range(3)]
    scheduler.add(jobs[0])
    for _ in range(4):                                             # a step takes half a second
        pieces = scheduler.schedule()
        scheduler.clock.now += 0.5
        for job, n in pieces: scheduler.tables.advance(job.name, n)
        scheduler.computed(pieces)
        jobs[0].tokens.append(0)
    scheduler.add(jobs[1])
    with pytest.raises(Overloaded) as refusal: scheduler.add(jobs[2])
    assert refusal.value.retry_after == pytest.approx(0.5 * (1 + 12))   # one token to compute, twelve to be written


def test_guesses_take_nobodys_page_and_no_place_beyond_the_limit():
    scheduler = Scheduler(Tables(4, 4), budget=16, most=2, clock=Clock())
    jobs = [Job("a", [0] * 4, 12), Job("b", [0] * 4, 12)]
    for job in jobs: scheduler.add(job)
    for guesses in ([], [1] * 7, [1] * 7, []):
        for job in jobs: job.tokens.append(0) if job.computed else None
        jobs[0].guesses = guesses
        pieces = dict(scheduler.schedule())
        for job, n in pieces.items(): scheduler.tables.advance(job.name, n)
        scheduler.tables.truncate("a", len(jobs[0].tokens))        # all guesses were wrong
        scheduler.computed([*pieces.items()])
        assert all(len(job.tokens) == job.computed for job in jobs) and scheduler.preemptions == 0
    jobs[0].tokens += [0] * 4; jobs[0].guesses = [1] * 9
    assert jobs[0].wanted == 12 - jobs[0].computed
