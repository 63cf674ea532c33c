"""Our layer beside its peers: time and memory, kept as JSON and drawn as PNG.

python -m benchmarks                  # measure everything, draw, write the README
python -m benchmarks --backend jax    # measure one backend again
python -m benchmarks --only decoding  # measure this again, keep the rest
python -m benchmarks --no-measuring   # draw and write again from what is kept
"""
