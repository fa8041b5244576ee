"A file, a model and a method become an adapter: what is learned and held out, killed and gone on, refused in one line."
import json
from dataclasses import replace
from itertools import count
from math import log

import pytest
import torch
from models import small_model
from typer.testing import CliRunner

import llm_workbench as wb
from llm_workbench import cli
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import InputError, SourceError
from llm_workbench.families.opening import open_checkpoint
from llm_workbench.finetuning import tuning
from llm_workbench.finetuning.data import batch_at, packed
from llm_workbench.finetuning.lora import adapt, adapter, load_adapter
from llm_workbench.finetuning.sft import Training, train
from llm_workbench.finetuning.tracking import METRICS, JsonLines
from llm_workbench.finetuning.tuning import Job, material, read_data, tune
from llm_workbench.inference.generation import LM

run = CliRunner().invoke
TALKS = [dict(messages=[dict(role="user", content=f"What is {i} and {i}?"),
                        dict(role="assistant", content=f"{i} and {i} are {2 * i}. " * (1 + i % 3))]) for i in range(20)]
RECORDS = dict(conversations=TALKS,
               continuations=[dict(prompt=f"{i} and", completion=f" {i + 1}") for i in range(20)],
               preferences=[dict(prompt=f"{i}?", chosen=f"{i}.", rejected=f"No idea of {i}.") for i in range(20)])


@pytest.fixture(scope="module")
def checkpoint(): return open_checkpoint()


@pytest.fixture
def lm(checkpoint):
    "A small random model that speaks in the embedded one's tokens."
    decoder = wb.Decoder.from_transformers(small_model("llama", changes=dict(vocab_size=49152)), ops=TORCH)
    return LM(decoder, checkpoint.tokenizer, checkpoint.card)


@pytest.fixture
def job(tmp_path):
    "A short job over conversations; `job(kind=..., out=..., ...)` changes it."
    def make(kind="conversations", out="run", **changes):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS[kind]))
        return Job(path, tmp_path / out, **(dict(steps=5, batch=4, every=2, rank=2, length=64) | changes))
    return make


def done(lm, job, log=None): return tune(lm, job, material(lm.tokenizer, job), log)
def bytes_of(result): return (result.path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", RECORDS)
def test_keys_say_what_a_line_teaches(job, kind):
    found, records = read_data(job(kind).data)
    assert (found, records) == (kind, RECORDS[kind])


@pytest.mark.parametrize("text, says", [
    ("", "no lines"), ('{"text": "hello"}\n', "has the keys text"), ("[1]\n", "line 1: not an object"),
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2: the key 'completion' is missing"),
    ('{"prompt": "a", "completion": 3}\n', "record 1 .*completion is no text"),
    ('{"prompt": ["a"], "completion": "b"}\n', "record 1 .*prompt is no text"),
    ('{"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}\n', "record 1 .*prompt is no text"),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', "record 1 .*no message with the role 'assistant'"),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "record 1 .*both answers are the same"),
])
def test_bad_lines_are_named(tmp_path, checkpoint, text, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=says): material(checkpoint.tokenizer, Job(path, tmp_path / "run"))


@pytest.mark.parametrize("changes", [
    dict(method="lara"), dict(batch=0), dict(length=1.5), dict(rank=0), dict(every=0), dict(steps=-1), dict(epochs=0),
    dict(epochs=float("nan")), dict(held=1.0), dict(held=-0.1)])
def test_a_job_that_cannot_be_meant(tmp_path, changes):
    with pytest.raises(InputError): Job("x.jsonl", tmp_path, **changes)


def split_is_clean(material, tokenizer, job):
    "Every text once, none both learned and held out, the same for the same seed."
    texts = material(tokenizer, job)
    a, b = ([tuple(e.ids) for group in part for e in group] for part in (texts.train, texts.held))
    assert not set(a) & set(b) and len({*a, *b}) == 20 and len(b) == round(20 * job.held)
    assert material(tokenizer, job) == texts and material(tokenizer, replace(job, seed=job.seed + 1)) != texts


def test_texts_are_learned_or_held_out(checkpoint, job):
    split_is_clean(material, checkpoint.tokenizer, job(held=0.25))
    assert not material(checkpoint.tokenizer, job(held=0.0)).held


def test_a_split_that_leaks_is_rejected(checkpoint, job):
    def leaking(tokenizer, job):
        texts = material(tokenizer, job)
        return replace(texts, train=texts.train + texts.held)
    def unseeded(tokenizer, job): return material(tokenizer, replace(job, seed=0))
    for mutant in (leaking, unseeded):
        with pytest.raises(AssertionError): split_is_clean(mutant, checkpoint.tokenizer, job(held=0.25))


def test_long_texts_are_cut_left_out_and_counted(checkpoint, job):
    whole = material(checkpoint.tokenizer, job(held=0.0))
    longest = max(len(e) for group in whole.train for e in group)
    some = material(checkpoint.tokenizer, job(held=0.0, length=longest - 1))
    assert some.cut and not some.lost and all(len(e) < longest for group in some.train for e in group)
    with pytest.raises(InputError, match="20 too long"): material(checkpoint.tokenizer, job(length=5))
    pairs = material(checkpoint.tokenizer, job("preferences", held=0.0))
    longest = max(len(e) for group in pairs.train for e in group)
    fewer = material(checkpoint.tokenizer, job("preferences", held=0.0, length=longest - 1))
    assert fewer.lost == 20 - len(fewer.train) > 0 and not fewer.cut


def rows_are_whole(parts, checkpoint, job):
    "The texts of a step: each once, in rows that are not longer than asked."
    texts = material(checkpoint.tokenizer, job)
    rows = parts(job, texts.train, None, list(range(12)), "cpu")
    assert all(r.tokens.shape[1] <= job.length for r in rows)
    assert sum(r.n_learned for r in rows) == sum(g[0].n_learned for g in texts.train[:12])


def test_rows_of_a_step(checkpoint, job):
    rows_are_whole(tuning.parts, checkpoint, job(length=100))
    def one_row(job, groups, liked, chosen, device): return [packed([groups[i][0] for i in chosen])]
    def cut(job, groups, liked, chosen, device): return tuning.parts(job, groups, liked, chosen[:-1], device)
    for mutant in (one_row, cut):
        with pytest.raises(AssertionError): rows_are_whole(mutant, checkpoint, job(length=100))


def test_pairs_of_a_step_fit_the_length(checkpoint, job):
    job = job("preferences", length=120)
    texts = material(checkpoint.tokenizer, job)
    rows = tuning.parts(job, texts.train, torch.zeros(len(texts.train), 2), list(range(10)), "cpu")
    assert sum(len(p.rows.tokens) for p in rows) == 20 and all(p.rows.tokens.numel() <= 2 * job.length for p in rows)


def test_it_is_the_loop_of_the_chapters(lm, job):
    job = job(method="lora", held=0.0, length=512)
    result, texts = done(lm, job), material(lm.tokenizer, job)
    again = adapt(lm.decoder, job.lora, seed=0)
    def rows_of(step): return packed(sorted((g[0] for g in batch_at(texts.train, 4, 0, step)), key=lambda e: -len(e)))
    train(again, rows_of, Training(5, tuning.METHODS["lora"]))
    got = load_adapter(lm.decoder, result.path)
    assert result.steps == 5 and result.before is None and result.after is None
    learned = adapter(got)
    for name, tensor in adapter(again).items(): torch.testing.assert_close(learned[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_every_kind_with_every_method_learns(lm, job, kind, method):
    before = [p.clone() for p in lm.decoder.parameters()]
    result = done(lm, job(kind, method=method, steps=8, lr=2e-2 if method != "full" else 2e-3))
    assert result.after < result.before
    if kind == "preferences": assert abs(result.before - log(2)) < 1e-5
    if method != "full": assert all(torch.equal(a, b) for a, b in zip(before, lm.decoder.parameters()))


def test_qlora_packs_what_it_freezes(lm, job, monkeypatch):
    made = []
    monkeypatch.setattr(tuning, "qlora", lambda decoder, *a, **k: made.append(1) or adapt(decoder, *a, **k))
    assert bytes_of(done(lm, job(method="qlora"))) and made == [1]


def test_full_training_ends_in_a_gguf(lm, job):
    result = done(lm, job(method="full"))
    again = wb.load(result.path, weights="dense", ops=TORCH)
    tokens = torch.tensor([lm.tokenizer.encode("What is 3 and 3?")])
    torch.testing.assert_close(again.decoder(tokens), lm.decoder(tokens), rtol=1e-4, atol=1e-4)


def goes_on(tune, lm, make, at):
    "A run that is stopped behind a step and started again ends as one that never stopped, with every step logged once."
    whole = tune(lm, make(out="whole"), material(lm.tokenizer, make()))
    def stop(step, metrics):
        if step == at: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): tune(lm, make(out="stopped"), material(lm.tokenizer, make()), stop)
    folder = make(out="stopped").out
    later = tune(lm, make(out="stopped"), material(lm.tokenizer, make()))
    assert bytes_of(whole) == bytes_of(later) and (whole.before, whole.after) == (later.before, later.after)
    steps = [json.loads(line)["step"] for line in (folder / METRICS).read_text().splitlines()]
    assert steps == list(range(5))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "metrics.jsonl", "report.json", "settings.json"]


@pytest.mark.parametrize("at", range(5))
def test_a_stopped_run_goes_on(lm, job, at): goes_on(tune, lm, job, at)


def test_runs_that_go_on_wrongly_are_rejected(lm, job, monkeypatch):
    "Mutants: one gives texts out anew where it goes on, one logs what a lost step said as well."
    def from_the_first(decoder, rows_of, *more):
        calls = count()
        return train(decoder, lambda step: rows_of(next(calls)), *more)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(tuning, "train", from_the_first)
        goes_on(tune, lm, job, 3)
    monkeypatch.setattr(JsonLines, "rewind", lambda self, step: None)
    def other(out="run", **changes): return job(rank=3, out=f"{out} 2", **changes)
    with pytest.raises(AssertionError): goes_on(tune, lm, other, 2)


def test_folders_that_are_taken(lm, job, tmp_path):
    first = job()
    done(lm, first)
    with pytest.raises(InputError, match="has ended"): done(lm, first)
    with pytest.raises(InputError, match="holds other things"): done(lm, replace(first, out=tmp_path))
    with pytest.raises(SourceError, match="cannot be the run's folder"): done(lm, replace(first, out=first.data))


def test_another_run_does_not_go_on_in_a_folder(lm, job, tmp_path):
    first = job()
    def stop(step, metrics): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): done(lm, first, stop)
    with pytest.raises(InputError, match="rank = 2, and this one has 3"): done(lm, replace(first, rank=3))
    other = tmp_path / "other.jsonl"
    other.write_text(first.data.read_text() + json.dumps(TALKS[0]) + "\n")
    with pytest.raises(InputError, match="a run with data"): done(lm, replace(first, data=other))
    (first.out / tuning.SETTINGS).write_text("{")
    with pytest.raises(SourceError, match="no description of a run"): done(lm, first)


def test_the_plan_grows_with_what_is_asked(checkpoint, job):
    from llm_workbench.families.loading import read_config
    config = read_config(checkpoint.config)
    def total(**changes):
        asked = job(**changes)
        return tuning.demand(config, asked, material(checkpoint.tokenizer, asked)).total
    assert total(recompute=True, length=512, batch=20) < total(length=512, batch=20)
    assert total(method="qlora") < total() < total(method="full") and total() < total(rank=64)


# ---------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def small(monkeypatch, lm):
    "`wb.load` gives the small model; its configuration is planned."
    monkeypatch.setitem(vars(wb), "load", lambda *_, **__: lm)
    return lm


def shell(job, *more): return run(cli.app, ["tune", str(job.data), str(job.out), "--steps", "3", "--batch", "4", *more])


def test_the_command_tells_what_it_does(small, job):
    job = job()
    result = shell(job)
    assert result.exit_code == 0, result.output
    said = result.stdout.splitlines()
    assert said[0].startswith("18 conversations to learn from") and "in 3 steps of 4 texts" in said[1]
    assert [line.split(", ")[0] for line in said[3:6]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "held out" in said[6] and said[8].endswith(f"chat --adapter {job.out}/adapter")


def test_a_dry_run_writes_nothing(small, job):
    result = shell(job(), "--dry-run")
    assert result.exit_code == 0 and "at the fullest moment weights" in result.stdout and not job().out.exists()


def test_too_little_memory_is_said_before(small, job, monkeypatch):
    import psutil
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), dict(available=10**8)))
    result = shell(job())
    assert result.exit_code == 1 and "--recompute" in result.stderr and not job().out.exists()
    assert shell(job(), "--anyway").exit_code == 0


def test_ctrl_c_says_how_to_go_on(small, job, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(tuning, "tune", stop)
    result = shell(job())
    assert result.exit_code == 130 and "goes on from the last checkpoint" in result.stderr


@pytest.mark.parametrize("more, says", [
    (["--method", "lara"], "did you mean"), (["--batch", "0"], "not a whole number"), (["--lr", "-1"], "not a number")])
def test_wrong_options_end_in_one_line(small, job, more, says):
    result = shell(job(), *more)
    assert result.exit_code != 0 and says in result.stderr.lower() and len(result.stderr.strip().splitlines()) == 1


def test_chat_puts_an_adapter_on(small, job):
    job = job()
    shell(job)
    result = run(cli.app, ["chat", "--prompt", "Hi", "--max-tokens", "3", "--temperature", "0",
                           "--adapter", str(job.out / "adapter")])
    assert result.exit_code == 0, result.output
    assert run(cli.app, ["chat", "--prompt", "Hi", "--adapter", str(job.out)]).exit_code == 1
