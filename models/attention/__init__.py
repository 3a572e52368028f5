"""Multi-head latent attention with sparse selection: indexer, selected keys, rotation, and the KV cache."""
