"""Lightning attention: linear attention whose heads forget at fixed rates, normalised after the sum, gated."""

import torch
import torch.nn.functional as F
from torch import nn

from attnlab.interchange.remote.parts import Heads, split_heads, wide

READS = (
    "heads", "head_width", "bias", "input_conv", "slopes", "decay_scale", "activation", "norm", "norm_epsilon",
    "norm_over", "gate_rank",
)  # fmt: skip
IGNORED = ("impl", "chunk")


class Form(Heads):
    """`o_t = sum_{s <= t} exp(-slope (t - s)) (q_t . k_s) v_s` per head; `Norm(o) * sigmoid(x W_d W_u)`, projected."""

    def __init__(self, c, width, build):
        super().__init__(c, width, build)
        inner, rank = c.heads * self.head_dim, c.gate_rank or self.head_dim
        self.q, self.k, self.v = (self.qkv(inner) for _ in range(3))
        self.gate_down, self.gate_up = nn.Linear(width, rank, bias=False), nn.Linear(rank, inner, bias=False)
        self.out = self.make_out(inner)
        if c.norm != "srmsnorm":
            self.scale = nn.Parameter(torch.ones(inner))
        if c.norm == "layernorm":
            self.bias = nn.Parameter(torch.zeros(inner))

    def heads(self, x):
        c = self.c
        act = F.silu if c.activation == "silu" else lambda z: z
        q, k, v = (wide(split_heads(act(linear(x)), self.head_dim)) for linear in (self.q, self.k, self.v))
        t = torch.arange(x.shape[1], device=x.device)
        back = (t[:, None] - t).to(q)
        slopes = torch.tensor(_slopes(c.heads, c.slopes)).to(q)
        decay = torch.exp(-c.decay_scale * slopes[:, None, None] * back.clamp(min=0)) * (back >= 0)  # [H, T, T]
        o = torch.einsum("bthd,bshd,hts,bshe->bthe", q, k, decay, v)
        gate = split_heads(self.gate_up(self.gate_down(x)), self.head_dim)
        return (self._normed(o) * torch.sigmoid(wide(gate))).to(x.dtype)

    def _normed(self, o):
        c = self.c
        over = (-2, -1) if c.norm_over == "layer" else (-1,)
        if c.norm == "layernorm":
            o = o - o.mean(over, keepdim=True)
        o = o * torch.rsqrt((o * o).mean(over, keepdim=True) + c.norm_epsilon)
        if c.norm != "srmsnorm":
            o = o * self.scale.reshape(c.heads, -1)
        return o + self.bias.reshape(c.heads, -1) if c.norm == "layernorm" else o


def _slopes(heads, form):
    if form == "interleaved":
        below = 1 << (heads.bit_length() - 1)
        even = lambda n: [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
        return even(below) + even(2 * below)[::2][: heads - below]
    return [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]
