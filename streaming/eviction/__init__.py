"""Which resident expert gives up its slot: the policies, and the contest that chooses between them."""
