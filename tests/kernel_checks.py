"""What every Triton and CUDA kernel has to hold, on a CPU (interpreted) and on a GPU (compiled).

A kernel's error against float64 may be at most twice that of torch's own functions in the same dtype, plus a floor of
some units in the last place; it writes all of its output and nothing beside it.
"""
import contextlib

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GUARD = 64


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    "The same numbers on every machine."
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def as_accurate(got, want, eager, floor=1.0, factor=2.0):
    """`got` is at most `factor` times as far from `want` (float64) as `eager` (same dtype), plus `floor` units in the
    last place of the largest value. Returns its error."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == eager.dtype, f"{got.dtype}, not {eager.dtype}"
    unit = torch.finfo(eager.dtype).eps
    got, want, eager = (x.detach().double().cpu() for x in (got, want, eager))
    finite = want.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7.0), want[~finite].nan_to_num(7.0)), "infinities are elsewhere"
    if not finite.any(): return 0.0
    assert got[finite].isfinite().all(), "NaN or infinity where none belongs"
    mine, theirs = ((x - want)[finite].abs().max().item() for x in (got, eager))
    allowed = factor * theirs + floor * unit * want[finite].abs().max().item()
    assert mine <= allowed, f"error {mine:.2e}, allowed {allowed:.2e} (torch in the same dtype: {theirs:.2e})"
    return mine


def _poison(dtype):
    if dtype.is_floating_point and dtype.itemsize > 1: return float("nan")
    return 1.0 if dtype.is_floating_point else 0x55 if dtype != torch.bool else True


class _Guarded:
    "torch, but what `empty` and `empty_like` give is poisoned and lies between guards."
    def __init__(self): self.made = []

    def __getattr__(self, name): return getattr(torch, name)

    def empty(self, *shape, dtype=None, device=None, **other):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype, n = dtype or torch.get_default_dtype(), torch.Size(shape).numel()
        whole = torch.full((n + 2 * GUARD,), _poison(dtype), dtype=dtype, device=device)
        self.made.append((whole, n))
        return whole[GUARD:GUARD + n].view(shape)

    def empty_like(self, x, dtype=None, device=None, **other):
        return self.empty(tuple(x.shape), dtype=dtype or x.dtype, device=device or x.device)


@contextlib.contextmanager
def guarded(*modules):
    """Inside, memory that these modules allocate with `torch.empty(_like)` is poisoned and lies between guards. What a
    kernel leaves unwritten stays poison and fails the comparison; a guard that changed fails here."""
    fake = _Guarded()
    for module in modules: module.torch = fake
    try: yield
    finally:
        for module in modules: module.torch = torch
    for whole, n in fake.made:
        bits = lambda x: x.contiguous().view(torch.uint8)
        want = torch.full_like(whole[:GUARD], _poison(whole.dtype))
        for side in (whole[:GUARD], whole[GUARD + n:]):
            assert torch.equal(bits(side), bits(want)), "the kernel wrote beside its output"


def rejects(check, *args, **options):
    "True if `check` raises AssertionError: that is what a wrong variant has to bring about."
    try: check(*args, **options)
    except AssertionError: return True
    return False
