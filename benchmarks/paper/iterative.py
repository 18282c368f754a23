"""LeNet on MNIST as in the paper and beyond: CONV2 and FC1 trimmed by mean + 1 std, round after round."""

import statistics

from matplotlib.ticker import MaxNLocator, ScalarFormatter

from benchmarks.paper.common import BLUE, GREY, ORANGE, Experiment, at_compression, picture, spread, table
from torchtrim import Round

PAPER = ((1.41, 98.75, 99.29), (2.24, 95.34, 99.30), (3.11, 88.21, 99.25), (3.85, 96.75, 99.26))
PAPER_ANCESTOR = 99.31
LEVELS = (1.4, 2.2, 3.1, 3.8, 5, 10, 15, 20, 25)


def main() -> None:
    experiment = Experiment("benchmarks.paper.iterative", __doc__)
    with experiment.progress:
        runs = [experiment.iterative(seed)[1] for seed in experiment.seeds]
    first = [rounds[0].test.before for rounds in runs]
    paper = dict(zip(LEVELS, PAPER, strict=False))
    rows = [["1", "1.00", "", spread(first), f"1.00: {PAPER_ANCESTOR}"]]
    for level in LEVELS:
        reached = [at_compression(rounds, level) for rounds in runs]
        theirs = paper.get(level)
        rows.append(
            [
                f"≥ {level:g}",
                spread([done.compression for done in reached]),
                spread([done.test.trimmed for done in reached]),
                spread([done.test.retrained for done in reached]),
                f"{theirs[0]}: {theirs[1]:.2f} → {theirs[2]:.2f}" if theirs else "",
            ]
        )
    by_level = table(["compression", "reached", "before retraining, %", "after, %", "the paper, %"], rows)
    one = [["0", "20-50-500-10", "1.00", "", f"{first[0]:.2f}", "1.00"], *[_row(done) for done in runs[0]]]
    by_round = table(["round", "widths", "compression", "before, %", "after, %", "speed-up"], one)

    def draw(axes) -> None:
        for rounds in runs:
            sizes = [1.0, *[done.compression for done in rounds]]
            axes[0].plot(sizes, [rounds[0].test.before, *[done.test.retrained for done in rounds]], "o-", c=BLUE, ms=3)
            axes[0].plot(sizes[1:], [done.test.trimmed for done in rounds], ".:", c=BLUE, alpha=0.5)
        axes[0].plot([1, *[row[0] for row in PAPER]], [PAPER_ANCESTOR, *[row[2] for row in PAPER]], "s-", c=ORANGE)
        axes[0].axhline(statistics.mean(first), c=GREY, lw=0.8)
        axes[0].set(xscale="log", ylim=(98.5, 99.7), xlabel="compression (parameters)", ylabel="test accuracy, %")
        axes[0].set_xticks([1, 2, 4, 10, 25])
        axes[0].xaxis.set_major_formatter(ScalarFormatter())
        axes[0].annotate("after retraining", (6, 99.55), color=BLUE)
        axes[0].annotate("the paper", (1.6, 99.19), color=ORANGE)
        axes[0].annotate("before retraining (dotted)", (3, 98.75), color=BLUE, alpha=0.7)
        for layer, colour in (("conv2", BLUE), ("fc1", ORANGE)):
            for rounds in runs:
                full = rounds[0].profile.widths[layer]
                shares = [100, *[100 * done.widths[layer] / full for done in rounds]]
                axes[1].plot(range(len(shares)), shares, "o-", c=colour, ms=3)
        axes[1].set(xlabel="round", ylabel="neurons left, %", ylim=(0, 105))
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].annotate("CONV2 (of 50)", (7.5, 52), color=BLUE)
        axes[1].annotate("FC1 (of 500)", (0.3, 30), color=ORANGE)

    experiment.write(
        "Iterative trimming of LeNet",
        f"""
LeNet (20-50-500-10, 431,080 parameters) is trained for four epochs on 55,000 images of MNIST. Each round measures the
APoZ on 5,000 other training images, removes the neurons of CONV2 and FC1 above mean + 1 standard deviation, and
retrains for one epoch. Each row takes, of every seed, the first round at that compression or beyond; accuracy is on
the 10,000 test images. The paper's figures stand at their own compression.

{by_level}
All rounds of seed 0 (speed-up: latency of a batch of 32, the ancestor's over the round's, timed in turns):

{by_round}""",
        picture(2, draw),
    )


def _row(done: Round) -> list[str]:
    widths = "-".join(str(width) for width in done.widths.values())
    return [
        str(done.number),
        widths,
        f"{done.compression:.2f}",
        f"{done.test.trimmed:.2f}",
        f"{done.test.retrained:.2f}",
        f"{done.speedup:.2f}",
    ]


if __name__ == "__main__":
    main()
