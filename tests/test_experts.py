"""Experts of mixtures: kept unless one asks for them; what goes then is exact, and what cannot be proved stays."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import torchtrim
from random_networks import with_random_values
from torchtrim import LayerPlan, Plan
from torchtrim._copies import named_tensors
from torchtrim._experts import difference
from torchtrim._history import history
from torchtrim.cli import app
from torchtrim.errors import PlanError
from torchtrim.testing import assert_exact, random_plan

EXPERTS, WIDTH, MIDDLE = 5, 6, 8


class Feed(nn.Module):
    """One expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, MIDDLE), nn.Linear(MIDDLE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Listed(nn.Module):
    """A list of modules; each expert computes what goes to it. `how`: the way in which tokens are sent."""

    def __init__(self, how: str = "softmax, topk", picked: int = 2) -> None:
        super().__init__()
        self.how, self.top_k = how, picked
        self.gate = nn.Linear(WIDTH, EXPERTS, bias="sigmoid" not in how)
        self.experts = nn.ModuleList(Feed() for _ in range(EXPERTS))
        self.register_buffer("correction", torch.zeros(EXPERTS))

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of the experts that each token goes to, and which they are."""
        logits = self.gate(x)
        if self.how == "softmax, topk":
            return logits.softmax(-1).topk(self.top_k, -1)
        if self.how == "topk, softmax":
            scores, picked = logits.topk(self.top_k)
            return scores.softmax(-1), picked
        if self.how == "sigmoid with a correction":
            scores = logits.sigmoid()
            picked = (scores + self.correction).topk(self.top_k).indices
            return scores.gather(-1, picked), picked
        if self.how == "sorted":
            scores, picked = logits.softmax(-1).sort(-1, descending=True)
            return scores[:, : self.top_k], picked[:, : self.top_k]
        scores = logits.softmax(-1)
        first, one = scores.max(-1, keepdim=True)
        if self.how == "one":
            return first, one
        second, other = scores.scatter(-1, one, -1.0).max(-1, keepdim=True)
        return torch.cat([first, second], -1), torch.cat([one, other], -1)

    def forward(self, x: Tensor) -> Tensor:
        scores, picked = self.routed(x)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(picked == index)
            out.index_add_(0, token, expert(x[token]) * scores[token, place, None])
        return out


class Numbered(Listed):
    """A dictionary in place of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{index}": expert for index, expert in enumerate(self.experts)})

    def forward(self, x: Tensor) -> Tensor:
        scores, picked = self.routed(x)
        out = torch.zeros_like(x)
        for index in picked.unique().tolist():
            token, place = torch.where(picked == index)
            out.index_add_(0, token, self.experts[f"expert_{index}"](x[token]) * scores[token, place, None])
        return out


class Stacked(nn.Module):
    """Parameters for all experts in one; those that are hit compute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.num_experts_per_tok = EXPERTS, 2
        self.gate, self.gate_bias = nn.Parameter(torch.empty(WIDTH, EXPERTS)), nn.Parameter(torch.empty(EXPERTS))
        self.up, self.up_bias = (
            nn.Parameter(torch.empty(EXPERTS, WIDTH, MIDDLE)),
            nn.Parameter(torch.empty(EXPERTS, MIDDLE)),
        )
        self.down = nn.Parameter(torch.empty(EXPERTS, MIDDLE, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scores, picked = (x @ self.gate + self.gate_bias).softmax(-1).topk(self.num_experts_per_tok)
        hit = F.one_hot(picked, self.num_experts).sum((0, 1)).nonzero()
        out = torch.zeros_like(x)
        for index in hit[:, 0]:
            token, place = torch.where(picked == index)
            hidden = F.relu(x[token] @ self.up[index] + self.up_bias[index])
            out.index_add_(0, token, hidden @ self.down[index] * scores[token, place, None])
        return out


class Dense(nn.Module):
    """All experts compute, which einsum says, and are weighted: by their softmax, or by that of the largest two."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.empty(EXPERTS, WIDTH, MIDDLE))
        self.down = nn.Parameter(torch.empty(EXPERTS, MIDDLE, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        if self.sparse:
            scores, picked = weights.topk(2)
            weights = torch.zeros_like(weights).scatter(-1, picked, scores)
        hidden = torch.einsum("td,edf->etf", x, self.up).relu()
        return torch.einsum("te,etf,efd->td", weights, hidden, self.down)


MIXTURES = {
    "list": Listed,
    "list, logits": lambda: Listed("topk, softmax"),
    "list, sigmoid": lambda: Listed("sigmoid with a correction"),
    "list, sorted": lambda: Listed("sorted"),
    "list, one": lambda: Listed("one", 1),
    "list, one after the other": lambda: Listed("one after the other"),
    "dictionary": Numbered,
    "stacked": Stacked,
    "dense": lambda: Dense(False),
    "dense, sparse weights": lambda: Dense(True),
}


class Network(nn.Module):
    """Two mixtures, the second beside a shared expert."""

    def __init__(self, mixture) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.first, self.second, self.shared = mixture(), mixture(), Feed()
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.first(x)
        x = x + self.second(x) + self.shared(x)
        return self.out(x)


class Normed(Network):
    """With norms, over which only one more way of asking leads."""

    def __init__(self, mixture) -> None:
        super().__init__(mixture)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.first(self.norms[0](x))
        x = x + self.second(self.norms[1](x))
        return self.out(self.norms[2](x))


def network(name: str = "list") -> nn.Module:
    torch.manual_seed(0)
    return with_random_values(Network(MIXTURES[name]))


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def locked_because(model: nn.Module, x: Tensor) -> str:
    """Why the experts stay, of a model whose router is called so."""
    graph = torchtrim.trace(model, x, experts=True)
    assert graph.mixtures == ()
    return graph.locked[next(name for name in graph.layers if name.endswith("gate"))]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_go_only_when_asked_for(name) -> None:
    model = network(name)
    assert {"first.gate", "second.gate"} <= torchtrim.trace(model, tokens()).locked.keys()
    graph = torchtrim.trace(model, tokens(), experts=True)
    assert list(graph.locked) == ["out"]
    assert [one.router for one in graph.mixtures] == ["first.gate", "second.gate"]
    assert {one.picked for one in graph.mixtures} == {1 if name in ("list, one", "list, sorted", "dense") else 2}
    plan = assert_exact(model, tokens(), tokens(50), tokens(3), experts=True, fraction=0.4, seeds=range(3))
    assert plan.experts
    assert len(plan.removed["first.gate"]) == len(plan.removed["second.gate"]) == 2


@pytest.mark.parametrize("name", ["list", "stacked"])
def test_streams_go_through_norms_beside_experts(name) -> None:
    """What the norms give decides where tokens go, so that the proof runs without averages too."""
    torch.manual_seed(0)
    model = with_random_values(Normed(MIXTURES[name]))
    assert "embed" in torchtrim.trace(model, tokens(), experts=True).locked
    plan = assert_exact(model, tokens(), tokens(9), experts=True, through_norms=True, seeds=(0, 1))
    assert {"embed", "first.gate", "second.gate"} <= plan.removed.keys()


def test_what_is_left_is_what_was_kept() -> None:
    model, x = network(), tokens()
    plan = Plan({"first.gate": LayerPlan(EXPERTS, (1, 3))}, experts=True)
    small = torchtrim.trim(model, plan, x)
    assert small.first.gate.out_features == len(small.first.experts) == 3
    assert [name for name, _ in small.first.experts.named_children()] == ["0", "1", "2"]
    for place, old in enumerate((0, 2, 4)):
        assert torch.equal(small.first.experts[place].up.weight, model.first.experts[old].up.weight)
        assert torch.equal(small.first.gate.weight[place], model.first.gate.weight[old])
    assert len(model.first.experts) == len(small.second.experts) == EXPERTS
    stacked = torchtrim.trim(network("stacked"), plan_of("first.gate", (0,)), x)
    assert (stacked.first.num_experts, stacked.first.num_experts_per_tok) == (4, 2)
    assert stacked.first.up_bias.shape == (4, MIDDLE)


def plan_of(name: str, experts: tuple[int, ...]) -> Plan:
    return Plan({name: LayerPlan(EXPERTS, experts)}, experts=True)


def test_removed_experts_are_never_picked_in_the_masked_model() -> None:
    model, x = network("list, sigmoid"), tokens()
    model.first.correction.fill_(0).index_fill_(0, torch.tensor([2]), 9.0)  # everyone's choice
    silent = copy.deepcopy(torchtrim.mask(model, plan_of("first.gate", (2,)), x))
    seen: list[Tensor] = []
    routed = silent.first.routed
    silent.first.routed = lambda x: seen.append(routed(x)[1]) or routed(x)
    assert torch.equal(silent(x), torchtrim.mask(model, plan_of("first.gate", (2,)), x)(x))
    assert 2 not in seen[0]
    assert 2 in model.first.routed(model.embed(x))[1]
    silent(x).sum().backward()
    assert silent.embed.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["list", "dictionary", "stacked"])
def test_a_trimmed_model_survives_a_file_and_is_trimmed_again(name, tmp_path: Path) -> None:
    model, x = network(name), tokens()
    once = torchtrim.trim(model, plan_of("first.gate", (1,)), x)
    twice = torchtrim.trim(once, Plan({"first.gate": LayerPlan(4, (0, 2))}, experts=True), x)
    for small in (once, twice):
        torchtrim.save(small, tmp_path / "model")
        loaded = torchtrim.load(network(name), tmp_path / "model")
        assert torch.equal(loaded(x), small(x))
        assert history(loaded).plans[-1].experts
        assert history(loaded).lists == history(small).lists
    assert history(twice).lists == ({} if name == "stacked" else {"first.experts": (2, 4)})


def test_a_plan_says_so() -> None:
    plan = plan_of("first.gate", (1,))
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).experts
    assert "experts" not in Plan({}).to_json()
    with pytest.raises(PlanError, match="experts: expected true or false"):
        Plan.from_json(plan.to_json().replace('"experts": true', '"experts": 1'))
    with pytest.raises(PlanError, match="cannot be removed"):
        torchtrim.trim(network(), replace(plan, experts=False), tokens())
    with pytest.raises(PlanError, match="trace with experts=True"):
        torchtrim.trim(network(), plan, torchtrim.trace(network(), tokens()))


def test_as_many_stay_as_are_picked() -> None:
    with pytest.raises(PlanError, match=r"first\.gate: 2 of its experts are picked; keep 1 more"):
        torchtrim.trim(network(), plan_of("first.gate", (0, 1, 2, 4)), tokens())
    graph = torchtrim.trace(network(), tokens(), experts=True)
    assert len(random_plan(graph, fraction=1.0).removed["first.gate"]) == 3
    torch.manual_seed(0)
    everyone = with_random_values(Network(lambda: Listed(picked=EXPERTS)))
    assert locked_because(everyone, tokens()) == "its experts stay: all of them are picked"


class Telling(Listed):
    """Gives the scores of all experts away."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.gate(x).sigmoid() @ x.new_ones(EXPERTS, 1) + super().forward(x)
        return x, self.gate(x).softmax(-1)


class Ranked(Listed):
    """An expert is worth as much as its number."""

    def forward(self, x: Tensor) -> Tensor:
        scores, picked = self.routed(x)
        return super().forward(x) + (scores * picked).sum(-1, keepdim=True)


class Counting(Listed):
    """Knows how many there are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate(x).softmax(-1).reshape(-1, 5).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("mixture", "reason"),
    [
        (Telling, "the model's own code counts them"),
        (Ranked, "without them others are picked, or in another way"),
        (Counting, "the model's own code counts them"),
    ],
)
def test_what_cannot_be_proved_is_locked_with_the_reason(mixture, reason) -> None:
    torch.manual_seed(0)
    model = with_random_values(nn.Sequential(nn.Linear(4, WIDTH), mixture()))
    assert locked_because(model, tokens()).startswith(f"its experts stay: {reason}")


@pytest.mark.parametrize("name", ["list", "stacked", "dense, sparse weights"])
@pytest.mark.parametrize("mistake", ["shifted", "another"])
def test_mistakes_are_found(name, mistake) -> None:
    model, x = network(name), tokens()
    graph = torchtrim.trace(model, x, experts=True)
    kept = np.ones(len(graph.root), bool)
    kept[graph.mixtures[0].roots[[1, 2]]] = False
    assert difference(model, graph, kept) is None
    places = [
        (tensor, axis)
        for tensor, axes in graph.axes.items()
        for axis, roots in enumerate(axes)
        if np.array_equal(roots, graph.mixtures[0].roots) and "correction" not in tensor
    ]
    assert len(places) == {"list": 2, "stacked": 5}.get(name, 3)
    for tensor, axis in places:
        roots = graph.axes[tensor][axis]
        wrong = np.roll(roots, 1) if mistake == "shifted" else roots[[1, 0, 2, 3, 4]]
        axes = tuple(wrong if i == axis else a for i, a in enumerate(graph.axes[tensor]))
        assert difference(model, replace(graph, axes={**graph.axes, tensor: axes}), kept) is not None, tensor


def test_the_model_is_not_touched() -> None:
    model, x = network("stacked"), tokens()
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    described = repr(model)
    graph = torchtrim.trace(model, x, experts=True)
    torchtrim.trim(model, random_plan(graph), x)
    torchtrim.mask(model, random_plan(graph), x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model).items())
    assert repr(model) == described
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mixture.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_experts import network\n"
        "def build():\n"
        "    return network().float()\n"
    )
    command = ["inspect", f"{file}:build", "--input", "20x4"]
    without, with_it = (CliRunner().invoke(app, [*command, *more]) for more in ([], ["--experts"]))
    assert "gate" in with_it.stdout
    assert without.stdout != with_it.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen2-moe-batched", "qwen3-moe", "olmoe", "deepseek-v3"])
def test_models_of_transformers(name) -> None:
    """The last has a router that picks groups first: whole groups go."""
    pytest.importorskip("transformers")
    from benchmarks.zoo.models import build

    specimen = build(f"transformers:{name}")
    model = with_random_values(specimen.model)
    plan = assert_exact(model, specimen.example, *specimen.others, experts=True, seeds=(0, 1))
    graph = torchtrim.trace(model, specimen.example, experts=True)
    assert {one.router for one in graph.mixtures} <= plan.removed.keys()
    assert len(graph.mixtures) == (1 if name == "deepseek-v3" else 2)
