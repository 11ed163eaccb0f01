"""Names beside the points of a plot, each where no other name, point or line is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

# Lengths are in points, 1/72 inch.
PLACES = (
    (0, 9), (0, -9), (24, 0), (-24, 0), (16, -17), (-16, -17), (16, 17), (-16, 17), (0, -20), (30, -24), (-30, -24),
)  # fmt: skip
"""Where the middle of a name may lie beside its point; the first place that is free is taken."""
FONT_SIZE = 8
HALF_HEIGHT, HALF_WIDTH_PER_LETTER = 4, 2.1
POINT_RADIUS = 4
ROOF_MARGIN = 2
FAR = 10
THIN_LINE = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0}
"""A name that is farther above or below its point than ``FAR`` gets a thin line to it."""


@dataclass(frozen=True)
class Box:
    """A rectangle on paper."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, half_width: float, half_height: float) -> Box:
        return cls(x - half_width, y - half_height, x + half_width, y + half_height)

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and self.right > other.left and self.bottom < other.top and self.top > other.bottom
        )


def write_names(axis: Axes, points: Sequence[tuple[str, float, float]], roof: float | None) -> None:
    """Write each name beside its point. The layout of the figure has to be final.

    Args:
        points: name, x and y, the coordinates in data units.
        roof: y of a horizontal line that no name may cross; None without one.
    """
    scale = 72 / axis.figure.dpi
    at = [tuple(axis.transData.transform((x, y)) * scale) for _, x, y in points]
    line = None if roof is None else axis.transData.transform((1, roof))[1] * scale
    own = [Box.around(x, y, POINT_RADIUS, POINT_RADIUS) for x, y in at]
    # What is written already, such as the names of the roofs.
    extents = [text.get_window_extent() for text in axis.texts]
    taken = [*own, *(Box(e.x0 * scale, e.y0 * scale, e.x1 * scale, e.y1 * scale) for e in extents)]
    for index in sorted(range(len(points)), key=lambda index: -at[index][1]):
        name, x, y = points[index]
        half_width = HALF_WIDTH_PER_LETTER * len(name)
        boxes = {place: _box(at[index], place, half_width) for place in PLACES}
        others = [box for box in taken if box != own[index]]
        free = [place for place, box in boxes.items() if not _crosses(box, line) and not any(map(box.overlaps, others))]
        place = free[0] if free else PLACES[0]
        taken.append(boxes[place])
        axis.annotate(
            name, (x, y), place, textcoords="offset points", ha="center", va="center", fontsize=FONT_SIZE,
            arrowprops=THIN_LINE if abs(place[1]) > FAR else None,
        )  # fmt: skip


def _box(point: tuple[float, float], place: tuple[float, float], half_width: float) -> Box:
    return Box.around(point[0] + place[0], point[1] + place[1], half_width, HALF_HEIGHT)


def _crosses(box: Box, line: float | None) -> bool:
    return line is not None and box.bottom < line + ROOF_MARGIN and box.top > line - ROOF_MARGIN
