"""Hugging Face causal LMs: loading, the ragged static cache, the self-test, GGUF files."""
