"""Timings beside named peers. Each module is a command: `python -m benchmarks.NAME`."""
