"""An index beside the graph: nearest rows of references too large to be constants of it, by faiss.

Douze, Guzhva, Deng et al., "The Faiss library", arXiv 2401.08281. Of each layer a search of its own:

    exact   every row of the reference is compared
    ivf     the reference is divided into lists, each around a centre (k-means); a row is compared with those of the
            `effort` lists whose centres are nearest
    hnsw    a graph whose edges lead from any row to ones nearby (Malkov, Yashunin 2018), `effort` of which are followed
            at once. It is no part of the artifact, which holds numbers only: it is built whenever one is read

Each holds the reference as the same float16 numbers that the graph would hold, and gives distances to the rows that it
found from the differences, as the graph does. So `exact` is the graph's result by another road, and what the others
miss is farther neighbours taken for near ones: distances never come out too small.

faiss is imported by the first index that is made (`pip install calserve[index]`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from calibrators.base import check_tensor
from calibrators.neighbours import centres_of_clusters, drawn_rows, nearest, nearest_centre
from calibrators.numerics import Array

FORMS = ("exact", "ivf", "hnsw")
TENSORS = ("form", "effort", "centres", "lists")
"""Of an index, by name; the last two of lists alone."""

ROWS_TO_LIST = 32
"""Rows, for each centre, that the centres are found from."""
ROWS_PER_LIST = 8
EDGES = 32
LEAST_EFFORT = {"exact": 1, "ivf": 1, "hnsw": 64}
MOST_CANDIDATES = 1024
ROWS_AT_ONCE = 1 << 15
TOGETHER = 32
"""Rows from which on one matrix product costs less than an exact search for each."""


class Index:
    """Searches in the layers of one reference.

    Parameters
    ----------
    form : of `FORMS`
    reference : (n_reference, n_columns) float16
    columns : of each layer, where it stands in the reference
    effort : lists, or candidates, that a search looks at
    centres : (n_lists, n_columns) float32, of lists
    lists : (n_layers, n_reference) int64, the list of each row in each layer

    Examples
    --------
    >>> reference = np.arange(8.0)[:, None].astype(np.float16)
    >>> Index.build("exact", reference, [slice(0, 1)], seed=0).nearest(0, np.array([[2.25]]), 2).tolist()
    [[0.0625, 0.5625]]
    """

    def __init__(
        self,
        form: str,
        reference: Array,
        columns: Sequence[slice],
        effort: int,
        centres: Array | None = None,
        lists: Array | None = None,
    ) -> None:
        self.form, self.effort, self._reference, self._columns = form, effort, reference, columns
        self._centres, self._lists = centres, lists
        self._searches = [self._search(layer) for layer in range(len(columns))]

    @classmethod
    def build(cls, form: str, reference: Array, columns: Sequence[slice], *, seed: int) -> Self:
        """A new one, with the least effort; deterministic by seed."""
        if form != "ivf":
            return cls(form, reference, columns, LEAST_EFFORT[form])
        n_lists = max(1, min(int(2 * np.sqrt(len(reference))), len(reference) // ROWS_PER_LIST))
        sample = reference[drawn_rows(len(reference), ROWS_TO_LIST * n_lists, seed)]
        of_layers = [centres_of_clusters(sample[:, of], n_lists, seed) for of in columns]
        lists = [nearest_centre(reference[:, of], centres) for of, centres in zip(columns, of_layers, strict=True)]
        return cls(form, reference, columns, LEAST_EFFORT[form], np.column_stack(of_layers), np.stack(lists))

    @property
    def most_effort(self) -> int:
        """Beyond which more is of no use, or none that is worth its cost."""
        return 1 if self.form == "exact" else MOST_CANDIDATES if self._centres is None else len(self._centres)

    def tensors(self) -> dict[str, Array]:
        """All but the reference."""
        numbers = {"form": np.asarray(FORMS.index(self.form)), "effort": np.asarray(self.effort)}
        if self._centres is None or self._lists is None:
            return numbers
        return numbers | {"centres": self._centres, "lists": self._lists}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array], reference: Array, columns: Sequence[slice]) -> Self:
        """What `tensors` gave; ValueError for what no index can hold."""
        if not {"form", "effort"} <= tensors.keys() <= {*TENSORS}:
            raise ValueError(f"an index has tensors {', '.join(TENSORS)}, got {', '.join(sorted(tensors))}")
        for name in ("form", "effort"):
            check_tensor(name, tensors[name], np.int64, ())
        if not (0 <= tensors["form"] < len(FORMS) and 1 <= tensors["effort"] <= len(reference) + MOST_CANDIDATES):
            raise ValueError(f"an index has no form {tensors['form']} with effort {tensors['effort']}")
        form = FORMS[int(tensors["form"])]
        if (form == "ivf") != ({"centres", "lists"} <= tensors.keys()):
            raise ValueError(f"an index of lists alone has centres and lists, got {', '.join(sorted(tensors))}")
        if form == "ivf":
            n_lists = len(tensors["centres"])
            check_tensor("centres", tensors["centres"], np.float32, (n_lists, reference.shape[1]))
            check_tensor("lists", tensors["lists"], np.int64, (len(columns), len(reference)))
            if not (tensors["lists"].min() >= 0 and tensors["lists"].max() < n_lists):
                raise ValueError(f"lists must hold numbers in 0..{n_lists - 1}")
        return cls(form, reference, columns, int(tensors["effort"]), tensors.get("centres"), tensors.get("lists"))

    def nearest(self, layer: int, x: Array, k: int, own: Array | None = None) -> Array:
        """`neighbours.nearest` in the reference's columns of this layer, as far as the search finds them."""
        if self.form == "exact" and len(x) >= TOGETHER:
            return nearest(x, self._reference[:, self._columns[layer]], k, own)
        faiss = _faiss()
        faiss.omp_set_num_threads(1)  # of the thread that asks: runs side by side are what keeps the cores busy
        rows, wanted = np.ascontiguousarray(x, np.float32), k if own is None else k + 1
        distances, places = self._searches[layer].search(rows, wanted, params=self._parameters(faiss))
        if own is not None:
            distances[places == own[:, None]] = np.inf
        kept = np.argsort(distances, axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(distances, kept, axis=1).astype(x.dtype)
        # A search that ends with fewer rows than it was asked for, or was asked for a row that is no number.
        short = np.flatnonzero((np.take_along_axis(places, kept, axis=1) < 0).any(axis=1) | ~np.isfinite(found[:, -1]))
        if len(short):
            reference = self._reference[:, self._columns[layer]]
            found[short] = nearest(x[short], reference, k, None if own is None else own[short])
        return found

    def _parameters(self, faiss: Any) -> Any:
        if self.form == "ivf":
            return faiss.SearchParametersIVF(nprobe=self.effort)
        return faiss.SearchParametersHNSW(efSearch=self.effort) if self.form == "hnsw" else None

    def _search(self, layer: int) -> Any:
        """faiss's own index of one layer."""
        faiss = _faiss()
        faiss.omp_set_num_threads(1)  # a graph of edges is the same one only where rows come one after the other
        columns = self._columns[layer]
        width, half = columns.stop - columns.start, faiss.ScalarQuantizer.QT_fp16
        if self.form == "hnsw":
            search = faiss.IndexHNSWSQ(width, half, EDGES, faiss.METRIC_L2)
        elif self._centres is None:
            search = faiss.IndexScalarQuantizer(width, half, faiss.METRIC_L2)
        else:
            of_centres = faiss.IndexFlatL2(width)
            of_centres.add(np.ascontiguousarray(self._centres[:, columns]))
            search = faiss.IndexIVFScalarQuantizer(of_centres, width, len(self._centres), half, faiss.METRIC_L2)
            search.by_residual = False
            search.referenced_objects = [of_centres]
        search.is_trained = True
        for start in range(0, len(self._reference), ROWS_AT_ONCE):
            rows = np.ascontiguousarray(self._reference[start : start + ROWS_AT_ONCE, columns], np.float32)
            if self._lists is None:
                search.add(rows)
            else:
                lists = np.ascontiguousarray(self._lists[layer, start : start + ROWS_AT_ONCE])
                search.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(lists))
        return search


def is_installed() -> bool:
    """Whether there is anything to make an index with."""
    try:
        _faiss()
    except ImportError:
        return False
    return True


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ImportError("an index beside the graph needs faiss: pip install 'calserve[index]'") from None
    return faiss
