"""The training run: batches, optimisers, live weights, the tokenizer."""
