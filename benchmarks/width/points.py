"""What the study runs: its data sets' settings, and the points of its experiments.

A point is a run's N, D, hidden width, κ and seed. A point that two experiments share is run once.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from barlow_fused import kappa, suggest_lambda

WIDTHS = [128 * 4**k for k in range(6)]  # 128 ... 131072
BASE_D = 8192
KAPPA = 0.032  # of the preset digits, in two digits
KAPPAS = [0.002, 0.008, KAPPA, 0.125, 0.5, 1.0]
KAPPA_WIDTHS = [2048, 8192, 32768]
SAMPLES = [32, 64, 128, 256, 512]
SAMPLES_HIDDEN = 512  # where N varies: again at least N
HIDDEN = 128  # where it is fixed; above N - 1, so that it is N that limits the rank
GROWING = dict(zip(WIDTHS, [64, 64, 64, 128, 256, 512], strict=True))  # sqrt(2 D), and at least N


@dataclasses.dataclass(frozen=True)
class Study:
    """The settings that all runs on a data set share. With what is not said here they follow the preset digits."""

    data: str
    images: int  # that pretraining sees, and whose labels the evaluation has
    test: int  # held-out images
    image_size: int  # pixels
    epochs: int
    n: int = 64  # where N is not what varies
    lr: float = 0.004  # of AdamW, for each 256 images of a batch
    warmup_epochs: float = 1


STUDIES = {
    study.data: study
    for study in (
        Study("digits", images=1437, test=360, image_size=12, epochs=12),
        Study("fashion-mnist", images=6000, test=5000, image_size=14, epochs=4),
    )
}


class Point(NamedTuple):
    """A run's settings that vary."""

    n: int
    d: int
    hidden: int
    kappa: float
    seed: int

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"n{self.n}-d{self.d}-h{self.hidden}-k{self.kappa:g}-s{self.seed}"


def points(experiment: str, study: Study, seed: int) -> list[Point]:
    """An experiment's points."""

    def at(d: int = BASE_D, n: int = study.n, hidden: int = HIDDEN, kappa: float = KAPPA) -> Point:
        return Point(n, d, hidden, float(f"{kappa:.4g}"), seed)

    if experiment == "width":
        return [at(d) for d in WIDTHS]
    if experiment == "lambda":
        lambd = suggest_lambda(study.n, BASE_D, KAPPA)
        return [at(d, kappa=kappa(study.n, d, lambd)) for d in WIDTHS]
    if experiment == "growing":
        return [at(d, hidden=GROWING[d]) for d in WIDTHS]
    if experiment == "samples":
        return [at(n=n, hidden=SAMPLES_HIDDEN) for n in SAMPLES]
    return [at(int(experiment.removeprefix("kappa-")), kappa=kappa) for kappa in KAPPAS]


EXPERIMENTS = {
    "width": "equal κ, equal hidden width",
    "lambda": f"equal λ, that of D = {BASE_D}",
    "growing": "equal κ, hidden width growing as √(2 D), from 64",
    "samples": f"equal κ and equally many images, D = {BASE_D}",
    **{f"kappa-{d}": f"κ at D = {d}" for d in KAPPA_WIDTHS},
}
TURNS = {"width": 0, "lambda": 0, f"kappa-{BASE_D}": 0, "samples": 1}  # the others come last


def in_order(experiments: list[str], study: Study, seeds: int) -> list[Point]:
    """All points of experiments, each once, in the order of running: what says most first, by seed, small D first."""
    wanted = [
        (TURNS.get(name, 2), point.seed, point.d, point)
        for name in experiments
        for seed in range(seeds)
        for point in points(name, study, seed)
    ]
    return list(dict.fromkeys(point for *_, point in sorted(wanted)))
