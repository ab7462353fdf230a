"""Placement: the mesh, what of an array each device holds, and what devices exchange along an axis."""
