"""``validate``: its own options, and a finished report judged again."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from s2p_deploy.bench.result import BenchResult, EngineFigures, Machine, Memory, Ratios
from s2p_deploy.cli import main
from s2p_deploy.records import Engine, Number
from tests.cli.commands import Chain, Run
from tests.validation.networks import write_weights


def bench_of(digest: str) -> str:
    """What ``bench --json`` prints of the engine of that digest."""
    number = Number(0.0125, 30, 0.01, 0.02)
    figures = EngineFigures(
        name="engine",
        digest=digest,
        recipe="w8a8",
        size=1_000_000,
        load_seconds=0.5,
        memory=Memory(before=1, loaded=2, steady=3, peak=4),
        step_p50=number,
        step_p95=number,
        picture_seconds=None,
        images_per_minute=None,
        ratios=Ratios(step=number, images_per_minute=None, load=1, steady_memory=1, peak_memory=1, size=1),
    )
    machine = Machine(processor="a processor", cores=2, flags=(), system="Linux", gpu=None, versions={})
    return BenchResult(
        machine=machine,
        backend="onnxruntime",
        precision="f32",
        provider="cpu",
        optimization="reference",
        batch=2,
        rounds=10,
        steps_per_round=3,
        pictures=0,
        sampling_steps=4,
        baseline=figures.model_copy(update={"ratios": None}),
        engines=(figures,),
    ).model_dump_json()


@pytest.fixture(scope="module")
def report(made_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    (folder / "bench.json").write_text(bench_of(Engine.open(Path(made_chain.engine)).manifest.digest))
    options = ["--prompts", made_chain.prompts, "--out", folder / "report", "--junit", folder / "junit" / "gates.xml"]
    options += ["--pictures", 1, "--schedule", "ddim:4", "--bench", folder / "bench.json"]
    assert main([str(part) for part in ["validate", made_chain.engine, *options]]) in {0, 3}
    return folder / "report"


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def test_pictures_schedules_and_junit(report: Path, run: Run) -> None:
    shown = run("validate", "--recheck", report, "--json").data
    suite = ET.parse(report.parent / "junit" / "gates.xml").getroot()[0]
    assert [case.get("name") for case in suite] == [gate["name"] for gate in shown["gates"]]
    text = (report / "report.json").read_text(encoding="utf-8")
    assert '"scheduler": "ddim"' in text
    assert "--pictures 1" in text


def test_recheck_judges_and_writes_nothing(report: Path, run: Run) -> None:
    before = sorted(report.parent.rglob("*"))
    failed = run("validate", "--recheck", report, *settings("validation.gates.median_psnr=99.9"), "--json")
    assert failed.code == 3
    assert failed.data["verdict"] == "failed"
    assert "pictures, median PSNR" in failed.data["error"]["message"]
    assert sorted(report.parent.rglob("*")) == before
    table = run("validate", "--recheck", report, *settings("validation.gates.median_psnr=99.9"))
    assert "pictures, median PSNR" in table.out
    assert table.err.count("\n") == 1


def test_recheck_writes_a_whole_report_where_it_is_told(report: Path, run: Run, tmp_path: Path) -> None:
    options = (*settings("validation.gates.median_psnr=99.9"), "--out", tmp_path / "again")
    assert run("validate", "--recheck", report, *options).code == 3
    assert "a processor" in (tmp_path / "again" / "report.html").read_text(encoding="utf-8"), "the benchmark stays"
    assert run("inspect", tmp_path / "again").code == 0
    assert run("validate", "--recheck", tmp_path / "again", "--junit", tmp_path / "a.xml").code in {0, 3}
    assert ET.parse(tmp_path / "a.xml").getroot()[0].get("tests")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recheck", "REPORT", "--prompts", "shapes:held_out"], "--prompts cannot be given"),
        (["--recheck", "REPORT", "--pictures", "3"], "--pictures cannot be given"),
        (["--recheck", "REPORT", "--device", "cpu"], "--device cannot be given"),
        (["--recheck", "REPORT", "--set", "training.iterations=3"], "validation.gates"),
        (["--recheck", "REPORT", "--recipe", "no-such-recipe"], "no-such-recipe"),
        (["--recheck", "nowhere"], "does not exist"),
        (["ENGINE", "--prompts", "shapes:held_out", "--out", "x", "--recipe", "w8a8"], "fixed in the engine's recipe"),
        (["ENGINE", "--prompts", "shapes:held_out", "--out", "x", *settings("a=1")], "fixed in the engine's recipe"),
        (["ENGINE", "--prompts", "shapes:held_out", "--out", "x", "--schedule", "ddim"], "NAME:STEPS"),
        (["ENGINE", "--prompts", "shapes:held_out", "--out", "x", "--weights-dir", "nowhere"], "SHA256SUMS"),
        (["ENGINE", "--prompts", "shapes:held_out", "--out", "x", "--floor", "ENGINE"], "quantizes something"),
        (["ENGINE", "--prompts", "shapes:held_out", "--out", "x", "--bench", "nowhere"], "bench --json"),
        (["ENGINE", "--prompts", "shapes:held_out", "--out", "x", "--device", "gpu"], "unknown device 'gpu'"),
        (["ENGINE", "--out", "x"], "--prompts and --out"),
        (["--prompts", "shapes:held_out", "--out", "x"], "ENGINE"),
    ],
)
def test_what_does_not_go_together_is_refused(
    report: Path, made_chain: Chain, run: Run, options: list[str], words: str, tmp_path: Path
) -> None:
    known = {"REPORT": str(report), "ENGINE": str(made_chain.engine), "x": str(tmp_path / "x")}
    refused = run("validate", *(known.get(option, option) for option in options))
    assert refused.code == 2
    assert words in refused.err
    assert refused.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_weights_that_were_changed_are_refused_before_anything_runs(
    made_chain: Chain, run: Run, tmp_path: Path
) -> None:
    folder = write_weights(tmp_path / "weights", "lpips-alex.safetensors")
    (folder / "lpips-alex.safetensors").write_bytes(b"other")
    options = ("--prompts", made_chain.prompts, "--out", tmp_path / "x", "--weights-dir", folder)
    refused = run("validate", made_chain.engine, *options)
    assert refused.code == 5
    assert "SHA-256 differs" in refused.err


def test_a_benchmark_of_another_engine_is_refused_before_anything_runs(
    made_chain: Chain, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "bench.json").write_text(bench_of("0" * 64))
    options = ("--prompts", made_chain.prompts, "--out", tmp_path / "x", "--bench", tmp_path / "bench.json")
    refused = run("validate", made_chain.engine, *options)
    assert refused.code == 2
    assert "run s2p-deploy bench on this engine" in refused.err
    assert not (tmp_path / "x.partial").exists()


@pytest.mark.slow
def test_weights_are_measured_and_reported(made_chain: Chain, run: Run, tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "weights", "lpips-alex.safetensors", "clip")
    options = ("--prompts", made_chain.prompts, "--out", tmp_path / "x", "--weights-dir", folder)
    assert run("validate", made_chain.engine, *options).code in {0, 3}
    assert '"lpips"' in (tmp_path / "x" / "report.json").read_text(encoding="utf-8")
