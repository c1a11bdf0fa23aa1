"""A small GGUF file, a plan for it, and what a call that fails must say and leave."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from kvtuner_gguf.errors import PlanError
from kvtuner_gguf.gguf_header import read_header
from kvtuner_gguf.pair import Pair
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Quality

PLAN = Plan(
    pairs=(Pair("q8_0", "q4_0"), Pair("", ""), Pair("q4_0", "iq4_nl")),
    bits_per_value=5.1,
    quality=Quality(0.0123, 1.25, 0.975, 4096),
    rival=Pair.parse("q5_0"),
    rival_quality=Quality(0.02, 2.5, 0.96, 4096),
    rival_bits=5.5,
    calibration={"text": "Größe", "seed": 7},
)


def our_metadata(path: Path) -> dict[str, object]:
    """The keys of a plan in a file, with their values."""
    return {key: value for key, value in read_header(path).metadata.items() if key.startswith("kvtuner.")}


def make_model(
    path: Path,
    *,
    n_layer: int = 3,
    alignment: int | None = None,
    n_tensors: int = 3,
    last: bytes | None = None,
    split: tuple[int, int] | None = None,
    extra: Sequence[tuple[str, str]] = (),
) -> Path:
    """A small GGUF with every kind of metadata, a float tensor, a quantized one and one of odd size."""
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(n_layer)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "é", "", "日本"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_array("test.flags", [True, False])
    writer.add_bool("test.bool", True)
    writer.add_float64("test.f64", 0.1)
    writer.add_uint8("test.u8", 255)
    writer.add_int64("test.i64", -5)
    if split:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    for key, value in extra:
        writer.add_string(key, value)
    rng = np.random.default_rng(n_layer)
    tensors = [
        ("token_embd.weight", rng.standard_normal((4, 32)).astype(np.float32), None),
        ("blk.0.ffn.weight", rng.integers(0, 256, (3, 36), dtype=np.uint8), GGMLQuantizationType.Q4_0),
        ("norm", rng.standard_normal(7).astype(np.float16), None),
    ]
    for name, data, kind in tensors[:n_tensors]:
        writer.add_tensor(f"s{split[0]}.{name}" if split else name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if last is not None:
        with open(path, "ab") as file:
            file.write(last)
    return path


def fault(call: Callable[[], object], *parts: object) -> str:
    """The message of the PlanError that call raises; it must hold all parts and end with a cure."""
    with pytest.raises(PlanError) as caught:
        call()
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message
    assert re.search(r"\. [A-Z][^.]*.*\.$", message), f"no cure: {message}"
    return message


def unchanged(path: Path, original: bytes, names: Sequence[str] = ("model.gguf",)) -> None:
    """Asserts that the file is as it was, and that its folder holds nothing but these names."""
    assert path.read_bytes() == original
    assert sorted(os.listdir(path.parent)) == sorted(names)
