"The tools behind make: they refuse with one clear sentence, they see drift, they see what is unfit to commit."
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------- install
@pytest.fixture
def install(monkeypatch):
    "The set-up script on a machine that lacks nothing."
    module = load("install")
    Usage = namedtuple("Usage", "total used free")
    Version = namedtuple("Version", "major minor micro releaselevel serial")

    def programs(*names):
        monkeypatch.setattr(module.shutil, "which", lambda name, *_, **__: f"/bin/{name}" if name in names else None)
    module.pretend = dict(
        python=lambda *v: monkeypatch.setattr(module.sys, "version_info", Version(*v, "final", 0)), programs=programs,
        disk=lambda gb: monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(10**12, 0, int(gb * 1e9))))
    module.pretend["programs"]("cc", "c++")
    module.pretend["disk"](100)
    return module


def test_install_accepts_a_fit_machine(install, tmp_path):
    for version in ((3, 11, 0), (3, 12, 7), (3, 13, 1)):
        install.pretend["python"](*version)
        assert install.missing_prerequisite(tmp_path / ".venv") is None


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 14, 0), (2, 7, 18)])
def test_install_refuses_a_wrong_python(install, tmp_path, version):
    install.pretend["python"](*version)
    problem = install.missing_prerequisite(tmp_path / ".venv")
    assert "Python 3.11, 3.12 or 3.13 is needed" in problem and "make PYTHON=" in problem and "\n" not in problem


@pytest.mark.parametrize("programs", [(), ("cc",), ("c++",)])
def test_install_refuses_without_both_compilers(install, tmp_path, programs):
    install.pretend["programs"](*programs)
    problem = install.missing_prerequisite(tmp_path / ".venv")
    assert "C and C++ compiler" in problem and "build-essential" in problem and "\n" not in problem


def test_install_refuses_a_full_disk_but_not_for_an_environment_that_is_there(install, tmp_path):
    install.pretend["disk"](1.25)
    problem = install.missing_prerequisite(tmp_path / ".venv")
    assert "only 1.2 GB are free" in problem and "\n" not in problem
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    assert install.missing_prerequisite(tmp_path / ".venv") is None


def test_install_knows_the_pins_of_what_it_installs_by_name(install):
    found = install.pins()
    assert found["torch"] == "torch==2.13.0" and found["llama-cpp-python"].startswith("llama-cpp-python==")
    assert all(pin.startswith(f"{name}==") and "#" not in pin for name, pin in found.items())


def test_the_doctor_rebuilds_llama_cpp_as_the_installer_builds_it():
    from llm_workbench.hardware.doctor import LLAMA_REBUILD
    assert f'CMAKE_ARGS="{load("install").LLAMA_CMAKE_ARGS}"' in LLAMA_REBUILD


def test_make_says_what_is_missing(tmp_path):
    "From the outside: a Python that is too old is named, and nothing is created."
    old = tmp_path / "python"
    code = ("import runpy, sys; sys.version_info = (3, 9, 1); sys.argv = sys.argv[1:]; "
            'runpy.run_path(sys.argv[0], run_name="__main__")')
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$@\"\n")
    old.chmod(0o755)
    for name in ("Makefile", "settings.ini", "setup.py"): shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "constraints.txt").touch()
    shutil.copytree(TOOLS, tmp_path / "tools")
    done = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "Python 3.11, 3.12 or 3.13 is needed" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / ".venv").exists()


# --------------------------------------------------------------------------------------------------------- check
def cell(source, kind="code", **more):
    outputs = {} if kind != "code" else dict(outputs=[], execution_count=None)
    name = f"c{abs(hash((source, kind))) % 10**7}"
    return dict(cell_type=kind, id=name, metadata={}, source=source, **outputs) | more


def write(path, *cells, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = dict(kernelspec=dict(display_name="python3", language="python", name="python3")) | metadata
    nb = dict(cells=list(cells), metadata=metadata, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb, indent=1) + "\n")
    return path


CHAPTER = [cell("#| default_exp part.one"), cell("# One\n\n> A chapter.", "markdown"),
           cell("#| export\ndef one(): return 1")]
TWO = [cell("#| default_exp part.two"), CHAPTER[1], cell("#| export\ndef two(): return 2")]


@pytest.fixture
def project(tmp_path):
    "A minimal project of the same make: one chapter, exported and committed, with our tools."
    shutil.copyfile(ROOT / "settings.ini", tmp_path / "settings.ini")
    shutil.copytree(TOOLS, tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".gitignore").write_text("__pycache__/\n*.pyc\n")
    (tmp_path / "llm_workbench").mkdir()
    (tmp_path / "llm_workbench" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    write(tmp_path / "nbs" / "01_part" / "01_one.ipynb", *CHAPTER)
    for command in (["nbdev_export"], ["nbdev_clean"], ["git", "init", "-q"], ["git", "add", "-A"],
                    ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-qm", "start"]):
        subprocess.run(command, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    return tmp_path


def environment(): return {**os.environ, "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]}


def tool(project, *command):
    "Whether a tool ended well, and what it said."
    done = subprocess.run([sys.executable, *command], cwd=project, env=environment(), capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def check(project, *steps): return tool(project, "tools/check.py", *steps)


def test_check_passes_where_nothing_drifted(project):
    ok, said = check(project, "exported", "clean", "hygiene")
    assert ok, said
    assert all(f"{step:10}" in said for step in ("exported", "clean", "hygiene")) and " s  ok" in said


def test_check_sees_a_module_edited_by_hand(project):
    module = project / "llm_workbench" / "part" / "one.py"
    module.write_text(module.read_text().replace("return 1", "return 2"))
    ok, said = check(project, "exported")
    assert not ok and "one.py" in said and "make export" in said, said


def test_check_sees_a_notebook_that_was_not_exported(project):
    write(project / "nbs" / "01_part" / "01_one.ipynb", *CHAPTER[:2], cell("#| export\ndef one(): return 'one'"))
    ok, said = check(project, "exported")
    assert not ok and "one.py" in said, said


def test_check_sees_a_new_module(project):
    write(project / "nbs" / "01_part" / "02_two.ipynb", *TWO)
    ok, said = check(project, "exported")
    assert not ok and "two.py" in said, said


def test_check_sees_an_edited_module_that_git_does_not_know_yet(project):
    write(project / "nbs" / "01_part" / "02_two.ipynb", *TWO)
    subprocess.run(["nbdev_export"], cwd=project, env=environment(), check=True)
    module = project / "llm_workbench" / "part" / "two.py"
    module.write_text(module.read_text().replace("return 2", "return 3"))
    ok, said = check(project, "exported")
    assert not ok and "two.py" in said, said


def test_check_sees_an_unclean_notebook(project):
    notebook = project / "nbs" / "01_part" / "01_one.ipynb"
    nb = json.loads(notebook.read_text())
    nb["cells"][2]["execution_count"] = 7
    nb["cells"][2]["metadata"]["collapsed"] = True
    notebook.write_text(json.dumps(nb, indent=1))
    ok, said = check(project, "clean")
    assert not ok and "01_one.ipynb" in said, said


def test_check_reports_every_problem_and_fails_with_their_names(project):
    write(project / "nbs" / "01_part" / "01_one.ipynb", *CHAPTER, widgets={})
    (project / "llm_workbench" / "part" / "one.py").write_text("")
    ok, said = check(project)[0], check(project, "exported", "hygiene")[1]
    assert not ok and "metadata.widgets" in said


# ----------------------------------------------------------------------------------------------------- notebooks
@pytest.fixture(scope="module")
def tools(): return load("notebooks")


TITLE = cell("# Title\n\n> What it is.", "markdown")


def shown(**output): return cell("x", outputs=[dict(output_type="display_data", metadata={}) | output])


@pytest.mark.parametrize("cells, metadata, expected", [
    ([TITLE], {}, None),
    ([TITLE], dict(widgets={}), "metadata.widgets"),
    ([cell("no title", "markdown")], {}, "H1"),
    ([cell("x")], {}, "H1"),
    ([TITLE, cell("x", outputs=[dict(output_type="error", ename="KeyError", evalue="", traceback=[])])], {}, "KeyErr"),
    ([TITLE, shown(data={"text/plain": "/home/someone/x.gguf"})], {}, "absolute path"),
    ([TITLE, shown(output_type="stream", name="stdout", text="wrote /tmp/x")], {}, "absolute path"),
    ([TITLE, shown(data={"text/plain": "C:\\Users\\someone"})], {}, "absolute path"),
    ([TITLE, shown(data={"text/plain": "llm_workbench/x.py"})], {}, None),
    ([TITLE, shown(data={"image/png": "iVBORw0KGgo/tmp/AAA", "text/plain": "a base64 path"})], {}, None),
    ([TITLE, shown(data={"text/plain": "x" * 1_000_000})], {}, "the limit is 1,000,000"),
])
def test_problems(tools, tmp_path, cells, metadata, expected):
    found = tools.problems(write(tmp_path / "x.ipynb", *cells, **metadata))
    assert (found == []) if expected is None else (len(found) == 1 and expected in found[0]), found


def test_without_paths_cuts_the_checkout_and_the_home(tools, monkeypatch):
    monkeypatch.setattr(tools, "ROOT", Path("/data/checkout"))
    monkeypatch.setattr(tools.Path, "home", lambda: Path("/home/someone"))
    data = {"text/plain": "see https://example.org"}
    output = dict(text=["/data/checkout/nbs/x.ipynb:1\n", "/home/someone/.cache/y\n"], data=data)
    assert tools.without_paths(output) == dict(text=["nbs/x.ipynb:1\n", ".cache/y\n"], data=data)


def test_without_paths_leaves_addresses_alone_where_home_is_the_root(tools, monkeypatch):
    monkeypatch.setattr(tools.Path, "home", lambda: Path("/"))
    output = dict(text="https://example.org//x")
    assert tools.without_paths(output) == output


def test_notebooks_are_run_as_they_are_tested_and_saved_clean(project):
    "Flagged cells keep their outputs and do not run; every other output is made anew."
    kept = dict(output_type="stream", name="stdout", text="kept")
    more = [cell("print(one())", outputs=[dict(kept, text="stale")]), cell("#| cuda\n1 / 0", outputs=[kept]),
            cell("#| eval: false\n1 / 0"), cell("import os; print(os.getcwd())")]
    path = write(project / "nbs" / "01_part" / "01_one.ipynb", *CHAPTER, *more)
    ok, said = tool(project, "tools/run_notebooks.py", str(path))
    assert ok, said
    cells = json.loads(path.read_text())["cells"]
    text = ["".join(o["text"]) for c in cells for o in c.get("outputs", [])]
    assert text == ["1\n", "kept", "nbs/01_part\n"], text
    assert all(c.get("execution_count") is None for c in cells) and "".join(cells[4]["source"]).startswith("#| cuda")
    assert check(project, "clean")[0], "what was saved is not clean"


def test_a_failing_notebook_is_named_and_left_as_it_was(project):
    path = write(project / "nbs" / "01_part" / "01_one.ipynb", *CHAPTER, cell("assert one() == 2, 'one is not two'"))
    before = path.read_text()
    ok, said = tool(project, "tools/run_notebooks.py", str(path))
    assert not ok and "one is not two" in said
    assert path.read_text() == before


# ----------------------------------------------------------------------------------------------------- benchmarks
def test_a_result_is_kept_with_all_that_explains_it(tmp_path, monkeypatch):
    from benchmarks import record
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench.py", "--threads", "2", "two words"])
    samples = dict(ours=[3.0, 1.0, 2.0], theirs=[4.0])
    path = record.record("decode", samples, units="token/s", results=tmp_path, threads=2)
    kept = record.recorded("decode", results=tmp_path)
    assert path.parent.parent == tmp_path and path.parent.name == record.describe_machine().slug
    assert kept["medians"] == dict(ours=2.0, theirs=4.0) and kept["samples"] == samples and kept["threads"] == 2
    assert kept["machine"]["versions"]["torch"] and kept["machine"]["cpu"] and kept["date"].endswith("+00:00")
    assert kept["command"].endswith("--threads 2 'two words'") and "/somewhere" not in kept["command"]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path):
    from benchmarks import record
    path = record.record("decode", dict(ours=[1.0]), results=tmp_path)
    before = path.read_text()
    nan, no_json, empty = ({"samples": dict(ours=values)} for values in ([float("nan")], [2.0], []))
    for bad in (nan, no_json | dict(note=object()), empty):
        with pytest.raises((ValueError, TypeError)): record.record("decode", results=tmp_path, **bad)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a half-written file was left behind"
