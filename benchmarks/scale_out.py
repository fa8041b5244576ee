"""Does one training end in the same parameters, whoever starts it and whoever shares the work?

    python tools/peers.py ray deepspeed        # two environments, 2.4 GB; without them their rows are left out
    python -m benchmarks.scale_out             # everything, about four minutes on two cores
    python -m benchmarks.scale_out --only ray  # one launcher again; the other rows stay
    python -m benchmarks.scale_out --only configs   # only what DeepSpeed reads in generated configurations

Eight steps of benchmarks/distributed.py: one process, and two by torchrun, accelerate, Ray Train and DeepSpeed. `apart`
is the largest difference of a parameter from one process, in units of the largest parameter of its tensor.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.distributed import SETTINGS, learner, rows_of
from benchmarks.record import record, recorded
from llm_workbench.files.safetensors import SafetensorsFile
from llm_workbench.finetuning import sft
from llm_workbench.finetuning.lora import trainable
from llm_workbench.finetuning.scale_out import Job, deepspeed_config, train

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-peers"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2",
              "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")
ALONE = ("-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes", "2",
         "--mixed_precision", "no", "--dynamo_backend", "no")
WORK = ("-m", "benchmarks.distributed")
INSIDE = "float64, its optimizer float32"      # DeepSpeed keeps a copy of the parameters in float32 and steps that
# launcher, way, method, dtype; what starts it, and the environment of tools/peers.py
RUNS = [
    ("python", "hand", "full", "float64", WORK, ""),
    *[("torchrun", way, "full", "float64", (*TORCHRUN, *WORK), "") for way in ("hand", "ddp", "zero1", "fsdp")],
    *[("torchrun", way, "lora", "float64", (*TORCHRUN, *WORK), "") for way in ("ddp", "fsdp")],
    *[("torchrun", way, "full", "float32", (*TORCHRUN, *WORK), "") for way in ("ddp", "fsdp")],
    ("accelerate launch --cpu", "hand", "full", "float64", (*ALONE, *WORK), ""),
    *[("accelerate launch --multi_gpu", way, "full", "float64", (*ACCELERATE, *WORK), "")
      for way in ("fsdp", "accelerate")],
    *[("Ray Train", way, "full", "float64", ("-m", "benchmarks.scale_out_peer", "ray"), "ray")
      for way in ("ddp", "fsdp")],
    *[("torchrun", f"deepspeed{stage}", "full", dtype, (*TORCHRUN, *WORK), "deepspeed")
      for stage, dtype in ((1, INSIDE), (2, INSIDE), (3, "float32"))],      # stage 3 takes no float64
]
NOTES = ["on two cores that other programs used as well, one thread a process: read `apart`, not the seconds",
         "accelerate launch --cpu --num_processes 2 starts ONE process (it leaves starting several to mpirun); "
         "--multi_gpu starts two, on a machine without GPUs as well",
         "DeepSpeed steps a copy of the parameters in float32, whatever the model is in"]


def python_of(environment): return str(HOME / environment / "bin" / "python") if environment else sys.executable


def call(command, environment=""):
    "Run a command of an environment; its output. Raises RuntimeError with the last lines."
    own = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo",
                            PYTHONNOUSERSITE="1", ACCELERATE_USE_CPU="true")
    own.pop("VIRTUAL_ENV", None)
    done = subprocess.run([python_of(environment), *command], cwd=ROOT, env=own, capture_output=True, text=True,
                          timeout=300)
    if done.returncode: raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-90:]))
    return done.stdout


@cache
def alone(method, dtype):
    "What learned in one process. With dropout, the number of a part decides what is drawn, as in `scale_out.train`."
    torch.set_num_threads(1)
    loop = sft.train if method == "full" else train
    return trainable(loop(learner(method, getattr(torch, dtype)), rows_of, sft.Training(**SETTINGS)))


def apart(path, want):
    file = SafetensorsFile(path)
    return max(((file[n].double() - p.double()).abs().max() / p.abs().max()).item() for n, p in want.items())


def measure(launcher, way, method, dtype, command, environment, want):
    "One row."
    with tempfile.TemporaryDirectory() as out:
        more = (way, out) if launcher == "Ray Train" else ("--runs", f"{way}:{method}", "--dtype", dtype.split(",")[0],
                                                           "--out", out)
        start = time.perf_counter()
        call((*command, *more), environment)
        seconds = time.perf_counter() - start
        told = json.loads((Path(out) / "told.json").read_text())[0]
        distance = apart(f"{out}/{way}_{method}.safetensors", want)
    return dict(launcher=launcher, way=way, method=method, dtype=dtype, ranks=told["ranks"], seconds=seconds,
                training=told["seconds"], apart=distance, held=told["parameter_bytes"])


def checked():
    "What DeepSpeed and transformers read in configurations that are generated, and in one that is wrong."
    jobs = [Job(batch=128, micro=2, nodes=n, stage=s, offload=o)
            for n in (1, 2) for s in (1, 2, 3) for o in (False, True) if s > 1 or not o]
    entries = [dict(ranks=job.ranks, config=deepspeed_config(job)) for job in jobs]
    wrong = dict(ranks=8, config=deepspeed_config(jobs[0]) | dict(train_batch_size=100))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([*entries, wrong], file)
        file.flush()
        out = call((*TORCHRUN[:-1], "1", "-m", "benchmarks.scale_out_peer", "check", file.name), "deepspeed")
    read = json.loads(out.strip().splitlines()[-1])["found"]
    for job, got in zip(jobs, read):
        want = dict(batch=job.batch, micro=job.micro, accumulation=job.accumulation, stage=job.stage, bf16=True,
                    clip=job.clip, offload_optimizer="cpu" if job.offload else "none",
                    offload_param="cpu" if job.offload and job.stage == 3 else "none")
        assert {k: got.get(k) for k in want} == want, (job, got)
    assert "refused" in read[-1], read[-1]
    return dict(accepted=len(jobs), refused=read[-1]["refused"])


def version(package, environment):
    found = next((HOME / environment).glob(f"lib/python3*/site-packages/{package}-*.dist-info"), None)
    return found.name.removesuffix(".dist-info").split("-")[1] if found else None


def keep(rows, configs=None):
    "Write these rows and those that were there before; the path."
    try: before = recorded("scale_out")
    except OSError: before = {}
    key = lambda r: (r["launcher"], r["way"], r["method"], r["dtype"])
    order = [r[:4] for r in RUNS]
    found = {key(r): r for r in (*before.get("rows", []), *rows) if key(r) in order}
    rows = sorted(found.values(), key=lambda r: order.index(key(r)))
    versions = dict(torch=torch.__version__, accelerate=metadata.version("accelerate"), ray=version("ray", "ray"),
                    deepspeed=version("deepspeed", "deepspeed"))
    return record("scale_out", {" ".join(key(r)): [r["seconds"]] for r in rows}, "seconds with starting the processes",
                  rows=rows, notes=NOTES, versions=versions, settings=SETTINGS,
                  deepspeed_configs=configs or before.get("deepspeed_configs"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(sorted({r[0] for r in RUNS}))
    parser.add_argument("--only", nargs="+", help=f"words of launchers or ways: {known}")
    args = parser.parse_args()
    chosen = [r for r in RUNS if not args.only or any(word in f"{r[0]} {r[1]} {r[2]} {r[3]}".lower()
                                                      for word in args.only)]
    failed = []
    for launcher, way, method, dtype, command, environment in chosen:
        if environment and not Path(python_of(environment)).exists():
            print(f"{launcher} {way}: left out, python tools/peers.py {environment} makes its environment")
            continue
        try: row = measure(launcher, way, method, dtype, command, environment, alone(method, dtype.split(",")[0]))
        except RuntimeError as e:
            failed.append(f"{launcher} {way}")
            print(f"{failed[-1]} failed:\n{e}", flush=True)
            continue
        keep([row])
        print({k: row[k] for k in ("launcher", "way", "method", "dtype", "seconds", "apart")}, flush=True)
    if (not args.only or "configs" in args.only) and Path(python_of("deepspeed")).exists(): keep([], checked())
    if failed: sys.exit(f"Without {', '.join(failed)}, whose last words are above.")


if __name__ == "__main__":
    main()
