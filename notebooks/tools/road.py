"""Draw the map of the course, notebooks/images/road.svg: each lesson, and the question that it leaves to the next.

    python notebooks/tools/road.py

Lesson 00 and the README show it; the questions are those at the lessons' ends.
"""

from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).resolve().parents[1] / "images" / "road.svg"

# number, title, what it leaves unsolved
STOPS = (
    ("00", "Start here", "It works. But what is inside?"),
    ("01", "Self-attention", "It knows no order, and only ever takes means."),
    ("02", "The Transformer", "A BERT of vectors that does nothing yet."),
    ("03", "The teacher", "It knows more than labels. Can a small one learn it?"),
    ("04", "The distillation loss", "Answers alone do not carry the teacher over."),
    ("05", "Magnitude pruning", "Which inner states should a smaller student imitate?"),
    ("06", "The TinyBERT losses", "What can layers learn before any task?"),
    ("07", "General distillation", "The task still has few sentences."),
    ("08", "Data augmentation", "All parts are there. What do they make together?"),
    ("09", "TinyBERT", "Zeros save no time, and the file is mostly words."),
    ("10", "Deployment", "One task, one language, one machine."),
    ("17", "Scaling out", "One task, one language, a model that fits one GPU."),
)
PARTS = {"the model": ("#0072B2", "01 02"), "teacher, student, pruning": ("#D55E00", "03 04 05"),
         "TinyBERT": ("#009E73", "06 07 08 09 10")}  # fmt: skip
GREY = "#595959"
BOX, STEP, LEFT = (430, 52), 76, 6  # two columns of six stops


def _stop(index: int) -> list[str]:
    """Draw one lesson's box and the arrow to the next."""
    number, title, left_open = STOPS[index]
    colour = next((c for c, members in PARTS.values() if number in members.split()), GREY)
    column, row = divmod(index, LEFT)
    x, y, (width, height) = 12 + column * 482, 44 + row * STEP, BOX
    dashes = ' stroke-dasharray="6 4"' if left_open.startswith("(") else ""
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="#fff" stroke="{colour}" stroke-width="2"{dashes}/>',
        f'<rect x="{x}" y="{y}" width="44" height="{height}" rx="7" fill="{colour}"/>',
        f'<text x="{x + 22}" y="{y + 33}" font-size="18" font-weight="bold" fill="#fff" text-anchor="middle">{number}</text>',
        f'<text x="{x + 56}" y="{y + 22}" font-size="16" font-weight="bold" fill="#1a1a1a">{escape(title)}</text>',
        f'<text x="{x + 56}" y="{y + 42}" font-size="13.5" font-style="italic" fill="#333">{escape(left_open)}</text>',
    ]
    if index + 1 < len(STOPS):
        start = f"{x + width / 2} {y + height}"
        if row + 1 < LEFT:
            path = f"M{start} v{STEP - height - 4}"
        else:  # up between the columns, to the top of the next one
            path = f"M{x + width} {y + height / 2} h26 V{44 + BOX[1] / 2} h22"
        parts.append(f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#tip)"/>')
    return parts


def draw() -> str:
    """Return the picture as SVG."""
    height = 44 + LEFT * STEP
    told = "; ".join(f"{number} {title}: {left_open}" for number, title, left_open in STOPS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 936 {height}" width="936" height="{height}" role="img" '
        f'aria-label="{escape(f"The lessons in order, each with what it leaves open. {told}", {chr(34): "&quot;"})}" '
        'font-family="system-ui, sans-serif">',
        f'<rect width="936" height="{height}" fill="#fff"/>',
        f'<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker>',
    ]
    for x, (name, (colour, members)) in zip((12, 200, 530), PARTS.items(), strict=True):
        parts.append(f'<text x="{x}" y="26" font-size="15" fill="{colour}">■ {name} ({members[:2]} to {members[-2:]})</text>')
    for index in range(len(STOPS)):
        parts += _stop(index)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8", newline="\n")
    print(f"wrote {FILE.name}")
