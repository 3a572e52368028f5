"""Who talks to whom, and when: the engine process, the GLM dialect, the HTTP API, the command line."""
