"""How accurate a LeNet is that is cut to a tenth, a 25th and a 50th at once, repaired, and retrained for a while."""

from functools import partial

from benchmarks.accuracy.common import Fashion
from benchmarks.accuracy.grid import RATE, Cuts, Widths, compression
from benchmarks.paper.common import spread, table
from torchtrim._data import load_data

WIDTHS: tuple[Widths, ...] = (15, 139), (10, 70), (7, 37)  # of CONV2 and FC1
EPOCHS = (0, 5)


def main() -> None:
    experiment = Fashion("benchmarks.accuracy.lenet", __doc__ or "", seeds=3)
    data = load_data("mnist")
    whole: list[float] = []
    rows: dict[Widths, list[list[float]]] = {widths: [[] for _ in EPOCHS] for widths in WIDTHS}
    for seed in experiment.seeds:
        cuts = Cuts(experiment, "MNIST", data, seed)
        whole += experiment.once(f"mnist, seed {seed}, whole", cuts.whole)
        for widths in WIDTHS:
            for place, epochs in enumerate(EPOCHS):
                key = f"mnist, seed {seed}, reconstruction, least squares, {widths}, {epochs} epochs"
                accuracy, *seconds = experiment.once(
                    key, partial(cuts.test, "reconstruction", "least squares", widths, epochs)
                )
                print(f"{key}: {accuracy:.2f} %, {sum(seconds):.1f} s", flush=True)
                rows[widths][place].append(accuracy)
    head = ["parameters", "widths of CONV2, FC1", *(f"{epochs} epochs" for epochs in EPOCHS)]
    cells = [[f"{compression(one):.1f}×", f"{one[0]}, {one[1]}", *map(spread, row)] for one, row in rows.items()]
    experiment.write(
        "LeNet, repaired and then retrained",
        f"""
LeNet on MNIST, cut once to fixed widths that `reconstruction` chose, repaired by least squares from the 5,000
calibration images, and retrained at a rate of {RATE:g}, or not. The whole network is at {spread(whole)}. Test accuracy,
%.

{table(head, cells)}""",
    )


if __name__ == "__main__":
    main()
