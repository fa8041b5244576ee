"The toy of the whole chain: its judges, its texts, its exact test, and the mistakes that these notice."
import math
from itertools import product

import numpy as np
import pytest
import torch

from llm_workbench.errors import InputError
from llm_workbench.finetuning import chain
from llm_workbench.finetuning.chain import (
    FORM,
    after,
    glad,
    made,
    mcnemar,
    narrowed,
    reading,
    right,
    solution,
    world,
    written,
)
from llm_workbench.finetuning.data import IGNORE
from llm_workbench.text.tokenizers import Tokenizer


@pytest.fixture(scope="module")
def here(): return world(3)


# ---- the exact test


def outcomes(up, down, same):
    counts = (up, down, same, same)
    return np.repeat([0, 1, 1, 0], counts), np.repeat([1, 0, 1, 0], counts)


def by_coins(up, down):
    "The same by looking at every way in which the coins can fall."
    tosses = [abs(2 * sum(t) - len(t)) for t in product((0, 1), repeat=up + down)]
    return sum(t >= abs(up - down) for t in tosses) / len(tosses)


CASES = [(0, 0), (1, 0), (0, 5), (3, 3), (7, 1), (2, 9), (8, 4)]


def check_test(p_of):
    for (up, down), same in product(CASES, (0, 40)):
        assert p_of(*outcomes(up, down, same)) == pytest.approx(by_coins(up, down), rel=1e-12)


def test_p_is_the_share_of_coins_that_fall_as_one_sided_or_more(): check_test(mcnemar)


def one_sided(before, after): return mcnemar(before, after) / 2


def over_all_questions(before, after):
    n, k = len(before), int((after > before).sum())
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(max(k, n - k), n + 1)) / 2**n)


def without_ties(before, after):
    up, down = int((after > before).sum()), int((after < before).sum())
    return min(1.0, 2 * sum(math.comb(up + down, i) for i in range(max(up, down) + 1, up + down + 1)) / 2**(up + down))


@pytest.mark.parametrize("mutant", [one_sided, over_all_questions, without_ties])
def test_wrong_tests_are_noticed(mutant):
    with pytest.raises(AssertionError): check_test(mutant)


def test_a_thousand_changed_questions_are_no_overflow():
    assert 0 < mcnemar(*outcomes(600, 400, 5)) < 1e-9


@pytest.mark.parametrize("before, now", [([1, 0], [1]), ([0.5], [1]), ([[1]], [[1]]), ([2, 0], [1, 0])])
def test_outcomes_that_do_not_compare(before, now):
    with pytest.raises(InputError, match="same questions"): mcnemar(np.array(before), np.array(now))


# ---- judges


def check_judge(judge):
    known = {"Add 00000000": "0", "Add 12002122": "1", "Add 22222222": "1", "Say 35443553": "35443553"}
    for question, result in known.items():
        assert solution(question) == result
        for steps, manner in product((False, True), repeat=2):
            answer = written(question, steps, manner)
            assert judge(question, answer) == 1 and glad(question, answer) == manner
            for wrong in (answer[:-1], answer + " " + answer, answer + " 1.", " " + answer, answer + "\n",
                          answer.replace(".", "")):
                assert judge(question, wrong) == 0 == glad(question, wrong), wrong
    for answer in ("0.", "2. Gladly.", "10021201, 2.", "0, 1, 2.", "1 2 0"): assert judge("Add 12002122", answer) == 0


def test_the_judge_takes_a_whole_right_answer_and_nothing_else(): check_judge(right)


def hasty(question, answer): return float(solution(question) in answer)
def anywhere(question, answer): return float((m := FORM.search(answer)) is not None and m[1] == solution(question))
def formed(question, answer): return float(FORM.fullmatch(answer) is not None)


@pytest.mark.parametrize("mutant", [hasty, anywhere, formed])
def test_judges_that_can_be_cheated_are_noticed(mutant):
    with pytest.raises(AssertionError): check_judge(mutant)


@pytest.mark.parametrize("question", ["", "Add", "Add ", "Add 3", "Say 012", "Sum 012", "Add 01 2", "add 012"])
def test_what_is_no_question(question):
    with pytest.raises(InputError, match="no question"): solution(question)


# ---- texts


def test_the_texts_are_a_function_of_the_seed(here):
    again, other = world(3), world(4)
    assert again.documents == here.documents and again.lessons == here.lessons and again.held == here.held
    assert other.held != here.held


def test_lessons_end_what_the_exam_begins(here):
    decode = here.tokenizer.decode
    for text in here.lessons[:50]:
        start = next(i for i, label in enumerate(text.labels) if label != IGNORE)
        question = decode(text.ids[:start], skip_special=True)
        assert here.chat(question) == text.ids[:start], "the same template in training and in use"
        assert right(question, decode(text.ids[start:], skip_special=True)) == 1
        assert text.ids[-1] == here.tokenizer.eos_id and text.labels[start:] == text.ids[start:]


def test_documents_end_what_the_exam_begins(here):
    for text in here.documents[:50]:
        start = next(i for i, label in enumerate(text.labels) if label != IGNORE)
        question, _, answer = here.tokenizer.decode(text.ids, skip_special=True).partition(": ")
        assert here.begun(question) == text.ids[:start] and right(question, answer) == 1
        assert text.ids[-1] in here.tokenizer.eos_ids


def test_a_gguf_carries_the_tokenizer(here):
    back = Tokenizer.from_gguf(here.tokenizer.to_gguf())
    for question in here.held[:20]:
        assert back.encode_chat(chain.asking(question)) == here.chat(question)
    assert back.eos_ids == here.tokenizer.eos_ids and len(here.chat("Add 01201201")) == len(here.chat("Say 34534534"))


# ---- models


def test_a_stage_leaves_the_model_before_it_alone(here):
    base = made(here.tokenizer, 1)
    kept = {name: t.clone() for name, t in base.state_dict().items()}
    new = after(base, reading(here.lessons, 0), steps=2, lr=1e-2)
    assert all(torch.equal(t, kept[name]) for name, t in base.state_dict().items())
    assert not any(torch.equal(t, kept[name]) for name, t in new.named_parameters())
    assert not any(p.requires_grad for d in (base, new) for p in d.parameters())


def test_a_narrowed_model_loses_only_units_that_count_for_little(here):
    whole = made(here.tokenizer, 1)
    with torch.no_grad():
        for layer in whole.layers: layer.mlp.down_proj.weight[:, 1::2] = 0        # every other unit does nothing
    short, rows = narrowed(whole), torch.tensor([here.chat(here.held[0])])
    assert torch.allclose(short(rows), whole(rows), atol=1e-5)
    assert short.config.intermediate_size * 2 == whole.config.intermediate_size == 2 * short.source["intermediate_size"]
    with torch.no_grad(): short.embed_tokens.weight.zero_()
    assert whole.embed_tokens.weight.any(), "memory of its own"


def test_a_model_is_a_function_of_its_seed_and_takes_no_random_number_from_others(here):
    state = torch.random.get_rng_state()
    a, b, c = (made(here.tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.embed_tokens.weight, b.embed_tokens.weight)
    assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)
