"""What the model computes: GLM-MoE-DSA in MLX, its caches and its loading. Knows no threads and no HTTP."""
