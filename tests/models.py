"""Small models of every family: real shapes scaled down, with what hurts kept.

Three query heads per KV head, every layer type present, a window of 5 under 14 tokens, an original context of 8
tokens where RoPE is stretched, and each RoPE scaling that releases use. The weights are random, and large enough
for mistakes to show. They come from `transformers`, in its layout. Tests and the chapters of the families use them."""
import torch

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
PLAIN = dict(rope_type="default", rope_theta=1e4)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=8.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.0, 2.0, 3.5, 8.0])
EXPERTS = dict(num_local_experts=5, num_experts_per_tok=2)
MLA = dict(
    num_key_value_heads=6,
    kv_lora_rank=20,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=14,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
)
DBRX = dict(d_model=48, n_heads=6, n_layers=3, max_seq_len=64, vocab_size=97)

SMALL: dict[str, list[dict]] = {   # changes to SIZES, one dict per variant
    "llama": [dict(head_dim=10, rope_parameters=LLAMA3),
              dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=LINEAR),
              dict(num_key_value_heads=1, max_position_embeddings=8, rope_parameters=DYNAMIC)],
    "mistral": [dict(sliding_window=5, head_dim=10), dict(sliding_window=None, rope_parameters=YARN)],
    "mixtral": [dict(EXPERTS, sliding_window=5), dict(EXPERTS, sliding_window=None, num_experts_per_tok=1)],
    "gemma": [dict(head_dim=16, num_key_value_heads=1)],
    "gemma2": [dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=24, num_hidden_layers=4,
                    attn_logit_softcapping=5.0, final_logit_softcapping=4.0)],
    "gemma3_text": [dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=24, num_hidden_layers=7,
                         rope_parameters=dict(full_attention=LINEAR, sliding_attention=PLAIN))],
}

QWEN_MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16)
V2 = dict(MLA, n_shared_experts=2, rope_parameters=dict(YARN, mscale=0.707, mscale_all_dim=0.707))

SMALL |= {
    "qwen2": [dict(), dict(tie_word_embeddings=True, rope_parameters=YARN, use_sliding_window=True, sliding_window=5,
                           max_window_layers=1)],
    "qwen3": [dict(head_dim=10, rope_parameters=YARN), dict(head_dim=16, tie_word_embeddings=True)],
    "qwen2_moe": [dict(QWEN_MOE, shared_expert_intermediate_size=24, mlp_only_layers=[1])],
    "qwen3_moe": [dict(QWEN_MOE, head_dim=10, norm_topk_prob=True, decoder_sparse_step=2, rope_parameters=YARN)],
    "deepseek_v2": [dict(V2, q_lora_rank=None, topk_method="greedy", routed_scaling_factor=1.0),
                    dict(V2, q_lora_rank=18, topk_method="group_limited_greedy", routed_scaling_factor=16.0)],
    "deepseek_v3": [dict(MLA, q_lora_rank=18, n_shared_experts=1,
                         rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0)),
                    dict(MLA, q_lora_rank=None, n_shared_experts=1, rope_parameters=PLAIN)],
}

MULTI = dict(new_decoder_architecture=True, num_kv_heads=2, bias=False, alibi=False)       # the larger Falcons

SMALL |= {
    "phi": [dict(num_key_value_heads=6, rope_parameters=dict(PLAIN, partial_rotary_factor=0.5)),
            dict(num_key_value_heads=2, qk_layernorm=True)],
    "phi3": [dict(sliding_window=5), dict(sliding_window=None, original_max_position_embeddings=8,
                                          rope_parameters=LONG)],
    "phimoe": [dict(EXPERTS, attention_bias=True, lm_head_bias=True, sliding_window=5,
                    original_max_position_embeddings=64,
                    rope_parameters=dict(LONG, short_mscale=1.2, long_mscale=1.3))],
    "cohere": [dict(), dict(use_qk_norm=True, logit_scale=0.25)],
    "cohere2": [dict(sliding_window=5, num_hidden_layers=4)],
    "falcon": [dict(new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=False, alibi=False),
               MULTI, dict(MULTI, num_ln_in_parallel_attn=1),
               dict(new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True, alibi=False)],
    "gpt_neox": [dict(rope_parameters=dict(PLAIN, partial_rotary_factor=0.25)),
                 dict(use_parallel_residual=False, attention_bias=False,
                      rope_parameters=dict(LINEAR, partial_rotary_factor=1.0))],
}

SMALL |= {
    "olmo": [dict(clip_qkv=0.5), dict(num_key_value_heads=6, tie_word_embeddings=True)],
    "olmo2": [dict()],
    "olmo3": [dict(sliding_window=5, num_hidden_layers=4,
                   rope_parameters=dict(full_attention=YARN, sliding_attention=PLAIN))],
    "dbrx": [dict(DBRX, attn_config=dict(clip_qkv=0.5, kv_n_heads=2, rope_theta=1e4),
                  ffn_config=dict(ffn_hidden_size=16, moe_num_experts=5, moe_top_k=2, hidden_size=48))],
    "stablelm": [dict(), dict(qk_layernorm=True, use_qkv_bias=True, use_parallel_residual=True)],
    "granite": [dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0)],
    "smollm3": [dict(num_hidden_layers=4), dict(num_hidden_layers=4, no_rope_layers=[0, 1, 1, 0],
                                                rope_parameters=YARN)],
    "gpt_oss": [dict(EXPERTS, head_dim=8, sliding_window=5, num_hidden_layers=4,
                     rope_parameters=dict(YARN, truncate=False))],
}


def small_config(model_type: str,        # a family that transformers has
                 variant: int = 0,       # of SMALL[model_type]
                 changes: dict | None = None,   # to SIZES, in place of a variant's
                 ) -> dict:
    "What a small configuration of this family says, without transformers' defaults."
    return {
        **({} if model_type == "dbrx" else SIZES),
        **(SMALL[model_type][variant] if changes is None else changes),
        "model_type": model_type,
    }


def small_model(model_type: str, variant: int = 0, seed: int = 0, changes: dict | None = None) -> torch.nn.Module:
    "A transformers model of this family, scaled down, with random weights that are large enough for mistakes to show."
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(**small_config(model_type, variant, changes))
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        # the weights of norms stay around 1; around 0 for Gemma, which stores w - 1
        for name, p in model.named_parameters():
            weighs = (
                p.ndim == 1
                and "norm" in name.lower()
                and name.endswith("weight")
                and not model_type.startswith("gemma")
            )
            p.copy_(weighs + torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5))
        for name, b in model.named_buffers():
            if name.endswith("correction_bias"): b.copy_(torch.rand(b.shape, generator=generator))
    return model
