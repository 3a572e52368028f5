"""The rehearsal: the product's own commands, from plan to shutdown, on a checkpoint of GLM-5.2's shapes."""
