# SPDX-License-Identifier: Apache-2.0
"""How a kernel is laid out, by architecture, dtype and width; nothing is tried at run time."""

from __future__ import annotations

from dataclasses import dataclass

# A row of channels is read by at most so many bytes at once: one cache line. Further lanes would
# only repeat the arithmetic of the coordinates.
_LINE = 128
# Tiles of channels that a thread holds, beyond which more lanes are taken.
_MAX_CHUNKS = 8
# Channels of a thread, beyond which one point alone has enough loads in flight.
_BUSY = 16
# Queries of a program: more would leave a GPU idle at a decoder's 300 queries.
MOST_ROWS = 64


@dataclass(frozen=True)
class Knobs:
    """What is tuned.

    Attributes:
        warps: warps of a program. With one, the backward exchanges everything by shuffles; with
            more, its small results go through shared memory and barriers.
        bytes: of a tensor of value (forward) or of its gradient (backward) that a thread moves at
            once, at most.
        unroll: points that are computed at once: more loads in flight, more registers.
    """

    warps: int
    bytes: int = 16
    unroll: int = 1


@dataclass(frozen=True)
class Layout:
    """The constants of a kernel's tiles; chunks x width cover D, and width is lanes x vec."""

    rows: int
    width: int
    chunks: int
    vec: int
    unroll: int
    warps: int

    @property
    def lanes(self) -> int:
        """Threads that share a row."""
        return self.width // self.vec


# (architecture, dtype, D) -> (forward, backward); None stands for any. The most specific row wins,
# and the last one serves whatever is not listed. The rows follow from what the compiler emits
# (tests/ops/test_triton_code.py): none is measured yet.
TABLE: dict[tuple[str | None, str | None, int | None], tuple[Knobs, Knobs]] = {
    # red.global.add.v4.f32 exists from sm_90 on. fp64 has no such instruction.
    ("sm_90", "fp64", None): (Knobs(4), Knobs(1, bytes=8)),
    ("sm_100", "fp64", None): (Knobs(4), Knobs(1, bytes=8)),
    # Two points at once make the fused forward spill there.
    ("sm_100", None, None): (Knobs(4), Knobs(1)),
    ("sm_90", None, None): (Knobs(4, unroll=2), Knobs(1)),
    ("sm_80", "fp64", None): (Knobs(4), Knobs(1, bytes=8)),
    ("sm_80", None, None): (Knobs(4, unroll=2), Knobs(1, bytes=4)),
    # Few programs are what is fast there.
    ("interpreter", None, None): (Knobs(4), Knobs(4)),
    # Reductions of one number a thread: neighbouring threads then fill whole sectors.
    (None, "fp64", None): (Knobs(4), Knobs(1, bytes=8)),
    (None, None, None): (Knobs(4), Knobs(1, bytes=4)),
}


def family(backend: str, arch: object) -> str:
    """The architecture as TABLE names it: an NVIDIA one as the listed one that it extends."""
    if backend == "cuda":
        number = int(str(arch))
        listed = [each for each in (100, 90, 80) if number >= each]
        return f"sm_{listed[0] if listed else number}"
    return str(arch).split(":")[0]


def knobs(architecture: str, dtype: str, channels: int) -> tuple[Knobs, Knobs]:
    """The row of TABLE that serves a width: forward, backward."""
    for key in (
        (architecture, dtype, channels),
        (architecture, dtype, None),
        (architecture, None, None),
        (None, dtype, None),
    ):
        if key in TABLE:
            return TABLE[key]
    return TABLE[None, None, None]


def split(groups: int, most_lanes: int) -> tuple[int, int]:
    """Lanes, a power of two, and chunks that cover `groups` with the least padding.

    Of equal paddings the one with the most lanes wins, up to `most_lanes`.
    """
    candidates = []
    for chunks in range(1, _MAX_CHUNKS + 1):
        lanes = 1 << (-(-groups // chunks) - 1).bit_length()
        candidates.append((lanes > most_lanes, lanes * chunks - groups, chunks, lanes))
    _, _, chunks, lanes = min(candidates)
    return lanes, chunks


def layout(knobs: Knobs, warp: int, itemsize: int, channels: int, vec: int, points: int) -> Layout:
    """The tiles of a kernel.

    Args:
        knobs: a row's entry for this kernel.
        warp: threads of a warp.
        itemsize: bytes of what `knobs.bytes` speaks of.
        channels: D.
        vec: a power of two that divides D and all offsets into value.
        points: the least points of a level.
    """
    vec = min(vec, max(1, knobs.bytes // itemsize))
    lanes, chunks = split(channels // vec, min(warp, max(1, _LINE // (vec * itemsize))))
    warps = max(1, min(knobs.warps, MOST_ROWS * lanes // warp))
    rows = max(1, warps * warp // lanes)
    # A loop that is unrolled away lets the compiler start the loads of all levels at once, and
    # there are not enough registers for that.
    unroll = knobs.unroll if points > knobs.unroll and points % knobs.unroll == 0 else 1
    if chunks * vec > _BUSY:
        unroll = 1
    return Layout(rows, lanes * vec, chunks, vec, unroll, warps)
