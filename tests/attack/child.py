"""The process that makes the attempts: says the number of each on its standard output, then how it ended."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import traceback
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(
    kind: str, module: str, folder: str, seed: str, first: str, end: str, memory: str, sabotage: str, keep: str
) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between our lines
    sys.path += [str(HERE.parent), str(HERE.parent / "native")]
    from fault import Fault
    from harness import kept

    (Path(folder) / "input").mkdir()
    if sabotage:
        getattr(import_module("sabotage"), sabotage)()
    attack = import_module(module).Attack(Path(folder))
    if int(memory):
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), resource.RLIM_INFINITY))
    for number in range(int(first), int(end)):
        print(number, file=out, flush=True)
        word = fault = ""
        try:
            word = attack.attempt(random.Random(f"{seed} {number}"))
        except Fault as e:
            fault = str(e)
        except BaseException:
            fault = traceback.format_exc()
        if fault:
            fault += kept(Path(folder), Path(keep) if keep else None, kind, seed, number)
        print(json.dumps({"word": word, "fault": fault}), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
