"The house in order: folders, chapters, modules, links, the README's table and the tour's map say the same."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "llm_workbench"
WIDTH = 120

# what a room may import beside itself and the modules at the top level; landscape stands first and looks ahead
MAY_IMPORT = dict(
    landscape={"hardware", "files", "families"}, hardware=set(), files=set(), text={"files"}, architecture={"hardware"},
    families={"files", "text", "architecture"}, inference={"architecture", "families", "files", "text"},
    quantization={"architecture", "families", "files"}, kernels={"architecture", "quantization", "hardware"},
    finetuning={"architecture", "families", "files", "hardware", "inference", "quantization", "text"},
    serving={"architecture", "families", "files", "hardware", "inference", "quantization", "text"},
    operations={"inference", "serving"})


def chapters(): return sorted(p for p in NBS.glob("[0-9]*/[0-9]*.ipynb"))
def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def text(path): return "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")
def name(path): return re.sub(r"^\d+_", "", path.stem)
def room(path): return re.sub(r"^\d+_", "", path.parent.name)
def number(path): return int(path.name[:2])


def test_rooms_and_chapters_are_numbered_in_order_without_letters_and_gaps():
    folders = sorted(p.name for p in NBS.iterdir() if p.is_dir() and not p.name.startswith("."))
    assert all(re.fullmatch(r"\d\d_[a-z]+", f) for f in folders), folders
    assert [re.sub(r"^\d+_", "", f) for f in folders] == [
        r for r in MAY_IMPORT if any(f.endswith("_" + r) for f in folders)
    ], "rooms are out of order"
    for folder in folders:
        stems = sorted(p.stem for p in (NBS / folder).glob("*.ipynb"))
        assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", s) for s in stems), stems
        assert [int(s[:2]) for s in stems] == list(range(1, len(stems) + 1)), f"{folder} has gaps: {stems}"


def test_a_chapter_exports_the_module_of_its_name_and_every_module_has_its_chapter():
    exported = {}
    for path in chapters():
        found = re.search(r"^#\| default_exp (\S+)$", "\n".join(source(c) for c in cells(path)), re.M)
        exported[path.name] = found and found[1]
        assert exported[path.name] == f"{room(path)}.{name(path)}", path
    modules = {f"{p.parent.name}.{p.stem}" for p in PACKAGE.glob("*/*.py") if p.stem != "__init__"}
    assert modules == set(exported.values())


def test_imports_run_downwards():
    "A module reads modules of the rooms that it may import, and of its own room only those of earlier chapters."
    place = {f"{room(p)}.{name(p)}": number(p) for p in chapters()}
    wrong = []
    for module, at in place.items():
        here = module.split(".")[0]
        for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom): continue
            path = (node.module or "").removeprefix("llm_workbench.")
            if node.level == 1: path = f"{here}.{path}"
            elif node.level == 0 and not (node.module or "").startswith("llm_workbench"): continue
            targets = (
                [path] if path in place else [f"{path}.{a.name}" for a in node.names if f"{path}.{a.name}" in place]
            )
            for target in targets:
                there = target.split(".")[0]
                if there == here and place[target] >= at or there != here and there not in MAY_IMPORT[here]:
                    wrong.append(f"{module} imports {target}")
    assert not wrong, wrong


def links(markdown):
    return re.findall(
        r"\[([^\]]*)\]\(([^)\s#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```|`[^`]*`(?!\])", "", markdown, flags=re.S)
    )


PAGES = [*sorted(NBS.glob("**/[0-9]*.ipynb")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere_and_carry_the_right_number(path):
    markdown = text(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for label, target in links(markdown):
        if re.match(r"\w+:", target): continue
        there = (path.parent / target).resolve()
        assert there.exists(), f"{path.name}: [{label}]({target}) leads nowhere"
        if m := re.match(r"(\d\d)\b", label):
            assert there.name.startswith(m[1]), f"{path.name}: [{label}]({target}) has an old number"


def test_the_readme_lists_every_chapter_in_order():
    listed = re.findall(r"^\| \[[^\]]+\]\((nbs/[^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert listed == [str(p.relative_to(ROOT)) for p in [NBS / "00_start_here.ipynb", *chapters()]]


def test_the_map_of_the_tour_names_every_room():
    tour = text(NBS / "00_start_here.ipynb")
    named = re.findall(r"^\| \[`(\d\d_\w+)`\]", tour, re.M)
    assert named == sorted({p.parent.name for p in chapters()})


def test_lines_fit_the_page():
    long = [
        f"{p.relative_to(ROOT)}:{c['id']}"
        for p in [NBS / "00_start_here.ipynb", *chapters()]
        for c in cells(p)
        if c["cell_type"] == "code"
        for line in source(c).splitlines()
        if len(line) > WIDTH
    ]
    for p in [
        *PACKAGE.glob("*.py"),
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "tools").glob("*.py"),
    ]:
        if p.name == "_modidx.py": continue
        long += [
            f"{p.relative_to(ROOT)}:{i}"
            for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > WIDTH
        ]
    assert not long, f"{len(long)} lines are longer than {WIDTH} columns: {long[:20]}"
