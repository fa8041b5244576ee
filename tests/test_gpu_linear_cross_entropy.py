"The last matrix and the loss in one: against float64, in chunks; interpreted without a GPU, compiled with one."
import importlib.util
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
from llm_workbench.kernels import linear_cross_entropy as lce
from llm_workbench.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.triton
np.seterr(all="ignore")          # the interpreter's numpy: what is masked away may be infinite


def inputs(N, C, V, dtype=torch.float32):
    h, w = randn(N, C, dtype=dtype), randn(V, C, dtype=dtype, seed=1, scale=C**-0.5)
    t = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    if N > 2: t[1] = -100
    return h, w, t.to(DEVICE)


def by_torch(h, w, t, reduction="mean", smoothing=0.0, wide=False):
    "Loss and gradients by torch; the logits in h's type."
    h, w = (x.detach().double() if wide else x.detach() for x in (h, w))
    h, w = h.requires_grad_(True), w.requires_grad_(True)
    z = F.linear(h, w)
    loss = F.cross_entropy(z if wide else z.float(), t, reduction=reduction, label_smoothing=smoothing)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def check(module=lce, N=5, C=16, V=90, dtype=torch.float32, chunk=2, reduction="mean", smoothing=0.0, wide=False):
    h, w, t = inputs(N, C, V, dtype)
    with guarded(module): got = module.launch_linear_cross_entropy(h, w, t, -100, reduction, smoothing, chunk=chunk,
                                                                   wide=wide)
    want, same = by_torch(h, w, t, reduction, smoothing, wide=True), by_torch(h, w, t, reduction, smoothing)
    for name, a, b, c in zip(("loss", "hidden", "weight"), got, want, same):
        # logits rounded in torch's order; a chunk rounds the sum once more
        try: as_accurate(a, b, c, floor=4.0 if name == "loss" else 2.0)
        except AssertionError as e: raise AssertionError(f"{name}: {e}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2, 2048])
@pytest.mark.parametrize("wide", [False, True])
def test_loss_and_gradients(dtype, chunk, wide): check(dtype=dtype, chunk=chunk, wide=wide)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 100), st.integers(1, 7), st.sampled_from(["mean", "sum"]),
       st.sampled_from([0.0, 0.1]))
def test_shapes(N, C, V, chunk, reduction, smoothing): check(N=N, C=C, V=V, chunk=chunk, reduction=reduction,
                                                             smoothing=smoothing)


def test_autograd_asks_for_what_it_needs():
    h, w, t = inputs(6, 8, 40)
    want = by_torch(h, w, t)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        a, b = h.clone().view(2, 3, 8).requires_grad_(needs[0]), w.clone().requires_grad_(needs[1])
        loss = linear_cross_entropy(a, b, t.view(2, 3), chunk=4)
        torch.testing.assert_close(loss.detach(), want[0])
        if not any(needs):
            assert not loss.requires_grad
            continue
        (loss * 3).backward()
        for x, g, needed in zip((a, b), want[1:], needs):
            if needed: torch.testing.assert_close(x.grad.view(g.shape), 3 * g)
            else: assert x.grad is None
    loss = linear_cross_entropy(h.requires_grad_(True), w, t)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"): loss.backward()


def test_views_and_nothing_to_do():
    h, w, t = inputs(8, 12, 40)
    for a, b, c in ((h[::2], w, t[::2]), (h[:, :7], w[:, :7], t), (randn(12, 8).T, randn(12, 40).T, t),
                    (h, w[::2], t % 20)):
        torch.testing.assert_close(linear_cross_entropy(a, b, c, chunk=3), F.cross_entropy(a @ b.T, c))
        x, y = a.detach().requires_grad_(True), b.detach().requires_grad_(True)
        for got, want in zip(torch.autograd.grad(linear_cross_entropy(x, y, c, chunk=3), (x, y)),
                             by_torch(a, b, c)[1:]): torch.testing.assert_close(got, want)
    loss, dh, dw = lce.launch_linear_cross_entropy(h[:0], w, t[:0], reduction="sum")
    assert loss == 0 and dh.shape == (0, 12) and (dw == 0).all()
    _, dh, dw = lce.launch_linear_cross_entropy(h, w, torch.full_like(t, -100))
    assert (dh == 0).all() and (dw == 0).all()


def test_gradients_in_float64():
    h, w, t = inputs(3, 4, 12, torch.float64)
    # the way that may go backward twice
    op = lambda h, w: lce.linear_cross_entropy_op(h, w, t, -100, "mean", 0.0, 0.0, 2, True, True, False)[0]
    assert torch.autograd.gradcheck(op, (h.requires_grad_(True), w.requires_grad_(True)))


def test_custom_op_and_compile():
    h, w, t = inputs(5, 8, 30)
    h, w = h.requires_grad_(True), w.requires_grad_(True)
    torch.library.opcheck(lce.linear_cross_entropy_op, (h, w, t, -100, "mean", 0.0, 0.0, 2, True, True, False))
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager" if DEVICE == "cpu" else "inductor",
                             fullgraph=True)
    got = torch.autograd.grad(compiled(h, w, t) * 2, (h, w))
    for a, b in zip(got, by_torch(h, w, t)[1:]): torch.testing.assert_close(a, 2 * b)


WRONG = {
    "the logits are not turned into their gradient": ("gradient = factor if for_hidden or for_weight else None",
                                                      "gradient = None"),
    "a chunk writes over the sum of those before": ("first=start == 0", "first=True"),
    "the mean is over all tokens": ("loss = losses.sum() * factor[0] if mean", "loss = losses.mean() if mean"),
    "a ragged last chunk is dropped": ("range(0, N, chunk)", "range(0, N - chunk + 1, chunk)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variants_are_rejected(name, tmp_path):
    old, new = WRONG[name]
    source = Path(lce.__file__).read_text()
    assert old in source, "the variant's text is gone"
    source = source.replace(old, new).replace("llm_workbench::", "wrong_variant::").replace("from ..",
        "from llm_workbench.").replace("from .", "from llm_workbench.kernels.")
    (tmp_path / "wrong_loss.py").write_text(source)
    spec = importlib.util.spec_from_file_location("wrong_loss", tmp_path / "wrong_loss.py")
    module = sys.modules["wrong_loss"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert rejects(check, module), f"nobody notices: {name}"


def test_bad_input():
    h, w, t = inputs(4, 8, 30)
    for call in (lambda: linear_cross_entropy(h, w[:, :5], t), lambda: linear_cross_entropy(h, w.half(), t),
                 lambda: linear_cross_entropy(h, w, t[:2]),
                 lambda: linear_cross_entropy(h, w, t.float()), lambda: linear_cross_entropy(h, w, t,
                     reduction="none"), lambda: linear_cross_entropy(h, w, t, chunk=0),
                 lambda: linear_cross_entropy(h, w[:0], t), lambda: linear_cross_entropy(h, w.to("meta"), t)):
        with pytest.raises(InputError): call()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_size_and_memory(dtype):
    "4,096 tokens, 64,000 columns: errors as torch's in the same type, and a tenth of its memory."
    N, C, V = 4096, 1024, 64000
    check(N=N, C=C, V=V, dtype=dtype, chunk=1024)
    h, w, t = inputs(N, C, V, dtype)
    def extra(run):
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - h.nbytes - w.nbytes + 0 * len(out)
    ours = extra(lambda: lce.launch_linear_cross_entropy(h, w, t, chunk=256))
    assert ours <= 0.10 * extra(lambda: by_torch(h, w, t)), ours
