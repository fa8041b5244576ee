"""How fast does a decoder run in each weight format, on the CPU, one token at a time?

    python -m benchmarks.formats                 # every format; about five minutes
    python -m benchmarks.formats --only q4_k nf4

A Llama-like decoder of 152 million random weights whose rows are whole blocks of every format (those of the embedded
model are not). Its matrices hold a few packed rows over and over: the time does not depend on the numbers. All layers
and the head are packed; the dense decoder in fp32 and bf16 is measured beside them, in turns. What the C kernels do not
read is unpacked for every token by plain torch.
"""
import argparse
import os
import statistics
import time
from functools import lru_cache

import torch

from benchmarks.record import record
from llm_workbench.architecture.decoder import Decoder
from llm_workbench.architecture.layers import ModelConfig
from llm_workbench.hardware.machine import read_bandwidth
from llm_workbench.kernels import fused_cpu, packed_cpu
from llm_workbench.quantization.formats import FORMATS, packed_by, packs, plan_of, shape_of
from llm_workbench.quantization.gguf_blocks import BlockFormat
from llm_workbench.quantization.i_quants import needs_importance
from llm_workbench.quantization.packing import Packed

SHAPE = dict(vocab_size=32768, hidden_size=768, intermediate_size=2048, num_hidden_layers=20, num_attention_heads=12,
             num_key_value_heads=4, head_dim=64, tie_word_embeddings=True)
ROWS, AFTER = 8, 64             # rows that are packed; tokens in the cache


def repeated(name, module, format):
    "A matrix in memory of its own: shared ones would stay in the processor's caches."
    one = rows_again(tuple(shape_of(module)), format)
    return Packed(format, one.shape, {n: t.clone() for n, t in one.tensors.items()})


@lru_cache(maxsize=8)
def rows_again(shape, format):
    "A matrix of this shape whose rows are a few packed ones, over and over."
    if not format.by_rows(shape): return format.pack(torch.randn(shape) * 0.02)
    needs = isinstance(format, BlockFormat) and needs_importance(format.block.name)
    few = format.pack(torch.randn(ROWS, shape[-1]) * 0.02, torch.ones(shape[-1]) if needs else None)
    return Packed(format, shape, {n: t.repeat(shape[0] // ROWS, *[1] * (t.ndim - 1)) for n, t in few.tensors.items()})


class Peer:
    "A decoder behind a prompt."
    def __init__(self, decoder):
        self.decoder, self.cache = decoder, decoder.new_cache()
        self.token = decoder(torch.arange(AFTER)[None], self.cache)[:, -1:].argmax(-1)
        self.speed(1)

    def speed(self, n):
        "Tokens per second of n steps behind the prompt."
        self.cache.truncate(AFTER)
        start = time.perf_counter()
        for _ in range(n): self.token = self.decoder(self.token, self.cache).argmax(-1)
        return n / (time.perf_counter() - start)


def measure(peers, rounds, seconds):
    "Tokens per second of each, in turns."
    counts = {name: max(1, int(peer.speed(1) * seconds)) for name, peer in peers.items()}
    samples = {name: [] for name in peers}
    for _ in range(rounds):
        for name, peer in peers.items(): samples[name].append(peer.speed(counts[name]))
    return samples


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FORMATS), choices=FORMATS, metavar="FORMAT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one sample, about")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    os.environ.setdefault("IN_TEST", "1")                              # no progress bars between the lines
    dense = Decoder(ModelConfig(**SHAPE), fused_cpu.CPU).eval().requires_grad_(False)
    always = {"fp32": Peer(dense), "bf16": Peer(Decoder(ModelConfig(**SHAPE), fused_cpu.CPU).bfloat16().eval())}
    bandwidth = [read_bandwidth() / 1e9 for _ in range(3)]
    samples, formats = {"read bandwidth": bandwidth}, {}
    for name in args.only:
        packed = packed_by(dense, plan_of(dense, name, packs), repeated)
        in_c = all(packed_cpu.plan(m.packed) is not None for m in packed.modules() if hasattr(m, "packed"))
        found = measure({**always, name: Peer(packed)}, args.rounds, args.seconds)
        ratio = statistics.median(a / b for a, b in zip(found[name], found["fp32"]))
        speed = statistics.median(found[name])
        formats[name] = dict(bits=FORMATS[name].bits((768, 768)), in_c=in_c, times_fp32=ratio,
                             share_of_bandwidth=speed * packed.nbytes / 1e9 / statistics.median(bandwidth))
        samples[name] = found[name]
        for kind in always: samples.setdefault(kind, []).extend(found[kind])
        print(f"{name:11} {formats[name]['bits']:6.3f} bits  {speed:7.1f} tokens/s  {ratio:5.2f} x fp32  "
              f"{formats[name]['share_of_bandwidth']:.2f} of read bandwidth{'' if in_c else '  (unpacked by torch)'}",
              flush=True)
        del packed
    units = {what: "GB/s" if what == "read bandwidth" else "tokens/s" for what in samples}
    out = record("formats", samples, units, formats=formats,
                 settings=dict(rounds=args.rounds, seconds=args.seconds, threads=args.threads, shape=SHAPE))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
