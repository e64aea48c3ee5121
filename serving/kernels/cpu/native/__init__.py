"""C++ sources of the processor's kernels, and the library built of them."""
