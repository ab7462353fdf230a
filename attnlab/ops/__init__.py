"""Pure maths on arrays: the definition of each op, its XLA form, and the choice of implementation."""

from attnlab.ops.attention import attention
from attnlab.ops.dispatch import recording
from attnlab.ops.masks import Mask, mask_for_extension, mask_from_segments

__all__ = ["Mask", "attention", "mask_for_extension", "mask_from_segments", "recording"]
