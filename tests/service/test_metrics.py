"""What /metrics says: by Prometheus's conventions, as the table in the docs has it, and as the dashboard asks for it."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from service.client import Client
from service.web.metrics import (
    Durations,
    JournalState,
    Metrics,
    ModelState,
    MonitorMetrics,
    NowcastMetrics,
    OnlineLearning,
    SetCoverage,
    ShadowRunning,
    ShadowStanding,
    WebhookMetrics,
)
from tests.service import models
from tests.service.conftest import RunningServer

ROOT = Path(__file__).parent.parent.parent
X, _, _ = models.labelled_rows(20, seed=0)
SOME = Durations((0.1, 1.0), (3, 2, 1), 4.5)
LABELS = {
    "grpc_method", "grpc_code", "model", "version", "revision", "provider", "why", "result", "what", "held", "monitor", "bound",
}  # fmt: skip
"""Whose values are the server's own words, or names of models, revisions and monitors."""


def everything() -> Metrics:
    """One of everything that can be said."""
    metrics = Metrics(
        lambda: [ModelState("m", "1", "r-1", "cpu", 1, 20, 9, {"answered": 6, "refused": 1}, {"full": 1}, {1: 4, 3: 4, 2000: 1}, SOME, SOME, SOME)],
        lambda: True,
        lambda: False,
        lambda: JournalState(True, 9, 9, 9, {"m": 1}, {("m", "full"): 1}, {"m": 1}, {"recorded": 1}, SOME),
        lambda: [OnlineLearning("m", "r-1", 3, False, {"learned": 1}, {"published": 1}, 1, 1.0, 1)],
        lambda: [SetCoverage("m", "r-1", 0.9, 9, 1, 0.9)],
        lambda: [MonitorMetrics("m", "default", 1.5, 6.0, 100, 2, 1)],
        lambda: [NowcastMetrics("m", 0.9, 0.88, 0.92, True)],
        lambda: WebhookMetrics({"delivered": 1, "failed": 0, "dropped": 0}, 2, 3),
        lambda: [ShadowStanding("m", "r-2", {"judged": 500}, 0.01, 0.005, 0.015, 1)],
        lambda: [ShadowRunning("m", "r-2", {"run": 50}, 0.5)],
    )  # fmt: skip
    metrics.recorder("/inference.GRPCInferenceService/ModelInfer")("OK", 0.01)
    return metrics


def families(exposition: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(exposition)}


ALL = families(everything().exposition().decode())


def exposed(family: Metric) -> str:
    """The name as one writes it in a query."""
    return family.name + {"counter": "_total"}.get(family.type, "")


def test_every_metric_has_a_type_a_help_and_a_conventional_name() -> None:
    for name, family in ALL.items():
        assert re.fullmatch(r"(calserve|grpc_server|process)(_[a-z0-9]+)+", name)
        assert family.type in {"counter", "gauge", "histogram", "summary"}
        assert re.fullmatch(r"[A-Z0-9].+\.", family.documentation), name
        assert not re.search(r"(_total|_count|_sum|_bucket|_info_info|_counter|_gauge)$", name)
        assert not re.search(r"_(ms|milliseconds|us|ns|minutes|hours|days|kb|mb|kilobytes|percent)(_|$)", name)


def test_labels_are_few_and_none_is_a_callers_word() -> None:
    for family in ALL.values():
        own = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert own <= (LABELS if family.name != "calserve_build_info" else {"version"}), family.name
        has_bounds = any("le" in sample.labels for sample in family.samples)
        assert has_bounds == (family.type == "histogram")


def test_histograms_are_cumulative_and_end_in_their_count() -> None:
    for family in ALL.values():
        if family.type == "histogram":
            buckets = [(s.labels["le"], s.value) for s in family.samples if s.name.endswith("_bucket")]
            (count,) = (s.value for s in family.samples if s.name.endswith("_count"))
            bounds, counts = [float(bound) for bound, _ in buckets], [value for _, value in buckets]
            assert bounds == sorted(bounds) and bounds[-1] == float("inf")
            assert counts == sorted(counts) and counts[-1] == count


def test_batches_are_counted_by_their_rows() -> None:
    of_rows = {(s.name, s.labels.get("le")): s.value for s in ALL["calserve_batch_rows"].samples}
    at_most = {bound: of_rows["calserve_batch_rows_bucket", bound] for bound in ("1", "2", "4", "1024", "+Inf")}
    assert at_most == {"1": 4, "2": 4, "4": 8, "1024": 8, "+Inf": 9}
    assert of_rows["calserve_batch_rows_sum", None] == 4 + 12 + 2000


def test_a_family_is_there_however_little_was_served_and_every_one_is_in_the_tests(
    server: RunningServer, client: Client
) -> None:
    def live() -> dict[str, Metric]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.app.metrics_port}/metrics", timeout=10) as answer:
            return families(answer.read().decode())

    assert live().keys() == ALL.keys()
    for rows in (1, 3, 20, 200):
        client.label("mlp", [client.predict("mlp", np.resize(X, (rows, 6))).prediction_id], [1])
    found = live()
    counts = {s.name: s.value for name in ALL for s in found[name].samples if s.name.endswith("_count")}
    assert counts["calserve_request_seconds_count"] == 4
    assert counts["calserve_queue_seconds_count"] == counts["calserve_batch_rows_count"] >= 4
    assert counts["calserve_label_delay_seconds_count"] == 4
    sums = {s.name: s.value for name in ALL for s in found[name].samples if s.name.endswith("_sum")}
    assert sums["calserve_batch_rows_sum"] == 224
    assert 0 < sums["calserve_run_seconds_sum"] < sums["calserve_request_seconds_sum"]


def test_the_table_in_the_docs_is_the_exposition() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9_]+)` \| (\w+) \|([^|]*)\| .+ \|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE
    )
    told = {name: (kind, tuple(sorted(re.findall(r"`(\w+)`", labels)))) for name, kind, labels in rows}
    assert len(told) == len(rows)
    real = {
        exposed(family): (
            family.type,
            tuple(sorted({label for sample in family.samples for label in sample.labels} - {"le"})),
        )
        for family in ALL.values()
    }
    assert told == real


def expressions(value: object) -> Iterator[str]:
    """Every query in a dashboard."""
    if isinstance(value, dict):
        yield from (query for key in ("expr", "query") if isinstance(query := value.get(key), str))
    parts: Iterable[object] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from expressions(part)


def queries(file: str) -> list[str]:
    text = (ROOT / "deploy" / file).read_text()
    if file.endswith(".json"):
        return [query for query in expressions(json.loads(text)) if query != "prometheus"]
    return re.findall(r"expr: (?:>-\n)?((?:.+\n)(?: {10}.+\n)*)", text)


SAMPLES = {sample.name: sample.labels.keys() for family in ALL.values() for sample in family.samples}
SET_BY_PROMETHEUS = {"instance", "job"}


@pytest.mark.parametrize(("file", "count"), [("grafana-dashboard.json", 30), ("alert-rules.yml", 14)])
def test_what_is_asked_for_in_deploy_is_there_with_its_labels(file: str, count: int) -> None:
    asked = queries(file)
    assert len(asked) >= count
    for query in asked:
        names = re.findall(r"\b(?:calserve|grpc_server|process)_\w+", query)
        assert names, query
        assert set(names) <= SAMPLES.keys(), query
        for name, matchers in re.findall(r"\b((?:calserve|grpc_server|process)_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= SAMPLES[name] | SET_BY_PROMETHEUS, query
        known = {label for name in names for label in SAMPLES[name]} | SET_BY_PROMETHEUS
        for grouped in re.findall(r"\b(?:by|ignoring) \(([^)]*)\)", query):
            assert set(grouped.replace(" ", "").split(",")) <= known, query
        assert query.count("(") == query.count(")") and query.count("[") == query.count("]")


def test_every_panel_says_what_it_shows_and_none_lies_on_another() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"] for panel in panels if panel["type"] != "row")
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells


def test_every_alert_says_what_is_wrong_and_how_urgent_it_is() -> None:
    text = (ROOT / "deploy/alert-rules.yml").read_text()
    rules = text.split("- alert: ")[1:]
    assert len(rules) == len({rule.partition("\n")[0] for rule in rules}) == len(queries("alert-rules.yml"))
    assert all(re.search(r"severity: (page|ticket)\}", rule) and "summary: " in rule for rule in rules)
