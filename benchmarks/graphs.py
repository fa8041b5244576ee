"""What does recording a decode step bring? One token at a time on a GPU, from Python and from a CUDA graph.

    python -m benchmarks.graphs                       # three shapes, bf16, random weights
    python -m benchmarks.graphs --shapes SmolLM2-135M --batches 1

A step is the whole decoder and the choice of the next token (greedy). `eager` calls it from Python over a cache that
grows; `graph` records it once over a cache of fixed shape and plays it back. Both start behind the same prompt, in one
process, in turns; speed is tokens per second of all rows together, beside what the memory allows: the weights and the
filled part of the cache, read once in every step.
"""
import argparse
import statistics
import sys
import time

import torch

from benchmarks.record import record
from llm_workbench.architecture.decoder import Decoder
from llm_workbench.architecture.layers import ModelConfig
from llm_workbench.architecture.ops import TORCH
from llm_workbench.hardware.machine import read_bandwidth

SHAPES = {  # sizes of released configurations: V, C, F, layers, H, K, D, tied
    "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3, 64, True),
    "Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, 64, True),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8, 128, False),
}


def random_decoder(shape):
    "A decoder of this shape in bf16 with small random weights, made on the GPU."
    V, C, F, layers, H, K, D, tied = SHAPES[shape]
    config = ModelConfig(V, C, F, layers, H, K, D, max_position_embeddings=8192, tie_word_embeddings=tied)
    with torch.device("cuda"): decoder = Decoder(config, TORCH)
    return decoder.to(torch.bfloat16).eval().requires_grad_(False)


class Eager:
    "A step called from Python; the cache grows."
    def __init__(self, decoder, prompt, slots):
        self.decoder, self.cache = decoder, decoder.new_cache(capacity=slots)
        self.token = decoder(prompt, self.cache)[:, -1:].argmax(-1)

    def steps(self, n):
        for _ in range(n): self.token = self.decoder(self.token, self.cache).argmax(-1)


class Graph:
    "The same step recorded once; the cache has fixed slots."
    def __init__(self, decoder, prompt, slots):
        self.cache = decoder.new_cache("static", batch=len(prompt), slots=slots)
        self.token = decoder(prompt, self.cache)[:, -1:].argmax(-1)
        self.played, prompt_tokens = 0, prompt.shape[1]
        for _ in range(3):
            self.token.copy_(decoder(self.token, self.cache).argmax(-1))     # warm-up: libraries are loaded
        torch.cuda.synchronize()
        self.cache.truncate(prompt_tokens)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph): self.token.copy_(decoder(self.token, self.cache).argmax(-1))

    def steps(self, n):
        for _ in range(n): self.graph.replay()


def timed(peer, n):
    "Seconds of one step, on average over n."
    torch.cuda.synchronize()
    start = time.perf_counter()
    peer.steps(n)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


@torch.inference_mode()
def measure(shape, batch, args):
    "Tokens per second of both ways in every round, and the bytes that a step has to read."
    decoder = random_decoder(shape)
    prompt = torch.randint(0, decoder.config.vocab_size, (batch, args.prompt), device="cuda")
    peers = {"eager": Eager(decoder, prompt, args.slots), "graph": Graph(decoder, prompt, args.slots)}
    for peer in peers.values():
        peer.steps(args.new)                              # lengths are met for the first time here
    speeds = {name: [] for name in peers}
    for _ in range(args.rounds):
        for name, peer in peers.items():
            peer.cache.truncate(args.prompt)
            speeds[name].append(batch / timed(peer, args.new))
    c, held = decoder.config, args.prompt + args.new / 2
    # rows are looked up
    weights = sum(p.nbytes for p in decoder.parameters()) - (
        0 if c.tie_word_embeddings else decoder.embed_tokens.dense().nbytes
    )
    cache = batch * held * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
    return speeds, weights + cache


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("torch sees no NVIDIA GPU: a CUDA graph needs one")
    bandwidth = [read_bandwidth(4 * 2**30, device="cuda") / 1e9 for _ in range(args.rounds)]
    samples, ratios, shares = {"read bandwidth": bandwidth}, {}, {}
    for shape in args.shapes:
        for batch in args.batches:
            speeds, nbytes = measure(shape, batch, args)
            label = f"{shape}, batch {batch}"
            samples |= {f"{name}, {label}": values for name, values in speeds.items()}
            middle = {name: statistics.median(values) for name, values in speeds.items()}
            ratios[label] = statistics.median(g / e for g, e in zip(speeds["graph"], speeds["eager"]))
            shares |= {
                f"{name}, {label}": m / batch * nbytes / (statistics.median(bandwidth) * 1e9)
                for name, m in middle.items()
            }
            print(
                f"{label:24} eager {middle['eager']:8.0f} tok/s   graph {middle['graph']:8.0f} tok/s   "
                f"{ratios[label]:.2f}x   "
                f"share of read bandwidth {shares[f'eager, {label}']:.2f} -> {shares[f'graph, {label}']:.2f}",
                flush=True,
            )
            torch.cuda.empty_cache()
    units = {what: "GB/s" if what == "read bandwidth" else "tokens/s" for what in samples}
    out = record(
        "graphs",
        samples,
        units,
        ratios=ratios,
        shares=shares,
        settings={k: getattr(args, k) for k in ("prompt", "new", "slots", "rounds")},
    )
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
