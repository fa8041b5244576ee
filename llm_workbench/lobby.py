"""The front door: opens a model from any source and makes it ready to be asked, with what is fastest on the device.

The one module that knows every room. Chapters stand below it and do not import it, except in the cells of a lesson.
"""
from pathlib import Path

import torch

from llm_workbench.architecture.decoder import Decoder
from llm_workbench.architecture.ops import TORCH, Ops
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.families.sources import open_checkpoint
from llm_workbench.inference.generation import LM


def load(source: str | Path | None = None,      # None: the embedded model; a folder, a .gguf file, or a hub id "org/name"
         *, dtype: torch.dtype = torch.float32, # what the weights are kept in
         device: str | torch.device = "cpu",
         weights: str | None = None,            # the format of the matrices; None: as they are, in `dtype`
         ops: Ops | None = None,                # how each primitive is computed; None: the fastest set for the device
         ) -> LM:
    "Open a checkpoint and make it ready to be asked. Raises SourceError, CheckpointError, InputError or UnsupportedError."
    device = checked_device(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype!r}: give a floating-point type of torch, such as torch.bfloat16.")
    if weights is not None:
        raise UnsupportedError(f"weights={weights!r}: packed weights are not built yet. Leave it out, and use dtype=torch.bfloat16 for less memory.")
    checkpoint = open_checkpoint(source)
    ops = fastest_ops(device) if ops is None else ops
    decoder = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, dtype=dtype, device=device, ops=ops)
    return LM(decoder, checkpoint.tokenizer, checkpoint.card)


def fastest_ops(device: str | torch.device) -> Ops:
    "The fastest set of functions for a device: C kernels on a CPU with a compiler (else a warning says why not), TORCH elsewhere."
    if torch.device(device).type != "cpu": return TORCH
    from llm_workbench.kernels.cpu import fastest
    return fastest()


def checked_device(device: str | torch.device) -> torch.device:
    "The device, if this torch can use it. Raises InputError for a name that torch does not know, UnsupportedError for a device that is not here."
    try: device = torch.device(device)
    except (RuntimeError, TypeError): raise InputError(f"device is {device!r}: give \"cpu\", \"cuda\", or another name that torch knows.") from None
    try: torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UnsupportedError(f"device {device} cannot be used here: {str(e).splitlines()[0]}") from None
    return device
