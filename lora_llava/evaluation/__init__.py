"""Evaluation: generated answers to scores."""
