"""Corpora: records in, token rows out."""
