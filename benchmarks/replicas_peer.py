"""What benchmarks/replicas.py asks of programs in environments of their own (tools/peers.py); JSON on the last line.

    python -m benchmarks.replicas_peer run FILE.gguf
    python -m benchmarks.replicas_peer check FILE     # configurations, read by Ray Serve
    python -m benchmarks.replicas_peer parse FILE     # command lines, read by vLLM in its environment

Conversations by the router that Ray Serve has, and by `by_prefix` plugged into it; then a replica is killed while it
writes, and whoever was cut off asks again, from where the text broke off.
"""
import json
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

# Ray's workers are nice to others, and wait for ever on a busy machine; unused ones are not started ahead of time.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_worker_niceness="0",
                  RAY_prestart_worker_first_driver="0", RAY_raylet_start_wait_time_s="120",
                  RAY_num_prestart_python_workers="0")

try:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import RequestRouter
except ImportError: RequestRouter = object             # in vLLM's environment

PAGE, PAGES, NEW = 32, 2, 8
CONVERSATIONS, TURNS, SYSTEMS, AT_A_TIME = 12, 4, 4, 4
KILLED_NEW, KILLED_AT_A_TIME = 48, 6


class ByPrefix(RequestRouter):
    "Ray Serve's interface around `by_prefix`."
    async def choose_replicas(self, candidate_replicas, pending_request=None):
        from llm_workbench.serving.scale_out import by_prefix
        them = {r.replica_id.unique_id: r for r in candidate_replicas}
        load = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in them.items()}
        tokens = pending_request.args[0] if pending_request else []
        return [[them[name]] for name in by_prefix(tokens, load, page=PAGE, pages=PAGES)] if load else []


class Replica:
    "Our engine; pieces of one text are streamed."
    def __init__(self, path):
        import torch

        from llm_workbench.lobby import load
        from llm_workbench.serving.engine import Engine, Runner
        torch.set_num_threads(1)
        self.runner = Runner(Engine(load(path), memory=2**28, page=PAGE))

    async def __call__(self, tokens, new):
        from llm_workbench.serving.engine import Request
        async for piece in self.runner.pieces(Request(tokens, new, stop_at_eos=False)):
            yield dict(pid=os.getpid(), tokens=piece.tokens, cached=piece.cached)

    def check_health(self):
        if not self.runner.alive: raise RuntimeError(str(self.runner.error))


def deploy(path, router):
    "A fresh application with two replicas; a handle that streams."
    options = {} if router is None else dict(request_router_config=RequestRouterConfig(request_router_class=router))
    deployment = serve.deployment(num_replicas=2, max_ongoing_requests=16, health_check_period_s=1,
                                  health_check_timeout_s=10, ray_actor_options=dict(num_cpus=1), **options)(Replica)
    return serve.run(deployment.bind(path), name="replicas", route_prefix=None).options(stream=True)


def ask(handle, tokens, new):
    "One text to its end: tokens, who wrote it, what was cached, seconds to the first token."
    start, first, text, pids, cached = time.perf_counter(), None, [], [], 0
    for piece in handle.remote(tokens, new):
        if piece["tokens"] and first is None: first, cached = time.perf_counter() - start, piece["cached"]
        text += piece["tokens"]
        pids.append(piece["pid"])
    return dict(text=text, pid=pids[0], cached=cached, prompt=len(tokens), first=first)


def conversation(handle, i):
    "The turns of a conversation, one after another."
    draw = random.Random(i)
    system = random.Random(1000 + i % SYSTEMS)
    text, told = [system.randrange(3, 49152) for _ in range(128)], []
    for _ in range(TURNS):
        text += [draw.randrange(3, 49152) for _ in range(40)]
        told.append(ask(handle, text, NEW))
        text += told[-1]["text"]
    return told


def conversations(handle):
    "All of them, some at a time."
    start = time.perf_counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        told = [t for turns in pool.map(lambda i: conversation(handle, i), range(CONVERSATIONS)) for t in turns]
    pids = [t["pid"] for t in told]
    return dict(requests=len(told), cached=sum(t["cached"] for t in told) / sum(t["prompt"] for t in told),
                by_replica=sorted(pids.count(p) for p in set(pids)), seconds=time.perf_counter() - start,
                first=[t["first"] for t in told], written=[t["text"] for t in told])


def killed(handle):
    "Kill the process of one replica in the middle of some texts; what is lost, retried, and how long it takes."
    prompts = [[random.Random(i).randrange(3, 49152) for _ in range(70)] for i in range(KILLED_AT_A_TIME)]
    whole = [ask(handle, p, KILLED_NEW) for p in prompts]              # nobody dies
    start, lock, dead, begun = time.perf_counter(), threading.Lock(), [], threading.Barrier(KILLED_AT_A_TIME)
    def client(prompt):
        text, tries, cut, again = [], 0, None, None
        while len(text) < KILLED_NEW:
            tries += 1
            try:
                for piece in handle.remote(prompt + text, KILLED_NEW - len(text)):
                    text += piece["tokens"]
                    if cut is not None and again is None: again = time.perf_counter() - cut
                    if tries == 1 and len(text) == 8: begun.wait(60)   # all texts have begun
                    with lock:
                        if tries == 1 and len(text) >= 12 and not dead:
                            dead.append((piece["pid"], time.perf_counter()))
                            os.kill(piece["pid"], signal.SIGKILL)
            except Exception as e:
                if tries > 20: raise
                cut = cut or time.perf_counter()
                errors.append(type(e).__name__)
                time.sleep(0.1)
        return dict(text=text, tries=tries, again=again)
    errors = []
    with ThreadPoolExecutor(KILLED_AT_A_TIME) as pool: found = list(pool.map(client, prompts))
    pid, when = dead[0]
    seen = set()
    while len(seen) < 2 and time.perf_counter() - when < 90:           # until two replicas answer again
        draw = random.Random()
        probe = ask(handle, [draw.randrange(3, 49152) for _ in range(64)], 1)
        if probe["pid"] != pid: seen.add(probe["pid"])
    return dict(running=len(found), cut_off=sum(f["tries"] > 1 for f in found), errors=sorted(set(errors)),
                same_text=sum(f["text"] == w["text"] for f, w in zip(found, whole)),
                again=[f["again"] for f in found if f["again"] is not None], two_again=time.perf_counter() - when,
                seconds=time.perf_counter() - start)


def run(path):
    "Everything that needs replicas."
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    found, starts = {}, []
    for name, router in (("power of two choices", None), ("by_prefix", ByPrefix)):
        start = time.perf_counter()
        handle = deploy(path, router)
        starts.append(time.perf_counter() - start)
        conversation(handle, 10**6)                                    # whatever is compiled first
        found[name] = conversations(handle)
        if router is not None: dying = killed(handle)
        serve.delete("replicas")
    texts = [run.pop("written") for run in found.values()]
    serve.shutdown()
    ray.shutdown()
    return dict(routers=found, same_text=texts[0] == texts[1], killed=dying, starts=starts, ray=ray.__version__)


def check(path):
    """What Ray's own classes make of configurations, and of one with a typo. Importing `ray.serve.llm` wants vLLM, so
    the two names in it, the application and the router, are looked up in its source."""
    from pathlib import Path

    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.serve.schema import ServeDeploySchema
    entries, read, folder = json.loads(Path(path).read_text()), [], Path(serve.__file__).parent / "llm"
    for config in entries["fleets"]:
        app = ServeDeploySchema.model_validate(config).applications[0]
        llm = app.args["llm_configs"][0]
        router = llm["deployment_config"].pop("request_router_config")["request_router_class"]
        assert app.import_path.startswith("ray.serve.llm:") and router.startswith("ray.serve.llm.request_router.")
        assert f"def {app.import_path.split(':')[1]}(" in (folder / "__init__.py").read_text()
        assert f"class {router.split('.')[-1]}(" in (folder / "request_router.py").read_text()
        llm = LLMConfig.model_validate(llm)
        scaling = llm.deployment_config["autoscaling_config"]
        read.append(dict(replicas=[scaling["min_replicas"], scaling["max_replicas"]], engine_kwargs=llm.engine_kwargs))
    try:
        ServeDeploySchema.model_validate(entries["typo"])
        typo = "taken without a word"
    except ValueError as e: typo = "refused: " + " ".join(str(e).split())[:160]
    return dict(read=read, typo=typo)


def parse(path):
    "What the parser of `vllm serve` makes of command lines."
    import contextlib
    import io
    from importlib.metadata import version
    try: from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError: from vllm.entrypoints.openai.cli_args import make_arg_parser
    try: from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError: from vllm.utils import FlexibleArgumentParser
    entries, parser = json.loads(open(path).read()), make_arg_parser(FlexibleArgumentParser())
    read = [{k: v for k, v in vars(parser.parse_args(words)).items() if isinstance(v, (str, int, list, type(None)))}
            for words in entries["commands"]]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said): parser.parse_args(entries["typo"])
        typo = "taken"
    except SystemExit: typo = "refused: " + said.getvalue().strip().splitlines()[-1][:160]
    return dict(read=read, typo=typo, vllm=version("vllm"))


if __name__ == "__main__":
    print(json.dumps(dict(run=run, check=check, parse=parse)[sys.argv[1]](sys.argv[2])), flush=True)
