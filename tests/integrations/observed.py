"""Runs a program as `python -m` or as its script does, and tells on stderr what each context it makes has allocated.

python observed.py NAME [ARGUMENT ...]    NAME: a module, or a file
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    import llama_cpp

    context = llama_cpp._internals.LlamaContext
    init = context.__init__

    def told(self: object, **kwargs: object) -> None:
        init(self, **kwargs)
        from kvtuner_gguf import native

        layers = [f"{layer.type_k}/{layer.type_v}" for layer in native.ctx_layers(self.model.model, self.ctx)]
        notes = native.plan_notes(self.model.model) + native.ctx_notes(self.ctx)
        print("observed " + json.dumps({"layers": layers, "notes": notes}), file=sys.stderr, flush=True)

    context.__init__ = told
    del sys.argv[0]
    if Path(sys.argv[0]).is_file():
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
