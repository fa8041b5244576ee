"CUDA C++ inside the package: compiled for sm_90a, its helpers and kernels run on the CPU, loaded on a GPU."
import ctypes
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.kernels import cuda as cu
from llm_workbench.kernels import quantized_weights as qw
from llm_workbench.quantization.formats import FORMATS
from llm_workbench.quantization.packing import unpack_codes
from tests.kernel_checks import DEVICE

pytestmark = pytest.mark.triton


def has_nvcc():
    try: return bool(cu.nvcc())
    except UnsupportedError: return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not here")
TWICE = cu.CudaSource("twice", '''extern "C" __global__ void twice(const float *x, float *y, int n) {
  int i = blockIdx.x * 64 + threadIdx.x;
  if (i < n) y[i] = FACTOR * x[i];
}''', (("FACTOR", 2),))


@needs_nvcc
@pytest.mark.parametrize("name, rows, dtype", [("int4_g128", 1, torch.bfloat16), ("int4_g32", 1, torch.float16),
                                               ("nf4", 1, torch.bfloat16),
                                               ("int8", 1, torch.bfloat16), ("q4_k", 1, torch.bfloat16),
                                               ("int4_g32", 8, torch.bfloat16),
                                               ("q6_k", 8, torch.bfloat16), ("nf4", 8, torch.float16)])
def test_no_spills_and_wide_loads(name, rows, dtype):
    w = qw.prepare(FORMATS[name].pack(torch.randn(16, 256)))
    for source in {qw.cuda_source(w, dtype, rows), qw.cuda_source(replace(w, shape=(8192, 256)), dtype, rows)}:
        found = cu.compiled_sm90a(source)
        assert found["spills"] == found["stack"] == 0 and found["loads_128"] >= 3 and found["mma"] >= 2, found
        assert found["shared"] <= 48 * 1024, found


@needs_nvcc
def test_what_does_not_compile_is_named():
    with pytest.raises(InputError, match="(?s)twice does not compile.*FACTOR"):
        cu.compiled_sm90a(cu.CudaSource("twice", TWICE.text))
    with pytest.raises(InputError, match="unused|never referenced"):
        cu.compiled_sm90a(cu.CudaSource("idle", 'extern "C" __global__ void idle() { int i = 3; }'))


HOST = '''
extern "C" void nibbles_of(const unsigned *words, unsigned *out, int n, unsigned zero) {
  for (int i = 0; i < n; i++) for (int j = 0; j < 4; j++) out[4 * i + j] = nibbles(words[i], j, zero);
}
extern "C" void bytes_of(const unsigned *words, unsigned *out, int n) {
  for (int i = 0; i < n; i++) for (int j = 0; j < 2; j++) out[2 * i + j] = bytes(words[i], 2 * j);
}
extern "C" void scales_of(const unsigned short *bits, float *out, int n) {
  for (int i = 0; i < n; i++) out[i] = scale_of(bits[i]);
}
extern "C" void entries_of(const unsigned *words, unsigned *out, int n) {
  for (int i = 0; i < n; i++) for (int j = 0; j < 4; j++) out[4 * i + j] = entry(words[i], j);
}
'''


@needs_nvcc
@pytest.mark.parametrize("bf16", [0, 1])
def test_helpers_on_the_host_decode_as_the_formats_do(bf16):
    library = cu.host_library(f"#define BF16 {bf16}\n#include <cstring>\n" + qw.HELPERS + HOST)
    dtype = torch.bfloat16 if bf16 else torch.float16
    words = torch.randint(-2**31, 2**31, (512,), generator=torch.Generator().manual_seed(0)).int()
    words[:4] = torch.tensor([0, -1, 0x12345678, -0x12345678])
    at = lambda t: ctypes.c_void_p(t.data_ptr())
    codes = unpack_codes(words.view(torch.uint8), 4).view(-1, 8)             # as the formats lay them
    for offset in 0, 8, 15:
        magic, out = (0x4300 if bf16 else 0x6400) + offset, torch.empty(512, 4, dtype=torch.int32)
        library.nibbles_of(at(words), at(out), 512, ctypes.c_uint(magic * 0x10001))
        got, want = out.view(dtype).view(512, 4, 2), torch.stack([codes[:, :4], codes[:, 4:]], -1).float() - offset
        assert torch.equal(got.float(), want)
    out = torch.empty(512, 2, dtype=torch.int32)
    library.bytes_of(at(words), at(out), 512)
    assert torch.equal(out.view(dtype).view(512, 4).float(), words.view(torch.uint8).view(512, 4).float() - 128)
    out = torch.empty(512, 4, dtype=torch.int32)
    library.entries_of(at(words), at(out), 512)
    assert torch.equal(out, words.view(torch.uint8).view(512, 4).int() * 128)
    every, out = torch.arange(65536).to(torch.uint16), torch.empty(65536)
    library.scales_of(at(every), at(out), 65536)
    want = every.view(torch.float16).float()
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.nan_to_num(), want.nan_to_num())


def test_nvrtc_takes_the_sources():
    if find_spec("cuda") is None or find_spec("cuda.core") is None: pytest.skip("cuda-core is not installed")
    from cuda.core import Program, ProgramOptions
    w = qw.prepare(FORMATS["int4_g32"].pack(torch.randn(16, 256)))
    made = Program(qw.cuda_source(w, torch.bfloat16, 1).source, "c++", ProgramOptions(arch="sm_90a",
                                                                                      std="c++17")).compile("cubin")
    assert len(made.code) > 1000


def test_emulated_threads():
    x, y = torch.randn(100), torch.empty(100)
    cu.emulated(TWICE)((2, 1, 1), (64, 1, 1), [x, y, 100])
    assert torch.equal(y, 2 * x)
    cu.emulated(TWICE.but(FACTOR=3))((2, 1, 1), (64, 1, 1), [x, y, 100])
    assert torch.equal(y, 3 * x)


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["torch", "cupy"])
def test_a_kernel_is_loaded_and_run(way):
    if way == "cupy": pytest.importorskip("cupy")
    x = torch.randn(100, device="cuda")
    y = torch.empty_like(x)
    cu.loaded(TWICE, 0, way)((2, 1, 1), (64, 1, 1), [x, y, 100])
    assert torch.equal(y, 2 * x)


@pytest.mark.cuda
def test_what_a_gpu_cannot_compile_is_named():
    with pytest.raises(UnsupportedError, match="(?s)no compiler for twice.*FACTOR"): cu.loaded(cu.CudaSource("twice",
        TWICE.text), 0)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_a_kernel_says_so():
    with pytest.raises(UnsupportedError, match="takes an NVIDIA GPU"): cu.loaded(TWICE)
