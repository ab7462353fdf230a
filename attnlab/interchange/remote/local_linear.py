"""Local linear attention: at every query the value of the affine map of keys that fits the values best around it."""

import types

import torch
import torch.nn.functional as F
from torch import nn

from attnlab.interchange.remote.parts import wide
from attnlab.interchange.remote.softmax import Form as Softmax

READS = ("ridge", "ridge_min", "blocks")
IGNORED = ("iterations", "max_iterations", "tolerance")  # the systems are solved exactly
ABSENT = {"sinks": False, "soft_cap": None, "query_scale": None}


class Form(Softmax):
    """With p = softmax(q . k / sqrt(d)), m = sum p k and A = sum p (k - m)(k - m)^T + ridge:

    o = sum_s p_s (1 + (k_s - m) . A^-1 (q - m)) v_s
    """

    def __init__(self, c, width, build):
        super().__init__(types.SimpleNamespace(**{**ABSENT, **vars(c)}), width, build)
        if c.ridge is None:
            self.ridge = nn.Linear(width, c.heads, bias=False)
            self.ridge_bias = nn.Parameter(torch.zeros(c.heads))

    def heads(self, x):
        c, T, d = self.c, x.shape[1], self.head_dim
        q, (k, v) = self.queries(x), self.keys_values(x)
        q, k = (wide(self._by_blocks(self._placed(y, name))) for y, name in ((q, "q"), (k, "k")))
        k, v = (y.repeat_interleave(c.heads // self.key_heads, dim=2) for y in (k, wide(v)))
        t = torch.arange(T, device=x.device)
        seen = t[:, None] >= t
        if c.window is not None:
            seen = seen & (t[:, None] - t < c.window)
        logits = torch.einsum("bthd,bshd->bhts", q, k) * d**-0.5
        p = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        mean = torch.einsum("bhts,bshd->bhtd", p, k)
        around = k.transpose(1, 2)[:, :, None] - mean[:, :, :, None]  # [B, H, T, S, d]
        moments = torch.einsum("bhts,bhtsd,bhtsf->bhtdf", p, around, around)
        block = torch.arange(d, device=x.device) // (d // c.blocks)
        moments = moments * (block[:, None] == block)
        system = moments + self._ridge(x)[..., None, None] * torch.eye(d, dtype=q.dtype, device=x.device)
        slope = torch.linalg.solve(system, q.transpose(1, 2) - mean)
        weights = p * (1 + torch.einsum("bhtsd,bhtd->bhts", around, slope))
        return torch.einsum("bhts,bshe->bthe", weights, v).to(x.dtype)

    def _ridge(self, x):
        """[B, H, T], or [1, 1, 1] where it is a number."""
        c = self.c
        if c.ridge is not None:
            return wide(x).new_full((1, 1, 1), c.ridge)
        return (F.softplus(wide(self.ridge(x)) + self.ridge_bias) + c.ridge_min).transpose(1, 2)

    def _by_blocks(self, y):
        """Channels in an order where the two that RoPE turns together are of one block."""
        halves = y.reshape(*y.shape[:-1], 2, self.c.blocks, -1)
        return halves.transpose(-3, -2).reshape(y.shape)
