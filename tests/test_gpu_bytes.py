"Norms, RoPE and gates in Triton: interpreted on a CPU, compiled on a GPU, always against float64 and torch."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, as_accurate, guarded, randn, rejects

from llm_workbench.architecture import norms_and_mlps as plain
from llm_workbench.architecture.rope import inverse_frequencies, rope_tables
from llm_workbench.architecture.rope import rotate as plain_rotate
from llm_workbench.errors import InputError
from llm_workbench.kernels import bytes as kb
from llm_workbench.kernels.launching import resources

pytestmark = pytest.mark.triton
quick = settings(max_examples=8 if DEVICE == "cpu" else 2, deadline=None, derandomize=True)
if DEVICE == "cuda": DTYPES = DTYPES[::2]     # a kernel is compiled for each type and kind of shape: half a second


def checked(mine, theirs, *args, floor=1.0):
    "The kernel, guarded, is as accurate as torch's function in the same dtype."
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    with guarded(kb): got = mine(*args)
    return as_accurate(got, theirs(*wide), theirs(*args), floor)


# ------------------------------------------------------------------------------------------------------------ norms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 96), (33, 7), (2, 3000)])
def test_rms_norm(shape, dtype):
    x, w = randn(*shape, dtype=dtype, scale=3), randn(shape[-1], dtype=dtype, seed=1)
    for weight in (w, None, w.float()): checked(kb.rms_norm, plain.rms_norm, x, weight, 1e-5)


@quick
@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from(DTYPES))
def test_norms_of_any_shape(N, C, dtype):
    x, w, b = randn(N, C, dtype=dtype, seed=N), randn(C, dtype=dtype, seed=1), randn(C, dtype=dtype, seed=2)
    checked(kb.rms_norm, plain.rms_norm, x, w, 1e-6)
    checked(kb.layer_norm, plain.layer_norm, x, w, b, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_heads_strides_and_nothing(dtype):
    x, w = randn(6, 5, 2, 40, dtype=dtype)[::2, :, :, :24], randn(2, 24, dtype=dtype)
    assert not x.is_contiguous()
    checked(kb.rms_norm, plain.rms_norm, x, w, 1e-5)
    checked(kb.layer_norm, plain.layer_norm, x, w, None, 1e-5)
    checked(kb.layer_norm, plain.layer_norm, x, None, None, 1e-5)
    checked(kb.rms_norm, plain.rms_norm, x.transpose(1, 3), None, 1e-5)
    assert kb.rms_norm(x[:0], w, 1e-5).shape == x[:0].shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_the_registers(dtype):
    C = kb.MOST + 77
    x, r, w = randn(2, C, dtype=dtype), randn(2, C, dtype=dtype, seed=1), randn(C, dtype=dtype, seed=2)
    checked(kb.rms_norm, plain.rms_norm, x, w, 1e-5)
    checked(kb.rms_norm, plain.rms_norm, x, None, 1e-5)
    with guarded(kb): out, total = kb.add_norm(x, r, w.float(), 1e-5)
    assert torch.equal(total, x + r)
    as_accurate(out, plain.rms_norm(total.double(), w.double(), 1e-5), plain.rms_norm(total, w.float(), 1e-5))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_norms_of_extreme_rows(scale):
    x, w = randn(4, 130, scale=scale), randn(130)
    checked(kb.rms_norm, plain.rms_norm, x, w, 1e-6)
    checked(kb.layer_norm, plain.layer_norm, x + 1, w, None, 1e-6, floor=8)      # a mean far above the deviation


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_is_the_two_steps(dtype):
    x, r, w = randn(9, 200, dtype=dtype), randn(9, 200, dtype=dtype, seed=1), randn(200, dtype=dtype, seed=2)
    with guarded(kb): out, total = kb.add_norm(x, r, w, 1e-5)
    assert torch.equal(total, x + r)
    as_accurate(out, plain.rms_norm(total.double(), w.double(), 1e-5), plain.rms_norm(total, w, 1e-5))
    strided = torch.stack([x, r], 1)                                            # neither has its rows one after another
    assert torch.equal(kb.add_norm(strided[:, 0], strided[:, 1], w, 1e-5)[0], out)


def test_add_norm_has_a_derivative():
    leaves = [randn(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate([(2, 3), (2, 3), (3,)])]
    assert torch.autograd.gradcheck(lambda x, r, w: kb.add_norm(x, r, w, 1e-3), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, weight", [((7, 33), (33,)), ((3, 2, 4, 24), (4, 24)), ((5, 40), None), ((1, 3), (3,)),
                                           ((3, 8300), (8300,)), ((2, 8300), None), ((300, 33), (33,))])
def test_rms_norm_backward(shape, weight, dtype):
    x, dy = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    w = None if weight is None else randn(*weight, dtype=dtype, seed=2)

    def grads(norm, to):
        leaves = [t.detach().to(to).requires_grad_() for t in (x, w) if t is not None]
        norm(leaves[0], leaves[1] if w is not None else None, 1e-5).backward(dy.to(to))
        return [t.grad for t in leaves]

    with guarded(kb): got = grads(kb.rms_norm, dtype)
    for mine, want, eager in zip(got, grads(plain.rms_norm, torch.float64), grads(plain.rms_norm, dtype)):
        as_accurate(mine, want, eager, floor=2)


def test_the_backward_pass_repeats_itself():
    x, w = randn(40, 64).requires_grad_(), randn(64).requires_grad_()
    runs = [torch.autograd.grad(kb.rms_norm(x, w, 1e-5).square().sum(), (x, w)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("weight", [(6,), (2, 6), None])
@pytest.mark.parametrize("most", [8192, 4])
def test_rms_norm_gradcheck(weight, most, monkeypatch):
    monkeypatch.setattr(kb, "MOST_BWD", most)                                    # 4: also the kernel for long rows
    x = randn(3, 2, 6, dtype=torch.float64).requires_grad_()
    w = () if weight is None else (randn(*weight, dtype=torch.float64).requires_grad_(),)
    assert torch.autograd.gradcheck(lambda x, w=None: kb.rms_norm(x, w, 1e-3), (x, *w), fast_mode=True)


# ------------------------------------------------------------------------------------------------------------- RoPE
def tables(T, R, batch=None, dtype=torch.float32):
    positions = torch.arange(T) if batch is None else torch.stack([torch.arange(T) + 7 * b for b in range(batch)])
    return [t.to(DEVICE) for t in rope_tables(positions, inverse_frequencies(R), dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, D, R", [(1, 1, 1, 2, 2), (2, 5, 3, 16, 12), (2, 3, 9, 64, 64), (1, 4, 5, 80, 20)])
def test_rotate(B, T, H, D, R, dtype):
    x = randn(B, T, H, D, dtype=dtype)
    for cos_sin in (tables(T, R, dtype=dtype), tables(T, R, B, dtype=dtype)):
        checked(kb.rotate, plain_rotate, x, *cos_sin)
        if dtype != torch.float32:                                               # rounded where torch rounds
            assert torch.equal(kb.rotate(x, *cos_sin), plain_rotate(x, *cos_sin))
    with guarded(kb): back = kb.rotated(kb.rotated(x, *cos_sin), *cos_sin, transpose=True)
    assert (back - x).abs().max() <= 8 * torch.finfo(dtype).eps * x.abs().max()


def test_rotate_reads_strides():
    x = randn(2, 6, 4, 48).transpose(1, 2)[..., :32]               # (2, 4, 6, 32): heads and tokens changed places
    checked(kb.rotate, plain_rotate, x, *tables(4, 32))
    assert kb.rotate(x[:, :0], *tables(0, 32)).shape == (2, 0, 6, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, K, D, R", [(2, 5, 6, 2, 16, 16), (1, 3, 1, 1, 32, 8), (2, 2, 3, 70, 128, 128)])
def test_rotate_in_place(B, T, H, K, D, R, dtype):
    whole = randn(B, T, H + 2 * K, D, dtype=dtype)                  # q, k and v of one product
    before, cos_sin = whole.clone(), tables(T, R, B, dtype=dtype)
    q, k, v = whole.split([H, K, K], 2)
    kb.rotate_in_place(q, k, *cos_sin)
    for now, was in zip((q, k), before.split([H, K, K], 2)):
        as_accurate(now, plain_rotate(was.double(), *(t.double() for t in cos_sin)), plain_rotate(was, *cos_sin))
    assert torch.equal(v, before[:, :, H + K:])
    if R < D: assert torch.equal(whole[..., R:], before[..., R:])


def test_rotate_takes_wider_tables():
    x = randn(1, 3, 2, 16).bfloat16()
    checked(kb.rotate, plain_rotate, x, *tables(3, 8))                            # float32 comes out, as from torch


def test_rotate_gradcheck():
    x = randn(2, 3, 2, 6, dtype=torch.float64).requires_grad_()
    c, s = (randn(3, 4, dtype=torch.float64, seed=i) for i in (1, 2))          # no rotation: all four entries differ
    assert torch.autograd.gradcheck(lambda x: kb.rotate(x, c, s), (x,), fast_mode=True)


# ------------------------------------------------------------------------------------------------------------ gates
PAIRS = [(kb.swiglu, plain.swiglu), (kb.geglu, plain.geglu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mine, theirs", PAIRS, ids=["swiglu", "geglu"])
def test_gates(mine, theirs, dtype):
    for shape in [(1,), (3, 5, 96), (2, 2500)]:
        g, u = randn(*shape, dtype=dtype, scale=3), randn(*shape, dtype=dtype, seed=1)
        checked(mine, theirs, g, u)
    both = randn(4, 2, 60, dtype=dtype)
    checked(mine, theirs, both[:, 0], both[:, 1])                                # halves of one product
    far = torch.tensor([-100.0, 0.0, 100.0], device=DEVICE, dtype=dtype)
    checked(mine, theirs, far, torch.ones_like(far))
    assert mine(g[:0], u[:0]).shape == (0, 2500)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mine, theirs", PAIRS, ids=["swiglu", "geglu"])
def test_gates_backward(mine, theirs, dtype):
    g, u, dy = (randn(7, 300, dtype=dtype, seed=i) for i in range(3))

    def grads(gate, to):
        leaves = [t.detach().to(to).requires_grad_() for t in (g, u)]
        return torch.autograd.grad(gate(*leaves), leaves, dy.to(to))

    with guarded(kb): got = grads(mine, dtype)
    for a, b, c in zip(got, grads(theirs, torch.float64), grads(theirs, dtype)): as_accurate(a, b, c, floor=2)
    wide = [t[:2, :6].double().clone().requires_grad_() for t in (g, u)]
    assert torch.autograd.gradcheck(mine, wide, fast_mode=True)


# ---------------------------------------------------------------------------------------------- torch and the chip
OPS = {
    "rms_norm": lambda: (kb.rms_norm_op, (randn(4, 12).requires_grad_(), randn(12).requires_grad_(), 1e-5)),
    "rotate": lambda: (kb.rotate_op, (randn(1, 3, 2, 8).requires_grad_(), *tables(3, 8), False)),
    "glu": lambda: (kb.glu_op, (randn(3, 20).requires_grad_(), randn(3, 20, seed=1).requires_grad_(), True)),
}


def test_without_an_interpreter_the_ops_are_plain_on_a_cpu(monkeypatch):
    monkeypatch.setattr(kb, "interpreting", lambda: False)
    x, w, cos, sin = (t.cpu() for t in (randn(2, 3, 2, 8), randn(8, seed=1), randn(3, 4, seed=2), randn(3, 4, seed=3)))
    cases = [(lambda x: kb.rms_norm(x, w, 1e-5), lambda x: plain.rms_norm(x, w, 1e-5)),
             (lambda x: kb.rotate(x, cos, sin), lambda x: plain_rotate(x, cos, sin)),
             (lambda x: kb.swiglu(x, x.flip(0)), lambda x: plain.swiglu(x, x.flip(0))),
             (lambda x: kb.geglu(x.flip(0), x), lambda x: plain.geglu(x.flip(0), x))]
    for mine, theirs in cases:
        leaf = x.clone().requires_grad_()
        got, want = (torch.autograd.grad(f(leaf).square().sum(), leaf)[0] for f in (mine, theirs))
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_torch_accepts_the_op(name):
    torch.library.opcheck(*OPS[name]())


def test_hopper_code_spills_nothing():
    wide = [x for t in ("*bf16", "*fp32") for x in kb.launches(t, 16384) if "norm" in x.kernel]
    table = resources(*kb.launches(), *wide)
    assert (table[["stack", "spills"]] == 0).all().all(), table
    assert (table.shared <= 227 * 1024).all() and (table.wide_loads + table.cp_async > 0).all(), table


# ---------------------------------------------------------------------------------------------- what must be refused
@pytest.mark.parametrize("call", [
    lambda: kb.rms_norm(randn(3, 4).int(), None, 1e-5),
    lambda: kb.rms_norm(randn(3, 4), randn(5), 1e-5),
    lambda: kb.rms_norm(randn(3, 0), None, 1e-5),
    lambda: kb.layer_norm(randn(1, kb.MOST + 1), None, None, 1e-5),
    lambda: kb.rms_norm(torch.empty(3, 4, device="meta"), None, 1e-5),
    lambda: kb.add_norm(randn(3, 4), randn(4, 3), None, 1e-5),
    lambda: kb.rotate(randn(2, 3, 4), *tables(3, 4)),
    lambda: kb.rotate(randn(1, 3, 2, 4), *tables(4, 4)),
    lambda: kb.rotate(randn(1, 3, 2, 4), *tables(3, 6)),
    lambda: kb.rotate(randn(1, 3, 2, 4), *(t.long() for t in tables(3, 4))),
    lambda: kb.rotate_in_place(randn(1, 3, 2, 4).half(), randn(1, 3, 1, 4).half(), *tables(3, 4)),
    lambda: kb.rotate_in_place(randn(1, 3, 2, 4), randn(1, 3, 1, 6), *tables(3, 4)),
    lambda: kb.rotate_in_place(randn(1, 3, 4, 2).mT, randn(1, 3, 2, 4), *tables(3, 4)),
    lambda: kb.rotate_in_place(randn(1, 3, 2, 4).requires_grad_(), randn(1, 3, 2, 4), *tables(3, 4)),
    lambda: kb.swiglu(randn(3), randn(4)),
    lambda: kb.geglu(randn(3), randn(3).half()),
])
def test_bad_input_is_named(call):
    "The message says what the kernel takes."
    with pytest.raises(InputError, match="takes"): call()


def wrong_mean(x, w, eps): return kb.rms_norm(x, w, eps) * (1 + 1 / x.shape[-1])                # n - 1 for n
def wrong_eps(x, w, eps): return kb.rms_norm(x, w, 0.0)
def wrong_rounding(x, w, eps): return (kb.rms_norm(x, None, eps).to(torch.bfloat16) * w.to(torch.bfloat16)).to(x.dtype)


@pytest.mark.parametrize("wrong", [wrong_mean, wrong_eps, wrong_rounding])
def test_wrong_norms_are_rejected(wrong):
    x, w = randn(3, 96, scale=1e-2), randn(96, seed=1)
    assert rejects(checked, wrong, plain.rms_norm, x, w, 1e-5)


@pytest.mark.parametrize("wrong", [
    lambda x, c, s: kb.rotate(x, c, -s), lambda x, c, s: kb.rotate(x, s, c),
    lambda x, c, s: kb.rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), c, s),     # pairs of neighbours
], ids=["backwards", "swapped", "interleaved"])
def test_wrong_rotations_are_rejected(wrong):
    assert rejects(checked, wrong, plain_rotate, randn(1, 4, 2, 16), *tables(4, 16))


def test_a_wrong_gate_is_rejected():
    g, u = randn(5, 60), randn(5, 60, seed=1)
    assert rejects(checked, kb.geglu, plain.swiglu, g, u)
    assert rejects(checked, lambda g, u: kb.swiglu(u, g), plain.swiglu, g, u)
    exact = lambda g, u: torch.nn.functional.gelu(g) * u                         # GELU without the tanh
    assert rejects(checked, kb.geglu, exact, g * 2, u)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_real_shapes_on_a_gpu(dtype):
    x, w = randn(1024, 4096, dtype=dtype), randn(4096, dtype=dtype, seed=1)
    checked(kb.rms_norm, plain.rms_norm, x, w, 1e-5)
    checked(kb.rms_norm, plain.rms_norm, randn(64, 65536, dtype=dtype), None, 1e-5)
    checked(kb.swiglu, plain.swiglu, x, x.flip(0))
    checked(kb.rotate, plain_rotate, x.view(1, 1024, 32, 128), *tables(1024, 128, dtype=dtype))
    rstd = kb.normed(x, None, w, 1e-5)[2]
    for mine, plainly in zip(kb.normed_backward(x.flip(0), x, w, rstd), kb._plain_backward(x.flip(0), x, w, rstd)):
        assert (mine - plainly).abs().max() <= 4 * torch.finfo(dtype).eps * plainly.abs().max()


@pytest.mark.cuda
def test_inside_torch_compile():
    def block(x, w): return kb.swiglu(kb.rms_norm(x, w, 1e-5), x)
    x, w = randn(64, 256), randn(256)
    assert torch.equal(torch.compile(block, fullgraph=True)(x, w), block(x, w))
