"""A scatter plot with names, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

W, H, PAD = 860, 620, 60


def scatter(points: Sequence[tuple[str, float, float]], x_name: str, y_name: str) -> str:
    """The plot of (name, x, y)."""
    spans = []
    for axis in (1, 2):
        values = [p[axis] for p in points]
        margin = 0.08 * (max(values) - min(values) or 1.0)
        spans.append((min(values) - margin, max(values) + margin))
    (x0, x1), (y0, y1) = spans

    def place(x: float, y: float) -> tuple[float, float]:
        return PAD + (x - x0) / (x1 - x0) * (W - 2 * PAD), H - PAD - (y - y0) / (y1 - y0) * (H - 2 * PAD)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="12">',
        f'<rect width="{W}" height="{H}" fill="white"/>',
        f'<path d="M{PAD} {PAD}V{H - PAD}H{W - PAD}" fill="none" stroke="#888"/>',
        f'<text x="{W / 2}" y="{H - 14}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text x="16" y="{H / 2}" text-anchor="middle" transform="rotate(-90 16 {H / 2})">{escape(y_name)}</text>',
    ]
    for k in range(5):
        x, y = x0 + (x1 - x0) * k / 4, y0 + (y1 - y0) * k / 4
        parts.append(
            f'<text x="{place(x, y0)[0]:.0f}" y="{H - PAD + 18}" text-anchor="middle" fill="#555">{x:.2f}</text>'
        )
        parts.append(f'<text x="{PAD - 8}" y="{place(x0, y)[1] + 4:.0f}" text-anchor="end" fill="#555">{y:.2f}</text>')
    for name, x, y in points:
        at, up = place(x, y)
        parts.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="4" fill="#2563eb"/>')
        parts.append(f'<text x="{at + 6:.1f}" y="{up + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
