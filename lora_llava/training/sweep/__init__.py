"""Sweeps: a grid of recipes, run one after the other, and the choice among them."""
