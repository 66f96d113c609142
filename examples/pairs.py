"""Puts a validation report's pictures side by side: floating point above, engine below, difference (x16) at the bottom.

python examples/pairs.py build/demo/w4a8/report-openvino --out docs/images/pairs.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

AMPLIFICATION = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--zoom", type=int, default=2)
    options = parser.parse_args()
    reference, candidate = (row_of(options.report / "pictures", kind, options.count) for kind in ("fp", "engine"))
    difference = abs(reference.astype(int) - candidate).clip(0, 255 // AMPLIFICATION) * AMPLIFICATION
    picture = np.concatenate([reference, candidate, difference.astype(np.uint8)])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.repeat(options.zoom, 0).repeat(options.zoom, 1)).save(options.out)


def row_of(folder: Path, kind: str, count: int) -> np.ndarray:
    """Puts the first pictures of one kind side by side, uint8 [height, count * width, 3]."""
    files = sorted(folder.glob(f"*-{kind}.png"))[:count]
    return np.concatenate([np.asarray(Image.open(file).convert("RGB")) for file in files], axis=1)


if __name__ == "__main__":
    main()
