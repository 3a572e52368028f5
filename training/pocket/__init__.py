"""How Pocket is made: data, network, training, files and evaluation."""
