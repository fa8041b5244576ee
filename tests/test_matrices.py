"Stores keep, ops compute: a stand-in for any matrix or stack of any family is asked, and nobody reads past it."
import copy

import pytest
import torch
from checks import some_tokens, worst
from models import SMALL, small_model
from torch import nn

from llm_workbench import Decoder
from llm_workbench.architecture.decoder import named_tensors
from llm_workbench.architecture.matrices import Linear, Matrix, Stack, swapped
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import InputError

CASES = [(family, i) for family, variants in SMALL.items() for i in range(len(variants))]


class Zeros(Matrix):
    "A matrix or stack that multiplies to zero."
    def __init__(self, given):
        super().__init__()
        self.shape, self.bias, self.device, self.dtype = given.dense().shape, None, given.device, given.dtype
    def forward(self, x, *which_and_ops): return x.new_zeros(*x.shape[:-1], self.shape[-2])
    def transposed(self, x, ops): return x.new_zeros(*x.shape[:-1], self.shape[-1])
    def dense(self, dtype=None): return torch.zeros(self.shape, dtype=dtype or self.dtype)


class Sum(Matrix):
    "A matrix or stack kept as the sum of two others."
    def __init__(self, given):
        super().__init__()
        self.first, self.second = copy.deepcopy(given), copy.deepcopy(given)
        with torch.no_grad():
            self.first.weight.mul_(0.25)
            self.second.weight.mul_(0.75)
        self.second.bias = None
    def forward(self, x, *which_and_ops): return self.first(x, *which_and_ops) + self.second(x, *which_and_ops)
    def transposed(self, x, ops): return self.first.transposed(x, ops) + self.second.transposed(x, ops)
    def dense(self, dtype=None): return self.first.dense(dtype) + self.second.dense(dtype)
    def rows(self, ids, dtype=None): return self.first.rows(ids, dtype) + self.second.rows(ids, dtype)
    bias = property(lambda self: self.first.bias)
    device, dtype = property(lambda self: self.first.device), property(lambda self: self.first.dtype)


class CopyOfOne(Sum):
    "A wrong stand-in: it forgets the second part when rows are looked up."
    def rows(self, ids, dtype=None): return self.first.rows(ids, dtype)


def matrices(decoder): return [name for name, m in decoder.named_modules() if isinstance(m, (Matrix, Stack))]
def with_one(decoder, name, make): return swapped(decoder, lambda n, module: make(module) if n == name else module)


@pytest.mark.parametrize("family,variant", CASES)
def test_a_matrix_of_zeros_changes_the_logits(family, variant):
    decoder, tokens = Decoder.from_transformers(small_model(family, variant)), some_tokens()
    with torch.inference_mode():
        want = decoder(tokens)
        unheard = [name for name in matrices(decoder) if torch.equal(with_one(decoder, name, Zeros)(tokens), want)]
    assert not unheard, f"somebody reads past {unheard}, or nobody multiplies by it"


@pytest.mark.parametrize("family,variant", CASES)
def test_a_matrix_kept_as_a_sum_changes_nothing(family, variant):
    decoder, tokens = Decoder.from_transformers(small_model(family, variant)), some_tokens()
    kept = dict(decoder.named_parameters())
    loss = lambda d: d(tokens).log_softmax(-1)[..., 0].mean()
    want, gradients = decoder(tokens).detach(), dict(zip(kept, torch.autograd.grad(loss(decoder), list(kept.values()))))
    largest = max(g.abs().max() for g in gradients.values())
    for name in matrices(decoder):
        twin = with_one(decoder, name, Sum)
        with torch.no_grad(): difference = worst(twin(tokens), want)
        assert difference <= 1e-4 * max(1, want.abs().max()), f"{name} kept as a sum: logits differ by {difference:.1e}"
        got, = torch.autograd.grad(loss(twin), [twin.get_submodule(name).first.weight])
        assert worst(got, gradients[f"{name}.weight"]) <= 1e-4 * largest, f"{name} kept as a sum: its gradient differs"


@pytest.mark.parametrize("family", SMALL)
def test_stand_ins_are_written_back_as_the_matrices_they_stand_for(family):
    decoder = Decoder.from_transformers(small_model(family))
    twin = swapped(decoder, lambda name, module: Sum(module) if isinstance(module, (Linear, Stack)) else module)
    want, got = decoder.transformers_state(), twin.transformers_state()
    assert want.keys() == got.keys() and max(worst(got[n], want[n]) for n in want) <= 1e-6


def test_a_stand_in_that_lies_about_rows_is_noticed():
    decoder, tokens = Decoder.from_transformers(small_model("llama", 1)), some_tokens()
    with torch.inference_mode():
        assert worst(with_one(decoder, "embed_tokens", CopyOfOne)(tokens), decoder(tokens)) > 1e-2


# --------------------------------------------------------------------------------------------------------- swapped
def test_a_new_tree_shares_parameters_and_nothing_else():
    decoder = Decoder.from_transformers(small_model("llama"))
    twin = decoder.with_ops(TORCH)
    assert all(a is b for a, b in zip(decoder.parameters(), twin.parameters()))
    twin.lm_head = Zeros(twin.lm_head)
    twin.layers[0].mlp.up_proj = Zeros(twin.layers[0].mlp.up_proj)
    hook = twin.layers[1].register_forward_hook(lambda *_: pytest.fail("a hook of the twin ran in the original"))
    with torch.inference_mode(): assert decoder(some_tokens()).abs().max() > 0
    hook.remove()
    assert isinstance(decoder.lm_head, Linear) and isinstance(decoder.layers[0].mlp.up_proj, Linear)


def test_a_tied_head_is_one_holder():
    decoder = Decoder.from_transformers(small_model("llama", 1))
    assert decoder.lm_head is decoder.embed_tokens
    twin = with_one(decoder, "embed_tokens", Zeros)
    assert twin.lm_head is twin.embed_tokens and isinstance(twin.lm_head, Zeros)
    assert "lm_head.weight" not in named_tensors(decoder)


def test_a_block_can_be_exchanged_whole():
    class Skip(nn.Module):
        def forward(self, x, step, ops): return x
    decoder, tokens = Decoder.from_transformers(small_model("llama")), some_tokens()
    none = swapped(decoder, lambda name, module: Skip() if name.rpartition(".")[0] == "layers" else module)
    with torch.inference_mode():
        plain = decoder.logits(decoder.norm(decoder.embed(tokens), decoder.ops))
        assert torch.equal(none(tokens), plain)


def test_what_make_returns_must_be_a_module():
    with pytest.raises(InputError, match="return a module"):
        swapped(Decoder.from_transformers(small_model("llama")), lambda name, module: None)


def test_a_router_in_float32_keeps_its_bias():
    from llm_workbench.architecture.moe import MoE
    torch.manual_seed(0)
    layer = MoE(16, 24, 4, 2, fp32=True, bias=True).bfloat16()
    with torch.no_grad(): layer.gate.bias.copy_(torch.tensor([0.0, 50.0, 0.0, 40.0]))
    logits, chosen, _ = layer.choose(torch.randn(5, 16).bfloat16(), TORCH)
    assert logits.dtype is torch.float32 and set(chosen.flatten().tolist()) == {1, 3}
