"""2:4 kernels for CPUs."""
