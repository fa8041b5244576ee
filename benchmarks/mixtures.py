"""What does it bring to choose a format for every matrix? Mixtures found under a budget, against one format for all.

    python -m benchmarks.mixtures

On the twin of the embedded model whose weights are spread out (see `benchmarks.damage`), with the same text. Formats
that use an importance get one, in the mixtures and alone. Mixtures are found twice: from the formats whose blocks fit
the rows (what `quantize` can pack), and with blocks that run on into the next row, as in `benchmarks.damage`."""
import argparse
import itertools

import torch

from benchmarks.damage import WINDOW, by_ggml, models, pack_all, row
from benchmarks.record import record
from llm_workbench.quantization.calibration import collect
from llm_workbench.quantization.formats import format_of
from llm_workbench.quantization.measuring_damage import (
    compare,
    costs_of,
    felt,
    layers,
    predict,
    replaced,
    rounded,
    search,
    size_of,
)

CANDIDATES = ("int2_g32", "uint2_g32", "int3_g32", "uint3_g32", "int4_g32", "int4_g64", "uint4_g32", "uint4_g64", "nf4",
              "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
              "iq3_s", "iq4_xs")
ALONE = ("int3_g32", "int4_g32", "q4_0", "q4_1", "q4_k", "iq4_nl", "nf4", "q5_0", "q5_1")
BITS = (3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)


@torch.no_grad()
def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    decoders, batches, held = models()
    decoder = decoders["spread out"]
    matrices = {n: m.dense(torch.float32) for n, m in layers(decoder).items()}
    weights = sum(w.numel() for w in matrices.values())
    want, inputs = predict(decoder, held), collect(decoder, batches, choose=lambda n, m: n.startswith("layers."))
    grams = felt(decoder, batches)
    joined = costs_of(matrices, CANDIDATES, grams, inputs, by_ggml, fitting=False)
    costs = {n: {f: c for f, c in options.items() if matrices[n].shape[1] % format_of(f).columns == 0}
             for n, options in joined.items()}
    rows, found, expected = {}, {}, {}

    def keep(name, new, nbytes):
        rows[name] = row(compare(want, predict(replaced(decoder, new), held), held), nbytes, weights)
        r = rows[name]
        print(f"{name:21} {r['bits']:.3f} bits  KL {r['kl']:.4f}  expected {expected[name]:.4f}", flush=True)

    for bits, (kind, options) in itertools.product(BITS, {"": costs, ", joined rows": joined}.items()):
        name = f"{bits} bits{kind}"
        found[name] = search(options, int(bits * weights / 8))
        expected[name] = sum(options[n][f][1] for n, f in found[name].items())
        new = {n: rounded(w, found[name][n], inputs[n].importance, by_ggml)[0] for n, w in matrices.items()}
        keep(name, new, size_of(options, found[name]))
    for format in ALONE:
        expected[format] = sum(options[format][1] for options in joined.values())
        keep(format, *pack_all(decoder, format, inputs))
    out = record("mixtures", {name: r.pop("blocks") for name, r in rows.items()}, "KL divergence, nats a token",
                 rows=rows, found=found, expected=expected,
                 settings=dict(candidates=CANDIDATES, window=WINDOW, weights=weights))
    print(f"written to {out.relative_to(out.parents[3])}")


if __name__ == "__main__": main()
