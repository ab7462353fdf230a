"""A language model of attnlab's in plain PyTorch: pre-norm blocks around mixers, one pattern of mixers repeated.

Nothing is cached: `generate` computes all positions anew for every token. Each row of a batch is one document.
"""

import re
import types

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from attnlab.interchange.remote.configuration_attnlab import AttnlabConfig
from attnlab.interchange.remote.mixers import FORMS
from attnlab.interchange.remote.parts import RMSNorm, wide

READS = (
    "width", "layers", "mixers", "pattern", "gated", "mlp_width", "mlp_gate", "mlp_bias", "norm", "norm_after",
    "norm_epsilon", "vocab", "tied", "embedding_scale", "logit_cap",
)  # fmt: skip
IGNORED = ("dtype", "remat", "unroll", "dropout")
GLUS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


def build(node, width):
    """The mixer of a node `{"name": ..., knob: value, ...}`."""
    return FORMS[node["name"]](types.SimpleNamespace(**node), width, build)


class GLU(nn.Module):
    """`(act(x W_gate) * x W_up) W_down`."""

    def __init__(self, c):
        super().__init__()
        self.gate, self.up = (nn.Linear(c.width, c.mlp_width, bias=c.mlp_bias) for _ in range(2))
        self.down, self.act = nn.Linear(c.mlp_width, c.width, bias=c.mlp_bias), GLUS[c.mlp_gate]

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Sublayer(nn.Module):
    """`x + tanh(gate) * norm_after(branch(norm(x)))`, gate and `norm_after` where the config has them."""

    def __init__(self, c, branch, gated):
        super().__init__()
        self.norm, self.branch = make_norm(c), branch
        self.norm_after = make_norm(c) if c.norm_after else nn.Identity()
        self.gate = nn.Parameter(torch.zeros(())) if gated else None

    def forward(self, x):
        y = self.norm_after(self.branch(self.norm(x)))
        return x + (y if self.gate is None else torch.tanh(self.gate) * y)


class Block(nn.Module):
    """The mixers of a block of the pattern, one after the other, then the MLP."""

    def __init__(self, c, letters):
        super().__init__()
        sublayers = [Sublayer(c, build(c.mixers[letter], c.width), letter in c.gated) for letter in letters]
        if c.mlp_width:
            sublayers.append(Sublayer(c, GLU(c), set(letters) <= set(c.gated)))
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, x):
        for sublayer in self.sublayers:
            x = sublayer(x)
        return x


def make_norm(c):
    """A norm of the stream."""
    return nn.Identity() if c.norm == "none" else RMSNorm(c.width, c.norm_epsilon)


class AttnlabPreTrainedModel(PreTrainedModel):
    """What transformers needs to know."""

    config_class = AttnlabConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]

    def _init_weights(self, module):
        """Weights are read, never drawn."""


class AttnlabModel(AttnlabPreTrainedModel):
    """Embedding, blocks, norm."""

    def __init__(self, config):
        super().__init__(config)
        self.c = c = types.SimpleNamespace(**config.attnlab)
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        blocks = [block.replace("+", "") for block in re.findall(r"[^+](?:\+[^+])*", c.pattern)]
        self.layers = nn.ModuleList([Block(c, blocks[i % len(blocks)]) for i in range(c.layers)])
        self.norm = make_norm(c)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        """Hidden states [B, T, D] of ids [B, T]; positions that `attention_mask` leaves out are no part of the text."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x if self.c.embedding_scale == 1 else x * self.c.embedding_scale
        if attention_mask is None or bool(attention_mask.all()):
            return BaseModelOutput(last_hidden_state=self._encoded(x))
        y = torch.zeros_like(x)
        for row, used in enumerate(attention_mask.bool()):
            y[row, used] = self._encoded(x[row : row + 1, used])[0]
        return BaseModelOutput(last_hidden_state=y)

    def _encoded(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class AttnlabForCausalLM(AttnlabPreTrainedModel, GenerationMixin):
    """The model with its output projection, which is the embedding where `tied`."""

    def __init__(self, config):
        super().__init__(config)
        self.model = AttnlabModel(config)
        c = self.model.c
        self.lm_head = None if c.tied else nn.Linear(c.width, c.vocab, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        """Logits [B, T, V] in float32 or wider; the mean loss where `labels` [B, T] are given, -100 left out."""
        x = self.model(input_ids, attention_mask, inputs_embeds).last_hidden_state
        kernel, cap = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight, self.model.c.logit_cap
        logits = wide(F.linear(x, kernel))
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """All positions, at every step."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}
