"""The prefix cache: looks up saved KV and restores it into a sequence's cache."""
