"The exceptions that the package raises on purpose: each says what is wrong and what to do."
import difflib
from collections.abc import Iterable


class WorkbenchError(Exception):
    "Base of every error that llm_workbench raises on purpose."


class InputError(WorkbenchError, ValueError):
    """An argument of a call is wrong: a value out of range, a row that does not exist, tensors that do not belong
    together."""


class CheckpointError(WorkbenchError, ValueError):
    "A checkpoint file is truncated, corrupt, or holds tensors that do not fit the model."


class UnsupportedError(WorkbenchError, ValueError):
    "What is asked for is valid, but names something that the workbench does not implement."


class SourceError(WorkbenchError, OSError):
    "A model source cannot be reached: no such file or folder, or the hub without a network."


class Interrupted(SourceError):
    "A server went away, or gave up, in the middle of an answer; `text` is what had come."

    def __init__(self, message: str, text: str = ""):
        super().__init__(message)
        self.text = text


class ContextLengthError(WorkbenchError, ValueError):
    "A prompt (plus what is to be generated) is longer than the context that the model was made for."


class Overloaded(WorkbenchError):
    "More work waits than is taken on; `retry_after` is an estimate of the seconds until there is room again."

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(WorkbenchError):
    "A server takes nothing more: it is being closed, or it is dead."


def did_you_mean(name: str,             # what was asked for
                 known: Iterable[str],  # what there is
                 ) -> str:              # a sentence with a blank before it, or nothing when no name is near
    "The nearest known name as a question, for the end of a message."
    known = [str(k) for k in known]
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1)
    return f" Did you mean {lower[near[0]]!r}?" if near and lower[near[0]] != name else ""
