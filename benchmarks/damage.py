"""What does each weight format cost the embedded model? Bits against KL divergence, same top token and perplexity.

    python -m benchmarks.damage                # every format, on two models; takes about half an hour
    python -m benchmarks.damage --seconds 200  # as far as that goes; the next call goes on where this one stopped

Only the matrices of the layers are packed (106 of 134 million weights), from dense ones, and evaluated as the dense
matrices that they unpack to. Where a row is no whole number of blocks, blocks run on into the next row. Two models: the
one that ships with the package, whose weights were rounded to Q4_1 once, and a twin whose weights are spread evenly
over the steps of that rounding. I-quants, and rows that say so, get the mean squares of inputs on other text as
importance."""
import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.record import record
from llm_workbench import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.quantization.calibration import CALIBRATION, HELD_OUT, collect, windows
from llm_workbench.quantization.formats import FORMATS
from llm_workbench.quantization.gguf_blocks import BlockFormat, c_quantize
from llm_workbench.quantization.measuring_damage import (
    compare,
    interval,
    layers,
    predict,
    replaced,
    rounded,
    spread_out,
)
from llm_workbench.quantization.packing import Packed

STATE = Path(tempfile.gettempdir()) / "llm_workbench_damage.json"
WINDOW, BLOCK, WEIGHED = 256, 32, ("q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def by_ggml(weight, format, importance):
    "The same bytes as `format.pack`, by ggml's library, which is faster at its own types."
    if not isinstance(format, BlockFormat): return format.pack(weight, importance)
    return Packed(format, tuple(weight.shape), {"data": c_quantize(weight, format.block.name, importance)})


def every_case():
    "(what the row is called, format, whether it gets an importance)"
    for name in FORMATS: yield name, name, name.startswith("iq")
    for name in WEIGHED: yield f"{name}, weighed", name, True


def pack_all(decoder, format, inputs):
    "New weights by name, and their bytes."
    def one(item):
        name, matrix = item
        return name, rounded(matrix.dense(torch.float32), format, inputs and inputs[name].importance, by_ggml)
    with ThreadPoolExecutor(2) as pool: done = dict(pool.map(one, layers(decoder).items()))
    return {n: w for n, (w, _) in done.items()}, sum(nbytes for _, nbytes in done.values())


def row(damage, nbytes, weights):
    "All that is kept of one measurement."
    parts = [p.mean().item() for p in damage.kl.split(BLOCK)]
    kl, ppl = interval(damage.kl, BLOCK), interval(damage.before - damage.after, BLOCK)
    return dict(blocks=parts, bits=8 * nbytes / weights, mb=nbytes / 1e6, kl=kl.mean, low=kl.low, high=kl.high,
                kl99=damage.quantile(0.99), worst=damage.worst, same_top=damage.same_top, rms_p=damage.rms_p,
                log_perplexity=ppl.mean, log_perplexity_low=ppl.low, log_perplexity_high=ppl.high)


def models():
    "The two decoders by name, the calibration text and the text to measure on."
    checkpoint = open_checkpoint()
    decoder = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, ops=TORCH)
    ids = [checkpoint.tokenizer.encode(text) for text in (CALIBRATION, HELD_OUT)]
    batches, held = windows(ids[0], 208, batch=2), torch.cat(windows(ids[1], WINDOW + 1))
    return {"spread out": spread_out(decoder), "as shipped": decoder}, batches, held


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after the case that passes this")
    args = parser.parse_args()
    started, rows = time.monotonic(), json.loads(STATE.read_text()) if STATE.exists() else {}
    decoders, batches, held = models()
    weights = sum(m.weight.numel() for m in layers(decoders["as shipped"]).values())
    for model, decoder in decoders.items():
        todo = [case for case in every_case() if f"{model}: {case[0]}" not in rows]
        if not todo: continue
        want, inputs = predict(decoder, held), collect(decoder, batches, choose=lambda n, m: n.startswith("layers."))
        for name, format, weighed in todo:
            if time.monotonic() - started > args.seconds: return print(f"{len(rows)} rows so far; call again")
            new, nbytes = pack_all(decoder, format, inputs if weighed else None)
            rows[f"{model}: {name}"] = r = row(compare(want, predict(replaced(decoder, new), held), held), nbytes,
                                               weights)
            STATE.write_text(json.dumps(rows))
            print(f"{time.monotonic() - started:6.0f} s  {model}: {name:14} {r['bits']:6.3f} bits  KL {r['kl']:8.4f} "
                  f"({r['low']:.4f} to {r['high']:.4f})  same top {r['same_top']:.3f}", flush=True)
    samples = {name: r.pop("blocks") for name, r in rows.items()}
    out = record("damage", samples, f"KL divergence, nats a token, one sample per block of {BLOCK} tokens", rows=rows,
                 settings=dict(model="SmolLM2-135M-Instruct", weights=weights,
                               calibration_tokens=sum(b.numel() for b in batches),
                               measured_tokens=held.numel() - len(held), window=WINDOW, block=BLOCK))
    STATE.unlink()
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__": main()
