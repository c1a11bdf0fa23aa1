"""Layers at once: the same results in the same order, and nothing begun after an end."""

from __future__ import annotations

import threading
import time

import pytest

from kvtuner_gguf.calibrate.layers import MOST_AT_ONCE, of_layers


@pytest.mark.parametrize("n_threads", [1, 2, 16])
def test_results_are_in_the_order_of_the_layers(n_threads):
    seen: set[int] = set()

    def work(il: int) -> int:
        seen.add(threading.get_ident())
        time.sleep(0.002 * (7 - il))
        return il * il

    assert list(of_layers(work, range(8), n_threads)) == [il * il for il in range(8)]
    assert len(seen) <= min(n_threads, MOST_AT_ONCE)


def test_an_error_ends_it_and_leaves_out_what_has_not_begun():
    begun = []

    def work(il: int) -> int:
        begun.append(il)
        time.sleep(0.01)
        if il == 1:
            raise KeyboardInterrupt
        return il

    with pytest.raises(KeyboardInterrupt):
        list(of_layers(work, range(100), 2))
    assert len(begun) < 20
