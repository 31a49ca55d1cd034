"""What a served model is asked besides its answers: its models, prompts and request fields."""
