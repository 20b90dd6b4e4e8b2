"""Drafters: whatever proposes tokens. One strategy, one file."""
