"""What is no file is refused, and not waited for."""

from __future__ import annotations

import os

import pytest

from kvtuner_gguf import Plan, native
from kvtuner_gguf.errors import KvtunerError
from kvtuner_gguf.gguf_header import read_header


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("read", [Plan.load, read_header, native.model_file])
def test_a_pipe_that_nobody_writes_to_is_refused_at_once(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KvtunerError, match="pipe.* is a folder or a device, need a"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("read", [Plan.load, read_header, native.model_file])
def test_a_folder_is_refused(read, tmp_path):
    with pytest.raises(KvtunerError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", [b"m\xe8.gguf", "Größe 模型.gguf".encode()])
def test_a_models_name_goes_to_c_as_the_file_system_has_it(name):
    assert native.model_file(os.fsdecode(name)).encode("utf-8") == name
