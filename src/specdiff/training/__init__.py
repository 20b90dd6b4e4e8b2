"""Corpora, teachers and training: how a drafter is made for a target."""
