"One row times a packed matrix, beside cuBLAS in bfloat16 and torch's int4."
import torch
import torch.nn.functional as F

from benchmarks.kernels import Case
from llm_workbench.kernels import quantized_weights as qw
from llm_workbench.quantization.formats import FORMATS
from llm_workbench.quantization.packing import Packed

BIG, MIDDLE = (8192, 28672), (4096, 14336)
VARIANTS = [(8, 1, 4), (8, 2, 3), (8, 4, 2), (4, 2, 6), (4, 4, 5), (16, 1, 2)]      # WARPS, UNROLL, BLOCKS


def random_packed(name, outs, ins):
    "Random codes and scales of a format, made on the GPU."
    format, tensors = FORMATS[name], {}
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


def case(name, shape, rows=1, goals=None, variants=False, triton=True):
    (outs, ins), x = shape, torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    w = qw.prepare(random_packed(name, outs, ins))
    dense = torch.randn(outs, ins, device="cuda", dtype=torch.bfloat16)
    peers = {"ours": lambda: qw.gemv_cuda(x, w), "cublas bf16": lambda: F.linear(x, dense)}
    if triton: peers["triton"] = lambda: qw.gemv(x, w)
    if name == "int4_g128":
        try: peers["torch int4"] = torch_int4(x, outs, ins)
        except Exception as e: print(f"    torch int4: {type(e).__name__}: {str(e)[:150]}")
    if variants:
        for a, b, c in VARIANTS: peers[f"cuda {a} warps x{b} {c}/SM"] = lambda k=dict(WARPS=a, UNROLL=b, BLOCKS=c): qw.gemv_cuda(x, w, **k)
        if triton:
            for n, k, warps in (2, 1024, 4), (8, 512, 4), (1, 2048, 4), (4, 2048, 8):
                peers[f"triton {n}x{k} {warps}"] = lambda c=dict(BLOCK_N=n, BLOCK_K=k, num_warps=warps): qw.gemv(x, w, c)
    return Case(f"{name} {outs}x{ins}, {rows} row{'s' if rows > 1 else ''}", peers, nbytes=nbytes(w) + x.nbytes + rows * outs * 2,
                roof="read", goals=goals or {})


def cases():
    yield case("int4_g128", BIG, goals={"cublas bf16": 3.0, "read": 0.8}, variants=True)
    yield case("int4_g32", BIG, goals={"cublas bf16": 3.0}, variants=True, triton=False)
    yield case("nf4", BIG, goals={"cublas bf16": 2.5}, variants=True)
    yield case("int8", BIG, goals={"cublas bf16": 1.8}, variants=True)
    yield case("int4_g128", MIDDLE, goals={"cublas bf16": 2.5}, variants=True, triton=False)
    yield case("int4_g32", MIDDLE, goals={"cublas bf16": 2.5})
    yield case("nf4", MIDDLE, goals={"cublas bf16": 2.5}, variants=True, triton=False)
    yield case("int8", MIDDLE, goals={"cublas bf16": 1.8}, variants=True, triton=False)
    for rows in 4, 8: yield case("int4_g128", BIG, rows, triton=False)
    for name in "q4_k", "q6_k", "q8_0": yield case(name, MIDDLE, triton=False)
