"""Every kernel of a backend on small shapes: what ``make compute-sanitizer`` runs under memcheck and racecheck.

small_shapes_on_gpu.py triton
"""

from __future__ import annotations

import argparse
import functools

import torch
from cases import answer, error, oracle, views

from barlow_fused import barlow_twins_loss
from barlow_fused.backends import why_unusable
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.normalization import CONVENTIONS
from benchmarks import precompile
from benchmarks.precompile import Call

EVERY = [
    Call(n, d, dtype, route, convention)
    for n, d in ((2, 4), (17, 100), (64, 1000), (130, 520), (300, 77), (600, 1300), (2100, 40))
    for dtype in precompile.DTYPES
    for convention in ("batch_norm", "none")
    for route in (("gram", "direct") if 2 * n <= d else ("direct",))
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("small_shapes_on_gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("backend", nargs="?", choices=("cuda", "triton"), default="cuda")
    backend = parser.parse_args(argv).backend
    reason = why_unusable(backend, torch.device("cuda", 0))
    if reason is not None:
        raise SystemExit(reason)
    configs.FLOAT32_ELEMENTS = 0  # small halves too are multiplied as they are
    for call in EVERY if backend == "cuda" else precompile.SANITIZED:
        z_a, z_b = (z.cuda() for z in views(call.n, call.d, getattr(torch, call.dtype)))
        ref = oracle(z_a, z_b, CONVENTIONS[call.convention])
        options = {"normalization": call.convention, "route": call.route, "backend": backend}
        got = answer(functools.partial(barlow_twins_loss, return_terms=True, **options), z_a, z_b)
        assert error(got.loss, ref.loss, at_least=call.d) < 1e-3, call
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
