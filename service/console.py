"""Tables for people, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table

from calibrators.inspection import Inspection
from service.client import Evaluation, Model, Revision, Score

SHOWN_SCORES = {
    "accuracy": "accuracy",
    "log_loss": "log loss",
    "brier_score": "Brier score",
    "expected_calibration_error": "ECE",
}
"""Scores in a table's columns, in this order."""


def score(value: Score | None) -> str:
    """0.412 [0.397, 0.428]"""
    return "" if value is None else f"{value.value:.4f} [dim]\\[{value.low:.4f}, {value.high:.4f}][/dim]"


def scores_table(title: str, rows: Iterable[tuple[str, Mapping[str, Score]]], best: str | None = None) -> Table:
    """One row for each named set of scores; the row named `best` stands out."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("probabilities of")
    for heading in SHOWN_SCORES.values():
        table.add_column(heading, justify="right")
    for name, scores in rows:
        style = "bold green" if name == best else None
        table.add_row(name, *(score(scores.get(key)) for key in SHOWN_SCORES), style=style)
    return table


def evaluation_table(title: str, name: str, evaluation: Evaluation) -> Table:
    rows = [("the model itself", evaluation.before), (name, evaluation.after)]
    return scores_table(f"{title}: {evaluation.row_count} rows, {evaluation.level:.0%} intervals", rows)


def revisions_table(revisions: Iterable[Revision]) -> Table:
    """Revisions with their held-out log loss and ECE, the active one marked."""
    table = Table()
    for heading in ("", "revision", "params", "rows", "log loss before", "after", "ECE before", "after", "made"):
        table.add_column(heading)
    for revision in revisions:
        held_out = revision.held_out
        pairs = [
            score(side.get(key)) if held_out else ""
            for key in ("log_loss", "expected_calibration_error")
            for side in ((held_out.before, held_out.after) if held_out else ({}, {}))
        ]
        params = ", ".join(f"{name}={value}" for name, value in revision.params.items())
        made = revision.create_time.strftime("%Y-%m-%d %H:%M:%S UTC")
        mark = "[bold green]active[/]" if revision.active else ""
        table.add_row(mark, revision.revision, params, str(revision.row_count), *pairs, made)
    return table


def models_table(models: Iterable[Model]) -> Table:
    table = Table()
    for heading in ("model", "version", "classes", "active revision", "provider", "logits from"):
        table.add_column(heading)
    for model in models:
        logits = model.logits_tensor or "no classifier: served without calibration"
        table.add_row(
            model.model, model.version, str(model.class_count or "?"), model.active_revision, model.provider, logits
        )
    return table


def inspection_table(name: str, inspection: Inspection) -> Table:
    """What was found in a model's graph, and why."""
    table = Table(title=name, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("output", inspection.output)
    table.add_row("logits", f"{inspection.logits.tensor} ({inspection.logits.form})")
    table.add_row("because", inspection.logits.reason)
    table.add_row("features", inspection.features or "none")
    table.add_row("because", inspection.features_reason)
    table.add_row("classes", str(inspection.n_classes or "not known before a run"))
    return table
