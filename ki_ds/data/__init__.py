"""Corpora, tokenizers, token stores and batches: from raw text to what a training step reads."""
