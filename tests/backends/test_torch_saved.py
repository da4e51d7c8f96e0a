"""What a CPU's passes save for backward has the shapes, dtypes and strides that torch.compile was told."""

from __future__ import annotations

import pytest
import torch
from cases import NORMALIZATIONS, ROUTES, views

from barlow_fused.backends import torch_cpu
from barlow_fused.backends.operations import Spec


@pytest.mark.parametrize("normalization", ["batch_norm", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n", "d"), [(40, 30), (3000, 200), (9000, 300)])
def test_what_is_saved_is_what_was_promised(n, d, route, dtype, normalization):
    """In one slab and in several, kept and not."""
    if route == "gram" and n > 1000:
        n, d = d, n
    convention = NORMALIZATIONS[normalization]
    z_a, z_b = views(n, d, dtype)
    terms, saved = torch_cpu.forward(z_a, z_b, Spec("torch", route, convention, 0.1, 1.0), True, False)
    assert len(terms) == 1
    promised = torch_cpu.empty_saved(z_a, route, convention)
    assert [(t.shape, t.dtype, t.stride(), t.storage_offset()) for t in saved] == [
        (t.shape, t.dtype, t.stride(), t.storage_offset()) for t in promised
    ]
    assert len({t.untyped_storage().data_ptr() for t in saved if t.numel()}) == sum(t.numel() > 0 for t in saved)
