"""The trainer's images: every data set in its own file layout, made here; the views; which step sees which images."""

import functools
import gzip
import hashlib
import http.server
import pathlib
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from images import make_imagefolder, pixels
from PIL import Image
from torchvision import datasets as torchvision_datasets

from barlow_fused.train import augment, datasets, loader, main, trainer
from barlow_fused.train.config import ConfigError, combine
from barlow_fused.train.processes import Processes

ALONE = Processes(0, 0, 1)


def make_cifar(folder, monkeypatch, kind):
    """CIFAR's pickled batches with a few images; torchvision is told their check sums."""
    fine = kind is torchvision_datasets.CIFAR100
    root = folder / kind.base_folder
    root.mkdir(parents=True)
    classes = 100 if fine else 10
    sums = {}
    for name, _ in [*kind.train_list, *kind.test_list]:
        labels = [i % classes for i in range(8)]
        contents = {"data": pixels(8, 3072), "fine_labels" if fine else "labels": labels}
        (root / name).write_bytes(pickle.dumps(contents))
        sums[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    key = kind.meta["key"]
    (root / kind.meta["filename"]).write_bytes(pickle.dumps({key: [str(i) for i in range(classes)]}))
    meta_sum = hashlib.md5((root / kind.meta["filename"]).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta_sum})
    return root


def make_stl10(folder, monkeypatch):
    kind = torchvision_datasets.STL10
    root = folder / kind.base_folder
    root.mkdir(parents=True)
    sums = {}
    for name, _ in [*kind.train_list, *kind.test_list]:
        contents = pixels(4, 3 * 96 * 96) if "_X" in name else np.arange(1, 5, dtype=np.uint8)
        (root / name).write_bytes(contents.tobytes())
        sums[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    (root / kind.class_names_file).write_text("\n".join(f"class {i}" for i in range(10)))
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(kind, part, [[name, sums[name]] for name, _ in getattr(kind, part)])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_own_files(name, tmp_path, monkeypatch):
    kind = getattr(torchvision_datasets, name.upper())
    make_cifar(tmp_path, monkeypatch, kind)
    images = datasets.load(name, tmp_path)
    assert len(images.train) == 8 * len(kind.train_list)
    assert len(images.test) == 8
    assert images.classes == int(name.removeprefix("cifar"))
    image, label = datasets.read(images.test, 3)
    assert image.numpy().tolist() == pixels(8, 3072)[3].reshape(3, 32, 32).tolist()
    assert label == 3


def make_fashion(folder, pack):
    """Fashion-MNIST's four files with a few images, as ``pack`` writes them."""
    folder.mkdir(parents=True)
    for part, count in (("train", 8), ("t10k", 4)):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, count, 28, 28))
        pack(folder / f"{part}-images-idx3-ubyte", header + pixels(count, 28, 28).tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, count))
        pack(folder / f"{part}-labels-idx1-ubyte", header + bytes(range(count)))


def pack_gz(path, contents):
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(contents))


@pytest.mark.parametrize("origin", ["torchvision", "debian"])
def test_fashion_mnist_is_read_from_torchvisions_folder_and_from_debians(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_OF_DEBIAN", tmp_path / "debian")
    if origin == "torchvision":
        make_fashion(tmp_path / "FashionMNIST" / "raw", pathlib.Path.write_bytes)
    else:
        make_fashion(tmp_path / "debian", pack_gz)
    images = datasets.load("fashion-mnist", tmp_path)
    assert (len(images.train), len(images.test), images.classes, images.size) == (8, 4, 10, 28)
    image, label = datasets.read(images.train, 5)
    assert image.shape == (1, 28, 28)
    assert image[0].numpy().tolist() == pixels(8, 28, 28)[5].tolist()
    assert label == 5


def test_missing_fashion_mnist_names_both_ways_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "FASHION_OF_DEBIAN", tmp_path / "debian")
    argv = ["--data", "fashion-mnist", "--data-dir", str(tmp_path), "--steps", "1", "--out", str(tmp_path / "run")]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for said in (str(tmp_path), "--download", "--data-dir", str(tmp_path / "debian"), "dataset-fashion-mnist"):
        assert said in message


@pytest.mark.skipif(not datasets.FASHION_OF_DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_fashion_mnist_is_whole(tmp_path):
    images = datasets.load("fashion-mnist", tmp_path)
    assert images.train.labels.bincount().tolist() == [6000] * 10
    assert images.test.labels.bincount().tolist() == [1000] * 10


def test_stl10_pretrains_on_its_unlabelled_part(tmp_path, monkeypatch):
    make_stl10(tmp_path, monkeypatch)
    images = datasets.load("stl10", tmp_path)
    assert images.train.split == "unlabeled"
    assert (images.labelled.split, images.test.split) == ("train", "test")
    assert [datasets.read(images.test, i)[1] for i in range(4)] == [0, 1, 2, 3]
    assert datasets.read(images.train, 0)[0].shape == (3, 96, 96)


def test_an_image_folder_has_imagenet_s_layout(tmp_path):
    images = datasets.load(f"imagefolder:{make_imagefolder(tmp_path)}", tmp_path)
    assert (len(images.train), len(images.test), images.classes) == (6, 6, 2)
    assert datasets.read(images.train, 0)[0].shape == (3, 40, 50)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    assert datasets.load(f"imagefolder:{tmp_path}", tmp_path).test is None


def test_hidden_folders_are_no_classes(tmp_path):
    make_imagefolder(tmp_path / "data")
    for part in ("train", "val"):
        (tmp_path / "data" / part / ".ipynb_checkpoints").mkdir()
    assert datasets.load(f"imagefolder:{tmp_path / 'data'}", tmp_path).classes == 2


def test_an_empty_class_is_named(tmp_path):
    (make_imagefolder(tmp_path) / "train" / "cow").mkdir()
    with pytest.raises(ConfigError, match=r"a class without any.*cow"):
        datasets.load(f"imagefolder:{tmp_path}", tmp_path)


@pytest.mark.parametrize("layout", ["", "train", "train/cat", "somewhere/deep"])
def test_images_without_labels_train_without_accuracies(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.Monitor, "draw", lambda _: None)
    folder = tmp_path / "data" / layout
    folder.mkdir(parents=True)
    if layout == "train/cat":  # one class: nothing to tell apart
        (tmp_path / "data" / "val" / "cat").mkdir(parents=True)
        Image.fromarray(pixels(40, 50, 3)).save(tmp_path / "data" / "val" / "cat" / "0.png")
    for i in range(4):
        Image.fromarray(pixels(40, 50, 3)).save(folder / f"{i}.png")
    flags = [
        "--data",
        f"imagefolder:{tmp_path / 'data'}",
        "--backbone",
        "tiny",
        "--projector",
        "16",
        "--image-size",
        "32",
        "--workers",
        "0",
    ]
    assert main([*flags, "--steps", "1", "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("No accuracies:") == 1


def test_an_image_too_large_to_be_decoded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses twice as many
    images = datasets.load(f"imagefolder:{make_imagefolder(tmp_path)}", tmp_path)
    with pytest.raises(datasets.UnreadableImageError, match=r"train/cat/0.jpg.*decompression bomb"):
        datasets.read(images.train, 0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_missing_data_says_where_it_was_looked_for_and_how_to_get_it(name, tmp_path, capsys):
    assert main(["--data", name, "--data-dir", str(tmp_path), "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path) in message
    assert "--download" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_image_folder_says_what_it_should_hold(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/train/<class>/\*.jpg"):
        datasets.load(f"imagefolder:{tmp_path / 'nowhere'}", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ConfigError, match="train/<class>"):
        datasets.load(f"imagefolder:{tmp_path}", tmp_path)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Serves a folder on a free port of this machine, and returns its address."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_download_fetches_what_is_not_there(serve, tmp_path, monkeypatch):
    kind = torchvision_datasets.CIFAR10
    root = make_cifar(tmp_path / "origin", monkeypatch, kind)
    archive = tmp_path / "origin" / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, kind.base_folder)
    monkeypatch.setattr(kind, "url", f"{serve(tmp_path / 'origin')}/{kind.filename}")
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(ConfigError, match="--download"):
        datasets.load("cifar10", tmp_path / "here")
    assert len(datasets.load("cifar10", tmp_path / "here", download=True).test) == 8
    archive.unlink()
    with pytest.raises(ConfigError, match="could not be downloaded"):
        datasets.load("cifar10", tmp_path / "there", download=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(workers, tmp_path):
    bad = make_imagefolder(tmp_path) / "train" / "dog" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    images = datasets.load(f"imagefolder:{tmp_path}", tmp_path)
    parts = loader.Parts(images, settings(batch_size=6, image_size=32), ALONE)
    with pytest.raises(datasets.UnreadableImageError) as raised:
        next(loader.batches(parts, workers, range(1)))
    assert str(bad) in str(raised.value)
    assert "Traceback" not in str(raised.value)


# Which images, which views


def settings(**values):
    return combine({"preset": "official-resnet50", "workers": 0, **values})


class Numbered(torch.utils.data.Dataset):
    """Image i is grey, of brightness i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return torch.full((3, 16, 16), i, dtype=torch.uint8), i


def numbered(count):
    return datasets.Images("numbered", Numbered(count), None, None, 1, 3, 16, [0.0] * 3, [1.0] * 3)


def test_the_split_of_digits_holds_out_images_that_training_never_sees():
    train, test = datasets.Digits(train=True), datasets.Digits(train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert test.labels.bincount().min() >= 34
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_an_epoch_sees_each_image_once():
    parts = loader.Parts(numbered(100), settings(batch_size=20, accumulate=2), ALONE)
    epochs = [[parts.part_of(e, position, part) for position in range(5) for part in (0, 1)] for e in (0, 1)]
    first, second = ([image for part in epoch for image in part] for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second


@pytest.mark.parametrize("augmentation", ["official", "digits"])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_exactly_what_one_process_sees(augmentation, count):
    config = settings(batch_size=16, accumulate=2, augmentation=augmentation, image_size=16)
    images = datasets.load("digits", None)
    for item in (0, 5):
        whole = loader.Parts(images, config, ALONE)[item]
        shares = [loader.Parts(images, config, Processes(rank, rank, count))[item] for rank in range(count)]
        for view in (0, 1):
            torch.testing.assert_close(torch.cat([share[view] for share in shares]), whole[view], rtol=0, atol=1e-5)


def test_workers_prepare_the_same_views_in_the_same_order():
    parts = loader.Parts(datasets.load("digits", None), settings(batch_size=4, image_size=16), ALONE)
    before = torch.get_rng_state()
    for alone, worked in zip(*(loader.batches(parts, workers, range(3, 7)) for workers in (0, 2)), strict=True):
        torch.testing.assert_close(worked, alone, rtol=0, atol=1e-5)
    assert torch.get_rng_state().equal(before)


def test_each_image_of_a_batch_gets_its_own_view():
    image = datasets.Digits(train=True).images[:1].float() / 255
    view_a, view_b = augment.digit_views(image.expand(8, -1, -1, -1), 16, torch.Generator().manual_seed(0))
    views = torch.cat([view_a, view_b])  # (16, 1, 16, 16)
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + torch.eye(16)
    assert distances.min() > 0.1


@pytest.mark.parametrize("size", [32, 224])
def test_the_official_views_are_asymmetric(size):
    """Blur always and never solarised; blur rarely and solarised in a fifth: as in the official Transform."""
    first, second = augment.official_views(size, [0.5] * 3, [0.5] * 3)
    names = [[type(step).__name__ for step in view.transforms] for view in (first, second)]
    assert names[0] == names[1] == [
        *("RandomResizedCrop", "RandomHorizontalFlip", "RandomApply", "RandomGrayscale", "RandomApply"),
        *("RandomSolarize", "Compose"),
    ]  # fmt: skip
    crop, flip, jitter, grey, _, _, _ = first.transforms
    assert (flip.p, jitter.p, grey.p) == (0.5, 0.8, 0.2)
    assert crop.scale == ((0.08, 1.0) if size == 224 else (0.2, 1.0))
    assert [view.transforms[4].p for view in (first, second)] == [1.0, 0.1]
    assert [view.transforms[5].p for view in (first, second)] == [0.0, 0.2]
    assert first.transforms[4].transforms[0].kernel_size == ((3, 3) if size == 32 else (23, 23))
    image = torch.from_numpy(pixels(3, 300, 200))
    assert first(image).shape == second(image).shape == (3, size, size)
    assert first(image).abs().max() <= 1.001


def test_images_are_evaluated_by_their_centre():
    image = torch.zeros(3, 64, 128, dtype=torch.uint8)
    image[:, :, 48:80] = 255
    assert augment.plain(28, [0.0] * 3, [1.0] * 3, crop=True)(image).shape == (3, 28, 28)
    assert augment.plain(28, [0.0] * 3, [1.0] * 3, crop=True)(image)[:, 14, 14].eq(1).all()
