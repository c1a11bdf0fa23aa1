"""Programs that import llama_cpp and know nothing of us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from kvtuner_gguf import native
from kvtuner_gguf.gguf_file import write_plan
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan

pytestmark = pytest.mark.native

PLANNED = Plan((Pair("q8_0", "q4_0"), Pair("q4_0", "q8_0"), Pair("f16", "q4_0"), Pair("q4_0", "f16")))
STRANGER = """
import json, os, sys
import llama_cpp
lib = llama_cpp.llama_cpp._lib._name
options = json.loads(sys.argv[2])
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False, **options)
on = llm.context_params.flash_attn_type
from kvtuner_gguf import native
layers = [(l.type_k, l.type_v) for l in native.ctx_layers(llm._model.model, llm._ctx.ctx)]
print(json.dumps([lib, os.environ.get("LLAMA_CPP_LIB_PATH"), on, layers, native.ctx_notes(llm._ctx.ctx)]))
llm.close()
"""
OFF, AUTO, ON = 0, -1, 1


def stranger(model: Path, code: str = STRANGER, **options: object) -> list:
    command = [sys.executable, "-c", code, str(model), json.dumps(options)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def planned(tiny, tmp_path):
    path = tmp_path / "planned.gguf"
    write_plan(tiny("llama"), PLANNED, path)
    return path


def test_llama_cpp_alone_has_our_library_and_all_of_the_plan(planned):
    lib, variable, on, layers, notes = stranger(planned)
    assert Path(lib).parent.samefile(native.lib_dir()) and variable is None
    assert [Pair(*layer) for layer in layers] == list(PLANNED.pairs) and notes == [] and on == AUTO


def test_flash_attention_stays_as_it_was_where_no_plan_needs_it(tiny, tmp_path):
    assert stranger(tiny("llama"))[2] == OFF
    keys = tmp_path / "keys.gguf"
    write_plan(tiny("llama"), Plan((Pair("q8_0", "f16"),) * 4), keys)
    _, _, on, layers, notes = stranger(keys)
    assert on == OFF and layers == [["q8_0", "f16"]] * 4 and notes == []
    assert stranger(tiny("llama"), flash_attn=True)[2] == ON


def test_our_own_class_keeps_to_its_caller_s_word(planned):
    ours = STRANGER.replace("llama_cpp.Llama(", "__import__('kvtuner_gguf').Llama(")
    _, _, on, layers, notes = stranger(planned, ours, flash_attn=False)
    assert on == OFF and [v for _, v in layers] == ["f16"] * 4 and any("needs flash attention" in n for n in notes)
    assert stranger(planned, ours)[2:] == [ON, [[p.type_k, p.type_v] for p in PLANNED.pairs], []]


IMPORT = [sys.executable, "-c", "import llama_cpp; print(llama_cpp.llama_cpp._lib._name)"]


def test_a_variable_leaves_llama_cpp_alone(tmp_path):
    """It has no library of its own here: then it finds none."""
    result = subprocess.run(IMPORT, capture_output=True, text=True, env=os.environ | {"KVTUNER_GGUF_AUTO": "0"})
    assert result.returncode == 1 and "FileNotFoundError: Shared library" in result.stderr
    asked = [*IMPORT[:2], f"import kvtuner_gguf; {IMPORT[2]}"]
    assert subprocess.run(asked, capture_output=True, env=os.environ | {"KVTUNER_GGUF_AUTO": "0"}).returncode == 0


def test_another_build_may_be_named(tmp_path):
    folder = tmp_path / "lib"
    folder.mkdir()
    for file in native.lib_dir().iterdir():
        (folder / file.name).symlink_to(file)
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(folder)}
    result = subprocess.run(IMPORT, capture_output=True, text=True, check=True, env=environment)
    assert Path(result.stdout.strip()).parent == folder


def test_another_version_of_llama_cpp_is_left_alone_with_a_line_that_says_so(tmp_path):
    """Our library has the functions and structures of one version."""
    info = tmp_path / "llama_cpp_python-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(IMPORT, capture_output=True, text=True, env=environment)
    assert f"llama-cpp-python is 9.9, our library is for {version('llama-cpp-python')}: left alone" in result.stderr
    assert "FileNotFoundError: Shared library" in result.stderr


def test_a_start_of_python_loads_next_to_nothing():
    code = (
        "import sys; print(*sorted(m for m in sys.modules if m.split('.')[0] in ('kvtuner_gguf', 'numpy', 'typing')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["kvtuner_gguf", "kvtuner_gguf.import_hook"]
