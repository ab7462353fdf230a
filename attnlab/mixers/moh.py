"""MoH: heads that each token routes to, over the heads of any other mixer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import config as config_lib
from attnlab.mixers import base
from attnlab.mixers.base import Capabilities, MixerConfig, MixerOutput, State, impl_knob, knob, register
from attnlab.mixers.heads import HeadMixer
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.sequence import Sequence
from attnlab.ops import gathered_kernel
from attnlab.ops import router as route
from attnlab.ops.attention_gated import gated
from attnlab.ops.dispatch import Implementation, Op
from attnlab.ops.gathered_attention import GATHERED_ATTENTION
from attnlab.ops.head_subsets import interleaved, spread_by_groups, take_heads
from attnlab.ops.keys_values import KeysValues
from attnlab.ops.masks import Mask
from attnlab.parallel import partition

_ROUTERS = {
    "learned": "scores of x, two-stage weights",
    "norm": "the queries' norms, weights 0 or 1, gradient straight through to the heads taken",
    "norm_dense": "as norm, gradient to all heads",
    "norm_hard": "as norm, no gradient through the weights",
}
# Cores whose attention is one call of the op for all heads: what `gather`, and a router that reads queries, stand on.
_SOFTMAX_CORES = ("gated", "softmax")


@dataclasses.dataclass(frozen=True)
class MoHConfig(MixerConfig):
    """Knobs of mixture-of-head attention. H heads: h_s shared, always on, and E = H - h_s routed, K of them on."""

    heads: int = knob(4, "heads H, shared and routed together; handed to the core", other=(2,), least=1)
    shared: int | None = knob(None, "shared heads h_s; none: a quarter of H", other=(0,))
    active: int | None = knob(None, "routed heads K that a token takes; none: three quarters of H are on", other=(1,))
    router: str = knob(
        "learned", "; ".join(f"{k}: {v}" for k, v in _ROUTERS.items()), other=("norm", "norm_hard"), choices=_ROUTERS
    )
    gate_norm: str = knob(
        "code",
        "code: as released, the weights of the heads that are on are 1 in the mean and the "
        "loss is K when balanced; paper: eq. 5 to 8, weights that sum to 1 or less, loss K / E",
        other=("paper",),
        choices=("code", "paper"),
    )
    balance: float = knob(0.01, "coefficient of the load-balance loss; 0: none", other=(0.0,), least=0)
    causal: bool = knob(True, "handed to the core", other=(False,))
    # What the node holds is checked when the number of heads is known.
    core: Any = knob(
        "softmax", "node of the mixer whose heads these are", other=("gated",), build=lambda tree, path: tree
    )
    impl: str = knob(
        "auto",
        "dense: every head, the weight may be 0; gather: only the heads that are on (cores "
        f"{' and '.join(_SOFTMAX_CORES)}); definition; auto: gather where it serves, on CPU and, where rows are so "
        "long that it saves, on TPU, else dense",
        other=("dense",),
    )
    gather_impl: str = impl_knob(GATHERED_ATTENTION, doc="with gather, implementation of the op over the routed heads")

    def __post_init__(self) -> None:
        super().__post_init__()
        need = config_lib.require
        need(self.shared is None or 0 <= self.shared <= self.heads, "shared", self.shared, f"0 to heads ({self.heads})")
        E = self.routed
        if self.active is not None:
            need(min(E, 1) <= self.active <= E, "active", self.active, f"{min(E, 1)} to heads - shared ({E})")
        config_lib.require_choice("impl", self.impl, ROUTED_HEADS.names())
        object.__setattr__(self, "core", self._typed_core())
        if self.reads_queries:
            where, cores = f"where router is {self.router}", ", ".join(_SOFTMAX_CORES)
            need(self.core.node_name in _SOFTMAX_CORES, "router", self.router, f"learned, or a core of {cores}")
            need(E != 1, "shared", self.shared, f"all heads, or at least two less, {where}: one norm has no spread")
            need(not self.core.qk_norm, "core.qk_norm", self.core.qk_norm, f"false {where}, which reads norms")
            need(self.gate_norm == "code", "gate_norm", self.gate_norm, f"code {where}: weights are 0 or 1")
        source = getattr(self.core, "source", None)
        need(source is None, "core.source", source, "none: heads are routed over the sequence's own keys")
        conv = getattr(self.core, "input_conv", 1)
        need(conv == 1, "core.input_conv", conv, "1: it would be the core's, and the router would not see it")
        reason = ROUTED_HEADS.table[self.impl].supports(RoutingSpec.of(self)) if self.impl != "auto" else None
        need(reason is None, "impl", self.impl, f"auto, dense or definition: {reason}")

    @property
    def second_stream(self) -> str:
        return self.core.second_stream

    @property
    def text(self) -> str | None:
        return self.core.text

    @property
    def always(self) -> int:
        """h_s."""
        return self.heads // 4 if self.shared is None else self.shared

    @property
    def routed(self) -> int:
        """E."""
        return self.heads - self.always

    @property
    def taken(self) -> int:
        """K."""
        if self.active is not None:
            return self.active
        return min(self.routed, max(1, 3 * self.heads // 4 - self.always))

    @property
    def reads_queries(self) -> bool:
        """Whether the router reads the core's queries."""
        return self.router != "learned" and self.routed > 0

    def _typed_core(self) -> MixerConfig:
        core = self.core
        if not isinstance(core, MixerConfig):
            known = [n for n in base.names() if issubclass(base.get(n), HeadMixer) and n != "moh"]
            node = {"name": "softmax", **core} if isinstance(core, Mapping) else core
            name, fields = config_lib.split_name(node, "core", known)
            allowed = {field.name for field in dataclasses.fields(base.get(name).Config)}
            handed = {k: getattr(self, k) for k in ("heads", "causal") if k in allowed}
            core = config_lib.build(base.get(name).Config, handed | fields, "core")
        for key in ("heads", "causal"):
            mine, its = getattr(self, key), getattr(core, key)
            config_lib.require(its == mine, f"core.{key}", its, f"{mine}, as {key} is; the core is handed it")
        return core


class Router(nnx.Module):
    """Weights of all heads from x [..., D], section 3 of the paper; logits and weights are fp32.

    W_r [D, E] scores the routed heads, W_s [D, h_s] the shared ones, W_h [D, 2] shares weight between both. A part that
    has one choice only has no weights.
    """

    def __init__(self, config: MoHConfig, width: int, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        make = lambda n: Linear(width, n, ("embed", "gates"), rngs=rngs, dtype=param_dtype(dtype))
        if config.routed:
            self.routed = make(config.routed)
        if config.always > 1:
            self.shared = make(config.always)
        if config.routed and config.always:
            self.both = make(2)

    def __call__(self, x: jax.Array) -> Routing:
        """Weights of the shared heads and of the routed ones, and how these were taken."""
        c = self.config
        code = c.gate_norm == "code"
        shared = jnp.ones((*x.shape[:-1], c.always), jnp.promote_types(x.dtype, jnp.float32))
        if c.always > 1:
            shared = route.softmax(self.shared(x)) * (c.always if code else 1)
        if not c.routed:
            return Routing(shared, shared[..., :0], None, None)
        logits = self.routed(x)
        p = route.softmax(logits)
        taken = _top_k(logits, c)
        routed = route.renormalised(p, taken) if code else jnp.where(taken, p, 0)
        if c.always:
            both = route.softmax(self.both(x)) * (2 if code else 1)
            shared, routed = shared * both[..., :1], routed * both[..., 1:]
        return Routing(shared, routed, p, taken)


@dataclasses.dataclass(frozen=True)
class Routing:
    """How tokens were routed.

    Attributes:
      shared, routed: weights [..., h_s] and [..., E].
      p, taken: probabilities and choices [..., E] of the routed heads; None if there are none.
    """

    shared: jax.Array
    routed: jax.Array
    p: jax.Array | None
    taken: jax.Array | None


def norm_routing(q_BTEd: jax.Array, config: MoHConfig) -> Routing:
    """The router without parameters: the K routed heads of largest |q| are on (eq. 9 and 10, and the released code)."""
    logits = route.norm_logits(q_BTEd)
    p, taken = route.softmax(logits), _top_k(logits, config)
    shared = jnp.ones((*p.shape[:-1], config.always), p.dtype)
    if config.router == "norm_hard":
        return Routing(shared, taken.astype(p.dtype), p, taken)
    return Routing(shared, route.straight_through(p, taken, dense=config.router == "norm_dense"), p, taken)


@dataclasses.dataclass(frozen=True)
class RoutingSpec:
    """The static facts by which an implementation is chosen.

    Attributes:
      heads, always, taken: H, h_s and K.
      core: name of the core.
      router: knob of the same name.
      routed: whether there is anything to choose.
      split: whether heads or positions are split over devices.
      masked: whether the core narrows what a query sees by a mask of its own.
      saves: whether moving rows about costs less than the attention that is left out; on CPU it always does.
    """

    heads: int
    always: int
    taken: int
    core: str
    router: str
    routed: bool
    split: bool
    saves: bool
    masked: bool = False

    def __str__(self) -> str:
        return f"H{self.heads} shared {self.always} active {self.taken} core {self.core}"

    @classmethod
    def of(cls, config: MoHConfig, length: int = 0, width: int = 0) -> RoutingSpec:
        """Of a layer, where it is traced, over so many positions by heads so wide."""
        c, split = config, partition.ways("seq") > 1 or partition.ways("heads") > 1
        saves = partition.platform() == "cpu"
        masked = getattr(c.core, "mask", None) is not None
        if partition.platform() == "tpu" and c.core.node_name in _SOFTMAX_CORES:
            sharing = c.heads // (getattr(c.core, "kv_heads", None) or c.heads)
            saves = gathered_kernel.pays(
                c.routed, c.taken, length, causal=c.causal, window=c.core.window, width=width, sharing=sharing
            )
        return cls(c.heads, c.always, c.taken, c.core.node_name, c.router, c.routed > 0, split, saves, masked)


@dataclasses.dataclass(frozen=True)
class SelectedKeys:
    """Keys and values that a query's heads read only where they are on.

    Attributes:
      kv: the keys and values.
      taken_BTE, used_BT: the routed heads that a position takes; positions that count, None: all.
      config: of the layer.
    """

    kv: KeysValues
    taken_BTE: jax.Array
    used_BT: jax.Array | None
    config: MoHConfig

    def attend(self, q_BTHd: jax.Array, mask: Mask, *, gate_BTHe: jax.Array | None = None, **options: Any) -> jax.Array:
        """As `KeysValues.attend`; 0 where a head is off, or whatever costs as little."""
        c = self.config
        shared, routed = shared_and_routed(c)
        wanted = self.taken_BTE if self.used_BT is None else self.taken_BTE & self.used_BT[..., None]
        o = self.kv.attend_selected(
            q_BTHd, mask, wanted, shared=shared, routed=routed, active=c.taken, key_heads=key_heads_read(c),
            gather_impl=c.gather_impl, **options,
        )  # fmt: skip
        return o if gate_BTHe is None else gated(o, gate_BTHe)

    def by_position(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """As `KeysValues.by_position`."""
        return self.kv.by_position(batch)


def dense(layer: MoH, x, seq, state, used) -> tuple[MixerOutput, Routing]:
    """All heads; weights may be 0."""
    if not layer.config.reads_queries:
        return layer.core.heads(x, seq, state), layer.router(x)
    return _of_softmax_core(layer, x, seq, state, None, lambda kv, routing: kv)


def gather(layer: MoH, x, seq, state, used) -> tuple[MixerOutput, Routing]:
    """Only the heads that are on."""
    if not layer.config.routed:
        return dense(layer, x, seq, state, used)
    routing = None if layer.config.reads_queries else layer.router(x)
    select = lambda kv, routing: SelectedKeys(kv, routing.taken, used, layer.config)
    return _of_softmax_core(layer, x, seq, state, routing, select)


def _of_softmax_core(layer: MoH, x, seq, state, routing: Routing | None, select) -> tuple[MixerOutput, Routing]:
    """The core's heads over `select(kv, routing)`; a router that reads queries routes by those that attend."""
    c, reads = layer.config, layer.core.reads(x, seq, state)
    if routing is None:  # RoPE, which queries have behind them, keeps norms
        routing = norm_routing(take_heads(reads.q, shared_and_routed(c)[1]), c)
    return layer.core.attended(dataclasses.replace(reads, kv=select(reads.kv, routing)), x), routing


def _no_gather(spec: RoutingSpec) -> str | None:
    if spec.core not in _SOFTMAX_CORES:
        return f"gather needs a core of {', '.join(_SOFTMAX_CORES)}"
    if spec.masked:
        return "gather needs a core whose mask is none: it routes over intervals of keys"
    if spec.router == "norm_dense":
        return "router norm_dense needs the outputs of heads that are off"
    return None


def _gather_pays(spec: RoutingSpec) -> bool:
    return spec.routed and spec.taken < spec.heads - spec.always and spec.saves and not spec.split


ROUTED_HEADS = Op(
    "moh",
    RoutingSpec.of,
    {
        "definition": Implementation(dense),
        "dense": Implementation(dense),
        "gather": Implementation(gather, _no_gather, worth=_gather_pays),
    },
    preference=("gather", "dense"),
)


@register("moh")
class MoH(HeadMixer):
    """Mixture of heads: `y = sum_i g_i(x) H_i W_O^i`, some heads shared and of the others the top K of each token.

    The heads H_i are those of the mixer `core`. Its keys and values are all computed; what is routed are its queries.
    """

    Config = MoHConfig
    capabilities = Capabilities(causal=True, bidirectional=True, streaming=True)
    paper = "Jin et al. 2024, MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv:2410.11842"
    extension = (
        "any mixer with heads as the core; shared heads spread among the routed ones; padding is not counted in the "
        "load-balance loss; an epsilon in the norm router's deviation; no head's work is done where it is off (gather)"
    )
    implementations = ROUTED_HEADS.table
    variants = (
        {"shared": 4, "core": {"name": "softmax", "kv_heads": 2, "window": 3}},
        {"shared": 2, "router": "norm", "core": {"name": "gated", "kv_heads": 2, "sinks": True, "soft_cap": 3.0}},
    )
    counted = "dense"  # with it a core computes what it declares

    def __init__(self, config: MoHConfig, *, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config, self.dtype = config, dtype  # heads and their width are the core's
        core = dataclasses.replace(config.core, impl="definition") if config.impl == "definition" else config.core
        self.core = base.build(core, width=width, rngs=rngs, dtype=dtype)
        if not config.reads_queries:
            self.router = Router(config, width, rngs=rngs, dtype=dtype)

    @classmethod
    def sequence_parallel_of(cls, config: MoHConfig) -> str:
        return base.get(config.core.node_name).sequence_parallel_of(config.core)

    def require(self, seq: Sequence, *, causal: bool) -> None:
        super().require(seq, causal=causal)
        self.core.require(seq, causal=causal)

    stack_reads = property(lambda self: self.core.stack_reads)
    embedding_width = property(lambda self: self.core.embedding_width)

    def begin_second(self, length: int, text: jax.Array | None) -> jax.Array:
        return self.core.begin_second(length, text)

    def begin_layer(self, layer: jax.Array, layers: int) -> None:
        self.core.begin_layer(layer, layers)

    def init_shared(self, batch: int, length: int) -> dict[str, jax.Array]:
        return self.core.init_shared(batch, length)

    def unknown(self, seq: Sequence, carried: State) -> jax.Array | None:
        return self.core.unknown(seq, carried)

    def require_stack(self, layers: int) -> None:
        self.core.require_stack(layers)

    def init_carried(self, batch: int, max_length: int, dtype: Any) -> State:
        return self.core.init_carried(batch, max_length, dtype)

    def heads(self, x: jax.Array, seq: Sequence, carried: State = None) -> MixerOutput:
        used = None if seq.segments is None else seq.segments > 0
        out, routing = self._routed_heads(x, seq, carried, used)
        gates = interleaved(routing.shared[..., None], routing.routed[..., None], *shared_and_routed(self.config))
        out = dataclasses.replace(out, y=(out.y * gates).astype(out.y.dtype))
        if carried is not None or routing.p is None:
            return out
        losses, metrics = self._balance(routing, used)
        return dataclasses.replace(out, losses=out.losses | losses, metrics=out.metrics | metrics)

    def combine(self, o_BTHe: jax.Array, x: jax.Array) -> jax.Array:
        return self.core.combine(o_BTHe, x)

    @classmethod
    def flops(cls, config: MoHConfig, width: int, length: int) -> tuple[dict[str, float], float | None]:
        core = base.get(config.core.node_name)
        flops, span = core.flops(config.core, width, length)
        if not config.reads_queries:
            E, shared = config.routed, config.always
            flops["router"] = 2.0 * width * (E + (shared if shared > 1 else 0) + (2 if E and shared else 0))
        if ROUTED_HEADS.pick(RoutingSpec.of(config, length, config.core.head_dim(width)), config.impl) == "gather":
            # Pairs of a query and a head that is off are left out as those are that the mask hides.
            share = (config.always + config.taken) / config.heads
            flops["attention"], span = flops["attention"] * share, span * share
        return flops, span

    # Inside.

    def _routed_heads(
        self, x: jax.Array, seq: Sequence, state: State, used: jax.Array | None
    ) -> tuple[MixerOutput, Routing]:
        """The core's heads, before their weights, and the weights; with `gather` a head that is off is left out."""
        chosen = ROUTED_HEADS.choose(RoutingSpec.of(self.config, x.shape[1], self.core.head_dim), self.config.impl)
        return chosen.run(self, x, seq, state, used)

    def _balance(self, routing: Routing, used: jax.Array | None) -> tuple[dict, dict]:
        c = self.config
        shares = route.load(routing.taken.astype(routing.p.dtype), used)
        metrics = {f"moh_load_{e}": shares[e] for e in range(c.routed)}
        metrics |= {"moh_load_max": jnp.max(shares), "moh_load_min": jnp.min(shares)}
        loss = route.load_balance(routing.p, routing.taken, used)
        metrics["moh_balance"] = jax.lax.stop_gradient(loss)
        if not c.balance:
            return {}, metrics
        return {"moh_balance_loss": c.balance / (1 if c.gate_norm == "code" else c.routed) * loss}, metrics


@functools.cache
def shared_and_routed(config: MoHConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of the core's heads are shared and which are routed, each ascending: the latter's order is the router's.

    Shared heads fill whole groups of those that share a key head, so that the other groups' keys need not be read
    where no head of theirs is on.
    """
    return spread_by_groups(config.heads, getattr(config.core, "kv_heads", None) or config.heads, config.always)


def key_heads_read(config: MoHConfig) -> int:
    """Most key heads that one token's heads read: those of the shared heads, and one for every routed head taken."""
    K = getattr(config.core, "kv_heads", None) or config.heads
    always = len({h * K // config.heads for h in shared_and_routed(config)[0]})
    return always + min(K - always, config.taken)


def _top_k(logits: jax.Array, config: MoHConfig) -> jax.Array:
    if config.impl != "definition":
        return route.top_k_mask(logits, config.taken)
    _, indices = jax.lax.top_k(logits, config.taken)
    return jnp.any(jax.nn.one_hot(indices, config.routed, dtype=bool), axis=-2)
