"""Which module of the denoiser a node came from, read from what torch's exporter notes on every node."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_ROOT = "network"  # the hot denoiser's own attribute: module paths are relative to it


def module_path(node: ir.Node) -> str:
    """Path of the innermost module that ``node`` came from, relative to the UNet; empty for the UNet itself.

    The exporter's list ends with the operator: ``['', 'network', 'network.conv_in', 'conv2d']`` gives ``conv_in``.
    """
    return _innermost(node.metadata_props.get(NAME_SCOPES, "['', '']"))


def inside(path: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a module path is one of ``prefixes`` or below one."""
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def parameter_name(path: str) -> str:
    """Name of a UNet parameter in the hot denoiser's state: ``conv_in.weight`` gives ``unet.conv_in.weight``."""
    return f"{_ROOT}.{path}"


@lru_cache(maxsize=2**14)  # a denoiser's nodes have a few thousand scopes, and are asked many times
def _innermost(scopes: str) -> str:
    listed: list[str] = ast.literal_eval(scopes)
    innermost = listed[-2] if len(listed) > 1 else ""
    return innermost.removeprefix(_ROOT).removeprefix(".")
