"""Hugging Face causal LMs over a ragged static cache."""
