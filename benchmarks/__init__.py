"""What ki_ds takes, beside what else one could run: `python -m benchmarks.NAME --help`."""
