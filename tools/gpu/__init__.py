"""What tools/check_gpu.py checks."""
