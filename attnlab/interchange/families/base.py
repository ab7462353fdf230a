"""What a family of published models is: its config.json both ways, and its tensors.

A family states how it differs from the plain decoder below, in a few attributes and hooks. Whether a model of attnlab's
is one of it nobody decides by hand: what the family would write of it is read again and compared
(`attnlab.interchange.exporting`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from attnlab.errors import UserError
from attnlab.interchange.fields import Fields, layer_kinds, rotary, rotary_keys
from attnlab.interchange.pieces import Piece

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# How a model is computed or trained, not what it is: a folder says nothing of it.
HOW = frozenset({"dtype", "remat", "unroll", "dropout", "impl", "decode_impl", "gather_impl", "chunk"})
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LETTERS = {FULL: "S", SLIDING: "W", LINEAR: "L"}


class Family:
    """A decoder of pre-norm blocks: attention, then a gated MLP, whose tensors have Llama's names.

    Attributes:
      name: of the family.
      model_type, architecture: in its config.json.
      remote_code: whether the folder has the code that reads it.
      own_code: whose repository has the code that reads it, where transformers itself does not.
      tied: what `tie_word_embeddings` is where the file does not say.
      head_dim: where the file does not say; None: width / heads.
      heads_divide: whether its code refuses heads that do not divide the width.
      mixer, linear: names of the mixers of its attention layers, and of its other ones if it has any.
      qk_norm: whether queries and keys are normed.
      norm_shift: 1 where its norms multiply by 1 + w, w being what is stored.
      norm_after: whether what a sublayer adds is normed, too.
      activation: default of the MLP's.
      activation_key: what config.json calls it.
      defaults: of further keys.
    """

    name = model_type = architecture = own_code = ""
    remote_code = False
    tied = False
    head_dim: int | None = None
    heads_divide = False
    mixer = "softmax"
    linear = ""
    qk_norm = False
    norm_shift = 0.0
    norm_after = False
    activation = "silu"
    activation_key = "hidden_act"
    defaults: Mapping[str, Any] = {}

    def claims(self, tree: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this family."""
        return tree.get("model_type") == self.model_type

    # config.json to the node of a model.

    def read(self, tree: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The node `model` of a run.

        Raises:
          UserError: a key or a value that is not known, by name.
        """
        fields = Fields({**self.defaults, **tree}, where)
        width, layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
        if self.heads_divide and width % fields.integer("num_attention_heads"):
            fields.refuse("num_attention_heads", f"divisors of hidden_size ({width}): the family's code asks for it")
        activation = fields.must(self.activation_key, self.activation, *ACTIVATIONS)
        model = {
            "vocab": fields.integer("vocab_size"),
            "width": width,
            "layers": layers,
            "mlp_width": fields.integer("intermediate_size"),
            "mlp_gate": ACTIVATIONS[activation],
            "tied": fields.flag("tie_word_embeddings", self.tied),
            "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
            "norm_after": self.norm_after,
        } | self.more(fields)
        kinds = self.kinds(fields, layers)
        nodes = {LETTERS[kind]: self.node(fields, kind) for kind in dict.fromkeys(kinds)}
        fields.require_all_read()
        letters = "".join(LETTERS[kind] for kind in kinds)
        periods = (n for n in range(1, layers + 1) if layers % n == 0 and letters == letters[:n] * (layers // n))
        return model | {"mixers": nodes, "pattern": letters[: next(periods)]}

    def more(self, fields: Fields) -> dict[str, Any]:
        """Further keys of the model's node."""
        return {}

    def kinds(self, fields: Fields, layers: int) -> list[str]:
        """The kind of each layer, one of `LETTERS`."""
        return layer_kinds(fields, layers, [FULL] * layers)

    def bias(self, fields: Fields) -> str:
        """Which projections of attention add a bias."""
        return "none"

    def window(self, fields: Fields) -> int:
        """Of windowed layers."""
        return fields.integer("sliding_window")

    def node(self, fields: Fields, kind: str) -> dict[str, Any]:
        """The node of the mixer of a kind of layers."""
        heads = fields.integer("num_attention_heads")
        width, default = fields.integer("hidden_size"), self.head_dim
        head = fields.integer("head_dim", width // heads if default is None else default)
        node = {
            "name": self.mixer,
            "heads": heads,
            "kv_heads": fields.integer("num_key_value_heads", heads),
            "head_width": head,
            "window": self.window(fields) if kind == SLIDING else None,
            "bias": self.bias(fields),
            "qk_norm": self.qk_norm,
            "qk_epsilon": fields.number("rms_norm_eps", 1e-6) if self.qk_norm else None,
        }
        return node | self.rotary(fields, kind, head)

    def rotary(self, fields: Fields, kind: str, head: int) -> dict[str, Any]:
        """The rotary knobs of a kind of layers."""
        return rotary(fields, head)

    # The model back to a config.json.

    def write(self, config: Any, length: int) -> dict[str, Any]:
        """What a config.json would say of a model, as far as the family has words for it.

        Args:
          config: a LanguageModelConfig.
          length: that it was trained at.

        Raises:
          UserError: it has layers that the family has not.
        """
        if several := [block for block in config.blocks if len(block) > 1]:
            raise UserError(f"a block has several mixers ({'+'.join(several[0])})")
        layers = [config.mixers[letter] for letter in layer_letters(config)]
        names = {layer.node_name for layer in layers}
        if self.mixer not in names or names - {self.mixer, self.linear}:
            raise UserError(f"its layers are {', '.join(sorted(names))}")
        first = next(layer for layer in layers if layer.node_name == self.mixer)
        head = first.head_dim(config.width)
        back = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        tree = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": config.width,
            "intermediate_size": config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": first.heads,
            "num_key_value_heads": first.key_heads,
            "head_dim": head,
            "vocab_size": config.vocab,
            "max_position_embeddings": length,
            "rms_norm_eps": config.norm_epsilon,
            self.activation_key: back[config.mlp_gate],
            "tie_word_embeddings": config.tied,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
        }
        return tree | self.write_rotary(config, layers, head) | self.write_more(config, layers)

    def write_rotary(self, config: Any, layers: list[Any], head: int) -> dict[str, Any]:
        """The rotary keys, new and old ones that agree."""
        rule = rotary_keys(next(layer for layer in layers if layer.node_name == self.mixer), head)
        return {"rope_theta": rule["rope_theta"], "rope_parameters": rule}

    def write_more(self, config: Any, layers: list[Any]) -> dict[str, Any]:
        """Further keys."""
        return {}

    def write_layer_types(self, layers: list[Any]) -> dict[str, Any]:
        """`layer_types` and the window, of families with windowed layers."""
        windows = {layer.window for layer in layers if getattr(layer, "window", None) is not None}
        kind = lambda layer: SLIDING if getattr(layer, "window", None) is not None else FULL
        kinds = [kind(layer) if layer.node_name == self.mixer else LINEAR for layer in layers]
        return {"layer_types": kinds, "sliding_window": max(windows, default=None)}

    def code(self, config: Any) -> dict[str, str]:
        """Files of code that the folder has: name to text."""
        return {}

    # Tensors.

    def pieces(self, config: Any) -> Iterator[Piece]:
        """Of all parameters, in the order in which they are written; of names that begin with `model.`."""
        D, V, P = config.width, config.vocab, len(config.blocks)
        yield Piece("embedding", None, "model.embed_tokens.weight", (V, D))
        for layer, letter in enumerate(layer_letters(config)):
            repeat, block = divmod(layer, P)
            here, there = f"transformer.periods.blocks.{block}.sublayers", f"model.layers.{layer}."
            norm = lambda leaf, name: Piece(f"{here}.{leaf}.scale", repeat, f"{there}{name}.weight", (D,),
                                            shift=self.norm_shift)  # fmt: skip
            yield norm("0.norm", "input_layernorm")
            yield from self.mixer_pieces(config.mixers[letter], D, f"{here}.0.branch", repeat, there)
            if config.norm_after:
                yield norm("0.norm_after", "post_attention_layernorm")
                yield norm("1.norm_after", "post_feedforward_layernorm")
            yield norm("1.norm", "pre_feedforward_layernorm" if config.norm_after else "post_attention_layernorm")
            sides = (("gate", D, config.hidden), ("up", D, config.hidden), ("down", config.hidden, D))
            for name, fan_in, fan_out in sides:
                yield from linear(f"{here}.1.branch.{name}", repeat, f"{there}mlp.{name}_proj", fan_in, fan_out,
                                  bias=config.mlp_bias)  # fmt: skip
        yield Piece("norm.scale", None, "model.norm.weight", (D,), shift=self.norm_shift)
        if not config.tied:
            yield Piece("head.kernel", None, "lm_head.weight", (V, D), "transposed")

    def mixer_pieces(self, mixer: Any, width: int, leaf: str, repeat: int, there: str) -> Iterator[Piece]:
        """Of one layer's mixer."""
        d = mixer.head_dim(width)
        queries, keys, there = mixer.heads * d, mixer.key_heads * d, f"{there}self_attn."
        for name, columns in (("q", queries), ("k", keys), ("v", keys)):
            yield from linear(
                f"{leaf}.{name}", repeat, f"{there}{name}_proj", width, columns, bias=mixer.bias != "none"
            )
        yield from linear(f"{leaf}.out", repeat, f"{there}o_proj", queries, width, bias=mixer.bias == "all")
        yield from self.head_norms(mixer, d, leaf, repeat, there)

    def head_norms(self, mixer: Any, d: int, leaf: str, repeat: int, there: str) -> Iterator[Piece]:
        """Of queries and keys."""
        for name in ("q", "k") if mixer.qk_norm else ():
            yield Piece(f"{leaf}.{name}_norm.scale", repeat, f"{there}{name}_norm.weight", (d,), shift=self.norm_shift)


def linear(leaf: str, repeat: int | None, tensor: str, fan_in: int, fan_out: int, *, bias: bool = False,
           rows: Any = None, shape: int | None = None) -> Iterator[Piece]:  # fmt: skip
    """Of a `Linear`; `rows` of a tensor that holds more has `shape` of them."""
    shape = fan_out if shape is None else shape
    yield Piece(f"{leaf}.kernel", repeat, f"{tensor}.weight", (shape, fan_in), "transposed", rows)
    if bias:
        yield Piece(f"{leaf}.bias", repeat, f"{tensor}.bias", (shape,), rows=rows)


def layer_letters(config: Any) -> list[str]:
    """The letter of each layer; of a block of several the letters together, which no family has."""
    return list(itertools.islice(itertools.cycle(config.blocks), config.layers))


def windowed(fields: Fields, layers: int) -> list[str]:
    """Kinds of layers by `use_sliding_window` and `max_window_layers`, as Qwen's are."""
    used = fields.flag("use_sliding_window") and fields.integer("sliding_window", None) is not None
    if not used:
        fields.get("sliding_window", None)
        return layer_kinds(fields, layers, [FULL] * layers)
    first = fields.integer("max_window_layers", 28, least=0)
    return layer_kinds(fields, layers, [SLIDING if i >= first else FULL for i in range(layers)], [FULL, SLIDING])
