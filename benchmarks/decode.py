"""How fast does the decoder read a prompt and write tokens, against transformers and llama.cpp, and against this
machine's memory?

    python -m benchmarks.decode                  # the embedded model on the CPU, all peers in one run, same threads
    python -m benchmarks.decode --prompt 2048    # after a longer text, where reading the cache takes its share
    python -m benchmarks.decode --device cuda    # random weights in the shapes of real models (no llama.cpp)

Every peer has a process of its own: torch and llama.cpp bring different thread pools, which wait for work by
spinning, and in one process they take the cores from each other. The processes take turns, one at a time, in many
short rounds, so that a slow moment of the machine hits all of them, and a ratio is the median of the ratios of the
rounds."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from benchmarks.record import record
from llm_workbench import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.kernels.cpu import CPU
from llm_workbench.embedded import embedded_model
from llm_workbench.hardware.machine import read_bandwidth

SHAPES = {  # sizes of released configurations, for devices that do not hold the embedded file
    "SmolLM2-135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9,
                         num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="default", rope_theta=1e5)),
    "Llama-3.2-1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32,
                         num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="default", rope_theta=5e5)),
}
MORE = dict(model_type="llama", max_position_embeddings=8192, rms_norm_eps=1e-5)


# --- one peer, in its own process -----------------------------------------------------------------------------------

def transformers_model(config, dtype, device, state=None):
    "transformers' Llama with sdpa attention: random weights, or those of `state`."
    from transformers import LlamaConfig, LlamaForCausalLM
    config = {k: v for k, v in config.items() if k != "model_type"}
    config = LlamaConfig(
        **{**config, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "sdpa"}
    )
    with torch.device(device): model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    if state is not None: model.load_state_dict(state, assign=True, strict=False)
    return model


def timed(function, device):
    "Seconds and result; waits for a GPU."
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def measure_ours(decoder, prompt, n_new, device):
    "Seconds for the prompt (logits of its last token) and for each further token, greedy, on average."
    cache = decoder.new_cache()
    prefill, last = timed(lambda: decoder.logits(decoder.hidden(prompt, cache)[:, -1:]).argmax(-1), device)
    def steps():
        token = last
        for _ in range(n_new): token = decoder(token, cache).argmax(-1)
    return prefill, timed(steps, device)[0] / n_new


def measure_transformers(model, prompt, n_new, device):
    "The same through generate(): the prompt is timed by asking for one token, the rest by the difference to n_new + 1."
    generate = lambda n: model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        use_cache=True,
    )
    one = timed(lambda: generate(1), device)[0]
    return one, (timed(lambda: generate(n_new + 1), device)[0] - one) / n_new


def measure_llama_cpp(llm, prompt, n_new, device):
    "The same through llama.cpp's eval on the file's own quantized weights."
    llm.reset()
    ids = prompt[0].tolist()
    prefill = timed(lambda: llm.eval(ids), device)[0]
    def steps():
        for _ in range(n_new): llm.eval([llm.sample(temp=0.0)])
    return prefill, timed(steps, device)[0] / n_new


def serve(args):
    "Load the peer named by --peer, then measure one round for every line that comes in."
    torch.set_num_threads(args.threads)
    kind, _, dtype = args.peer.rpartition(" ")
    generator = torch.Generator().manual_seed(0)
    if kind == "llama.cpp":
        import llama_cpp
        model = llama_cpp.Llama(
            str(embedded_model()),
            n_ctx=args.prompt + args.new + 16,
            n_batch=512,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            verbose=False,
        )
        vocabulary, nbytes, measure = model.n_vocab(), embedded_model().stat().st_size, measure_llama_cpp
    else:
        dtype = getattr(torch, dtype)
        if args.device == "cpu":
            from llm_workbench.families.opening import open_checkpoint
            checkpoint = open_checkpoint()
            decoder = Decoder.from_checkpoint(
                checkpoint.config, checkpoint.tensors, dtype, "cpu", CPU if kind == "ours" else TORCH
            )
            make = lambda: transformers_model(
                checkpoint.config,
                dtype,
                "cpu",
                decoder.transformers_state() | {"lm_head.weight": decoder.lm_head.dense().detach()},
            )
        else:
            theirs = transformers_model({**SHAPES[args.shape], **MORE}, dtype, args.device)
            decoder, make = Decoder.from_transformers(theirs, TORCH), lambda: theirs
        vocabulary, nbytes = decoder.config.vocab_size, sum(p.nbytes for p in decoder.parameters())
        model, measure = (make(), measure_transformers) if kind == "transformers" else (decoder, measure_ours)
    prompt = torch.randint(100, vocabulary, (1, args.prompt), generator=generator).to(args.device)
    with torch.inference_mode():
        measure(model, prompt, args.new, args.device)          # warm-up
        print(json.dumps(nbytes), flush=True)
        for _ in sys.stdin: print(json.dumps(measure(model, prompt, args.new, args.device)), flush=True)


# --- all peers ------------------------------------------------------------------------------------------------------

class Peer:
    "A process that measures one round when asked."
    def __init__(self, name):
        command = [sys.executable, "-m", "benchmarks.decode", *sys.argv[1:], "--peer", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.weight_bytes = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line: raise SystemExit(f"a peer of the benchmark ended early:\n{self.process.communicate()[1][-2000:]}")
        return json.loads(line)

    def round(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def peak_of_load(dtype, threads):
    "Peak resident memory that load() adds in a fresh process, over the bytes of the weights that it keeps."
    code = f"""
import torch
torch.set_num_threads({threads})
import llm_workbench, llm_workbench.lobby
def memory(key): return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key))
before = memory('VmRSS')
lm = llm_workbench.load(dtype=torch.{dtype})
print((memory('VmHWM') - before) / sum(p.nbytes for p in lm.decoder.parameters()))
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no NVIDIA GPU: run without --device cuda, or install a CUDA build of torch")
    if args.peer: return serve(args)

    on_cpu = args.device == "cpu"
    names = [
        f"{who} {dtype}"
        for dtype in ("float32", "bfloat16")
        for who in ["ours"] + ["ours with TORCH"] * on_cpu + ["transformers"]
    ] + ["llama.cpp Q4_1"] * on_cpu
    peers = {name: Peer(name) for name in names}
    samples = {"read bandwidth": []}
    for i in range(args.rounds):
        samples["read bandwidth"].append(read_bandwidth(threads=args.threads, device=args.device) / 1e9)
        for name in names[i % len(names):] + names[:i % len(names)]:          # nobody always follows the same neighbour
            prefill, step = peers[name].round()
            samples.setdefault(f"prefill, {name}", []).append(args.prompt / prefill)
            samples.setdefault(f"decode, {name}", []).append(1 / step)
        print(f"round {i + 1} of {args.rounds}", flush=True)
    for peer in peers.values(): peer.close()

    middle = {what: statistics.median(values) for what, values in samples.items()}
    ratios = {
        f"{phase}, {dtype}: ours / transformers": statistics.median(
            a / b for a, b in zip(samples[f"{phase}, ours {dtype}"], samples[f"{phase}, transformers {dtype}"])
        )
        for phase in ("prefill", "decode")
        for dtype in ("float32", "bfloat16")
    }
    weight_bytes = {name: peer.weight_bytes for name, peer in peers.items()}
    limits = {
        f"decode, {name}: share of bandwidth / weight bytes": middle[f"decode, {name}"]
        * weight_bytes[name]
        / (middle["read bandwidth"] * 1e9)
        for name in names
    }
    more = dict(
        threads=args.threads,
        prompt_tokens=args.prompt,
        new_tokens=args.new,
        weight_bytes=weight_bytes,
        ratios=ratios,
        limits=limits,
    )
    if on_cpu:
        more["peak of load() / weights kept"] = {d: peak_of_load(d, args.threads) for d in ("float32", "bfloat16")}
    else: more["shape"] = args.shape
    units = {what: "GB/s" if what == "read bandwidth" else "tokens/s" for what in samples}
    name = "_".join(
        ["decode"]
        + [args.shape] * (args.device == "cuda")
        + [f"{args.prompt}_tokens"] * (args.prompt != parser.get_default("prompt"))
    )
    out = record(name, samples, units, **more)
    for what, value in middle.items(): print(f"{what:42} {value:9.1f} {units[what]}")
    for what, value in {
        **ratios,
        **limits,
        **{f"peak of load() / weights kept, {d}": v for d, v in more.get("peak of load() / weights kept", {}).items()},
    }.items():
        print(f"{what:68} {value:6.2f}")
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__":
    main()
