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
FORWARD = {
    "128x128 8w 2s": Config(128, 128, 8, 2), "128x128 8w 3s": Config(128, 128, 8, 3), "128x64 8w 3s": Config(128, 64, 8, 3),
    "128x64 8w 4s": Config(128, 64, 8, 4), "64x128 4w 2s": Config(64, 128, 4, 2), "64x64 4w 3s": Config(64, 64, 4, 3),
    "ws 128x128 2s": Config(128, 128, 4, 2, "roles"), "ws 128x64 3s": Config(128, 64, 4, 3, "roles"),
    "gluon 128x128 2s": Config(128, 128, 4, 2, "gluon"), "gluon 128x64 4s": Config(128, 64, 4, 4, "gluon"),
    "pointers 128x128 8w 2s": Config(128, 128, 8, 2, "pointers"),
    "pointers 128x64 8w 3s": Config(128, 64, 8, 3, "pointers")}
FEW = ("128x128 8w 3s", "128x64 8w 3s", "ws 128x128 2s", "gluon 128x128 2s", "gluon 128x64 4s")
BACKWARD = {   # for dk and dv, for dq
    "64x128, 128x64": (Config(64, 128, 8, 2), Config(128, 64, 8, 2)), "3s": (Config(64, 128, 8, 3), Config(128, 64, 8, 3)),
    "64x64 4w, 64x64 4w": (Config(64, 64, 4, 2), Config(64, 64, 4, 2)), "pointers": (Config(64, 128, 8, 2, "pointers"), Config(128, 64, 8, 2, "pointers")),
    "32x128, 128x128": (Config(32, 128, 8, 3), Config(128, 128, 8, 2)), "64x64 8w, 64x128 4w": (Config(64, 64, 8, 2), Config(64, 128, 4, 2))}


def tried(kind):
    "Whether a kind of kernel ends at all, found out in a process of its own: warps that wait for each other can wait for ever."
    code = f"from benchmarks.gpu.flash_attention import *; [try_out(c) for c in FORWARD.values() if c.how == {kind!r}]"
    try: done = subprocess.run([sys.executable, "-c", code], timeout=90, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    except subprocess.TimeoutExpired: print(f"    {kind}: does not end")
    else:
        if not done.returncode: return True
        print(f"    {kind}: {done.stderr.strip()[-300:]}")
    return False


def try_out(config):
    q, k, v = made(1, 1000)
    for causal in (True, False): flash.flash_forward(q, k, v, causal=causal, config=config)
    torch.cuda.synchronize()


def made(B, T, n=3):
    "q, k, v (and what is like q)."
    return [torch.randn(B, T, h, D, device="cuda", dtype=torch.bfloat16) for h in (H, K, K, H)[:n]]


def sdpa(backend, q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend): return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


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


def forward_case(B, T, causal, configs, more=()):
    q, k, v = made(B, T)
    run = lambda config: lambda: flash.flash_forward(q, k, v, causal=causal, config=config)
    want = sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
    named = {name: run(FORWARD[name]) for name in configs if name in FORWARD}
    if "ladder" in more:
        named["naive"] = lambda: (attention(q, k, v, causal=causal),)
        named["tiled"] = lambda: (flash.tiled_attention(q, k, v, causal=causal),)
    peers = agreeing(named, want, {"ours": run(None)})
    for name, backend in BACKENDS.items(): peers[name] = lambda backend=backend: sdpa(backend, q, k, v, causal)
    if "ladder" in more:
        wide = [x.repeat_interleave(H // K, 2) for x in (k, v)]                 # it knows no groups
        peers["SDPA efficient"] = lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION, q, *wide, causal)
    return Case(f"forward {'causal' if causal else 'full'} B{B} T{T}", peers, flops=4 * B * H * T * T * D / (1 + causal), roof="bf16",
                nbytes=2 * (2 * q.nbytes + k.nbytes + v.nbytes) / 2, goals=GOALS)


def backward_case(B, T, causal, configs):
    q, k, v, grad = made(B, T, 4)
    out, lse = flash.flash_forward(q, k, v, causal=causal)
    run = lambda configs: lambda: flash.flash_backward(grad, q, k, v, out, lse, causal=causal, configs=configs)[:3]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    def backward(backend):
        result = sdpa(backend, *leaves, causal)
        return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)
    theirs = {name: backward(backend) for name, backend in BACKENDS.items()}
    peers = agreeing({name: run(BACKWARD[name]) for name in configs}, theirs["SDPA flash"](), {"ours": run(None)})
    peers = peers | theirs
    return Case(f"backward {'causal' if causal else 'full'} B{B} T{T}", peers, flops=10 * B * H * T * T * D / (1 + causal), roof="bf16",
                goals={"SDPA flash": 1.0}, graph=False)


def cases():
    for kind in ("roles", "gluon"):
        if not tried(kind):
            for name in [n for n, c in FORWARD.items() if c.how == kind]: del FORWARD[name]
    yield forward_case(4, 4096, True, FORWARD, ("ladder",))
    yield backward_case(4, 4096, True, BACKWARD)
    yield forward_case(1, 16384, True, FEW)
    yield forward_case(2, 8192, True, FEW)
    yield forward_case(2, 8192, False, FEW)
    yield backward_case(2, 8192, True, ())
