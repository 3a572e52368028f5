"""GLM-5.3-Flash (`glm5_next`), its language model: linear and pooled sparse attention, mixed streams."""
