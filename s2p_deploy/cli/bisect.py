"""``s2p-deploy validate --bisect``: which layers cost a model most fidelity, and the plan change that it suggests."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.cli.options import context_from_options
from s2p_deploy.cli.output import Outcome, show, table
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from s2p_deploy.records import CalibratedModel, PrecisionPlan
    from s2p_deploy.validation.bisect import Bisection

_LATENTS = 32
_SHOWN = 12  # layers


def bisect_model(folder: Path | None, calib: Path | None, plan_out: Path | None, device: str, *, as_json: bool) -> int:
    """Bisects the calibrated model at ``folder``, or the one that an engine at ``folder`` was made from, on a device.

    The changed plan is written to ``plan_out``, where given. Exits 0 whatever is found: no gate is asked.

    Raises:
        InputError: there is no such model, it has no stored latents, or ``plan_out`` exists.
    """
    if plan_out is not None and plan_out.exists():
        raise InputError(f"{plan_out} exists: choose another --plan-out")
    if folder is None:
        raise InputError("validate --bisect takes an engine or a calibrated model")
    calibrated = _calibrated(folder, calib)
    from s2p_deploy.records.precision_plan import write_plan
    from s2p_deploy.validation.bisect import changed_plan

    bisection = _bisected(calibrated, device)
    plan = changed_plan(calibrated.plan, bisection.changes)
    text: list[Any] = [_table(bisection), *_lines(bisection)]
    if plan_out is not None:
        plan_out.parent.mkdir(parents=True, exist_ok=True)
        write_plan(plan, plan_out)
        text.append(f"the changed plan is in {plan_out}: s2p-deploy calibrate MODEL --plan {plan_out} ...")
    bits = {name: _bits_of(calibrated, one) for name, one in (("now", calibrated.plan), ("suggested", plan))}
    text.append(
        "average bits of weights {now[weights]:.2f}, of activations {now[activations]:.2f};"
        " suggested {suggested[weights]:.2f} and {suggested[activations]:.2f}".format(**bits)
    )
    return show(Outcome(_data(bisection) | {"average_bits": bits}, tuple(text)), as_json=as_json)


def _calibrated(folder: Path, calib: Path | None) -> CalibratedModel:
    from s2p_deploy.records import CalibratedModel, Engine, ExportedGraph
    from s2p_deploy.records.artifacts import parent_folder, read_manifest

    if read_manifest(folder).kind != "Engine":
        return CalibratedModel.open(folder)
    if calib is not None:
        return CalibratedModel.open(calib)
    engine = Engine.open(folder)
    graph = ExportedGraph.open(parent_folder(folder, engine.manifest, "graph"))
    return CalibratedModel.open(parent_folder(graph.folder, graph.manifest, "calib"))


def _bisected(calibrated: CalibratedModel, device: str) -> Bisection:
    from s2p_deploy.calib import fake_quant_denoiser
    from s2p_deploy.records import LatentDataset
    from s2p_deploy.records.artifacts import parent_folder
    from s2p_deploy.validation.bisect import bisect
    from s2p_deploy.validation.reference import choose_latents, stored_predictions, unquantized_denoiser

    if "dataset" not in calibrated.manifest.parents:
        raise InputError(f"{calibrated.folder} was made without latents (streamed, or recipe fp): nothing to look at")
    dataset = LatentDataset.open(parent_folder(calibrated.folder, calibrated.manifest, "dataset"))
    latents, predictions = choose_latents(dataset, _LATENTS), stored_predictions(dataset, _LATENTS)
    with context_from_options(device) as context, context.arithmetic():
        fake_quant = fake_quant_denoiser(calibrated).to(context.torch_device)
        unquantized = unquantized_denoiser(calibrated).to(context.torch_device)
        return bisect(fake_quant, unquantized, latents, predictions, progress=context.progress)


def _bits_of(calibrated: CalibratedModel, plan: PrecisionPlan) -> dict[str, float]:
    from s2p_deploy.records.calibrated_model import parameter_name
    from s2p_deploy.validation.bisect import plan_bits

    sizes = {layer.name: calibrated.tensor(parameter_name(f"{layer.name}.weight")).size for layer in plan.layers}
    return plan_bits(plan, sizes)


def _table(found: Bisection) -> Table:
    title = f"SQNR to FP {found.sqnr:.2f} dB over {found.latents} latents; gain in dB in floating point"
    rows = [
        (
            one.name,
            f"{one.gain:.2f}",
            *map(_number, (one.weights_gain, one.activations_gain)),
            one.weights,
            one.activations,
        )
        for one in found.layers[:_SHOWN]
    ]
    return table(title, ("layer", "gain", "by weights", "by activations", "weights now", "activations now"), rows)


def _lines(found: Bisection) -> list[str]:
    from s2p_deploy.validation.bisect import rules_of

    blocks = ", ".join(f"{group.name} {group.gain:.2f}" for group in found.groups[:4])
    lines = [f"blocks, gain in dB: {blocks} ({found.passes} passes over the latents)"]
    if not found.changes:
        return [*lines, "no layer stands out: no change suggested"]
    rules = [", ".join(f"{key}: {value}" for key, value in rule.items()) for rule in rules_of(found.changes)]
    return [
        *lines,
        f"suggested, {found.expected - found.sqnr:.2f} dB with these in floating point; append to the recipe's rules:",
        *(f"  - {{{rule}}}" for rule in rules),
    ]


def _data(found: Bisection) -> dict[str, Any]:
    from s2p_deploy.validation.bisect import rules_of

    return {"kind": "Bisection"} | asdict(found) | {"rules": rules_of(found.changes)}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
