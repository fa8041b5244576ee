"""Set up the virtual environment, so that it can be interrupted and repeated at any point.

    python3 tools/install.py .venv           # create it, install everything but llama.cpp (minutes to compile)
    .venv/bin/python tools/install.py start  # have llama.cpp compiled in the background, if it is not there
    .venv/bin/python tools/install.py wait   # the same, and wait for it

Runs on whatever Python the machine has, so it uses the standard library only.
"""
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED_GB = 8
# Runs the Triton kernels without a GPU, as plain Python. No pin: torch's CUDA build brings the triton that fits it.
INTERPRETER = "triton==3.6.0"
# llama.cpp's AMX path crashes on virtualised CPUs; without it the build keeps AVX-512 and is the same elsewhere.
LLAMA_CMAKE_ARGS = "-DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__"
# Without bytecode, which would be made for all and is made for what is imported.
PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "-qq",
       "--no-compile", "-c", "constraints.txt"]
# Stands in for the package until pip puts that beside it (a folder goes before a file of the same name).
STAND_IN = '''"llama-cpp-python is not compiled yet: whoever imports it is told how far it is."
from llm_workbench.environment import llama_cpp_build

build = llama_cpp_build()
says = f"llama-cpp-python is not there yet: {build.has}. What to do: {build.advice}"
raise ModuleNotFoundError(says, name="llama_cpp")
'''

sys.path.insert(0, str(ROOT))


def missing_prerequisite(venv):
    "The first thing that this machine lacks, as one sentence; None if nothing."
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return (f"Python 3.11, 3.12 or 3.13 is needed, but {sys.executable} is {sys.version.split()[0]}: "
                "install one of them, or run make PYTHON=/path/to/python3.12")
    if not any(map(shutil.which, ["cc", "gcc", "clang"])) or not any(map(shutil.which, ["c++", "g++", "clang++"])):
        return ("A C and C++ compiler is needed to build llama-cpp-python: install one "
                "(Debian/Ubuntu: apt install build-essential; macOS: xcode-select --install)")
    free_gb = shutil.disk_usage(venv.parent).free / 1e9
    if free_gb < NEEDED_GB and not (venv / "pyvenv.cfg").exists():
        return f"{NEEDED_GB} GB of free disk are needed for {venv}, but only {free_gb:.1f} GB are free: free some space"


def run(title, *command):
    "Run one step, say what it took, and stop with one clear sentence if it fails."
    print(f"== {title}", flush=True)
    start = time.time()
    code = subprocess.run([str(c) for c in command], cwd=ROOT, close_fds=False).returncode
    if code:
        sys.exit(f"Setting up stopped at: {title} (exit status {code}). "
                 "Mend what the lines above say, then run make again.")
    print(f"   {time.time() - start:.0f} s", flush=True)


def pins():
    "The exact requirements of constraints.txt, by name."
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {line.partition("==")[0]: line for line in lines if line}


def one_at_a_time():
    "Wait until no other make works on the environment. The steps inherit the lock: it ends when the last of them does."
    import fcntl
    lock = open(__file__)
    os.set_inheritable(lock.fileno(), True)
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("== another make is setting up: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def create(venv):
    "An environment whose pip is whole; then its own Python goes on in this process, which keeps the lock."
    problem = missing_prerequisite(venv)
    if problem: sys.exit(problem)
    from llm_workbench.environment import whole
    lock, python = one_at_a_time(), venv / "bin" / "python"  # the lock is free when nothing refers to it
    pip = metadata.distributions(name="pip", path=[str(p) for p in venv.glob("lib/python3*/site-packages")])
    if not python.exists() or not any(map(whole, pip)):
        run(f"creating {venv.name} with Python {sys.version.split()[0]}", sys.executable, "-m", "venv", "--clear", venv)
    os.execv(python, [str(python), __file__, "packages"])


def packages():
    "Everything but llama.cpp, into the environment of this Python."
    from llm_workbench.environment import LLAMA_CPP, whole
    for found in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        if found.name.startswith("llama_cpp_python"): continue  # its build may be at it right now
        if not whole(metadata.Distribution.at(found)): shutil.rmtree(found)  # an interrupted pip left it
    exact = pins()
    run("installing pip", *PIP, exact["pip"])  # the one that comes with Python may be years old and much slower
    run("installing torch", *PIP, exact["torch"])
    if sys.platform == "linux":  # the pins are complete there: no search, and nothing brings llama.cpp with it
        others = [pin for name, pin in exact.items() if name != LLAMA_CPP]
        run("installing the pinned versions", *PIP, "--no-deps", *others)
        if not any(metadata.distributions(name="triton")): run("installing triton", *PIP, "--no-deps", INTERPRETER)
        run("installing llm_workbench", *PIP, "--no-deps", "-e", ".")
    else: run("installing llm_workbench and its requirements (several minutes)", *PIP, "-e", ".[dev]")
    run("registering the Jupyter kernel", sys.executable, "-m", "ipykernel", "install", "--sys-prefix",
        "--name", "llm-workbench", "--display-name", "llm_workbench")


# ---------------------------------------------------------------------------------------- llama.cpp, in the background
def compiled():
    "Is llama.cpp installed, whole and in the pinned version?"
    from llm_workbench.environment import LLAMA_CPP, whole
    found = metadata.distributions(name=LLAMA_CPP)
    return any(whole(d) and f"{LLAMA_CPP}=={d.version}" == pins()[LLAMA_CPP] for d in found)


def free(file):
    "Take the lock of an open file; False if a build holds it. Whoever only looks holds it for a moment, hence twice."
    import fcntl
    for _ in range(2):
        try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError: time.sleep(0.2)
        else: return True
    return False


def start():
    "Have llama.cpp compiled by a process of its own, unless it is there or under way."
    from llm_workbench.environment import STARTED, llama_cpp_log
    with llama_cpp_log().open("a") as log:
        ours = free(log)
        if ours and compiled(): return
        print(f"== llama.cpp is {'' if ours else 'still '}being compiled in the background (it takes a few minutes); "
              f"log: {os.path.relpath(log.name, ROOT)}", flush=True)
        if not ours: return
        log.truncate(0)
        print(time.strftime(STARTED), file=log, flush=True)
        # The build and all that it starts write to the log, and so hold its lock until the last of them ends.
        subprocess.Popen([sys.executable, __file__, "build"], cwd=ROOT, start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def build():
    "Compile and install llama.cpp; the last line written says whether it failed."
    from llm_workbench.environment import FAILED, LLAMA_CPP, whole
    os.nice(10)  # whoever works in the notebooks meanwhile goes first
    site = Path(sysconfig.get_path("purelib"))
    (site / "llama_cpp.py").write_text(STAND_IN)
    for found in site.glob("llama_cpp_python-*.dist-info"):
        if not whole(metadata.Distribution.at(found)): shutil.rmtree(found)
    # No pip cache: pip would hand back a wheel that was built with other CMAKE_ARGS.
    code = subprocess.run([*PIP, "--no-cache-dir", pins()[LLAMA_CPP]], cwd=ROOT,
                          env={**os.environ, "CMAKE_ARGS": os.environ.get("CMAKE_ARGS", LLAMA_CMAKE_ARGS)}).returncode
    if code: sys.exit(f"{FAILED} (exit status {code})")
    (site / "llama_cpp.py").unlink()


def wait():
    "Start what `start` starts, and wait for its end; stop with one sentence if it failed."
    import fcntl

    from llm_workbench.environment import llama_cpp_build, llama_cpp_log
    start()
    with llama_cpp_log().open(errors="replace") as log:
        fcntl.flock(log, fcntl.LOCK_SH)
        if compiled(): return
        end = log.read().splitlines()[-40:]
    now = llama_cpp_build()
    sys.exit("\n".join([*end, f"llama-cpp-python: {now.has}. What to do: {now.advice}"]))


def main(args):
    actions = dict(packages=packages, start=start, build=build, wait=wait)
    try:
        if args and args[0] in actions: actions[args[0]]()
        else: create(Path(args[0] if args else ".venv").resolve())
    except KeyboardInterrupt: sys.exit("Interrupted. Run make again: it goes on where it stopped.")


if __name__ == "__main__":
    main(sys.argv[1:])
