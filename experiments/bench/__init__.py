"""Measurements of cost: what a curvature step and a plain step take, compared with what else does the same work."""
