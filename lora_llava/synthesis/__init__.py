"""Data generation: conversations about images, written from captions and boxes (LLaVA, arXiv 2304.08485)."""
