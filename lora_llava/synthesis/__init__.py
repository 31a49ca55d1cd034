"""Conversations about images from captions and boxes: GPT-assisted data, as LLaVA's paper made its own."""
