"""A training step on a GPU: the shape of Llama 3.2 1B with LoRA, of Llama 3.1 8B with QLoRA, beside TRL's trainer.

    python -m benchmarks.training                        # both shapes, every peer that is installed
    python -m benchmarks.training --only "1B, LoRA"
    python -m benchmarks.training --dry                  # a tiny shape and three steps, on a CPU too; nothing is kept

Weights are random, the same for all from one seed, so the first losses have to agree. Ours is the loop of the chapters
with the Triton kernels: flash attention, and the loss that never has all logits. A peer is TRL's SFTTrainer over peft
(8B: over bitsandbytes' NF4); where TRL is absent, transformers and peft in a plain loop; what is absent is said. Blocks
are computed again in the backward pass by all. Every run is a process of its own; memory is what torch had allocated
at the most while it trained.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

import torch

from benchmarks.record import record

SHAPES = {"1B, LoRA": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                           num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
          "8B, QLoRA": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                            num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False)}
TINY = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, vocab_size=999)
RANK, RATE, TEXTS, TOKENS, GOALS = 16, 2e-4, 4, 2048, {"tokens/s": 1.3, "peak, GB": 0.7}
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
WANTS = {"ours": (), "TRL": ("trl", "peft"), "transformers": ("peft",)}


def absent(who, shape, device):
    "What keeps a peer from running here; empty: nothing."
    wants = (*WANTS[who], *(("bitsandbytes",) if who != "ours" and "QLoRA" in shape else ()))
    return " and ".join(name for name in wants if not find_spec(name))


def device_of(args): return "cuda" if torch.cuda.is_available() and not args.dry else "cpu"


def configuration(args):
    from transformers import LlamaConfig
    shape = SHAPES[args.shape] | (TINY if args.dry else {})
    return LlamaConfig(**shape, rope_theta=5e5, max_position_embeddings=131072, pad_token_id=None)


def texts(args, step):
    g = torch.Generator().manual_seed(step)
    return torch.randint(0, configuration(args).vocab_size, (args.texts, args.tokens), generator=g)


def model_of(args):
    "Random weights in bfloat16 (float32 on a CPU), the same for everybody."
    from transformers import LlamaForCausalLM
    device = device_of(args)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device): return LlamaForCausalLM(configuration(args))
    finally: torch.set_default_dtype(torch.float32)


def peak(start, device):
    if device == "cpu": return 0
    torch.cuda.synchronize()
    if start: torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def ours(args):
    from llm_workbench import Decoder
    from llm_workbench.architecture.ops import TORCH
    from llm_workbench.finetuning.data import IGNORE, Example, padded
    from llm_workbench.finetuning.lora import LoRAConfig, adapt
    from llm_workbench.finetuning.qlora import qlora
    from llm_workbench.finetuning.sft import Training, recomputed, token_loss, train
    device, ops, loss = device_of(args), TORCH, token_loss
    if device == "cuda":
        from llm_workbench.kernels.linear_cross_entropy import linear_cross_entropy
        from llm_workbench.kernels.triton_ops import TRITON as ops

        def loss(decoder, rows):
            labels = rows.labels[:, 1:]
            learned = labels != IGNORE
            hidden, targets = rows.hidden(decoder)[:, :-1][learned], labels[learned]
            weight = decoder.lm_head.dense(hidden.dtype)
            return linear_cross_entropy(hidden, weight, targets, reduction="sum"), len(targets)
    decoder = Decoder.from_transformers(model_of(args), ops).with_ops(blocks=recomputed)
    learner = (qlora if "QLoRA" in args.shape else adapt)(decoder, LoRAConfig(RANK, 2 * RANK))
    del decoder
    rows = [padded([Example(ids, ids) for ids in texts(args, step).tolist()], device) for step in range(args.steps)]
    log, settings = [], Training(args.steps, lr=RATE, warmup=0, schedule="constant")
    peak(True, device)
    train(learner, rows.__getitem__, settings, loss, log=lambda _, m: log.append(m))
    return dict(loss=[m["loss"] for m in log], ends=[m["seconds"] for m in log], peak=peak(False, device))


def packed_by_bitsandbytes(model):
    "The blocks' matrices in NF4 with double quantization, as `load_in_4bit` makes them."
    import bitsandbytes as bnb
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, old in list(part.named_children()):
                if not isinstance(old, torch.nn.Linear): continue
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, False, compute_dtype=old.weight.dtype,
                                        quant_type="nf4", compress_statistics=True)
                new.weight = bnb.nn.Params4bit(old.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                                               compress_statistics=True)
                setattr(part, name, new.to(old.weight.device))
    return model


def peer_model(args):
    from peft import LoraConfig
    model = model_of(args).requires_grad_(False)
    if "QLoRA" in args.shape: model = packed_by_bitsandbytes(model)
    return model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")


def transformers(args):
    from peft import get_peft_model
    device, (model, lora) = device_of(args), peer_model(args)
    model = get_peft_model(model, lora)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.config.use_cache = False
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, ends = torch.optim.AdamW(learns, lr=RATE, weight_decay=0.0, fused=True), [], []
    peak(True, device)
    start = time.perf_counter()
    for step in range(args.steps):
        ids = texts(args, step).to(device)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        losses.append(loss.item())
        ends.append(time.perf_counter() - start)
    return dict(loss=losses, ends=ends, peak=peak(False, device))


def TRL(args):
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer
    device, (model, lora), ends = device_of(args), peer_model(args), []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            peak(True, device)
            self.start = time.perf_counter()
        def on_step_end(self, *_, **__):
            if device == "cuda": torch.cuda.synchronize()
            ends.append(time.perf_counter() - self.start)
    ids = [row for step in range(args.steps) for row in texts(args, step).tolist()]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a",
                                    pad_token="a")
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(folder, max_steps=args.steps, per_device_train_batch_size=args.texts, max_length=None,
                           learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, use_cpu=device == "cpu",
                           bf16=device == "cuda", gradient_checkpointing=True, train_sampling_strategy="sequential",
                           logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list([dict(input_ids=r, labels=r) for r in ids]),
                             peft_config=lora, callbacks=[Clock()], processing_class=words)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return dict(loss=losses, ends=ends, peak=peak(False, device))


def run(shape, who, args):
    "One run in a process of its own; None and a word where it fails."
    command = [sys.executable, "-m", "benchmarks.training", "--shape", shape, "--who", who, "--steps", str(args.steps),
               "--texts", str(args.texts), "--tokens", str(args.tokens), *["--dry"] * args.dry]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode: return json.loads(done.stdout.splitlines()[-1])
    print(f"{shape}, {who}: failed\n{done.stderr[-2000:]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text")
    parser.add_argument("--only", nargs="*", default=list(SHAPES))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--who", choices=WANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry: args.steps, args.texts, args.tokens = 3, 2, 32
    if args.who: return print("\n" + json.dumps(globals()[args.who](args)))
    if not args.dry and not torch.cuda.is_available():
        sys.exit("torch sees no NVIDIA GPU: benchmarks.finetuning measures the same on a CPU, and --dry tries this one")
    samples, rows, ratios, without = {}, {}, {}, {}
    for shape in args.only:
        for who in WANTS:
            if who == "transformers" and f"{shape}, TRL" in rows: continue      # stands in for TRL
            if lacks := absent(who, shape, args): without[f"{shape}, {who}"] = f"{lacks} not installed"
            elif found := run(shape, who, args):
                each = [args.texts * args.tokens / (b - a) for a, b in zip(found["ends"][1:], found["ends"][2:])]
                samples[f"{shape}, {who}, tokens/s"] = each                     # without two steps of warming up
                rows[f"{shape}, {who}"] = {"tokens/s": statistics.median(each), "peak, GB": found["peak"] / 1e9,
                                           "loss": found["loss"]}
            else: without[f"{shape}, {who}"] = "failed"
            print(f"{shape}, {who}:", rows.get(f"{shape}, {who}") or without[f"{shape}, {who}"], flush=True)
        mine, other = (next((rows[k] for k in (f"{shape}, {who}" for who in whos) if k in rows), None)
                       for whos in (("ours",), ("TRL", "transformers")))
        if not mine or not other: continue
        ratios[shape] = {key: mine[key] / other[key] for key in GOALS if other[key]}
        ratios[shape]["first losses apart"] = abs(mine["loss"][0] / other["loss"][0] - 1)
        print(f"{shape}: ours over the other's", ratios[shape], "goals", GOALS, flush=True)
    if args.dry: return sys.exit(1 if any(why == "failed" for why in without.values()) else 0)
    out = record("training", samples, "tokens/s", rows=rows, ratios=ratios, goals=GOALS, absent=without,
                 settings=dict(steps=args.steps, texts=args.texts, tokens=args.tokens, rank=RANK))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
