"""An index beside the graph: faiss and the graph as each other's oracle, what an approximate one may change, artifacts."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import calibrators
from calibrators import neighbours
from calibrators.graph import Graph, stage
from calibrators.index import FORMS, Index
from calibrators.kinds import density_aware
from calibrators.kinds.density_aware import DensityAware
from tests.calibrators.test_density_aware import created, rows

Array = NDArray[Any]

N = 1500
LOGITS, Y, FEATURES = (
    np.concatenate(pair) for pair in zip(rows(N, seed=1), rows(N // 2, moved=2.0, seed=2), strict=True)
)
MOVED = np.arange(len(Y)) >= N
REFERENCE = dict(zip(("logits", "features"), rows(1500, seed=3)[::2], strict=True))
UNSEEN, _, UNSEEN_FEATURES = (
    np.concatenate(p) for p in zip(rows(400, seed=4), rows(400, moved=2.0, seed=5), strict=True)
)


def fitted(**params: Any) -> DensityAware:
    calibrator = created(reference_rows=1500, **params)
    return calibrator.fit(LOGITS, Y, features=FEATURES, shifted=MOVED, reference=REFERENCE)


def served(calibrator: Any, logits: Array, features: Array) -> dict[str, Array]:
    """By the index and the second graph, as a server does."""
    signals = {"logits": logits.astype(np.float32), "features": features.astype(np.float32)}
    names = ["probabilities", *calibrator.further_outputs]
    session = onnxruntime.InferenceSession(stage(calibrator).to_bytes(), providers=["CPUExecutionProvider"])
    found = session.run(names, {"logits": signals["logits"], **calibrator.look_up(**signals)})
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_what_looks_at_everything_finds_the_distances_of_the_graph(form: str) -> None:
    rng = np.random.default_rng(0)
    reference, x = rng.normal(size=(900, 13)).astype(np.float16), rng.normal(size=(60, 13)).astype(np.float32)
    index = Index.build(form, reference, [slice(0, 5), slice(5, 13)], seed=0)
    index.effort = index.most_effort
    for layer, columns in enumerate((slice(0, 5), slice(5, 13))):
        width = columns.stop - columns.start
        proto = helper.make_model(
            helper.make_graph([], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", width])], []),
            opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
        )  # fmt: skip
        graph = Graph(proto)
        graph.output(neighbours.emit_nearest(graph, "x", reference[:, columns], 7), "d", TensorProto.FLOAT, (None, 7))
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        (by_graph,) = session.run(["d"], {"x": x[:, columns]})
        np.testing.assert_allclose(index.nearest(layer, x[:, columns], 7), np.sort(by_graph), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_no_neighbour_of_itself_and_what_is_missed_is_only_ever_nearer(form: str) -> None:
    reference = np.random.default_rng(0).normal(size=(2000, 6)).astype(np.float16)
    own, x = np.where(np.arange(100) % 2, np.arange(100), -1), reference[:100].astype(np.float64)
    index = Index.build(form, reference, [slice(0, 6)], seed=0)
    few = [slice(start, start + 20) for start in range(0, 100, 20)]
    found = np.concatenate([index.nearest(0, x[rows], 5, own[rows]) for rows in few])
    np.testing.assert_allclose(index.nearest(0, x, 5, own), found, rtol=1e-5, atol=1e-12)
    exact = neighbours.nearest(x, reference, 5, own)
    assert (found >= exact * (1 - 1e-6)).all()
    assert (found[own < 0, 0] < 1e-12).all()
    assert (found[own >= 0, 0] > 0).all()


def test_a_list_too_short_for_k_neighbours_is_made_up_for() -> None:
    reference = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float16)
    index = Index.build("ivf", reference, [slice(0, 3)], seed=0)
    x = np.zeros((4, 3))
    np.testing.assert_allclose(index.nearest(0, x, 60), neighbours.nearest(x, reference, 60), rtol=1e-6)


@pytest.mark.parametrize(("n_reference", "at_once"), [(333, 100), (3000, 40 * neighbours.GROUP)])
def test_a_long_reference_is_compared_block_by_block(
    n_reference: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x, reference = rng.normal(size=(70, 6)), rng.normal(size=(n_reference, 6)).astype(np.float16)
    own = np.arange(70) * 4
    whole = neighbours.nearest(x, reference, 9, own)
    monkeypatch.setattr(neighbours, "REFERENCE_AT_ONCE", at_once)
    monkeypatch.setattr(neighbours, "ROWS_AT_ONCE", 32)
    np.testing.assert_allclose(neighbours.nearest(x, reference, 9, own), whole, rtol=1e-12)


def test_centres_are_as_good_as_those_of_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5))[rng.integers(60, size=3000)] + 0.3 * rng.normal(size=(3000, 5))

    def inertia(centres: Array) -> float:
        return float(neighbours.nearest(x, centres, 1).sum())

    found = neighbours.centres_of_clusters(x, 100, seed=0)
    np.testing.assert_array_equal(found, neighbours.centres_of_clusters(x, 100, seed=0))
    assert inertia(found) < 1.15 * KMeans(100, n_init=1, random_state=0).fit(x).inertia_


@pytest.mark.parametrize(
    "params", [{}, {"distance": "mean", "normalise": "l2"}, {"link": "linear", "base": "temperature"}]
)
@pytest.mark.parametrize("form", FORMS)
def test_an_index_changes_no_probability_by_more_than_its_tolerance(form: str, params: dict[str, Any]) -> None:
    graph, index = fitted(index="graph", **params), fitted(index=form, **params)
    np.testing.assert_array_equal(graph.weights_, index.weights_)
    wanted = graph.predict_proba(UNSEEN, features=UNSEEN_FEATURES)
    tolerance = 1e-4 if form == "exact" else 2 * index.index_tolerance  # it was kept on the calibration rows
    assert np.abs(index.predict_proba(UNSEEN, features=UNSEEN_FEATURES) - wanted).max() < tolerance
    found = served(index, UNSEEN, UNSEEN_FEATURES)
    assert np.abs(found["probabilities"] - wanted).max() < tolerance
    for name, values in index.predict_further(UNSEEN, features=UNSEEN_FEATURES).items():
        np.testing.assert_allclose(found[name], values, atol=1e-3)
    assert f"index ({form}, effort" in index.notes[0]


def test_more_is_looked_at_until_the_tolerance_is_kept_and_a_fit_that_cannot_keep_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strict, loose = (fitted(index="ivf", index_tolerance=tolerance) for tolerance in (1e-4, 0.05))
    assert strict.index_ is not None
    assert loose.index_ is not None
    assert strict.index_.effort > loose.index_.effort
    monkeypatch.setattr(Index, "most_effort", 1)
    with pytest.raises(ValueError, match=r"no probability off by more than .*, more than index_tolerance=0.0001; take"):
        fitted(index="ivf", index_tolerance=1e-4)


def test_auto_switches_by_the_size_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted().index_ is None
    monkeypatch.setattr(density_aware, "SWITCH", 1000)
    index = fitted().index_
    assert index is not None
    assert index.form == "ivf"
    monkeypatch.setattr(density_aware, "is_installed", lambda: False)
    assert fitted().index_ is None


def test_a_reference_beyond_the_graphs_limit_is_served_by_an_index_and_not_exported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(density_aware, "MOST_NUMBERS", 10_000)
    monkeypatch.setattr(density_aware, "SWITCH", 10_000)
    calibrator = fitted()
    assert calibrator.has_index
    assert served(calibrator, UNSEEN, UNSEEN_FEATURES)["probabilities"].shape == UNSEEN.shape
    with pytest.raises(ValueError, match=r"a graph holds at most 10000 numbers of a reference, this one has .* fewer"):
        calibrator.emit(Graph(stage(calibrator).proto), "logits", "features")
    monkeypatch.setattr(density_aware, "is_installed", lambda: False)
    with pytest.raises(ValueError, match="needs an index beside the graph: pip install"):
        fitted()


@pytest.mark.parametrize("form", FORMS)
def test_an_artifact_holds_the_index_and_gives_the_same_numbers(form: str) -> None:
    calibrator = fitted(index=form)
    again = calibrators.loads(calibrators.dumps(calibrator))
    assert calibrators.dumps(again) == calibrators.dumps(calibrator)
    np.testing.assert_array_equal(
        again.predict_proba(UNSEEN, features=UNSEEN_FEATURES),
        calibrator.predict_proba(UNSEEN, features=UNSEEN_FEATURES),
    )


def test_a_conformal_kind_looks_up_what_its_base_does() -> None:
    params = {"layers": ["early", "late"], "widths": [5, 8], "index": "exact"}
    calibrator: Any = calibrators.create("split_conformal", base="density_aware", base_params=params)
    calibrator.fit(LOGITS, Y, features=FEATURES)
    assert calibrator.has_index
    wanted = calibrator.predict_proba(UNSEEN, features=UNSEEN_FEATURES)
    np.testing.assert_allclose(served(calibrator, UNSEEN, UNSEEN_FEATURES)["probabilities"], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": np.asarray(3)}, "no form 3"),
        ({"effort": np.asarray(0)}, "with effort 0"),
        ({"effort": np.asarray(1.0)}, "'effort' must be int64"),
        ({"lists": None}, "an index of lists alone has centres and lists"),
        ({"form": None}, "an index has tensors"),
        ({"lists": np.full((1, 1500), 10**6)}, "lists must hold numbers in 0.."),
        ({"centres": np.full((77, 8), np.nan, np.float32)}, "'centres'"),
    ],
)
def test_a_forged_index_is_refused(changes: dict[str, Array | None], message: str) -> None:
    calibrator = fitted(index="ivf")
    changed = {f"index/{name}": array for name, array in changes.items()}
    tensors = {n: a for n, a in (calibrator.tensors() | changed).items() if a is not None}
    with pytest.raises(ValueError, match=message):
        created(reference_rows=1500, index="ivf").set_tensors(tensors)


def test_without_faiss_an_index_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'calserve\[index\]'"):
        fitted(index="exact")


@pytest.mark.parametrize("params", [{"index": "tree"}, {"index_tolerance": -1.0}])
def test_parameters_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        created(**params).check_params()


def test_a_row_that_is_no_number_spoils_itself_alone() -> None:
    calibrator = fitted(index="ivf")
    features = UNSEEN_FEATURES[:5].copy()
    features[2] = np.nan
    found = served(calibrator, UNSEEN[:5], features)["probabilities"]
    wanted = served(calibrator, UNSEEN[:5], UNSEEN_FEATURES[:5])["probabilities"]
    np.testing.assert_allclose(found[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]], atol=1e-6)
