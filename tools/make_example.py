"""Something to find with the demo's model: a glyph as a hand draws it on paper, and scenes that have it in them.

Both are generated. The glyph is of a class that the model never saw, drawn by another hand than those of the scenes.
"""

import argparse
import dataclasses
from pathlib import Path

from PIL import Image

from fewshot_d2.data.datasets.builtin import multi_instance_parts

# So few classes that most scenes have the one that is searched.
_CLASSES = 5


def make_example(folder: Path, scenes: int = 20) -> None:
    """Write ``glyph.png`` (dark on white) and ``scenes/*.png``."""
    part = next(p for p in multi_instance_parts() if p.name == "scenes_glyphs_val_novel")
    first = part.classes[0]
    spec = dataclasses.replace(part.scene_spec(), classes=(first, first + _CLASSES))
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    for index in range(scenes):
        Image.fromarray(spec.picture(index).image).save(folder / "scenes" / f"{index:02d}.png")
    ink = part.source.drawing(first, part.support_drawings[0])
    Image.fromarray(255 - ink).save(folder / "glyph.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo/example"))
    parser.add_argument("--scenes", type=int, default=20)
    args = parser.parse_args()
    make_example(args.output, args.scenes)
    print(f"find it:\n  {find_command(args.output)}")


def find_command(folder: Path) -> str:
    """The command that finds the glyph in the scenes."""
    return (
        f"fewshot-d2 find --support {folder}/glyph.png::glyph --images {folder}/scenes "
        "--output output/found"
    )


if __name__ == "__main__":
    main()
