"""What the server does on a GPU at GLM-5.2's true shapes. Figures are in docs/measurements.md."""
