"""The GLM dialect: chat template, tokenizer, reasoning. Text and ids; imports no MLX."""
