"The C kernels: random shapes against float64, memory beside the output, fallbacks, the compiler's moods, whole models."
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from checks import cached_is_uncached, ragged_is_single, some_tokens, tiny, worst
from llm_workbench import Decoder
from llm_workbench.architecture.matrices import Linear
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import InputError, UnsupportedError
from llm_workbench.kernels import cpu
from llm_workbench.kernels.cpu import CPU

DTYPES = list(cpu.DEFINES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def used(monkeypatch):
    "The names of the kernels that run from now on."
    names, original = [], cpu.compiled
    monkeypatch.setattr(cpu, "compiled", lambda kernel, dtype: names.append(kernel.name) or original(kernel, dtype))
    return names


def as_good_as(plain, mine, *tensors, room=2e-6, **options):
    "Against float64, `mine` errs at most twice as much as `plain` in the same dtype, plus `room` (relative)."
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]
    truth, same, got = plain(*wide, **options), plain(*tensors, **options), mine(*tensors, **options)
    assert got.dtype == same.dtype and got.shape == same.shape and not got.isnan().any()
    mine, theirs, size = worst(got.double(), truth), worst(same.double(), truth), truth.abs().max().item() or 1.0
    assert mine <= 2 * theirs + room * size, (mine, theirs)


@each_dtype
@torch.inference_mode()
def test_random_shapes(dtype, monkeypatch):
    names, draw = used(monkeypatch), random.Random(0)
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape).to(dtype)
    for _ in range(60):
        rows, ins = draw.randint(1, cpu.MOST_ROWS[dtype]), draw.choice([1, 2, 63, 64, 65, 100, 576, 1000])
        outs = draw.choice([1, 3, 17, 192, 700])
        shape = draw.choice([(rows, ins), (1, rows, ins), (rows, 1, ins)] + [(ins,)] * (rows == 1))
        as_good_as(REFERENCE.linear, CPU.linear, make(*shape), make(outs, ins), draw.choice([None, make(outs)]))
        x = (torch.randn(shape) * 10 ** draw.uniform(-4, 3)).to(dtype)
        as_good_as(REFERENCE.rms_norm, CPU.rms_norm, x, make(ins), 1e-5)
        B, T, H, D = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 9), draw.choice([8, 10, 64, 80])
        R, rows = draw.choice([D, D // 2 // 2 * 2, 2]), draw.choice([(), (B,)])
        as_good_as(REFERENCE.rotate, CPU.rotate, make(B, T, H, D), make(*rows, T, R), make(*rows, T, R))
    ran = {name: names.count(name) for name in set(names)}
    assert ran == dict(linear=60, rms_norm=60, rotate=60), "a fallback was tested instead of the kernel"


@each_dtype
@torch.inference_mode()
def test_random_attention(dtype, monkeypatch):
    names, draw = used(monkeypatch), random.Random(1)
    torch.manual_seed(1)
    make = lambda *shape: torch.randn(*shape).to(dtype)
    for _ in range(80):
        B, K, G, D = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 5), draw.choice([1, 8, 17, 64, 96])
        n, Dv, free = draw.choice([1, 2, 63, 64, 65, 129, 300]), draw.choice([D, 5]), draw.choice([0, 7])
        q, k, v = make(B, 1, K * G, D), make(B, n + free, K, D)[:, :n], make(B, n + free, K, Dv)[:, :n]
        if draw.random() < 0.3: v = k[..., :D // 2 + 1]              # latent attention: the value is a part of the key
        options = dict(window=draw.choice([None, 1, 5, 64, 1000]), scale=draw.choice([None, 0.1, 3.0]),
                       lengths=draw.choice([None, torch.randint(0, n + 1, (B,))]))
        scores = torch.einsum("bhd,bnhd->bhn", q[:, 0].double(), k.double().repeat_interleave(G, 2))
        largest = scores.abs().max().item() * (D ** -0.5 if options["scale"] is None else options["scale"])
        room = torch.finfo(torch.float32).eps * (4 + 2 * largest)    # the rounding of a score is its weight's error
        as_good_as(REFERENCE.attention, CPU.attention, q, k, v, room=room, **options)
    assert names == ["attention"] * 80


@each_dtype
@torch.inference_mode()
def test_slots_that_are_not_in_use_are_not_read(dtype, monkeypatch):
    "A static cache hands over all slots; what stands beyond the lengths cannot matter, not even a NaN."
    names, (q, lengths) = used(monkeypatch), (torch.randn(3, 1, 6, 16).to(dtype), torch.tensor([1, 700, 64]))
    for window in (None, 50):
        k, v = torch.randn(2, 3, 4000, 2, 16).to(dtype)
        clean = CPU.attention(q, k, v, lengths=lengths, window=window)
        for row, n in enumerate(lengths.tolist()):
            alone = CPU.attention(q[row:row + 1], k[row:row + 1, :n], v[row:row + 1, :n], window=window)
            assert torch.equal(clean[row:row + 1], alone)
            for slots in [slice(n, None)] + [slice(0, max(n - 50, 0))] * (window is not None):
                k[row, slots] = v[row, slots] = float("nan")
        assert torch.equal(CPU.attention(q, k, v, lengths=lengths, window=window), clean)
    assert names == ["attention"] * 10


@each_dtype
def test_nothing_is_written_beside_the_output(dtype):
    "Every kernel writes into the middle of a guarded buffer, and must fill just that."
    address = lambda x: x.data_ptr() if isinstance(x, torch.Tensor) else x
    def guarded(kernel, n, *before, after=()):
        buffer = torch.full((n + 256,), 77.0, dtype=dtype)
        cpu.compiled(kernel, dtype)(*map(address, before), buffer[128:].data_ptr(), *map(address, after))
        around = torch.cat([buffer[:128], buffer[128 + n:]])
        assert (around == 77).all(), f"{kernel.name} writes beyond its output"
        assert (buffer[128:128 + n] != 77).all(), f"{kernel.name} leaves a part of its output"
    make = lambda *shape: torch.randn(shape).to(dtype)
    guarded(cpu.LINEAR, 3 * 65, make(65, 63), torch.randn(3, 63), make(65), after=(65, 63, 3))
    guarded(cpu.RMS_NORM, 3 * 65, make(3, 65), make(65), after=(3, 65, 1e-5))
    guarded(cpu.ROTATE, 2 * 3 * 10, make(2, 3, 10), make(2, 4), make(2, 4), after=(2, 3, 10, 4, 2))
    n, K, G, D = 70, 2, 3, 17
    sizes, steps = (1, K * G, G, D, D, n), (0, K * D, D)
    options = (None, *sizes, *steps, *steps, 0, 0.5)
    guarded(cpu.ATTENTION, 6 * D, make(6, D), make(n, K, D), make(n, K, D), after=options)


@torch.inference_mode()
def test_what_the_kernels_do_not_take_goes_to_torch(monkeypatch):
    "Other dtypes, other layouts, many rows: the answer of TORCH, bit for bit, and no kernel runs."
    names = used(monkeypatch)
    def same(op, *given, **options):
        assert torch.equal(getattr(CPU, op)(*given, **options), getattr(TORCH, op)(*given, **options)), (op, options)
    x, w, strided = torch.randn(1, 8), torch.randn(6, 8), torch.randn(2, 16)[:, ::2]
    for a, b in [(x.half(), w.half()), (x.double(), w.double()), (torch.randn(64, 8), w), (x, torch.randn(8, 6).T),
                 (strided, w), (torch.randn(0, 8), w)]: same("linear", a, b)
    for a in (x.half(), strided, torch.randn(5000, 8), torch.randn(0, 8)):
        same("rms_norm", a, torch.ones(8, dtype=a.dtype), 1e-5)
    same("rms_norm", x, None, 1e-5)
    same("rms_norm", x.bfloat16(), torch.ones(8), 1e-5)              # a wider weight is another order of rounding
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 9, 2, 8)
    span = torch.tensor([[0], [-1]])
    for options in (dict(softcap=5.0), dict(sinks=torch.randn(4)), dict(causal=False), dict(spans=span),
                    dict(spans=span, lengths=torch.tensor([9, 4]), window=3)): same("attention", q, k, k, **options)
    same("attention", q.half(), k.half(), k.half())
    prompt = CPU.attention(torch.randn(2, 3, 4, 8), k, k, lengths=torch.tensor([9, 4]))
    assert not prompt.isnan().any()
    assert not names


@torch.inference_mode()
def test_a_compiled_step_takes_the_functions_of_torch(monkeypatch):
    "torch.compile cannot follow an address into C: no graph break, no kernel, the same logits."
    decoder, tokens = Decoder.from_transformers(tiny()).with_ops(CPU), some_tokens(T=1)
    want, names = decoder(tokens), used(monkeypatch)
    got = torch.compile(lambda tokens: decoder(tokens), fullgraph=True, backend="aot_eager")(tokens)
    assert worst(got, want) <= 1e-4 and not names


@torch.inference_mode()
def test_a_matrix_kept_narrower_than_its_input_is_multiplied(monkeypatch):
    "bf16 weights, fp32 input: the matrix widens itself, and the kernel sees one dtype."
    names, matrix = used(monkeypatch), Linear(8, 6).bfloat16()
    x = torch.randn(1, 8)
    assert worst(matrix(x, CPU), matrix(x, REFERENCE)) <= 1e-5 and names == ["linear"]


WRONG = {
    "x too narrow": lambda o: o.linear(torch.randn(1, 7), torch.randn(6, 8)),
    "bias too short": lambda o: o.linear(torch.randn(1, 8), torch.randn(6, 8), torch.randn(5)),
    "two dtypes": lambda o: o.linear(torch.randn(1, 8), torch.randn(6, 8).bfloat16()),
    "norm weight too short": lambda o: o.rms_norm(torch.randn(1, 8), torch.randn(7), 1e-5),
    "tables too wide": lambda o: o.rotate(torch.randn(1, 1, 2, 8), torch.randn(1, 16), torch.randn(1, 16)),
    "tables too short": lambda o: o.rotate(torch.randn(1, 3, 2, 8), torch.randn(2, 8), torch.randn(2, 8)),
    "4 heads over 3": lambda o: o.attention(torch.randn(1, 1, 4, 8), torch.randn(1, 5, 3, 8), torch.randn(1, 5, 3, 8)),
}


@pytest.mark.parametrize("what", WRONG)
@torch.inference_mode()
def test_wrong_shapes_are_refused_as_torch_refuses_them(what, monkeypatch):
    "No kernel reads beyond a tensor because its neighbour has another shape."
    names = used(monkeypatch)
    with pytest.raises((RuntimeError, InputError)) as of_torch: WRONG[what](TORCH)
    with pytest.raises(type(of_torch.value)): WRONG[what](CPU)
    assert not names


@torch.inference_mode()
def test_more_values_than_keys_reach_no_kernel(monkeypatch):
    names = used(monkeypatch)
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 6, 2, 8)
    try: CPU.attention(q, k, v)
    except RuntimeError: pass                       # torch's own word, where it has one
    assert not names


@torch.inference_mode()
def test_a_window_below_one_is_refused():
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 5, 2, 8)
    with pytest.raises(InputError, match="window=0"): CPU.attention(q, k, k, window=0)


def test_gradients_take_the_road_of_torch(monkeypatch):
    names = used(monkeypatch)
    w = torch.randn(6, 8, requires_grad=True)
    CPU.linear(torch.randn(1, 8), w).sum().backward()
    assert w.grad is not None and not names


@torch.inference_mode()
def test_a_long_context_fits_on_a_thread_stack(monkeypatch):
    "200,000 keys, from a thread whose stack is small: scores live in blocks."
    names, result = used(monkeypatch), []
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 200_000, 1, 16)
    def run():
        with torch.inference_mode(): result.append(CPU.attention(q, k, k))
    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=run)
        thread.start(); thread.join()
    finally: threading.stack_size(before)
    assert worst(result[0], REFERENCE.attention(q.double(), k.double(), k.double())) <= 1e-4 and names == ["attention"]


@torch.inference_mode()
def test_threads_do_not_disturb_each_other():
    inputs = [(torch.randn(1, 576), torch.randn(700, 576)) for _ in range(8)]
    want, got = [F.linear(*i) for i in inputs], [None] * 8
    def run(n):
        with torch.inference_mode():
            for _ in range(20): got[n] = CPU.linear(*inputs[n])
    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert max(worst(g, w) for g, w in zip(got, want)) <= 1e-3


# ------------------------------------------------------------------------------------------------------- compiling
SOURCE = "int number(void) { return 42; }"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llm_workbench" / "kernels"


def test_compiled_once_and_kept(empty_cache, monkeypatch):
    first = cpu.build(SOURCE)
    assert [first] == list(empty_cache.iterdir())
    monkeypatch.setattr(cpu.subprocess, "run", lambda *args, **kw: pytest.fail("compiled again"))
    assert cpu.build(SOURCE) == first


def test_another_source_macro_or_processor_is_another_library(empty_cache, monkeypatch):
    found = {cpu.build(SOURCE), cpu.build(SOURCE + "\n"), cpu.build(SOURCE, "BF16")}
    monkeypatch.setattr(cpu, "cpu_name", lambda: "another processor")
    assert len(found | {cpu.build(SOURCE)}) == 4


def test_processes_may_compile_at_the_same_time(empty_cache):
    build = f"ctypes.CDLL(str(cpu.build({SOURCE!r})))"
    code = f"import ctypes; from llm_workbench.kernels import cpu; print({build}.number())"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate(timeout=120)[0].strip() for p in running] == ["42"] * 3
    assert len(list(empty_cache.iterdir())) == 1


def test_a_refusal_leaves_nothing_behind(empty_cache):
    with pytest.raises(UnsupportedError, match="cannot compile.*error.*ops=TORCH"): cpu.build("nonsense")
    assert not list(empty_cache.iterdir())


def test_no_compiler_is_one_clear_sentence(empty_cache, monkeypatch):
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match="install one.*ops=TORCH"): cpu.build(SOURCE)


def test_without_openmp_one_thread_and_a_warning(empty_cache, monkeypatch):
    monkeypatch.setattr(cpu, "openmp", lambda: ["-fno-such-flag-anywhere"])
    with pytest.warns(UserWarning, match="one thread"): library = cpu.build(cpu.PRELUDE + cpu.LINEAR.source)
    assert library.exists()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu.build(SOURCE).exists()
    assert cpu.cache_folder() == cpu.cache_folder(), "a folder of the process' own, the same at every call"


# ------------------------------------------------------------------------------------------------------- the real model
def test_cached_is_uncached(lm):
    tokens = torch.randint(100, 40_000, (1, 12), generator=torch.Generator().manual_seed(0))
    print(f"\ncached vs uncached with CPU: {cached_is_uncached(lm.decoder.with_ops(CPU), tokens=tokens):.1e}")


def test_ragged_batch_is_single(lm):
    tokens = torch.randint(100, 40_000, (3, 14), generator=torch.Generator().manual_seed(0))
    print(f"\nragged vs single with CPU: {ragged_is_single(lm.decoder.with_ops(CPU), tokens=tokens):.1e}")


def test_the_real_model_token_by_token_equals_transformers(lm, hf_model, monkeypatch):
    "A hundred tokens written with the kernels: the logits of every step are those of one pass of transformers."
    names, decoder = used(monkeypatch), lm.decoder.with_ops(CPU)
    text = "The lighthouse stood at the edge of the sea, and every evening the keeper climbed"
    ids = lm.tokenizer.encode(text)
    written = replace(lm, decoder=decoder).generate_ids([ids], max_new_tokens=100, stop_at_eos=False)[0]
    whole = torch.tensor([ids + written[:-1]])
    with torch.inference_mode():
        theirs = hf_model(whole).logits[0, len(ids) - 1:]
        cache, steps = decoder.new_cache(), []
        for piece in whole.split([len(ids)] + [1] * 99, 1): steps.append(decoder(piece, cache)[0, -1])
    assert written == theirs.argmax(-1).tolist()
    difference = worst(torch.stack(steps), theirs)
    print(f"\n100 tokens with the kernels: largest logit difference to transformers {difference:.1e}")
    assert difference <= 2e-3
    per_step = dict(linear=211, rms_norm=61, rotate=30, attention=30)
    assert all(names.count(name) >= 2 * 99 * n for name, n in per_step.items()), "the kernels did not run"
