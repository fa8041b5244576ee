"""Constrained decoding: all that is drawn is valid, and what is allowed is what trying each token allows.

Random logits reach corners where no model goes, so most draws need none. Oracles: Python's `re` and `jsonschema`, every
continuation of a small vocabulary, and llguidance where it is installed (it judges the same documents).
"""
import copy
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import llm_workbench as wb
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.inference import constrained
from llm_workbench.inference.constrained import (
    INF, Alt, Constraint, EachRow, Machine, Network, Ref, char_set, grammar, literal, parse_regex, regex)
from llm_workbench.inference.generation import Row
from llm_workbench.inference.json_schemas import SchemaReader, any_json, json_schema, tools
from llm_workbench.text.vocabularies import CONTROL, NORMAL, Vocabulary

jsonschema = pytest.importorskip("jsonschema")                              # comes with JupyterLab
SCHEMAS = json.loads((Path(__file__).parent / "data" / "schemas.json").read_text(encoding="utf-8"))
SUPPORTED, REFUSED = SCHEMAS["supported"], SCHEMAS["refused"]
FORMATS = jsonschema.FormatChecker()


class Words(Vocabulary):
    "Tokens given as bytes; the last one ends a text."
    def __init__(self, tokens):
        self.tokens, self.special = [*tokens, b"<end>"], {"<end>": len(tokens)}
        self.types = [NORMAL] * len(tokens) + [CONTROL]

    def token_bytes(self, id): return self.tokens[id]


class SmallTokenizer:
    def __init__(self, tokens):
        self.vocabulary = Words(tokens)
        self.eos_ids = [len(tokens)]


MORE = ['{"', '"}', '":', '": ', '",', ', "', '"]', "[]", "{}", "}}", "]}", "\n  ", "  ", "12", "00", "true", "null",
        "ab", "é", "日", "🙂", '"name', "a-", "2024-", "\\n", "\\u00"]
BYTES = SmallTokenizer([*(bytes([b]) for b in range(256)), *(m.encode() for m in MORE), "日".encode()[1:], b'\xf0\x9f"'])


@pytest.fixture(scope="module")
def real(): return wb.load().tokenizer


def drawn(mask, limit=90, seed=0, pick=None):
    "A text from random logits: each allowed token is as likely as another."
    row, n = Row([1], limit), len(mask.strings)
    torch.manual_seed(seed)
    while row.reason is None:
        token = int(mask([row], torch.randn(1, n)).argmax())
        row.tokens.append(token)
        row.reason = "stop" if token in mask.ends else "length" if len(row.tokens) >= limit else None
    return b"".join(mask.strings[t] for t in row.tokens), row.reason


def accepts(tree, text, rules=None):
    machine = Machine(Network(tree, rules))
    state = machine.run(machine.first, text.encode())
    return state > 0 and machine.done[state]


# --- regular expressions against Python's re --------------------------------------------------------------------------

ATOMS = st.sampled_from(["a", "b", "é", ".", r"\d", r"\w", r"\S", "[ab]", "[^a]", "[a-cé]", r"\.", "日", r"[^\w]",
                         "[]b]"])
COUNTS = ["*", "+", "?", "{2}", "{1,}", "{0,2}", "{,2}", "*?"]
PATTERNS = st.recursive(ATOMS, lambda inner: st.one_of(
    st.lists(inner, min_size=1, max_size=3).map("".join), st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
    st.tuples(inner, st.sampled_from(COUNTS)).map("({0[0]}){0[1]}".format)),
    max_leaves=6)
TEXTS = st.text("abc.é日 1_\n]", max_size=7)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(PATTERNS, st.lists(TEXTS, max_size=6))
def test_patterns_accept_what_python_accepts(pattern, texts):
    machine = Machine(Network(parse_regex(pattern)))
    for text in texts:
        state = machine.run(machine.first, text.encode())
        assert (state > 0 and machine.done[state]) == bool(re.fullmatch(pattern, text, re.ASCII)), (pattern, text)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(PATTERNS, st.integers(0, 10**6))
def test_what_is_drawn_from_a_pattern_matches_it(pattern, seed):
    mask = regex(BYTES, pattern)
    least = mask.machine.least[mask.machine.first]
    text, reason = drawn(regex(BYTES, pattern, finish_within=least + 20), least + 20, seed)
    assert reason == "stop" and re.fullmatch(pattern, text.decode(), re.ASCII), (pattern, text)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(PATTERNS, TEXTS)
def test_a_searched_pattern_is_found_where_python_finds_it(pattern, text):
    for p in (pattern, "^" + pattern, f"{pattern}$"):
        assert accepts(parse_regex(p, search=True), text) == bool(re.search(p.replace("$", r"\Z"), text, re.ASCII)), p


# --- which tokens are allowed -----------------------------------------------------------------------------------------

SMALL = [b"a", b"ab", b"b", b"ba", b"bb", b"c", b"(", b")", b"((", b"))", b"aab", b")b", "é".encode(), "é".encode()[:1],
         "é".encode()[1:] + b"a"]
RULES = ["(ab)*", "a{2,3}b?", "(a|bb)+c", "é*a", "[^a]{1,2}", "(ab|aab)(ba)*"]
NESTED = ['root ::= "(" root ")" | "a"', 'root ::= "a" root "b" | ""', 'root ::= ("(" root ")")* "b"?',
          'root ::= x x | "a"\nx ::= "b" | "a" x | ""']


def completions(mask, most=6):
    "Every token sequence of at most `most` tokens that spells a whole text, by trying them all, prefix by prefix."
    found, todo = set(), [((), mask.machine.first)]
    for _ in range(most + 1):
        found |= {tokens for tokens, state in todo if mask.machine.done[state]}
        todo = [((*tokens, t), new) for tokens, state in todo for t, text in enumerate(mask.strings)
                if text and (new := mask.machine.run(state, text))]
        if len(todo) > 20_000: break
    return found


def allowed_is_what_can_be_completed(make, vocabulary=tuple(SMALL)):
    tokenizer = SmallTokenizer(list(vocabulary))
    for make_mask in [*(lambda t, r=r: make(t, parse_regex(r)) for r in RULES),
                      *(lambda t, g=g: make(t, Ref("root"), constrained.GrammarParser(g).parse()) for g in NESTED)]:
        try: mask = make_mask(tokenizer)
        except UnsupportedError: continue
        found = completions(mask)
        for begun in {tokens[:n] for tokens in list(found)[:300] for n in range(3)}:
            want = {tokens[len(begun)] for tokens in found if tokens[:len(begun)] == begun and len(tokens) > len(begun)}
            row = Row([1], 99, list(begun))
            out = mask([row], torch.zeros(1, len(mask.strings)))[0]
            got = set(torch.isfinite(out).nonzero().flatten().tolist())
            assert (mask.ends[0] in got) == (begun in found), f"the end token after {begun}"
            got -= set(mask.ends)
            assert want <= got, f"{want - got} after {begun} are missing"
            for token in got - want:           # only because the completion is longer than was tried
                state = mask.machine.run(mask.machine.first, b"".join(mask.strings[t] for t in (*begun, token)))
                assert state and mask.machine.least[state] < INF and len(begun) + 1 + mask.machine.least[state] > 3


def test_allowed_tokens_are_those_with_a_completion(): allowed_is_what_can_be_completed(Constraint)


@pytest.mark.parametrize("lost", [b"a", b"b", b"c", b")"])
def test_a_vocabulary_without_a_byte_leads_into_no_dead_end(lost):
    "Single bytes are missing: only states from which whole tokens lead to an end are entered."
    tokenizer = SmallTokenizer([t for t in SMALL if t != lost])
    for rule in RULES:
        try: mask = regex(tokenizer, rule)
        except InputError: continue
        for seed in range(15):
            text, reason = drawn(mask, 40, seed)
            assert reason == "length" or re.fullmatch(rule, text.decode()), (rule, text)


def test_what_no_vocabulary_can_spell_is_refused_before_generation():
    with pytest.raises(InputError, match="cannot spell"): regex(SmallTokenizer([b"ab"]), "aba")
    with pytest.raises(InputError, match="No text fits"): regex(SmallTokenizer([b"a"]), "b")
    with pytest.raises(InputError, match="No text fits"): grammar(BYTES, 'root ::= "a" root')
    without = SmallTokenizer([t for t in BYTES.vocabulary.tokens[:-1] if t != b"1"])
    with pytest.raises(UnsupportedError, match="alone"): any_json(without)
    assert regex(SmallTokenizer([b"ab", b"aba"]), "ababa").accepts("ababa")
    nothing = SmallTokenizer([b"a"])
    nothing.eos_ids = []
    with pytest.raises(InputError, match="no end token"): regex(nothing, "a")


def test_the_mask_of_the_real_vocabulary_is_that_of_each_token_alone(real):
    schema = json_schema(real, SUPPORTED["resume"])
    text = '{"name": "Zoë 🙂", "jobs": [{"title": "x\\n", "from": 2001}], "skills": ["a", "b"]}'.encode()
    for end in (0, 1, 9, 10, 14, 17, 21, 40, len(text) - 3, len(text)):
        state = schema.machine.run(schema.machine.first, text[:end])
        want = np.array([bool(s) and schema.machine.run(state, s) > 0 for s in schema.strings])
        got = schema.missing(state) < INF
        assert (got == want).all(), f"{(got != want).sum()} tokens differ after {text[:end]}"
    special = [i for i, s in enumerate(schema.strings) if not s]
    assert special and not got[special].any()


# --- the life of a row ------------------------------------------------------------------------------------------------

def test_rows_of_a_batch_keep_their_own_place_and_rule(real):
    lm = wb.load()
    masks = [regex(real, "(yes|no) thanks"), None, grammar(real, 'root ::= [0-9] root | "."')]
    prompts = ["Tea?", "The sky is", "Pi is 3"]
    together = lm.generate(prompts, mask=EachRow(masks), max_new_tokens=8, temperature=1.5, seed=3)
    for i, (prompt, mask) in enumerate(zip(prompts, masks)):
        alone = lm.generate(prompt, mask=mask, max_new_tokens=8, temperature=1.5, seed=3 + i)
        assert together[i].tokens == alone.tokens, "a rule or a place reaches a neighbour"
    shared = regex(real, "[ab]{3}")
    for done in lm.generate(prompts, mask=shared, max_new_tokens=8, temperature=2.0, seed=1):
        assert re.fullmatch("[ab]{3}", done.text) and done.reason == "stop"
    with pytest.raises(InputError, match="masks for"): lm.generate(prompts[:2], mask=EachRow(masks), max_new_tokens=2)


def test_after_an_end_token_nothing_but_end_tokens_comes():
    mask = regex(BYTES, "a")
    row = Row([1], 9, [97, mask.ends[0]])
    assert torch.isfinite(mask([row], torch.zeros(1, len(mask.strings)))[0]).nonzero().flatten().tolist() == mask.ends
    with pytest.raises(InputError, match="forbids"): mask([Row([1], 9, [98])], torch.zeros(1, len(mask.strings)))
    with pytest.raises(InputError, match="forbids"): mask([Row([1], 9, [97, 97])], torch.zeros(1, len(mask.strings)))


def test_logits_wider_than_the_vocabulary_and_a_finished_row():
    mask = regex(BYTES, "a")
    wide = mask([Row([1], 9)], torch.zeros(1, len(mask.strings) + 7))[0]
    assert torch.isfinite(wide).nonzero().flatten().tolist() == [97]
    assert torch.isfinite(mask([Row([1], 9, [98], "stop")], torch.zeros(1, 300))).all()


def test_a_text_is_finished_within_its_tokens_or_refused():
    deep = 'root ::= "(" root ")" | "x"'
    for limit in (2, 3, 5, 20):
        for seed in range(20):
            text, reason = drawn(grammar(BYTES, deep, finish_within=limit), limit, seed)
            assert reason == "stop" and grammar(BYTES, deep).accepts(text)
    for limit in (0, 1):
        with pytest.raises(InputError, match="Allow at least 2"): grammar(BYTES, deep, finish_within=limit)
    with pytest.raises(InputError, match="Allow at least"):        # the row has less room than was promised
        drawn(regex(BYTES, "a{20}", finish_within=50), 10)
    text, reason = drawn(regex(BYTES, "a{20}"), 10)
    assert reason == "length" and text == b"a" * 10


def test_ambiguous_and_deep_grammars_stay_small():
    mask = grammar(BYTES, 'root ::= "a" root root "c" | "b" | ""')
    state = mask.machine.first
    for _ in range(400): state = mask.machine.step(state, ord("a"))
    for _ in range(400): state = mask.machine.step(state, ord("c"))
    assert mask.machine.done[state] and len(mask.machine.kernels) < 3000
    brackets = any_json(BYTES)
    deep = b"[" * 3000
    state = brackets.machine.run(brackets.machine.first, deep)
    assert (brackets.missing(state) < INF).any() and brackets.accepts(deep + b"]" * 3000)
    flat = grammar(BYTES, 'root ::= "a" root | "b"')
    assert flat.accepts("a" * 5000 + "b") and len(flat.machine.kernels) < 10


# --- JSON schemas -----------------------------------------------------------------------------------------------------

def valid(schema, document):
    return jsonschema.Draft202012Validator(spec(schema), format_checker=FORMATS).is_valid(document)


def spec(schema):
    "What draft 2020-12 calls things: a tuple of draft 7 and OpenAPI's nullable in its own words."
    if isinstance(schema, list): return [spec(s) for s in schema]
    if not isinstance(schema, dict): return schema
    schema = {k: spec(v) for k, v in schema.items()}
    if isinstance(schema.get("items"), list):
        schema = {**schema, "prefixItems": schema["items"], "items": schema.get("additionalItems", True)}
    if schema.pop("nullable", False): schema = {"anyOf": [schema, {"type": "null"}]}
    return schema


@pytest.mark.parametrize("name", SUPPORTED)
def test_all_that_is_drawn_is_valid(name):
    mask = json_schema(BYTES, SUPPORTED[name], finish_within=200)
    kinds = set()
    for seed in range(15):
        text, reason = drawn(mask, 200, seed)
        assert reason == "stop" and valid(SUPPORTED[name], json.loads(text)), text
        kinds.add(text)
    assert len(kinds) > 1 or name == "constant object"


def test_what_the_real_vocabulary_draws_is_valid(real):
    for name, schema in SUPPORTED.items():
        mask = json_schema(real, schema, finish_within=150)
        text, reason = drawn(mask, 150, 1)
        assert reason == "stop" and valid(schema, json.loads(text)), (name, text)


def changed(document, rng):
    "The document with one thing changed; keys keep their order."
    document = copy.deepcopy(document)
    places = []
    def visit(value, put):
        places.append((value, put))
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            visit(value[key], lambda new, value=value, key=key: value.__setitem__(key, new))
    holder = [document]
    visit(document, lambda new: holder.__setitem__(0, new))
    value, put = rng.choice(places)
    if isinstance(value, dict) and value and rng.random() < 0.5: value.pop(rng.choice(list(value)))
    elif isinstance(value, dict) and rng.random() < 0.5: value[rng.choice(["zz", "extra"])] = rng.choice([1, "x", None])
    elif isinstance(value, list) and value and rng.random() < 0.7:
        rng.choice([value.pop, lambda: value.append(value[0])])()
    elif isinstance(value, str) and rng.random() < 0.7: put(rng.choice([value + "a", value[:-1], "", value * 2]))
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.7:
        put(rng.choice([value + 1, -value, 131, 0]))
    else: put(rng.choice([1, "x", None, True, [], {}, -3, 2.5]))
    return holder[0]


def documents(name, n=12):
    "Right and wrong documents, near to each other, as compact texts and as Python writes them."
    mask, rng = json_schema(BYTES, SUPPORTED[name], finish_within=120), random.Random(name)
    for seed in range(n):
        document = json.loads(drawn(mask, 120, seed)[0])
        for change in (False, True, True, True):
            if change: document = changed(document, rng)
            if any(ord(c) in (127, *range(32)) for c in json.dumps(document, ensure_ascii=False)): continue
            for separators in ((",", ":"), (", ", ": ")):
                yield document, json.dumps(document, ensure_ascii=False, separators=separators)


SUBSETS = ("uri", "hostname", "email", "date-time")     # formats of which only a part is written


def has_format(schema): return any(f'"format": "{f}"' in json.dumps(schema) for f in SUBSETS)


def plain_number(value): return "e" not in repr(value) and abs(value) < 1e9 and len(repr(value).partition(".")[2]) <= 6


def usual(document):
    "Numbers as bounded ones are written; no whole float, which JSON Schema calls an integer and we never write."
    if isinstance(document, dict): return all(map(usual, document.values()))
    if isinstance(document, list): return all(map(usual, document))
    return not isinstance(document, (int, float)) or plain_number(document) and not (
        isinstance(document, float) and document == int(document))


@pytest.mark.parametrize("name", SUPPORTED)
def test_documents_get_the_verdict_of_jsonschema(name):
    "A subset of a format may refuse what jsonschema accepts; everything else agrees both ways."
    mask, seen = json_schema(BYTES, SUPPORTED[name]), set()
    for document, text in documents(name):
        if not usual(document): continue
        ours, theirs = mask.accepts(text), valid(SUPPORTED[name], document)
        assert ours <= theirs, f"accepted, but not valid: {text}"
        fine = ours or not theirs or has_format(SUPPORTED[name]) or out_of_order(SUPPORTED[name], document)
        assert fine, f"refused, but valid: {text}"
        seen.add(ours)
    assert True in seen or name == "unicode keys" or has_format(SUPPORTED[name])   # there all numbers are long


def out_of_order(schema, document):
    "A named property after a further one: valid, and never written."
    if isinstance(document, list): return any(out_of_order(schema, d) for d in document)
    if not isinstance(document, dict): return False
    if any(k in ("zz", "extra") for k in list(document)[:-1]): return True
    return any(out_of_order(schema, d) for d in document.values())


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_is_not_supported_is_refused_by_name_and_path(keyword):
    nested = {"type": "object", "properties": {"p": REFUSED[keyword]}}
    with pytest.raises(UnsupportedError, match=rf"'{keyword}' at #/properties/p"): json_schema(BYTES, nested)


@pytest.mark.parametrize("schema", [
    3, [], {"type": "strin"}, {"type": 3}, {"enum": 3}, {"properties": []}, {"required": "a"}, {"minLength": -1},
    {"minItems": "a"}, {"minimum": "1"}, {"$ref": "#/nowhere"}, {"anyOf": []}, {"anyOf": {}}, "{",
    {"pattern": "("}, {"enum": []},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"type": "string", "minLength": 3, "maxLength": 2},
    False])
def test_what_is_no_schema_or_fits_nothing_is_one_input_error(schema):
    with pytest.raises(InputError): json_schema(BYTES, schema)


def test_references_around_a_circle_are_refused():
    loop = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    with pytest.raises((InputError, UnsupportedError)): json_schema(BYTES, loop)


def test_closed_objects_have_no_other_properties():
    schema = {"type": "object", "properties": {"a": {"type": "object"}}}
    assert json_schema(BYTES, schema).accepts('{"a":{"x":1},"b":2}')
    closed = json_schema(BYTES, schema, closed=True)
    assert closed.accepts('{"a":{}}') and not closed.accepts('{"a":{"x":1}}') and not closed.accepts('{"b":2}')


def test_a_further_key_is_never_a_named_one_in_another_spelling():
    mask = json_schema(BYTES, {"properties": {"a": {"type": "integer"}, "ab": {}}, "type": "object"})
    assert mask.accepts('{"a":1,"abc":"x"}') and mask.accepts('{"b":"x"}') and mask.accepts('{"":1}')
    for text in ('{"a":"x"}', '{"\\u0061":"x"}', '{"b":1,"a":"x"}'): assert not mask.accepts(text), text


NUMBERS = st.dictionaries(st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
                          st.one_of(st.integers(-200, 200), st.sampled_from([0.5, -0.5, 0.05, 99.95, -12.25, 1e-3])),
                          min_size=1, max_size=2)
SIMPLE = [True, {"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"enum": [1, "a", None]}]
FLAT = st.one_of(st.sampled_from(SIMPLE),
                 NUMBERS.map(lambda b: {"type": "number", **b}), NUMBERS.map(lambda b: {"type": "integer", **b}),
                 st.tuples(st.integers(0, 3), st.integers(3, 6)).map(lambda m: {"type": "string", "minLength": m[0],
                                                                              "maxLength": m[1]}))
RANDOM = st.recursive(FLAT, lambda inner: st.one_of(
    st.tuples(st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), st.sampled_from([True, False]), st.sets(
        st.sampled_from("abc"))).map(lambda p: {"type": "object", "properties": p[0], "additionalProperties": p[1],
                                                "required": sorted(p[2] & p[0].keys())}),
    st.tuples(inner, st.integers(0, 2), st.integers(2, 3)).map(
        lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": p[2]}),
    st.lists(inner, min_size=1, max_size=2).map(lambda p: {"anyOf": p})), max_leaves=6)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(RANDOM, st.integers(0, 10**6))
def test_random_schemas_are_never_broken(schema, seed):
    try: mask = json_schema(BYTES, schema, finish_within=300)
    except InputError: return                                  # bounds that contradict each other
    text, reason = drawn(mask, 300, seed)
    assert reason == "stop" and valid(schema, json.loads(text)), (schema, text)


def test_tool_calls_are_read_back():
    named = [{"type": "function", "function": {"name": n, "parameters": {"type": "object", "properties": {"x": {
        "$ref": "#/$defs/x"}}, "$defs": {"x": {"enum": [n]}}, "required": ["x"]}}} for n in ("f", "g")]
    for many in (False, True):
        mask = tools(BYTES, named, many=many, begin="<call>", end="</call>", finish_within=150)
        for seed in range(20):
            calls = mask.parse(drawn(mask, 150, seed)[0].decode())
            assert calls and all(json.loads(c["function"]["arguments"]) == {"x": c["function"]["name"]} for c in calls)
    for wrong in ([], {}, [{}], [named[0], named[0]], ["f"]):
        with pytest.raises(InputError): tools(BYTES, wrong)


# --- mutants ----------------------------------------------------------------------------------------------------------

class EndsEarly(Constraint):
    def allowed(self, state, left=INF):
        may = super().allowed(state, left)
        may[self.ends] = True
        return may


class NeverEnds(Constraint):
    def allowed(self, state, left=INF):
        may = super().allowed(state, left)
        if may.sum() > len(self.ends): may[self.ends] = False
        return may


class FirstByteOnly(Constraint):
    def missing(self, state):
        return np.array([0 if s and self.machine.run(state, s[:1]) else INF for s in self.strings])


class WholeCharacters(Constraint):
    def missing(self, state):
        whole = np.array([s.decode(errors="ignore").encode() == s for s in self.strings])
        return np.where(whole, super().missing(state), INF)


@pytest.mark.parametrize("mutant", [EndsEarly, NeverEnds, FirstByteOnly, WholeCharacters])
def test_wrong_masks_are_noticed(mutant):
    with pytest.raises(AssertionError): allowed_is_what_can_be_completed(mutant)


def forgets_required(self, schema, path): return SchemaReader_of_object(self, {**schema, "required": []}, path)
def forgets_closed(self, schema, path):
    return SchemaReader_of_object(self, {**schema, "additionalProperties": True}, path)
def ignores_bounds(self, schema, whole, path): return parse_regex(r"-?\d")
def any_length(self, schema, path): return Ref("string")
def one_item_more(self, schema, path):
    more = {"maxItems": schema["maxItems"] + 1} if "maxItems" in schema else {}
    return SchemaReader_of_array(self, {**schema, **more}, path)
SchemaReader_of_object, SchemaReader_of_array = SchemaReader.of_object, SchemaReader.of_array


@pytest.mark.parametrize("method, mutant, name", [
    ("of_object", forgets_required, "user, closed"), ("of_object", forgets_closed, "user, closed"),
    ("of_number", ignores_bounds, "age"), ("of_string", any_length, "one to three tags"),
    ("of_array", one_item_more, "one to three tags")])
def test_wrong_readings_of_a_schema_are_noticed(method, mutant, name, monkeypatch):
    judge = lambda: test_documents_get_the_verdict_of_jsonschema(name)
    judge()
    monkeypatch.setattr(SchemaReader, method, mutant)
    with pytest.raises(AssertionError): judge()


# --- llguidance, where it is installed --------------------------------------------------------------------------------

def test_documents_get_the_verdict_of_llguidance():
    "The same right and wrong documents, byte by byte, through both. Differences are counted by schema and bounded."
    llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed: pip install llguidance")
    peer = Peer(llguidance)
    agree, differ, covered = 0, {}, 0
    for name, schema in SUPPORTED.items():
        mask, matcher = json_schema(BYTES, schema), peer.matcher(schema)
        if matcher is None: continue
        covered += 1
        for document, text in itertools.islice(documents(name, 6), 40):
            if not usual(document): continue
            if mask.accepts(text) == peer.accepts(schema, text): agree += 1
            else: differ.setdefault(name, []).append((text, valid(schema, document)))
    print(f"{covered} of {len(SUPPORTED)} schemas covered by llguidance; {agree} verdicts agree; {differ}")
    assert agree > 300 and sum(map(len, differ.values())) < 0.1 * agree


class Peer:
    "llguidance over the same vocabulary."
    def __init__(self, library):
        self.library, tokens = library, BYTES.vocabulary.tokens
        class Tokens:
            eos_token_id, bos_token_id, special_token_ids = len(tokens) - 1, None, [len(tokens) - 1]
            def __init__(self): self.tokens = tokens
            def __call__(self, text): return list(text if isinstance(text, bytes) else text.encode())
        self.tokenizer = library.LLTokenizer(library.TokenizerWrapper(Tokens()))

    def matcher(self, schema):
        text = self.library.LLMatcher.grammar_from_json_schema(json.dumps(spec(schema)))
        matcher = self.library.LLMatcher(self.tokenizer, text, log_level=0)
        return None if matcher.get_error() else matcher

    def accepts(self, schema, text):
        matcher, data = self.matcher(schema), list(text.encode())
        return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
