import copy
from dataclasses import dataclass, field, replace
import torch
from torch import nn, Tensor
import torch.nn.functional as F
from llm_workbench.architecture.norms_and_mlps import RMSNorm, GatedMLP
from llm_workbench.architecture.rope import inverse_frequencies, rope_tables
from llm_workbench.architecture.kv_cache import ContiguousCache, NoCache
from llm_workbench.architecture.ops import Ops, REFERENCE

@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, c.head_dim, c.sliding_window
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, H * D, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, K * D, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, K * D, bias=c.attention_bias)
        self.o_proj = nn.Linear(H * D, c.hidden_size, bias=c.attention_bias)
    def forward(self, x, rope, cache, ops):
        heads = lambda t: t.unflatten(-1, (-1, self.head_dim))           # (B, T, heads, D)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = ops.rotate(q, *rope), ops.rotate(k, *rope)
        out = cache.attend(self.layer, q, k, v, attention=ops.attention, window=self.window)
        return self.o_proj(out.flatten(2))

class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.mlp_bias)
    def forward(self, x, rope, cache, ops):
        x = x + self.self_attn(self.input_layernorm(x, ops), rope, cache, ops)
        return x + self.mlp(self.post_attention_layernorm(x, ops), ops)

class Decoder(nn.Module):
    def __init__(self, config, ops=REFERENCE):
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings: self.lm_head.weight = self.embed_tokens.weight
    def hidden(self, tokens, cache=None, counts=None):
        cache = cache or NoCache()
        positions = cache.positions(tokens.shape[1], tokens.device)
        x = self.embed_tokens(tokens)
        rope = rope_tables(positions, inverse_frequencies(self.config.head_dim, self.config.rope_parameters["rope_theta"]), dtype=x.dtype)
        for block in self.layers: x = block(x, rope, cache, self.ops)
        cache.advance(tokens.shape[1], counts)
        return self.norm(x, self.ops)
    def forward(self, tokens, cache=None, counts=None): return self.lm_head(self.hidden(tokens, cache, counts))
    def new_cache(self): return ContiguousCache(self.config.num_hidden_layers)
