"""Drafter networks: the SEDD diffusion transformer and small causal LMs."""
