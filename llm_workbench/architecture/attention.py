import torch
from torch import Tensor

def visible(n_queries, n_keys, *, causal=True, window=None, lengths=None, device=None):
    "(1 or B, Tq, Tk) bool: which keys each query may see. Query i of a row stands at key position length - Tq + i."
    if lengths is None: lengths = torch.tensor([n_keys], device=device)
    key = torch.arange(n_keys, device=device)                                        # (Tk,)
    query = lengths[:, None] - n_queries + torch.arange(n_queries, device=device)    # (B, Tq)
    seen = (key < lengths[:, None, None]).expand(-1, n_queries, -1)
    if causal: seen = seen & (key <= query[..., None])
    if window: seen = seen & (key > query[..., None] - window)
    return seen

def attention(q, k, v, *, causal=True, window=None, softcap=None, sinks=None, scale=None, lengths=None):
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1:3]
    q = q.reshape(B, Tq, K, H // K, D)                                  # query heads in groups, one per KV head
    scores = torch.einsum("btkgd,bskd->bkgts", q, k) * (D ** -0.5 if scale is None else scale)
    if softcap: scores = softcap * torch.tanh(scores / softcap)
    unseen = ~visible(Tq, Tk, causal=causal, window=window, lengths=lengths, device=q.device)[:, None, None]
    scores = scores.masked_fill(unseen, float("-inf"))
    if sinks is not None:  # one learned score per head that takes weight and gives no value (gpt-oss)
        sink = sinks.view(1, K, H // K, 1, 1).expand(B, -1, -1, Tq, 1).to(scores)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :Tk]
    weights = weights.masked_fill(unseen, 0.0).to(v.dtype)              # a query that sees nothing returns zeros, not NaN
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3)  # (B, Tq, H, Dv)
