"Find, run and inspect the notebooks; the commands beside this file use it."
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
MAX_BYTES = 1_000_000


def all_notebooks():
    "Every notebook that nbdev would export or test, in reading order."
    hidden = lambda p: any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)
    return sorted(p for p in NBS.rglob("*.ipynb") if not hidden(p))


def execute(path, save):
    "Run `path` as nbdev_test does (same directives, same flags), optionally keeping the outputs; the seconds it took."
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    from execnb.nbio import read_nb, write_nb

    os.environ["IN_TEST"] = "1"
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    flags = set(get_config().tst_flags.split())
    nb = NBProcessor(path, process=True).nb
    raw = read_nb(path)  # the processor strips directives from sources; what is saved keeps them

    def skipped(cell):
        directives = getattr(cell, "directives_", None) or {}
        return (cell.cell_type != "code" or "nbdev_export(" in cell.source or flags & directives.keys()
                or directives.get("eval:", [""])[0].lower() == "false")

    for cell in nb.cells:
        if not skipped(cell): cell.outputs = []
    shell = CaptureShell(path, mpl_format="png")
    start = time.time()
    try:
        with working_directory(path.parent):
            shell.run_all(nb, exc_stop=True, preproc=skipped)
    except Exception:
        sys.exit(shell.prettytb(fname=path.relative_to(ROOT)))
    if save:
        for cell, ran in zip(raw.cells, nb.cells):
            if not skipped(ran) and cell.cell_type == "code": cell.outputs = [portable(o) for o in ran.outputs]
        config = get_config()
        clean_nb(raw, allowed_cell_metadata_keys=config.allowed_cell_metadata_keys.split(), clean_ids=True)
        raw.metadata.pop("widgets", None)
        tmp = path.with_suffix(".tmp")
        write_nb(raw, tmp)
        os.replace(tmp, path)
    return time.time() - start


def portable(output):
    "What of an output is worth keeping: no paths of this machine; of a widget its picture, not its dead handle."
    data = output.get("data", {})
    if "image/png" in data:
        output = {**output, "data": {k: v for k, v in data.items() if k != "application/vnd.jupyter.widget-view+json"}}
    return without_paths(output)


def without_paths(output):
    "An output with this checkout's absolute path cut out, so that it reads the same on every machine."
    text = json.dumps(output)
    for folder in (ROOT, Path.home()):
        if folder.parent != folder: text = text.replace(f"{folder}/", "")  # a home of "/" would eat slashes
    return json.loads(text)


def problems(path):
    "What keeps `path` from being fit to commit."
    text = path.read_text(encoding="utf-8")
    nb = json.loads(text)
    found = []
    size = len(text.encode())
    if size > MAX_BYTES: found.append(f"{size:,} bytes; the limit is {MAX_BYTES:,}: draw fewer or smaller figures")
    if "widgets" in nb["metadata"]:
        found.append("metadata.widgets is saved: GitHub cannot show such a notebook; run make notebooks")
    first = next((c for c in nb["cells"] if c["cell_type"] == "markdown"), None)
    if first is None or not "".join(first["source"]).startswith("# "):
        found.append("the first text cell is not an H1 title")
    for i, cell in enumerate(nb["cells"]):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error": found.append(f"cell {i} keeps an error output ({output['ename']})")
            data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/png")}
            if re.search(r"(/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\Users)", json.dumps({**output, "data": data})):
                found.append(f"cell {i} shows an absolute path")
    return found
