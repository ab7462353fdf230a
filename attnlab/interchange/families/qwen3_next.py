"""Qwen3-Next, dense: gated attention in one layer of four, the gated delta rule in the others."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import numpy as np

from attnlab.interchange.families.base import FULL, LINEAR, Family, linear
from attnlab.interchange.families.gated_qwen3 import fused_queries
from attnlab.interchange.fields import Fields, layer_kinds, rotary
from attnlab.interchange.pieces import Piece

_OF_EXPERTS = (
    "decoder_sparse_step", "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok",
    "norm_topk_prob", "output_router_logits", "router_aux_loss_coef", "mlp_only_layers",
)  # fmt: skip


class Hybrid(Family, abc.ABC):
    """What Qwen3-Next and Qwen3.5 share; they differ in how the delta rule's projections lie in tensors."""

    mixer, linear = "gated", "gated_deltanet"
    head_dim = 256
    qk_norm = True
    norm_shift = 1.0

    def kinds(self, fields: Fields, layers: int) -> list[str]:
        every = fields.integer("full_attention_interval", 4)
        return layer_kinds(fields, layers, [LINEAR if (i + 1) % every else FULL for i in range(layers)], [FULL, LINEAR])

    def bias(self, fields: Fields) -> str:
        fields.must("attention_bias", False)
        fields.must("attn_output_gate", True)
        return "none"

    def rotary(self, fields: Fields, kind: str, head: int) -> dict[str, Any]:
        return rotary(fields, head, fraction=0.25)

    def node(self, fields: Fields, kind: str) -> dict[str, Any]:
        keys, values = fields.integer("linear_num_key_heads", 16), fields.integer("linear_num_value_heads", 32)
        d, e = fields.integer("linear_key_head_dim", 128), fields.integer("linear_value_head_dim", 128)
        conv = fields.integer("linear_conv_kernel_dim", 4)
        attention = super().node(fields, kind)
        if kind == FULL:
            return attention
        return {
            "name": self.linear, "heads": values, "key_heads": keys, "head_width": d, "expand": e / d, "conv": conv,
            "query_scale": None, "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        }  # fmt: skip

    def write_rotary(self, config: Any, layers: list[Any], head: int) -> dict[str, Any]:
        keys = super().write_rotary(config, layers, head)
        # Without the key these families turn a quarter.
        keys["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
        return keys

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        kinds = self.write_layer_types(layers)
        delta = next((layer for layer in layers if layer.node_name == self.linear), None)
        if delta is None:
            return {"attention_bias": False, "layer_types": kinds["layer_types"]}
        return {
            "attention_bias": False,
            "layer_types": kinds["layer_types"],
            "linear_num_value_heads": delta.heads,
            "linear_num_key_heads": delta.key_heads or delta.heads,
            "linear_key_head_dim": delta.head_dim(config.width),
            "linear_value_head_dim": delta.value_dim(config.width),
            "linear_conv_kernel_dim": delta.conv,
        }

    def mixer_pieces(self, mixer: Any, width: int, leaf: str, repeat: int, there: str) -> Iterator[Piece]:
        if mixer.node_name == self.linear:
            yield from self.delta_pieces(mixer, width, leaf, repeat, f"{there}linear_attn.")
            return
        d = mixer.head_dim(width)
        rows = np.arange(2 * mixer.heads * d).reshape(mixer.heads, 2, d)
        yield from fused_queries(mixer, width, leaf, repeat, there, *(rows[:, i].reshape(-1) for i in (0, 1)))
        for piece in super().mixer_pieces(mixer, width, leaf, repeat, there):
            if not piece.tensor.endswith("q_proj.weight"):
                yield piece

    def delta_pieces(self, mixer: Any, width: int, leaf: str, repeat: int, there: str) -> Iterator[Piece]:
        """Of a layer of the delta rule."""
        K, H, d, e = mixer.key_heads or mixer.heads, mixer.heads, mixer.head_dim(width), mixer.value_dim(width)
        yield from self.projections(width, K, H, d, e, leaf, repeat, there)
        # There all q, all k, all v; here the channels of each key head together.
        q = np.arange(K * d).reshape(K, d)
        v = 2 * K * d + np.arange(H * e).reshape(K, -1)
        rows = np.concatenate([q, K * d + q, v], axis=1).reshape(-1)
        yield Piece(f"{leaf}.filters", repeat, f"{there}conv1d.weight", (len(rows), 1, mixer.conv), "taps", rows)
        yield Piece(f"{leaf}.log_decay.a_log", repeat, f"{there}A_log", (H,))
        yield Piece(f"{leaf}.log_decay.dt_bias", repeat, f"{there}dt_bias", (H,))
        yield Piece(f"{leaf}.norm.scale", repeat, f"{there}norm.weight", (e,))  # by w, not by 1 + w
        yield from linear(f"{leaf}.out", repeat, f"{there}out_proj", H * e, width)

    @abc.abstractmethod
    def projections(
        self, width: int, K: int, H: int, d: int, e: int, leaf: str, repeat: int, there: str
    ) -> Iterator[Piece]:
        """Of q, k, v, the output's gate z, the writing strengths b and the decays a."""


class Qwen3Next(Hybrid):
    name = model_type = "qwen3_next"
    architecture = "Qwen3NextForCausalLM"

    def more(self, fields: Fields) -> dict[str, Any]:
        if not fields.has("num_experts"):  # 512 where the file does not say
            fields.refuse("num_experts", "0: mixtures of experts are out of reach of a dense MLP")
        for key in _OF_EXPERTS:  # of a model without any
            fields.has(key)
        return {}

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        return super().write_more(config, layers) | {"num_experts": 0}

    def projections(
        self, width: int, K: int, H: int, d: int, e: int, leaf: str, repeat: int, there: str
    ) -> Iterator[Piece]:
        R = H // K
        of = np.arange(K * (2 * d + 2 * R * e)).reshape(K, -1)
        cuts = [d, 2 * d, 2 * d + R * e]
        parts = [part.reshape(-1) for part in np.split(of, cuts, axis=1)]
        for name, rows in zip(("q", "k", "v", "gate"), parts):
            yield from linear(
                f"{leaf}.{name}", repeat, f"{there}in_proj_qkvz", width, len(rows), rows=rows, shape=of.size
            )
        both = np.arange(2 * H).reshape(K, 2, R)
        for name, i in (("beta", 0), ("log_decay.linear", 1)):
            rows = both[:, i].reshape(-1)
            yield from linear(f"{leaf}.{name}", repeat, f"{there}in_proj_ba", width, H, rows=rows, shape=2 * H)
