"""How fast does the decoder read a prompt and write tokens, against transformers and llama.cpp, and against the memory?

    python -m benchmarks.decode                  # the embedded model on the CPU (our C kernels, and TORCH)
    python -m benchmarks.decode --prompt 2048    # after a longer text, where reading the cache takes its share
    python -m benchmarks.decode --packed         # weights as the file stores them, in 8 bits and in 4
    python -m benchmarks.decode --device cuda    # random weights in the shapes of real models (no llama.cpp)

Every peer has a process of its own, all with the same number of threads: torch and llama.cpp bring different thread
pools, which wait for work by spinning, and in one process they take the cores from each other. The processes take
turns, one at a time, in many short rounds, so that a slow moment of the machine hits all of them, and a ratio is the
median of the ratios of the rounds. On a GPU there is one peer more: ours with a static cache, its decode step recorded
once and repeated (a CUDA graph).
"""
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
from llm_workbench.embedded import embedded_model
from llm_workbench.hardware.machine import read_bandwidth
from llm_workbench.kernels.cpu_prompt import CPU
from llm_workbench.lobby import load

DTYPES = ("float32", "bfloat16")
PACKED = ("stored", "int8", "int4_g32")      # what `load(weights=...)` keeps
PLAIN = ("ours with TORCH", "transformers")  # without our kernels
SHAPES = {  # sizes of released configurations, for devices that do not hold the embedded file
    "SmolLM2-135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="default", rope_theta=1e5)),
    "Llama-3.2-1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="default", rope_theta=5e5)),
}
MORE = dict(model_type="llama", max_position_embeddings=8192, rms_norm_eps=1e-5)


# --- one peer, in its own process -------------------------------------------------------------------------------------

def transformers_model(config, dtype, device, state=None):
    "transformers' Llama with sdpa attention: random weights, or those of `state`."
    from transformers import LlamaConfig, LlamaForCausalLM
    none = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = {k: v for k, v in config.items() if k != "model_type"} | none
    with torch.device(device): model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa"))
    model = model.to(dtype).eval().requires_grad_(False)
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
    prefill, last = timed(lambda: first_token(decoder, prompt, cache), device)
    def steps():
        token = last
        for _ in range(n_new): token = decoder(token, cache).argmax(-1)
    return prefill, timed(steps, device)[0] / n_new


def first_token(decoder, prompt, cache): return decoder.logits(decoder.hidden(prompt, cache)[:, -1:]).argmax(-1)


class Recorded:
    "One greedy decode step over a static cache as a CUDA graph: its token goes in and out in the same place."
    def __init__(self, decoder, slots):
        self.decoder = decoder
        self.cache = decoder.new_cache("static", batch=1, slots=slots, context=slots)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=decoder.device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):                         # what is made on first use is made here
            for _ in range(3): self.step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph): self.step()

    def step(self): self.token.copy_(self.decoder(self.token, self.cache).argmax(-1))


def measure_recorded(recorded, prompt, n_new, device):
    "The same with a recorded step; the prompt is read in the ordinary way."
    recorded.cache.truncate(0)
    prefill, last = timed(lambda: first_token(recorded.decoder, prompt, recorded.cache), device)
    recorded.token.copy_(last)
    def steps():
        for _ in range(n_new): recorded.graph.replay()
    return prefill, timed(steps, device)[0] / n_new


def check_recorded(recorded, prompt):
    "Raise RuntimeError unless a few repeated steps give the tokens of the ordinary loop."
    cache, got = recorded.decoder.new_cache(), []
    recorded.cache.truncate(0)
    want = [first_token(recorded.decoder, prompt, cache)]
    recorded.token.copy_(first_token(recorded.decoder, prompt, recorded.cache))
    for _ in range(8):
        got.append(recorded.token.item())
        recorded.graph.replay()
        want.append(recorded.decoder(want[-1], cache).argmax(-1))
    if got != [token.item() for token in want[:8]]: raise RuntimeError("the recorded step gives other tokens")


def measure_transformers(model, prompt, n_new, device):
    "The same through generate(): the prompt is timed by one token, the rest by the difference to n_new + 1."
    def generate(n):
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
                              do_sample=False, use_cache=True)
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


def models(who, dtype, args):
    "Our decoder, and a function that makes transformers' model with the same weights."
    if args.device == "cpu":
        weights = who.removeprefix("ours in ") if who.removeprefix("ours in ") in PACKED else "dense"
        decoder = load(dtype=dtype, weights=weights, ops=TORCH if who in PLAIN else CPU).decoder
        state = lambda: decoder.transformers_state() | {"lm_head.weight": decoder.lm_head.dense().detach()}
        return decoder, lambda: transformers_model(decoder.source, dtype, "cpu", state())
    theirs = transformers_model({**SHAPES[args.shape], **MORE}, dtype, args.device)
    return Decoder.from_transformers(theirs, TORCH), lambda: theirs


def prepare(args):
    "What a peer measures with: (its model, its function, the vocabulary size, bytes of the weights)."
    who, _, dtype = args.peer.rpartition(" ")
    if who == "llama.cpp":
        import llama_cpp
        model = llama_cpp.Llama(str(embedded_model()), n_ctx=args.prompt + args.new + 16, n_batch=512,
                                n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
        return model, measure_llama_cpp, model.n_vocab(), embedded_model().stat().st_size
    decoder, make = models(who, getattr(torch, dtype), args)
    sizes = decoder.config.vocab_size, decoder.nbytes
    if who == "transformers": return make(), measure_transformers, *sizes
    if who == "ours in a CUDA graph": return Recorded(decoder, args.prompt + args.new + 16), measure_recorded, *sizes
    return decoder, measure_ours, *sizes


@torch.inference_mode()
def serve(args):
    "Load the peer named by --peer, then measure one round for every line that comes in."
    torch.set_num_threads(args.threads)
    try:
        model, measure, vocabulary, nbytes = prepare(args)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(100, vocabulary, (1, args.prompt), generator=generator).to(args.device)
        if measure is measure_recorded: check_recorded(model, prompt)
    except Exception as e:
        if "CUDA graph" not in args.peer: raise                # this one may fail to record, and says why
        return print(json.dumps(dict(not_measured=f"{type(e).__name__}: {e}".splitlines()[0])), flush=True)
    measure(model, prompt, args.new, args.device)              # warm-up
    print(json.dumps(nbytes), flush=True)
    for _ in sys.stdin: print(json.dumps(measure(model, prompt, args.new, args.device)), flush=True)


# --- all peers --------------------------------------------------------------------------------------------------------

class Peer:
    "A process that measures one round when asked."
    def __init__(self, name):
        command = [sys.executable, "-m", "benchmarks.decode", *sys.argv[1:], "--peer", name]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.process = subprocess.Popen(command, **pipes, text=True)
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


def peak_of_load(dtype, threads, weights="dense"):
    """Peak resident memory that reading the weights adds in a fresh process, over the bytes that are kept.

    Beyond what is there before: libraries, the tokenizer, and code that packing a small matrix has brought in."""
    code = f"""
import torch
torch.set_num_threads({threads})
from llm_workbench import Decoder
from llm_workbench.lobby import fastest_ops, keeping, open_checkpoint
from llm_workbench.quantization.formats import FORMATS
if {weights!r} in FORMATS: FORMATS[{weights!r}].pack(torch.randn(512, 768)).unpack()
checkpoint, ops, dtype = open_checkpoint(None), fastest_ops(), torch.{dtype}
def memory(key): return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key))
open('/proc/self/clear_refs', 'w').write('5')                # the peak begins here
before = memory('VmRSS')
keep = keeping({weights!r}, dtype, torch.device('cpu'), ops)
decoder = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, dtype, 'cpu', ops, keep)
print((memory('VmHWM') - before) / decoder.nbytes)
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def peers_of(args):
    "The names of all peers."
    on_cpu = args.device == "cpu"
    if args.packed:
        return ["transformers float32", "ours float32", *(f"ours in {w} float32" for w in PACKED), "llama.cpp Q4_1"]
    ours = ["ours", "ours with TORCH"] if on_cpu else ["ours", "ours in a CUDA graph"]
    return [f"{who} {d}" for d in DTYPES for who in [*ours, "transformers"]] + ["llama.cpp Q4_1"] * on_cpu


def started(args):
    "The peers that can be measured, by name, and the reasons of those that cannot."
    peers, reasons = {name: Peer(name) for name in peers_of(args)}, {}
    for name, peer in list(peers.items()):
        if not isinstance(peer.weight_bytes, dict): continue
        reasons[name] = peers.pop(name).weight_bytes["not_measured"]
        peer.close()
        print(f"not measured: {name}: {reasons[name]}", flush=True)
    return peers, reasons


def measured(peers, args):
    "Samples of every round: the bandwidth, then each peer's prefill and decode."
    names, samples = list(peers), {"read bandwidth": []}
    for i in range(args.rounds):
        samples["read bandwidth"].append(read_bandwidth(threads=args.threads, device=args.device) / 1e9)
        for name in names[i % len(names):] + names[:i % len(names)]:          # nobody always follows the same neighbour
            prefill, step = peers[name].round()
            samples.setdefault(f"prefill, {name}", []).append(args.prompt / prefill)
            samples.setdefault(f"decode, {name}", []).append(1 / step)
        print(f"round {i + 1} of {args.rounds}", flush=True)
    for peer in peers.values(): peer.close()
    return samples


def ratios_of(samples):
    "Medians of the ratios of single rounds, where both were measured."
    found = {}
    for phase in ("prefill", "decode"):
        for dtype in DTYPES:
            for a, b in (("ours", "transformers"), ("ours in a CUDA graph", "ours")):
                pair = [samples.get(f"{phase}, {who} {dtype}") for who in (a, b)]
                if all(pair): found[f"{phase}, {dtype}: {a} / {b}"] = statistics.median(x / y for x, y in zip(*pair))
        for weights in PACKED:
            ours = samples.get(f"{phase}, ours in {weights} float32", ())
            for peer in ("transformers float32", "llama.cpp Q4_1") if ours else ():
                pair = zip(ours, samples[f"{phase}, {peer}"])
                found[f"{phase}, ours in {weights} / {peer}"] = statistics.median(x / y for x, y in pair)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--packed", action="store_true", help="weights in 8 and 4 bits, on the CPU")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no NVIDIA GPU: run without --device cuda, or install a CUDA build of torch")
    if args.device == "cuda" and args.packed: sys.exit("the kernels for packed weights are for the CPU: leave one out")
    if args.peer: return serve(args)

    peers, reasons = started(args)
    samples = measured(peers, args)
    middle = {what: statistics.median(values) for what, values in samples.items()}
    weight_bytes = {name: peer.weight_bytes for name, peer in peers.items()}
    limits = {f"decode, {name}: share of bandwidth / weight bytes":
              middle[f"decode, {name}"] * n / (middle["read bandwidth"] * 1e9) for name, n in weight_bytes.items()}
    more = dict(threads=args.threads, prompt_tokens=args.prompt, new_tokens=args.new, weight_bytes=weight_bytes,
                ratios=ratios_of(samples), limits=limits)
    if reasons: more["not measured"] = reasons
    if args.packed:
        more["peak of load() / weights kept"] = {w: peak_of_load("float32", args.threads, w) for w in PACKED}
    elif args.device == "cpu":
        more["peak of load() / weights kept"] = {d: peak_of_load(d, args.threads) for d in DTYPES}
    else: more["shape"] = args.shape
    units = {what: "GB/s" if what == "read bandwidth" else "tokens/s" for what in samples}
    shape, length = [args.shape] * (args.device == "cuda"), [f"{args.prompt}_tokens"] * (args.prompt != 512)
    out = record("_".join(["decode", *["packed"] * args.packed, *shape, *length]), samples, units, **more)
    report(middle, units, more)
    print(f"written to {out.relative_to(out.parents[3])}")


def report(middle, units, more):
    "The medians, ratios and limits on the screen."
    for what, value in middle.items(): print(f"{what:42} {value:9.1f} {units[what]}")
    what = "peak of load() / weights kept"
    peaks = {f"{what}, {d}": v for d, v in more.get(what, {}).items()}
    for what, value in {**more["ratios"], **more["limits"], **peaks}.items(): print(f"{what:68} {value:6.2f}")


if __name__ == "__main__":
    main()
