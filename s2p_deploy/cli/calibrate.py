"""``s2p-deploy calibrate``: prompts to a CalibratedModel."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from s2p_deploy.cli.options import (
    DeviceOption,
    EmaOption,
    FileComponentsOption,
    ForceOption,
    JsonOption,
    LoraOption,
    ModelArgument,
    OutFolder,
    PredictionTypeOption,
    RecipeOption,
    SettingsOption,
    ThreadsOption,
    VaeOption,
    VariantOption,
    bytes_from_option,
    context_from_options,
    overrides_from_settings,
    print_estimate,
)
from s2p_deploy.cli.output import Outcome, artifact_outcome, show, with_pipeline
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from s2p_deploy.context import Context
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.recipe import Recipe

_DEFAULT_SCALES = "its activation scales are placeholders: engines have their real size and speed, but draw no pictures"


def calibrate(  # noqa: PLR0913 - its options
    model: ModelArgument,
    *,
    recipe: RecipeOption,
    out: OutFolder,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="One prompt per line, JSON lines, or shapes:train (bundled)."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An edited plan.yaml that replaces the recipe's formats."),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CALIB",
            help="A calibrated model to continue from, or with scales.activations=given, to take scales from.",
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Dataset that calibrations share; made there if there is none."),
    ] = None,
    target_psnr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="PSNR of the pictures to reach, by leaving the fewest layers unquantized."),
    ] = None,
    target_ssim: Annotated[
        float | None, typer.Option(metavar="SSIM", help="The same for SSIM; both may be given.")
    ] = None,
    target_lpips: Annotated[
        float | None, typer.Option(metavar="LPIPS", help="LPIPS to stay below; needs --weights-dir.")
    ] = None,
    at: Annotated[
        Literal["median", "p10", "worst"], typer.Option(help="Where a target is asked for, over the pictures.")
    ] = "median",
    weights_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Local weights of metrics, for --target-lpips.")
    ] = None,
    components: FileComponentsOption = None,
    vae: VaeOption = None,
    prediction_type: PredictionTypeOption = None,
    variant: VariantOption = None,
    ema: EmaOption = False,
    lora: LoraOption = None,
    controlnet: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Calibrate this ControlNet of the model's, in diffusers format."),
    ] = None,
    control_images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Pictures that --controlnet reads, one for each prompt, in turn."),
    ] = None,
    settings: SettingsOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say how the training fits into memory, or that it does not; write nothing."),
    ] = False,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory to plan a training with, e.g. 24GiB; what a GPU has free if omitted."
        ),
    ] = None,
    samples_per_call: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Most samples of a call without gradients; measured on a GPU if omitted."
        ),
    ] = None,
    tf32: Annotated[bool, typer.Option(help="Round a GPU's float32 products to TF32: faster, other scales.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Make a stopped run on a GPU end in the same bits; slower.")
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Train weights and timestep-indexed scales from prompts alone.

    A run that was stopped continues where it was when the same command is started again; a finished artifact of the
    same command is left as it is.

    With --lora the pipeline is first written anew with the LoRAs in its weights, to pipeline-<digest> beside --out:
    every later command reads that as the floating-point pipeline.

    On a GPU, batches are divided and activations recomputed so that the training fits into the memory that is free; one
    line on stderr says how, and what does not fit is refused (exit code 4) with what would.

    Recipes that look at no activation (fp, ptq-stream) need no prompts and read one weight at a time, so their memory
    does not depend on the model's size. Engines of ptq-stream have their real size and speed, but its activation scales
    are placeholders: they draw no pictures.
    """
    from s2p_deploy import BaseOptions, Recipe, api

    asked = _asked({"psnr": target_psnr, "ssim": target_ssim, "lpips": target_lpips}, at)
    resolved = Recipe.load(recipe, overrides_from_settings([*(settings or ()), *asked]))
    options = BaseOptions(components, vae, prediction_type, variant, ema)
    limit = None if memory_limit is None else bytes_from_option(memory_limit)
    with context_from_options(device, threads) as plain:
        context = replace(
            plain, memory_limit=limit, samples_per_call=samples_per_call, tf32=tf32, deterministic=deterministic
        )
        if controlnet is not None or control_images is not None:
            others = {
                "--plan": plan,
                "--from": initial,
                "--dataset": dataset,
                "--lora": lora,
                "--target-*": asked,
                "--weights-dir": weights_dir,
                "--dry-run": dry_run,
            }
            _check_control(controlnet, control_images, prompts, [name for name, value in others.items() if value])
            made = api.calibrate_controlnet(
                api.as_base(model, out, options),
                controlnet=str(controlnet),
                recipe=resolved,
                prompts=str(prompts),
                pictures=str(control_images),
                out=out,
                force=force,
                context=context,
            )
            return show(artifact_outcome(made.folder, made.manifest), as_json=as_json)
        if dry_run:
            return show(_plan_of_training(api.as_base(model, out, options), resolved, plan, context), as_json=as_json)
        made = api.calibrate(
            model,
            recipe=resolved,
            out=out,
            options=options,
            prompts=prompts,
            plan=plan,
            initial=initial,
            dataset=dataset,
            weights_dir=weights_dir,
            lora=lora or (),
            force=force,
            context=context,
            on_estimate=print_estimate,
        )
    outcome = artifact_outcome(made.folder, made.manifest)
    if "target" in made.manifest.content:
        target = made.manifest.content["target"]
        outcome = replace(
            outcome, data=outcome.data | {"target": target}, text=(*outcome.text, f"target: {target['text']}")
        )
    if lora:
        outcome = with_pipeline(outcome, made.manifest)
    if resolved.scales.activations == "default":
        outcome = replace(outcome, data=outcome.data | {"note": _DEFAULT_SCALES}, text=(*outcome.text, _DEFAULT_SCALES))
    return show(outcome, as_json=as_json)


def _check_control(controlnet: Path | None, pictures: Path | None, prompts: str | None, others: list[str]) -> None:
    """Raises InputError unless all is there that a ControlNet is calibrated with, and nothing else."""
    if controlnet is None or pictures is None or prompts is None:
        raise InputError("a ControlNet is calibrated with --controlnet, --control-images and --prompts: give all three")
    if others:
        raise InputError(f"{others[0]} cannot be used with --controlnet: leave it out")


def _asked(target: dict[str, float | None], at: str) -> list[str]:
    """Returns the recipe's settings of a target, none where none is asked for."""
    limits = [f"target.{name}={limit}" for name, limit in target.items() if limit is not None]
    return [*limits, f"target.at={at}"] if limits else []


def _plan_of_training(base: BasePipeline, recipe: Recipe, plan: Path | None, context: Context) -> Outcome:
    """Tells how a training would be divided; loads no network."""
    from s2p_deploy.calib import training_fit
    from s2p_deploy.records.precision_plan import read_plan

    fit = training_fit(base, recipe, plan=None if plan is None else read_plan(plan), context=context)
    if fit is None:
        return Outcome({"kind": "fit", "training": None}, ("training: as the recipe says; no memory is counted here",))
    return Outcome({"kind": "fit", "training": asdict(fit)}, (f"training: {fit}",))
