import torch
from torchvision.ops import box_iou

from atss.geometry import area, centerness, centres, iou, side_distances


def test_by_hand():
    box = torch.tensor([10.0, 20, 30, 60])
    assert centres(box).tolist() == [20, 40]
    assert area(box) == 800
    distances = side_distances(torch.tensor([14.0, 30]), box)
    assert distances.tolist() == [4, 10, 16, 30]
    torch.testing.assert_close(centerness(distances), torch.tensor((4 / 16 * 10 / 30) ** 0.5))
    assert centerness(side_distances(centres(box), box)) == 1


def test_iou_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(50, 4, generator=generator).sort(dim=1).values for _ in range(2))
    torch.testing.assert_close(iou(a[:, None], b[None]), box_iou(a, b))


def test_iou_of_empty_boxes_is_zero():
    point, box = torch.tensor([5.0, 5, 5, 5]), torch.tensor([0.0, 0, 9, 9])
    assert iou(point, point) == 0
    assert iou(point, box) == 0
    assert iou(torch.tensor([8.0, 0, 2, 9]), box) == 0


def test_centerness_is_zero_outside():
    """Also if both pairs of distances have a negative product."""
    box = torch.tensor([10.0, 20, 30, 60])
    points = torch.tensor([[5.0, 40], [20, 70], [5, 70]])
    assert centerness(side_distances(points, box)).tolist() == [0, 0, 0]
