"Norms, RoPE and gates at the shapes of 8B and 405B models, beside torch op by op, torch.compile and the lower rungs."
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from benchmarks.kernels import Case
from llm_workbench.architecture import norms_and_mlps as plain
from llm_workbench.architecture.rope import inverse_frequencies, rope_tables
from llm_workbench.architecture.rope import rotate as plain_rotate
from llm_workbench.kernels import bytes as kb


def randn(*shape): return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@triton.jit
def persistent_norm_kernel(x_ptr, weight_ptr, out_ptr, n_rows, n_cols, eps, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    "A rung: few programs, each with many rows; the weight stays in registers, the next row is under way."
    col = tl.arange(0, BLOCK)                                                    # (BLOCK,)
    inside = col < n_cols
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), n_rows, tl.num_programs(0), num_stages=STAGES):
        x = tl.load(x_ptr + row * n_cols + col, mask=inside, other=0.0).to(tl.float32)
        y = (x / tl.sqrt(tl.sum(x * x) / n_cols + eps)).to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + row * n_cols + col, (y * weight).to(out_ptr.dtype.element_ty), mask=inside)


def norm_rungs(x, w):
    "The same norm in other ways: functions without arguments by name."
    (N, C), out = x.shape, torch.empty_like(x)
    rstd = torch.empty(N, device="cuda")
    args = (x, x, w, out, out, rstd, N, C, C, 0, 1, 1e-6)
    how = dict(RESIDUAL=False, WEIGHT=True, ROUND=True, ACC=tl.float32)
    BLOCK = triton.next_power_of_2(C)
    def looped(): kb.rms_norm_loop_kernel[(N,)](*args, BLOCK=1024, **how, num_warps=4)
    def row(warps): return lambda: kb.rms_norm_kernel[(N,)](*args, ROWS=1, BLOCK=BLOCK, **how, num_warps=warps)
    def persistent(stages, warps, a_chip):
        return lambda: persistent_norm_kernel[(132 * a_chip,)](x, w, out, N, C, 1e-6, BLOCK=BLOCK, STAGES=stages,
                                                               num_warps=warps)
    return {"a loop, 4 warps": looped, "a row, 4 warps": row(4), "a row, 16 warps": row(16), "a row, 32 warps": row(32),
            "persistent": persistent(1, 8, 6) if C <= 4096 else persistent(1, 16, 3),
            "persistent, 3 stages": persistent(3, 8, 4) if C <= 4096 else persistent(3, 16, 1)}


def swiglu_backward(dy, g, u): return torch.ops.aten.silu_backward(dy * u, g), dy * F.silu(g)


def torch_backward(dy, x, w):
    "Torch's own derivative of F.rms_norm, where this torch has it: {} or the function by name."
    if not hasattr(torch.ops.aten, "_fused_rms_norm_backward"): return {}
    try: _, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], w, 1e-6)
    except (RuntimeError, TypeError): return {}
    return {"F.rms_norm": lambda: torch.ops.aten._fused_rms_norm_backward(dy, x, [x.shape[-1]], rstd, w, [True, True])}


def cases():
    "In the order of the goals; tensors are built when a case is reached."
    eager_norm = lambda x, w: plain.rms_norm(x, w, 1e-6)
    compiled_norm = torch.compile(eager_norm, dynamic=False)
    for N, C in [(16384, 4096), (4096, 16384)]:
        x, w = randn(N, C), randn(C)
        out = torch.empty_like(x)
        yield Case(f"RMSNorm {N} x {C} bf16", {
            "ours": lambda: kb.rms_norm(x, w, 1e-6), "op by op": lambda: eager_norm(x, w),
            "F.rms_norm": lambda: F.rms_norm(x, (C,), w, 1e-6), "compiled": lambda: compiled_norm(x, w),
            "copy": lambda: out.copy_(x), **norm_rungs(x, w)},
            nbytes=2 * x.nbytes + w.nbytes, goals={"copy": 0.95, "F.rms_norm": 1.3})

    x, r, w = randn(16384, 4096), randn(16384, 4096), randn(4096)
    def two_steps(norm):
        def both(x, r, w): return norm(total := x + r, w), total
        return both
    compiled_add = torch.compile(two_steps(eager_norm), dynamic=False)
    fused = two_steps(lambda x, w: F.rms_norm(x, (4096,), w, 1e-6))
    yield Case("add + RMSNorm 16384 x 4096 bf16", {
        "ours": lambda: kb.add_norm(x, r, w, 1e-6), "op by op": lambda: two_steps(eager_norm)(x, r, w),
        "F.rms_norm": lambda: fused(x, r, w), "compiled": lambda: compiled_add(x, r, w)},
        nbytes=4 * x.nbytes + w.nbytes, goals={"copy": 0.95, "op by op": 1.8})

    rstd = kb.normed(x, None, w, 1e-6)[2]
    yield Case("RMSNorm backward 16384 x 4096 bf16", {
        "ours": lambda: kb.normed_backward(r, x, w, rstd), "op by op": lambda: kb._plain_backward(r, x, w, rstd),
        **torch_backward(r, x, w), **backward_rungs(r, x, w)}, nbytes=3 * x.nbytes + 2 * w.nbytes, goals={"copy": 0.8})

    heads, per_head = randn(16384 * 32, 128), randn(128)
    yield Case("RMSNorm of heads 524288 x 128 bf16", {
        "ours": lambda: kb.rms_norm(heads, per_head, 1e-6), "op by op": lambda: eager_norm(heads, per_head),
        "F.rms_norm": lambda: F.rms_norm(heads, (128,), per_head, 1e-6),
        "a row a program": lambda: one_row_each(heads, per_head)}, nbytes=2 * heads.nbytes, goals={"copy": 0.95})
    del heads

    b = randn(4096)
    yield Case("LayerNorm 16384 x 4096 bf16", {
        "ours": lambda: kb.layer_norm(x, w, b, 1e-5), "op by op": lambda: plain.layer_norm(x, w, b, 1e-5),
        "F.layer_norm": lambda: F.layer_norm(x, (4096,), w, b, 1e-5)}, nbytes=2 * x.nbytes, goals={"copy": 0.95})
    del x, r

    B, T, H, K, D = 4, 4096, 32, 8, 128
    q, k = randn(B, T, H, D), randn(B, T, K, D)
    tables = rope_tables(torch.arange(T, device="cuda"), inverse_frequencies(D, device="cuda"), dtype=q.dtype)
    both = lambda turn: lambda: (turn(q, *tables), turn(k, *tables))
    yield Case(f"RoPE {B} x {T}, 32 + 8 heads of 128, bf16", {
        "ours": both(kb.rotate), "ours, in place": lambda: kb.rotate_in_place(q, k, *tables),
        "op by op": both(plain_rotate), "compiled": both(torch.compile(plain_rotate, dynamic=False))},
        nbytes=2 * (q.nbytes + k.nbytes) + 2 * tables[0].nbytes, goals={"copy": 0.9})
    del q, k

    compiled_swiglu = torch.compile(plain.swiglu, dynamic=False)
    g, u, dy = randn(8192, 14336), randn(8192, 14336), randn(8192, 14336)
    out = torch.empty_like(g)
    def blocks(BLOCK, warps):
        grid = (triton.cdiv(g.numel(), BLOCK),)
        return lambda: kb.glu_kernel[grid](g, u, out, g.numel(), grid[0], g.numel(), g.numel(), BLOCK=BLOCK, GELU=False,
                                           ACC=tl.float32, num_warps=warps)
    yield Case("SwiGLU 8192 x 14336 bf16", {
        "ours": lambda: kb.swiglu(g, u), "op by op": lambda: plain.swiglu(g, u),
        "compiled": lambda: compiled_swiglu(g, u), "block 1024, 8 warps": blocks(1024, 8),
        "block 1024, 4 warps": blocks(1024, 4), "block 4096, 8 warps": blocks(4096, 8),
        "block 8192, 8 warps": blocks(8192, 8)}, nbytes=3 * g.nbytes, goals={"copy": 0.95, "compiled": 1.0})
    whole = torch.cat([g, u], -1)
    halves = whole.chunk(2, -1)
    yield Case("GeGLU, halves of one product, 8192 x 14336 bf16", {
        "ours": lambda: kb.geglu(*halves), "op by op": lambda: plain.geglu(*halves)}, nbytes=3 * g.nbytes,
        goals={"copy": 0.9})
    del whole, halves
    compiled_backward = torch.compile(swiglu_backward, dynamic=False)
    yield Case("SwiGLU backward 8192 x 14336 bf16", {
        "ours": lambda: kb.glu_backward(dy, g, u, False), "op by op": lambda: swiglu_backward(dy, g, u),
        "compiled": lambda: compiled_backward(dy, g, u)}, nbytes=5 * g.nbytes, goals={"copy": 0.95})
    del g, u, dy, out

    # one token of an 8B model: what a launch costs when there is nothing to move
    x, w, g = randn(1, 4096), randn(4096), randn(1, 14336)
    yield Case("RMSNorm of one token, 4096", {
        "ours": lambda: kb.rms_norm(x, w, 1e-6), "op by op": lambda: eager_norm(x, w),
        "F.rms_norm": lambda: F.rms_norm(x, (4096,), w, 1e-6)}, nbytes=3 * x.nbytes)


def one_row_each(x, w):
    "A rung: a program for every short row."
    (N, C), out = x.shape, torch.empty_like(x)
    kb.rms_norm_kernel[(N,)](x, x, w, out, out, torch.empty(N, device="cuda"), N, C, C, 0, 1, 1e-6, ROWS=1, BLOCK=C,
                             RESIDUAL=False, WEIGHT=True, ROUND=True, ACC=tl.float32, num_warps=4)


def backward_rungs(dy, x, w):
    "The norm's derivative with other tiles; partial sums and their sum as in `normed_backward`."
    (N, C), dx = x.shape, torch.empty_like(x)
    _, _, rstd = kb.normed(x, None, w, 1e-6)
    def run(stages, warps, programs):
        def go():
            parts = torch.empty((programs, 1, C), device="cuda")
            kb.rms_norm_bwd_kernel[(programs, 1)](dy, x, w, rstd, dx, parts, N, C, 1, ROWS=1, BLOCK=C, STAGES=stages,
                                                  WEIGHT=True, ROUND=True, ACC=tl.float32, num_warps=warps)
            return parts.sum(0).to(w.dtype)
        return go
    return {"1 stage, 16 warps": run(1, 16, 264), "3 stages, 16 warps": run(3, 16, 264),
            "1 stage, 8 warps": run(1, 8, 264), "2 stages, 32 warps": run(2, 32, 132), "1 stage, 16 warps, 528 programs": run(1, 16, 528)}
