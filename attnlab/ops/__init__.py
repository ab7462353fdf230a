"""Pure maths on arrays: the definition of each op, its XLA form, and the choice of implementation."""

from attnlab.ops.attention import attention
from attnlab.ops.dispatch import choices, clear_choices
from attnlab.ops.masks import Mask, mask_for_extension, mask_from_segments

__all__ = ["Mask", "attention", "choices", "clear_choices", "mask_for_extension", "mask_from_segments"]
