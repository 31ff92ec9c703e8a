"""ResNet50's shape with random weights: as much to compute as the real one, and no network needed to get it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torchvision  # type: ignore[import-untyped]  # the package brings no types

from infra.settings import ENV_PREFIX


def resnet50_variables(folder: Path) -> dict[str, str]:
    """Write the weights into `folder`. Returns the variables of a service that uses them."""
    torch.manual_seed(7)
    path = folder / "random-resnet50.pth"
    torch.save(torchvision.models.resnet50().state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    own = {"MODEL": "own", "OWN_NETWORK": "resnet50", "OWN_WEIGHTS": str(path), "WEIGHTS_SHA256": digest}
    return {ENV_PREFIX + name: value for name, value in own.items()}
