"""Everything hostile that was thought of, against a real server with Pocket: `python -m benchmarks.siege`."""
