"""Replicas of our engine behind Ray Serve: does a router that knows prefixes find more, what is lost with a replica?

    python tools/peers.py ray vllm             # two environments; vLLM (3.5 GB) only reads command lines here
    python -m benchmarks.replicas              # both questions, and what Ray and vLLM read in generated configurations
    python -m benchmarks.replicas --only hand_over

Two replicas of the embedded model (its Q4_1 weights, one thread each) on a local Ray cluster.
"""
import argparse
import json
import tempfile

from benchmarks.record import record, recorded
from benchmarks.scale_out import call, python_of, version
from llm_workbench.embedded import embedded_model
from llm_workbench.serving.scale_out import Fleet, engine_arguments, ray_serve_config, vllm_command

FLEETS = [Fleet("tiny", "org/tiny"), Fleet("small", "org/small", replicas=(1, 8)), Fleet("one", "org/one", tensor=8),
          Fleet("two", "org/two", tensor=4, pipeline=2, replicas=(2, 6)), Fleet("long", "org/long", 2, context=131072),
          Fleet("moe", "org/moe", tensor=8, experts=True, requests=128)]
NOTES = ["two replicas, one thread each, on two cores that other programs used as well: read shares, not seconds",
         "prompts are random tokens; four system prompts of 128 tokens, turns of 40 and 8 written tokens"]


def hand_over():
    "What the readers of the generated files say of all fleets, and of one with a typo."
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        typo = ray_serve_config(FLEETS[0])
        typo["applications"][0]["rout_prefix"] = typo["applications"][0].pop("route_prefix")
        json.dump(dict(fleets=[ray_serve_config(f) for f in FLEETS], typo=typo), file)
        file.flush()
        ray = json.loads(call(("-m", "benchmarks.replicas_peer", "check", file.name), "ray").splitlines()[-1])
    for fleet, read in zip(FLEETS, ray["read"], strict=True):
        assert (read["replicas"], read["engine_kwargs"]) == (list(fleet.replicas), engine_arguments(fleet)), read
    found = {f"ray {version('ray', 'ray')}, serve and serve.llm": dict(accepted=len(ray["read"]), typo=ray["typo"])}
    try: python = open(python_of("vllm"))
    except OSError: return found
    python.close()
    commands = [vllm_command(f)[2:] for f in FLEETS]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(dict(commands=commands, typo=[*commands[0], "--tensor-paralel-size", "2"]), file)
        file.flush()
        vllm = json.loads(call(("-m", "benchmarks.replicas_peer", "parse", file.name), "vllm").splitlines()[-1])
    for fleet, read in zip(FLEETS, vllm["read"], strict=True):
        want = engine_arguments(fleet) | dict(model_tag=fleet.source, served_model_name=[fleet.model])
        assert {k: read.get(k) for k in want} == want, (want, read)
    return found | {f"vllm {vllm['vllm']}, vllm serve": dict(accepted=len(vllm["read"]), typo=vllm["typo"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("replicas", "hand_over"))
    only = parser.parse_args().only
    try: before = recorded("replicas")
    except OSError: before = {}
    if only != "hand_over":
        said = call(("-m", "benchmarks.replicas_peer", "run", str(embedded_model())), "ray")
        told = json.loads(said.splitlines()[-1])
        samples = {name: run.pop("first") for name, run in told["routers"].items()}
        samples["start of two replicas"] = told.pop("starts")
        versions = dict(ray=told.pop("ray"))
    else:
        told = {key: before[key] for key in ("routers", "killed", "same_text")}
        samples, versions = before["samples"], before["versions"]
    handed = hand_over() if only != "replicas" else before.get("hand_over")
    print(record("replicas", samples, "seconds to the first token; of starting", **told, notes=NOTES, versions=versions,
                 hand_over=handed))


if __name__ == "__main__":
    main()
