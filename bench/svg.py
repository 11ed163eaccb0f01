"""The few SVG elements that the small pictures are made of: text and rectangles, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

FONTS = "Helvetica, Arial, sans-serif"
BLUE, GREY, TEXT, FAINT = "#0072b2", "#b3b3b3", "#333333", "#777777"


def text(
    x: float, y: float, content: str, *, colour: str = TEXT, size: int = 13, bold: bool = False, anchor: str = "start"
) -> str:
    style = f'fill="{colour}" font-size="{size}" text-anchor="{anchor}"' + ' font-weight="bold"' * bold
    return f'<text x="{x:.1f}" y="{y}" {style}>{escape(content)}</text>'


def document(width: int, height: int, parts: Sequence[str]) -> str:
    """A whole picture on white."""
    size = f'width="{width}" height="{height}"'
    start = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" font-family="{FONTS}">',
        f'<rect {size} rx="6" fill="white"/>',
    ]
    return "\n".join([*start, *parts, "</svg>"]) + "\n"
