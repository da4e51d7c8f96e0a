"""Whether an installed wheel is whole: run by try_wheel.sh, outside of the sources, without nvcc."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import barlow_fused
from barlow_fused import backends, nvcc

assert Path(barlow_fused.__file__).is_relative_to(sys.prefix), barlow_fused.__file__
assert nvcc.find() is None, f"there is an nvcc here: {nvcc.find()}"

cuda = backends.load("cuda", torch.device("cuda"))
assert cuda.why_no_extension() is None, cuda.why_no_extension()
module = cuda.extension()
assert module.architectures == "sm_80 sm_90 sm_90a sm_100 compute_80", module.architectures
assert len(module.kernels()) > 10

z_a, z_b = torch.randn(2, 64, 512, dtype=torch.float64).requires_grad_().unbind()
results = []
for backend in ("torch", "reference"):
    loss = barlow_fused.barlow_twins_loss(z_a, z_b, backend=backend)
    results.append((loss, *torch.autograd.grad(loss, (z_a, z_b))))
torch.testing.assert_close(*results)

script = Path(sys.prefix) / "bin" / "barlow-fused"
said = subprocess.run([script, "doctor"], capture_output=True, text=True, check=True, env=os.environ).stdout
assert "built with CUDA" in said, said
print(f"{Path(module.__file__).name} and the loss work: {module.architectures}")
