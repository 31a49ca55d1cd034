"""The demo: a small synthetic world, its data sets, and its pre-trained base model."""
