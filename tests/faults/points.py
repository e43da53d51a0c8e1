"""Where a job can be killed, in the order in which it gets there, and a seeded life of many deaths."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Point:
    """A function of the package; a process dies at the edge of one of its calls."""

    stage: str
    target: str
    """module:function or module:Class.function"""
    most: int
    """The call is drawn from the first so many."""
    edge: str = "either"
    """before, after, either"""
    one: bool = False
    """Rank 0 alone calls it."""


P = "prefopt_dist."
POINTS = (
    Point("start", P + "checkpoint.run_folder:RunFolder.note", 1, one=True),
    Point("start", P + "distributed.ranks:require_shared_folder", 1),
    Point("tokenising", P + "data.prepare:_Columns.append", 2, one=True),
    Point("tokenising", P + "data.cache:_publish", 2, one=True),
    Point("loading the reference", P + "distributed.zero3:reference_engine", 1),
    Point("first pass", P + "reference.first_pass:_sums", 12),
    Point("first pass", P + "reference.first_pass:_sums", 20),
    Point("between store shards", P + "reference.store:ReferenceStore.commit", 2, "after"),
    Point("inside a store shard", P + "reference.store:ReferenceStore._claim", 2),
    Point("inside a store shard", P + "reference.store:_check", 3, one=True),
    Point("loading the policy", P + "distributed.zero3:policy_engine", 1),
    Point("evaluation", P + "training.evaluation:evaluate", 1),
    Point("training step", P + "training.step:forward_backward", 3),
    Point("training step", P + "training.step:reduce_metrics", 3),
    Point("checkpoint, staging", P + "checkpoint.save:_random_states", 1),
    Point("checkpoint, staging", P + "checkpoint.save:_report", 1),
    Point("checkpoint, before the rename", P + "checkpoint.save:Manifest.text", 1, one=True),
    Point("training step", P + "training.step:optimizer_step", 6),
    Point("checkpoint, after the rename", P + "checkpoint.save:fsync_folder", 1, one=True),
    Point("loading a checkpoint", P + "checkpoint.load:load", 1),
    Point("metrics row", P + "monitoring.metrics_file:MetricsFile.append", 6, one=True),
    Point("metrics row", P + "monitoring.metrics_file:MetricsFile.truncate_to", 1, one=True),
    Point("pruning", P + "checkpoint.save:remove", 1, one=True),
    Point("clearing or pruning", P + "checkpoint.save:shutil.rmtree", 8, one=True),
    Point("pruning", P + "checkpoint.load:_sweep", 1, one=True),
    Point("training step", P + "training.step:forward_backward", 3),
    Point("evaluation", P + "training.evaluation:evaluate", 1),
    Point("checkpoint, before the rename", P + "checkpoint.save:Manifest.text", 1, one=True),
    Point("pruning", P + "checkpoint.save:remove", 1, one=True),
    Point("export", P + "checkpoint.export:_write", 1),
    Point("export", P + "checkpoint.export_weights:_write_part", 1, one=True),
    Point("export", P + "checkpoint.export_check:verify", 1),
    Point("export", P + "checkpoint.export:fsync_folder", 1, one=True),
    Point("export", P + "checkpoint.run_folder:RunFolder.write_done", 1, "before", one=True),
)


CONVERSION = (
    Point("conversion, before it", P + "checkpoint.resharding:prepare", 1),
    Point("conversion, planning", P + "checkpoint.resharding:_plan", 1, one=True),
    Point("conversion, writing", P + "checkpoint.resharding:_write", 8),
    Point("conversion, writing", P + "checkpoint.resharding:_write", 8),
    Point("conversion, manifest", P + "checkpoint.resharding:write_atomic", 1, one=True),
    Point("conversion, after the rename", P + "checkpoint.resharding:fsync_folder", 1, one=True),
    Point("loading the converted form", P + "distributed.partitions:fill", 1),
    Point("superseding the converted form", P + "checkpoint.resharding:remove", 1, one=True),
)
"""Reached where a job goes on with a checkpoint of another number of ranks."""


@dataclass(frozen=True)
class Fault:
    """One planned death: at a point, or, without a target, after a share of an undisturbed start's time.

    On fewer ranks than it was drawn for, `at` counts round, and "other" is "self" where there is no other.
    """

    stage: str
    who: str
    """self, other, all; memory: nobody, but the rank runs out of memory"""
    at: int = 0
    target: str = ""
    call: int = 1
    before: bool = True
    share: float = 0.0
    segment: int | None = None
    """It waits for this part of the schedule of ranks; None: for any."""

    def plan(self) -> dict[str, Any]:
        """For the planted killer and the record."""
        return asdict(self)


def life(draw: random.Random, kills: int, world_size: int) -> list[Fault]:
    """The deaths that wait for one job; a start dies of the first that it reaches."""
    moments = kills // 6
    planted = draw.sample(POINTS, min(kills - moments, len(POINTS)))
    return [_at(point, draw, world_size) for point in planted] + [_moment(draw, world_size) for _ in range(moments)]


def changing_life(draw: random.Random, kills: int, segments: int, most_ranks: int) -> list[Fault]:
    """The same for a job that changes its number of ranks; more wait than the job can reach.

    In every segment but the first half of the deaths are in or around the conversion.
    """
    deaths = []
    for segment in range(segments):
        conversion = draw.sample(CONVERSION, min(kills // 2, len(CONVERSION))) if segment else ()
        others = draw.sample(POINTS, min(kills, len(POINTS)))
        deaths += [replace(_at(point, draw, most_ranks), segment=segment) for point in (*conversion, *others)]
        deaths.append(replace(_moment(draw, most_ranks), segment=segment))
    return deaths


def _moment(draw: random.Random, world_size: int) -> Fault:
    who, at = draw.choice(("self", "all")), draw.randrange(world_size)
    return Fault("any moment", who, at=at, share=draw.uniform(0.1, 0.95))


def _at(point: Point, draw: random.Random, world_size: int) -> Fault:
    return Fault(
        point.stage,
        who=draw.choice(("self", "other", "all") if world_size > 1 else ("all",)),
        at=0 if point.one else draw.randrange(world_size),
        target=point.target,
        call=draw.randint(1, point.most),
        before=draw.random() < 0.5 if point.edge == "either" else point.edge == "before",
    )
