"""C++ kernels for CPUs (csrc/cpu), compiled for several instruction sets and chosen at first use."""
