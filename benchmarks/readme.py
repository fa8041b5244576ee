"""Write the measured figures of README.md from the committed results: python -m benchmarks.readme [folder under
results/]"""
import re
import sys
from pathlib import Path

from benchmarks.record import RESULTS, recorded

README = Path(__file__).parents[1] / "README.md"
MARKS = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.S)
PEERS = {f"{who} {dtype}": f"{label}, {short}" for dtype, short in {"float32": "fp32", "bfloat16": "bf16"}.items()
         for who, label in {"ours": "this decoder, ops `CPU`", "ours with TORCH": "this decoder, ops `TORCH`",
                            "transformers": "transformers"}.items()} | {"llama.cpp Q4_1": "llama.cpp, the file's Q4_1"}
GOAL = 1.5   # decode against transformers.generate


def rows(result):
    for peer, label in PEERS.items():
        share = result["limits"][f"decode, {peer}: share of bandwidth / weight bytes"]
        prefill, decode = (result["medians"][f"{phase}, {peer}"] for phase in ("prefill", "decode"))
        yield f"| {result['prompt_tokens']:,} | {label} | {prefill:.0f} | {decode:.1f} | {share:.2f} |"


def ratios(result):
    fp32, bf16 = (result["ratios"][f"decode, {d}: ours / transformers"] for d in ("float32", "bfloat16"))
    verdict = f"the goal of {GOAL} is " + (
        "reached"
        if min(fp32, bf16) >= GOAL
        else "reached in bf16 only"
        if bf16 >= GOAL
        else "reached in fp32 only"
        if fp32 >= GOAL
        else "not reached"
    )
    return f"{fp32:.2f} times in fp32 and {bf16:.2f} times in bf16 after {result['prompt_tokens']:,} tokens ({verdict})"


def packed(folder: str) -> list[str]:
    "A sentence on packed weights, where they were measured."
    if not (RESULTS / folder / "decode_packed.json").exists(): return []
    result = recorded("decode_packed", folder)
    speed, times, peak = result["medians"], result["ratios"], result["peak of load() / weights kept"]
    def of(weights, peer): return times[f"decode, ours in {weights} / {peer}"]
    return [
        f"Packed, in a run of their own ([samples](benchmarks/results/{folder}/decode_packed.json)), in tokens/s: int8 "
        f"{speed['decode, ours in int8 float32']:.0f} ({of('int8', 'transformers float32'):.1f} times transformers in "
        f"fp32), int4_g32 {speed['decode, ours in int4_g32 float32']:.0f} "
        f"({of('int4_g32', 'transformers float32'):.1f} times), the file's own blocks "
        f"{speed['decode, ours in stored float32']:.0f} ({of('stored', 'llama.cpp Q4_1'):.2f} times llama.cpp with the "
        f"same blocks); peak memory {peak['int8']:.2f}, {peak['int4_g32']:.2f} and {peak['stored']:.2f} times the "
        "weights."]


def block(folder: str) -> str:
    "The Markdown between the marks."
    names = sorted(path.stem for path in (RESULTS / folder).glob("decode*.json"))
    results = [recorded(name, folder) for name in names if "packed" not in name]
    first = next(r for r in results if r["name"] == "decode")
    peak = first["peak of load() / weights kept"]
    links = ", ".join(f"[{r['prompt_tokens']:,} tokens](benchmarks/results/{folder}/{r['name']}.json)" for r in results)
    return "\n".join([
        f"Measured with `make bench` on {first['date'][:10]}: {first['machine']['cpu']}, {first['threads']} threads, "
        f"{first['medians']['read bandwidth']:.1f} GB/s read bandwidth.",
        "Every peer in a process of its own, all taking turns in one run; medians, and medians of the ratios of single "
        "rounds.",
        f"The machine is shared and varies; raw samples: {links}.", "",
        "| tokens of prompt | SmolLM2-135M by | prefill, tokens/s | decode, tokens/s | decode, share of bandwidth / "
        "weight bytes |", "|---|---|---|---|---|",
        *(row for result in results for row in rows(result)), "",
        f"Decode against `transformers.generate` at the same dtype: {'; '.join(map(ratios, results))}.",
        f"The peak memory of `load()` is {peak['float32']:.2f} (fp32) and {peak['bfloat16']:.2f} (bf16) times the "
        "weights that it keeps.",
        *packed(folder),
        *([] if any(RESULTS.glob("*/*SmolLM2*.json")) else ["No GPU has been measured yet."]), ""])


if __name__ == "__main__":
    folders = sys.argv[1:] or [p.name for p in RESULTS.iterdir() if (p / "decode.json").exists()]
    README.write_text(
        MARKS.sub(lambda m: m[1] + block(folders[0]) + m[2], README.read_text(encoding="utf-8")), encoding="utf-8"
    )
    print(block(folders[0]))
