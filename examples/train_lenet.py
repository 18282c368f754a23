"""Train LeNet on MNIST from scratch and print how many test images it recognises.

Four epochs take less than a minute on a laptop's CPU; a GPU is used where there is one.
"""

import torch

from torchtrim._data import load_data
from torchtrim._lenet import LeNet
from torchtrim._training import Training, evaluate, train, training_progress


def main() -> None:
    training = Training(epochs=4)
    data = load_data("mnist")
    torch.manual_seed(training.seed)
    model = LeNet().to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with training_progress() as progress:
        train(model, data.train, training, progress=progress, label="training LeNet")
        accuracy = evaluate(model, data.test, progress=progress)
    print(f"LeNet, {parameters:,} parameters, {training.epochs} epochs: test accuracy {accuracy:.2f} %")


if __name__ == "__main__":
    main()
