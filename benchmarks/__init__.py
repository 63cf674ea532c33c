"""Our layer beside its peers: time and memory, kept as JSON and drawn as PNG.

python -m benchmarks                  # measure everything, draw, write the README
python -m benchmarks --backend jax    # measure one backend again
python -m benchmarks --only decoding  # measure this again, keep the rest
python -m benchmarks --only grid --case 'causal 1x16 '  # these cells again
python -m benchmarks --again          # begin anew, where a stopped run would go on
python -m benchmarks --no-measuring   # draw and write again from what is kept
"""
