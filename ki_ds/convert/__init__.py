"""Weights of others, and of finished runs, as Hugging Face folders that were checked against their source."""
