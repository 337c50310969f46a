"""The plan for the residuals of a solve: of how many steps they are kept, and in what form."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import diffrax
import jax
import numpy as np

from ..types import PyTree
from ._checkpoints import ceil
from ._diffrax import sub_saveats
from ._explicit import ExplicitMethod


# Bytes for residuals, or the choice by the rule below.
Allowance: TypeAlias = int | Literal["auto"]

# Bytes that "auto" allows: half of a usual third cache.
BUDGET = 16 * 2**20
# The ring is cleared at the start, all of it: 64 MB that a solve of 20 steps did not need took five times as
# long as the solve. With fewer than `LEAST` steps the writes of all others are not worth it.
MOST = 48
LEAST = 8
# A block is long enough for its products to be fast, and what it reads and writes stays near the processor.
BLOCK_BYTES = 5 * 2**19
BLOCKS = (4, 24)
# Slots that a rejected attempt after the last step may have written to.
SPARE = 2


@dataclass(frozen=True)
class Plan:
    """A choice of how many steps to keep, and how.

    `size`: steps in the ring, a multiple of `block`: so many at a time the gradients of their weights are
    taken of. `count`: stages that the vjp of a step goes through. `is_chained`: a step begins with the field
    that the one before it ended with, and their stage is one. `is_dense`: the dense output is kept too.
    """

    size: int
    block: int
    count: int
    is_chained: bool
    is_dense: bool

    @classmethod
    def of(
        cls,
        method: ExplicitMethod,
        saveat: diffrax.SaveAt,
        max_steps: int,
        keep: Allowance,
    ) -> "Plan | None":
        """Return the plan for a solve, `None` if nothing is to be kept."""
        is_dense = bool(saveat.dense or any(sub.ts is not None or sub.steps for sub in sub_saveats(saveat)))
        count = method.count(is_dense)
        each = count * _bytes(method.residuals) + is_dense * (method.tableau.num_stages + 2) * _bytes(
            method.y0
        )
        total = (BUDGET if keep == "auto" else keep) // max(each, 1)
        needed = max_steps + SPARE
        block = max(BLOCKS[0], min(BLOCKS[1], BLOCK_BYTES // max(each, 1)))
        block = max(1, min(block, total // 4, needed, MOST))
        # Besides the ring a copy of a block, and the cotangents of its products, are counted in.
        room = total - 2 * block
        if room < (min(LEAST, needed) if keep == "auto" else block + SPARE):
            return None
        size = block * min(min(room, MOST) // block, ceil(needed, block))
        is_chained = method.last_is_first and not method.control_moves
        return cls(size, block, count, is_chained, is_dense)


def _bytes(tree: PyTree) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
