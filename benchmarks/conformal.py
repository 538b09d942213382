"""Prediction sets on real data: coverage, size, classes, streams, and what they cost beside every installed peer.

    OMP_NUM_THREADS=1 python -m benchmarks.conformal [--sections bands,sizes,..] [--only CIFAR]

bands     mean coverage of every score over 200 random splits, in standard errors from k / (n + 1)
sizes     coverage and mean size over 20 random splits, the same rows and probabilities for everybody
classes   CovGap and size of the three kinds at few rows a class
streams   long-run and local coverage of the online learners, and of the threshold of the rows before them
time      microseconds a row for sets from probabilities, everybody in turn, the median of the rounds
served    what a run with sets costs over one without, for ResNet-20 and for a head of 1000 classes, at batch 16

The peers are found by import (`benchmarks/conformal_peers.py`); one that is absent is named with the reason.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import calibrators
from benchmarks.conformal_peers import Peer, Sets, find
from benchmarks.datasets import DEFAULT_FOLDER, DataSet, load
from calibrators.conformal import Thresholds, create_score
from calibrators.conformal.level import rank
from calibrators.conformal.online import AdaptiveConformal, ConformalPID, DecayingSteps, DynamicallyTunedConformal
from calibrators.conformal.score import members
from calibrators.conformal.scores import names
from calibrators.metrics import coverage_gap, local_coverage

Array = NDArray[Any]
LEVEL = 0.9
VALUES: dict[str, dict[str, float]] = {"raps": {"penalty": 0.01, "free_ranks": 5}, "saps": {"weight": 0.2}}
RANDOMISED = ("aps", "raps", "saps", "top_k")
N_SPLITS, N_SIZED = 200, 20
ROUNDS = 15

console = Console(width=150)


def table(title: str, *heads: str) -> Table:
    made = Table(*heads, title=title, title_justify="left", box=None, padding=(0, 2))
    for column in made.columns[1:]:
        column.justify = "right"
    return made


def whole(data: DataSet) -> tuple[Array, Array]:
    """All rows' probabilities by a temperature fitted on the calibration half, float32, and their labels."""
    logits = np.concatenate([data.logits, data.test_logits]).astype(np.float32)
    p = calibrators.create("temperature").fit(data.logits, data.labels).predict_proba(logits)
    return p, np.concatenate([data.labels, data.test_labels])


def splits(n: int, count: int) -> Iterator[tuple[Array, Array]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        order = rng.permutation(n)
        yield order[: n // 2], order[n // 2 :]


def shares_for(score: str, n: int, seed: int) -> Array | None:
    """A number for each row, where the score has a use for it."""
    return np.random.default_rng(seed).random(n) if score in RANDOMISED else None


def own(name: str, randomised: bool = False) -> Peer:
    """This library's sets in the shape of a peer's."""
    score = create_score(name, VALUES.get(name))

    def shares(rows: Array, seed: int) -> Array | None:
        return shares_for(name, len(rows), seed) if randomised else None

    def calibrate(p: Array, y: Array, level: float) -> Sets:
        thresholds = Thresholds.of(score.of_labels(p, y, shares(p, 1))).at(level)
        return lambda rows: members(rows, score.cuts(rows, thresholds, shares(rows, 2)), allow_empty=True)

    return calibrate


# ---- sections


def bands(folder: Path, only: str) -> None:
    found = table(
        f"coverage at {LEVEL} over {N_SPLITS} splits: mean less k/(n + 1), in standard errors", "data", *names()
    )
    for data in load(folder, only):
        p, y = whole(data)
        cells = []
        for name in names():
            shares = shares_for(name, len(y), 1)
            scores = create_score(name, VALUES.get(name)).of_labels(p, y, shares)
            hits = []
            for learned, judged in splits(len(y), N_SPLITS):
                threshold = Thresholds.of(scores[learned]).at(LEVEL)[0]
                hits.append((scores[judged] <= threshold).mean())
            n = len(learned)
            c = rank(LEVEL, n) / (n + 1)
            error = math.sqrt(c * (1 - c) * (1 / (n + 2) + 1 / len(judged)) / N_SPLITS)
            cells.append(f"{np.mean(hits):.4f} {(np.mean(hits) - c) / error:+.1f}")
        found.add_row(data.name, *cells)
    console.print(found)


def sizes(folder: Path, only: str, peers: dict[str, dict[str, Peer]]) -> None:
    variants: dict[str, dict[str, Peer]] = {}
    for name in names():
        variants[name] = {"calserve": own(name)}
        if name in RANDOMISED:
            variants[name]["calserve, randomised"] = own(name, randomised=True)
        variants[name] |= {tool: scores[name] for tool, scores in peers.items() if name in scores}
    for data in load(folder, only):
        p, y = whole(data)
        found = table(f"{data.name}: {N_SIZED} splits at {LEVEL}", "score", "by", "coverage", "size", "empty")
        for name, tools in variants.items():
            for tool, calibrate in tools.items():
                rows = []
                for learned, judged in splits(len(y), N_SIZED):
                    sets = calibrate(p[learned], y[learned], LEVEL)(p[judged])
                    size = sets.sum(axis=1)
                    rows.append((sets[np.arange(len(judged)), y[judged]].mean(), size.mean(), (size == 0).mean()))
                covered, mean, empty = np.mean(rows, axis=0)
                found.add_row(name, tool, f"{covered:.4f}", f"{mean:.3f}", f"{100 * empty:.1f} %")
        console.print(found)


def classes(folder: Path) -> None:
    kinds = ("split_conformal", "class_conditional_conformal", "clustered_conformal")
    for data in load(folder, "closed"):
        p, y = whole(data)
        logits = np.log(p)
        found = table(f"{data.name}: CovGap in % / size, 10 draws", "rows a class", *kinds)
        for rows in (10, 20, 30):
            cells: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
            for seed in range(10):
                order = np.random.default_rng(seed).permutation(len(y))
                counted = np.array([(y[order[:i]] == y[order[i]]).sum() for i in range(len(order))])
                learned, judged = order[counted < rows], order[counted >= rows]
                for kind in kinds:
                    fit: Any = calibrators.create(kind, base="identity").fit(logits[learned], y[learned])
                    sets = fit.predict_set(logits[judged])
                    cells[kind].append((100 * coverage_gap(sets, y[judged], LEVEL), float(sets.sum(axis=1).mean())))
            found.add_row(str(rows), *("{:.2f} / {:.1f}".format(*np.mean(cells[kind], axis=0)) for kind in kinds))
        console.print(found)


def elec2(folder: Path) -> tuple[Array, Array, int]:
    """Scores in order of time after the rows that the network was fitted on; the first 1,000 of them to start from."""
    with np.load(folder / "streams" / "elec2.npz") as data:
        start = int(data["n_train"])
        return data["probs"][start:], data["y"][start:].astype(int), 1000


def shifting_cifar(folder: Path) -> tuple[Array, Array, int]:
    """Clean images, then noise, contrast, blur, more noise, and clean again; 2,500 rows each."""
    clean, shift = (np.load(folder / "cifar10" / f"resnet20_{part}.npz") for part in ("clean", "shift"))
    parts = [clean["logits"], *(shift[f"{name}_logits"] for name in ("gaussian_noise_3", "contrast_4"))]
    parts += [shift["gaussian_blur_3_logits"], shift["gaussian_noise_5_logits"], clean["logits"][2500:]]
    labels = np.concatenate([clean["labels"], *([clean["labels"][2500:]] * 5)])
    fit = calibrators.create("temperature").fit(clean["logits"][:2500], clean["labels"][:2500])
    return fit.predict_proba(np.concatenate(parts)), labels, 2500


def streams(folder: Path) -> None:
    learners: dict[str, Callable[[Array], Any]] = {
        "aci": lambda s: AdaptiveConformal(LEVEL, scores=s),
        "dtaci": lambda s: DynamicallyTunedConformal(LEVEL, scores=s),
        "pid": lambda s: ConformalPID(LEVEL, scores=s),
        "pid, theta": lambda s: ConformalPID(LEVEL, scores=s, forecast="theta"),
        "decaying": lambda s: DecayingSteps(LEVEL, scores=s),
    }
    for title, read in (("elec2", elec2), ("shifting CIFAR-10", shifting_cifar)):
        p, y, n_first = read(folder)
        found = table(f"{title} at {LEVEL}", "score", "threshold", "coverage", "worst 500", "best 500", "us a label")
        for name in ("lac", "aps"):
            scores = create_score(name).of_labels(p, y).astype(np.float64)
            first, rest = scores[:n_first], scores[n_first:]
            hits: dict[str, tuple[Array, float]] = {"fixed": (rest <= Thresholds.of(first).at(LEVEL)[0], 0.0)}
            for learner, make in learners.items():
                begun = time.thread_time()
                held = make(first).run(rest)
                hits[learner] = (held, 1e6 * (time.thread_time() - begun) / len(rest))
            for learner, (held, cost) in hits.items():
                local = local_coverage(held)
                cells = (f"{held.mean():.4f}", f"{local.min():.3f}", f"{local.max():.3f}", f"{cost:.0f}")
                found.add_row(name, learner, *cells)
        console.print(found)


def times(peers: dict[str, dict[str, Peer]]) -> None:
    for n_classes, n_rows in ((10, 2000), (100, 1000), (1000, 300)):
        rng = np.random.default_rng(0)
        z = 3 * rng.normal(size=(2 * n_rows, n_classes))
        p = np.exp(z - z.max(axis=1, keepdims=True)).astype(np.float32)
        p /= p.sum(axis=1, keepdims=True)
        y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
        makers: dict[tuple[str, str], Sets] = {}
        for name in names():
            tools = {"calserve": own(name)} | {tool: scores[name] for tool, scores in peers.items() if name in scores}
            for tool, calibrate in tools.items():
                makers[name, tool] = calibrate(p[:n_rows], y[:n_rows], LEVEL)
        spent: dict[tuple[str, str], list[float]] = {key: [] for key in makers}
        for _ in range(ROUNDS):
            for key, make in makers.items():
                begun = time.thread_time()
                make(p[n_rows:])
                spent[key].append(1e6 * (time.thread_time() - begun) / n_rows)
        tools = ["calserve", *peers]
        found = table(f"K={n_classes}, {n_rows} rows: microseconds a row", "score", *tools)
        for name in names():
            costs = {tool: np.median(spent[name, tool]) for tool in tools if (name, tool) in spent}
            found.add_row(name, *(f"{costs[tool]:.2f}" if tool in costs else "-" for tool in tools))
        console.print(found)


def head(n_features: int, n_classes: int) -> onnx.ModelProto:
    """One linear layer."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(n_features, n_classes)) / 8, rng.normal(size=n_classes)]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["logits"])],
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", n_features])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", n_classes])],
        [numpy_helper.from_array(w.astype(np.float32), name) for w, name in zip(weights, "wb", strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def served(folder: Path, batch: int = 16) -> None:
    from calibrators import inspect_model
    from service.inference.model import ServedModel
    from service.inference.session import Device
    from service.inference.warmup import made_up

    models = {"a head 512-1000": head(512, 1000)}
    resnet = folder / "cifar10" / "resnet20_cifar10.onnx"
    if resnet.is_file():
        models = {"ResNet-20, K=10": onnx.load(resnet)} | models
    found = table(f"a run at batch {batch}, one thread", "model", "score", "without sets", "with", "more")
    for title, proto in models.items():
        model = ServedModel("m", "1", proto, "", Device.choose("cpu", threads=1), inspect_model(proto))
        rng = np.random.default_rng(0)
        z = 3 * rng.normal(size=(500, model.n_classes))
        y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
        (shape,) = [array.shape[1:] for array in made_up(model.inputs, 1).values()]
        feeds = {model.inputs[0].name: rng.random((batch, *shape), dtype=np.float32)}
        for score in ("lac", "aps", "raps"):
            fit = calibrators.create("split_conformal", score=score).fit(z, y)
            snapshot = model.snapshot(fit, "split_conformal-1")
            plain = [spec.name for spec in snapshot.graph_outputs]
            both = [spec.name for spec in snapshot.outputs]
            spent: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(200):
                for sets in (False, True):
                    begun = time.thread_time_ns()
                    snapshot.run(both if sets else plain, feeds)
                    spent[sets].append(1e-3 * (time.thread_time_ns() - begun))
            without, with_sets = np.median(spent[False]), np.median(spent[True])
            cells = (f"{without:.0f} us", f"{with_sets:.0f} us", f"{100 * (with_sets / without - 1):.1f} %")
            found.add_row(title, score, *cells)
        model.close()
    console.print(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--sections", default="bands,sizes,classes,streams,time,served")
    parser.add_argument("--only", default="", help="data sets whose name contains this, of bands and sizes")
    arguments = parser.parse_args()
    folder, (peers, absent) = arguments.shared_data, find()
    for tool, reason in absent.items():
        console.print(f"not compared: {tool} ({reason})")
    sections = {
        "bands": lambda: bands(folder, arguments.only),
        "sizes": lambda: sizes(folder, arguments.only, peers),
        "classes": lambda: classes(folder),
        "streams": lambda: streams(folder),
        "time": lambda: times(peers),
        "served": lambda: served(folder),
    }
    warnings.filterwarnings("ignore", module="mapie")  # that not every class is among the rows, again and again
    for section in arguments.sections.split(","):
        sections[section]()


if __name__ == "__main__":
    main()
