"""A bar chart as SVG, which a page shows as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#9c6b4e")
WIDTH, LEFT, RIGHT, BAR, GAP = 960, 230, 200, 26, 14


def bars(
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    said: Mapping[str, str],
    marks: Mapping[str, float] | None = None,
) -> str:
    """For each row of parts a stacked bar with what is ``said`` of it behind; ``marks`` are lines across all bars.

    Args:
        rows: row -> part -> length, in the unit that ``title`` names.
        marks: what stands above a line -> where it is, in that unit.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    colours = dict(zip(parts, COLOURS, strict=False))
    ends = [sum(row.values()) for row in rows.values()]
    scale = (WIDTH - LEFT - RIGHT) / max([*ends, *(marks or {}).values()])
    top = 100 if marks else 76
    height = top + len(rows) * (BAR + GAP)
    shapes: list[str] = []
    for index, (part, colour) in enumerate(colours.items()):
        left = LEFT + index * 125
        shapes.append(f'<rect x="{left}" y="44" width="12" height="12" fill="{colour}"/>')
        shapes.append(_text(left + 18, 55, part))
    for name, value in (marks or {}).items():
        x = LEFT + value * scale
        shapes.append(_text(x, 84, name, "middle"))
        shapes.append(f'<path d="M{x:.1f} 90V{height - GAP}" stroke="#a0aec0" stroke-dasharray="4"/>')
    for index, (name, row) in enumerate(rows.items()):
        y, end = top + index * (BAR + GAP), float(LEFT)
        shapes.append(_text(LEFT - 10, y + 18, name, "end"))
        for part, value in row.items():
            width = value * scale
            shapes.append(f'<rect x="{end:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colours[part]}"/>')
            end += width
        shapes.append(_text(end + 8, y + 18, said[name]))
    return _svg(title, height, shapes)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _svg(title: str, height: int, shapes: Sequence[str]) -> str:
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
    white = '<rect width="100%" height="100%" fill="white"/>'
    heading = f'<text x="16" y="28" font-size="16">{title}</text>'
    return "\n".join([f'{start} font-size="14">', white, heading, *shapes, "</svg>\n"])
