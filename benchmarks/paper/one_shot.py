"""One large cut against many small ones: the sizes of the iterative run, reached in one step."""

import torchtrim
from benchmarks.paper.common import TRIMMED, Experiment, at_compression, spread, table
from torchtrim import LayerPlan, Plan

SIZES = (3.8, 10, 25)


def main() -> None:
    experiment = Experiment("benchmarks.paper.one_shot", __doc__)
    found: dict[tuple[float, str], list[float]] = {}

    def note(size: float, what: str, value: float) -> None:
        found.setdefault((size, what), []).append(value)

    with experiment.progress:
        for seed in experiment.seeds:
            ancestor, rounds = experiment.iterative(seed)
            measured = experiment.profile(ancestor)
            for size in SIZES:
                target = at_compression(rounds, size)
                plan = to_widths(measured, {layer: target.widths[layer] for layer in TRIMMED})
                for epochs, name in ((1, "one epoch"), (target.number, "equal epochs")):
                    small = torchtrim.trim(ancestor, plan, experiment.data.example)
                    if name == "one epoch":
                        note(size, "compression", target.compression)
                        note(size, "rounds", target.number)
                        note(size, "iterative", target.test.retrained)
                        note(size, "untrained", experiment.test(small))
                    experiment.train(small, epochs, seed, f"seed {seed}: one shot, {size}×, {name}")
                    note(size, name, experiment.test(small))
    rows = [
        [
            spread(found[size, "compression"]),
            spread(found[size, "rounds"], 1),
            spread(found[size, "iterative"]),
            spread(found[size, "untrained"]),
            spread(found[size, "one epoch"]),
            spread(found[size, "equal epochs"]),
        ]
        for size in SIZES
    ]
    head = [
        "compression",
        "rounds",
        "iterative, %",
        "one shot, untrained, %",
        "after 1 epoch, %",
        "after as many epochs as rounds, %",
    ]
    experiment.write(
        "One-shot against iterative trimming",
        f"""
The widths that the iterative run reached (one epoch of retraining a round), cut out of its ancestor in one step: the
neurons of the highest APoZ of CONV2 and FC1 go. Retrained for one epoch, and for as many epochs as the iterative run
had rounds, so that both have seen the same number of images. The paper finds that one large cut does damage that
retraining does not repair. Test accuracy.

{table(head, rows)}""",
    )


def to_widths(measured: torchtrim.Profile, widths: dict[str, int]) -> Plan:
    """The plan that leaves this many neurons of each layer, those of lowest APoZ."""
    layers: dict[str, LayerPlan] = {}
    for name, left in widths.items():
        order = (-measured[name].apoz).argsort(kind="stable")
        layers[name] = LayerPlan(measured[name].width, tuple(sorted(order[: measured[name].width - left].tolist())))
    return Plan(layers, "apoz, to fixed widths")


if __name__ == "__main__":
    main()
