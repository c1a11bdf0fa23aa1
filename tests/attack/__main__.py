"""The attacks, with figures: python tests/attack [KIND...] [--long | --count N] [--seed N] [--markdown | --json].

Plain pytest runs the short form of each. A fault names the seed and the attempt, which --first N --count 1 makes again,
and the folder where its input was kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from harness import UPSTREAM, Tally, attack
from kinds import KINDS

KEEP = Path("build/attack")


def main() -> None:
    args = _arguments()
    tallies = []
    if args.markdown:
        print(
            f"{_where()}\n\n| kind | what is counted | tried | faults | seed | time |\n|---|---|---|---|---|---|",
            flush=True,
        )
    for name in args.kinds or KINDS:
        kind = KINDS[name]
        count = args.count or (kind.long if args.long else kind.short)
        tallies.append(attack(name, count, seed=args.seed, first=args.first, keep=KEEP))
        for fault in tallies[-1].faults.values():
            print(fault, file=sys.stderr)
        if not args.json:
            print(_row(tallies[-1]) if args.markdown else _line(tallies[-1]), flush=True)
    if args.json:
        print(json.dumps([vars(tally) for tally in tallies], indent=2))
    sys.exit(any(tally.faults for tally in tallies))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", choices=[[], *KINDS], help=f"default: all of {', '.join(KINDS)}"
    )
    parser.add_argument("--long", action="store_true", help="as many as docs/reliability.md tells")
    parser.add_argument("--count", type=int, help="how many of what the kind counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="attempt to start with")
    parser.add_argument("--markdown", action="store_true", help="rows of the table in docs/reliability.md")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _where() -> str:
    """The command, the commit, the machine and the day."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    info = Path("/proc/cpuinfo")
    cpu = (
        next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), ""
        )
        if info.exists()
        else platform.processor()
    )
    return (
        f"`python tests/attack {' '.join(sys.argv[1:])}`, commit {commit}, {cpu}, {os.cpu_count()} processors, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def _line(tally: Tally) -> str:
    words = ", ".join(f"{n} {word}" for word, n in tally.words.most_common())
    return f"{tally.kind:<12} {tally.tried:>7} tried {len(tally.faults):>3} faults {tally.seconds:>7.1f} s   {words}"


def _row(tally: Tally) -> str:
    upstream = tally.words[UPSTREAM]
    note = f" (and {upstream} of which upstream dies, too)" if upstream else ""
    return (
        f"| {tally.kind} | {KINDS[tally.kind].what} | {tally.tried:,} | {len(tally.faults)}{note} | {tally.seed} "
        f"| {tally.seconds:.0f} s |"
    )


if __name__ == "__main__":
    main()
