"""What is asked of a device: what it lacks is found out once, and replaced by something right."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import error
from torch._subclasses.fake_tensor import FakeTensorMode

from barlow_fused import plan
from barlow_fused.backends import accelerator
from barlow_fused.backends.triton_kernels import configs

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def _precision_restored():
    legacy, setting = torch.backends.cuda.matmul.allow_tf32, torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = setting
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("high" if legacy else "highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


SETTINGS = {
    "set_float32_matmul_precision": {"highest": False, "high": True, "medium": True},
    "allow_tf32": {False: False, True: True},
    "cuda.matmul.fp32_precision": {"ieee": False, "tf32": True},
    "fp32_precision": {"ieee": None, "tf32": None},  # where nothing more special was said
}


def _set(name: str, value: str | bool) -> None:
    if name == "set_float32_matmul_precision":
        torch.set_float32_matmul_precision(value)
    elif name == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = value
    elif name == "cuda.matmul.fp32_precision":
        torch.backends.cuda.matmul.fp32_precision = value
    else:
        torch.backends.fp32_precision = value


EVERY = [(name, value) for name, values in SETTINGS.items() for value in values]


@pytest.mark.usefixtures("_precision_restored")
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, about its older settings
@pytest.mark.parametrize(("first", "second"), list(itertools.product(EVERY, EVERY)), ids=str)
def test_both_of_pytorchs_precision_settings_are_read(first, second):
    """Whichever was used, and in whatever order: nothing raises, and the last word about products on GPUs counts."""
    torch.backends.cuda.matmul.fp32_precision = "none"
    for name, value in (first, second):
        _set(name, value)
    said = [SETTINGS[name][value] for name, value in (first, second) if SETTINGS[name][value] is not None]
    general = [value == "tf32" for name, value in (first, second) if name == "fp32_precision"]
    expected = said[-1] if said else general[-1]
    assert accelerator.tf32() is expected
    assert configs.precision_of(torch.float32) == ("tf32" if expected else "tf32x3")
    assert plan(64, 1024, device="h200").backend == "torch"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_of_halves_have_float32_sums(dtype):
    """A CPU's library does not return them; the result is right all the same, and no exception is seen."""
    x, y = torch.randn(30, 5000).to(dtype), torch.randn(5000, 20).to(dtype)
    want = x.double() @ y.double()
    assert accelerator.matmul(x, y).dtype == torch.float32
    assert error(accelerator.matmul(x, y), want) < 1e-6
    assert error(accelerator.bmm(x[None], y[None])[0], want) < 1e-6


def test_a_device_without_float64_sums_in_what_it_has(monkeypatch):
    about = accelerator.Accelerator("none", float64=False)
    monkeypatch.setattr(accelerator, "of", lambda device: about)
    assert accelerator.widest(torch.zeros(1)) == torch.float32


def test_a_device_that_refuses_is_asked_once():
    asked = []

    def refuse():
        asked.append(None)
        raise NotImplementedError("aten::mm.dtype")

    assert accelerator._works(refuse) is False
    assert accelerator._works(lambda: None) is True
    accelerator._sums_in_float32.cache_clear()
    with FakeTensorMode():  # where every operator works
        assert accelerator._sums_in_float32("cpu") is False
    accelerator._sums_in_float32.cache_clear()
    assert [accelerator._sums_in_float32("cpu") for _ in range(2)] == [False, False]
    assert accelerator._sums_in_float32.cache_info().hits == 1


def test_units_of_a_device_that_does_not_say():
    assert accelerator.units(torch.device("meta")) == accelerator.TYPICAL_UNITS
