"""Which model a file holds, whatever plan is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from .errors import PlanError
from .gguf_file import weights_hash
from .gguf_header import GGUF, Header, Tensor, read_header
from .plan import PREFIX
from .reading import opened

_SAMPLE_BYTES = 4096  # of each tensor's start and end


def weights_sample(path: Path) -> str:
    """64 hex digits that name the weights: a hash of the tensor table, and of each tensor's start. Raises PlanError."""
    digest = hashlib.sha256(weights_hash(path).encode())
    with opened(path, GGUF) as file:
        for tensor in read_header(path).tensors:
            file.seek(tensor.offset)
            digest.update(file.read(min(tensor.n_bytes or _SAMPLE_BYTES, _SAMPLE_BYTES)))
    return digest.hexdigest()


def same_model(path: Path, header: Header, model: Path) -> bool:
    """Whether a file is this model, whose header is given, with a plan, another plan, or none; tensors are compared at
    their ends."""
    try:
        other = read_header(path)
    except PlanError:
        return False
    if [_shape(t) for t in other.tensors] != [_shape(t) for t in header.tensors]:
        return False
    with opened(path, GGUF) as a, opened(model, GGUF) as b:
        return all(one == two for one, two in zip_longest(_parts(a, other), _parts(b, header)))


def _shape(tensor: Tensor) -> tuple[object, ...]:
    return tensor.name, tensor.type_name, tensor.shape


def _parts(file: BinaryIO, header: Header) -> Iterator[bytes | None]:
    """Bytes that tell a model: its metadata but for the plan's, in order, then samples of its tensors."""
    for key, start, end in header.keys:
        if not key.startswith(PREFIX):
            file.seek(start)
            yield file.read(end - start)
    yield None
    for tensor in header.tensors:
        for at in (tensor.offset, tensor.offset + max(0, tensor.n_bytes - _SAMPLE_BYTES)):
            file.seek(at)
            yield file.read(min(tensor.n_bytes or _SAMPLE_BYTES, _SAMPLE_BYTES))
