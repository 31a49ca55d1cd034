"""Rows that need no image, rows with a surprising answer, and near-duplicate images."""
