"""One model on several machines: rank 0 has the loop, the other ranks repeat its calls of the model."""
