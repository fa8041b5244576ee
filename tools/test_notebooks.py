"""Run notebooks as nbdev_test does, each in a process of its own that is forked from one with the common imports: what
takes seconds is imported once, and no chapter sees what another left behind.

    python tools/test_notebooks.py WORKERS NOTEBOOK ...
"""
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import ROOT


def run(path, output):
    "In the child: run one notebook, with all that it prints in a file; ends the process as any Python program ends."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    for stream in (1, 2): os.dup2(output.fileno(), stream)
    good, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(0 if good else 1)


def main(workers, paths):
    import matplotlib.figure, nbdev.test, pandas, torch   # noqa: no threads are started yet, so forking is safe
    waiting, running, failed = list(paths), {}, False
    while waiting or running:
        while waiting and len(running) < workers:
            path, output = waiting.pop(0), tempfile.TemporaryFile()
            sys.stdout.flush()
            if not (pid := os.fork()): run(path, output)
            running[pid] = path, output, time.time()
        pid, status = os.wait()
        path, output, start = running.pop(pid)
        print(f"{time.time() - start:6.1f} s  {path.relative_to(ROOT)}{'  FAILED' if status else ''}", flush=True)
        output.seek(0)
        if status: print(output.read().decode(errors="replace"), flush=True)
        failed |= bool(status)
    return failed


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(int(sys.argv[1]), [Path(p).resolve() for p in sys.argv[2:]]))
