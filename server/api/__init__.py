"""HTTP: validates, renders, tokenises, streams. Imports no MLX."""
