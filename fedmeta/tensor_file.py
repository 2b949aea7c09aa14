"""Reading tensors with a header of texts from one file; nothing in such a file is ever executed."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmeta.errors import FedmetaError


def read_tensors(path: Path, what: str, format_name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads a safetensors file.

    Args:
        path: The file.
        what: What it should be, for the message.
        format_name: The format that its header must name.

    Returns:
        The header's texts, and the tensors by name.

    Raises:
        FedmetaError: The file cannot be read, or is of another format or version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = dict(file.metadata() or {})
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise FedmetaError(f"{path}: not a readable {what} ({error})") from error
    if header.get("format") != format_name:
        raise FedmetaError(f"{path}: not a {what} of this version of fedmeta")
    return header, tensors
