"""Choosing between ways: intervals that cover, planted mistakes in them, and prompts made of examples."""
import math
import random

import pytest
import torch

from llm_workbench.errors import InputError
from llm_workbench.finetuning.when import break_even, exact_interval, nearest, sign_test, with_examples


def check_cover(interval, level=0.95):
    "Whatever the true share is, draws whose interval holds it have at least the promised probability."
    for n in (1, 3, 12, 36):
        found = [interval(k, n) for k in range(n + 1)]
        for p in [i / 200 for i in range(1, 200)]:
            held = math.fsum(math.comb(n, k) * p**k * (1 - p)**(n - k) for k, (low, high) in enumerate(found)
                             if low <= p <= high)
            assert held >= level - 1e-9, f"{n} questions, true share {p}: only {held:.3f}"


def test_exact_intervals_cover_mirror_and_nest():
    check_cover(exact_interval)
    for n in (1, 7, 12):
        for k in range(n + 1):
            low, high = exact_interval(k, n)
            assert low <= k / n <= high and exact_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
            inner = exact_interval(k, n, 0.5)
            assert low <= inner[0] and inner[1] <= high
    assert exact_interval(0, 12)[0] == 0 and exact_interval(12, 12)[1] == 1
    assert exact_interval(0, 12)[1] == pytest.approx(1 - 0.025 ** (1 / 12))


def wald(k, n):
    half = 1.96 * math.sqrt(k / n * (1 - k / n) / n)
    return k / n - half, k / n + half


def wilson(k, n, z=1.96):
    mid, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return mid - half, mid + half


def one_sided(k, n): return exact_interval(k, n, 0.9)


@pytest.mark.parametrize("mistake", [wald, wilson, one_sided])
def test_intervals_that_promise_too_much_are_rejected(mistake):
    with pytest.raises(AssertionError): check_cover(mistake)


def test_sign_test_is_the_share_of_coins_as_far_apart():
    for better in range(7):
        for worse in range(7):
            n, apart = better + worse, abs(better - worse)
            share = sum(math.comb(n, i) for i in range(n + 1) if abs(2 * i - n) >= apart) / 2**n
            assert sign_test(better, worse) == pytest.approx(share)


def test_nearest_is_the_largest_product_nearest_last():
    g = torch.Generator().manual_seed(0)
    kept, asked = (torch.nn.functional.normalize(torch.randn(n, 6, generator=g), dim=-1) for n in (9, 4))
    for k in (1, 3, 9):
        found = nearest(kept, asked, k)
        for row, vector in zip(found.tolist(), asked):
            order = sorted(range(9), key=lambda i: float(kept[i] @ vector))
            assert row == order[-k:]
    assert nearest(kept, kept, 1)[:, 0].tolist() == list(range(9)), "each is nearest to itself"
    for bad in (lambda: nearest(kept, asked, 0), lambda: nearest(kept, asked, 10), lambda: nearest(kept, asked[:, :5]),
                lambda: nearest(kept, asked[0])):
        with pytest.raises(InputError): bad()


def test_break_even_is_where_the_lines_cross():
    draw = random.Random(0)
    for _ in range(100):
        once, each, instead = (draw.uniform(0.1, 9) for _ in range(3))
        n = break_even(once, each, instead)
        if instead <= each: assert n == math.inf
        else: assert once + n * each == pytest.approx(n * instead)


def test_examples_stand_in_front_in_turns():
    turn = [dict(role="user", content="a"), dict(role="assistant", content="b")]
    found = with_examples([turn, turn], "q", "s")
    assert [m["role"] for m in found] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert found[-1]["content"] == "q" and with_examples([], "q") == [dict(role="user", content="q")]
    for bad in (lambda: with_examples([], " "), lambda: with_examples([turn[:1]], "q"),
                lambda: with_examples([turn[1:], turn[1:]], "q")):
        with pytest.raises(InputError): bad()
