"""Every CUDA kernel on small shapes: what ``make compute-sanitizer`` runs under memcheck and racecheck."""

from __future__ import annotations

import itertools

import torch
from cases import answer, error, oracle, views

from barlow_fused import barlow_twins_loss
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.normalization import CONVENTIONS

SHAPES = [(2, 4), (17, 100), (64, 1000), (130, 520), (300, 77), (600, 1300), (2100, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def main() -> None:
    configs.FLOAT32_ELEMENTS = 0  # small halves too are multiplied as they are
    for (n, d), dtype, name in itertools.product(SHAPES, DTYPES, ("batch_norm", "none")):
        z_a, z_b = (z.cuda() for z in views(n, d, dtype))
        ref = oracle(z_a, z_b, CONVENTIONS[name])
        for route in ("gram", "direct") if 2 * n <= d else ("direct",):

            def loss(a, b, route=route, name=name):
                return barlow_twins_loss(a, b, normalization=name, route=route, backend="cuda", return_terms=True)

            got = answer(loss, z_a, z_b)
            assert error(got.loss, ref.loss, at_least=d) < 1e-3, (n, d, dtype, name, route)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
