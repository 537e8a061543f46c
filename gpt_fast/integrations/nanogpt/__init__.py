"""Checkpoints of nanoGPT, its relatives and llm.c: weights to this library's language model and back to nanoGPT."""
