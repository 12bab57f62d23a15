"""Draws the picture of the model: streams, window rows, compressed entries, indexer, experts.

    python tools/draw_model.py [--out docs/images/model.svg]

The file's ending says in which format. The same script always writes the same SVG.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "model.svg"
INK, FAINT, PAPER = "#22303c", "#9aa7b1", "#f3f5f7"
BLUE, ORANGE, GREEN, VIOLET = "#2a6fbb", "#d9601a", "#3a8f5b", "#7a5aa6"
STREAMS = (5.0, 8.5, 12.0, 15.5)  # where the four residual streams run

# The example of the attention panel: the query at position 22, a window of 6 and blocks of 4.
TOKENS, WINDOW, RATIO = 23, 6, 4
SCORES, CHOSEN = (0.35, 0.95, 0.2, 0.8, 0.45), (1, 3)
LEFT, STEP, ROW = 48.0, 2.9, 37.0  # first token's x, distance between tokens, their y


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=OUT, type=Path, help="SVG or PNG file to write")
    out = parser.parse_args().out
    # Without these two the ids and the date in the file would differ from run to run.
    plt.rcParams["svg.hashsalt"] = "v4jax"
    metadata = {"Date": None} if out.suffix == ".svg" else None
    draw().savefig(out, metadata=metadata, dpi=150)


def draw():
    """The whole figure; all coordinates are in units of a 120 x 72 sheet."""
    figure = plt.figure(figsize=(12, 7.2), facecolor="white")
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set(xlim=(0, 120), ylim=(0, 72))
    sheet.axis("off")
    draw_layer(sheet)
    draw_attention(sheet)
    draw_experts(sheet)
    return figure


def draw_layer(sheet):
    """Left: from token ids to logits, and what one layer does to the streams."""
    title(sheet, 2, 70, "From token ids to logits")
    for x in STREAMS:
        sheet.plot([x, x], [64, 6.5], color=VIOLET, linewidth=2.2, zorder=1)
    box(sheet, 2, 64, 39, 3.6, "token ids, embedding, copied into M = 4 streams")
    frame = Rectangle((1.2, 19), 41, 42.5, fill=False, linestyle="--", edgecolor=FAINT)
    sheet.add_patch(frame)
    note(sheet, 41.4, 19.6, "one layer; Flash has 43, Pro 61", align="right")
    half_layer(sheet, 58, "attention", "window rows and\ncompressed entries", BLUE)
    half_layer(sheet, 38.5, "experts", "6 routed\nand 1 shared", GREEN)
    arrow(sheet, (15.5, 14.5), (22, 14.5), VIOLET)
    mtp = "MTP block: reads the streams\nand the next token, predicts\none token further"
    box(sheet, 22, 11, 19, 7, mtp, 6.5)
    box(sheet, 2, 3, 39, 3.6, "streams summed with weights, RMSNorm, logits")


def half_layer(sheet, top, name, text, colour):
    """Streams into one vector, a sub-layer, and its result back into all streams."""
    box(sheet, 3, top - 1.7, 15, 3.4, "pre: weighted sum", 7)
    arrow(sheet, (18, top), (23, top))
    box(sheet, 23, top - 1.7, 17, 3.4, "RMSNorm", 7)
    arrow(sheet, (31.5, top - 1.7), (31.5, top - 5))
    box(sheet, 23, top - 15, 17, 10, f"{name}\n\n{text}", 8, colour)
    arrow(sheet, (23, top - 13), (18, top - 13))
    box(sheet, 3, top - 14.7, 15, 3.4, "post: add, mix streams", 7)


def draw_attention(sheet):
    """Right, above: what the query at the last position of a CSA layer attends to."""
    title(sheet, 46, 70, "Attention of a CSA layer, for the query at position 22")
    for t in range(TOKENS):
        token(sheet, t)
    for j in range(len(SCORES)):
        entry(sheet, j)
    softmax = "one softmax over window rows, chosen entries and a sink"
    box(sheet, 58, 63.6, 60, 3.4, softmax, 8, BLUE)
    arrow(sheet, (at(20.4), ROW + 3), (at(20.4), 63.6), BLUE)
    bracket(sheet, 0, 16, "a block of m = 4 tokens becomes one entry (it looks back one block)")
    bracket(sheet, 17, 22, "window: the last W rows")
    note(sheet, 46.2, 60.6, "indexer:", ORANGE)
    note(sheet, 46.2, 58.8, "scores all", ORANGE)
    note(sheet, 46.2, 57.0, "entries,", ORANGE)
    note(sheet, 46.2, 55.2, "keeps top k", ORANGE)
    note(sheet, at(20.8), ROW + 5, "open block:\nno entry yet", FAINT, size=6.5)
    kinds = "window layer: window rows alone     CSA layer: window + chosen entries (m = 4)     "
    note(sheet, 46.2, 28.9, kinds + "HCA layer: window + every entry (m = 128)", size=6.8)


def at(t):
    """The x of a token's left edge."""
    return LEFT + STEP * t


def token(sheet, t):
    inside = t > TOKENS - 1 - WINDOW
    colour = BLUE if inside else PAPER
    cell = Rectangle((at(t), ROW), STEP - 0.4, 3, facecolor=colour, edgecolor=INK, linewidth=0.7)
    sheet.add_patch(cell)
    number = {"color": "white" if inside else INK, "fontsize": 6.5}
    sheet.text(at(t) + STEP / 2 - 0.2, ROW + 1.4, str(t), ha="center", va="center", **number)


def entry(sheet, j):
    """A block's entry above its tokens, and the score that the indexer gives it."""
    chosen = j in CHOSEN
    colour = ORANGE if chosen else FAINT
    first, bottom, middle = at(RATIO * j), ROW + 3.2, at(RATIO * j + RATIO / 2) - 0.2
    for begin, alpha in ((first, 0.25), (first - RATIO * STEP, 0.10)):
        if begin < LEFT - 0.1:
            continue
        end = begin + RATIO * STEP - 0.4
        corners = [(begin, bottom), (end, bottom), (middle + 2.4, 46), (middle - 2.4, 46)]
        sheet.add_patch(Polygon(corners, facecolor=colour, alpha=alpha, linewidth=0))
    box(sheet, middle - 2.6, 46, 5.2, 3.2, f"entry {j}", 6.5, colour, solid=chosen)
    height = 7 * SCORES[j]
    bar = Rectangle((middle - 1, 51), 2, height, facecolor=colour, linewidth=0)
    sheet.add_patch(bar)
    if chosen:
        arrow(sheet, (middle, 51.4 + height), (max(middle, 60.5), 63.6), ORANGE)


def draw_experts(sheet):
    """Right, below: how one token gets to its experts."""
    title(sheet, 46, 25.5, "Experts, for one token")
    box(sheet, 47, 10, 9, 4, "x  [D]", 8)
    arrow(sheet, (51.5, 14), (51.5, 18.3))
    router = "router: the 6 experts of highest score + bias (first 3 layers: a table by token id)"
    box(sheet, 47, 18.3, 71, 3.6, router, 7.5)
    note(sheet, 67, 8.2, "routed experts: 256 in Flash, 384 in Pro", size=6.8)
    for i in range(14):
        chosen = i in (1, 2, 5, 8, 9, 12)
        x = 67 + 2.9 * i
        box(sheet, x, 10, 2.2, 4, "", 6, GREEN if chosen else FAINT, solid=chosen)
        if chosen:
            arrow(sheet, (x + 1.1, 18.3), (x + 1.1, 14.2), GREEN)
    arrow(sheet, (56, 12), (66.4, 12))
    arrow(sheet, (108, 12), (111.5, 12))
    box(sheet, 111.5, 9.8, 6.5, 4.4, "sum", 8)
    arrow(sheet, (51.5, 10), (51.5, 6.7))
    box(sheet, 47, 3, 60, 3.6, "shared expert: every token", 7.5, GREEN)
    arrow(sheet, (107, 4.8), (114.7, 9.8))


def title(sheet, x, y, text):
    sheet.text(x, y, text, fontsize=10.5, fontweight="bold", color=INK, va="center")


def note(sheet, x, y, text, colour=INK, align="left", size=7.0):
    sheet.text(x, y, text, fontsize=size, color=colour, ha=align, va="center")


def box(sheet, x, y, width, height, text, size=7.5, colour=INK, solid=False):
    rounded = "round,pad=0,rounding_size=0.5"
    fill = colour if solid else "white"
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle=rounded, facecolor=fill, edgecolor=colour, zorder=2
    )
    sheet.add_patch(patch)
    shown = {"fontsize": size, "color": "white" if solid else colour, "zorder": 3}
    sheet.text(x + width / 2, y + height / 2, text, ha="center", va="center", **shown)


def arrow(sheet, start, end, colour=INK):
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    sheet.annotate("", xy=end, xytext=start, arrowprops=style, zorder=2)


def bracket(sheet, first, last, text):
    """A line under a run of tokens, and what they are."""
    left, right, y = at(first), at(last + 1) - 0.4, ROW - 1.2
    sheet.plot([left, left, right, right], [y + 0.6, y, y, y + 0.6], color=INK, linewidth=0.9)
    note(sheet, (left + right) / 2, y - 1.6, text, align="center")


if __name__ == "__main__":
    main()
