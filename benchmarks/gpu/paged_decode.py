"""Attention of one query over a paged cache, and the launch that fills it: 32 heads over 8 of 128 unless said, bf16.

Peers: the pages gathered first and then SDPA; SDPA and flex_attention over a cache that lies in one piece (no pages:
what a paged kernel may cost); other configurations of the kernel, the first of them the rungs of the chapter's ladder.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.kernels import Case
from llm_workbench.architecture.rope import rotate
from llm_workbench.kernels import paged_decode as pd
from llm_workbench.kernels.paged_decode import Config

H, K, D, BF16 = 32, 8, 128, torch.bfloat16


def cut(keys, warps, stages, splits=None, **more): return Config(keys, splits, warps, stages, **more)


def name(c):
    parts = [f"{c.keys} keys", f"{c.warps} warps", f"{c.stages} stages"] + ([f"{c.splits} splits"] if c.splits else [])
    return ", ".join(parts + ["early"] * c.pdl + ["byte by byte"] * (not c.words))


def paged(B, T, page, kv=None, H=H, K=K, D=D):
    "Queries, pages in random order, and whatever else `paged_attention` wants."
    M = T // page
    table = torch.randperm(B * M, device="cuda").int().view(B, M)
    make = lambda: torch.randn(B * M, page, K, D, device="cuda", dtype=BF16)
    k, v = make(), make()
    scales = dict(k_scale=None, v_scale=None)
    if kv: (k, scales["k_scale"]), (v, scales["v_scale"]) = (pd.quantize_heads(x, kv) for x in (k, v))
    lengths = torch.full((B,), T, device="cuda")
    return (torch.randn(B, 1, H, D, device="cuda", dtype=BF16), k, v, table, lengths), scales


def size(args, scales): return sum(t.nbytes for t in (*args[1:3], *scales.values())
                                   if t is not None) + 2 * args[0].nbytes


def error(args, scales, n=2):
    "Relative error of the first rows against float64."
    few = (args[0][:n], *args[1:3], args[3][:n], args[4][:n])
    wide = lambda t: t.double() if t is not None and t.itemsize > 1 else t
    got = pd.paged_attention(*few, **scales).double()
    want = pd.plain_paged(few[0].double(), wide(few[1]), wide(few[2]), *few[3:],
                          **{n: wide(s) for n, s in scales.items()})
    return ((got - want).norm() / want.norm()).item()


def sdpa(q, k, v):
    "SDPA with the heads of a group as its queries."
    B, _, H, D = q.shape
    return F.scaled_dot_product_attention(q.view(B, K, H // K, D), k.transpose(1, 2), v.transpose(1, 2))


def flex(q, k, v):
    "torch's flex_attention, compiled, as it decodes; k and v (B, T, K, D) in one piece."
    from torch.nn.attention.flex_attention import flex_attention
    run = torch.compile(flex_attention)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: run(q, k, v, enable_gqa=True)


def heads_first(x):
    "The same pages, but the tokens of a head lie together: (P, K, S, D) in memory."
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attention(label, B, T, page, kv=None, others=(), goals=None, gather=False, compiled=False):
    args, scales = paged(B, T, page, kv)
    q, k, v, table, lengths = args
    peers = {"ours": lambda: pd.paged_attention(*args, **scales)}
    if gather:
        whole = [x[table.long()].flatten(1, 2) for x in (k, v)]
        def gathered():
            where = table.long()
            return sdpa(q, k[where].flatten(1, 2), v[where].flatten(1, 2))
        peers |= {"gather, SDPA": gathered, "SDPA without pages": lambda: sdpa(q, *whole),
                  "ours without pages": lambda: pd.decode_attention(q, *whole, lengths)}
    if compiled:
        peers["flex_attention without pages"] = flex(q, *whole)
        apart = [heads_first(x) for x in (k, v)]
        peers["ours, heads first"] = lambda: pd.paged_attention(q, *apart, table, lengths)
    peers |= {name(c): (lambda c=c: pd.paged_attention(*args, **scales, config=c)) for c in others}
    return Case(label, peers, size(args, scales), 4 * B * T * H * D, "read", goals or {},
                more=dict(relative_error=error(args, scales)))


def ragged(B, T, page):
    "Rows of every length from T / B to T."
    (q, k, v, table, lengths), _ = paged(B, T, page)
    lengths = torch.arange(1, B + 1, device="cuda") * (T // B)
    nbytes = int(lengths.sum()) * 2 * K * D * 2 + 2 * q.nbytes
    run = lambda config=None: pd.paged_attention(q, k, v, table, lengths, config=config)
    others = [cut(64, 4, 3, s) for s in (1, 6, 12)]
    return Case(f"B{B}, {T // B} to {T}, page {page}", {"ours": run} | {name(c): (lambda c=c: run(c)) for c in others},
                nbytes, 0, "read")


def latent(B, T, page):
    "Multi-head latent attention: 128 heads share one key of 576 numbers, whose first 512 are the value."
    q, k = torch.randn(B, 1, 128, 576, device="cuda", dtype=BF16), torch.randn(B * T // page, page, 1, 576,
                                                                               device="cuda", dtype=BF16)
    table, lengths = torch.randperm(B * T // page, device="cuda").int().view(B, -1), torch.full((B,), T, device="cuda")
    run = lambda config=None: pd.paged_attention(q, k, None, table, lengths, value_dim=512, config=config)
    others = [cut(32, 8, 3), cut(64, 8, 2), cut(32, 8, 3, 4)]
    return Case(f"latent, B{B} x {T}, page {page}", {"ours": run} | {name(c): (lambda c=c: run(c)) for c in others},
                k.nbytes + 2 * q.nbytes, 2 * B * T * 128 * (576 + 512), "read")


def append(kv):
    "16,384 tokens turned, narrowed and written to their pages."
    N, page = 16384, 16
    k, v = (torch.randn(N, K, D, device="cuda", dtype=BF16) for _ in range(2))
    table, at = torch.randperm(N // page, device="cuda").int().view(1, -1), torch.arange(N, device="cuda")
    rows, angles = torch.zeros_like(at), torch.rand(N, D, device="cuda")
    pages = [torch.zeros(N // page, page, K, D, device="cuda", dtype=kv or BF16) for _ in range(2)]
    scales = {n: torch.zeros(N // page, page, K, device="cuda", dtype=torch.float16)
              for n in ("k_scale", "v_scale")} if kv else {}
    args = (k, v, angles.cos(), angles.sin(), *pages, table, rows, at)
    nbytes = sum(t.nbytes for t in (k, v, *args[2:6], *scales.values()))
    def op_by_op():
        turned = rotate(k.float(), *args[2:4])
        where = table[0].long()[at // page], at % page
        for x, to, scale in zip((turned, v), pages, scales.values() or (None, None)):
            if scale is None: to[where] = x.to(to.dtype)
            else:
                codes, scale[where] = pd.quantize_heads(x, kv)
                to.view(torch.uint8)[where] = codes.view(torch.uint8)
    peers = {"ours": lambda: pd.append(*args, **scales), "op by op": op_by_op}
    peers |= {f"{b} lines, {w} warps": (lambda b=b, w=w: pd.append(*args, **scales, block=b, warps=w)) for b,
              w in ((16, 4), (64, 8), (64, 4))}
    return Case(f"append 16384 tokens as {str(kv or BF16)[6:]}", peers, nbytes, 0, "copy", {"copy": 0.85})


def cases():
    early = replace(pd.config_for(D, D, 2, H // K), pdl=True)
    several = [cut(64, 4, 3, s) for s in (1, 2, 6)] + [cut(64, 4, 2, 3), cut(64, 4, 4, 3), cut(128, 8, 3),
                                                       cut(32, 4, 4), early]
    yield attention("B32 x 4096, page 16", 32, 4096, 16, None, several, {"read": 0.9, "gather, SDPA": 1.3,
        "flex_attention without pages": 1.1}, True, True)
    yield attention("B32 x 4096, page 64", 32, 4096, 64, goals={"read": 0.9}, others=[cut(64, 4, 3, 1), cut(64, 4, 3,
                                                                                                            2)])
    yield attention("B1 x 1024, page 16", 1, 1024, 16, gather=True, others=[cut(64, 4, 3, s) for s in (4,
        16)] + [cut(32, 4, 3, 16), early])
    yield attention("B1 x 4096, page 16", 1, 4096, 16, gather=True, others=[cut(64, 4, 3, 1), cut(64, 4, 3, 16),
                                                                            cut(64, 4, 3, 48), early])
    yield attention("B1 x 131072, page 16", 1, 131072, 16, goals={"read": 0.7}, others=[cut(64, 4, 3, 1), cut(64, 4, 3,
        32), cut(64, 4, 3, 128), early])
    for kv in (torch.int8, torch.float8_e4m3fn):
        others = [cut(64, 4, 3), cut(64, 4, 4), cut(128, 8, 3), cut(64, 4, 3, words=False)]
        yield attention(f"B32 x 4096, page 16, KV {str(kv)[6:]}", 32, 4096, 16, kv, others)
    yield ragged(32, 4096, 16)
    yield latent(32, 4096, 64)
    for kv in (None, torch.int8, torch.float8_e4m3fn): yield append(kv)
