"""loft-hpc: lottery tickets in convolutional networks, found by filter-wise training over MPI ranks."""

__version__ = "0.1.0"
