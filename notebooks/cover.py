"""Draw the README's figure, notebooks/cover.png: what GPTQ's claim measures on the base model, as the tour shows it.

python -m notebooks.cover
"""

from __future__ import annotations

from pathlib import Path

from chapters.contents import find
from chapters.figures import save_png_bytes
from chapters.lab import Lab
from minitfm.checkpoint import replace_file

CHAPTER = "gptq"
TARGET = Path(__file__).with_name("cover.png")


def main() -> None:
    """Measure the claim at its quick budget and write its figure."""
    figure = find(CHAPTER).module().claim(Lab()).figure
    with replace_file(TARGET) as temporary:
        temporary.write_bytes(save_png_bytes(figure))
    print(f"{TARGET.name}: {TARGET.stat().st_size // 1000} KB")


if __name__ == "__main__":
    main()
