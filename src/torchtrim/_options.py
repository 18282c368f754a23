"""The options of the command line, and what its help says of them."""

from pathlib import Path
from typing import Annotated

import typer

TRIM, TRAIN, RUN, DATA = "What goes, and when to stop", "Training", "The run", "Model and data"
BUDGET = "A budget"

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="lenet, torchvision:NAME, timm:NAME, or FILE.py:FUNCTION.")
]
DataName = Annotated[
    str, typer.Option("--data", metavar="DATA", help="mnist, idx:DIR or imagefolder:DIR.", rich_help_panel=DATA)
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A state_dict (.pt, .safetensors), a model that torchtrim wrote, or DEFAULT for the library's own.",
        rich_help_panel=DATA,
    ),
]
Calibration = Annotated[
    int | None,
    typer.Option(
        "--calibration",
        "--examples",
        metavar="N",
        help="Examples held out of training, to measure and decide on. Without: every tenth, at most 5,000.",
        rich_help_panel=DATA,
    ),
]
Resize = Annotated[int, typer.Option(help="Image folders: the shorter side, in pixels.", rich_help_panel=DATA)]
Crop = Annotated[int, typer.Option(help="Image folders: the square that is seen, in pixels.", rich_help_panel=DATA)]
ThroughNorms = Annotated[
    bool,
    typer.Option(
        "--through-norms",
        help="Trim the widths too that LayerNorm and RMSNorm average over, of embeddings and residual streams. What "
        "the norms compute then changes.",
        rich_help_panel=TRIM,
    ),
]
RuleText = Annotated[
    str | None,
    typer.Option(
        "--rule",
        help="Which neurons go: mean+1std, threshold:0.9, fraction:0.3. Without: mean+1std.",
        rich_help_panel=TRIM,
    ),
]
ZeroTolerance = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="After GELU, SiLU or tanh, count as zero what is smaller than this share of the activations' root mean "
        "square, such as 0.01.",
        rich_help_panel=TRIM,
    ),
]
_SCORES = "apoz, mean_activation, l1_norm, l2_norm, contribution, random:SEED, or reconstruction"
Score = Annotated[str, typer.Option(help=f"Their score: {_SCORES}.", rich_help_panel=TRIM)]
Criterion = Annotated[
    str,
    typer.Option(
        help=f"Their score: {_SCORES}, which with --repair least-squares keeps the most accuracy; give it a budget, or "
        "a --rule such as fraction:0.2 or threshold:-0.01 (an error of 1 %).",
        rich_help_panel=TRIM,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Examples a step. Without: 128, image folders 32.", rich_help_panel=TRAIN)
]
Workers = Annotated[int, typer.Option(help="Processes that read images.", rich_help_panel=TRAIN)]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.", rich_help_panel=RUN)]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=1024,
        help="CPU threads. Without: one for each core, the demo one. On a busy machine few are faster.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[int, typer.Option(help="Decides all that is drawn at random.", rich_help_panel=RUN)]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on after the last whole round of an interrupted run.", rich_help_panel=RUN),
]

# Of a run

Layers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help='Layers to trim: names or patterns such as "features.*", repeated or with commas. Without: all.',
        rich_help_panel=TRIM,
    ),
]
ProgressiveStart = Annotated[
    int | None,
    typer.Option(metavar="N", help="Trim the N most silent layers first, then their neighbours.", rich_help_panel=TRIM),
]
ProgressiveStep = Annotated[
    int | None,
    typer.Option(metavar="N", help="With --progressive: the N on either side join. Without: 1.", rich_help_panel=TRIM),
]
Repair = Annotated[
    str | None,
    typer.Option(
        metavar="WAYS",
        help="Repair what is left from the calibration data, before any retraining: mean, least-squares, batchnorm; "
        "several with commas.",
        rich_help_panel=TRIM,
    ),
]
RepairPositions = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Look at N positions of each example, drawn at random, for least-squares and the criterion "
        "reconstruction; for large images. Without: at all.",
        rich_help_panel=TRIM,
    ),
]
Parameters = Annotated[
    float | None,
    typer.Option(
        metavar="AMOUNT",
        help="Instead of --rule: choose over all layers at once, to leave this share or number of parameters.",
        rich_help_panel=BUDGET,
    ),
]
Flops = Annotated[
    float | None,
    typer.Option(metavar="AMOUNT", help="The same, of FLOPs of one input: 0.5, or 2e9.", rich_help_panel=BUDGET),
]
Bytes = Annotated[
    float | None, typer.Option("--bytes", metavar="AMOUNT", help="The same, of bytes.", rich_help_panel=BUDGET)
]
Latency = Annotated[
    str | None,
    typer.Option(
        metavar="AMOUNT",
        help='The same, of the latency of a batch of 32, which is measured here: 0.5, or "12 ms".',
        rich_help_panel=BUDGET,
    ),
]
Floor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="AMOUNT",
        help="How many of a layer's neurons must stay, a share or a number; of some layers features.*=0.2, repeated "
        "or with commas, of which the first that fits counts. Without, and for the others: 0.05.",
        rich_help_panel=BUDGET,
    ),
]
Cap = Annotated[
    list[str] | None,
    typer.Option(
        metavar="AMOUNT",
        help="How many of a layer's neurons may stay at most, in the same way. Without: all.",
        rich_help_panel=BUDGET,
    ),
]
MultipleOf = Annotated[
    int | None, typer.Option(metavar="N", help="Leave multiples of so many neurons.", rich_help_panel=BUDGET)
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="Spare the layers that `torchtrim sensitivity` found to be sensitive.",
        rich_help_panel=BUDGET,
    ),
]
Rounds = Annotated[int | None, typer.Option(help="Stop after so many. Without any limit: 4.", rich_help_panel=TRIM)]
Compression = Annotated[
    float | None, typer.Option(help="Stop when the parameters are so many times fewer.", rich_help_panel=TRIM)
]
SmallestAccuracy = Annotated[
    float | None, typer.Option(help="Stop below this accuracy on the calibration data, in %.", rich_help_panel=TRIM)
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        metavar="PERCENT",
        help="Stop when accuracy on the calibration data falls so far below the ancestor's.",
        rich_help_panel=TRIM,
    ),
]
GuardDrop = Annotated[
    float | None,
    typer.Option(
        "--guard",
        metavar="PERCENT",
        help="Roll back a round whose accuracy falls so far below the ancestor's, and try half of it.",
        rich_help_panel=TRIM,
    ),
]
Retries = Annotated[
    int | None,
    typer.Option(metavar="N", help="With --guard: how often to try a round again. Without: 3.", rich_help_panel=TRIM),
]
TrainEpochs = Annotated[
    float, typer.Option(help="Train the model for so long before it is trimmed.", rich_help_panel=TRAIN)
]
RetrainEpochs = Annotated[
    float, typer.Option(help="Retrain for so long in every round; may be a fraction.", rich_help_panel=TRAIN)
]
Distill = Annotated[
    float | None,
    typer.Option(
        metavar="WEIGHT",
        help="Retrain towards the ancestor's outputs too: their share of the loss, such as 0.5.",
        rich_help_panel=TRAIN,
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="With --distill: what softens these outputs. Without: 4.", rich_help_panel=TRAIN)
]
Patience = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="End retraining after N epochs no better than any before, the start included; go back to the best.",
        rich_help_panel=TRAIN,
    ),
]
KeepBest = Annotated[
    bool,
    typer.Option("--keep-best", help="Retrain to the end, then go back to the best epoch.", rich_help_panel=TRAIN),
]
OptimizerName = Annotated[
    str | None, typer.Option(help="adamw or sgd. Without: adamw, image folders sgd.", rich_help_panel=TRAIN)
]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Highest learning rate. Without: 0.005, image folders 0.001.", rich_help_panel=TRAIN),
]
ScheduleName = Annotated[
    str | None,
    typer.Option(help="onecycle or cosine. Without: onecycle, image folders cosine.", rich_help_panel=TRAIN),
]
WeightDecay = Annotated[float | None, typer.Option(help="Without: 0.05, image folders 0.0005.", rich_help_panel=TRAIN)]
LabelSmoothing = Annotated[float | None, typer.Option(help="Without: 0.05, image folders 0.", rich_help_panel=TRAIN)]
Shift = Annotated[
    int | None,
    typer.Option(help="Move images by up to so many pixels. Without: 2, image folders 0.", rich_help_panel=TRAIN),
]
MixedPrecision = Annotated[
    str | None,
    typer.Option(
        help="auto, no, bf16 or fp16. Without: auto, bfloat16 where the hardware computes in it.", rich_help_panel=TRAIN
    ),
]
RunPlace = Annotated[
    Path | None, typer.Option(help="The run directory. Without: runs/MODEL-DATA.", rich_help_panel=RUN)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the directory.", rich_help_panel=RUN)]
