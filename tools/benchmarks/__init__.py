"""The measurements of tools/benchmark.py."""
