"""Saved KV as blocks: their file format, the folder on disk, the memory tier, and the thread that writes."""
