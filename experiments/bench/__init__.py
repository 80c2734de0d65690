"""Measurements of cost: what a curvature step and a plain step take, beside what else does the same work."""
