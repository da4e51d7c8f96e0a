"""Races of the CUDA kernels: pytest --kernels races, in the emulation with its race detector (csrc/gpu/emulation).

BARLOW_RACE_SEEDS=100 tries that many seeds, BARLOW_MUTATIONS=all leaves out every barrier, wait and fence.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import kernel_runs
import mutations
import pytest
from kernel_runs import RUNS
from sites import SOURCES, sites

HERE = pathlib.Path(__file__).parent
SEEDS = int(os.environ.get("BARLOW_RACE_SEEDS", "2"))
LARGE = ("Hopper: gram (1040, 80)",)  # half a minute, with a seed
SITES = {site.name: site for site in sites()}
TELLING = (  # one of each kind
    "blocks/multiply.h run: barrier() #2",
    "blocks/multiply.h run: copy_async_wait<STAGES - 2>()",
    "blocks/reduce.h arrive: fence_device()",
    "blocks/reduce.h arrive: fence_device() #2",
    "blocks/reduce.h arrive: Team::barrier()",
    "blocks/hopper_multiply.h begin: mbarrier_fence_init()",
    "blocks/hopper_multiply.h end: cluster_barrier()",
    "blocks/hopper_multiply.h done: warp_barrier()",
    "blocks/hopper_multiply.h start: mbarrier_wait(full(place.stage), place.phase)",
    "blocks/hopper_epilogue.h wait_for_room: mbarrier_wait(&memory.taken, tiles % 2 ^ 1)",
    "blocks/hopper_epilogue.h wait_for_tile: mbarrier_wait(&memory.given, tiles % 2)",
    "kernels/hopper_gram.cu meet: mbarrier_wait_cluster(barrier, exchanges % 2)",
)


def say(name: str, **variables: str) -> str:
    return kernel_runs.outcome(mutations.module(), name, True, **variables)


@pytest.mark.parametrize("name", RUNS)
def test_no_race_is_reported(name):
    assert say(name) == ""


@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
@pytest.mark.parametrize("name", [name for name in RUNS if name not in LARGE or SEEDS > 2])
def test_nor_in_random_order(name, seed):
    assert say(name, BARLOW_EMULATION_SEED=str(seed)) == ""


def test_a_seed_reproduces_a_run():
    """Which threads are named depends on the order."""
    variables = {"BARLOW_EMULATION_DROP": SITES["blocks/multiply.h run: barrier() #2"].drop}
    said = [
        re.sub(r"0x\w+", "", say("gram (33, 100) bfloat16", BARLOW_EMULATION_SEED=seed, **variables))
        for seed in ("5", "5", "6")
    ]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("name", SITES if os.environ.get("BARLOW_MUTATIONS") == "all" else TELLING)
def test_what_is_left_out_is_reported(name):
    site = SITES[name]
    notice = mutations.first_notice(site, mutations.runs_of(site), True)
    if name in mutations.REDUNDANT:
        assert notice == ""
    else:
        assert notice != ""
        assert mutations.kind(notice) == expected()[name][0]
    if "race: " in notice and "ends, not ordered after" not in notice:
        assert re.search(r"(blocks|kernels)/\w+\.\w+:\d+.*(blocks|kernels)/\w+\.\w+:\d+", notice)


def expected() -> dict[str, list[str]]:
    """The rows of docs/races.md."""
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", mutations.TABLE.read_text(), re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows if cells.count(" | ") == 3}


def test_the_table_has_every_place():
    rows = expected()
    assert list(rows) == list(SITES)
    unnoticed = {name for name, cells in rows.items() if not mutations.Row(*cells).noticed}
    assert unnoticed == set(mutations.REDUNDANT)


def test_every_call_of_a_primitive_is_a_place():
    """What sites.py finds by its pattern, and what the emulation's primitives let be left out."""
    emulation = "".join((SOURCES / "gpu" / "emulation" / name).read_text() for name in ("device.h", "hopper.h"))
    of_emulation = set(re.findall(r"(\w+)\([^()]*Site site = Site::here\(\)\)", emulation))
    from sites import PRIMITIVES

    assert of_emulation == set(PRIMITIVES)


@functools.cache
def model() -> pathlib.Path:
    """The program of race_model.cpp."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="race-model-"))
    common = ["g++", "-std=c++17", "-g", "-Wno-unknown-pragmas", "-DBARLOW_EMULATION", "-DBARLOW_RACES", "-I", SOURCES]
    detector = SOURCES / "gpu" / "emulation" / "races.cpp"
    for command in (
        [*common, "-O1", "-fsanitize=thread", "-c", HERE / "race_model.cpp", "-o", folder / "model.o"],
        [*common, "-O2", folder / "model.o", detector, "-o", folder / "model", "-ldl"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return folder / "model"


RULES = re.findall(r'name = "(\w+)"', (HERE / "race_model.cpp").read_text())
SENTENCES = {"init_fence": "without mbarrier_fence_init"}  # others: a race


@pytest.mark.parametrize("seed", [None, "1", "2"])
@pytest.mark.parametrize("rule", RULES)
def test_the_model_tells_right_from_wrong(rule, seed):
    environment = {} if seed is None else {"BARLOW_EMULATION_SEED": seed}
    for side in ("right", "wrong"):
        done = subprocess.run([model(), rule, side], env=environment, capture_output=True, text=True)
        if side == "right":
            assert (done.returncode, done.stdout) == (0, "")
        else:
            assert done.returncode == 1
            assert SENTENCES.get(rule, "race: ") in done.stdout
