"""The engine: a process of its own that owns MLX. Token ids in, token ids out; imports no FastAPI."""
