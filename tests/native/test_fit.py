"""What `fit` says that a model takes is what a context of it allocates, to the byte."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from running import metadata
from test_layers import PLANS

from kvtuner_gguf.cli import main
from kvtuner_gguf.fit import F16, PLAN, fit, largest
from kvtuner_gguf.kvectors import KVectors
from kvtuner_gguf.native import Memory
from kvtuner_gguf.pair import USUAL, Pair
from kvtuner_gguf.plan import Plan

pytestmark = pytest.mark.native


def allocated(load, path, n_ctx: int, pair: Pair | None = None) -> Memory:
    """Of a model that is loaded, under its file's plan or a pair."""
    session = load(path)
    if pair:
        session.set_plan([pair] * session.n_layer)
    with session.context(n_ctx) as ctx:
        return ctx.memory()


NAMED = {F16: Pair(F16, F16), **{str(pair): pair for pair in USUAL}}


@pytest.mark.parametrize("arch", PLANS)
def test_each_row_is_what_is_allocated(load, tiny, arch):
    """Plain, sliding windows, recurrent layers, shared KV, MLA."""
    pairs, _ = PLANS[arch]
    path = tiny(arch, extra=metadata(pairs))
    found = fit(path, n_ctx=768)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [*NAMED, PLAN] and found.notes == ()
    for name, row in rows.items():
        assert row.memory == allocated(load, path, 768, NAMED.get(name))
    geometry = load(path).geometry(768)
    assert rows[PLAN].bits_per_value == pytest.approx(geometry.bits_per_value(tuple(pairs)))
    assert rows["q8_0/q4_0"].bits_per_value == pytest.approx(8.5 if arch == "mla" else 6.5)
    assert rows[F16].bits_per_value == 16
    n_f16 = geometry.bytes((Pair(F16, F16),) * geometry.n_layer)
    assert found.left == found.available - rows[F16].memory.total + n_f16
    assert found.left_bits == pytest.approx(16 * found.left / n_f16)


def test_vectors_of_k_are_counted(load, tiny, tmp_path):
    n_ctx, path = 512, tmp_path / "plan.json"
    plan = Plan((Pair("q4_0", "q4_0"),) * 4, k_vectors=(KVectors(mean=(0.5,) * 128, scale=(2.0,) * 128),) * 4)
    plan.save(path)
    model = tiny("llama")
    session = load(model)
    plain, conditioned = (row for row in fit(model, path, n_ctx=n_ctx).rows if row.name in ("q4_0/q4_0", PLAN))
    session.put_in_force(plan)
    with session.context(n_ctx) as ctx:
        assert conditioned.memory == ctx.memory()
    stored = 4 * 2 * 128 * 4
    assert conditioned.memory.cache - plain.memory.cache == stored + stored // 2  # and the inverses of the scales
    assert conditioned.bits_per_value == pytest.approx(
        session.geometry(n_ctx).bits_per_value(plan.pairs, plan.k_vectors)
    )


@pytest.mark.parametrize("arch", ["llama", "gemma3", "hybrid"])
def test_the_context_that_fits_is_the_largest(load, tiny, arch):
    path = tiny(arch)
    session = load(path, no_alloc=True)

    def total(n_ctx: int, pair: Pair) -> int:
        with session.context(n_ctx, [pair] * session.n_layer) as ctx:
            return ctx.memory().total

    for n_ctx in (512, 1536):
        limit = total(n_ctx, NAMED["q8_0/q8_0"])
        for spare, fitting in ((0, n_ctx), (-1, n_ctx - 256), (1, n_ctx)):
            rows = {row.name: row for row in fit(path, n_ctx=256, memory=limit + spare).rows}
            assert rows["q8_0/q8_0"].most_ctx == fitting
            for name, row in rows.items():
                assert total(row.most_ctx, NAMED[name]) <= limit + spare < total(row.most_ctx + 256, NAMED[name])


def test_the_ends_of_what_fits(tiny):
    path = tiny("llama")
    assert {row.most_ctx for row in fit(path, memory=1000).rows} == {0} and fit(path, memory=1000).left < 0
    found = fit(path, memory=2**40)
    assert {row.most_ctx for row in found.rows} == {found.n_ctx_train}


def test_largest_asks_little():
    """Contexts are made to ask: some ten of them, not as many as there are."""
    asked = []

    def n_bytes(n_ctx: int) -> int:
        asked.append(n_ctx)
        return 1000 + 7 * max(n_ctx, 4096) + n_ctx  # windows make it bend

    for limit in (1000, 29000, 29928, 29929, 40000, 10**6, 8 * 131072 + 999, 8 * 131072 + 1000):
        asked.clear()
        want = max((n for n in range(256, 131072 + 1, 256) if 1000 + 7 * max(n, 4096) + n <= limit), default=0)
        assert largest(n_bytes, limit, 131072) == want
        assert len(asked) < 20


def test_the_command_tells_what_to_do(tiny, tmp_path):
    """By the text and by the JSON, with a pair that a model cannot take, and what a verdict said."""
    path = tiny("llama")
    run = CliRunner().invoke
    found = json.loads(run(main, ["fit", str(path), "-c", "2k", "--memory", "6M", "--json"]).stdout)
    assert found["n_ctx"] == 2048 and [row["verdict"] for row in found["rows"]] == [None] * 5
    text = run(main, ["fit", str(path), "-c", "2048", "--memory", "6M"]).stdout
    left = found["left"] // 2**20
    assert f"kvtuner-gguf calibrate {path} --memory {left}M -c 2048" in text
    assert f"kvtuner-gguf verdict {path}" in text
    text = run(main, ["fit", str(tiny("llama", head_dim=80))]).stdout
    assert "q4_0/q4_0: left out" in text and "all of them fit" in text
