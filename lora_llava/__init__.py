"""Parameter-efficient fine-tuning of LLaVA: LoRA and QLoRA on one consumer GPU."""

__version__ = "0.1.0"
