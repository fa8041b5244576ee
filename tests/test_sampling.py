"A draw of fixed shape: whatever the settings, nothing is read back or made on the host, and it compiles once."
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from llm_workbench.inference import sampling
from llm_workbench.inference.sampling import Sampler, counted, gumbel, token_counts

B, V = 3, 500
EACH = dict(temperature=[0.0, 0.7, 2.0], top_k=[1, 40, 7], top_p=[0.0, 0.9, 1.0], min_p=[0.0, 0.05, 0.5],
            repetition_penalty=[1.0, 1.2, 2.0], presence_penalty=[0.0, 0.5, 1.0], frequency_penalty=[0.0, -0.3, 0.2])
SAMPLERS = {"greedy": Sampler(0.0), "plain": Sampler(), "tiny temperature": Sampler(1e-9),
            "top_k beyond V": Sampler(top_k=999)}
for name, values in EACH.items():
    SAMPLERS[name] = Sampler(**{name: values[1]})
    SAMPLERS[f"{name}, a tensor"] = Sampler(**{name: torch.tensor(values[1])})
    SAMPLERS[f"{name} per row"] = Sampler(**{name: torch.tensor(values)})
SAMPLERS["all"] = Sampler(**{name: values[1] for name, values in EACH.items()})
SAMPLERS["all per row"] = Sampler(**{name: torch.tensor(values) for name, values in EACH.items()})
mixed = dict(repetition_penalty=1.3, frequency_penalty=torch.tensor([0.1, 0.2, 0.3]))
SAMPLERS["greedy with penalties"] = Sampler(0.0, **mixed)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


def a_call(seed, device="cpu"):
    "Logits, counts and noise."
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(-1, V, (B, 60), generator=generator)
    noise = gumbel(torch.empty(B, V), generator)
    given = 3 * torch.randn(B, V, generator=generator), token_counts(history, V), noise
    return [t.to(device) for t in given]


@every_sampler
def test_compiled_once_without_a_break_and_equal(sampler):
    compilations = CompileCounterWithBackend("aot_eager")
    pick = torch.compile(sampler.pick, fullgraph=True, backend=compilations)
    for seed in range(4):
        given = a_call(seed)
        assert torch.equal(pick(*given), sampler.pick(*given))
    assert compilations.frame_count == 1


@every_sampler
def test_the_call_itself_compiles_and_draws_its_own_noise(sampler):
    compilations = CompileCounterWithBackend("aot_eager")
    call = torch.compile(sampler, fullgraph=True, backend=compilations)
    for seed in range(3):
        logits, counts, _ = a_call(seed)
        assert ((call(logits, counts) >= 0) & (call(logits, counts) < V)).all()
    assert compilations.frame_count == 1


def test_other_values_per_row_need_no_other_compilation():
    compilations = CompileCounterWithBackend("aot_eager")
    pick = torch.compile(lambda sampler, *given: sampler.pick(*given), fullgraph=True, backend=compilations)
    for i in range(6):
        sampler = Sampler(**{name: torch.tensor(values).roll(i) for name, values in EACH.items()})
        given = a_call(i)
        assert torch.equal(pick(sampler, *given), sampler.pick(*given))
    assert compilations.frame_count == 1


class OnlyHere(TorchDispatchMode):
    "Fails where an operation makes a tensor on the CPU."
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        assert not any(t.device.type == "cpu" for t in made), f"{function} makes a tensor on the host"
        return out


@every_sampler
def test_nothing_is_read_back_and_nothing_is_made_on_the_host(sampler):
    "A tensor on the device meta has no values: whoever looks at one fails."
    moved, (logits, counts, noise) = sampler.to("meta"), a_call(0, "meta")
    with OnlyHere():
        for given in ((logits, counts, noise), (logits, counts), (logits.bfloat16(), counts, noise)):
            tokens = moved.pick(*given)
            assert tokens.shape == (B,) and tokens.dtype is torch.int64
            assert counted(counts, tokens) is counts


@pytest.mark.parametrize("name", ["top_k per row", "top_p", "top_p per row", "all"])
def test_a_look_is_noticed(monkeypatch, name):
    monkeypatch.setattr(sampling, "may_look", lambda logits: True)
    sampler, given = SAMPLERS[name].to("meta"), a_call(0, "meta")
    with pytest.raises(RuntimeError, match="meta"): sampler.pick(*given)


@every_sampler
def test_where_the_host_may_look_the_tokens_are_the_same(sampler, monkeypatch):
    calls = [a_call(seed) for seed in range(5)]
    quick = [sampler.pick(*given) for given in calls]
    monkeypatch.setattr(sampling, "may_look", lambda logits: False)
    assert all(torch.equal(sampler.pick(*given), tokens) for given, tokens in zip(calls, quick))
    assert all(torch.equal(sampler.select([i]).pick(*(t[i:i + 1] for t in given)), tokens[i:i + 1])
               for given, tokens in zip(calls, quick) for i in range(B)), "a row depends on its neighbours"
