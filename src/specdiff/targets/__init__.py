"""Targets: the model whose distribution is preserved."""
