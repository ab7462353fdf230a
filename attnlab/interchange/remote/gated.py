"""Gated softmax attention: `Y' = Y * act(x W)` at one of five places of the layer."""

import torch
import torch.nn.functional as F
from torch import nn

from attnlab.interchange.remote.parts import wide
from attnlab.interchange.remote.softmax import Form as Softmax

READS = ("position", "granularity", "sharing", "operation", "activation", "input_dependent")  # and softmax's
IGNORED = ()
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "ns_sigmoid": lambda z: 0.5 + 0.5 * torch.sigmoid(z),
    "identity": lambda z: z,
}


class Gate(nn.Module):
    """Scores of `groups` heads, for each channel of theirs or one for each head."""

    def __init__(self, c, width, groups, head_dim):
        super().__init__()
        self.c, self.groups = c, groups
        columns = groups * (head_dim if c.granularity == "elementwise" else 1)
        if c.input_dependent:
            self.linear = nn.Linear(width, columns, bias=False)
        else:
            self.theta = nn.Parameter(torch.zeros(columns))

    def forward(self, y, x):
        """y [..., groups, e], gated by x [..., D]."""
        c = self.c
        logits = self.linear(x) if c.input_dependent else self.theta
        scores = ACTIVATIONS[c.activation](wide(logits.reshape(*logits.shape[:-1], self.groups, -1)))
        if c.sharing == "shared":
            scores = scores.mean(-2, keepdim=True)
        return (wide(y) * scores if c.operation == "multiplicative" else wide(y) + scores).to(y.dtype)


class Form(Softmax):
    """G1: heads' outputs; G2: values; G3: keys; G4: queries; G5: the layer's output."""

    def __init__(self, c, width, build):
        super().__init__(c, width, build)
        groups, of = c.heads, self.head_dim
        if c.position == "G5":
            groups, of = 1, width
        elif c.position in ("G2", "G3"):
            groups = self.key_heads
        self.gate = Gate(c, width, groups, of)

    def _gated(self, position, y, x):
        return self.gate(y, x) if self.c.position == position else y

    def queries(self, x):
        return self._gated("G4", super().queries(x), x)

    def keys_values(self, x):
        k, v = super().keys_values(x)
        return self._gated("G3", k, x), self._gated("G2", v, x)

    def heads(self, x):
        return self._gated("G1", super().heads(x), x)

    def combine(self, o, x):
        y = super().combine(o, x)
        return self._gated("G5", y[..., None, :], x)[..., 0, :]
