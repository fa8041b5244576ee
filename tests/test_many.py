"""A batch of texts with adapters of their own: the same as each alone and as peft's mixed batch; planted mistakes."""
import pytest
import torch

from models import small_model
from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import InputError
from llm_workbench.finetuning import many as module
from llm_workbench.finetuning.lora import LoRAConfig, adapt, load_adapter, save_adapter, trainable
from llm_workbench.finetuning.many import Many, many, per_row, using
from llm_workbench.inference.generation import generate_tokens
from llm_workbench.quantization.formats import quantize

KINDS = {"small": LoRAConfig(r=2, alpha=5.0), "wide": LoRAConfig(r=7, alpha=3.0, rslora=True),
         "some matrices": LoRAConfig(r=3, targets=("q_proj", "down_proj")), "pissa": LoRAConfig(r=2, init="pissa"),
         "head": LoRAConfig(r=2, targets=("lm_head", "v_proj"))}
TOKENS = torch.randint(97, (7, 9), generator=torch.Generator().manual_seed(1))
ASKED = ["wide", None, "small", "pissa", "wide", "some matrices", None]


def moved(decoder, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(decoder).values(): p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return decoder


def world(family="llama", variant=0, change=lambda d: d, kinds=KINDS):
    base = change(Decoder.from_transformers(small_model(family, variant)).double())
    names = [k for k in kinds if k != "head" or base.lm_head is not base.embed_tokens]
    return base, {name: moved(adapt(base, kinds[name], i).double(), i) for i, name in enumerate(names)}


def alone(base, adapted, asked, run):
    return torch.cat([run(base if name is None else adapted[name], i) for i, name in enumerate(asked)])


@torch.no_grad()
def apart(base, adapted, asked=ASKED):
    asked = [name for name in asked if name is None or name in adapted]
    together, tokens = many(base, adapted), TOKENS[:len(asked)]
    with using(together, asked): got = together(tokens)
    want = alone(base, adapted, asked, lambda d, i: d(tokens[i:i + 1]))
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("family, variant", [("llama", 0), ("llama", 1), ("gemma2", 0), ("phi", 1), ("mixtral", 0)])
def test_each_row_is_as_alone(family, variant):
    kinds = {"small": KINDS["small"]} if family == "phi" else KINDS       # its MLP has other names
    assert apart(*world(family, variant, kinds=kinds)) < 1e-6


@pytest.mark.parametrize("ops", [REFERENCE, TORCH])
def test_over_any_ops_and_packed_weights(ops):
    pack = lambda d: quantize(d.float(), "int8").with_ops(ops)
    assert apart(*world(change=pack, kinds={"small": KINDS["small"], "wide": KINDS["wide"]})) < 1e-5


def test_with_a_cache_at_every_split():
    base, adapted = world()
    together = many(base, adapted)
    with torch.no_grad(), using(together, ASKED):
        whole = together(TOKENS)
        for at in range(1, 9):
            cache = together.new_cache()
            parts = torch.cat([together(part, cache) for part in TOKENS.split([at, 9 - at], 1)], 1)
            assert (parts - whole).abs().max() < 1e-6 * whole.abs().max()


@pytest.mark.parametrize("counts", [[3, 1, 4, 2, 1, 1, 5], [1] * 7, [9, 1]])
def test_texts_of_one_packed_row_have_adapters_of_their_own(counts):
    base, adapted = world()
    together, rows = many(base, adapted), [TOKENS[i, :n] for i, n in enumerate(counts)]
    with torch.no_grad():
        with using(together, ASKED[:len(counts)], counts): got = together(torch.cat(rows)[None], pieces=counts)[0]
        want = alone(base, adapted, ASKED[:len(counts)], lambda d, i: d(rows[i][None])[0])
    assert (got - want).abs().max() < 1e-6 * want.abs().max()
    with pytest.raises(InputError, match="packed row"), torch.no_grad(), using(together, ASKED[:2], [2, 2]):
        together(TOKENS)


def test_nobody_chosen_is_the_base_to_the_bit():
    base, adapted = world()
    with torch.no_grad():
        together, want = many(base, adapted), base(TOKENS)
        assert torch.equal(together(TOKENS), want)
        with using(together, [None] * 7): assert torch.equal(together(TOKENS), want)
        assert torch.equal(base(TOKENS), want), "the base itself is untouched"


def test_written_texts_are_those_of_each_alone_when_rows_leave():
    base, adapted = world()
    together = many(base, adapted)
    prompts = [TOKENS[i, :3 + i].tolist() for i in range(6)]
    settings = dict(max_new_tokens=14, eos_ids=list(range(0, 97, 9)))
    for rows in generate_tokens(together, prompts, batch=per_row(ASKED[:6]), **settings): pass
    lengths = {len(row.tokens) for row in rows}
    assert len(lengths) > 1, "no row left before the others, so nothing was tested"
    for i, (row, name) in enumerate(zip(rows, ASKED)):
        for one in generate_tokens(base if name is None else adapted[name], [prompts[i]], **settings): pass
        assert row.tokens == one[0].tokens, (i, name)
    assert together.chosen.rows is None


def test_files_of_adapters(tmp_path):
    base, adapted = world(kinds={"small": KINDS["small"], "pissa": KINDS["pissa"]})
    for name, decoder in adapted.items(): save_adapter(decoder.float(), tmp_path / name)
    base = base.float()
    assert apart(base, {name: load_adapter(base, tmp_path / name) for name in adapted}) < 1e-5


def test_peft_mixes_to_the_same_scores(tmp_path):
    peft = pytest.importorskip("peft")
    hf = small_model("llama", 0)
    base = Decoder.from_transformers(hf)
    adapted = {name: moved(adapt(base, LoRAConfig(r=r)), r) for name, r in (("a", 2), ("b", 5))}
    for name, decoder in adapted.items(): save_adapter(decoder, tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    with torch.no_grad():
        want = theirs.eval()(TOKENS[:4], adapter_names=["b", "__base__", "a", "b"]).logits
        together = many(base, adapted)
        with using(together, ["b", None, "a", "b"]): got = together(TOKENS[:4])
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def added(self, x, ops, rows):
    out = self.base(x, ops)
    return out + x.reshape(len(x), -1, x.shape[-1]).bmm(self.A[rows]).bmm(self.B[rows]).view_as(out)

def neighbour(self, x, ops): return added(self, x, ops, self.chosen.rows.roll(1))
def the_first_for_all(self, x, ops): return added(self, x, ops, self.chosen.rows[:1].expand(len(x)))

def not_scaled(found, base):
    A, B = REAL(found, base)
    for i, m in enumerate(found):
        if m is not None: B[i] /= m.config.scale
    return A, B

def the_last_is_no_zero(found, base):
    A, B = REAL(found, base)
    A[-1], B[-1] = A[0], B[0]
    return A, B

REAL = module.stacked

@pytest.mark.parametrize("where, name, mutant", [
    (Many, "forward", neighbour), (Many, "forward", the_first_for_all), (module, "stacked", not_scaled),
    (module, "stacked", the_last_is_no_zero)], ids=lambda x: getattr(x, "__name__", str(x)))
def test_mistakes_are_noticed(where, name, mutant, monkeypatch):
    monkeypatch.setattr(where, name, mutant)
    assert apart(*world()) > 1e-3


def test_bad_input():
    base, adapted = world(kinds={"small": KINDS["small"]})
    together = many(base, adapted)
    with pytest.raises(InputError, match="2 adapters for 1"):
        generate_tokens(together, [[1, 2]], batch=per_row(["small", None]), max_new_tokens=4)
    with pytest.raises(InputError, match="many"):
        with using(base, [None]): pass
    with pytest.raises(InputError, match="name one for each row"):
        with using(together, [None]): together.hidden(TOKENS[:2])
    with pytest.raises(InputError, match="no single one"): together.layers[0].self_attn.q_proj.dense()
    with pytest.raises(InputError, match="each row of a batch"):
        with using(together, ["small"]): together.hidden(TOKENS[:2])
