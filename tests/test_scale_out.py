"""Training on several processes: models and numbers of ranks that hurt, mistakes that the checks reject, checkpoints
that other numbers of ranks go on with, and what happens where ranks do not agree."""
import faulthandler
import multiprocessing
import random
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.scale_out import RUNS, alone as in_one_process, measure, python_of
from llm_workbench.architecture.decoder import Decoder
from llm_workbench.architecture.layers import ModelConfig
from llm_workbench.architecture.ops import TORCH
from llm_workbench.errors import InputError
from llm_workbench.finetuning import scale_out, sft
from llm_workbench.finetuning.data import IGNORE, Example, packed, padded
from llm_workbench.finetuning.lora import LoRAConfig, adapt, trainable
from llm_workbench.finetuning.scale_out import (
    STAGES, WAYS, Job, Ranks, accelerate_config, gathered, held, sent, slurm_script, tokens_to_hide, torchrun_command)
from llm_workbench.finetuning.sft import STATE, Training, TrainingError, token_loss

# ---- processes: fresh ones each time, forked from one that has imported everything; they meet in a file


def on_one(work, meet, rank, size, args):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(50, exit=True)                # who waits for whom, instead of a silent hang
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size,
                            timeout=timedelta(seconds=60))
    try:
        with scale_out.group() as ranks: return work(ranks, *args)
    finally:
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    "on_ranks(n, work, *args): what work(ranks, *args) gives on each of n processes."
    context, count = multiprocessing.get_context("forkserver"), iter(range(10**6))
    context.set_forkserver_preload(["pytest", "benchmarks.scale_out", "torch.distributed.fsdp",
                                    "torch.distributed.tensor", "torch._dynamo"])
    folder = tmp_path_factory.mktemp("meet")
    def run(size, work, *args):
        meet = str(folder / str(next(count)))
        with ProcessPoolExecutor(size, mp_context=context) as pool:
            jobs = [pool.submit(on_one, work, meet, rank, size, args) for rank in range(size)]
            return [job.result(timeout=90) for job in jobs]
    return run


# ---- models whose sizes no number of ranks divides

SIZES = dict(vocab_size=97, hidden_size=20, intermediate_size=26, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=10, max_position_embeddings=64)
KINDS = {"tied": dict(tie_word_embeddings=True, attention_bias=True, head_bias=True, logit_softcap=5.0),
         "experts": dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=14, moe_layers=(1,)),
         "norms": dict(block="sandwich", qk_norm="head", norm_offset=1.0)}


def learner(kind, lora=None, seed=0):
    torch.manual_seed(seed)
    decoder = Decoder(ModelConfig(**SIZES | KINDS[kind]), TORCH).double()
    return adapt(decoder, lora).double() if lora else decoder.requires_grad_(True)


def rows_of(step):
    "Six parts, padded ones and packed ones, from three to sixty learned tokens."
    g = torch.Generator().manual_seed(step)
    def text(length, prompt):
        ids = torch.randint(97, (length,), generator=g).tolist()
        return Example(ids, [IGNORE] * prompt + ids[prompt:])
    return [(packed if i % 2 else padded)([text(4 + 4 * i + k, 1 + k) for k in range(2)]) for i in range(6)]


SETTINGS = Training(4, lr=3e-3, warmup=0, weight_decay=0.1, clip=0.3)
DROPS, DORA = LoRAConfig(r=3, dropout=0.3), LoRAConfig(r=2, dora=True)


def learned(ranks, kind, way, lora=None, settings=SETTINGS, seeds=(0, 0, 0)):
    norms = {}
    decoder = learner(kind, lora, seeds[ranks.rank])
    scale_out.train(decoder, rows_of, settings, ranks, way, log=norm_into(norms))
    return norms | {name: t.numpy() for name, t in gathered(trainable(decoder)).items()}


def norm_into(norms):
    "The length of each gradient before it is clipped: Adam and clipping forgive a wrong factor, this does not."
    def log(step, metrics): norms[f"norm of step {step}"] = torch.tensor([metrics["norm"]]).double().numpy()
    return log


@cache
def alone(kind, lora=None, settings=SETTINGS):
    "The oracle: one process. With dropout, numbers of parts decide what is drawn, so it is our own loop then."
    norms = {}
    loop = scale_out.train if lora and lora.dropout else sft.train
    decoder = loop(learner(kind, lora), rows_of, settings, log=norm_into(norms))
    return norms | {name: t.detach().numpy() for name, t in trainable(decoder).items()}


def check(results, want):
    for rank, got in enumerate(results):
        missing = {n for n in want.keys() - got.keys() if not n.startswith("norm of")}     # resumed: not all steps
        assert not missing and not got.keys() - want.keys(), f"rank {rank} learned other parameters"
        worst = max(got, key=lambda n: abs(got[n] - want[n]).max())
        difference = abs(got[worst] - want[worst]).max()
        assert difference < 1e-11, f"rank {rank}: {worst} is {difference:.1e} from one process"


CASES = {2: [("tied", "hand", None), ("experts", "fsdp", None), ("tied", "fsdp", DORA), ("norms", "ddp", DORA)],
         3: [("tied", "fsdp", None), ("tied", "ddp", DROPS), ("experts", "ddp", None), ("norms", "fsdp", DROPS)]}

def several(ranks, cases): return [learned(ranks, *case) for case in cases]

@pytest.mark.parametrize("size", CASES)
def test_ranks_end_where_one_process_ends(on_ranks, size):
    for (kind, way, lora), *results in zip(CASES[size], *on_ranks(size, several, CASES[size])):
        check(results, alone(kind, lora))


def test_a_process_alone_without_dropout_is_the_loop_of_the_earlier_chapter():
    check([learned(Ranks(), "norms", "hand")], alone("norms"))


def test_ranks_that_begin_differently_take_the_weights_of_the_first(on_ranks):
    cases = [("norms", way, None, SETTINGS, (0, 1)) for way in WAYS]
    for results in zip(*on_ranks(2, several, cases)): check(results, alone("norms"))


# ---- mistakes

def mean_of_means(model, mine, settings, step):
    total = 0.0
    for number, part in mine:
        scale_out.seeded(settings.seed, step, number)
        value, count = model(part)
        (value / count).backward()
        total += value.item() / count
    return total, len(mine)

def not_divided(params, way, ranks, n):
    for p in params: dist.all_reduce(p.grad)

def average_taken_for_a_sum(params, way, ranks, n):
    for p in params: p.grad /= n

def never_sent(params, way, ranks, n):
    for p in params: p.grad *= ranks.size / n

def clipped_by_its_own_length(params, way, ranks, n):
    nn.utils.clip_grad_norm_(params := list(params), SETTINGS.clip * n / ranks.size)
    for p in params:
        dist.all_reduce(p.grad)
        p.grad /= n

def the_same_data(parts, ranks): return list(enumerate(parts))[:len(parts) // ranks.size]
def numbered_anew(parts, ranks): return list(enumerate(parts[ranks.rank::ranks.size]))
def one_seed_for_all(seed, step, part): torch.manual_seed(seed + step)

MUTANTS = [(mean_of_means, "backward", "hand", None), (not_divided, "added_up", "hand", None),
           (average_taken_for_a_sum, "added_up", "ddp", None), (never_sent, "added_up", "hand", None),
           (clipped_by_its_own_length, "added_up", "hand", None), (the_same_data, "share", "fsdp", None),
           (numbered_anew, "share", "ddp", DROPS), (one_seed_for_all, "seeded", "hand", DROPS)]

@contextmanager
def replaced(name, function):
    before = getattr(scale_out, name)
    setattr(scale_out, name, function)
    try: yield
    finally: setattr(scale_out, name, before)

def mutated(ranks):
    found = []
    for mutant, name, way, lora in MUTANTS:
        with replaced(name, mutant): found.append(learned(ranks, "norms", way, lora))
    return found

@pytest.fixture(scope="module")
def wrong(on_ranks): return list(zip(*on_ranks(2, mutated)))

@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[m[0].__name__ for m in MUTANTS])
def test_wrong_ways_are_rejected(wrong, i):
    with pytest.raises(AssertionError, match="from one process"): check(wrong[i], alone("norms", MUTANTS[i][3]))


# ---- checkpoints

class Killed(Exception): pass

def killed(ranks, kind, way, lora, settings, at):
    def log(step, metrics):
        if step == at: raise Killed
    try: scale_out.train(learner(kind, lora), rows_of, settings, ranks, way, log=log)
    except Killed: return True

def forgets(decoder, settings, ranks): return ORIGINAL(decoder, settings, ranks)[0], {}
ORIGINAL = scale_out.resume

@pytest.mark.parametrize("lora, size, way", [(None, 3, "fsdp"), (DROPS, 2, "ddp")], ids=["full", "lora"])
def test_other_ranks_go_on_with_a_checkpoint(on_ranks, tmp_path, lora, size, way):
    settings = Training(4, lr=3e-3, warmup=0, weight_decay=0.1, clip=0.3, folder=str(tmp_path), every=2)
    assert on_ranks(2, killed, "tied", "fsdp", lora, settings, 2) == [True, True]
    kept = (tmp_path / STATE).read_bytes()
    check(on_ranks(size, learned, "tied", way, lora, settings), alone("tied", lora))
    (tmp_path / STATE).write_bytes(kept)
    check([learned(Ranks(), "tied", "hand", lora, settings)], alone("tied", lora))
    (tmp_path / STATE).write_bytes(kept)
    with replaced("resume", forgets), pytest.raises(AssertionError, match="from one process"):
        check([learned(Ranks(), "tied", "hand", lora, settings)], alone("tied", lora))

def own_folder(ranks, folders):
    settings = Training(4, lr=3e-3, warmup=0, weight_decay=0.1, clip=0.3, folder=folders[ranks.rank], every=2)
    try: scale_out.train(learner("norms"), rows_of, settings, ranks, "ddp")
    except InputError as e: return str(e)

def test_ranks_that_find_different_checkpoints_stop(on_ranks, tmp_path):
    settings = Training(4, lr=3e-3, warmup=0, weight_decay=0.1, clip=0.3, folder=str(tmp_path / "a"), every=2)
    killed(Ranks(), "norms", "hand", None, settings, 2)
    for said in on_ranks(2, own_folder, [str(tmp_path / "a"), str(tmp_path / "b")]):
        assert "steps done are [2, 0]" in said and "one folder" in said


# ---- ranks that do not agree

def with_nan(ranks): return [one_with_nan(ranks, way) for way in WAYS]

def one_with_nan(ranks, way):
    decoder = learner("norms")
    before = [p.detach().clone() for p in decoder.parameters()]
    def loss(decoder, part):
        value, n = token_loss(decoder, part)
        return value * (float("nan") if ranks.rank == 1 else 1.0), n
    try: scale_out.train(decoder, rows_of, SETTINGS, ranks, way, loss)
    except TrainingError as e: said = str(e)
    after = gathered(dict(decoder.named_parameters()))
    return said, all(torch.equal(a, b) for a, b in zip(after.values(), before))

def test_a_nan_on_one_rank_stops_all_before_it_harms_the_weights(on_ranks):
    for told in on_ranks(2, with_nan):
        for said, unharmed in told:
            assert re.match(r"step 0: the loss is nan and .* over all 2 ranks", said) and unharmed

def refused(ranks):
    said = []
    for way, parts in (("ddp", 5), ("fdsp", 6)):
        try: scale_out.train(learner("norms"), lambda step: rows_of(step)[:parts], SETTINGS, ranks, way)
        except InputError as e: said.append(str(e))
    return said

def test_what_cannot_be_shared_is_said_on_every_rank(on_ranks):
    for shared, way in on_ranks(2, refused):
        assert "5 parts cannot be shared by 2 ranks" in shared and "Did you mean 'fsdp'?" in way

def test_without_other_processes():
    for way in ("ddp", "fsdp"):
        with pytest.raises(InputError, match="under a launcher"): learned(Ranks(), "norms", way)
    with pytest.raises(InputError, match="nothing learns"):
        scale_out.train(learner("norms").requires_grad_(False), rows_of, SETTINGS)
    with pytest.raises(InputError, match="MASTER_PORT not set"), scale_out.group(): pass

@pytest.mark.parametrize("rank, size, local", [("2", "2", "0"), ("-1", "2", "0"), ("x", "2", "0"), ("0", "2", "-1")])
def test_variables_that_cannot_be(rank, size, local):
    with pytest.raises(InputError, match="RANK counts from 0"):
        scale_out.launched(dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local, MASTER_ADDR="h", MASTER_PORT="1"))


# ---- numbers and configurations

def test_what_is_held_and_sent_follows_the_stages():
    draw = random.Random(0)
    for _ in range(200):
        learning, frozen, ranks, parts = (draw.randrange(1, 10**9), draw.choice([0, draw.randrange(10**9)]),
                                          draw.randrange(1, 100), draw.randrange(1, 9))
        bytes_ = [sum(held(learning, frozen, stage=s, ranks=ranks).values()) for s in STAGES]
        assert bytes_ == sorted(bytes_, reverse=True)
        assert bytes_[3] == pytest.approx(sum(held(learning, frozen, stage=0, ranks=1).values()) / ranks)
        wire = [sent(learning, frozen, stage=s, ranks=ranks, parts=parts) for s in STAGES]
        assert wire == sorted(wire) and wire[0] < 2 * 2 * learning + 1

@pytest.mark.parametrize("changes", [dict(flops=0), dict(bandwidth=-1), dict(learning=0), dict(learning=1.1)])
def test_rates_that_cannot_be(changes):
    with pytest.raises(InputError): tokens_to_hide(**dict(flops=1.0, bandwidth=1.0, ranks=2) | changes)

def test_batches_that_do_not_fit_come_with_two_that_do():
    draw, seen = random.Random(0), 0
    for _ in range(500):
        numbers = dict(micro=draw.randrange(1, 9), nodes=draw.randrange(1, 5), gpus=draw.randrange(1, 9))
        batch = draw.randrange(1, 300)
        try: job = Job(batch, **numbers)
        except InputError as e:
            low, high = map(int, re.search(r"batch of (\d+) or (\d+)", str(e)).groups())
            assert Job(low, **numbers).accumulation + 1 == Job(high, **numbers).accumulation
            seen += 1
        else: assert job.micro * job.accumulation * job.ranks == batch
    assert 100 < seen < 500

@pytest.mark.parametrize("wrong", [dict(batch=True), dict(micro=1.0), dict(nodes=0), dict(gpus="8"), dict(stage=None)])
def test_jobs_that_cannot_be(wrong):
    with pytest.raises(InputError): Job(**dict(batch=64, micro=2) | wrong)

def test_one_machine_needs_no_meeting_place_and_replicas_need_no_plugin():
    job = Job(64, 2, stage=0)
    assert torchrun_command(job, "a.py") == "torchrun --standalone --nproc-per-node 8 a.py"
    assert "rdzv" not in slurm_script(job, "a.py")
    config = accelerate_config(job)
    assert config["distributed_type"] == "MULTI_GPU" and "fsdp_config" not in config
    assert accelerate_config(Job(64, 2, stage=1), "zero.json")["deepspeed_config"]["zero3_init_flag"] is False


# ---- other programs, where their environments are

@pytest.mark.parametrize("run", [r for r in RUNS if r[5]], ids=lambda r: f"{r[0]} {r[1]}")
def test_other_programs_end_where_one_process_ends(run):
    if not Path(python_of(run[5])).exists(): pytest.skip(f"python tools/peers.py {run[5]} makes its environment")
    found = measure(*run, in_one_process(run[2], run[3].split(",")[0]))["apart"]
    assert found < (1e-11 if run[3] == "float64" else 5e-6)
