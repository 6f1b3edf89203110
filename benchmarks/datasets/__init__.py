"""Data sets of the benchmarks: constants, and how they are prepared for nnU-Net."""
