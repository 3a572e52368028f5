"""From a checked request to token ids, and what the server remembers of its own answers for that."""
