"""The microbenchmark: the loss by every method that can run here, checked first, then timed in one interleaved run.

python -m benchmarks --device cpu --n 256 --d 8192 --peers eager,compile,fused
python -m benchmarks --preset small --json small.json --compare old.json
python -m benchmarks profile --n 256 --d 8192

presets.py    shapes that have a name
peers.py      the methods: name -> callable(z_a, z_b) -> loss
inputs.py     two views, and enough sets of them to exceed the cache
accuracy.py   the float64 truth, and who is right
timing.py     rounds in which every method runs once in every mode, and their statistics
memory.py     peak memory beyond inputs and gradients, measured
machine.py    what it ran on: hardware, versions, commit, the machine's bandwidth and matrix-product rate
run.py        one shape, from inputs to results
results.py    a run as JSON and CSV
report.py     a run as tables
pictures.py   a run as a picture
compare.py    what regressed from one run to another
readme.py     the tables and pictures of README and docs, from results/
profile.py    where one call's time goes
verify.py     everything that needs a GPU, in nine minutes: precompile.py, gpu_tests.py (with telling.py), and more
workers.py    a pool of processes that may crash or hang
__main__.py   the command line

kernels.py, precompile.py, gpu_tests.py, network.py and scaling.py stand on their own, each with a --help.
"""
