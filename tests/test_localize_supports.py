"""Image-level supports become boxed ones: by a detector that is known to the pixel, by features, by every system."""

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from inference_cases import small_config, system_configs, write_model
from PIL import Image
from torch import nn
from torchvision.ops import box_iou

from fewshot_d2 import FewShotPredictor, Support, SupportSet, localize_supports
from fewshot_d2.cli.main import main
from fewshot_d2.modeling.co_localization import common_boxes, common_maps, largest_region

RED, BLUE = (230, 20, 20), (20, 20, 230)


def picture(seed, box, color=RED, size=(96, 128)):
    """Grey noise with a rectangle (XYXY) of a colour."""
    pixels = np.random.default_rng(seed).normal(120, 12, (*size, 1)).clip(0, 255).astype(np.uint8)
    pixels = np.repeat(pixels, 3, axis=2)
    if box is not None:
        x0, y0, x1, y1 = box
        pixels[y0:y1, x0:x1] = color
    return Support(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


BOXES = ([40, 24, 72, 64], [16, 16, 56, 48], [64, 40, 112, 80])


def red_set(**options):
    return SupportSet([7], ["red"], [[picture(i, box, **options) for i, box in enumerate(BOXES)]])


class ColorPredictor:
    """Finds the reddest rectangle of a picture exactly, and a worse box with a lower score; keeps a diary."""

    def __init__(self, misses=()):
        self.support, self.diary, self.misses = "before", [], misses

    def set_support(self, support_set):
        self.support = support_set

    def predict(self, image):
        image = np.ascontiguousarray(image)
        self.diary.append((self.support, image))
        red = (image[:, :, 2] > 200) & (image[:, :, 0] < 50)
        found = Instances(image.shape[:2])
        boxes, scores = torch.zeros(0, 4), torch.zeros(0)
        if red.any() and len(self.diary) - 1 not in self.misses:
            ys, xs = np.nonzero(red)
            box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            boxes = torch.tensor([[0, 0, 5, 5], box], dtype=torch.float32)
            scores = torch.tensor([0.2, 0.9])
        found.pred_boxes, found.scores = Boxes(boxes), scores
        found.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
        return found


def test_each_picture_is_searched_with_the_others():
    predictor, support_set = ColorPredictor(), red_set()
    boxed, done = localize_supports(predictor, support_set)
    assert [shot.box.tolist() for shot in boxed.examples[0]] == [list(box) for box in BOXES]
    assert [(d.class_name, d.number) for d in done] == [("red", 1), ("red", 2), ("red", 3)]
    assert [d.score for d in done] == pytest.approx([0.9] * 3)
    assert all(shot.box is None for shot in support_set.examples[0])
    assert (boxed.class_ids, boxed.class_names) == ([7], ["red"])
    for i, (used, image) in enumerate(predictor.diary):
        shots = support_set.examples[0]
        assert used.examples == [shots[:i] + shots[i + 1 :]] and used.class_ids == [7]
        # BGR, as OpenCV has it.
        assert (image[:, :, ::-1] == shots[i].image.permute(1, 2, 0).numpy()).all()
    assert predictor.support == "before"


def test_examples_with_boxes_masks_or_negative_ones_stay():
    shots = red_set().examples[0]
    boxed = Support(shots[1].image, torch.tensor([1.0, 2, 3, 4]))
    masked = Support(shots[2].image, None, torch.ones(96, 128, dtype=torch.bool))
    negative = Support(shots[2].image, negative=True)
    support_set = SupportSet([1], ["red"], [[negative, shots[0], boxed, masked]])
    predictor = ColorPredictor()
    after, done = localize_supports(predictor, support_set)
    assert [d.number for d in done] == [2] and done[0].box.tolist() == BOXES[0]
    assert after.examples[0][0] is negative and after.examples[0][2:] == [boxed, masked]
    assert predictor.diary[0][0].examples[0] == [negative, boxed, masked]


def test_what_is_not_found_stays_as_it_was():
    after, done = localize_supports(ColorPredictor(misses=(1,)), red_set())
    assert [shot.box is None for shot in after.examples[0]] == [False, True, False]
    assert done[1].box is None and done[1].score == 0
    _, done = localize_supports(ColorPredictor(), red_set(), min_score=0.95)
    assert all(d.box is None for d in done)


def test_a_box_outside_its_picture_is_not_taken():
    predictor = ColorPredictor()
    predict = predictor.predict

    def shifted(image):
        found = predict(image)
        found.pred_boxes.tensor[1] += 500
        return found

    predictor.predict = shifted
    after, _ = localize_supports(predictor, red_set())
    assert [shot.box.tolist() for shot in after.examples[0]] == [[0, 0, 5, 5]] * 3


def test_a_single_picture_has_no_others():
    single = SupportSet([1, 2], ["red", "one"], [red_set().examples[0], [picture(9, BOXES[0])]])
    predictor = ColorPredictor()
    with pytest.raises(ValueError, match="class 'one' must have at least 2 examples.*'common'"):
        localize_supports(predictor, single)
    assert not predictor.diary and predictor.support == "before"
    # A single example that has its box already is no problem.
    boxed = SupportSet(
        [1], ["one"], [[Support(single.examples[1][0].image, torch.tensor([0.0, 0, 5, 5]))]]
    )
    assert localize_supports(predictor, boxed)[1] == []
    with pytest.raises(ValueError, match="method must be one of"):
        localize_supports(predictor, single, method="guess")


class Averages(nn.Module):
    """Mean colours of squares: features without any learning."""

    def __init__(self, stride=8):
        super().__init__()
        self.stride = stride

    def output_shape(self):
        return {"fine": ShapeSpec(3, stride=2), "colors": ShapeSpec(3, stride=self.stride)}

    def forward(self, images):
        pool = nn.functional.avg_pool2d
        return {"fine": pool(images, 2), "colors": pool(images, self.stride, ceil_mode=True)}


class Detector:
    """What ``common_boxes`` needs of one; pads to 32 pixels with a colour that stands out if it is looked at."""

    def __init__(self, stride=8):
        self.backbone = Averages(stride)

    def preprocess(self, queries):
        return ImageList.from_tensors([q["image"].float() for q in queries], 32, pad_value=255.0)


def query_of(shot, scale=1):
    image = shot.image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return {"image": image, "height": shot.image.shape[1], "width": shot.image.shape[2]}


@pytest.mark.parametrize("scale", [1, 2])
def test_what_is_common_is_boxed_in_original_pixels(scale):
    """Boxes lie on the grid of cells, so that they must come out but for the smoothing of a cell."""
    shots = red_set().examples[0]
    found = common_boxes(Detector(8 * scale), [query_of(s, scale) for s in shots], threshold=0.3)
    for (box, score), expected in zip(found, BOXES, strict=True):
        assert box_iou(box[None], torch.tensor([expected]).float()) > 0.7
        assert 0.3 < score <= 1


def test_a_decoy_in_one_picture_is_not_what_is_common():
    shots = red_set().examples[0]
    shots[1].image[:, 70:90, 100:124] = torch.tensor(BLUE, dtype=torch.uint8)[:, None, None]
    found = common_boxes(Detector(), [query_of(shot) for shot in shots], threshold=0.3)
    for (box, _), expected in zip(found, BOXES, strict=True):
        assert box_iou(box[None], torch.tensor([expected]).float()) > 0.6


def test_a_single_picture_gives_what_stands_out():
    ((box, _),) = common_boxes(Detector(), [query_of(picture(0, BOXES[0]))], threshold=0.3)
    assert box_iou(box[None], torch.tensor([BOXES[0]]).float()) > 0.7


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (96, 128)])
def test_pictures_without_anything_in_common(size):
    """One colour all over, down to a single pixel: nothing is found and nothing fails."""
    flat = Support(torch.full((3, *size), 90, dtype=torch.uint8))
    assert common_boxes(Detector(), [query_of(flat)] * 2, threshold=0.3) == [None, None]


def test_the_sign_is_that_of_the_middle():
    """An object of one direction on a ground of another, either way round; lengths do not matter."""
    cells = torch.zeros(8, 9)
    cells[3:5, 3:6] = 1
    for first, second in ((cells, 1 - cells), (1 - cells, 7 * cells)):
        (found,) = common_maps([torch.stack([first, second])])
        torch.testing.assert_close(found, cells)
    (found,) = common_maps([torch.stack([5 - cells, 5 - cells])])
    assert not found.any()


def test_the_largest_region_wins():
    attention = torch.zeros(20, 30)
    attention[2:4, 2:4] = 1.0
    attention[10:15, 20:28] = 0.5
    assert largest_region(attention, 0.3) == ([20, 10, 28, 15], 0.5)
    assert largest_region(attention, 0.6) == ([2, 2, 4, 4], 1.0)
    assert largest_region(attention, 1.0) is None
    # Corners that touch connect.
    attention[4:10, 4] = attention[9, 4:20] = 0.4
    assert largest_region(attention, 0.3)[0] == [2, 2, 28, 15]


@pytest.mark.parametrize("system", sorted(system_configs()))
def test_every_system_localizes_by_either_method(system):
    """Random weights: where the boxes are says nothing, but they are valid and the system takes them."""
    torch.manual_seed(0)
    predictor = FewShotPredictor(small_config(system))
    support_set = SupportSet(
        [7], ["red"], [[picture(i, [8, 8, 40, 32], size=(48, 64)) for i in range(2)]]
    )
    for method in ("others", "common"):
        after, done = localize_supports(predictor, support_set, method=method)
        assert len(done) == 2 and predictor.support is None
        for shot, result in zip(after.examples[0], done, strict=True):
            assert (shot.box is None) == (result.box is None)
        assert method == "others" or all(d.box is not None for d in done)
        predictor.set_support(after)
        predictor.support = None


def test_command_line_writes_boxes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    for i, shot in enumerate(red_set().examples[0]):
        Image.fromarray(shot.image.permute(1, 2, 0).numpy()).save(f"{i}.png")
    model = ["--config-file", "config.yaml", "--weights", "model_final.pth"]
    assert main(["support", "create", "red.zip", "0.png::red", "1.png::red", "2.png::red"]) == 0
    arguments = ["support", "localize", "red.zip", "--method", "common", *model]
    assert main([*arguments, "--output", "boxed.zip"]) == 0
    assert all(shot.box is None for shot in SupportSet.load("red.zip").examples[0])
    boxes = [shot.box for shot in SupportSet.load("boxed.zip").examples[0]]
    assert all(box is not None for box in boxes)
    assert f"{boxes[0][0]:.0f},{boxes[0][1]:.0f}," in capsys.readouterr().out
    assert main([*arguments, "--output", "boxed.zip"]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    # In place, and nothing is above the score.
    assert main([*arguments, "--min-score", "1.1"]) == 1
    assert "not found" in capsys.readouterr().out
    assert main(["support", "create", "one.zip", "0.png::red"]) == 0
    assert main(["support", "localize", "one.zip", *model]) == 2
    assert "at least 2 examples" in capsys.readouterr().err


def test_grey_and_transparent_files_are_localized(tmp_path):
    shot = red_set().examples[0][0]
    image = Image.fromarray(shot.image.permute(1, 2, 0).numpy())
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.convert("L").save(tmp_path / "grey.png")
    shots = [Support.from_file(tmp_path / name) for name in ("alpha.png", "grey.png")]
    (box, _), grey = common_boxes(Detector(), [query_of(s) for s in shots], threshold=0.3)
    assert box_iou(box[None], torch.tensor([BOXES[0]]).float()) > 0.6
    assert grey is None or len(grey[0]) == 4
