"The matrix product in Triton: every way, type and layout, its gradient, float8, and what it has to refuse."
import importlib.util
import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, as_accurate, guarded, randn, rejects

from llm_workbench.errors import InputError
from llm_workbench.kernels import matmul as module
from llm_workbench.kernels.launching import resources
from llm_workbench.kernels.matmul import (CONFIGS, Config, compiled_as, float8, linear, matmul, matmul_op)

pytestmark = pytest.mark.triton
WAYS = {"pointers": Config(64, 32, 32, warps=4, stages=2, group=2, how="pointers"),
        "tiles": Config(64, 32, 32, warps=4, stages=2, group=2, how="tiles"),
        "persistent": Config(64, 32, 32, warps=4, stages=2, group=2),
        "in halves": Config(64, 64, 32, warps=4, stages=2, split=2)}
FLOAT8 = torch.float8_e4m3fn


def agrees(x, w, bias=None, **options):
    "One product against torch in float64 and in its own dtype."
    want = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    with guarded(module): got = matmul(x, w, bias, **options)
    return as_accurate(got, want, F.linear(x, w, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way(way, dtype):
    x, w, bias = randn(130, 88, dtype=dtype), randn(104, 88, dtype=dtype, seed=1), randn(104, dtype=dtype, seed=2)
    agrees(x, w, config=WAYS[way])
    agrees(x, w, bias, config=WAYS[way])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M,N,K", [(1, 1, 1), (1, 40, 72), (5, 9, 72), (16, 33, 260), (17, 8, 8), (65, 7, 24),
                                   (200, 264, 40)])
def test_as_it_chooses(M, N, K, dtype):
    x, w, bias = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1), randn(N, dtype=dtype, seed=2)
    agrees(x, w, bias)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(M=st.integers(1, 80), N=st.integers(1, 80), K=st.integers(1, 80), seed=st.integers(0, 99))
def test_any_shape(M, N, K, seed):
    agrees(randn(M, K, dtype=torch.float16, seed=seed), randn(N, K, dtype=torch.float16, seed=seed + 1),
           randn(N, dtype=torch.float16))


LAYOUTS = {"transposed x": lambda: (randn(72, 40, dtype=torch.bfloat16).t(),
                                    randn(48, 72, dtype=torch.bfloat16, seed=1)),
           "transposed w": lambda: (randn(40, 72, dtype=torch.bfloat16),
                                    randn(72, 48, dtype=torch.bfloat16, seed=1).t()),
           "both transposed": lambda: (randn(72, 40, dtype=torch.bfloat16).t(),
                                       randn(72, 48, dtype=torch.bfloat16, seed=1).t()),
           "columns of a wider one": lambda: (randn(40, 96, dtype=torch.bfloat16)[:, 8:80],
                                              randn(48, 72, dtype=torch.bfloat16, seed=1)),
           "every second row": lambda: (randn(80, 72, dtype=torch.bfloat16)[::2],
                                        randn(96, 72, dtype=torch.bfloat16, seed=1)[::2]),
           "every second column": lambda: (randn(40, 144, dtype=torch.bfloat16)[:, ::2],
                                           randn(48, 72, dtype=torch.bfloat16, seed=1)),
           "not at 16 bytes": lambda: (randn(40 * 72 + 1, dtype=torch.bfloat16)[1:].view(40, 72),
                                       randn(48, 72, dtype=torch.bfloat16, seed=1)),
           "one row, repeated": lambda: (randn(1, 72, dtype=torch.bfloat16).expand(40, 72),
                                         randn(48, 72, dtype=torch.bfloat16, seed=1)),
           "four dimensions": lambda: (randn(2, 3, 4, 72, dtype=torch.bfloat16).transpose(0, 1),
                                       randn(48, 72, dtype=torch.bfloat16, seed=1)),
           "one dimension": lambda: (randn(72, dtype=torch.bfloat16), randn(48, 72, dtype=torch.bfloat16, seed=1)),
           "a narrow last dimension": lambda: (randn(40, 8, dtype=torch.bfloat16),
                                               randn(48, 8, dtype=torch.bfloat16, seed=1)),
           "float32 transposed": lambda: (randn(72, 40).t(), randn(72, 48, seed=1).t())}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    agrees(*LAYOUTS[name]())


@pytest.mark.parametrize("x_t", (False, True))
@pytest.mark.parametrize("w_t", (False, True))
def test_transposed_by_descriptors(x_t, w_t):
    make = lambda *shape, seed: randn(*shape, dtype=torch.float16, seed=seed)
    turn = lambda shape, t, seed: make(*shape[::-1], seed=seed).t() if t else make(*shape, seed=seed)
    agrees(turn((72, 40), x_t, 0), turn((48, 40), w_t, 1), config=WAYS["persistent"])


@pytest.mark.parametrize("way", WAYS)
def test_what_lies_beside_is_not_read_in(way):
    "Both sides are windows of a larger tensor full of NaN."
    def window(rows, cols, seed):
        whole = torch.full((rows + 8, cols + 16), float("nan"), dtype=torch.float16, device=DEVICE)
        whole[:rows, 8:8 + cols] = randn(rows, cols, dtype=torch.float16, seed=seed)
        return whole[:rows, 8:8 + cols]
    agrees(window(70, 40, 0), window(40, 40, 1), config=WAYS[way])


@pytest.mark.parametrize("way", [*WAYS, "few"])
def test_infinities_and_nan_stay_in_their_row(way):
    M = 16 if way == "few" else 70
    x, w = randn(M, 40, dtype=torch.float16), randn(40, 40, dtype=torch.float16, seed=1)
    x[3, 7], x[4, 39] = float("inf"), float("nan")
    got = matmul(x, w, config=CONFIGS["few"][2] if way == "few" else WAYS[way])
    assert got[3].isinf().all() and got[4].isnan().all()
    rest = [i for i in range(M) if i not in (3, 4)]
    as_accurate(got[rest], x[rest].double() @ w.double().t(), x[rest] @ w.t())


def test_large_sums_are_held_in_float32():
    "300 products of 225: the sum is past what float16 can add one by one, and the difference of two is exact."
    x = torch.full((40, 600), 15.0, dtype=torch.float16, device=DEVICE)
    w = x.clone()
    w[:, 300:] = -15.0
    assert matmul(x, w).eq(0).all() and matmul(x[:2], w[:9]).eq(0).all()
    big = matmul(x[:, :300] * 4, w[:, :300])                                 # 270,000 does not fit into float16
    assert big.isinf().all() and matmul(x[:, :300], w[:, :300], out_dtype=torch.float32).eq(67500).all()


@pytest.mark.parametrize("M,N,K", [(0, 8, 8), (8, 0, 8), (0, 0, 0), (3, 8, 0)])
def test_nothing(M, N, K):
    x, w, bias = randn(M, K), randn(N, K), randn(N)
    assert torch.equal(matmul(x, w, bias), F.linear(x, w, bias))
    assert torch.equal(matmul(randn(20, 24)[:, :0], randn(20, 24)[:, :0]), torch.zeros(20, 20, device=DEVICE))
    assert torch.equal(matmul(x.half(), w.half()), F.linear(x.half(), w.half()))


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("by_row", (False, True), ids=("one scale", "a scale a row"))
def test_float8(by_row, way):
    wide = randn(70, 96), randn(48, 96, seed=1) * torch.linspace(0.01, 30, 48, device=DEVICE)[:, None]
    (x, x_scale), (w, w_scale) = (float8(t, by_row) for t in wide)
    bias = randn(48, dtype=torch.bfloat16)
    want = F.linear(x.double() * x_scale, w.double() * w_scale, bias.double())
    eager = F.linear((x.float() * x_scale), (w.float() * w_scale), bias.float()).bfloat16()
    config = WAYS[way] if way else None
    with guarded(module): got = matmul(x, w, bias, x_scale=x_scale, w_scale=w_scale, config=config)
    as_accurate(got, want, eager, floor=2.0)
    plain = matmul(x, w, out_dtype=torch.float32, config=config)              # without scales: the numbers themselves
    as_accurate(plain, x.double() @ w.double().t(), x.float() @ w.float().t(),
                floor=2.0**12 if DEVICE == "cuda" else 1.0)
    exact = matmul(x, w, x_scale=x_scale.view(-1), w_scale=w_scale.view(-1),
                   config=Config(64, 32, 32, warps=4, exact=True))
    as_accurate(exact, want - bias.double(), (eager.float() - bias.float()).bfloat16(), floor=2.0)


def test_float8_rounds_to_the_nearest_and_never_beyond_the_largest():
    x = randn(30, 40) * 1000
    x[3] = 0
    for by_row in (False, True):
        q, scale = float8(x, by_row)
        assert q.dtype == FLOAT8 and q.float().abs().max() == 448 and not q.float().isnan().any()
        assert ((q.float() * scale - x).abs() <= x.abs() / 16 + scale * 2.0**-10).all()
    assert float8(torch.zeros(2, 8, device=DEVICE))[0].float().eq(0).all()


# --- the op ----------------------------------------------------------------------------------------------------------

def test_gradients_in_float64():
    args = [randn(2, 2, 4, dtype=torch.float64), randn(3, 4, dtype=torch.float64, seed=1),
            randn(3, dtype=torch.float64, seed=2)]
    for t in args: t.requires_grad_()
    assert torch.autograd.gradcheck(matmul_op, args)
    assert torch.autograd.gradcheck(lambda x, w: matmul_op(x, w), args[:2])
    assert torch.autograd.gradgradcheck(lambda x, w: matmul_op(x, w),
                                        [t.detach()[:1].clone().requires_grad_() for t in args[:2]], fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_as_good_as_those_of_torch(dtype):
    parts = [randn(3, 30, 40, dtype=dtype), randn(48, 40, dtype=dtype, seed=1), randn(48, dtype=dtype, seed=2)]
    above = randn(3, 30, 48, dtype=dtype, seed=3)
    def gradients(function, cast):
        leaves = [cast(t).detach().requires_grad_() for t in parts]
        return torch.autograd.grad(function(*leaves), leaves, cast(above))
    for got, want, eager in zip(gradients(linear, lambda t: t), gradients(F.linear, lambda t: t.double()),
                                gradients(F.linear, lambda t: t)):
        as_accurate(got, want, eager)


def test_only_the_gradients_that_are_wanted():
    x, w = randn(20, 8).requires_grad_(), randn(8, 8)
    linear(x, w).sum().backward()
    assert w.grad is None and torch.allclose(x.grad, w.sum(0).expand(20, 8), atol=1e-5)


def test_opcheck():
    x, w, bias = randn(2, 20, 16), randn(24, 16, seed=1), randn(24, seed=2)
    for args in ((x, w), (x.requires_grad_(), w.requires_grad_(), bias)): torch.library.opcheck(matmul_op, args)


def test_inside_compile():
    x, w, bias = randn(20, 16), randn(24, 16, seed=1), randn(24, seed=2)
    run = torch.compile(lambda x: linear(x, w, bias).relu(), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), linear(x, w, bias).relu())


def test_plain_where_kernels_do_not_run(monkeypatch):
    if DEVICE == "cuda": x, w, bias = (t.cpu() for t in (randn(20, 16), randn(24, 16), randn(24)))
    else: x, w, bias = randn(20, 16), randn(24, 16), randn(24)
    monkeypatch.setattr(module, "interpreting", lambda: False)
    monkeypatch.setattr(module, "matmul", lambda *a, **k: pytest.fail("the kernel was called"))
    assert torch.equal(linear(x, w, bias), F.linear(x, w, bias))


def test_precision_follows_torch(monkeypatch):
    seen = []
    monkeypatch.setitem(module.LAUNCH, "pointers", lambda *a: seen.append(a[-1]))
    monkeypatch.setitem(module.LAUNCH, "persistent", lambda *a: seen.append(a[-1]))
    for setting in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
        linear(randn(40, 8), randn(8, 8))
    assert seen == ["ieee", "tf32"]


# --- what it refuses -------------------------------------------------------------------------------------------------

def refused(**change):
    args = {**dict(x=randn(4, 16), w=randn(8, 16), bias=randn(8)), **change}
    return args


BAD = {"alike": lambda: refused(x=randn(4, 16).half()),
       "int8": lambda: refused(x=torch.ones(4, 16, dtype=torch.int8, device=DEVICE)),
       "x (..., K)": lambda: refused(x=randn(4, 15)), "(8, 16, 1)": lambda: refused(w=randn(8, 16, 1)),
       "a bias": lambda: refused(bias=randn(9)), "precision": lambda: refused(precision="tf16"),
       "only with float8": lambda: refused(x_scale=randn(1), w_scale=randn(1)),
       "both sides or none": lambda: refused(x=randn(4, 16).to(FLOAT8), w=randn(8, 16).to(FLOAT8), x_scale=randn(1)),
       "one or 4 numbers": lambda: refused(x=randn(4, 16).to(FLOAT8), w=randn(8, 16).to(FLOAT8), x_scale=randn(3),
                                           w_scale=randn(1)),
       "multiples of 16 bytes": lambda: refused(x=randn(4, 15), w=randn(8, 15), config=WAYS["tiles"]),
       "at most 16 rows": lambda: refused(x=randn(17, 16), config=CONFIGS["few"][4]),
       "one device": lambda: refused(w=torch.empty(8, 16, device="meta"))}


@pytest.mark.parametrize("says", BAD)
def test_bad_input(says):
    with pytest.raises(InputError) as error: matmul(**BAD[says]())
    assert says in str(error.value), error.value


# --- known wrong variants ---------------------------------------------------------------------------------------------

def wrong(name, right, instead, folder):
    "The chapter's kernels in a module of their own, with a piece of the source of one exchanged."
    text = "from llm_workbench.kernels.launching import tl, triton\n"
    for each in ("tile_at", "added", "matmul_kernel", "matmul_tma_kernel"):
        source = "@triton.jit\n" + inspect.getsource(getattr(module, each).fn).removeprefix("@triton.jit\n")
        assert each != name or source.count(right), f"{name} has no {right!r}"
        text += "\n" + (source.replace(right, instead) if each == name else source)
    path = folder / "wrong_kernels.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


WRONG = {
    "the last step is forgotten": ("matmul_kernel", "range(0, K, BLOCK_K)",
                                   "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)", "pointers"),
    "numbers beyond K are read": ("matmul_kernel", "< K - k", "< K", "pointers"),
    "a column beyond N is written": ("matmul_kernel", "& (cols < N)[None, :]", "& (cols < N + 1)[None, :]", "pointers"),
    "the last group is as high as the others": ("tile_at", "tl.minimum(tiles_m - first, GROUP)", "GROUP", "pointers"),
    "the bias of the next column": ("matmul_tma_kernel", "bias_ptr + cols,", "bias_ptr + (cols + 1) % N,",
                                    "persistent"),
    "only the first tile of a program": ("matmul_tma_kernel", "tiles_m * tiles_n, tl.num",
                                         "tl.num_programs(0), tl.num", "persistent"),
    "halves exchanged": ("matmul_tma_kernel", "left, right = acc", "right, left = acc", "in halves"),
    "added up in float16": ("added", "acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)",
                            "acc = (acc + tl.dot(x, w, input_precision=PRECISION)).to(tl.float16).to(tl.float32)",
                            "pointers"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_variants_are_rejected(mistake, monkeypatch, tmp_path):
    name, right, instead, way = WRONG[mistake]
    made = wrong(name, right, instead, tmp_path)
    for kernel in ("matmul_kernel", "matmul_tma_kernel"): monkeypatch.setattr(module, kernel, getattr(made, kernel))
    shapes = (260, 1040), (104, 1040), (104,)
    x, w, bias = (randn(*shape, dtype=torch.float16, seed=i) for i, shape in enumerate(shapes))
    if mistake != "added up in float16": x, w = x[:, :88], w[:, :88]
    monkeypatch.setattr(module, "multiprocessors", lambda device: 3)          # fewer programs than tiles, on a GPU, too
    assert rejects(agrees, x, w, bias, config=WAYS[way])


# --- what the compiler makes of it -----------------------------------------------------------------------------------

def test_compiled_for_sm_90():
    half, launches = torch.bfloat16, []
    for kind in ("large", "small", "pointers"):
        launches += [compiled_as(CONFIGS[kind][2], half, bias=True), compiled_as(CONFIGS[kind][1], FLOAT8, scaled=True)]
        launches += [compiled_as(CONFIGS[kind][4], torch.float32, precision="ieee" if kind == "pointers" else "tf32")]
    launches += [compiled_as(CONFIGS["large"][2], dtype, x_t=t, w_t=True, label=f"transposed {t}")
                 for dtype, t in ((half, True), (torch.float16, False))]
    launches += [compiled_as(CONFIGS["pointers"][8], torch.float64), compiled_as(CONFIGS["one"], half),
                 compiled_as(CONFIGS["few"][2], half)]
    launches += [compiled_as(CONFIGS["one"], torch.float32), compiled_as(CONFIGS["few"][4], torch.float32)]
    table = resources(*launches)
    assert (table["stack"] == 0).all() and (table.spills == 0).all(), table
    assert (table.shared <= 227 * 1024).all(), table
    narrow = table[~table.index.str.contains("fp32 pointers|fp64|few")]
    assert (narrow.wgmma > 0).all(), narrow
    assert (table.tma[table.index.str.contains("persistent|transposed")] > 0).all(), table


# --- on a GPU ---------------------------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M,N,K", [(4096, 4096, 4096), (1000, 14336, 4096), (4096, 1000, 1032), (1, 4096, 14336),
                                   (7, 4096, 4096)])
def test_real_shapes(M, N, K, dtype):
    agrees(randn(M, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1), randn(N, dtype=dtype, seed=2))


@pytest.mark.cuda
@pytest.mark.parametrize("size", CONFIGS["pointers"])
def test_every_configuration_of_the_table(size):
    dtype = {1: FLOAT8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[size]
    x, w = (randn(600, 528, seed=i).to(dtype) for i in range(2))
    for kind in ("large", "small", "pointers"):
        if size not in CONFIGS[kind]: continue
        precision = "ieee" if kind == "pointers" else "tf32"
        got = matmul(x, w, config=CONFIGS[kind][size], precision=precision)
        if size < 4: as_accurate(got, x.double() @ w.double().t(), (x.float() @ w.float().t()).bfloat16()); continue
        error = (got.double() - x.double() @ w.double().t()).abs().max().item()
        assert error <= {4: 1e-3 if precision == "ieee" else 0.2, 8: 1e-9}[size], (kind, error)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, FLOAT8], ids=str)
def test_sums_as_they_are(dtype):
    x, w = (randn(2000, 2048, seed=i).to(dtype) for i in range(2))
    eager = lambda t: torch.mm(t, w.t(), out_dtype=torch.float32)           # tensor cores cut sums off, for cuBLAS too
    for t in (x, x[:200]):
        as_accurate(matmul(t, w, out_dtype=torch.float32), t.double() @ w.double().t(),
                    t.float() @ w.float().t() if dtype == FLOAT8 else eager(t),
                    floor=2.0**16 if dtype == FLOAT8 else 4.0)


@pytest.mark.cuda
def test_tf32_is_asked_for():
    x, w = randn(512, 512), randn(512, 512, seed=1)
    want = x.double() @ w.double().t()
    error = {p: (matmul(x, w, precision=p) - want).abs().max().item() for p in ("ieee", "tf32")}
    assert error["ieee"] < 1e-3 < error["tf32"] < 0.2
