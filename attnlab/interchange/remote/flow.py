"""Flow attention: linear attention whose sources compete and whose outputs are allocated by conserved flows."""

import torch
import torch.nn.functional as F

from attnlab.interchange.remote.parts import Heads, split_heads, wide

READS = (
    "heads", "head_width", "bias", "input_conv", "causal", "feature", "competition", "allocation", "clip", "epsilon",
)  # fmt: skip
IGNORED = ("impl", "chunk", "form")  # forms of one sum
FEATURES = {
    "sigmoid": torch.sigmoid,
    "relu": lambda x: F.relu(x) + 1e-6,
    "elu": lambda x: F.elu(x) + 1,
}


class Form(Heads):
    """Sums run over the positions so far, of which there are N; q, k are features:

    I = (q + eps) . (sum k + eps),                 O = (k + eps) . (sum q + eps)
    I^ = (q + eps) . (sum k N / O + eps) / N,      O^ = (k + eps) . (sum q N / I + eps) / N
    u = v N exp(clip O^) / sum exp(clip O^),       o = sigmoid(I^) / I * q . sum k u^T
    """

    def __init__(self, c, width, build):
        super().__init__(c, width, build)
        inner = c.heads * self.head_dim
        self.q, self.k, self.v = (self.qkv(inner) for _ in range(3))
        self.out = self.make_out(inner)

    def heads(self, x):
        c, T = self.c, x.shape[1]
        q, k, v = (wide(split_heads(linear(x), self.head_dim)) for linear in (self.q, self.k, self.v))
        q, k = FEATURES[c.feature](q), FEATURES[c.feature](k)
        count = torch.arange(1, T + 1, device=x.device).to(q)[:, None]
        flow = lambda a, total: ((a + c.epsilon) * (total + c.epsilon)).sum(-1)  # [B, T, H]
        so_far = lambda a, weight=None: (a if weight is None else a * weight[..., None]).cumsum(1)
        share = 1 / flow(q, so_far(k))
        if c.competition:
            outgoing = flow(k, so_far(q, count * share)) / count
            scores = outgoing if c.clip is None else outgoing.clamp(-c.clip, c.clip)
            v = v * (count * torch.exp(scores - scores.logcumsumexp(1)))[..., None]
        o = torch.einsum("bhts,bshe->bthe", torch.einsum("bthd,bshd->bhts", q, k).tril(), v)
        if c.allocation:
            received = flow(q, so_far(k, count / flow(k, so_far(q)))) / count
            share = share * torch.sigmoid(received)
        return (o * share[..., None]).to(x.dtype)
