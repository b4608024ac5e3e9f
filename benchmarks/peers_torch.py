"""The PyTorch side of peers.py: one method on given weights and data, timed when told to.

    python peers_torch.py METHOD FILE.npz

Reads a line per round from standard input and answers with the seconds of one run (see `steady`);
on "end" it writes its moments beside FILE and answers with its peak memory in MiB.
Index letters: n example.
"""

import copy
import sys

import numpy as np
import torch
from layouts import to_torch
from resources import peak_mib, steady
from torch import nn


def network(name, weights):
    if name == "mnist":
        width = weights[0].shape[-1]
        model = nn.Sequential(
            nn.Conv2d(1, width, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, 10 * width),
            nn.ReLU(),
            nn.Linear(10 * width, 10),
        )
    else:
        sizes = [w.shape for w in weights if w.ndim == 2]
        layers = [layer for s in sizes for layer in (nn.Linear(*s), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights):
            parameter.copy_(torch.tensor(to_torch(value, weights)))
    return model


def method(name, model, x, y):
    """A function that returns `(mean, m2)`, lists of tensors."""
    n = len(x)
    total = nn.CrossEntropyLoss(reduction="sum")
    mean_loss = nn.CrossEntropyLoss()

    def centred(mean, square_sums):
        return mean, [s - n * m * m for s, m in zip(square_sums, mean)]

    if name == "plain":

        def run():
            return torch.autograd.grad(mean_loss(model(x), y), list(model.parameters())), []

    elif name.startswith("BackPACK"):
        from backpack import backpack, extend
        from backpack.extensions import SumGradSquared, Variance

        extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
        extension = Variance if "Variance" in name else SumGradSquared

        def run():
            extended.zero_grad()
            with backpack(extension()):
                loss(extended(x), y).backward()
            mean = [p.grad for p in extended.parameters()]
            if "Variance" in name:  # of gradients divided by the batch, as the mean loss's are
                return mean, [p.variance * n**2 * n for p in extended.parameters()]
            return centred(mean, [p.sum_grad_squared * n**2 for p in extended.parameters()])

    elif name == "torch.func":
        from torch.func import functional_call, grad, vmap

        parameters = {k: v.detach() for k, v in model.named_parameters()}

        def one(parameters, x, y):
            return total(functional_call(model, parameters, (x[None],)), y[None])

        per_example = vmap(grad(one), in_dims=(None, 0, 0))

        def run():
            g = per_example(parameters, x, y).values()
            mean = [v.mean(0) for v in g]
            return mean, [((v - m) ** 2).sum(0) for v, m in zip(g, mean)]

    elif name == "Opacus":
        from opacus import GradSampleModule

        wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")

        def run():
            wrapped.zero_grad()
            total(wrapped(x), y).backward()
            g = [p.grad_sample for p in wrapped.parameters()]
            mean = [v.mean(0) for v in g]
            return mean, [((v - m) ** 2).sum(0) for v, m in zip(g, mean)]

    else:
        raise ValueError(f"unknown method {name!r}")
    return run


def main():
    name, path = sys.argv[1:]
    data = dict(np.load(path))
    torch.set_num_threads(int(data["threads"]))
    weights = [data[k] for k in sorted(data) if k.startswith("weight")]
    x = data["x"].transpose(0, 3, 1, 2) if data["x"].ndim == 4 else data["x"]
    # An image of one channel can be taken for channels last, which Opacus 1.6 unfolds wrongly (its
    # second convolution is then off by 0.3): the layout is made the usual one.
    x = torch.tensor(x).clone(memory_format=torch.contiguous_format)
    y = torch.tensor(data["y"])
    run = method(name, network(str(data["network"]), weights), x, y)
    for _ in range(3):
        found = run()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print(steady(run), flush=True)
    found = run()
    mean, m2 = found
    arrays = {f"mean{j:02d}": v.detach().numpy() for j, v in enumerate(mean)}
    arrays.update({f"m2{j:02d}": v.detach().numpy() for j, v in enumerate(m2)})
    np.savez(f"{path}.{name}.npz", **arrays)
    print(peak_mib(), flush=True)


if __name__ == "__main__":
    main()
