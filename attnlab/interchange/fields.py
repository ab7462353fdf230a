"""Reading a config.json key by key: what nobody asked for is refused by name in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnlab.config import show
from attnlab.errors import UserError

# Keys that say nothing of the model's function: names, tokens, what is for training or for other programs.
IGNORED = frozenset(
    "architectures model_type auto_map transformers_version _name_or_path torch_dtype dtype initializer_range "
    "use_cache bos_token_id eos_token_id pad_token_id attention_dropout hidden_dropout_prob return_dict "
    "output_hidden_states output_attentions _attn_implementation_autoset _attn_implementation attn_implementation "
    "is_encoder_decoder problem_type id2label label2id task_specific_params pretraining_tp cache_implementation "
    "is_llama_config transformers.js_config mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings "
    "unsloth_fixed chunk_size_feed_forward max_position_embeddings "
    # read where kinds of layers are made out
    "layer_types max_window_layers".split()
)
_REFUSED = {
    "quantization_config": "weights that are quantised are not read",
    "num_experts": "mixtures of experts are out of reach of a dense MLP",
    "num_local_experts": "mixtures of experts are out of reach of a dense MLP",
    "kv_lora_rank": "latent attention (MLA) is not read",
}
_MISSING = object()


class Fields:
    """The keys of a config.json.

    Args:
      tree: the object.
      where: what to call it in messages.
    """

    def __init__(self, tree: Mapping[str, Any], where: str):
        self._tree, self.where, self._used = dict(tree), where, set()
        for key, reason in _REFUSED.items():
            if self._tree.get(key):
                raise UserError(f"{where}: {key} = {show(self._tree[key])}: {reason}")
            self._used.add(key)

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key; null is as if it were not there.

        Raises:
          UserError: it is not there and has no default.
        """
        self._used.add(key)
        value = self._tree.get(key)
        if value is None:
            if default is _MISSING:
                raise UserError(f"{self.where} has no {key}, which says what the model is")
            return default
        return value

    def has(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        self._used.add(key)
        return key in self._tree

    def integer(self, key: str, default: Any = _MISSING, least: int = 1) -> Any:
        """An integer of at least so much, or the default."""
        value = self.get(key, default)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return value if value is default or good else self.refuse(key, f"an integer, {least} or more")

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """A number above 0, or the default."""
        value = self.get(key, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
        if value is default or not good:
            return value if value is default else self.refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(key, default)
        return value if isinstance(value, bool) else self.refuse(key, "true or false")

    def must(self, key: str, *allowed: Any) -> Any:
        """A value that has to be one of `allowed`, the first where it is not there."""
        value = self.get(key, allowed[0])
        return value if value in allowed else self.refuse(key, ", ".join(map(str, allowed)))

    def refuse(self, key: str, allowed: str) -> Any:
        """Raises UserError: the key's value is not possible."""
        raise UserError(f"{self.where}: {key} = {show(self._tree.get(key))} is not read; allowed: {allowed}")

    def require_all_read(self) -> None:
        """Raises UserError where there are keys that nobody asked for, other than null and false ones' absence."""
        left = [key for key, value in self._tree.items() if key not in self._used | IGNORED and value is not None]
        if left:
            shown = ", ".join(f"{key} = {show(self._tree[key])}" for key in sorted(left)[:10])
            raise UserError(f"{self.where} has keys that are not known of this family: {shown}")


def layer_kinds(fields: Fields, layers: int, default: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """`layer_types`, of the kinds in `default` and `known`, or `default` where the file does not say."""
    kinds, allowed = fields.get("layer_types", list(default)), set(default) | set(known)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= allowed:
        fields.refuse("layer_types", f"{layers} of {', '.join(sorted(allowed))}")
    return kinds


def rotary(fields: Fields, head: int, *, layer: str | None = None, base: float = 10_000.0, fraction: float = 1.0,
           local: bool = False) -> dict[str, Any]:  # fmt: skip
    """A mixer's `rope_base`, `rope_width` and `rope_scaling`, from the new keys (`rope_parameters`) or the old ones.

    Args:
      head: width of a head.
      layer: kind of layer, where the file may have parameters for each.
      base, fraction: where the file does not say.
      local: whether the old keys `rope_theta` and `rope_scaling` are of other layers.

    Raises:
      UserError: old and new keys that differ, a kind or a key that is not known.
    """
    new, old = fields.get("rope_parameters", None), fields.get("rope_scaling", None)
    top, part = fields.number("rope_theta", None), fields.number("partial_rotary_factor", None)
    if new is not None and layer is not None and any(isinstance(v, Mapping) for v in new.values()):
        new, top = new.get(layer), None
        if not isinstance(new, Mapping):
            fields.refuse("rope_parameters", f"an object with {layer}")
    elif local:
        new = old = top = None
    if new is not None and old is not None and dict(new) | dict(old) != dict(new):
        fields.refuse("rope_scaling", "null beside rope_parameters, or the same")
    rule = dict(new if new is not None else old or {})
    for name in ("mrope_section", "mrope_interleaved"):  # of images: text has three equal rows of positions
        rule.pop(name, None)
    theta = rule.pop("rope_theta", base if top is None else top)
    if top is not None and theta != top:
        fields.refuse("rope_theta", f"{theta}, as in rope_parameters")
    share = rule.pop("partial_rotary_factor", fraction if part is None else part)
    if part is not None and share != part:
        fields.refuse("partial_rotary_factor", f"{share}, as in rope_parameters")
    kinds = {kind for kind in (rule.pop("rope_type", None), rule.pop("type", None)) if kind}
    kind = "default" if not kinds else kinds.pop() if len(kinds) == 1 else str(sorted(kinds))
    scaling = None if kind == "default" and not rule else _scaling(fields, kind, rule)
    width = int(head * share)
    if not 0 < share <= 1 or width % 2:
        raise UserError(
            f"{fields.where}: partial_rotary_factor = {share} turns {width} of {head} channels, which is odd"
        )
    return {"rope_base": float(theta), "rope_width": None if width == head else width, "rope_scaling": scaling}


_SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high",
               "original_max_position_embeddings": "original_length"},
    "yarn": {"factor": "factor", "beta_fast": "fast", "beta_slow": "slow", "attention_factor": "attention_factor",
             "truncate": "truncate", "original_max_position_embeddings": "original_length"},
}  # fmt: skip


def _scaling(fields: Fields, kind: str, rule: dict[str, Any]) -> dict[str, Any]:
    """The node of a scaling."""
    if kind not in _SCALING_KEYS:
        raise UserError(
            f"{fields.where}: the rotary scaling {kind!r} is not read; allowed: default, {', '.join(_SCALING_KEYS)}"
        )
    keys, rule = _SCALING_KEYS[kind], {key: value for key, value in rule.items() if value is not None}
    if kind != "linear":
        rule.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
    if kind == "yarn":
        over, all_ = rule.pop("mscale", None), rule.pop("mscale_all_dim", None)
        if over and all_ and "attention_factor" not in rule:
            times = lambda m: 0.1 * m * math.log(rule["factor"]) + 1
            rule["attention_factor"] = times(over) / times(all_)
    unknown = sorted(rule.keys() - keys.keys())
    if unknown or "factor" not in rule:
        what = f"{unknown[0]} is not known" if unknown else "factor is missing"
        raise UserError(f"{fields.where}: rotary scaling {kind}: {what}; allowed: {', '.join(keys)}")
    whole = ("original_length", "truncate")
    named = {keys[key]: value for key, value in rule.items()}
    return {"name": kind} | {key: value if key in whole else float(value) for key, value in named.items()}


def rotary_keys(mixer: Any, head: int) -> dict[str, Any]:
    """`rope_parameters` of a mixer's Config; UserError where it has none."""
    if mixer.rope_base is None:
        raise UserError("its layers have no rotary positions")
    keys: dict[str, Any] = {"rope_theta": mixer.rope_base, "rope_type": "default"}
    if mixer.rope_width is not None and mixer.rope_width != head:
        keys["partial_rotary_factor"] = mixer.rope_width / head
    if mixer.rope_scaling is not None:
        names = _SCALING_KEYS[mixer.rope_scaling.node_name]
        given = {key: getattr(mixer.rope_scaling, name) for key, name in names.items()}
        keys |= {"rope_type": mixer.rope_scaling.node_name} | {k: v for k, v in given.items() if v is not None}
    return keys
