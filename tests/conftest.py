"""How the tests are run: of which kernels, in which environment, and which of them in one worker."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator

import pytest

# Tests that share something that takes long: those in whose names one of these finds the same groups
SHARING = (
    r"test_on_every_rank",
    r"test_torch_backend.*test_accuracy_over_shapes\[(?:slabs|whole)-(.*)-(?:gram|direct)\]",
    r"test_the_other_fails_where_a_rank",
    r"test_train_resume.*test_two_processes",
    r"test_train\.py::(?!test_two_steps)",
)
KINDS = ("compiled", "interpreter", "sanitized", "races")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        choices=KINDS,
        default="compiled",
        help="how tests/kernels runs the kernels on this CPU: CUDA's compiled for it (default), Triton's in the "
        "interpreter, CUDA's under the address and undefined-behaviour sanitizers (with --numprocesses), or CUDA's "
        "under the emulation's race detector",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The environment of the workers, or of this process: before anything imports Triton.

    Workers share the cores. What they give back stays with the allocator: page faults took a fifth of the time.
    Inductor's cache is of this run alone: it does not tell one set of vector instructions from another, and what it has
    compiled for AVX-512 gives NaN with ATEN_CPU_CAPABILITY=avx2.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="inductor-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
        config.add_cleanup(cache.cleanup)
    if "BARLOW_FUSED_CACHE_DIR" not in os.environ:  # records of verified kernels
        records = tempfile.TemporaryDirectory(prefix="records-")
        os.environ["BARLOW_FUSED_CACHE_DIR"] = records.name
        config.add_cleanup(records.cleanup)
    os.environ.setdefault("BARLOW_FUSED_VERIFY", "never")
    workers = config.getoption("numprocesses", None) or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
    if config.getoption("--kernels") == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    if config.getoption("--kernels") == "sanitized" and not hasattr(config, "workerinput"):
        import builds

        if not config.getoption("numprocesses", None):
            raise pytest.UsageError("--kernels sanitized needs --numprocesses: the sanitizers start with a process")
        os.environ.update(builds.sanitizers())


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Tests that share something that takes long run in one worker, where it is made once; all others as they come."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            for pattern in SHARING:
                if match := re.search(pattern, nodeid):
                    return f"{pattern}: {match.groups()}"
            return nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _environment_read_again() -> Iterator[None]:
    """A process reads BARLOW_FUSED_ROUTE and BARLOW_FUSED_BACKEND once; a test may have changed them."""
    yield
    from barlow_fused import choice

    choice._environment.update(choice._read_environment())
