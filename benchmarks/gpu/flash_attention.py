"""Flash attention beside SDPA's flash (FA2), cuDNN and memory-efficient kernels: bf16, head size 128, 32 heads over 8.

The kernel in several configurations; a configuration that fails or differs is named and left out.
"""
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import Case
from llm_workbench.architecture.attention import attention
from llm_workbench.kernels import flash_attention as flash
from llm_workbench.kernels.flash_attention import Config

H, K, D = 32, 8, 128
GOALS = {"SDPA flash": 1.2, "SDPA cuDNN": 0.85}
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
GLUON = flash.HOPPER[128]
FORWARD = {
    "pointers": Config(64, 64, 4, 3, "pointers"), "descriptors": Config(64, 64, 4, 3),
    "128x128, 8 warps": Config(128, 128, 8, 3), "gluon, one job": GLUON._replace(lasting=False),
    "gluon, lasting": GLUON}
RISKY = ("gluon",)                               # warps that wait for each other: a mistake there never ends
BACKWARD = {   # for dk and dv, for dq
    "32x128 8w 3s, 64x64 4w 3s": (Config(32, 128, 8, 3), Config(64, 64, 4, 3)),
    "32x64 4w 3s, 128x64 8w 3s": (Config(32, 64, 4, 3), Config(128, 64, 8, 3)),
    "64x64 4w 2s, 64x64 4w 2s": (Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    "32x128 8w 4s, 128x64 8w 4s": (Config(32, 128, 8, 4), Config(128, 64, 8, 4))}


def made(B, T, n=3):
    "q, k, v (and what is like q)."
    return [torch.randn(B, T, h, D, device="cuda", dtype=torch.bfloat16) for h in (H, K, K, H)[:n]]


def sdpa(backend, q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend): out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def try_out(kinds):
    "Run the risky kernels once and say which came to an end."
    q, k, v = made(4, 4096)
    for kind in kinds:
        for name in [n for n, c in FORWARD.items() if c.how == kind]:
            flash.flash_forward(q, k, v, config=FORWARD[name])
            torch.cuda.synchronize()
            print(name, flush=True)


def start_trying():
    "In a process of its own, while this one compiles the others."
    code = "import sys; from benchmarks.gpu.flash_attention import *; try_out(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *RISKY], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=Path(__file__).parents[2])


def that_end(process, seconds=45):
    "The names of the risky configurations that came to an end."
    try: out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        print("    some risky configuration does not end")
    if process.returncode: print(f"    risky: {errors.strip()[-400:]}")
    return set(out.splitlines())


def agreeing(named, want, peers):
    "Add to peers what runs and is right; say what is not."
    for name, run in named.items():
        try: got = run()
        except Exception as e:
            print(f"    {name}: {type(e).__name__}: {str(e).splitlines()[0][:150]}")
            continue
        errors = [(g.float() - w.float()).abs().max().item() / w.float().abs().max().item() for g, w in zip(got, want)]
        if max(errors) < 0.02: peers[name] = run
        else: print(f"    {name}: WRONG, relative errors {errors}")
    return peers


def forward_case(B, T, causal, names, ladder=False, trying=None):
    q, k, v = made(B, T)
    run = lambda config: lambda: flash.flash_forward(q, k, v, causal=causal, config=config)
    want = sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
    peers = agreeing({n: run(FORWARD[n]) for n in names if FORWARD[n].how not in RISKY}, want, {"ours": run(None)})
    if trying:
        safe = that_end(trying)
        for name in [n for n, c in FORWARD.items() if c.how in RISKY and n not in safe]: del FORWARD[name]
    agreeing({n: run(FORWARD[n]) for n in names if n in FORWARD and FORWARD[n].how in RISKY}, want, peers)
    for name, backend in BACKENDS.items(): peers[name] = lambda backend=backend: sdpa(backend, q, k, v, causal)
    if ladder:
        wide = [x.repeat_interleave(H // K, 2) for x in (k, v)]                 # it knows no groups
        peers["SDPA efficient"] = lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION, q, *wide, causal)
        agreeing({"naive": lambda: (attention(q, k, v, causal=causal),),
                  "tiled": lambda: (flash.tiled_attention(q, k, v, causal=causal),)}, want, peers)
    flops = 4 * B * H * T * T * D / (1 + causal)
    return Case(f"forward {'causal' if causal else 'full'} B{B} T{T}", peers, flops=flops, roof="bf16",
                nbytes=2 * q.nbytes + k.nbytes + v.nbytes, goals=GOALS)


def backward_case(B, T, causal, names):
    q, k, v, grad = made(B, T, 4)
    out, lse = flash.flash_forward(q, k, v, causal=causal)
    run = lambda configs: lambda: flash.flash_backward(grad, q, k, v, out, lse, causal=causal, configs=configs)[:3]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    def backward(backend):
        result = sdpa(backend, *leaves, causal)
        return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)
    theirs = {}
    for name, backend in BACKENDS.items():
        try: theirs[name] = backward(backend)
        except Exception as e: print(f"    {name}: {type(e).__name__}: {str(e).splitlines()[0][:150]}")
    peers = agreeing({n: run(BACKWARD[n]) for n in names}, next(iter(theirs.values()))(), {"ours": run(None)}) | theirs
    flops = 10 * B * H * T * T * D / (1 + causal)
    return Case(f"backward {'causal' if causal else 'full'} B{B} T{T}", peers, flops=flops, roof="bf16",
                goals={"SDPA flash": 1.0}, graph=False)


def cases():
    trying = start_trying()
    yield forward_case(4, 4096, True, list(FORWARD), True, trying)
    yield backward_case(4, 4096, True, BACKWARD)
    few = [n for n, c in FORWARD.items() if n == "descriptors" or c.how in RISKY]
    for B, T, causal in ((1, 16384, True), (2, 8192, True), (2, 8192, False)): yield forward_case(B, T, causal, few)
    yield backward_case(2, 8192, True, ())
