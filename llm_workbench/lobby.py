"The lobby: it knows every room, opens a model from anywhere and picks the fastest functions for the machine."
from pathlib import Path

import torch

from llm_workbench.architecture.ops import TORCH, Ops
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.families.loading import Decoder
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.inference.generation import LM
from llm_workbench.kernels import cpu


def load(source: str | Path | None = None,  # None: the embedded model; a folder, a .gguf file, or a hub id: "org/name"
         *, dtype: torch.dtype = torch.float32,   # what the weights are kept in
         device: str | torch.device = "cpu",
         weights: str | None = None,              # a format to keep the matrices in; None: as `dtype` says
         ops: Ops | None = None,                  # how each primitive is computed; None: the fastest that there is here
         ) -> LM:
    """Open a checkpoint and make it ready to be asked.

    Raises SourceError, CheckpointError or UnsupportedError; InputError for a wrong argument or an absent device."""
    if weights is not None:
        raise UnsupportedError(f"weights={weights!r}: no packed formats are built yet; leave it out, or choose a dtype")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype!r}: give a floating-point type of torch, such as torch.bfloat16")
    if ops is not None and not isinstance(ops, Ops):
        raise InputError(f"ops is {ops!r}: give a set of functions, such as TORCH of llm_workbench.architecture.ops")
    device = usable(device)
    checkpoint = open_checkpoint(source)
    ops = fastest_ops(device) if ops is None else ops
    decoder = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, dtype=dtype, device=device, ops=ops)
    return LM(decoder, checkpoint.tokenizer, checkpoint.card)


def fastest_ops(device: str | torch.device = "cpu") -> Ops:
    "C kernels on a CPU (TORCH and a warning where there is no compiler), TORCH elsewhere."
    return cpu.fastest() if torch.device(device).type == "cpu" else TORCH


def usable(device: str | torch.device) -> torch.device:
    "The device, if this torch can use it. Raises InputError that says why not."
    try: device = torch.device(device)
    except (RuntimeError, TypeError): raise InputError(f"{device!r} is no device: give 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no NVIDIA GPU: leave device out, or see `llm-workbench doctor` for what is "
                         "missing")
    try: torch.empty(0, device=device)
    except (RuntimeError, NotImplementedError) as e:
        raise InputError(f"device {str(device)!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return device
