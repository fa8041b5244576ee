"What the hardware part needs, and what its timer waits for."
import subprocess
import sys

import pytest
import torch

from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.hardware import machine as M


def test_timing_needs_no_psutil():
    "A machine with a GPU may lack it: everything but the memory of the host works."
    code = ("import sys; sys.modules['psutil'] = None\n"
            "from llm_workbench.hardware import machine as M\n"
            "assert M.best_seconds(lambda: None, 0.001) > 0 and M.read_bandwidth(2**16, seconds=0.001) > 0\n"
            "assert M.memory_budget(M.SMOLLM2_135M)['weights'] == 2 * 134_515_008\n"
            "assert M.cpu_name() and M.usable_cores() and M.torch_build() and M.torch_gpus() is not None\n"
            "print('fine')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


class Device:
    "Work that is queued by a call and done when somebody waits: the way of a GPU, on a clock turned by hand."
    def __init__(self, durations): self.now, self.queued, self.durations = 0.0, 0, iter(durations)
    def clock(self): return self.now
    def work(self): self.queued += 1
    def sync(self):
        for _ in range(self.queued): self.now += next(self.durations)
        self.queued = 0


def test_the_timer_waits_for_queued_work():
    device = Device([9.0, 0.5, 0.25, 0.75, 0.5])  # the first is the warm-up
    assert M.best_seconds(device.work, 1.9, device.sync, device.clock) == 0.25
    device = Device([1 / 4096] * 100_000)
    assert M.best_seconds(device.work, 1.0, device.sync, device.clock) == 1 / 4096, (
        "calls of a round were not divided out"
    )


def test_the_timer_waits_for_the_gpu_by_default_if_there_is_one_in_use(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    M.best_seconds(lambda: None, 0)
    assert not waits
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    M.best_seconds(lambda: None, 0)
    assert len(waits) == 2, "once after the warm-up, once in the only round"


def test_wrong_configurations():
    with pytest.raises(InputError, match="intermediate_size"): M.dense_parameters(dict(hidden_size=8))
    with pytest.raises(UnsupportedError, match="dense"): M.decode_bytes(M.SMOLLM2_135M | dict(num_local_experts=8))
