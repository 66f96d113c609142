"""From a recipe's ordered rules, and scores of sensitivity, to the precision of every site."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError
from s2p_deploy.records import ActPoint, PrecisionPlan, SitePlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2p_deploy.families import Site
    from s2p_deploy.recipe import Mixed, Override, Recipe, Rule

# words in place of a pattern: sites that read only the text, that read the latents, and the one that comes last
TEXT, INPUT, OUTPUT = "text", "input", "output"
SENSITIVE, INSENSITIVE = "sensitive", "insensitive"  # rules of the sites that mixed precision chose
_DEFAULT = "default"
_BRANCH = "low-rank branch"


@dataclass(frozen=True)
class _Choice:
    weights: str
    activations: str
    rule: str
    sensitivity: float | None = None


def plan_from_recipe(recipe: Recipe, sites: Sequence[Site]) -> PrecisionPlan:
    """Resolves a recipe's rules over the sites of a denoiser.

    A site starts from the recipe's own formats; each rule that matches it overrides what the rule names, in order.
    Sites that read one tensor in one activation format share an act point, which carries the name of its first site;
    a second format on the same tensor makes a second point, whose name ends in ``:<format>``.

    Raises:
        InputError: a rule matches no site or changes nothing, or a site would quantize activations but not weights.
    """
    for rule in recipe.rules:
        _check_rule(rule, sites)
    return _plan(sites, {site.name: _choose(recipe, site) for site in sites}, f"recipe {recipe.name}")


def mixed_plan(
    plan: PrecisionPlan, sites: Sequence[Site], sensitivities: Mapping[str, float], mixed: Mixed
) -> PrecisionPlan:
    """Mixed precision by sensitivity (S2P, arXiv 2412.06661, section 4.3) on top of the plan that the rules gave.

    Of the n sites that ``plan`` quantizes, the round(top * n) with the largest scores become sensitive and the
    round(bottom * n) with the smallest insensitive (those that are not sensitive already); ties go by module order.
    A site whose formats the override would leave as they are is no candidate: the rules decided about it.
    Their rules are called so. Every site keeps its score in the plan.

    Args:
        plan: of ``sites``, from the recipe's rules.
        sites: of the denoiser: which of them read one tensor.
        sensitivities: one score per site.
        mixed: shares and formats.

    Raises:
        InputError: a site would quantize activations but not weights, or has no score.
    """
    formats = {point.name: point.activations for point in plan.act_points}
    rules = {site.site: (site.weights, formats.get(site.act_point or "", "none"), site.rule) for site in plan.sites}
    missing = [name for name in rules if name not in sensitivities]
    if missing:
        raise InputError(f"site {missing[0]} has no sensitivity: score every site of the plan")
    quantized = [name for name, (weights, activations, _) in rules.items() if {weights, activations} != {"none"}]
    choices = {name: _Choice(*rule, sensitivities[name]) for name, rule in rules.items()}
    ranked = sorted(quantized, key=lambda name: -sensitivities[name])
    top = [name for name in ranked if _changes(choices[name], mixed.sensitive)][: round(mixed.top * len(ranked))]
    lowest = [name for name in ranked if name not in top and _changes(choices[name], mixed.insensitive)]
    bottom = lowest[max(0, len(lowest) - round(mixed.bottom * len(ranked))) :]
    choices |= {name: _overridden(choices[name], mixed.sensitive, SENSITIVE) for name in top}
    choices |= {name: _overridden(choices[name], mixed.insensitive, INSENSITIVE) for name in bottom}
    return _plan(sites, choices, "mixed precision")


def check_plan(plan: PrecisionPlan, sites: Sequence[Site]) -> None:
    """Refuses a plan, such as an edited file, that does not fit a denoiser or that no engine can run.

    Raises:
        InputError: a site of one is not in the other or of another kind; sites of one act point read different
            tensors; a site has quantized activations with floating-point weights; a low-rank branch is quantized.
    """
    known = {site.name: site for site in sites}
    planned = {site.site: site for site in plan.sites}
    for name in planned.keys() - known.keys():
        raise InputError(f"precision plan: the denoiser has no site {name}: correct its name or remove it")
    for name in known.keys() - planned.keys():
        raise InputError(f"precision plan: site {name} is missing: every site of the denoiser needs its formats")
    for point in plan.act_points:
        if len({known[name].tensor for name in point.sites}) != 1:
            names = ", ".join(point.sites)
            raise InputError(f"precision plan: act point {point.name}: {names} do not read one tensor: divide it")
    for name, site in planned.items():
        if site.op != known[name].op:
            raise InputError(f"precision plan: site {name} is a {known[name].op}, not a {site.op}")
        activations = "none" if site.act_point is None else plan.point(site.act_point).activations
        _check_formats(known[name], site.weights, activations, "precision plan")


def _matches(rule: Rule, site: Site) -> bool:
    named = {TEXT: site.reads == "text", INPUT: site.reads == "sample", OUTPUT: site.last}
    return named[rule.match] if rule.match in named else fnmatchcase(site.name, rule.match)


def _check_rule(rule: Rule, sites: Sequence[Site]) -> None:
    if rule.weights is None and rule.activations is None:
        raise InputError(f"recipe rule {rule.match!r} sets neither weights nor activations: give one or remove it")
    if not any(_matches(rule, site) for site in sites):
        raise InputError(
            f"recipe rule {rule.match!r} matches no site of this denoiser: correct its pattern or remove it"
        )


def _choose(recipe: Recipe, site: Site) -> _Choice:
    if site.branch:
        return _Choice("none", "none", _BRANCH)
    weights, activations = recipe.weights, recipe.activations
    weights_rule = activations_rule = _DEFAULT
    for rule in recipe.rules:
        if not _matches(rule, site):
            continue
        if rule.weights is not None:
            weights, weights_rule = rule.weights, rule.match
        if rule.activations is not None:
            activations, activations_rule = rule.activations, rule.match
    return _Choice(weights, activations, ", ".join(dict.fromkeys((weights_rule, activations_rule))))


def _changes(choice: _Choice, override: Override) -> bool:
    """Whether the override changes a format of the site; one that names none only marks, and so may mark any."""
    new = _overridden(choice, override, choice.rule)
    return {override.weights, override.activations} == {None} or new != choice


def _overridden(choice: _Choice, override: Override, rule: str) -> _Choice:
    """What the rules keep in floating point stays there: an override only moves between integer formats, or out."""
    weights = choice.weights if choice.weights == "none" else override.weights or choice.weights
    activations = choice.activations if choice.activations == "none" else override.activations or choice.activations
    return _Choice(weights, activations, rule, choice.sensitivity)


def _check_formats(site: Site, weights: str, activations: str, origin: str) -> None:
    if weights == "none" and activations != "none":
        raise InputError(
            f"{origin}: {site.name} would have {activations} activations with floating-point weights,"
            " which no engine runs in integers: set its activations to none too"
        )
    if site.branch and weights != "none":
        raise InputError(f"{origin}: {site.name} is half of a low-rank branch and stays in floating point")


def _plan(sites: Sequence[Site], choices: Mapping[str, _Choice], origin: str) -> PrecisionPlan:
    """The sites' plan and the act points that follow from their choices."""
    for site in sites:
        _check_formats(site, choices[site.name].weights, choices[site.name].activations, origin)
    points = _act_points(sites, choices)
    owner = {name: point.name for point in points for name in point.sites}
    return PrecisionPlan(tuple(_site_plan(site, choices[site.name], owner.get(site.name)) for site in sites), points)


def _site_plan(site: Site, choice: _Choice, point: str | None) -> SitePlan:
    return SitePlan(site.name, site.op, choice.weights, point, choice.rule, choice.sensitivity)


def _act_points(sites: Sequence[Site], choices: Mapping[str, _Choice]) -> tuple[ActPoint, ...]:
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
            ActPoint(name, activations, tuple(site.name for site in group), timestep_dependent=group[0].reads != "text")
        )
    return tuple(points)
