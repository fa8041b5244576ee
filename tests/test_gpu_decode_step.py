"The kernels of a decode step: products of few rows, attention behind a static cache, the best token, whole layers."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, as_accurate, guarded, randn, rejects
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.architecture.rope import inverse_frequencies, rope_tables, rotate
from llm_workbench.errors import InputError
from llm_workbench.kernels import decode_step
from llm_workbench.kernels.decode_step import STEP, Work, attend, few_rows, greedy, linear, normed, why_not
from llm_workbench.kernels.launching import resources, tl, triton

pytestmark = pytest.mark.triton
GPU = DEVICE == "cuda"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------- products of few rows
def plain_few_rows(x, weights, norm=None, eps=1e-6, gated=False, add=None):
    "The same with torch, in the dtype that comes in."
    if norm is not None: x = TORCH.rms_norm(x, norm, eps)
    parts = [F.linear(x, w) for w in weights]
    out = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts, -1)
    return out if add is None else out + add


def check_few_rows(run, dtype, M, K, sizes, *, norm=False, gated=False, add=None, scale=1.0, seed=0):
    x = randn(M, K, dtype=dtype, seed=seed, scale=scale)
    weights = [randn(n, K, dtype=dtype, seed=seed + 1 + i, scale=K**-0.5) for i, n in enumerate(sizes)]
    g = randn(K, dtype=dtype, seed=seed + 7).abs() if norm else None
    N = sizes[0] if gated else sum(sizes)
    more = None if add is None else randn(*((M, N) if add == "rows" else (N,)), dtype=dtype, seed=seed + 8)
    double = lambda t: None if t is None else t.double()
    want = plain_few_rows(double(x), list(map(double, weights)), double(g), 1e-6, gated, double(more))
    eager = plain_few_rows(x, weights, g, 1e-6, gated, more)
    with guarded(decode_step): got = run(x, weights, norm=g, gated=gated, add=more)
    return as_accurate(got, want, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 17])
def test_few_rows(dtype, M):
    check_few_rows(few_rows, dtype, M, 72, [40, 24, 24], norm=True)
    check_few_rows(few_rows, dtype, M, 72, [50, 50], norm=True, gated=True)
    check_few_rows(few_rows, dtype, M, 600, [70], add="rows")


@given(st.integers(0, 32), st.integers(1, 300), st.lists(st.integers(1, 70), min_size=1, max_size=3), st.booleans(),
       st.sampled_from([None, "rows", "bias"]), st.sampled_from(DTYPES))
@settings(max_examples=8 if GPU else 25, deadline=None, derandomize=True)
def test_any_shape(M, K, sizes, norm, add, dtype):
    check_few_rows(few_rows, dtype, M, K, sizes, norm=norm, add=add)


@pytest.mark.parametrize("M", [1, 3])
def test_sums_that_programs_share_come_out_in_their_order(M):
    "Split along K: the same bits every time, and counters are zero again."
    config = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, SPLIT=4, num_warps=4, num_stages=2) if M > 1 else None
    x, w = randn(M, 200), randn(50, 200, seed=1)
    work = Work(DEVICE)
    got = [few_rows(x, [w], work=work, config=config) for _ in range(2)]
    assert torch.equal(*got) and not work.counts.any()
    as_accurate(got[0], x.double() @ w.double().T, x @ w.T)
    check_few_rows(lambda *a, **o: few_rows(*a, config=config, **o), torch.float16, M, 130, [33, 33], gated=True)


def test_large_numbers_stay_finite():
    for M in (1, 2):
        check_few_rows(few_rows, torch.float16, M, 64, [32], norm=True, scale=1e4)
        check_few_rows(few_rows, torch.bfloat16, M, 64, [32], norm=True, scale=1e15)
        zero = few_rows(torch.zeros(M, 64, device=DEVICE), [randn(8, 64)], norm=randn(64), add=randn(8))
        assert torch.equal(zero, randn(8).expand(M, 8))


def test_inputs_that_are_not_contiguous_and_outputs_in_place():
    wide = randn(4, 2, 96)
    x, w, add = wide[:, 1, ::2], randn(30, 48, seed=1), randn(30, 4, seed=2).T
    for M in (1, 4):
        eager, want = (plain_few_rows(x[:M].to(d), [w.to(d)], add=add[:M].to(d)) for d in (x.dtype, torch.float64))
        as_accurate(few_rows(x[:M], [w], add=add[:M]), want, eager)
        stream = add[:M].contiguous()
        assert few_rows(x[:M], [w], add=stream, out=stream) is stream
        as_accurate(stream, want, eager)


@triton.jit
def without_scale(x_ptr, norm_ptr, a_ptr, b_ptr, c_ptr, add_ptr, out_ptr, n_a, n_b, n_c, K, eps, NORM: tl.constexpr,
                  GATED: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  AHEAD: tl.constexpr):
    "Wrong: forgets the mean in the mean square."
    row, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    g = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    w = tl.load(a_ptr + row[:, None] * K + k[None, :], mask=(row < n_a)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    out = tl.sum(w * (x * g * tl.rsqrt(tl.sum(x * x, 0) + eps))[None, :], 1)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < n_a)


def test_wrong_products_are_noticed(monkeypatch):
    case = lambda M=1, **o: (few_rows, torch.float32, M, 72, o.pop("sizes", [40]))
    with monkeypatch.context() as m:
        m.setattr(decode_step, "gemv_kernel", without_scale)
        assert rejects(check_few_rows, *case(), norm=True)
    swapped = lambda x, weights, **o: few_rows(x, weights[::-1], **o)
    assert rejects(check_few_rows, swapped, torch.float32, 1, 72, [40, 40], gated=True)
    assert rejects(check_few_rows, swapped, torch.float32, 3, 72, [40, 20, 20])
    early = lambda x, weights, **o: few_rows(x, weights, config=dict(
        BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, SPLIT=2, num_warps=4, num_stages=2), work=tired(), **o)
    assert rejects(check_few_rows, early, torch.float32, 3, 128, [40])        # a counter that was not zero


def tired():
    work = Work(DEVICE)
    work.counts += 1
    return work


def test_bad_products_are_refused():
    x, w = randn(2, 64), randn(8, 64)
    for bad in (lambda: few_rows(randn(33, 64), [w]), lambda: few_rows(x, [w, w, w, w]), lambda: few_rows(x, [w], gated=True),
                lambda: few_rows(x.half(), [w]), lambda: few_rows(x.double(), [w.double()]), lambda: few_rows(x, [randn(8, 60)]),
                lambda: few_rows(x, [randn(64, 8).T]), lambda: few_rows(x, [w], norm=randn(8)), lambda: few_rows(x, [w], add=randn(3)),
                lambda: few_rows(x, [w], out=randn(2, 9)), lambda: few_rows(x[0], [w]), lambda: few_rows(x, [w.to("meta")])):
        with pytest.raises(InputError, match="few_rows takes"): bad()


# -------------------------------------------------------------------------------------------------------- the op
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (40, 64), (0, 64)])
def test_linear_is_linear(shape):
    x, w, b = randn(*shape), randn(24, 64, seed=1), randn(24, seed=2)
    as_accurate(linear(x, w, b), F.linear(x.double(), w.double(), b.double()), F.linear(x, w, b))


def test_gradients_and_opcheck():
    args = [t.requires_grad_() for t in (randn(3, 40), randn(10, 40, seed=1), randn(10, seed=2))]
    torch.library.opcheck(decode_step.few_rows_op, args)
    torch.library.opcheck(decode_step.few_rows_op, (args[0], args[1], None))
    grads = [torch.autograd.grad((run(*args) ** 2).sum(), args) for run in (linear, F.linear)]
    for mine, theirs in zip(*grads): assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_other_dtypes_go_to_torch():
    x, w = randn(3, 40).double(), randn(10, 40).double()
    assert torch.equal(linear(x, w), F.linear(x, w))
    assert torch.equal(linear(x.float(), randn(40, 10).T), F.linear(x.float(), randn(40, 10).T))


# ----------------------------------------------------------------------------------------------------- attention
def past(B, slots, K, D, G, lengths, dtype, R, seed=0):
    "What attend is given; slots that are not filled hold NaN."
    qkv = randn(B, (G + 2) * K * D, dtype=dtype, seed=seed)
    k, v = (randn(B, slots, K, D, dtype=dtype, seed=seed + i) for i in (1, 2))
    for b, n in enumerate(lengths): k[b, n:], v[b, n:] = math.nan, math.nan
    held = torch.tensor(lengths, device=DEVICE)
    cos, sin = rope_tables(held, inverse_frequencies(R, device=DEVICE)) if R else (None, None)
    return qkv, cos, sin, held, k, v


def plain_attend(qkv, cos, sin, held, k, v, heads, window=None, scale=None):
    "The same with the reference functions: the output, and the caches after it."
    B, slots, K, D = k.shape
    q, k_new, v_new = qkv.view(B, 1, -1, D).split([heads, K, K], 2)
    if cos is not None: q, k_new = (rotate(t, cos[:, None].to(t.dtype), sin[:, None].to(t.dtype)) for t in (q, k_new))
    k, v, rows = k.clone(), v.clone(), torch.arange(B, device=k.device)
    k[rows, held], v[rows, held] = k_new[:, 0], v_new[:, 0]
    clean = lambda t: t.nan_to_num(0.0)
    out = REFERENCE.attention(q, clean(k), clean(v), lengths=held + 1, window=window, scale=scale)
    return out.flatten(1), k, v


def check_attend(run, dtype, B, slots, K, D, G, lengths, R=None, seed=0, **options):
    R = D if R is None else R
    qkv, cos, sin, held, k, v = past(B, slots, K, D, G, lengths, dtype, R, seed)
    double = lambda t: t.double() if t is not None and t.is_floating_point() else t
    want, _, _ = plain_attend(*map(double, (qkv, cos, sin, held, k, v)), G * K, **options)
    eager, k_after, v_after = plain_attend(qkv, cos, sin, held, k, v, G * K, **options)
    with guarded(decode_step): got = run(qkv, cos, sin, held, k, v, G * K, **options)
    as_accurate(got, want, eager, floor=2.0)
    assert torch.equal(v.nan_to_num(7.0), v_after.nan_to_num(7.0)), "values are not where they belong"
    as_accurate(k.nan_to_num(0.0), k_after.double().nan_to_num(0.0), k_after.nan_to_num(0.0))
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend(dtype):
    check_attend(attend, dtype, 2, 100, 2, 16, 3, [70, 3])
    check_attend(attend, dtype, 1, 12, 1, 24, 1, [0], R=8)
    check_attend(attend, dtype, 2, 20, 1, 10, 4, [19, 5], window=4, scale=0.5)


@given(st.lists(st.integers(0, 150), min_size=1, max_size=3), st.sampled_from([(1, 1), (2, 3), (3, 4), (1, 17)]),
       st.sampled_from([(8, 8), (16, 0), (20, 12), (64, 64)]), st.sampled_from([None, 1, 40]), st.sampled_from([1, 2, 8]),
       st.sampled_from(DTYPES))
@settings(max_examples=8 if GPU else 20, deadline=None, derandomize=True)
def test_any_past(lengths, heads, sizes, window, splits, dtype):
    (K, G), (D, R) = heads, sizes
    config = dict(BLOCK_G=16 if G <= 16 else 32, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_S=16, SPLITS=splits,
                  num_warps=4, num_stages=2)
    run = lambda *a, **o: attend(*a, config=config, **o)
    check_attend(run, dtype, len(lengths), 151, K, D, G, lengths, R, window=window)


def test_tables_by_position_and_counters():
    qkv, cos, sin, held, k, v = past(2, 90, 2, 16, 3, [80, 2], torch.float32, 16)
    every = rope_tables(torch.arange(90, device=DEVICE), inverse_frequencies(16, device=DEVICE))
    work = Work(DEVICE)
    first = attend(qkv, cos, sin, held, k.clone(), v.clone(), 6, work=work)
    again = attend(qkv, *every, held, k.clone(), v.clone(), 6, by_position=True, work=work)
    assert torch.allclose(first, again, atol=1e-6) and not work.counts.any() and held.tolist() == [80, 2]


def test_large_scores():
    check_attend(attend, torch.float32, 1, 80, 1, 16, 2, [70], scale=300.0)


def test_a_full_text_writes_nothing():
    qkv, cos, sin, held, k, v = past(1, 8, 1, 16, 1, [8], torch.float32, 16)
    before = k.clone(), v.clone()
    out = attend(qkv, cos, sin, held, k, v, 1)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1]) and out.isfinite().all()


def test_wrong_attention_is_noticed():
    shape = (torch.float32, 2, 100, 2, 16, 3, [70, 3])
    assert rejects(check_attend, lambda *a, **o: attend(*a, **o, scale=0.3), *shape)
    assert rejects(check_attend, lambda *a, **o: attend(*a, window=50), *shape)
    short = lambda qkv, cos, sin, held, *a, **o: attend(qkv, cos, sin, held - 1, *a, **o)       # writes over a token
    assert rejects(check_attend, short, *shape)
    unturned = lambda qkv, cos, sin, *a, **o: attend(qkv, None, None, *a, **o)
    assert rejects(check_attend, unturned, *shape)


def test_bad_attention_is_refused():
    qkv, cos, sin, held, k, v = past(2, 20, 2, 16, 3, [3, 4], torch.float32, 16)
    for bad in (lambda: attend(qkv[:, :-1], cos, sin, held, k, v, 6), lambda: attend(qkv, cos, sin, held, k, v, 5),
                lambda: attend(qkv, cos, sin, held.int(), k, v, 6), lambda: attend(qkv, cos, sin, held, k.half(), v, 6),
                lambda: attend(qkv, cos[:1], sin[:1], held, k, v, 6), lambda: attend(qkv, cos, sin, held, k[:, ::2], v[:, ::2], 6),
                lambda: attend(qkv, cos, sin, held, k, v, 6, by_position=True)):
        with pytest.raises(InputError, match="attend takes"): bad()


# ------------------------------------------------------------------------------------------------- the best token
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy(dtype):
    logits = randn(3, 9001, dtype=dtype)
    logits[1, 8999] = 50.0
    following = torch.empty(3, dtype=torch.int64, device=DEVICE)
    with guarded(decode_step): got = greedy(logits, following=following)
    assert torch.equal(got, logits.float().argmax(-1)) and torch.equal(following, got)
    assert torch.equal(greedy(logits[:, ::3]), logits[:, ::3].float().argmax(-1))
    assert greedy(logits[:0]).shape == (0,) and greedy(logits[:, :1]).tolist() == [0, 0, 0]


def test_ties_go_to_the_first_and_bad_rows_to_none():
    logits = torch.zeros(6, 5000, device=DEVICE)
    logits[0, [7, 4999]] = 1.0
    logits[1, 4500] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    logits[4, 17] = -math.inf
    following = torch.empty(6, dtype=torch.int64, device=DEVICE)
    assert greedy(logits, following=following).tolist() == [7, -1, -1, -1, 0, 0]
    assert following.tolist() == [7, 0, 0, 0, 0, 0]
    for bad in (lambda: greedy(logits[0]), lambda: greedy(logits.long()), lambda: greedy(logits, out=logits[:, 0])):
        with pytest.raises(InputError, match="greedy takes"): bad()


def test_norm():
    for dtype in DTYPES:
        x, g = randn(5, 300, dtype=dtype)[:, ::2], randn(150, dtype=dtype, seed=1)
        want = TORCH.rms_norm(x.contiguous().double(), g.double(), 1e-5)
        as_accurate(normed(x.contiguous(), g, 1e-5), want, TORCH.rms_norm(x, g, 1e-5))


# ---------------------------------------------------------------------------------------------------- whole layers
FUSED = [("llama", 0, {}), ("mistral", 0, {}), ("smollm3", 0, {}), ("llama", 2, {})]


def pair_of(family, variant, changes, dtype=torch.float32):
    decoder = Decoder.from_transformers(small_model(family, variant, changes=changes or None)).to(DEVICE, dtype)
    return decoder.with_ops(TORCH), decoder.with_ops(STEP if GPU else TORCH.but(blocks=decode_step.FusedBlocks(TORCH)))


@pytest.mark.parametrize("family,variant,changes", FUSED, ids=str)
@torch.inference_mode()
def test_steps_equal_the_ordinary_ones(family, variant, changes, monkeypatch):
    plain, ours = pair_of(family, variant, changes)
    assert why_not(ours.layers[0]) is None
    runs, original = [], decode_step.Plan.run
    monkeypatch.setattr(decode_step.Plan, "run", lambda self, *a: runs.append(1) or original(self, *a))
    caches = [d.new_cache("static", batch=2, slots=20) for d in (plain, ours)]
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for d, cache in zip((plain, ours), caches): d(tokens[:, :5], cache, [5, 3])
    for t in range(5, 8):
        want, got = (d(tokens[:, t:t + 1], cache) for d, cache in zip((plain, ours), caches))
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert len(runs) == 3, "the ordinary loop was tested instead of the kernels"


@torch.inference_mode()
def test_what_the_kernels_do_not_know_goes_the_ordinary_way():
    for family, variant in (("gemma", 0), ("qwen3", 0), ("mixtral", 0)):
        plain, ours = pair_of(family, variant, {})
        assert any(why_not(block) for block in ours.layers), family
        a, b = (d.new_cache("static", batch=1, slots=12) for d in (plain, ours))
        for part in torch.arange(4, device=DEVICE)[None].split([2, 1, 1], 1):
            want, got = plain(part, a), ours(part, b)
            assert (got - want).abs().max() <= 1e-4 * want.abs().max(), family


@torch.inference_mode()
def test_reasons():
    plain, ours = pair_of("llama", 0, dict(num_hidden_layers=2))
    assert isinstance(STEP.blocks, decode_step.FusedBlocks) and STEP.linear is linear
    layers, blocks = ours.layers, ours.ops.blocks
    assert blocks.why_not_layers(layers, ours.ops) is None
    assert "another function" in blocks.why_not_layers(layers, ours.ops.but(swiglu=lambda a, b: a))
    hook = layers[1].mlp.register_forward_hook(lambda *a: None)
    assert "hooks" in blocks.why_not_layers(layers, ours.ops)
    hook.remove()
    assert blocks.why_not_layers(layers, ours.ops) is None
    before = decode_step.plan(layers)
    layers[0].mlp.up_proj.weight = torch.nn.Parameter(layers[0].mlp.up_proj.weight.clone())
    assert decode_step.plan(layers) is not before, "weights that moved are looked up again"


# ----------------------------------------------------------------------------------- what the compiler makes of it
@pytest.mark.skipif(GPU, reason="the same compiler runs anyway")
def test_compiled_for_sm_90():
    table = resources(*decode_step.launches())
    assert (table.spills == 0).all() and (table["stack"] == 0).all(), table.to_string()
    assert (table.shared <= 227 * 1024).all()
    matrix = table.index.str.startswith("skinny") & ~table.index.str.contains("fp32")
    assert (table.wgmma[matrix] > 0).all() and (table.cp_async[matrix] > 0).all()
    assert (table.wide_loads[table.index.str.startswith("gemv")] > 0).all()


@pytest.mark.cuda
@pytest.mark.parametrize("M,dtype", [(1, torch.bfloat16), (1, torch.float32), (7, torch.bfloat16), (32, torch.bfloat16),
                                     (32, torch.float16)], ids=str)
def test_real_shapes(M, dtype):
    check_few_rows(few_rows, dtype, M, 4096, [4096, 1024, 1024], norm=True)
    check_few_rows(few_rows, dtype, M, 4096, [14336, 14336], norm=True, gated=True)
    check_few_rows(few_rows, dtype, M, 14336, [4096], add="rows")
    check_few_rows(few_rows, dtype, M, 576, [576, 192, 192], norm=True)
    check_few_rows(few_rows, dtype, M, 576, [49152], norm=True)
    check_attend(attend, dtype, M, 2048, 8, 128, 4, [(997 * b) % 2047 for b in range(M)])
    check_attend(attend, dtype, M, 700, 3, 64, 3, [600 + b for b in range(M)])
