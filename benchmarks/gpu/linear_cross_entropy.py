"The loss of a vocabulary of 151,936 without its logits: against the bare products, the naive way and its memory."
import torch
import torch.nn.functional as F

from benchmarks.kernels import Case
from llm_workbench.kernels.linear_cross_entropy import launch_linear_cross_entropy


def extra_memory(run, kept):
    "Bytes that `run` needs at its peak beyond what was there and beyond the `kept` bytes that it hands back."
    run()                                                                 # workspaces are there
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del out
    return peak - before - kept


def cases():
    N, C, V = 8192, 4096, 151936
    h = torch.randn(N, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(V, C, device="cuda") * C**-0.5).bfloat16().requires_grad_(True)
    t = torch.randint(V, (N,), device="cuda")
    t[::16] = -100
    grads = h.nbytes + w.nbytes

    def naive():
        loss = F.cross_entropy(F.linear(h, w).float(), t)
        return loss, *torch.autograd.grad(loss, (h, w))
    def naive_narrow():
        loss = F.cross_entropy(F.linear(h, w), t)
        return loss, *torch.autograd.grad(loss, (h, w))
    compiled = torch.compile(lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t))
    def compile_():
        loss = compiled(h, w, t)
        return loss, *torch.autograd.grad(loss, (h, w))
    def products():
        z = torch.mm(hd, wd.T)
        return torch.mm(z, wd), torch.mm(z.T, hd)
    hd, wd = h.detach(), w.detach()
    def ours(chunk=2048, **how): return lambda: launch_linear_cross_entropy(hd, wd, t, chunk=chunk, **how)

    peers = {"ours": ours(), "products": products, "naive": naive_narrow, "compile": compile_, "chunks of 1024": ours(1024), "chunks of 4096": ours(4096),
             "float32 sum": ours(wide=True), "weight frozen": ours(for_weight=False)}
    more = {}
    for name, run in (peers | {"naive in float32": naive}).items():
        if name == "products": continue
        try: more[name] = extra_memory(run, grads if name != "weight frozen" else h.nbytes)
        except Exception as e: more[name] = f"{type(e).__name__}: {str(e)[:200]}"
    torch.cuda.empty_cache()
    found = {name: x.double() for name, x in zip(("loss", "hidden", "weight"), ours()())}
    want = naive()
    errors = {name: ((found[name] - x.double()).abs().max() / x.double().abs().max()).item() for name, x in zip(found, want)}
    del found, want
    torch.cuda.empty_cache()
    share = more["ours"] / more["naive"] if isinstance(more["naive"], int) else None
    yield Case(f"linear cross-entropy {N} x {C} x {V} bf16", peers, flops=6 * N * C * V, roof="bf16", goals={"products": 1 / 1.25}, graph=False,
               more=dict(extra_bytes=more, share_of_naive_memory=share, goal_share_of_naive_memory=0.10, errors_against_naive_in_float32=errors))
