"""Create the virtual environment: check what the machine must bring, install, register the Jupyter kernel.

Runs on whatever Python the machine has, so it uses the standard library only.
"""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED_GB = 8
# llama.cpp's AMX path crashes on virtualised CPUs; without it the build keeps AVX-512 and is the same elsewhere.
LLAMA_CMAKE_ARGS = "-DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__"


def missing_prerequisite(venv):
    "The first thing that this machine lacks, as one sentence; None if nothing."
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return (f"Python 3.11, 3.12 or 3.13 is needed, but {sys.executable} is {sys.version.split()[0]}: "
                "install one of them, or run make PYTHON=/path/to/python3.12")
    if not any(map(shutil.which, ["cc", "gcc", "clang", "cl"])) or not any(map(shutil.which, ["c++", "g++", "clang++", "cl"])):
        return ("A C and C++ compiler is needed to build llama-cpp-python: install one "
                "(Debian/Ubuntu: apt install build-essential; macOS: xcode-select --install)")
    free_gb = shutil.disk_usage(venv.parent).free / 1e9
    if free_gb < NEEDED_GB and not (venv / "pyvenv.cfg").exists():
        return f"{NEEDED_GB} GB of free disk are needed for {venv}, but only {free_gb:.1f} GB are free: free some space"


def run(title, *command, env=None):
    "Run one step, say what it took, and stop with one clear sentence if it fails."
    print(f"== {title}", flush=True)
    start = time.time()
    code = subprocess.run([str(c) for c in command], cwd=ROOT, env={**os.environ, **(env or {})}).returncode
    if code:
        sys.exit(f"Setting up stopped at: {title} (exit status {code}). Mend what the lines above say, then run make again.")
    print(f"   {time.time() - start:.0f} s", flush=True)


def pinned(name):
    "The exact requirement of `name` in constraints.txt."
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split(" ")[0] for line in lines if line.startswith(f"{name}=="))


def main(venv):
    problem = missing_prerequisite(venv)
    if problem:
        sys.exit(problem)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "-q", "-c", "constraints.txt"]
    if not python.exists():
        run(f"creating {venv.name} with Python {sys.version.split()[0]}", sys.executable, "-m", "venv", venv)
    run("installing torch", *pip, pinned("torch"))
    # No pip cache: pip would hand back a wheel that was built with other CMAKE_ARGS.
    run("building llama-cpp-python (several minutes on two cores)", *pip, "--no-cache-dir", pinned("llama-cpp-python"),
        env={"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", LLAMA_CMAKE_ARGS)})
    if sys.platform == "linux":  # the pins are complete there: nothing to search, and a version that is gone is named at once
        run("installing the pinned versions", *pip, "--no-deps", "-r", "constraints.txt")
    run("installing llm_workbench and its requirements", *pip, "-e", ".[dev]")
    run("registering the Jupyter kernel", python, "-m", "ipykernel", "install", "--sys-prefix",
        "--name", "llm-workbench", "--display-name", "llm_workbench")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv").resolve())
