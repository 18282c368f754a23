"""How accurate a LeNet on MNIST is that was cut to a tenth to a fiftieth of its parameters, and then retrained."""

import warnings
from functools import partial

from benchmarks.accuracy.common import Fashion
from benchmarks.accuracy.lenet import RATE, Cuts
from benchmarks.accuracy.repair import compression
from benchmarks.paper.common import ANCESTOR_EPOCHS, spread, table
from torchtrim import TorchtrimWarning
from torchtrim._data import load_data

FAR = (15, 139), (10, 70), (7, 37)  # CONV2 and FC1
EPOCHS = 5


def main() -> None:
    experiment = Fashion("benchmarks.accuracy.far", __doc__ or "", seeds=3)
    warnings.simplefilter("ignore", TorchtrimWarning)
    data = load_data("mnist")
    whole: list[float] = []
    found: dict[tuple[tuple[int, int], float], list[float]] = {}
    for seed in experiment.seeds:
        cuts = Cuts(experiment, "mnist", data, seed)
        whole += experiment.once(f"mnist, seed {seed}, whole", cuts.whole)
        for widths in FAR:
            for epochs in (0, EPOCHS):
                key = f"mnist, seed {seed}, reconstruction, least squares, {widths}, {epochs} epochs"
                work = partial(cuts.test, "reconstruction", widths, "least squares", epochs)
                accuracy, seconds = experiment.once(key, work)
                print(f"{key}: {accuracy:.2f} %, {seconds:.1f} s", flush=True)
                found.setdefault((widths, epochs), []).append(accuracy)
    rows = [
        ["-".join(map(str, widths)), f"{compression(widths):.1f}×", *(spread(found[widths, n]) for n in (0, EPOCHS))]
        for widths in FAR
    ]
    experiment.write(
        "Far cuts of LeNet",
        f"""
LeNet on MNIST, trained for {ANCESTOR_EPOCHS} epochs, where it is at {spread(whole)}; cut once to fixed widths of CONV2
and FC1 by `reconstruction`, repaired by least squares on the 5,000 calibration images, then retrained for {EPOCHS}
epochs with AdamW and a one-cycle schedule that peaks at {RATE:g}. Test accuracy, %.

{table(["CONV2-FC1", "parameters", "repaired", "retrained"], rows)}
""",
    )


if __name__ == "__main__":
    main()
