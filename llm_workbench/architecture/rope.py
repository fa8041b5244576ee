import math
import torch
from torch import Tensor

def rope_tables(positions, inv_freq, attention_factor=1.0, dtype=torch.float32):
    angles = positions[..., None].float() * inv_freq.to(positions.device)     # (..., T, D/2)
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)

def rotate(x, cos, sin):
    R = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)                            # over the heads
    part = x[..., :R]
    a, b = part.chunk(2, -1)
    turned = part * cos + torch.cat([-b, a], -1) * sin
    return turned if R == x.shape[-1] else torch.cat([turned, x[..., R:]], -1)

def inverse_frequencies(dim, theta=10_000.0):
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
