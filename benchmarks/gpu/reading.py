"Reading memory and nothing else: the roof for kernels that read much and write little."
import torch
import triton
import triton.language as tl


@triton.jit
def read_kernel(x_ptr, out_ptr, per_program, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * per_program
    total = tl.zeros((BLOCK,), tl.float32)
    for at in tl.range(0, per_program, BLOCK, num_stages=4):
        total += tl.load(x_ptr + start + at + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def read_sum(x, programs=1024):
    "Partial sums of x; its size is a multiple of 2 ** 20."
    out = torch.empty(programs, device=x.device)
    read_kernel[(programs,)](x, out, x.numel() // programs, BLOCK=4096, num_warps=8)
    return out
