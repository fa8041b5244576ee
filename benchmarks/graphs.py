"""What do recording a decode step and fusing its kernels bring? One token at a time on a GPU.

    python -m benchmarks.graphs                       # three shapes, bf16, random weights
    python -m benchmarks.graphs --shapes SmolLM2-135M --batches 1
    python -m benchmarks.graphs --compile             # also torch.compile inside the graph: minutes

A step is the whole decoder and the choice of the next token (greedy). `eager` calls it from Python over a cache that
grows; `graph` records it once, with torch's ops, over a cache of fixed shape and plays it back; `ours` records the
kernels of this package (`TRITON`), `ours, early` lets each start when all programs of the one before it have begun to
work (programmatic dependent launch), `ours, int4_...` keeps the matrices in four bits.
All start behind the same prompt, in
one process, in turns; speed is tokens per second of all rows together, beside what the memory allows: the weights and
the filled part of the cache, read once in every step, at the rate at which `benchmarks.kernels` reads memory.

Prompts are read with torch's functions and with `TRITON`, beside the rate of a large product in the same run.
"""
import argparse
import statistics
import sys
import time

import torch

from benchmarks.gpu.reading import read_sum
from benchmarks.kernels import Timer
from benchmarks.record import record
from llm_workbench.architecture.decoder import Decoder
from llm_workbench.architecture.layers import ModelConfig
from llm_workbench.architecture.ops import TORCH
from llm_workbench.inference.generation import Batch, generate_tokens, next_logits
from llm_workbench.kernels.graphs import RecordedStep, recorded
from llm_workbench.kernels.triton_ops import TRITON
from llm_workbench.quantization.formats import quantize

SHAPES = {  # sizes of released configurations: V, C, F, layers, H, K, D, tied
    "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3, 64, True),
    "Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, 64, True),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8, 128, False),
}


def random_decoder(shape):
    "A decoder of this shape in bf16 with small random weights, made on the GPU."
    V, C, F, layers, H, K, D, tied = SHAPES[shape]
    config = ModelConfig(V, C, F, layers, H, K, D, max_position_embeddings=32768, tie_word_embeddings=tied)
    with torch.device("cuda"): decoder = Decoder(config, TORCH)
    return decoder.to(torch.bfloat16).eval().requires_grad_(False)


class Eager:
    "A step called from Python; the cache grows."
    def __init__(self, decoder, prompt, slots):
        self.decoder, self.cache = decoder, decoder.new_cache(capacity=slots)
        self.token = decoder(prompt, self.cache)[:, -1:].argmax(-1)

    def steps(self, n):
        for _ in range(n): self.token = self.decoder(self.token, self.cache).argmax(-1)

    def again(self, prompt_tokens): self.cache.truncate(prompt_tokens)


class Graph:
    "The same step recorded once; the cache has fixed slots."
    def __init__(self, decoder, prompt, slots, early=False):
        cache = decoder.new_cache(capacity=slots)
        first = decoder(prompt, cache)[:, -1:].argmax(-1)
        self.step = RecordedStep(decoder, len(prompt), slots, early=early)
        self.step.load(cache)
        self.step.tokens.copy_(first)

    def steps(self, n):
        for _ in range(n): self.step.run()

    def again(self, prompt_tokens): self.step.reset([prompt_tokens] * self.step.batch)


class Compiled(Graph):
    "The step of torch's ops through torch.compile, then recorded."
    def __init__(self, decoder, prompt, slots):
        decoder = decoder.with_ops(TORCH)
        for i, layer in enumerate(decoder.layers): decoder.layers[i] = torch.compile(layer, dynamic=False)
        super().__init__(decoder, prompt, slots)


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
    fast = decoder.with_ops(TRITON)
    make = {"eager": lambda: Eager(decoder, prompt, args.slots), "graph": lambda: Graph(decoder, prompt, args.slots),
            "ours": lambda: Graph(fast, prompt, args.slots),
            "ours, early": lambda: Graph(fast, prompt, args.slots, True)}
    packed = "int4_g32" if decoder.config.hidden_size % 128 else "int4_g128"
    if batch == 1: make[f"ours, {packed}"] = lambda: Graph(quantize(fast, packed), prompt, args.slots)
    if args.compile: make["graph, compiled"] = lambda: Compiled(decoder, prompt, args.slots)
    peers = {}
    for name, peer in make.items():
        try: peers[name] = peer()
        except Exception as e: print(f"    {name}: {type(e).__name__}: {str(e)[:300]}", flush=True)
    if "ours" in peers and (reason := peers["ours"].step.why_not_fused): print("    not fused:", reason)
    for peer in peers.values():
        # lengths are met for the first time here
        peer.steps(args.new if not isinstance(peer, Eager) else args.eager_new)
    speeds = {name: [] for name in peers}
    for _ in range(args.rounds):
        for name, peer in peers.items():
            peer.again(args.prompt)
            speeds[name].append(batch / timed(peer, args.new if not isinstance(peer, Eager) else args.eager_new))
    c, held = decoder.config, args.prompt + args.new / 2
    # rows are looked up
    weights = sum(p.nbytes for p in decoder.parameters()) - (
        0 if c.tie_word_embeddings else decoder.embed_tokens.dense().nbytes
    )
    cache = batch * held * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
    return speeds, weights + cache


@torch.inference_mode()
def read_prompts(shape, lengths, rounds):
    "Seconds of reading one prompt by each set of ops, and its FLOPs: products, and attention below the diagonal."
    decoder, samples, flops = random_decoder(shape), {}, {}
    c, products = decoder.config, sum(p.numel() for p in decoder.layers.parameters() if p.dim() == 2)
    for T in lengths:
        prompt = torch.randint(0, c.vocab_size, (1, T), device="cuda")
        pairs = c.num_hidden_layers * c.num_attention_heads * T * (T + 1) / 2
        flops[T] = 2 * T * products + 4 * pairs * c.head_dim + 2 * c.vocab_size * c.hidden_size
        runs = {name: decoder.with_ops(ops) for name, ops in dict(TORCH=TORCH, ours=TRITON).items()}
        samples[T] = {name: [] for name in runs}
        for turn in range(rounds + 1):                                       # the first one compiles
            for name, model in runs.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                next_logits(model, prompt, model.new_cache(capacity=T))
                torch.cuda.synchronize()
                if turn: samples[T][name].append(time.perf_counter() - start)
    return samples, flops


@torch.inference_mode()
def written(decoder, batch, prompts, n):
    "Tokens per second of generation as a user calls it: every token is read by the host. Without prompt and recording."
    rows = generate_tokens(decoder, prompts, batch=batch, max_new_tokens=n + 2)
    for _ in range(2): next(rows)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in rows: pass
    return len(prompts) * n / (time.perf_counter() - start)


def generation(shape, batch, args):
    "The ordinary loop against the recorded one."
    decoder = random_decoder(shape)
    prompts = torch.randint(0, decoder.config.vocab_size, (batch, args.prompt)).tolist()
    ways = {"generate, eager": (decoder, Batch, args.eager_new),
            "generate, ours": (decoder.with_ops(TRITON), recorded(Batch), args.new)}
    for decoder, kind, n in ways.values(): written(decoder, kind, prompts, n)
    return {name: [written(*way[:2], prompts, way[2]) for _ in range(3)] for name, way in ways.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--eager-new", type=int, default=16, help="tokens of the eager way: it is slow")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", nargs="*", type=int, default=[4096, 16384], help="lengths of prompts to read")
    parser.add_argument("--compile", action="store_true", help="torch.compile inside the graph as well")
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("torch sees no NVIDIA GPU: a CUDA graph needs one")
    torch.manual_seed(0)
    timer, big = Timer(), torch.ones(2**30, device="cuda", dtype=torch.bfloat16)
    bandwidth = [big.nbytes / s / 1e9 for s in timer(lambda: read_sum(big), 8)][3:]
    square = big[: 2**26].view(8192, 8192).clone()
    rate = [2 * 8192**3 / s / 1e12 for s in timer(lambda: square @ square, 8)][3:]
    del big, square
    samples, ratios, against, shares = {"read bandwidth": bandwidth, "matmul rate": rate}, {}, {}, {}
    units = {"read bandwidth": "GB/s", "matmul rate": "TFLOP/s"}

    def written_down():
        settings = {k: getattr(args, k) for k in ("prompt", "new", "eager_new", "slots", "rounds", "prefill")}
        return record("graphs", samples, {what: units.get(what, "tokens/s") for what in samples}, ratios=ratios,
                      times_the_graph=against, shares=shares, settings=settings)

    for shape in args.shapes:
        for batch in args.batches:
            start = time.time()
            speeds, nbytes = measure(shape, batch, args)
            if batch == 1:
                try: speeds |= generation(shape, batch, args)
                except Exception as e: print(f"    generation: {type(e).__name__}: {str(e)[:300]}", flush=True)
            label = f"{shape}, batch {batch}"
            samples |= {f"{name}, {label}": values for name, values in speeds.items()}
            middle = {name: statistics.median(values) for name, values in speeds.items()}
            if "graph" in middle: ratios[label] = middle["graph"] / middle["eager"]
            against |= {f"{name}, {label}": m / middle.get("graph", m) for name, m in middle.items() if "ours" in name}
            shares |= {
                f"{name}, {label}": m / batch * nbytes / (statistics.median(bandwidth) * 1e9)
                for name, m in middle.items() if "int4" not in name      # reads other bytes
            }
            print(f"{label} ({time.time() - start:.0f} s)", flush=True)
            for name, m in middle.items():
                share = f"{shares[of]:.3f} of read" if (of := f"{name}, {label}") in shares else ""
                print(f"    {name:16} {m:9.0f} tok/s  {batch / m * 1e6:8.1f} us a step  {share}", flush=True)
            torch.cuda.empty_cache()
            out = written_down()
        if not args.prefill: continue
        times, flops = read_prompts(shape, args.prefill, args.rounds)
        for T, by_ops in times.items():
            for name, seconds in by_ops.items():
                label = f"prefill of {T}, {name}, {shape}"
                samples[label] = [T / s for s in seconds]
                shares[label] = flops[T] / statistics.median(seconds) / (statistics.median(rate) * 1e12)
                print(f"    {label}: {statistics.median(samples[label]):.0f} tok/s, {shares[label]:.3f} of the matmul "
                      "rate", flush=True)
        torch.cuda.empty_cache()
        out = written_down()
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
