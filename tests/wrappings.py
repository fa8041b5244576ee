"""Quantized checkpoints written code by code from the published layouts, and read back the same way: slow and plain.

Nothing here uses the package's packing: a matrix is a list of codes, a word a Python integer. GPTQ and AWQ cannot be
run on this project's machines (their libraries need a newer torch and a GPU), so these loops are what the readers are
compared with; compressed-tensors and bitsandbytes are compared with their own libraries as well."""
import json
import math

import torch
from safetensors.torch import save_file

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def signed(word): return word - 2**32 if word >= 2**31 else word


def stream(codes, bits):
    "Codes as one stream of bits, lowest first, cut into 32-bit words; the last one is filled with zeros."
    whole = 0
    for i, code in enumerate(codes): whole |= code << bits * i
    return [signed(whole >> 32 * w & 0xFFFFFFFF) for w in range(math.ceil(len(codes) * bits / 32))]


def threes(codes):
    "32 codes of 3 bits in three words, as AutoGPTQ's `pack` does it: two codes stand with a foot in each of two words."
    out = []
    for at in range(0, len(codes), 32):
        c, words = codes[at:at + 32], [0, 0, 0]
        for j in range(10): words[0] |= c[j] << 3 * j
        words[0] |= c[10] << 30 & 0xFFFFFFFF
        words[1] |= c[10] >> 2 & 1
        for j in range(10): words[1] |= c[11 + j] << 3 * j + 1
        words[1] |= c[21] << 31 & 0xFFFFFFFF
        words[2] |= c[21] >> 1 & 3
        for j in range(10): words[2] |= c[22 + j] << 3 * j + 2
        out += map(signed, words)
    return out


def packed(codes, bits): return threes(codes) if bits == 3 and len(codes) % 32 == 0 else stream(codes, bits)


def rounded(weight, bits, group, symmetric, order=None, scale_dtype=torch.float16):
    "Codes (O, I), scales and zero points (O, G) and the group of each column: any will do that fit."
    (O, I), group = weight.shape, group or weight.shape[1]
    G = math.ceil(I / group)
    which = torch.arange(I) // group if order is None else order
    scale, zero = torch.zeros(O, G), torch.zeros(O, G, dtype=torch.long)
    for g in range(G):
        w, mid = weight[:, which == g], 2 ** (bits - 1)
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        s = w.abs().amax(1) / max(mid - 1, 1) if symmetric else (high - low) / (2**bits - 1)
        scale[:, g] = s.clamp(min=1e-4)
        zero[:, g] = mid if symmetric else (-low / scale[:, g]).round().clamp(0, 2**bits - 1)
    scale = scale.to(scale_dtype)
    codes = (weight / scale.float()[:, which] + zero[:, which]).round().clamp(0, 2**bits - 1).long()
    return codes, scale, zero, which


def numbers(codes, scale, zero, which, factor=1.0):
    "What they mean, in float32."
    return (codes - zero[:, which]).float() * scale.float()[:, which] * factor


def read_words(columns, bits, n):
    "Codes from words, one bit after the other."
    bit = lambda words, at: words[at // 32] >> at % 32 & 1
    return [[sum(bit(words, i * bits + b) << b for b in range(bits)) for i in range(n)] for words in columns]


def gptq_by_hand(tensors, bits, v1, O, I):
    "The weight of GPTQ tensors, number by number."
    ones = sum(1 << at for at in range(0, 32, bits)) if v1 and bits != 3 else 0
    codes = read_words(tensors["qweight"].T.tolist(), bits, I)
    zeros = read_words([[(w + ones) % 2**32 for w in g] for g in tensors["qzeros"].tolist()], bits, O)
    scale, group, out = tensors["scales"].tolist(), tensors["g_idx"].tolist(), torch.zeros(O, I)
    for o in range(O):
        for i in range(I):
            zero = zeros[group[i]][o]
            out[o, i] = (codes[o][i] - ((zero + 1) % 8 if v1 and bits == 3 else zero)) * scale[group[i]][o]
    return out


def awq_by_hand(tensors, group):
    "The weight of AWQ tensors, number by number."
    word = lambda t, n, o: t[n][o // 8] >> 4 * AWQ.index(o % 8) & 15
    q, z, s = (tensors[n].tolist() for n in ("qweight", "qzeros", "scales"))
    I, O = len(q), len(s[0])
    return torch.tensor([[(word(q, i, o) - word(z, i // group, o)) * s[i // group][o] for i in range(I)]
                         for o in range(O)])


# --- the layouts ------------------------------------------------------------------------------------------------------

def gptq(weight, bits=4, group=32, symmetric=True, v1=True, order=None, g_idx=True, scale_dtype=torch.float16):
    "Tensors of a module in GPTQ's layout and the weight that they mean."
    codes, scale, zero, which = rounded(weight, bits, group, symmetric, order, scale_dtype)
    columns = [packed(column, bits) for column in codes.tolist()]          # a column of words: one output
    tensors = {"qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(), "scales": scale.T.contiguous()}
    rows = []
    for g in zero.T.tolist():
        if not v1: rows.append(packed(g, bits))
        elif bits == 3: rows.append(packed([(z - 1) % 8 for z in g], 3))
        else:                                                   # GPTQModel takes the ones off whole words, with borrows
            ones = sum(1 << at for at in range(0, 32, bits))
            rows.append([signed((w - ones) % 2**32) for w in packed(g, bits)])
    tensors["qzeros"] = torch.tensor(rows, dtype=torch.int32)
    if g_idx: tensors["g_idx"] = which.int()
    return tensors, numbers(codes, scale, zero, which)


def gptq_config(bits=4, group=32, symmetric=True, v1=True, desc_act=False):
    return dict(quant_method="gptq", bits=bits, group_size=group or -1, sym=symmetric, desc_act=desc_act,
                checkpoint_format="gptq" if v1 else "gptq_v2", lm_head=False, pack_dtype="int32")


def awq(weight, group=32, symmetric=False):
    codes, scale, zero, which = rounded(weight, 4, group, symmetric)
    def across(rows):                                            # (n, O) -> (n, O / 8) words
        def word(eight): return signed(sum(eight[AWQ[n]] << 4 * n for n in range(8)))
        words = [[word(row[at:at + 8]) for at in range(0, len(row), 8)] for row in rows.tolist()]
        return torch.tensor(words, dtype=torch.int32)
    return dict(qweight=across(codes.T), qzeros=across(zero.T), scales=scale.T.contiguous()), numbers(
        codes, scale, zero, which)


def awq_config(group=32):
    return dict(quant_method="awq", bits=4, group_size=group or -1, zero_point=True, version="gemm")


def compressed(weight, bits=4, group=32, symmetric=True, strategy="group", packs=True, scale_dtype=torch.bfloat16):
    "Tensors of pack-quantized and int-quantized."
    O, I = weight.shape
    codes, scale, zero, which = rounded(weight, bits, group if strategy == "group" else None, symmetric,
                                        scale_dtype=scale_dtype)
    if strategy == "tensor":
        scale, zero = scale[:1].expand(O, 1), zero[:1].expand(O, 1)
        codes = (weight / scale.float() + zero).round().clamp(0, 2**bits - 1).long()
    one = (lambda t: t[0].contiguous()) if strategy == "tensor" else (lambda t: t.contiguous())
    tensors = {"weight_scale": one(scale)}
    if packs:
        tensors["weight_packed"] = torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32)
        tensors["weight_shape"] = torch.tensor([O, I])
    else: tensors["weight"] = (codes - 2 ** (bits - 1)).to(torch.int8)
    if not symmetric:
        words = torch.tensor([stream(column, bits) for column in zero.T.tolist()], dtype=torch.int32).T.contiguous()
        raw = one((zero - 2 ** (bits - 1)).to(torch.int8))
        tensors["weight_zero_point"] = words if packs and strategy != "tensor" else raw
    return tensors, numbers(codes, scale, zero, which)


def compressed_config(format="pack-quantized", ignore=("lm_head",), **weights):
    weights = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, dynamic=False) | weights
    group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None, format=format)
    return dict(quant_method="compressed-tensors", format=format, config_groups=dict(group_0=group),
                ignore=list(ignore), quantization_status="compressed", sparsity_config={}, transform_config={})


def fp8(weight, block=(128, 128), leaf="weight_scale_inv", dtype=torch.float8_e4m3fn, scale_dtype=torch.float32):
    "Floats of eight bits in tiles, the last of which may be cut off."
    (O, I), (r, c) = weight.shape, (n or size for n, size in zip(block, weight.shape))
    tiles = math.ceil(O / r), math.ceil(I / c)
    scale, data, meant = torch.zeros(tiles), torch.zeros(O, I, dtype=dtype), torch.zeros(O, I)
    for y in range(tiles[0]):
        for x in range(tiles[1]):
            tile = weight[y * r:y * r + r, x * c:x * c + c]
            s = tile.abs().max() / torch.finfo(dtype).max
            if scale_dtype == torch.float8_e8m0fnu: s = 2 ** s.log2().ceil()
            s = s.to(scale_dtype).float()
            scale[y, x] = s
            code = (tile / s).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
            data[y * r:y * r + r, x * c:x * c + c] = code
            meant[y * r:y * r + r, x * c:x * c + c] = code.float() * s
    return {"weight": data, leaf: scale.to(scale_dtype)}, meant


def fp8_config(block=(128, 128)):
    return dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=block and list(block))


E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def nvfp4(weight):
    "NVFP4 of compressed-tensors: the nearest of sixteen numbers, two to a byte, the first in the lower half."
    (O, I), level = weight.shape, torch.tensor([*E2M1, *(-v for v in E2M1)])
    divisor = (448 * 6 / weight.abs().max()).float().view(1)
    scale = (weight.unflatten(1, (-1, 16)).abs().amax(2) / 6 * divisor).to(torch.float8_e4m3fn)
    each = (scale.float() / divisor).repeat_interleave(16, 1)
    codes = (weight[..., None] / each[..., None] - level).abs().argmin(-1)
    data = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return dict(weight_packed=data, weight_scale=scale, weight_global_scale=divisor), level[codes] * each


# --- whole models -----------------------------------------------------------------------------------------------------

def tokenizer_of(folder, size=97):
    "The least that opens: bytes are no tokens here."
    from tokenizers import Tokenizer, models, pre_tokenizers
    made = Tokenizer(models.BPE({chr(33 + i): i for i in range(size)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def wrap(folder, into, make, settings, chosen=lambda name, weight: weight.ndim == 2 and "proj" in name, dtype=None):
    """A saved model of transformers with the chosen matrices in another layout: `make(weight)` gives tensors and
    meaning. Returns what each weight means, by the names of the file."""
    from safetensors.torch import load_file
    into.mkdir(parents=True, exist_ok=True)
    tensors, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(".weight") and chosen(name, weight):
            own, meant[name] = make(weight.float())
            tensors |= {f"{name.removesuffix('.weight')}.{leaf}": t.contiguous() for leaf, t in own.items()}
        else: tensors[name] = meant[name] = weight
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (into / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tokenizer_of(into)
    return meant
