"""How fast does the decoder read a prompt and write tokens, against transformers and llama.cpp, and against this machine's memory?

    python -m benchmarks.decode                  # the embedded model on the CPU, all peers in one run, same threads
    python -m benchmarks.decode --device cuda    # random weights in the shapes of real models (no llama.cpp)

Peers take turns in every round, so that a slow moment of the machine hits all of them.
"""
import argparse
import gc
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from benchmarks.record import record
from llm_workbench.architecture.decoder import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.hardware.machine import read_bandwidth

SHAPES = {  # sizes of released configurations, for devices that do not hold the embedded file
    "SmolLM2-135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e5)),
    "Llama-3.2-1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
}


def transformers_model(config, dtype, device, state=None):
    "transformers' Llama with sdpa attention: random weights, or those of `state`."
    from transformers import LlamaConfig, LlamaForCausalLM
    config = {k: v for k, v in config.items() if k != "model_type"}
    config = LlamaConfig(**{**config, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "sdpa"})
    with torch.device(device): model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    if state is not None: model.load_state_dict(state, assign=True, strict=False)
    return model


class Clock:
    "Seconds of a block; waits for a GPU."
    def __init__(self, device): self.wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    def __call__(self, function):
        self.wait()
        start = time.perf_counter()
        result = function()
        self.wait()
        return time.perf_counter() - start, result


def measure_ours(decoder, prompt, n_new, clock):
    "Seconds for the prompt (logits of its last token) and for each further token, greedy, on average."
    cache = decoder.new_cache()
    prefill, last = clock(lambda: decoder.logits(decoder.hidden(prompt, cache)[:, -1:]).argmax(-1))
    def steps():
        token = last
        for _ in range(n_new): token = decoder(token, cache).argmax(-1)
        return token
    return prefill, clock(steps)[0] / n_new


def measure_transformers(model, prompt, n_new, clock):
    "The same through generate(): the prompt is timed by asking for one token, the rest by the difference to n_new + 1."
    generate = lambda n: model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n, do_sample=False, use_cache=True)
    one = clock(lambda: generate(1))[0]
    return one, (clock(lambda: generate(n_new + 1))[0] - one) / n_new


def measure_llama_cpp(llm, prompt, n_new, clock):
    "The same through llama.cpp's eval on the file's own quantized weights."
    llm.reset()
    ids = prompt[0].tolist()
    prefill = clock(lambda: llm.eval(ids))[0]
    def steps():
        for _ in range(n_new): llm.eval([llm.sample(temp=0.0)])
    return prefill, clock(steps)[0] / n_new


def peak_of_load(dtype, threads):
    "Peak resident memory that load() adds in a fresh process, over the bytes of the weights that it keeps."
    code = f"""
import resource, torch
torch.set_num_threads({threads})
import llm_workbench, llm_workbench.inference.generation
def high_water():
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))
def resident():
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmRSS'))
before = resident()
lm = llm_workbench.load(dtype=torch.{dtype})
kept = sum(p.nbytes for p in lm.decoder.parameters())
print((high_water() - before) / kept, kept)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return float(out[0])


def embedded():
    "Config, fp32 tensors by transformers' names, path and vocabulary of the embedded model."
    from llm_workbench.checkpoints.sources import open_checkpoint
    from llm_workbench.hardware.machine import embedded_model
    checkpoint = open_checkpoint()
    return checkpoint.config, checkpoint.tensors, embedded_model()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = Clock(args.device)
    if args.device == "cuda" and not torch.cuda.is_available(): sys.exit("torch sees no NVIDIA GPU: run without --device cuda, or install a CUDA build of torch")

    if args.device == "cpu": config, tensors, path = embedded()
    else: config, tensors, path = {**SHAPES[args.shape], "model_type": "llama", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}, None, None
    prompt = torch.randint(100, config["vocab_size"], (1, args.prompt), generator=torch.Generator().manual_seed(0)).to(args.device)

    peers, weight_bytes = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if tensors is None:
            hf = transformers_model(config, dtype, args.device)
            decoder = Decoder.from_transformers(hf, TORCH)
        else:
            decoder = Decoder.from_checkpoint(config, tensors, dtype, args.device, TORCH)
            hf = transformers_model(config, dtype, args.device, decoder.transformers_state() | {"lm_head.weight": decoder.lm_head.weight.detach()})
        weight_bytes[name] = sum(p.nbytes for p in decoder.parameters())
        peers[f"ours {name}"] = lambda d=decoder: measure_ours(d, prompt, args.new, clock)
        peers[f"transformers {name}"] = lambda m=hf: measure_transformers(m, prompt, args.new, clock)
    if path is not None:
        import llama_cpp
        llm = llama_cpp.Llama(str(path), n_ctx=args.prompt + args.new + 16, n_batch=512, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
        weight_bytes["Q4_1"] = path.stat().st_size
        peers["llama.cpp Q4_1"] = lambda: measure_llama_cpp(llm, prompt, args.new, clock)

    samples = {"read bandwidth": []}
    with torch.inference_mode():
        for function in peers.values(): function()                     # warm-up
        for i in range(args.rounds):
            samples["read bandwidth"].append(read_bandwidth(threads=args.threads, device=args.device) / 1e9)
            order = list(peers.items())
            for name, function in order[i % len(order):] + order[:i % len(order)]:   # nobody always follows the same neighbour
                prefill, step = function()
                samples.setdefault(f"prefill, {name}", []).append(args.prompt / prefill)
                samples.setdefault(f"decode, {name}", []).append(1 / step)
            print(f"round {i + 1} of {args.rounds}", flush=True)

    middle = {what: statistics.median(values) for what, values in samples.items()}
    bandwidth = middle["read bandwidth"]
    ratios = {f"{phase}, {d}: ours / transformers": middle[f"{phase}, ours {d}"] / middle[f"{phase}, transformers {d}"]
              for phase in ("prefill", "decode") for d in ("float32", "bfloat16")}
    limits = {f"decode, {peer}: share of bandwidth / weight bytes": middle[f"decode, {peer}"] * weight_bytes[peer.split()[-1]] / (bandwidth * 1e9) for peer in peers}
    more = dict(threads=args.threads, prompt_tokens=args.prompt, new_tokens=args.new, weight_bytes=weight_bytes, ratios=ratios, limits=limits)
    if args.device == "cpu":
        del peers, decoder, hf
        gc.collect()
        more["peak of load() / weights kept"] = {d: peak_of_load(d, args.threads) for d in ("float32", "bfloat16")}
    else: more["shape"] = args.shape
    units = {what: "GB/s" if what == "read bandwidth" else "tokens/s" for what in samples}
    name = "decode" if args.device == "cpu" else f"decode_{args.shape}"
    out = record(name, samples, units, **more)
    for what, value in middle.items(): print(f"{what:42} {value:9.1f} {units[what]}")
    for what, value in {**ratios, **limits, **{f"peak of load() / weights kept, {d}": v for d, v in more.get("peak of load() / weights kept", {}).items()}}.items(): print(f"{what:68} {value:6.2f}")
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
