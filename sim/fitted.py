"""What must be said of a node that was fitted to measurements: changed numbers, old or foreign measurements."""

from __future__ import annotations

import re
from datetime import date

from sim.spec import NodeSpec

STALE_DAYS = 180
# What conditions and results name where there is no GPU.
NO_GPU = "none"


def fit_notes(node: NodeSpec, today: date | None = None) -> tuple[str, ...]:
    """One line for each thing that makes a fitted node less than it seems; none for a node that was not fitted. Without
    `today` the age of the measurements is not looked at."""
    fit = node.fit
    if fit is None:
        return ()
    notes = []
    if fit.digest != node.numbers_digest:
        notes.append(f"node {node.name}: numbers were changed after they were fitted on {fit.date}")
    if not same_gpu(fit.gpu, node.device.name):
        where = machine_words(fit.gpu)
        notes.append(f"node {node.name}: foreign measurements, of {where}, where the node is {node.device.name}")
    if today is not None and (age := age_days(fit.date, today)) is not None and age > STALE_DAYS:
        notes.append(f"node {node.name}: stale measurements, {age} days old ({fit.date}); measure again")
    return tuple(notes)


def age_days(measured: str, today: date) -> int | None:
    """Days since a date in ISO form; None if it is none."""
    try:
        return (today - date.fromisoformat(measured[:10])).days
    except ValueError:
        return None


def same_gpu(measured: str, device: str) -> bool:
    """Whether two names can mean the same GPU: they share a model such as H200, or are equal."""
    one, two = ({w for w in re.split(r"[^a-z0-9]+", name.lower()) if w} for name in (measured, device))
    models = [{w for w in words if re.match(r"(?!sxm)[a-z]+\d", w)} for words in (one, two)]
    return bool(models[0] & models[1]) or one == two


def machine_words(gpu: str) -> str:
    """What measurements and runs were made on."""
    return "CPU processes" if gpu == NO_GPU else gpu
