"""The front door: opens a model from any source, with what is fastest on the device, ready to be asked.

The one module that knows every room. Chapters stand below it: their exported cells do not import it.
"""
from pathlib import Path

import torch

from llm_workbench.architecture.decoder import Decoder
from llm_workbench.architecture.ops import TORCH, Ops
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.families.sources import open_checkpoint
from llm_workbench.inference.generation import LM
from llm_workbench.kernels import cpu


def load(source: str | Path | None = None,       # None: the embedded model; a folder, a .gguf file, or a hub id "org/name"
         *, dtype: torch.dtype = torch.float32,  # what the weights are kept in
         device: str | torch.device = "cpu",
         weights: str | None = None,             # the format of the matrices; None: as they are, in `dtype`
         ops: Ops | None = None,                 # how each primitive is computed; None: the fastest for the device
         ) -> LM:
    "Open a checkpoint, ready to be asked. Raises SourceError, CheckpointError, InputError or UnsupportedError."
    device = usable(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype!r}: give a floating-point type of torch, such as torch.bfloat16.")
    if weights is not None:
        raise UnsupportedError(f"weights={weights!r}: packed weights are not built yet. "
                               "Leave it out; dtype=torch.bfloat16 halves the memory.")
    if ops is not None and not isinstance(ops, Ops):
        raise InputError(f"ops is {ops!r}: give a set of functions, such as TORCH of llm_workbench.architecture.ops.")
    checkpoint = open_checkpoint(source)
    ops = fastest_ops(device) if ops is None else ops
    decoder = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, dtype=dtype, device=device, ops=ops)
    return LM(decoder, checkpoint.tokenizer, checkpoint.card)


def fastest_ops(device: str | torch.device = "cpu") -> Ops:
    "The fastest functions for a device: C kernels on a CPU (TORCH and a warning where no compiler is), TORCH elsewhere."
    return cpu.fastest() if torch.device(device).type == "cpu" else TORCH


def usable(device: str | torch.device) -> torch.device:
    "The device. Raises InputError for a name that torch does not know, UnsupportedError for a device that is not here."
    try: device = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device is {device!r}: give \"cpu\", \"cuda\", or another name that torch knows.") from None
    try: torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UnsupportedError(f"device {str(device)!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return device
