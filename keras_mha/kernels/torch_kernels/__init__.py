"""The kernels that PyTorch ships, a module each, and what hands calls to them."""
