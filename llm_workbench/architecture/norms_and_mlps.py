import torch
from torch import nn, Tensor
import torch.nn.functional as F

def rms_norm(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

def swiglu(gate, up): return F.silu(gate) * up

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps
    def forward(self, x, ops): return ops.rms_norm(x, self.weight, self.eps)

class GatedMLP(nn.Module):
    def __init__(self, hidden_size, intermediate_size, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
    def forward(self, x, ops): return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
