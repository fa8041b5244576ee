"Whole decoders on Triton's kernels: two or three families interpreted on a CPU, all of them compiled on a GPU."
import pytest
import torch
from checks import cached_is_uncached, some_tokens, worst
from kernel_checks import DEVICE, as_accurate
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE, TORCH, compare_ops
from llm_workbench.inference.generation import Batch
from llm_workbench.kernels.triton_ops import TRITON, who
from llm_workbench.quantization.formats import quantize

pytestmark = pytest.mark.triton
FEW = ["llama", "gemma2", "gpt_neox"]
EXPERTS = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
FAMILIES = FEW if DEVICE == "cpu" else list(SMALL)
EVERY = [(family, i) for family in FAMILIES for i in range(1 if DEVICE == "cpu" else len(SMALL[family]))]


@pytest.fixture(params=EVERY, ids=[f"{family}-{i}" for family, i in EVERY])
def decoder(request):
    torch.backends.cuda.matmul.allow_tf32 = False
    return Decoder.from_transformers(small_model(*request.param)).to(DEVICE)


class Routing:
    """The experts that a run chose, for runs in narrower numbers: there a router flips where two experts nearly tie,
    and the logits of that token say nothing about kernels. (Sparsemixer chooses for itself.)"""
    def __init__(self): self.chosen = []

    def noted(self, logits, top_k, **options):
        chosen, weights = REFERENCE.route(logits, top_k, **options)
        self.chosen.append(chosen)
        return chosen, weights

    def again(self):
        kept = iter(self.chosen)
        def route(logits, top_k, *, bias=None, **options):
            wanted = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, next(kept), 1e4)
            return REFERENCE.route(logits, top_k, bias=wanted, **options)
        return route


def scaled(got, want): return worst(got, want) / want.abs().max().item()


@torch.inference_mode()
def test_logits_equal_the_reference(decoder):
    tokens = some_tokens(T=9).to(DEVICE)
    mine, plain = (decoder.with_ops(ops)(tokens) for ops in (TRITON, REFERENCE))
    assert scaled(mine, plain) <= 1e-4


@pytest.mark.skipif(DEVICE == "cuda", reason="the test above has all families there")
@pytest.mark.parametrize("family", EXPERTS)
@torch.inference_mode()
def test_experts_equal_the_reference(family):
    tokens, decoder = some_tokens(B=1, T=7), Decoder.from_transformers(small_model(family))
    mine, plain = (decoder.with_ops(ops)(tokens) for ops in (TRITON, REFERENCE))
    assert scaled(mine, plain) <= 1e-4


def test_a_cache_changes_nothing(decoder):
    tokens = some_tokens(T=4 if DEVICE == "cpu" else 14).to(DEVICE)
    cached_is_uncached(decoder.with_ops(TRITON), lambda d: d.new_cache(context=tokens.shape[1]), tokens)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision_is_as_accurate_as_the_reference(decoder, dtype):
    tokens, routing = some_tokens().to(DEVICE), Routing()
    want = decoder.to(dtype).double().with_ops(REFERENCE.but(route=routing.noted))(tokens)
    if not want.isfinite().all(): pytest.skip("no finite logits")
    narrow = decoder.to(dtype)
    mine, plain = (narrow.with_ops(ops.but(route=routing.again()))(tokens) for ops in (TRITON, REFERENCE))
    if not plain.isfinite().all(): pytest.skip(f"these weights are too large for {dtype}")
    as_accurate(mine, want, plain, factor=3.0, floor=4.0)


@pytest.mark.parametrize("family", FEW)
@torch.inference_mode()
def test_bfloat16_is_as_accurate_as_the_reference(family):
    tokens, decoder = some_tokens(B=1, T=5).to(DEVICE), Decoder.from_transformers(small_model(family)).to(DEVICE)
    want = decoder.to(torch.bfloat16).double().with_ops(REFERENCE)(tokens)
    narrow = decoder.to(torch.bfloat16)
    mine, plain = (narrow.with_ops(ops)(tokens) for ops in (TRITON, REFERENCE))
    as_accurate(mine, want, plain, factor=3.0, floor=4.0)


def test_the_derivative_of_a_model_equals_the_reference():
    tokens, grads = some_tokens(B=1, T=6).to(DEVICE), []
    for ops in (TRITON, REFERENCE):
        decoder = Decoder.from_transformers(small_model("qwen3")).to(DEVICE).with_ops(ops)
        for p in decoder.parameters(): p.requires_grad_(True)
        decoder(tokens).square().mean().backward()
        grads.append({name: p.grad for name, p in decoder.named_parameters()})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, want in grads[1].items():
        if want is not None: assert scaled(grads[0][name], want) <= 1e-3, name


def test_each_op_on_the_shapes_of_a_model():
    decoder = Decoder.from_transformers(small_model("llama")).to(DEVICE)
    found = compare_ops(TRITON, decoder.config, n_tokens=5 if DEVICE == "cpu" else 256, past=7, device=DEVICE)
    assert found["relative error"].max() <= 1e-5, found
    assert set(found.index.get_level_values("op")) == set(vars(TRITON))


@torch.inference_mode()
def test_recorded_experts_are_taken_again():
    logits, routing = torch.randn(4, 6), Routing()
    options = dict(score="sigmoid", scale=2.0)
    want = routing.noted(logits, 2, **options)
    other = -logits                                                     # would choose otherwise
    chosen, weights = routing.again()(other, 2, **options)
    assert torch.equal(chosen.sort().values, want[0].sort().values)
    kept = other.sigmoid().gather(1, chosen)
    assert torch.allclose(weights, 2 * kept / kept.sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["int8", "int4_g32"])
@torch.inference_mode()
def test_packed_weights(name):
    model = small_model("llama", changes=dict(hidden_size=96, intermediate_size=96))
    tokens = some_tokens(B=1, T=3).to(DEVICE)
    packed = quantize(Decoder.from_transformers(model).to(DEVICE), name)
    assert scaled(packed.with_ops(TRITON)(tokens), packed.with_ops(REFERENCE)(tokens)) <= 1e-4


def test_the_set_says_who_runs():
    assert who(TRITON)["swiglu"] == "kernels.bytes.swiglu" and who(REFERENCE)["rotate"] == "architecture.rope.rotate"
    assert who(TRITON).keys() == who(REFERENCE).keys()


def test_what_a_model_calls_a_wrong_kernel_changes():
    "The comparison above would notice a kernel that is wrong in one sign or one rounding."
    decoder, tokens = Decoder.from_transformers(small_model("llama")).to(DEVICE), some_tokens(B=1, T=5).to(DEVICE)
    want = decoder.with_ops(REFERENCE)(tokens)
    wrong = {"rotate": lambda x, c, s: TRITON.rotate(x, c, -s), "swiglu": lambda g, u: TRITON.swiglu(u, g),
             "rms_norm": lambda x, w, eps: TRITON.rms_norm(x, w, 1e3 * eps)}
    for name, function in wrong.items():
        assert scaled(decoder.with_ops(TRITON.but(**{name: function}))(tokens), want) > 1e-4, name


def test_the_lobby_takes_them_on_a_gpu():
    from llm_workbench.lobby import batches_for, fastest_ops
    assert fastest_ops("cuda") is (TRITON if DEVICE == "cuda" else TORCH)
    assert batches_for(torch.device("cuda")).__name__ == "RecordedBatch" and batches_for(torch.device("cpu")) is Batch
