"""Targets: the model whose law is preserved."""
