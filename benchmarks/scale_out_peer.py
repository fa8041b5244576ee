"""What benchmarks/scale_out.py asks of programs in environments of their own (tools/peers.py); JSON on the last line.

    python -m benchmarks.scale_out_peer ray WAY OUT                  # the training as a job of Ray Train, 2 workers
    torchrun --standalone -m benchmarks.scale_out_peer check FILE    # DeepSpeed configurations, read by DeepSpeed
"""
import json
import os
import sys
import tempfile
from pathlib import Path


def by_ray(way, out):
    "A TorchTrainer on a local cluster; Ray connects the workers, so `group` takes what is there."
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def work(config):
        import torch
        from benchmarks.distributed import job
        from llm_workbench.finetuning.scale_out import group
        torch.set_num_threads(1)
        with group() as ranks: job([(config["way"], "full")], config["out"], ranks)

    with tempfile.TemporaryDirectory() as storage:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        trainer = TorchTrainer(work, train_loop_config=dict(way=way, out=str(Path(out).resolve())),
                               scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
                               torch_config=TorchConfig(backend="gloo"), run_config=RunConfig(storage_path=storage))
        trainer.fit()
        ray.shutdown()
    return dict(ray=ray.__version__)


class ManyRanks:
    "Stands for a job of so many ranks, which is all that DeepSpeed's configuration asks of it."
    def __init__(self, ranks): self.ranks = ranks
    def get_data_parallel_world_size(self): return self.ranks


def check(path):
    "[{ranks, config}, ...] -> what DeepSpeed's own class made of each, and transformers' class for its Trainer."
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    deepspeed.ops.__compatible_ops__.clear()          # nothing is to be compiled
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    found = []
    for entry in json.loads(Path(path).read_text()):
        try: read = DeepSpeedConfig(json.loads(json.dumps(entry["config"])), mpu=ManyRanks(entry["ranks"]))
        except (AssertionError, ValueError) as e:
            found.append(dict(refused=" ".join(str(e).split())[:160]))
            continue
        zero, theirs = read.zero_config, HfTrainerDeepSpeedConfig(entry["config"])
        found.append(dict(batch=read.train_batch_size, micro=read.train_micro_batch_size_per_gpu,
                          accumulation=read.gradient_accumulation_steps, stage=int(zero.stage),
                          bf16=bool(read.bfloat16_config.enabled), clip=read.gradient_clipping,
                          offload_optimizer=str(getattr(zero.offload_optimizer, "device", "none")).split(".")[-1],
                          offload_param=str(getattr(zero.offload_param, "device", "none")).split(".")[-1],
                          transformers=dict(zero3=theirs.is_zero3(), offload=theirs.is_offload())))
    return dict(deepspeed=deepspeed.__version__, found=found)


def main():
    # Ray's workers are nice to others, and wait for ever on a busy machine; unused ones are not started ahead of time.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_worker_niceness="0",
                      RAY_prestart_worker_first_driver="0")
    what, *args = sys.argv[1:]
    print(json.dumps(dict(ray=by_ray, check=check)[what](*args)), flush=True)


if __name__ == "__main__":
    main()
