"""How long a calibration is said to take: as its parts make it, and as it was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvtuner_gguf.calibrate.estimate import seconds
from kvtuner_gguf.calibrate.goals import WithinBits
from kvtuner_gguf.calibrate.options import Options
from kvtuner_gguf.calibrate.pipeline import sizes_of
from kvtuner_gguf.calibrate.progress import OWN_WEIGHTS, PAPER_STAGES, STAGES

OPTIONS = Options(Path("model.gguf"), WithinBits(4.5))
SMOLLM2 = {"n_vocab": 49152, "n_embd": 576, "n_params": 134_515_008}


def of_stages(
    options: Options, own: float = 1.8e-3, searched: float = 0.38e-3, n_layer: int = 30, **more
) -> dict[str, float]:
    session = SimpleNamespace(**SMOLLM2, **{"n_threads": 2, **more})
    plannable = SimpleNamespace(sizes=sizes_of(options), types=dict.fromkeys(range(n_layer)))
    return seconds(options, plannable, session, own, searched)


def of(options: Options = OPTIONS, own: float = 1.8e-3, searched: float = 0.38e-3, n_layer: int = 30, **more) -> float:
    return sum(of_stages(options, own, searched, n_layer, **more).values())


def test_smollm2_takes_as_long_as_it_did():
    """144 s on two cores of a Zen 4, where a token of a prompt took 1.8 and .38 ms."""
    assert of() == pytest.approx(144, rel=0.2)


@pytest.mark.parametrize(("method", "stages"), [("fitted", STAGES), ("paper", PAPER_STAGES)])
def test_each_stage_is_told_its_seconds(method, stages):
    asked = replace(OPTIONS, method=method)
    assert set(of_stages(asked)) == {name for name, _ in stages}
    alone = of_stages(asked, searched=1.8e-3)  # no copy: what is proved is the model itself
    assert set(alone) == {name for name, _ in stages if not name.startswith(OWN_WEIGHTS)}


def test_more_of_anything_takes_longer():
    assert of(own=3e-3) > of() and of(searched=1e-3) > of() and of(n_layer=60) > of()
    assert of(replace(OPTIONS, n_chunk=8)) > 1.5 * of()
    assert of(replace(OPTIONS, n_trials=200)) > of() > of(replace(OPTIONS, n_trials=20))


def test_less_of_anything_takes_less():
    assert of(replace(OPTIONS, text=Path("text.txt"))) < of()
    assert of(n_threads=8) < of()
    assert of(replace(OPTIONS, method="paper", n_trials=10)) < of(replace(OPTIONS, method="paper"))
