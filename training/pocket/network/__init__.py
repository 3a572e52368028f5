"""GLM-5.2's architecture in torch, in a size that trains on one GPU."""
