"""Ablations: plans of runs that differ in what is asked about, their runner, and what their results say."""
