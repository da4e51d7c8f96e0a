"""The trainer: what a run writes, that it repeats, that it stops cleanly, and that pretraining gains accuracy."""

import dataclasses
import json
import signal
import sys

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from rich.console import Console

from barlow_fused import BarlowTwinsLoss, cross_correlation
from barlow_fused.train import Config, data, evaluate, main, model, pictures, report, trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TINY = ["--steps", "4", "--batch-size", "32", "--projector", "32-128", "--device", "cpu"]


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run):
    """The metrics that must repeat: all but the speed."""
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in read_metrics(run)]


def short_fit(out, **settings):
    """The training loop alone, without the evaluation around it."""
    settings = {"steps": 4, "batch_size": 32, "projector": "32-128", "device": "cpu", **settings}
    config = trainer.start_run(trainer.resolve(Config(out=out, **settings)))
    torch.manual_seed(config.seed)
    network = model.BarlowTwins(config.projector_widths)
    backend = "auto" if config.loss == "fused" else "reference"
    criterion = BarlowTwinsLoss(lambd=config.lambd, backend=backend, return_terms=True)
    images = data.load().train_images.to(torch.get_default_dtype())
    return network, trainer.fit(network, criterion, images, config, Console(quiet=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*TINY, "--out", str(out)]) == 0
    return out


def test_a_run_writes_every_artefact(run):
    assert {path.name for path in run.iterdir()} == {
        "checkpoint.pt",
        "config.toml",
        "cross_correlation.png",
        "encoder.pt",
        "loss.png",
        "metrics.jsonl",
        "results.json",
        "views.png",
    }
    for picture in run.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_written_configuration_is_resolved(run):
    config = tomllib.loads((run / "config.toml").read_text())
    assert set(config) == {field.name for field in dataclasses.fields(Config)} | {"environment"}
    assert config["steps"] == 4
    assert config["epochs"] == 1
    assert config["device"] == "cpu"
    assert config["out"] == str(run)
    assert config["environment"]["torch"] == torch.__version__


def test_every_step_of_a_short_run_is_logged(run):
    metrics = read_metrics(run)
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4]
    for entry in metrics:
        assert set(entry) == {"step", "epoch", "loss", "on_diag", "off_diag", "lr", "images_per_second"}
        assert entry["loss"] == pytest.approx(entry["on_diag"] + Config.lambd * entry["off_diag"], rel=1e-5)
        assert entry["epoch"] == 1
        assert entry["images_per_second"] > 0


def test_a_long_run_is_logged_every_tenth_step(tmp_path):
    short_fit(tmp_path, steps=201, batch_size=2, projector="8")
    steps = [entry["step"] for entry in read_metrics(tmp_path)]
    assert steps == [1, *range(10, 201, 10), 201]


def test_the_checkpoint_and_the_encoder_load_without_pickle(run):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4
    assert checkpoint["config"]["projector"] == "32-128"
    network = model.BarlowTwins([32, 128])
    network.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.AdamW(trainer.parameter_groups(network, 1e-4))
    optimizer.load_state_dict(checkpoint["optimizer"])
    encoder = model.Encoder()
    encoder.load_state_dict(torch.load(run / "encoder.pt", weights_only=True))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][f"encoder.{name}"])


def test_the_results_hold_all_accuracies(run):
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"raw_pixels", "untrained_encoder", "pretrained_encoder"}
    for accuracies in results.values():
        assert set(accuracies) == set(evaluate.Accuracy._fields)
        assert all(0 < accuracy <= 100 for accuracy in accuracies.values())


def test_what_is_printed_fits_80_columns_and_says_where_the_run_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    accuracy = evaluate.Accuracy(*(4 * [100.0]))
    report.print_gain(Console(), accuracy, accuracy._replace(knn_few=1.0), accuracy, 1437, 360)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("+99.0" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_a_log_that_is_no_terminal_gets_about_ten_lines(capsys):
    entry = {"loss": 1.0, "on_diag": 1.0, "off_diag": 1.0, "images_per_second": 1.0}
    with report.Progress(Console(force_terminal=False), 1000) as progress:
        for step in range(1, 1001):
            progress.update(step, entry if step % 10 == 0 else None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("step 1000/1000")


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    network, _ = short_fit(tmp_path / "same")
    short_fit(tmp_path / "other", seed=1)
    assert numbers(tmp_path / "same") == numbers(run)
    assert numbers(tmp_path / "other") != numbers(run)
    weights = torch.load(run / "encoder.pt", weights_only=True)
    assert all(weights[name].equal(parameter) for name, parameter in network.encoder.named_parameters())


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-8), (torch.float32, 2e-2)])
def test_fused_and_reference_loss_train_alike(tmp_path, dtype, rel):
    torch.set_default_dtype(dtype)
    try:
        short_fit(tmp_path / "fused")
        short_fit(tmp_path / "reference", loss="reference")
    finally:
        torch.set_default_dtype(torch.float32)
    for fused, reference in zip(numbers(tmp_path / "fused"), numbers(tmp_path / "reference"), strict=True):
        assert fused == pytest.approx(reference, rel=rel)


def test_a_short_run_beats_the_untrained_encoder_with_few_labels(tmp_path):
    digits = data.load()
    config = Config(out=tmp_path, steps=60, batch_size=128, projector="256-1024", device="cpu")
    config = trainer.start_run(trainer.resolve(config))
    torch.manual_seed(0)
    network = model.BarlowTwins(config.projector_widths)
    model.set_batch_norm_statistics(network, data.enlarge(digits.train_images))
    before = trainer.accuracy(network, digits, torch.device("cpu"))
    criterion = BarlowTwinsLoss(lambd=0.005, return_terms=True)
    metrics = trainer.fit(network, criterion, digits.train_images, config, Console(quiet=True))
    after = trainer.accuracy(network, digits, torch.device("cpu"))
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert after.knn_few > before.knn_few + 5
    assert after.probe_few > before.probe_few + 3


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "0"),
        ("--steps", "many"),
        ("--epochs", "-1"),
        ("--batch-size", "1"),
        ("--batch-size", "1438"),
        ("--projector", "512-"),
        ("--projector", "512-0"),
        ("--lambd", "-1"),
        ("--lambd", "nan"),
        ("--lr", "0"),
        ("--lr", "inf"),
        ("--weight-decay", "-1"),
        ("--seed", "-1"),
        ("--loss", "unfused"),
        ("--device", "tpu"),
    ],
)
def test_a_bad_flag_is_named_with_code_2(flag, value, tmp_path, capsys):
    assert exit_code([flag, value, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert flag in message
    assert value in message
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert exit_code([*TINY, "--out", str(run)]) == 2
    assert "--out" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}
    (tmp_path / "file").touch()
    assert exit_code([*TINY, "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_said_with_code_2(tmp_path, capsys):
    assert exit_code([*TINY, "--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "--device" in capsys.readouterr().err


def exit_code(argv):
    try:
        return main(argv)
    except SystemExit as end:  # argparse's own errors
        return end.code


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer.time, "strftime", lambda pattern: "digits-now")
    outs = [trainer.start_run(trainer.resolve(Config(steps=1))).out for _ in range(3)]
    assert len(set(outs)) == 3
    assert all((out / "config.toml").is_file() for out in outs)


def test_a_run_that_diverges_stops_with_a_message_and_keeps_its_state(tmp_path, capsys):
    assert main([*TINY, "--out", str(tmp_path), "--lr", "1e38"]) == 1
    message = capsys.readouterr().err
    assert "step 2" in message
    assert "checkpoint.pt" in message
    good = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert good["step"] == 0
    assert all(tensor.isfinite().all() for tensor in good["model"].values())
    assert torch.load(tmp_path / "diverged.pt", weights_only=True)["step"] == 1
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_weights_that_are_not_finite_are_never_the_last_good_checkpoint(tmp_path):
    with pytest.raises(trainer.DivergedError, match="weight is NaN or infinite after step 1"):
        short_fit(tmp_path, steps=1, lr=1e38, weight_decay=1e38)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 0


@pytest.fixture
def signal_in_step_3(monkeypatch):
    """Raises a signal amid the third step of a run of 32 images a step."""
    two_views = data.two_views

    def set_up(signum):
        def interrupted_views(images, seed, step):
            if step == 2 and len(images) == 32:
                signal.raise_signal(signum)
            return two_views(images, seed, step)

        monkeypatch.setattr(data, "two_views", interrupted_views)

    return set_up


def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(signal_in_step_3, tmp_path, capsys):
    signal_in_step_3(signal.SIGINT)
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    assert "SIGINT after step 3" in capsys.readouterr().err
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert len(read_metrics(tmp_path)) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_does_the_same(signal_in_step_3, tmp_path):
    signal_in_step_3(signal.SIGTERM)
    with pytest.raises(trainer.Interrupted, match="SIGTERM after step 3") as stopped:
        short_fit(tmp_path)
    assert stopped.value.signum == signal.SIGTERM
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3


def test_a_second_ctrl_c_stops_at_once():
    with trainer.StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    trainer.save({"step": 1}, path)

    def fail(contents, file):
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.save({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_the_split_holds_out_images_that_training_never_sees():
    digits = data.load()
    assert len(digits.train_images) == data.TRAIN_IMAGES
    assert len(digits.test_images) == data.TEST_IMAGES
    assert digits.test_labels.bincount().min() >= 34
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)


def test_an_epoch_sees_each_image_once():
    images = torch.arange(100)
    epoch = torch.cat([data.random_batch(images, 10, seed=0, step=step) for step in range(10)])
    assert epoch.sort().values.equal(images)
    next_epoch = torch.cat([data.random_batch(images, 10, seed=0, step=step) for step in range(10, 20)])
    assert not next_epoch.equal(epoch)


def test_each_image_of_a_batch_gets_its_own_view():
    image = data.load().train_images[:1]
    view_a, view_b = data.two_views(image.expand(8, -1, -1, -1), seed=0, step=0)
    views = torch.cat([view_a, view_b])  # (16, 1, 16, 16)
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + torch.eye(16)
    assert distances.min() > 0.1


def test_batch_norm_statistics_are_those_of_the_images():
    network = model.BarlowTwins([16, 16])
    images = data.enlarge(data.load().train_images)
    model.set_batch_norm_statistics(network, images)
    features = trainer.inference(network.encoder.stem, images)
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.var((0, 2, 3)), torch.ones(32), atol=2e-2, rtol=0)
    assert network.encoder.stem[1].momentum == 0.1


def test_knn_finds_the_label_of_the_nearest_direction():
    directions = torch.eye(10).repeat_interleave(6, dim=0)  # (60, 10), six of each class
    labels = torch.arange(10).repeat_interleave(6)
    features = evaluate.Features(directions, labels, 3 * torch.eye(10) + 0.1, torch.arange(10))
    assert evaluate.knn_accuracy(features, torch.arange(60)) == 100


def test_few_labels_are_so_many_of_each_class():
    labels = data.load().train_labels
    draws = [evaluate.few_of_each_class(labels, draw) for draw in (0, 0, 1)]
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


def test_the_schedule_warms_up_and_falls_to_a_thousandth():
    config = trainer.resolve(Config(steps=100, lr=1.0))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    rates = [trainer.set_learning_rate(optimizer, step, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.001)
    assert rates[9:] == sorted(rates[9:], reverse=True)
