"""Which unit runs where and when, if each takes as long as predicted: list scheduling, the largest first.

The same rule as the Ray runner's: all units whose inputs are there are handed over, the largest first, and one starts
as soon as a node has a free slot and memory for it. On equal slots that is the LPT rule, at most 4/3 of the shortest
possible schedule (Graham 1969, Bounds on multiprocessing timing anomalies).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A unit to schedule."""

    name: str
    seconds: float
    memory: int
    """Bytes it keeps of a node's."""
    size: float
    """By which the largest is found."""
    after: tuple[str, ...] = ()
    """Units that must have ended."""


@dataclass(frozen=True)
class Placed:
    """Where and when a unit runs: node number, seconds from the start."""

    node: int
    start: float
    end: float


def schedule(work: Sequence[Work], nodes: int, slots: int, memory: int) -> dict[str, Placed]:
    """Place units on `nodes` of `slots` places and `memory` bytes each.

    A unit that needs more memory than a node has is given a whole node. Prerequisites that are not among `work` count
    as done.
    """
    names = {one.name for one in work}
    waiting = sorted(work, key=lambda one: -one.size)
    free_slots, free_memory = [slots] * nodes, [memory] * nodes
    running: list[tuple[float, str, int, int]] = []
    placed: dict[str, Placed] = {}
    ended: set[str] = set()
    now = 0.0
    while waiting or running:
        for one in list(waiting):
            if any(name in names and name not in ended for name in one.after):
                continue
            needed = min(one.memory, memory)
            able = [node for node in range(nodes) if free_slots[node] and free_memory[node] >= needed]
            if not able:
                continue
            node = max(able, key=lambda node: (free_slots[node], -node))
            waiting.remove(one)
            free_slots[node] -= 1
            free_memory[node] -= needed
            placed[one.name] = Placed(node, now, now + one.seconds)
            heapq.heappush(running, (now + one.seconds, one.name, node, needed))
        assert running, "a unit waits for one that comes later"
        now, name, node, needed = heapq.heappop(running)
        free_slots[node] += 1
        free_memory[node] += needed
        ended.add(name)
    return placed


def peak_memory(work: Sequence[Work], placed: dict[str, Placed]) -> int:
    """Most bytes that the units on one node take together at any time."""
    most = 0
    for one in work:
        at = placed[one.name]
        beside = (
            other.memory
            for other in work
            if placed[other.name].node == at.node and placed[other.name].start <= at.start < placed[other.name].end
        )
        most = max(most, sum(beside))
    return most
