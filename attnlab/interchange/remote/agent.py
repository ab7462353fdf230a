"""Causal agent attention by learned agents: each averages the values so far by softmax, queries choose among agents."""

import torch
from torch import nn

from attnlab.interchange.remote.parts import Heads, causal_conv, split_heads, wide

READS = ("heads", "head_width", "bias", "input_conv", "causal", "agents", "conv")
IGNORED = ("impl", "chunk")
TAPS = 3


class Form(Heads):
    """`o_t = softmax_a(q_t . A_a / sqrt(d)) . V_a(t)`, `V_a(t) = sum_{j <= t} softmax_j(A_a . k_j / sqrt(d)) v_j`.

    A causal convolution of the values is added.
    """

    def __init__(self, c, width, build):
        super().__init__(c, width, build)
        inner = c.heads * self.head_dim
        self.q, self.k, self.v = (self.qkv(inner) for _ in range(3))
        self.out = self.make_out(inner)
        self.agents = nn.Parameter(torch.zeros(c.heads, c.agents, self.head_dim))
        if c.conv:
            self.conv_kernel = nn.Parameter(torch.zeros(TAPS, inner))
            self.conv_bias = nn.Parameter(torch.zeros(inner))

    def heads(self, x):
        q, k, v = (split_heads(linear(x), self.head_dim) for linear in (self.q, self.k, self.v))
        product = lambda y: torch.einsum("bthd,hmd->bhtm", wide(y), wide(self.agents)) * self.head_dim**-0.5
        chosen, logits = product(q).softmax(-1), product(k)
        T = x.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        gathered = logits[:, :, None] - logits.logcumsumexp(2)[:, :, :, None]  # [B, H, T, S, m]
        gathered = gathered.masked_fill(~seen[..., None], float("-inf")).exp()
        o = torch.einsum("bhtm,bhtsm,bshe->bthe", chosen, gathered, wide(v)).to(x.dtype)
        if self.c.conv:
            o = o + (causal_conv(v.flatten(2), self.conv_kernel) + self.conv_bias.to(x.dtype)).reshape(o.shape)
        return o
