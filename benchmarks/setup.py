"""How long does a newcomer wait? From an empty folder to the first answer of a model, with `make lab`.

    python -m benchmarks.setup

Clones the last commit and runs `make lab` as a reader does, with an empty pip cache. Seconds from the start until
JupyterLab answers, until the tour's first cell has answered in a kernel of that server, until llama.cpp (compiled
meanwhile) works; then the seconds until JupyterLab answers when everything is there. The network is part of it.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.record import record

ROOT = Path(__file__).parents[1]
README, MARKS = ROOT / "README.md", re.compile(r"(<!-- setup -->\n).*?(<!-- /setup -->)", re.S)
TOKEN = "newcomer"
SERVER = f"--no-browser --ip=127.0.0.1 --ServerApp.port_retries=0 --IdentityProvider.token={TOKEN}"
OWN_FOLDERS = ("PIP_CACHE_DIR", "XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR",
               "JUPYTER_RUNTIME_DIR")
STRANGE = ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "MAKEFLAGS", "MAKELEVEL")
LIMIT = 1800   # seconds


def newcomer(base: Path) -> dict:
    "The environment variables of somebody who has just logged in: nothing of this checkout, no caches."
    own = Path(sys.executable).parent
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != own]
    kept = {name: value for name, value in os.environ.items() if name not in STRANGE}
    return kept | {name: str(base / name.lower()) for name in OWN_FOLDERS} | dict(PATH=os.pathsep.join(path))


def near_packages() -> bool:
    "Does pip take packages from this machine, too, and not only from the network?"
    settings = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    return any(word in settings for word in ("file:/", "find-links"))


class Lab:
    "`make lab` in `checkout`; stopped at the end of the with block."
    def __init__(self, checkout: Path, environment: dict):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.runtime = Path(environment["JUPYTER_RUNTIME_DIR"])
        command = ["make", "lab", f"LAB_ARGS={SERVER} --port={self.port}"]
        self.process = subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True)

    def __enter__(self): return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)

    def ask(self, what: str, method: str = "GET"):
        address, who = f"http://127.0.0.1:{self.port}/api/{what}", dict(Authorization=f"token {TOKEN}")
        request = urllib.request.Request(address, method=method, headers=who)
        return json.loads(urllib.request.urlopen(request, timeout=10).read() or "null")

    def answers(self):
        "Wait until the server does."
        deadline = time.time() + LIMIT
        while True:
            try: return self.ask("status")
            except OSError:
                alive = self.process.poll() is None and time.time() < deadline
                if not alive: sys.exit("make lab ended without a server")
                time.sleep(0.1)

    def run(self, code: str) -> str:
        "What `code` prints in a new kernel of the server."
        from jupyter_client import BlockingKernelClient
        kernel, said = self.ask("kernels", "POST")["id"], []
        client = BlockingKernelClient(connection_file=str(self.runtime / f"kernel-{kernel}.json"))
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=LIMIT)
        hear = lambda message: said.append(message["content"].get("text", ""))
        reply = client.execute_interactive(code, timeout=LIMIT, output_hook=hear)
        client.stop_channels()
        if reply["content"]["status"] != "ok": sys.exit(f"the cell failed: {reply['content']}")
        return "".join(said)


def first_cell(checkout: Path) -> str:
    cells = json.loads((checkout / "nbs" / "00_start_here.ipynb").read_text(encoding="utf-8"))["cells"]
    return next("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def sentence(result: dict) -> str:
    "The README's words for a result."
    seconds, machine = result["medians"], result["machine"]
    near = ", most packages from a mirror nearby: a slow network adds to it" if result["near_packages"] else ""
    on = f"{machine['cpu']}, {machine['cores']} cores{near}"
    return (f"Measured with `python -m benchmarks.setup` on {result['date'][:10]} from an empty folder ({on}):\n"
            f"JupyterLab answers after {seconds['JupyterLab answers']:.0f} seconds, "
            f"the model in the tour's first cell after {seconds['the first cell has answered']:.0f},\n"
            f"llama.cpp is there after {seconds['llama.cpp works'] / 60:.1f} minutes; "
            f"from then on `make lab` takes {seconds['JupyterLab answers again']:.0f} seconds.\n")


def main():
    with tempfile.TemporaryDirectory() as folder:
        base, start, samples = Path(folder), time.time(), {}
        checkout, environment = base / "llm_workbench", newcomer(base)

        def passed(what):
            samples[what] = [round(time.time() - start, 1)]
            print(f"== {samples[what][0]:6.1f} s: {what}", flush=True)
        subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
        with Lab(checkout, environment) as lab:
            lab.answers()
            passed("JupyterLab answers")
            said = lab.run(first_cell(checkout))
            passed("the first cell has answered")
            print("  ", said.strip())
            python = checkout / ".venv" / "bin" / "python"
            subprocess.run([python, "tools/install.py", "wait"], cwd=checkout, env=environment, check=True)
            passed("llama.cpp works")
        start = time.time()
        with Lab(checkout, environment) as lab:
            lab.answers()
            passed("JupyterLab answers again")
    path = record("setup", samples, "s", first_answer=said.strip(), pip_cache="empty", near_packages=near_packages())
    said = sentence(json.loads(path.read_text(encoding="utf-8")))
    readme = README.read_text(encoding="utf-8")
    README.write_text(MARKS.sub(lambda m: m[1] + said + m[2], readme), encoding="utf-8")
    print(said)


if __name__ == "__main__":
    main()
