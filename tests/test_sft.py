"""The training loop: gradients that ignore how rows are cut, mistakes that the checks reject, and what a kill, a full
disk or a NaN leaves behind."""
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llm_workbench as wb
from models import small_model
from llm_workbench.architecture.layers import ModelConfig
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import CheckpointError, InputError, SourceError
from llm_workbench.files.safetensors import SafetensorsFile
from llm_workbench.finetuning import sft
from llm_workbench.finetuning.data import IGNORE, Example, batch_at, packed, padded
from llm_workbench.finetuning.lora import LoRAConfig, adapt, trainable
from llm_workbench.finetuning.sft import (
    STATE, Training, TrainingError, accumulated, adamw, mean_loss, recomputed, token_loss, train)


def texts(n=8, seed=0, vocabulary=97):
    g = torch.Generator().manual_seed(seed)
    def one(length, prompt):
        ids = torch.randint(vocabulary, (length,), generator=g).tolist()
        return Example(ids, [IGNORE] * prompt + ids[prompt:])
    return [one(3 + 5 * i % 17, 1 + i % 3) for i in range(n)]


def plain(decoder, rows):
    "The oracle: all logits at once, in one call of torch's own."
    logits = decoder.logits(rows.hidden(decoder))[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, rows.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"), rows.n_learned


def gradients(decoder, rows, loss):
    decoder.zero_grad()
    value, n = loss(decoder, rows)
    value.backward()
    grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in trainable(decoder).values()]
    return value.item(), n, torch.cat([g.flatten() for g in grads])


def check_loss(loss, decoder, rows):
    value, n, got = gradients(decoder, rows, loss)
    want, m, grad = gradients(decoder, rows, plain)
    assert n == m, f"{n} tokens counted, {m} are learned"
    assert abs(value - want) <= 1e-9 * abs(want), f"the sum is {value}, not {want}"
    assert (got - grad).norm() <= 1e-9 * grad.norm(), "gradients differ"


FAMILIES = [("llama", 0), ("llama", 1), ("gemma2", 0), ("mixtral", 0)]     # a tied head, biases, a bound on logits

@pytest.mark.parametrize("family, variant", FAMILIES)
@pytest.mark.parametrize("make", [padded, packed])
def test_loss_and_gradients_are_those_of_all_logits(family, variant, make):
    decoder = wb.Decoder.from_transformers(small_model(family, variant)).double()
    for learning in (decoder.requires_grad_(True), adapt(decoder, LoRAConfig(r=2))):
        with torch.no_grad():
            for p in trainable(learning).values(): p += 0.01 * torch.randn(p.shape, dtype=p.dtype)
        for chunk in (1, 5, 1000):
            check_loss(lambda d, r: token_loss(d, r, chunk), learning, make(texts()))


@pytest.mark.parametrize("ops", [REFERENCE, TORCH])
def test_blocks_computed_again_change_nothing(ops):
    decoder = wb.Decoder.from_transformers(small_model("llama", 0)).double().requires_grad_(True)
    for make in (padded, packed):
        want = gradients(decoder.with_ops(ops), make(texts()), token_loss)[2]
        got = gradients(decoder.with_ops(ops.but(blocks=recomputed)), make(texts()), token_loss)[2]
        assert torch.equal(got, want)


def test_dropout_is_drawn_again_where_blocks_are_computed_again():
    decoder = wb.Decoder.from_transformers(small_model("llama", 0))
    found = []
    for ops in (TORCH, TORCH.but(blocks=recomputed)):
        adapted = adapt(decoder.with_ops(ops), LoRAConfig(r=4, dropout=0.5)).train()
        torch.manual_seed(3)
        found.append(gradients(adapted, padded(texts()), token_loss)[2])
    assert torch.equal(*found)


def on_the_prompt(decoder, rows):
    return token_loss(decoder, type(rows)(rows.tokens, rows.tokens, rows.counts, rows.pieces))

def not_shifted(decoder, rows):
    learned = rows.labels != IGNORE
    logits = decoder.logits(rows.hidden(decoder)[learned])
    return F.cross_entropy(logits, rows.labels[learned], reduction="sum"), rows.n_learned

def last_chunk_lost(decoder, rows):
    total, n = token_loss(decoder, rows)
    return total * (1 - 1 / n), n

def mean_inside(decoder, rows):
    total, n = token_loss(decoder, rows)
    return total / n, n

def padding_counted(decoder, rows):
    total, n = token_loss(decoder, rows)
    return total, rows.labels[:, 1:].numel()

def head_not_taught(decoder, rows):
    hidden, labels = rows.hidden(decoder)[:, :-1], rows.labels[:, 1:]
    targets = labels[labels != IGNORE]
    def loss_of(h, part): return sft.summed_loss(decoder.logits(h), targets[part])
    return sft.in_chunks(loss_of, hidden[labels != IGNORE], nn.Identity()), rows.n_learned

@pytest.mark.parametrize("mutant", [on_the_prompt, not_shifted, last_chunk_lost, mean_inside, padding_counted,
                                    head_not_taught])
def test_wrong_losses_are_rejected(mutant):
    decoder = wb.Decoder.from_transformers(small_model("llama", 0)).double().requires_grad_(True)
    with pytest.raises(AssertionError):
        check_loss(mutant, decoder, padded(texts()))


# ---- a step

def tiny(seed=0):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return wb.Decoder(ModelConfig(**sizes, num_key_value_heads=1, head_dim=8, max_position_embeddings=64),
                      TORCH).double().requires_grad_(True)

def mean_of_means(decoder, parts, loss, params):
    "Tokens counted per batch: every part weighs the same."
    for part in parts:
        value, n = loss(decoder, part)
        (value / n / len(parts)).backward()
    return 0.0, 1

def check_parts(accumulate):
    decoder, data = tiny(), sorted(texts(), key=len)
    params = list(decoder.parameters())
    accumulate(decoder, [padded(data[:5]), padded(data[5:6]), packed(data[6:])], token_loss, params)
    got = torch.cat([p.grad.flatten() for p in params])
    decoder.zero_grad()
    accumulated(decoder, [padded(data)], token_loss, params)
    assert torch.allclose(got, torch.cat([p.grad.flatten() for p in params]), rtol=1e-9, atol=1e-12)

def test_parts_have_the_gradient_of_the_whole(): check_parts(accumulated)

def test_a_mean_of_means_is_rejected():
    with pytest.raises(AssertionError): check_parts(mean_of_means)


def rows_of(step): return [padded(batch_at(texts(), 3, 0, step)), padded(batch_at(texts(4, 5), 2, 1, step))]

def by_hand(settings, data, decay_all=False, late=0, clip=True):
    "Training written out, in which mistakes can be planted."
    decoder = tiny()
    params, m, v = list(decoder.parameters()), {}, {}
    for step in range(settings.steps):
        value, n = 0.0, 0
        for p in params: p.grad = None
        for part in data(step):
            loss, count = plain(decoder, part)
            loss.backward()
            n += count
        g = [p.grad / n for p in params]
        norm = math.sqrt(sum((x**2).sum().item() for x in g))
        if clip and norm > settings.clip: g = [x * settings.clip / (norm + 1e-6) for x in g]
        lr = settings.lr_at(step + late)
        with torch.no_grad():
            for i, (p, x) in enumerate(zip(params, g)):
                m[i], v[i] = 0.9 * m.get(i, 0) + 0.1 * x, 0.999 * v.get(i, 0) + 0.001 * x**2
                if decay_all or p.ndim > 1: p *= 1 - lr * settings.weight_decay
                p -= lr * (m[i] / (1 - 0.9**(step + 1))) / ((v[i] / (1 - 0.999**(step + 1))).sqrt() + 1e-8)
    return decoder

SETTINGS = Training(12, lr=2e-2, warmup=0.25, schedule="linear", weight_decay=0.1, clip=0.5)

def apart(a, b): return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))

@pytest.mark.parametrize("schedule", sft.SCHEDULES)
def test_twelve_steps_are_those_written_out(schedule):
    settings = Training(12, lr=2e-2, warmup=3, schedule=schedule, weight_decay=0.1, clip=0.5)
    assert apart(train(tiny(), rows_of, settings), by_hand(settings, rows_of)) < 1e-10

@pytest.mark.parametrize("mistake", [dict(decay_all=True), dict(late=1), dict(clip=False)], ids=str)
def test_planted_mistakes_move_the_weights(mistake):
    assert apart(train(tiny(), rows_of, SETTINGS), by_hand(SETTINGS, rows_of, **mistake)) > 1e-6

def test_what_does_not_learn_stays_and_dropout_is_off_afterwards():
    base = tiny().requires_grad_(False)
    before = [p.clone() for p in base.parameters()]
    adapted = adapt(base, LoRAConfig(r=2, dropout=0.3)).double()
    random = torch.get_rng_state()
    train(adapted, rows_of, SETTINGS)
    assert torch.equal(random, torch.get_rng_state()), "training leaves the caller's random numbers alone"
    assert not adapted.training and all(torch.equal(a, b) for a, b in zip(before, base.parameters()))
    assert any(p.detach().abs().max() > 0 for n, p in trainable(adapted).items() if n.endswith("B"))

def test_mean_loss_is_per_token_and_without_dropout():
    adapted = adapt(tiny().requires_grad_(False), LoRAConfig(r=2, dropout=0.9)).double().train()
    with torch.no_grad():
        for p in trainable(adapted).values(): p += 0.5
    one = mean_loss(adapted, [padded(texts())])
    assert adapted.training and mean_loss(adapted, [padded([t]) for t in texts()]) == pytest.approx(one, rel=1e-9)
    with pytest.raises(InputError, match="no batches"): mean_loss(adapted, [])


# ---- interruptions

def stopped_at(n, decoder, settings):
    class Stop(Exception): pass
    def log(step, metrics):
        if step == n: raise Stop
    with pytest.raises(Stop): train(decoder, rows_of, settings, log=log)

@pytest.mark.parametrize("at", range(0, 11, 2))
def test_stopped_anywhere_it_ends_in_the_same_bits(at, tmp_path):
    def new(): return adapt(tiny().requires_grad_(False), LoRAConfig(r=2, dropout=0.3)).double()
    whole = train(new(), rows_of, Training(11, lr=1e-2))
    settings = Training(11, lr=1e-2, folder=tmp_path, every=3)
    stopped_at(at, new(), settings)
    again = train(new(), rows_of, settings)
    assert apart(whole, again) == 0
    assert apart(train(new(), rows_of, settings, log=lambda *_: pytest.fail("it was done")), whole) == 0

def forgets_the_averages(params, optimizer, settings):
    step = sft_load(params, optimizer, settings)
    optimizer.state.clear()
    return step

def begins_the_data_anew(params, optimizer, settings):
    sft_load(params, optimizer, settings)
    return 0

sft_load = sft.load_state

@pytest.mark.parametrize("mutant", [forgets_the_averages, begins_the_data_anew])
def test_wrong_ways_to_go_on_are_noticed(mutant, tmp_path, monkeypatch):
    whole = train(tiny(), rows_of, Training(11, lr=1e-2))
    settings = Training(11, lr=1e-2, folder=tmp_path, every=3)
    stopped_at(6, tiny(), settings)
    monkeypatch.setattr(sft, "load_state", mutant)
    assert apart(whole, train(tiny(), rows_of, settings)) > 1e-5


SCRIPT = """
import sys, time
sys.path[:0] = sys.argv[2:]
import test_sft as t
settings = t.Training(80, lr=1e-2, folder=sys.argv[1], every=1)
t.train(t.tiny(), t.rows_of, settings, log=lambda step, _: print(step, flush=True))
"""

def test_killed_at_any_moment_it_goes_on(tmp_path, root):
    "SIGKILL while it writes a checkpoint after every step: there is always a whole one, and the end is the same."
    run = [sys.executable, "-c", SCRIPT, str(tmp_path), str(root / "tests"), str(root)]
    for last in (3, 40):
        with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
            steps = []
            for line in process.stdout:
                steps.append(int(line))
                if steps[-1] >= last: break
            time.sleep(0.003 * last % 0.01)
            process.send_signal(signal.SIGKILL)
        assert int(SafetensorsFile(tmp_path / STATE).metadata["step"]) >= steps[-1]
    settings = Training(80, lr=1e-2, folder=tmp_path, every=1)
    whole = train(tiny(), rows_of, Training(80, lr=1e-2))
    assert apart(whole, train(tiny(), rows_of, settings)) == 0

def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    settings = Training(8, lr=1e-2, folder=tmp_path, every=2)
    stopped_at(4, tiny(), settings)
    before = (tmp_path / STATE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises((SourceError, OSError)) as e: train(tiny(), rows_of, settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert isinstance(e.value, SourceError) and "step 6" in str(e.value) and "File too large" in str(e.value)
    assert (tmp_path / STATE).read_bytes() == before and os.listdir(tmp_path) == [STATE]
    assert apart(train(tiny(), rows_of, settings), train(tiny(), rows_of, Training(8, lr=1e-2))) == 0

@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_before_any_harm(what, tmp_path):
    def broken(decoder, rows):
        total, n = token_loss(decoder, rows)
        if state["step"] != 5: return total, n
        return total * (math.nan if what == "loss" else 1) + (0 if what == "loss" else (total - total).sqrt() * 1.0), n
    state, settings = dict(step=0), Training(9, lr=1e-2, folder=tmp_path, every=2)
    def data(step):
        state["step"] = step
        return rows_of(step)
    decoder, seen = tiny(), []
    with pytest.raises(TrainingError, match="step 5.*lower lr"):
        train(decoder, data, settings, loss=broken, log=lambda step, _: seen.append(step))
    assert seen == [0, 1, 2, 3, 4] and all(p.isfinite().all() for p in decoder.parameters())
    assert SafetensorsFile(tmp_path / STATE).metadata["step"] == "4"
    whole = train(tiny(), rows_of, Training(9, lr=1e-2))
    assert apart(whole, train(tiny(), rows_of, settings)) == 0, "mended, it goes on"


# ---- bad input

def test_bad_settings_and_rows():
    for wrong in (dict(steps=0), dict(steps=2.5), dict(lr=0.0), dict(lr=math.inf), dict(clip=0.0), dict(warmup=-1.0),
                  dict(every=0), dict(weight_decay=-0.1)):
        with pytest.raises(InputError, match="steps and every"): Training(**{"steps": 3} | wrong)
    with pytest.raises(InputError, match="'cosine'"): Training(3, schedule="cosin")
    with pytest.raises(InputError, match="nothing learns"): train(tiny().requires_grad_(False), rows_of, SETTINGS)
    nothing = padded([Example([1, 2, 3], [IGNORE] * 3)])
    for chunk in (0, 2.5, None):
        with pytest.raises(InputError, match="chunk is"): token_loss(tiny(), padded(texts()), chunk)
    with pytest.raises(InputError, match="no learned token"): train(tiny(), lambda step: nothing, SETTINGS)

def test_another_run_in_the_folder_is_refused(tmp_path):
    train(tiny(), rows_of, Training(2, lr=1e-2, folder=tmp_path))
    with pytest.raises(InputError, match="lr = 0.01.*another folder"):
        train(tiny(), rows_of, Training(2, lr=1e-3, folder=tmp_path))
    with pytest.raises(InputError, match="other parameters"):
        train(adapt(tiny().requires_grad_(False)), rows_of, Training(2, lr=1e-2, folder=tmp_path))

@pytest.mark.parametrize("harm", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"\xff" * 8 + b[8:],
                                  lambda b: b.replace(b'"settings"', b'"settinks"')])
def test_a_damaged_checkpoint_is_named(harm, tmp_path):
    settings = Training(2, lr=1e-2, folder=tmp_path)
    train(tiny(), rows_of, settings)
    (tmp_path / STATE).write_bytes(harm((tmp_path / STATE).read_bytes()))
    with pytest.raises(CheckpointError, match=STATE): train(tiny(), rows_of, settings)

def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="file"):
        train(tiny(), rows_of, Training(2, lr=1e-2, folder=tmp_path / "file"))
