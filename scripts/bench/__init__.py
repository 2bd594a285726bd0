"""Benchmarks of single stages, and what scripts/benchmark.py needs: other hardware, and the PyTorch reference."""
