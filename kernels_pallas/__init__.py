"""Pallas kernels of the hot paths: arrays and blocks only, nothing of Flax or configs. One folder per kernel."""
