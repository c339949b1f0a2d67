"""The claim that nodes need no synchronisation: each trains on its shard, and the results are merged afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_merging import ABOUT, SHALLOW, Member, Run, State, Task, mean_weights, task
from claims_merging_charts import dot, dots
from claims_training import FIVE, OURS, PUBLISHED, Diverged, Rows, batches
from evidence_tables import Estimate

from emomerge.optim import OPTIMIZERS

NODES = 5
MEETING = 10
"""Steps between meetings of nodes that average their weights."""
RATES = (3e-3, 1e-2)
CASES = {
    ("strong", "random"): "FashionMNIST, 11,000 rows a node",
    ("strong", "classes"): "FashionMNIST, two classes a node",
}
SCHEMES = ("independent, mean", "independent, tall-mask", "alone", "meeting", "synchronous")
MERGED = SCHEMES[:2]


def shards(rows: Rows, split: str, seed: int) -> list[Rows]:
    """Return each node's rows: drawn at random, or two classes each."""
    if split == "classes":
        order = rows.y.argsort(stable=True)
    else:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows.of(part) for part in order.tensor_split(NODES)]


def chosen(units: Units, case: tuple[str, str], preset: str | None, figure: str) -> Arm:
    """Return what trains, chosen by a figure on validation data: of a preset, or of AdamW's rates."""
    arms = [arm for arm in units.arms() if (arm["task"], arm["split"]) == case and arm.get("preset") == preset]
    return units.best(f"{figure} validation", arms)


def compare(units: Units, first: tuple[Arm, str], second: tuple[Arm, str]) -> Estimate:
    """Return first − second of the test loss, each an arm and a scheme, paired by seed."""
    a, b = ({u.seed: u.figures[f"{scheme} test"] for u in units.of(**arm)} for arm, scheme in (first, second))
    return Estimate(tuple((a[s] if a[s] is not None else float("inf")) - b[s] for s in sorted(a) if b[s] is not None))


def judge_nodes(units: Units) -> Verdict:
    rows = [["shards, nodes' optimizer", "nodes", *SCHEMES, "merged − synchronous", "merged − alone"]]
    to_synchronous, to_alone = [], []
    for case, title in CASES.items():
        for preset in (PUBLISHED, OURS, None):
            by_scheme = {scheme: chosen(units, case, preset, scheme) for scheme in SCHEMES}
            merged = min(MERGED, key=lambda s: units.estimate(f"{s} validation", **by_scheme[s]).mean)
            pair = [compare(units, (by_scheme[merged], merged), (by_scheme[s], s)) for s in ("synchronous", "alone")]
            if preset is not None:
                to_synchronous.append(pair[0])
                to_alone.append(pair[1])
            losses = [_loss(units, by_scheme[s], s) for s in SCHEMES]
            name = f"`{preset}`" if preset else "AdamW, rate tuned"
            rows.append([f"{title}, {name}", _nodes(by_scheme[merged]), *losses, *map(interval_text, pair)])
    flags = [a.sign <= 0 and b.sign < 0 for a, b in zip(to_synchronous, to_alone, strict=True)]
    text = (
        f"Independent nodes, merged afterwards, have a higher test loss than synchronous data parallelism in "
        f"{counted(d.sign > 0 for d in to_synchronous)} cases, a lower one in {counted(d.sign < 0 for d in to_synchronous)}; "
        f"against one node alone on its shard a lower one in {counted(d.sign < 0 for d in to_alone)}, a higher one in "
        f"{counted(d.sign > 0 for d in to_alone)}."
    )
    notes = (
        f"Test loss; {NODES} nodes, {SHALLOW} steps each. Synchronous: gradients averaged over the nodes in every step, as "
        f"many steps. Meeting: weights averaged every {MEETING} steps. Alone: mean over the nodes. In each cell the optimizer "
        "(for AdamW its rate) is the best for that scheme on validation data; “nodes” names it for the merge. "
        f"{ABOUT}"
    )
    return Verdict(worded(flags), text, rows, notes)


def _loss(units: Units, arm: Arm, scheme: str) -> str:
    mean = units.estimate(f"{scheme} test", **arm).mean
    return f"{mean:.3f}" if mean < float("inf") else ""


def _nodes(arm: Arm) -> str:
    if arm["set"] == "adamw":
        return f"{arm['rate']:g}"
    return "the five" if arm["set"] == "five" else f"{OPTIMIZERS[arm['set']].class_name} ×5"


def draw_nodes(units: Units) -> Any:
    rows = []
    for case, title in CASES.items():
        for preset, kind in ((PUBLISHED, "v3.8"), (OURS, "auto"), (None, "AdamW, rate tuned")):
            for scheme in SCHEMES:
                arm = chosen(units, case, preset, scheme)
                rows.append(dot(f"{scheme} · {kind}", kind, title, units.estimate(f"{scheme} test", **arm)))
    return dots(rows, ["Five nodes: merged once at the end, meeting every ten steps, and synchronous"], "test loss", log=True)


@claim(
    name="nodes",
    says="“Distributed learning enables ‘no synchronization required’ with other nodes”: they train on their own, and what "
    "they learned is merged.",
    source="README, main features",
    control="The same five nodes with synchronous data parallelism at the same number of steps, and each node alone on its "
    "shard. It would hold if the merge were never worse than synchronous training and always better than a node alone, with "
    "both presets and for both kinds of shards. AdamW in the same schemes shows whether that is special to emo.",
    taught="Nodes should meet: weights averaged every ten steps are better than one merge at the end in every case, with AdamW "
    "as with the five, and still behind gradients averaged in every step. emomerge's default procedure meets in rounds; on a "
    "cluster, runs of one seed meet too.",
    arms=[
        {"task": name, "split": split, **arm}
        for name, split in CASES
        for arm in (
            *({"set": x, "preset": preset} for preset in (PUBLISHED, OURS) for x in (*FIVE, "five")),
            *({"set": "adamw", "rate": rate} for rate in RATES),
        )
    ],
    judge=judge_nodes,
    figure=draw_nodes,
)
def nodes(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Losses of the five schemes."""
    of, steps = task(arm["task"], effort), effort.steps(SHALLOW)
    parts = shards(of.train, arm["split"], seed)
    names = FIVE if arm["set"] == "five" else [arm["set"]] * NODES
    rules = [name if name == "adamw" else f"{name}/{arm['preset']}" for name in names]
    members = [Member(rule, order, arm.get("rate")) for order, rule in enumerate(rules)]
    figures: Figures = {f"{scheme} {split}": None for scheme in SCHEMES for split in ("validation", "test")}

    def note(scheme: str, losses: Sequence[float | None]) -> None:
        figures[f"{scheme} validation"], figures[f"{scheme} test"] = losses

    try:
        states = _independent(of, members, parts, seed, steps, meeting=None)
        note("independent, mean", of.losses(of.merge(states, "mean")))
        note("independent, tall-mask", of.losses(of.merge(states, "tall-mask")))
        alone = [of.losses(state) for state in states]
        note("alone", [None if None in column else sum(column) / NODES for column in zip(*alone, strict=True)])  # type: ignore[arg-type]
        if arm.get("preset") != PUBLISHED:  # ours, and AdamW
            note("meeting", of.losses(of.merge(_independent(of, members, parts, seed, steps, meeting=MEETING), "mean")))
        if arm["set"] != "five":  # gradients are averaged for one optimizer
            note("synchronous", of.losses(_synchronous(of, members[0], parts, seed, steps)))
    except Diverged:
        pass
    return figures


def _independent(
    of: Task, members: Sequence[Member], parts: Sequence[Rows], seed: int, steps: int, *, meeting: int | None
) -> list[State]:
    """Train each node on its shard; with `meeting`, all go on from the mean of their weights every so many steps."""
    runs = [Run(of, member, seed, steps, rows=rows) for member, rows in zip(members, parts, strict=True)]
    period = meeting or steps
    for _ in range(steps // period):
        for run in runs:
            run.advance(period)
        if meeting is not None:
            mean = mean_weights(runs)
            for run in runs:
                run.set_weights(mean)
    return [run.state for run in runs]


def _synchronous(of: Task, member: Member, parts: Sequence[Rows], seed: int, steps: int) -> State:
    """Train one model on the mean of the nodes' gradients: batches of each shard, put together."""
    run, size = Run(of, member, seed, steps), of.setting.batch
    streams = [batches(len(rows), size, steps, 100 * seed + order) for order, rows in enumerate(parts)]
    for _ in range(steps):
        drawn = [rows.of(next(stream)) for rows, stream in zip(parts, streams, strict=True)]
        x, y = torch.cat([rows.x for rows in drawn]), torch.cat([rows.y for rows in drawn])
        run.trainer.step(F.cross_entropy(run.network(x), y))
    return run.state
