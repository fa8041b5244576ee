"""`make lab` and `make test` as a stranger uses them: interrupted, repeated, two at a time, with a failing compiler.

The Makefile and the installer are the real ones, in real processes. What they call is faked: `venv` makes an
environment without copying anything, `pip` waits, half-installs and fails where a file beside the fakes says so.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKES = {
    "venv.py": """
import os, pathlib, shutil, sys
said("venv")
folder = pathlib.Path(sys.argv[-1])
if folder.exists() and "--clear" in sys.argv: shutil.rmtree(folder)
(folder / "bin").mkdir(parents=True)
(folder / "bin" / "python").symlink_to(sys._base_executable)
(folder / "pyvenv.cfg").write_text(f"home = {pathlib.Path(sys._base_executable).parent}\\n")
site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
site.mkdir(parents=True)
install(site, "pip", "1")
""",
    "pip.py": """
import os, pathlib, sys, sysconfig
names = [a for a in sys.argv[2:] if "==" in a]
kept = [a for a in sys.argv[2:] if "==" in a or ">=" in a or a in ("--no-deps", "--no-cache-dir")]
said("pip " + " ".join(kept), os.environ.get("CMAKE_ARGS", ""))
site = pathlib.Path(sysconfig.get_path("purelib"))
for name, _, version in (n.partition("==") for n in names):
    module = name.replace("-", "_").removesuffix("_python")
    if any(site.glob(f"{name.replace('-', '_')}-{version}.dist-info/METADATA")): continue  # pip looks no further
    stop(f"before {name}")
    if (fakes / f"fail {name}").exists(): sys.exit("error: the compiler gave up")
    install(site, name, version)
""",
    "ipykernel.py": "said('kernel')",
    "jupyter.py": "said('jupyter opens'); print('JupyterLab is open')",
    "common.py": """
import os, pathlib, time
fakes = pathlib.Path(__file__).parent

def said(*words):
    with open(fakes / "said", "a") as file: print(*words, file=file)

def stop(where):
    "Stand still at this point for as long as the test wants."
    if (fakes / f"stop {where}").exists(): (fakes / f"stands {where}").touch()
    while (fakes / f"stop {where}").exists(): time.sleep(0.02)
    (fakes / f"stands {where}").unlink(missing_ok=True)

def install(site, name, version):
    "A package as pip installs it: the files, METADATA, and RECORD with its line about INSTALLER at the very end."
    name = name.replace("-", "_")
    module, info = name.removesuffix("_python"), site / f"{name}-{version}.dist-info"
    (site / module).mkdir(exist_ok=True)
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    (info / "RECORD").write_text(f"{module}/__init__.py,,\\n")
    stop(f"within {module}")
    (site / module / "__init__.py").write_text("installed = True")
    (info / "INSTALLER").write_text("pip")
    (info / "RECORD").write_text(f"{module}/__init__.py,,\\n{info.name}/INSTALLER,,\\n{info.name}/RECORD,,\\n")
""",
}
CONSTRAINTS = "# pins\nnumpy==2.3.5\nllama-cpp-python==0.3.36\npip==26.3\ntorch==2.13.0\n"
LLAMA = "pip --no-cache-dir llama-cpp-python==0.3.36"


class Machine:
    "A checkout in an empty folder, on a machine whose tools are the fakes."
    def __init__(self, folder):
        self.checkout, self.fakes = folder / "checkout", folder / "fakes"
        self.log = self.checkout / ".venv" / "llama_cpp.log"
        self.fakes.mkdir()
        for name, code in FAKES.items():
            (self.fakes / name).write_text(code if name == "common.py" else f"from common import *\n{code}")
        for name in ("Makefile", "settings.ini", "setup.py", "tools/install.py", "llm_workbench/__init__.py",
                     "llm_workbench/environment.py"):
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, self.checkout / name)
        (self.checkout / "constraints.txt").write_text(CONSTRAINTS)
        (self.checkout / "tools" / "check.py").write_text("print('the checks ran')")
        # Without what a `make` around this test tells its children: it would print which folder it enters.
        inherited = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
        self.environment = {**inherited, "PYTHONPATH": f"{self.fakes}{os.pathsep}{self.checkout}"}
        self.running = []

    def start(self, *target):
        "Run make in a process group of its own, as a terminal does, so that Ctrl-C reaches all of it."
        process = subprocess.Popen(["make", f"PYTHON={sys.executable}", *target], cwd=self.checkout, text=True,
                                   env=self.environment, start_new_session=True, preexec_fn=interruptible,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.running.append(process)
        return process

    def make(self, *target):
        process = self.start(*target)
        said = process.communicate(timeout=60)[0]
        return process.returncode, said

    def python(self, code):
        python = self.checkout / ".venv" / "bin" / "python"
        done = subprocess.run([python, "-c", code], cwd=self.checkout, env=self.environment, capture_output=True,
                              text=True)
        return done.stdout.strip() or done.stderr.splitlines()[-1]

    def state(self): return self.python("from llm_workbench.environment import llama_cpp_build as b; print(b().state)")
    def called(self): return (self.fakes / "said").read_text().splitlines()
    def builds(self): return sum(line.startswith(LLAMA) for line in self.called())
    def ready(self): return (self.checkout / ".venv" / ".installed").exists()

    def hold(self, where): (self.fakes / f"stop {where}").touch()
    def release(self, where): (self.fakes / f"stop {where}").unlink(missing_ok=True)
    def arrives(self, where): self.until(lambda: (self.fakes / f"stands {where}").exists())

    def until(self, condition):
        deadline = time.time() + 30
        while not condition():
            assert time.time() < deadline, f"this never came; so far: {self.called()}"
            time.sleep(0.02)

    def processes(self, word):
        "What runs in this checkout with `word` as a part of its command."
        import psutil
        found = psutil.process_iter(["cwd", "cmdline"])
        return [p for p in found if p.info["cwd"] == str(self.checkout) and word in (p.info["cmdline"] or [])]

    def end(self):
        for file in self.fakes.glob("stop *"): file.unlink()
        for process in self.running:
            if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        self.until(lambda: not self.processes("build"))


def interruptible():
    "A shell that starts the tests in the background lets them ignore Ctrl-C, and their children too."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.end()


def control_c(process):
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=60)[0]


# ------------------------------------------------------------------------------------------------- in the background
def test_jupyter_opens_while_llama_cpp_is_compiled(machine):
    machine.hold("before llama-cpp-python")
    code, said = machine.make("lab")
    assert code == 0 and "JupyterLab is open" in said, said
    assert "llama.cpp is being compiled in the background" in said and "log: .venv/llama_cpp.log" in said, said
    machine.arrives("before llama-cpp-python")
    assert machine.state() == "building"
    called = machine.called()
    assert not any("llama" in line for line in called[:called.index("jupyter opens")] if not line.startswith(LLAMA))
    pip, torch, *rest = [line for line in called if line.startswith("pip")]
    assert (pip, torch) == ("pip pip==26.3 ", "pip torch==2.13.0 "), "they come first, in the pinned versions"
    assert "pip --no-deps numpy==2.3.5 pip==26.3 torch==2.13.0 " in rest, "the pins, without what must be compiled"
    if sys.platform == "linux":  # a package that requires llama.cpp (the embedded model's does) would bring it
        assert all("--no-deps" in line for line in rest if not line.startswith(LLAMA))
    told = machine.python("import llama_cpp")
    assert told.startswith("ModuleNotFoundError: llama-cpp-python is not there yet: being compiled for less than"), told
    assert str(machine.log) in told
    assert machine.python("import importlib.util as u; print(u.find_spec('torch') is not None)") == "True"

    machine.release("before llama-cpp-python")
    code, said = machine.make("test")
    assert code == 0 and "the checks ran" in said, said
    assert machine.state() == "installed" and machine.python("import llama_cpp; print(llama_cpp.installed)") == "True"
    assert not list(machine.checkout.glob(".venv/lib/*/site-packages/llama_cpp.py")), "the stand-in is still there"
    assert machine.builds() == 1


def test_the_build_avoids_amx_and_pips_cache(machine):
    machine.make("test")
    line = next(line for line in machine.called() if "llama" in line)
    assert line == f"{LLAMA} -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__"
    machine.make("clean")
    machine.environment["CMAKE_ARGS"] = "-DGGML_NATIVE=OFF"
    machine.make("test")
    assert machine.called()[-1].endswith("-DGGML_NATIVE=OFF"), "a reader's own CMAKE_ARGS go before ours"


def test_the_checks_wait_for_the_build(machine):
    machine.hold("before llama-cpp-python")
    process = machine.start("test")
    machine.arrives("before llama-cpp-python")
    time.sleep(0.3)
    assert process.poll() is None, "the checks began without llama.cpp"
    machine.release("before llama-cpp-python")
    assert "the checks ran" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_nothing_is_done_twice(machine):
    machine.make("test")
    before = machine.called()
    for target in ("lab", "test"):
        code, said = machine.make(target)
        assert code == 0 and "compiled" not in said, said
    assert [line for line in machine.called()[len(before):]] == ["jupyter opens"]


# ------------------------------------------------------------------------------------------------------ two at a time
def test_a_second_make_starts_no_second_build(machine):
    machine.hold("before llama-cpp-python")
    machine.make("lab")
    machine.arrives("before llama-cpp-python")
    code, said = machine.make("lab")
    assert code == 0 and "llama.cpp is still being compiled" in said, said
    waiting = machine.start("test")
    time.sleep(0.3)
    machine.release("before llama-cpp-python")
    assert "the checks ran" in waiting.communicate(timeout=60)[0]
    assert machine.builds() == 1


def test_two_makes_at_once_take_turns(machine):
    machine.hold("within torch")
    first = machine.start("lab")
    machine.arrives("within torch")
    second = machine.start("test")
    assert "waiting for it" in second.stdout.readline()
    time.sleep(0.5)
    assert sum(line.startswith("pip torch") for line in machine.called()) == 1, "two pips work in one environment"
    machine.release("within torch")
    assert "JupyterLab is open" in first.communicate(timeout=60)[0]
    assert "the checks ran" in second.communicate(timeout=60)[0] and second.returncode == 0
    assert machine.called().count("venv") == 1 and machine.builds() == 1


def test_eight_at_once_start_one_build(machine):
    machine.make("lab")
    machine.make("test")
    shutil.rmtree(next(machine.checkout.glob(".venv/lib/*/site-packages/llama_cpp_python-*.dist-info")))
    machine.hold("before llama-cpp-python")
    several = [machine.start("test") for _ in range(8)]
    machine.arrives("before llama-cpp-python")
    time.sleep(0.5)
    machine.release("before llama-cpp-python")
    assert all("the checks ran" in process.communicate(timeout=60)[0] for process in several)
    assert machine.builds() == 2, "one for the environment, one for the eight"


# ------------------------------------------------------------------------------------------------------------ failure
def test_a_build_that_fails_is_told_and_tried_again(machine):
    (machine.fakes / "fail llama-cpp-python").touch()
    code, said = machine.make("test")
    assert code and "the checks ran" not in said
    assert "error: the compiler gave up" in said, "the compiler's own words are missing"
    assert "its compilation failed (exit status 1)" in said and f"mend what the end of {machine.log} says" in said, said
    assert "Traceback" not in said and machine.state() == "failed"
    told = machine.python("import llama_cpp")
    assert "failed (exit status 1)" in told and str(machine.log) in told, told
    assert machine.make("lab")[0] == 0, "a notebook that does not need llama.cpp can be read all the same"
    machine.until(lambda: machine.builds() == 2 and machine.state() == "failed")
    assert machine.log.read_text().count("started") == 1, "the log tells of two builds"

    (machine.fakes / "fail llama-cpp-python").unlink()
    code, said = machine.make("test")
    assert code == 0 and "the checks ran" in said and machine.state() == "installed"


def test_a_step_that_fails_stops_with_one_sentence(machine):
    (machine.fakes / "fail numpy").touch()
    code, said = machine.make("lab")
    assert code and "Setting up stopped at: installing the pinned versions (exit status 1)" in said
    assert "JupyterLab" not in said and "Traceback" not in said and not machine.ready()
    (machine.fakes / "fail numpy").unlink()
    assert machine.make("lab")[0] == 0


def test_another_pin_is_another_build(machine):
    machine.make("test")
    (machine.checkout / "constraints.txt").write_text(CONSTRAINTS.replace("0.3.36", "0.3.40"))
    code, _ = machine.make("test")
    assert code == 0 and any("llama-cpp-python==0.3.40" in line for line in machine.called())


# ------------------------------------------------------------------------------------------------------- interruption
@pytest.mark.parametrize("where", ["before torch", "within torch", "within numpy", "within pip"])
def test_interrupted_while_installing(machine, where):
    "Ctrl-C leaves half a package, which pip takes for installed; make does not."
    machine.hold(where)
    process = machine.start("lab")
    machine.arrives(where)
    said = control_c(process)
    assert process.returncode and "JupyterLab" not in said and not machine.ready()
    machine.release(where)
    code, said = machine.make("test")
    assert code == 0 and "the checks ran" in said, said
    assert machine.called().count("venv") == (2 if where == "within pip" else 1), "half a pip is kept"
    code = "import torch, numpy, llama_cpp; print(torch.installed and numpy.installed and llama_cpp.installed)"
    assert machine.python(code) == "True"


def test_interrupting_jupyter_or_the_waiting_does_not_stop_the_build(machine):
    machine.hold("before llama-cpp-python")
    process = machine.start("test")
    machine.arrives("before llama-cpp-python")
    said = control_c(process)
    assert process.returncode and "Traceback" not in said and "the checks ran" not in said, said
    assert machine.state() == "building"
    machine.release("before llama-cpp-python")
    assert machine.make("test")[0] == 0 and machine.builds() == 1


@pytest.mark.parametrize("where", ["before llama-cpp-python", "within llama_cpp"])
def test_a_killed_build_is_started_again(machine, where):
    machine.hold(where)
    machine.make("lab")
    machine.arrives(where)
    for process in machine.processes("build"): process.kill()
    assert machine.state() == "building", "pip is still at work: a second one beside it would be a mess"
    for process in machine.processes("pip"): process.kill()
    machine.until(lambda: machine.state() == "interrupted")
    assert "its compilation was interrupted" in machine.python("import llama_cpp") or where.startswith("within")
    machine.release(where)
    code, said = machine.make("test")
    assert code == 0 and machine.builds() == 2, said
    assert machine.python("import llama_cpp; print(llama_cpp.installed)") == "True"


def test_a_build_of_the_past_holds_nothing(machine):
    "A log without a living process, as after a reboot, is no lock."
    machine.make("lab")
    machine.make("test")
    shutil.rmtree(next(machine.checkout.glob(".venv/lib/*/site-packages/llama_cpp_python-*.dist-info")))
    machine.log.write_text("started 2026-01-01 00:00:00\n")
    assert machine.state() == "interrupted"
    assert machine.make("test")[0] == 0 and machine.state() == "installed"
