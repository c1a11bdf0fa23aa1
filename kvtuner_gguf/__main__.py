"""python -m kvtuner_gguf: the kvtuner-gguf command where its script is not on the path."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main(prog_name="python -m kvtuner_gguf")
