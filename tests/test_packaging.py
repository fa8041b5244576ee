"One set of requirements in four files, a wheel that holds the package and nothing else, and a light import."
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
BROUGHT = {"setuptools"}  # by torch, which is installed with what it requires


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def pins():
    "{name: [Requirement with an exact version and perhaps a marker]}"
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        line = line.split(" #")[0].strip()
        if not line or line.startswith(("#", "-")): continue
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def exported_modules():
    "{module path inside the package: notebook}"
    found = {}
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in notebook.relative_to(ROOT).parts): continue
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            name = re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M)
            if name and cell["cell_type"] == "code": found[name[1].replace(".", "/") + ".py"] = notebook
    return found


# ----------------------------------------------------------------------------------- one source of requirements
@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_exact_pin_that_satisfies_it(settings, pins, python):
    environment = dict(python_version=python, python_full_version=f"{python}.0", sys_platform="linux", os_name="posix",
                       platform_system="Linux", platform_machine="x86_64", implementation_name="cpython",
                       platform_python_implementation="CPython")
    wrong = []
    for text in (settings["requirements"] + " " + settings["dev_requirements"]).split():
        wanted = Requirement(text)
        known = pins.get(canonicalize_name(wanted.name), [])
        here = [p for p in known if p.marker is None or p.marker.evaluate(environment)]
        exact = [re.fullmatch(r"==([^*,]+)", str(p.specifier)) for p in here]
        if len(here) != 1 or not exact[0]: wrong.append(f"{text}: {list(map(str, here)) or 'no pin'}")
        elif exact[0][1] not in wanted.specifier: wrong.append(f"{text}: the pin {exact[0][1]} does not satisfy it")
    assert not wrong, f"constraints.txt on Python {python}: " + "; ".join(wrong)


def test_the_pins_are_complete(settings, pins):
    "On Linux they are installed as they stand, without a look at what they require: all of that must be among them."
    asked, seen, absent = [], set(), set()
    for text in (settings["requirements"] + " " + settings["dev_requirements"]).split(): asked.append(Requirement(text))
    while asked:
        wanted = asked.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen: continue
        seen.add((name, frozenset(wanted.extras)))
        if name not in pins and name not in BROUGHT: absent.add(name)
        try: requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        for more in map(Requirement, requires):
            if more.marker is None or any(more.marker.evaluate(dict(extra=extra)) for extra in {"", *wanted.extras}):
                asked.append(more)
    assert not absent, f"constraints.txt lacks {sorted(absent)}"


def test_torch_is_pinned_and_triton_follows_it(pins):
    assert [str(p.specifier) for p in pins["torch"]] == ["==2.13.0"], "another torch: measure again what chapters claim"
    assert "triton" not in pins, "torch's CUDA build names the only triton that fits it: a pin here breaks that install"


def test_what_is_installed_is_what_is_pinned(settings, pins):
    "The tests speak for the pinned versions only if those are the ones that run."
    here = {}
    for text in settings["requirements"].split():
        name = canonicalize_name(Requirement(text).name)
        fitting = (p.specifier for p in pins.get(name, []) if p.marker is None or p.marker.evaluate())
        here[name] = next(fitting, SpecifierSet("<0"))
    versions = {name: metadata.version(name) for name in here}
    wrong = {name: version for name, version in versions.items() if Version(version).public not in here[name]}
    assert not wrong, f"installed versions that constraints.txt does not name: {wrong}"


def test_setup_says_what_settings_say(settings, monkeypatch):
    told = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: told.update(given))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert told["name"] == settings["lib_name"] == "llm_workbench" and told["version"] == settings["version"]
    assert told["install_requires"] == settings["requirements"].split()
    assert told["extras_require"] == {"dev": settings["dev_requirements"].split()}
    assert told["entry_points"]["console_scripts"] == settings["console_scripts"].split()
    supported = SpecifierSet(told["python_requires"])
    assert [v for v in ("3.10", *PYTHONS, "3.14") if f"{v}.0" in supported] == list(PYTHONS)
    assert {c.rpartition(" ")[2] for c in told["classifiers"] if ":: 3." in c} == set(PYTHONS)
    assert settings["min_python"] == PYTHONS[0]


def test_version_is_the_same_everywhere(settings):
    import llm_workbench
    assert llm_workbench.__version__ == settings["version"]


def test_conda_installs_the_same(settings):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert pip == ["-c constraints.txt", "-e .[dev]"], "conda users must get the pinned versions from settings.ini"
    python = next(d for d in conda if d.startswith("python="))
    assert python.removeprefix("python=") in PYTHONS and "pip" in conda
    packages = {Requirement(r).name for r in settings["requirements"].split()}
    assert not packages & {d.split("=")[0] for d in conda}, "a Python package from conda would escape constraints.txt"


# ---------------------------------------------------------------------------------------------------- the wheel
@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the checkout, so that nothing is left behind in it."
    folder = tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, folder / "source" / name
        if not source.is_file(): continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    local = Version(metadata.version("setuptools")) >= Version("70.1")  # from there on it makes wheels by itself
    options = ["--wheel", "--outdir", str(folder), *["--no-isolation"] * local]
    command = [sys.executable, "-m", "build", *options, str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "warning: build_py" not in done.stdout.lower()
    return next(folder.glob("*.whl"))


OWN = {"__init__.py", "cli.py", "display.py", "embedded.py", "environment.py", "errors.py"}  # not from a notebook


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    strangers = [n for n in names if not re.match(r"llm_workbench/|llm_workbench-[^/]+\.dist-info/", n)]
    assert not strangers, f"the wheel also holds {strangers[:5]}"
    code = {n.removeprefix("llm_workbench/") for n in names if n.startswith("llm_workbench/")}
    assert {n for n in code if not n.endswith(".py")} == {
        "landscape/models.json", "finetuning/instructions.jsonl",
        *(f"serving/{n}" for n in ("engines.json", "arguments.json", "kubernetes.yaml", "modal_app.txt"))}
    assert exported_modules().keys() <= code and OWN <= code
    assert any(n.endswith("LICENSE") for n in names), "the licence must travel with the package"


def test_wheel_installs_and_imports_in_an_empty_environment(wheel, tmp_path):
    "An empty venv; the dependencies are borrowed from this environment by a path file, the package is not."
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    venv.create(tmp_path / "venv", with_pip=False)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    here = dict(capture_output=True, text=True, cwd=tmp_path, env=environment)
    ask = lambda code: subprocess.run([python, "-c", code], **here)
    site = Path(ask("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    assert ask("import llm_workbench").returncode, "the new environment knows the package: this proves nothing"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    done = subprocess.run([*pip, "--no-deps", "--no-index", "--disable-pip-version-check", "-q", str(wheel)], **here)
    assert done.returncode == 0, done.stderr
    borrowed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    modules = sorted("llm_workbench." + name.removesuffix(".py").replace("/", ".") for name in exported_modules())
    done = ask(f"import importlib, llm_workbench; [importlib.import_module(m) for m in {modules!r}]; "
               "print(llm_workbench.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(site), f"imported from {done.stdout.strip()}, not from the wheel"
    shown = subprocess.run([scripts / "llm-workbench", "--version"], **here)
    assert shown.returncode == 0 and shown.stdout.strip() == wheel.name.split("-")[1], shown.stderr


# ----------------------------------------------------------------------------------------------------- the import
def in_fresh_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_costs_less_than_a_third_of_a_second_beyond_torch():
    code = ("import json, time; import torch; start = time.process_time(); import llm_workbench; "
            "print(json.dumps(time.process_time() - start))")
    assert min(in_fresh_python(code) for _ in range(5)) < 0.3


def test_import_brings_no_heavy_library():
    heavy = ["torch", "transformers", "matplotlib", "pandas", "bitsandbytes", "llama_cpp", "jupyterlab", "ipywidgets"]
    code = f"import json, sys; import llm_workbench; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    assert in_fresh_python(code) == []


def test_no_module_brings_a_library_for_plots_or_oracles():
    modules = sorted("llm_workbench." + name.removesuffix(".py").replace("/", ".") for name in exported_modules())
    heavy = ["transformers", "matplotlib", "pandas", "bitsandbytes", "llama_cpp", "ipywidgets", "IPython"]
    code = f"""
import importlib, json, sys
brought = {{}}
for name in {modules!r}:
    before = set(sys.modules)
    importlib.import_module(name)
    new = [m for m in {heavy!r} if m in sys.modules and m not in before]
    if new: brought[name] = new
print(json.dumps(brought))"""
    assert in_fresh_python(code) == {}, "import these where they are used, inside the function"
