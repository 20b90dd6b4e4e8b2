"""The loop inside transformers' `generate`."""
