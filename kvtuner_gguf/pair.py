"""The K type and the V type of one layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .codecs import codec
from .errors import PlanError


@dataclass(frozen=True, order=True)
class Pair:
    """The ggml type names of one layer's K and V; both empty for a layer that has no KV of its own."""

    type_k: str
    type_v: str

    def __post_init__(self) -> None:
        for name in (self.type_k, self.type_v):
            if name:
                codec(name)

    def __str__(self) -> str:
        return f"{self.type_k}/{self.type_v}"

    @classmethod
    def parse(cls, text: str) -> Pair:
        """'q8_0/q4_0' -> Pair; one name stands for both sides. Raises PlanError or CodecError."""
        names = text.split("/")
        if len(names) == 1:
            names *= 2
        if len(names) != 2 or not all(names):
            raise PlanError(f"pair '{text}': need K/V, for example q8_0/q4_0, or one type for both.")
        return cls(*names)


Pairs = tuple[Pair, ...]  # one for each layer of a model
USUAL = tuple(map(Pair.parse, ("q8_0/q8_0", "q8_0/q4_0", "q5_1/q5_1", "q4_0/q4_0")))  # what people set for all layers


def allocated_pairs(layers: Iterable[Any], n_layer: int) -> tuple[Pair, ...]:
    """One pair per layer from what a context has allocated (native.LayerCache); none for a layer without KV of its
    own."""
    found = {layer.il: Pair(layer.type_k, layer.type_v or layer.type_k) for layer in layers}
    return tuple(found.get(il, Pair("", "")) for il in range(n_layer))
