"""The language model that reads a context: cross-attention to items, each a few ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from attnlab import batch as batch_lib
from attnlab import mixers
from attnlab.errors import ConfigError
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.models.objective import Batch, register

CONTEXT = "context"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderConfig(LanguageModelConfig):
    """A language model one of whose mixers has `source` = context."""

    context_names: ClassVar[tuple[str, ...]] = (CONTEXT,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(mixer, "source", None) == CONTEXT for mixer in self.mixers.values()):
            able = [name for name in mixers.names() if mixers.get(name).capabilities.cross]
            raise ConfigError(
                f"model.mixers: no mixer has source = {CONTEXT!r}, so nothing would read the context; allowed: one or "
                f"more that have; mixers that can: {', '.join(able)}"
            )

    @property
    def described(self) -> str:
        return "a language model that reads a context"


@register("reader")
class Reader(LanguageModel):
    """A language model whose batches have a `context`, int32 [B, S, C]: S items of C ids, embedded as their sum.

    `context_node` [B, S], where it is there, says what items belong to, for masks that read it.
    """

    Config = ReaderConfig
    decodes = False

    @classmethod
    def batch_spec(cls, config: ReaderConfig, length: int) -> Mapping[str, Any]:
        items = batch_lib.Field((None, None), "int32", (None, None), ids=config.vocab, said="model.vocab")
        node = batch_lib.Field((None,), "int32", (None,), optional=True)
        return {**super().batch_spec(config, length), CONTEXT: items, f"{CONTEXT}_node": node}

    def sequence(self, batch: Batch) -> mixers.Sequence:
        rows = jnp.sum(self.embed(batch[CONTEXT]), axis=2)
        context = mixers.Context(rows, node=batch.get(f"{CONTEXT}_node"))
        return dataclasses.replace(super().sequence(batch), contexts={CONTEXT: context})
