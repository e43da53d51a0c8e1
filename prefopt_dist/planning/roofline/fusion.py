"""Kernels of a layer joined as a compiler joins them: one for all small operations between two products.

Small operations that follow each other, or read the same tensor, without a product in between become one kernel. It
reads what comes from outside once, and writes only what another kernel reads. In the backward pass it makes again what
the forward pass would have had to write for it, where reading the operands again is cheaper (as torch.compile's
partition of forward and backward does). Kernels for one operation each (Liger's) save less: they do not join a residual
with the norm behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from prefopt_dist.planning.roofline.kernels import Kernel, Moved

NAME = "fused"
"""Name of a joined kernel."""


@dataclass
class _Region:
    """Kernels of a layer and a pass that become one."""

    of: tuple[int | None, str, int]
    """Layer, pass, and the most products before it in them"""
    members: list[Kernel] = field(default_factory=list)
    made: dict[int, float] = field(default_factory=dict)
    """Bytes of the memory that its members write, by place"""
    read: dict[int, float] = field(default_factory=dict)
    """Bytes of the memory that it reads from outside"""
    written: dict[int, float] = field(default_factory=dict)
    """Bytes of what it leaves for others"""
    shared: set[int] = field(default_factory=set)
    """Places of the largest tensors that its members read"""

    def add(self, kernel: Kernel) -> None:
        """Take one more kernel, in their order."""
        for moved in kernel.read:
            if moved.place not in self.made:
                self.read[moved.place] = max(self.read.get(moved.place, 0.0), moved.bytes)
        for moved in kernel.written:
            self.made[moved.place] = max(self.made.get(moved.place, 0.0), moved.bytes)
        self.members.append(kernel)

    def kernel(self) -> Kernel:
        """Return the joined kernel, of the part that moved most of its members' bytes."""
        by_part: dict[str, float] = defaultdict(float)
        for member in self.members:
            by_part[member.part] += member.bytes
        return replace(
            self.members[0],
            name=NAME,
            part=max(by_part, key=lambda part: by_part[part]),
            flop=sum(member.flop for member in self.members),
            read=tuple(Moved(*of) for of in self.read.items()),
            written=tuple(Moved(*of) for of in self.written.items()),
        )


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Return the kernels with the small operations of each layer joined; those outside of the layers stay.

    Args:
        kernels: of a forward and a backward pass, in the order in which they run.
    """
    regions = _regions(kernels)
    of_kernel = {id(kernel): region for region in regions for kernel in region.members}
    maker = {place: region for region in regions for place in region.made}
    again: dict[int, set[int]] = defaultdict(set)  # by region: what it makes again instead of reading it
    for region in regions:
        if region.members[0].step == "backward":
            again[id(region)] = _made_again(region, maker)
    for kernel in kernels:
        own = of_kernel.get(id(kernel))
        for moved in kernel.read:
            source = maker.get(moved.place)
            if source is None or source is own or (own is not None and moved.place in again[id(own)]):
                continue
            source.written[moved.place] = source.made[moved.place]
    used = {moved.place for kernel in kernels for moved in kernel.read}
    for region in regions:  # what nobody reads is a result: a gradient, or the last layer's hidden states
        region.written |= {place: size for place, size in region.made.items() if place not in used}
    done: set[int] = set()
    found = []
    for kernel in kernels:
        own = of_kernel.get(id(kernel))
        if own is None:
            found.append(kernel)
        elif id(own) not in done:
            done.add(id(own))
            found.append(own.kernel())
    return found


def _made_again(region: _Region, maker: dict[int, _Region]) -> set[int]:
    """Choose what a region of the backward pass makes again; it then reads the operands of what made it."""
    wanted: dict[int, list[int]] = defaultdict(list)
    for place in region.read:
        source = maker.get(place)
        if source is not None and source is not region and source.members[0].step == "forward":
            wanted[id(source)].append(place)
    found: set[int] = set()
    for places in wanted.values():
        source = maker[places[0]]
        saved = sum(2 * region.read[place] for place in places)  # it is not written either
        more = {place: size for place, size in source.read.items() if place not in region.read}
        if sum(more.values()) < saved:
            found |= set(places)
            for place in places:
                del region.read[place]
            region.read |= more
    return found


def _regions(kernels: Iterable[Kernel]) -> list[_Region]:
    """Group the small operations of each layer and pass that follow each other without a product in between."""
    # By place, within its layer and pass: the most products on a way to it. Neighbours of one depth can be joined.
    depths: dict[int, tuple[int | None, str, int]] = {}
    of_place: dict[int, _Region] = {}
    readers: dict[int, _Region] = {}
    regions: dict[int, _Region] = {}
    for kernel in kernels:
        within = kernel.layer, kernel.step
        before = [depths[m.place][2] for m in kernel.read if m.place in depths and depths[m.place][:2] == within]
        depth = max(before, default=0)
        for moved in kernel.written:
            depths[moved.place] = (*within, depth + (not kernel.fusible))
        if kernel.layer is None or not kernel.fusible:
            continue
        largest = max((m.bytes for m in kernel.read), default=0.0)
        shared = [m.place for m in kernel.read if m.bytes == largest]  # two readers of one tensor are joined too
        near = [of_place[m.place] for m in kernel.read if m.place in of_place]
        near += [readers[place] for place in shared if place in readers]
        same = list({id(region): region for region in near if region.of == (*within, depth)}.values())
        region = _joined(same) if same else _Region((*within, depth))
        for old in same:
            del regions[id(old)]
        region.add(kernel)
        regions[id(region)] = region
        of_place |= dict.fromkeys(region.made, region)
        region.shared |= {*shared}
        readers |= dict.fromkeys(region.shared, region)
    return list(regions.values())


def _joined(regions: Sequence[_Region]) -> _Region:
    first, *others = regions
    for other in others:
        for kernel in other.members:
            first.add(kernel)
        for place in other.made:
            first.read.pop(place, None)
        first.shared |= other.shared
    return first
