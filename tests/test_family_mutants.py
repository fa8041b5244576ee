"""Mistakes that were made in real implementations, planted one at a time: the parity matrix must reject each, at
the step where it first matters.

A mutant is a change to a decoder whose twin passes; `step` is the first line of the divergence table that goes
wrong ("logits" where only what follows the head is wrong)."""
import copy
from dataclasses import replace

import pytest
import torch

from checks import worst
from models import SMALL, small_model

from llm_workbench import Decoder
from llm_workbench.architecture.layers import Attention
from llm_workbench.architecture.norms_and_mlps import rms_norm
from llm_workbench.families.comparing import divergence
from llm_workbench.families.layouts import DOWN, GATE_UP, Entry, qkv_rows
from llm_workbench.families.table import FAMILIES

TOKENS = torch.randint(0, 97, (2, 14), generator=torch.Generator().manual_seed(1))


def config(**changes): return lambda d: d.with_config(**changes)
def ops(**functions): return lambda d: d.with_ops(**functions)


def rope(**changes):
    "Entries of the RoPE parameters changed or (None) taken away."
    def change(d):
        new = {**d.config.rope_parameters, **changes}
        return d.with_config(rope_parameters={k: v for k, v in new.items() if v is not None})
    return change


def modules(change):
    "`change(block)` on every block."
    def mutate(d):
        for block in d.layers: change(block)
        return d
    return mutate


def router(**options):
    return modules(lambda block: block.mlp.options.update(options) if hasattr(block.mlp, "experts") else None)


def norm_after_rope(d):
    class Late(Attention):
        "Turns first and norms then."
        def forward(self, x, step, ops):
            heads = (
                proj(x, ops).unflatten(-1, (-1, self.config.head_dim))
                for proj in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, k, v = heads
            q, k = (ops.rotate(t, *step.tables[self.turns]) for t in (q, k))
            out = step.attend(self.layer, self.q_norm(q, ops), self.k_norm(k, ops), v, ops, **self.options)
            return self.o_proj(out.flatten(2), ops)
    return modules(lambda block: setattr(block.self_attn, "__class__", Late))(d)


def wrong_layout(kind, **wrong):
    "The decoder read with other layouts."
    def mutate(d):
        true = FAMILIES[kind]
        FAMILIES[kind] = replace(true, **wrong)
        try: return Decoder.from_checkpoint(d.source, d.theirs)
        finally: FAMILIES[kind] = true
    return mutate


def swapped_gate_up(c):
    both = lambda *parts: (torch.cat(parts),)
    return Entry(("mlp.up_proj", "mlp.gate_proj"), ("mlp.gate_up_proj",), lambda t: t.chunk(2), both)


def experts_not_interleaved(c):
    "gpt-oss: the first half taken for the gate."
    turned = lambda t: (t.transpose(1, 2),)
    same = lambda t: (t,)
    return [
        Entry((f"{GATE_UP}.weight",), (GATE_UP,), turned, turned),
        Entry((f"{GATE_UP}.bias",), (f"{GATE_UP}_bias",), same, same),
        Entry((f"{DOWN}.weight",), (DOWN,), turned, turned),
    ]


def zero_bias(block):
    if hasattr(block.mlp, "experts"): block.mlp.e_score_correction_bias.zero_()


def layer_norm_without_mean(x, weight, bias, eps):
    out = rms_norm(x, weight, eps)
    return out if bias is None else out + bias


def exact_gelu(gate, up): return torch.nn.functional.gelu(gate) * up


def drop(name): return modules(lambda block: setattr(block, name, None))


def one_rope(d): return d.with_config(rope_parameters=d.config.rope_parameters["sliding_attention"])


ATTENTION, MLP = "layers.0.self_attn", "layers.0.mlp"
MUTANTS = {   # name: (family, variant, mistake, the step where it first matters)
    "QK-norm after RoPE": ("qwen3", 0, norm_after_rope, ATTENTION),
    "YaRN without its attention factor": ("mistral", 1, rope(attention_factor=1.0), ATTENTION),
    "YaRN ignored": ("qwen3", 0, rope(rope_type="default"), ATTENTION),
    "Llama-3 scaling taken for linear": ("llama", 0, rope(rope_type="linear"), ATTENTION),
    "dynamic NTK at a fixed factor": ("llama", 2, rope(original_max_position_embeddings=64), ATTENTION),
    "LongRoPE with its short factors beyond the trained length": (
        "phi3", 1, rope(original_max_position_embeddings=4096), ATTENTION),
    "LongRoPE's attention factor forgotten": ("phi3", 1, rope(attention_factor=1.0), ATTENTION),
    "interleaved pairs read as halves (Command R)": ("cohere", 0, config(rope_interleaved=False), ATTENTION),
    "interleaved pairs read as halves (DeepSeek)": ("deepseek_v3", 0, config(rope_interleaved=False), ATTENTION),
    "the whole head turned where only a part is (Phi)": ("phi", 0, config(rotary_dim=None), ATTENTION),
    "RoPE on layers that have none (SmolLM3)": ("smollm3", 0, config(no_rope_layers=()), "layers.3.self_attn"),
    "RoPE on the full layers of Command R7B": ("cohere2", 0, config(no_rope_layers=()), "layers.3.self_attn"),
    "one RoPE for both layer types (Gemma 3)": ("gemma3_text", 0, one_rope, "layers.5.self_attn"),
    "window off by one": ("mistral", 0, config(sliding_window=6), ATTENTION),
    "window on every layer": ("gemma2", 0, config(layer_types=()), "layers.1.self_attn"),
    "window forgotten": ("gpt_oss", 0, config(sliding_window=None), ATTENTION),
    "attention soft-cap forgotten": ("gemma2", 0, config(attention_softcap=None), ATTENTION),
    "logit soft-cap forgotten": ("gemma2", 0, config(logit_softcap=None), "logits"),
    "scale by head size instead of query_pre_attn_scalar": ("gemma2", 0, config(attention_scale=None), ATTENTION),
    "sinks dropped": ("gpt_oss", 0, modules(lambda block: setattr(block.self_attn, "sinks", None)), ATTENTION),
    "1 + w forgotten": ("gemma", 0, config(norm_offset=0.0), "layers.0.attn_norm"),
    "embedding not scaled": ("gemma", 0, config(embedding_multiplier=1.0), "layers.0.mlp_norm"),
    "exact GELU for the tanh form": ("gemma", 0, ops(geglu=exact_gelu), MLP),
    "norm behind attention forgotten": ("gemma2", 0, drop("attn_post_norm"), "layers.0.mlp_norm"),
    "LayerNorm without its mean": ("stablelm", 0, ops(layer_norm=layer_norm_without_mean), "layers.0.attn_norm"),
    "parallel block run one after the other": ("gpt_neox", 0, config(block="pre"), "layers.0.mlp_norm"),
    "queries, keys and values not clipped": ("olmo", 0, config(clip_qkv=None), ATTENTION),
    "Falcon's grouped QKV read as rows": ("falcon", 1,
                                          wrong_layout("falcon", layouts=(qkv_rows("self_attention.query_key_value"),
                                                       )), ATTENTION),
    "GPT-NeoX's grouped QKV read as rows": ("gpt_neox", 0,
                                            wrong_layout("gpt_neox", layouts=(qkv_rows("attention.query_key_value"),)),
                                            ATTENTION),
    "gate and up of a fused matrix exchanged": (
        "phi3", 0, wrong_layout("phi3", layouts=(qkv_rows("self_attn.qkv_proj"), swapped_gate_up)), MLP),
    "gate and up of gpt-oss not interleaved": ("gpt_oss", 0,
                                               wrong_layout("gpt_oss", layouts=(experts_not_interleaved,)), MLP),
    "residual multiplier forgotten": ("granite", 0, config(residual_multiplier=1.0), "layers.0.mlp_norm"),
    "attention multiplier forgotten": ("granite", 0, config(attention_scale=None), ATTENTION),
    "logits not divided": ("granite", 0, config(logit_multiplier=1.0), "logits"),
    "logit scale forgotten": ("cohere", 0, config(logit_multiplier=1.0), "logits"),
    "latent attention scaled by the part without positions": ("deepseek_v3", 1, config(attention_scale=12 ** -0.5),
                                                              ATTENTION),
    "latent attention without YaRN's mscale": ("deepseek_v3", 0, config(attention_scale=None), ATTENTION),
    "router not renormalised": ("mixtral", 0, router(normalise=False), MLP),
    "router renormalised where it should not be": ("qwen2_moe", 0, router(normalise=True), MLP),
    "router's scale forgotten": ("deepseek_v2", 1, router(scale=1.0), "layers.1.mlp"),
    "router's groups ignored": ("deepseek_v2", 1, router(n_groups=None), "layers.1.mlp"),
    "router's bias ignored": ("deepseek_v3", 0, modules(zero_bias), "layers.1.mlp"),
    "softmax for sigmoid": ("deepseek_v3", 0, router(score="softmax"), "layers.1.mlp"),
    "sparsemixer taken for top-2 softmax": ("phimoe", 0, router(score="softmax"), MLP),
    "shared expert without its gate": ("qwen2_moe", 0,
                                       modules(lambda block: delattr(block.mlp, "shared_expert_gate")
                                               if hasattr(block.mlp, "shared_expert_gate") else None), MLP),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_rejected_where_it_first_matters(name):
    kind, variant, mistake, step = MUTANTS[name]
    hf = small_model(kind, variant)
    right = Decoder.from_transformers(hf)
    with torch.inference_mode():
        want = hf(TOKENS).logits
        assert worst(right(TOKENS), want) <= 1e-4
    twin = copy.deepcopy(right)
    twin.theirs = hf.state_dict()
    wrong = mistake(twin)
    with torch.inference_mode(): error = worst(wrong(TOKENS), want)
    assert error > 1e-3, f"the matrix would accept this: logits differ by {error:.1e} only"
    good, bad = divergence(right, hf, TOKENS)["relative"], divergence(wrong, hf, TOKENS)["relative"]
    first = next((s for s in bad.index if bad[s] > 3e-5 and good[s] <= 1e-5), "logits")
    assert first == step, f"first differs at {first}"


def test_there_are_as_many_as_the_chapter_says():
    assert (
        all(kind in SMALL and variant < len(SMALL[kind]) for kind, variant, *_ in MUTANTS.values())
        and len(MUTANTS) > 40
    )
