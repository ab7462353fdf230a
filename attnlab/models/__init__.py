"""Models: stacks of blocks around mixers."""
