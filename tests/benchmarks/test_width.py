"""The study of the width: its points, that it goes on where it was, and what is made of its runs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytest.importorskip("timm")

from barlow_fused import suggest_lambda
from barlow_fused.train import evaluate, trainer
from benchmarks import machine, readme
from benchmarks.__main__ import main
from benchmarks.pictures import digest_of
from benchmarks.width import one, pictures, study, tables
from benchmarks.width.points import EXPERIMENTS, KAPPA, STUDIES, WIDTHS, Point, Study, in_order, points

TINY = Study("digits", images=96, test=40, image_size=8, epochs=2, n=32)
DIGITS = STUDIES["digits"]


# The points


def test_at_equal_kappa_lambda_falls_and_at_equal_lambda_kappa_rises():
    kappas, lambdas = points("width", DIGITS, 0), points("lambda", DIGITS, 0)
    assert [point.d for point in kappas] == [point.d for point in lambdas] == WIDTHS
    assert {point.kappa for point in kappas} == {KAPPA}
    of_lambda = [suggest_lambda(point.n, point.d, point.kappa) for point in lambdas]
    assert of_lambda == pytest.approx([suggest_lambda(DIGITS.n, 8192, KAPPA)] * len(WIDTHS), rel=1e-3)
    assert max(point.kappa for point in lambdas) > 0.5


@pytest.mark.parametrize("data", STUDIES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_n_alone_limits_the_rank_of_every_point(experiment, data):
    for point in points(experiment, STUDIES[data], 0):
        assert point.hidden >= point.n
        assert point.d >= 2 * (point.n - 1)  # where suggest_lambda is kappa's inverse


def test_each_point_runs_once_what_says_most_first_seed_by_seed():
    wanted = in_order(list(EXPERIMENTS), DIGITS, 3)
    assert len(set(wanted)) == len(wanted)
    first = in_order(["width", "lambda", "kappa-8192"], DIGITS, 3)
    assert wanted[: len(first)] == first
    assert [(point.seed, point.d) for point in first] == sorted((point.seed, point.d) for point in first)
    assert set(points("width", DIGITS, 2)) <= set(first)


# The runs


class Recorder(study.Launcher):
    """Answers at once, and fails at the call of that number."""

    def __init__(self, fails_at=math.inf):
        super().__init__()
        object.__setattr__(self, "asked", [])
        object.__setattr__(self, "fails_at", fails_at)

    def answer(self, recorded, what, point, **more):
        self.asked.append((what, point, *more.values()))
        if len(self.asked) == self.fails_at:
            raise study.StudyError("killed")
        if what == "step":
            return {"seconds": 0.1, "peak_bytes": 1e9}
        accuracy = dict.fromkeys(tables.METRICS, 90.0 + point.seed)
        if what == "baselines":
            return {"pixels": accuracy, "untrained": accuracy}
        rest = {"loss": 30.0, "floor": 10.0, "c_ii_of_floor": 0.97, "lambd": 0.001, "seconds": 1.0}
        return {**accuracy, **rest}


def test_a_study_that_was_killed_goes_on_where_it_was(tmp_path):
    wanted = in_order(["width"], DIGITS, 2)
    with pytest.raises(study.StudyError):
        study.add_runs(study.read("digits", tmp_path), wanted, Recorder(fails_at=6), tmp_path, print)
    recorded = study.read("digits", tmp_path)
    assert [study.point_of(run) for run in recorded["runs"]] == wanted[:3]  # after the baselines of two seeds
    rest = Recorder()
    study.add_runs(recorded, wanted, rest, tmp_path, print)
    assert [(what, point) for what, point in rest.asked] == [("pretrain", point) for point in wanted[3:]]
    assert study.missing(study.read("digits", tmp_path), wanted) == []
    assert [path.name for path in tmp_path.iterdir()] == ["width-digits.json"]


def test_points_can_be_added_later_but_not_with_other_settings(tmp_path, monkeypatch, capsys):
    study.write(study.read("digits", tmp_path), tmp_path)
    monkeypatch.setitem(study.STUDIES, "digits", dataclasses.replace(DIGITS, epochs=99))
    assert main(["width", "--data", "digits", "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "other settings" in message
    assert "width-digits.json" in message


def test_a_step_is_measured_once_a_shape_and_predicted_where_it_does_not_fit(tmp_path, monkeypatch):
    recorded, wanted = study.read("digits", tmp_path), in_order(["width", "lambda", "kappa-8192"], DIGITS, 2)
    monkeypatch.setattr(machine, "free_memory", lambda device: 6e9)
    launcher = Recorder()
    study.add_costs(recorded, wanted, launcher, tmp_path, print)
    assert [point.d for _, point, loss in launcher.asked if loss == "fused"] == WIDTHS
    assert [point.d for _, point, loss in launcher.asked if loss == "reference"] == [128, 512, 2048, 8192]
    needs = {cost["d"]: cost["needs_bytes"] for cost in recorded["costs"] if "needs_bytes" in cost}
    assert needs[131072] > 4 * needs[32768] > 16 * 1e9
    study.add_costs(recorded, wanted, again := Recorder(), tmp_path, print)
    assert again.asked == []


def test_a_run_is_a_process_of_its_own_after_the_words_before_it(tmp_path):
    script = tmp_path / "before.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "assert sys.argv[2:4] == ['-m', 'benchmarks.width.one'], sys.argv\n"
        "asked = json.loads(sys.argv[4])\n"
        "folder = pathlib.Path(asked['folder'])\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'result.json').write_text(json.dumps(asked))\n"
    )
    launcher = study.Launcher((sys.executable, str(script)), threads=2, runs=tmp_path / "runs")
    point = points("width", DIGITS, 1)[0]
    recorded = study.read("digits", tmp_path)
    answer = launcher.answer(recorded, "step", point, loss="fused")
    assert (answer["what"], answer["loss"], answer["threads"], Point(*answer["point"])) == ("step", "fused", 2, point)
    assert list((tmp_path / "runs").iterdir()) == []
    script.write_text("import sys; sys.exit('no room')")
    with pytest.raises(study.StudyError, match=f"digits-pretrain-{point.name} ended with 1: no room"):
        launcher.answer(recorded, "pretrain", point)


def test_the_command_line_says_what_is_run(tmp_path, monkeypatch):
    launchers = []
    monkeypatch.setattr(study, "Launcher", lambda *given: launchers.append((given, Recorder())) or launchers[-1][1])
    asked = ["--data", "digits", "--experiment", "width", "--widest", "2048", "--seeds", "1", "--part", "runs"]
    more = ["--before", "nice -n 19", "--threads", "2", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main(["width", *asked, *more]) == 0
    ((given, recorder),) = launchers
    assert given == (("nice", "-n", "19"), 2, tmp_path / "runs")
    assert [(what, point.d) for what, point in recorder.asked[1:]] == [("pretrain", d) for d in (128, 512, 2048)]
    assert [path.name for path in tmp_path.iterdir()] == ["width-digits.json"]


def request(folder, what, point, **more):
    asked = {"what": what, "study": dataclasses.asdict(TINY), "point": point, "folder": str(folder), "threads": 1}
    return json.dumps({**asked, **more})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "DRAWS", 2)
    monkeypatch.setattr(evaluate, "FEW", 2)
    monkeypatch.setattr(one, "STEPS", 1)


def test_a_run_pretrains_and_goes_on_after_a_kill(quick, tmp_path, monkeypatch):
    point = Point(n=32, d=64, hidden=32, kappa=0.05, seed=0)
    assert one.main(request(tmp_path / "whole", "pretrain", point)) == 0
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert {*tables.METRICS, "loss", "on_diag", "off_diag", "floor", "rank", "seconds"} <= whole.keys()
    assert whole["steps"] == 6
    assert whole["floor"] == pytest.approx(64 * 0.05 / 1.05)
    assert whole["loss"] > whole["floor"]
    assert all(0 < whole[metric] <= 100 for metric in tables.METRICS)

    stops, rates = iter([*[False] * 4, True]), trainer.optim.set_learning_rates

    def killed(*args):
        if next(stops, False):
            raise KeyboardInterrupt
        return rates(*args)

    monkeypatch.setattr(trainer.optim, "set_learning_rates", killed)
    with pytest.raises(KeyboardInterrupt):
        one.main(request(tmp_path / "killed", "pretrain", point))
    assert one.main(request(tmp_path / "killed", "pretrain", point)) == 0
    again = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_baselines_and_steps_are_measured(quick, tmp_path):
    point = Point(n=32, d=64, hidden=32, kappa=0.05, seed=0)
    assert one.main(request(tmp_path / "baselines", "baselines", point)) == 0
    found = json.loads((tmp_path / "baselines" / "result.json").read_text())
    assert all(found[which].keys() == tables.METRICS.keys() for which in ("pixels", "untrained"))
    assert one.main(request(tmp_path / "step", "step", point, loss="reference")) == 0
    cost = json.loads((tmp_path / "step" / "result.json").read_text())
    assert cost["seconds"] > 0
    assert cost["peak_bytes"] > 1e8


# What is made of them


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 6e9)
    made = study.read("digits", tmp_path)
    wanted = in_order(["width", "lambda", "kappa-8192"], DIGITS, 3)
    study.add_runs(made, wanted, Recorder(), tmp_path, print)
    study.add_costs(made, wanted, Recorder(), tmp_path, print)
    return made


def test_a_table_has_mean_and_spread_over_the_seeds(recorded):
    lines = tables.table(recorded, "width").splitlines()
    assert len(lines) == 2 + 2 + len(WIDTHS)
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[:5] == ["131072", "0.032", "0.001", "0.97", "3"]
    assert cells[5:9] == ["91.0 ± 1.0"] * 4  # of 90, 91 and 92
    assert cells[9] == "3"
    assert cells[10:12] == ["100 ms", "-"]
    assert cells[12] == "1.0 GB"
    assert cells[13].startswith("needs ")
    assert len({line.count("|") for line in lines}) == 1


def test_one_seed_has_no_spread(recorded):
    recorded["runs"] = [run for run in recorded["runs"] if run["seed"] == 0]
    assert "| 1 | 90.0 | 90.0 |" in tables.table(recorded, "width")
    assert "over 1 seed," in tables.settings(recorded, "")


def test_the_findings_are_those_of_the_runs(recorded):
    for run in recorded["runs"]:
        if run["d"] == 8192 and run["kappa"] == 0.5:
            run["probe_few"] += 5
    text = tables.findings(recorded, "")
    assert "D = 8192: 96.0 % at κ = 0.5." in text
    assert "91.0 at D = 128 (κ = 0.000256), " in text
    assert "91.0 / 91.0 at D = 131072 (κ = 0.516) and 91.0 / 96.0 at D = 8192 (κ = 0.5)" in text
    assert "91.0 to 91.0 % from D = 128 to 131072, with a deviation over the seeds of up to 1.0" in text
    recorded["runs"] = []
    assert tables.findings(recorded, "") == ""


def test_every_view_of_the_guide_is_made_of_a_study(recorded, tmp_path):
    study.write(recorded, tmp_path)
    views = [view for view in readme.VIEWS if view.startswith("width_")]
    text = "\n".join(f"<!-- benchmarks: {view} width-digits -->\nOLD {view}\n<!-- /benchmarks -->" for view in views)
    fresh = readme.render(text, tmp_path)
    assert "OLD" not in fresh
    assert fresh.count(tables.NOT_YET) == 2  # the hidden layer that grows, and N
    assert readme.render(fresh, tmp_path) == fresh
    assert readme.drawn(fresh) == [(view, "width-digits") for view in views if view in readme.PICTURES_OF]
    assert "(width-digits.png)" in fresh
    assert "(width-digits-costs.png)" in fresh


@pytest.mark.parametrize("draw", [pictures.draw, pictures.draw_costs])
def test_the_pictures_know_what_they_were_drawn_from(draw, recorded, tmp_path):
    draw(recorded, tmp_path / "picture.png")
    assert digest_of(tmp_path / "picture.png") == pictures.digest(recorded)
    recorded["runs"][0]["knn_few"] += 1
    assert digest_of(tmp_path / "picture.png") != pictures.digest(recorded)


@pytest.mark.parametrize(
    ("flag", "value"), [("--data", "mnist"), ("--experiment", "depth"), ("--seeds", "0"), ("--threads", "x")]
)
def test_bad_arguments_are_named(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        main(["width", flag, value])
    assert end.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]
