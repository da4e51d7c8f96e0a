"""Complete recipes: every setting that a result depends on, so that a preset does not change when a default does."""

from __future__ import annotations

from typing import Any

from ..width import kappa

# Nothing to download; minutes on a CPU.
DIGITS: dict[str, Any] = {
    "data": "digits",
    "augmentation": "digits",
    "image_size": 16,
    "backbone": "tiny",
    "projector": "512-8192",
    "batch_size": 128,
    "epochs": 45,
    "warmup_epochs": 6,
    "optimizer": "adamw",
    "lr_weights": 0.002,  # for each 256 images
    "lr_biases": 0.002,
    "weight_decay": 1e-4,
    "kappa": kappa(128, 8192, 0.0005),  # 0.0318
    "gradient": "lightly",
    "precision": "fp32",
    "channels_last": True,  # the faster one on a CPU in 5 of 6 pairs of runs
    "knn_every": 10,
}

# solo-learn's recipe for CIFAR (scripts/pretrain/cifar/barlow.yaml). Its loss is scaled by 0.1, which LARS does not see
# and which is taken up by the biases' learning rate here.
CIFAR_RESNET18: dict[str, Any] = {
    "data": "cifar10",
    "augmentation": "official",
    "backbone": "resnet18",
    "stem": "auto",
    "projector": "2048-2048-2048",
    "batch_size": 256,
    "epochs": 1000,
    "warmup_epochs": 10,
    "optimizer": "lars",
    "lr_weights": 0.3,
    "lr_biases": 0.03,
    "trust_coefficient": 0.02,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "kappa": kappa(256, 2048, 0.0051),  # 0.0359
    "gradient": "lightly",
    "precision": "bf16",
    "channels_last": True,
    "workers": 8,
    "knn_every": 10,
    "checkpoint_every": 1000,
}

# The paper's, as in the official main.py: ResNet-50 on ImageNet, 16 or 32 GPUs.
OFFICIAL_RESNET50: dict[str, Any] = {
    "data": "imagefolder:imagenet",
    "augmentation": "official",
    "image_size": 224,
    "backbone": "resnet50",
    "stem": "full",
    "projector": "8192-8192-8192",
    "sync_batch_norm": True,
    "batch_size": 2048,
    "epochs": 1000,
    "warmup_epochs": 10,
    "optimizer": "lars",
    "lr_weights": 0.2,
    "lr_biases": 0.0048,
    "trust_coefficient": 0.001,
    "momentum": 0.9,
    "weight_decay": 1e-6,
    "kappa": kappa(2048, 8192, 0.0051),  # 0.0153
    "gradient": "official",
    "precision": "fp16",
    "channels_last": True,
    "workers": 8,
    "knn_every": 10,
    "checkpoint_every": 1000,
}

PRESETS = {"digits": DIGITS, "cifar-resnet18": CIFAR_RESNET18, "official-resnet50": OFFICIAL_RESNET50}


def preset_of(data: str | None) -> str:
    """The preset that is taken for a data set when none is named."""
    small_photos = ("cifar10", "cifar100", "stl10")
    name = (data or "digits").partition(":")[0]
    return "cifar-resnet18" if name in small_photos else {"imagefolder": "official-resnet50"}.get(name, "digits")
