"""Gated linear attention: a linear memory per head that forgets each channel of the keys at a rate of the input."""

import torch
import torch.nn.functional as F
from torch import nn

from attnlab.interchange.remote.parts import Heads, LowRank, RMSNorm, split_heads, wide

READS = ("heads", "head_width", "bias", "input_conv", "key_width", "key_heads", "rank", "temperature", "gate")
IGNORED = ("impl", "chunk")


class Form(Heads):
    """`S_t = diag(a_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(d)` per head; `(RMSNorm(o) * silu(x W_g)) W_o`."""

    def __init__(self, c, width, build):
        super().__init__(c, width, build)
        self.key_dim, self.key_heads = c.key_width or self.head_dim // 2, c.key_heads or c.heads
        keys, values = self.key_heads * self.key_dim, c.heads * self.head_dim
        self.q, self.k = self.qkv(c.heads * self.key_dim), self.qkv(keys)
        self.v = self.qkv(self.key_heads * self.head_dim)
        self.log_decay = LowRank(width, c.rank, keys, bias=True)
        self.norm = RMSNorm(self.head_dim, 1e-6)
        if c.gate:
            self.gate = nn.Linear(width, values, bias=False)
        self.out = self.make_out(values)

    def heads(self, x):
        c, (B, T, _) = self.c, x.shape
        of_heads = lambda y, width: split_heads(y, width).repeat_interleave(c.heads // self.key_heads, dim=2)
        q = wide(split_heads(self.q(x), self.key_dim)) * self.key_dim**-0.5
        k, v = wide(of_heads(self.k(x), self.key_dim)), wide(of_heads(self.v(x), self.head_dim))
        log_decay = F.logsigmoid(wide(self.log_decay(x))) / c.temperature
        decay = of_heads(log_decay, self.key_dim).exp()
        memory, out = q.new_zeros(B, c.heads, self.key_dim, self.head_dim), []
        for t in range(T):
            memory = decay[:, t, :, :, None] * memory + k[:, t, :, :, None] * v[:, t, :, None]
            out.append(torch.einsum("bhd,bhde->bhe", q[:, t], memory))
        o = self.norm(torch.stack(out, dim=1).to(x.dtype))
        return o * F.silu(split_heads(self.gate(x), self.head_dim)) if c.gate else o
