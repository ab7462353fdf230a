"""Gated DeltaNet: a linear memory per head that decays and that is corrected, not only added to, at every write."""

import torch
import torch.nn.functional as F
from torch import nn

from attnlab.interchange.remote.parts import Heads, RMSNorm, causal_conv, unit, wide

READS = (
    "heads", "head_width", "bias", "input_conv", "key_heads", "expand", "query_scale", "conv", "gate", "norm_epsilon",
    "decay",
)  # fmt: skip
IGNORED = ("impl", "chunk")


class Decay(nn.Module):
    """Log decays `-exp(A_log) * softplus(x W + dt_bias)`, [B, T, H]."""

    def __init__(self, width, heads):
        super().__init__()
        self.linear = nn.Linear(width, heads, bias=False)
        self.a_log, self.dt_bias = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))

    def forward(self, x):
        return -torch.exp(wide(self.a_log)) * F.softplus(wide(self.linear(x)) + self.dt_bias)


class Form(Heads):
    """`S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T`, `o_t = S_t q_t` per head; here S is transposed."""

    def __init__(self, c, width, build):
        super().__init__(c, width, build)
        self.value_dim, self.key_heads = int(c.expand * self.head_dim), c.key_heads or c.heads
        keys, values = self.key_heads * self.head_dim, c.heads * self.value_dim
        self.q, self.k, self.v = self.qkv(keys), self.qkv(keys), self.qkv(values)
        if c.conv > 1:
            self.filters = nn.Parameter(torch.zeros(c.conv, 2 * keys + values))
        self.beta = nn.Linear(width, c.heads, bias=False)
        if c.decay:
            self.log_decay = Decay(width, c.heads)
        self.norm = RMSNorm(self.value_dim, c.norm_epsilon)
        if c.gate:
            self.gate = nn.Linear(width, values, bias=False)
        self.out = self.make_out(values)

    def heads(self, x):
        c, (B, T, _), d = self.c, x.shape, self.head_dim
        # q, k and v are convolved together; the channels of a key head lie together.
        qkv = torch.cat([y(x).reshape(B, T, self.key_heads, -1) for y in (self.q, self.k, self.v)], dim=-1)
        if c.conv > 1:
            qkv = causal_conv(qkv.flatten(2), self.filters).reshape(qkv.shape)
        q, k, v = F.silu(qkv).split([d, d, qkv.shape[-1] - 2 * d], dim=-1)
        scale = d**-0.5 if c.query_scale is None else c.query_scale
        q, k = (y.repeat_interleave(c.heads // self.key_heads, dim=2) for y in (unit(q) * scale, unit(k)))
        v = wide(v.reshape(B, T, c.heads, -1))
        beta = torch.sigmoid(wide(self.beta(x)))[..., None, None]
        decay = torch.exp(self.log_decay(x))[..., None, None] if c.decay else torch.ones_like(beta)
        memory, out = q.new_zeros(B, c.heads, d, self.value_dim), []
        for t in range(T):
            memory = decay[:, t] * memory
            held = torch.einsum("bhd,bhde->bhe", k[:, t], memory)[:, :, None]
            memory = memory + beta[:, t] * k[:, t, :, :, None] * (v[:, t, :, None] - held)
            out.append(torch.einsum("bhd,bhde->bhe", q[:, t], memory))
        o = self.norm(torch.stack(out, dim=1).to(x.dtype))
        return o * F.silu(self.gate(x)).reshape(o.shape) if c.gate else o
