"""The catalogue of embedded data sets; importing ``fewshot_d2.data.datasets`` registers it.

Each set of scenes has a companion ``<name>_support`` of exemplars with the same category ids and other drawings.
Ids of base and novel classes differ, because they are numbered over the whole source.
"""

from dataclasses import dataclass
from pathlib import Path

from ...files import dataset_path
from .cluttered_omniglot import LEVELS, ClutteredSpec, ReferenceSpec
from .generated import register_generated
from .glyphs import GlyphSource, ProceduralGlyphs
from .omniglot import (
    BACKGROUND,
    EVALUATION,
    TEST_ONE_SHOT,
    TRAIN_DRAWERS,
    VAL_DRAWERS,
    VAL_ONE_SHOT,
    OmniglotGlyphs,
)
from .scenes import ExemplarSpec, SceneSpec

# Base classes first, novel classes behind them.
_NUM_BASE_GLYPHS = 2000
GLYPHS = ProceduralGlyphs(classes=2200, seed=20)

# Classes, drawers, number of scenes and the published seed of each set. The paper has 2,000,000 training scenes and
# 10,000 in the other sets; ``ClutteredSpec`` makes any number.
_CLUTTERED = {
    "train": (BACKGROUND, TRAIN_DRAWERS, 8000, 2209944264),
    "val_train": (BACKGROUND, VAL_DRAWERS, 2000, 4020197800),
    "test_train": (BACKGROUND, VAL_DRAWERS, 2000, 1665765955),
    "val_one_shot": (VAL_ONE_SHOT, VAL_DRAWERS, 2000, 3755213170),
    "test_one_shot": (TEST_ONE_SHOT, VAL_DRAWERS, 2000, 2301871561),
}


@dataclass(frozen=True)
class Part:
    """One row of the catalogue: ranges of classes and drawings, numbers of scenes and of exemplars a class."""

    name: str
    source: GlyphSource
    classes: tuple[int, int]
    drawings: tuple[int, int]
    support_drawings: tuple[int, int]
    scenes: int
    exemplars: int
    seed: int

    def scene_spec(self) -> SceneSpec:
        """What determines the scenes."""
        return SceneSpec(self.source, self.classes, self.drawings, self.scenes, self.seed)

    def exemplar_spec(self) -> ExemplarSpec:
        """What determines the companion of exemplars."""
        return ExemplarSpec(
            self.source, self.classes, self.support_drawings, self.exemplars, self.seed
        )


def multi_instance_parts() -> list[Part]:
    """The sets of multi-instance scenes."""
    base, novel = (0, _NUM_BASE_GLYPHS), (_NUM_BASE_GLYPHS, GLYPHS.num_classes)
    # As many base classes as novel ones are tested, so that both are equally hard.
    seen = (0, GLYPHS.num_classes - _NUM_BASE_GLYPHS)
    omniglot = OmniglotGlyphs()
    # Few classes with many scenes each, for episodes whose classes have their own queries and supports.
    few_novel, few_base = ((start, start + 120) for start, _ in (EVALUATION, BACKGROUND))
    # Exemplars of Omniglot are by other people than the scenes, in training as in evaluation.
    return [
        Part("scenes_glyphs_train", GLYPHS, base, (0, 40), (40, 50), 4000, 3, 1),
        Part("scenes_glyphs_val_base", GLYPHS, seen, (50, 90), (90, 100), 300, 5, 2),
        Part("scenes_glyphs_val_novel", GLYPHS, novel, (50, 90), (90, 100), 300, 5, 3),
        Part("scenes_omniglot_train", omniglot, BACKGROUND, (0, 7), (7, 10), 8000, 3, 4),
        Part("scenes_omniglot_val_base", omniglot, BACKGROUND, (10, 17), (17, 20), 300, 3, 5),
        Part("scenes_omniglot_val_novel", omniglot, EVALUATION, (10, 17), (17, 20), 300, 3, 6),
        Part("scenes_omniglot_train_240", omniglot, (0, 240), (0, 10), (10, 13), 8000, 3, 9),
        Part("scenes_omniglot_episodes_novel", omniglot, few_novel, (10, 17), (17, 20), 1000, 3, 7),
        Part("scenes_omniglot_episodes_base", omniglot, few_base, (10, 17), (17, 20), 1000, 3, 8),
    ]


def register_catalogue(root: str | Path) -> None:
    """Register all embedded sets, to be written below ``root`` on first use."""
    for part in multi_instance_parts():
        register_generated(part.name, part.scene_spec(), root)
        register_generated(f"{part.name}_support", part.exemplar_spec(), root)
    _register_cluttered(root)


def _register_cluttered(root: str | Path) -> None:
    """Register the single-target protocol: five sets at seven levels, each with its references."""
    source = OmniglotGlyphs()
    for name, (classes, drawers, scenes, seed) in _CLUTTERED.items():
        for level in LEVELS:
            spec = ClutteredSpec(source, classes, drawers, level, scenes, seed)
            full_name = f"cluttered_omniglot_L{level}_{name}"
            register_generated(full_name, spec, root)
            register_generated(f"{full_name}_support", ReferenceSpec.of(spec), root)


register_catalogue(dataset_path("."))
