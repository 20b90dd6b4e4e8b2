"""Training: recipes, tasks and the trainer that turn a corpus into a drafter."""
