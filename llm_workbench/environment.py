"What of this environment is installed whole, and how far llama.cpp is, which `make` compiles in the background."
import csv
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

LLAMA_CPP = "llama-cpp-python"
STARTED = "started %Y-%m-%d %H:%M:%S"  # the log's first line
FAILED = "failed"                      # how the log's last line begins if the build failed; a killed one writes none


class Build(NamedTuple):
    "How far the compilation of llama-cpp-python is."
    state: str        # "installed", "building", "failed", "interrupted" or "absent"
    has: str = ""     # the same in words
    advice: str = ""  # what to do


def llama_cpp_log() -> Path:
    "What the compiler wrote in this environment."
    return Path(sys.prefix) / "llama_cpp.log"


def whole(distribution: metadata.Distribution) -> bool:
    "Did pip finish with it? An interrupted one leaves metadata behind, which the next takes for an installed package."
    record = [row[0] for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()) if row]
    finished = any(name.endswith(".dist-info/INSTALLER") for name in record)  # pip adds this line last
    files = [Path(distribution.locate_file(name)) for name in record if not name.endswith(".pyc")]
    return finished and all(file.exists() for file in files)


def llama_cpp_build() -> Build:
    "How far llama.cpp is in the environment of this Python."
    log = llama_cpp_log()
    if locked(log):
        has = f"being compiled for {_age(log)} (it takes a few minutes)"
        return Build("building", has, f"wait; the compiler writes to {log}")
    if any(map(whole, metadata.distributions(name=LLAMA_CPP))): return Build("installed")
    if not log.exists():
        return Build("absent", "not installed", f"pip install {LLAMA_CPP} (it is compiled: needs a C/C++ compiler)")
    end = (log.read_text(errors="replace").splitlines() or [""])[-1]
    if end.startswith(FAILED):
        return Build("failed", f"its compilation {end}", f"mend what the end of {log} says, then run make lab again")
    return Build("interrupted", "its compilation was interrupted", f"run make lab: it starts again (log: {log})")


def locked(file: Path) -> bool:
    "Does a process hold the lock of `file`? The system frees it when the last holder ends: the dead leave no lock."
    try:
        import fcntl
        with file.open() as f: fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError: return True
    except (ImportError, FileNotFoundError): pass
    return False


def _age(log: Path) -> str:
    "How long ago the build started, by its first line."
    with log.open(errors="replace") as file: first = file.readline().strip()
    try: minutes = (time.time() - time.mktime(time.strptime(first, STARTED))) / 60
    except ValueError: return "a while"
    return f"{minutes:.0f} min" if minutes >= 1 else "less than a minute"
