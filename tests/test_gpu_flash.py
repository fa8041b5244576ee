"Flash attention: every mask, forward and backward, against float64; interpreted without a GPU, compiled with one."
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_checks import DEVICE, DTYPES, as_accurate, guarded, randn, rejects
from llm_workbench.architecture.attention import attention
from llm_workbench.errors import InputError
from llm_workbench.kernels import flash_attention as flash
from llm_workbench.kernels.flash_attention import Config, flash_backward, flash_forward
from llm_workbench.kernels.launching import interpreting, resources

pytestmark = pytest.mark.triton
import triton
import triton.language as tl

SMALL = Config(16, 16, 4, 2, "pointers")     # several tiles in a short text
SMALL_TMA = Config(16, 32, 4, 2)
GLUON = dict(lasting=False), dict(lasting=True)
CHIP = 2.0 if DEVICE == "cuda" else 0.0     # its exp2 and log2 are off by some units
OPTIONS = {   # B, Tq, Tk, H, K, D and what is asked for; sizes that share compiled kernels where they can
    "causal": ((1, 37, 37, 2, 1, 16), {}),
    "after a past": ((1, 19, 53, 2, 1, 16), {}),
    "both directions": ((1, 21, 35, 2, 1, 16), dict(causal=False)),
    "window": ((1, 50, 50, 2, 1, 16), dict(window=20)),
    "window smaller than a tile": ((1, 33, 41, 2, 1, 16), dict(window=3)),
    "window of one": ((1, 18, 18, 2, 1, 16), dict(window=1)),
    "window, both directions": ((1, 34, 41, 2, 1, 16), dict(window=9, causal=False)),
    "softcap": ((1, 37, 37, 2, 1, 16), dict(softcap=3.0)),
    "sinks": ((2, 21, 37, 4, 2, 16), dict(sinks=True)),
    "lengths": ((3, 18, 50, 2, 1, 16), dict(lengths=[50, 20, 33])),
    "lengths below the queries": ((3, 21, 37, 2, 1, 16), dict(lengths=[0, 7, 37])),
    "lengths, both directions": ((2, 17, 37, 2, 1, 16), dict(lengths=[0, 19], causal=False)),
    "everything": ((2, 21, 45, 4, 2, 24), dict(window=17, softcap=5.0, sinks=True, lengths=[45, 30], scale=0.4)),
    "one token": ((2, 1, 41, 4, 2, 16), dict(lengths=[41, 17])),
    "one and one": ((1, 1, 1, 1, 1, 8), {}),
    "negative scale": ((1, 17, 17, 2, 1, 16), dict(scale=-0.3)),
    "no scale": ((1, 17, 21, 2, 1, 16), dict(scale=0.0)),
}


def inputs(shape, dtype=torch.float32, scale=1.0, **options):
    "Tensors and options of a case; sinks=True and lengths=[...] become tensors."
    B, Tq, Tk, H, K, D = shape
    sizes = [(Tq, H), (Tk, K), (Tk, K)]
    q, k, v = (randn(B, T, h, D, dtype=dtype, seed=i, scale=scale) for i, (T, h) in enumerate(sizes))
    if options.get("sinks"): options["sinks"] = randn(H, seed=7)
    if options.get("lengths"): options["lengths"] = torch.tensor(options["lengths"], device=DEVICE)
    return (q, k, v), options


def widened(tensors, options):
    sinks = options.get("sinks")
    return [t.double() for t in tensors], options | ({} if sinks is None else dict(sinks=sinks.double()))


def check_forward(tensors, options, run=flash_forward, config=SMALL, floor=1.0):
    with guarded(flash): out, lse = run(*tensors, config=config, **options)
    wide, wide_options = widened(tensors, options)
    want = attention(*wide, **wide_options)
    as_accurate(out, want, attention(*tensors, **options), floor=floor + CHIP)
    _, lse_wanted = flash.plain_forward(*wide, **wide_options)
    seen = lse_wanted > -1e37
    apart = (lse - lse_wanted)[seen].abs()
    assert not seen.any() or apart.max() < 2e-5 * (1 + lse_wanted[seen].abs().max())


def gradients(tensors, options, grad):
    "By torch, through the reference."
    sinks = [options["sinks"]] if options.get("sinks") is not None else []
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, *sinks)]
    more = dict(options, sinks=leaves[3]) if len(leaves) == 4 else options
    return torch.autograd.grad(attention(*leaves[:3], **more), leaves, grad.to(leaves[0].dtype))


def check_backward(tensors, options, run=flash_backward, configs=(SMALL, SMALL), floor=2.0):
    grad = randn(*tensors[0].shape, dtype=tensors[0].dtype, seed=9)
    out, lse = flash_forward(*tensors, config=configs and configs[0], **options)
    with guarded(flash): got = run(grad, *tensors, out, lse, configs=configs, **options)
    wide, wide_options = widened(tensors, options)
    for mine, want, eager in zip(got, gradients(wide, wide_options, grad.double()), gradients(tensors, options, grad)):
        if want.any(): as_accurate(mine, want, eager, floor=floor + CHIP)
        else: assert mine.abs().max() < 8 * torch.finfo(mine.dtype).eps * grad.abs().max()    # one key: its weight is 1


@pytest.mark.parametrize("name", OPTIONS)
def test_forward(name):
    check_forward(*inputs(OPTIONS[name][0], **OPTIONS[name][1]))


@pytest.mark.parametrize("name", OPTIONS)
def test_backward(name):
    check_backward(*inputs(OPTIONS[name][0], **OPTIONS[name][1]))


@pytest.mark.parametrize("name, config, dtype", [
    ("causal", SMALL, torch.float16), ("everything", SMALL_TMA, torch.float16),
    ("everything", SMALL_TMA, torch.bfloat16), ("lengths below the queries", SMALL, torch.bfloat16)], ids=str)
def test_half_precision(name, config, dtype):
    case = inputs(OPTIONS[name][0], dtype, **OPTIONS[name][1])
    check_forward(*case, config=config)
    check_backward(*case, configs=(config, config))


@pytest.mark.parametrize("D", [1, 40, 80, 200] if interpreting() else [1, 80])
def test_odd_head_sizes_with_the_table(D):
    "The tiles that users get: few queries, many queries, float32."
    check_forward(*inputs((1, 21, 21, 2, 1, D)), config=None)
    check_forward(*inputs((1, 21, 21, 2, 1, D), torch.bfloat16), config=None)
    wide = flash.forward_config(D, torch.bfloat16, 1000, D % 8 == 0)
    check_forward(*inputs((1, 71, 71, 2, 1, D), torch.bfloat16), config=wide)


@settings(deadline=None, derandomize=True, max_examples=6 if interpreting() else 2)
@given(st.data())
def test_random_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    B, K, G, Tq, D = draw(1, 2), draw(1, 2), draw(1, 3), draw(1, 40), draw(1, 33)
    Tk = Tq + data.draw(st.sampled_from([0, 0, 1, 15, 30]))
    options = dict(causal=data.draw(st.booleans()))
    if data.draw(st.booleans()): options["window"] = draw(1, 50)
    if data.draw(st.booleans()): options["lengths"] = [draw(0, Tk) for _ in range(B)]
    if data.draw(st.booleans()): options["sinks"] = True
    config = Config(16, data.draw(st.sampled_from([16, 32])), 4, 2, "pointers")
    case = inputs((B, Tq, Tk, K * G, K, D), **options)
    check_forward(*case, config=config)
    check_backward(*case, configs=(config, config))


def test_strides():
    "Heads before tokens, slices of a wider tensor, columns of stride 2."
    B, T, H, K, D = 1, 20, 4, 2, 16
    whole = randn(B, T, H + 2 * K, D)
    sliced = whole[:, :, :H], whole[:, :, H:H + K], whole[:, :, H + K:]
    heads_first = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in sliced)
    skipping = tuple(randn(B, T, h, 2 * D, seed=h)[..., ::2] for h in (H, K, K))
    for tensors in (sliced, heads_first, skipping):
        check_forward(tensors, {})
        check_backward(tensors, {})
    tensors, options = inputs((1, 20, 20, 2, 1, 16))
    out, lse = flash_forward(*tensors, config=SMALL)
    scalar = torch.ones((), device=DEVICE).expand(out.shape)                       # what out.sum().backward() sends
    for a, b in zip(flash_backward(scalar, *tensors, out, lse, configs=(SMALL, SMALL)),
                    flash_backward(scalar.contiguous(), *tensors, out, lse, configs=(SMALL, SMALL))):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_extreme_scores(scale):
    """Scores near zero, a softmax that is one key, and scores whose exponential no float holds. Large scores are lost
    to rounding wherever two keys nearly tie: enough texts that the largest error of both sides is one of many."""
    check_forward(*inputs((8, 64, 64, 4, 1, 16), scale=scale), floor=4.0)


def test_empty():
    for shape in ((0, 5, 5, 2, 1, 16), (1, 0, 5, 2, 1, 16), (1, 3, 0, 2, 1, 16)):
        tensors, _ = inputs(shape)
        out, lse = flash_forward(*tensors)
        assert out.shape == tensors[0].shape and not out.any()
        grads = flash_backward(torch.ones_like(out), *tensors, out, lse)
        assert [g.shape for g in grads[:3]] == [t.shape for t in tensors] and not any(g.any() for g in grads[:3])


def test_backward_gives_the_same_bits():
    tensors, options = inputs((1, 36, 36, 2, 1, 16))
    out, lse = flash_forward(*tensors, config=SMALL)
    runs = [flash_backward(out, *tensors, out, lse, configs=(SMALL, SMALL)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(r[:3] for r in runs)))


@pytest.mark.skipif(not interpreting(), reason="float64 only in the interpreter")
@pytest.mark.parametrize("name, shape, options", [
    ("plain", (1, 5, 5, 1, 1, 3), {}), ("grouped, past", (1, 3, 6, 4, 2, 3), {}),
    ("cap", (1, 4, 4, 1, 1, 3), dict(softcap=1.5)),
    ("all", (2, 4, 7, 2, 1, 3), dict(window=3, softcap=2.0, sinks=True, lengths=[7, 3], scale=0.7))])
def test_gradcheck(name, shape, options):
    tensors, options = inputs(shape, torch.float64, **options)
    if options.get("sinks") is not None: options["sinks"] = options["sinks"].double().requires_grad_()
    leaves = [t.requires_grad_() for t in tensors] + ([options["sinks"]] if options.get("sinks") is not None else [])
    run = lambda q, k, v, *sinks: flash.flash_attention(q, k, v, **(options | (dict(sinks=sinks[0]) if sinks else {})))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_custom_op():
    tensors, options = inputs((1, 18, 18, 2, 1, 16), sinks=True)
    leaves = [t.requires_grad_() for t in (*tensors, options["sinks"])]
    arguments = (*leaves[:3], True, 9, None, leaves[3], None, torch.tensor([18], device=DEVICE))
    torch.library.opcheck(flash.flash_op, arguments, atol=1e-4, rtol=1e-3)
    others = (*(t.detach() for t in tensors), False, None, 2.0, None, 0.3, None)
    torch.library.opcheck(flash.flash_op, others, test_utils=("test_schema", "test_faketensor"))


def test_plain_twins():
    "What the op computes where no kernel runs."
    for name in ("everything", "lengths below the queries", "both directions"):
        tensors, options = inputs(OPTIONS[name][0], **OPTIONS[name][1])
        wide, wide_options = widened(tensors, options)
        out, lse = flash.plain_forward(*tensors, **options)
        as_accurate(out, attention(*wide, **wide_options), attention(*tensors, **options))
        grad = randn(*out.shape, seed=9)
        got = flash.plain_backward(grad, *tensors, out, lse, **options)
        true, theirs = gradients(wide, wide_options, grad.double()), gradients(tensors, options, grad)
        for mine, want, eager in zip(got, true, theirs): as_accurate(mine, want, eager, floor=2.0)


def test_drop_in():
    "The op of `Ops`: with and without gradients, and what it hands on."
    tensors, options = inputs((2, 18, 30, 4, 2, 16), lengths=[30, 20], window=11)
    want = attention(*tensors, **options)
    assert torch.allclose(flash.flash_attention(*tensors, **options), want, atol=2e-6)
    leaf = tensors[0].clone().requires_grad_()
    flash.flash_attention(leaf, *tensors[1:], **options).square().sum().backward()
    mine, leaf.grad = leaf.grad, None
    attention(leaf, *tensors[1:], **options).square().sum().backward()
    assert torch.allclose(mine, leaf.grad, atol=1e-4)
    spans = torch.tensor([[0] * 5 + [-1] * 13] * 2, device=DEVICE)
    assert torch.allclose(flash.flash_attention(*tensors, spans=spans), attention(*tensors, spans=spans), atol=2e-6)
    latent = tensors[0], tensors[1], randn(2, 30, 2, 8)
    assert torch.allclose(flash.flash_attention(*latent), attention(*latent), atol=2e-6)


def test_tiled_rung():
    tensors, _ = inputs((1, 35, 35, 4, 2, 16))
    with guarded(flash): out = flash.tiled_attention(*tensors, BLOCK_M=16, BLOCK_N=16)
    as_accurate(out, attention(*(t.double() for t in tensors)), attention(*tensors))


# Wrong variants that the checks have to reject

@triton.jit
def sees_itself_not(position, key, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    seen = key < length
    if CAUSAL: seen = seen & (key < position)
    if WINDOW: seen = seen & (key > position - window)
    return seen


@triton.jit
def window_too_long(position, key, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    seen = key < length
    if CAUSAL: seen = seen & (key <= position)
    if WINDOW: seen = seen & (key >= position - window)
    return seen


@triton.jit
def sees_padding(position, key, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    seen = key <= length
    if CAUSAL: seen = seen & (key <= position)
    if WINDOW: seen = seen & (key > position - window)
    return seen


@triton.jit
def diagonal_taken_as_full(first, length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                           WINDOW: tl.constexpr):
    stop = tl.minimum(length, first + BLOCK_M)
    return 0, 0, tl.cdiv(stop, BLOCK_N) * BLOCK_N, stop


@triton.jit
def last_queries_forgotten(start_n, shift, length, Tq, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    stop = Tq // BLOCK_M * BLOCK_M
    start = tl.maximum(start_n - shift, 0) // BLOCK_M * BLOCK_M
    return start, stop, stop, stop


@pytest.mark.skipif(not interpreting(), reason="compiled kernels keep the helpers that they were compiled with")
@pytest.mark.parametrize("name, variant, case", [
    ("sees", sees_itself_not, "causal"), ("sees", window_too_long, "window"),
    ("sees", sees_padding, "lengths, both directions"), ("key_ranges", diagonal_taken_as_full, "causal"),
    ("query_ranges", last_queries_forgotten, "causal")])
def test_wrong_variants_are_rejected(monkeypatch, name, variant, case):
    tensors, options = inputs(OPTIONS[case][0], **OPTIONS[case][1])
    if name != "query_ranges": check_forward(tensors, options)
    monkeypatch.setattr(flash, name, variant)
    if name != "query_ranges": assert rejects(check_forward, tensors, options), variant
    monkeypatch.setattr(flash, name, variant)
    assert rejects(check_backward, tensors, options), variant


def test_wrong_launchers_are_rejected():
    tensors, options = inputs((1, 20, 20, 2, 1, 16), sinks=True)
    without = lambda *t, sinks=None, **more: flash_forward(*t, **more)
    assert rejects(check_forward, tensors, options, without)
    def half_a_gradient(*args, **more):
        dq, dk, dv, ds = flash_backward(*args, **more)
        return dq, dk / 2, dv, ds
    assert rejects(check_backward, tensors, options, half_a_gradient)


def test_bad_inputs():
    (q, k, v), _ = inputs((2, 6, 6, 4, 2, 16))
    def refused(words, *tensors, **options):
        with pytest.raises(InputError, match=words): flash_forward(*tensors, **options)
    refused("alike", q, k.half(), v)
    refused("alike", q.int(), k.int(), v.int())
    refused(r"\(B, Tq, H, D\)", q[0], k, v)
    refused(r"\(B, Tk, K, D\)", q, k, v[..., :8])
    refused(r"\(B, Tk, K, D\)", q, k[:1], v[:1])
    refused("multiple of the KV heads", q[:, :, :3], k, v)
    refused("from 1 to 256", *(x.repeat(1, 1, 1, 20) for x in (q, k, v)))
    refused("window", q, k, v, window=0)
    refused("softcap", q, k, v, softcap=-1.0)
    refused("sink a head", q, k, v, sinks=q.new_zeros(3))
    refused("length a row", q, k, v, lengths=torch.tensor([6], device=DEVICE))
    refused("whole numbers", q, k, v, lengths=q.new_tensor([6.0, 6.0]))
    if DEVICE == "cpu": refused("one device", q, k.to("meta"), v)
    out, lse = flash_forward(q, k, v)
    with pytest.raises(InputError, match="gradient like q"): flash_backward(out[:1], q, k, v, out, lse)


@pytest.mark.skipif(DEVICE == "cuda", reason="the same on every machine")
def test_resources():
    "What the compiler makes of the kernels for an H100 or H200: tensor cores and copy engine, nothing spilled."
    launches = [flash.launch("flash_kernel", D, c, label=f"forward {D}") for D, c in flash.HALF.items()]
    launches += [flash.launch(kernel, 128, c, label=kernel)
                 for kernel, c in zip(("dkdv_kernel", "dq_kernel"), flash.HALF_BACKWARD[128])]
    launches += [flash.launch("flash_kernel", 128, Config(128, 128, 4, 2, how), label=how)
                 for how in ("gluon",)]
    launches += [flash.launch("flash_kernel", 128, flash.FULL[128], "fp32", label="forward float32")]
    table = resources(*launches)
    print(table.to_string())
    assert (table.spills == 0).all() and (table["stack"] == 0).all() and (table.shared <= 227 * 1024).all()
    half = table[~table.index.str.contains("float32")]
    assert (half.wgmma > 0).all() and (half.tma > 0).all()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the same on every machine")
def test_resources_of_every_launch():
    "All masks at once, the largest variant of every kernel. A soft cap spills a few registers in rare shapes."
    everything, launches = dict(WINDOW=True, SOFTCAP=True, LENGTHS=True), []
    for D in (32, 80, 128, 256):
        for dtype, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            for there in (True, False):
                name, both = f"{D} {dtype} {there}", flash.backward_configs(D, kind, there, True)
                launches += [flash.launch("flash_kernel", D, flash.forward_config(D, kind, T, there), dtype,
                                          f"forward {name} {T}", SINKS=True, **everything) for T in (1, 40, 1000)]
                launches += [flash.launch(kernel, D, c, dtype, f"{kernel} {name}", **everything)
                             for kernel, c in zip(("dkdv_kernel", "dq_kernel"), both)]
    table = resources(*{repr(replace(x, label="")): x for x in launches}.values())
    print(table.to_string())
    assert (table.spills <= 8).all() and (table.shared <= 227 * 1024).all()


# Compiled, at sizes that models have

@pytest.mark.cuda
@pytest.mark.parametrize("D, dtype, options", [
    (128, torch.bfloat16, {}), (80, torch.float16, dict(window=300, sinks=True, softcap=20.0)),
    (256, torch.bfloat16, dict(lengths=[1111, 700])), (128, torch.float32, {})], ids=str)
def test_real_sizes(D, dtype, options):
    "The Triton kernels with the tiles of the tables."
    case = inputs((2, 500 if options.get("lengths") else 1111, 1111, 8, 2, D), dtype, **options)
    check_forward(*case, config=flash.forward_config(D, dtype, 1111))
    check_backward(*case, configs=None)


def gluon_at_real_sizes():
    everything = dict(window=300, sinks=True, lengths=[0, 60, 1111])
    for D, dtype, options in ((128, torch.bfloat16, {}), (128, torch.bfloat16, everything),
                              (128, torch.float16, dict(window=20)), (80, torch.float16, dict(causal=False)),
                              (256, torch.bfloat16, {})):
        B = len(options.get("lengths", "ab"))
        case = inputs((B, 500 if B == 3 else 1111, 1111, 8, 2, D), dtype, **options)
        for more in GLUON:
            check_forward(*case, config=flash.HOPPER[128 if D <= 128 else 256]._replace(**more))
            print(D, dtype, options, more, "right", flush=True)


@pytest.mark.cuda
def test_gluon_at_real_sizes():
    "In a process of its own: warps that wait for each other can wait for ever."
    if torch.cuda.get_device_capability()[0] != 9: pytest.skip("this kernel is for compute capability 9.0")
    code = "import test_gpu_flash as t; t.gluon_at_real_sizes()"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, timeout=120, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.cuda
def test_decoding_and_continuing():
    for Tq, Tk in ((1, 4096), (5, 3000), (64, 777)):
        check_forward(*inputs((2, Tq, Tk, 8, 2, 128), torch.bfloat16, lengths=[Tk, Tk - 200]), config=None)


@pytest.mark.cuda
def test_in_a_graph_and_compiled():
    tensors, options = inputs((1, 300, 300, 4, 2, 128), torch.bfloat16)
    want = flash.flash_attention(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = flash.flash_attention(*tensors)
    graph.replay()
    assert torch.equal(out, want)
    compiled = torch.compile(lambda q, k, v: flash.flash_attention(q * 1.0, k, v), fullgraph=True)
    assert torch.equal(compiled(*tensors), want)
    leaves = [t.clone().requires_grad_() for t in tensors]
    compiled(*leaves).sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
