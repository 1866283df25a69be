"""The toolchain of the CUDA kernels: unrolls them, compiles them to PTX, launches or simulates them."""
