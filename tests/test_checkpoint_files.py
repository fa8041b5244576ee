"""Checkpoint files: equal to the libraries on random files, one named error for every kind of damage, bounded time
and memory."""
import json
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from llm_workbench.files import gguf as G
from llm_workbench.files import safetensors as S
from llm_workbench.embedded import embedded_model
from llm_workbench.errors import CheckpointError, InputError, SourceError, UnsupportedError

MODEL = embedded_model()
MUTATIONS = 1000  # of each format


def raw(t): return S.tensor_bytes(t).numpy().tobytes()


def random_tensors(seed):
    "Random bytes as tensors of every type in several shapes."
    rng, out = np.random.default_rng(seed), {}
    for name, dtype in S.DTYPES.items():
        for shape in [(), (1,), (0, 4), (3, 5), (2, 3, 4)]:
            data = rng.integers(0, 2 if name == "BOOL" else 256, prod(shape) * dtype.itemsize, dtype=np.uint8)
            out[f"{name}.{len(out)}"] = (
                torch.tensor(data).view(dtype).reshape(shape) if data.size else torch.empty(shape, dtype=dtype)
            )
    names = rng.permutation(list(out))
    return {name: out[name] for name in names}


# --- safetensors against its library --------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_safetensors_equals_library(tmp_path, seed):
    tensors, meta = random_tensors(seed), [None, {}, {"format": "pt"}, {"é\n\x01": "\x7f\"\\😀"}][seed]
    S.save_safetensors(tensors, tmp_path / "ours", meta)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata=meta)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes(), "the writers differ"
    file = S.SafetensorsFile(tmp_path / "theirs")
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    assert set(file) == set(theirs) == set(tensors) and file.metadata == (meta or {})
    for name, t in tensors.items():
        for other in (file[name], theirs[name]):
            assert other.dtype == t.dtype and other.shape == t.shape and raw(other) == raw(t), name


def test_save_takes_any_tensor(tmp_path):
    "Odd names, views, parameters and lazily conjugated numbers."
    odd = {
        'é"\\\n\x01\x7f😀': torch.zeros(2),
        "b": torch.arange(12.0).reshape(3, 4).T,
        "a": torch.arange(9)[::2],
        "": torch.ones(1),
        "w": torch.nn.Parameter(torch.ones(2)),
        "none": torch.from_numpy(np.zeros((0, 3), np.float32)),
        "c": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
    }
    S.save_safetensors(odd, tmp_path / "x")
    plain = {k: t.detach().resolve_conj().contiguous() for k, t in odd.items()}
    assert (tmp_path / "x").read_bytes() == safetensors.torch.save(plain)
    S.save_safetensors({}, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == safetensors.torch.save({}) and len(S.SafetensorsFile(tmp_path / "x")) == 0


@pytest.mark.parametrize("tensors, metadata", [
    ({"a": [1]}, None), ({3: torch.zeros(1)}, None), ({"__metadata__": torch.zeros(1)}, None),
    ({"a": torch.zeros(1)}, {"n": 3}),
    ({"a": torch.zeros(1, dtype=torch.complex128)}, None), ({"a": torch.zeros(1, device="meta")}, None),
    ({"a": torch.eye(3).to_sparse()}, None)])
def test_save_refuses(tmp_path, tensors, metadata):
    with pytest.raises(InputError): S.save_safetensors(tensors, tmp_path / "x", metadata)
    assert not list(tmp_path.iterdir()), "a refused save left a file"


@pytest.mark.parametrize("save", [S.save_safetensors, lambda tensors, path: G.write_gguf(path, {}, tensors)])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, save, monkeypatch):
    path = tmp_path / "model"
    save({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    def stop(_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(S.os, "fsync", stop)
    with pytest.raises(OSError): save({"a": torch.zeros(400)}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    with pytest.raises(SourceError): save({}, tmp_path / "no such folder" / "x")


def test_windows_are_private_and_outlive_the_file(tmp_path):
    path = tmp_path / "x"
    S.save_safetensors({"a": torch.arange(4.0)}, path)
    window = S.SafetensorsFile(path)["a"]
    S.save_safetensors({"a": torch.zeros(4)}, path)          # replaced under the reader
    assert window.tolist() == [0, 1, 2, 3]
    window += 1
    assert S.SafetensorsFile(path)["a"].tolist() == [0, 0, 0, 0], "an in-place change reached the file"


def test_unaligned_data_is_copied(tmp_path):
    "Other writers need not fill the header up: then tensors start at odd bytes."
    header = json.dumps({"a": dict(dtype="F32", shape=[3], data_offsets=[0, 12])}).encode()
    header += b" " * (1 - len(header) % 8)
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + np.arange(3, dtype=np.float32).tobytes())
    a = S.SafetensorsFile(tmp_path / "x")["a"]
    assert a.tolist() == [0, 1, 2] and a.data_ptr() % 4 == 0


def test_sharded(tmp_path):
    parts = {f"model-0000{i}-of-00003.safetensors": {f"layer.{i}.w": torch.full((2, 2), float(i))} for i in (1, 2, 3)}
    for name, part in parts.items(): S.save_safetensors(part, tmp_path / name)
    index = {"metadata": {"total_size": 48}, "weight_map": {t: name for name, part in parts.items() for t in part}}
    (tmp_path / S.INDEX).write_text(json.dumps(index))
    model = S.open_safetensors(tmp_path)
    assert len(model) == 3 and all(torch.equal(model[t], part[t]) for part in parts.values() for t in part)
    assert all(model.info(t).shape == (2, 2) for t in model)
    with pytest.raises(S.MissingTensor, match="layer.1.w"): model["layer.1.ww"]
    assert "layer.9.w" not in model and model.get("layer.9.w") is None


@pytest.mark.parametrize("index, word", [
    ('{"weight_map": {"a": "../x.safetensors"}}', "plain file name"), ('{"weight_map": {"a": '
                                                                       '"/etc/passwd"}}', "plain file name"),
    ('{"weight_map": {"a": ".."}}', "plain file name"), ('{"weight_map": {"a": ""}}', "plain file name"),
    ('{"weight_map": {"a": "gone"}}', "missing"),
    ('{"weight_map": {"a": 3}}', "weight_map"), ('{"weight_map": []}', "weight_map"), ("{}", "weight_map"),
    ("[]", "list"), ("{", "JSON"),
    ("", "empty"),
    ('{"weight_map": ' + "[" * 10_000, "JSON")])
def test_bad_index(tmp_path, index, word):
    (tmp_path / S.INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=word): S.open_safetensors(tmp_path)


def test_promised_but_absent(tmp_path):
    S.save_safetensors({"a": torch.ones(1)}, tmp_path / "one")
    (tmp_path / S.INDEX).write_text('{"weight_map": {"z": "one"}}')
    with pytest.raises(CheckpointError, match="'z'"): S.open_safetensors(tmp_path)["z"]


@pytest.mark.parametrize("open_file", [S.SafetensorsFile, S.open_safetensors, G.GGUFFile])
def test_no_such_file(tmp_path, open_file):
    with pytest.raises(SourceError, match="download"): open_file(tmp_path / "nothing")
    with pytest.raises(SourceError): open_file(tmp_path)      # a folder without a model
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"): open_file(tmp_path / "empty")


# --- GGUF against its package ---------------------------------------------------------------------------------------

READABLE = [t for t in gguf.GGMLQuantizationType if t.name in G.PLAIN or t in gguf.quants._type_traits]


def test_every_type_is_unpacked_as_by_the_package():
    rng = np.random.default_rng(0)
    for kind in gguf.GGMLQuantizationType:
        items, nbytes = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (3, 2, 41 * nbytes), dtype=np.uint8)
        if kind not in READABLE:
            with pytest.raises(UnsupportedError): G.dequantize(torch.from_numpy(data), kind.name)
        elif kind.name in G.PLAIN and kind.name not in ("F32", "F16", "BF16"):
            assert raw(G.dequantize(torch.from_numpy(data), kind.name, G.PLAIN[kind.name])) == data.tobytes()
        else:
            with np.errstate(all="ignore"): theirs = np.ascontiguousarray(gguf.quants.dequantize(data, kind))
            ours = G.dequantize(torch.from_numpy(data), kind.name)
            assert ours.shape == theirs.shape == (3, 2, 41 * items)
            np.testing.assert_array_equal(ours.numpy(), theirs, err_msg=kind.name)  # NaN equals NaN


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4", "F16", "BF16",
                                  "F32"])
def test_packing_is_bit_exact(kind):
    rng = np.random.default_rng(1)
    for scale in [1e-45, 1e-40, 1e-38, 1e-9, 1e-7, 6e-5, 1e-3, 1, 1e3, 1e5, 6.6e6, 1e30, 1e38]:
        for w in [rng.standard_normal((16, 512)), rng.standard_cauchy((16, 512)), rng.integers(-8, 8, (16, 512)) / 2,
                  -np.abs(rng.standard_normal((16, 512))), rng.choice([-1.0, 1.0], (16, 512)),
                  np.where(rng.random((16, 512)) < 0.02, 1.0, 0.0), np.zeros((16, 512))]:
            w = np.clip(w * scale, -3.4e38, 3.4e38).astype(np.float32)
            if kind == "TQ1_0" and np.abs(w).max() > 3e37: continue     # the package itself overflows in a cast
            with np.errstate(all="ignore"): theirs = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
            ours = G.quantize(torch.from_numpy(w), kind).numpy()
            differ = (ours != theirs.view(np.uint8).reshape(ours.shape)).sum()
            assert ours.tobytes() == theirs.tobytes(), f"{kind} at scale {scale}: {differ} bytes differ"


def test_chunks_do_not_show(monkeypatch):
    w = torch.randn(7, 3 * 256)
    whole = {k: G.quantize(w, k) for k in ("Q4_0", "Q4_1", "Q8_0", "TQ2_0")}
    values = {k: G.dequantize(p, k, torch.bfloat16) for k, p in whole.items()}
    monkeypatch.setattr(G, "CHUNK", 256)
    for k, p in whole.items():
        assert torch.equal(G.quantize(w, k), p) and torch.equal(G.dequantize(p, k, torch.bfloat16), values[k]), k


@pytest.mark.parametrize("call, error", [
    (lambda: G.quantize(torch.full((32,), float("nan")), "Q4_0"), CheckpointError),
    (lambda: G.quantize(torch.full((32,), -float("inf")),
    "Q8_0"), CheckpointError),
    (lambda: G.quantize(torch.zeros(33), "Q4_1"), CheckpointError),
    (lambda: G.quantize(torch.tensor(1.0), "F32"), CheckpointError),
    (lambda: G.quantize(torch.zeros(256), "Q4_K"), UnsupportedError),
    (lambda: G.quantize(torch.zeros(4), "Q9_9"), UnsupportedError),
    (lambda: G.dequantize(torch.zeros(4, dtype=torch.uint8), "Q9_9"), UnsupportedError),
    (lambda: G.dequantize(torch.zeros(19, dtype=torch.uint8), "Q4_0"), CheckpointError),
    (lambda: G.unpermute_qk(torch.zeros(16, 2), 3), CheckpointError),
    (lambda: G.permute_qk(torch.zeros(16, 2), 0), CheckpointError)])
def test_quantizers_refuse(call, error):
    with pytest.raises(error): call()


META = {
    "general.architecture": "llama",
    "n": 3,
    "neg": -4,
    "big": 2**40,
    "x": 0.5,
    "yes": True,
    "no": False,
    "list": [1, -2],
    "names": ["a", "é", ""],
    "floats": [0.5, 1.5],
    "flags": [True, False],
    "text": "ünï\n",
}


def with_package(path, tensors, meta=META, kinds=None):
    "The same content written by gguf.GGUFWriter."
    T, w = gguf.GGUFValueType, gguf.GGUFWriter(path, meta["general.architecture"])
    for key, value in meta.items():
        kind = G._guess(value)
        if key == "general.architecture": continue
        if kind.endswith("[]"): w.add_key_value(key, value, T.ARRAY, T[kind[:-2]])
        else: w.add_key_value(key, value, T[(kinds or {}).get(key, kind)])
    if "general.alignment" in meta: w.data_alignment = meta["general.alignment"]
    for name, (packed, kind) in tensors.items():
        w.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind]) if kind not in (
            "F32",
            "F16",
        ) else w.add_tensor(name, packed)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_written_file_equals_the_package(tmp_path, alignment):
    rng = np.random.default_rng(3)
    meta = META | ({"general.alignment": alignment} if alignment else {})
    packed = {f"{t.name}.weight": (rng.integers(0, 256, (3, 2 * gguf.GGML_QUANT_SIZES[t][1]), dtype=np.uint8), t.name)
              for t in READABLE if t.name not in G.PLAIN}
    packed |= {
        "f32": (rng.standard_normal((2, 3, 5)).astype(np.float32), "F32"),
        "f16": (rng.standard_normal(7).astype(np.float16), "F16"),
    }
    with_package(tmp_path / "theirs", packed, meta)
    tensors, types = (
        {k: torch.from_numpy(v) for k, (v, _) in packed.items()},
        {k: kind for k, (_, kind) in packed.items()},
    )
    G.write_gguf(tmp_path / "ours", meta, tensors, types)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes(), "the writers differ"
    file = G.GGUFFile(tmp_path / "theirs")
    assert file.metadata == meta and file.alignment == (alignment or 32)
    for name, (data, kind) in packed.items():
        with np.errstate(all="ignore"): theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(file.load(name).numpy(), theirs.reshape(file.tensors[name].shape), err_msg=name)
        assert raw(file.raw(name)) == data.tobytes()


def test_all_value_types(tmp_path):
    T = gguf.GGUFValueType
    values = {
        "u8": 200,
        "i8": -100,
        "u16": 60000,
        "i16": -30000,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "f32": 0.25,
        "bool": True,
        "string": "a\0b",
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f64": 0.1,
    }
    kinds = dict(zip(values, "UINT8 INT8 UINT16 INT16 UINT32 INT32 FLOAT32 BOOL STRING UINT64 INT64 FLOAT64".split()))
    w = gguf.GGUFWriter(tmp_path / "x", "llama")
    for key, value in values.items():
        w.add_key_value(key, value, T[kinds[key]])
        w.add_key_value(key + "s", [value, value], T.ARRAY, T[kinds[key]])
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    file = G.GGUFFile(tmp_path / "x")
    assert file.metadata == {"general.architecture": "llama"} | {
        k + s: [v, v] if s else v for k, v in values.items() for s in ("", "s")
    }
    assert all(file.value_types[k] == kind and file.value_types[k + "s"] == kind + "[]" for k, kind in kinds.items())
    G.write_gguf(tmp_path / "y", file.metadata, {}, value_types=file.value_types)
    assert G.GGUFFile(tmp_path / "y").metadata == file.metadata
    assert (tmp_path / "y").read_bytes().rstrip(b"\0") == (tmp_path / "x").read_bytes().rstrip(b"\0")
    nested = {"nested": [[1, 2], [3]], "empty": []}
    G.write_gguf(tmp_path / "y", nested, {})
    assert G.GGUFFile(tmp_path / "y").metadata == nested


def test_version_2_is_read(tmp_path):
    G.write_gguf(tmp_path / "x", META, {"a": torch.ones(3)})
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:4] + b"\2" + data[5:])
    file = G.GGUFFile(tmp_path / "x")
    assert file.version == 2 and file.metadata == META and file.load("a").tolist() == [1, 1, 1]


@pytest.mark.parametrize("call", [
    ({"a": {}}, {}), ({"a": [1, "b"]}, {}), ({"a": "x"}, {}, {}, {"a": "UINT8"}), ({"a": 2**70}, {}),
    ({"general.alignment": 33}, {}), ({"a": "\ud800"}, {}),
    ({}, {"a": torch.zeros(2, dtype=torch.complex64)}), ({}, {"a": torch.zeros(33)}, {"a": "Q4_0"}),
    ({}, {"a": torch.zeros(1, 1, 1, 1, 1)}),
    ({}, {"a": torch.zeros(19, dtype=torch.uint8)}, {"a": "Q4_0"}), ({}, {"a": torch.zeros(4)}, {"a": "Q9"})])
def test_write_gguf_refuses(tmp_path, call):
    with pytest.raises(CheckpointError): G.write_gguf(tmp_path / "x", *call)
    assert not list(tmp_path.iterdir())


def test_unpermute_is_the_inverse_of_the_converter():
    "LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py, and transformers' loader."
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
    for heads, D in [(9, 64), (3, 64), (1, 2), (4, 6)]:
        w = torch.randn(heads * D, 5)
        converted = w.reshape(heads, 2, D // 2, 5).swapaxes(1, 2).reshape(w.shape)
        assert torch.equal(G.permute_qk(w, heads), converted) and torch.equal(G.unpermute_qk(converted, heads), w)
        assert torch.equal(
            torch.from_numpy(LlamaTensorProcessor()._reverse_permute_weights(converted.numpy(), heads, heads)), w
        )
        assert torch.equal(G.unpermute_qk(converted[:, 0], heads), w[:, 0])


PEAK = """
import sys, torch, gguf.quants
from llm_workbench.files.gguf import GGUFFile
high = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
file = GGUFFile(sys.argv[1])
before = high()
weights = {name: file.load(name, getattr(torch, sys.argv[2])) for name in file.tensors}
print(sum(w.nbytes for w in weights.values()), high() - before, len(weights))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_peaks_near_the_result(dtype):
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(MODEL), dtype], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    kept, peak, n = map(int, run.stdout.split())
    assert n == 272 and kept == 134_515_008 * (4 if dtype == "float32" else 2)
    assert peak < 1.25 * kept, f"{peak / kept:.2f} times the weights"


# --- named damage ---------------------------------------------------------------------------------------------------

def st(header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets))


GOOD_ST = st({"a": entry()})
BAD_ST = {
    "empty": (b"", "empty"), "seven bytes": (b"1234567", "too few"), "cut in the header": (GOOD_ST[:20], "header"),
    "cut in the data": (GOOD_ST[:-1], "cut off"), "one byte too many": (GOOD_ST + b"x", "behind its last tensor"),
    "header longer than the file": (st({"a": entry()}, length=10**6), "header"),
    "header of 2^60": (st({"a": entry()}, length=2**60),
    "header"),
    "header of 2^64 - 1": (st({"a": entry()}, length=2**64 - 1), "header"),
    "header of 0": (st({"a": entry()}, length=0), "JSON|brace"),
    "html": (b"<!DOCTYPE html><html></html>", "not a safetensors"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors"),
    "pickle": (b"\x80\x02}q\x00." + bytes(40), "safetensors"), "not utf-8": (st(b'{"a\xff": 1}'), "JSON"),
    "bad json": (st(b'{"a": }'),
    "JSON"),
    "list": (st(b"[1, 2]"), "brace"), "spaces first": (st(b"  {}", b""), "brace"), "NaN": (st(b'{"a": NaN}'), "NaN"),
    "Infinity": (st(b'{"a": -Infinity}'), "JSON"),
    "deep list": (st(b'{"a":' + b"[" * 100_000), "JSON"), "deep object": (st(b'{"a":' * 100_000), "JSON"),
    "huge number": (st(b'{"a": ' + b"9" * 10_000 + b"}"), "JSON"),
    "lone surrogate is no name": (st(b'{"a": {"dtype": "\\ud800", "shape": [], "data_offsets": [0, 4]}}'), "dtype"),
    "duplicate name": (st(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
                       "twice"),
    "duplicate field": (st(b'{"a": {"dtype":"U8","dtype":"F32","shape":[4],"data_offsets":[0,16]}}'), "twice"),
    "entry is a number": (st({"a": 3}), "'a'"), "entry is a list": (st({"a": []}), "'a'"),
    "no shape": (st({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), "shape"),
    "unknown dtype": (st({"a": entry("F31")}), "F31"), "dtype is a list": (st({"a": entry([])}), "dtype"),
    "dtype is null": (st({"a": entry(None)}), "dtype"),
    "shape is a number": (st({"a": entry() | {"shape": 4}}), "shape"),
    "negative size": (st({"a": entry(shape=(-4,))}), "shape"),
    "fractional size": (st({"a": entry(shape=(4.0,))}), "shape"),
    "size is true": (st({"a": entry(shape=(True, 4))}), "shape"),
    "size is text": (st({"a": entry(shape=("4",))}), "shape"),
    "1000 dimensions": (st({"a": entry(shape=(1,) * 1000)}), "shape"),
    "size 2^64": (st({"a": entry(shape=(2**64,))}), "shape"),
    "product overflows": (st({"a": entry(shape=(2**62, 2**62))}), "overflow"),
    "empty but huge": (st({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""), "overflow"),
    "wrong product": (st({"a": entry(shape=(5,))}), "needs 20"),
    "wrong type": (st({"a": entry("F64")}), "needs 32"), "offsets reversed": (st({"a": entry(offsets=(16, 0))}), "'a'"),
    "negative offset": (st({"a": entry(offsets=(-16, 0))}), "data_offsets"),
    "three offsets": (st({"a": entry(offsets=(0, 16, 16))}), "data_offsets"),
    "offset 2^63": (st({"a": entry(offsets=(2**63, 2**63 + 16))}), "data_offsets"),
    "out of range": (st({"a": entry(offsets=(16, 32))}), "gap"),
    "overlap": (st({"a": entry(), "b": entry(offsets=(0, 16))}), "overlap"),
    "partial overlap": (st({"a": entry(), "b": entry(offsets=(12, 28))}, bytes(28)), "overlap"),
    "gap": (st({"a": entry(), "b": entry(offsets=(20, 36))}, bytes(36)), "gap"), "last one missing": (st({"a": entry(),
    "b": entry(offsets=(16, 32))}), "cut off"),
    "metadata is a list": (st({"__metadata__": [], "a": entry()}), "__metadata__"),
    "metadata holds a number": (st({"__metadata__": {"a": 1}, "a": entry()}), "__metadata__"),
}


def kv(key, kind, body): return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + body
def text(s): return struct.pack("<Q", len(s)) + s
def info(name=b"w", dims=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gg(entries=(), infos=(info(),), data=bytes(32), magic=b"GGUF", version=3, n_tensors=None, n_entries=None, align=32):
    counts = len(infos) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries
    head = magic + struct.pack("<IQQ", version, *counts)
    head += b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % align) + data


ALIGN = b"general.alignment"
BAD_GGUF = {
    "empty": (b"", "empty"), "two bytes": (b"GG", "GGUF"), "only the magic": (b"GGUF", "version"),
    "bad magic": (gg(magic=b"GGUX"),
    "not a GGUF"),
    "safetensors": (GOOD_ST, "not a GGUF"), "zip": (gg(magic=b"PK\3\4"), "not a GGUF"),
    "version 0": (gg(version=0), "version|endian"),
    "version 1": (gg(version=1), "version 1"),
    "version 4": (gg(version=4), "version 4"), "big-endian": (gg(version=3 << 24), "big-endian"),
    "cut in the header": (gg()[:20],
    "needed"), "cut in the table": (gg()[:40], "needed"),
    "cut in the data": (gg(data=bytes(15)), "cut off"), "no data": (gg(data=b""), "cut off"),
    "2^60 tensors": (gg(n_tensors=2**60),
    "needed"), "2^64 - 1 tensors": (gg(n_tensors=2**64 - 1), "needed"),
    "2^60 entries": (gg(n_entries=2**60), "needed"), "one tensor too many": (gg(n_tensors=2), "needed|cut off"),
    "string of 2^60": (gg([kv(b"a", 8, struct.pack("<Q", 2**60))]), "needed"),
    "key of 2^60": (gg([struct.pack("<Q", 2**60) + b"a"]), "needed"),
    "name of 2^63": (gg(infos=[struct.pack("<Q", 2**63) + bytes(40)]),
    "needed"),
    "array of 2^40 bytes": (gg([kv(b"a", 9, struct.pack("<IQ", 0, 2**40))]), "needed"),
    "array of 2^40 strings": (gg([kv(b"a", 9, struct.pack("<IQ", 8, 2**40))]), "needed"),
    "array of 2^61 doubles": (gg([kv(b"a", 9, struct.pack("<IQ", 12, 2**61))]), "needed"),
    "array of 2^40 arrays": (gg([kv(b"a", 9, struct.pack("<IQ", 9, 2**40))]), "needed"),
    "arrays in arrays": (gg([kv(b"a", 9, struct.pack("<IQ", 9, 1) * 5000)]), "four deep"),
    "array of unknown": (gg([kv(b"a", 9, struct.pack("<IQ", 77, 1))]), "77"),
    "unknown value type": (gg([kv(b"a", 13, bytes(8))]), "13"), "boolean 2": (gg([kv(b"a", 7, b"\2")]), "boolean"),
    "booleans 2": (gg([kv(b"a", 9, struct.pack("<IQB", 7, 1, 2))]), "boolean"),
    "duplicate key": (gg([kv(b"a", 0, b"\1")] * 2), "twice"), "key not utf-8": (gg([kv(b"\xff", 0, b"\1")]), "UTF-8"),
    "value not utf-8": (gg([kv(b"a", 8, text(b"\xff"))]), "UTF-8"),
    "name not utf-8": (gg(infos=[info(b"\xff")]), "UTF-8"),
    "duplicate tensor": (gg(infos=[info(), info(offset=32)], data=bytes(64)),
    "same name"),
    "1000 dimensions": (gg(infos=[info(dims=(1,) * 1000)]), "dimensions"),
    "2^32 - 1 dimensions": (gg(infos=[text(b"w") + b"\xff" * 4 + bytes(40)]), "dimensions"),
    "product overflows": (gg(infos=[info(dims=(2**40, 2**40))]), "overflow"),
    "empty but huge": (gg(infos=[info(dims=(0, 2**63, 2**63))]),
    "overflow"), "out of range": (gg(infos=[info(dims=(2**40,))]), "cut off"),
    "offset out of range": (gg(infos=[info(offset=2**40)]), "cut off"),
    "offset 2^64 - 32": (gg(infos=[info(offset=2**64 - 32)]),
    "cut off"), "offset not aligned": (gg(infos=[info(offset=4)], data=bytes(64)), "multiple"),
    "overlap": (gg(infos=[info(), info(b"v")]), "overlap"),
    "inside": (gg(infos=[info(dims=(64,)), info(b"v", offset=128)], data=bytes(512)), "overlap"),
    "unknown type": (gg(infos=[info(kind=99)]), "99"), "removed type": (gg(infos=[info(kind=4)]), "type 4"),
    "half a block": (gg(infos=[info(dims=(33,), kind=2)]), "blocks of 32"),
    "scalar block": (gg(infos=[info(dims=(), kind=2)]), "blocks of 32"),
    "alignment 0": (gg([kv(ALIGN, 4, bytes(4))]), "alignment"),
    "alignment 33": (gg([kv(ALIGN, 4, struct.pack("<I", 33))]), "alignment"),
    "alignment is text": (gg([kv(ALIGN, 8, text(b"32"))]), "alignment"),
    "alignment is true": (gg([kv(ALIGN, 7, b"\1")]), "alignment"),
    "alignment 2^31": (gg([kv(ALIGN, 4, struct.pack("<I", 2**31))]), "cut off"),
}


def read_safetensors(path):
    file = S.SafetensorsFile(path)
    return {name: file[name] for name in file}


def read_gguf(path):
    file = G.GGUFFile(path)
    return {name: file.load(name) for name in file.tensors}


def test_the_good_files_are_good(tmp_path):
    (tmp_path / "s").write_bytes(GOOD_ST)
    (tmp_path / "g").write_bytes(gg())
    assert read_safetensors(tmp_path / "s")["a"].tolist() == read_gguf(tmp_path / "g")["w"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("read, damage", [(read_safetensors, k) for k in BAD_ST] + [(read_gguf, k) for k in BAD_GGUF])
def test_named_damage(tmp_path, read, damage):
    data, word = (BAD_ST if read is read_safetensors else BAD_GGUF)[damage]
    (tmp_path / "model").write_bytes(data)
    with pytest.raises(CheckpointError, match=word) as error: read(tmp_path / "model")
    message = str(error.value)
    assert len(message) < 600 and any(w in message for w in ("download", "fetch", "convert")), (
        f"says not what to do: {message}"
    )


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K"])
def test_types_without_a_reader(tmp_path, kind):
    t = G.block_types()[kind]
    number = gguf.GGMLQuantizationType[kind].value
    (tmp_path / "x").write_bytes(gg(infos=[info(dims=(t.items,), kind=number)], data=bytes(t.nbytes)))
    with pytest.raises(CheckpointError, match=f"'w'.*{kind}"): read_gguf(tmp_path / "x")


# --- files that ask for much ----------------------------------------------------------------------------------------

GREEDY = {
    "brackets": (read_safetensors, st(b'{"a":[' + b"[]," * 100_000 + b"[]]}")),
    "objects": (read_safetensors, st(b'{"a":[' + b"{}," * 100_000 + b"{}]}")),
    "names": (read_safetensors, st(b"{" + b",".join(b'"%d":0' % i for i in range(30_000)) + b"}")),
    "numbers": (read_safetensors, st(b'{"a":{"dtype":"F32","shape":[' + b"1," * 100_000
                                     + b'1],"data_offsets":[0,4]}}')),
    "small ints": (read_gguf, gg([kv(b"a", 9, struct.pack("<IQ", 2, 200_000)
                                     + np.arange(200_000, dtype=np.uint16).tobytes())])),
    "empty strings": (read_gguf, gg([kv(b"a", 9, struct.pack("<IQ", 8, 30_000) + bytes(240_000))])),
    "empty arrays": (read_gguf, gg([kv(b"a", 9, struct.pack("<IQ", 9, 20_000) + bytes(12 * 20_000))])),
    "empty tensors": (read_gguf, gg(infos=[info(b"%d" % i, dims=(0, 2**40)) for i in range(6_000)])),
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_files_stay_within_bounds(tmp_path, name):
    read, data = GREEDY[name]
    (tmp_path / "x").write_bytes(data)
    tracemalloc.start()
    begin = time.process_time()
    try: read(tmp_path / "x")
    except CheckpointError: pass
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 * len(data) + 2**20, f"{peak / len(data):.0f} bytes of memory for a byte of file"
    assert seconds < 20, f"{seconds:.1f} s for {len(data):,} bytes"


# --- a thousand mutations -------------------------------------------------------------------------------------------

LENGTHS = [0, 1, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


def mutate(rng, good, other, fields):
    "One of eight kinds of damage, once to four times."
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        near = rng.randrange(min(len(data), fields[-1] + 64) or 1)    # in the header, where damage is felt
        kind = rng.randrange(9)
        if kind == 0 and data: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1: data[near:near + 1] = bytes([rng.randrange(256)])
        elif kind == 2: del data[a:]
        elif kind == 3: data[near:near] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4: del data[near:near + rng.randrange(1, 9)]
        elif kind == 5:
            at, n = rng.choice(fields), rng.choice([4, 8, 8])
            data[at : at + n] = (
                rng.choice([*LENGTHS, len(data), len(data) - 8, rng.randrange(256)]) % 256**n
            ).to_bytes(n, "little")
        elif kind == 6: data[near:near + b - a] = other[a:b]
        elif kind == 7: data[near:near] = data[a:b][:64]
        else:                                                         # another digit, or another number, in its place
            digits = [i for i in range(min(len(data), fields[-1] + 64)) if 48 <= data[i] <= 57]
            if digits:
                data[(at := rng.choice(digits)) : at + 1] = str(
                    rng.choice([0, 1, 2, 9, 16, 77, 2**40, 2**64, -1, 1.5])
                ).encode()
        if not data: break
    return bytes(data)


def samples(tmp_path, fmt):
    "Two small good files of a format, and where numbers of interest lie in the first."
    g = torch.Generator().manual_seed(0)
    w = {
        "a.weight": torch.randn(2, 256, generator=g),
        "b.weight": torch.randn(3, 32, generator=g).bfloat16(),
        "c": torch.arange(5),
        "d.e": torch.tensor([True, False]),
        "f8": torch.randn(8, generator=g).to(torch.float8_e4m3fn),
        "s": torch.tensor(0.5),
    }
    if fmt == "safetensors":
        S.save_safetensors(w, tmp_path / "a", {"format": "pt"})
        S.save_safetensors(dict(list(w.items())[::2]), tmp_path / "b")
        good = (tmp_path / "a").read_bytes()
        return good, (tmp_path / "b").read_bytes(), [0] * 4 + [8 + int.from_bytes(good[:8], "little") - 64]
    rng, blocks = np.random.default_rng(0), [t.name for t in READABLE if t.name not in G.PLAIN]
    w = {k: w[k] for k in ("a.weight", "b.weight", "c", "s")}
    w |= {k: torch.from_numpy(rng.integers(0, 256, (2, 2 * G.block_type(k).nbytes), np.uint8)) for k in blocks}
    types = {"a.weight": "Q4_1"} | {k: k for k in w if k in G.block_types()}
    G.write_gguf(tmp_path / "a", META | {"nested": [[1], [2, 3]], "general.alignment": 32}, w, types)
    G.write_gguf(tmp_path / "b", META, {"a.weight": w["a.weight"], "q": w["a.weight"]}, {"q": "Q8_0"})
    good, start = (tmp_path / "a").read_bytes(), G.GGUFFile(tmp_path / "a").data_start
    # small 8-byte numbers
    return good, (tmp_path / "b").read_bytes(), [i for i in range(4, start - 64) if good[i + 2:i + 8] == bytes(6)]


@pytest.mark.parametrize("fmt", ["safetensors", "gguf"])
def test_a_thousand_mutations(tmp_path, fmt):
    good, other, fields = samples(tmp_path, fmt)
    read, path, rng = {"safetensors": read_safetensors, "gguf": read_gguf}[fmt], tmp_path / "x", random.Random(2024)
    read(tmp_path / "a")
    accepted, refused, stricter, worst, slowest = 0, 0, 0, 0, 0
    tracemalloc.start()
    for i in range(MUTATIONS):
        data = mutate(rng, good, other, fields)
        path.write_bytes(data)
        tracemalloc.reset_peak()
        held, begin, out = tracemalloc.get_traced_memory()[0], time.process_time(), None
        try: out = read(path)
        except CheckpointError as error:
            refused += 1
            assert 20 < len(str(error)) < 900
        except BaseException as error: raise AssertionError(f"mutation {i} of {fmt} raised {type(error).__name__}: "
                                                            f"{error}") from error
        slowest = max(slowest, time.process_time() - begin)
        worst = max(worst, (tracemalloc.get_traced_memory()[1] - held) / (len(data) + 4096))
        if out is not None:
            accepted += 1
            assert sum(t.nbytes for t in out.values()) <= 32 * len(data), (
                f"mutation {i}: more numbers than the file can hold"
            )
        if fmt == "safetensors":          # the library is the judge: what we accept it accepts, with the same bytes
            try: theirs = safetensors.torch.load(data)
            except Exception: theirs = None
            stricter += out is None and theirs is not None
            if out is not None:
                assert theirs is not None and set(theirs) == set(out), f"mutation {i}: accepted, but not by the library"
                for k, t in out.items():
                    same = t.dtype == theirs[k].dtype and t.shape == theirs[k].shape and raw(t) == raw(theirs[k])
                    assert same, f"mutation {i}: {k} has other numbers"
    tracemalloc.stop()
    print(f"{fmt}: {refused} refused, {accepted} read; at most {worst:.1f} bytes of memory for a byte of file, "
          f"{slowest:.3f} s; "
          f"{stricter} refused here but not by the library")
    assert refused + accepted == MUTATIONS and refused > MUTATIONS // 3 and accepted > MUTATIONS // 50, (
        "the mutations test nothing"
    )
    assert worst < 16 and slowest < 5
    assert stricter <= MUTATIONS // 50, "far stricter than the library"
