"""The widths of the paper's VGG-16 table, trimmed out of torchvision's `vgg16`: parameters, FLOPs, latency."""

import torch
import torchvision

import torchtrim
from benchmarks.paper.common import BLUE, ORANGE, Experiment, picture, table
from torchtrim import LayerPlan, Plan
from torchtrim._cost import measure_beside

CONV5_3, FC6 = "features.28", "classifier.0"
PAPER = (
    (488, 3477, 1.19),
    (451, 2937, 1.45),
    (430, 2479, 1.71),
    (420, 2121, 1.96),
    (400, 1787, 2.28),
    (390, 1513, 2.59),
)


def main() -> None:
    experiment = Experiment("benchmarks.paper.vgg16", __doc__, seeds=1)
    torch.manual_seed(0)
    model = torchvision.models.vgg16().eval()
    example = torch.randn(1, 3, 224, 224)
    before = sum(parameter.numel() for parameter in model.parameters())
    sizes: list[float] = [1]
    speedups: list[float] = [1]
    rows = [["512-4096", f"{before:,}", "1.00", "1.00", f"{torchtrim.measure(model, example).flops / 1e9:.2f}", "1.00"]]
    for conv, dense, compression in PAPER:
        plan = Plan({CONV5_3: LayerPlan(512, tuple(range(conv, 512))), FC6: LayerPlan(4096, tuple(range(dense, 4096)))})
        small = torchtrim.trim(model, plan, example)
        cost, first = measure_beside([small, model], example, seconds=8)
        sizes.append(before / cost.parameters)
        speedups.append(first.latency / cost.latency)
        rows.append(
            [
                f"{conv}-{dense}",
                f"{cost.parameters:,}",
                f"{before / cost.parameters:.2f}",
                f"{compression:.2f}",
                f"{cost.flops / 1e9:.2f}",
                f"{first.latency / cost.latency:.2f}",
            ]
        )

    def draw(axes) -> None:
        widths = ["512-4096", *(f"{conv}-{dense}" for conv, dense, _ in PAPER)]
        axes[0].plot(widths, sizes, "o-", c=BLUE, label="times fewer parameters")
        axes[0].plot(widths, speedups, "s-", c=ORANGE, label="times faster, one image")
        axes[0].tick_params("x", rotation=30)
        axes[0].set(xlabel="CONV5-3 - FC6", ylim=(0, None))
        axes[0].legend(frameon=False)

    head = ["CONV5-3 - FC6", "parameters", "compression", "the paper's", "GFLOPs of an image", "speed-up"]
    experiment.write(
        "VGG-16 at the paper's widths",
        f"""
`torchvision.models.vgg16` with its CONV5-3 (`{CONV5_3}`) and FC6 (`{FC6}`) trimmed to the widths of the
paper's table. Parameters, FLOPs (a multiplication with its addition counts as two) and latency follow from the widths
alone, so the weights are random. Speed-up is the latency of one image of 224 × 224, the original's over the trimmed
one's, timed in turns. Parameters sit in FC6, operations in the convolutions, so that the network becomes much smaller
and hardly faster.

{table(head, rows)}""",
        picture(1, draw),
    )


if __name__ == "__main__":
    main()
