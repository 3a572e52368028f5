"""Draws the pictures of docs/, for light and dark pages: `python docs/pictures/draw.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1f2328} .small{font-size:11px;fill:#59636e}
.title{font-weight:600} .box{fill:#f6f8fa;stroke:#59636e} .room{fill:#fff;stroke:#818b98}
.arrow{stroke:#0969da;stroke-width:1.5;fill:none} .head{fill:#0969da}
@media (prefers-color-scheme:dark){text{fill:#f0f6fc} .small{fill:#9198a1} .box{fill:#151b23;stroke:#9198a1}
.room{fill:#0d1117;stroke:#656c76} .arrow{stroke:#4493f8} .head{fill:#4493f8} .page{fill:#0d1117}}
.page{fill:#fff}
.line{fill:none;stroke-width:2} .first{stroke:#0969da} .second{stroke:#bf3989} .third{stroke:#1a7f37}
.fourth{stroke:#9a6700} .grid{stroke:#818b98;stroke-width:.5;stroke-dasharray:2 3}
@media (prefers-color-scheme:dark){.first{stroke:#4493f8} .second{stroke:#f778ba} .third{stroke:#3fb950}
.fourth{stroke:#d29922} .grid{stroke:#656c76}}
"""


@dataclass
class Picture:
    """Boxes, arrows and words on a page of `width` by `height` pixels."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, w: int, h: int, title: str, *lines: str, kind: str = "room") -> None:
        """Draws a rectangle with a title and smaller lines below it."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="6"/>')
        self.text(x + 10, y + 19, title, "title")
        for number, line in enumerate(lines):
            self.text(x + 10, y + 36 + 15 * number, line, "small")

    def text(self, x: int, y: int, words: str, kind: str = "small") -> None:
        """Writes words that begin at (x, y)."""
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>')

    def arrow(self, *points: tuple[int, int]) -> None:
        """Draws a line through the points, with a head at the last one."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline class="arrow" points="{path}" marker-end="url(#head)"/>')

    def chain(self, boxes: Sequence[tuple[str, str]], y: int) -> None:
        """Draws eight boxes in two rows, and arrows from each to the next."""
        for number, (title, line) in enumerate(boxes):
            x, top = 20 + 220 * (number % 4), y + 76 * (number // 4)
            self.box(x, top, 200, 52, title, line)
            if number % 4:
                self.arrow((x - 20, top + 26), (x, top + 26))
        self.arrow((780, y + 52), (780, y + 64), (120, y + 64), (120, y + 76))

    def svg(self) -> str:
        """Returns the picture as a file."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        marker = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
                f'aria-label="{escape(self.title)}">',
                f"<style>{STYLE}</style><defs>{marker}</defs>",
                f'<rect class="page" width="{self.width}" height="{self.height}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def architecture() -> Picture:
    """The two processes, their rooms, and a request's way through them."""
    page = Picture(
        900, 560, "Two processes: HTTP on the left, the engine on the right, server/link between them"
    )
    page.text(20, 26, "client", "title")
    page.arrow((65, 22), (120, 22), (120, 66))
    page.box(20, 40, 370, 400, "HTTP process", "text and JSON; imports no MLX", kind="box")
    page.box(40, 92, 330, 50, "server/api/request", "1  the body, checked once, as types")
    page.box(40, 160, 330, 50, "server/api/prompt + server/glm", "2  chat template, token ids, grammar")
    page.box(
        40, 228, 330, 50, "server/api/dialects", "3  one file a route; sends Generate, streams the answer"
    )
    page.box(40, 296, 330, 50, "server/api/answer + server/glm", "8  text, thought, tool calls; JSON or SSE")
    page.box(40, 364, 160, 56, "server/api/access", "keys, quotas, receipts")
    page.box(210, 364, 160, 56, "server/api/admin", "metrics, cache, memory")
    page.box(410, 200, 90, 100, "server/link", "messages", "supervisor", "pipe")
    page.box(520, 40, 360, 400, "engine process", "token ids in, token ids out; owns MLX", kind="box")
    page.box(540, 92, 320, 50, "server/engine", "4  loop: take commands, choose, step, hand out")
    page.box(540, 160, 155, 50, "…/schedule", "5  who runs next")
    page.box(705, 160, 155, 50, "…/prefix", "5  saved prompts")
    page.box(540, 228, 320, 50, "models/", "6  the flat forward, layer by layer")
    page.box(540, 296, 155, 50, "streaming/", "6  experts into slots")
    page.box(705, 296, 155, 50, "…/decode", "7  the next token")
    page.box(540, 364, 320, 56, "…/memory + config/", "the plan of --ram-budget, and who keeps to it")
    page.box(520, 470, 360, 66, "SSD", "checkpoint (306 to 395 GB), mirrors, saved prompts", kind="box")
    page.arrow((205, 142), (205, 160))
    page.arrow((205, 210), (205, 228))
    page.arrow((370, 245), (410, 245))
    page.arrow((500, 225), (512, 225), (512, 117), (540, 117))
    page.arrow((617, 142), (617, 160))
    page.arrow((782, 142), (782, 160))
    page.arrow((617, 210), (617, 228))
    page.arrow((617, 278), (617, 296))
    page.arrow((782, 278), (782, 296))
    page.arrow((860, 321), (870, 321), (870, 452), (455, 452), (455, 300))
    page.arrow((410, 280), (390, 280), (390, 321), (370, 321))
    page.arrow((530, 470), (530, 321), (540, 321))
    page.text(545, 465, "past the page cache")
    return page


def expert() -> Picture:
    """An expert's way from a file to the product."""
    page = Picture(900, 470, "An expert's way from the checkpoint's file to the product")
    page.box(
        20,
        30,
        250,
        96,
        "1  ExpertIndex",
        "streaming/files/index.py",
        "(layer, expert, part) -> file and bytes,",
        "read from the headers at start-up",
    )
    page.box(
        20,
        150,
        250,
        82,
        "2  plan_runs",
        "streaming/files/read_plan.py",
        "neighbours merged, large pieces cut",
        "",
    )
    page.box(
        20,
        256,
        250,
        96,
        "3  Reader",
        "streaming/disk/reader.py",
        "threads, positional reads, four classes:",
        "demand, lookahead, sweep, prefix files",
    )
    page.box(
        20, 376, 250, 66, "SSD", "O_DIRECT or F_NOCACHE,", "one folder or several (mirror.py)", kind="box"
    )
    page.box(
        320,
        256,
        250,
        96,
        "4  Filler",
        "streaming/fills.py",
        "a read writes only while its Ticket",
        "for (slot, generation) is valid",
    )
    page.box(
        320,
        30,
        250,
        96,
        "5  ExpertStore, StoreLayer",
        "streaming/store.py, layer.py",
        "which expert lies in which slot;",
        "the policy names the one that goes",
    )
    page.box(
        320,
        150,
        250,
        82,
        "6  Bank",
        "streaming/banks.py",
        "one layer's slots: MLX arrays",
        "[slots, ...], filled in place",
    )
    page.box(
        620,
        30,
        260,
        96,
        "7  MoeMlp, Experts",
        "models/glm_moe_dsa.py, experts/",
        "the router's ids become slots;",
        "hits are computed while misses are read",
    )
    page.box(
        620,
        150,
        260,
        82,
        "8  gather_qmm",
        "models/arithmetic.py",
        "products with the packed weights,",
        "summed in ascending expert id",
    )
    page.box(
        620,
        256,
        260,
        96,
        "prompts: Sweeper, Ring",
        "streaming/sweep.py, ring.py",
        "each absent expert once, for all rows,",
        "in slots of the ring's own",
    )
    page.arrow((145, 126), (145, 150))
    page.arrow((145, 232), (145, 256))
    page.arrow((145, 376), (145, 352))
    page.arrow((270, 304), (320, 304))
    page.arrow((445, 256), (445, 232))
    page.arrow((570, 191), (620, 191))
    page.arrow((620, 78), (570, 78))
    page.arrow((320, 78), (270, 78))
    page.arrow((750, 126), (750, 150))
    page.arrow((620, 304), (570, 304))
    page.text(578, 70, "asks")
    page.text(276, 70, "where?")
    return page


def walks() -> Picture:
    """The files that a prompt, and a saved block, pass one after the other."""
    page = Picture(
        900, 400, "A prompt's way from the body to the engine, and a saved block's way out and back"
    )
    prompt = (
        ("1  body.py", "bounds on size, depth, time"),
        ("2  chat_schema.py", "types; unknown fields noted"),
        ("3  chat.py", "one Chat for each request"),
        ("4  replay.py, remembered.py", "its own turns, token by token"),
        ("5  template.py, tokenizer.py", "text, then token ids"),
        ("6  constraints.py", "the grammar of the answer"),
        ("7  service.py", "one Generate for each answer"),
        ("8  answer.py", "asks the Engine"),
    )
    page.text(20, 26, "a prompt, from the body to the engine", "title")
    page.chain(prompt, 40)
    block = (
        ("1  lookup.py", "blocks named by their tokens"),
        ("2  cache_blocks.py", "rows of the cache as bytes"),
        ("3  block_memory.py", "the tier in memory"),
        ("4  block_writer.py", "behind the engine's back"),
        ("5  block_files.py", "a file for each, to the SSD"),
        ("6  block_files.py", "read and checked"),
        ("7  restore.py", "a few between two steps"),
        ("8  cache_blocks.py", "bytes as rows of a cache"),
    )
    page.text(20, 226, "a saved block, out and back", "title")
    page.chain(block, 240)
    return page


PICTURES = {"architecture.svg": architecture, "expert.svg": expert, "walks.svg": walks}


def main() -> None:
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
