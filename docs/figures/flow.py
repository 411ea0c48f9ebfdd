"""Draw flow.svg, the picture of the data flow.

python docs/figures/flow.py
"""

from __future__ import annotations

from pathlib import Path

BLUE, ORANGE, GREY = "#3b7dd8", "#e8853d", "#8a8f98"
STYLE = """
  <style>
    text { font: 15px system-ui, sans-serif; fill: #24292f; text-anchor: middle }
    .small { font-size: 12.5px; fill: #57606a }
    .box { fill: #eef4fc; stroke: #3b7dd8; stroke-width: 1.5 }
    .vote { fill: #fdf1e7; stroke: #e8853d }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .small { fill: #9aa4af } .box { fill: #16273d } .vote { fill: #3a2414 }
    }
  </style>"""
CROPS = [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)]


def box(x: float, width: float, label: str, below: str, kind: str = "") -> str:
    middle = x + width / 2
    return (
        f'<rect class="box {kind}" x="{x}" y="70" width="{width}" height="60" rx="8"/>'
        f'<text x="{middle}" y="105">{label}</text><text class="small" x="{middle}" y="154">{below}</text>'
    )


def arrow(x: float, end: float) -> str:
    return (
        f'<path d="M{x} 100H{end - 7}" stroke="{GREY}" stroke-width="1.5"/><path d="M{end} 100l-8-4v8z" fill="{GREY}"/>'
    )


def views(x: float, y: float, side: float = 40, gap: float = 12) -> str:
    """Ten small maps in two rows, each with its crop; the mirrored ones below, in the other colour."""
    parts = []
    for i in range(10):
        left, top = x + (i % 5) * (side + gap), y + (i // 5) * (side + gap + 4)
        across, down = CROPS[i % 5]
        crop = side * 5 / 6
        parts.append(
            f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="{GREY}" stroke-opacity=".6"/>'
            f'<rect x="{left + across * (side - crop):.1f}" y="{top + down * (side - crop):.1f}" width="{crop:.1f}" '
            f'height="{crop:.1f}" fill="{ORANGE if i > 4 else BLUE}" fill-opacity=".45"/>'
        )
    return "".join(parts)


def main() -> None:
    parts = [
        box(20, 110, "front", "N × C × H × W"),
        arrow(130, 170),
        views(172, 52),
        '<text class="small" x="298" y="30">ten views of the map, the mirrored ones below</text>',
        '<text class="small" x="298" y="172">10·N × C × h × w</text>',
        arrow(426, 466),
        box(466, 110, "tail", "10·N × K"),
        arrow(576, 616),
        box(616, 110, "vote", "N × K", "vote"),
        '<text class="small" x="521" y="52">training: a loss on each row</text>',
        '<text class="small" x="671" y="52">eval</text>',
    ]
    picture = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 190" role="img">'
        "<title>A feature map inside the network is cut into ten views; the rest of the network classifies each; they vote."
        f"</title>{STYLE}\n  " + "\n  ".join(parts) + "\n</svg>\n"
    )
    Path(__file__).with_suffix(".svg").write_text(picture)


if __name__ == "__main__":
    main()
