"""The models of torchvision: all architectures, one or two sizes of each."""

import inspect
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.zoo.models import Specimen

_CLASSIFICATION = """
    alexnet vgg11 vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_0 squeezenet1_1 densenet121
    googlenet inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5
    shufflenet_v2_x1_0 efficientnet_b0 efficientnet_b1 efficientnet_v2_s regnet_x_400mf regnet_x_1_6gf regnet_y_400mf
    regnet_y_1_6gf convnext_tiny convnext_small swin_t swin_v2_t vit_b_16 vit_b_32 maxvit_t quantized_resnet18
    quantized_mobilenet_v2 quantized_shufflenet_v2_x0_5 quantized_googlenet
"""
_SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
_DETECTION = """
    fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn
    retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large fcos_resnet50_fpn maskrcnn_resnet50_fpn
    maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn
"""
_VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d mvit_v1_b mvit_v2_s swin3d_t"
_FLOW = "raft_small raft_large"
FAMILIES = {
    name: f"torchvision, {family}"
    for family, names in {
        "classification": _CLASSIFICATION,
        "segmentation": _SEGMENTATION,
        "detection": _DETECTION,
        "video": _VIDEO,
        "optical flow": _FLOW,
    }.items()
    for name in names.split()
}
_FIXED = {"vit_b_16": 224, "vit_b_32": 224, "maxvit_t": 224}
_SIDES = {"inception_v3": (299, 331), "vgg11": (64, 96), "vgg11_bn": (64, 96)}
# Untrained detectors are sure of nothing: without thresholds they find something to compare.
_DETECTOR = {
    "min_size": 96,
    "max_size": 128,
    "box_score_thresh": 0.0,
    "score_thresh": 0.0,
    "box_detections_per_img": 4,
    "detections_per_img": 10,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_test": 20,
    "topk_candidates": 40,
}


def build(name: str) -> Specimen:
    """A model of torchvision without pretrained weights."""
    family = FAMILIES[name].partition(", ")[2]
    options: dict[str, Any] = {"weights": None}
    builder = torchvision.models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options |= {option: None for option in ("weights_backbone",) if option in known}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if family == "detection":
        options |= {**_DETECTOR, "num_classes": 8}
        if name.startswith("ssd"):
            options = {key: value for key, value in options.items() if key not in ("min_size", "max_size")}
        options = _accepted(name, options)
    elif name in ("mvit_v1_b", "mvit_v2_s"):
        options["num_classes"] = 10
    model = builder(**options)
    return _INPUTS[family](name, model)


def _accepted(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Detectors hand on what they do not know to their base class, each to another."""
    bases = {
        "fasterrcnn": torchvision.models.detection.FasterRCNN,
        "maskrcnn": torchvision.models.detection.FasterRCNN,
        "keypointrcnn": torchvision.models.detection.FasterRCNN,
        "retinanet": torchvision.models.detection.RetinaNet,
        "fcos": torchvision.models.detection.FCOS,
        "ssd300": torchvision.models.detection.ssd.SSD,
        "ssdlite320": torchvision.models.detection.ssd.SSD,
    }
    known = inspect.signature(bases[name.partition("_")[0]]).parameters.keys() | {"weights", "weights_backbone"}
    return {option: value for option, value in options.items() if option in known}


def _images(name: str, model: nn.Module) -> Specimen:
    side, other = _SIDES.get(name, (96, 128))
    side = _FIXED.get(name, side)
    sizes = () if name in _FIXED else (_noise(2, 3, other, other),)
    return Specimen(model, _noise(2, 3, side, side), (_noise(3, 3, side, side),), sizes)


def _detections(name: str, model: nn.Module) -> Specimen:
    """A list of images, which may differ in their sizes."""
    if name.startswith("ssdlite"):  # as it is made, images leave no trace beyond rounding, by which its boxes rank
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    first, second = _noise(3, 96, 96), _noise(3, 96, 128)
    return Specimen(model, ([first, second],), (([first],),), (([_noise(3, 128, 128)],),))


def _videos(name: str, model: nn.Module) -> Specimen:
    if name.startswith("mvit"):  # it has positions for these sizes alone
        return Specimen(model, _noise(1, 3, 16, 224, 224), (_noise(2, 3, 16, 224, 224),))
    frames = 16 if name == "s3d" else 8
    side = 224 if name == "s3d" else 64
    others = (_noise(3, 3, frames, side, side),)
    return Specimen(model, _noise(2, 3, frames, side, side), others, (_noise(2, 3, frames, side + 32, side + 32),))


def _pairs(name: str, model: nn.Module) -> Specimen:
    """Two images; fewer refinements than the twelve of the default."""

    def pair(batch: int, side: int) -> dict[str, Any]:
        images = {"image1": _noise(batch, 3, side, side), "image2": _noise(batch, 3, side, side)}
        return {**images, "num_flow_updates": 2}

    return Specimen(model, pair(1, 128), (pair(2, 128),), (pair(1, 160),))


_INPUTS = {
    "classification": _images,
    "segmentation": _images,
    "detection": _detections,
    "video": _videos,
    "optical flow": _pairs,
}


def _noise(*shape: int) -> Tensor:
    return torch.rand(shape)
