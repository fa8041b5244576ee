"""One training, started in every way there is: the script that the chapter on scale-out launches.

    python -m benchmarks.distributed --out FOLDER                                                   # one process
    torchrun --standalone --nproc-per-node 2 -m benchmarks.distributed --runs ddp:full fsdp:lora --out FOLDER
    accelerate launch --multi_gpu --num_processes 2 -m benchmarks.distributed --runs accelerate:full --out FOLDER

A toy learns to put digits in order, all of it or an adapter. Rank 0 writes what learned, FOLDER/WAY_METHOD.safetensors,
and FOLDER/told.json: seconds of each, and how many bytes of parameters each rank holds.
"""
import argparse
import json
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from llm_workbench.architecture.decoder import Decoder
from llm_workbench.architecture.layers import ModelConfig
from llm_workbench.architecture.ops import TORCH
from llm_workbench.files.safetensors import save_safetensors
from llm_workbench.finetuning.data import IGNORE, Example, batch_at, padded
from llm_workbench.finetuning.lora import LoRAConfig, adapt, trainable
from llm_workbench.finetuning.scale_out import LossOf, Ranks, WAYS, gathered, group, local_bytes, train
from llm_workbench.finetuning.sft import Training, adamw, summed_loss, token_loss

SEP, END = 10, 11
PARTS, SIZE = 4, 4                    # parts of a step, texts of a part
SETTINGS = dict(steps=8, lr=3e-3, warmup=0.1, weight_decay=0.1, clip=0.5)


def sorting(n, seed=0):
    "Digits, and the same digits in order, which is what is learned."
    g = torch.Generator().manual_seed(seed)
    lists = [torch.randint(10, (k,), generator=g).tolist() for k in torch.randint(2, 10, (n,), generator=g).tolist()]
    return [Example(d + [SEP] + sorted(d) + [END], [IGNORE] * (len(d) + 1) + sorted(d) + [END]) for d in lists]


LESSONS = sorting(400)


def rows_of(step):
    "The parts of a step, long texts with long ones: their learned tokens differ as much as they can."
    texts = sorted(batch_at(LESSONS, PARTS * SIZE, 0, step), key=len)
    return [padded(texts[i:i + SIZE]) for i in range(0, len(texts), SIZE)]


def learner(method="full", dtype=torch.float64):
    "A toy of which all learns, or an adapter with dropout."
    torch.manual_seed(0)
    sizes = dict(vocab_size=12, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    toy = Decoder(ModelConfig(**sizes, num_key_value_heads=2, head_dim=12, max_position_embeddings=32), TORCH)
    if method == "full": return toy.to(dtype).requires_grad_(True)
    return adapt(toy.to(dtype), LoRAConfig(r=4, dropout=0.1)).to(dtype)


def by_accelerate(decoder, settings, ranks):
    "The same training with Hugging Face's Accelerator, which averages over ranks: hence the factor."
    from accelerate import Accelerator
    accelerator, params = Accelerator(cpu=True), list(trainable(decoder).values())
    model, optimizer = accelerator.prepare(LossOf(decoder, token_loss), adamw(params, settings))
    model.train()
    for step in range(settings.steps):
        parts = rows_of(step)
        mine, n = parts[ranks.rank::ranks.size], sum(part.n_learned for part in parts)
        for part in mine:
            with nullcontext() if part is mine[-1] else accelerator.no_sync(model):
                accelerator.backward(model(part)[0] * ranks.size / n)
        accelerator.clip_grad_norm_(params, settings.clip)
        for g in optimizer.param_groups: g["lr"] = settings.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()


def by_zero1(decoder, settings, ranks):
    "torch's own ZeRO-1: each rank keeps the averages of some parameters, steps them, and sends them to the others."
    from torch.distributed.optim import ZeroRedundancyOptimizer
    params = list(trainable(decoder).values())
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in adamw(params, settings).param_groups]
    model = nn.parallel.DistributedDataParallel(LossOf(decoder, token_loss))
    optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=settings.lr)
    model.train()
    for step in range(settings.steps):
        parts = rows_of(step)
        mine, n = parts[ranks.rank::ranks.size], sum(part.n_learned for part in parts)
        for part in mine:
            with nullcontext() if part is mine[-1] else model.no_sync(): (model(part)[0] * ranks.size / n).backward()
        nn.utils.clip_grad_norm_(params, settings.clip)
        for g in optimizer.param_groups: g["lr"] = settings.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()


def at_once(decoder, part):
    "`token_loss` with all scores at once: ZeRO-3 takes the head's weights away as soon as its forward is done."
    learned = part.labels[:, 1:] != IGNORE
    hidden, targets = part.hidden(decoder)[:, :-1][learned], part.labels[:, 1:][learned]
    return summed_loss(decoder.logits(hidden), targets), len(targets)


def by_deepspeed(decoder, settings, ranks, stage):
    "The same training with a DeepSpeed engine, which averages over parts and ranks: hence the factor."
    import deepspeed
    deepspeed.ops.__compatible_ops__.clear()      # its C++ all-reduce is compiled when used, for minutes; gloo is there
    config = dict(train_batch_size=PARTS, train_micro_batch_size_per_gpu=1, zero_allow_untested_optimizer=True,
                  gradient_accumulation_steps=PARTS // ranks.size, gradient_clipping=settings.clip,
                  steps_per_print=10**9,
                  zero_optimization=dict(stage=stage, overlap_comm=False, reduce_bucket_size=10**6))
    params = [p for p in decoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adamw(params, settings).param_groups, lr=settings.lr)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=LossOf(decoder, at_once if stage == 3 else token_loss), optimizer=optimizer, model_parameters=params,
        config=config)
    engine.train()
    for step in range(settings.steps):
        parts = rows_of(step)
        n = sum(part.n_learned for part in parts)
        for g in optimizer.param_groups: g["lr"] = settings.lr_at(step)
        for part in parts[ranks.rank::ranks.size]:
            engine.backward(engine(part)[0] * PARTS / n)
            engine.step()
    if stage < 3: return None
    found = {}
    for name, p in trainable(decoder).items():
        with deepspeed.zero.GatheredParameters([p]): found[name] = p.detach().clone()
    return found


OTHERS = dict(accelerate=by_accelerate, zero1=by_zero1)
OTHERS |= {f"deepspeed{stage}": partial(by_deepspeed, stage=stage) for stage in (1, 2, 3)}


def run(way, method, settings, ranks, dtype=torch.float64, log=None):
    "One training; what learned, whole, and a line about it."
    decoder, start, found = learner(method, dtype), time.perf_counter(), None
    if way in OTHERS: found = OTHERS[way](decoder, settings, ranks)
    else: train(decoder, rows_of, settings, ranks, way, log=log)
    seconds, held = time.perf_counter() - start, [local_bytes(decoder.parameters())]
    if dist.is_initialized():
        held = [None] * ranks.size
        dist.all_gather_object(held, local_bytes(decoder.parameters()))
    return found or gathered(trainable(decoder)), dict(way=way, method=method, ranks=ranks.size, seconds=seconds,
                                                       parameter_bytes=held)


def dying(rank, step):
    "A log that ends the process `rank` in the middle of step `step`: what a machine does whose power fails."
    def log(now, metrics):
        if now == step: os._exit(7)
    return log if int(os.environ["RANK"]) == rank else None


def job(runs, out, ranks, dtype=torch.float64):     # runs: [(way, method), ...]
    "All trainings one after another; rank 0 writes."
    told, settings = [], Training(**SETTINGS)
    for way, method in runs:
        tensors, line = run(way, method, settings, ranks, dtype)
        told.append(line)
        if ranks.rank == 0: save_safetensors(tensors, Path(out) / f"{way}_{method}.safetensors")
    if ranks.rank == 0: (Path(out) / "told.json").write_text(json.dumps(told))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["hand:full"], metavar="WAY:METHOD",
                        choices=[f"{way}:{method}" for way in (*WAYS, *OTHERS) for method in ("full", "lora")])
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--dies", type=int, nargs=2, metavar=("RANK", "STEP"), help="then one more training by fsdp, "
                        "with checkpoints every 4 steps in FOLDER/run, in which one rank ends")
    parser.add_argument("--out", required=True, help="a folder that is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    alone = args.runs == ["hand:full"] and "RANK" not in os.environ
    with nullcontext(Ranks()) if alone else group() as ranks:
        runs = [tuple(r.split(":")) for r in args.runs]
        job(runs, args.out, ranks, getattr(torch, args.dtype))
        if args.dies:
            settings = Training(**SETTINGS, folder=Path(args.out) / "run", every=4)
            run("fsdp", "full", settings, ranks, log=dying(*args.dies))


if __name__ == "__main__":
    main()
