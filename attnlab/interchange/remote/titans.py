"""Titans: a network per head that is trained by gradient descent along the sequence, alone or with attention."""

import torch
import torch.nn.functional as F
from torch import nn

from attnlab.interchange.remote.parts import Heads, RMSNorm, causal_conv, rope, split_heads, unit, wide

READS = (
    "heads", "head_width", "bias", "input_conv", "variant", "depth", "expansion", "residual_norm", "activation",
    "norm_scale", "norm_epsilon", "chunk", "momentum", "forgetting", "grad_at", "read_after_write", "stability",
    "theta_max", "conv", "persistent", "window", "rope_base",
)  # fmt: skip
IGNORED = ("impl",)
LEAST_LOG = -30.0  # of a gate


class Memory(nn.Module):
    """`M_W` with its projections: W learns `1/2 |M_W(k_t) - v_t|^2` step by step, and is read at q_t:

    S_t = eta_t S_{t-1} - theta_t grad(W_{t'}; k_t, v_t),   W_t = keep_t W_{t-1} + S_t,   y_t = M_{W_t}(q_t)

    where t' is the last step of the chunk before.
    """

    def __init__(self, c, width, head_dim):
        super().__init__()
        self.c, self.columns = c, 3 * c.heads * head_dim
        self.normed = c.depth > 1 if c.residual_norm is None else c.residual_norm
        self.qkv = nn.Linear(width, self.columns, bias=c.bias != "none")
        if c.conv:
            self.weight = nn.Parameter(torch.zeros(self.columns, c.conv))
        gates = c.forgetting + c.momentum + 1
        self.gates = nn.Linear(width, c.heads * gates, bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(c.heads, gates))
        widths = [head_dim, *[c.expansion * head_dim] * (c.depth - 1), head_dim]
        for i in range(c.depth):
            self.register_parameter(f"layer_{i}", nn.Parameter(torch.zeros(c.heads, widths[i], widths[i + 1])))
        if c.norm_scale:
            self.norm_gain = nn.Parameter(torch.zeros(c.heads, 1, head_dim))
        learn = c.depth + c.norm_scale
        inputs = [1, *widths[1:-1], *[1] * c.norm_scale] if c.stability == "bound" else None
        self.rates = [1 / (learn * n) for n in inputs] if inputs else [1.0] * learn

    def begin(self, batch):
        """Weights, momentum, the chunk's first weights, and the log of what is left of them."""
        layers = [getattr(self, f"layer_{i}") for i in range(self.c.depth)]
        if self.c.norm_scale:
            layers.append(self.norm_gain)
        weights = [wide(w).expand(batch, *w.shape) for w in layers]
        return weights, [torch.zeros_like(w) for w in weights], weights, 0.0

    def network(self, weights, x):
        """M_W(x) of x [B, H, n, d]."""
        c, z = self.c, x
        for i, w in enumerate(weights[: c.depth]):
            z = (F.gelu(z, approximate="tanh" if c.activation == "gelu_tanh" else "none") if i else z) @ w
        if not self.normed:
            return z
        z = z - z.mean(-1, keepdim=True)
        z = z * torch.rsqrt((z * z).mean(-1, keepdim=True) + c.norm_epsilon)
        return x + (z * (1 + weights[-1]) if c.norm_scale else z)

    def convolved(self, x):
        """Queries, keys and values of x, before SiLU, in one."""
        y = self.qkv(x)
        return causal_conv(y, self.weight.T) if self.c.conv else y

    def taught(self, state, x, convolved, first):
        """The state after the positions of x, the first of which is `first`, and what each reads, [B, T, H, d]."""
        c, (B, T, _) = self.c, x.shape
        q, k, v = wide(F.silu(convolved)).reshape(B, T, c.heads, -1).chunk(3, dim=-1)
        q, k = unit(q), unit(k)
        gates = list((wide(self.gates(x)).reshape(B, T, c.heads, -1) + self.gate_bias).unbind(-1))
        log_keep = F.logsigmoid(-gates.pop(0)).clamp(min=LEAST_LOG) if c.forgetting else torch.zeros_like(gates[0])
        eta = F.logsigmoid(gates.pop(0)).clamp(min=LEAST_LOG).exp() if c.momentum else torch.zeros_like(gates[0])
        theta = c.theta_max * torch.sigmoid(gates.pop())
        if c.stability == "bound":
            theta = theta / c.chunk * (1 - eta)
        out, at = [], lambda y, t: y[:, t, :, None, None]
        for t in range(T):
            weights, momentum, start, log_kept = state
            if (first + t) % c.chunk == 0:
                start, log_kept = weights, 0.0
            log_kept = log_kept + at(log_keep, t)
            key, value, query = (y[:, t, :, None] for y in (k, v, q))
            held = [w * log_kept.exp() for w in start] if c.grad_at == "decayed" else start
            wrong = lambda w: 0.5 * ((self.network(w, key) - value) ** 2).sum()  # noqa: B023
            slopes = torch.func.grad(wrong)(held)
            momentum = [
                at(eta, t) * s - rate * at(theta, t) * slope for s, rate, slope in zip(momentum, self.rates, slopes)
            ]
            learned = [at(log_keep, t).exp() * w + s for w, s in zip(weights, momentum)]
            out.append(self.network(learned if c.read_after_write else weights, query)[:, :, 0])
            state = learned, momentum, start, log_kept
        return state, torch.stack(out, dim=1)


class Attention(nn.Module):
    """Softmax attention in whose softmax persistent keys stand that every query sees."""

    def __init__(self, c, width, head_dim):
        super().__init__()
        self.c, self.head_dim = c, head_dim
        self.q, self.k, self.v = (nn.Linear(width, c.heads * head_dim, bias=c.bias != "none") for _ in range(3))
        if c.persistent:
            self.persistent = nn.Parameter(torch.zeros(2, c.persistent, c.heads, head_dim))

    def placed(self, x):
        """Queries, keys and values [B, T, H, d]."""
        q, k, v = (split_heads(y(x), self.head_dim) for y in (self.q, self.k, self.v))
        return rope(q, self.c.rope_base), rope(k, self.c.rope_base), v

    def attend(self, q, k, v, seen):
        """[B, T, H, d]; `seen` [T, S]."""
        if self.c.persistent:
            before = [p.to(q.dtype).expand(len(q), *p.shape) for p in self.persistent]
            k, v = torch.cat([before[0], k], dim=1), torch.cat([before[1], v], dim=1)
            seen = F.pad(seen, (self.c.persistent, 0), value=True)
        logits = torch.einsum("bthd,bshd->bhts", wide(q), wide(k)) * self.head_dim**-0.5
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, wide(v)).to(q.dtype)

    def forward(self, x):
        t = torch.arange(x.shape[1], device=x.device)
        back = t[:, None] - t
        return self.attend(*self.placed(x), (back >= 0) & (back < self.c.window))


class Segments(nn.Module):
    """Memory as context: a segment attends to itself and to what the memory at its beginning gives for it."""

    def __init__(self, c, width, head_dim):
        super().__init__()
        self.c, total = c, c.heads * head_dim
        self.attention, self.memory = Attention(c, width, head_dim), Memory(c, total, head_dim)
        self.query = nn.Linear(width, total, bias=c.bias != "none")
        self.retrieved = nn.Linear(total, 2 * total, bias=c.bias != "none")

    def forward(self, x):
        """y and m, [B, T, H, d]."""
        c, attention = self.c, self.attention
        q, k, v = attention.placed(x)
        query = unit(F.silu(wide(self.query(x))).reshape(q.shape))
        state, ys, ms = self.memory.begin(len(x)), [], []
        for first in range(0, x.shape[1], c.window):
            segment = slice(first, first + c.window)
            read = self.memory.network(state[0], query[:, segment].transpose(1, 2)).transpose(1, 2)
            k_read, v_read = self.retrieved(read.flatten(2).to(x.dtype)).chunk(2, dim=-1)
            own = q[:, segment].shape
            # Turned by its own place in the sequence.
            k_read = rope(F.pad(k_read.reshape(own), (0, 0, 0, 0, first, 0)), c.rope_base)[:, first:]
            keys, values = torch.cat([k[:, segment], k_read], 1), torch.cat([v[:, segment], v_read.reshape(own)], 1)
            seen = torch.ones(own[1], own[1], dtype=torch.bool, device=x.device).tril().repeat(1, 2)
            ys.append(attention.attend(q[:, segment], keys, values, seen).flatten(2))
            convolved = self.memory.convolved(torch.cat(ys, dim=1))[:, segment]
            state, m = self.memory.taught(state, ys[-1], convolved, first)
            ms.append(m.to(x.dtype))
        return torch.cat(ys, dim=1).reshape(q.shape), torch.cat(ms, dim=1)


class Form(Heads):
    """The memory in the four places of the paper: alone (lmm), before attention (mal), beside it (mag), in it (mac)."""

    def __init__(self, c, width, build):
        super().__init__(c, width, build)
        d, total = self.head_dim, c.heads * self.head_dim
        if c.variant == "mac":
            self.mixed = Segments(c, width, d)
        else:
            self.memory = Memory(c, width, d)
        if c.variant in ("mal", "mag"):
            self.attention = Attention(c, width, d)
        self.memory_norm = RMSNorm(d, 1e-6)
        if c.variant in ("lmm", "mal"):
            self.gate = nn.Linear(width, total, bias=False)
        else:
            self.attention_norm = RMSNorm(d, 1e-6)
        if c.variant == "mal":
            self.between = self.make_out(total)
        self.out = self.make_out(total)

    def heads(self, x):
        variant = self.c.variant
        if variant == "mac":
            return self._by_memory(*self.mixed(x))
        _, m = self.memory.taught(self.memory.begin(len(x)), x, self.memory.convolved(x), 0)
        m = m.to(x.dtype)
        if variant == "mag":
            return self._by_memory(self.attention(x), m)
        o = self.memory_norm(m) * torch.sigmoid(self.gate(x).reshape(m.shape))
        return o if variant == "lmm" else self.attention(self.between(o.flatten(2)))

    def _by_memory(self, y, m):
        return self.attention_norm(y) * torch.sigmoid(self.memory_norm(m))
