"""``calibrate``: what the options of a device's memory and arithmetic do."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy import Recipe, calibrate
from s2p_deploy.cli.options import overrides_from_settings
from s2p_deploy.context import Context
from tests.cli.commands import QUICK, Run, quick_settings

TRAINED = ("--recipe", "w4a8", "--device", "cpu")


@pytest.mark.slow
def test_a_dry_run_tells_how_the_training_fits_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "calib"
    told = run("calibrate", "shapes", *TRAINED, "--out", out, "--dry-run", "--memory-limit", "8GiB")
    assert told.code == 0, told.err
    assert told.out.startswith("training: 2000 iterations of 32 x 1: ")
    assert told.out.endswith(" GiB of 8.0 GiB\n")
    told = run("calibrate", "shapes", *TRAINED, "--out", out, "--dry-run", "--json")
    assert told.data == {"kind": "fit", "training": None}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["w8a8", "ptq-stream", "fp"])
def test_a_dry_run_refuses_a_rule_that_the_run_would_refuse(run: Run, tmp_path: Path, recipe: str) -> None:
    rule = "rules=[{match: conv_inn, weights: int8, activations: none}]"
    command = ("calibrate", "shapes", "--recipe", recipe, "--device", "cpu", "--out", tmp_path / "a", "--set", rule)
    refused = run(*command, "--prompts", "shapes:train", "--dry-run")
    assert refused.code == 2
    assert "recipe rule 'conv_inn' matches no layer of this denoiser" in refused.err
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(run: Run, tmp_path: Path) -> None:
    small = ("--recipe", "w8a8", "--device", "cpu", "--memory-limit", "1M", "--out", tmp_path / "a")
    refused = run("calibrate", "shapes", *small, "--dry-run")
    assert refused.code == 4
    assert "the denoiser and one sample take 0.0 GiB" in refused.err
    assert refused.err.endswith("can be used: use --device cpu, or recipe ptq-stream\n")
    refused = run("calibrate", "shapes", *TRAINED, "--out", tmp_path / "a", "--memory-limit", "much")
    assert refused.code == 2
    assert "--memory-limit 'much' must be a size" in refused.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--control-images", "."], "give all three"),
        (["--controlnet", "."], "give all three"),
        (["--controlnet", ".", "--control-images", ".", "--dry-run"], "--dry-run cannot be used with --controlnet"),
        (["--controlnet", ".", "--control-images", ".", "--lora", "a.safetensors"], "--lora cannot be used with"),
        (["--controlnet", ".", "--control-images", ".", "--target-psnr", "50"], "--target-* cannot be used with"),
    ],
)
def test_what_a_controlnet_is_not_calibrated_with_is_refused(
    run: Run, tmp_path: Path, options: list[str], words: str
) -> None:
    prompts = () if words == "give all three" and "--controlnet" in options else ("--prompts", "shapes:train")
    refused = run("calibrate", "shapes", "--recipe", "w8a8", "--out", tmp_path / "calib", *prompts, *options)
    assert refused.code == 2
    assert words in refused.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "named"),
    [
        (("--tf32",), "arithmetic"),
        (("--deterministic",), "arithmetic"),
        (("--samples-per-call", "1"), "samples per call"),
        (("--memory-limit", "8GiB"), "memory limit"),
    ],
)
def test_an_option_reaches_the_calibration(
    run: Run, prompts_file: Path, option: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    """Unfinished work without the option is not gone on with."""
    recipe = Recipe.load("w4a8", overrides_from_settings(list(QUICK)))

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "dataset":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(
            "shapes", recipe=recipe, prompts=prompts_file, out=tmp_path / "a", context=Context("cpu", progress=stop)
        )
    options = (*TRAINED, "--prompts", prompts_file, "--out", tmp_path / "a", *quick_settings())
    refused = run("calibrate", "shapes", *options, *option)
    assert refused.code == 2
    assert f"holds unfinished work with another {named}: start it as it was" in refused.err
    assert run("calibrate", "shapes", *options, "--no-tf32").code == 0
