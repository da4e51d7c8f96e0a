"""The microbenchmark: the loss by every method that can run here, checked first, then timed in one interleaved run.

python -m benchmarks --device cpu --n 256 --d 8192 --dtype float32 --peers eager,compile,fused
python -m benchmarks --grid --json grid.json

peers.py      the methods: name -> callable(z_a, z_b) -> loss
accuracy.py   inputs, the float64 truth, and who is right
timing.py     rounds in which every method runs once, and their statistics
memory.py     peak memory beyond inputs and gradients, measured
machine.py    what it ran on: hardware, versions, commit, the machine's matrix-product rate
run.py        one shape, from inputs to results
report.py     tables and JSON
__main__.py   the command line
"""
