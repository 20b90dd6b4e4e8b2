"""Compiled decoder layers: the same numbers in fewer passes over memory and fewer Python calls."""
