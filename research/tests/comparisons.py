"""Comparisons made up by hand, for tests of what shows them."""

from __future__ import annotations

from s2p_deploy.records import Number
from s2p_research.comparison import (
    Comparison,
    FailedRecipe,
    FloatFigures,
    Gains,
    PictureFigures,
    RecipeFigures,
    Spread,
    StepErrors,
    TimestepSqnr,
)

HOSTILE = "<script>alert(1)</script> $x_^ | **bold** `code` {{ 7 * 7 }}"


def spread(value: float) -> Spread:
    """Around ``value``, over three pictures."""
    number = Number(value, 3, value - 1, value + 1)
    return Spread(median=number, mean=number, tenth=Number(value - 2, 3, value - 3, value), worst=value - 3)


def recipe(
    name: str, psnr: float, *, bits: float = 8.0, gain: float | None = None, schedules: int = 1
) -> RecipeFigures:
    """A recipe that draws with ``psnr`` dB on every schedule; its other figures follow from that."""
    pictures = PictureFigures(
        psnr=spread(psnr),
        ssim=spread(psnr / 100),
        haarpsi=spread(psnr / 100),
        feature_distance=Number(100 - psnr, 3, 90 - psnr, 110 - psnr),
        accuracy=Number(0.9, 3, 0.8, 1.0),
        step_error=StepErrors(timesteps=(901.0, 1.0), low=(0.1, 0.2), median=(0.2, 0.3), high=(0.3, 0.4)),
        seconds=0.5,
        psnr_values=(psnr - 3, psnr, psnr + 3),
    )
    averages = {"weights": bits, "activations": bits}
    return RecipeFigures(
        name=name,
        digest="0" * 64,
        average_bits={"parameters": averages, "layers": averages, "input_elements": averages},
        size=4_000_000,
        simulation_only="",
        training={"iterations": 2, "loss": "timestep_balanced"},
        calibration_seconds=12.0,
        sqnr=TimestepSqnr(
            timestep_indices=(1, 501), db=(psnr - 20, psnr - 10), mean=Number(psnr - 15, 2, psnr - 16, psnr - 14)
        ),
        pictures=(pictures,) * schedules,
        gains=() if gain is None else (Gains(psnr=Number(gain, 3, gain - 0.5, gain + 0.5)),) * schedules,
    )


def failed(name: str) -> FailedRecipe:
    """A recipe that came to nothing."""
    return FailedRecipe(name=name, error="InputError", message="a rule matches no layer")


def comparison(*recipes: RecipeFigures | FailedRecipe, schedules: int = 1) -> Comparison:
    """Of three pictures; the second schedule is UniPC's."""
    shift = {"psnr": Number(28.5, 3, 27.0, 30.0), "ssim": Number(0.95, 3), "haarpsi": Number(0.85, 3)}
    floats = [
        FloatFigures(scheduler=scheduler, steps=steps, pixel_shift=shift, accuracy=Number(0.99, 3), seconds=0.25)
        for scheduler, steps in ((None, 50), ("unipc", 10))
    ]
    return Comparison(
        source="shapes",
        base="1" * 64,
        size=7_000_000,
        guidance_scale=2.0,
        train="2" * 64,
        held_out="3" * 64,
        pictures=3,
        latents=2,
        floats=tuple(floats[:schedules]),
        recipes=recipes,
        command="python -m s2p_research compare one two --out DIR",
        versions={"torch": "2.11", "diffusers": "0.42"},
        threads=1,
    )
