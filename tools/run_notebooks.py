"""Run notebooks top to bottom as nbdev_test does and save their outputs, clean.

    python tools/run_notebooks.py                         # all
    python tools/run_notebooks.py nbs/04_architecture     # a folder or single files
"""
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import ROOT, all_notebooks, execute, problems


def main(args):
    wanted = [Path(a).resolve() for a in args]
    chosen = [p for p in all_notebooks() if not wanted or any(p == w or w in p.parents for w in wanted)]
    if not chosen: sys.exit(f"No notebook matches {' '.join(args)}")
    if len(chosen) == 1:
        seconds = execute(chosen[0], save=True)
        print(f"{seconds:6.1f} s  {chosen[0].relative_to(ROOT)}", flush=True)
        for p in problems(chosen[0]): print(f"          {p}")
        return
    for path in chosen:  # one process each: a chapter must not see what another left behind
        if subprocess.run([sys.executable, __file__, str(path)], cwd=ROOT).returncode: sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
