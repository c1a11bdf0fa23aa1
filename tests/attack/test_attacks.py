"""The short form of each attack, and that each finds a fault that is put into the product on purpose."""

import pytest
from harness import attack
from kinds import KINDS

native = [name for name, kind in KINDS.items() if kind.native]
every_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.native] * kind.native) for name, kind in KINDS.items()]
)
FOUND = {  # sabotage -> (the kind that finds it, how many attempts it may take, what it says)
    "parser": ("parser", 60, "Error"),
    "parser_writes": ("parser", 60, "tensor"),
    "loader": ("loader", 20, "SIGSEGV"),
    "sidecars": ("sidecars", 40, "plan that comes back is another"),
    "states": ("states", 60, "were taken|saved under|does not come back"),
    "objects": ("objects", 60, "MiB"),
    "shifts": ("shifts", 8000, "logits are off"),
    "threads": ("threads", 2, "beside other threads"),
    "in_place": ("signals", 60, "neither the old nor the new one|not whole"),
    "leftover": ("writers", 2, "left"),
    "noise": ("killed", 3, "another plan|neither the old nor the new one"),
    "no_room": ("disks", 20, "the model changed|left"),
    "noise ": ("records", 10, "another plan"),
}


@every_kind
def test_the_product_holds(name, tmp_path):
    tally = attack(name, KINDS[name].short, keep=tmp_path)
    assert not tally.faults, "\n".join(tally.faults.values())
    assert tally.tried >= KINDS[name].short


@pytest.mark.parametrize(
    "sabotage",
    [pytest.param(name, marks=[pytest.mark.native] * KINDS[kind].native) for name, (kind, *_) in FOUND.items()],
)
def test_a_fault_is_found(sabotage):
    name, count, says = FOUND[sabotage]
    (fault,) = attack(name, count, sabotage=sabotage.strip(), most_faults=1).faults.values()
    assert any(part in fault for part in says.split("|")), fault


def test_every_kind_is_known_to_find_something():
    assert {name for name, *_ in FOUND.values()} == {*KINDS}


def test_an_attempt_that_hangs_is_a_fault(monkeypatch):
    monkeypatch.setitem(KINDS, "parser", KINDS["parser"]._replace(limit_s=5))
    (fault,) = attack("parser", 2, sabotage="hang", most_faults=1).faults.values()
    assert "hangs" in fault


def test_the_same_seed_makes_the_same_attempts():
    one, two, other = (attack("parser", 80, seed=seed).words for seed in (3, 3, 4))
    assert one == two != other


def test_the_input_of_a_fault_is_kept(tmp_path):
    tally = attack("parser", 40, sabotage="parser", most_faults=1, keep=tmp_path)
    (number,) = tally.faults
    assert (tmp_path / f"parser-0-{number}" / "model.gguf").is_file()
    again = attack("parser", 1, first=number, sabotage="parser")
    assert [*again.faults] == [number]
