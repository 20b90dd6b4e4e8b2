"""Discrete diffusion: noise schedules, forward processes, and their reversal."""
