from dataclasses import dataclass, replace
from collections.abc import Callable
import torch.nn.functional as F
from llm_workbench.architecture.attention import attention, visible
from llm_workbench.architecture.norms_and_mlps import rms_norm, swiglu
from llm_workbench.architecture.rope import rotate

@dataclass(frozen=True)
class Ops:
    rms_norm: Callable = rms_norm
    swiglu: Callable = swiglu
    rotate: Callable = rotate
    attention: Callable = attention

REFERENCE = Ops()

def fused_rms_norm(x, weight, eps): return F.rms_norm(x, weight.shape, weight, eps)

def fused_attention(q, k, v, *, causal=True, window=None, softcap=None, sinks=None, scale=None, lengths=None):
    if softcap or sinks is not None:
        return attention(q, k, v, causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale, lengths=lengths)
    Tq, Tk = q.shape[1], k.shape[1]
    plain = lengths is None and (window is None or window >= Tk)
    mask = None
    if not (plain and (not causal or Tq == 1 or Tq == Tk)):
        mask = visible(Tq, Tk, causal=causal, window=window, lengths=lengths, device=q.device)[:, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale,
                                         is_causal=causal and mask is None and Tq > 1, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)

TORCH = replace(REFERENCE, rms_norm=fused_rms_norm, attention=fused_attention)
