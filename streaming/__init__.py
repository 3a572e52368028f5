"""Bytes between SSD and memory: expert index, reader, banks, store. Knows no HTTP, no attention."""
