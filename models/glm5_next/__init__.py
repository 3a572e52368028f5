"""GLM-5.3-Flash (`glm5_next`), its language model: linear attention, pooled sparse attention, mixed streams."""
