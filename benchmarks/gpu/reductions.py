"Softmax, cross-entropy with its gradient, and draws: against copying, torch, torch.compile and a sort."
import torch
import torch.nn.functional as F

from benchmarks.kernels import Case
from llm_workbench.kernels import reductions as r


def configs(columns):
    "Other ways to cut a row of bf16, as peers."
    loop = lambda keep, lanes, warps, per_sm, stages=5: dict(KEEP=keep, LOOP=True, LANES=lanes, VEC=8, STAGES=stages, num_warps=warps, per_sm=per_sm)
    if columns > r.IN_REGISTERS:
        return {"keep 8k, 32 warps": loop(8192, 1024, 32, 1), "keep 32k, 16 warps": loop(32768, 1024, 16, 1), "keep 16k, 16 warps, 2 a SM": loop(16384, 1024, 16, 2),
                "keep 8k, 16 warps, 2 a SM": loop(8192, 512, 16, 2), "keep 16k, 32 warps, a program a row": loop(16384, 1024, 32, None)}
    flat = lambda warps: dict(KEEP=columns, LOOP=False, LANES=1, VEC=1, STAGES=1, num_warps=warps, per_sm=None)
    if columns == 32768:
        return {"registers, 16 warps": flat(16), "loop, 16 warps, 2 a SM": loop(8192, 512, 16, 2), "loop, 8 warps, 4 a SM": loop(4096, 512, 8, 4),
                "loop, 32 warps, 1 a SM": loop(16384, 1024, 32, 1)}
    return {}


def softmax(rows, columns, dtype=torch.bfloat16, goals={}, splits=None):
    x = torch.randn(rows, columns, device="cuda", dtype=dtype)
    compiled = torch.compile(lambda x: torch.softmax(x, -1))
    peers = {"ours": lambda: r.launch_softmax(x), "eager": lambda: torch.softmax(x, -1), "compile": lambda: compiled(x)}
    if splits: peers |= {f"{n} splits": lambda n=n: r.launch_softmax(x, splits=n) for n in splits}
    elif dtype == torch.bfloat16: peers |= {name: lambda c=c: r.launch_softmax(x, config=c) for name, c in configs(columns).items()}
    return Case(f"softmax {rows} x {columns} {str(dtype)[6:]}", peers, nbytes=2 * x.nbytes, flops=5 * x.numel(), goals=goals)


def cross_entropy(rows, columns, dtype=torch.bfloat16, goals={}):
    x, t = torch.randn(rows, columns, device="cuda", dtype=dtype), torch.randint(columns, (rows,), device="cuda")
    out = x.clone()                                                       # ours writes over its logits
    leaf = x.clone().requires_grad_(True)
    def eager():
        loss = F.cross_entropy(leaf, t)
        return loss, torch.autograd.grad(loss, leaf)[0]
    compiled = torch.compile(F.cross_entropy)
    def compile_():
        loss = compiled(leaf, t)
        return loss, torch.autograd.grad(loss, leaf)[0]
    def two_kernels():                                                    # loss, then a backward pass that reads the logits again
        loss = r.cross_entropy(leaf, t)
        return loss, torch.autograd.grad(loss, leaf)[0]
    peers = {"ours": lambda: r.cross_entropy_grad_(out, t), "forward and backward": two_kernels, "eager": eager, "compile": compile_}
    if dtype == torch.bfloat16: peers |= {name: lambda c=c: r.cross_entropy_grad_(out, t, config=c) for name, c in configs(columns).items()}
    return Case(f"cross-entropy and gradient {rows} x {columns} {str(dtype)[6:]}", peers, nbytes=2 * x.nbytes, flops=8 * x.numel(), goals=goals)


def sampling(batch, V, how, dtype=torch.float32, scale=2.0, goals={}, others=False):
    from llm_workbench.inference.sampling import Sampler
    x = (scale * torch.randn(batch, V, device="cuda")).to(dtype)
    step = torch.zeros(batch, dtype=torch.int64, device="cuda")
    sampler, p = Sampler(**how), how.get("top_p")
    def sort():                                                           # as most write it
        values, ids = x.sort(-1, descending=True)
        probs = (values / how.get("temperature", 1.0)).softmax(-1)
        probs = torch.where(probs.cumsum(-1) - probs < p, probs, 0.0)
        return ids.gather(-1, (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True))
    peers = {"ours": lambda: r.launch_sample(x, sampler.temperature, sampler.top_k, p, sampler.min_p, seed=1, step=step)}
    if p: peers |= {"sort": sort, "only torch.sort": lambda: x.sort(-1, descending=True)}
    peers["Sampler"] = lambda: sampler.pick(x)
    if others:
        for lanes, warps, stages in ((1024, 16, 4), (1024, 32, 3), (1024, 32, 5), (512, 16, 5)):
            c = dict(LANES=lanes, STAGES=stages, num_warps=warps)
            peers[f"{lanes} lanes, {warps} warps, {stages} stages"] = lambda c=c: r.launch_sample(x, sampler.temperature, sampler.top_k, p, sampler.min_p, seed=1, step=step, config=c)
    return Case(f"{', '.join(f'{k} {v}' for k, v in how.items()) or 'temperature 1'}, {batch} x {V} {str(dtype)[6:]}, spread {scale:g}", peers, nbytes=x.nbytes, roof="read", goals=goals)


def cases():
    goals = {"copy": 0.90}
    yield cross_entropy(8192, 32768, goals={**goals, "compile": 1.0})
    yield cross_entropy(4096, 131072, goals={**goals, "compile": 1.0})
    yield softmax(8192, 32768, goals=goals)
    yield softmax(4096, 131072, goals=goals)
    yield cross_entropy(4096, 151936)
    yield cross_entropy(4096, 131072, torch.float32)
    yield softmax(16384, 4096, goals=goals)
    yield softmax(16, 131072, splits=(1, 8, 32))
    yield sampling(64, 151936, dict(top_p=0.9), goals={"sort": 8.0}, others=True)
    yield sampling(64, 151936, dict(top_p=0.9), torch.bfloat16, goals={"sort": 8.0})
    yield sampling(64, 151936, dict(top_p=0.9), scale=5.0)
    yield sampling(64, 151936, dict(temperature=0.7, top_k=50, top_p=0.95, min_p=0.02))
    yield sampling(64, 151936, dict())
    yield sampling(1, 151936, dict(top_p=0.9))
