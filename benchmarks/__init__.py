"""Time and memory of variants, measured side by side in one run: `python -m benchmarks --help`."""
