"""Softmax attention by all pairs: `softmax(q k^T / sqrt(d)) v` per head, then a projection."""

import torch
import torch.nn.functional as F
from torch import nn

from attnlab.interchange.remote.parts import Heads, LayerNorm, RMSNorm, rope, split_heads, unit, wide

READS = (
    "heads", "head_width", "kv_heads", "bias", "input_conv", "rope_base", "rope_width", "rope_scaling", "window",
    "qk_norm", "qk_epsilon", "sinks", "soft_cap", "query_scale",
)  # fmt: skip
IGNORED = ("impl", "decode_impl")


class Form(Heads):
    """H heads of queries, of which neighbours share one of K heads of keys and values."""

    def __init__(self, c, width, build):
        super().__init__(c, width, build)
        self.key_heads, d = c.kv_heads or c.heads, self.head_dim
        self.q = self.qkv(c.heads * d)
        self.k, self.v = self.qkv(self.key_heads * d), self.qkv(self.key_heads * d)
        self.out = self.make_out(c.heads * d)
        if c.qk_norm == "cosine":
            self.temperature = nn.Parameter(torch.ones(c.heads))
        elif c.qk_norm == "layer":
            self.q_norm, self.k_norm = (LayerNorm(d, c.qk_epsilon or 1e-5) for _ in range(2))
        elif c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(d, c.qk_epsilon or 1e-6) for _ in range(2))
        if c.sinks:
            self.sinks = nn.Parameter(torch.zeros(c.heads))

    def queries(self, x):
        """[B, T, H, d], before QK-norm and RoPE."""
        return split_heads(self.q(x), self.head_dim)

    def keys_values(self, x):
        """[B, T, K, d] each, before QK-norm and RoPE."""
        return split_heads(self.k(x), self.head_dim), split_heads(self.v(x), self.head_dim)

    def heads(self, x):
        c, T = self.c, x.shape[1]
        q, (k, v) = self.queries(x), self.keys_values(x)
        q, k = self._placed(q, "q"), self._placed(k, "k")
        k, v = (y.repeat_interleave(c.heads // self.key_heads, dim=2) for y in (k, v))
        t = torch.arange(T, device=x.device)
        seen = t[:, None] >= t
        if c.window is not None:
            seen = seen & (t[:, None] - t < c.window)
        logits = torch.einsum("bthd,bshd->bhts", wide(q), wide(k)) * self._scale(seen)
        if c.soft_cap is not None:
            logits = c.soft_cap * torch.tanh(logits / c.soft_cap)
        logits = logits.masked_fill(~seen, float("-inf"))
        if c.sinks:  # one more key, which has no value
            sinks = wide(self.sinks)[:, None, None].expand(len(x), -1, T, 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = logits.softmax(-1)[..., :T]
        return torch.einsum("bhts,bshd->bthd", weights, wide(v)).to(x.dtype)

    def _placed(self, y, name):
        """Queries or keys after QK-norm and RoPE."""
        c = self.c
        if c.qk_norm == "cosine":
            y = unit(y, c.qk_epsilon or 1e-6).to(y.dtype)
        elif c.qk_norm:
            y = (self.q_norm if name == "q" else self.k_norm)(y)
        return rope(y, c.rope_base, c.rope_width, c.rope_scaling)

    def _scale(self, seen):
        """Factor on q . k: a number, or [H, T, 1] where it depends on how many keys a query sees."""
        c = self.c
        if c.qk_norm == "cosine":
            return F.softplus(wide(self.temperature))[:, None, None] * torch.log(wide(seen.sum(-1)))[:, None]
        return self.head_dim**-0.5 if c.query_scale is None else c.query_scale
