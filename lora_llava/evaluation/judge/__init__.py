"""Scoring answers by a judge, such as GPT-4: LLaVA-Bench's way."""

from lora_llava.evaluation.judge.review import parse_scores

__all__ = ["parse_scores"]
