"The lobby: it knows every room, opens a model from anywhere and picks the fastest functions for the machine."
from pathlib import Path

import torch

from llm_workbench.architecture.ops import TORCH, Ops
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.families.loading import Decoder
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.inference.generation import LM
from llm_workbench.kernels.cpu import fastest


def load(source: str | Path | None = None,  # None: the embedded model; a folder, a .gguf file, or a hub id: "org/name"
         *, dtype: torch.dtype = torch.float32,   # what the weights are kept in
         device: str | torch.device = "cpu",
         weights: str | None = None,              # a format to keep the matrices in; None: as `dtype` says
         ops: Ops | None = None,                  # how each primitive is computed; None: the fastest that there is here
         ) -> LM:
    """Open a checkpoint and make it ready to be asked.

    Raises SourceError, CheckpointError or UnsupportedError; InputError for a device that is not there."""
    if weights is not None:
        raise UnsupportedError(f"weights={weights!r}: no packed formats are built yet; leave it out, or choose a dtype")
    device = _device(device)
    checkpoint = open_checkpoint(source)
    chosen = ops or (fastest() if device.type == "cpu" else TORCH)
    decoder = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, dtype=dtype, device=device, ops=chosen)
    return LM(decoder, checkpoint.tokenizer, checkpoint.card)


def _device(device) -> torch.device:
    try: device = torch.device(device)
    except (RuntimeError, TypeError): raise InputError(f"{device!r} is no device: give 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no NVIDIA GPU: leave device out, or see `llm-workbench doctor` for what is "
                         "missing")
    return device
