"""What several mixers, and the stack, are made of. Names of parameters are those of attnlab."""

import abc
import math

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale`, in float32 or wider."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.scale, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x):
        y = wide(x)
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.epsilon)
        return (y * self.scale).to(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias`, in float32 or wider."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.epsilon = epsilon

    def forward(self, x):
        y = wide(x)
        y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.epsilon)
        return (y * self.scale + self.bias).to(x.dtype)


class LowRank(nn.Module):
    """`x W_d W_u`, plus a bias where asked."""

    def __init__(self, width, rank, columns, bias=False):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, columns, bias=bias)

    def forward(self, x):
        return self.up(self.down(x))


def wide(x):
    """In float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x, epsilon=1e-6):
    """x divided by its length `sqrt(x . x + epsilon)`."""
    x = wide(x)
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + epsilon)


def causal_conv(x, taps):
    """`y[t] = sum_i taps[K - 1 - i] * x[t - i]` of x [B, T, C], taps [K, C]: one filter per channel."""
    count = taps.shape[0]
    padded = F.pad(x, (0, 0, count - 1, 0))
    return sum(wide(taps[row]) * padded[:, row : row + x.shape[1]] for row in range(count)).to(x.dtype)


def split_heads(y, width):
    """[B, T, H * width] to [B, T, H, width]."""
    return y.reshape(*y.shape[:2], -1, width)


def rope(x, base, width=None, scaling=None):
    """Turns the pairs (i, i + r/2) of each head's first r channels by the angle position * f_i; x [B, T, H, d].

    Args:
      base: `f_i = base^(-2i / r)`.
      width: r; None: d.
      scaling: what changes these frequencies: `name` and its fields; None: nothing.
    """
    if base is None:
        return x
    width = width or x.shape[-1]
    frequencies, factor = _frequencies(base, width, scaling)
    y, rest = wide(x[..., :width]), x[..., width:]
    positions = torch.arange(x.shape[1], device=x.device, dtype=y.dtype)
    angle = positions[:, None, None] * frequencies.to(y)
    cos, sin = factor * torch.cos(angle), factor * torch.sin(angle)
    a, b = y.chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def _frequencies(base, width, scaling):
    """[width / 2] in float64, and the factor on cosines and sines."""
    f = float(base) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling is None:
        return f, 1.0
    name, s = scaling["name"], scaling["factor"]
    if name == "linear":
        return f / s, 1.0
    length = scaling["original_length"]
    if name == "llama3":
        low, high = scaling["low"], scaling["high"]
        kept = ((length * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * f / s + kept * f, 1.0
    if name != "yarn":
        raise ValueError(f"rope_scaling {name!r} is not known; allowed: linear, llama3, yarn")
    channel = lambda turns: width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))
    low, high = channel(scaling["fast"]), channel(scaling["slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 * (high == low)
    stretched = ((torch.arange(width // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    factor = scaling["attention_factor"]
    return stretched * f / s + (1 - stretched) * f, 0.1 * math.log(s) + 1 if factor is None else factor


class Heads(nn.Module, abc.ABC):
    """A mixer that is a sum over heads: `heads` gives each head's output, `combine` projects and adds them.

    Args:
      c: the mixer's knobs.
      width: D.
      build: makes a mixer of a node and a width, where one is part of this one.
    """

    def __init__(self, c, width, build):
        super().__init__()
        if not getattr(c, "causal", True):
            raise ValueError("causal = False is no language model's; allowed: True")
        self.c, self.width = c, width
        self.head_dim = c.head_width or width // c.heads
        if c.input_conv > 1:
            self.input_taps = nn.Parameter(torch.zeros(c.input_conv, width))

    def qkv(self, columns):
        """A projection to queries, keys or values."""
        return nn.Linear(self.width, columns, bias=self.c.bias != "none")

    def make_out(self, rows):
        """The projection of all heads' outputs."""
        return nn.Linear(rows, self.width, bias=self.c.bias == "all")

    @abc.abstractmethod
    def heads(self, x):
        """[B, T, H, e] of x [B, T, D]: causal, one document from its first position."""

    def combine(self, o, x):
        """[B, T, D] of `heads` and x."""
        return self.out(o.flatten(2))

    def forward(self, x):
        if self.c.input_conv > 1:
            x = x + causal_conv(x, self.input_taps)
        return self.combine(self.heads(x), x)
