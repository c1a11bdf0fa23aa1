"""The cache types: one row each. What a row costs is derived from here, everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CodecError


@dataclass(frozen=True)
class Codec:
    """A ggml type that a K or V cache can hold.

    block_size  values in a block
    type_size   bytes of a block, scales included
    in_menu     whether a calibration chooses from it by default
    better      the type of no more bits that errs less, which takes its place there where a head allows
    groups      four groups of channels with bits of their own: for K alone, and in a basis (kvectors.py) alone, which
                sorts the channels by what they matter
    """

    name: str
    block_size: int
    type_size: int
    in_menu: bool = True
    better: str = ""
    groups: bool = False

    @property
    def bits_per_value(self) -> float:
        """Real bits per cached value, scales included."""
        return 8 * self.type_size / self.block_size

    def row_bytes(self, n_values: int) -> int:
        """Bytes of n_values in a row. Raises CodecError if they do not fill whole blocks."""
        if n_values % self.block_size:
            raise CodecError(
                f"{self.name}: a row of {n_values} values is not a multiple of its block of {self.block_size}. "
                "Leave this layer at f16."
            )
        return n_values // self.block_size * self.type_size


# from the most to the least precise; ggml's names, block sizes and type sizes. qB_N, kB_N and tB_N are ours: B bits,
# blocks of N
CODECS: dict[str, Codec] = {
    c.name: c
    for c in (
        Codec("f32", 1, 4, in_menu=False),
        Codec("f16", 1, 2),
        Codec("bf16", 1, 2, in_menu=False),
        Codec("q8_0", 32, 34),
        Codec("q6_32", 32, 26),
        Codec("q5_1", 32, 24),
        Codec("q5_0", 32, 22),
        Codec("k5_64", 64, 41, groups=True),
        Codec("q4_1", 32, 20),
        Codec("q4_0", 32, 18),
        Codec("iq4_nl", 32, 18, better="t4_64"),
        Codec("t4_64", 64, 33),
        Codec("k4_64", 64, 33, groups=True),
        Codec("q3_32", 32, 14, better="t3_64"),
        Codec("t3_64", 64, 25),
        Codec("q3_64", 64, 26, better="t3_64"),
        Codec("k3_64", 64, 25, groups=True),
        Codec("q2_32", 32, 10, better="t2_64"),
        Codec("t2_64", 64, 17),
        Codec("q2_64", 64, 18, better="t2_64"),
        Codec("k2_64", 64, 17, groups=True),
    )
}


def codec(name: str) -> Codec:
    """The row of a type name. Raises CodecError, which lists the known names."""
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"cache type '{name}' is not known. Use one of: {', '.join(CODECS)}.") from None
