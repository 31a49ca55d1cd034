"""Export to GGUF, llama.cpp's format: the language model, and the tower with its projector as `mmproj`."""
