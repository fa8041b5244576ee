"""How fast is a prompt read, against the machine's rate of matrix products, what was there before, and other programs?

    python -m benchmarks.prefill                        # the embedded model, 512 tokens
    python -m benchmarks.prefill --prompt 512 2048      # and longer ones
    python -m benchmarks.prefill --openvino FOLDER      # also a model that openvino-genai reads
                                  --openvino-python P   # by the interpreter that has it

Every peer has a process of its own and reads the prompt when asked; they take turns in many short rounds. The rate of
`torch.nn.functional.linear` in the model's shapes is measured in every round, too. `before` is the set of ops without
the kernels for prompts. The warm peers hold all but 16 tokens of the prompt in the cache.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

OPENVINO = """
import json, sys, time, random
import openvino_genai
pipe = openvino_genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_NUM_THREADS=int(sys.argv[2]))
import numpy, openvino
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    ids = numpy.array([[random.randrange(100, 40000) for _ in range(int(line))]], dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
    start = time.perf_counter()
    pipe.generate(inputs, max_new_tokens=1)
    print(json.dumps(time.perf_counter() - start), flush=True)
"""
OURS = {   # name: dtype, weights, set of ops
    "before float32": ("float32", "dense", "fused_cpu.CPU"), "ours float32": ("float32", "dense", "cpu_prompt.CPU"),
    "before bfloat16": ("bfloat16", "dense", "fused_cpu.CPU"), "ours bfloat16": ("bfloat16", "dense", "cpu_prompt.CPU"),
    "ours stored": ("float32", "stored", "cpu_prompt.CPU"), "ours int8": ("float32", "int8", "cpu_prompt.CPU"),
    "ours int8, int8 inputs": ("float32", "int8", "cpu_prompt.INT8"),
    "warm float32": ("float32", "dense", "cpu_prompt.CPU")}
NEW = 16   # tokens that the warm peer reads


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def reader(name, threads):
    "A function that reads so many tokens and returns the seconds."
    import torch

    from benchmarks.decode import transformers_model
    from llm_workbench.kernels import cpu_prompt, fused_cpu
    from llm_workbench.lobby import load
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    tokens_of = lambda n: torch.randint(100, 40_000, (1, n))
    if name.startswith("transformers"):
        decoder = load(dtype=getattr(torch, name.split()[1]), weights="dense").decoder
        state = decoder.transformers_state() | {"lm_head.weight": decoder.lm_head.dense().detach()}
        model = transformers_model(decoder.source, decoder.dtype, "cpu", state)
        how = dict(max_new_tokens=1, do_sample=False)
        def generate(n):
            ids = tokens_of(n)
            return timed(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how))
        return generate
    dtype, weights, ops = OURS[name]
    module, attribute = ops.split(".")
    ops = getattr(dict(cpu_prompt=cpu_prompt, fused_cpu=fused_cpu)[module], attribute)
    decoder = load(dtype=getattr(torch, dtype), weights=weights, ops=ops).decoder
    def read(n):
        tokens, cache = tokens_of(n), decoder.new_cache(capacity=n)
        first = lambda new: decoder.logits(decoder.hidden(new, cache)[:, -1:]).argmax(-1)
        if not name.startswith("warm"): return timed(lambda: first(tokens))
        decoder.hidden(tokens, cache)
        cache.truncate(n - NEW)
        return timed(lambda: first(tokens[:, -NEW:]))
    return read


def rates(threads):
    "Operations a second of the MLP's product, in both dtypes."
    import torch
    import torch.nn.functional as F

    from llm_workbench.hardware.machine import best_seconds
    torch.set_num_threads(threads)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(512, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
        seconds = best_seconds(lambda: F.linear(x, w), 0.2)
        found[f"rate {str(dtype).removeprefix('torch.')}"] = 2 * 512 * w.numel() / seconds
    return found


def serve(name, threads):
    read = (lambda n: rates(threads)) if name == "rates" else reader(name, threads)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin: print(json.dumps(read(int(line))), flush=True)


class Peer:
    "A process that reads a prompt of so many tokens when asked."
    def __init__(self, command):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.process = subprocess.Popen(command, **pipes, text=True)
        self.answer()

    def answer(self):
        while line := self.process.stdout.readline():
            try: return json.loads(line)
            except json.JSONDecodeError: continue                    # a library's greeting
        raise SystemExit(f"a peer of the benchmark ended early:\n{self.process.communicate()[1][-2000:]}")

    def read(self, n):
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def measured(peers, args):
    "Samples: the rates, and tokens a second of each peer for each length."
    samples, names = {}, [n for n in peers if n != "rates"]
    for name in names:
        if name not in args.slow: peers[name].read(64)               # what is compiled on first use
    for i in range(args.rounds):
        for what, value in peers["rates"].read(0).items(): samples.setdefault(what, []).append(value / 1e9)
        for n in args.prompt:
            for name in names[i % len(names):] + names[:i % len(names)]:
                if name in args.slow and (i > 0 or n > 512): continue
                what = f"{name}, {n} tokens"
                samples.setdefault(what, []).append(n / peers[name].read(n))
        print(f"round {i + 1} of {args.rounds}", flush=True)
    for peer in peers.values(): peer.close()
    return samples


def shares(middle, lengths, weights=106_168_320, head=49152 * 576):
    """The time that the embedded model's matrices need, over the time of the prompt: in float32 at that rate, in
    bfloat16 at the better of the two."""
    rate = dict(float32=middle["rate float32"], bfloat16=max(middle["rate float32"], middle["rate bfloat16"]))
    found = {}
    for n in lengths:
        for who in ("before", "ours", "transformers"):
            for dtype, own in rate.items():
                if speed := middle.get(f"{who} {dtype}, {n} tokens"):
                    found[f"{who} {dtype}, {n} tokens"] = (2 * n * weights + 2 * head) / (own * 1e9) * speed / n
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512])
    parser.add_argument("--peers", nargs="*", help="names, such as 'ours float32'; all, unless told otherwise")
    parser.add_argument("--openvino", nargs="*", default=[])
    parser.add_argument("--openvino-python", default=sys.executable)
    parser.add_argument("--slow", nargs="*", default=[], help="peers that are asked once, for 512 tokens at most")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer: return serve(args.peer, args.threads)

    from benchmarks.record import record
    command = [sys.executable, "-m", "benchmarks.prefill", "--threads", str(args.threads), "--peer"]
    names = args.peers or [*OURS, "transformers float32", "transformers bfloat16"]
    peers = {name: Peer([*command, name]) for name in ("rates", *names)}
    for folder in args.openvino:
        other = [args.openvino_python, "-c", OPENVINO, folder, str(args.threads)]
        peers[os.path.basename(os.path.normpath(folder))] = Peer(other)
    samples = measured(peers, args)
    middle = {what: statistics.median(values) for what, values in samples.items()}
    ratios = {}
    for n in args.prompt:
        for dtype in ("float32", "bfloat16"):
            for peer in (f"before {dtype}", f"transformers {dtype}"):
                a, b = (samples.get(f"{who}, {n} tokens") for who in (f"ours {dtype}", peer))
                if a and b and peer not in args.slow:
                    ratios[f"ours / {peer}, {n} tokens"] = statistics.median(x / y for x, y in zip(a, b))
        a, b = (middle.get(f"{who} float32, {n} tokens") for who in ("ours", "warm"))
        if a and b: ratios[f"time of a warm first token / cold, {n} tokens"] = a / b
    units = {what: "GFLOP/s" if what.startswith("rate") else "tokens/s" for what in samples}
    more = dict(threads=args.threads, prompt_tokens=args.prompt, new_tokens_of_warm=NEW, slow=args.slow, ratios=ratios,
                shares=shares(middle, args.prompt))
    out = record("prefill", samples, units, **more)
    for what, value in {**middle, **ratios}.items(): print(what, value)
    print("shares of the rate:", more["shares"])
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
