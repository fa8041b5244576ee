"The exceptions that the package raises on purpose: each says what is wrong and what to do."


class WorkbenchError(Exception):
    "Base of every error that llm_workbench raises on purpose."


class CheckpointError(WorkbenchError, ValueError):
    "A checkpoint file is truncated, corrupt, or holds tensors that do not fit the model."


class UnsupportedError(WorkbenchError, ValueError):
    "The file or configuration is valid, but names something that the workbench does not implement."


class SourceError(WorkbenchError, OSError):
    "A model source cannot be reached: no such file or folder, or the hub without a network."


class ContextLengthError(WorkbenchError, ValueError):
    "A prompt (plus what is to be generated) is longer than the context that the model was made for."
