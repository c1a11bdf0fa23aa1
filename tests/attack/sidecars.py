"""Damaged sidecars: each is refused with a KvtunerError, or is a plan that keeps its identity, and a context has what
it says."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

from fault import need
from models import tiny_qwen2
from running import vectors

from kvtuner_gguf.codecs import CODECS
from kvtuner_gguf.errors import KvtunerError, PlanError
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.pair import Pair, allocated_pairs
from kvtuner_gguf.plan import Plan
from kvtuner_gguf.quality import Quality
from kvtuner_gguf.runtime import Session

N_LAYER = 4
QUALITY = Quality(0.0123, 1.25, 0.975, 4096)
PLANS = (
    Plan.uniform(Pair("q8_0", "q4_0"), N_LAYER),
    Plan(
        tuple(Pair.parse(name) for name in ("q8_0/q4_0", "q4_0/f16", "k3_64/iq4_nl", "f16/q2_64")),
        bits_per_value=5.1,
        quality=QUALITY,
        rival=Pair.parse("q5_0"),
        rival_quality=QUALITY,
        rival_bits=5.5,
        k_vectors=(vectors(0), vectors(1, scale=False), vectors(2, basis=True), vectors(3, mean=False, scale=False)),
        calibration={"text": "Größe", "seed": 7},
    ),
)
VALUES = (
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320, 3.5e38, "", "q8_0",
    "Q8_0", "q9", "q8_0\0", "f16",
    "\x1b[2J", "\u202e", "\ud800", "x" * 5000, [], {}, [[]], ["q8_0"], ["q8_0"] * 4, ["q8_0"] * 5, [1.0] * 512,
    [1e39], ["\ud800"] * 4, {"a": 1},
)  # fmt: skip
SNIPPETS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1" * 5000,
    "[" * 3000,
    '{"a":' * 3000,
    "null",
    "\\ud800",
    '"',
    ",",
    "}",
    "\ufeff",
    "\0",
    "//",
    "tru",
)


class Attack:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "input" / "plan.json"
        self.session = Session(tiny_qwen2(folder / "model.gguf"), n_threads=1)
        self.texts = [plan.to_json() for plan in PLANS]

    def attempt(self, rng: random.Random) -> str:
        data = _damaged(rng, rng.choice(self.texts))
        self.path.write_bytes(data)
        plan = _or_refused(lambda: Plan.from_json(data))
        loaded = _or_refused(lambda: Plan.load(self.path))
        need(isinstance(plan, Plan) == isinstance(loaded, Plan), f"from_json: {plan!s:.200}, load: {loaded!s:.200}")
        if not isinstance(plan, Plan):
            return "refused"
        need(loaded == plan, "load and from_json differ")
        for name, same in (
            ("JSON", Plan.from_json(plan.to_json())),
            ("pickle", pickle.loads(pickle.dumps(plan))),
            ("deepcopy", copy.deepcopy(plan)),
        ):
            need(same == plan and same.k_vectors == plan.k_vectors, f"{name}: the plan that comes back is another")
        return self._on_a_model(plan)

    def _on_a_model(self, plan: Plan) -> str:
        """A plan is refused by the model, or allocated and conditioned as it says; what differs, a note tells."""
        try:
            self.session.set_plan(plan.pairs, plan.k_vectors)
        except KvtunerError:
            return "refused by the model"
        need(plan.n_layer == self.session.n_layer, f"a plan of {plan.n_layer} layers is in force")
        with self.session.context(256) as ctx:
            layers, notes = ctx.layers(), ctx.notes()
        asked = [(p.type_k or "f16", p.type_v or "f16") for p in plan.pairs]
        given = [(p.type_k, p.type_v) for p in allocated_pairs(layers, self.session.n_layer)]
        need(asked == given or bool(notes), f"asked {asked}, allocated {given}, no note")
        for il, (layer, v) in enumerate(zip(layers, plan.k_vectors)):
            need(
                _in_force(v.under(layer.type_k)) == (layer.k_mean, layer.k_scale, layer.k_basis)
                or CODECS[layer.type_k].block_size == 1
                or bool(notes),
                f"layer {il} is not conditioned as asked",
            )
        return "allocated"


def _in_force(v: KVectors) -> tuple[bool, bool, bool]:
    """Mean, scale, basis: it holds the scale."""
    return bool(v.mean), bool(v.scale) and not v.basis, bool(v.basis)


def _damaged(rng: random.Random, text: str) -> bytes:
    if rng.random() < 0.5:
        text = json.dumps(_odd_values(rng, json.loads(text)), ensure_ascii=rng.random() < 0.5, allow_nan=True)
    data = bytearray(text.encode(errors="surrogatepass"))
    if rng.random() < 0.6:
        for _ in range(rng.choice((1, 1, 2, 4))):
            _BYTES[rng.randrange(len(_BYTES))](rng, data)
    if rng.random() < 0.03:
        return data.decode(errors="replace").encode(
            rng.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1")), errors="replace"
        )
    return bytes(data)


def _odd_values(rng: random.Random, values: dict[str, object]) -> dict[str, object]:
    """Some of a sidecar's values replaced, or missing, or more of them."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(
            [
                *values,
                "type_k",
                "calibration.x",
                "k_mean",
                "k_scale.n_values",
                "k_basis",
                "k_basis_scale",
                "rival",
                "enabled",
                "",
                "calibration.\x00",
            ]
        )
        old, action = values.get(key), rng.randrange(4)
        if action == 0:
            values.pop(key, None)
        elif action == 1 and isinstance(old, list) and old:
            old[rng.randrange(len(old))] = rng.choice((*VALUES, *CODECS, float("nan"), float("inf")))
        elif action == 2 and isinstance(old, list):
            values[key] = rng.choice((old + old[:1], old[:-1], old * 2, old[::-1]))
        else:
            values[key] = rng.choice(VALUES)
    return values


_BYTES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    lambda rng, data: data.__setitem__(rng.randrange(len(data)), rng.randrange(256)) if data else None,
    lambda rng, data: data.__delitem__(slice(rng.randrange(len(data) + 1), None)),
    lambda rng, data: data.__delitem__(slice(at := rng.randrange(len(data) + 1), at + rng.choice((1, 2, 50)))),
    lambda rng, data: data.__setitem__(slice(at := rng.randrange(len(data) + 1), at), rng.choice(SNIPPETS).encode()),
    lambda rng, data: data.__setitem__(slice(at := rng.randrange(len(data) + 1), at), data[: rng.randrange(300)]),
)


def _or_refused(call: Callable[[], Plan]) -> Plan | PlanError:
    try:
        return call()
    except PlanError as e:
        need(len(str(e)) < 2000 and str(e).isprintable(), f"an error that garbles a terminal: {str(e)!r:.3000}")
        return e
