"""Chat templates: found beside a checkpoint, compiled, and rendered with what transformers offers."""
