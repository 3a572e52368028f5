"""Which sequences run next, in which pass, and how long: owned by the engine's thread."""
