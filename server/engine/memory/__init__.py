"""The memory plan while the engine runs: what is used, what the system has left, how banks follow."""
