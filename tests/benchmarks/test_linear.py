"""The benchmark of the last layer and the loss: its numbers are right, its table and picture are made of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import linear, pictures, readme, results
from benchmarks.__main__ import main


def test_the_truth_is_the_truth():
    inputs = linear.make(24, 7, 5000, torch.float64, torch.device("cpu"))
    loss, grads = linear.truth(inputs)
    for method in linear.METHODS.values():
        errors, wrong = linear.wrong(method, inputs, (loss, grads))
        assert max(errors) < 1e-9
        assert wrong is None
    off = [g * (1 + 1e-6) for g in grads]
    assert linear.wrong(linear.separate, inputs, (loss, off))[1]


def test_a_run(tmp_path, capsys):
    file, picture = tmp_path / "linear-cpu.json", tmp_path / "picture.png"
    arguments = ["--linear", "8", "--n", "32", "--d", "100,300", "--seconds", "0.01", "--device", "cpu"]
    assert main([*arguments, "--json", str(file), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    run = results.load(file)
    assert [shape["d"] for shape in run["shapes"]] == [100, 300]
    assert pictures.digest_of(picture) is not None
    linear.draw(run, picture)  # as the documents' are, from the file
    assert pictures.digest_of(picture) == linear.digest(run)
    shown = readme.render("<!-- benchmarks: linear linear-cpu -->\n<!-- /benchmarks -->", tmp_path)
    assert shown.count("| 32 | 8 | 300 |") == len(linear.METHODS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--n", "1"], "--n: at least 2"), (["--peers", "fast"], "'fast' is not a method"), (["--d", "0"], "at least 1")],
)
def test_bad_arguments(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--linear", "8", *flags])
    assert message in capsys.readouterr().err
