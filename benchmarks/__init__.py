"""Measurements. Each module prints one table; benchmarks/notes.md keeps what was seen, and where."""
