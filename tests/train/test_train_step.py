"""One optimiser step: networks and weights, LARS and its schedule, the accumulated loss, fused against reference."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("tensorboard")

import torchvision

from barlow_fused import barlow_twins_loss, suggest_lambda
from barlow_fused.reference import reference_loss
from barlow_fused.train import main, model, optim, step, trainer
from barlow_fused.train.config import ConfigError, combine

CPU = torch.device("cpu")


@pytest.fixture
def training_only(monkeypatch):
    """No evaluation and no pictures."""
    for name in ("look", "accuracy", "pixels", "draw", "knn"):
        monkeypatch.setattr(trainer.Monitor, name, lambda self: None)


# Networks


@pytest.mark.parametrize(
    ("name", "features"),
    [
        *(("resnet18", 512), ("resnet50", 2048), ("resnext50_32x4d", 2048), ("vgg11", 4096), ("densenet121", 1024)),
        *(("mobilenet_v3_small", 1024), ("efficientnet_b0", 1280), ("convnext_tiny", 768), ("swin_t", 768)),
        *(("regnet_y_400mf", 440), ("googlenet", 1024), ("timm:resnet10t", 512)),
    ],
)
def test_any_classifier_of_torchvision_and_timm_is_a_backbone(name, features):
    network = model.build(name, 3, 64, [16, 32], stem="full")
    assert network.features == features
    y = torch.rand(2, 3, 64, 64)
    z_a, z_b = network.eval()(y, y)
    assert z_a.shape == (2, 32)
    torch.testing.assert_close(z_a, z_b)
    assert not any(isinstance(module, nn.Linear) and module.out_features == 1000 for module in network.modules())


def test_a_vision_transformer_needs_its_own_image_size():
    with pytest.raises(ConfigError, match="--backbone vit_b_32 cannot take images of 64 pixels"):
        model.build("vit_b_32", 3, 64, [16])


@pytest.mark.parametrize("name", ["resnet19", "squeezenet1_0", "timm:resnet19", "fcn_resnet50"])
def test_what_is_no_backbone_is_named(name):
    with pytest.raises(ConfigError, match=name):
        model.build(name, 3, 64, [16])


def test_small_images_get_a_small_stem():
    for size, stem, kernel in ((32, "auto", 3), (224, "auto", 7), (32, "full", 7), (224, "small", 3)):
        backbone = model.build("resnet18", 3, size, [16], stem=stem).backbone
        assert backbone.conv1.kernel_size == (kernel, kernel)
        assert isinstance(backbone.maxpool, nn.Identity) == (kernel == 3)
    with pytest.raises(ConfigError, match="--stem small"):
        model.build("vgg11", 3, 32, [16], stem="small")


def test_grey_images_pass_a_network_for_colours():
    network = model.build("resnet18", 1, 16, [16])
    assert network.eval()(*[torch.rand(2, 1, 16, 16)] * 2)[0].shape == (2, 16)


def test_batch_norm_statistics_are_those_of_the_images():
    network = model.build("tiny", 1, 16, [16, 16])
    images = torch.rand(256, 1, 16, 16)
    model.set_batch_norm_statistics(network.backbone, images)
    features = network.backbone.eval().stem(images)
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.var((0, 2, 3)), torch.ones(32), atol=2e-2, rtol=0)
    assert network.backbone.stem[1].momentum == 0.1


# The official layouts


class OfficialBarlowTwins(nn.Module):
    """What facebookresearch/barlowtwins saves: backbone, projector and the loss's batch norm."""

    def __init__(self, widths):
        super().__init__()
        self.backbone = torchvision.models.resnet18(zero_init_residual=True)
        self.backbone.fc = nn.Identity()
        self.projector = nn.Sequential(
            nn.Linear(512, widths[0], bias=False),
            nn.BatchNorm1d(widths[0]),
            nn.ReLU(inplace=True),
            nn.Linear(widths[0], widths[1], bias=False),
        )
        self.bn = nn.BatchNorm1d(widths[1], affine=False)


@pytest.fixture
def official(tmp_path):
    """The two files of the official code, of a smaller network."""
    network = OfficialBarlowTwins([16, 32])
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}  # DistributedDataParallel's
    torch.save({"epoch": 3, "model": state, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pth")
    torch.save(network.backbone.state_dict(), tmp_path / "resnet.pth")
    return network, tmp_path


def test_official_weights_are_a_starting_point(official):
    network, folder = official
    for name, parts in (("resnet.pth", ["backbone"]), ("checkpoint.pth", ["backbone", "projector"])):
        ours = model.build("resnet18", 3, 224, [16, 32])
        assert model.load_weights(ours, folder / name).startswith(" and ".join(parts))
        for part in parts:
            for key, tensor in getattr(network, part).state_dict().items():
                assert tensor.equal(getattr(ours, part).state_dict()[key])


def test_weights_of_another_model_are_refused(official):
    _, folder = official
    with pytest.raises(ConfigError, match=r"of another model: .* tensors differ, the first is layer1.0.conv1.weight"):
        model.load_weights(model.build("resnet50", 3, 224, [16, 32]), folder / "resnet.pth")
    with pytest.raises(ConfigError, match=r"projector.3.weight: \(64, 16\) in this model, \(32, 16\) in the file"):
        model.load_weights(model.build("resnet18", 3, 224, [16, 64]), folder / "checkpoint.pth")
    (folder / "text.pth").write_text("no weights")
    (folder / "empty.pth").write_bytes(b"")
    torch.save({}, folder / "nothing.pth")
    torch.save({"model": 3}, folder / "number.pth")
    for name in ("text.pth", "empty.pth", "nothing.pth", "number.pth"):
        with pytest.raises(ConfigError, match="not a file of weights"):
            model.load_weights(model.build("resnet18", 3, 224, [16]), folder / name)


def test_the_trained_encoder_is_plain_torchvision(official, training_only, tmp_path):
    _, folder = official
    out = tmp_path / "run"
    argv = ["--data", "fake", "--preset", "official-resnet50", "--backbone", "resnet18", "--image-size", "32"]
    argv += ["--projector", "16-32", "--batch-size", "4", "--steps", "2", "--workers", "0", "--precision", "fp32"]
    assert main([*argv, "--init", str(folder / "checkpoint.pth"), "--out", str(out)]) == 0
    plain = torchvision.models.resnet18()
    missing, unexpected = plain.load_state_dict(torch.load(out / "encoder.pt", weights_only=True), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    assert plain.conv1.weight.norm() > 0
    again = model.build("resnet18", 3, 224, [16, 32])
    assert model.load_weights(again, out / "checkpoints" / "step-00000002.pt").startswith("backbone and projector")


# The optimiser


def official_lars(p, grad, mu, lr, weight_decay, momentum=0.9, eta=0.001):
    """The official LARS, of one tensor: biases and batch norm are neither decayed nor adapted."""
    if p.ndim != 1:
        grad = grad + weight_decay * p
        grad = grad * torch.where(grad.norm() > 0, eta * p.norm() / grad.norm(), 1.0)
    mu = momentum * mu + grad
    return p - lr * mu, mu


def test_lars_is_the_official_one():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30)).double()
    config = combine({"preset": "official-resnet50", "weight_decay": 1e-4, "batch_size": 256})
    optimizer = optim.build(network, config)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in network.parameters()]
    for number in range(3):
        optim.set_learning_rates(optimizer, 20 + number, 100, 1, config)
        rates = [group["lr"] for group in optimizer.param_groups]
        for i, p in enumerate(network.parameters()):
            p.grad = torch.randn_like(p)
            expected[i] = official_lars(expected[i][0], p.grad, expected[i][1], rates[p.ndim == 1], 1e-4)
        optimizer.step()
    # timm divides by |grad| + weight_decay |p| where the official code divides by |grad + weight_decay p|
    for p, (value, _) in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-8)


def test_the_schedule_is_the_official_one():
    def official(number, epochs, loader, batch_size):  # adjust_learning_rate
        max_steps, warmup_steps, base_lr = epochs * loader, 10 * loader, batch_size / 256
        if number < warmup_steps:
            return base_lr * number / warmup_steps
        number, max_steps = number - warmup_steps, max_steps - warmup_steps
        q = 0.5 * (1 + math.cos(math.pi * number / max_steps))
        return base_lr * q + base_lr * 0.001 * (1 - q)

    config = combine({"preset": "official-resnet50", "epochs": 100, "batch_size": 512})
    optimizer = optim.build(nn.Linear(2, 2), config)
    for number in range(0, 700, 13):
        lr = optim.set_learning_rates(optimizer, number, 700, 7, config)
        share = official(number, 100, 7, 512)
        assert lr == pytest.approx(0.2 * share)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.0048 * share)


# Accumulation


class Plain(nn.Module):
    """A network of two views whose images do not know of one another."""

    def __init__(self, norm, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 24), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(24, 40))

    def forward(self, y_a, y_b):
        return self.layers(y_a), self.layers(y_b)


def gradients(network, views, accumulate, **settings):
    own = {"precision": "fp64", "channels_last": False, "batch_size": len(views[0]), "accumulate": accumulate}
    config = combine({**own, **settings})
    criterion = step.criterion(config, trainer.Processes(0, 0, 1), network)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    stepper = step.Stepper(network, criterion, optim.build(network, config), scaler, config, CPU, 0)
    terms = stepper.backward(list(zip(*(view.chunk(accumulate) for view in views), strict=True)), 3)
    return terms.loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("loss", ["fused", "reference"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(loss):
    views = torch.randn(2, 24, 12).double()
    results = []
    for accumulate in (1, 2, 6):
        torch.manual_seed(0)
        results.append(gradients(Plain(nn.LayerNorm(24)).double(), views, accumulate, loss=loss))
    for value, grads in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-12, atol=0)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-9, atol=1e-12)


def test_batch_norms_see_a_part_and_the_loss_sees_the_batch():
    views = torch.randn(2, 24, 12).double()
    torch.manual_seed(0)
    network, twin = (Plain(nn.BatchNorm1d(24), dropout=0.3).double() for _ in range(2))
    twin.load_state_dict(network.state_dict())
    loss, grads = gradients(network, views, 3)
    passed = []
    for part, pair in enumerate(zip(*(view.chunk(3) for view in views), strict=True)):
        torch.manual_seed(step.derive(0, "network", 3, part, 0))
        passed.append(twin(*pair))
    z_a, z_b = (torch.cat(z) for z in zip(*passed, strict=True))
    expected = reference_loss(z_a, z_b, combine({"batch_size": 24}).lambd).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)
    for (name, seen), (_, once) in zip(network.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(seen, once, rtol=1e-12, atol=1e-15, msg=f"{name} moved more than once a part")


# Whole runs


QUICK = ["--steps", "50", "--batch-size", "32", "--warmup-epochs", "0.5", "--checkpoint-every", "50", "--device", "cpu"]


def run(out, *flags):
    assert main([*QUICK, "--out", str(out), *flags]) == 0
    metrics = trainer.read_jsonl(out / "metrics.jsonl")
    return torch.tensor([[entry[name] for name in ("loss", "on_diag", "off_diag")] for entry in metrics]).double()


def weights(out):
    return torch.load(out / "checkpoints" / "step-00000050.pt", weights_only=True)["model"]


@pytest.mark.parametrize(("projector", "route"), [("64-256", "gram"), ("64-48", "direct")])
def test_fused_and_reference_train_alike_in_float64(projector, route, training_only, tmp_path):
    """The same trajectory to 1e-9 over 50 steps: every loss, both terms, and the weights at the end."""
    flags = ["--precision", "fp64", "--projector", projector]
    fused, reference = (run(tmp_path / loss, *flags, "--loss", loss) for loss in ("fused", "reference"))
    assert reference[-1, 0] < 0.7 * reference[0, 0]  # it did train
    assert ((fused - reference).abs() / reference).max() < 1e-9
    ours, theirs = weights(tmp_path / "fused"), weights(tmp_path / "reference")
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).double().norm() <= 1e-9 * tensor.double().norm(), name


@pytest.mark.parametrize(("projector", "accumulate"), [("64-256", 1), ("64-48", 1), ("8-256", 2)])
def test_the_last_layer_in_the_loss_trains_alike(projector, accumulate, training_only, tmp_path):
    """By the Gram, the direct and the hidden route; its checkpoints are those of the other."""
    flags = ["--precision", "fp64", "--projector", projector, "--accumulate", str(accumulate)]
    fused = run(tmp_path / "fused", *flags, "--fused-projector")
    separate = run(tmp_path / "separate", *flags, "--no-fused-projector")
    assert separate[-1, 0] < separate[0, 0]
    assert ((fused - separate).abs() / separate).max() < 1e-9
    ours, theirs = weights(tmp_path / "fused"), weights(tmp_path / "separate")
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).double().norm() <= 1e-9 * tensor.double().norm(), name
    more = ["--steps", "60", "--resume", str(tmp_path / "fused"), "--no-fused-projector", "--device", "cpu"]
    assert main(more) == 0
    assert len(trainer.read_jsonl(tmp_path / "fused" / "metrics.jsonl")) == 60


def test_where_the_last_layer_is_fused(monkeypatch, capsys):
    assert not trainer.crowded(combine({"projector": "512-8192", "device": "cpu"}))
    assert trainer.crowded(combine({"projector": "512-100000000", "device": "cpu"}))
    assert main(["--fused-projector", "--loss", "reference", "--device", "cpu"]) == 2
    assert "--fused-projector is of --loss fused" in capsys.readouterr().err


def test_fused_and_reference_train_alike_in_float32(training_only, tmp_path, monkeypatch):
    """Float32 trajectories part: rounding grows as training goes on. How far do two of the reference's own part?

    On one machine its runs are bit for bit the same, so that would be no measure. Other runs of it, on another machine
    or with another number of threads, sum in another order. That is done here: the samples are handed to the loss in
    another order, which changes nothing but the rounding. Runs agree to the loss's own accuracy until in one of them a
    rounding turns an activation's sign, some 10 to 20 steps later; from there on they part quickly. When that happens
    is chance, so the fused run is compared over the first steps and at the end: there it has drifted no more than five
    times as far as the farthest of three such runs of the reference.
    """
    flags = ["--projector", "64-256", "--loss", "reference"]
    reference = run(tmp_path / "reference", *flags)

    def shuffled(seed):
        def loss(z_a, z_b, *args):
            order = torch.randperm(len(z_a), generator=torch.Generator().manual_seed(seed))
            return reference_loss(z_a[order], z_b[order], *args)

        return loss

    runs = []
    for seed in (1, 2, 3):
        monkeypatch.setattr("barlow_fused.loss.reference_loss", shuffled(seed))
        runs.append(run(tmp_path / f"shuffled-{seed}", *flags))
    fused = run(tmp_path / "fused", "--projector", "64-256", "--loss", "fused")
    drift = torch.stack([(other - reference).abs() / reference for other in runs])[..., 0].amax(0).cummax(0).values
    ours = ((fused - reference).abs() / reference)[:, 0].cummax(0).values
    assert drift[-1] > 0
    assert ours[4] <= 1e-6  # the loss's own accuracy in float32
    assert ours[-1] <= 5 * drift[-1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "bf16"],
        ["--precision", "fp16", "--accumulate", "2"],
        ["--channels-last", "--optimizer", "sgd"],
        ["--optimizer", "lars", "--backbone", "resnet18"],
        ["--fused-projector", "--precision", "bf16", "--optimizer", "lars"],
        ["--fused-projector", "--precision", "fp16", "--accumulate", "2"],
    ],
    ids=" ".join,
)
def test_every_way_to_train_runs_and_learns(flags, training_only, tmp_path):
    assert main([*QUICK, "--projector", "64-128", "--out", str(tmp_path), "--steps", "3", *flags]) == 0
    losses = [entry["loss"] for entry in trainer.read_jsonl(tmp_path / "metrics.jsonl")]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)


def test_compile_compiles_the_network(training_only, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self)))
    flags = ["--steps", "1", "--projector", "16", "--compile", "--out", str(tmp_path)]
    assert main([*QUICK, *flags]) == 0
    assert compiled == [model.BarlowTwins]


def test_the_loss_is_the_packages_own():
    config = combine({"kappa": 0.01, "batch_size": 8, "projector": "40"})
    z_a, z_b = torch.randn(2, 8, 40)
    terms = step.criterion(config, trainer.Processes(0, 0, 1), nn.Identity())(z_a, z_b)
    torch.testing.assert_close(terms.loss, barlow_twins_loss(z_a, z_b, lambd=suggest_lambda(8, 40, 0.01)))
