"""What the page says, section by section, in the order a reader asks."""

import shlex
from collections.abc import Sequence
from typing import TypeVar

from gptcli import __version__
from gptcli.config.derived import explicit_settings
from gptcli.formatting import count, duration, loss, perplexity, plural, size
from gptcli.formatting import scored as scored_part
from gptcli.plotting.report import markup
from gptcli.plotting.report.charts import Chart
from gptcli.plotting.report.markup import escaped
from gptcli.runs.record import Evaluation, RunHistory, TextSample

_MOST_SAMPLES = 60
_SAMPLES_OPEN = 6
_MOST_OF_IT = 0.9
_MOST_ROWS_OPEN = 15
_AXES = (("steps", "steps"), ("tokens", "tokens"), ("time", "time"))

Item = TypeVar("Item")


def body(run: RunHistory, charts: Sequence[Chart], now: str) -> str:
    """Return everything between the page's head and its script."""
    parts = [
        _head(run),
        _summary(run),
        _curves(charts),
        _evaluations(run),
        _samples(run),
        _time(run),
        _settings(run),
        _data(run),
        _environment(run),
        _checkpoints(run),
        f"<footer>Written by gptcli {escaped(__version__)} at {escaped(now)} from"
        f" <code>{escaped(run.folder)}</code></footer>",
    ]
    return "\n".join(part for part in parts if part)


def _head(run: RunHistory) -> str:
    facts = run.facts
    lines = [f'<h1>{escaped(run.name)}<span class="state {_state_class(run)}">'
             f"{escaped(run.state)}</span></h1>"]  # fmt: skip
    if facts.created:
        lines.append(f'<p class="quiet">begun {escaped(facts.created)}</p>')
    if facts.command:
        lines.append(f"<p><code>gpt {escaped(shlex.join(facts.command))}</code></p>")
    if run.status.error:
        lines.append(f'<p class="bad">{escaped(run.status.error)}</p>')
    lines += [f'<p class="bad">note: {escaped(problem)}</p>' for problem in run.problems]
    return "\n".join(lines)


def _state_class(run: RunHistory) -> str:
    known = ("finished", "running", "stopped", "failed", "died")
    return run.state if run.state in known else "unknown"


def _summary(run: RunHistory) -> str:
    last = run.steps[-1] if run.steps else None
    scored = run.evaluations[-1] if run.evaluations else None
    of = f"of {run.max_steps:,}" if run.max_steps else ""
    passes = run.epochs_at(last.step) if last else None
    epochs = plural(passes, "epoch") if passes is not None else ""
    tiles = [("Steps", f"{run.step:,}", of)]
    if run.best is not None:
        best = run.best
        part = scored_part(run.eval_tokens, run.facts.data.tokens.val)
        at = f"at step {best.step:,}{part}"
        tiles.append(("Best validation loss", loss(best.val_loss), at))
        tiles.append(("Best perplexity", perplexity(best.val_loss), "per token"))
    if run.best_epoch is not None:
        epoch = run.best_epoch
        tiles.append(("Best epoch loss", loss(epoch.train_loss), f"at step {epoch.step:,}"))
    if scored is not None:
        if scored.val_loss is not None and scored is not run.best:
            tiles.append(("Last validation loss", loss(scored.val_loss), ""))
        tiles.append(("Last training loss", loss(scored.train_loss), "evaluated"))
    elif last is not None:
        tiles.append(("Last training loss", loss(last.loss), ""))
    if last is not None:
        tiles.append(("Tokens", count(last.tokens), epochs))
        tiles.append(("Wall time", duration(run.seconds), ""))
        tiles.append(("Tokens per second", count(last.tokens_per_second), "last logged"))
    if run.facts.parameters:
        tiles.append(("Parameters", count(run.facts.parameters), ""))
    cells = (
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}"
        f"{f'<small>{escaped(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _curves(charts: Sequence[Chart]) -> str:
    if not charts:
        return '<h2>Curves</h2>\n<p class="quiet">Nothing is logged yet.</p>'
    radios = "".join(
        f'<label><input type="radio" name="axis" value="{value}"'
        f"{' checked' if value == 'steps' else ''}> {name}</label>"
        for value, name in _AXES
    )
    figures = "\n".join(
        f"<figure><figcaption><b>{escaped(chart.title)}</b></figcaption></figure>"
        for chart in charts
    )
    return f"""<h2>Curves</h2>
<p id="error"></p>
<noscript><p class="bad">The curves are drawn by a script, and scripts are off.</p></noscript>
<div class="controls"><fieldset>{radios}</fieldset>
<label><input type="checkbox" name="smooth" checked> smoothed</label>
<label><input type="checkbox" name="log"> logarithmic loss</label></div>
<div class="charts">
{figures}
</div>"""


def _evaluations(run: RunHistory) -> str:
    if not run.evaluations and not run.epochs:
        return ""

    def row(one: Evaluation) -> tuple[str, ...]:
        star = " ★" if run.best is not None and one.step == run.best.step else ""
        tokens = count(run.tokens_at(one.step))
        return (f"{one.step:,}", tokens, loss(one.val_loss) + star,
                perplexity(one.val_loss), loss(one.train_loss))  # fmt: skip

    parts = ["<h2>Evaluations</h2>"]
    if run.evaluations:
        header = ("step", "tokens", "validation loss", "perplexity", "training loss")
        table = markup.table(header, [row(one) for one in reversed(run.evaluations)])
        parts.append(_folded(table, len(run.evaluations), "evaluations"))
    if run.epochs:
        rows = [(str(one.epoch), f"{one.step:,}", loss(one.train_loss))
                for one in reversed(run.epochs)]  # fmt: skip
        table = markup.table(("epoch", "step", "mean training loss"), rows)
        parts.append(_folded(table, len(run.epochs), "epochs"))
    return "\n".join(parts)


def _samples(run: RunHistory) -> str:
    if not run.samples:
        return ""
    shown = _spread(run.samples, _MOST_SAMPLES)
    left_out = len(run.samples) - len(shown)
    note = f'<p class="quiet">{len(shown)} of {len(run.samples)}</p>\n' if left_out else ""
    texts = [_sample(one, is_open=number == 0) for number, one in enumerate(reversed(shown))]
    earlier = "\n".join(texts[_SAMPLES_OPEN:])
    if earlier:
        n_earlier = len(texts) - _SAMPLES_OPEN
        earlier = (
            f'<details><summary class="quiet">{n_earlier} earlier</summary>\n{earlier}</details>'
        )
    return "<h2>Samples</h2>\n" + note + "\n".join(texts[:_SAMPLES_OPEN]) + earlier


def _sample(sample: TextSample, *, is_open: bool) -> str:
    # A parser drops a line break right after <pre>; the first one is for it.
    prompt = f"<b>{escaped(sample.prompt)}</b>" if sample.prompt else ""
    return (
        f"<details{' open' if is_open else ''}><summary>after step {sample.step:,}</summary>"
        f'<pre dir="auto">\n{prompt}{escaped(sample.text)}</pre></details>'
    )


def _time(run: RunHistory) -> str:
    total = sum(run.status.seconds_by_work.values())
    if not total:
        return ""
    rows = [
        (
            escaped(work),
            f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect width="{100 * seconds / total:.2f}" height="10"></rect></svg>',
            duration(seconds),
            f"{seconds / total:.1%}",
        )
        for work, seconds in sorted(run.status.seconds_by_work.items(), key=lambda item: -item[1])
    ]
    wall = run.seconds
    note = ""
    if total < _MOST_OF_IT * wall:  # a killed process tells nothing
        told, all_of_it = duration(total), duration(wall)
        note = f'<p class="quiet">{told} of {all_of_it} are accounted for</p>\n'
    return "<h2>Where the time went</h2>\n" + note + markup.table((), rows, "bars")


def _settings(run: RunHistory) -> str:
    if not run.settings:
        return ""
    changed = explicit_settings(run.settings, run.facts.given)
    everything = markup.facts((key, _value(value)) for key, value in run.settings.items())
    return (
        '<h2>Configuration</h2>\n<p class="quiet">What differs from the defaults</p>\n'
        + markup.facts((key, _value(value)) for key, value in changed.items())
        + f"<details><summary>all {len(run.settings)} settings</summary>{everything}</details>"
    )


def _value(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case "":
            return '""'
    return str(value)


def _data(run: RunHistory) -> str:
    data = run.facts.data
    counts = [
        (f"{name}, {split}", f"{number:,}")
        for name, pair in (("tokens", data.tokens), ("bytes of text", data.bytes))
        for split, number in (("training", pair.train), ("validation", pair.val))
        if number
    ]
    rows = [("source", data.source or ""), ("revision", data.revision or ""),
            ("folder", data.dir or ""), *counts, ("fingerprint", data.fingerprint or ""),
            ("tokenizer", run.settings.get("tokenizer.name") or ""),
            ("sha256 of the tokenizer", data.tokenizer or "")]  # fmt: skip
    return "<h2>Data</h2>\n" + markup.facts(rows)


def _environment(run: RunHistory) -> str:
    facts = run.facts
    settled = [(key, _value(run.settings[key])) for key in ("device", "dtype", "compile")
               if key in run.settings]  # fmt: skip
    origin = [(f"began from: {key}", _value(value)) for key, value in facts.origin.items()]
    rows = [("gptcli", facts.gptcli or ""), ("torch", facts.torch or ""),
            ("python", facts.python or ""), ("platform", facts.platform or ""),
            ("host", run.status.host or ""), ("threads", facts.threads or ""),
            *settled, *origin]  # fmt: skip
    return "<h2>Environment</h2>\n" + markup.facts(rows)


def _checkpoints(run: RunHistory) -> str:
    if not run.checkpoints:
        return ""
    rows = [(f"<code>{escaped(file.name)}</code>", size(file.n_bytes))
            for file in run.checkpoints]  # fmt: skip
    return "<h2>Checkpoints</h2>\n" + markup.table(("file", "size"), rows)


def _folded(table: str, n_rows: int, what: str) -> str:
    """Return a table; a long one is there when asked for."""
    if n_rows <= _MOST_ROWS_OPEN:
        return table
    return f"<details><summary>{n_rows:,} {what}</summary>{table}</details>"


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
