"""Kernels that JAX brings for devices other than a CPU, each in a module of its own."""
