"""Figures and what they share: colours, style, curves, heat maps."""
