"""The attacks: what each tries, how often, and how long one attempt may take."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """module   the file here whose class Attack makes the attempts
    what     what is counted
    short    counted by plain pytest
    long     counted by `python tests/attack --long`
    each     how many of what one attempt is
    limit_s  seconds after which an attempt counts as one that hangs: many times what it takes on a busy machine
    memory   bytes of address space that the process may take
    native   whether it needs the patched library
    bare     the program here that does the same to `input` without our part in it; a death that it dies, too, is not
             ours
    """

    module: str
    what: str
    short: int
    long: int
    each: int = 1
    limit_s: float = 600
    memory: int = 6 << 30
    native: bool = True
    bare: str = ""
    input: str = "model.gguf"


KINDS = {
    "parser": Kind("gguf_parser", "damaged GGUFs, in Python", 600, 50_000, memory=3 << 30, native=False),
    "loader": Kind("gguf_loader", "damaged GGUFs, in llama.cpp with the plan's code", 150, 10_000, bare="bare.py"),
    "sidecars": Kind("sidecars", "damaged sidecars, read and put on a model", 400, 15_000),
    "states": Kind("states", "saved states, a fifth under another plan, the rest damaged", 120, 6_000),
    "objects": Kind("objects", "models and contexts made and freed", 30, 600),
    "shifts": Kind("shifts", "tokens that a shift of the context made room for", 2_000, 60_000, each=500),
    "threads": Kind("threads", "rounds of six threads with a plan each", 4, 100),
    "records": Kind("records", "damaged records, then calibrate again and solve", 6, 500, limit_s=1800),
    "signals": Kind("signals", "signals while a model is written", 40, 900),
    "killed": Kind("killed", "signals in a calibration, then the same again", 4, 100, limit_s=1800),
    "disks": Kind("disks", "commands on a disk that fills up, then once more with room", 6, 200, limit_s=1800),
    "writers": Kind("writers", "rounds of five to seven commands at once on one model", 3, 100, limit_s=1800),
}
