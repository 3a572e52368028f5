"""Bytes between SSD and memory: index, reader, banks, policy, store. Knows no HTTP and no attention."""
