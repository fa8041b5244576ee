"""Which details of OpenAI's protocol do servers get right? The checks of serving.production_engines on real ones.

    python tools/peers.py xllamacpp vllm         # once: a llama-server and a vLLM for this CPU
    python -m benchmarks.conformance             # both, on the embedded model
    python -m benchmarks.conformance --only vLLM
    python -m benchmarks.conformance --add ours http://127.0.0.1:8000 --key SECRET     # whatever else answers

vLLM is started by the command that `launch` generates, in bf16; llama-server by xllamacpp, which is llama.cpp's server
in a Python package, on the embedded GGUF. Results of servers that are not asked again are kept.
"""
import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.record import record, recorded
from llm_workbench.embedded import embedded_model
from llm_workbench.serving.production_engines import CHECKS, Deployment, conformance, launch, wrong_words

HOME = Path(__file__).parents[1] / ".venv-peers"
KEY, PATIENCE = "a-key-for-this-run", 1500
DEPLOYMENT = Deployment("smollm2", context=4096, concurrent=8, dtype="bfloat16", port=8123, key="SERVE_KEY",
                        weight_bytes=0.3e9, tools="hermes")
XLLAMACPP = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.api_keys, params.model_alias = 4096 * 4, 4, [sys.argv[3]], {"smollm2"}
params.cpuparams.n_threads = 2
params.use_jinja = True
server = xllamacpp.Server(params)
print("xllamacpp", xllamacpp.__version__, flush=True)
sys.stdin.read()
"""


def vllm():
    "The command, its environment, and where it runs."
    python = HOME / "vllm" / "bin" / "python"
    d = replace(DEPLOYMENT, model=str(HOME / "models" / "transformers"))
    started = launch(d, "vLLM")
    assert not wrong_words("vLLM", started.words), wrong_words("vLLM", started.words)
    words = [str(python.with_name(started.words[0])), *started.words[1:]]
    own = dict(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
               VLLM_API_KEY=KEY)
    return words, own, d


def llama_server():
    python = HOME / "xllamacpp" / "bin" / "python"
    return [str(python), "-P", "-c", XLLAMACPP, str(embedded_model()), str(DEPLOYMENT.port), KEY], {}, DEPLOYMENT


SERVERS = {"vLLM": vllm, "llama-server": llama_server}


def last_words(log):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it said nothing"])[-1].strip()[-300:]


@contextmanager
def running(name, log):
    "Start a server, wait until it answers, and end it. Gives its address. Raises RuntimeError with its last words."
    words, own, d = SERVERS[name]()
    if not Path(words[0]).exists(): raise RuntimeError("its environment is not there: python tools/peers.py")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | own
    with log.open("w") as file:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment)
    url, end = f"http://127.0.0.1:{d.port}", time.monotonic() + PATIENCE
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"it ended with status {process.returncode}: {last_words(log)}")
            if time.monotonic() > end: raise RuntimeError(f"it was not ready in {PATIENCE} s: {last_words(log)}")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                    if response.status == 200: break
            except (urllib.error.URLError, OSError): time.sleep(1)
        yield url
    finally:
        process.stdin.close()
        process.terminate()
        try: process.wait(30)
        except subprocess.TimeoutExpired: process.kill()


def version_of(name):
    python, package = {"vLLM": (HOME / "vllm/bin/python", "vllm-cpu"),
                       "llama-server": (HOME / "xllamacpp/bin/python", "xllamacpp")}.get(name, (None, ""))
    if not python: return f"llm_workbench {version('llm_workbench')}"
    code = f"from importlib.metadata import version; print('{package}', version('{package}'))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=SERVERS)
    parser.add_argument("--add", nargs=2, metavar=("NAME", "URL"), help="a server that is running")
    parser.add_argument("--key")
    parser.add_argument("--checks", nargs="+", default=[], help="only these; what the others said is kept")
    parser.add_argument("--log", type=Path, default=HOME / "conformance.log")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))          # so that the server is ended, too
    try: before = recorded("conformance")
    except OSError: before = {}
    rows, versions, reasons = before.get("rows", {}), before.get("versions", {}), before.get("not_measured", {})
    start = before.get("samples", {})
    if args.add:
        rows[args.add[0]] = [asdict(r) for r in conformance(args.add[1], args.key)]
        versions[args.add[0]] = version_of(args.add[0])
    for name in [] if args.add else args.only or SERVERS:
        begun = time.monotonic()
        try:
            with running(name, args.log) as url:
                ready = time.monotonic() - begun
                asked = [c for c in CHECKS if not args.checks or c[0] in args.checks]
                new = {r.check: asdict(r) for r in conformance(url, KEY, timeout=300, checks=asked)}
            old = {r["check"]: r for r in rows.get(name, [])}
            rows[name] = [(old | new)[c[0]] for c in CHECKS if c[0] in old | new]
            start[f"seconds until {name} was ready"], versions[name] = [ready], version_of(name)
            reasons.pop(name, None)
        except RuntimeError as e:
            reasons[name] = str(e)
            print(f"{name}: {e}")
    for name, found in rows.items():
        passed = [r for r in found if r["passed"]]
        start[f"passed by {name}"] = [len(passed)]
        print(f"{name}: {len(passed)} of {len(found)}")
        for r in found:
            if not r["passed"]: print(f"  {r['check']:22} {r['asked']:28} {r['came'][:120]}")
    if start: print(record("conformance", start, "checks, seconds", rows=rows, versions=versions, not_measured=reasons))


if __name__ == "__main__": main()
