"""Surviving weights against training from scratch: the same trimmed architecture, at equal epochs."""

from benchmarks.paper.common import ANCESTOR_EPOCHS, TRIMMED, Experiment, at_compression, spread, table

SIZES = (3.8, 10, 25)


def main() -> None:
    experiment = Experiment("benchmarks.paper.from_scratch", __doc__)
    found: dict[tuple[float, str], list[tuple[float, float]]] = {}
    labels = {
        "surviving": "surviving weights, trimmed and retrained round by round",
        "last": "from scratch, epochs of the last round (1)",
        "retraining": "from scratch, epochs of all retraining",
        "total": "from scratch, epochs of ancestor and retraining",
    }
    compression: dict[float, list[float]] = {}
    with experiment.progress:
        for seed in experiment.seeds:
            _, rounds = experiment.iterative(seed)
            for size in SIZES:
                target = at_compression(rounds, size)
                compression.setdefault(size, []).append(target.compression)
                found.setdefault((size, "surviving"), []).append(
                    (target.test.retrained, silence(experiment, target.model))
                )
                widths = tuple(target.widths[layer] for layer in ("conv1", "conv2", "fc1"))
                for name, epochs in (
                    ("last", 1),
                    ("retraining", target.number),
                    ("total", ANCESTOR_EPOCHS + target.number),
                ):
                    model = experiment.fresh(100 + seed, widths)
                    experiment.train(model, epochs, 100 + seed, f"seed {seed}: from scratch, {size}×, {epochs} epochs")
                    found.setdefault((size, name), []).append((experiment.test(model), silence(experiment, model)))
    rows = [
        [
            f"{spread(compression[size])}×, {label}",
            spread([accuracy for accuracy, _ in found[size, name]]),
            spread([zeros for _, zeros in found[size, name]]),
        ]
        for size in SIZES
        for name, label in labels.items()
    ]
    experiment.write(
        "Surviving weights against training from scratch",
        f"""
The architectures that the iterative run reached, trained from a new random start with the same training (AdamW,
one-cycle) for one epoch, for as many epochs as all retraining took, and for as many as the ancestor and all retraining
took together. Mean APoZ is over the neurons of CONV2 and FC1, on the calibration images. The paper finds that the
same architecture from scratch ends with more zero activations and lower accuracy.

{table(["network", "test accuracy, %", "mean APoZ, %"], rows)}""",
    )


def silence(experiment: Experiment, model) -> float:
    """The mean APoZ of the trimmed layers' neurons, in per cent."""
    measured = experiment.profile(model)
    apoz = [value for layer in TRIMMED for value in measured[layer].apoz]
    return 100 * sum(apoz) / len(apoz)


if __name__ == "__main__":
    main()
