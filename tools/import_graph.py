#!/usr/bin/env python3
"""Who imports whom, in the package and in native/: draws docs/architecture.md; tests/unit/test_graph.py checks it.

--floors prints the floors that the imports need, for the table below, and draws nothing.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"

# From the roof to the ground: a module imports only from floors below its own. `__init__` is the package itself.
FLOORS = (
    "__main__",
    "cli",
    "cli_chat",
    "cli_measure",
    "api cli_files",
    "calibrate.pipeline",
    "calibrate.measured calibrate.verdict tasks.evaluate",
    "calibrate.estimate calibrate.evaluate calibrate.runs",
    "calibrate.checks calibrate.crew calibrate.methods calibrate.store calibrate.write",
    "calibrate.condition calibrate.error calibrate.jobs calibrate.options page",
    "__init__ calibrate.basis calibrate.capture calibrate.delivery calibrate.goals calibrate.text card fit output",
    "calibrate.hidden calibrate.kld calibrate.moments calibrate.prices calibrate.solve calibrate.weights identity "
    "llama serve shown tasks.ask",
    "calibrate.cluster calibrate.kld_model calibrate.nsga2 calibrate.proof calibrate.prune calibrate.samples chat "
    "gguf_file import_hook runtime",
    "arguments calibrate.results gguf_header in_force report",
    "geometry held plan rpc tasks.made",
    "calibrate.corpus hidden kvectors log tap tasks.task uses",
    "calibrate.records default_model kept native pair quality session_file target tasks.answer",
    "cache codecs machine ports reading room template terminal threads values",
    "errors",
    "atomic calibrate calibrate.layers calibrate.progress calibrate.sizes interrupts printable tasks tasks.score words",
)
NOT_DRAWN = frozenset(" ".join(FLOORS[-2:]).split())  # nearly all import them, they import next to nothing
PARTS = {"calibrate": "calibrate", "tasks": "kvtuner_gguf/tasks"}  # of the package: what makes plans, and tries them
# of the other modules: to run a plan takes nothing of those
MAY_CALIBRATE = {"api", "cli", "cli_chat", "cli_measure"}

# Native code: the folders are the targets that it is linked into.
NATIVE_FLOORS = ("server", "llama ggml-cpu ggml-cuda ggml-rpc tests", "ggml-base")

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """ "calibrate.kld" -> its file: every module of the package as it is installed, where calibrate/ lies inside."""
    folders = {".": "kvtuner_gguf", **{f".{name}.": folder for name, folder in PARTS.items()}}
    files = {f"kvtuner_gguf{name}{p.stem}": p for name, folder in folders.items() for p in (ROOT / folder).glob("*.py")}
    return {_short(name): path for name, path in sorted(files.items())}


def _short(module: str) -> str:
    """kvtuner_gguf.calibrate.kld -> calibrate.kld, kvtuner_gguf.calibrate -> calibrate, kvtuner_gguf -> __init__"""
    return module.removesuffix(".__init__").removeprefix("kvtuner_gguf").lstrip(".") or "__init__"


def python_graph(typing: bool = False) -> Graph:
    """module -> the modules that it imports at any depth of its code; typing: under `if TYPE_CHECKING` instead."""
    files = modules()
    return {
        module: {name for node in _statements(path.read_text(), typing) for name in _targets(node, path, files)}
        - {module}
        for module, path in files.items()
    }


parsed = cache(ast.parse)


@cache
def _statements(code: str, typing: bool) -> list[ast.Import | ast.ImportFrom]:
    return list(_imports(parsed(code), typing))


def _imports(tree: ast.AST, typing: bool, inside: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(tree, (ast.Import, ast.ImportFrom)) and inside == typing:
        yield tree
    guarded = tree.body if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING") else []
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):  # where statements are
        for child in getattr(tree, name, ()):
            yield from _imports(child, typing, inside or child in guarded)


def _targets(node: ast.Import | ast.ImportFrom, path: Path, files: dict[str, Path]) -> Iterator[str]:
    """Our modules that a statement imports; `from package import name` is the module of that name, if there is one."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        package = ["kvtuner_gguf", *([path.parent.name] if path.parent.name in PARTS else [])]
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        names = [f"{base}.{alias.name}" if _short(f"{base}.{alias.name}") in files else base for alias in node.names]
    for name in names:
        if name.split(".")[0] == "kvtuner_gguf" and _short(name) in files:
            yield _short(name)


def native_files() -> dict[str, Path]:
    files = [path for path in (ROOT / "native").rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    return {path.name: path for path in sorted(files)}


def native_graph() -> Graph:
    """ "llama/kvt-plan" -> what its header and its source include of our own, "ggml-base/kvt-types" say."""
    files = native_files()
    graph: Graph = {_unit(path): set() for path in files.values()}
    for path in files.values():
        included = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
        graph[_unit(path)] |= {_unit(files[Path(name).name]) for name in included if Path(name).name in files}
    return {unit: included - {unit} for unit, included in graph.items()}


def _unit(path: Path) -> str:
    return path.relative_to(ROOT / "native").with_suffix("").as_posix()


#
# faults
#


def circle(graph: Graph) -> str:
    """ "a -> b -> a", or "" if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return " -> ".join(reversed(e.args[1]))
    return ""


def climbing(graph: Graph, floors: tuple[str, ...]) -> list[str]:
    """What imports something that lies on no floor below its own, and what lies on no floor."""
    floor = {name: len(floors) - i for i, names in enumerate(floors) for name in names.split()}
    homeless = sorted({*graph, *chain(*graph.values())} ^ floor.keys())
    if homeless:
        return [f"{name} is in the table of floors or in the tree, not in both" for name in homeless]
    return [
        f"{module} imports {name}, which lies no floor below it"
        for module, names in graph.items()
        for name in sorted(names)
        if floor[name] >= floor[module]
    ]


def lowest(graph: Graph) -> list[str]:
    """The floors that the graph needs, from the roof to the ground, each name on the lowest that it can have."""
    floor: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floor[name] = max((floor[other] + 1 for other in graph[name]), default=0)
    return [
        " ".join(sorted(name for name in floor if floor[name] == i)) for i in reversed(range(max(floor.values()) + 1))
    ]


def folders(graph: Graph) -> Graph:
    """The graph between the folders of native/."""
    between: Graph = {}
    for unit, included in graph.items():
        between.setdefault(_room(unit), set()).update(map(_room, included))
    return {folder: included - {folder} for folder, included in between.items()}


#
# drawing
#


def needed(graph: Graph) -> Graph:
    """The graph less each arrow that a longer way implies, so that it can be read; one with a circle as it is."""
    if circle(graph):
        return graph
    below: Graph = {}
    for name in TopologicalSorter(graph).static_order():
        below[name] = graph[name].union(*(below[other] for other in graph[name]))
    return {name: {x for x in to if not any(x in below[other] for other in to)} for name, to in graph.items()}


def mermaid(graph: Graph, typing: Graph) -> str:
    """A flow chart: a box per folder of nodes, an arrow per import; dotted: for types alone."""
    lines = ["```mermaid", "flowchart TD"]
    for room in sorted({_room(name) for name in graph}):
        nodes = [f'        {_id(name)}["{_label(name)}"]' for name in sorted(graph) if _room(name) == room]
        lines += [f'    subgraph in_{_id(room)}["{room}"]', *nodes, "    end"]
    for arrow, arrows in (("-->", needed(graph)), ("-.->", {name: to - graph[name] for name, to in typing.items()})):
        lines += [
            f"    {_id(name)} {arrow} {' & '.join(map(_id, sorted(to)))}" for name, to in sorted(arrows.items()) if to
        ]
    return "\n".join([*lines, "```"])


def _id(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _label(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _room(name: str) -> str:
    """Where a node lies: calibrate.kld -> calibrate, plan -> kvtuner_gguf, llama/kvt-plan -> llama."""
    return (re.split(r"[./]", name)[-2:-1] or ["kvtuner_gguf"])[0]


def drawing() -> str:
    python, typing = (
        {name: imported - NOT_DRAWN for name, imported in graph.items() if name not in NOT_DRAWN}
        for graph in (python_graph(), python_graph(typing=True))
    )
    ground = ", ".join(f"`{name}`" for name in sorted(NOT_DRAWN - {"calibrate"}))
    return f"""\
{mermaid(python, typing)}

An arrow: imports; dotted: for types alone. An arrow that a longer way implies is left out, and so are the lowest
floors, which any module may import: {ground}.

{mermaid(native_graph(), {})}

An arrow: includes. A header and its source are one box.
"""


def drawn(page: str) -> str:
    """The page with the graph as it is now between its two marks."""
    before, mark, rest = page.partition("<!-- graph -->\n")
    _, end, after = rest.partition("<!-- /graph -->")
    if not (mark and end):
        raise SystemExit(
            f"{PAGE.name}: no lines <!-- graph --> and <!-- /graph -->. Put them where the graph shall be."
        )
    return f"{before}{mark}{drawing()}{end}{after}"


if __name__ == "__main__":
    if "--floors" in sys.argv:  # for the table above
        print(*lowest(python_graph()), sep="\n")
        sys.exit()
    PAGE.write_text(drawn(PAGE.read_text()))
