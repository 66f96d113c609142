"""Stage: an engine and held-out prompts give a ValidationReport. A failed gate is a result, not an error."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy import __version__
from s2p_deploy.calib import fake_quant_denoiser
from s2p_deploy.calib.request import claim_unfinished, partial_of
from s2p_deploy.context import Context
from s2p_deploy.engines import backend_by_name, engine_subgraphs, load_engine
from s2p_deploy.engines.joined import JoinedRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, load_pipeline
from s2p_deploy.families.lora import Lora
from s2p_deploy.families.lora_fusing import fused, loadable_networks, weights_in_memory
from s2p_deploy.pipeline import Schedule, pipeline_with_engine, schedules_to_bind, timesteps_of
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Skipped, file_digest
from s2p_deploy.records.artifacts import check_vacant
from s2p_deploy.records.files import claimed
from s2p_deploy.shapes.classifier import CLASSIFIER
from s2p_deploy.validation.chain import Chain, open_chain
from s2p_deploy.validation.checkpoint import ValidationCheckpoint
from s2p_deploy.validation.end_to_end import measure_end_to_end, measure_floors, whole_denoiser
from s2p_deploy.validation.measurements import NO_WEIGHTS, Measurements
from s2p_deploy.validation.parity import measure_parity
from s2p_deploy.validation.perceptual import measure_perceptual
from s2p_deploy.validation.pictures import PicturePairs, compare_pictures, pictures_to_change
from s2p_deploy.validation.placement import onloaded, reference_device
from s2p_deploy.validation.reference import choose_latents, latents_of_pictures
from s2p_deploy.validation.report import KIND, Validated, write_report
from s2p_deploy.validation.report_page import bench_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.context import Progress
    from s2p_deploy.engines import BoundRunner
    from s2p_deploy.families.lora import GivenLora
    from s2p_deploy.families.pictures import PictureInputs
    from s2p_deploy.metric_networks import MetricWeights
    from s2p_deploy.records import Engine, PromptSet, ValidationReport
    from s2p_deploy.validation.measurements import EndToEnd, Floor, PictureComparison
    from s2p_deploy.validation.pictures import GeneratedPictures
    from s2p_deploy.validation.reference import ValidationLatents


def validate(  # noqa: PLR0913 - what, where, and options by keyword
    engine: Engine | Chain,
    prompts: PromptSet,
    out: Path,
    *,
    pictures: int | None = None,
    schedules: tuple[Schedule, ...] = (),
    floor: Engine | None = None,
    weights: MetricWeights | None = None,
    bench: Mapping[str, Any] | None = None,
    loras: tuple[GivenLora, ...] = (),
    replace: bool = False,
    command: str = "",
    context: Context = Context(),
) -> ValidationReport:
    """Measures an engine against the floating-point pipeline, judges it by its recipe's gates and writes the report.

    Three questions are answered: whether the export is right, whether the engine is, and whether the pictures are the
    same. Finished parts are kept in ``<out>.partial``: a second start of the same validation goes on there, to the same
    report but for wall times.

    Args:
        engine: the engine; as :func:`open_chain` returns it where what it was made from was moved.
        prompts: held-out prompts; the first ``pictures`` are drawn.
        out: folder of the report.
        pictures: how many pictures (None: the recipe's).
        schedules: other schedules to draw on the same engine, reported and not gated.
        floor: an engine of recipe ``fp`` of the same pipeline, reported beside the engine.
        weights: local weights of metrics that need some, from :func:`open_weights`.
        bench: output of ``s2p-deploy bench --json`` for this engine, for the report.
        loras: act in all pictures, the pipeline's and the engine's; graph and engine are compared without, and of
            joined engines the first alone.
        replace: whether a report at ``out``, or unfinished work of another validation, may be replaced.
        command: the command line, for the report.
        context: where the references compute (``auto``: on the engine's device), threads and progress.

    Returns:
        The report. Its verdict is ``failed`` where a gate was not met and ``not verified`` where one could not be
        measured here (an engine that needs another device).

    Raises:
        InputError: ``bench`` is of other engines, a LoRA is none of the pipeline or not for the engine, ``out`` exists,
            unfinished work of another validation does, another process is at work on it, or a schedule is not covered.
        MissingEnvironmentError: the engine cannot be loaded.
        IntegrityError: what was kept of an earlier start was changed.
    """
    chain = engine if isinstance(engine, Chain) else open_chain(engine)
    inputs = chain.folders | ({} if floor is None else {"floor engine": floor.folder})
    check_vacant(out, KIND, replace=replace, inputs=inputs)
    if bench is not None:
        bench_rows(bench, chain.engine.manifest.digest)
    if floor is not None:
        _check_floor(floor, chain)
    schedules_to_bind(chain.engine, chain.base, (Schedule.of(chain.recipe.sampling), *schedules))
    context.set_threads()
    drawn = prompts.first(pictures or chain.recipe.validation.pictures)
    request = ValidationRequest(drawn, schedules, floor, weights, loras)
    partial, device = partial_of(out), reference_device(chain.engine, context)
    with claimed(partial), context.arithmetic():
        claim_unfinished(partial, request.to_json(chain, device), replace=replace)
        checkpoint = ValidationCheckpoint.begin(partial)
        run = ValidationRun(chain, request, checkpoint, load_pipeline(chain.base), device, context.progress)
        with run.loaded_engine() as runner:
            measurements, pairs = run.measure(runner)
        digests = weights.digests if weights else {}
        acting = {f"LoRA {each.file.name}:{each.weight:g}": file_digest(each.file) for each in loras}
        validated = Validated(request.prompts, measurements, pairs, digests, command, checkpoint.spent, bench, acting)
        report = write_report(chain, validated, chain.recipe.validation.gates, out, replace=replace)
        shutil.rmtree(partial)
    return report


@dataclass(frozen=True)
class ValidationRequest:
    """Everything to measure besides the recipe's own questions.

    ``prompts`` are drawn; ``schedules`` are drawn too, and reported. ``floor`` is an engine of recipe ``fp`` of the
    same pipeline, ``weights`` are of the metrics that need some. ``loras`` act in all pictures.
    """

    prompts: PromptSet
    schedules: tuple[Schedule, ...] = ()
    floor: Engine | None = None
    weights: MetricWeights | None = None
    loras: tuple[GivenLora, ...] = ()

    def to_json(self, chain: Chain, device: torch.device) -> dict[str, Any]:
        """Lists everything that decides what is measured, as JSON values; gates do not."""
        return {
            "engine": chain.engine.manifest.digest,
            "prompts": self.prompts.digest,
            "latents": chain.recipe.validation.latents,
            "schedules": [[one.scheduler, one.steps] for one in self.schedules],
            "floor engine": self.floor.manifest.digest if self.floor else None,
            "weights": self.weights.digests if self.weights else None,
            "device of the references": str(device),
            "number of threads": torch.get_num_threads(),
            "version": f"{__version__}, torch {torch.__version__}",
        } | ({"LoRAs": [[file_digest(each.file), each.weight] for each in self.loras]} if self.loras else {})


@dataclass(frozen=True)
class ValidationRun:
    """A validation that is under way: finished parts come from ``checkpoint``.

    ``pipe`` is in floating point. References compute on ``device``, each while it is measured: between parts, ``pipe``
    and the fake-quantized model are where they were loaded.
    """

    chain: Chain
    request: ValidationRequest
    checkpoint: ValidationCheckpoint
    pipe: DiffusionPipeline
    device: torch.device
    progress: Progress

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """Lists the schedules to draw, the recipe's own first."""
        own = Schedule.of(self.chain.recipe.sampling)
        length, strength = own.max_sequence_length, own.strength
        others = (replace(one, max_sequence_length=length, strength=strength) for one in self.request.schedules)
        return (own, *others)

    @contextmanager
    def loaded_engine(self) -> Iterator[BoundRunner | Skipped]:
        """Loads the engine for all schedules while the context lasts; yields why, where it cannot run here.

        Raises:
            InputError: a schedule is not covered. MissingEnvironmentError: the engine cannot be loaded.
        """
        chain, timesteps = self.chain, [timesteps_of(self.pipe, schedule) for schedule in self.schedules]
        able = backend_by_name(chain.engine.backend).capabilities()
        if not able.executes:
            yield Skipped(able.missing or f"{chain.engine.backend} cannot execute here: it needs a GPU")
            return
        with load_engine(chain.engine, chain.graph, schedules=timesteps, device=str(self.device)) as runner:
            yield runner

    def measure(self, runner: BoundRunner | Skipped) -> tuple[Measurements, PicturePairs | None]:
        """Measures everything, part by part; returns the pictures too, where the engine can run here.

        Raises:
            MissingEnvironmentError: the floor's engine cannot be loaded. IntegrityError: what was kept, or a network's
            weights, are damaged.
        """
        own, *others = self.schedules
        measure, weights = self.checkpoint.measure, self.request.weights
        candidate_pipe = self.pipe
        if not isinstance(runner, Skipped):
            candidate_pipe = pipeline_with_engine(self.pipe, self.chain.engine, runner)
            self.let_loras_act(candidate_pipe)  # what does not fit is refused before the long work
        reference = self.generated(self.pipe, own, "pictures, FP")
        latents = self.latents(reference)
        alone = runner.high if isinstance(runner, JoinedRunner) else runner  # the engine of the chain's graph
        parity = self.parity(latents, alone) | {"floors": measure("floors", lambda: self.floors(latents))}
        if isinstance(alone, Skipped):
            return Measurements(**parity, end_to_end=alone, pictures=alone), None
        candidate = self.generated(candidate_pipe, own, "pictures, engine")
        pairs = PicturePairs.of(self.request.prompts, reference, candidate)
        measurements = Measurements(
            **parity,
            end_to_end=measure("end_to_end", lambda: self.end_to_end(latents, alone)),
            pictures=measure("pictures", lambda: self.compared(reference, candidate, own)),
            perceptual=NO_WEIGHTS
            if weights is None
            else measure("perceptual", lambda: measure_perceptual(pairs, weights, self.progress, self.device)),
            other_schedules=tuple(self.on_schedule(candidate_pipe, schedule) for schedule in others),
        )
        return measurements, pairs

    @cached_property
    def fake_quant(self) -> FakeQuantDenoiser:
        """Returns the model that the engine was made from, as PyTorch simulates it."""
        return fake_quant_denoiser(self.chain.calibrated)

    @cached_property
    def loras(self) -> tuple[tuple[Lora, float], ...]:
        """Opens the LoRAs that act in all pictures, each with its weight."""
        given = self.request.loras
        known = weights_in_memory(loadable_networks(self.pipe)) if given else {}
        return tuple((Lora(each.file, known), each.weight) for each in given)

    def let_loras_act(self, candidate: DiffusionPipeline) -> None:
        """Loads the LoRAs into the engine of a pipeline. Raises InputError where its branches do not hold them."""
        loaded = denoiser_of(candidate).loras
        for number, (lora, _) in enumerate(self.loras):
            loaded.add(lora, str(number))
        loaded.set({str(number): weight for number, (_, weight) in enumerate(self.loras)})
        if self.loras:
            loaded.strengths({}, torch.zeros(1))  # their ranks must fit side by side

    @cached_property
    def changed(self) -> PictureInputs | None:
        """Returns the pictures that are changed, with synthetic masks; None where all are drawn from text alone."""
        prompts, (own, *_) = self.request.prompts, self.schedules

        def drawn(whole: PictureInputs) -> GeneratedPictures:
            stage, guidance = "pictures to change", self.chain.guidance_scale
            return self.checkpoint.pictures(stage, self.pipe, prompts, own, guidance, self.progress, inputs=whole)

        with onloaded(self.pipe, self.device):
            return pictures_to_change(self.pipe, prompts, self.chain.recipe.sampling, drawn)

    def generated(self, pipe: DiffusionPipeline, schedule: Schedule, stage: str) -> GeneratedPictures:
        """Generates the prompts' pictures with ``pipe``."""
        prompts, guidance, changed = self.request.prompts, self.chain.guidance_scale, self.changed
        # the engine, in the denoiser's place, has its own
        networks = {name: part for name, part in loadable_networks(self.pipe).items() if part is pipe.components[name]}
        with onloaded(pipe, self.device), fused(networks, self.loras):
            return self.checkpoint.pictures(stage, pipe, prompts, schedule, guidance, self.progress, inputs=changed)

    def latents(self, reference: GeneratedPictures) -> ValidationLatents:
        """Chooses latents of the calibration's dataset, or of the FP pictures where there was none."""
        chain, count = self.chain, self.chain.recipe.validation.latents
        if chain.dataset is not None:
            return choose_latents(chain.dataset, count)
        sampling, timesteps = chain.recipe.sampling, chain.calibrated.timesteps
        return latents_of_pictures(
            self.pipe,
            self.request.prompts,
            reference,
            sampling,
            timesteps,
            count,
            device=self.device,
        )

    def parity(self, latents: ValidationLatents, runner: BoundRunner | Skipped) -> dict[str, Any]:
        """Measures graph and engine on the reference's own inputs."""
        with ExitStack() as stack:
            can_run = not isinstance(runner, Skipped)
            parts = stack.enter_context(engine_subgraphs(self.chain.engine, self.chain.graph)) if can_run else None
            stack.enter_context(onloaded(self.fake_quant, self.device))
            kept: dict[str, Any] = {"measure": self.checkpoint.measure, "progress": self.progress}
            return measure_parity(self.chain, self.fake_quant, latents, runner, parts, **kept)

    def floors(self, latents: ValidationLatents) -> tuple[Floor, ...]:
        """Measures what half precision alone changes."""
        with ExitStack() as stack:
            floor = self.request.floor
            engine = None if floor is None else stack.enter_context(load_engine(floor, device=str(self.device)))
            timesteps = self.chain.calibrated.timesteps
            return measure_floors(self.pipe, timesteps, latents, engine, progress=self.progress, device=self.device)

    def end_to_end(self, latents: ValidationLatents, runner: BoundRunner) -> EndToEnd:
        """Compares one call of the engine with those of the references."""
        floating = whole_denoiser(self.pipe, self.chain.calibrated.timesteps)
        return measure_end_to_end(floating, self.fake_quant, runner, latents, device=self.device)

    def compared(
        self, reference: GeneratedPictures, candidate: GeneratedPictures, schedule: Schedule
    ) -> PictureComparison:
        """Compares the engine's pictures with the FP pipeline's."""
        guidance = self.chain.guidance_scale
        return compare_pictures(
            reference, candidate, self.request.prompts, schedule, guidance, CLASSIFIER, device=self.device
        )

    def on_schedule(self, candidate: DiffusionPipeline, schedule: Schedule) -> PictureComparison:
        """Generates and compares on another schedule."""
        stage = f"pictures, {schedule.scheduler} {schedule.steps}"
        pipes = (("FP", self.pipe), ("engine", candidate))
        first, second = (self.generated(pipe, schedule, f"{stage}, {name}") for name, pipe in pipes)
        return self.compared(first, second, schedule)


def _check_floor(floor: Engine, chain: Chain) -> None:
    if not recipe_from_data(floor.manifest.recipe, str(floor.folder)).is_float:
        raise InputError(f"--floor {floor.folder} quantizes something: give an engine of recipe fp")
    if floor.manifest.base.digest != chain.engine.manifest.base.digest:
        raise InputError(f"--floor {floor.folder} is of another pipeline: give one of {chain.base.base.source}")
