"What matrices see: equal to hooks on transformers, in every family, while the logits stay the same to the bit."
import pytest
import torch
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.architecture.matrices import Matrix, Stack
from llm_workbench.architecture.ops import REFERENCE
from llm_workbench.errors import InputError
from llm_workbench.quantization import calibration
from llm_workbench.quantization.calibration import CALIBRATION, HELD_OUT, Inputs, collect, recorded, windows
from llm_workbench.quantization.formats import packs, quantize, stacked
from llm_workbench.quantization.round_to_nearest import Integers

FAMILIES = sorted(SMALL)
EXPERTS = ["mixtral", "qwen2_moe", "deepseek_v3", "dbrx", "gpt_oss"]


def some_tokens(*shape, seed=0): return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))
def decoder_of(family, variant=0): return Decoder.from_transformers(small_model(family, variant), REFERENCE)
def flat(inputs): return [i for seen in inputs.values() for i in (seen if isinstance(seen, list) else [seen])]


def hooked(model, tokens):
    "Inputs of every nn.Linear of a transformers model, by its name."
    seen = {}
    def keep(name):
        def hook(module, args): seen[name] = args[0].flatten(0, -2).double()
        return hook
    hooks = [m.register_forward_pre_hook(keep(n.removeprefix("model."))) for n, m in model.named_modules()
             if isinstance(m, torch.nn.Linear)]
    with torch.inference_mode(): model(tokens)
    for hook in hooks: hook.remove()
    return seen


def faults(collect, family="llama"):
    "Which of the numbers of `collect` are not those of hooks on the same model in transformers."
    model, tokens = small_model(family), some_tokens(3, 14)
    want, got = hooked(model, tokens), collect(Decoder.from_transformers(model, REFERENCE), [tokens[:1], tokens[1:]])
    assert len(want.keys() & got.keys()) > 10
    found = set()
    for name in want.keys() & got.keys():
        x, seen = want[name], got[name]
        def near(a, b): return torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        if seen.rows != len(x): found.add("rows")
        if not near(seen.gram, x.T @ x / len(x)): found.add("gram")
        if not near(seen.importance, x.square().mean(0)): found.add("importance")
        if not near(seen.mean_abs, x.abs().mean(0)): found.add("mean_abs")
        if not near(seen.largest, x.abs().amax(0)): found.add("largest")
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "olmo2", "granite", "cohere"])
def test_equals_hooks_on_transformers(family): assert faults(collect, family) == set()


class Forgets(calibration._Sums):
    "Wrong: begins anew with every batch."
    def add(self, x): self.gram, self.rows = None, 0; super().add(x)

class Coarse(calibration._Sums):
    "Wrong: sums in bfloat16."
    def add(self, x): super().add(x); self.gram = self.gram.bfloat16().float()

class Signed(calibration._Sums):
    "Wrong: means of x, not of |x|."
    def add(self, x): super().add(x); self.total -= x.flatten(0, -2).abs().sum(0) - x.flatten(0, -2).sum(0)

class LastLargest(calibration._Sums):
    "Wrong: the largest of the last batch."
    def add(self, x): super().add(x); self.largest = x.flatten(0, -2).abs().amax(0)

class SharesAll(calibration._Listener):
    "Wrong: takes every input of the same shape for the same one."
    def saw(self, name, x):
        shapes = vars(self).setdefault("shapes", {})
        if x.shape in shapes: self.sums[name] = shapes[x.shape]
        else:
            super().saw(name, x)
            shapes[x.shape] = self.sums[name]


@pytest.mark.parametrize("part, mutant", [("_Sums", Forgets), ("_Sums", Coarse), ("_Sums", Signed),
                                          ("_Sums", LastLargest), ("_Listener", SharesAll)])
def test_wrong_sums_are_noticed(monkeypatch, part, mutant):
    monkeypatch.setattr(calibration, part, mutant)
    assert faults(collect)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_no_logit_changes_and_every_matrix_is_heard(family):
    decoder, tokens = decoder_of(family), some_tokens(2, 9)
    twin, found = recorded(decoder, calibration._Listener())
    assert torch.equal(twin(tokens), decoder(tokens)), "recording changed a logit"
    cache = twin.new_cache()
    parts = torch.cat([twin(t, cache) for t in tokens.split([4, 5], 1)], 1)
    assert (parts - decoder(tokens)).abs().max() < 1e-3 * parts.abs().max()
    got = collect(decoder, [tokens])
    assert got.keys() == found.keys() == {n for n, m in decoder.named_modules()
                                          if isinstance(m, (Matrix, Stack)) and packs(n, m)}
    for name, seen in got.items():
        module = decoder.get_submodule(name)
        assert isinstance(seen, list) == isinstance(module, Stack), name
        for i in flat({name: seen}):
            assert i.gram.shape == (module.weight.shape[-1],) * 2 and i.gram.isfinite().all()
            assert i.rows <= 18 * 6 and torch.allclose(i.gram, i.gram.T)
        unused = name == "embed_tokens" and not decoder.config.tie_word_embeddings
        assert unused or any(i.rows for i in flat({name: seen})), f"{name} was not heard"


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_share_the_tokens(family):
    decoder, tokens = decoder_of(family), some_tokens(1, 3)
    got = collect(decoder, [tokens])
    k = decoder.config.num_experts_per_tok
    stacks = [n for n in got if n.endswith("experts.gate_up_proj")]
    for name in stacks:
        assert sum(i.rows for i in got[name]) == 3 * k and all(i.rows <= 3 for i in got[name])
        assert [i.rows for i in got[name]] == [i.rows for i in got[name.replace("gate_up", "down")]]
    assert stacks
    unseen = [i for n in stacks for i in got[n] if not i.rows]
    assert all(not i.importance.any() for i in unseen)
    with torch.no_grad(): assert quantize(decoder, Integers(4, trials=2), importance=got)(tokens).isfinite().all()


@torch.no_grad()
def test_latents_are_the_inputs_of_both_halves_of_latent_attention():
    decoder, tokens = decoder_of("deepseek_v2"), some_tokens(2, 7)
    kept = []
    norm = decoder.layers[0].self_attn.kv_a_norm
    handle = norm.register_forward_hook(lambda m, args, out: kept.append(out.flatten(0, 1)))
    got = collect(decoder, [tokens])
    handle.remove()
    k, v = got["layers.0.self_attn.k_b"], got["layers.0.self_attn.v_b"]
    assert len({id(i) for i in k}) == 1 and len({id(i) for i in v}) == len(v) == 6
    assert torch.allclose(k[0].gram, kept[0].T @ kept[0] / 14, rtol=1e-4, atol=1e-5) and k[0].rows == 14
    assert all(i.rows == 14 for i in v) and not torch.allclose(v[0].gram, v[1].gram)
    # what a change of k_b does to the scores of independent queries is what its Gram matrix says
    change = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    queries = torch.randn(4000, 12, generator=torch.Generator().manual_seed(1))
    measured = (queries @ change @ kept[0].T).square().mean()
    assert abs(measured / (change @ k[0].gram * change).sum() - 1) < 0.1


def test_the_same_inputs_are_kept_once():
    got = collect(decoder_of("llama"), [some_tokens(2, 9), some_tokens(1, 5)])
    block = "layers.1.self_attn."
    assert got[block + "q_proj"] is got[block + "k_proj"] is got[block + "v_proj"] and got[block + "q_proj"].rows == 23
    assert got["layers.1.mlp.gate_proj"] is got["layers.1.mlp.up_proj"]
    assert got[block + "o_proj"] is not got[block + "q_proj"] is not got["layers.0.self_attn.q_proj"]


def test_streams_do_not_matter_and_samples_are_rows():
    decoder, tokens = decoder_of("llama"), some_tokens(6, 20)
    once, often = collect(decoder, [tokens], keep=8), collect(decoder, (t for t in tokens), keep=8)
    for name, a in once.items():
        b = often[name]
        assert a.rows == b.rows and torch.allclose(a.gram, b.gram, rtol=1e-3, atol=1e-3 * a.gram.abs().max().item())
        if a.rows: assert a.sample.shape == b.sample.shape == (8, len(a.gram))
        assert torch.allclose(a.sample, b.sample, atol=1e-3), "the same rows are drawn, however they come"
    assert collect(decoder, [tokens[0, :3]], keep=8)["lm_head"].sample.shape[0] == 3
    assert collect(decoder, [tokens[0]])["lm_head"].sample is None


def test_chosen_matrices_only_and_packed_ones_too():
    decoder, tokens = decoder_of("llama"), some_tokens(2, 9)
    def only(name, module): return "down" in name
    assert collect(decoder, [tokens], choose=only).keys() == {f"layers.{i}.mlp.down_proj" for i in range(3)}
    packed = quantize(decoder, Integers(8, "row"))
    a, b = collect(decoder, [tokens]), collect(packed, [tokens])
    assert all(torch.allclose(a[n].gram, b[n].gram, rtol=0.3, atol=0.1 * a[n].gram.abs().max().item()) for n in a)


def test_half_precision_models_are_summed_in_float32():
    decoder = decoder_of("llama").to(torch.bfloat16)
    seen = flat(collect(decoder, [some_tokens(2, 9)], keep=2))
    assert all(t.dtype == torch.float32 for i in seen for t in (i.gram, i.mean_abs, i.largest, i.sample))


WRONG = {"nothing": [], "floats": [torch.ones(1, 3)], "too large": [torch.tensor([97])],
         "negative": [torch.tensor([-1])], "empty": [torch.zeros(1, 0, dtype=torch.int64)],
         "three dimensions": [some_tokens(1, 2, 3)], "a list": [[1, 2]]}

@pytest.mark.parametrize("batches", WRONG.values(), ids=WRONG)
def test_text_that_is_none(batches):
    with pytest.raises(InputError): collect(decoder_of("llama"), batches)


@torch.no_grad()
def test_a_layer_that_overflows_is_named():
    decoder = decoder_of("llama")
    decoder.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(InputError, match="layers.1.mlp.down_proj"): collect(decoder, [some_tokens(1, 4)])


def test_windows():
    pieces = windows(list(range(23)), 5, batch=3)
    assert [tuple(p.shape) for p in pieces] == [(3, 5), (1, 5)] and pieces[0].dtype == torch.int64
    assert pieces[1][0, -1] == 19
    with pytest.raises(InputError): windows([1, 2], 3)


def test_the_two_texts_share_no_line():
    lines = [{line for line in text.split("\n") if len(line) > 20} for text in (CALIBRATION, HELD_OUT)]
    assert not lines[0] & lines[1] and all(len(text) > 1500 for text in (CALIBRATION, HELD_OUT))


def test_importance_of_another_model_is_refused_before_anything_is_packed():
    decoder, experts = decoder_of("llama"), decoder_of("mixtral")
    seen = collect(decoder, [some_tokens(1, 5)])
    good = dict(seen)
    for name in ("layers.0.mlp.up_proj", "lm_head"):
        small = Inputs(torch.eye(3), torch.ones(3), torch.ones(3), 4)
        lacks = {n: i for n, i in good.items() if n != name}
        for wrong in (lacks, lacks | {name: [good[name]]}, lacks | {name: small}):
            with pytest.raises(InputError, match=name): quantize(decoder, "int8", importance=wrong)
    seen, stack = collect(experts, [some_tokens(1, 5)]), "layers.1.mlp.experts.down_proj"
    for wrong in (seen[stack][:-1], seen[stack][0], []):
        with pytest.raises(InputError, match=stack): quantize(experts, "int8", importance=seen | {stack: wrong})
    with pytest.raises(InputError): stacked([Integers(4, "tensor").pack(torch.randn(2, 8))] * 2)


@torch.no_grad()
def test_weighed_scales_lower_the_error_of_outputs():
    "On inputs of very different sizes, the search weighed by importance is better where it counts, worse in weights."
    generator = torch.Generator().manual_seed(0)
    weight, order = torch.randn(64, 128, generator=generator), torch.randperm(128, generator=generator)
    x = torch.randn(500, 128, generator=generator) * torch.logspace(-1.5, 1.5, 128)[order]
    sums = calibration._Sums()
    sums.add(x)
    format, seen = Integers(3, 32, trials=16), sums.inputs(128)
    def errors(w): return ((w - weight) @ x.T).square().sum(), (w - weight).square().sum()
    (plain, of_weights), (weighed, more) = (errors(format.pack(weight, i).unpack()) for i in (None, seen.importance))
    assert weighed < 0.8 * plain and more > of_weights
    mutant = errors(format.pack(weight, 1 / seen.importance).unpack())[0]
    assert mutant > plain
