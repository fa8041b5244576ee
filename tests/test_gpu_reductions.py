"Softmax, cross-entropy and draws by Triton against float64; interpreted without a GPU, compiled with one."
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_checks import DEVICE, DTYPES, as_accurate, guarded, randn, rejects
from llm_workbench.errors import InputError
from llm_workbench.inference.sampling import Sampler
from llm_workbench.kernels import reductions
from llm_workbench.kernels.launching import Launch, interpreting, resources

pytestmark = pytest.mark.triton
np.seterr(all="ignore")          # the interpreter's numpy: what is masked away may be infinite
few = settings(max_examples=6, deadline=None, derandomize=True)

# a row longer than what stays in registers, and than one tile of the loop, at widths that the interpreter can bear
SMALL = dict(KEEP=64, LOOP=True, LANES=8, VEC=8, STAGES=2, num_warps=1, per_sm=1)
HARD = {"large": lambda x: x * 1e4, "shifted": lambda x: x + 1e4, "equal": lambda x: x * 0 + 3,
        "some -inf": lambda x: x.masked_fill(x > 0.5, float("-inf")), "-inf first": lambda x: torch.cat([x[:, :0],
            x * 0 + float("-inf")], 1).index_copy(1, torch.tensor([x.shape[1] - 1], device=x.device), x[:, -1:]),
        "all -inf in one row": lambda x: torch.cat([x[:1] * 0 + float("-inf"), x[1:]]),
        "+inf": lambda x: x.masked_fill(x > 2.0, float("inf")),
        "finite masks": lambda x: x.masked_fill(x > 0, torch.finfo(x.dtype).min)}


# --- softmax

def check_softmax(module=reductions, shape=(3, 300), dtype=torch.float32, change=lambda x: x, **how):
    x = change(randn(*shape, dtype=dtype, scale=2.0))
    with guarded(module): y = module.launch_softmax(x, **how)
    # an exponential by hardware may be 2 units off
    return as_accurate(y, x.double().softmax(-1), x.softmax(-1), floor=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [{}, dict(config=SMALL), dict(splits=4)], ids=["registers", "loop", "splits"])
def test_softmax_ways(dtype, how):
    for shape in ((3, 300), (1, 1), (4, 64), (2, 65), (1, 193)): check_softmax(shape=shape, dtype=dtype, **how)


@pytest.mark.parametrize("name", HARD)
def test_softmax_hard_rows(name):
    for how in ({}, dict(config=SMALL), dict(splits=4)): check_softmax(change=HARD[name], **how)


@few
@given(st.integers(1, 5), st.integers(1, 400), st.sampled_from(DTYPES), st.sampled_from([{}, dict(config=SMALL),
                                                                                         dict(splits=2)]))
def test_softmax_shapes(rows, columns, dtype, how): check_softmax(shape=(rows, columns), dtype=dtype, **how)


def test_softmax_strides_and_no_rows():
    x = randn(6, 40)
    for view in (x[::2], x[:, 3:17], x.T, x[:, ::2], x.view(2, 3, 40), x.view(2, 3, 40).transpose(0, 1),
                 x[:1].expand(4, 40)):
        as_accurate(reductions.softmax(view), view.double().softmax(-1), view.softmax(-1), floor=2.0)
    assert reductions.softmax(x[:0]).shape == (0, 40) and reductions.softmax(x[0]).shape == (40,)


# --- cross-entropy

def targets_for(n, V, ignore=-100, seed=1):
    t = torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))
    if n > 2: t[1] = ignore
    return t.to(DEVICE)


def exact(x, t, smoothing=0.0, z_loss=0.0, reduction="mean", ignore=-100):
    "Loss and gradient in float64, by torch."
    x = x.detach().double().requires_grad_(True)
    losses = F.cross_entropy(x, t.long(), reduction="none", ignore_index=ignore, label_smoothing=smoothing)
    if z_loss: losses = losses + z_loss * x.logsumexp(-1) ** 2 * (t != ignore)
    loss = losses if reduction == "none" else losses.sum() / ((t != ignore).sum() if reduction == "mean" else 1)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def eager(x, t, smoothing=0.0, z_loss=0.0, reduction="mean", ignore=-100):
    "The loss in float32 and the gradient in x's type, by torch."
    x = x.detach().requires_grad_(True)
    loss = F.cross_entropy(x.float(), t.long(), reduction=reduction, ignore_index=ignore, label_smoothing=smoothing)
    if z_loss:
        extra = z_loss * x.float().logsumexp(-1) ** 2 * (t != ignore)
        loss = loss + (extra if reduction == "none" else extra.sum() / ((t != ignore).sum() if reduction == "mean"
                                                                        else 1))
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def check_loss(module=reductions, shape=(4, 300), dtype=torch.float32, change=lambda x: x, config=None, **options):
    "Both ways to a gradient: written over the logits, and by a backward pass."
    x, t = change(randn(*shape, dtype=dtype, scale=2.0)), targets_for(*shape)
    named = {dict(smoothing="label_smoothing").get(k, k): v for k, v in options.items()}
    (loss, grad), (same_loss, same_grad) = exact(x, t, **options), eager(x, t, **options)
    # torch's is NaN for an ignored row with an infinity
    grad, same_grad = (g.masked_fill((t == -100)[:, None], 0.0) for g in (grad, same_grad))
    with guarded(module):
        own = x.clone()
        got, g = module.cross_entropy_grad_(own, t, config=config, **named)
        assert g.data_ptr() == own.data_ptr()
        as_accurate(got, loss, same_loss, floor=4.0)
        as_accurate(g, grad, same_grad, floor=2.0)
        losses, stats = module.launch_cross_entropy(x, t, None, -100, options.get("smoothing", 0.0),
                                                    options.get("z_loss", 0.0), config)
        of_rows = {**options, "reduction": "none"}
        as_accurate(losses, exact(x, t, **of_rows)[0], eager(x, t, **of_rows)[0], floor=4.0)
        n = (t != -100).sum() if options.get("reduction", "mean") == "mean" else torch.ones((), device=DEVICE)
        g = module.launch_cross_entropy_backward((1 / n.float()).view(1), x, t, stats, -100,
                                                 options.get("smoothing", 0.0), options.get("z_loss", 0.0))
        as_accurate(g, grad, same_grad, floor=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, SMALL], ids=["registers", "loop"])
def test_loss_and_gradient(dtype, config):
    for shape in ((4, 300), (1, 1), (2, 65)): check_loss(shape=shape, dtype=dtype, config=config)


@pytest.mark.parametrize("options", [dict(smoothing=0.1), dict(z_loss=0.02), dict(smoothing=0.2, z_loss=0.01,
    reduction="sum"), dict(reduction="none")], ids=str)
def test_loss_options(options):
    for config in (None, SMALL): check_loss(config=config, **options)


@pytest.mark.parametrize("name", [n for n in HARD if "-inf" not in n or "all" in n])
def test_loss_hard_rows(name):
    for config in (None, SMALL): check_loss(change=HARD[name], config=config)


def test_loss_of_a_target_at_minus_infinity():
    x, t = randn(3, 50), torch.tensor([4, 5, -100], device=DEVICE)
    x[0, 4], x[1, 7] = float("-inf"), float("-inf")
    (loss, grad), (_, same) = exact(x, t, reduction="none"), eager(x, t, reduction="none")
    got, g = reductions.cross_entropy_grad_(x.clone(), t, reduction="none")
    assert got[0] == float("inf") and got[2] == 0
    as_accurate(got[1:], loss[1:], loss[1:].float(), floor=4.0)
    as_accurate(g, grad, same, floor=2.0)


@few
@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from(DTYPES), st.sampled_from([None, SMALL]),
       st.sampled_from([0.0, 0.1]))
def test_loss_shapes(rows, columns, dtype, config, smoothing): check_loss(shape=(rows, columns), dtype=dtype,
                                                                          config=config, smoothing=smoothing)


def test_loss_is_torchs():
    "Signature and results of `F.cross_entropy`: reductions, ignore_index, integer types, views, shapes, nothing to do."
    x, t = randn(6, 50), targets_for(6, 50, ignore=3)
    for reduction in reductions.REDUCTIONS:
        for smoothing in (0.0, 0.3):
            want = F.cross_entropy(x, t, ignore_index=3, reduction=reduction, label_smoothing=smoothing)
            for targets in (t, t.int()):
                torch.testing.assert_close(reductions.cross_entropy(x, targets, ignore_index=3, reduction=reduction,
                                                                    label_smoothing=smoothing), want)
    for view in (x[::2], x[:, 5:30], randn(50, 6).T, x[:1].expand(6, 50)):
        some = targets_for(len(view), view.shape[1])
        torch.testing.assert_close(reductions.cross_entropy(view, some), F.cross_entropy(view, some))
    torch.testing.assert_close(reductions.cross_entropy(x.view(2, 3, 50), t.view(2, 3), reduction="none"),
                               F.cross_entropy(x, t, reduction="none").view(2, 3))
    empty = reductions.cross_entropy(x[:0], t[:0]), reductions.cross_entropy(x, torch.full_like(t, -100))
    assert all(e.isnan() for e in empty) and reductions.cross_entropy(x[:0], t[:0], reduction="sum") == 0
    assert reductions.cross_entropy(x, torch.full_like(t, 50), reduction="none").isnan().all()


@pytest.mark.parametrize("reduction", reductions.REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_loss_through_autograd(reduction, inplace):
    "The gradient that comes in is used: per row, as a factor, and 1."
    x, t = randn(4, 60), targets_for(4, 60)
    for weight in (1.0, 2.5) if reduction != "none" else (1.0, torch.arange(4.0, device=DEVICE)):
        ours, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        (reductions.cross_entropy(ours * 1.5, t, reduction=reduction, inplace=inplace) * weight).sum().backward()
        (F.cross_entropy(theirs * 1.5, t, reduction=reduction) * weight).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_in_place_tells_whoever_kept_the_logits():
    x, t = randn(4, 60).requires_grad_(True), targets_for(4, 60)
    loss = reductions.cross_entropy(x.exp(), t, inplace=True)             # exp needs its output for its own gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()
    loss = reductions.cross_entropy(x * 2, t, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"): loss.backward()


def test_gradients_in_float64():
    x, t = randn(3, 6, dtype=torch.float64).requires_grad_(True), targets_for(3, 6)
    assert torch.autograd.gradcheck(reductions.softmax, x)
    # exact in float32, as a kernel's numbers are
    for options in ({}, dict(label_smoothing=0.125, z_loss=0.0625, reduction="none")):
        assert torch.autograd.gradcheck(lambda x: reductions.cross_entropy(x, t, **options), x)


def test_custom_ops():
    x, t = randn(3, 20).requires_grad_(True), targets_for(3, 20)
    _, stats = reductions.launch_cross_entropy(x.detach(), t)
    torch.library.opcheck(reductions.softmax_op, (x,))
    torch.library.opcheck(reductions.cross_entropy_op, (x, t, -100, 0.1, 0.01))
    torch.library.opcheck(reductions.cross_entropy_backward_op, (torch.ones(3, device=DEVICE), x.detach(), t, stats,
                                                                 -100, 0.1, 0.01))


def test_plain_twins():
    x, t = randn(4, 60), targets_for(4, 60)
    for options in ((-100, 0.0, 0.0), (-100, 0.1, 0.02)):
        (losses, stats), (plain, plain_stats) = reductions.launch_cross_entropy(x, t, None,
            *options), reductions.plain_losses(x, t, *options)
        torch.testing.assert_close(losses, plain)
        torch.testing.assert_close(stats[:, t != -100], plain_stats[:, t != -100])
        up = randn(4, seed=3)
        torch.testing.assert_close(reductions.launch_cross_entropy_backward(up, x, t, stats, *options),
                                   reductions.plain_backward(up, x, t, stats, *options))


# --- draws

# a group is (at 8 bytes a lane) some tokens of every 16: several in small rows
DRAW = dict(LANES=4, SLOTS=4, STAGES=2, num_warps=1)


def kept_plain(logits, t=1.0, k=None, p=None, m=None):
    "The kept tokens of one row in float64: whatever is strictly worse than a full set is cut, ties stay together."
    x = logits.double() / t
    kept = x > float("-inf")
    if k is not None and k < len(x): kept &= x >= x.topk(k).values[-1]
    if p is not None and p < 1:
        w = torch.where(kept, x, float("-inf")).softmax(-1)
        above = (w[None, :] * (x[None, :] > x[:, None])).sum(-1)
        kept &= (above < p) | (x == x.max())
    if m: kept &= x >= x.max() + math.log(m)
    return kept


def check_draws(module=reductions, V=100, dtype=torch.float32, cases=None, scale=2.0, quantum=None, seed=0,
                config=None):
    "One draw for each setting: the token is kept, and its log-probability says how much weight is kept with it."
    cases = cases or [dict(), dict(k=1), dict(k=7), dict(k=V), dict(k=V + 5), dict(p=0.0), dict(p=0.5), dict(p=0.95),
                      dict(p=1.0), dict(m=0.1), dict(m=1.0),
                      dict(k=20, p=0.7), dict(k=30, p=0.9, m=0.05, t=1.7), dict(p=0.3, t=0.2), dict(t=3.0, p=0.99)]
    x = randn(1, V, dtype=torch.float32, seed=seed, scale=scale)
    if quantum: x = (x / quantum).round() * quantum                      # many ties
    x = x.to(dtype).expand(len(cases), V)
    column = lambda name, off, kind: torch.tensor([c.get(name, off) for c in cases], dtype=kind, device=DEVICE)
    with guarded(module):
        tokens, logp = module.launch_sample(x, column("t", 1.0, torch.float32), column("k", V, torch.int64),
                                            column("p", 1.0, torch.float32),
                                            column("m", 0.0, torch.float32), seed=5, step=3, config=config)
    for case, token, got in zip(cases, tokens.tolist(), logp.tolist()):
        kept = kept_plain(x[0].cpu(), **case)
        want = (x[0].cpu().double() / case.get("t", 1.0)).masked_fill(~kept, float("-inf")).log_softmax(-1)
        assert 0 <= token < V and kept[token], f"{case}: token {token} is not kept"
        assert abs(got - want[token].item()) < 2e-5, f"{case}: log-probability {got}, not {want[token].item()}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_come_from_the_kept_set(dtype): check_draws(dtype=dtype, config=DRAW if dtype == torch.float32 else None)


def test_ties_stay_together():
    check_draws(quantum=0.5)
    check_draws(scale=0.0, cases=[dict(k=3), dict(p=0.5), dict(m=0.5), dict()])


@few
@given(st.integers(1, 200), st.sampled_from(DTYPES), st.integers(1, 210), st.floats(0.0, 0.999), st.floats(0.0, 1.0),
       st.floats(0.1, 5.0), st.integers(0, 9))
def test_any_setting(V, dtype, k, p, m, t, seed):
    k, t = min(k, V), float(np.float32(t))
    check_draws(V=V, dtype=dtype, seed=seed, cases=[dict(k=k, t=t), dict(p=float(np.float32(p))),
                                                    dict(k=k, p=0.8, m=float(np.float32(m)), t=t)])


def chi_square(counts, probs):
    "How likely counts at least this far from probs are. Tokens that are rarer than 5 times are put together."
    n = counts.sum()
    order = probs.argsort(descending=True)
    counts, want = counts[order].double(), (probs * n)[order].double()
    many = int((want >= 5).sum())
    if many < len(want): counts, want = (torch.cat([x[:many], x[many:].sum()[None]]) for x in (counts, want))
    counts, want = counts[want > 0], want[want > 0]
    distance = ((counts - want) ** 2 / want).sum()
    return torch.special.gammaincc(torch.tensor((len(want) - 1) / 2, dtype=torch.float64), distance / 2).item()


def draws(x, n, config=None, **how):
    "How often each token comes in n draws from one row."
    at_once = n if DEVICE == "cpu" else 2**15
    tokens = torch.cat([reductions.launch_sample(x.expand(min(at_once, n - i), -1), seed=11, step=i, config=config,
                                                 **how)[0] for i in range(0, n, at_once)])
    assert (tokens >= 0).all()
    return tokens.bincount(minlength=x.shape[1]).cpu()


def test_draws_are_as_frequent_as_likely():
    "Chi-square, p > 0.01: groups of several tokens, some cut."
    n = 120 if DEVICE == "cpu" else 1_000_000
    x = torch.linspace(0, 2.2, 23, device=DEVICE)[None].roll(9, 1)
    for how in (dict(min_p=0.2), dict(), dict(top_k=12, top_p=0.8))[:1 if DEVICE == "cpu" else 3]:
        kept = kept_plain(x[0].cpu(), k=how.get("top_k"), p=how.get("top_p"), m=how.get("min_p"))
        probs = x[0].cpu().double().masked_fill(~kept, float("-inf")).softmax(-1)
        counts = draws(x, n, DRAW, **how)
        assert (p := chi_square(counts, probs)) > 0.01, (how, p)
        assert chi_square(counts, probs.flip(0)) < 0.01                         # and the test can tell


def test_same_numbers_same_draws():
    x = randn(6, 40)
    first = reductions.launch_sample(x, seed=3, step=1)[0]
    assert torch.equal(first, reductions.launch_sample(x, seed=3, step=1)[0])
    assert torch.equal(first, reductions.launch_sample(x, seed=3, step=torch.ones(6, dtype=torch.int64,
                                                                                  device=DEVICE))[0])
    assert not torch.equal(first, reductions.launch_sample(x, seed=3, step=2)[0])
    assert not torch.equal(first, reductions.launch_sample(x, seed=4, step=1)[0])
    seeds = torch.arange(6, device=DEVICE) + 2**40
    of_own = reductions.launch_sample(x, seed=seeds, top_p=0.9)[0]
    order = torch.tensor([4, 2, 0], device=DEVICE)
    # whoever else is there
    assert torch.equal(of_own[order], reductions.launch_sample(x[order], seed=seeds[order], top_p=0.9)[0])
    same = x[:1].expand(6, 40)
    assert len(reductions.launch_sample(same, seed=3)[0].unique()) > 1  # rows that share a seed differ


def test_as_the_sampler():
    "A Sampler's settings, penalties and greedy rows; and what cannot be drawn from."
    x = randn(5, 60, scale=2.0)
    counts = torch.zeros(5, 60, device=DEVICE)
    counts[:, :20] = 2
    for s in (Sampler(), Sampler(top_k=9, top_p=0.8, temperature=0.7), Sampler(min_p=0.2, repetition_penalty=1.3,
                                                                               frequency_penalty=0.2),
              Sampler(temperature=torch.tensor([0.0, 1.0, 0.5, 2.0, 0.0], device=DEVICE),
                      top_p=torch.tensor([0.9, 1.0, 0.0, 0.5, 1.0], device=DEVICE))):
        tokens, logp = reductions.sample(x, s, seed=1, counts=counts)
        want = s.adjust(x, counts).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logp, want, atol=2e-5, rtol=0)
    greedy = Sampler(temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)
    x[2, 7], x[2, 31] = 20.0, 20.0  # the first of equals
    assert torch.equal(reductions.sample(x, greedy)[0], x.argmax(-1)) and (reductions.sample(x, greedy)[1] == 0).all()
    x[0, 3], x[1, 3], x[2] = float("nan"), float("inf"), float("-inf")
    for s in (Sampler(), Sampler(top_k=4, top_p=0.9), greedy):
        tokens, logp = reductions.sample(x, s)
        assert tokens[:3].tolist() == [-1, -1, -1] and (tokens[3:] >= 0).all() and logp[:3].isnan().all()
    masked = torch.full((2, 60), float("-inf"), device=DEVICE)
    masked[0, 5], masked[1, 6:8] = -3e38, -1e-45
    assert reductions.launch_sample(masked, top_k=5, top_p=0.9)[0].tolist()[0] == 5
    assert reductions.launch_sample(masked, top_k=1, top_p=0.9)[0].tolist()[1] in (6, 7)
    assert reductions.launch_sample(x[:0])[0].shape == (0,)


# --- wrong variants

WRONG = {   # what is wrong: old text, new text, the check that must not pass
    "softmax: sums of an earlier maximum are kept as they were": ("sums = sums * tl.exp2((most - larger) * LOG2E) +",
        "sums = sums +", lambda m: check_softmax(m, config=SMALL)),
    "softmax: the padding counts": ('mask=at < n_cols, other=float("-inf"))', "mask=at < n_cols, other=0.0)",
                                    lambda m: check_softmax(m)),
    "softmax: the loop writes a tile further on": ("there = n_loop - TILE - start + lane",
        "there = n_loop - start + lane", lambda m: check_softmax(m, config=SMALL)),
    "join: slices are added up as if their maxima were one": ("tl.load(parts + SPLITS) * tl.exp(tops - top)",
        "tl.load(parts + SPLITS)", lambda m: check_softmax(m, splits=4)),
    "cross-entropy: an ignored row keeps its logits": ("if not valid:", "if row < 0:", lambda m: check_loss(m)),
    "cross-entropy: one for the target is not taken off": ("- of_all - of_target", "- of_all", lambda m: check_loss(m)),
    "cross-entropy: z-loss without its gradient": ("factor * (1 + 2 * z_loss * lse) / total", "factor / total",
                                                   lambda m: check_loss(m, z_loss=0.02)),
    "backward: the sum is forgotten": ("(top + tl.log(total))) / total)", "(top + tl.log(total))))",
                                       lambda m: check_loss(m)),
    "draws: top-k one short": ("if MASS else wanted ", "if MASS else wanted - 1 ",
                               lambda m: check_draws(m, cases=[dict(k=k) for k in (2, 5, 9, 20)])),
    "draws: the nucleus stops before it reaches p": ("want = tl.maximum(wanted * total, 1e-37)",
        "want = tl.maximum(0.9 * wanted * total, 1e-37)", lambda m: check_draws(m,
            cases=[dict(p=p) for p in (0.5, 0.8, 0.95)])),
    "draws: top-p of all tokens, not of the k": ("n_cols, floor, lo, p, top", "n_cols, -1e30, lo, p, top",
                                                 lambda m: check_draws(m, cases=[dict(k=20, p=0.7), dict(k=9, p=0.8)])),
    "draws: temperature after the filters": ("w = tl.exp2((x - top) * scale) if MASS else tl.full(x.shape",
        "w = tl.exp2((x - top) * LOG2E) if MASS else tl.full(x.shape", lambda m: check_draws(m, cases=[dict(p=0.5,
            t=3.0), dict(p=0.8, t=0.4)])),
}


def variant(tmp_path, old, new):
    "The module with `old` replaced, under another name; its ops get a namespace of their own."
    source = Path(reductions.__file__).read_text()
    assert old in source, "the variant's text is gone"
    source = source.replace(old, new).replace("llm_workbench::", "wrong_variant::").replace("from ..",
        "from llm_workbench.").replace("from .", "from llm_workbench.kernels.")
    path = tmp_path / "wrong_variant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("wrong_variant", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["wrong_variant"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variants_are_rejected(name, tmp_path):
    old, new, check = WRONG[name]
    check(reductions)
    assert rejects(check, variant(tmp_path, old, new)), f"nobody notices: {name}"


# --- what is refused, what the compiler makes of it

def test_bad_input():
    x, t = randn(4, 30), targets_for(4, 30)
    for call in (lambda: reductions.softmax(t), lambda: reductions.softmax(x[0, 0]),
                 lambda: reductions.softmax(x[:, :0]), lambda: reductions.launch_softmax(x, splits=3),
                 lambda: reductions.cross_entropy(x, t[:2]), lambda: reductions.cross_entropy(x, t.float()),
                 lambda: reductions.cross_entropy(x, t, reduction="max"),
                 lambda: reductions.cross_entropy(randn(30, 4).T, t, inplace=True),
                 lambda: reductions.scale_(x, randn(3)), lambda: reductions.launch_sample(x[0]),
                 lambda: reductions.launch_sample(x.double()), lambda: reductions.launch_sample(x, top_k=torch.ones(3,
                     dtype=torch.int64, device=DEVICE)),
                 lambda: reductions.softmax(x.to("meta"))):
        with pytest.raises(InputError): call()


NAME = "llm_workbench.kernels.reductions"

def launches():
    "What the launchers start on a GPU."
    def row(kernel, types, n, size, **more):
        c = dict(reductions.row_config(n, size))
        warps, _ = c.pop("num_warps"), c.pop("per_sm")
        return Launch(f"{NAME}:{kernel}", types, dict(c, DOUBLE=False, **more), warps,
                      label=f"{kernel} {types[0][1:]} {n} {more.get('GRAD', '')}".strip())
    ce = lambda t: [t, t, "*i64", "*fp32", "*fp32", "*fp32", "i32:16", "i32:16", "i32:16", "i32:16", "i32", "fp32",
                    "fp32"]
    for t, size, widths in (("*bf16", 2, (8192, 32768, 65536, 131072)), ("*fp32", 4, (131072,))):
        for n in widths:
            if size == 2 and n > 8192: yield row("softmax_kernel", [t, t] + 4 * ["i32:16"], n, size)
            yield row("cross_entropy_kernel", ce(t), n, size, GRAD=True, SMOOTH=False)
    yield row("cross_entropy_kernel", ce("*bf16"), 131072, 2, GRAD=False, SMOOTH=False)
    for t, vec in (("*bf16", 8), ("*fp32", 4)):
        s = reductions.SAMPLING[16 // vec]
        yield Launch(f"{NAME}:sample_kernel", [t, "*i64", "*fp32", "*fp32", "fp32", "i32", "fp32", "fp32", "i32",
                                               "i32", "i32:16", "i32:16"],
                     dict(TOP_K=True, TOP_P=True, MIN_P=True, **dict.fromkeys(["ROWS_T", "ROWS_K", "ROWS_P", "ROWS_M",
                                                                               "ROWS_SEED", "ROWS_STEP"], False),
                          LANES=s["LANES"], SLOTS=s["SLOTS"], STAGES=s["STAGES"], VEC=vec, TILES=32, SHIFT=0
                          if vec == 4 else 16), s["num_warps"], label=f"sample_kernel {t[1:]}")
    split = dict(SPLITS=32, **reductions.SPLIT, DOUBLE=False)
    yield Launch(f"{NAME}:softmax_part_kernel", ["*bf16", "*fp32", "i32:16", "i32:16", "i32:16"],
                 dict(split, STAGES=2), 8)
    yield Launch(f"{NAME}:softmax_join_kernel", ["*bf16", "*fp32", "*bf16", "i32:16", "i32:16", "i32:16", "i32:16"],
                 split, 8)
    yield Launch(f"{NAME}:cross_entropy_backward_kernel", ["*bf16", "*bf16", "*i64", "*fp32", "*fp32", "i32:16", "i32",
                                                           "i32:16", "i32:16", "i32", "fp32", "fp32"],
                 dict(BLOCK=4096, DOUBLE=False), 8)


def test_compiled_for_hopper():
    table = resources(*launches())
    print(table.to_string())
    fits = (table.spills == 0) & (table["stack"] == 0) & (table.shared <= 227 * 1024)
    assert fits.all(), table.to_string()
    memory = table[table.index.str.contains("softmax_kernel|cross_entropy")]
    assert (memory.wide_loads + memory.cp_async > 0).all()


# --- real sizes

@pytest.mark.cuda
@pytest.mark.parametrize("columns, dtype", [(4096, torch.bfloat16), (32768, torch.bfloat16), (32768, torch.float32),
                                            (50257, torch.float16),
                                            (131072, torch.bfloat16), (131072, torch.float32),
                                            (262144, torch.bfloat16)])
def test_real_widths(columns, dtype):
    rows = 140  # more than the chip holds at once: programs take several rows
    check_softmax(shape=(rows, columns), dtype=dtype)
    for splits in (1, 32): check_softmax(shape=(3, columns), dtype=dtype, splits=splits)
    check_loss(shape=(rows, columns), dtype=dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_draws(dtype):
    "A vocabulary of 151,936: kept weight by log-probability, and a million draws."
    V = 151936
    x = randn(1, V, scale=2.0).to(dtype)
    p = torch.tensor([0.05, 0.5, 0.9, 0.99, 0.999, 1.0], device=DEVICE)
    tokens, logp = reductions.launch_sample(x.expand(6, V), top_p=p)
    values, order = x[0].double().sort(descending=True)
    for i, share in enumerate(p.tolist()):
        w = values.softmax(-1)
        last = values[int((w.cumsum(-1) - w < share).sum()) - 1]
        mass = w[values >= last].sum()
        want = (x[0, tokens[i]].double() - values.logsumexp(-1) - mass.log()).item()
        assert abs(logp[i].item() - want) < 1e-3 if share > 0.99 else abs(logp[i].item() - want) < 5e-5, (share,
            logp[i].item(), want)
    peaked = (x + torch.linspace(0, 14, V, device=DEVICE) ** 2 / 14).to(dtype)
    kept = kept_plain_sorted(peaked[0].double(), 0.9)
    probs = peaked[0].double().masked_fill(~kept, float("-inf")).softmax(-1).cpu()
    n = 2**20
    assert chi_square(draws(peaked, n, top_p=0.9), probs) > 0.01


def kept_plain_sorted(x, p):
    "`kept_plain` for top-p at sizes where every pair is too much; ties stay together."
    values, _ = x.sort(descending=True)
    w = values.softmax(-1)
    return x >= values[int((w.cumsum(-1) - w < p).sum()) - 1]


@pytest.mark.cuda
def test_inside_torch_compile_and_graphs():
    x, t = randn(64, 5000, dtype=torch.bfloat16), targets_for(64, 5000)
    compiled = torch.compile(lambda x: reductions.cross_entropy(x * 2, t), fullgraph=True)
    a, b = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    compiled(a).backward()
    F.cross_entropy((b * 2).float(), t).backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=2e-2)
    step = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    reductions.launch_sample(x, top_p=0.9, step=step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): tokens, _ = reductions.launch_sample(x, top_p=0.9, step=step)
    graph.replay()
    first = tokens.clone()
    step += 1
    graph.replay()
    assert torch.equal(first, reductions.launch_sample(x, top_p=0.9, step=step - 1)[0]) and not torch.equal(first,
                                                                                                            tokens)
