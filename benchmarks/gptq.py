"""What GPTQ saves at every width, and what its options are worth: KL divergence of the embedded model on held-out text.

    python -m benchmarks.gptq

Calibrated on the text of the chapter on calibration. The numbers are nats a token and do not depend on speed."""
import argparse

import torch

from benchmarks.record import record
from llm_workbench import Decoder
from llm_workbench.architecture.ops import TORCH
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.quantization.calibration import CALIBRATION, HELD_OUT, collect, windows
from llm_workbench.quantization.formats import quantize
from llm_workbench.quantization.gptq import gptq
from llm_workbench.quantization.round_to_nearest import Integers


def cases(decoder, inputs):
    "What is measured, by name: calls that give a decoder."
    result = {}
    for name in ("int4_g32", "uint4_g32", "int3_g32", "uint3_g32", "int2_g32", "uint2_g32"):
        result[f"{name}, rounded"] = lambda name=name: quantize(decoder, name)
        result[f"{name}, GPTQ"] = lambda name=name: gptq(decoder, name, inputs)
    g64, search = Integers(3, 64), Integers(3, 32, trials=8)
    result["int3_g64, rounded"] = lambda: quantize(decoder, g64)
    result["int3_g64, GPTQ"] = lambda: gptq(decoder, g64, inputs)
    result["int3_g32, scales searched, rounded"] = lambda: quantize(decoder, search, importance=inputs)
    result["int3_g32, scales searched, GPTQ"] = lambda: gptq(decoder, search, inputs)
    result["int3_g32, GPTQ, order of memory"] = lambda: gptq(decoder, "int3_g32", inputs, order=False)
    result["int3_g32, GPTQ, dynamic scales"] = lambda: gptq(decoder, "int3_g32", inputs, order=False, dynamic=True)
    for damp in (0.01, 0.2, 1.0):
        result[f"int3_g32, GPTQ, damp {damp}"] = lambda damp=damp: gptq(decoder, "int3_g32", inputs, damp=damp)
    return result


@torch.inference_mode()
def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    checkpoint = open_checkpoint()
    decoder = Decoder.from_checkpoint(checkpoint.config, checkpoint.tensors, ops=TORCH)
    tokens = [checkpoint.tokenizer.encode(text) for text in (CALIBRATION, HELD_OUT)]
    batches, held = windows(tokens[0], 208, batch=2), torch.cat(windows(tokens[1], 256))
    inputs, want = collect(decoder, batches), decoder(held).log_softmax(-1)
    samples = {}
    for name, make in cases(decoder, inputs).items():
        got = make()(held).log_softmax(-1)
        samples[name] = (want.exp() * (want - got)).sum(-1).mean(1).tolist()         # one number for each window
        print(f"{name:40} {sum(samples[name]) / len(samples[name]):8.4f}", flush=True)
    out = record("gptq", samples, "KL divergence, nats a token, one sample per window of 256 tokens",
                 means={name: sum(v) / len(v) for name, v in samples.items()},
                 settings=dict(model="SmolLM2-135M-Instruct", calibration_tokens=sum(b.numel() for b in batches),
                               held_out_tokens=held.numel()))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__": main()
