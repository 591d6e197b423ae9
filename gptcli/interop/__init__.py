"""Weights and files of other programs: Hugging Face folders, nanoGPT's checkpoints, GGUF."""
