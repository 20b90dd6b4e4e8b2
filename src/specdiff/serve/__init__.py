"""A server with the API of OpenAI: continuous batching over one target and one drafter."""
