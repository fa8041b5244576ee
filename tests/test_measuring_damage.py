"Perplexity by four customs, divergence against plain float64, intervals that keep their promise, and the search."
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import small_model

from llm_workbench import Decoder
from llm_workbench.architecture.ops import REFERENCE
from llm_workbench.errors import InputError
from llm_workbench.quantization import measuring_damage as module
from llm_workbench.quantization.calibration import collect
from llm_workbench.quantization.formats import FORMATS, quantize
from llm_workbench.quantization.measuring_damage import (
    Score,
    apart,
    compare,
    costs_of,
    felt,
    halves,
    interval,
    joined,
    layers,
    predict,
    quadratic,
    replaced,
    rolling,
    rounded,
    score,
    search,
    size_of,
    sliding,
    spread_out,
)


@pytest.fixture(scope="module")
def model(): return small_model("llama")
@pytest.fixture(scope="module")
def decoder(model): return Decoder.from_transformers(model, REFERENCE)
def some_ids(n, seed=0): return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# the four customs, written again as the programs do it, on a transformers model

@torch.inference_mode()
def llama_cpp(model, ids, n_ctx, bos):
    "tools/perplexity: the logits from the middle of each chunk on, each against the token behind it."
    nll, count, first = 0.0, 0, n_ctx // 2
    for start in range(0, len(ids) // n_ctx * n_ctx, n_ctx):
        chunk = list(ids[start:start + n_ctx])
        if bos is not None: chunk[0] = bos
        logits = model(torch.tensor([chunk])).logits[0].double().numpy()
        for i in range(first, n_ctx - 1):
            row = logits[i] - logits[i].max()
            nll -= row[chunk[i + 1]] - math.log(np.exp(row).sum())
            count += 1
    return nll, count


@torch.inference_mode()
def gptq_paper(model, ids, window):
    "Cross entropy of each window, shifted by one."
    nll, count = 0.0, 0
    for i in range(len(ids) // window):
        part = torch.tensor([ids[i * window:(i + 1) * window]])
        logits = model(part).logits[0, :-1].double()
        nll += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
        count += window - 1
    return nll, count


@torch.inference_mode()
def transformers_docs(model, ids, window, stride):
    "Labels of -100 for what an earlier window has scored."
    nll, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        part = torch.tensor([ids[begin:end]])
        labels = part.clone()
        labels[:, :-(end - before)] = -100
        logits = model(part).logits[0, :-1].double()
        nll += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        count += (labels[0, 1:] != -100).sum().item()
        before = end
        if end == len(ids): break
    return nll, count


@torch.inference_mode()
def lm_eval(model, ids, window, prefix):
    "Token by token: each is predicted from what its window holds."
    nll, n = 0.0, len(ids)
    for i in range(n):
        end = min((i // window + 1) * window, n)                       # of the window that scores it
        seen = [prefix, *ids][max(0, end - window):i + 1]
        nll -= model(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)[ids[i]].item()
    return nll, n


CASES = [("llama.cpp", 16, None), ("llama.cpp", 15, 3), ("GPTQ", 16, None), ("GPTQ", 21, None), ("transformers", 16, 5),
         ("transformers", 16, 16), ("transformers", 16, 1), ("lm-eval", 16, 2), ("lm-eval", 60, 2)]


def faults(model, decoder):
    "Which customs are not those of the programs."
    ids, found = some_ids(50), set()
    for name, window, other in CASES:
        plan, want = {"llama.cpp": lambda: (halves(ids, window, other), llama_cpp(model, ids, window, other)),
                      "GPTQ": lambda: (apart(ids, window), gptq_paper(model, ids, window)),
                      "transformers": lambda: (sliding(ids, window, other),
                                               transformers_docs(model, ids, window, other)),
                      "lm-eval": lambda: (rolling(ids, window, other), lm_eval(model, ids, window, other))}[name]()
        got = score(decoder, plan)
        if got.tokens != want[1] or abs(got.nats - want[0]) > 1e-4 * want[0]: found.add(name)
    return found


def test_customs_are_those_of_the_programs(model, decoder): assert faults(model, decoder) == set()


def first_half(ids, window, bos=None):
    "Wrong: scores the first half."
    return [(t[:window // 2 + 1], window // 2) for t, _ in module.halves(ids, window, bos)]
def bos_kept_out(ids, window, bos=None):
    "Wrong: never puts the beginning."
    return module.halves(ids, window)
def half_and_one(ids, window, bos=None):
    "Wrong: scores the middle token, too."
    return [(t, n + 1) for t, n in module.halves(ids, window, bos)]
def scores_first(ids, window):
    "Wrong: every window loses its last token instead of its first."
    return [(t[:-1], n - 1) for t, n in module.apart(ids, window)]
def scores_again(ids, window, stride):
    "Wrong: what overlaps is scored again."
    return [(t, len(t) - 1) for t, _ in module.sliding(ids, window, stride)]
def no_reach(ids, window, prefix):
    "Wrong: the last window does not reach back."
    return [(t[-n - 1:], n) for t, n in module.rolling(ids, window, prefix)]
def scores_prefix(ids, window, prefix):
    "Wrong: the token before the text belongs to it."
    return module.rolling([prefix, *ids], window, prefix)


@pytest.mark.parametrize("wrong, name, custom", [
    (first_half, "halves", "llama.cpp"), (bos_kept_out, "halves", "llama.cpp"), (half_and_one, "halves", "llama.cpp"),
    (scores_first, "apart", "GPTQ"), (scores_again, "sliding", "transformers"), (no_reach, "rolling", "lm-eval"),
    (scores_prefix, "rolling", "lm-eval")])
def test_wrong_customs_are_noticed(model, decoder, monkeypatch, wrong, name, custom):
    monkeypatch.setitem(globals(), name, wrong)
    assert faults(model, decoder) == {custom}


def unshifted(decoder, plan):
    "Wrong: each token is scored by the prediction behind it."
    nats = 0.0
    for tokens, n in plan:
        logp = decoder(tokens[None])[0, -n:].double().log_softmax(-1)
        nats -= logp.gather(-1, tokens[-n:, None]).sum().item()
    return Score(nats, sum(n for _, n in plan))
def in_bits(decoder, plan):
    "Wrong: base 2."
    s = module.score(decoder, plan)
    return Score(s.nats / math.log(2), s.tokens)
def all_scored(decoder, plan): return module.score(decoder, [(t, len(t) - 1) for t, _ in plan])


@pytest.mark.parametrize("wrong", [unshifted, in_bits, all_scored])
def test_wrong_scores_are_noticed(model, decoder, monkeypatch, wrong):
    monkeypatch.setitem(globals(), "score", wrong)
    with torch.inference_mode(): assert faults(model, decoder)


@pytest.mark.parametrize("window", [3, 4, 8])
@pytest.mark.parametrize("n", [9, 16, 33])
def test_who_is_scored(n, window):
    ids = list(range(n))
    def scored(plan): return [t for tokens, k in plan for t in tokens[-k:].tolist()]
    whole = n // window * window
    assert scored(rolling(ids, window, 99)) == ids
    for stride in range(1, window): assert scored(sliding(ids, window, stride)) == ids[1:]
    def listed(plan): return [(tokens.tolist(), k) for tokens, k in plan]
    assert listed(sliding(ids[:whole], window, window)) == listed(apart(ids, window))
    assert scored(halves(ids, window)) == [t for t in ids[:whole] if t % window > window // 2]
    assert all(len(t) <= window + 1 for t, _ in rolling(ids, window, 99))


def test_a_byte_is_a_byte():
    g = random.Random(0)
    text = "".join(g.choice("abcd") for _ in range(600))
    p = {"a": 0.5, "b": 0.25, "c": 0.125, "d": 0.125}
    found = []
    for size in (1, 2, 3):                                        # tokens of one, two and three letters
        parts = [text[i:i + size] for i in range(0, 600, size)]
        found.append(Score(-sum(math.log(math.prod(p[c] for c in part)) for part in parts), len(parts)))
    assert max(s.bits_per_byte(text) for s in found) - min(s.bits_per_byte(text) for s in found) < 1e-9
    assert found[2].perplexity > 2 * found[0].perplexity
    assert Score(4 * math.log(2), 3).bits_per_byte("é!") == pytest.approx(4 / 3)          # bytes, not letters
    assert Score(4 * math.log(5), 3).per_word("one two\nthree  four") == pytest.approx(5)


# divergence

def by_numpy(want, got, tokens, first=0):
    "Statistics of llama.cpp's --kl-divergence in plain float64."
    kl, same, before, after = [], [], [], []
    for w, g, t in zip(want.double().numpy(), got.double().numpy(), tokens.tolist()):
        for i in range(first, len(w)):
            lp = w[i] - w[i].max(); lp -= np.log(np.exp(lp).sum())
            lq = g[i] - g[i].max(); lq -= np.log(np.exp(lq).sum())
            kl.append(float((np.exp(lp) * (lp - lq)).sum()))
            same.append(int(w[i].argmax()) == int(g[i].argmax()))
            before.append(lp[t[i + 1]]); after.append(lq[t[i + 1]])
    kl, p, q = np.array(kl), np.exp(before), np.exp(after)
    return dict(mean=kl.mean(), worst=kl.max(), q99=np.quantile(kl, 0.99), q90=np.quantile(kl, 0.9), same=np.mean(same),
                rms=math.sqrt(np.mean((q - p) ** 2)), ratio=math.exp(np.mean(before) - np.mean(after)))

def statistics(d):
    return dict(mean=d.mean, worst=d.worst, q99=d.quantile(0.99), q90=d.quantile(0.9), same=d.same_top, rms=d.rms_p,
                ratio=d.perplexity)

def dumped(tmp_path, decoder, tokens):
    "Logits of a model and its damaged twin, written and read again."
    for name, d in dict(want=decoder, got=quantize(decoder, "int4_g32", choose=lambda n, m: "down_proj" in n)).items():
        np.save(tmp_path / f"{name}.npy", predict(d, tokens).numpy())
    return [torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("want", "got")]

def divergence_faults(tmp_path, decoder):
    tokens, found = torch.tensor(some_ids(60)).view(3, 20), set()
    want, got = dumped(tmp_path, decoder, tokens)
    for scale, first in itertools.product((1.0, 0.01, 8.0), (0, 10)):
        expected = by_numpy(want * scale, got * scale, tokens, first)
        mine = statistics(compare(want * scale, got * scale, tokens, first))
        found |= {k for k in expected if abs(mine[k] - expected[k]) > 1e-6}
    return found


def test_divergence_is_the_float64_one(tmp_path, decoder): assert divergence_faults(tmp_path, decoder) == set()

right = module._compared
MUTANTS = {
    "reversed": lambda w, g, t: (right(g, w, t)[0], *right(w, g, t)[1:]),
    "in bits": lambda w, g, t: (right(w, g, t)[0] / math.log(2), *right(w, g, t)[1:]),
    "unshifted": lambda w, g, t: (*right(w, g, t)[:2], *right(w, g, t.roll(1))[2:]),
    "second best": lambda w, g, t: (right(w, g, t)[0], w.topk(2).indices[:, 1] == g.topk(2).indices[:, 1],
                                    *right(w, g, t)[2:]),
    "half precision": lambda w, g, t: tuple(x.half().double() if x.is_floating_point() else x
                                            for x in right(w, g, t)),
}

@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_divergences_are_noticed(tmp_path, decoder, monkeypatch, name):
    monkeypatch.setattr(module, "_compared", MUTANTS[name])
    assert divergence_faults(tmp_path, decoder)


def test_no_change_is_no_damage(decoder):
    want = predict(decoder, tokens := torch.tensor([some_ids(30)])).double()   # in float32 the sum itself is rounded
    d = compare(want, want + 5.0, tokens)                                # a constant changes no distribution
    assert d.worst < 1e-9 and d.same_top == 1 and d.rms_p < 1e-7 and abs(d.perplexity - 1) < 1e-7


# intervals

def series(n, memory, seed):
    g = np.random.default_rng(seed)
    x = np.zeros(n + 100)
    for i, e in enumerate(g.normal(size=n + 100) * math.sqrt(1 - memory**2)): x[i] = memory * x[i - 1] + e
    return torch.tensor(x[100:])

def coverage(interval, memory, tries=150, n=1024):
    return sum(i.low <= 0 <= i.high for i in (interval(series(n, memory, s)) for s in range(tries))) / tries

def test_intervals_hold_what_they_promise():
    def by_blocks(x): return interval(x, 32, draws=400)
    def by_tokens(x): return interval(x, 1, draws=400)
    assert coverage(by_blocks, 0.8) > 0.85 and coverage(by_blocks, 0.0) > 0.85
    assert coverage(by_tokens, 0.8) < 0.65 and coverage(by_tokens, 0.0) > 0.88

def test_an_interval_by_tokens_is_the_usual_one():
    x = series(400, 0.0, 1)
    i, half = interval(x, 1), 1.96 * x.std().item() / 20
    assert i.mean == pytest.approx(x.mean().item()) and (i.high - i.low) / 2 == pytest.approx(half, rel=0.06)

def test_pairs_are_narrower():
    hard = series(512, 0.9, 2).exp()
    a, b = hard * 1.2, hard * 1.1
    pair, one = interval(a - b), interval(a)
    assert pair.low > 0 and pair.high - pair.low < 0.2 * (one.high - one.low)

def test_odd_last_block():
    x = torch.cat([torch.zeros(64), torch.full((3,), 100.0)])
    i = interval(x, 32)
    assert i.mean == pytest.approx(300 / 67) and i.low == 0 and i.high <= 100
    assert interval(torch.ones(70), 32) == module.Interval(1.0, 1.0, 1.0)


# weights

@pytest.mark.parametrize("name", ["int8", "int4_g32", "int4_g128", "nf4", "q4_k", "q6_k", "tq2_0", "fp8_block"])
def test_rounded_is_the_format_on_joined_rows(name):
    torch.manual_seed(0)
    w, f = torch.randn(16, 96), FORMATS[name]
    new, nbytes = rounded(w, name)
    k = math.lcm(f.columns, 96) // 96
    packed = f.pack(w.view(16 // k, 96 * k))
    assert torch.equal(new, packed.unpack().view(16, 96)) and nbytes == packed.nbytes
    assert torch.equal(joined(w, f.columns).flatten(), w.flatten())

def test_importance_runs_along():
    torch.manual_seed(0)
    w, importance = torch.randn(8, 96), torch.rand(96) + 0.1
    new, _ = rounded(w, "q4_k", importance)
    assert torch.equal(new, FORMATS["q4_k"].pack(w.view(1, 768), importance.repeat(8)).unpack().view(8, 96))

def test_replaced_and_spread_out(decoder):
    tokens = torch.tensor([some_ids(12)])
    same = replaced(decoder, {n: m.dense() for n, m in layers(decoder).items()})
    assert torch.equal(predict(same, tokens), predict(decoder, tokens))
    name = next(iter(layers(decoder)))
    assert not torch.equal(predict(replaced(decoder, {name: layers(decoder)[name].dense() * 2}), tokens),
                           predict(decoder, tokens))
    group = math.gcd(*(m.dense().shape[1] for m in layers(decoder).values()))
    twin = spread_out(decoder, group)
    for a, b in zip(layers(decoder).values(), layers(twin).values()):
        parts = a.dense().unflatten(-1, (-1, group))
        step = (parts.amax(-1) - parts.amin(-1)) / 15
        off = (b.dense() - a.dense()).unflatten(-1, (-1, group)).abs().amax(-1)
        assert (off <= step / 2 * 1.001).all() and off.max() > 0


# the search

def test_felt_is_the_fisher_information(decoder):
    "By autograd, for one matrix: half the mean square of the loss's slope along an error, over drawn tokens."
    tokens = torch.tensor(some_ids(120)).view(4, 30)
    name = "layers.1.mlp.down_proj"
    matrix = layers(decoder)[name]
    grams = felt(decoder, [tokens[:1], tokens[1:]])
    assert grams.keys() == layers(decoder).keys()
    for n, m in layers(decoder).items():
        f = grams[n]
        assert f.shape == (m.dense().shape[1],) * 2 and torch.allclose(f, f.T, rtol=1e-3,
                                                                       atol=1e-6 * f.abs().max().item())
        assert torch.linalg.eigvalsh(f.double()).min() > -1e-5 * f.abs().max()
    torch.manual_seed(0)
    error = torch.randn_like(matrix.dense()) * matrix.dense().std() * 0.02
    want = predict(decoder, tokens)
    got = compare(want, predict(replaced(decoder, {name: matrix.dense() + error}), tokens), tokens).mean
    assert 0.5 < quadratic(error, grams[name]) / 2 / got < 2

def test_quadratic_is_the_mean_square_of_outputs():
    torch.manual_seed(0)
    x, e = torch.randn(500, 12), torch.randn(5, 12)
    assert quadratic(e, x.T @ x / 500) == pytest.approx((x @ e.T).square().sum(1).mean().item(), rel=1e-4)


def random_costs(seed, matrices=5, formats=4):
    g = random.Random(seed)
    return {f"m{i}": {f"f{j}": (g.randint(1, 30), g.random() * 10 ** g.randint(-3, 1)) for j in range(formats)}
            for i in range(matrices)}

def damage_of(costs, found): return sum(costs[n][f][1] for n, f in found.items())

def best(costs, budget):
    choices = (dict(zip(costs, c)) for c in itertools.product(*costs.values()))
    return min((damage_of(costs, c) for c in choices if size_of(costs, c) <= budget))

def search_faults(search):
    worst = []
    for seed in range(40):
        costs = random_costs(seed)
        least, most = (sum(f(n for n, _ in o.values()) for o in costs.values()) for f in (min, max))
        for share in (0.0, 0.2, 0.5, 0.8, 1.0):
            budget = round(least + share * (most - least))
            found = search(costs, budget)
            if found.keys() != costs.keys() or size_of(costs, found) > budget: return "over budget"
            worst.append(damage_of(costs, found) - best(costs, budget))
    return "far from the best" if np.mean(worst) > 0.25 else None

def test_search_is_near_the_best(): assert search_faults(search) is None

def greedy_by_damage(costs, budget):
    "Wrong: the best format for the first matrices, as long as there is money."
    found, left = {}, budget
    rest = {n: min(b for b, _ in o.values()) for n, o in costs.items()}
    for name, options in costs.items():
        del rest[name]
        fits = {f: o for f, o in options.items() if o[0] + sum(rest.values()) <= left}
        found[name] = min(fits, key=lambda f: fits[f][1])
        left -= options[found[name]][0]
    return found
def over(costs, budget): return search(costs, int(budget * 1.5))
def smallest(costs, budget): return {n: min(o, key=lambda f: o[f][0]) for n, o in costs.items()}

@pytest.mark.parametrize("wrong", [greedy_by_damage, over, smallest])
def test_wrong_searches_are_noticed(wrong): assert search_faults(wrong)


def test_found_formats_fit_quantize(decoder):
    tokens = torch.tensor(some_ids(90)).view(3, 30)
    matrices = {n: m.dense() for n, m in layers(decoder).items()}
    formats = ("int4_g32", "int8_g32", "int8", "q4_k")                # q4_k fits no row here
    costs = costs_of(matrices, formats, felt(decoder, [tokens]), collect(decoder, [tokens]))
    assert all("q4_k" not in options and "int8" in options for options in costs.values())
    narrow = [n for n, o in costs.items() if "int4_g32" in o]
    budget = sum(o.get("int4_g32", o["int8"])[0] for o in costs.values()) * 5 // 4
    found = search(costs, budget)
    q = quantize(decoder, "int8", choose=lambda name, m: found.get(name))
    nbytes = sum(m.packed.nbytes for m in q.modules() if hasattr(m, "packed"))
    assert nbytes == size_of(costs, found) <= budget and (not narrow or len(set(found.values())) > 1)


def test_clear_errors(decoder):
    ids, tokens = some_ids(40), torch.tensor(some_ids(40)).view(2, 20)
    want = predict(decoder, tokens)
    nan = want.clone(); nan[1, 2, 3] = float("nan")
    broken = replaced(decoder, {n: m.dense() * float("nan") for n, m in itertools.islice(layers(decoder).items(), 1)})
    for call in (lambda: apart(ids[:10], 11), lambda: halves([], 8), lambda: sliding(ids, 8, 0),
                 lambda: sliding(ids, 8, 9), lambda: rolling([], 8, 0),
                 lambda: apart(ids, 2), lambda: score(decoder, [(torch.tensor([5, 97]), 1)]),
                 lambda: score(decoder, [(torch.tensor([-1, 9]), 1)]),
                 lambda: score(broken, apart(ids, 8)), lambda: predict(broken, tokens),
                 lambda: predict(decoder, tokens[:, :1]),
                 lambda: compare(want, want[..., :-1], tokens), lambda: compare(want, nan, tokens),
                 lambda: compare(nan, want, tokens),
                 lambda: compare(want, want, tokens[:1]), lambda: interval(torch.ones(32), 32),
                 lambda: interval(torch.ones(0), 1),
                 lambda: interval(torch.ones(9), 0), lambda: search(random_costs(0), 0),
                 lambda: joined(torch.zeros(3, 100), 256),
                 lambda: rounded(torch.zeros(8, 32), "int5"), lambda: Score(1.0, 1).bits_per_byte(""),
                 lambda: Score(1.0, 1).per_word("  ")):
        with pytest.raises(InputError): call()
    assert replace(Score(1.0, 1), tokens=2).perplexity == pytest.approx(math.exp(0.5))
