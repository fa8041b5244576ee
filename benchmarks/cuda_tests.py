"""Do the CUDA tests pass on this GPU, and what does each take?

    python -m benchmarks.cuda_tests            # all of them
    python -m benchmarks.cuda_tests -k graph   # options for pytest

Needs what the tests need: torch, triton, transformers, numpy, pytest, hypothesis, fastcore, gguf, pandas.
"""
import sys
from pathlib import Path

from benchmarks.record import record

TESTS = Path(__file__).parents[1] / "tests"


class Outcomes:
    "What became of every test, and its seconds."
    def __init__(self): self.seconds, self.of = [], dict(passed=[], failed=[], skipped=[])

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed: self.seconds.append(report.duration)
        if report.when == "call" or not report.passed: self.of[report.outcome].append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed: self.of["failed"].append(f"{report.nodeid} (not collected)")


def main(options):
    import pytest
    import torch
    if not torch.cuda.is_available(): sys.exit("torch sees no NVIDIA GPU here (llm-workbench doctor says why)")
    outcomes = Outcomes()
    status = pytest.main(["-q", "-m", "cuda or triton", str(TESTS), *options], plugins=[outcomes])
    if outcomes.seconds:
        more = {f"tests {what}": len(tests) for what, tests in outcomes.of.items()}
        more |= {what: outcomes.of[what] for what in ("failed", "skipped")}
        path = record("cuda_tests", {"seconds of a test": outcomes.seconds}, "s", **more)
        print(f"written to {path.relative_to(path.parents[3])}")
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
