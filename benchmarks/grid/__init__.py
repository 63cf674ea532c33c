"""The grid: our layer beside Keras's over the shapes that people train with.

`cells` says what is measured, `run` has it measured in processes of their own, a line a
cell is kept at once, and `pages` tells what was found. `thresholds` compares our own
tiles with whole scores.
"""
