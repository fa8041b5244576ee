"Scores of texts: alone, in batches, behind a shared context, through windows; against all logits at once."
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small_model

import llm_workbench as wb
from llm_workbench import Decoder
from llm_workbench.errors import ContextLengthError, InputError, UnsupportedError
from llm_workbench.inference import loglikelihood as scoring
from llm_workbench.inference.generation import LM
from llm_workbench.inference.loglikelihood import as_lm_eval, scored, settings_of, windows


class Letters:
    "A tokenizer of 97 characters; two letters make a token where they are doubled."
    bos_id, eos_ids = None, [0]
    def encode(self, text, special=False):
        ids, i = [], 0
        while i < len(text):
            double = i + 1 < len(text) and text[i] == text[i + 1] == "l"
            ids.append(96 if double else ord(text[i]) - 31)
            i += 1 + double
        return ids

    def decode(self, ids): return "".join("ll" if t == 96 else chr(t + 31) for t in ids)


@pytest.fixture(scope="module", params=["llama", "gemma2", "mixtral"])
def lm(request):
    decoder = Decoder.from_transformers(small_model(request.param)).requires_grad_(False)
    return LM(decoder, Letters(), None)


def plainly(lm, context, continuation):
    "All logits of one text at once."
    first, rest = lm.pair_ids(context, continuation)
    with torch.inference_mode(): z = lm.decoder(torch.tensor([first + rest]))[0, len(first) - 1:-1]
    z = z.double().log_softmax(-1)
    return z.gather(1, torch.tensor(rest)[:, None]).sum().item(), bool((z.argmax(-1) == torch.tensor(rest)).all())


PAIRS = [("abc", "d"), ("abc", "defg"), ("abc", " x"), ("", "hello"), ("z", "y"), ("other", "text here"), ("abc ", "q"),
         ("al", "low"), ("", "a")]


def agrees(lm, pairs, run):
    for score, pair in zip(run(pairs), pairs, strict=True):
        want, greedy = plainly(lm, *pair)
        assert abs(score.total - want) <= 1e-4 * max(1, abs(want)), pair
        assert score.greedy == greedy and math.isclose(sum(score.logprobs), score.total, abs_tol=1e-4)
        assert score.tokens == lm.pair_ids(*pair)[1]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_pairs_in_any_batch(lm, batch): agrees(lm, PAIRS, lambda pairs: lm.loglikelihood(pairs, batch=batch))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text("abl ", max_size=6), st.text("abl", min_size=1, max_size=5)), max_size=7))
def test_random_pairs(pairs):
    lm = LM(Decoder.from_transformers(small_model("llama")).requires_grad_(False), Letters(), None)
    agrees(lm, pairs, lm.loglikelihood)


def test_a_border_inside_a_token(lm):
    assert lm.pair_ids("al", "low") == ([66, 77], [77, 80, 88])            # "all" would be two tokens: encoded apart
    assert lm.pair_ids("a ", "b") == lm.pair_ids("a", " b")


def test_a_context_that_is_too_long_loses_its_beginning(lm):
    limit = lm.decoder.config.max_position_embeddings
    long = "ab" * limit
    score = lm.loglikelihood([(long, "cd"), (long, "e")])
    kept = lm.loglikelihood([(long[-(limit - 1):], "cd")])[0]
    assert abs(score[0].total - kept.total) < 1e-4
    with pytest.raises(ContextLengthError, match="loglikelihood_rolling"): lm.loglikelihood([("a", "b" * (limit + 1))])


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_windows_score_every_token_once(n, size, stride):
    stride, seen = min(stride, size), []
    for begin, first, end in windows(n, size, stride):
        assert 0 <= begin <= first < end <= begin + size
        assert begin == 0 or end - begin == size                            # as much in front as fits
        seen += range(first, end)
    assert seen == list(range(n))


def test_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    for n, size in ((10, 4), (4, 4), (3, 8), (17, 5)):
        tokens = list(range(100, 100 + n))
        theirs = [utils.make_disjoint_window(w) for w in utils.get_rolling_token_windows(tokens, 0, size, 1)]
        row = [0, *tokens]
        assert [(len(b), b) for _, b in theirs] == [(e - f, tokens[f:e]) for _, f, e in windows(n, size, size)]
        assert [a + b[:-1] for a, b in theirs] == [row[s:e] for s, _, e in windows(n, size, size)]


def test_a_document_through_windows(lm):
    text = "some text of forty letters and a few more"
    one = lm.loglikelihood_rolling(text)
    assert abs(one.total - plainly(lm, "", text)[0]) < 1e-3 and one.tokens == lm.tokenizer.encode(text)
    narrow = lm.loglikelihood_rolling(text, size=8, stride=3)
    ids = [0, *lm.tokenizer.encode(text)]
    at = 20                                                                  # scored by one window: recomputed alone
    begin, first, end = next(w for w in windows(len(ids) - 1, 8, 3) if w[1] <= at < w[2])
    with torch.inference_mode(): z = lm.decoder(torch.tensor([ids[begin:end]]))[0].log_softmax(-1)
    assert abs(narrow.logprobs[at] - z[at - begin, ids[at + 1]]) < 1e-4


def test_tokens_one_by_one(lm):
    found = lm.logprobs("abc", top=4)
    assert [t.text for t in found] == list("abc")
    assert abs(sum(t.logprob for t in found) - plainly(lm, "", "abc")[0]) < 1e-4
    for t in found:
        values = [p for _, p in t.top]
        assert values == sorted(values, reverse=True) and t.logprob <= values[0]


def test_scores_in_pieces(lm, monkeypatch):
    hidden, tokens = torch.randn(11, lm.decoder.config.hidden_size), torch.arange(11)
    with torch.inference_mode():
        want = scored(lm.decoder, hidden, tokens, 3)
        monkeypatch.setattr(scoring, "PIECE", 4)
        for a, b in zip(want, scored(lm.decoder, hidden, tokens, 3)): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_vectors(lm, pool):
    texts = ["a", "some words", "more of them than that"]
    got = lm.embed(texts, pool=pool, normalize=False)
    for text, vector in zip(texts, got):
        with torch.inference_mode(): h = lm.decoder.hidden(torch.tensor([lm.tokenizer.encode(text)]))[0]
        torch.testing.assert_close(vector, h.mean(0) if pool == "mean" else h[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lm.embed(texts, pool=pool).norm(dim=1), torch.ones(3))
    alone, together = (lm.embed(texts, pool=pool, batch=n) for n in (1, 3))
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


MUTANTS = {
    "one row too late": ("h[len(asked[i][0]) - 1:len(row)]", "h[len(asked[i][0]):len(row) + 1]"),
    "the row in front of a shared context": ("cache)[0, -1:]", "cache)[0, -2:-1]"),
    "padding is part of the text": ("h[:len(rest) - 1]", "h[:len(rest)][-len(rest) + 1:] if len(rest) > 1 else h[:0]"),
    "the order of the lengths": ("zip(members, values.split(sizes)", "zip(sorted(members), values.split(sizes)"),
    "not the natural logarithm": (".log_softmax(-1)", ".log_softmax(-1) / 0.6931"),
    "the likeliest is any of the best two": ("z.argmax(-1) == wanted", "(z.topk(2).indices == wanted[:, None]).any(1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_variants_are_rejected(lm, name, tmp_path):
    import importlib.util
    import inspect
    right, wrong = MUTANTS[name]
    source = inspect.getsource(scoring)
    assert source.count(right) >= 1, right
    path = tmp_path / "wrong.py"
    source = source.replace(right, wrong).replace("from ..", "from llm_workbench.")
    path.write_text(source.replace("from .", "from llm_workbench.inference."))
    kept = {k: v for k, v in vars(LM).items() if k in ("loglikelihood", "_together", "_behind", "_note")}
    spec = importlib.util.spec_from_file_location("wrong", path)
    try:
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        with pytest.raises((AssertionError, RuntimeError)):
            agrees(lm, [*PAIRS, ("abc", "zz"), *[("q" * k, "rs") for k in (9, 1, 5)]], lm.loglikelihood)
            tokens = torch.tensor([[7, 8]])
            with torch.inference_mode(): z = lm.decoder(tokens)[0, :1]
            second = z.topk(2).indices[0, 1:]
            assert not made.scored(lm.decoder, lm.decoder.hidden(tokens)[0, :1], second)[1].any()
    finally:
        for k, v in kept.items(): setattr(LM, k, v)


def test_bad_input(lm):
    wrong = [lambda: lm.loglikelihood([("a", "")]), lambda: lm.loglikelihood([(1, "b")]), lambda: lm.logprobs(""),
             lambda: lm.loglikelihood_rolling(""), lambda: lm.loglikelihood_rolling("a", size=4, stride=5),
             lambda: lm.choose("a", []), lambda: lm.choose("a", ["b"], "words"), lambda: lm.embed(["a", ""]),
             lambda: lm.embed("a", pool="max")]
    for call in wrong:
        with pytest.raises(InputError): call()
    assert lm.loglikelihood([]) == []


def test_without_lm_eval(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UnsupportedError, match="pip install lm-eval"): as_lm_eval(lm)


def test_through_lm_eval(lm):
    pytest.importorskip("lm_eval.api.model", reason="lm-eval is not installed")

    class Request:
        def __init__(self, *args): self.args = args

    harness = as_lm_eval(lm)
    assert harness.loglikelihood([Request(*p) for p in PAIRS]) == [(s.total, s.greedy) for s in lm.loglikelihood(PAIRS)]
    assert harness.loglikelihood_rolling([Request("some text")]) == [lm.loglikelihood_rolling("some text").total]


def test_settings_of_lm_eval():
    assert settings_of({}) == dict(stop=[], max_new_tokens=256, temperature=0.0)
    asked = dict(until=["a", "b"], do_sample=True, temperature=0.7, top_p=0.9, max_gen_toks=4)
    assert settings_of(asked) == dict(stop=["a", "b"], max_new_tokens=4, temperature=0.7, top_p=0.9)


def test_length_normalisation_counts_bytes():
    lm = wb.load()
    assert scoring.LENGTHS["bytes"]("é", None) == 2
    assert lm.name == "llm_workbench" and lm.choose("The capital of France is", [" Rome", " Paris", " London"]) == 1
