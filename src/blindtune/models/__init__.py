"""Hugging Face decoders seen without their classes: loading, families, blocks and surgery."""
