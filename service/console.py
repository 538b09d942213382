"""Tables for people, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import onnx
from rich import box
from rich.markup import escape
from rich.table import Table

from calibrators.auto import Candidate
from calibrators.inspection import Inspection
from calibrators.layers import default_layers, find_layers, multiply_adds, named_layers
from calibrators.metrics import Estimate
from service.client import Alarm, Evaluation, Model, Monitor, Nowcast, OnlineState, Revision, Shadow
from service.rpc.tokens import Token
from service.store.maintenance import Contents

SHOWN_SCORES = {
    "accuracy": "accuracy",
    "log_loss": "log loss",
    "brier_score": "Brier score",
    "expected_calibration_error": "ECE",
}
"""Scores in a table's columns, in this order."""


def score(value: Estimate | None) -> str:
    """The value, and its interval on a line beneath: four of them fit beside a name in 80 columns."""
    if value is None:
        return ""
    interval = f"\n[dim]{value.low:.3f}–{value.high:.3f}[/dim]" if value.has_interval else ""
    return f"{value.value:.4f}{interval}"


def scores_table(title: str, rows: Iterable[tuple[str, Mapping[str, Estimate]]], best: str | None = None) -> Table:
    """One row for each named set of scores; the row named `best` stands out."""
    table = Table(
        title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    table.add_column("probabilities of", no_wrap=True)
    for heading in SHOWN_SCORES.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, scores in rows:
        style = "bold green" if name == best else None
        table.add_row(name, *(score(scores.get(key)) for key in SHOWN_SCORES), style=style)
    return table


def evaluation_table(title: str, name: str, evaluation: Evaluation) -> Table:
    rows = [("the model itself", evaluation.before), (name, evaluation.after)]
    return scores_table(f"{title}: {evaluation.row_count} rows, {evaluation.level:.0%} intervals", rows)


def revisions_table(revisions: Iterable[Revision]) -> Table:
    """Revisions with their held-out log loss and ECE, before and after; the active one marked."""
    table = Table()
    table.add_column("revision", no_wrap=True)
    for heading in ("params", "rows", "log loss", "ECE", "made (UTC)"):
        table.add_column(heading)
    for revision in revisions:
        name = f"[bold green]{revision.revision} (active)[/]" if revision.active else revision.revision
        params = ", ".join(f"{name}={value}" for name, value in revision.params.items())
        changes = (_change(revision.held_out, key) for key in ("log_loss", "expected_calibration_error"))
        made = revision.create_time.strftime("%Y-%m-%d %H:%M")
        table.add_row(name, params, str(revision.row_count), *changes, made)
    return table


def ranking_table(candidates: Iterable[Candidate]) -> Table:
    """What kind "auto" compared: cross-validated scores, and the gain over temperature scaling with its error."""
    table = Table(
        title="cross-validated; gain: log loss saved against temperature scaling",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("kind", no_wrap=True)
    for heading in ("log loss", "gain", "Brier", "ECE", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in candidates:
        if candidate.skipped:
            table.add_row(candidate.kind, "[dim]skipped[/]", style="dim")
            continue
        values = (f"{candidate.scores[key].value:.4f}" for key in ("brier_score", "expected_calibration_error"))
        gain = "{:+.4f} ± {:.4f}".format(*candidate.gain)
        table.add_row(
            candidate.kind, f"{candidate.scores['log_loss'].value:.4f}", gain, *values, f"{candidate.seconds:.1f}"
        )
    return table


def _change(evaluation: Evaluation | None, key: str) -> str:
    if evaluation is None:
        return "not scored"
    return f"{evaluation.before[key].value:.4f} -> {evaluation.after[key].value:.4f}"


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
    table.add_column(overflow="fold")
    rows = {
        "output": inspection.output,
        "logits": f"{inspection.logits.tensor} ({inspection.logits.form})",
        "  because": inspection.logits.reason,
        "features": inspection.features or "none",
        "  because ": inspection.features_reason,
        "classes": str(inspection.n_classes or "not known before a run"),
    }
    for what, found in rows.items():
        table.add_row(what, escape(found))
    return table


def counts_table(what: str, counts: Mapping[str, int]) -> Table:
    table = Table()
    table.add_column(what)
    table.add_column("how many", justify="right")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    return table


def online_tables(state: OnlineState) -> tuple[Table, Table]:
    """What an online revision has learned, and the states that it can be rolled back to."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in (
        ("revision", f"[bold]{state.revision}[/]{' (suspended)' if state.suspended else ''}"),
        ("serving", f"state {state.serving}"),
        ("newest", f"state {state.newest}{f', refused: {state.refused}' if state.refused else ''}"),
        *((name.replace("_", " "), str(count)) for name, count in state.rows.items()),
        ("waiting", str(state.waiting)),
        ("published, refused", f"{state.published}, {state.refused_count}"),
        (
            "log loss: newest, best, start",
            ", ".join(f"{loss:.4f}" for loss in (state.newest_log_loss, state.best_log_loss, state.start_log_loss)),
        ),
        ("gain over the start, half Brier", score(state.gain)),
    ):
        table.add_row(name, value)
    kept = Table("kept state", "labels", "time")
    for one in state.kept:
        kept.add_row(str(one.online_state), str(one.learned), f"{one.time:%Y-%m-%d %H:%M:%S}")
    return table, kept


def shadows_table(shadows: Iterable[Shadow]) -> Table:
    """Challengers: how each stands, or stood."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("challenger", "champion", "labels", "gain, half Brier", "verdict", "shadow"):
        table.add_column(heading, justify="right" if heading == "labels" else "left", no_wrap=heading == "challenger")
    for shadow in shadows:
        verdict = f"[bold]{shadow.verdict}[/]" if shadow.verdict != "undecided" else shadow.verdict
        outcome = shadow.policy if shadow.outcome == "running" else shadow.outcome
        table.add_row(shadow.revision, shadow.champion, f"{shadow.labels:,}", score(shadow.gain), verdict, outcome)
    return table


def shadow_table(shadow: Shadow) -> Table:
    """Everything about one challenger."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in (
        ("challenger", f"[bold]{shadow.revision}[/]"),
        ("champion", f"{shadow.champion}, since {shadow.compared_since:%Y-%m-%d %H:%M:%S}"),
        ("policy", f"{shadow.policy}, from {shadow.least_labels} labels on"),
        ("run on a share of", f"{shadow.share:g}" if shadow.share else "none: from kept logits"),
        ("gain, half Brier", score(shadow.gain)),
        ("  holds at all times", f"{shadow.level:g}"),
        ("gain, log loss", f"{shadow.log_loss_gain:.4f}"),
        (
            "verdict",
            shadow.verdict + (f", since {shadow.verdict_time:%Y-%m-%d %H:%M:%S}" if shadow.verdict_time else ""),
        ),
        ("producers who contest it", str(shadow.contesting)),
        *((name.replace("_", " "), str(count)) for name, count in shadow.rows.items()),
        ("started by", shadow.started_by or "anybody"),
        ("outcome", shadow.outcome + (f" by {shadow.ended_by or 'anybody'}" if shadow.end_time else "")),
        ("note", escape(shadow.note)),
    ):
        table.add_row(name, value)
    return table


def monitors_table(monitors: Iterable[Monitor]) -> Table:
    """How far each monitor is from ringing."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("monitor", no_wrap=True)
    table.add_column("statistic and threshold", no_wrap=True)
    for heading in ("rows", "missing", "late"):
        table.add_column(heading, justify="right")
    table.add_column("if it rings")
    for monitor in monitors:
        name = f"[bold red]{monitor.name}[/]" if monitor.alarms else f"[bold]{monitor.name}[/]"
        what = f"\n[dim]{monitor.detector}, {monitor.watched}{', default' if monitor.is_default else ''}[/]"
        table.add_row(
            name + what,
            _bar(monitor),
            *(f"{count:,}" for count in (monitor.rows, monitor.missing, monitor.late)),
            monitor.policy.replace("_", " "),
        )
    return table


def nowcasts_table(nowcasts: Mapping[str, Nowcast]) -> Table:
    """What is served now, as far as it is known."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("now", "95 % interval", "labels", "rows", ""):
        table.add_column(heading)
    for name, now in nowcasts.items():
        known = now.estimate == now.estimate  # NaN: there is none
        figure = f"{now.estimate:.3f}" if known else ""
        interval = f"{now.low:.3f}–{now.high:.3f}" if known else ""
        style = None if now.valid else "dim"
        counts = (f"{count:,}" for count in (now.labels, now.rows))
        table.add_row(f"{name.replace('_', ' ')} {figure}", interval, *counts, escape(now.why_not), style=style)
    return table


def _bar(monitor: Monitor, width: int = 20) -> str:
    """The statistic as a part of the threshold."""
    if not monitor.ready:
        return "[dim]gathers its reference[/]"
    share = min(1.0, max(0.0, monitor.statistic / monitor.threshold)) if monitor.threshold > 0 else 0.0
    full = round(width * share)
    colour = "green" if share < 0.5 else "yellow" if share < 1 else "red"
    bar = f"[{colour}]{'━' * full}[/][dim]{'━' * (width - full)}[/]"
    return f"{bar}\n{monitor.statistic:.2f} of {monitor.threshold:.2f}"


def alarms_table(alarms: Iterable[Alarm]) -> Table:
    """Alarms with their causes; those that nobody has acknowledged stand out."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_lines=True)
    for heading in ("alarm", "monitor", "since (UTC)"):
        table.add_column(heading, no_wrap=True)
    table.add_column("cause, what was done, what to do", overflow="fold")
    for alarm in alarms:
        seen = f"[dim]seen by {escape(alarm.acknowledged_by)}[/]" if alarm.acknowledge_time else "[red]open[/]"
        again = f"\nrang {alarm.repeats} times more" if alarm.repeats else ""
        since = f"{alarm.change_time:%Y-%m-%d %H:%M:%S}\n[dim]{alarm.change_rows:,} rows before[/]"
        table.add_row(
            f"{alarm.alarm}\n{seen}{again}", f"{alarm.monitor}\n[dim]{alarm.revision}[/]", since, _cause(alarm)
        )
    return table


def _cause(alarm: Alarm) -> str:
    lines = [] if alarm.outcome == "told" else [f"{alarm.policy.replace('_', ' ')}: {alarm.outcome}"]
    if alarm.cause is not None:
        where = f" in {alarm.cause.where}" if alarm.cause.where else ""
        lines = [f"{alarm.cause.kind.replace('_', ' ')}{where}", *alarm.cause.evidence, *lines, alarm.cause.action]
    return escape("\n".join(lines))


def journal_table(contents: Iterable[Contents]) -> Table:
    """What the journal has of each model."""
    table = Table()
    for heading in ("model", "predictions", "labels", "conflicts", "lost", "from (UTC)", "to (UTC)"):
        table.add_column(heading, justify="right" if heading[0] in "plc" else "left")
    for found in contents:
        counts = (f"{count:,}" for count in (found.predictions, found.labels, found.conflicts, found.lost))
        times = (
            f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M}" for ms in (found.oldest_ms, found.newest_ms)
        )
        table.add_row(found.model, *counts, *times)
    return table


def layers_table(model: onnx.ModelProto, inspection: Inspection) -> Table:
    """The layers that calibrators may read, what each costs, and which are read where nobody names any."""
    layers, products = find_layers(model, inspection), multiply_adds(model)
    read = {layer.tensor for layer in default_layers(layers)} if not inspection.layers else {*inspection.layers}
    whole = f", of {products:,} products a row" if products else ""
    table = Table(title=f"layers{whole}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("tensor", "shape", "width", "products a row and 1,000 reference rows", "because"):
        table.add_column(heading, overflow="fold")
    found = {layer.tensor for layer in layers}
    named = [name for name in inspection.layers if name not in found]
    for layer in [*layers, *named_layers(model, inspection, named)]:
        shape = ", ".join(str(size or "?") for size in layer.shape)
        share = f" ({1000 * layer.width / products:.1%} of the model)" if products else ""
        name = f"[bold]{escape(layer.tensor)}[/]" if layer.tensor in read else escape(layer.tensor)
        table.add_row(name, escape(f"[{shape}]"), str(layer.width), f"{1000 * layer.width:,}{share}", layer.reason)
    table.caption = "density_aware reads the bold ones unless told otherwise"
    return table


def tokens_table(tokens: Iterable[Token]) -> Table:
    """What each token is for, and until when; never its hash."""
    table = Table()
    for heading in ("token", "roles", "models", "expires (UTC)"):
        table.add_column(heading)
    for token in tokens:
        expires = "never" if token.expires is None else f"{token.expires.astimezone(UTC):%Y-%m-%d %H:%M}"
        table.add_row(token.name, ", ".join(sorted(token.roles)), escape(", ".join(token.models)), expires)
    return table
