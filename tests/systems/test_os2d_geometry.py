"""OS2D: points, matrices, places, boxes, corners and labels against loops and closed forms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fewshot_d2.systems.os2d import geometry
from fewshot_d2.systems.os2d.scales import Scales
from fewshot_d2.systems.os2d.targets import BOX_CODER, GroundTruth, assign, localization_losses


def random_parameters(rng, kind, rows, n):
    near = torch.tensor(geometry.IDENTITY[kind])[:, None]
    return near + 0.3 * torch.randn(rows, len(near), n, generator=rng)


def matrix_of(parameters, inverse):
    """3 x 3, by the library."""
    if len(parameters) == 4:
        sx, tx, sy, ty = parameters.tolist()
        rows = [[sx, 0, tx], [0, sy, ty]]
    else:
        rows = parameters.view(2, 3).tolist()
    matrix = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    return torch.linalg.inv(matrix) if inverse else matrix


@pytest.mark.parametrize("kind", ["simple", "affine"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (1, 5), (4, 1), (1, 1)])
def test_places_boxes_and_corners_are_those_of_all_225_points(rng, kind, inverse, size):
    height, width = size
    parameters = random_parameters(rng, kind, 2, height * width)
    matrices = geometry.to_matrices(parameters, inverse=inverse)
    points = geometry.template_points(torch.device("cpu"))
    places = geometry.sampled_places(matrices, points, size)
    boxes, corners = geometry.to_boxes(matrices, size), geometry.to_corners(matrices, size)
    assert places.shape == (2, 225, height * width, 2)
    line = torch.linspace(-1, 1, 15, dtype=torch.float64).tolist()
    for r, y, x in itertools.product(range(2), range(height), range(width)):
        n = y * width + x
        matrix = matrix_of(parameters[r, :, n], inverse)
        pixels = {}
        for row, column in itertools.product(range(15), range(15)):
            local = matrix @ torch.tensor([line[column], line[row], 1.0], dtype=torch.float64)
            in_map = 7.5 * local[:2] + torch.tensor([x + 0.5, y + 0.5])
            found = (places[r, column * 15 + row, n].double() + 1) / 2
            for axis, side in enumerate((width, height)):
                # A map of one cell is sampled in it whatever the place.
                if side > 1:
                    assert_close(found[axis] * (side - 1), in_map[axis], atol=1e-3, rtol=1e-4)
            pixels[row, column] = 120 * local[:2] + 16 * torch.tensor([x + 0.5, y + 0.5])
        every = torch.stack(list(pixels.values()))
        first, second = every.amin(0), every.amax(0)
        second = torch.maximum(second, first + 1)
        tolerance = {"atol": 2e-2 if inverse else 2e-3, "rtol": 1e-4}
        assert_close(boxes[r, n].double(), torch.cat([first, second]), **tolerance)
        named = torch.cat([pixels[0, 0], pixels[0, 14], pixels[14, 0], pixels[14, 14]])
        assert_close(corners[r, n].double(), named, **tolerance)


def test_inner_points_are_eleven_rows_and_columns_without_the_border():
    inner = geometry.inner_points(torch.device("cpu")).tolist()
    assert inner == [c * 15 + r for c in range(2, 13) for r in range(2, 13)]


def test_identity_box_is_the_anchor_and_least_box_a_pixel():
    identity = torch.tensor(geometry.IDENTITY["affine"]).view(1, 6, 1).repeat(1, 1, 6)
    anchors = geometry.anchors((2, 3), torch.device("cpu"))
    assert_close(geometry.to_boxes(identity, (2, 3))[0], anchors)
    assert anchors[4].tolist() == [24 - 120, 24 - 120, 24 + 120, 24 + 120]
    nothing = torch.zeros(1, 6, 1, requires_grad=True)
    box = geometry.to_boxes(nothing, (1, 1))
    assert box.tolist() == [[[8, 8, 9, 9]]]
    box[..., 2:].sum().backward()
    assert not nothing.grad.any()


def test_one_singular_matrix_changes_its_whole_chunk():
    parameters = torch.eye(3)[:2].flatten().view(1, 6, 1).repeat(2, 1, 40000)
    parameters[0, [0, 4], 7] = 0.0
    matrices = geometry.to_matrices(parameters, inverse=True)
    shifted = torch.linalg.inv((1 + 1e-5) * torch.eye(3, dtype=torch.float64))[0, 0].float()
    flat = matrices.transpose(1, 2).reshape(-1, 6)
    assert (flat[:65535, 0][torch.arange(65535) != 7] == shifted).all()
    assert (flat[65535:, 0] == 1).all()
    assert_close(flat[7], torch.tensor([1e5, 0, 0, 0, 1e5, 0]), rtol=1e-4, atol=1e-4)


def test_matrices_that_stay_singular_give_finite_boxes_corners_and_gradients():
    """What is added to the diagonal can be just what makes it zero."""
    parameters = torch.zeros(1, 6, 4)
    parameters[0, 0] = torch.tensor([-1e-5, 1.0, 1e-38, 0.0])
    parameters[0, 4, 1] = 1.0
    parameters.requires_grad_()
    matrices = geometry.to_matrices(parameters, inverse=True)
    boxes, corners = geometry.to_boxes(matrices, (2, 2)), geometry.to_corners(matrices, (2, 2))
    assert torch.isfinite(boxes).all() and torch.isfinite(corners).all()
    boxes.sum().backward()
    assert torch.isfinite(parameters.grad).all()


def naive_labels(boxes, truth, high, low):
    labels = torch.zeros(boxes.shape[:2], dtype=torch.int64)
    matched = torch.zeros_like(labels)
    for k, n in itertools.product(*map(range, boxes.shape[:2])):
        best, x = 0.0, boxes[k, n].double().tolist()
        for g, y in enumerate(truth.boxes.double().tolist()):
            if truth.classes[g] != k:
                continue
            w = max(min(x[2], y[2]) - max(x[0], y[0]), 0)
            h = max(min(x[3], y[3]) - max(x[1], y[1]), 0)
            areas = (x[2] - x[0]) * (x[3] - x[1]) + (y[2] - y[0]) * (y[3] - y[1])
            iou = w * h / (areas - w * h)
            if iou > best:
                best, matched[k, n] = iou, g
        if best >= high:
            labels[k, n] = -1 if truth.difficult[matched[k, n]] else 1
        elif best >= low:
            labels[k, n] = -1
    return labels, matched


def test_labels_are_those_of_a_loop(rng):
    corner = 100 * torch.rand(7, 2, generator=rng)
    boxes = torch.cat([corner, corner + 20 + 100 * torch.rand(7, 2, generator=rng)], dim=1)
    truth = GroundTruth(
        boxes, torch.tensor([0, 0, 1, 3, 3, 3, 0]), torch.tensor([0, 1, 0, 0, 1, 0, 0]).bool()
    )
    near = boxes[torch.randint(0, 7, (4, 60), generator=rng)]
    near = near + 8 * torch.randn(4, 60, 4, generator=rng)
    for high, low in ((0.5, 0.1), (0.8, 0.4)):
        labels, position = assign(near, truth, (high, low))
        expected, matched = naive_labels(near, truth, high, low)
        assert torch.equal(labels, expected)
        assert set(labels.unique().tolist()) == {-1, 0, 1}
        assert torch.equal(position[labels == 1], matched[labels == 1])


def test_labels_without_objects_are_negative():
    truth = GroundTruth(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool())
    labels, _ = assign(torch.rand(3, 5, 4), truth, (0.5, 0.1))
    assert labels.shape == (3, 5) and not labels.any()


def test_box_code_and_its_loss_are_the_written_out_ones(rng):
    anchors = geometry.anchors((1, 2), torch.device("cpu"))
    corner = 50 * torch.randn(2, 2, 2, generator=rng)
    first, second = torch.cat([corner, corner + 30 + 200 * torch.rand(2, 2, 2, generator=rng)], -1)

    def code(box, anchor):
        centre, side = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        middle = (anchor[:2] + anchor[2:]) / 2
        return torch.cat([10 * (centre - middle) / 240, 5 * (side / 240).log()])

    losses = localization_losses(first, anchors, second)
    for n in range(2):
        predicted, wanted = code(first[n], anchors[n]), code(second[n], anchors[n])
        assert_close(BOX_CODER.get_deltas(anchors, first)[n], predicted, atol=1e-5, rtol=1e-5)
        assert_close(losses[n], F.smooth_l1_loss(predicted, wanted, reduction="sum"))
    assert localization_losses(first[:0], anchors[:0], second[:0]).shape == (0,)


def scales(**values):
    defaults = {"class_size": 240, "image_size": 0, "by_exemplars": False}
    more = {"max_image_size": 2000, "pyramid": (1.0,), "divisibility": 0}
    return Scales(**{**defaults, **more, **values})


def test_class_images_keep_their_shape_and_get_an_area():
    assert scales().class_image((240, 240)) == (240, 240)
    root = math.sqrt(150 / 335)
    assert scales().class_image((150, 335)) == (int(240 * root), int(240 / root))
    # However long: at least a pixel, or a cell.
    assert scales().class_image((1, 1000)) == (7, 7589)
    assert scales(divisibility=16).class_image((1, 1000)) == (16, 7584)


def test_levels_scale_the_longer_side():
    levels = scales(image_size=1280, pyramid=(0.5, 1.0, 1.6)).levels((300, 400), (600, 800), [])
    assert levels == [(480, 640), (960, 1280), (1536, 2048)]
    # Numbers that are whole but for rounding stay whole: 1.4 * 1280 of an image of 3264.
    pyramid = (0.5, 0.625, 0.8, 1.0, 1.2, 1.4, 1.6)
    widths = [640, 800, 1024, 1280, 1536, 1792, 2048]
    grozi = scales(image_size=1280, pyramid=pyramid).levels((2448, 3264), (1, 1), [])
    assert grozi == [(w * 3 // 4, w) for w in widths]
    assert scales().levels((30, 41), (600, 800), []) == [(30, 41)]
    assert scales(divisibility=16, image_size=10).levels((3, 4), (3, 4), []) == [(16, 16)]


def test_levels_by_exemplars_bring_their_median_to_the_class_size():
    chosen = scales(by_exemplars=True)
    assert chosen.levels((300, 400), (600, 800), [60.0, 120.0, 4000.0]) == [(1200, 1600)]
    assert chosen.levels((300, 400), (600, 800), [1.0]) == [(1500, 2000)]


@pytest.mark.parametrize("values", [{"pyramid": ()}, {"pyramid": (0.0,)}, {"class_size": 0}])
def test_scales_that_give_no_image_are_refused(values):
    with pytest.raises(ValueError, match="MODEL.OS2D"):
        scales(**values)
