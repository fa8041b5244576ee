"Preference losses against the code of trl's own trainers, on ragged batches of a real (small) model and at extremes."
import copy
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checks import apart, gradients, tiny
from models import small_model
from torch import nn

from llm_workbench import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.finetuning import preferences as module
from llm_workbench.finetuning.data import IGNORE, Example, packed, padded
from llm_workbench.finetuning.preferences import (
    FREE,
    KINDS,
    check_reference,
    dpo_loss,
    kl_level,
    kto_loss,
    logprobs,
    mismatched,
    orpo_loss,
    pair,
    paired,
    preference_loss,
    reference_logprobs,
    token_logprobs,
)

SMOOTHED = [kind for kind in KINDS if KINDS[kind].smoothing and kind != "sigmoid"]  # trl's sigmoid ignores it


def text(prompt, answer): return Example([*prompt, *answer], [IGNORE] * len(prompt) + list(answer))


def some_pairs(n=5, seed=0, V=97):
    "Prompts and answers of many lengths, answers of one token among them."
    g = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(V, (k,), generator=g).tolist()
    made = []
    for i in range(n):
        prompt = draw(1 + i % 4)
        made.append((text(prompt, draw([1, 7, 3, 2, 5][i % 5])), text(prompt, draw([4, 1, 3, 9, 1][i % 5]))))
    return made


def both(sharper=1.0):
    "A policy and a reference, as transformers has them and as ours; they are close, as after some steps of training."
    theirs = tiny(), tiny()
    with torch.no_grad():
        for hf in theirs:
            for p in hf.parameters(): p.mul_(0.6)
        g = torch.Generator().manual_seed(3)
        for p in theirs[1].parameters(): p.add_(0.01 * torch.randn(p.shape, generator=g))
        theirs[1].lm_head.weight.mul_(sharper)
    ours = [Decoder.from_transformers(hf) for hf in theirs]
    ours[0].requires_grad_(True), ours[1].requires_grad_(False)
    return theirs, ours


@pytest.fixture(scope="module")
def models(): return both()


def bare(cls, **settings):
    "A trainer of trl with its own loss methods and no training loop around it."
    trainer = cls.__new__(cls)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)
    common = dict(accelerator=accelerator, aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
                  _total_train_tokens=0, _tp_size=1, is_encoder_decoder=False,
                  args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None))
    trainer.__dict__.update(common | settings)
    return trainer


def inputs_of(texts):
    "A padded batch in trl's words."
    rows = padded(texts)
    real = (torch.arange(rows.tokens.shape[1]) < torch.tensor(rows.counts)[:, None]).long()
    return dict(input_ids=rows.tokens, attention_mask=real, completion_mask=(rows.labels != IGNORE).long())


def trl_step(theirs, pairs, kind, beta, smoothing=0.0):
    "The loss of a step by trl: model, reference, log-probabilities, loss."
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head
    policy, reference = theirs
    if kind in FREE:
        batch = {}
        for i, name in enumerate(("chosen", "rejected")):
            rows = inputs_of([p[i] for p in pairs])
            labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, IGNORE)
            batch |= {f"{name}_input_ids": rows["input_ids"], f"{name}_attention_mask": rows["attention_mask"],
                      f"{name}_labels": labels}
        settings = dict(beta=beta, label_smoothing=smoothing, padding_value=0, pad_token_id=0)
        cpo = dict(alpha=0.0, cpo_alpha=float(kind == "cpo"), simpo_gamma=0.5,
                   loss_type="simpo" if kind == "simpo" else "sigmoid")
        trainer = bare(ORPOTrainer, **settings) if kind == "orpo" else bare(CPOTrainer, **settings, **cpo)
        return trainer.get_batch_loss_metrics(policy, batch)[0]
    for hf, outputs in ((policy, ("log_probs", "entropy", "mean_logits", "is_top1")), (reference, ("log_probs",))):
        if not hasattr(hf, "has_fused_head"): add_fused_lm_head(hf, outputs=outputs)
        hf.has_fused_head = True
    trainer = bare(DPOTrainer, model=policy, ref_model=reference, ld_alpha=None, precompute_ref_logps=False,
                   f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=beta,
                   label_smoothing=smoothing, use_weighting=False)
    return trainer._compute_loss(policy, inputs_of([c for c, _ in pairs] + [r for _, r in pairs]), False)


def differs_from_trl(models, kind, beta=0.3, smoothing=0.0):
    "Whether a whole step (loss, gradients of all weights) is another one than trl's."
    (policy, reference), (ours, before) = models
    pairs = some_pairs()
    options = dict(beta=beta) | (dict(label_smoothing=smoothing) if smoothing else {})
    want = trl_step((policy, reference), pairs, kind, beta, smoothing)
    total, n = module.preference_loss(ours, paired(pairs), kind, before, **options)
    off = abs(total.item() / n - want.item()) / max(1, abs(want.item()))
    return off > 1e-6 or apart(gradients(ours, total / n), gradients(policy, want, "model.")) > 1e-5


@pytest.mark.parametrize("beta", [0.05, 0.3, 3.0])
@pytest.mark.parametrize("kind", [*KINDS, *FREE])
def test_a_whole_step_is_trls(models, kind, beta):
    assert not differs_from_trl(models, kind, beta, 0.1 if kind in (*SMOOTHED, "cpo") else 0.0)


def test_a_real_trainer_with_its_own_data_and_reference(models, tmp_path):
    "trl tokenizes, collates and computes the reference beforehand; the first loss is ours, and ln 2."
    from datasets import Dataset
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96", pad_token="w95")
    said = lambda ids: " ".join(f"w{i}" for i in ids)
    pairs = [(text(c.ids[:1], c.ids[1:] + [96]), text(c.ids[:1], r.ids[1:] + [96])) for c, r in some_pairs(V=95)]
    data = Dataset.from_list([dict(prompt=said(c.ids[:1]) + " ", chosen=said(c.ids[1:-1]), rejected=said(r.ids[1:-1]))
                              for c, r in pairs])
    hf = tiny()
    ours = Decoder.from_transformers(hf).requires_grad_(True)
    args = DPOConfig(tmp_path, use_cpu=True, bf16=False, per_device_train_batch_size=5, precompute_ref_log_probs=True,
                     beta=0.2, gradient_checkpointing=False, dataloader_num_workers=0, report_to="none")
    trainer = DPOTrainer(hf, args=args, train_dataset=data, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    known = reference_logprobs(ours, [t for p in pairs for t in p]).view(-1, 2)
    assert torch.allclose(known.T.flatten(), torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]),
                          atol=1e-3, rtol=1e-6)
    want = trainer.compute_loss(trainer.model, batch)
    total, n = preference_loss(ours, paired(pairs, known), beta=0.2)
    assert abs(total.item() / n - math.log(2)) < 1e-5 and abs(want.item() - math.log(2)) < 1e-5
    assert apart(gradients(ours, total / n), gradients(trainer.model, want, "model.")) < 1e-4


def kto_differs_from_trl(models, good, beta=0.3):
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.utils import add_fused_lm_head
    (policy, reference), (ours, before) = models
    texts = [t for p in some_pairs() for t in p][:len(good)]
    others, good = mismatched(texts), torch.tensor(good)
    for hf in (policy, reference):
        if not hasattr(hf, "has_fused_head"): add_fused_lm_head(hf, outputs=("log_probs", "entropy", "mean_logits"))
        hf.has_fused_head = True
    batch = inputs_of(texts) | {f"KL_{n}": v for n, v in inputs_of(others).items()} | dict(label=good)
    trainer = bare(KTOTrainer, model=policy, ref_model=reference, calculate_KL=True, loss_type="kto", beta=beta,
                   desirable_weight=1.3, undesirable_weight=0.7, precompute_ref_logps=False)
    want = trainer._compute_loss(policy, batch, False)
    values, kl_values = logprobs(ours, padded(texts))[0], logprobs(ours, padded(others))[0]   # with gradient
    level = module.kl_level(kl_values, reference_logprobs(before, others))
    losses, _ = module.kto_loss(values, reference_logprobs(before, texts), good, level, beta, 1.3, 0.7)
    assert kl_level(kl_values, reference_logprobs(before, others)) > 0, "a level of 0 would test nothing"
    off = (losses.mean() - want).abs().item()
    return off > 1e-6 or apart(gradients(ours, losses.mean()), gradients(policy, want, "model.")) > 1e-5


LABELS = {"mixed": [True, False] * 4, "all good": [True] * 4, "all bad": [False] * 5, "two": [False, True]}

@pytest.fixture(scope="module")
def moved():
    "A reference that is surer of itself thinks less of random texts: the KL is above 0."
    return both(sharper=2.0)


@pytest.mark.parametrize("good", LABELS.values(), ids=LABELS)
def test_kto_is_trls(moved, good):
    assert not kto_differs_from_trl(moved, good)


# ---- mistakes that these comparisons reject

def on_the_prompt(rows):
    real = torch.arange(rows.tokens.shape[1]) < torch.tensor(rows.counts)[:, None]
    return torch.where(real, rows.tokens, IGNORE)[:, 1:]

def averaged(decoder, rows, *rest):
    sums, counts = logprobs(decoder, rows, *rest)
    return sums / counts, counts

def not_averaged(decoder, rows, *rest):
    sums, counts = logprobs(decoder, rows, *rest)
    return sums, torch.ones_like(counts)

def unshifted(rows): return rows.labels[:, :-1]
def exchanged(c, r, rc, rr, *rest, **options): return dpo_loss(r, c, rr, rc, *rest, **options)
def no_reference(c, r, rc, rr, *rest, **o): return dpo_loss(c, r, rc * 0, rr * 0, *rest, **o)
def wrong_sign(x, share): return -(1 - share) * F.logsigmoid(x) + share * F.logsigmoid(-x)
def on_the_answer_only(decoder, rows, n, options):
    sums, counts = logprobs(decoder, rows)
    return orpo_loss(*(sums / counts).split(n), -sums[:n].sum() / counts[:n].sum(), **options)

MUTANTS = [("_targets", on_the_prompt, "bco_pair"), ("_targets", on_the_prompt, "ipo"),
           ("_targets", unshifted, "sigmoid"),
           ("logprobs", averaged, "sigmoid"), ("dpo_loss", exchanged, "sigmoid"),
           ("dpo_loss", no_reference, "sigmoid"), ("_smoothed", wrong_sign, "aot"),
           ("_smoothed", wrong_sign, "cpo"), ("logprobs", not_averaged, "simpo"), ("logprobs", not_averaged, "ipo"),
           ("logprobs", averaged, "cpo"), ("_orpo_step", on_the_answer_only, "orpo")]

@pytest.mark.parametrize("name, mutant, kind", MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_a_step_notices_mistakes(models, monkeypatch, name, mutant, kind):
    monkeypatch.setattr(module, name, mutant)
    assert differs_from_trl(models, kind, smoothing=0.1 if kind in (*SMOOTHED, "cpo") else 0.0)


def test_in_the_margin_the_prompt_cancels(models, monkeypatch):
    "Why the sigmoid does not notice that mistake, and the check above is made with other kinds."
    monkeypatch.setattr(module, "_targets", on_the_prompt)
    assert not differs_from_trl(models, "sigmoid")


def with_gradient(policy, reference): return (policy - reference).mean().clamp(min=0)
def unclamped(policy, reference): return (policy - reference).mean().detach() - 1
def kto_with_gradient(values, reference, good, kl, beta, desirable, undesirable):
    ratio = values - reference
    x = beta * torch.where(good, ratio - kl, kl - ratio)
    return torch.where(good, desirable, undesirable) * (1 - x.sigmoid()), None
def kto_unweighted(values, reference, good, kl, beta, *_): return kto_loss(values, reference, good, kl, beta)
def kto_upside_down(values, reference, good, *rest): return kto_loss(values, reference, ~good, *rest)

@pytest.mark.parametrize("mutants", [dict(kl_level=with_gradient, kto_loss=kto_with_gradient), dict(kl_level=unclamped),
                                     dict(kto_loss=kto_unweighted), dict(kto_loss=kto_upside_down)],
                         ids=["KL with gradient", "another level", "no weights", "labels upside down"])
def test_kto_notices_mistakes(moved, monkeypatch, mutants):
    for name, mutant in mutants.items(): monkeypatch.setattr(module, name, mutant)
    assert kto_differs_from_trl(moved, LABELS["mixed"])


def reference_moves(models):
    "Whether steps on pairs change what the reference says."
    ours = copy.deepcopy(models[1][0])
    before = ours.with_ops(TORCH)                                     # another tree over the same tensors
    pairs = some_pairs()
    known = reference_logprobs(before, [t for p in pairs for t in p])
    optimizer = torch.optim.SGD(ours.parameters(), 0.01)
    try: module.preference_loss(ours, paired(pairs), reference=before)[0].backward()
    except InputError: return False                                   # it is refused before anything moves
    optimizer.step()
    return not torch.equal(reference_logprobs(before, [t for p in pairs for t in p]), known)


def test_a_reference_that_trains_along_is_refused(models, monkeypatch):
    assert not reference_moves(models)
    monkeypatch.setattr(module, "check_reference", lambda decoder, reference: None)
    assert reference_moves(models)


def test_no_gradient_reaches_the_reference(models):
    ours, before = models[1][0], copy.deepcopy(models[1][1]).requires_grad_(True)
    preference_loss(ours, paired(some_pairs()), reference=before)[0].backward()
    assert all(p.grad is None for p in before.parameters())
    values = [torch.tensor([-3.0, -4.0], requires_grad=True) for _ in range(4)]
    for kind in KINDS:
        loss = dpo_loss(*values, kind=kind, label_smoothing=1e-3 if kind == "exo_pair" else 0.0,
                        counts=(torch.ones(2), torch.ones(2)))[0].sum()
        slopes = torch.autograd.grad(loss, values, allow_unused=True)
        assert slopes[0] is not None and slopes[2] is None and slopes[3] is None, kind
    with pytest.raises(InputError, match="vocabulary"):
        check_reference(ours, Decoder(replace(ours.config, vocab_size=96)))


# ---- extremes

def formulas_of_trl(values, kind, beta, smoothing):
    from trl.trainer.dpo_trainer import DPOTrainer
    c, r, rc, rr = values
    out = torch.cat([c, r])[:, None]
    mask = torch.tensor([[0, 1]]).expand(len(out), 2)
    trainer = bare(DPOTrainer, model=nn.Identity(), ld_alpha=None, precompute_ref_logps=True, loss_types=[kind],
                   f_divergence_type="reverse_kl", loss_weights=[1.0], beta=beta, label_smoothing=smoothing,
                   use_weighting=False)
    outputs = SimpleNamespace(log_probs=out, entropy=out, mean_logits=out, is_top1=mask[:, 1:].bool())
    return trainer._compute_loss(lambda **_: outputs, dict(input_ids=mask, attention_mask=mask, completion_mask=mask,
                                                           ref_chosen_logps=rc, ref_rejected_logps=rr), False)


FAR = [(-1e4, -1e-3, -1.0, -1e4), (-1e-3, -1e4, -1e4, -1.0), (-1e4, -1e4, -1e4, -1e4), (0.0, 0.0, 0.0, 0.0),
       (-1e-30, -700.0, -1e-30, 0.0), (-90.0, -1.0, -1.0, -90.0), (-1e4, -1e4, -1e-3, -1e-3)]

@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind):
    "Finite in float32, and trl's value where that is finite in float64."
    smoothing, one = (0.1 if kind in SMOOTHED else 0.0), torch.ones(1)
    lost = 0
    for numbers in FAR:
        for beta in (0.01, 1.0, 10.0):
            got, want = ([torch.tensor([v], dtype=d, requires_grad=True) for v in numbers]
                         for d in (torch.float32, torch.float64))
            loss = dpo_loss(*got, beta, kind, smoothing, (one, one))[0]
            theirs = formulas_of_trl(want, kind, beta, smoothing)
            slopes = torch.autograd.grad(loss, got[:2], allow_unused=True, materialize_grads=True)
            assert loss.isfinite() and all(s.isfinite() for s in slopes), (numbers, beta)
            if not theirs.isfinite(): lost += 1; continue
            assert torch.allclose(loss.double(), theirs, rtol=1e-5, atol=1e-6), (numbers, beta)
    assert (lost > 0) == (kind == "discopop"), "DiscoPOP is the one that overflows in trl"


def test_orpo_at_certainty():
    for x in (0.0, -1e-38, -1e-9, -1e-7, -0.6, -0.7, -30.0, -1e4):
        for y in (0.0, -1e-9, -2.0, -1e4):
            c, r = (torch.tensor([v], requires_grad=True) for v in (x, y))
            loss = orpo_loss(c, r, torch.tensor(0.0), 1.0)[0]
            assert loss.isfinite() and all(g.isfinite() for g in torch.autograd.grad(loss, (c, r))), (x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    values = [torch.tensor([-301.0, -2.5], dtype=dtype) for _ in range(4)]
    losses, rewards = dpo_loss(*values)
    assert losses.dtype == rewards.dtype == torch.float32 and torch.allclose(losses, torch.full((2,), math.log(2)))


# ---- log-probabilities

@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "cohere"])
def test_logprobs_of_a_family(family):
    "Alone, padded, packed, in chunks: one number; logits are scaled and bounded as the family has it."
    hf = small_model(family)
    decoder = Decoder.from_transformers(hf)
    texts = [t for p in some_pairs() for t in p]
    with torch.no_grad():
        want = []
        for t in texts:
            z = hf(torch.tensor([t.ids])).logits[0].log_softmax(-1)
            want.append(sum(z[i - 1, t.ids[i]].item() for i in range(1, len(t.ids)) if t.labels[i] != IGNORE))
        want = torch.tensor(want)
        for rows in (padded(texts), packed(texts)):
            for chunk in (1, 3, 256):
                got, counts = logprobs(decoder, rows, chunk)
                assert torch.allclose(got, want, atol=2e-3, rtol=1e-5), (family, chunk)
            assert counts.tolist() == [sum(x != IGNORE for x in t.labels[1:]) for t in texts]


def test_packed_texts_do_not_follow_each_other(models):
    "A text that learns from its first token on: nothing comes before that token, in a row of its own or a shared one."
    texts = [Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [8, 9]), Example([3, 4, 2, 1], [3, 4, 2, 1])]
    ours, row = models[1][1], packed(texts)
    same = lambda row: torch.allclose(logprobs(ours, padded(texts))[0], logprobs(ours, row)[0], atol=1e-4)
    assert same(row)
    assert not same(replace(row, labels=row.tokens)), "the first token of a text is learned behind the text before it"


def test_chunks_have_the_gradients_of_the_whole(models):
    ours, rows = models[1][0], padded([t for p in some_pairs() for t in p])
    z = ours(rows.tokens, counts=rows.counts)[:, :-1].log_softmax(-1)
    labels = rows.labels[:, 1:]
    plain = (z.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORE)).sum()
    want = gradients(ours, plain)
    for chunk in (1, 5, 1000): assert apart(gradients(ours, logprobs(ours, rows, chunk)[0].sum()), want) < 1e-5


def test_aot_compares_groups():
    "The order of pairs does not matter to AOT, and who is paired with whom does not to its unpaired form."
    g = torch.Generator().manual_seed(0)
    c, r, rc, rr = (-10 * torch.rand(6, generator=g) for _ in range(4))
    shuffle = torch.randperm(6, generator=g)
    total = lambda *v, kind: dpo_loss(*v, kind=kind)[0].sum()
    assert torch.allclose(total(c, r, rc, rr, kind="aot"), total(*(v[shuffle] for v in (c, r, rc, rr)), kind="aot"))
    alone, moved = (c, r, rc, rr), (c, r[shuffle], rc, rr[shuffle])
    assert torch.allclose(total(*alone, kind="aot_unpaired"), total(*moved, kind="aot_unpaired"))
    assert not torch.allclose(total(*alone, kind="sigmoid"), total(*moved, kind="sigmoid"))
    assert torch.allclose(dpo_loss(*(v[:1] for v in alone), kind="aot")[0], dpo_loss(*(v[:1] for v in alone))[0])


def test_smoothing_by_hand():
    "Two judges of whom one errs with the given probability: the expected loss."
    c, r = torch.tensor([-4.0, -9.0]), torch.tensor([-7.0, -2.0])
    zero = torch.zeros(2)
    for share in (0.0, 0.2, 0.5):
        want = (1 - share) * dpo_loss(c, r, zero, zero)[0] + share * dpo_loss(r, c, zero, zero)[0]
        assert torch.allclose(dpo_loss(c, r, zero, zero, label_smoothing=share)[0], want)


# ---- what cannot be done

LP = torch.tensor([-5.0, -3.0])
WRONG = {
    "beta NaN": dict(beta=math.nan), "beta infinite": dict(beta=math.inf), "beta a text": dict(beta="0.1"),
    "smoothing 1": dict(label_smoothing=1.0), "smoothing below 0": dict(label_smoothing=-0.1),
    "robust at one half": dict(kind="robust", label_smoothing=0.5), "no token": dict(
        kind="ipo", counts=(torch.tensor([1, 0]), torch.tensor([1, 1]))),
    "counts of other pairs": dict(kind="sigmoid_norm", counts=(torch.ones(3), torch.ones(3))),
}

@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_settings_that_make_no_loss(options):
    with pytest.raises(InputError): dpo_loss(LP, LP, LP, LP, **options)


VALUES = {"infinite": torch.tensor([-math.inf, -1.0]), "NaN": torch.tensor([-1.0, math.nan]),
          "whole": torch.tensor([-1, -2]), "three": torch.tensor([-1.0, -2.0, -3.0]),
          "a matrix": LP[None], "none": LP[:0], "losses": -LP}

@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_no_log_probability(value, place):
    values = [LP] * 4
    values[place] = value
    with pytest.raises(InputError): dpo_loss(*values)


def test_pairs_that_are_none(models):
    ours, good = models[1][0], some_pairs()
    with pytest.raises(InputError, match="pair 1"): paired([good[0], (good[1][0], good[2][1])])
    with pytest.raises(InputError, match="chosen text of pair 0 has an empty"):
        paired([(text([1, 2], []), text([1, 2], [3]))])
    with pytest.raises(InputError, match="shape"): paired(good, torch.zeros(4, 2))
    with pytest.raises(InputError, match="no pairs"): paired([])
    with pytest.raises(InputError, match="chunk"): token_logprobs(ours, paired(good).rows, 0)
    with pytest.raises(UnsupportedError, match="'orpo'"): preference_loss(ours, paired(good), "opro")
    only_first = Example([4, 5], [4, IGNORE])                              # learned, but nothing stands in front of it
    with pytest.raises(InputError, match="text 0"): logprobs(ours, padded([only_first]))
    tokenizer = SimpleNamespace()
    for messages in ([], [dict(role="user", content="Hi"), dict(role="assistant", content="Hello")]):
        with pytest.raises(InputError, match="leave the answer out"): pair(tokenizer, messages, "a", "b")
