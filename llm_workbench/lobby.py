"The lobby: it knows every room, opens a model from anywhere and picks the fastest functions for the machine."
import warnings
from pathlib import Path

import torch
from fastcore.basics import patch

from llm_workbench.architecture.ops import TORCH, Ops
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.families.loading import Decoder
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.hardware.doctor import Finding
from llm_workbench.inference import loglikelihood  # noqa: F401  `LM` can score, too
from llm_workbench.inference.generation import LM, Batch
from llm_workbench.kernels import cpu, cpu_prompt, packed_cpu, rounded_cpu
from llm_workbench.quantization.checkpoints import as_wrapped, unwrapped
from llm_workbench.quantization.formats import Keep, as_format, as_stored, format_of
from llm_workbench.quantization.packing import Format


def load(source: str | Path | None = None,  # None: the embedded model; a folder, a .gguf file, or a hub id: "org/name"
         *, dtype: torch.dtype = torch.float32,   # of the numbers between matrices, and of matrices that are not packed
         device: str | torch.device = "cpu",
         weights: str | Format | None = None,     # how matrices are kept: see `keeping`
         ops: Ops | None = None,                  # how each primitive is computed; None: the fastest that there is here
         ) -> LM:
    """Open a checkpoint and make it ready to be asked.

    Raises SourceError, CheckpointError or UnsupportedError; InputError for a wrong argument or an absent device."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype!r}: give a floating-point type of torch, such as torch.bfloat16")
    if ops is not None and not isinstance(ops, Ops):
        raise InputError(f"ops is {ops!r}: give a set of functions, such as TORCH of llm_workbench.architecture.ops")
    device = usable(device)
    ops = fastest_ops(device) if ops is None else ops
    keep = keeping(weights, dtype, device, ops)
    checkpoint = open_checkpoint(source, unwrapped)
    if checkpoint.packed_by and weights in (None, "stored"): keep = as_wrapped(dtype, device)
    decoder = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, dtype, device, ops, keep)
    return LM(decoder, checkpoint.tokenizer, checkpoint.card, batches_for(device))


@patch
def serve(self: LM, host: str = "127.0.0.1", port: int = 0,   # 0: a free one
          **settings):                                               # of `serving.openai_server.start`
    """Serve the model from a thread, by OpenAI's protocol and Ollama's: `with lm.serve() as server: server.url`.

    Raises SourceError for a port that is taken, UnsupportedError where FastAPI or uvicorn is absent."""
    from llm_workbench.serving.openai_server import start
    return start(self, host, port, **settings)


def keeping(weights: str | Format | None,  # "stored", "dense", a format or its name; None: the fastest that there is
            dtype: torch.dtype, device: torch.device, ops: Ops) -> Keep | None:
    """How `Decoder.from_checkpoint` shall keep matrices.

    "stored" keeps the file's own blocks where there are any, "dense" keeps tensors of `dtype`. None is "stored" for
    the formats that the C kernels multiply by, if these are the ops, and dense for all else. (`load` keeps what a
    quantizer has packed, with None as with "stored".) Raises InputError for an unknown format."""
    if weights == "dense": return None
    if weights == "stored": return as_stored(dtype, device)
    if weights is not None: return as_format(format_of(weights), dtype, device)
    in_c = ops.packed_linear in (packed_cpu.packed_linear, cpu_prompt.packed_linear, cpu_prompt.int8_linear,
                                 rounded_cpu.packed_linear)
    return as_stored(dtype, device, packed_cpu.BLOCKS) if in_c else None


def fastest_ops(device: str | torch.device = "cpu") -> Ops:
    "C kernels on a CPU, Triton's on CUDA; TORCH and a warning where they cannot be compiled, and on other devices."
    kind = torch.device(device).type
    if kind == "cpu": return cpu_prompt.CPU if cpu.fastest() is cpu.CPU else TORCH
    return compiled_triton() if kind == "cuda" and torch.cuda.is_available() else TORCH


def chosen_ops() -> list[Finding]:
    "For the doctor: which functions `load` takes on each device of this machine, and why not faster ones."
    findings = []
    for device in ["cpu", *["cuda"] * torch.cuda.is_available()]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ops = fastest_ops(device)
        rooms = sorted({f.__module__.removeprefix("llm_workbench.") for f in vars(ops).values()})
        findings.append(Finding(f"ops on {device}", None if told else True, ", ".join(rooms),
                                "; ".join(str(w.message) for w in told)))
    return findings


def compiled_triton() -> Ops:
    "`TRITON` where Triton compiles for the GPU in this process, else TORCH and a warning that says why."
    try:
        from llm_workbench.kernels.launching import interpreting    # brings Triton in: only now
        from llm_workbench.kernels.triton_ops import TRITON
    except UnsupportedError as e: why = str(e)
    else:
        if not interpreting(): return TRITON
        why = "TRITON_INTERPRET is set, so kernels run on the CPU only."
    warnings.warn(f"{why} This run goes on with TORCH.")
    return TORCH


def batches_for(device: torch.device) -> type[Batch]:
    "Who decides the tokens: on CUDA, where Triton is, steps that are recorded as one graph (`batch.why_not`)."
    if device.type != "cuda": return Batch
    try: from llm_workbench.kernels.graphs import recorded
    except UnsupportedError: return Batch          # no Triton: `compiled_triton` has said so
    return recorded(Batch)


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
