#!/usr/bin/env python3
"""Writes docs/plans.svg: KLD against bits of plans, uniform pairs and stock's pairs, from the tables in
tests/bench/plans.md. Run it when they have changed; a unit test compares."""

from __future__ import annotations

import math
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "tests/bench/plans.md", ROOT / "docs/plans.svg"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 300, 58, 34, 8, 42
BITS, KLD = (2.0, 8.9), (5e-5, 12.0)
LINES = {"default": ("plan", "#1f6feb"), "best uniform pair": ("best uniform pair within the same bytes", "#c2600a")}
STOCK = ("stock, one pair for all layers", "#6e7781")

Points = list[tuple[float, float, str]]


def tables(text: str) -> dict[str, dict[str, Points]]:
    """Model -> "default", "best uniform pair", "stock", "floor" -> (bits, KLD at 2048, label), of the first two
    tables."""
    found: dict[str, dict[str, Points]] = {}
    for section in text.split("\n## ")[1:3]:
        points: dict[str, Points] = {"default": [], "best uniform pair": [], "stock": [], "floor": []}
        points["floor"].append((0.0, float(re.search(r"Noise floor.*?: (0\.\d+)", section)[1]), ""))
        for row in re.findall(r"^\|(.+)\|$", section, re.MULTILINE):
            _, plan, bits, kld, *_ = (cell.strip() for cell in row.split("|"))
            name = next((kind for kind in points if plan.startswith(kind)), None)
            if name:
                points[name].append((float(bits), float(kld), plan.split()[-1]))
        found[section.split("\n")[0].split(" (")[0]] = points
    return found


def text_at(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{words}</text>'


def panel(model: str, points: dict[str, Points], x0: float) -> list[str]:
    """One model's part, from x0 on."""
    w, h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(bits: float) -> float:
        return x0 + LEFT + w * (bits - BITS[0]) / (BITS[1] - BITS[0])

    def y(kld: float) -> float:
        low, high = (math.log10(end) for end in KLD)
        return TOP + h * (high - math.log10(kld)) / (high - low)

    title = f'<tspan font-weight="bold">{model}</tspan>: mean KLD from an f16 cache, nats'
    out = [text_at(x0 + LEFT, TOP - 14, title)]
    for i in range(-4, 2):
        at = y(10.0**i)
        out.append(f'<line x1="{x(BITS[0]):.1f}" x2="{x(BITS[1]):.1f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d8dee4"/>')
        out.append(text_at(x0 + LEFT - 6, at + 4, f"{10.0**i:g}" if i > -4 else "0.0001", "end"))
    out += [text_at(x(b), HEIGHT - BOTTOM + 16, str(b), "middle") for b in range(2, 9)]
    out.append(text_at(x0 + LEFT + w / 2, HEIGHT - 8, "bits per cached value", "middle"))
    floor = y(points["floor"][0][1])
    out.append(
        f'<line x1="{x(BITS[0]):.1f}" x2="{x(BITS[1]):.1f}" y1="{floor:.1f}" y2="{floor:.1f}" stroke="{STOCK[1]}" '
        'stroke-dasharray="2 3"/>'
    )
    out.append(text_at(x(BITS[0]) + 4, floor - 4, "noise floor", more=f' fill="{STOCK[1]}"'))
    for kind, (_, colour) in LINES.items():
        rows = sorted(set(points[kind]))
        path = " ".join(f"{x(bits):.1f},{y(kld):.1f}" for bits, kld, _ in rows)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x(bits):.1f}" cy="{y(kld):.1f}" r="3.5" fill="{colour}"/>' for bits, kld, _ in rows]
    for bits, kld, name in points["stock"]:
        if name.startswith(("q8_0", "q5_1", "q4_0")):
            out.append(f'<circle cx="{x(bits):.1f}" cy="{y(kld):.1f}" r="3.5" fill="{STOCK[1]}"/>')
            at_end = bits > 8
            where = (x(bits) - 6, y(kld) + 15) if at_end else (x(bits) + 6, y(kld) - 5)
            out.append(text_at(*where, name, "end" if at_end else "start", f' fill="{STOCK[1]}"'))
    return out


def picture(text: str) -> str:
    """docs/plans.svg from the text of tests/bench/plans.md."""
    models = tables(text)
    width, height = WIDTH * len(models), HEIGHT + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12" fill="#24292f">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for i, (model, points) in enumerate(models.items()):
        out += panel(model, points, i * WIDTH)
    at = 40.0
    for words, colour in (*LINES.values(), STOCK):
        out.append(f'<circle cx="{at:.1f}" cy="{HEIGHT + 14}" r="4" fill="{colour}"/>')
        out.append(text_at(at + 10, HEIGHT + 18, words))
        at += 40 + 7.2 * len(words)
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(PAGE.read_text()))
