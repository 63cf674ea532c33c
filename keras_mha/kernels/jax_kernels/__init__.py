"""Kernels that JAX ships for some kind of device.

Each module here offers `refusal(call)`, and `forward` and `backward` as `blockwise` has
them.
"""
