"""The token classifier: the language model's parts, every position sees the whole row and tells its own class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from attnlab import batch as batch_lib
from attnlab.models.lm import LanguageModel, LanguageModelConfig
from attnlab.models.objective import register


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(LanguageModelConfig):
    """An encoder of tokens; its mixers have `causal` = false. Classes are ids of the vocabulary."""

    causal: ClassVar[bool] = False

    @property
    def described(self) -> str:
        return "a token classifier"


@register("classifier")
class Classifier(LanguageModel):
    """Embedding, bidirectional transformer, norm, output projection; cross-entropy where the weights say."""

    Config = ClassifierConfig
    decodes = False

    @classmethod
    def batch_spec(cls, config: ClassifierConfig, length: int) -> Mapping[str, Any]:
        spec = dict(super().batch_spec(config, length))
        spec["targets"] = dataclasses.replace(spec["targets"], about=batch_lib.OWN)
        return spec | {"weights": dataclasses.replace(spec["weights"], optional=False)}
