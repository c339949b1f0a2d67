"""What finished experiments have in common, and how their models rank: the content of the page and of --json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pydantic import ConfigDict

from emomerge.errors import BadInput
from emomerge.reporting.comparison.ranks import Ranking, rank_models
from emomerge.reporting.table import middle_radius
from emomerge.reporting.text import decimals, fixed, short
from emomerge.results import ArtefactRow, HeldOut, Number, Part, Results, Role, Shown

SOURCE = ("kind", "train", "validation", "test", "eval_fraction", "limit", "seed", "split_seed")
"""Fields of a recipe's task that say which rows are the test rows."""


class Described(Part):
    """Base class of the parts of a comparison; the docstrings of fields are their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Contender(Described):
    """A model of one of the experiments and its place among those that were measured on the same rows."""

    run: Shown
    """The experiment: the name of its folder, or the path where two have the same name."""
    model: Shown
    role: Role
    path: Shown | None
    recommended: bool
    """Whether the experiment's own report says to use it."""
    test_loss: Number
    rank: int | None
    """By mean loss, from 1; null if the model diverged."""
    rank_low: int | None
    """The best rank that the rows do not exclude."""
    rank_high: int | None
    difference: Number
    """Loss minus that of the first; paired over the rows."""
    difference_low: Number
    """Bounds of its 95 % interval, which holds for all pairs of the table together."""
    difference_high: Number
    accuracy: Number = None
    sharpness: Number = None
    cpu_seconds: Number = None
    distance: Number = None


class Group(Described):
    """Experiments whose models were measured on the same test rows."""

    runs: tuple[Shown, ...]
    about: Shown
    unit: Shown
    rows: int | None
    radius: float | None
    """σ of the sharpness, if all experiments measured it there on the same kind of rows."""
    recommended: tuple[Contender, ...]
    """The model that each experiment recommends, best first, ranked among themselves."""
    models: tuple[Contender, ...]
    """All models, best first, ranked among all."""


class Comparison(Described):
    """Output of `emomerge report` of several experiments."""

    out: Shown = ""
    """The page."""
    advice: tuple[Shown, ...]
    groups: tuple[Group, ...]
    notes: tuple[Shown, ...]
    """What is not comparable, and what the comparison does not tell."""


def compare(experiments: Mapping[str, Results]) -> Comparison:
    """Compare experiments that were measured on the same test rows; others form groups of their own.

    Args:
        experiments: name → results; at least two.

    Raises:
        BadInput: results lack the losses of the single rows, or no two experiments share their test rows.
    """
    groups, notes = _grouped(experiments)
    if all(len(names) == 1 for names in groups):
        raise BadInput(
            "no two of these experiments can be compared", found="; ".join(notes),
            expected="two or more that were measured on the same test rows",
            fix="give their recipes the same data, split and probe.batch_size",
        )  # fmt: skip
    made = tuple(_group({name: experiments[name] for name in names}) for names in groups)
    advice = tuple(sentence for group in made if len(group.runs) > 1 for sentence in _advice(group, len(made) > 1))
    for names in groups:
        notes += _differences({name: experiments[name] for name in names})
    return Comparison(advice=advice, groups=made, notes=(*notes, *_limits(made)))


# Which experiments can be compared -------------------------------------------------------------------------------------


def _grouped(experiments: Mapping[str, Results]) -> tuple[list[list[str]], list[str]]:
    """Return the names of comparable experiments, group by group, and what is not comparable and why."""
    groups: list[list[str]] = []
    notes = []
    for name, results in experiments.items():
        why = ""
        for group in groups:
            first = experiments[group[0]]
            why = _obstacle(first, results, group[0], name)
            if not why:
                group.append(name)
                break
            notes.append(f"Not comparable: {why}")
        else:
            groups.append([name])
            continue
        if _losses(results, name).rows != _losses(first, group[0]).rows:
            notes.append(
                f"{group[0]} and {name} have the same test rows and labels, but their models read them differently "
                "(tokenizer, length or transform)."
            )
    return groups, list(dict.fromkeys(notes))


def _losses(results: Results, name: str) -> HeldOut:
    if results.held_out is None:
        raise BadInput(
            "results without the losses of single rows", where=f"{name}/results.json",
            fix="delete that file and run the recipe again; its evaluations are remembered",
        )  # fmt: skip
    return results.held_out


def _obstacle(first: Results, second: Results, one: str, other: str) -> str:
    """Return why two experiments cannot be compared; nothing if they can."""
    here, there = _losses(first, one), _losses(second, other)
    kinds = [_source(results).get("kind") for results in (first, second)]
    units = [results.data.unit if results.data else "nats" for results in (first, second)]
    if kinds[0] != kinds[1] or units[0] != units[1]:
        tasks = [kind or "another task" for kind in kinds]
        return f"{one} is {tasks[0]} in {units[0]}, {other} is {tasks[1]} in {units[1]}."
    labels = here.labels is not None and here.labels == there.labels and _source(first) == _source(second)
    if here.rows != there.rows and not labels:
        counts = [results.data.rows.test if results.data else len(_losses(results, "").weights) for results in (first, second)]
        return f"{other} was measured on other test rows ({counts[1]:,}) than {one} ({counts[0]:,})."
    if here.weights != there.weights:
        return f"{one} and {other} cut the test rows into different batches; give their recipes the same probe.batch_size."
    return ""


def _source(results: Results) -> dict[str, object]:
    task = results.recipe.get("task")
    return {key: task[key] for key in SOURCE if key in task} if isinstance(task, dict) else {}


def _differences(group: Mapping[str, Results]) -> list[str]:
    """Say which experiments differ in the training seed only."""
    names = list(group)

    def without_seeds(results: Results) -> str:
        plain = json.loads(json.dumps(results.recipe))
        plain.pop("name", None)
        if isinstance(plain.get("runs"), dict):
            plain["runs"].pop("seeds", None)
        return json.dumps(plain, sort_keys=True)

    alike: dict[str, list[str]] = {}
    for name in names:
        if group[name].recipe:
            alike.setdefault(without_seeds(group[name]), []).append(name)
    return [
        f"{', '.join(same)} are trainings of one recipe: the differences between them are those that chance makes."
        for same in alike.values()
        if len(same) > 1
    ]


# Ranks ----------------------------------------------------------------------------------------------------------------


def _group(experiments: Mapping[str, Results]) -> Group:
    """Rank the models of comparable experiments."""
    first = next(iter(experiments.values()))
    radii = {middle_radius(results) for results in experiments.values()}
    data = {results.probe.data if results.probe else None for results in experiments.values()}
    radius = radii.pop() if len(radii) == 1 and len(data) == 1 else None
    chosen, everything = [], []
    for name, results in experiments.items():
        known = _losses(results, name).losses
        best = recommended(results)
        chosen += [(name, results, best)] if best.name in known else []
        everything += [(name, results, row) for row in results.artefacts if row.name in known]
    return Group(
        runs=tuple(experiments), about=first.data.summary if first.data else first.name,
        unit=first.data.unit if first.data else "nats", rows=first.data.rows.test if first.data else None, radius=radius,
        recommended=_ranked(chosen, radius), models=_ranked(everything, radius),
    )  # fmt: skip


def recommended(results: Results) -> ArtefactRow:
    """Return the model that the experiment's report says to use; without one, that of the verdict or of the lowest loss."""
    rows = {row.name: row for row in results.artefacts}
    for name in (results.selected and results.selected.name, results.verdict and results.verdict.merge):
        if name is not None and name in rows:
            return rows[name]
    losses = {row.name: row.loss("validation") for row in results.artefacts if row.role != "base"}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return rows[min(known, key=known.__getitem__, default=results.artefacts[0].name)]


def _ranked(entries: Sequence[tuple[str, Results, ArtefactRow]], radius: float | None) -> tuple[Contender, ...]:
    whole = [entry for entry in entries if None not in _of(entry)]
    found: list[Contender] = []
    if whole:
        weights = _losses(whole[0][1], whole[0][0]).weights
        ranking = rank_models([[loss for loss in _of(entry) if loss is not None] for entry in whole], weights)
        best = int(ranking.mean.argmin())
        order = sorted(range(len(whole)), key=lambda i: float(ranking.mean[i]))
        found = [_contender(whole[i], radius, ranking, i, best) for i in order]
    return tuple(found + [_contender(entry, radius) for entry in entries if None in _of(entry)])


def _of(entry: tuple[str, Results, ArtefactRow]) -> tuple[float | None, ...]:
    name, results, row = entry
    return _losses(results, name).losses[row.name]


def _contender(
    entry: tuple[str, Results, ArtefactRow], radius: float | None, ranking: Ranking | None = None, index: int = 0, best: int = 0
) -> Contender:
    name, results, row = entry
    place: dict[str, object] = dict.fromkeys(("test_loss", "rank", "rank_low", "rank_high"))
    place |= dict.fromkeys(("difference", "difference_low", "difference_high"))
    if ranking is not None:
        estimate, low, high = ranking.difference(index, best)
        place = {
            "test_loss": float(ranking.mean[index]), "rank": int(ranking.rank[index]), "rank_low": int(ranking.low[index]),
            "rank_high": int(ranking.high[index]), "difference": estimate, "difference_low": low, "difference_high": high,
        }  # fmt: skip
    return Contender.model_validate(
        {
            "run": name, "model": row.name, "role": row.role, "path": row.path,
            "recommended": row.name == recommended(results).name, "accuracy": row.accuracy("test"),
            "sharpness": None if radius is None else row.mean(f"sharpness_{radius:g}"),
            "cpu_seconds": row.mean("cpu_seconds"), "distance": row.mean("distance"), **place,
        }
    )  # fmt: skip


# Advice ---------------------------------------------------------------------------------------------------------------


def _advice(group: Group, named: bool) -> list[str]:
    """Return what to do, for one group; `named` if the sentences must say which."""
    ranked = [found for found in group.recommended if found.rank is not None]
    start = f"Of {', '.join(group.runs)}: " if named else ""
    if len(ranked) < 2:
        return [f"{start}Too few models have a finite loss to be compared."]
    best, *others = ranked
    open_to_first = [found for found in ranked if found.rank_low == 1]
    if len(open_to_first) == 1:
        places = decimals([others[0].difference], 3)
        figures = (others[0].difference, others[0].difference_low, others[0].difference_high)
        distance, low, high = (fixed(figure, places) for figure in figures)
        return [
            f"{start}{'use' if start else 'Use'} {best.model} of {best.run}. Its test loss, {short(best.test_loss, 4)} "
            f"{group.unit}, is lower than that of every other experiment's model; the next, {others[0].model} of "
            f"{others[0].run}, is {distance} [{low}, {high}] higher."
        ]
    named_models = ", ".join(f"{found.model} of {found.run}" for found in open_to_first)
    rows = f" by {group.rows:,} test rows" if group.rows else ""
    sentences = [f"{start}{named_models} cannot be told apart{rows}: each of them may be the best."]
    costs = {found: found.cpu_seconds for found in open_to_first if found.cpu_seconds is not None}
    if len(costs) == len(open_to_first) and len(set(costs.values())) > 1:
        cheapest = min(open_to_first, key=lambda found: found.cpu_seconds or 0)
        sentences[0] += (
            f" The cheapest to train was {cheapest.model} of {cheapest.run}: {short(cheapest.cpu_seconds)} CPU seconds."
        )
    half = max(((found.difference_high or 0) - (found.difference_low or 0)) / 2 for found in open_to_first)
    sentences.append(
        f"A difference of test loss below about {short(half, 1)} {group.unit} cannot be told from chance here: hold out "
        "more rows (task.eval_fraction), or train every recipe with several seeds."
    )
    return sentences


def _limits(groups: Sequence[Group]) -> list[str]:
    found = [
        "The intervals cover the choice of test rows, not that of another training: one training per recipe says little about "
        "the recipe."
    ]
    if any(len(group.runs) > 1 for group in groups):
        found.append(
            "A model chosen by this table looks a little better than it is, because it was chosen on the test rows; measure it "
            "on rows that no experiment has seen before you quote its loss."
        )
    return found
