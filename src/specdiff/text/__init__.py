"""Text: prompts, answers, conversations and infilling."""
