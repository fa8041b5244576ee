import torch
from torch import nn, Tensor

def route(logits, top_k, *, score="softmax", normalise=True, bias=None):
    "(N, E) router logits -> (N, k) expert indices, (N, k) weights. Mixtral: softmax over the chosen ones."
    scores = logits.float().softmax(-1) if score == "softmax" else logits.float().sigmoid()
    chosen = (scores if bias is None else scores + bias).topk(top_k, -1).indices
    weights = scores.gather(-1, chosen)
    if normalise: weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights
