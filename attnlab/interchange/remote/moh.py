"""Mixture of heads: `sum_i g_i(x) H_i W_O^i`, some heads always on and of the others the top K of each token."""

import torch
from torch import nn

from attnlab.interchange.remote.parts import wide

READS = ("heads", "shared", "active", "router", "gate_norm", "core")
IGNORED = ("balance", "impl", "gather_impl")


class Router(nn.Module):
    """Weights of the shared heads and of the routed ones from x: W_s, W_r, and W_h that shares weight between both."""

    def __init__(self, width, always, routed):
        super().__init__()
        if routed:
            self.routed = nn.Linear(width, routed, bias=False)
        if always > 1:
            self.shared = nn.Linear(width, always, bias=False)
        if routed and always:
            self.both = nn.Linear(width, 2, bias=False)


class Form(nn.Module):
    """The heads are those of the mixer `core`."""

    def __init__(self, c, width, build):
        super().__init__()
        self.c, self.core = c, build(c.core, width)
        self.always = c.heads // 4 if c.shared is None else c.shared
        self.routed = c.heads - self.always
        default = min(self.routed, max(1, 3 * c.heads // 4 - self.always))
        self.taken = default if c.active is None else c.active
        key_heads = c.core.get("kv_heads") or c.heads
        self.shared_heads, self.routed_heads = _places(c.heads, key_heads, self.always)
        self.by_norm = c.router != "learned" and self.routed > 0
        if not self.by_norm:
            self.router = Router(width, self.always, self.routed)

    def forward(self, x):
        shared, routed = self._by_norm(x) if self.by_norm else self._learned(x)
        gates = x.new_zeros(*x.shape[:2], self.c.heads, dtype=shared.dtype)
        gates[..., self.shared_heads], gates[..., self.routed_heads] = shared, routed
        o = self.core.heads(x)
        return self.core.combine((wide(o) * gates[..., None]).to(o.dtype), x)

    def _learned(self, x):
        """Weights [..., h_s] and [..., E]. As released, those that are on are 1 in the mean; as in the paper, less."""
        released, x = self.c.gate_norm == "code", wide(x)
        product = lambda linear: x @ wide(linear.weight).T
        shared = x.new_ones(*x.shape[:-1], self.always)
        if self.always > 1:
            shared = product(self.router.shared).softmax(-1) * (self.always if released else 1)
        if not self.routed:
            return shared, shared[..., :0]
        logits = product(self.router.routed)
        routed = logits.softmax(-1) * _top(logits, self.taken)
        if released:
            total = routed.sum(-1, keepdim=True).clamp(min=torch.finfo(routed.dtype).eps)
            routed = routed * (self.taken / total)
        if self.always:
            both = product(self.router.both).softmax(-1) * (2 if released else 1)
            shared, routed = shared * both[..., :1], routed * both[..., 1:]
        return shared, routed

    def _by_norm(self, x):
        """The routed heads of largest queries are on, by weight 1."""
        norms = wide(self.core.queries(x)[:, :, self.routed_heads]).norm(dim=-1)
        logits = norms * torch.rsqrt(norms.var(-1, keepdim=True) + 1e-12)
        return norms.new_ones(*x.shape[:2], self.always), _top(logits, self.taken).to(norms.dtype)


def _top(logits, count):
    """Which `count` are the largest; of equal ones those that come first."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :count], True)


def _places(heads, key_heads, always):
    """Which heads are shared and which are routed: shared ones fill groups of a key head, spread evenly."""
    group = heads // key_heads
    full, rest = divmod(always, group)
    groups = [h for h in range(key_heads) if _evenly(h, full + (rest > 0), key_heads)]
    last = groups[-1] if rest else None
    within = lambda h: h // group in groups and (h // group != last or _evenly(h % group, rest, group))
    return [h for h in range(heads) if within(h)], [h for h in range(heads) if not within(h)]


def _evenly(i, n, of):
    """Whether the i-th of `of` places is one of n spread evenly."""
    return (i + 1) * n // of > i * n // of
