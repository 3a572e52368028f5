"""What the server does on a GPU at GLM-5.2's true shapes. How to run them there: benchmarks/gpu/README.md."""
