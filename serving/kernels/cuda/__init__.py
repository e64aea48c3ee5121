"""2:4 kernels for NVIDIA GPUs."""
