"""How bytes leave the disk: files opened past the page cache, a pool of reading threads, and their rate."""
