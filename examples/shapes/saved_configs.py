"""Makes the configurations that diffusers and transformers write independent of where and how weights were trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def load_as_float32(config: Path) -> None:
    """Transformers loads in the type that a configuration names, diffusers in float32: a pipeline needs one type."""
    data = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(data, indent=2) + "\n")


def forget_origin(config: Path) -> None:
    """Diffusers writes down the folder that a part was loaded from, a path of this machine."""
    data = json.loads(config.read_text())
    data.pop("_name_or_path", None)
    config.write_text(json.dumps(data, indent=2) + "\n")
