"""Ablations: plans of arms and seeds, their runs, statistics, and one page that reports them."""
