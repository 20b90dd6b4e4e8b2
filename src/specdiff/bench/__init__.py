"""Speed, measured as ratios: every baseline in one process, taking turns on the same prompts.

suites -> plan (cells) -> runner (turns, tuning, cost curves; a generator of events) -> journal (what an interrupt keeps) -> results.
"""
