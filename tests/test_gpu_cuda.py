"CUDA C++ inside the package: compiled for sm_90a where nvcc is, its helpers run on the CPU, loaded where there is a GPU."
import numpy as np
import pytest
import torch

from llm_workbench.errors import UnsupportedError
from llm_workbench.kernels import cuda as cu
from llm_workbench.kernels import quantized_weights as qw
from llm_workbench.quantization.formats import FORMATS
from tests.kernel_checks import DEVICE

pytestmark = pytest.mark.triton


def has_nvcc():
    try: return bool(cu.nvcc())
    except UnsupportedError: return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not here")


@needs_nvcc
@pytest.mark.parametrize("name", ["int4_g128", "int4_g32", "nf4", "int8", "q4_k", "q6_k"])
@pytest.mark.parametrize("rows", [1, 8])
def test_no_spills_and_wide_loads(name, rows):
    w = qw.prepare(FORMATS[name].pack(torch.randn(16, 256)))
    found = cu.compiled_sm90a(qw.cuda_source(w, torch.bfloat16, rows))
    assert found["spills"] == found["stack"] == 0 and found["loads_128"] >= 3 and found["mma"] >= 2, found
    assert found["shared"] <= 48 * 1024


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["torch", "cupy"])
def test_a_kernel_is_loaded_and_run(way):
    if way == "cupy": pytest.importorskip("cupy")
    text = 'extern "C" __global__ void twice(const float *x, float *y, int n) { int i = blockIdx.x * 64 + threadIdx.x; if (i < n) y[i] = FACTOR * x[i]; }'
    x = torch.randn(100, device="cuda")
    y = torch.empty_like(x)
    run = cu.loaded(cu.CudaSource("twice", text, (("FACTOR", 2),)), 0, way)
    run((2, 1, 1), (64, 1, 1), [x, y, 100])
    assert torch.equal(y, 2 * x)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_a_kernel_says_so():
    with pytest.raises(UnsupportedError, match="takes an NVIDIA GPU"): cu.loaded(cu.CudaSource("twice", ""))
