"""The DDF operator as Numba kernels for the CPU."""
