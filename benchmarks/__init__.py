"""Measurements. Each module prints one table; docs/measurements.md keeps what was seen, and where."""
