# SPDX-License-Identifier: Apache-2.0
"""Mistakes that tests plant into copies of csrc, to see that they are caught.

A comment in the source, `// mutant: <name>`, names the statement that follows it. In a copy, what
takes the statement's place asks at run time whether to make the mistake: one library holds all of
them, and makes the one that VITADAPTER_MUTANT names, or none.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path

MARK = re.compile(r"^[ \t]*// mutant: (.+)\n", re.MULTILINE)
CHOICE = "VITADAPTER_MUTANT"

_ASK = f"""
#include <cstdlib>
#include <cstring>
inline bool is_mutant(const char* name) {{
  const char* chosen = std::getenv("{CHOICE}");
  return chosen != nullptr && std::strcmp(chosen, name) == 0;
}}
"""


def marks(source: Path) -> dict[str, list[Path]]:
    """The files of csrc that have a mark, by the names of the marks."""
    found: dict[str, list[Path]] = {}
    for path in sorted(source.rglob("*")):
        if path.is_file():
            for name in MARK.findall(path.read_text()):
                found.setdefault(name, []).append(path)
    return found


def plant(source: Path, mistakes: Mapping[str, str]) -> Path:
    """Makes mistakes possible in a copy of csrc; returns the file to include before all others.

    Args:
        source: the copy; marks of other mistakes stay comments.
        mistakes: by name, what takes the statement's place: with $MUTANT for whether this mistake
            is to be made, $statement for the statement, and where that is `left = right;` with
            $left and $right.
    """
    found = marks(source)
    for number, (name, mistake) in enumerate(mistakes.items()):
        (path,) = found[name]
        text = path.read_text()
        (mark,) = [match for match in MARK.finditer(text) if match[1] == name]
        end = _end_of_statement(text, mark.end())
        statement = text[mark.end() : end].strip()
        left, _, right = statement.rstrip(";").partition(" =")
        planted = string.Template(mistake).substitute(
            MUTANT=f"mutant_{number}", statement=statement, left=left, right=right
        )
        path.write_text(text[: mark.start()] + planted + text[end:])
    prelude = source / "mutants.h"
    prelude.write_text(
        _ASK
        + "".join(
            f'inline const bool mutant_{number} = is_mutant("{name}");\n'
            for number, name in enumerate(mistakes)
        )
    )
    return prelude


def _end_of_statement(text: str, start: int) -> int:
    """Where the statement ends that begins at `start`: after its semicolon or its empty body."""
    depth = 0
    for at in range(start, len(text)):
        if depth == 0 and text[at] == ";":
            return at + 1
        if depth == 0 and text.startswith(") {}", at - 2):
            return at + 2
        depth += (text[at] in "([{") - (text[at] in ")]}")
    raise ValueError(f"no statement in {text[start : start + 100]!r}")


# Of the CUDA kernels, caught by tests/cuda_emulation.
EMULATED = {
    "corner off by one": "$left = $MUTANT ? high + one < size : ($right);",
    "half of the warp in the mask": (
        "static const struct { operator uint32_t() const { return $MUTANT ? 0xffff : $right; } }"
        " kAllLanes{};"
    ),
    "four sums that miss half of the group": "if (!$MUTANT || offset != 4) $statement",
    "a lane that finishes another corner's sum": (
        "$left = $MUTANT ? (high ? a : b) + __shfl_xor_sync(kAllLanes, high ? a : b, 2) : ($right);"
    ),
    "a lane that leaves early": "$statement if ($MUTANT && lane == 31) return;",
    "dot products in the place of weights that are still read": (
        "if ($MUTANT) samples[(i + 1) % count].weight[0] = 0; $statement"
    ),
    "samples read before they are written": "if (!$MUTANT) $statement",
    "gradient without the attention weight": (
        "$statement if ($MUTANT) $left = f.wy[i / 2] * f.wx[i % 2];"
    ),
    "points that take the place of earlier ones": "if ($MUTANT) count = 0; $statement",
    "softmax without its sum": "if ($MUTANT) return exponential(logit - most_); $statement",
    "the mean of one lane": "$left = $MUTANT ? mean_ : ($right);",
    "a reference that all lanes add to": (
        "if ($MUTANT && points_ > 0 && i < p_.width) to[i] += sum; else $statement"
    ),
    "a mask of another image": (
        "mask($MUTANT || masks == nullptr ? masks : masks + index.b * n.pixels) {}"
    ),
    "one row's memory for all": (
        "$left = $MUTANT ? reinterpret_cast<acc*>(memory + stage::kWarpBytes) : ($right);"
    ),
    "a row of another image": "if ($MUTANT) return high >> shift; $statement",
    "a last band as high as the others": "$left = $MUTANT ? kBand : ($right);",
    "a last run as long as the others": "$left = $MUTANT ? kRun : ($right);",
}
_LESS_MEMORY = (
    "if ($MUTANT) {"
    " LaunchShape less = [&]() -> LaunchShape { $statement }();"
    " less.bytes -= 16;"
    " return less; }"
    " $statement"
)
# 16 bytes less for each block than its warps use.
TOO_SMALL = {
    "forward blocks with too little memory": _LESS_MEMORY,
    "backward blocks with too little memory": _LESS_MEMORY,
}
# Of the CPU kernels, caught by tests/sanitize.
SANITIZED = {
    "column beyond the map": "$statement if ($MUTANT) $left = high;",
    "points off the map behind the pixel of zeros": (
        "$left = $right + ($MUTANT ? lane_int<acc>(1) : lane_int<acc>(0));"
    ),
    "vectors that must be aligned": (
        "if ($MUTANT) v = *static_cast<const Vec<T, N>*>(p); else $statement"
    ),
}
