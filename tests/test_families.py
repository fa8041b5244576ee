"""The parity matrix: every family against transformers, on small models that keep what hurts.

Logits and gradients, cached = uncached at every split, ragged = single, tensors in and out unchanged, and every
combination of ops and cache. The worst difference of each family is printed with `pytest -s`."""
from dataclasses import asdict
from functools import cache

import pytest
import torch

from checks import cached_is_uncached, ragged_is_single, worst
from models import SIZES, SMALL, small_config, small_model
from llm_workbench.architecture.decoder import named_tensors
from llm_workbench.architecture.kv_cache import NoCache
from llm_workbench.architecture.layers import fill_tables
from llm_workbench.families.loading import Decoder
from llm_workbench.families.table import read_config, supported, transformers_entries
from llm_workbench.architecture.ops import REFERENCE, TORCH
from llm_workbench.errors import CheckpointError, InputError, UnsupportedError
from llm_workbench.kernels.cpu import CPU

REQUIRED = """llama mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 qwen2_moe qwen3_moe deepseek_v2
deepseek_v3 phi phi3 phimoe cohere cohere2 falcon gpt_neox olmo olmo2 olmo3 dbrx stablelm granite
smollm3 gpt_oss""".split()
MODELS = [(kind, variant) for kind in SMALL for variant in range(len(SMALL[kind]))]
TOKENS = torch.randint(0, 97, (3, 14), generator=torch.Generator().manual_seed(1))
each_model = pytest.mark.parametrize("kind, variant", MODELS, ids=lambda v: str(v))
each_family = pytest.mark.parametrize("kind", SMALL)


@cache
def pair(kind, variant=0):
    with torch.inference_mode(False): hf = small_model(kind, variant)
    return hf, Decoder.from_transformers(hf)


def test_every_required_family_is_in_the_matrix():
    assert set(REQUIRED) <= set(SMALL) and set(SMALL) | {"arctic"} == set(supported())


@each_family
def test_small_models_keep_what_hurts(kind):
    """A layer of each type that the family has, more tokens than the window and than the stretched context, several
    query heads per KV head."""
    configs = [pair(kind, v)[1].config for v in range(len(SMALL[kind]))]
    T = TOKENS.shape[1]
    for c in configs:
        assert c.num_hidden_layers >= 3 and (not c.sliding_window or c.sliding_window < T)
        if c.num_experts and len(c.moe_layers) < c.num_hidden_layers: assert c.moe_layers, "no layer with experts"
        if kind in ("gemma2", "gemma3_text", "cohere2", "olmo3", "gpt_oss"):
            assert {c.window(i) for i in range(c.num_hidden_layers)} == {None, 5}, "both types of layer"
    if kind not in ("deepseek_v2", "deepseek_v3", "gpt_neox"):
        assert any(c.num_attention_heads != c.num_key_value_heads for c in configs)


@each_model
@torch.inference_mode()
def test_logits(kind, variant):
    hf, ours = pair(kind, variant)
    want = hf(TOKENS).logits
    error = worst(ours(TOKENS), want)
    print(f"{kind} {variant}: {error:.1e} of {want.abs().max():.1f}")
    assert error <= 1e-4 and want.abs().max() > 0.1


@each_model
def test_gradients(kind, variant):
    hf, ours = pair(kind, variant)
    loss = lambda logits: torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    for model in (hf, ours): model.zero_grad(set_to_none=True)
    loss(hf(TOKENS).logits).backward()
    loss(ours(TOKENS)).backward()
    mine, theirs = dict(ours.named_parameters()), dict(hf.named_parameters())
    scale = max(p.grad.abs().max().item() for p in theirs.values() if p.grad is not None)
    compared = 0
    for e in transformers_entries(named_tensors(ours), ours.config, kind):
        if e.ours[0] not in mine or mine[e.ours[0]].grad is None:
            continue                # a router's bias is no parameter
        for name, grad in zip(e.theirs, e.join(*(mine[n].grad for n in e.ours))):
            if theirs[name].grad is None:
                continue                                        # an expert that no token chose
            assert worst(grad, theirs[name].grad) <= 1e-4 * scale, f"the gradient of {name} differs"
            compared += 1
    assert compared >= 0.9 * len(theirs), f"only {compared} of {len(theirs)} gradients were there to be compared"


@each_model
def test_cached_is_uncached_at_every_split(kind, variant):
    ours = pair(kind, variant)[1]
    T = TOKENS.shape[1]
    for store in ("contiguous", "sliding"):
        cached_is_uncached(ours, lambda d: d.new_cache(store, context=T), TOKENS, tolerance=1e-4)


@each_model
def test_ragged_is_single(kind, variant):
    # as in the check, with three tokens after each
    counts = [11, 1, 5]
    ragged_is_single(
        pair(kind, variant)[1], lambda d: d.new_cache(context=[n + 3 for n in counts]), TOKENS, tolerance=1e-4
    )


@each_model
def test_tensors_go_in_and_come_out_unchanged(kind, variant):
    hf, ours = pair(kind, variant)
    want, got = hf.state_dict(), ours.transformers_state()
    if hf.config.tie_word_embeddings: want.pop("lm_head.weight", None)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want)


@each_family
@torch.inference_mode()
def test_to_transformers(kind):
    hf, ours = pair(kind)
    back = ours.to_transformers()
    assert type(back) is type(hf) and worst(back(TOKENS).logits, hf(TOKENS).logits) <= 1e-4


@each_family
@torch.inference_mode()
def test_any_ops_with_any_cache(kind):
    "Every family, every set of ops and every cache that exists, in every combination."
    ours = pair(kind)[1]
    whole, T = ours(TOKENS), TOKENS.shape[1]
    for name, ops in dict(REFERENCE=REFERENCE, TORCH=TORCH, CPU=CPU).items():
        decoder = ours.with_ops(ops)
        assert worst(decoder(TOKENS), whole) <= 1e-3
        for store, options, tolerance in (
            ("contiguous", {}, 1e-3),
            ("sliding", {}, 1e-3),
            ("quantized", dict(bits=8, group=2, residual=4), 0.1 * whole.abs().max().item()),
        ):
            cache = decoder.new_cache(store, context=T, **options)
            got = torch.cat([decoder(piece, cache) for piece in TOKENS.split([6, 1, 1, 6], 1)], 1)
            assert worst(got, whole) <= tolerance, (
                f"{kind} with {name} and a {store} cache differs by {worst(got, whole):.1e}"
            )


@torch.inference_mode()
def test_latent_attention_caches_the_latent_only():
    hf, ours = pair("deepseek_v3")
    cache = ours.new_cache(capacity=14)
    ours(TOKENS, cache)
    c = ours.config
    assert cache.nbytes == TOKENS.numel() * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * 4


def test_without_a_declared_length_the_first_call_decides():
    """LongRoPE chooses its angles by the length of the text: here by 14 tokens or by the first 4, and never changes
    them on the way."""
    ours = pair("phi3", 1)[1]
    with torch.inference_mode():
        short, declared = ours.new_cache(), ours.new_cache(context=14)
        a = torch.cat([ours(p, short) for p in TOKENS.split([4, 10], 1)], 1)
        b = torch.cat([ours(p, declared) for p in TOKENS.split([4, 10], 1)], 1)
        assert worst(a[:, :4], ours(TOKENS[:, :4])) <= 1e-4 and worst(b, ours(TOKENS)) <= 1e-4 and worst(a, b) > 1e-2


# --- Snowflake Arctic, which transformers does not have -------------------------------------------------------------

ARCTIC = dict(model_type="arctic", vocab_size=32000, hidden_size=7168, intermediate_size=4864, num_hidden_layers=35,
              num_attention_heads=56, num_key_value_heads=8, num_local_experts=128, num_experts_per_tok=2,
              moe_layer_frequency=1,
              max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0)
SMALL_ARCTIC = dict(
    hidden_size=48,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_local_experts=5,
    vocab_size=97,
)


def test_arctic_has_its_published_sizes():
    """A 10B dense transformer beside 128 experts of 3.66B: 480B in all, 17B active (Snowflake's announcement, April
    2024)."""
    with torch.device("meta"): model = Decoder(read_config(ARCTIC))
    count = lambda keep: sum(p.numel() for n, p in model.named_parameters() if keep(n))
    in_experts, total = count(lambda n: ".experts." in n), count(lambda n: True)
    dense = total - in_experts
    assert round(total / 1e9) == 479 and round(dense / 1e9) == 10
    assert in_experts / 128 / 1e9 == pytest.approx(3.66, abs=0.005) and (
        dense + in_experts * 2 / 128
    ) / 1e9 == pytest.approx(17, abs=0.5)


def arctic_oracle(t, x, c):
    """One block as its authors describe it, written out: the experts read the block's *input*, the dense half what
    attention wrote."""
    import torch.nn.functional as F
    norm = lambda v, w: v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * w
    mlp = lambda v, gate, up, down: F.linear(F.silu(F.linear(v, gate)) * F.linear(v, up), down)
    attended = x + t["attend"](norm(x, t["input_layernorm"]))
    dense = mlp(norm(attended, t["residual_layernorm"]), t["gate"], t["up"], t["down"])
    h = norm(x, t["post_attention_layernorm"])
    probabilities = F.linear(h, t["router"]).softmax(-1)
    top = probabilities.topk(2, -1)
    sparse = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            for p, e in zip(top.values[b, s], top.indices[b, s]):
                gate, up = t["experts_in"][e].chunk(2)
                sparse[b, s] += p / top.values[b, s].sum() * mlp(h[b, s], gate, up, t["experts_out"][e])
    return attended + dense + sparse


@torch.inference_mode()
def test_arctic_block_is_dense_beside_sparse():
    config = read_config({**ARCTIC, **SMALL_ARCTIC})
    torch.manual_seed(0)
    decoder = Decoder(config)
    for p in decoder.parameters(): p.copy_(torch.randn_like(p) * 0.3)
    block, x = decoder.layers[0], torch.randn(2, 7, 48)
    begin = lambda: fill_tables(NoCache().begin(2, 7), decoder.ropes, x.dtype)
    t = {
        "input_layernorm": block.attn_norm.weight,
        "residual_layernorm": block.mlp_norm.weight,
        "post_attention_layernorm": block.moe_norm.weight,
        "gate": block.mlp.gate_proj.dense(),
        "up": block.mlp.up_proj.dense(),
        "down": block.mlp.down_proj.dense(),
        "router": block.moe.gate.dense(),
        "experts_in": block.moe.experts["gate_up_proj"].dense(),
        "experts_out": block.moe.experts["down_proj"].dense(),
        "attend": lambda h: block.self_attn(h, begin(), REFERENCE),
    }
    assert worst(block(x, begin(), REFERENCE), arctic_oracle(t, x, config)) <= 1e-4
    cached_is_uncached(decoder, tokens=TOKENS, tolerance=1e-4)


def test_arctic_tensors_by_their_names():
    config = {**ARCTIC, **SMALL_ARCTIC}
    model = Decoder(read_config(config))
    model.source = config
    state = model.transformers_state()
    assert {
        "model.layers.0.residual_mlp.gate_proj.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.0.residual_layernorm.weight",
    } <= state.keys()
    again = Decoder.from_checkpoint(config, state)
    assert worst(again(TOKENS), model(TOKENS)) == 0


# --- what cannot be read --------------------------------------------------------------------------------------------

LLAMA = dict(
    model_type="llama", vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
)


@pytest.mark.parametrize("config, error, words", [
    (dict(LLAMA, model_type="gemma4"), UnsupportedError, "'gemma4' is not supported.*Did you mean 'gemma"),
    (dict(LLAMA, model_type=None), UnsupportedError, "is not supported"),
    (dict(LLAMA, rope_scaling=dict(rope_type="yarnn", factor=2.0)), UnsupportedError, "Did you mean 'yarn'"),
    (dict(LLAMA, hidden_act="relu2"), UnsupportedError, "relu2"),
    (dict(LLAMA, model_type="falcon", alibi=True), UnsupportedError, "ALiBi"),
    (dict(LLAMA, model_type=["llama"]), UnsupportedError, "is not supported"),
    (["llama"], InputError, "a list is no configuration"),
    (dict(LLAMA, model_type="gemma3_text", use_bidirectional_attention=True), UnsupportedError, "both directions"),
    (dict(LLAMA, model_type="gpt_oss", swiglu_limit=8.0), UnsupportedError, "swiglu_limit"),
    (dict(LLAMA, model_type="deepseek_v2", num_attention_heads=2), CheckpointError, "num_experts_per_tok is "
                                                                                    "null")], ids=lambda v: str(v)[:30])
def test_a_configuration_that_cannot_be_read(config, error, words):
    with pytest.raises(error, match=words): Decoder(read_config(config))


@pytest.mark.parametrize("kind", ["falcon", "phi3", "dbrx", "gpt_oss", "deepseek_v3"])
def test_missing_surplus_and_misshapen_tensors_are_listed(kind):
    "Also for tensors that hold several of ours: the names are those of the file."
    hf = pair(kind)[0]
    state = hf.state_dict()
    # of layer 0
    names = sorted(n for n in state if n.startswith(next(n for n in state if ".0." in n).split(".0.")[0] + ".0."))
    broken = {n: t for n, t in state.items() if n != names[0]} | {
        names[1]: torch.ones(3, 5),
        "extra.weight": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as e: Decoder.from_checkpoint(hf.config.to_dict(), broken)
    for words in (f"missing: {names[0]}", "extra.weight", f"{names[1]} (3, 5) instead of "
                                                          f"{tuple(state[names[1]].shape)}"):
        assert words in str(e.value), str(e.value)


# --- config.json as it lies in repositories: short, and of any age --------------------------------------------------

def bare_configs():
    for kind, variant in MODELS: yield f"{kind} {variant}", small_config(kind, variant)
    for name, config in released().items():
        if config["model_type"] != "arctic": yield name, config
    sizes = {**SIZES, "num_hidden_layers": 12, "head_dim": 16}
    yield (
        "gemma3, old spelling",
        dict(
            sizes,
            model_type="gemma3_text",
            sliding_window_pattern=6,
            rope_local_base_freq=5e3,
            rope_theta=7e5,
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
    )
    yield "cohere2, old spelling", dict(sizes, model_type="cohere2", sliding_window_pattern=3)
    yield "gemma2, nothing said", dict(SIZES, model_type="gemma2")
    yield (
        "qwen2, windows in the upper layers",
        dict(sizes, model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=5),
    )
    yield (
        "qwen3, windows in the upper layers",
        dict(sizes, model_type="qwen3", use_sliding_window=True, sliding_window=7, max_window_layers=5),
    )
    yield "smollm3, another interval", dict(sizes, model_type="smollm3", no_rope_layer_interval=3)
    yield (
        "llama, old spelling",
        dict(sizes, model_type="llama", rope_theta=5e5, rope_scaling=dict(type="linear", factor=4.0)),
    )


def test_a_short_config_is_read_as_transformers_reads_it():
    "What a config.json leaves out is filled in as transformers does, family by family."
    wrong = {}
    for name, config in bare_configs():
        bare, whole = asdict(read_config(dict(config))), asdict(read_config(full(config)))
        # transformers 5.23 overlooks the rope_theta inside attn_config and turns by 10,000; the file says 500,000
        if name == "DBRX":
            assert bare.pop("rope_parameters")["rope_theta"] == config["attn_config"]["rope_theta"] == 500_000
            whole.pop("rope_parameters")
        if bare != whole: wrong[name] = {k: (bare[k], whole[k]) for k in bare if bare[k] != whole[k]}
    assert not wrong


# --- the released models of the landscape ---------------------------------------------------------------------------

def released():
    from llm_workbench.landscape.models import catalogue
    return {
        m["name"]: m["config"]
        for m in catalogue()["models"]
        if m["config"] and m["config"]["model_type"] in supported()
    }


def test_released_models_have_the_parameters_that_transformers_counts():
    "Every model that the guides name, at its real size on the meta device."
    from llm_workbench.landscape.models import count_parameters
    models = released()
    assert len(models) >= 70
    wrong = {}
    for name, config in models.items():
        with torch.device("meta"): ours = Decoder(read_config(full(config)))
        if sum(p.numel() for p in ours.parameters()) != count_parameters(config)[0]:
            wrong[name] = sum(p.numel() for p in ours.parameters()), count_parameters(config)[0]
    assert not wrong


def full(config):
    "A configuration with transformers' own defaults for what it leaves out."
    from transformers import AutoConfig
    return config if config["model_type"] == "arctic" else AutoConfig.for_model(**config).to_dict()
