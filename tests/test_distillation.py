"Distillation against trl's trainers on ragged batches, against sums by hand, and the mistakes that these notice."
import copy
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checks import apart, gradients, tiny
from models import small_model

from llm_workbench import Decoder
from llm_workbench.errors import CheckpointError, ContextLengthError, InputError, SourceError
from llm_workbench.files.safetensors import save_safetensors
from llm_workbench.finetuning import distillation as module
from llm_workbench.finetuning.data import IGNORE, Example, packed, padded
from llm_workbench.finetuning.distillation import (
    check_teacher,
    distillation_loss,
    divergence,
    load_targets,
    on_policy_rows,
    save_targets,
    teacher_targets,
)
from llm_workbench.finetuning.lora import LoRAConfig, adapt, trainable
from llm_workbench.inference.sampling import Sampler

GREEDY = Sampler(temperature=0.0)


def text(prompt, answer): return Example([*prompt, *answer], [IGNORE] * len(prompt) + list(answer))


def some_texts(seed=0, V=97):
    "Prompts and answers of many lengths, answers of one token among them."
    g = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(V, (k,), generator=g).tolist()
    return [text(draw(1 + i % 4), draw([1, 7, 3, 2, 9][i % 5])) for i in range(7)]


@pytest.fixture(scope="module")
def models():
    "A student and a wider, deeper teacher, as transformers has them and as ours."
    theirs = tiny(), tiny(seed=5, hidden_size=54, num_hidden_layers=3)
    with torch.no_grad():
        for hf in theirs:
            for p in hf.parameters(): p.mul_(0.8)
    ours = [Decoder.from_transformers(hf) for hf in theirs]
    ours[0].requires_grad_(True), ours[1].requires_grad_(False)
    return theirs, ours


def bare(cls, **settings):
    "A trainer of trl with its own loss methods and no training loop around it."
    trainer = cls.__new__(cls)
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, is_main_process=False)
    trainer.__dict__.update(dict(accelerator=accelerator, _is_vlm=False, model_kwarg_keys=(),
                                 _metrics=defaultdict(lambda: defaultdict(list)),
                                 _forward_redirection=lambda wrapper, inner, f, *a, **k: f(*a, **k)) | settings)
    return trainer


def trl_step(theirs, texts, beta, temperature=1.0):
    "A whole step by the stable trainer: prompts are filled up on the left, answers on the right."
    from trl.trainer.distillation_trainer import DistillationTrainer
    from trl.trainer.utils import pad
    cut = [sum(label == IGNORE for label in t.labels) for t in texts]
    sides = {"prompt": ([t.ids[:c] for t, c in zip(texts, cut)], "left"),
             "completion": ([t.ids[c:] for t, c in zip(texts, cut)], "right")}
    inputs = {}
    for name, (ids, side) in sides.items():
        inputs[f"{name}_ids"] = pad([torch.tensor(i) for i in ids], padding_value=0, padding_side=side)
        inputs[f"{name}_mask"] = pad([torch.ones(len(i), dtype=torch.long) for i in ids], 0, side)
    trainer = bare(DistillationTrainer, teacher_model=theirs[1], beta=float(beta), temperature=temperature)
    return trainer._compute_loss(theirs[0], inputs, None)[0]


def inputs_of(texts):
    rows = padded(texts)
    real = (torch.arange(rows.tokens.shape[1]) < torch.tensor(rows.counts)[:, None]).long()
    return dict(input_ids=rows.tokens, attention_mask=real, labels=rows.labels)


def gkd_step(theirs, texts, beta):
    "The same by the experimental trainer. Its temperature is used for sampling only."
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    return bare(GKDTrainer, teacher_model=theirs[1], beta=beta).compute_loss(theirs[0], inputs_of(texts))


def differs_from_trl(models, beta, temperature=1.0, hard=0.0):
    "Whether a whole step (loss, gradients of all weights) is another one than trl's; transformers adds hard labels."
    theirs, (ours, teacher) = models
    texts = some_texts()
    want = temperature**2 * trl_step(theirs, texts, beta, temperature)
    if hard: want = (1 - hard) * want + hard * theirs[0](**inputs_of(texts)).loss
    total, n = module.distillation_loss(ours, teacher, padded(texts), beta, temperature, hard, chunk=5)
    off = abs(total.item() / n - want.item()) / max(1, abs(want.item()))
    return off > 1e-6 or apart(gradients(ours, total / n), gradients(theirs[0], want, "model.")) > 3e-6


@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_a_whole_step_is_trls(models, beta, temperature, hard):
    assert not differs_from_trl(models, beta, temperature, hard)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_a_whole_step_is_that_of_gkd(models, beta):
    "In float64, which the kernel of the other trainer does not have: what is left there is its rounding and ours."
    theirs = [copy.deepcopy(hf).double() for hf in models[0]]
    ours, teacher = (Decoder.from_transformers(hf).double().requires_grad_(hf is theirs[0]) for hf in theirs)
    want = gkd_step(theirs, some_texts(), beta)
    total, n = distillation_loss(ours, teacher, padded(some_texts()), beta)
    assert abs(total.item() / n - want.item()) < 1e-6
    assert apart(gradients(ours, total / n), gradients(theirs[0], want, "model.")) < 1e-6


# ---- mistakes that these comparisons reject

between, log_probs, whole_loss = module._between, module._log_probs, module.distillation_loss

def wrong_direction(s, t, beta): return between(t, s, beta)
def weights_exchanged(s, t, beta):
    if beta in (0, 1): return between(s, t, beta)
    m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return (1 - beta) * module._kl(t, m) + beta * module._kl(s, m)
def mixture_exchanged(s, t, beta):
    if beta in (0, 1): return between(s, t, beta)
    m = torch.logaddexp(s + math.log(beta), t + math.log1p(-beta))
    return beta * module._kl(t, m) + (1 - beta) * module._kl(s, m)
def no_square(s, t, beta): return between(s, t, beta) / 2.5**2
def student_only(logits, temperature): return log_probs(logits, temperature if logits.requires_grad else 1.0)
def teacher_only(logits, temperature): return log_probs(logits, 1.0 if logits.requires_grad else temperature)
def real(rows): return torch.arange(rows.tokens.shape[1]) < torch.tensor(rows.counts)[:, None]
def on_the_prompt(rows): return torch.where(real(rows), rows.tokens, IGNORE)[:, 1:]
def on_the_padding(rows): return torch.where(real(rows), rows.labels, rows.tokens)[:, 1:]
def unshifted(rows): return rows.labels[:, :-1]
def per_text(*args, **options): return whole_loss(*args, **options)[0], 7
def mean_of_means(decoder, teacher, rows, *rest, **options):
    parts = [whole_loss(decoder, teacher, padded([t]), *rest, **options) for t in some_texts()]
    return sum(total / n for total, n in parts), len(parts)

MUTANTS = [("_between", wrong_direction, 0, 1.0), ("_between", wrong_direction, 1, 1.0),
           ("_between", weights_exchanged, 0.1, 1.0), ("_between", mixture_exchanged, 0.1, 1.0),
           ("_between", no_square, 0, 2.5), ("_log_probs", student_only, 0, 2.5), ("_log_probs", teacher_only, 1, 2.5),
           ("_targets", on_the_prompt, 0, 1.0), ("_targets", on_the_padding, 0, 1.0), ("_targets", unshifted, 0, 1.0),
           ("distillation_loss", per_text, 0, 1.0), ("distillation_loss", mean_of_means, 0, 1.0)]

@pytest.mark.parametrize("name, mutant, beta, temperature", MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_a_step_notices_mistakes(models, monkeypatch, name, mutant, beta, temperature):
    monkeypatch.setattr(module, name, mutant)
    assert differs_from_trl(models, beta, temperature)


def teacher_moves(models):
    "Whether a step of a student changes what a teacher over the same tensors says."
    ours = Decoder(models[1][0].config)
    before = ours.with_ops()                                          # another tree over the same tensors
    for p in ours.layers[1].parameters(): p.requires_grad_(False)     # not all of them train
    rows, kept = padded(some_texts()), before(torch.tensor([[1, 2]])).detach()
    try: total, n = module.distillation_loss(ours, before, rows, hard=0.5)
    except InputError: return False                                   # it is refused before anything moves
    (total / n).backward()
    torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], 0.1).step()
    return not torch.equal(before(torch.tensor([[1, 2]])), kept)


def test_a_teacher_that_trains_along_is_refused(models, monkeypatch):
    assert not teacher_moves(models)
    monkeypatch.setattr(module, "check_teacher", lambda decoder, teacher: None)
    assert teacher_moves(models)


def test_no_gradient_reaches_the_teacher(models):
    ours, teacher = models[1][0], Decoder.from_transformers(models[0][1]).requires_grad_(True)
    distillation_loss(ours, teacher, padded(some_texts()))[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    a, b = torch.randn(2, 3, 9, requires_grad=True)
    for beta in (0, 0.4, 1):
        s, t = a.detach().requires_grad_(), b.detach().requires_grad_()
        slopes = torch.autograd.grad(divergence(s, t, beta).sum(), (s, t), allow_unused=True)
        assert slopes[0].abs().sum() > 0 and slopes[1] is None


# ---- targets

def by_hand(theirs, texts, k, beta, temperature):
    "The divergence between groups of tokens, place by place in float64: k of the teacher's likeliest, and the others."
    total = 0.0
    for t in texts:
        p, q = ((hf.double()(torch.tensor([t.ids])).logits[0] / temperature).softmax(-1) for hf in theirs[::-1])
        for i in range(1, len(t.ids)):
            if t.labels[i] == IGNORE: continue
            top = p[i - 1].topk(k).indices.tolist()
            pq = torch.tensor([[x[i - 1, top].tolist() + [1 - x[i - 1, top].sum().item()]] for x in (p, q)])[:, 0]
            m = beta * pq[0] + (1 - beta) * pq[1]
            kl = lambda a, b: (a * (a / b).log()).sum()
            total += (kl(pq[0], pq[1]) if beta == 0 else kl(pq[1], pq[0]) if beta == 1
                      else beta * kl(pq[0], m) + (1 - beta) * kl(pq[1], m))
    for hf in theirs: hf.float()
    return temperature**2 * total.item()


def topk_is_wrong(models, k, beta=0, temperature=1.0):
    theirs, (ours, teacher) = models
    with torch.no_grad():
        want = by_hand(theirs, some_texts(), k, beta, temperature)
        targets = module.teacher_targets(teacher, some_texts(), k, temperature, batch=3)
        got = module.distillation_loss(ours, targets, padded(some_texts()), beta, temperature)[0].item()
    return abs(got / want - 1) > 1e-4


@pytest.mark.parametrize("k", [1, 5, 96])
@pytest.mark.parametrize("beta, temperature", [(0, 1.0), (0.3, 2.0), (1, 1.0)])
def test_the_likeliest_and_the_others(models, k, beta, temperature):
    assert not topk_is_wrong(models, k, beta, temperature)


def not_renormalised(scores, ids): return scores.gather(1, ids)
def others_ignored(scores, ids): return scores.gather(1, ids).log_softmax(-1)
def others_uniform(scores, ids):
    rest = scores.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([scores.gather(1, ids), rest - math.log(97 - ids.shape[1])], 1)

@pytest.mark.parametrize("mutant", [not_renormalised, others_ignored, others_uniform], ids=lambda m: m.__name__)
def test_a_list_notices_mistakes(models, monkeypatch, mutant):
    monkeypatch.setattr(module, "_grouped", mutant)
    assert topk_is_wrong(models, 5)


def test_all_but_one_is_the_whole(models):
    "With one token outside the list, losses and gradients are those of the live teacher."
    ours, teacher = models[1]
    targets = teacher_targets(teacher, some_texts(), 96)
    for beta in (0, 0.5, 1):
        want, got = (distillation_loss(ours, t, padded(some_texts()), beta, hard=0.2)[0] for t in (teacher, targets))
        assert torch.allclose(got, want, rtol=1e-5)
        assert apart(gradients(ours, got), gradients(ours, want)) < 1e-5


def test_targets_serve_any_batch_and_survive_the_disk(models, tmp_path):
    ours, teacher = models[1]
    texts = some_texts()
    targets = teacher_targets(teacher, texts, 9, 1.5, batch=2)
    save_targets(targets, tmp_path / "t.safetensors")
    kept = load_targets(tmp_path / "t.safetensors")
    loss = lambda told, rows: distillation_loss(ours, told, rows, 0.5, 1.5)
    for some in (texts, texts[::-1], texts[2:5], [texts[3]] * 2):
        (a, n), (b, m), (c, _) = (loss(t, r) for t, r in ((targets, padded(some)), (kept, packed(some)),
                                                          (kept, replace(padded(some), counts=padded(some).counts))))
        assert n == m == sum(t.n_learned for t in some) and torch.allclose(a, b, rtol=1e-4) and torch.equal(a, c)
    assert torch.equal(kept.ids, targets.ids) and torch.equal(kept.logprobs, targets.logprobs)
    assert kept.temperature == 1.5 and kept.vocab_size == 97


def test_targets_of_other_texts(models):
    ours, teacher = models[1]
    texts = some_texts()
    targets = teacher_targets(teacher, texts, 4)
    fails = lambda t, match: pytest.raises(InputError, match=match)
    one = texts[4]
    for other in (Example([*one.ids[:-1], 1 + one.ids[-1] % 90], [*one.labels[:-1], 1 + one.ids[-1] % 90]),
                  Example(one.ids, [*one.labels[:-1], IGNORE]), Example(one.ids[:-1], one.labels[:-1]),
                  some_texts(1)[0]):
        with fails(other, "text 1 is none of the 7"): distillation_loss(ours, targets, padded([texts[0], other]))
    with pytest.raises(InputError, match="at temperature 1, and the loss is at 2"):
        distillation_loss(ours, targets, padded(texts), temperature=2.0)
    for k in (0, 97, 2.0):
        with pytest.raises(InputError, match="k is"): teacher_targets(teacher, texts, k)
    with pytest.raises(InputError, match="no token"): teacher_targets(teacher, [text([1, 2], [])], 4)


def test_files_that_hold_no_targets(models, tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(SourceError): load_targets(path)
    save_safetensors({"ids": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no targets"): load_targets(path)
    targets = teacher_targets(models[1][1], some_texts(), 4)
    for broken in (dict(ids=targets.ids[:-1]), dict(ends=targets.ends - 1), dict(keys=targets.keys[1:]),
                   dict(logprobs=targets.logprobs[:, 1:]), dict(temperature="hot")):
        save_targets(replace(targets, **broken), path)
        with pytest.raises(CheckpointError, match="do not belong together"): load_targets(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError): load_targets(path)


# ---- arrangements, families, precisions

def test_arrangement_and_chunks_do_not_matter(models):
    ours, teacher = models[1]
    want, n = distillation_loss(ours, teacher, padded(some_texts()), 0.3, hard=0.5)
    slopes = gradients(ours, want)
    for rows in (padded(some_texts()), padded(some_texts(), pad=5), packed(some_texts())):
        for chunk in (1, 4, n, 1000):
            got, m = distillation_loss(ours, teacher, rows, 0.3, hard=0.5, chunk=chunk)
            assert m == n and torch.allclose(got, want, rtol=1e-5)
            assert apart(gradients(ours, 3 * got), {name: 3 * slope for name, slope in slopes.items()}) < 2e-5
    with torch.no_grad(): assert torch.allclose(distillation_loss(ours, teacher, rows, 0.3, hard=0.5, chunk=4)[0], want)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "mixtral"])
def test_a_family(models, family):
    "Logits are scaled and bounded as the family has it, on both sides; heads are tied or not."
    hf = small_model(family)
    other, rows = Decoder.from_transformers(hf).requires_grad_(True), padded(some_texts())
    learned = rows.labels[:, 1:] != IGNORE
    for student, teacher in ((other, models[1][1]), (models[1][0], other)):
        z = [m(rows.tokens, counts=rows.counts)[:, :-1][learned] for m in (student, teacher)]
        want = 4 * divergence(*z, 0.5, 2.0).sum()
        got, _ = distillation_loss(student, teacher, rows, 0.5, 2.0, chunk=6)
        assert torch.allclose(got, want, rtol=1e-5), family
        assert apart(gradients(student, got), gradients(student, want)) < 1e-5


def test_an_adapter_learns_from_its_base(models):
    "Frozen head, shared tensors: nothing to learn at first, and only the adapter learns then."
    base = models[1][1]
    student = adapt(base, LoRAConfig(r=2))
    total, n = distillation_loss(student, base, padded(some_texts()), 0)
    assert abs(total.item() / n) < 1e-5
    with torch.no_grad(): student.layers[0].mlp.down_proj.B.add_(0.5)
    found = gradients(student, distillation_loss(student, base, padded(some_texts()), 0)[0])
    assert found.keys() == trainable(student).keys() and max(g.abs().max() for g in found.values()) > 0


def test_half_precision_is_widened(models):
    ours, teacher = (Decoder.from_transformers(hf).to(torch.bfloat16).requires_grad_(True) for hf in models[0])
    total, n = distillation_loss(ours, teacher, padded(some_texts()), 0, chunk=4)
    total.backward()
    want = distillation_loss(*models[1], padded(some_texts()), 0)[0]
    assert total.dtype == torch.float32 and abs(total.item() / want.item() - 1) < 0.1
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in ours.parameters())


@pytest.mark.parametrize("beta", [0, 1e-6, 0.5, 1])
def test_extremes(beta):
    "Finite in float32 where models are sure of opposite things, and the value of float64."
    s, t = torch.zeros(4, 11), torch.zeros(4, 11)
    s[0, 0], t[0, 1], s[1, 2], t[1, 2], t[2], t[3, 4] = 80.0, 80.0, 1e4, 1e4, -1e4, -1e4
    leaf = s.clone().requires_grad_()
    loss = divergence(leaf, t, beta)
    slope, = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isfinite().all() and slope.isfinite().all()
    assert torch.allclose(loss.double(), divergence(s.double(), t.double(), beta), rtol=1e-5, atol=1e-6)


# ---- who writes, and who reads what

def test_rows_of_the_student_are_gkds(models):
    "Greedy answers with an end token somewhere: tokens, labels and what counts, as trl makes them."
    from transformers import GenerationConfig
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    hf, ours = models[0][0], models[1][0]
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]]
    ends = [on_policy_rows(ours, prompts, 6, sampler=GREEDY).tokens[0, 7].item()]      # the first answer's third
    mine = on_policy_rows(ours, prompts, 6, ends, GREEDY)
    inputs = dict(prompts=torch.tensor(prompts), prompt_attention_mask=torch.ones(3, 5, dtype=torch.long))
    tokens, mask, labels = GKDTrainer.generate_on_policy_outputs(
        hf, inputs, GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0))
    assert mine.counts == mask.sum(1).tolist() and mine.counts[0] <= 8
    T = mine.tokens.shape[1]
    assert torch.equal(mine.labels, labels[:, :T]) and (labels[:, T:] == IGNORE).all()
    assert torch.equal(mine.tokens * mask[:, :T], tokens[:, :T] * mask[:, :T])


def test_rows_of_the_student_by_seed(models):
    ours = models[1][0]
    prompts = [[1], [2, 3, 4], [5, 6]]
    drawn = [on_policy_rows(ours, prompts, 5, seed=seed).tokens for seed in (7, 7, 8)]
    assert torch.equal(*drawn[:2]) and not torch.equal(*drawn[1:])
    torch.manual_seed(0); a = on_policy_rows(ours, prompts, 5).tokens
    torch.manual_seed(0); b = on_policy_rows(ours, prompts, 5).tokens
    assert torch.equal(a, b)
    total, n = distillation_loss(ours, models[1][1], on_policy_rows(ours, prompts, 5), 1)
    total.backward()
    assert n == 15
    with pytest.raises(InputError, match="no prompt"): on_policy_rows(ours, [], 5)
    with pytest.raises(ContextLengthError): on_policy_rows(ours, prompts, 500)


def test_a_teacher_that_reads_more(models):
    "The same answers behind other prompts: place for place the divergence of what each reads."
    ours, teacher = models[1]
    texts, more = some_texts(), []
    for t in texts: more.append(Example([11, 12, 13, *t.ids], [IGNORE] * 3 + t.labels))
    want = 0.0
    for t, m in zip(texts, more):
        n = t.n_learned
        z = [model(torch.tensor([x.ids]))[0, -n - 1:-1] for model, x in ((ours, t), (teacher, m))]
        want += divergence(*z, 0).sum()
    for seen in (padded(more), packed(more)):
        got, _ = distillation_loss(ours, teacher, padded(texts), 0, seen=seen)
        assert torch.allclose(got, want, rtol=1e-4)
    assert not torch.allclose(distillation_loss(ours, teacher, padded(texts), 0)[0], want, rtol=1e-2)
    targets = teacher_targets(teacher, more, 96)
    assert torch.allclose(distillation_loss(ours, targets, padded(texts), 0, seen=padded(more))[0], want, rtol=1e-4)
    with pytest.raises(InputError, match="other learned tokens"):
        distillation_loss(ours, teacher, padded(texts), 0, seen=padded(more[::-1]))


# ---- what cannot be done

WRONG = {"beta below 0": dict(beta=-0.1), "beta above 1": dict(beta=1.1), "beta NaN": dict(beta=math.nan),
         "beta a text": dict(beta="0.5"), "beta a bool": dict(beta=True), "temperature 0": dict(temperature=0),
         "temperature infinite": dict(temperature=math.inf), "hard above 1": dict(hard=1.5),
         "hard NaN": dict(hard=math.nan), "chunk 0": dict(chunk=0)}

@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_settings_that_make_no_loss(models, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is"):
        distillation_loss(*models[1], padded(some_texts()), **options)


def test_what_does_not_belong_together(models):
    ours, teacher = models[1]
    other = Decoder(replace(ours.config, vocab_size=96))
    for wrong in (other, teacher_targets(other, [text([1], [2, 3])], 4)):
        with pytest.raises(InputError, match="vocabulary of 97 tokens and the teacher one of 96"):
            distillation_loss(ours, wrong, padded([text([1], [2, 3])]))
    for rows in (padded([text([1, 2], [])]), padded([Example([4, 5], [4, IGNORE])])):
        with pytest.raises(InputError, match="no learned token"): distillation_loss(ours, teacher, rows)
    with pytest.raises(InputError, match="same vocabulary"): divergence(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(InputError, match="train along"): check_teacher(ours, ours)
