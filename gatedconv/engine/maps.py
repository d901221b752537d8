"""Places the maps of a plan: views of others, borders for their readers, slots of the workspace (csrc/cpu/plan.h)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from gatedconv.engine.layers import Layer
from gatedconv.engine.pack import PANEL, round_up


@dataclass
class Map:
    """A feature map of the plan.

    Attributes:
        channels: Its channels.
        height: Rows for the example input; as `width`, only for reports and choices, not part of the program.
        width: Columns for the example input.
        pixel: Floats from one pixel to the next.
        halo: Pixels of zeros around it, as many as its readers' padding.
        multiple: The border at the bottom and right is widened until height and width are multiples of this.
        slot: Its place in the workspace; maps that are never needed at the same time share one.
        holder: The map whose channels these are, as a part of it; None for a map with memory of its own.
        offset: The first of those channels.
    """

    channels: int
    height: int
    width: int
    pixel: int = 0
    halo: int = 0
    multiple: int = 1
    slot: int = -1
    holder: int | None = None
    offset: int = 0


@dataclass
class Step:
    """One instruction, as encoded and as reported; `parts` are the maps of a concatenation."""

    op: str
    layer: Layer | None
    source: int
    target: int
    residual: int = -1
    gate: int = -1
    parts: tuple[int, ...] = ()
    macs: int = 0
    weight_bytes: int = 0

    @property
    def reads(self) -> set[int]:
        """The maps that it needs."""
        return {self.source, self.residual, self.gate, *self.parts} - {-1}


def join_maps(steps: list[Step], maps: list[Map]) -> list[Step]:
    """Make slices and the parts of concatenations views of one map; return the steps with copies of what cannot be one.

    A part becomes a view if whole vectors of it end where the next part begins: the kernels write whole vectors.
    """
    made_by = {step.target: step for step in steps}
    for step in steps:
        if step.op == "slice":
            assert step.layer is not None
            maps[step.target].holder, maps[step.target].offset = step.source, step.layer.offset
    copied: dict[tuple[int, int], int] = {}  # (concatenation, position) -> the view that a copy fills
    for step in reversed([step for step in steps if step.op == "cat"]):
        at = 0
        _adopt(step, maps)
        for position, part in enumerate(step.parts):
            if not _place_part(step, position, at, maps, made_by):
                m = maps[part]
                copied[step.target, position] = len(maps)
                maps.append(Map(m.channels, m.height, m.width, holder=step.target, offset=at))
            at += maps[part].channels
    for m in maps:  # a view of a view is one of what that is a view of
        while m.holder is not None and (above := maps[m.holder]).holder is not None:
            m.offset, m.holder = m.offset + above.offset, above.holder
    joined: list[Step] = []
    for step in steps:
        if step.op != "cat":
            joined.append(replace(step, op="view") if step.op == "slice" else step)
            continue
        views = [copied.get((step.target, position), part) for position, part in enumerate(step.parts)]
        for part, view in zip(step.parts, views, strict=True):
            if part != view:
                joined.append(Step("copy", step.layer, part, view))
        joined.append(Step("view", step.layer, views[0], step.target, parts=tuple(views)))
    return joined


def _adopt(cat: Step, maps: list[Map]) -> None:
    """Make a concatenation whose parts follow one another in a longer one a view of that."""
    root, at = _root(cat.parts[0], maps), _offset(cat.parts[0], maps)
    if root in cat.parts or root == cat.target:
        return
    offset = at
    for part in cat.parts:
        if _root(part, maps) != root or _offset(part, maps) != at:
            return
        at += maps[part].channels
    maps[cat.target].holder, maps[cat.target].offset = root, offset


def _place_part(cat: Step, position: int, at: int, maps: list[Map], made_by: dict[int, Step]) -> bool:
    """Make a part of a concatenation, from channel `at` on, a view of the concatenation's map, if it can be one."""
    part = cat.parts[position]
    m = maps[part]
    end = at + m.channels
    if _root(part, maps) == _root(cat.target, maps):
        # Placed with a longer concatenation that begins with the same parts, or with what it is a slice of.
        return _offset(part, maps) == _offset(cat.target, maps) + at
    maker = made_by[part]
    if maker.op == "slice" and m.offset == 0 and m.holder is not None:
        # All slices of a map in their order: the map itself is the part.
        whole = maps[m.holder]
        channels = 0
        for other in cat.parts[position:]:
            if maps[other].holder != m.holder or maps[other].offset != channels or channels == whole.channels:
                break
            channels += maps[other].channels
        if channels != whole.channels or made_by[m.holder].op in ("slice", "input"):
            return False
        m, end = whole, at + channels
    elif maker.op in ("slice", "input"):
        return False
    if m.holder is not None:
        return False
    last = end == maps[cat.target].channels
    base = _offset(cat.target, maps)
    if (base + at) % PANEL or (end % PANEL and not (last and maps[cat.target].holder is None)):
        return False
    m.holder, m.offset = cat.target, at
    return True


def _root(at: int, maps: list[Map]) -> int:
    while (holder := maps[at].holder) is not None:
        at = holder
    return at


def _offset(at: int, maps: list[Map]) -> int:
    offset = 0
    while (holder := maps[at].holder) is not None:
        offset += maps[at].offset
        at = holder
    return offset


def shape_maps(steps: list[Step], maps: list[Map]) -> None:
    """Give every map the border and the pixel that its readers need; views have those of the map that holds them."""
    narrow = set(range(len(maps)))
    for step in steps:
        layer = step.layer
        if layer is not None and layer.kind == "conv":
            m = maps[_root(step.source, maps)]
            m.halo = max(m.halo, *layer.padding)
            m.multiple = max(m.multiple, {"winograd2": 2, "winograd4": 4}.get(step.op, 1))
        # Only direct convolution reads single channels; everything else reads whole vectors.
        changes = layer is not None and (layer.before is not None or layer.gate is not None)
        single = step.op in ("conv", "bf16") and layer is not None and layer.groups == 1 and not changes
        narrow -= step.reads - ({step.source} if single and step.residual != step.source else set())
    for i, m in enumerate(maps):
        if m.holder is not None:
            continue
        if i == steps[0].target and i in narrow and m.channels < PANEL:
            m.pixel = m.channels
        else:
            m.pixel = round_up(m.channels, PANEL)
            # Pixels a multiple of 2 KiB apart share too few sets of the first cache.
            m.pixel += PANEL if m.pixel % 512 == 0 else 0
    for m in maps:
        if m.holder is not None:
            holder = maps[m.holder]
            m.pixel, m.halo, m.multiple = holder.pixel, holder.halo, holder.multiple


def place_maps(steps: list[Step], maps: list[Map]) -> None:
    """Linear scan over the steps: a slot is free again after the last reader of its map and of that map's views."""
    roots = [_root(i, maps) for i in range(len(maps))]
    last_read = _last_reads(steps, maps, roots)
    free: list[int] = []
    slots = 0
    for at, step in enumerate(steps):
        root = roots[step.target] if step.target >= 0 else -1
        if root >= 0 and maps[root].slot < 0:
            if free:
                maps[root].slot = free.pop()
            else:
                maps[root].slot, slots = slots, slots + 1
        free += [maps[i].slot for i, last in last_read.items() if last == at]
    for i, m in enumerate(maps):
        m.slot = maps[roots[i]].slot


_LOCAL = {"conv", "bf16", "depthwise", "max_pool", "avg_pool", "layer_norm"}
# Floats of the smallest map that may not stay in a second-level cache. The kernels' limit, unknown
# here, is 0.2 to 0.8 MB by the machine (csrc/cpu/plan_schedule.h: half of cache_bytes); this is 0.5 MB. Half and
# twice that take 1.03 and 0.97 to 1.06 of the time (AMD EPYC, AVX-512, EfficientNet-B0 and MobileNetV2); EfficientNet's
# maps then take 1.18 and 0.79 of the memory, those of five other networks the same.
_PASSES = 2**17


def _last_reads(steps: list[Step], maps: list[Map], roots: list[int]) -> dict[int, int]:
    """The last step for which every map is kept.

    Steps in a row, each of which alone reads a large map that the one in front makes, may run band by band
    (csrc/cpu/plan_bands.h): their other inputs are read until the last of them is done.
    """
    readers = Counter(root for step in steps for root in {roots[i] for i in step.reads})
    last_read: dict[int, int] = {}
    held: set[int] = set()  # by the steps in a row that end with the current one
    passing = -1
    for at, step in enumerate(steps):
        reads = {roots[i] for i in step.reads}
        if step.op not in _LOCAL or step.source != passing:
            held = set()
        held |= reads - {passing}
        last_read.update(dict.fromkeys(reads | held, at))
        m = maps[step.target]
        large = m.channels * m.height * m.width >= _PASSES
        passing = step.target if step.op in _LOCAL and large and readers[roots[step.target]] == 1 else -1
    return last_read
