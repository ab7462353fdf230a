"""The config of a model of attnlab's: config.json's `attnlab` says what the stack is and holds each mixer's knobs."""

from transformers import PretrainedConfig


class AttnlabConfig(PretrainedConfig):
    """Of `modeling_attnlab.py`.

    Args:
      attnlab: the stack's fields, and `mixers`: letter of `pattern` to a mixer's name and knobs.
    """

    model_type = "attnlab"

    def __init__(self, attnlab=None, **kwargs):
        self.attnlab = attnlab or {}
        super().__init__(**kwargs)
