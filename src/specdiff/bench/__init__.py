"""Benchmark: speed ratios of all baselines, interleaved in one process on the same prompts.

suites -> settings (parts, baselines, cells) -> runner (turns, tuning, cost curves; a generator of
events) -> journal (survives an interrupt) -> results -> table, report.
"""
