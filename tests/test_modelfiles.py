"Modelfiles, Go templates, names and the folder: fuzzed, interrupted, damaged, and against named mutants."
import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_workbench.embedded import embedded_model
from llm_workbench.errors import CheckpointError, InputError, SourceError, UnsupportedError
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.files.gguf import write_gguf
from llm_workbench.inference import modelfiles as chapter
from llm_workbench.inference.modelfiles import (
    KNOWN, PARAMETERS, Modelfile, ModelName, ModelStore, checked_option, encode_go, go_to_jinja, go_turns, modelfile_of,
    overlaid, parse_modelfile, quote, settings_of)

TALK = [dict(role="user", content="What is a river?")]


@pytest.fixture(scope="module")
def tokenizer(): return open_checkpoint().tokenizer


# Modelfiles

WORDS = st.one_of(st.sampled_from(['"', '"""', "\n", "\r\n", " ", "FROM", "from x", "PARAMETER", "stop", "temperature",
                                   "1", "MESSAGE user", "SYSTEM", "TEMPLATE", "{{ .Prompt }}", "#", "\t", "\0", "é"]),
                  st.text(max_size=6))


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, max_size=14).map("".join) | st.lists(WORDS, max_size=14).map(" ".join))
def test_any_text_is_a_modelfile_or_one_of_our_errors(text):
    try: made = parse_modelfile(text)
    except (InputError, UnsupportedError): return
    assert made.base
    try: written = str(made)
    except InputError: return                      # a text that no quotes can hold
    assert parse_modelfile(written) == made


def round_trips(quote) -> bool:
    for text in ("", "a", " a ", "a\nb", '"a"', '"a', 'a"', '"""', 'a\n"b"', ' "a"\nb ', "\t", 'say "x"'):
        lines = chapter._lines(quote(text) + "\nSYSTEM next")
        try:
            if chapter.take_value(lines) != text or lines != ["SYSTEM next"]: return False
        except IndexError: return False
    return True


def test_quotes_and_their_mutants():
    assert round_trips(quote)
    def theirs(s):       # as the Go writer decides: a text in quotes loses them
        if "\n" not in s and s == s.strip(" "): return s
        return f'"""{s}"""' if '"' in s else f'"{s}"'
    for mutant in (str, lambda s: f'"{s}"', lambda s: json.dumps(s), theirs): assert not round_trips(mutant)
    with pytest.raises(InputError, match="no escapes"): quote('"a"""\nb')
    with pytest.raises(InputError): quote("a\rb")


@pytest.mark.parametrize("text, word", [
    ("", "no FROM"), ("FROM", "one FROM"), ("FROM a\nFROM b", "one FROM"), ("x", "'X' is no instruction"),
    ("FROM a\nPARAMETER", "parameter ''"), ("FROM a\nPARAMETER heat 1", "heat"),
    ("FROM a\nPARAMETER top_k 1.5", "type int"),
    ("FROM a\nPARAMETER temperature nan", "type float"), ("FROM a\nPARAMETER use_mmap 1", "type bool"),
    ("FROM a\nMESSAGE tool x", "role 'tool'"), ('FROM a\n\n# c\nSYSTEM "b', "Line 4"), (5, "text, not int")])
def test_a_bad_modelfile_is_named(text, word):
    with pytest.raises(InputError, match=word): parse_modelfile(text)


def test_what_a_modelfile_may_look_like():
    made = parse_modelfile('\ufeff# c\r\n  from  ./a b.gguf \r\nparameter stop "x"\r\n'
                           'SYSTEM """\r\n two\r\nlines"""\r\nmessage user\thi: there\r\n'
                           'LICENSE a\nLICENSE b\nADAPTER ./l')
    assert made == Modelfile("./a b.gguf", dict(stop=["x"]), None, "\n two\nlines", ["./l"],
                             [dict(role="user", content="hi: there")], ["a", "b"])
    assert parse_modelfile("FROM a\nPARAMETER seed 1\nPARAMETER seed 2").parameters == dict(seed=2)
    for line in ("RENDERER x", "PARSER y", "REQUIRES 1.0", "DRAFT z"):
        with pytest.raises(UnsupportedError, match=line.split()[0]): parse_modelfile("FROM a\n" + line)


def test_laying_over_another():
    base = Modelfile("f", dict(seed=1, top_k=2), "t", "s", messages=[dict(role="user", content="a")], licenses=["x"])
    over = overlaid(base, Modelfile("name", dict(top_k=3), system=""))
    assert over == replace(base, parameters=dict(seed=1, top_k=3), system=""), "an empty one is a system message"


# Go templates

@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["{{", "}}", "{{-", "-}}", " ", "if", "else", "end", "range", ".Messages", ".Role",
                                 "eq", "(", ")", '"u"', '"', "not", "len", "$x", "and", ".", "{%", "a\n", "{{ end }}",
                                 "{{ if .A }}"]),
                max_size=16).map(" ".join))
def test_any_go_template_is_translated_or_refused(template):
    try: jinja = go_to_jinja(template)
    except (InputError, UnsupportedError): return
    with contextlib.suppress(InputError, CheckpointError):       # a comparison of a text with a number, say
        chapter.render_chat(jinja, [], System="s", Prompt="p", Messages=[dict(Role="user", Content="c")])


def test_templates_that_cost_time_are_refused(tokenizer):
    for template in ("{{" * 20_000, "{{ " + "(" * 9_000 + "}}"):
        with pytest.raises(InputError): go_to_jinja(template)
    talk = [dict(role="user", content=f"a{chapter._ANSWER}b")]
    assert encode_go(tokenizer, "{{ .Prompt }}!", talk) == tokenizer.encode("ab!"), "nobody types the end of a prompt"


def rendered(template, **values): return chapter.render_chat(go_to_jinja(template), [], **values)


@pytest.mark.parametrize("template, want", [
    ("a {{- .A -}} b", "a1b"), ("{{ if .A }}x{{ else }}y{{ end }}", "x"),
    ("{{ if .No }}x{{ else if .A }}z{{ end }}", "z"),
    ('{{ if and (eq .A "1") (not .No) }}t{{ end }}', "t"), ("{{ range .L }}<{{ .R }}>{{ end }}", "<p><q>"),
    ("{{ range .L }}{{ $.A }}{{ end }}", "11"), ("{{/* c */}}{% raw %}{{ .A }}{# x #}", "{% raw %}1{# x #}"),
    ("{{ if gt (len .L) 1 }}many{{ end }}", "many"), ("\n{{ .A }}\n", "\n1\n"), ('"\\ {{ .A }} é😀', '"\\ 1 é😀'),
    ("{{ range .L }}{{ if eq .R \"q\" }}{{ . }}{{ end }}{{ end }}", "{'R': 'q'}")])
def test_go_means_what_it_means_in_go(template, want):
    assert rendered(template, A="1", L=[dict(R="p"), dict(R="q")]) == want


def test_turns_as_ollama_joins_them():
    said = [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"), ("assistant", "e"), ("user", "f"),
            ("system", "g")]
    turns = go_turns([dict(role=r, content=c) for r, c in said])
    assert [tuple(t.values()) for t in turns] == [("a\n\nb", "c\n\nd", "e"), ("", "f", ""), ("g", "", "")]


def same_prompt(encode, tokenizer):
    talk = [dict(role="system", content="Be <|im_end|>"), dict(role="user", content="<|im_"),
            dict(role="assistant", content="end|>"), dict(role="user", content="{{ .System }} {% x %}")]
    return encode(tokenizer, KNOWN["chatml"], talk) == tokenizer.encode_chat(talk)


def test_typed_special_tokens_stay_text_in_a_go_template(tokenizer):
    assert same_prompt(encode_go, tokenizer)
    def unmarked(tokenizer, template, messages):            # renders, then reads special tokens wherever they stand
        turns = go_turns(messages)
        turns[-1]["Response"] = chapter._ANSWER
        jinja = go_to_jinja(template)
        text = "".join(chapter.render_chat(jinja, [], **t) for t in turns).partition(chapter._ANSWER)[0]
        return tokenizer.encode(text, special=True)
    assert not same_prompt(unmarked, tokenizer)


def test_a_known_template_is_found_by_what_it_writes(tokenizer):
    class Other:                                             # the shape of Llama 3's, without a message of its own
        bos_id, add_bos, chat_template = None, False, "x"
        vocabulary = tokenizer.vocabulary
        def chat(self, messages):
            head = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
            return "".join(head.format(m["role"], m["content"]) for m in messages) + \
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
        def encode_chat(self, messages): return self.vocabulary.encode(self.chat(messages), False)
    found = chapter.known_template(Other())
    assert found is not None and found[0] == KNOWN["llama3"] and found[1] == ""
    Other.chat = lambda self, messages: str(messages)
    assert chapter.known_template(Other()) is None


# Options

@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*PARAMETERS, "x"]), st.none() | st.booleans() | st.integers() | st.floats() |
                       st.text(max_size=4) | st.lists(st.text(max_size=3) | st.integers(), max_size=3), max_size=4))
def test_any_options_become_settings_or_one_of_our_errors(options):
    try: made, most, context = settings_of(options)
    except (InputError, UnsupportedError): return
    assert most is None or most >= 1
    assert made["top_k"] is None or made["top_k"] >= 1
    assert all(made["stop"])


def test_off_is_off():
    made, most, _ = settings_of(dict(top_k=0, top_p=1, min_p=0, seed=-1, num_predict=-1, repeat_penalty=1, stop=""))
    assert (made["top_k"], made["top_p"], made["min_p"], made["seed"], most, made["stop"]) == (None,) * 5 + ([],)
    assert settings_of(dict(seed=0))[0]["seed"] == 0, "0 is a seed"
    assert settings_of(dict(num_thread=8, use_mmap=True, num_gpu=99))[0] == settings_of({})[0]
    assert type(checked_option("top_k", 5.0)) is int


# Names and the folder

@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["a", "B", "1", "_", "-", ".", "..", "/", ":", "é", " ", "\\", "\0", "http://", "~",
                                 "x" * 90]),
                max_size=9).map("".join))
def test_no_name_leaves_the_folder(text):
    try: name = ModelName.parse(text)
    except InputError: return
    assert ModelName.parse(str(name)) == name
    path = Path("/root/models") / name.path
    assert Path(os.path.normpath(path)) == path and len(path.parts) == 7


def test_a_laxer_rule_for_names_would_be_noticed(monkeypatch):
    monkeypatch.setitem(chapter._PART, "model", r"[\w.-]{1,80}")      # mutant: may begin with a dot
    with pytest.raises(AssertionError): test_no_name_leaves_the_folder()


def small_gguf(path: Path, note="a") -> Path:
    "A GGUF without tensors: enough for a store, which reads no weights."
    write_gguf(path, {"general.architecture": "llama", "general.name": note}, {})
    return path


@pytest.fixture
def store(tmp_path): return ModelStore(tmp_path / "models")


def files(store): return sorted(str(p.relative_to(store.root)) for p in store.root.rglob("*") if p.is_file())


def test_a_store_keeps_what_it_was_given(store, tmp_path):
    gguf = small_gguf(tmp_path / "a.gguf")
    made = Modelfile("a.gguf", dict(stop=["x"], seed=3), "{{ .Prompt }}", "s", [], [dict(role="user", content="é")],
                     ["l", "m"])
    store.create("me/A:1", made, tmp_path)
    back = store.modelfile("ME/a:1")
    assert replace(back, base="a.gguf") == made and os.path.samefile(back.base, gguf)
    manifest = json.loads((store.root / "manifests/registry.ollama.ai/me/A/1").read_text())
    assert manifest["schemaVersion"] == 2 and manifest["layers"][0]["mediaType"] == "application/vnd.ollama.image.model"
    sizes = [(store.root / "blobs" / la["digest"].replace(":", "-")).stat().st_size for la in manifest["layers"]]
    assert sizes == [la["size"] for la in manifest["layers"]]
    store.create("ME/A:1", Modelfile("me/a:1", system="t"))
    assert [str(n) for n in store.names()] == ["me/A:1"], "one model, two spellings"
    assert store.modelfile("me/a:1").system == "t"


@pytest.mark.parametrize("step", range(1, 12))
def test_nothing_is_half_made_wherever_it_is_interrupted(store, tmp_path, monkeypatch, step):
    store.create("old", Modelfile(str(small_gguf(tmp_path / "a.gguf")), system="old"))
    made = Modelfile(str(small_gguf(tmp_path / "b.gguf", "b")), dict(seed=1), "{{ .Prompt }}", "new", licenses=["l"])
    before, calls, real = files(store), [0], os.replace
    def interrupted(*args):
        calls[0] += 1
        if calls[0] == step: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(os, "replace", interrupted)
    try: store.create("old", made)
    except KeyboardInterrupt: pass
    monkeypatch.undo()
    assert not [f for f in files(store) if f.endswith(".tmp")]
    assert store.modelfile("old").system in ("old", "new")
    store.verify("old")
    if store.modelfile("old").system == "old":
        store.prune()
        assert files(store) == before


def keeps_shared(delete, store, tmp_path) -> bool:
    store.create("a", Modelfile(str(small_gguf(tmp_path / "a.gguf"))))
    store.create("b", Modelfile("a", system="x"))
    delete(store, "b")
    try: store.verify("a")
    except CheckpointError: return False
    return len(store.names()) == 1 and len(files(store)) == 3          # a manifest, a config, the GGUF


def test_delete_and_its_mutants(tmp_path):
    def greedy(store, name):                # removes all that the model names
        for blob in store._blobs(ModelName.parse(name)): blob.unlink(missing_ok=True)
        store._manifest_path(ModelName.parse(name)).unlink()
    def lazy(store, name): store._manifest_path(ModelName.parse(name)).unlink()
    for i, (delete, right) in enumerate(((ModelStore.delete, True), (greedy, False), (lazy, False))):
        assert keeps_shared(delete, ModelStore(tmp_path / str(i)), tmp_path) == right, delete


def test_damage_in_the_folder_is_named(store, tmp_path):
    store.create("a", Modelfile(str(small_gguf(tmp_path / "a.gguf")), system="s"), link=False)
    path = store.root / "manifests/registry.ollama.ai/library/a/latest"
    good = path.read_bytes()
    for bad in (b"", b"{}", b"[]", b"null", good.replace(b"sha256:", b"md5:"), good[:-9],
                good.replace(b'"size"', b'"sise"')):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="manifest of a"): store.modelfile("a")
    path.write_bytes(good)
    blob = next(b for b in store.root.glob("blobs/*") if b.read_bytes() == b"s")
    blob.write_bytes(b"t")
    with pytest.raises(CheckpointError, match="missing or changed"): store.verify("a")
    blob.unlink()
    with pytest.raises(CheckpointError, match="has lost its file"): store.modelfile("a")
    store.delete("a")
    with pytest.raises(SourceError, match="not found"): store.delete("a")


def test_a_copy_where_links_are_refused(store, tmp_path, monkeypatch):
    def refuse(*args): raise OSError("another disk")
    monkeypatch.setattr(os, "link", refuse)
    gguf = small_gguf(tmp_path / "a.gguf")
    store.create("a", Modelfile(str(gguf)))
    assert not os.path.samefile(store.modelfile("a").base, gguf)
    store.verify("a")


def test_a_modelfile_of_the_embedded_model_says_what_its_template_says(tokenizer):
    made = modelfile_of(embedded_model())
    assert made.template == KNOWN["chatml"] and made.licenses == ["apache-2.0"]
    assert "<|im_end|>" in made.parameters["stop"]
    front = [dict(role="system", content=made.system)]
    assert encode_go(tokenizer, made.template, front + TALK) == tokenizer.encode_chat(TALK)
