"""The detectors of Ultralytics, built from the model files of its package: the smallest size of each.

Its licence, AGPL-3.0, is not ours: it is in no extra of this project, and is used where somebody has installed it.
"""

import os
import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo.models import Specimen

_DETECTION = """
    yolov3-tiny yolov5n yolov6n yolov8n yolov8n-ghost yolov8n-p2 yolov9t yolov10n yolo11n yolo12n yolo26n rtdetr-l
"""
_OTHERS = """
    yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolo11n-seg yolo11n-pose yolo11n-obb yolo11n-cls yolo12n-cls
    yolo26n-seg yolo26n-pose yolo26n-obb yolo26n-cls yolo26n-sem yolo26n-depth
"""
_EXPORTED = "yolov5n yolov8n yolov8n-seg yolov10n yolo11n yolo11n-pose yolo12n yolo26n"
_EXPORT = ":export"  # without the feature maps, which these models return beside their boxes
FAMILIES = {
    **dict.fromkeys(_DETECTION.split(), "ultralytics, detection"),
    **dict.fromkeys(_OTHERS.split(), "ultralytics, other tasks"),
    **{name + _EXPORT: "ultralytics, as exported" for name in _EXPORTED.split()},
}
_KINDS = {
    "seg": "SegmentationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
    "cls": "ClassificationModel",
    "sem": "SemanticSegmentationModel",
    "depth": "DepthModel",
}


def build(name: str) -> Specimen:
    """A model with random weights. With `:export`, it returns what its exported form returns: the boxes alone."""
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # it writes its settings when it is imported
    from ultralytics.nn import tasks

    file, colon, _ = name.partition(":")
    kind = (
        "RTDETRDetectionModel" if file.startswith("rtdetr") else _KINDS.get(file.rpartition("-")[2], "DetectionModel")
    )
    model: Any = getattr(tasks, kind)(f"{file}.yaml", verbose=False)
    if colon:
        model.model[-1].export = True
    return Specimen(model.eval(), _noise(2, 96), (_noise(3, 96),), (_noise(2, 128),))


def _noise(batch: int, side: int) -> Tensor:
    return torch.rand(batch, 3, side, side)
