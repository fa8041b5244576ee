"One row times a packed matrix, beside cuBLAS in bfloat16 and torch's int4."
import torch
import torch.nn.functional as F

from benchmarks.kernels import Case
from llm_workbench.kernels import quantized_weights as qw
from llm_workbench.quantization.formats import FORMATS
from llm_workbench.quantization.packing import Packed

BIG, MIDDLE, SMALL = (8192, 28672), (4096, 14336), (4096, 4096)
VARIANTS = {BIG: [(4, 2, 6), (4, 2, 4), (8, 4, 2), (8, 2, 3), (4, 8, 3)], MIDDLE: [(4, 4, 4), (8, 2, 3), (16, 2, 1),
                                                                                   (16, 4, 1)],
            SMALL: [(4, 4, 4), (16, 2, 1)]}                             # WARPS, UNROLL, BLOCKS


def random_packed(name, outs, ins):
    "Random codes and scales of a format, made on the GPU."
    format, tensors = FORMATS[name], {}
    if name in qw.BLOCKS:  # not all bytes are blocks: some that were packed, over and over
        blocks = format.pack(torch.randn(64, 256)).data.cuda()
        tensors["data"] = blocks[torch.randint(64, (outs, ins // 256), device="cuda")].view(outs, -1)
        return Packed(format, (outs, ins), tensors)
    for what, (shape, dtype) in format.layout((outs, ins)).items():
        if dtype == torch.uint8: tensors[what] = torch.randint(0, 256, shape, dtype=dtype, device="cuda")
        else: tensors[what] = (torch.rand(shape, device="cuda") * 0.02 + 0.01).to(dtype)
    return Packed(format, (outs, ins), tensors)


def torch_int4(x, outs, ins):
    "torch's own kernel, groups of 128, with codes of no meaning: only its time counts."
    codes = torch.randint(0, 256, (outs, ins // 2), dtype=torch.uint8, device="cuda")
    weight = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(ins // 128, outs, 2, device="cuda", dtype=torch.bfloat16)
    return lambda: torch._weight_int4pack_mm(x, weight, 128, scales)


def nbytes(w): return sum(t.nbytes for t in (w.data, w.scale, w.zero, w.least) if t is not None)


def case(name, shape, rows=1, goals=None, more=()):
    (outs, ins), x = shape, torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    packed = random_packed(name, outs, ins)
    w = qw.prepare(packed)
    dense = torch.randn(outs, ins, device="cuda", dtype=torch.bfloat16)
    peers = {"ours": lambda: qw.product(x, w),
             "cublas bf16": lambda: F.linear(x, dense)}
    if "ladder" in more:
        peers |= {"unpack in torch, cublas": lambda: F.linear(x, packed.unpack(torch.bfloat16)),
                  "triton, two bytes": lambda: qw.gemv(x, w, wide=False), "triton": lambda: qw.gemv(x, w)}
    if "unpack" in more: peers["unpack in triton, cublas"] = lambda: F.linear(x, qw.unpack(w, torch.bfloat16))
    if name == "int4_g128":
        try: peers["torch int4"] = torch_int4(x, outs, ins)
        except Exception as e: print(f"    torch int4: {type(e).__name__}: {str(e)[:150]}")
    if "variants" in more:
        for a, b, c in VARIANTS[shape]:
            if w.kind != "levels" or a < 16: peers[f"cuda {a} warps x{b} {c}/SM"] = lambda k=dict(WARPS=a, UNROLL=b,
                BLOCKS=c): qw.gemv_cuda(x, w, **k)
    if "blocks" in more:
        for blocks in MORE_BLOCKS: peers["triton " + "x".join(map(str, blocks[:3]))] = lambda b=blocks: qw.gemm(x, w, b)
    if "rows" in more:
        peers["eight rows at a time"] = lambda: torch.cat([qw.gemv_cuda(part, w) for part in x.split(qw.MOST)])
    want = x[:8].double() @ qw.unpack(w)[:256].double().T
    error = ((peers["ours"]()[:8, :256] - want).abs().max() / want.abs().max()).item()
    return Case(f"{name} {outs}x{ins}, {rows} row{'s' if rows > 1 else ''}", peers,
                nbytes=nbytes(w) + x.nbytes + rows * outs * 2,
                flops=2 * rows * outs * ins, roof="read", goals=goals or {}, more=dict(error=error,
                    bits=8 * nbytes(w) / (outs * ins)))


MORE_BLOCKS = [(64, 16, 128, 4, 3), (64, 16, 64, 4, 5), (64, 32, 32, 4, 4), (128, 64, 32, 8, 3), (64, 64, 32, 4, 4)]


def cases():
    yield case("int4_g128", BIG, goals={"cublas bf16": 3.0, "read": 0.8}, more=("ladder", "variants", "unpack"))
    yield case("int4_g32", BIG, goals={"cublas bf16": 3.0}, more=("variants",))
    yield case("nf4", BIG, goals={"cublas bf16": 2.5}, more=("ladder", "variants"))
    yield case("int8", BIG, goals={"cublas bf16": 1.8}, more=("ladder", "variants"))
    yield case("int4_g128", MIDDLE, goals={"cublas bf16": 2.5}, more=("ladder", "variants"))
    yield case("int4_g32", MIDDLE, goals={"cublas bf16": 2.5}, more=("variants",))
    yield case("nf4", MIDDLE, goals={"cublas bf16": 2.5}, more=("variants",))
    yield case("int8", MIDDLE, goals={"cublas bf16": 1.8}, more=("variants",))
    yield case("int4_g128", SMALL, more=("variants",))
    for name in "q4_0", "q4_1", "q4_k", "q6_k", "q8_0": yield case(name, MIDDLE)
    for rows in 2, 4, 8: yield case("int4_g128", BIG, rows)
    for rows in 16, 64, 256: yield case("int4_g128", BIG, rows, more=("unpack", "blocks", "rows") if rows < 256
                                        else ("unpack",))
