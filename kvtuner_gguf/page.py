"""A calibration as one page of HTML that needs nothing else: what the plan is, what it costs, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import atomic_file
from .codecs import codec
from .errors import KvtunerError
from .geometry import Geometry
from .output import PAGE_MARK
from .pair import USUAL, Pair
from .plan import Plan
from .printable import printable
from .report import MIB, comparison_note, comparison_table, memory_rows, tasks_note, tasks_tables, verdict_line
from .room import write_errors
from .runtime import Session

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .calibrate.options import Outcome, Solved
    from .calibrate.results import Sensitivity
    from .quality import Row
    from .tasks.score import TaskComparison

CONTEXTS = tuple(1024 << i for i in range(8))  # at which memory is shown, as far as the model was trained
_SYMBOLS = ("star", "circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down")
_LAYER_PIXELS = 40  # that a layer's type is readable in
_SIDES = {"k": "K", "v": "V", "kv": "K and V"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; } p { max-width: 46rem; }
"""


def check_plotly() -> None:
    """Raises KvtunerError if the package that draws is not there."""
    if find_spec("plotly") is None:
        raise KvtunerError("a report needs plotly, which is not installed. pip install 'kvtuner-gguf[report]'")


def save_page(
    path: Path, model: Path, outcome: Outcome, solved: Solved, answered: TaskComparison | None = None
) -> None:
    """Write the page in one step. Raises PlanError."""
    data = page(model, outcome, solved, answered).encode()
    with write_errors(path, len(data), "Choose another place with --report."), atomic_file(path) as out:
        out.write(data)


def page(model: Path, outcome: Outcome, solved: Solved, answered: TaskComparison | None = None) -> str:
    """The page of a calibration, of what its records foretell of other goals, and of answers to tasks. Raises
    NativeError if the model cannot be opened."""
    plan, geometry = outcome.plan, outcome.geometry
    name = escape(printable(model.name))
    parts = [
        ("What it costs", _tables([comparison_table(outcome.comparison)], comparison_note(outcome.comparison))),
        *([("Tasks", _tables(tasks_tables(answered), tasks_note(answered)))] if answered else []),
        ("KLD against bits", _drawn(front(outcome.comparison.rows, solved), with_library=True)),
        ("The plan", _drawn(types(plan), width=_LAYER_PIXELS * plan.n_layer)),
        ("What each layer's K and V add to the KLD", _drawn(sensitivity(solved.sensitivities))),
        ("Memory against context", _drawn(memory(geometries(model), plan))),
    ]
    (_, n_bytes, bits, share), *_ = memory_rows(plan.pairs, geometry, plan.vector_bytes)
    head = (
        f"{bits:.2f} bits per cached value: {n_bytes / MIB:.1f} MiB at {geometry.n_ctx} tokens, {100 * share:.0f} % of "
        f"f16's. {verdict_line(outcome)}"
    )
    body = "\n".join(f"<h2>{escape(title)}</h2>\n{content}" for title, content in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{PAGE_MARK}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>K/V cache plan of {name}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>K/V cache plan of {name}</h1>\n<p>{escape(head)}</p>\n{body}\n</body></html>\n"
    )


def front(rows: Sequence[Row], solved: Solved) -> go.Figure:
    """What plans of other goals are foretold to have, and what was measured on held-out text."""
    import plotly.graph_objects as go

    floor, *measured = rows
    figure = go.Figure()
    bits = [point.bits_per_value for point in solved.front]
    figure.add_scatter(
        x=bits,
        y=[point.kld for point in solved.front],
        name="plans of other goals, predicted for the search's text",
        line={"color": "#1f6feb"},
        hovertemplate="%{x:.2f} bits: %{y:.5f}<extra></extra>",
    )
    for row, symbol in zip(measured, cycle(_SYMBOLS)):
        figure.add_scatter(
            x=[row.bits_per_value],
            y=[row.quality.kld_mean],
            error_y={"array": [row.quality.kld_se]},
            name=row.name,
            mode="markers",
            marker={"size": 10, "symbol": symbol},
            hovertemplate="%{x:.2f} bits: %{y:.5f}",
        )
    if floor.quality.kld_mean > 0:
        ends = [min(bits, default=2.0), max(bits, default=16.0)]
        line = {"color": "#57606a", "dash": "dot"}
        figure.add_scatter(x=ends, y=[floor.quality.kld_mean] * 2, name="rounding alone", mode="lines", line=line)
    figure.update_xaxes(title="bits per cached value")
    figure.update_yaxes(title="mean KLD, nats", type="log", exponentformat="power", dtick=1)
    figure.update_layout(height=560)
    return figure


def types(plan: Plan) -> go.Figure:
    """The type of each layer's K and V, coloured by its bits."""
    import plotly.graph_objects as go

    sides = (plan.type_v, plan.type_k)
    figure = go.Figure()
    figure.add_heatmap(
        z=[[codec(name).bits_per_value if name else math.nan for name in side] for side in sides],
        text=[list(side) for side in sides],
        y=["V", "K"],
        colorscale="Blues",
        zmin=2,
        zmax=8.5,
        texttemplate="%{text}",
        textfont={"size": 10},
        hovertemplate="layer %{x}, %{y}: %{text}<extra></extra>",
        showscale=False,
    )
    figure.update_xaxes(title="layer", dtick=1 if plan.n_layer <= 40 else 5)
    figure.update_layout(height=320)
    return figure


def sensitivity(rows: Sequence[Sensitivity]) -> go.Figure:
    """What each side of each layer adds in each type, as colours on a logarithmic scale."""
    import plotly.graph_objects as go

    at = {(_row_name(row), row.il): row.kld for row in rows}
    layers = sorted({row.il for row in rows})
    by_bits = sorted(rows, key=lambda row: (row.side, row.bits_per_value, row.type))
    names = list(dict.fromkeys(map(_row_name, by_bits)))
    klds = [[at.get((name, il), math.nan) for il in layers] for name in names]
    figure, powers = go.Figure(), list(range(-9, 3))
    figure.add_heatmap(
        z=[[math.log10(kld) if kld > 0 else math.nan for kld in line] for line in klds],
        x=layers,
        y=names,
        customdata=klds,
        colorscale="YlOrRd",
        hovertemplate="layer %{x}, %{y}: %{customdata:.2e}<extra></extra>",
        colorbar={"title": "KLD", "tickvals": powers, "ticktext": [f"1e{power}" for power in powers]},
    )
    figure.update_xaxes(title="layer")
    figure.update_layout(height=max(320, 60 + 20 * len(names)))
    return figure


def _row_name(row: Sensitivity) -> str:
    return f"{_SIDES[row.side]} {row.type}"


def geometries(model: Path) -> list[Geometry]:
    """What the model caches at each of CONTEXTS that it was trained for, the smallest in any case."""
    with Session(model, no_alloc=True) as session:
        most = session.fitting(session.n_ctx_train or CONTEXTS[-1])
        return [session.geometry(n_ctx) for n_ctx in CONTEXTS if n_ctx <= max(most, CONTEXTS[0])]


def memory(shapes: Sequence[Geometry], plan: Plan) -> go.Figure:
    """Bytes of the cache at each context with the plan, with f16, and with the usual pairs."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, pair in {"f16": Pair("f16", "f16"), **{str(pair): pair for pair in USUAL}, "plan": None}.items():
        n_bytes = [
            shape.bytes(plan.pairs, plan.k_vectors) if pair is None else shape.bytes((pair,) * shape.n_layer)
            for shape in shapes
        ]
        figure.add_scatter(
            x=[shape.n_ctx for shape in shapes],
            y=[n / MIB for n in n_bytes],
            name=name,
            mode="lines+markers",
            line={"width": 4 if pair is None else 1.5},
            hovertemplate="%{x} tokens: %{y:.1f} MiB",
        )
    figure.update_xaxes(title="tokens", type="log", tickvals=(at := [shape.n_ctx for shape in shapes]), ticktext=at)
    figure.update_yaxes(title="MiB", type="log")
    return figure


def _drawn(figure: go.Figure, *, width: int = 320, with_library: bool = False) -> str:
    """As HTML, at least so many pixels wide: a narrower page is moved below it."""
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
    )
    config = {"responsive": True, "displayModeBar": False}
    html = figure.to_html(full_html=False, include_plotlyjs=with_library, config=config)
    return f'<div class="wide"><div style="min-width: {width}px">{html}</div></div>'


def _tables(tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]], note: str) -> str:
    """Heads and rows, and what is said of them."""
    of_each = (f'<div class="wide"><table>{"".join(_rows(*part))}</table></div>' for part in tables)
    return "<br>\n".join(of_each) + f"\n<p>{escape(note)}</p>"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for tag, cells in (("th", head), *(("td", row) for row in rows)):
        yield "<tr>" + "".join(f"<{tag}>{escape(printable(cell))}</{tag}>" for cell in cells) + "</tr>"
