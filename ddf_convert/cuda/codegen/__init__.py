"""From Numba-CUDA kernels to launched machine code."""
