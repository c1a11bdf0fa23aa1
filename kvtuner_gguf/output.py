"""Where a command writes its plan: one rule for all of them, looked at before any work is spent.

Never a file that the command reads. A file that exists is replaced only if nothing is lost: an empty one, a sidecar by
a sidecar, the same model by the same model; any other with `force`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import PlanError
from .gguf_file import check_target, first_shard, shard_paths, write_plan
from .gguf_header import Header, read_header
from .identity import same_model
from .plan import Plan, is_gguf
from .room import write_errors
from .target import check_folder, check_place, check_writable

_SPARE_BYTES = 1 << 20  # for a plan
_PAGE_BYTES = 8 << 20  # of a report, with the library that draws in it
PAGE_MARK = '<meta name="generator" content="kvtuner-gguf">'  # near the start of each
_NO_FORCE = "Choose another name with -o, or replace it with --force."


@dataclass(frozen=True)
class Output:
    """A place that was checked.

    path   of the file to write
    model  whose copy with the plan it is to be; None = a sidecar. Itself, if path is the model: in place
    notes  what the user should know
    """

    path: Path
    model: Path | None
    notes: tuple[str, ...] = ()

    def write(self, plan: Plan | None, recovery: str = "") -> Path:
        """Write the plan there (None = the model without one). Raises PlanError, which ends with `recovery`."""
        try:
            if self.model is not None:
                write_plan(self.model, plan, None if self.path == self.model else self.path, overwrite=True)
            elif plan is None:
                raise PlanError(f"{self.path}: a sidecar holds a plan, got none. Give a plan, or another name.")
            else:
                plan.save(self.path)
        except PlanError as error:
            raise PlanError(f"{error} {recovery}".strip()) from error
        return self.path


def in_place(model: Path) -> Output:
    """The model itself. Raises PlanError if it cannot be written."""
    header = first_shard(model)
    with write_errors(model, header.file_bytes, "Write a new file elsewhere with -o."):
        check_target(model, True, header, True)
        check_folder(model, header.file_bytes + _SPARE_BYTES)
        n_links = os.stat(model).st_nlink
    if n_links == 1:
        return Output(model, model)
    return Output(model, model, (f"{model} has {n_links} names (hard links): the others keep the file as it was.",))


def sidecar(path: Path, *, reads: Iterable[Path] = (), force: bool = False) -> Output:
    """A file of its own for the plan. Raises PlanError if it must not or cannot be written there."""
    with write_errors(path, _SPARE_BYTES, "Choose another place with -o."):
        _check_new(path, reads)
        if _is_there(path):
            check_writable(path)
            if is_gguf(path):  # even by force: who types the wrong name loses a model
                raise PlanError(
                    f"{path}: is a GGUF model, which a sidecar must not replace. Choose another name with -o."
                )
            if not force and not _is_sidecar(path):
                raise PlanError(f"{path}: exists, and is no plan's sidecar. {_NO_FORCE}")
        check_folder(path, _SPARE_BYTES)
    return Output(path, None)


def copy(model: Path, path: Path, *, reads: Iterable[Path] = (), force: bool = False) -> Output:
    """A new GGUF for the model with its plan. Raises PlanError if it must not or cannot be written there."""
    header = first_shard(model)
    with write_errors(path, header.file_bytes, "Choose another place with -o."):
        _check_new(path, (*shard_paths(model, header), *reads))
        check_target(path, False, header, True)
        if _is_there(path):
            check_writable(path)
            if not force and not same_model(path, header, model):
                raise PlanError(f"{path}: exists, and is not the same model as {model}. {_NO_FORCE}")
        _check_shards(model, path, header)
        check_folder(path, header.file_bytes + _SPARE_BYTES)
    return Output(path, model)


def gguf(model: Path, path: Path | None, *, reads: Iterable[Path] = (), force: bool = False) -> Output:
    """A copy of the model, or, without a path, the model itself. Raises PlanError as these."""
    return in_place(model) if path is None else copy(model, path, reads=reads, force=force)


def output(model: Path, path: Path | None, *, reads: Iterable[Path] = (), force: bool = False) -> Output:
    """A sidecar if the name ends in .json, else as `gguf`. Raises PlanError as these."""
    if path is not None and path.suffix.lower() == ".json":
        return sidecar(path, reads=(model, *reads), force=force)
    return gguf(model, path, reads=reads, force=force)


def check_page(path: Path, *, reads: Iterable[Path] = (), force: bool = False) -> None:
    """A page about a calibration. Raises PlanError if it must not or cannot be written there."""
    with write_errors(path, _PAGE_BYTES, "Choose another place with --report."):
        _check_new(path, reads)
        if _is_there(path):
            check_writable(path)
            if not force and not _is_page(path):
                raise PlanError(f"{path}: exists, and is no report. Choose another name, or replace it with --force.")
        check_folder(path, _PAGE_BYTES)


def _check_new(path: Path, reads: Iterable[Path]) -> None:
    """Raises PlanError if something stands at path that no write may replace, OSError if its folder is none."""
    os.stat(path.parent)
    check_place(path)
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(info.st_mode):
        raise PlanError(
            f"{path}: exists already, and is a folder or a device, need a file. Choose another name with -o."
        )
    for read in reads:
        if read.exists() and os.path.samefile(path, read):
            raise PlanError(f"{path}: is a file that is read here ({read}). Choose another name with -o.")


def _is_there(path: Path) -> bool:
    """Whether a file stands there that holds anything."""
    return path.exists() and path.stat().st_size > 0


def _is_sidecar(path: Path) -> bool:
    try:
        Plan.load(path)
    except PlanError:
        return False
    return True


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return PAGE_MARK.encode() in file.read(1 << 10)


def _check_shards(model: Path, path: Path, header: Header) -> None:
    """Raises PlanError if the other shards of the model do not lie beside path, where they are looked for when it is
    loaded."""
    if header.split_count <= 1:
        return
    for old, new in list(zip(shard_paths(model, header), shard_paths(path, header)))[1:]:
        if not (new.exists() and read_header(new).tensors == read_header(old).tensors):
            raise PlanError(
                f"{path}: a first shard, which is loaded with the other {header.split_count - 1} of the same name, "
                f"and {new.name} is missing there "
                f"or another's. Link or copy the shards to that name first, write a sidecar with -o plan.json, or "
                f"leave -o out to change {model} itself."
            )
