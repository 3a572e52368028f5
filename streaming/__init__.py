"""Bytes between SSD and memory: expert index, reader, banks, policy, store. Knows no HTTP and no attention."""
