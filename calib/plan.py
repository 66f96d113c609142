"""From a recipe's ordered rules to the precision of every site: resolved once, then read by every later stage."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError
from s2p_deploy.records import ActPoint, PrecisionPlan, SitePlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.families import Site
    from s2p_deploy.recipe import Recipe, Rule

TEXT = "text"  # the word that matches every site that reads only the text
_DEFAULT = "default"


@dataclass(frozen=True)
class _Choice:
    weights: str
    activations: str
    rule: str


def plan_from_recipe(recipe: Recipe, sites: Sequence[Site]) -> PrecisionPlan:
    """Resolves a recipe over the sites of a denoiser.

    A site starts from the recipe's own formats; each rule that matches it overrides what the rule names, in order.
    Sites that read one tensor in one activation format share an act point, which carries the name of its first site;
    a second format on the same tensor makes a second point, whose name ends in ``:<format>``.

    Raises:
        InputError: a rule matches no site or changes nothing, or a site would quantize activations but not weights.
    """
    for rule in recipe.rules:
        _check_rule(rule, sites)
    choices = {site.name: _choose(recipe, site) for site in sites}
    points = _act_points(sites, choices)
    owner = {name: point.name for point in points for name in point.sites}
    plans = tuple(
        SitePlan(site.name, site.op, choices[site.name].weights, owner.get(site.name), choices[site.name].rule)
        for site in sites
    )
    return PrecisionPlan(plans, points)


def _matches(rule: Rule, site: Site) -> bool:
    return site.reads_text if rule.match == TEXT else fnmatchcase(site.name, rule.match)


def _check_rule(rule: Rule, sites: Sequence[Site]) -> None:
    if rule.weights is None and rule.activations is None:
        raise InputError(f"recipe rule {rule.match!r} sets neither weights nor activations: give one or remove it")
    if not any(_matches(rule, site) for site in sites):
        raise InputError(
            f"recipe rule {rule.match!r} matches no site of this denoiser: correct its pattern or remove it"
        )


def _choose(recipe: Recipe, site: Site) -> _Choice:
    weights, activations = recipe.weights, recipe.activations
    weights_rule = activations_rule = _DEFAULT
    for rule in recipe.rules:
        if not _matches(rule, site):
            continue
        if rule.weights is not None:
            weights, weights_rule = rule.weights, rule.match
        if rule.activations is not None:
            activations, activations_rule = rule.activations, rule.match
    if weights == "none" and activations != "none":
        raise InputError(
            f"recipe {recipe.name}: {site.name} would have {activations} activations with floating-point weights,"
            " which no engine runs in integers: set its activations to none too"
        )
    return _Choice(weights, activations, ", ".join(dict.fromkeys((weights_rule, activations_rule))))


def _act_points(sites: Sequence[Site], choices: dict[str, _Choice]) -> tuple[ActPoint, ...]:
    readers: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        activations = choices[site.name].activations
        if activations != "none":
            readers.setdefault((site.tensor, activations), []).append(site)
    points, named = [], set()
    for (tensor, activations), group in readers.items():
        name = f"{group[0].name}:{activations}" if tensor in named else group[0].name
        named.add(tensor)
        points.append(
            ActPoint(name, activations, tuple(site.name for site in group), timestep_dependent=not group[0].reads_text)
        )
    return tuple(points)
