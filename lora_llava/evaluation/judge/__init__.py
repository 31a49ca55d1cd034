"""Scores from a judge model such as GPT-4, as in LLaVA-Bench."""

from lora_llava.evaluation.judge.review import parse_scores

__all__ = ["parse_scores"]
