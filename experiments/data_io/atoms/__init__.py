"""Molecules and crystals: arrays, databases, neighbour lists, splits."""
