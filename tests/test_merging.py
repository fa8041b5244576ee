"Merging: equal to peft and to a slow reference on shapes that hurt, from files as in memory, and what is refused."
import json
import math

import pytest
import torch
from models import SMALL, small_model
from transformers import LlamaConfig, LlamaForCausalLM

from llm_workbench import Decoder
from llm_workbench.architecture.decoder import named_tensors
from llm_workbench.architecture.ops import REFERENCE
from llm_workbench.errors import CheckpointError, InputError, SourceError, UnsupportedError
from llm_workbench.files.safetensors import INDEX, save_safetensors
from llm_workbench.finetuning import merging as module
from llm_workbench.finetuning.merging import (ADAPTERS, METHODS, VECTORS, cosines, merge, merge_adapters, merge_files,
                                              merge_models, partner, task_vector, turned)

peft = pytest.importorskip("peft")
PRUNES = {"magnitude_prune", "ties", "dare_linear", "dare_ties"}
HERE = dict(density=0.3)


def options_of(how): return HERE if how.removesuffix("_svd") in PRUNES else {}


def models_of(n=3, dtype=torch.float32, seed=0):
    "A base, and models near it: a matrix, a stack, a vector, a scalar, an empty tensor and whole numbers."
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed_tokens.weight": (13, 6), "layers.0.experts": (3, 5, 4), "norm.weight": (7,), "gate": (),
              "none": (0, 3)}
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tuned = [{name: t + 0.1 * torch.randn(t.shape, generator=g) for name, t in base.items()} for _ in range(n)]
    count = {"counts": torch.tensor([1, 2, 3])}
    return [{**{name: t.to(dtype) for name, t in m.items()}, **count} for m in (base, *tuned)]


# ---- a reference that works number by number

def slow(deltas, how, weights, density, keep):
    "One merged tensor from lists of numbers; `keep` says what chance left."
    n = deltas[0].numel()
    rows = [d.flatten().tolist() for d in deltas]
    if "dare" in how: rows = [[x / density if k else 0.0 for x, k in zip(r, ks)] for r, ks in zip(rows, keep)]
    elif how in PRUNES:
        for r in rows:
            for i in sorted(range(n), key=lambda i: -abs(r[i]))[int(density * n):]: r[i] = 0.0
    out = []
    for column in zip(*rows):
        if "ties" not in how: out.append(sum(w * x for w, x in zip(weights, column)))
        else:
            up = sum(column) >= 0
            agree = [(w, x) for w, x in zip(weights, column) if x and (x > 0) == up]
            out.append(sum(w * x for w, x in agree) / max(len(agree), 1))
    return torch.tensor(out).view_as(deltas[0])


def equals_slow(how, weights=(0.9, -0.4, 0.6), density=0.4):
    base, *tuned = models_of()
    options = dict(density=density) if how in PRUNES else {}
    got = merge(tuned, how, weights, base, **options)
    for name, t in base.items():
        if name in ("none", "counts"): continue
        chance = module.generator_for(0, name)
        keep = [torch.bernoulli(torch.full_like(t, density), generator=chance).flatten().tolist() for _ in tuned]
        want = t + slow([m[name] - t for m in tuned], how, weights, density, keep)
        assert torch.allclose(got[name], want, atol=1e-6), f"{how} differs at {name}"


@pytest.mark.parametrize("how", VECTORS)
def test_number_by_number(how): equals_slow(how)


def arcs():
    "Ends, sphere and plane of spherical interpolation."
    g = torch.Generator().manual_seed(1)
    for shape in ((40,), (6, 9), (2, 3, 4)):
        a, b = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
        b = b / b.norm() * a.norm()
        for t in (0.0, 0.3, 0.9, 1.0):
            on = turned(a, b, t)
            assert abs(on.norm() - a.norm()) < 1e-12, "off the sphere"
            angle = lambda x, y: 2 * torch.atan2((x - y).norm(), (x + y).norm())
            assert abs(angle(a, on) - t * angle(a, b)) < 1e-7, "not at the share of the angle"
        assert torch.equal(turned(a, 5 * b, 0.0), a) and torch.equal(turned(a, 5 * b, 1.0), 5 * b), "the ends"
        row = turned(a, 2 * b, 0.3, by_row=True).reshape(-1, shape[-1])[-1]
        last = [x.reshape(-1, shape[-1])[-1] for x in (a, 2 * b)]
        assert torch.allclose(row, turned(*last, 0.3)), "a row has its own angle"


def expectation():
    delta = torch.randn(50, generator=torch.Generator().manual_seed(2)).double()
    g = torch.Generator().manual_seed(3)
    mean = torch.stack([module.dropped(delta, 0.25, g) for _ in range(4000)]).mean(0)
    assert (mean - delta).norm() / delta.norm() < 1.5 * (3 / 4000) ** 0.5, "the expected value is not the old one"


def chance_by_name():
    base, tuned = ({n: torch.full((100,), x) for n in "abc"} for x in (0.0, 1.0))
    got = merge([tuned], "dare_linear", base=base, density=0.5)
    assert not torch.equal(got["a"], got["b"]), "two tensors lost the same numbers"
    alone = merge([{"c": tuned["c"]}], "dare_linear", base={"c": base["c"]}, density=0.5)
    assert torch.equal(alone["c"], got["c"]), "chance depends on other tensors"
    assert not torch.equal(got["c"], merge([tuned], "dare_linear", base=base, density=0.5, seed=1)["c"])


@pytest.mark.parametrize("check", [arcs, expectation, chance_by_name])
def test_properties(check): check()


# ---- peft

def after_seed(model, seed):
    "peft draws numbers when it makes room for the new adapter; the seed has to be set after that."
    make = model.base_model.inject_adapter
    def seeded(*args, **options):
        make(*args, **options)
        torch.manual_seed(seed)
    model.base_model.inject_adapter = seeded
    return model


def state(model, name): return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def llama_with(targets, ranks, alphas, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=24, intermediate_size=9, num_hidden_layers=2,
                                         num_attention_heads=3, num_key_value_heads=1))
    for name, target, r, alpha in zip("xyz", targets, ranks, alphas):
        settings = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=target)
        if name == "x": model = peft.get_peft_model(model, settings, name)
        else: model.add_adapter(name, settings)
    for name, p in model.named_parameters():
        if "lora_" in name: torch.nn.init.normal_(p, std=0.1)
    model.to(dtype)
    return model, [state(model, name) for name in "xyz"[:len(ranks)]]


ALL = ["q_proj", "k_proj", "down_proj", "up_proj"]
CASES = {
    "one rank": ([ALL] * 3, (4, 4, 4), (8, 16, 4), (0.5, 0.3, 1.1)),
    "negative": ([ALL] * 3, (3, 3, 3), (3, 6, 1), (1.0, -1.0, 0.7)),
    "some modules": ([ALL, ["q_proj"], ["down_proj", "q_proj"]], (2, 2, 2), (4, 2, 8), (0.4, 0.4, 0.4)),
    "ranks": ([ALL] * 3, (2, 5, 3), (4, 10, 3), (0.6, -0.2, 0.6)),
    "a single one": ([ALL], (4,), (8,), (-0.7,)),
    "more rank than the matrix": ([["k_proj"]] * 2, (9, 9), (9, 9), (0.5, 0.5)),
}


def equals_peft(how, case, elect="total", dtype=torch.float32):
    targets, ranks, alphas, weights = CASES[case]
    model, adapters = llama_with(targets, ranks, alphas, dtype=dtype)
    options = options_of(how) | (dict(elect=elect) if "ties" in how else {})
    theirs_options = {"majority_sign_method" if k == "elect" else k: v for k, v in options.items()}
    names = [*"xyz"][:len(ranks)]
    after_seed(model, 5).add_weighted_adapter(names, list(weights), "m", combination_type=how, **theirs_options)
    want = state(model, "m")
    got = merge_adapters(adapters, how, weights, [a / r for a, r in zip(alphas, ranks)],
                         seed=torch.Generator().manual_seed(5), **options)
    assert got.keys() == want.keys()
    for name in got:
        if not partner(name): continue
        a, b = (m[partner(name)] @ m[name] for m in (got, want))
        assert (a - b).abs().max() <= 1e-6, f"{how} differs from peft at {name} by {(a - b).abs().max():.1e}"
        if ADAPTERS[how][0] != "products":
            for n in (name, partner(name)): assert (got[n] - want[n]).abs().max() <= 1e-6, n


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ADAPTERS)
def test_adapters_are_those_of_peft(how, case):
    if case == "ranks" and ADAPTERS[how][0] == "factors":
        _, adapters = llama_with(*CASES[case][:3])
        with pytest.raises(InputError, match="different ranks"): merge_adapters(adapters, how, **options_of(how))
    elif case == "more rank than the matrix" and ADAPTERS[how][0] == "products":      # peft's factors do not fit then
        _, adapters = llama_with(*CASES[case][:3])
        got, exact = (merge_adapters(adapters, h, 0.5, **options_of(h)) for h in (how, "cat"))
        for name in filter(partner, got):
            assert got[name].shape == (9, 24) and got[partner(name)].shape == (8, 9) and got[name][8:].eq(0).all()
            if how == "svd": assert torch.allclose(got[partner(name)] @ got[name], exact[partner(name)] @ exact[name],
                                                   atol=1e-6)
    else: equals_peft(how, case)


@pytest.mark.parametrize("how", ["ties", "dare_ties_svd"])
def test_a_majority_of_signs(how):
    equals_peft(how, "negative", "frequency", torch.float64)   # float32 rounding tilts singular vectors by 1e-6


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear"])
def test_adapters_of_an_embedding(how):
    _, adapters = llama_with([["embed_tokens", "q_proj"]] * 2, (3, 3), (6, 3))
    assert any("lora_embedding_A" in name for name in adapters[0])
    model, _ = llama_with([["embed_tokens", "q_proj"]] * 2, (3, 3), (6, 3))
    after_seed(model, 5).add_weighted_adapter(["x", "y"], [0.8, -0.5], "m", combination_type=how, **options_of(how))
    want = state(model, "m")
    got = merge_adapters(adapters, how, (0.8, -0.5), (2, 1), seed=torch.Generator().manual_seed(5), **options_of(how))
    for name in filter(partner, got):
        assert (got[partner(name)] @ got[name] - want[partner(name)] @ want[name]).abs().max() <= 1e-6, name


def test_adapters_in_bfloat16_keep_their_dtype():
    _, adapters = llama_with([ALL] * 2, (4, 4), (8, 8))
    low = [{n: t.bfloat16() for n, t in a.items()} for a in adapters]
    for how in ADAPTERS:
        got, want = (merge_adapters(a, how, 0.5, 2.0, **options_of(how)) for a in (low, adapters))
        assert all(t.dtype == torch.bfloat16 for t in got.values())
        if how == "cat": assert all(torch.allclose(got[n].float(), want[n], atol=0.02) for n in got)


# ---- known mistakes

def no_election(deltas, elect="total"): return deltas != 0

def no_rescale(delta, density, generator=None):
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator)

def unit_length(a, b, t, by_row=False):
    a, b = a / a.norm(), b / b.norm()
    angle = torch.acos((a * b).sum().clamp(-1, 1))
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()

def one_angle(a, b, t, by_row=False, right=turned): return right(a, b, t)

def straight(a, b, t, by_row=False): return (1 - t) * a + t * b

def wrong_base(found, base):
    values = list(found.values())
    return (values, None) if base is None else (values[:-1], values[0])

def smallest(delta, density):
    keep = delta.abs().flatten().topk(int(density * delta.numel()), largest=False).indices
    return torch.zeros_like(delta).flatten().index_fill(0, keep, 1).view_as(delta) * delta

def largest_signed(delta, density):
    keep = delta.flatten().topk(int(density * delta.numel())).indices
    return torch.zeros_like(delta).flatten().index_fill(0, keep, 1).view_as(delta) * delta

def by_all(deltas, agree, weights):
    return module.weighted_sum([d * a for d, a in zip(deltas, agree)], weights) / len(deltas)

def same_chance(seed, name, device="cpu"): return torch.Generator().manual_seed(seed)

TIES, NEGATIVE = (lambda: equals_slow("ties")), (lambda: equals_peft("linear", "negative"))
MUTANTS = [
    ("agreeing", no_election, TIES), ("agreeing", no_election, lambda: equals_peft("ties_svd", "one rank")),
    ("dropped", no_rescale, expectation), ("dropped", no_rescale, lambda: equals_peft("dare_linear", "one rank")),
    ("turned", unit_length, None), ("turned", one_angle, None), ("turned", straight, None),
    ("split", wrong_base, lambda: equals_slow("task_arithmetic")), ("split", wrong_base, TIES),
    ("trimmed", smallest, TIES), ("trimmed", smallest, lambda: equals_peft("magnitude_prune", "one rank")),
    ("trimmed", largest_signed, TIES), ("disjoint_mean", by_all, TIES), ("generator_for", same_chance, chance_by_name),
    ("copysign", lambda size, sign: size, NEGATIVE), ("sqrt", lambda x: x, NEGATIVE),
]

@pytest.mark.parametrize("name, mutant, check", MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_mistakes_are_noticed(monkeypatch, name, mutant, check):
    monkeypatch.setattr(module, name, mutant)
    monkeypatch.setitem(globals(), name, mutant)
    with pytest.raises(AssertionError): (check or arcs)()


# ---- numbers

@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7, 0.0])
def test_slerp_of_nearly_parallel_float32(angle):
    g = torch.Generator().manual_seed(0)
    a, across = (torch.randn(2000, generator=g).double() for _ in range(2))
    across -= (across @ a) / (a @ a) * a
    b = math.cos(angle) * a + math.sin(angle) * across / across.norm() * a.norm()
    want = math.cos(0.3 * angle) * a + math.sin(0.3 * angle) * across / across.norm() * a.norm()
    got = turned(a.float(), b.float(), 0.3)
    assert (got - want).norm() / a.norm() < 1e-6


def test_slerp_where_there_is_no_arc():
    zero, x = torch.zeros(4), torch.randn(4, 3)
    assert torch.equal(turned(zero, zero, 0.3), zero) and turned(torch.tensor(2.0), torch.tensor(-1.0), 0.5) == 0.5
    x[2] = 0
    rows = turned(x, torch.ones(4, 3), 0.25, by_row=True)
    assert torch.allclose(rows[2], torch.full((3,), 0.25)) and rows.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", METHODS)
def test_dtypes(how, dtype):
    base, *tuned = models_of(2, dtype)
    start = base if how in VECTORS else None
    got, want = (merge(m, how, base=b, **options_of(how)) for m, b in (
        (tuned, start), ([{n: t.double() for n, t in m.items() if n != "counts"} for m in tuned],
                         start and {n: t.double() for n, t in base.items() if n != "counts"})))
    assert [t.dtype for t in got.values()] == [t.dtype for t in base.values()]
    if how.startswith("dare"): return                                        # another dtype draws other numbers
    for name in want: assert torch.allclose(got[name].double(), want[name], rtol=8e-3, atol=1e-3), name


def test_task_vectors():
    base, a, b = models_of(2)
    va, vb = task_vector(a, base), task_vector(b, base)
    assert "counts" not in va and cosines([va, va, vb])[0, 1] == pytest.approx(1) and cosines([va, vb]).shape == (2, 2)
    zero = {n: torch.zeros_like(t) for n, t in va.items()}
    assert cosines([va, zero])[0, 1] == 0
    opposite = {n: -t for n, t in va.items()}
    assert cosines([va, opposite])[0, 1] == pytest.approx(-1)
    with pytest.raises(InputError): cosines([])


@pytest.mark.parametrize("how", METHODS)
def test_one_merged_with_itself_is_itself(how):
    base, one = models_of(1)
    weights = {"ties": 1.0, "dare_ties": 1.0}.get(how, 0.5)                  # a mean, or half of two
    options = dict(density=1.0) if how in PRUNES else {}
    got = merge([one, one], how, weights, base if how in VECTORS else None, **options)
    assert all(torch.allclose(got[n], t, atol=1e-6) for n, t in one.items())


# ---- files

def written(folder, models, shards=False):
    paths = []
    for i, m in enumerate(models):
        path = folder / (f"m{i}" if shards else f"m{i}.safetensors")
        if shards:
            path.mkdir()
            names = list(m)
            parts = {f"part-{j}.safetensors": names[j::2] for j in range(2)}
            for file, own in parts.items(): save_safetensors({n: m[n] for n in own}, path / file)
            (path / INDEX).write_text(json.dumps({"weight_map": {n: f for f, own in parts.items() for n in own}}))
        else: save_safetensors(m, path)
        paths.append(path)
    return paths


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("how", METHODS)
def test_from_files_as_in_memory(tmp_path, how, shards):
    n = 2 if how == "slerp" else 3
    base, *tuned = models_of(n, torch.bfloat16)
    first, *paths = written(tmp_path, [base, *tuned], shards)
    started = how in VECTORS
    out = merge_files(paths, tmp_path / "out.safetensors", how, base=first if started else None, **options_of(how))
    want = merge(tuned, how, base=base if started else None, **options_of(how))
    save_safetensors(want, tmp_path / "want", {"format": "pt"})
    assert out.read_bytes() == (tmp_path / "want").read_bytes()
    from safetensors.torch import load_file
    assert load_file(out).keys() == base.keys()


def test_the_result_may_replace_an_input(tmp_path):
    _, *tuned = models_of(2)
    paths = written(tmp_path, tuned)
    merge_files(paths, paths[0])
    want = merge(tuned)
    from safetensors.torch import load_file
    assert all(torch.equal(t, want[n]) for n, t in load_file(paths[0]).items())


def test_what_goes_wrong_leaves_the_old_file(tmp_path, monkeypatch):
    base, *tuned = models_of(2)
    paths, out = written(tmp_path, [base, *tuned]), tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    tuned[1]["norm.weight"][3] = math.inf
    save_safetensors(tuned[1], paths[2])
    refused = [
        (lambda: merge_files(paths, out), InputError, "norm.weight of model 3"),
        (lambda: merge_files(paths[:2], out, base=paths[0]), InputError, "base"),
        (lambda: merge_files([paths[0], tmp_path / "absent.safetensors"], out), SourceError, "absent"),
        (lambda: merge_files([], out), InputError, "no models"),
        (lambda: merge_files(paths[:1], tmp_path / "no" / "out.safetensors"), SourceError, "Cannot write"),
    ]
    for wrong, error, text in refused:
        with pytest.raises(error, match=text): wrong()
    def cut(reader, name):
        with open(paths[1], "r+b") as f: f.truncate(reader.data_start + 8)
        return whole(reader, name)
    whole = module.read_tensor
    monkeypatch.setattr(module, "read_tensor", cut)
    with pytest.raises(CheckpointError, match="cut off"): merge_files(paths[:2], out)
    assert out.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))


LLAMA = dict(model_type="llama", vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=1)

@pytest.mark.parametrize("change, text", [
    (dict(config=LLAMA | dict(rope_theta=5e5)), "rope_parameters"),
    (dict(config=LLAMA | dict(vocab_size=14)), "vocab_size"),
    (dict(config=LLAMA | dict(model_type="mistral")), "families"), (dict(words={"a": 1, "b": 0}), "vocabularies"),
    (dict(config=LLAMA | dict(max_position_embeddings=99)), None), (dict(config=None), None), (dict(words=None), None),
], ids=lambda x: str(x)[:40])
def test_folders_that_say_what_they_are(tmp_path, change, text):
    _, *tuned = models_of(2)
    for i, m in enumerate(tuned):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        save_safetensors(m, folder / "model.safetensors")
        said = dict(config=LLAMA, words={"a": 0, "b": 1}) | (change if i else {})
        if said["config"]: (folder / "config.json").write_text(json.dumps(said["config"]))
        if said["words"]: (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": said["words"]}}))
    run = lambda: merge_files([tmp_path / "m0", tmp_path / "m1"], tmp_path / "out.safetensors")
    if text is None: assert run().is_file()
    else:
        with pytest.raises(InputError, match=text): run()


# ---- decoders

@torch.no_grad()
@pytest.mark.parametrize("family, variant", [("llama", 1), ("mixtral", 0), ("deepseek_v3", 0), ("gpt_oss", 0)])
def test_decoders_are_merged_as_transformers_would_be(family, variant):
    "Tied heads, stacks of experts, buffers, sinks: the mean of the state dicts of transformers."
    assert SMALL[family][variant] is not None
    a, b = (small_model(family, variant, seed=s) for s in (0, 1))
    ours = merge_models([Decoder.from_transformers(m, REFERENCE) for m in (a, b)], "linear", (0.3, 0.7))
    mixed = {n: 0.3 * t + 0.7 * b.state_dict()[n] if t.is_floating_point() else t for n, t in a.state_dict().items()}
    mean = small_model(family, variant)
    mean.load_state_dict(mixed)
    tokens = torch.randint(0, 97, (2, 14), generator=torch.Generator().manual_seed(0))
    want = Decoder.from_transformers(mean, REFERENCE)(tokens)
    assert torch.allclose(ours(tokens), want, atol=1e-4) and ours.source == Decoder.from_transformers(a).source
    assert (ours.lm_head is ours.embed_tokens) == a.config.tie_word_embeddings


def test_decoders_that_cannot_be_merged():
    llama, mistral = (Decoder.from_transformers(small_model(f), REFERENCE) for f in ("llama", "mistral"))
    from llm_workbench.quantization.formats import quantize
    from llm_workbench.quantization.round_to_nearest import Integers
    packed = quantize(llama, Integers(4, 2))
    for wrong, error, text in [
        (lambda: merge_models([llama, mistral]), InputError, "model 2"),
        (lambda: merge_models([llama, packed]), UnsupportedError, "of model 2 is a PackedMatrix"),
        (lambda: merge_models([llama, llama], "ties", base=packed, density=0.5), UnsupportedError, "the base"),
        (lambda: merge_models([llama, named_tensors(llama)]), InputError, "not a Decoder"),
        (lambda: merge([llama, llama]), InputError, "merge_models"),
        (lambda: merge_models([]), InputError, "no models"),
    ]:
        with pytest.raises(error, match=text): wrong()


# ---- bad input

BASE, A, B = models_of(2)
def with_(m, name, t): return {**m, name: t}
LORA = {"m.q.lora_A.weight": torch.ones(2, 5), "m.q.lora_B.weight": torch.ones(3, 2)}
WRONG = {
    "no such method": (lambda: merge([A], "tie", base=BASE), UnsupportedError, "Did you mean 'ties'"),
    "no tensors": (lambda: merge([{}, {}]), InputError, "no tensors"),
    "not a tensor": (lambda: merge([A, with_(B, "gate", 1.0)]), InputError, "'gate' is a float"),
    "no data": (lambda: merge([A, with_(B, "gate", torch.empty((), device="meta"))]), InputError, "gate"),
    "shape": (lambda: merge([A, with_(B, "layers.0.experts", torch.ones(3, 4, 5))]), InputError, "layers.0.experts"),
    "vocabulary": (lambda: merge([A, with_(B, "embed_tokens.weight", torch.ones(14, 6))]), InputError, "vocabularies"),
    "missing": (lambda: merge([A, {n: t for n, t in B.items() if n != "gate"}]), InputError,
                "model 2 has no tensor 'gate'"),
    "surplus": (lambda: merge([A, with_(B, "more", torch.ones(1))]), InputError, "model 1 has no tensor 'more'"),
    "missing in the base": (lambda: merge([A], "ties", base={"gate": BASE["gate"]}, density=1), InputError,
                            "the base has no"),
    "dtypes": (lambda: merge([A, with_(B, "gate", B["gate"].half())]), InputError, "gate is torch.float16 in model 2"),
    "float8": (lambda: merge([with_(m, "gate", m["gate"].to(torch.float8_e4m3fn)) for m in (A, B)]),
               UnsupportedError, "gate"),
    "whole numbers": (lambda: merge([A, with_(B, "counts", torch.tensor([1, 2, 4]))]), UnsupportedError, "counts"),
    "NaN": (lambda: merge([A, with_(B, "norm.weight", torch.full((7,), math.nan))]), InputError,
            "norm.weight of model 2"),
    "overflow": (lambda: merge([{"x": torch.full((2,), 6e4).half()}], "task_arithmetic", 9.0,
                               {"x": torch.zeros(2).half()}), InputError, "x overflows torch.float16"),
    "sum": (lambda: merge([A, B], "linear", [0.5, 0.6]), InputError, "sum to 1.1"),
    "count": (lambda: merge([A, B], "linear", [1.0]), InputError, "1 weights for 2"),
    "not finite": (lambda: merge([A, B], "ties", [1, math.nan], BASE, density=0.5), InputError, "finite"),
    "words": (lambda: merge([A, B], "linear", "ab"), InputError, "weights='ab'"),
    "slerp of one": (lambda: merge([A], "slerp"), InputError, "two models"),
    "beyond the arc": (lambda: merge([A, B], "slerp", (1.5, -0.5)), InputError, "slerp"),
    "no base": (lambda: merge([A, B], "task_arithmetic"), InputError, "give the base"),
    "a base too many": (lambda: merge([A, B], "linear", base=BASE), InputError, "leave the base out"),
    **{f"density {d}": (lambda d=d: merge([A], "dare_linear", base=BASE, density=d), InputError, "density")
       for d in (0, 1.1, -0.1, math.nan, None, "half")},
    "density of a mean": (lambda: merge([A, B], "linear", density=0.5), InputError, "leave the density out"),
    "election": (lambda: merge([A], "ties", base=BASE, density=1, elect="mean"), InputError, "elect"),
    "seed": (lambda: merge([A], "dare_ties", base=BASE, density=1, seed="x"), InputError, "seed"),
    "option": (lambda: merge([A], "ties", base=BASE, densty=1), InputError, "densty"),
    "no adapters": (lambda: merge_adapters([]), InputError, "no adapters"),
    "an empty adapter": (lambda: merge_adapters([{}]), InputError, "adapter 1 has no"),
    "no such way": (lambda: merge_adapters([LORA], "tiessvd"), UnsupportedError, "ties_svd"),
    "no B": (lambda: merge_adapters([LORA, dict([*LORA.items()][:1])]), InputError, "adapter 2 has no partner"),
    "no A": (lambda: merge_adapters([dict([*LORA.items()][1:])]), InputError, "adapter 1"),
    "DoRA": (lambda: merge_adapters([LORA | {"m.q.lora_magnitude_vector": torch.ones(3)}]), UnsupportedError,
             "magnitude"),
    "a saved module": (lambda: merge_adapters([LORA | {"m.head.weight": torch.ones(3, 2)}]), UnsupportedError,
                       "m.head.weight"),
    "packed factors": (lambda: merge_adapters([{n: t.to(torch.int8) for n, t in LORA.items()}]), UnsupportedError,
                       "lora_A"),
    "NaN in a factor": (lambda: merge_adapters([{n: t * math.nan for n, t in LORA.items()}]), InputError,
                        "lora_A.weight of adapter 1"),
    "ranks within": (lambda: merge_adapters([LORA | {"m.q.lora_B.weight": torch.ones(3, 4)}]), InputError, "partner"),
    "other models": (lambda: merge_adapters([LORA, LORA | {"m.q.lora_A.weight": torch.ones(2, 6)}]), InputError,
                     "lora_A"),
    "dtypes of factors": (lambda: merge_adapters([LORA, {n: t.half() for n, t in LORA.items()}]), InputError,
                          "one dtype"),
    "rank without svd": (lambda: merge_adapters([LORA, LORA], "cat", rank=3), InputError, "rank=3"),
    "rank 0": (lambda: merge_adapters([LORA, LORA], "svd", rank=0), InputError, "rank=0"),
    "no density": (lambda: merge_adapters([LORA, LORA], "ties_svd"), InputError, "density"),
    "scalings": (lambda: merge_adapters([LORA, LORA], scaling=[1.0]), InputError, "1 weights for 2"),
}

@pytest.mark.parametrize("wrong, error, text", WRONG.values(), ids=WRONG)
def test_what_has_no_meaning_is_refused(wrong, error, text):
    with pytest.raises(error, match=text): wrong()
