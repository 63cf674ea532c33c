"""Kernels that JAX ships for kinds of devices, each as tiles are called."""
