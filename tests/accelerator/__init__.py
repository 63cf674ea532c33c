"""What only a GPU or a TPU can show; skipped where there is none.

    make test-accelerator                  under every backend that is installed
    make test-accelerator BACKEND=torch    under one

`KERAS_MHA_ACCELERATOR=cpu` runs on a CPU what can be run there: that the tests
themselves are right is seen so, and of a device nothing.
"""
