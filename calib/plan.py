"""The plan: a recipe's transforms, and from its rules and scores of sensitivity the precision of every layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    apply_transforms,
    discover_layers,
    indexed_skeleton,
    layers_behind_norms,
    shiftable,
    unpadded,
)
from s2p_deploy.records import ActivationQuantizer, LayerPlan, PrecisionPlan, TransformSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser, QuantizableLayer
    from s2p_deploy.families.model_family import Config
    from s2p_deploy.recipe import Mixed, Override, Recipe, Rule
    from s2p_deploy.records import LatentDataset, TimestepTable, TimeTable

# words in place of a pattern: layers that read only the text, that read the latents, and the one that comes last
TEXT, INPUT, OUTPUT = "text", "input", "output"
SENSITIVE, INSENSITIVE = "sensitive", "insensitive"  # rules of the layers that mixed precision chose
_DEFAULT = "default"


@dataclass(frozen=True)
class Transforms:
    """Rewrites of a denoiser's modules before it is planned, exact in floating point until their values are fitted.

    ``rules`` follow the recipe's own, for layers that a rewrite adds.
    """

    spec: TransformSpec
    rules: tuple[Rule, ...] = ()

    def apply(self, denoiser: IndexedDenoiser) -> None:
        """Rewrites the modules of a denoiser in place; what it computes stays the same."""
        apply_transforms(denoiser, self.spec)

    def fit(self, denoiser: IndexedDenoiser, dataset: LatentDataset, progress: Progress) -> None:
        """Finds the values of the rewrites of ``denoiser``, where they have any."""


def split_shortcuts(denoiser: IndexedDenoiser, recipe: Recipe) -> Transforms:
    """Makes the transforms of a recipe for a denoiser that has none yet."""
    which = recipe.transforms.split_shortcut
    splits = denoiser.family.split_shortcuts(denoiser.network) if which != "none" else {}
    chosen = {path: at for path, at in splits.items() if which == "all" or path.endswith(".conv_shortcut")}
    return Transforms(TransformSpec(split=chosen))


def planned_layers(
    recipe: Recipe, transforms: Transforms, config: Config, time: TimeTable | TimestepTable, given: PrecisionPlan | None
) -> tuple[Transforms, tuple[QuantizableLayer, ...], PrecisionPlan]:
    """Finds the layers of a transformed denoiser from its configuration alone, and plans their precision.

    ``given`` replaces the plan of the recipe's rules. Returns the transforms with the recipe's shifts.

    Raises:
        InputError: the recipe's rules or the given plan do not fit the denoiser.
    """
    denoiser = indexed_skeleton(config, time).denoiser
    transforms.apply(denoiser)
    layers = discover_layers(denoiser)
    ruled = recipe.model_copy(update={"rules": (*recipe.rules, *transforms.rules)})
    if recipe.transforms.shift == "channel" and not transforms.spec.shifts:
        shifts = _shifts(denoiser, plan_from_recipe(ruled, layers), layers)
        transforms = replace(
            transforms, spec=replace(transforms.spec, shifted=shifts.shifted, shifted_norms=shifts.shifted_norms)
        )
        apply_transforms(denoiser, shifts)
        layers = discover_layers(denoiser)
    if given is not None:
        check_plan(given, layers)
        return transforms, layers, given
    return transforms, layers, plan_from_recipe(ruled, layers)


def _shifts(denoiser: IndexedDenoiser, plan: PrecisionPlan, layers: Sequence[QuantizableLayer]) -> TransformSpec:
    """Finds the norms that can shift all that reads them, and the other layers that nobody shares the tensor with.

    All of them have quantized activations. A norm takes a shift for nothing, for queries, keys and values at once.
    """
    network = denoiser.network
    quantized = {name for quantizer in plan.activation_quantizers for name in quantizer.layers}
    norms = {
        norm: readers
        for norm, readers in layers_behind_norms(denoiser).items()
        if quantized.issuperset(readers) and all(unpadded(network.get_submodule(reader)) for reader in readers)
    }
    behind = {reader for readers in norms.values() for reader in readers}
    readers_of = Counter(layer.tensor for layer in layers)
    shifted = tuple(
        layer.name
        for layer in layers
        if layer.name in quantized - behind
        and readers_of[layer.tensor] == 1
        and shiftable(network.get_submodule(layer.name))
    )
    return TransformSpec(shifted=shifted, shifted_norms=norms)


@dataclass(frozen=True)
class _Choice:
    weights: str
    activations: str
    rule: str
    sensitivity: float | None = None


def plan_from_recipe(recipe: Recipe, layers: Sequence[QuantizableLayer]) -> PrecisionPlan:
    """Resolves a recipe's rules over the layers of a denoiser.

    A layer starts from the recipe's own formats; each rule that matches it overrides what the rule names, in order.
    Layers that read one tensor in one activation format share an activation quantizer, which carries the name of its
    first layer; a second format on the same tensor makes a second quantizer, whose name ends in ``:<format>``.

    Raises:
        InputError: a rule matches no layer or changes nothing, or a layer would quantize activations but not weights.
    """
    for rule in recipe.rules:
        _check_rule(rule, layers)
    return _plan(layers, {layer.name: _choose(recipe, layer) for layer in layers}, f"recipe {recipe.name}")


def mixed_plan(
    plan: PrecisionPlan,
    layers: Sequence[QuantizableLayer],
    sensitivities: Mapping[str, float],
    mixed: Mixed,
    products: Mapping[str, float] | None = None,
) -> PrecisionPlan:
    """Adds mixed precision by sensitivity (S2P, arXiv 2412.06661, section 4.3) to the plan that the rules gave.

    Of the n layers that ``plan`` quantizes, the round(top * n) with the largest scores become sensitive and the
    round(bottom * n) with the smallest insensitive (those that are not sensitive already); ties go by module order.
    Where ``mixed.products`` is given, it decides which become sensitive.
    A layer whose formats the override would leave as they are is no candidate: the rules decided about it.
    Their rules are called so. Every layer keeps its score in the plan.

    Args:
        plan: of ``layers``, from the recipe's rules.
        layers: of the denoiser: which of them read one tensor.
        sensitivities: one score per layer.
        mixed: shares and formats.
        products: every layer's share of a call's multiplications, for ``mixed.products``.

    Raises:
        InputError: a layer would quantize activations but not weights, or has no score.
    """
    formats = {quantizer.name: quantizer.activations for quantizer in plan.activation_quantizers}
    rules = {
        layer.name: (layer.weights, formats.get(layer.activation_quantizer or "", "none"), layer.rule)
        for layer in plan.layers
    }
    missing = [name for name in rules if name not in sensitivities]
    if missing:
        raise InputError(f"layer {missing[0]} has no sensitivity: score every layer of the plan")
    quantized = [name for name, (weights, activations, _) in rules.items() if {weights, activations} != {"none"}]
    choices = {name: _Choice(*rule, sensitivities[name]) for name, rule in rules.items()}
    ranked = sorted(quantized, key=lambda name: -sensitivities[name])
    top = [name for name in ranked if _changes(choices[name], mixed.sensitive)]
    if mixed.products is None:
        top = top[: round(mixed.top * len(ranked))]
    else:
        top = _within_products(plan, top, sensitivities, products or {}, mixed.products)
    lowest = [name for name in ranked if name not in top and _changes(choices[name], mixed.insensitive)]
    bottom = lowest[max(0, len(lowest) - round(mixed.bottom * len(ranked))) :]
    choices |= {name: _overridden(choices[name], mixed.sensitive, SENSITIVE) for name in top}
    choices |= {name: _overridden(choices[name], mixed.insensitive, INSENSITIVE) for name in bottom}
    return _plan(layers, choices, "mixed precision")


def _within_products(
    plan: PrecisionPlan,
    candidates: Sequence[str],
    sensitivities: Mapping[str, float],
    products: Mapping[str, float],
    share: float,
) -> list[str]:
    """Chooses layers by score per multiplication, within a ``share`` of all; those of one quantizer go together."""
    quantizer = {layer.name: layer.activation_quantizer or layer.name for layer in plan.layers}
    groups: dict[str, list[str]] = {}
    for name in candidates:
        groups.setdefault(quantizer[name], []).append(name)
    costs = {group: sum(products[name] for name in names) for group, names in groups.items()}
    scores = {group: max(sensitivities[name] for name in names) for group, names in groups.items()}
    chosen: list[str] = []
    for group in sorted(groups, key=lambda group: -scores[group] / costs[group]):
        if scores[group] > 0 and costs[group] <= share:
            share -= costs[group]
            chosen += groups[group]
    return chosen


def check_plan(plan: PrecisionPlan, layers: Sequence[QuantizableLayer]) -> None:
    """Refuses a plan, such as an edited file, that does not fit a denoiser or that no engine can run.

    Raises:
        InputError: a layer of one is not in the other or of another kind; layers of one activation quantizer read
            different tensors; a layer has quantized activations with floating-point weights.
    """
    known = {layer.name: layer for layer in layers}
    planned = {layer.name: layer for layer in plan.layers}
    for name in planned.keys() - known.keys():
        raise InputError(f"precision plan: the denoiser has no layer {name}: correct its name or remove it")
    for name in known.keys() - planned.keys():
        raise InputError(f"precision plan: layer {name} is missing: every layer of the denoiser needs its formats")
    for quantizer in plan.activation_quantizers:
        if len({known[name].tensor for name in quantizer.layers}) != 1:
            names = ", ".join(quantizer.layers)
            raise InputError(
                f"precision plan: activation quantizer {quantizer.name}: {names} do not read one tensor: divide it"
            )
    for name, layer in planned.items():
        if layer.op != known[name].op:
            raise InputError(f"precision plan: layer {name} is a {known[name].op}, not a {layer.op}")
        activations = (
            "none" if layer.activation_quantizer is None else plan.quantizer(layer.activation_quantizer).activations
        )
        _check_formats(known[name], layer.weights, activations, "precision plan")


def _matches(rule: Rule, layer: QuantizableLayer) -> bool:
    named = {TEXT: layer.reads == "text", INPUT: layer.reads == "sample", OUTPUT: layer.last}
    if rule.match in named:
        return named[rule.match]
    return any(fnmatchcase(name, rule.match) for name in (layer.name, layer.name.removesuffix(".layer")))


def _check_rule(rule: Rule, layers: Sequence[QuantizableLayer]) -> None:
    if rule.weights is None and rule.activations is None:
        raise InputError(f"recipe rule {rule.match!r} sets neither weights nor activations: give one or remove it")
    if not any(_matches(rule, layer) for layer in layers):
        raise InputError(
            f"recipe rule {rule.match!r} matches no layer of this denoiser: correct its pattern or remove it"
        )


def _choose(recipe: Recipe, layer: QuantizableLayer) -> _Choice:
    weights, activations = recipe.weights, recipe.activations
    weights_rule = activations_rule = _DEFAULT
    for rule in recipe.rules:
        if not _matches(rule, layer):
            continue
        if rule.weights is not None:
            weights, weights_rule = rule.weights, rule.match
        if rule.activations is not None:
            activations, activations_rule = rule.activations, rule.match
    return _Choice(weights, activations, ", ".join(dict.fromkeys((weights_rule, activations_rule))))


def _changes(choice: _Choice, override: Override) -> bool:
    """Checks that an override changes a format of the layer; one that names none only marks, and so may mark any."""
    new = _overridden(choice, override, choice.rule)
    return {override.weights, override.activations} == {None} or new != choice


def _overridden(choice: _Choice, override: Override, rule: str) -> _Choice:
    """Overrides integer formats; what the rules keep in floating point stays there."""
    weights = choice.weights if choice.weights == "none" else override.weights or choice.weights
    activations = choice.activations if choice.activations == "none" else override.activations or choice.activations
    return _Choice(weights, activations, rule, choice.sensitivity)


def _check_formats(layer: QuantizableLayer, weights: str, activations: str, origin: str) -> None:
    if weights == "none" and activations != "none":
        raise InputError(
            f"{origin}: {layer.name} would have {activations} activations with floating-point weights,"
            " which no engine runs in integers: set its activations to none too"
        )


def _plan(layers: Sequence[QuantizableLayer], choices: Mapping[str, _Choice], origin: str) -> PrecisionPlan:
    """Makes the layers' plan, and the activation quantizers that follow from their choices."""
    for layer in layers:
        _check_formats(layer, choices[layer.name].weights, choices[layer.name].activations, origin)
    quantizers = _activation_quantizers(layers, choices)
    owner = {name: quantizer.name for quantizer in quantizers for name in quantizer.layers}
    chosen = ((layer, choices[layer.name]) for layer in layers)
    plans = tuple(
        LayerPlan(layer.name, layer.op, choice.weights, owner.get(layer.name), choice.rule, choice.sensitivity)
        for layer, choice in chosen
    )
    return PrecisionPlan(plans, quantizers)


def _activation_quantizers(
    layers: Sequence[QuantizableLayer], choices: Mapping[str, _Choice]
) -> tuple[ActivationQuantizer, ...]:
    readers: dict[tuple[int, str], list[QuantizableLayer]] = {}
    for layer in layers:
        activations = choices[layer.name].activations
        if activations != "none":
            readers.setdefault((layer.tensor, activations), []).append(layer)
    quantizers, named = [], set()
    for (tensor, activations), group in readers.items():
        name = f"{group[0].name}:{activations}" if tensor in named else group[0].name
        named.add(tensor)
        quantizers.append(
            ActivationQuantizer(
                name, activations, tuple(layer.name for layer in group), timestep_dependent=group[0].reads != "text"
            )
        )
    return tuple(quantizers)
