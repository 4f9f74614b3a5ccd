"""C++ kernels for CPUs (csrc/cpu), compiled for several instruction sets, chosen at load."""
