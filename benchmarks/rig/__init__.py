"""What benchmarks share: checkpoints, simulated disks and devices, recorded routings, drivers of the loop."""
