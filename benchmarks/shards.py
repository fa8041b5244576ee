"""Tensor parallelism between processes, held against one process: the script that the chapter on serving's scale-out
launches.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.shards --out FOLDER

Every rank loads the embedded model in float32, keeps its shard, and writes the same greedy text. Rank 0 first writes it
alone, and leaves FOLDER/told.json (without --out: a result in benchmarks/results): both texts, how far the logits are
apart, what each rank holds, the bytes of a token as the wires and as the system's sockets count them, and the best
seconds of a token and of collectives.
"""
import argparse
import json
import os
import socket
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import llm_workbench as wb
from benchmarks.record import record
from llm_workbench.architecture.ops import TORCH
from llm_workbench.finetuning.scale_out import group
from llm_workbench.serving.scale_out import Processes, sharded

PROMPT = "The lighthouse stood at the edge of the sea, and every evening the keeper"
SIZES = (576 * 4, 2**24)                                # bytes of an all-reduce: a token's stream; a long one


def socket_bytes():
    "Bytes that this process has sent through its TCP sockets, as the system counts them (tcpi_bytes_sent); Linux."
    if sys.platform != "linux": return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try: one = socket.socket(fileno=os.dup(int(name)))
        except OSError: continue                        # no socket, or gone
        with one:
            try: info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            except OSError: continue
            if len(info) >= 208: total += struct.unpack_from("Q", info, 200)[0]
    return total


@torch.inference_mode()
def token_seconds(decoder, prompt, n=12):
    "Seconds of decode steps."
    cache = decoder.new_cache()
    token, times = decoder(prompt, cache)[:, -1:].argmax(-1), []
    for _ in range(n):
        start = time.perf_counter()
        token = decoder(token, cache).argmax(-1)
        times.append(time.perf_counter() - start)
    return times


def collective_seconds(nbytes, n=25):
    "Seconds of all-reduces."
    x, times = torch.ones(nbytes // 4), []
    for _ in range(n):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - start)
    return times


def of_token(decoder, prompt, wire, n=8):
    "Bytes that this rank sends for one decode step: counted by its wire, and by its sockets."
    with torch.inference_mode():
        cache = decoder.new_cache()
        token = decoder(prompt, cache)[:, -1:].argmax(-1)
        before, seen = wire.sent, socket_bytes()
        for _ in range(n): token = decoder(token, cache).argmax(-1)
    return (wire.sent - before) / n, None if seen is None else (socket_bytes() - seen) / n


def job(ranks, out, new):
    lm = wb.load(weights="dense", ops=TORCH)
    prompt, nbytes = torch.tensor([lm.tokenizer.encode(PROMPT)]), lm.decoder.nbytes
    if ranks.rank == 0:
        with torch.inference_mode(): want = lm.decoder(prompt)
        text = lm.generate(PROMPT, max_new_tokens=new).text
        samples = {"one process, one thread": token_seconds(lm.decoder, prompt)}
        torch.set_num_threads(2)
        samples["one process, two threads"] = token_seconds(lm.decoder, prompt)
        torch.set_num_threads(1)
    wire = Processes()
    lm = replace(lm, decoder=sharded(lm.decoder, wire))                # the whole one is forgotten
    dist.barrier()
    with torch.inference_mode(): logits = lm.decoder(prompt)
    mine = dict(text=lm.generate(PROMPT, max_new_tokens=new).text, held=lm.decoder.nbytes / nbytes)
    wired, tcp = of_token(lm.decoder, prompt, wire)
    seconds, collectives = token_seconds(lm.decoder, prompt), {str(n): collective_seconds(n) for n in SIZES}
    found = [None] * ranks.size
    dist.all_gather_object(found, mine)
    if ranks.rank: return
    samples["two processes, one thread each"] = seconds
    told = dict(alone=text, text=[f["text"] for f in found], held=[f["held"] for f in found], wire=wired, tcp=tcp,
                apart=((logits - want).abs().max() / want.abs().max()).item())
    told |= dict(seconds={name: min(times) for name, times in samples.items()},
                 collectives={n: min(times) for n, times in collectives.items()})      # the best: others may be at work
    if out is not None: return (Path(out) / "told.json").write_text(json.dumps(told))
    samples |= {f"all-reduce of {n} bytes": times for n, times in collectives.items()}
    print(record("shards", samples, "seconds of a token, or of a sum", told=told))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a folder that is there; without it the result goes to benchmarks/results")
    parser.add_argument("--new", type=int, default=24, help="tokens to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with group() as ranks: job(ranks, args.out, args.new)


if __name__ == "__main__":
    main()
