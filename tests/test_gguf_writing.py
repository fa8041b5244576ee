"""A decoder written as a GGUF: llama.cpp must compute what the decoder does, for every architecture, our reader must
find the same model, and the bytes must be those of llama.cpp's own quantizer."""
import ctypes

import pytest
import torch

import llm_workbench as wb
from test_gguf_families import CASES, TOKENS, decoder_of, llama_cpp_logits, make, tensors_of
from llm_workbench.embedded import embedded_model
from llm_workbench.errors import CheckpointError, InputError, SourceError, UnsupportedError
from llm_workbench.families.loading import Decoder
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.families.table import read_config
from llm_workbench.files.gguf import GGUFFile
from llm_workbench.quantization import gguf_writing as writing
from llm_workbench.quantization.formats import quantize
from llm_workbench.quantization.gguf_sizes import predict_bytes, tensor_types
from llm_workbench.quantization.gguf_writing import gguf_metadata, gguf_parts, save_gguf

transformers = pytest.importorskip("transformers")
ROUNDED = {"gemma", "gemma2", "gemma3_text"}       # a GGUF holds 1 + w of their norms


def decoder_and_config(case):
    model, config = make(*CASES[case][:2])
    decoder = Decoder.from_checkpoint(config, model.state_dict())
    return model, config, decoder


def relative(a, b): return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_llama_cpp_computes_the_same(case, tmp_path):
    model, config, decoder = decoder_and_config(case)
    written = save_gguf(decoder, tmp_path / "m.gguf", "F32")
    file, oracle = GGUFFile(written.path), tensors_of(model.state_dict(), config)
    assert file.tensors.keys() == oracle.keys(), "names of the gguf package"
    for name, want in oracle.items():
        if name.startswith("rope_"): assert torch.allclose(file.load(name), want, rtol=1e-5)
        else: assert torch.equal(file.load(name), want), name
    again = open_checkpoint(written.path)
    for name, t in decoder.transformers_state().items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"): continue
        exact = config["model_type"] not in ROUNDED or "norm" not in name
        assert torch.equal(again.tensors[name], t) if exact else torch.allclose(again.tensors[name], t, atol=1e-6), name
    ours = decoder(TOKENS)
    assert (decoder_of(written.path)(TOKENS) - ours).abs().max() <= 1e-4
    if CASES[case][2]:
        cpp = llama_cpp_logits(written.path)
        assert relative(cpp, ours) <= 5e-3
        sure = ours.topk(2).values.diff(dim=-1).abs()[..., 0] > 1e-2 * cpp.abs().max()     # no ties
        assert torch.equal(cpp.argmax(-1)[sure], ours.argmax(-1)[sure]) and sure.sum() > 5


@torch.no_grad()
def test_arctic_is_read_back(tmp_path):
    config = dict(model_type="arctic", vocab_size=97, hidden_size=48, intermediate_size=20, num_hidden_layers=2,
                  num_attention_heads=6, num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2,
                  moe_layer_frequency=1, max_position_embeddings=64, rms_norm_eps=1e-5,
                  rope_parameters=dict(rope_type="default", rope_theta=1e4))
    torch.manual_seed(0)
    decoder = Decoder(read_config(config)).eval()
    for p in decoder.parameters(): p.copy_(torch.randn_like(p) * 0.3)
    decoder.source = config
    path = save_gguf(decoder, tmp_path / "m.gguf", "F32").path
    assert torch.equal(decoder_of(path)(TOKENS), decoder(TOKENS))
    assert relative(llama_cpp_logits(path), decoder(TOKENS)) <= 5e-3


# ---- mixtures

BLOCKS = dict(vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
              num_key_value_heads=2, max_position_embeddings=64, head_dim=32, pad_token_id=None,
              rope_parameters=dict(rope_type="default", rope_theta=1e4))
MIXED = ("F16", "BF16", "Q4_0", "Q8_0", "Q2_K", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "IQ4_XS", "MXFP4_MOE")
C_NAMES = {"MXFP4_MOE": 38}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    "A Llama whose rows are whole blocks of 256, and its F32 file."
    config = dict(BLOCKS, model_type="llama")
    torch.manual_seed(0)
    decoder = Decoder(read_config(config)).eval()
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.copy_(torch.randn_like(p) * (0.06 if p.ndim > 1 else 0.3) + ("norm" in name))
    decoder.source = config
    path = tmp_path_factory.mktemp("wide") / "f32.gguf"
    save_gguf(decoder, path, "F32", tokenizer=letters())
    return decoder, config, path


def letters():
    "A tokenizer of 97 tokens."
    from llm_workbench.text.bpe import ByteBPE, alphabet
    from llm_workbench.text.tokenizers import Tokenizer
    from llm_workbench.text.vocabularies import CONTROL, NORMAL, Vocabulary
    tokens = ["<s>", "</s>", *alphabet()[:94], "AB"]
    vocab = {token: i for i, token in enumerate(tokens)}
    types = [CONTROL] * 2 + [NORMAL] * 95
    return Tokenizer(Vocabulary(tokens, types, ByteBPE(vocab, [("A", "B")], "qwen2")), bos_id=0, eos_id=1, add_bos=True)


def quantized_by_llama_cpp(source, path, mixture):
    "What llama_model_quantize makes of a file."
    c = pytest.importorskip("llama_cpp").llama_cpp
    options = c.llama_model_quantize_default_params()
    options.ftype, options.nthread = C_NAMES.get(mixture) or getattr(c, f"LLAMA_FTYPE_MOSTLY_{mixture}"), 1
    assert c.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)) == 0
    return GGUFFile(path)


def differing(mine, theirs):
    return [n for n in theirs.tensors if mine.tensors[n].type != theirs.tensors[n].type
            or not torch.equal(mine.raw(n), theirs.raw(n))]


@pytest.mark.parametrize("mixture", MIXED)
def test_the_bytes_are_llama_cpps(mixture, wide, tmp_path):
    decoder, config, f32 = wide
    written = save_gguf(decoder, tmp_path / "mine.gguf", mixture)
    theirs = quantized_by_llama_cpp(f32, tmp_path / "theirs.gguf", mixture)
    mine = GGUFFile(written.path)
    assert differing(mine, theirs) == [] and mine.tensors.keys() == theirs.tensors.keys()
    assert written.types == tensor_types(config, mixture) and not written.asked and not written.unchanged
    assert written.nbytes == predict_bytes(config, mixture) == sum(t.nbytes for t in mine.tensors.values())
    assert mine.metadata["general.file_type"] == theirs.metadata["general.file_type"]


@pytest.mark.parametrize("mixture", ["Q8_0", "Q4_K_M", "Q2_K"])
@torch.no_grad()
def test_llama_cpp_computes_with_the_same_weights(mixture, wide, tmp_path):
    "llama.cpp rounds activations to 8 bits where weights are blocks: the distance is that, and no more."
    path = save_gguf(wide[0], tmp_path / "m.gguf", mixture, tokenizer=letters()).path
    ours, cpp = decoder_of(path)(TOKENS), llama_cpp_logits(path)
    assert relative(cpp, ours) <= 0.05
    if mixture == "Q2_K": assert relative(wide[0](TOKENS), ours) > 0.1, "the tolerance would not notice other weights"


@torch.no_grad()
def test_packed_matrices_are_not_rounded_twice(wide, tmp_path):
    decoder = wide[0]
    packed = quantize(decoder, "q4_k", lambda name, module: "q8_0" if name.endswith("v_proj") else True)
    written = save_gguf(packed, tmp_path / "m.gguf", "stored")
    again = open_checkpoint(written.path)
    assert set(written.types.values()) == {"Q4_K", "Q8_0", "F32"} and len(written.unchanged) == 2 + 7 * 3
    for name, module in packed.named_modules():
        if not hasattr(module, "packed"): continue
        kind, rows = again.tensors.own.packed(f"{name}.weight")
        assert kind.lower() == module.format.name and torch.equal(rows, module.packed.data), name
    mixed = save_gguf(packed, tmp_path / "n.gguf", "Q4_K_M")
    assert len(mixed.unchanged) == sum(kind == "Q4_K" and "attn_v" not in n for n, kind in mixed.types.items()) > 10
    nf4 = save_gguf(quantize(decoder, "nf4"), tmp_path / "o.gguf", "stored")
    assert set(nf4.types.values()) == {"F32"}, "a format that no GGUF has keeps its numbers"


def test_importance_changes_the_bytes_as_in_pack(wide, tmp_path):
    from llm_workbench.quantization.calibration import collect
    from llm_workbench.quantization.formats import FORMATS
    decoder = wide[0]
    seen = collect(decoder, [TOKENS])
    path = save_gguf(decoder, tmp_path / "m.gguf", "Q4_K_M", importance=seen).path
    file, plain = GGUFFile(path), GGUFFile(save_gguf(decoder, tmp_path / "n.gguf", "Q4_K_M").path)
    name = "layers.1.mlp.up_proj"
    weight, importance = decoder.get_submodule(name).dense(), seen[name].importance
    assert torch.equal(file.raw("blk.1.ffn_up.weight"), FORMATS["q4_k"].pack(weight, importance).data)
    assert not torch.equal(file.raw("blk.1.ffn_up.weight"), plain.raw("blk.1.ffn_up.weight"))


def test_rows_that_are_no_whole_blocks(tmp_path):
    _, config, decoder = decoder_and_config("qwen2")        # 48 and 64 columns
    written = save_gguf(decoder, tmp_path / "m.gguf", "Q4_K_M")
    assert written.types == tensor_types(config, "Q4_K_M")
    assert written.types["blk.0.attn_q.weight"] == "F16" and written.asked["blk.0.attn_q.weight"] == "Q4_K"
    assert written.types["blk.1.ffn_down.weight"] in ("Q5_0", "Q8_0") and "blk.1.ffn_down.weight" in written.asked
    assert "blk.0.attn_norm.weight" not in written.asked and "of another type" in repr(written)
    chosen = save_gguf(decoder, tmp_path / "m.gguf", lambda name: "Q8_0" if "ffn" in name else "F16")
    assert chosen.types["blk.0.ffn_down.weight"] == "Q8_0" and chosen.types["blk.0.ffn_up.weight"] == "F16"
    assert chosen.types["blk.0.attn_q.weight"] == "F16" and chosen.types["blk.0.attn_norm.weight"] == "F32"
    some = save_gguf(decoder, tmp_path / "m.gguf", {"blk.0.ffn_down.weight": "Q4_1"})
    assert {n for n, kind in some.types.items() if kind != "F32"} == {"blk.0.ffn_down.weight"}


# ---- the embedded model and its tokenizer

def test_the_embedded_file_comes_back(tmp_path):
    pytest.importorskip("llama_cpp")
    lm, original = wb.load(weights="stored"), GGUFFile(embedded_model())
    path = tmp_path / "again.gguf"
    written = save_gguf(lm, path, "stored")
    again = GGUFFile(path)
    assert differing(again, original) == [] and again.tensors.keys() == original.tensors.keys()
    assert len(written.unchanged) == sum(t.type not in ("F32", "F16") for t in original.tensors.values())
    mine, theirs = again.metadata, original.metadata
    for key in theirs:
        if key.startswith("tokenizer.") and not key.endswith("add_space_prefix"): assert mine[key] == theirs[key], key
    other = wb.load(path, weights="stored")
    ids = lm.tokenizer.encode("The capital of France is")
    with torch.no_grad(): assert torch.equal(other.decoder(torch.tensor([ids])), lm.decoder(torch.tensor([ids])))
    assert other.card.name == lm.card.name and other.card.licence == lm.card.licence
    assert other.decoder.source == lm.decoder.source


def test_tokenizers_of_other_kinds(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers
    from llm_workbench.text.sentencepiece import ScoreBPE
    from llm_workbench.text.tokenizers import Tokenizer
    from llm_workbench.text.vocabularies import NORMAL, UNUSED, LibraryVocabulary, Vocabulary
    lm_tokenizer = wb.load().tokenizer
    model = lm_tokenizer.vocabulary.model
    library = tokenizers.Tokenizer(models.BPE(dict(model.vocab), [p for p in sorted(model.ranks, key=model.ranks.get)]))
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    keys = Tokenizer(LibraryVocabulary(library), eos_id=2).to_gguf(49160)
    again = Tokenizer.from_gguf(keys)
    assert keys["tokenizer.ggml.pre"] in ("gpt-2", "smollm") and len(keys["tokenizer.ggml.tokens"]) == 49160
    assert keys["tokenizer.ggml.token_type"][-1] == UNUSED
    for text in ("Hello, world 2024!", "x = [1, 23]\n\tend ", "日本 🙂"):
        assert again.encode(text) == lm_tokenizer.encode(text)
    assert again.encode("<|im_end|>", special=True) == library.encode("<|im_end|>").ids
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    spm = Tokenizer(Vocabulary(list(vocab), [2, 3, 3, NORMAL, NORMAL, NORMAL], ScoreBPE(vocab, [0., 0, 0, -3, -2, -1])),
                    bos_id=1, eos_id=2, add_bos=True)
    back = Tokenizer.from_gguf(spm.to_gguf(8))
    assert back.encode("a a") == spm.encode("a a") and len(back.vocabulary) == 8
    pieces = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    wordpiece = Tokenizer(LibraryVocabulary(pieces))
    with pytest.raises(UnsupportedError, match="WordPiece.*tokenizer.model"): wordpiece.to_gguf()
    odd = tokenizers.Tokenizer(models.BPE(dict(model.vocab), list(model.ranks)))
    odd.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("l", "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    with pytest.raises(UnsupportedError, match="cuts text"): Tokenizer(LibraryVocabulary(odd)).to_gguf()


def test_the_probe_tells_pre_tokenizers_apart():
    from llm_workbench.text.pre_tokenizers import PATTERNS, pre_tokenize
    from llm_workbench.text.tokenizers import PROBE
    cuts = {name: tuple(pre_tokenize(PROBE, name)) for name in PATTERNS}
    assert len(set(cuts.values())) == len(cuts), {n: [m for m in cuts if m != n and cuts[m] == cuts[n]] for n in cuts}


def test_llama_cpp_reads_our_tokenizer(wide):
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(wide[2]), vocab_only=True, verbose=False)
    assert llama.tokenize(b"ABACAB", add_bos=True) == letters().encode("ABACAB") and llama.token_eos() == 1


# ---- refusals

def test_what_is_refused(wide, tmp_path):
    decoder, path = wide[0], tmp_path / "m.gguf"
    bare = Decoder(decoder.config)
    for bad, kind, word in [
            (lambda: save_gguf(decoder, path, "Q4_KM"), UnsupportedError, "Did you mean 'Q4_K_M'"),
            (lambda: save_gguf(decoder, path, lambda name: "Q9"), UnsupportedError, "Q9"),
            (lambda: save_gguf(decoder, path, {"blk.0.attn_q.weight": "I8"}), UnsupportedError, "I8"),
            (lambda: save_gguf(bare, path), UnsupportedError, "ModelConfig"),
            (lambda: save_gguf({}, path), InputError, "dict"),
            (lambda: save_gguf(decoder, tmp_path / "none" / "m.gguf"), SourceError, "Cannot write")]:
        with pytest.raises(kind, match=word): bad()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind, changes, word", [
    ("llama", dict(num_key_value_heads=1, max_position_embeddings=8, rope_parameters=dict(
        rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rotations"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), "windows"),
    ("qwen2_moe", dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1],
                       shared_expert_intermediate_size=24), "moe_layers"),
    ("qwen3_moe", dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=10,
                       norm_topk_prob=False), "router"),
    ("smollm3", dict(num_hidden_layers=4, no_rope_layers=[0, 1, 1, 0]), "rotations"),
    ("gemma2", dict(head_dim=16, query_pre_attn_scalar=24, num_hidden_layers=4), "attention_scale"),
    ("falcon", dict(new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True, alibi=False),
     "falcon")])
def test_what_a_gguf_cannot_say_is_refused(kind, changes, word, tmp_path):
    model, config = make(kind, changes)
    decoder = Decoder.from_checkpoint(config, model.state_dict())
    with pytest.raises(UnsupportedError, match=word): save_gguf(decoder, tmp_path / "m.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file(wide, tmp_path):
    decoder, path = quantize(wide[0], "q8_0"), tmp_path / "m.gguf"
    path.write_bytes(b"old")
    decoder.get_submodule("layers.2.mlp.down_proj").packed.data[:, :2] = 255      # scales that are NaN
    with pytest.raises((InputError, CheckpointError), match="NaN"): save_gguf(decoder, path, "Q4_K_M")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---- known-wrong variants


def _swapped(parts):
    out = dict(parts)
    for name in parts:
        if "ffn_gate.weight" in name:
            up = name.replace("gate", "up")
            out[name], out[up] = parts[up], parts[name]
    return out


def _unturned(decoder, parts):
    own = writing.held_parts(decoder)
    return parts | {f"blk.{i}.attn_{x}.weight": own[f"layers.{i}.self_attn.{x}_proj.weight"]
                    for i in range(len(decoder.layers)) for x in "qk"}


def _no_offset(decoder, parts):
    own = writing.held_parts(decoder)
    return parts | {f"blk.{i}.attn_norm.weight": own[f"layers.{i}.attn_norm.weight"]
                    for i in range(len(decoder.layers))}


@pytest.mark.parametrize("case, wrong", [("llama, rope_freqs", _unturned), ("gemma", _no_offset),
                                         ("qwen2", lambda decoder, parts: _swapped(parts))])
@torch.no_grad()
def test_llama_cpp_notices_wrong_layouts(case, wrong, tmp_path, monkeypatch):
    _, _, decoder = decoder_and_config(case)
    right = writing.gguf_parts
    monkeypatch.setattr(writing, "gguf_parts", lambda decoder: wrong(decoder, right(decoder)))
    path = save_gguf(decoder, tmp_path / "m.gguf", "F32").path
    assert relative(llama_cpp_logits(path), decoder(TOKENS)) > 0.02


def test_a_table_of_types_off_by_one_layer_is_noticed(wide, tmp_path, monkeypatch):
    decoder, _, f32 = wide
    right = writing.chosen_types

    def late(parts, *rest):
        types, asked = right(parts, *rest)
        shifted = {n: types[n.replace(f"blk.{n.split('.')[1]}.", f"blk.{(int(n.split('.')[1]) + 1) % 3}.")]
                   if n.startswith("blk.") else kind for n, kind in types.items()}
        return shifted, asked
    monkeypatch.setattr(writing, "chosen_types", late)
    path = save_gguf(decoder, tmp_path / "m.gguf", "Q4_K_M").path
    assert differing(GGUFFile(path), quantized_by_llama_cpp(f32, tmp_path / "theirs.gguf", "Q4_K_M"))


def test_a_promise_that_is_not_kept_leaves_nothing(tmp_path):
    from llm_workbench.files.gguf import Later, write_gguf
    path, made = tmp_path / "m.gguf", []

    def make(n): made.append(n); return torch.full((2, 32), float(n))
    write_gguf(path, {}, {str(n): Later((2, 32), lambda n=n: make(n)) for n in range(3)}, dict.fromkeys("012", "Q8_0"))
    file = GGUFFile(path)
    assert made == [0, 1, 2] and [file.load(n)[0, 0].item() for n in "012"] == pytest.approx([0, 1, 2], abs=1e-2)
    before = path.read_bytes()
    for later, types, word in [(Later((3, 32), lambda: make(1)), {"0": "F32"}, "promised"),
                               (Later((2, 32), list), {}, "type"),
                               (Later((2, 33), lambda: make(1)), {"0": "Q8_0"}, "blocks")]:
        with pytest.raises(CheckpointError, match=word): write_gguf(path, {}, {"0": later}, types)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@torch.no_grad()
def test_llama_cpp_leaves_out_the_window_of_mistral(tmp_path):
    "It is in the file, and our reader takes it; llama.cpp computes as if there were none."
    from models import SMALL
    model, config = make("mistral", SMALL["mistral"][0])
    decoder = Decoder.from_checkpoint(config, model.state_dict())
    path = save_gguf(decoder, tmp_path / "m.gguf", "F32").path
    cpp, ours = llama_cpp_logits(path), decoder(TOKENS)
    assert torch.equal(decoder_of(path)(TOKENS), ours) and relative(cpp, ours) > 0.1
    assert relative(cpp, decoder.with_config(sliding_window=None)(TOKENS)) <= 1e-4
