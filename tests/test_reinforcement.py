"Reinforcement against trl's own trainers, on ragged batches of a real (small) model, and known mistakes."
import copy
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checks import apart, gradients, tiny

from llm_workbench import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import ContextLengthError, InputError, UnsupportedError
from llm_workbench.finetuning import reinforcement as module
from llm_workbench.finetuning.data import IGNORE, Example, padded
from llm_workbench.finetuning.reinforcement import (
    LOSSES,
    PolicyLoss,
    Rollouts,
    advantages,
    answer_logprobs,
    graded,
    grpo_loss,
    k3,
    matches,
    number_right,
    policy_loss,
    referred,
    rollouts,
)

PROMPTS = [[5], [7, 8, 9], [11, 3], [1, 2, 3, 4]]
SIZES = [1, 7, 3, 9, 2, 5, 4, 8]                     # tokens of two answers to each prompt
T = 0.7


def moved(decoder, seed, by=0.01):
    "A copy whose weights stand a little apart."
    other, g = copy.deepcopy(decoder).requires_grad_(False), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters(): p.add_(by * torch.randn(p.shape, generator=g))
    return other


def given():
    "A model as transformers has it and as ours, and rollouts that a neighbour of it drew."
    hf = tiny()
    with torch.no_grad():
        for p in hf.parameters(): p.mul_(0.6)
    ours = Decoder.from_transformers(hf).requires_grad_(True)
    g = torch.Generator().manual_seed(1)
    prompts = [p for p in PROMPTS for _ in range(2)]
    answers = [torch.randint(97, (n,), generator=g).tolist() for n in SIZES]
    rows = padded([Example(p + a, [IGNORE] * len(p) + a) for p, a in zip(prompts, answers)])
    with torch.no_grad():
        old, reference = (answer_logprobs(moved(ours, seed, by), rows, T) for seed, by in ((2, 0.04), (3, 0.01)))
    some = torch.tensor([1.2, -0.7, 0.4, -1.5, -0.3, 0.9, -1.1, 0.6])
    return hf, ours, Rollouts(rows, old, prompts, answers, 2, T, some, some, reference)


@pytest.fixture(scope="module")
def world(): return given()


def left(rows): return torch.tensor([[0] * (max(map(len, rows)) - len(r)) + r for r in rows])
def right(rows, value=0): return torch.tensor([r + [value] * (max(map(len, rows)) - len(r)) for r in rows])
def ones(rows): return [[1] * len(r) for r in rows]


def aligned(batch, values):
    "What stands at the tokens of the answers, (B, longest answer), as trl has it."
    return right([row[keep].tolist() for row, keep in zip(values, batch.mask)], 0.0)


def theirs(hf, batch, s, cls=None):
    "The loss of trl's trainer for these rollouts."
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head
    if not hasattr(hf, "has_fused_head"): add_fused_lm_head(hf, temperature=T, outputs=("log_probs", "entropy"))
    hf.has_fused_head = True
    cls = cls or GRPOTrainer
    trainer, same = cls.__new__(cls), lambda t, **_: t
    trainer.__dict__.update(
        accelerator=SimpleNamespace(gather=same, reduce=same, num_processes=1, autocast=nullcontext,
                                    is_main_process=False, device=torch.device("cpu")),
        args=SimpleNamespace(use_bias_correction_kl=s.unbiased, delta=None, steps_per_generation=1), model=hf,
        aux_loss_enabled=False, use_vllm=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, loss_type=s.kind, beta=s.beta,
        importance_sampling_level=s.level, epsilon_low=s.low, epsilon_high=s.high, max_completion_length=s.longest,
        _metrics=defaultdict(lambda: defaultdict(list)))
    mask = right(ones(batch.answers))
    old = aligned(batch, batch.old)
    return trainer._compute_loss(hf, dict(
        prompt_ids=left(batch.prompts), prompt_mask=left(ones(batch.prompts)), completion_ids=right(batch.answers),
        completion_mask=mask, advantages=batch.advantages, old_per_token_logps=old, old_logps=(old * mask).sum(1),
        ref_per_token_logps=aligned(batch, batch.reference), num_items_in_batch=mask.sum()))


def differs(world, s, cls=None, ours=None):
    "Whether loss or gradients of a whole step are others than trl's."
    hf, decoder, batch = world
    want = theirs(hf, batch, s, cls)
    total, n = module.grpo_loss(decoder, batch, ours or s)
    got, theirs_ = gradients(decoder, total / n), gradients(hf, want, "model.")
    shared = got.keys() & theirs_.keys()
    assert len(shared) > 15, "the two models name their parameters differently"
    scale = max(theirs_[name].abs().max() for name in shared)
    off = max(((got[name] - theirs_[name]).abs().max() / max(1, scale)).item() for name in shared)
    return off > 1e-6 or abs(total.item() / n - want.item()) > 1e-6 * max(1, abs(want.item()))


def setting(kind="dapo", level="token", beta=0.3, low=0.02, high=0.03):
    return PolicyLoss(kind, level, low, high, beta, 11)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_whole_step_is_trls(world, kind, level, beta): assert not differs(world, setting(kind, level, beta))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_price_without_the_ratio_is_trls_too(world, level):
    s = replace(setting("dapo", level), unbiased=False)
    assert not differs(world, s) and differs(world, s, ours=replace(s, unbiased=True))


@pytest.mark.parametrize("low, high", [(0.2, 0.28), (0.001, 0.001)])
def test_rloo_is_two_of_the_settings(world, low, high):
    from trl.trainer.rloo_trainer import RLOOTrainer
    assert not differs(world, setting("grpo", "product", 0.0, low, high), RLOOTrainer)


def test_the_made_ratios_meet_the_clip_on_both_sides(world):
    "Else the comparisons above would not see it."
    hf, ours, batch = world
    with torch.no_grad(): ratio = (answer_logprobs(ours, batch.rows, T) - batch.old).exp()
    for side in (ratio < 0.98, ratio > 1.03):
        for sign in (-1, 1): assert (side & batch.mask & (batch.advantages.sign() == sign)[:, None]).any()


# ---- mistakes that these comparisons reject

REAL = SimpleNamespace(logprobs=answer_logprobs, importance=module.importance, k3=k3, divided=module._divided,
                       policy_loss=policy_loss)
def of_the_batch(losses, mask, s): return losses.sum(), len(mask)
def a_token_less(losses, mask, s): return REAL.divided(losses, mask, s)[0], REAL.divided(losses, mask, s)[1] - 1
def padding_counts(losses, mask, s): return REAL.divided(losses, torch.ones_like(mask), s)
def mean_of_means(losses, mask, s): return (losses.sum(1) / mask.sum(1)).sum(), len(mask)
def against_itself(logprobs, old, mask, level): return REAL.importance(logprobs, logprobs.detach(), mask, level)
def upside_down(logprobs, old, mask, level): return 1 / REAL.importance(logprobs, old, mask, level)
def not_averaged(logprobs, old, mask, level): return REAL.importance(logprobs, old, mask, "product")
def wrong_way(logprobs, reference): return k3(reference.detach() * 0 + logprobs, 2 * logprobs.detach() - reference)
def negative(logprobs, reference): return -k3(logprobs, reference)
def first_order(logprobs, reference): return logprobs - reference
def at_temperature_1(decoder, rows, temperature=1.0): return REAL.logprobs(decoder, rows)
def shifted(decoder, rows, temperature=1.0):
    return REAL.logprobs(decoder, replace(rows, labels=rows.labels.roll(1, 1)), temperature)

def with_clip(choose):
    "The loss with another choice between the ratio and the clipped one."
    def mutant(logprobs, old, advantages, mask, s, reference):
        a, ratio = advantages[:, None], module.importance(logprobs, old, mask, s.level)
        losses = -choose(ratio * a, ratio.clamp(1 - s.low, 1 + s.high) * a) + s.beta * k3(logprobs, reference) * ratio
        return module._divided(losses * mask, mask, s)
    return mutant

the_right_one, the_larger = with_clip(torch.min), with_clip(torch.max)
the_clipped = with_clip(lambda x, clipped: clipped)

MUTANTS = {
    "tokens counted per batch": ("_divided", of_the_batch, "dapo"),
    "one token not counted": ("_divided", a_token_less, "dapo"),
    "padding counted, per token": ("_divided", padding_counts, "dapo"),
    "padding counted, per answer": ("_divided", padding_counts, "grpo"),
    "per answer instead of per token": ("_divided", mean_of_means, "dapo"),
    "ratio against the current policy": ("importance", against_itself, "grpo"),
    "ratio upside down": ("importance", upside_down, "grpo"),
    "a sum for the mean of a sequence": ("importance", not_averaged, "sequence"),
    "KL the wrong way round": ("k3", wrong_way, "dapo"),
    "KL with the sign flipped": ("k3", negative, "dapo"),
    "KL of the first order": ("k3", first_order, "dapo"),
    "another temperature": ("answer_logprobs", at_temperature_1, "dapo"),
    "shifted by one": ("answer_logprobs", shifted, "dapo"),
    "clipped on the wrong side": ("policy_loss", the_larger, "dapo"),
    "clipped on both sides": ("policy_loss", the_clipped, "dapo"),
}

@pytest.mark.parametrize("name, mutant, kind", MUTANTS.values(), ids=MUTANTS)
def test_a_step_notices_mistakes(world, monkeypatch, name, mutant, kind):
    monkeypatch.setattr(module, name, mutant)
    assert differs(world, setting("grpo", "sequence") if kind == "sequence" else setting(kind))


def test_the_rewritten_clip_is_right_without_its_mistake(world, monkeypatch):
    monkeypatch.setattr(module, "policy_loss", the_right_one)
    assert not differs(world, setting())


def test_the_reference_stands_still(world):
    "No gradient reaches it or the old policy, and one that shares weights with the model in training is refused."
    hf, ours, batch = world
    other = moved(ours, 3).requires_grad_(True)
    known = referred(batch, other, ours)
    assert not known.reference.requires_grad
    ours.zero_grad()
    grpo_loss(ours, known, setting())[0].backward()
    assert all(p.grad is None for p in other.parameters()) and all(p.grad is not None for p in ours.parameters())
    values = [torch.full((2, 3), -1.0, requires_grad=True) for _ in range(3)] + [torch.ones(2, requires_grad=True)]
    loss = policy_loss(values[0], values[1], values[3], torch.ones(2, 3, dtype=torch.bool), setting(), values[2])[0]
    assert [s is None for s in torch.autograd.grad(loss, values, allow_unused=True)] == [False, True, True, True]
    with pytest.raises(InputError, match="train along"): referred(batch, ours.with_ops(TORCH), ours)


def test_a_reference_that_trains_along_moves(world, monkeypatch):
    "What the check above is for: with it out of the way, the KL pulls on nothing."
    hf, ours, batch = world
    monkeypatch.setattr(module, "check_reference", lambda decoder, reference: None)
    ours = copy.deepcopy(ours)
    with torch.no_grad(): before = referred(batch, ours, ours).reference
    grpo_loss(ours, replace(batch, reference=before), setting())[0].backward()
    torch.optim.SGD(ours.parameters(), 0.1).step()
    assert not torch.allclose(referred(batch, ours, ours).reference, before)


# ---- whole trainers: they draw, we compare

REWARDS = [1.0, 0.0, 0.5, 0.25, 2.0, 2.0, 2.0, 2.0]

def trainer_of(kind, tmp_path, **settings):
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96", pad_token="w95")
    data = Dataset.from_list([dict(prompt="w5"), dict(prompt="w7 w8 w9")])
    args = getattr(trl, f"{kind}Config")(
        tmp_path, use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        temperature=T, gradient_checkpointing=False, dataloader_num_workers=0, report_to="none", beta=0.2, **settings)
    tiny().save_pretrained(tmp_path / "model")                          # trl reads its reference from there
    def rewards(completions, **_): return REWARDS[:len(completions)]
    return getattr(trl, f"{kind}Trainer")(str(tmp_path / "model"), reward_funcs=rewards, args=args,
                                          train_dataset=data, processing_class=tokenizer)


def drawn_by(trainer, kind, beta=0.0):
    "A batch that a trainer drew and graded, and the same rollouts as ours."
    prompts = [dict(prompt="w5")] * 4 + [dict(prompt="w7 w8 w9")] * 4
    batch = trainer._generate_and_score_completions(prompts)
    prompts, answers = ([ids[keep.bool()].tolist() for ids, keep in zip(batch[f"{n}_ids"], batch[f"{n}_mask"])]
                        for n in ("prompt", "completion"))
    ours = Decoder.from_transformers(trainer.model).requires_grad_(True)
    before = Decoder.from_transformers(trainer.ref_model)
    rows = padded([Example(p + a, [IGNORE] * len(p) + a) for p, a in zip(prompts, answers)])
    with torch.no_grad(): old = answer_logprobs(ours, rows, T)
    mine = referred(Rollouts(rows, old, prompts, answers, 4, T), before, ours)
    rewards = iter(REWARDS)
    return batch, ours, graded(mine, lambda p, a: next(rewards), str, kind, beta)


def test_a_real_grpo_trainer(tmp_path):
    trainer = trainer_of("GRPO", tmp_path)
    with torch.no_grad():
        for p in trainer.ref_model.parameters(): p.mul_(0.99)
    for scale, kind in (("group", "group"), ("batch", "batch"), ("none", "centred")):
        trainer.scale_rewards = scale
        batch, ours, mine = drawn_by(trainer, kind)
        assert torch.allclose(batch["advantages"], mine.advantages, atol=1e-6), scale
    want = trainer.compute_loss(trainer.model, batch)
    total, n = grpo_loss(ours, mine, PolicyLoss(beta=0.2))               # trl's default: dapo
    assert abs(total.item() / n - want.item()) < 1e-6 * max(1, abs(want.item())) and abs(want.item()) > 1e-4
    assert apart(gradients(ours, total / n), gradients(trainer.model, want, "model.")) < 1e-5


def test_a_real_rloo_trainer(tmp_path):
    trainer = trainer_of("RLOO", tmp_path)
    with torch.no_grad():
        for p in trainer.ref_model.parameters(): p.mul_(0.99)
    batch, ours, mine = drawn_by(trainer, "rloo", 0.2)
    assert torch.allclose(batch["advantages"], mine.advantages, atol=1e-5) and mine.rewards[6] != REWARDS[6]
    total, n = grpo_loss(ours, mine, PolicyLoss("grpo", "product"))
    assert abs(total.item() / n - trainer.compute_loss(trainer.model, batch).item()) < 1e-5


# ---- advantages

def uncentred(rewards, group, kind): return rewards
def over_the_batch(rewards, group, kind): return rewards - rewards.mean()
def population(rewards, group, kind):
    r = rewards.view(-1, group)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-4)).flatten()

def advantage_differs(make):
    "Whether an advantage is another than trl's rule, or moves with a level that is added to all rewards of a prompt."
    r = torch.tensor(REWARDS)
    want = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in r.split(4)])
    lifted = r + torch.tensor([5.0] * 4 + [0.0] * 4)
    return any((make(x, 4, "group") - want).abs().max() > 1e-5 for x in (r, lifted))

@pytest.mark.parametrize("mutant", [uncentred, over_the_batch, population])
def test_advantages_notice_mistakes(mutant):
    assert advantage_differs(mutant) and not advantage_differs(advantages)


@pytest.mark.parametrize("kind", ["rloo", "centred", "group", "batch"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.7])
def test_equals_have_no_advantage_at_all(kind, value):
    "Not even by rounding, which a division by 1e-4 would make large."
    assert advantages(torch.full((21,), value), 7, kind).abs().max() < 1e-6


# ---- rollouts and rewards

@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_come_along(world, temperature):
    "Of the temperature, and of every answer at its own places; any number that ends a row."
    ours = world[1]
    drawn = rollouts(ours, PROMPTS, 3, eos_ids=range(0, 97, 9), max_new_tokens=12, temperature=temperature, seed=5)
    sizes = [len(a) for a in drawn.answers]
    assert len(set(sizes)) > 3 and drawn.prompts == [p for p in PROMPTS for _ in range(3)]
    with torch.no_grad(): again = answer_logprobs(ours, drawn.rows, temperature)
    assert torch.allclose(drawn.old, again, atol=1e-4) and drawn.mask.sum(1).tolist() == sizes
    assert not torch.allclose(drawn.old, answer_logprobs(ours, drawn.rows, temperature * 1.1), atol=1e-2)
    same = rollouts(ours, PROMPTS, 3, eos_ids=range(0, 97, 9), max_new_tokens=12, temperature=temperature, seed=5)
    assert same.answers == drawn.answers and torch.equal(same.old, drawn.old)


def test_an_answer_without_tokens_to_learn_changes_nothing():
    "As trl's clamp has it: a masked-out answer counts as an answer in `grpo`, and nowhere else."
    mask = torch.tensor([[True, True], [False, False]])
    values = [torch.tensor([[-1.0, -2.0], [0.0, 0.0]])] * 2
    for kind, n in (("grpo", 2), ("dapo", 2), ("bnpo", 1), ("dr_grpo", 22)):
        total, count = policy_loss(*values, torch.tensor([1.0, 5.0]), mask, setting(kind, beta=0.0))
        assert total.isfinite() and count == n


def test_rewards():
    answer = number_right(lambda prompt: 12)
    said = {"12": 1, "it is 12.": 1, "3, 12": 1, "12, 3": 0, "": 0, "1 2": 0, "12.0": 1, "-12": 0}
    assert {a: answer("", a) for a in said} == said
    form = matches(r"<think>.*</think>\d+")
    assert [form("", a) for a in ("<think>a\nb</think>3", "<think>a</think>3 ", "3")] == [1, 0, 0]


# ---- what cannot be done

LP, MASK = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
WRONG = {
    "n not whole": lambda d: rollouts(d, PROMPTS, 1.5, eos_ids=[1], max_new_tokens=3),
    "temperature NaN": lambda d: rollouts(d, PROMPTS, 2, eos_ids=[1], max_new_tokens=3, temperature=float("nan")),
    "temperature a text": lambda d: rollouts(d, PROMPTS, 2, eos_ids=[1], max_new_tokens=3, temperature="1"),
    "prompts are none": lambda d: rollouts(d, None, 2, eos_ids=[1], max_new_tokens=3),
    "token outside": lambda d: rollouts(d, [[97]], 2, eos_ids=[1], max_new_tokens=3),
    "too long": lambda d: rollouts(d, PROMPTS, 2, eos_ids=[1], max_new_tokens=64),
    "no rewards": lambda d: advantages(torch.ones(0), 2),
    "rewards in a table": lambda d: advantages(torch.ones(2, 2), 2),
    "reward infinite": lambda d: advantages(torch.tensor([1.0, float("inf")]), 2),
    "low not a number": lambda d: PolicyLoss(low=float("nan")),
    "high infinite": lambda d: PolicyLoss(high=float("inf")),
    "beta a text": lambda d: PolicyLoss(beta="0.1"), "longest 0": lambda d: PolicyLoss("dr_grpo", longest=0),
    "advantages of tokens": lambda d: policy_loss(LP, LP, LP, MASK),
    "no reference": lambda d: policy_loss(LP, LP, LP[:, 0], MASK, PolicyLoss(beta=1.0)),
}

@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_cannot_be_done(world, wrong):
    with pytest.raises((InputError, UnsupportedError, ContextLengthError)) as e: wrong(world[1])
    assert len(str(e.value)) > 20 and "Traceback" not in str(e.value)
