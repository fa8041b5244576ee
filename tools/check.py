"""Every check, in order, with what each took: what `make test` and continuous integration run.

    python tools/check.py            # all
    python tools/check.py clean      # only the steps whose name contains a word
"""
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import ROOT, all_notebooks, problems


def contents(folder):
    "Every file under `folder` and what is in it, without caches. Not from git: it does not say what new files hold."
    return {p.relative_to(ROOT): p.read_bytes() for p in sorted((ROOT / folder).rglob("*"))
            if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}


def unchanged_by(command, folder, advice):
    "Run `command`; it fails if that changes, adds or removes anything under `folder`."
    before = contents(folder)
    if subprocess.run(command, cwd=ROOT).returncode: return False
    after = contents(folder)
    changed = [p for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)]
    if changed: print(*changed[:30], advice, sep="\n")
    return not changed


def exported():
    advice = "The package does not match the notebooks: run make export and commit."
    return unchanged_by(["nbdev_export"], "llm_workbench", advice)


def clean(): return unchanged_by(["nbdev_clean"], "nbs", "Notebooks are not clean: run make export and commit.")


def hygiene():
    found = [(p, problem) for p in all_notebooks() for problem in problems(p)]
    for path, problem in found: print(f"{path.relative_to(ROOT)}: {problem}")
    return not found


# Two processes at a time, and the cores shared among their threads. Where a chapter starts more of them than there are
# cores, waiting must not be spinning: that is many times slower.
WORKERS = min(2, os.cpu_count())
SHARED = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // WORKERS)), "OMP_WAIT_POLICY": "PASSIVE",
          "GOMP_SPINCOUNT": "0"}


def notebooks():
    command = [sys.executable, str(ROOT / "tools" / "test_notebooks.py"), str(WORKERS), *map(str, all_notebooks())]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **SHARED}).returncode == 0


def pytest():
    command = [sys.executable, "-m", "pytest", "-q", "--durations=15", "tests"]
    command += ["-n", str(WORKERS), "--dist", "loadfile", "--max-worker-restart", "0"]   # a file stays together
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **SHARED}).returncode == 0


STEPS = dict(exported=exported, clean=clean, hygiene=hygiene, notebooks=notebooks, pytest=pytest)


def main(words):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    took, failed = {}, []
    for name, step in STEPS.items():
        if words and not any(w in name for w in words): continue
        print(f"\n== {name}", flush=True)
        start = time.time()
        if not step(): failed.append(name)
        took[name] = time.time() - start
    print()
    for name, seconds in took.items(): print(f"{name:10} {seconds:6.0f} s  {'FAILED' if name in failed else 'ok'}")
    print(f"{'all':10} {sum(took.values()):6.0f} s")
    sys.exit(f"Failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
