"""The search for settings: planted mistakes in the interval, the parabola and the halving; a trial that breaks down."""
import math
import random

import pytest
import torch

from llm_workbench.errors import InputError
from llm_workbench.finetuning import hyperparameters as module
from llm_workbench.finetuning.data import batch_at, padded
from llm_workbench.finetuning.hyperparameters import (
    Trial, halving, lowest, sorter, sorting, steps_of, student, t_interval, t_quantile)
from llm_workbench.finetuning.sft import Training, train


def check_quantile(quantile):
    "Freedom 1 and 2 have formulas; 30 is printed in every table; symmetric around a half."
    for p in (0.025, 0.3, 0.9, 0.995):
        assert quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-4)
        assert quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-4)
        assert quantile(p, 7) == pytest.approx(-quantile(1 - p, 7), rel=1e-4)
    assert quantile(0.975, 30) == pytest.approx(2.04227, rel=1e-4)


def test_student_quantiles(): check_quantile(t_quantile)


@pytest.mark.parametrize("mistake", [lambda p, n: t_quantile(p, n + 1), lambda p, n: t_quantile(2 * p - 1, n),
                                     lambda p, n: 1.96])
def test_wrong_quantiles_are_rejected(mistake):
    with pytest.raises((AssertionError, ValueError, IndexError)): check_quantile(mistake)


def check_interval(interval):
    mean, low, high = interval([1.0, 2.0, 4.0, 5.0])
    assert mean == 3 and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(3.18245 * math.sqrt(10 / 3) / 2, rel=1e-4)    # t of 3, sd with n - 1
    assert interval([2.0, 2.0]) == (2, 2, 2)


def test_an_interval_by_hand(): check_interval(t_interval)


def test_an_interval_of_the_numbers_themselves_is_rejected():
    def too_wide(values):
        mean, low, high = t_interval(values)
        return mean, mean - (mean - low) * len(values)**0.5, mean + (high - mean) * len(values)**0.5
    with pytest.raises(AssertionError): check_interval(too_wide)


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_the_lowest_point_moves_with_the_unit_and_stays_between_the_neighbours(unit):
    draw = random.Random(0)
    for _ in range(50):
        rates = sorted(unit * 10 ** draw.uniform(-4, 0) for _ in range(6))
        losses = [draw.uniform(0.1, 2) for _ in rates]
        i, found = losses.index(min(losses)), lowest(rates, losses)
        assert rates[max(i - 1, 0)] <= found <= rates[min(i + 1, 5)]
        assert lowest([7 * r for r in rates], losses) == pytest.approx(7 * found)


def curves(n, seed, crossing=False):
    "Losses that fall with the steps; with `crossing`, the best in the end begins as the worst."
    draw = random.Random(seed)
    ends = [draw.uniform(0.1, 1) for _ in range(n)]
    order = sorted(range(n), key=ends.__getitem__)
    delay = {i: 10.0 if crossing and i == order[0] else 1.0 for i in range(n)}
    return {i: (lambda steps, i=i: ends[i] + delay[i] / steps) for i in range(n)}, order[0]


def check_halving(search):
    for n, seed in ((1, 0), (2, 0), (9, 1), (20, 2)):
        asked, (trials, best) = [], curves(n, seed)
        def watched(name): return lambda steps: asked.append((name, steps)) or trials[name](steps)
        who, rounds = search({name: watched(name) for name in trials}, [2, 6, 18])
        assert who == best
        assert len(rounds) == 3 and [len(r) for r in rounds] == [n, -(-n // 3), -(-(-(-n // 3)) // 3)]
        assert len(set(asked)) == len(asked) == sum(map(len, rounds)), "each is asked once at each rung"
    losses = {"nan": math.nan, "inf": math.inf, "good": 3.0, "bad": 4.0}
    who, rounds = search({name: (lambda s, v=v: v) for name, v in losses.items()}, [1, 2], 1 / 2)
    assert who == "good" and set(rounds[1]) == {"good", "bad"}


def test_halving_keeps_the_best_and_asks_no_one_twice(): check_halving(halving)


def keeps_the_worst(trials, rungs, keep=1 / 3):
    return halving({k: (lambda s, f=f: -f(s)) for k, f in trials.items()}, rungs, keep)


def trusts_nan(trials, rungs, keep=1 / 3):
    left, rounds = list(trials), []
    for rung in rungs:
        rounds.append({name: trials[name](rung) for name in left})
        left = sorted(left, key=rounds[-1].get)[:math.ceil(len(left) * keep)]
    return left[0], rounds


@pytest.mark.parametrize("mistake", [keeps_the_worst, trusts_nan])
def test_wrong_halvings_are_rejected(mistake):
    with pytest.raises(AssertionError): check_halving(mistake)


def test_halving_loses_whoever_begins_slowly():
    "What it cannot do, so that nobody expects it."
    trials, best = curves(9, 3, crossing=True)
    assert halving(trials, [3, 9, 27])[0] != best


def test_steps_count_only_what_was_added():
    assert steps_of([dict.fromkeys(range(9)), dict.fromkeys(range(3)), {0: 1}], [9, 27, 81]) == 81 + 54 + 54


@pytest.fixture(scope="module")
def base(): return sorter(0, 10)


def make(base, lr=1e-3, steps=12, way="lora"):
    lessons, exam = sorting("train", 64, 0, down=True), [padded(sorting("validation", 16, 0, down=True))]
    def rows_of(step): return padded(batch_at(lessons, 8, 0, step))
    return Trial(student(base, way, 2), rows_of, Training(steps, lr=lr, warmup=0.1), exam)


@pytest.mark.parametrize("way", ["lora", "rslora", "full"])
def test_a_trial_in_parts_is_the_training_in_one_go_and_leaves_the_base_alone(base, way):
    kept = {name: p.clone() for name, p in base.named_parameters()}
    parts, whole = make(base, way=way), make(base, way=way)
    torch.manual_seed(5)
    for step in (0, 1, 5, 5, 12): parts.to(step)
    drawn = torch.rand(3)
    train(whole.decoder, whole.rows_of, whole.settings)
    for a, b in zip(parts.params.values(), whole.params.values(), strict=True): assert torch.equal(a, b)
    for name, p in base.named_parameters(): assert torch.equal(p, kept[name]), name
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)), "a trial draws no random numbers of others"


def test_a_trial_that_breaks_down_is_worth_infinity(base):
    trial = make(base)
    trial.to(3)
    with torch.no_grad(): next(iter(trial.params.values())).fill_(math.nan)
    assert trial.to(6) == math.inf and trial.to(6) == math.inf
    with pytest.raises(InputError): trial.to(2)


def test_no_list_is_in_two_splits_and_orders_are_right():
    for down in (False, True):
        for split in module.SPLITS:
            for e in sorting(split, 200, 3, down):
                digits, answer = e.ids[:e.ids.index(10)], e.ids[e.ids.index(10) + 1:-1]
                assert answer == sorted(digits, reverse=down) and module.split_of(digits) == split
                assert e.labels == [-100] * (len(digits) + 1) + answer + [11]
    assert sorting("test", 5, 1) == sorting("test", 5, 1) != sorting("test", 5, 2)
