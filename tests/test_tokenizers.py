"Tokenizers: equal to llama.cpp, tokenizers and transformers on nasty text; streams, damage, and mutants to be noticed."
import ctypes
import functools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm_workbench.text import bpe, pre_tokenizers as cuts
from llm_workbench.text.bpe import ByteBPE, byte_chars, merge, spell, train_bpe
from llm_workbench.text.pre_tokenizers import PATTERNS, well_formed
from llm_workbench.text.tokenizers import Tokenizer
from llm_workbench.text.vocabularies import ByteStream, Vocabulary
from llm_workbench.files.gguf import GGUFFile
from llm_workbench.embedded import embedded_model
from llm_workbench.errors import CheckpointError, InputError, SourceError, UnsupportedError, WorkbenchError

MODEL = embedded_model()
T = "tokenizer.ggml."
llama_cpp = pytest.importorskip("llama_cpp")  # it may still be being compiled
SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))

TEXTS = json.loads((Path(__file__).parent.parent / "nbs/04_text/hard_texts.json").read_text(encoding="utf-8"))
HARD = [*TEXTS["texts"].values(), "a" * 2000, "a" * 3000 + " " * 300 + "!" * 300, "!" * 500 + "\n" * 100]


def nasty(seed, count, longest=24):
    rng = random.Random(seed)
    return ["".join(rng.choices(TEXTS["alphabet"], k=rng.randint(1, longest))) for _ in range(count)]


@functools.cache
def metadata(): return GGUFFile(MODEL).metadata


@functools.cache
def tok(): return Tokenizer.from_gguf(metadata())


@functools.cache
def llama(path=str(MODEL)): return llama_cpp.Llama(path, vocab_only=True, verbose=False)


def write_vocab(path, model, tokens, types, merges=None, scores=None, pre=None, **more):
    "A GGUF file that holds nothing but a tokenizer."
    w = gguf.GGUFWriter(str(path), "llama")
    for what in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(w, f"add_{what}")(8)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model(model)
    w.add_token_list(tokens)
    w.add_token_types(types)
    if pre: w.add_tokenizer_pre(pre)
    if merges: w.add_token_merges(merges)
    if scores: w.add_token_scores(scores)
    w.add_bos_token_id(more.pop("bos", 1))
    w.add_eos_token_id(more.pop("eos", 2))
    for name, value in more.items(): w.add_bool(T + name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return GGUFFile(path).metadata, llama(str(path))


def differing(tokenizer, reference, texts, special=(False, True), add_bos=False):
    return [(t, s) for t in texts for s in special
            if tokenizer.encode(t, s, add_bos=add_bos) != reference.tokenize(t.encode(), add_bos=add_bos, special=s)]


# --- the model's own file against llama.cpp ---

def test_model_file_equals_llama_cpp():
    wrong = differing(tok(), llama(), HARD + nasty(0, 400))
    assert not wrong, f"{len(wrong)} texts differ, first {wrong[0]}"


def test_every_old_character_is_classified_as_in_llama_cpp():
    "Letters, numbers, marks and blanks of the Basic Multilingual Plane that Unicode 14 already had."
    import unicodedata
    chars = [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c)) != "Cn"]
    for i in range(0, len(chars), 4000):
        text = "".join(f"x{c} \n\n{c}1" for c in chars[i:i + 4000])
        assert tok().encode(text) == llama().tokenize(text.encode(), add_bos=False), (
            f"a character near U+{ord(chars[i]):04X} is cut differently")


def test_ids_and_roundtrip():
    t = tok()
    assert (t.bos_id, t.eos_id, t.pad_id, t.unk_id, t.eos_ids, t.add_bos) == (1, 2, 2, 0, [0, 2], False)
    assert t.vocab_size == 49152
    assert t.encode("") == [] and t.decode([]) == "" and t.encode("x", add_bos=True)[0] == 1
    assert t.encode("<|im_start|>x", special=True, add_bos=True).count(1) == 1, "a second beginning was added"
    absent = {b for b, c in byte_chars().items() if c not in t.vocabulary.model.vocab}
    for text in HARD + nasty(1, 300):
        for special in (False, True):
            kept = bytes(b for b in text.encode() if b not in absent).decode("utf-8", "replace")
            assert t.decode(t.encode(text, special)) == kept


def test_surrogates_and_wrong_types():
    t = tok()
    assert t.encode("\ud800") == t.encode("\ufffd") and t.encode("a\ud83d\ude00b") == t.encode("a😀b")
    assert all(well_formed(text) == text for text in nasty(2, 200))
    for bad in (b"x", None, 3, ["x"]):
        with pytest.raises(InputError, match="must be a str"): t.encode(bad)
        with pytest.raises(InputError, match="must be a str"): cuts.pre_tokenize(bad)
        with pytest.raises(InputError, match="must be a str"): train_bpe(bad, 300)


def test_wrong_ids_get_a_sentence(tmp_path):
    folder_of(tmp_path, library_bpe("hello world", 300), eos_token="<|end|>")
    for t in (tok(), Tokenizer.from_file(tmp_path)):
        good = t.encode("hello world")
        assert t.decode(torch.tensor(good)) == t.decode(iter(good)) == "hello world"
        for bad in (-1, 49152, 2**40, "a", 1.5, None, [1]):
            with pytest.raises(InputError, match="token id"): t.decode([bad])
            with pytest.raises(InputError, match="token id"): t.pieces([bad])
            with pytest.raises(InputError, match="token id"): t.stream().push(bad)
        for bad in (None, 3, torch.tensor(3)):
            with pytest.raises(InputError, match="list of integers"): t.decode(bad)
        for bad in ("ab", torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)):
            with pytest.raises(InputError, match="list of ids"): t.decode(bad)


def test_wrong_sources_get_a_sentence(tmp_path):
    for bad in (None, 3):
        with pytest.raises(InputError): Tokenizer.from_file(bad)
    with pytest.raises(InputError, match="from_gguf"): Tokenizer.from_file(MODEL)
    for bad in (None, str(MODEL), [("a", 1)]):
        with pytest.raises(InputError, match="metadata"): Tokenizer.from_gguf(bad)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(SourceError, match="FIFO"): Tokenizer.from_file(tmp_path)


def test_heavy_libraries_are_imported_when_used():
    "Machines without them can import the modules, and a tokenizer from a GGUF needs none of them to be made."
    code = ("import sys; from llm_workbench.text.tokenizers import Tokenizer; from llm_workbench.text import marks;"
            "Tokenizer.from_gguf({'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.tokens': ['a'], "
            "'tokenizer.ggml.merges': []}); "
            "print({'regex', 'jinja2', 'tokenizers', 'transformers', 'torch'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_long_pieces_do_not_explode():
    "A quadratic merge needs hours for this; the heap seconds."
    assert len(tok().encode("ab" * 100_000)) > 1000


def test_the_conversion_trap():
    "transformers drops the digit rule of this file; if this fails it has been mended, and the notebook should say so."
    from transformers import AutoTokenizer
    converted = AutoTokenizer.from_pretrained(MODEL.parent, gguf_file=MODEL.name)
    right = llama().tokenize(b"\n\n1", add_bos=False)
    assert tok().encode("\n\n1") == right == [1116, 33]
    assert converted.encode("\n\n1", add_special_tokens=False) != right
    talk = [{"role": "user", "content": "한"}]
    assert tok().chat(talk) == converted.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


# --- other vocabularies against llama.cpp ---

@functools.cache
def crossing_vocabulary():
    "Merges learnt without any cuts: most cross the cuts of every pre-tokenizer, and a wrong cut shows in the ids."
    library = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=1400, initial_alphabet=list(byte_chars().values()), show_progress=False)
    library.train_from_iterator([spell(t) for t in nasty(3, 3000)], trainer)
    model, kinds = json.loads(library.to_str())["model"], gguf.TokenType
    tokens = ["<UNK>", "<BOS>", "<EOS>", "<think>"] + sorted(model["vocab"], key=model["vocab"].get)
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.USER_DEFINED] + [kinds.NORMAL] * len(model["vocab"])
    return tokens, types, [" ".join(m) for m in model["merges"]]


NAMES = [*sorted(PATTERNS), "llama3", "glm4", "starcoder", "olmo", "dbrx", "deepseek-r1-qwen", "llama4"]


@pytest.mark.parametrize("pre", NAMES)
def test_pre_tokenizers_equal_llama_cpp(pre, tmp_path):
    tokens, types, merges = crossing_vocabulary()
    read, reference = write_vocab(tmp_path / "v.gguf", "gpt2", tokens, types, merges, pre=pre)
    mine = Tokenizer.from_gguf(read)
    texts = [t for t in HARD if len(t) < 400] + nasty(4, 500) + ["a<think>b<EOS> <BOS>c", "<think><think>"]
    wrong = differing(mine, reference, texts)
    assert not wrong, f"{pre}: {len(wrong)} texts differ, first {wrong[0]}"
    assert mine.encode("x") == reference.tokenize(b"x", add_bos=True), "another opinion on whether texts begin with BOS"


def test_every_name_is_known_to_llama_cpp(tmp_path):
    tokens, types, merges = crossing_vocabulary()
    texts = ["CamelCase It'S 12345½,\n\n 한국어 漢字カ x\u0301", " don’t\r\n\t7th"]
    for name in cuts.pre_tokenizers():
        read, reference = write_vocab(tmp_path / f"{name}.gguf", "gpt2", tokens, types, merges, pre=name)
        mine = Tokenizer.from_gguf(read)
        assert not (wrong := differing(mine, reference, texts, (False,))), (name, wrong)
        assert mine.encode("x") == reference.tokenize(b"x", add_bos=True), name


@functools.cache
def sentencepiece_vocabulary():
    "Pieces with scores: characters, frequent strings, bytes; random scores with ties."
    rng, kinds = random.Random(5), gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", "<think>"] + [f"<0x{b:02X}>" for b in range(256)]
    pieces = set(" ".join(nasty(6, 50)).replace(" ", "▁")) - {"<", ">"}
    for t in nasty(7, 400):
        t = ("▁" + t.replace(" ", "▁"))[:40]
        pieces |= {t[i:i + n] for i in range(0, len(t), 3) for n in (2, 3, 4)}
    # llama.cpp ends a token at a NUL; without ▁ no space survives
    pieces = [p for p in sorted(pieces) if "\0" not in p and (p == "▁" or rng.random() < 0.8)]
    pieces = [p for p in pieces if p not in set(tokens)]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.USER_DEFINED] + [kinds.BYTE] * 256
    scores = [0.0] * 260 + [-float(rng.randint(0, 200)) for _ in pieces]
    return tokens + pieces, types + [kinds.NORMAL] * len(pieces), scores


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_llama_cpp(prefix, tmp_path):
    tokens, types, scores = sentencepiece_vocabulary()
    read, reference = write_vocab(tmp_path / "s.gguf", "llama", tokens, types, scores=scores, add_space_prefix=prefix)
    mine = Tokenizer.from_gguf(read)
    texts = HARD + nasty(8, 400) + ["a<think>b</s> <s>c", "</s>", " lead", "<s>x"]
    wrong = differing(mine, reference, texts)
    assert not wrong, f"{len(wrong)} texts differ, first {wrong[0]}"
    assert mine.encode("x") == reference.tokenize(b"x", add_bos=True)
    for t in texts:
        if "<" in t or "▁" in t: continue
        assert mine.decode(mine.encode(t, add_bos=False)) == t, f"{t!r} does not survive the round trip"


# --- training against the tokenizers library ---

def library_bpe(text, vocab_size, digits=False, special=("<|end|>",)):
    library = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    library.pre_tokenizer, library.decoder = pre_tokenizers.Sequence([*first, byte_level]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator([text], trainer)
    return library


def merges_of(library): return [tuple(m) for m in json.loads(library.to_str())["model"]["merges"]]


@pytest.mark.parametrize("seed", range(6))
def test_training_equals_the_library(seed):
    text = "\n".join(nasty(100 + seed, 300)) + " aaaa aaaaa aaa abab" * seed   # nearly every choice is a tie
    for pre, digits in (("gpt-2", False), ("smollm", True)):
        library = library_bpe(text, 600, digits)
        vocab, merges = train_bpe(text, 600, pre, ["<|end|>"])
        assert merges == merges_of(library) and vocab == library.get_vocab()
        mine = ByteBPE(vocab, merges, pre)
        for t in [text, *HARD, *nasty(200 + seed, 100)]: assert mine.encode(t) == library.encode(t).ids, repr(t[:60])


def test_training_stops_when_nothing_is_left():
    vocab, merges = train_bpe("abab", 10_000)
    assert merges == [("a", "b"), ("ab", "ab")] and len(vocab) == 258
    assert train_bpe("", 300) == ({c: i for i, c in enumerate(sorted(byte_chars().values()))}, [])


# --- streaming ---

def streamed(tokenizer, ids, **kw):
    stream = tokenizer.stream(**kw)
    return [*map(stream.push, ids), stream.flush()]


def test_stream_adds_up_and_shows_whole_characters():
    t, rng = tok(), random.Random(9)
    for text in HARD + nasty(10, 200):
        ids = t.encode(text, special=True)
        parts = streamed(t, ids)
        assert "".join(parts) == t.decode(ids)
        if "\ufffd" not in text: assert not any("\ufffd" in p for p in parts), "a piece of a character was shown"
    for _ in range(500):
        one = lambda: rng.randrange(t.vocab_size) if rng.random() < 0.5 else rng.randrange(130, 260)
        ids = [one() for _ in range(rng.randint(0, 20))]
        raw = b"".join(map(t.vocabulary.token_bytes, ids))
        assert "".join(streamed(t, ids)) == t.decode(ids) == raw.decode("utf-8", "replace")
        assert "".join(streamed(t, ids, skip_special=True)) == t.decode(ids, skip_special=True)


# --- tokenizer.json ---

def folder_of(tmp_path, library, **more):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=library, **more)
    wrapped.save_pretrained(tmp_path)
    return wrapped


def llama_like():
    "A SentencePiece-like tokenizer.json: BPE over characters with byte fallback, ▁ and a BOS token by post-processing."
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    library.train_from_iterator(["the cat sat on the mat 한국 return x"] * 9, trainer)
    data = json.loads(library.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                           special_tokens=[("<s>", 1)])
    return library


def test_folder_of_a_byte_level_model(tmp_path):
    library = library_bpe("".join(nasty(11, 200)), 500, True, ["<|end|>", "<|im_start|>", "<|im_end|>", "<pad>"])
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    wrapped = folder_of(tmp_path, library, eos_token="<|im_end|>", pad_token="<pad>", chat_template=template)
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[0, 2])))
    t = Tokenizer.from_file(tmp_path)
    assert (t.eos_id, t.pad_id, t.bos_id, t.eos_ids, t.add_bos) == (2, 3, None, [0, 2], False)
    assert t.vocab_size == len(wrapped)
    for text in HARD + nasty(12, 200):
        assert t.encode(text, special=True) == wrapped.encode(text, add_special_tokens=False)
        assert t.encode(text) == wrapped.encode(text, add_special_tokens=False, split_special_tokens=True)
        ids = t.encode(text, special=True)
        assert "".join(streamed(t, ids)) == t.decode(ids) == wrapped.decode(ids, clean_up_tokenization_spaces=False)
    talk = [{"role": "user", "content": "x<|im_end|>"}]
    assert t.chat(talk) == wrapped.apply_chat_template(talk, tokenize=False)
    assert t.encode_chat(talk).count(2) == 1 and t.encode(t.chat(talk), special=True).count(2) == 2
    rng = random.Random(13)
    for _ in range(300):
        ids = [rng.randrange(t.vocab_size) for _ in range(rng.randint(0, 15))]
        assert "".join(streamed(t, ids)) == t.decode(ids), ids


def test_folder_of_a_llama_like_model(tmp_path):
    wrapped = folder_of(tmp_path, llama_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    t = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert t.add_bos and (t.bos_id, t.eos_id, t.unk_id) == (1, 2, 0)
    for text in [x for x in HARD if x] + nasty(14, 150):
        if not text.startswith("<s>"):                                       # never two beginnings
            assert t.encode(text, special=True) == wrapped.encode(text)
        ids = t.encode(text)
        assert "".join(streamed(t, ids, skip_special=True)) == t.decode(ids, skip_special=True)
        if text.startswith("\ufeff") or "▁" in text or "<" in text: continue
        assert t.decode(ids, skip_special=True) == text
    with pytest.raises(UnsupportedError, match="no chat template"): t.chat([{"role": "user", "content": "x"}])


def test_threads_do_not_share_the_switch(tmp_path):
    folder_of(tmp_path, library_bpe("hello world", 300), eos_token="<|end|>")
    t, wrong = Tokenizer.from_file(tmp_path), []

    def work(special):
        for _ in range(400):
            if (0 in t.encode("a<|end|>b", special=special)) != special: wrong.append(special)
    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for x in threads: x.start()
    for x in threads: x.join()
    assert not wrong


def test_damaged_tokenizer_json(tmp_path):
    with pytest.raises(SourceError): Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="tokenizer.model"): Tokenizer.from_file(tmp_path)
    file = tmp_path / "tokenizer.json"
    good = library_bpe("hello hello world", 270).to_str()
    rng = random.Random(15)
    for bad in ["", "{", "[]", "null", "{}", '{"model": null}', "\x00" * 50, good[:-20], good.replace('"BPE"', '"XYZ"'),
                '{"a":' * 5000]:
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(CheckpointError): Tokenizer.from_file(tmp_path)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError): Tokenizer.from_file(tmp_path)
    for _ in range(300):
        chars = list(good)
        for _ in range(rng.randint(1, 4)):
            i = rng.randrange(len(chars))
            chars[i] = rng.choice(['"', "{", "}", "[", "]", ",", "9", "-", "x", "", "\\", "true"])
        file.write_text("".join(chars), encoding="utf-8")
        try: Tokenizer.from_file(tmp_path).encode("hello <|end|>")
        except WorkbenchError: pass
    file.write_text(good, encoding="utf-8")
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        for bad in ("{", "[]"):
            (tmp_path / name).write_text(bad)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")): Tokenizer.from_file(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9999, "x", null, 0]}')
    assert Tokenizer.from_file(tmp_path).eos_ids == [0]


def test_damaged_metadata():
    "Any value of any key replaced by something else: a named error, or a tokenizer that works."
    small = {T + "model": "gpt2", T + "pre": "smollm", T + "tokens": ["a", "b", "ab", "<s>"],
             T + "token_type": [1, 1, 1, 3], T + "merges": ["a b"], T + "bos_token_id": 3, T + "eos_token_id": 3,
             T + "add_bos_token": True, "tokenizer.chat_template": "{{ messages }}"}
    spm = {**small, T + "model": "llama", T + "scores": [0.0, 1.0, 2.0, 3.0]}
    junk = [None, 0, -1, 4, 2**63, 1.5, float("nan"), "", "x", "a b", [], [1], [None] * 4, ["a"] * 4, ["a", "b"],
            [0.5] * 4, ["", "", "", ""], [" "] * 4, {}, True, b"x", [[1]] * 4, [2**70] * 4]
    for whole in (small, spm):
        assert Tokenizer.from_gguf(whole).encode("ab")[0] == 3
        for key in whole:
            for value in junk:
                try: t = Tokenizer.from_gguf({**whole, key: value})
                except (CheckpointError, UnsupportedError): continue
                ids = t.encode("ab <s> ½", special=True)
                t.decode(ids)
            if key in (T + "tokens", T + "model"):
                without = {k: v for k, v in whole.items() if k != key}
                with pytest.raises((CheckpointError, UnsupportedError)): Tokenizer.from_gguf(without)
    with pytest.raises(UnsupportedError, match="Did you mean 'qwen2'"):
        Tokenizer.from_gguf({**small, T + "pre": "qwen22"})


# --- mutants: each is a mistake that the comparisons above must notice ---

@functools.cache
def other_ranks(reverse):
    ranks = tok().vocabulary.model.ranks
    if reverse: return {(b[::-1], a[::-1]): r for (a, b), r in ranks.items()}
    return {pair: -len(pair[0] + pair[1]) for pair in ranks}


def longest_first(symbols, ranks): return merge(symbols, other_ranks(False))


def from_the_right(symbols, ranks): return [s[::-1] for s in merge("".join(symbols)[::-1], other_ranks(True))][::-1]


class NaiveStream(ByteStream):
    def push(self, id): return self.vocabulary.token_bytes(id).decode("utf-8", "replace")


def smollm(*patterns): return lambda m: m.setitem(PATTERNS, "smollm", patterns)


GPT2 = cuts.GPT2
MUTANTS = {   # what is put in another's place
    "no digit rule": smollm(GPT2),
    "digits after the words": smollm(GPT2, r"\p{N}"),
    "ASCII digits only": smollm(r"[0-9]", GPT2),
    "no room for the last blank": smollm(r"\p{N}", GPT2.replace(r"\s+(?!\S)|", "")),
    "contractions of any case": smollm(r"\p{N}", "(?i)" + GPT2),
    "longest token first": lambda m: m.setattr(bpe, "merge", longest_first),
    "merges from the right": lambda m: m.setattr(bpe, "merge", from_the_right),
    "merges across cuts": lambda m: m.setattr(bpe, "pre_tokenize", lambda text, name: [text]),
    "matches only, gaps lost": lambda m: m.setattr(cuts, "isolate", lambda pattern, text: [
        match.group() for match in cuts.compiled(pattern).finditer(text)]),
    "special tokens not cut out": lambda m: m.setattr(
        Vocabulary, "split", lambda self, text, special: [text] if text else []),
}


def differs_from_llama_cpp():
    "A tokenizer of its own, since one remembers the pieces that it has seen."
    return bool(differing(Tokenizer.from_gguf(metadata()), llama(), HARD + nasty(0, 150)))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name, monkeypatch):
    MUTANTS[name](monkeypatch)
    assert differs_from_llama_cpp(), f"the comparison with llama.cpp does not notice: {name}"


def test_the_unchanged_code_is_no_mutant(): assert not differs_from_llama_cpp()


def test_naive_streaming_is_noticed():
    ids = tok().encode("한 👩‍🚀")
    naive = NaiveStream(tok().vocabulary)
    assert "".join([*map(naive.push, ids), naive.flush()]) != tok().decode(ids)


def test_training_mutants_are_noticed(monkeypatch):
    text = "\n".join(nasty(100, 300)) + " baaab aaaaab" * 30
    right, train = merges_of(library_bpe(text, 600)), lambda: train_bpe(text, 600, special=["<|end|>"])[1]
    assert train() == right
    replace, letters = bpe.replace_pair, bpe.alphabet
    with monkeypatch.context() as m:   # runs merged from the right
        m.setattr(bpe, "replace_pair", lambda symbols, pair, new: replace(symbols[::-1], pair[::-1], new)[::-1])
        assert train() != right
    with monkeypatch.context() as m:   # another order of the alphabet, so ties fall to other pairs
        m.setattr(bpe, "alphabet", lambda: letters()[::-1])
        assert train() != right
