"""The language model: tokens in, logits or losses out."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import batch as batch_lib
from attnlab import config as config_lib
from attnlab import mixers
from attnlab.errors import ConfigError, UserError
from attnlab.mixers.parts import Linear, param_dtype
from attnlab.mixers.roles import Role, drawn, normal
from attnlab.models.cost import ModelCost, stack_cost
from attnlab.models.distillation import MATCH, Matching, match_layers
from attnlab.models.layer_inputs import reads
from attnlab.models.objective import Batch, Objective, Sums, register
from attnlab.models.perplexity import Perplexity
from attnlab.models.scores import Scores, sums_of_scores
from attnlab.models.transformer import StackConfig, Transformer, extend
from attnlab.ops.cross_entropy import capped, cross_entropy, likeliest
from attnlab.ops.kl_divergence import kl_divergence
from attnlab.ops.layout import Layout
from attnlab.ops.linear import project
from attnlab.ops.position_codes import box_code, in_common_boxes, is_box, plane_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(StackConfig):
    """A decoder-only language model.

    Attributes:
      vocab: rows of the embedding; at least the tokenizer's vocabulary.
      tied: whether the output projection is the embedding.
      embedding_scale: factor on what is looked up in the embedding; Gemma's is sqrt(D).
      decoupled: whether mixers that read the embedding (`stack_reads`: ablated with weights=static) find in its place
        what is looked up in a table of their own, as wide as they say (`Mixer.embedding_width`; Feng et al. 2024, DARE,
        arXiv:2410.02604, read for language models).
      cell_code: base of the code of rows and columns (`attnlab.ops.position_codes.plane_code`) that is added to the
        embedding of an image's cells, wherever the data's `layout` says that there is one; none: nothing is added.
      cell_box: side of a common box to which the code moves the cells of each subject (the data's `node` above 0) of an
        image (`attnlab.ops.position_codes.in_common_boxes`); none: cells are where they are.
      box_code: base of the code of boxes (`attnlab.ops.position_codes.box_code`) that, through an MLP with a GELU,
        is added to the embedding of objects, wherever the data's `boxes` say that there is one; none: nothing is added.
      logit_cap: c in `c tanh(logits / c)` of the output; none: no cap (Gemma Team 2024, Gemma 2, section 2).
    """

    vocab: int
    tied: bool = False
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    decoupled: bool = False
    cell_code: float | None = None
    cell_box: float | None = None
    box_code: float | None = None

    def __post_init__(self) -> None:
        need = config_lib.require
        need(self.vocab >= 1, "model.vocab", self.vocab, "1 or more")
        need(self.embedding_scale > 0, "model.embedding_scale", self.embedding_scale, "above 0")
        if self.cell_code is not None:
            need(self.cell_code > 1, "model.cell_code", self.cell_code, "above 1, or none")
            need(self.width % 4 == 0, "model.width", self.width, "a multiple of 4 beside model.cell_code")
        if self.cell_box is not None:
            need(self.cell_box > 0, "model.cell_box", self.cell_box, "above 0, or none")
            need(self.cell_code is not None, "model.cell_box", self.cell_box, "none where model.cell_code is")
        if self.box_code is not None:
            need(self.box_code > 1, "model.box_code", self.box_code, "above 1, or none")
            need(self.width % 8 == 0, "model.width", self.width, "a multiple of 8 beside model.box_code")
        need(self.logit_cap is None or self.logit_cap > 0, "model.logit_cap", self.logit_cap, "above 0, or none")
        super().__post_init__()
        if (ids := self.fixed_text) is not None:
            need(
                ids.max() < self.vocab,
                "model.vocab",
                self.vocab,
                f"{ids.max() + 1} or more, for the ids of a mixer's text",
            )
        if self.decoupled:
            some, readers = len(self._widths_read) > 0, "as ablated does with weights=static"
            need(some, "model.decoupled", True, f"false where no mixer reads the embedding, {readers}")
            widths = sorted(self._widths_read)
            need(len(widths) == 1, "embedding_width", widths, "one for all mixers that read the embedding")

    @property
    def decoupled_width(self) -> int | None:
        """Of the table that mixers read in the embedding's place; None: there is none."""
        return next(iter(self._widths_read)) if self.decoupled else None

    @functools.cached_property
    def _widths_read(self) -> frozenset[int]:
        """Widths of the embedding by the mixers that read it."""
        blank = lambda mixer: mixers.build(mixer, width=self.width, rngs=nnx.Rngs(0))
        stack = [nnx.eval_shape(lambda m=m: blank(m)) for m in self.mixers.values()]
        return frozenset(m.embedding_width or self.width for m in stack if "embedding" in m.stack_reads)

    @property
    def fixed_text(self) -> np.ndarray | None:
        """Ids [n] of the text whose embeddings mixers find in `Sequence.text`; None: no mixer reads one."""
        paths = {str(path) for mixer in self.mixers.values() if (path := mixer.text)}
        config_lib.require(len(paths) < 2, "model.mixers", sorted(paths), "one text for all mixers that read one")
        return _ids_of(paths.pop()) if paths else None

    @property
    def described(self) -> str:
        return "a language model"


@functools.cache
def _ids_of(path: str) -> np.ndarray:
    """The ids of a fixed text, int32 [n]; read once, so that a run has one whatever happens to the file."""
    try:
        ids = np.load(pathlib.Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"text = {path!r} of a mixer cannot be read: {error}") from None
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise ConfigError(f"text = {path!r} of a mixer holds {ids.dtype} {ids.shape}; allowed: ids, int [n], 0 or more")
    return ids.astype(np.int32)


def at_step(seq: mixers.Sequence, options: Mapping[str, Any]) -> mixers.Sequence:
    """The sequence at the training step that a loss's options say, if they do."""
    return dataclasses.replace(seq, step=options.get("step"))


def _places(batch: Batch) -> mixers.Sequence:
    """Where the positions of a batch stand."""
    layout = Layout.of_columns(batch["layout"]) if "layout" in batch else None
    told = {name: batch.get(name) for name in ("node", "boxes")}
    return mixers.Sequence(batch["positions"], batch["segments"], layout=layout, **told)


def _cuts_an_image(layout: Layout) -> jax.Array:
    """Whether the first position is of an image and not its first cell, or the last one and not its last, bool [B]."""
    kind, cell, size = map(jnp.asarray, (layout.kind, layout.cell, layout.size))
    inside = lambda at, edge: (kind[:, at] == batch_lib.VISUAL) & jnp.any(cell[:, at] != edge, axis=-1)
    return inside(0, 0) | inside(-1, size[:, -1] - 1)


@register("lm")
class LanguageModel(Objective):
    """Embedding, transformer, norm, output projection.

    Args:
      config: checked at construction.
      rngs: stream `params`.
    """

    Config = LanguageModelConfig
    options = ("z_loss", "loss_chunk", "loss_impl")
    distills = MATCH
    decodes = True

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = config.compute_dtype
        self.embedding = self.make_embedding(config, rngs)
        if config.decoupled:
            args = ((config.vocab, config.decoupled_width), param_dtype(dtype), config.decoupled_width**-0.5)
            self.attention_embedding = drawn(rngs, normal, *args, axes=("vocab", "embed"), role=Role.EMBEDDING)
        if config.box_code is not None:
            make = lambda *axes: Linear(config.width, config.width, axes, rngs=rngs, dtype=dtype, bias=True)
            self.box_in, self.box_out = make("embed", "mlp"), make("mlp", "embed")
        self.transformer = Transformer(config, rngs=rngs)
        self.norm = config.make_norm()
        if not config.tied:
            axes = ("embed", "vocab")
            self.head = Linear(config.width, config.vocab, axes, rngs=rngs, dtype=dtype, role=Role.OUTPUT)

    @property
    def counts(self) -> bool:
        return reads(self.transformer.periods, "step")

    @staticmethod
    def make_embedding(config: Any, rngs: nnx.Rngs) -> Any:
        """What `embedded` reads."""
        args = ((config.vocab, config.width), param_dtype(config.compute_dtype), config.width**-0.5)
        return drawn(rngs, normal, *args, axes=("vocab", "embed"), role=Role.EMBEDDING)

    @classmethod
    def batch_spec(cls, config: LanguageModelConfig, length: int) -> batch_lib.Spec:
        """`weights` say what counts; without them everything does but padding. `slices`: see `Scores`. `layout`
        (`Layout.of_columns`) and `node` are for masks that read them, for `cell_code` and for `cell_box`, `boxes` for
        `box_code`."""
        if (ids := config.fixed_text) is not None:
            config_lib.require(
                length <= len(ids), "data.length", length, f"at most {len(ids)}, the ids of a mixer's text"
            )
        plain = batch_lib.Field((length,), "int32", ("seq",))
        ids = dataclasses.replace(plain, ids=config.vocab, said="model.vocab")
        targets = dataclasses.replace(ids, about=batch_lib.NEXT)
        weights = batch_lib.Field((length,), "float32", ("seq",), optional=True)
        slices = batch_lib.Field((length, None), "int8", ("seq", None), optional=True)
        unread = config.cell_code is None
        layout = batch_lib.Field((length, batch_lib.LAYOUT), "int32", ("seq", None), optional=unread)
        arrays = {"tokens": ids, "targets": targets, "segments": plain, "positions": plain}
        arrays |= {"weights": weights, "slices": slices, "layout": layout}
        boxes = batch_lib.Field((length, 4), "float32", ("seq", None), optional=config.box_code is None)
        return arrays | {"node": dataclasses.replace(plain, optional=config.cell_box is None), "boxes": boxes}

    def loss(self, batch: Batch, key: jax.Array | None, options: Mapping[str, Any]) -> Sums:
        """Cross-entropy, a mean over tokens by their weights.

        Options: `z_loss`, coefficient of the mean squared log-partition (Chowdhery et al. 2022, PaLM, section 5), and
        `loss_chunk` and `loss_impl`, of `attnlab.ops.cross_entropy.cross_entropy`.
        """
        chunk, impl, step = options["loss_chunk"], options["loss_impl"], options.get("step")
        nll, lse, out = self.token_losses(batch, key, chunk=chunk, impl=impl, step=step)
        losses = {"loss": jnp.sum(nll)}
        if options["z_loss"]:
            losses["z_loss"] = options["z_loss"] * jnp.sum(lse * lse)
        tokens = jnp.sum(batch["segments"] > 0).astype(nll.dtype)
        return Sums.of(losses, out, weight=jnp.sum(self.weights(batch)), tokens=tokens)

    def distill(
        self, teacher: Any, batch: Batch, key: jax.Array | None, options: Mapping[str, Any], matching: Matching
    ) -> Sums:
        """What `Matching` says; its parts are metrics whose names begin with `distill_`: each layer's error, or the
        divergence times T^2 and, where it counts, cross-entropy.

        Of logits it is a mean over tokens by their weights, of layers over all that are not padding: what a position
        writes others read, be its own prediction counted or not.

        Options as of `loss`, without `z_loss`; `loss_impl` is of both `cross_entropy` and `kl_divergence`.
        """
        weights = self.weights(batch)
        if matching.match == "layers":
            weights = (batch["segments"] > 0).astype(weights.dtype)
            read, seq = teacher.embedded(batch), at_step(teacher.sequence(batch), options)
            errors, out = match_layers(self.transformer, teacher.transformer, read, seq, weights, matching, key)
            parts = {f"distill_layer_{i}": error for i, error in errors.items()}
            loss = sum(errors.values()) / len(errors)
        else:
            parts, out = self._match_logits(teacher, batch, weights, key, options, matching)
            a = matching.cross_entropy
            loss = (1 - a) * parts["distill_kl"] + (a * parts["distill_cross_entropy"] if a else 0)
        tokens = jnp.sum(batch["segments"] > 0).astype(weights.dtype)
        sums = Sums.of({"loss": loss}, out, weight=jnp.sum(weights), tokens=tokens)
        return dataclasses.replace(sums, metrics=sums.metrics | parts)

    def _match_logits(
        self, teacher: Any, batch: Batch, weights: jax.Array, key: Any, options: Mapping[str, Any], matching: Matching
    ) -> tuple[dict[str, jax.Array], mixers.MixerOutput]:
        theirs = jax.lax.stop_gradient(teacher.encoded(teacher.embedded(batch), teacher.sequence(batch), None).y)
        out = self.encoded(self.embedded(batch), at_step(self.sequence(batch), options), key)
        T, chunk, impl = matching.temperature, options["loss_chunk"], options["loss_impl"]
        caps = {"cap": self.config.logit_cap, "teacher_cap": teacher.config.logit_cap}
        both = out.y, self.output_kernel(), theirs, teacher.output_kernel()
        parts = {"distill_kl": T * T * jnp.sum(kl_divergence(*both, weights, T, chunk, impl, **caps))}
        if matching.cross_entropy:
            args = out.y, self.output_kernel(), batch["targets"], weights
            nll, _ = cross_entropy(*args, chunk, impl, cap=self.config.logit_cap)
            parts["distill_cross_entropy"] = jnp.sum(nll)
        return parts, out

    def evaluate(self, batch: Batch, options: Mapping[str, Any]) -> dict[str, jax.Array]:
        """`nll` and `tokens` [T] by position in the row's document; with weights, also what `Scores` is made of."""
        nll, _, out = self.token_losses(batch, chunk=options["loss_chunk"], impl=options["loss_impl"])
        weights = self.weights(batch)
        by_position = lambda values: jnp.zeros((nll.shape[1],), nll.dtype).at[batch["positions"]].add(values)
        sums = {"nll": by_position(nll), "tokens": by_position(weights)}
        if "weights" not in batch:
            return sums
        right = likeliest(out.y, self.output_kernel(), options["loss_chunk"]) == batch["targets"]
        sums |= sums_of_scores(nll, weights, right, batch.get("slices"))
        return sums | {"correct": by_position(right * weights)}

    @classmethod
    def summarize(cls, sums: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Perplexity | Scores:
        if "correct" in sums:
            return Scores(dict(sums), facts)
        return Perplexity(sums["nll"], sums["tokens"], facts["bytes"])

    @classmethod
    def cost(cls, config: LanguageModelConfig, length: int) -> ModelCost:
        stack, embedding = stack_cost(config, length), config.vocab * config.width
        tables = embedding * (1 if config.tied else 2) + config.vocab * (config.decoupled_width or 0)
        parameters = stack.parameters + tables + config.norm_parameters
        flops = {"mlp": stack.flops["mlp"], "head": 2.0 * embedding} | stack.flops
        if config.box_code is not None:
            parameters += 2 * config.width * (config.width + 1)
            flops["boxes"] = 4.0 * config.width**2
        return dataclasses.replace(stack, parameters=parameters, embedding_parameters=embedding, flops=flops)

    def hidden(self, tokens_BT: jax.Array, seq: mixers.Sequence, key: jax.Array | None = None) -> mixers.MixerOutput:
        """Normalised final hidden states [B, T, D] of whole sequences; `key` turns dropout on."""
        return self.encoded(self.embed(tokens_BT, seq), self.decoupled(tokens_BT, seq), key)

    def encoded(self, x: jax.Array, seq: mixers.Sequence, key: jax.Array | None) -> mixers.MixerOutput:
        """`hidden` of what goes into the stack, x [B, T, D]."""
        out = self.transformer(x, seq, key)
        return mixers.MixerOutput(self.norm(out.y), losses=out.losses, metrics=out.metrics)

    def embedded(self, batch: Batch) -> jax.Array:
        """[B, T, D], what goes into the stack."""
        return self.embed(batch["tokens"], _places(batch))

    def sequence(self, batch: Batch) -> mixers.Sequence:
        """Where its positions stand, and the contexts that they read."""
        return self.decoupled(batch.get("tokens"), _places(batch))

    def decoupled(self, tokens_BT: jax.Array | None, seq: mixers.Sequence) -> mixers.Sequence:
        """With what mixers that read the embedding find in their own table, where they have one, and a fixed text's."""
        if (ids := self.config.fixed_text) is not None:
            seq = dataclasses.replace(seq, text=self.embed(jnp.asarray(ids)))
        if not self.config.decoupled:
            return seq
        e = jnp.take(self.attention_embedding[...], tokens_BT, axis=0).astype(self.config.compute_dtype)
        return dataclasses.replace(seq, embedding=e)

    def weights(self, batch: Batch) -> jax.Array:
        """[B, T], how much each position counts."""
        used = (batch["segments"] > 0).astype(param_dtype(self.config.compute_dtype))
        return used * batch["weights"] if "weights" in batch else used

    def token_losses(
        self,
        batch: Batch,
        key: jax.Array | None = None,
        *,
        chunk: int = 8192,
        impl: str = "auto",
        step: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, mixers.MixerOutput]:
        """Losses of a batch of packed documents.

        Args:
          batch: arrays of `batch_spec`; segment 0 is padding.
          key: turns dropout on.
          chunk, impl: of `attnlab.ops.cross_entropy.cross_entropy`.
          step: `Sequence.step`.

        Returns:
          nll_BT in nats, lse_BT (both by their weights: 0 on padding), and the output of `hidden`.
        """
        seq = dataclasses.replace(self.sequence(batch), step=step)
        out = self.encoded(self.embedded(batch), seq, key)
        args = out.y, self.output_kernel(), batch["targets"], self.weights(batch)
        nll, lse = cross_entropy(*args, chunk, impl, cap=self.config.logit_cap)
        return nll, lse, out

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., V] fp32 logits of normalised hidden states [..., D]."""
        kernel = self.output_kernel().astype(hidden.dtype)
        return capped(project(hidden, kernel, param_dtype(hidden.dtype)), self.config.logit_cap)

    def embed(self, tokens_BT: jax.Array, seq: mixers.Sequence | None = None) -> jax.Array:
        """[B, T, D] in the compute type; the cells of a layout's images and objects with their codes, if they have any.

        Raises UserError where there are cells to be moved to a common box, and no `node` that says of what they are.
        """
        c = self.config
        x = jnp.take(self.embedding[...], tokens_BT, axis=0).astype(c.compute_dtype)
        x = x if c.embedding_scale == 1 else x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.cell_code is not None and seq is not None and seq.layout is not None:
            x += self._code_of_cells(seq.layout, seq.node).astype(x.dtype)
        if c.box_code is not None and seq is not None and seq.boxes is not None:
            boxes = jnp.asarray(seq.boxes, param_dtype(c.compute_dtype))
            code = self.box_out(jax.nn.gelu(self.box_in(box_code(boxes, c.width, c.box_code)), approximate=False))
            x += jnp.where(is_box(boxes)[..., None], code, 0).astype(x.dtype)
        return x

    def _code_of_cells(self, layout: Layout, node_BT: jax.Array | None) -> jax.Array:
        """[B, T, D], 0 of what is no cell."""
        c = self.config
        cells = jnp.asarray(layout.cell).astype(param_dtype(c.compute_dtype))
        visual = jnp.asarray(layout.kind) == batch_lib.VISUAL
        if c.cell_box is not None:
            if node_BT is None:
                raise UserError("model.cell_box is set, and Sequence.node is not given beside Sequence.layout")
            node = jnp.asarray(node_BT)
            cells = in_common_boxes(cells, jnp.asarray(layout.span)[..., 0], node, visual & (node > 0), c.cell_box)
        code = plane_code(cells[..., 0], cells[..., 1], c.width, c.cell_code)
        return jnp.where(visual[..., None], code, 0)

    def output_kernel(self) -> jax.Array:
        """[D, V]."""
        return self.embedding[...].T if self.config.tied else self.head.kernel[...]

    def init_state(self, batch: int, max_length: int) -> Any:
        """Streaming state with room for `max_length` positions; UserError where a text that mixers read is shorter."""
        ids = self.config.fixed_text
        if ids is not None and max_length > len(ids):
            raise UserError(f"{max_length} positions; allowed: at most {len(ids)}, the ids of a mixer's text")
        text = None if ids is None else self.embed(jnp.asarray(ids))
        return self.transformer.init_state(batch, max_length, text=text)

    def extend(
        self, periods: list[Any], tokens_BT: jax.Array, seq: mixers.Sequence, state: Any
    ) -> tuple[jax.Array, Any]:
        """Hidden states [B, T, D] of the next positions and the new state; `periods` is `transformer.unstacked()`.

        With `cell_box` a piece that begins or ends inside an image gives NaN, as jit can raise nothing: boxes are those
        of all its cells.
        """
        x = self.embed(tokens_BT, seq)
        if self.config.cell_box is not None and seq.layout is not None:
            x = jnp.where(_cuts_an_image(seq.layout)[:, None, None], jnp.nan, x)
        x, state = extend(periods, x, self.decoupled(tokens_BT, seq), state)
        return self.norm(x), state
