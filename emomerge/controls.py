"""The controls: comparisons that a merge must win before it is called better or flatter. One entry each.

An entry holds the text for reports and the claim in which the control is a rival; `experiment` makes the controls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Claim: TypeAlias = Literal["better", "flatter"]
SINGLE_RUN, PLAIN_MEAN = "best single run", "plain mean"
"""Labels of the two rivals that are artefacts of the recipe, a run and a merge, rather than controls."""


@dataclass(frozen=True)
class Control:
    """A kind of control."""

    label: str
    """Label in the verdict's evidence."""
    meaning: str
    """What the control is and what it guards against: a phrase without a full stop."""
    symbol: str
    """Symbol in figures: Vega's name, or an SVG path."""
    area: int
    """Size of the symbol in square pixels."""
    rival_in: Claim
    """The claim for which the control is a rival: `better` (held-out loss) or `flatter` (sharpness)."""
    required: bool = False
    """Whether the claim cannot be shown without it."""
    made_from: str | None = None
    """The control that it is made from without further training."""


PLUS = "M-.3,-1H.3V-.3H1V.3H.3V1H-.3V.3H-1V-.3H-.3Z"
STAR = "M0,-1.1L.26,-.36L1.05,-.34L.42,.14L.65,.89L0,.45L-.65,.89L-.42,.14L-1.05,-.34L-.26,-.36Z"
HOURGLASS = "M-.8,-.9L.8,-.9L-.8,.9L.8,.9Z"

CONTROLS: Mapping[str, Control] = {
    "adamw-sweep": Control(
        "AdamW sweep",
        "the best of as many AdamW runs as the merge has, equally long, at logarithmically spaced peak rates, chosen by "
        "validation loss: what one does without knowing the rate",
        "cross", 70, "better", required=True,
    ),
    "adamw-soup": Control(
        "soup of the AdamW sweep",
        "the greedy soup of the sweep's runs, chosen by validation loss (Wortsman et al. 2022)",
        "M0,-1L.95,-.31L.59,.81L-.59,.81L-.95,-.31Z", 70, "better", made_from="adamw-sweep",
    ),
    "distance-matched": Control(
        "distance-matched",
        "the best run's task vector rescaled to the merge's length: is the merge flatter, or merely nearer to the base?",
        "triangle-up", 60, "flatter", required=True,
    ),
    "loss-matched": Control(
        "loss-matched",
        "the snapshot of the long run whose training loss is nearest to the merge's: is the merge flatter, or merely less "
        "far learnt?",
        "triangle-down", 60, "flatter", required=True, made_from="long-run",
    ),
    "long-run": Control(
        "long run of equal steps",
        "the best single run's optimizer with the steps of all runs together, stopped where its validation loss was lowest",
        "triangle-right", 60, "better", required=True,
    ),
    "adamw-long-run": Control(
        "AdamW with cosine, equal steps",
        "AdamW with cosine decay and the steps of all runs together, stopped where its validation loss was lowest",
        HOURGLASS, 70, "better",
    ),
    "adamw-large-batch": Control(
        "AdamW with larger batches",
        "AdamW with cosine decay and the steps of one run, each on as many rows as the steps of all runs together",
        PLUS, 70, "better",
    ),
    "adamw-average": Control(
        "average of AdamW runs",
        "the plain mean of AdamW runs, as many and as long as the merge's own",
        "triangle-left", 60, "better",
    ),
    "swa": Control(
        "SWA of the long run",
        "the mean of the long run's snapshots from its second half (stochastic weight averaging)",
        STAR, 70, "better", made_from="long-run",
    ),
}  # fmt: skip
"""Kind → control, in the order of evidence, tables and legends."""
