"""The trainer: what a run writes, its configuration, that it repeats, and that pretraining gains accuracy."""

import dataclasses
import json
import math
import sys

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("tensorboard")

from matplotlib.axes import Axes
from rich.console import Console

from barlow_fused import cross_correlation, kappa, loss_floor, suggest_lambda
from barlow_fused.train import Config, config, evaluate, main, model, pictures, presets, probe, report, trainer
from barlow_fused.train.config import combine, parse_args
from barlow_fused.train.evaluate import Accuracy, Features

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TINY = ["--steps", "4", "--batch-size", "32", "--projector", "32-128", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Accuracies of few labels over two draws instead of twenty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "DRAWS", 2)
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than a short run."""
    monkeypatch.setattr(trainer.Monitor, "draw", lambda self: None)


def read_metrics(run):
    return trainer.read_jsonl(run / "metrics.jsonl")


def numbers(run):
    """The metrics that must repeat: all but the speed."""
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in read_metrics(run)]


def exit_code(argv):
    try:
        return main(argv)
    except SystemExit as end:  # argparse's own errors
        return end.code


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*TINY, "--out", str(out)]) == 0
    return out


def test_a_run_writes_every_artefact(run):
    assert {path.name for path in run.iterdir()} == {
        *(
            ".lock",
            "checkpoints",
            "config.toml",
            "encoder.pt",
            "knn.jsonl",
            "metrics.jsonl",
            "results.json",
            "tensorboard",
        ),
        *("cross_correlation.png", "knn.png", "loss.png", "spectrum.png", "views.png"),
    }
    for picture in run.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_written_configuration_is_resolved_and_is_read_again(run):
    text = tomllib.loads((run / "config.toml").read_text())
    assert set(text) == {f.name for f in dataclasses.fields(Config)} - {"resume", "init"} | {"environment"}
    assert text["steps"] == 4
    assert text["epochs"] == 45
    assert text["log_every"] == 1
    assert text["image_size"] == 16
    assert text["device"] == "cpu"
    assert text["out"] == str(run)
    assert text["environment"]["torch"] == torch.__version__
    again = parse_args(["--config", str(run / "config.toml")])
    assert {name: value for name, value in text.items() if name != "environment"} == again.to_dict()


def test_every_step_of_a_short_run_is_logged(run):
    metrics = read_metrics(run)
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4]
    for entry in metrics:
        assert set(entry) == {
            *("step", "epoch", "loss", "loss_above_floor", "on_diag", "off_diag", "lr", "images_per_second")
        }
        lambd = suggest_lambda(32, 128, kappa(128, 8192, 0.0005))
        assert entry["loss"] == pytest.approx(entry["on_diag"] + lambd * entry["off_diag"], rel=1e-5)
        assert entry["loss_above_floor"] == pytest.approx(entry["loss"] - loss_floor(32, 128, lambd).loss, abs=1e-3)
        assert entry["loss_above_floor"] > 0
        assert entry["epoch"] == 1
        assert entry["images_per_second"] > 0


def test_lambda_is_that_of_kappa_for_the_whole_batch():
    asked = combine({"kappa": 0.1, "projector": "64-4096", "batch_size": 64, "accumulate": 4})
    assert asked.lambd == suggest_lambda(64, 4096, 0.1)
    assert kappa(64, 4096, asked.lambd) == pytest.approx(0.1)
    assert asked.loss_floor.loss == pytest.approx(4096 * 0.1 / 1.1)
    assert combine({"preset": "digits"}).lambd == pytest.approx(0.0005, rel=1e-12)
    assert combine({"preset": "cifar-resnet18"}).lambd == pytest.approx(0.0051, rel=1e-12)


@pytest.mark.parametrize("pull", ["0.02", "0.7"])
def test_the_floor_is_said_at_the_start(pull, no_pictures, tmp_path, monkeypatch, capsys):
    for name in ("look", "accuracy", "pixels", "knn"):
        monkeypatch.setattr(trainer.Monitor, name, lambda self: None)
    argv = ["--steps", "1", "--batch-size", "32", "--projector", "32-128", "--device", "cpu"]
    assert main([*argv, "--kappa", pull, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"κ = {pull}: at least " in out
    assert ("Warning: κ = 0.7 is above 0.5" in out) == (pull == "0.7")


@pytest.mark.parametrize("projector", ["32-128", "32-16"])
def test_the_floor_is_drawn_into_the_loss_where_there_is_one(projector, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **_: drawn.append(y))
    config = combine({"batch_size": 32, "projector": projector})
    metrics = [{"step": 1, "loss": 30.0, "on_diag": 20.0, "off_diag": 10.0, "lr": 0.1}]
    pictures.draw_loss(metrics, config, tmp_path / "loss.png")
    assert drawn == ([config.loss_floor.loss] if projector == "32-128" else [])


def test_tensorboard_has_the_same_numbers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert board.Scalars("train/loss")[-1].value == pytest.approx(read_metrics(run)[-1]["loss"])
    assert board.Scalars("knn/accuracy")[-1].step == 4


def test_a_long_run_is_logged_every_tenth_step():
    resolved = [resolve(steps=steps).log_every for steps in (200, 201)]
    assert resolved == [1, 10]
    assert resolve(steps=200, log_every=7).log_every == 7


def resolve(**settings):
    asked = combine(settings)
    alone = trainer.Processes(0, 0, 1)
    return trainer.resolve(asked, trainer.load_images(asked, alone), alone)


def test_steps_stop_a_run_and_do_not_change_its_schedule():
    spe = 1437 // 128
    assert (resolve().steps, resolve().epochs) == (45 * spe, 45)
    assert (resolve(steps=5).steps, resolve(steps=5).epochs) == (5, 45)
    assert resolve(steps=61 * spe).epochs == 61


def test_the_encoder_and_the_checkpoint_load_without_pickle(run):
    state = torch.load(run / "checkpoints" / "step-00000004.pt", weights_only=True)
    assert state["step"] == 4
    assert state["config"]["projector"] == "32-128"
    network = model.build("tiny", 1, 16, [32, 128])
    network.load_state_dict(state["model"])
    encoder = torch.load(run / "encoder.pt", weights_only=True)
    assert all(tensor.equal(encoder[name]) for name, tensor in network.backbone.state_dict().items())


def test_the_results_hold_all_accuracies(run):
    results = json.loads((run / "results.json").read_text())
    assert list(results) == ["raw_pixels", "untrained_encoder", "pretrained_encoder"]
    for result in results.values():
        assert set(result) == set(Accuracy._fields)
        assert all(0 <= value <= 100 for value in result.values())
    knn = trainer.read_jsonl(run / "knn.jsonl")
    assert [entry["step"] for entry in knn] == [0, 4]
    assert [entry["knn"] for entry in knn] == [
        results[f"{which}_encoder"]["knn_all"] for which in ("untrained", "pretrained")
    ]


def test_the_linear_probe_of_a_run(run, capsys):
    assert probe.main([str(run), "--epochs", "3"]) == 0
    assert "top-1" in capsys.readouterr().out
    result = json.loads((run / "linear_probe.json").read_text())
    assert result["lr_classifier"] == 0.3
    assert 100 >= result["best_top1"] >= result["top1"] > 50
    assert result["top5"] > result["top1"]
    classifier = torch.load(run / "linear_probe.pt", weights_only=True)
    assert classifier["weight"].shape == (10, 128)


def test_a_probe_of_nothing_says_so(tmp_path, capsys):
    assert probe.main([str(tmp_path)]) == 2
    assert str(tmp_path / "config.toml") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("--weight-decay", "-1"), ("--lr-classifier", "nan"), ("--seed", "-1"), ("--epochs", "0")]
)
def test_a_bad_flag_of_the_probe_is_named(flag, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        probe.main([str(tmp_path), flag, value])
    assert end.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_the_closing_table_fits_80_columns(capsys):
    untrained, trained = Accuracy(1.0, None, 3.0), Accuracy(100.0, None, 3.5)
    report.print_gain(Console(width=80), {"untrained_encoder": untrained, "pretrained_encoder": trained}, 1437, 360)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("+99.0" in line and "-" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_a_log_that_is_no_terminal_gets_about_ten_lines(capsys):
    entry = {"loss": 1.0, "on_diag": 1.0, "off_diag": 1.0, "images_per_second": 1.0}
    with report.Progress(Console(force_terminal=False), 0, 1000) as progress:
        for step in range(1, 1001):
            progress.update(step, entry if step % 10 == 0 else None, memory=2_500_000_000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("step 1000/1000")
    assert "2.5 GB" in lines[-1]


def test_the_same_seed_gives_the_same_numbers(run, no_pictures, tmp_path):
    assert main([*TINY, "--out", str(tmp_path / "same")]) == 0
    assert main([*TINY, "--out", str(tmp_path / "other"), "--seed", "1"]) == 0
    assert numbers(tmp_path / "same") == numbers(run)
    assert numbers(tmp_path / "other") != numbers(run)
    same, first = (torch.load(out / "encoder.pt", weights_only=True) for out in (tmp_path / "same", run))
    assert all(same[name].equal(tensor) for name, tensor in first.items())


def test_a_short_run_beats_the_untrained_encoder(no_pictures, tmp_path):
    assert main(["--steps", "60", "--projector", "256-1024", "--kappa", "0.035", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = results["untrained_encoder"], results["pretrained_encoder"]
    metrics = read_metrics(tmp_path)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert after["knn_few"] > before["knn_few"] + 5
    assert after["probe_few"] > before["probe_few"] + 3


# The configuration


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "0"),
        ("--steps", "many"),
        ("--epochs", "-1"),
        ("--batch-size", "1"),
        ("--batch-size", "1438"),
        ("--accumulate", "3"),
        ("--accumulate", "128"),
        ("--projector", "512-"),
        ("--projector", "512-0"),
        ("--projector", "99999999999"),
        ("--kappa", "-1"),
        ("--kappa", "nan"),
        ("--lr-weights", "0"),
        ("--lr-biases", "inf"),
        ("--weight-decay", "-1"),
        ("--seed", "-1"),
        ("--loss", "unfused"),
        ("--device", "tpu"),
        ("--preset", "none"),
        ("--data", "mnist"),
        ("--backbone", "resnet19"),
        ("--image-size", "4"),
        ("--config", "nowhere.toml"),
        ("--resume", "nowhere"),
        ("--init", "nowhere.pth"),
    ],
)
def test_a_bad_flag_is_named_with_code_2(flag, value, tmp_path, capsys):
    assert exit_code([flag, value, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert flag in message or value in message
    assert value in message
    assert not (tmp_path / "run").exists()


def test_a_value_comes_from_flags_then_the_file_then_the_preset(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('preset = "cifar-resnet18"\nepochs = 7\nseed = 3\nlr_weights = 1\n')
    got = parse_args(["--config", str(path), "--seed", "5"])
    assert (got.seed, got.epochs, got.backbone, got.lr_weights) == (5, 7, "resnet18", 1.0)
    assert parse_args(["--config", str(path), "--preset", "digits"]).backbone == "tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "no setting 'colour'"),
        ("epochs = 'ten'", "epochs must be a int"),
        ("epochs = true", "epochs must be a int"),
        ("epochs", "not TOML"),
    ],
)
def test_a_bad_file_is_answered_by_one_sentence(text, message, tmp_path, capsys):
    (tmp_path / "bad.toml").write_text(text)
    assert exit_code(["--config", str(tmp_path / "bad.toml")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_preset_follows_the_data_unless_it_is_named():
    assert combine({}).preset == "digits"
    assert combine({"data": "cifar100"}).backbone == "resnet18"
    assert combine({"data": "imagefolder:x"}).projector == "8192-8192-8192"
    assert combine({"data": "cifar10", "preset": "digits"}).backbone == "tiny"


def test_the_official_preset_is_the_official_main_py():
    got = combine({"preset": "official-resnet50"})
    assert got.epochs == 1000
    assert got.batch_size == 2048
    assert got.lr_weights == 0.2
    assert got.lr_biases == 0.0048
    assert got.weight_decay == 1e-6
    assert got.lambd == pytest.approx(0.0051, rel=1e-12)
    assert got.projector_widths == [8192, 8192, 8192]
    assert (got.optimizer, got.momentum, got.trust_coefficient) == ("lars", 0.9, 0.001)
    assert (got.gradient, got.sync_batch_norm, got.warmup_epochs) == ("official", True, 10)
    assert (got.backbone, got.image_size, got.stem, got.augmentation) == ("resnet50", 224, "full", "official")


def test_every_setting_is_in_help_and_in_a_named_group(capsys):
    assert exit_code(["--help"]) == 0
    out = capsys.readouterr().out
    for name in config.FIELDS:
        assert config.flag_name(name) in out or f"--[no-]{name}" in out
    assert all(section.__doc__ in out for section in config.SECTIONS)


SMALL = ["--batch-size", "4", "--image-size", "16", "--projector", "64-64-64", "--workers", "0", "--device", "cpu"]


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_two_steps_of_every_preset_on_fake_images(preset, no_pictures, tmp_path):
    argv = ["--preset", preset, "--data", "fake", "--steps", "2", "--out", str(tmp_path), *SMALL]
    assert main(argv) == 0
    metrics = read_metrics(tmp_path)
    assert [entry["step"] for entry in metrics] == [1, 2]
    assert all(math.isfinite(entry["loss"]) for entry in metrics)
    assert not (tmp_path / "results.json").exists()  # fake images have no labels


def test_a_run_is_never_overwritten(run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert exit_code([*TINY, "--out", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}
    (tmp_path / "file").touch()
    assert exit_code([*TINY, "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_said_with_code_2(tmp_path, capsys):
    assert exit_code([*TINY, "--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "--device" in capsys.readouterr().err


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer.time, "strftime", lambda pattern: "digits-now")
    alone = trainer.Processes(0, 0, 1)
    outs = [trainer.start_run(resolve(steps=1), None, alone).out for _ in range(3)]
    assert len(set(outs)) == 3
    assert all((out / "config.toml").is_file() for out in outs)


# What is measured and drawn


def test_knn_finds_the_label_of_the_nearest_direction():
    directions = torch.eye(10).repeat_interleave(6, dim=0)  # (60, 10), six of each class
    labels = torch.arange(10).repeat_interleave(6)
    features = Features(directions, labels, 3 * torch.eye(10) + 0.1, torch.arange(10))
    assert evaluate.knn_accuracy(features, torch.arange(60), 10, 5) == 100
    assert evaluate.knn_accuracy(features._replace(test_labels=torch.arange(10).roll(1)), torch.arange(60), 10, 5) == 0


def test_few_labels_are_so_many_of_each_class():
    labels = torch.arange(1000) % 10
    draws = [evaluate.few_of_each_class(labels, draw, 10) for draw in (0, 0, 1)]
    assert labels[draws[0]].bincount().tolist() == [evaluate.FEW] * 10
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


def test_the_pictured_correlations_are_those_of_the_whole_matrix():
    z_a, z_b = torch.randn(50, 80), torch.randn(50, 80)
    seen = pictures.correlate(z_a, z_b)
    c = cross_correlation(z_a, z_b)
    torch.testing.assert_close(seen.diagonal, c.diagonal())
    off = c[~torch.eye(80, dtype=torch.bool)]
    assert seen.off_diag_rms == pytest.approx(off.square().mean().sqrt().item(), rel=1e-5)
    assert seen.histogram.sum() == off.numel()
    assert seen.block.shape == (pictures.SHOWN, pictures.SHOWN)


@pytest.mark.parametrize("shape", [(200, 30), (30, 200)])
def test_the_pictured_spectrum_is_the_covariance_matrix_s(shape):
    x = torch.randn(shape).double() + 5
    seen = pictures.spectrum(x)
    expected = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    expected /= expected.sum()
    torch.testing.assert_close(seen.shares[:30], expected[:30], atol=1e-12, rtol=0)
    one_of_many = pictures.Spectrum(torch.tensor([1.0, 0.0, 0.0]))
    all_alike = pictures.Spectrum(torch.full((8,), 1 / 8))
    assert one_of_many.effective_rank == pytest.approx(1)
    assert all_alike.effective_rank == pytest.approx(8)
