from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image.lpips import NetLinLayer, ScalingLayer
from transformers import CLIPModel, CLIPProcessor

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.metric_networks import CLIP, INCEPTION, LPIPS, SUMS, Lpips, load_weights
from s2p_deploy.records import Number, Skipped
from s2p_deploy.validation import open_weights
from s2p_deploy.validation.measurements import Perceptual
from s2p_deploy.validation.perceptual import measure_perceptual
from s2p_deploy.validation.pictures import PicturePairs
from tests.validation.networks import pin, write_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "all", INCEPTION, LPIPS, CLIP)


@pytest.fixture(scope="module")
def pairs() -> PicturePairs:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (5, 40, 48, 3), np.uint8)
    candidate = (reference * 0.9).astype(np.uint8)
    candidate[0] = reference[0]
    return PicturePairs(tuple(f"prompt {letter}" for letter in "abcde"), reference, candidate)


@pytest.fixture(scope="module")
def found(folder: Path, pairs: PicturePairs) -> Perceptual:
    return measure_perceptual(pairs, open_weights(folder))


def test_every_metric_has_its_n_and_interval(found: Perceptual) -> None:
    for distance in (found.fid, found.sfid, found.fid_clip):
        assert isinstance(distance, Number)
        assert distance.n == 5
        assert distance.value > 0
        assert distance.low is not None
    assert isinstance(found.lpips, np.ndarray)
    assert found.lpips.shape == (5,)
    assert found.lpips[0] == 0, "equal pictures"
    assert (found.lpips[1:] > 0).all()


def test_equal_pictures_are_no_distance_apart(folder: Path, pairs: PicturePairs) -> None:
    same = measure_perceptual(PicturePairs(pairs.texts, pairs.reference, pairs.reference), open_weights(folder))
    for distance in (same.fid, same.sfid, same.fid_clip):
        assert isinstance(distance, Number)
        assert distance.value == pytest.approx(0, abs=1e-6)
    assert isinstance(same.lpips, np.ndarray)
    assert not same.lpips.any()


def test_lpips_is_what_the_parts_of_torchmetrics_give(folder: Path, pairs: PicturePairs) -> None:
    network = load_weights(Lpips(), folder / LPIPS)
    stored = load_file(folder / LPIPS)
    first, second = (
        torch.from_numpy(one.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
        for one in (pairs.reference, pairs.candidate)
    )
    total = torch.zeros(5)
    with torch.no_grad():
        for place, end in enumerate((2, 5, 8, 10, 12)):
            weighting = NetLinLayer(stored[f"lin{place}.model.1.weight"].shape[1], use_dropout=True).eval()
            weighting.load_state_dict({"model.1.weight": stored[f"lin{place}.model.1.weight"]})
            seen = [network.features[:end](ScalingLayer()(one)) for one in (first, second)]  # type: ignore[index]
            units = [torch.nn.functional.normalize(one, dim=1, eps=1e-10) for one in seen]
            total += weighting((units[0] - units[1]) ** 2).mean((1, 2, 3))
        torch.testing.assert_close(network(first, second), total)


def test_clip_score_is_the_network_s_own_cosine(folder: Path, pairs: PicturePairs, found: Perceptual) -> None:
    model = CLIPModel.from_pretrained(folder / CLIP, local_files_only=True)
    processor = CLIPProcessor.from_pretrained(folder / CLIP, local_files_only=True)
    assert isinstance(found.clip_score, np.ndarray)
    assert found.clip_score.shape == (2, 5)
    for scores, pictures in zip(found.clip_score, (pairs.reference, pairs.candidate), strict=True):
        given = processor(text=list(pairs.texts), images=list(pictures), return_tensors="pt", padding=True)
        with torch.no_grad():
            cosines = (model(**given).logits_per_image / model.logit_scale.exp()).diagonal()
        np.testing.assert_allclose(scores, 100 * cosines.clamp_min(0).double().numpy(), atol=1e-3)


def test_what_is_not_there_is_skipped_with_the_reason(tmp_path: Path, pairs: PicturePairs) -> None:
    found = measure_perceptual(pairs, open_weights(write_weights(tmp_path / "some", LPIPS)))
    assert isinstance(found.lpips, np.ndarray)
    assert found.fid == found.sfid == Skipped("the folder of weights has no inception-v3-fid.safetensors")
    assert found.clip_score == Skipped("the folder of weights has no clip")
    small = PicturePairs(pairs.texts, pairs.reference[:, :30], pairs.candidate[:, :30])
    assert isinstance(measure_perceptual(small, open_weights(tmp_path / "some")).lpips, Skipped)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("features.3.bias"), "features.3.bias is missing"),
        (lambda state: state.update(more=torch.zeros(1)), "more has no place"),
        (lambda state: state.update({"features.3.bias": torch.zeros(3)}), r"is \[3\], expected \[192\]"),
    ],
)
def test_weights_of_another_network_are_refused(
    change: object, words: str, folder: Path, pairs: PicturePairs, tmp_path: Path
) -> None:
    state = load_file(folder / LPIPS)
    assert callable(change)
    change(state)
    save_file(state, tmp_path / LPIPS)
    with pytest.raises(IntegrityError, match=words):
        measure_perceptual(pairs, open_weights(pin(tmp_path)))


def test_a_clip_that_holds_code_or_pickles_is_not_read(tmp_path: Path, pairs: PicturePairs) -> None:
    folder = write_weights(tmp_path / "clip-only", CLIP)
    (folder / CLIP / "model.safetensors").rename(folder / CLIP / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match="no CLIP"):
        measure_perceptual(pairs, open_weights(pin(folder)))
    assert (folder / SUMS).is_file()


@pytest.fixture
def pinned(tmp_path: Path) -> Path:
    (tmp_path / LPIPS).write_bytes(b"weights")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not read, not pinned", encoding="utf-8")
    return pin(tmp_path)


def test_what_is_pinned_is_there_with_its_digest(pinned: Path) -> None:
    found = open_weights(pinned)
    assert set(found.digests) == {LPIPS, "clip/config.json"}
    assert found.place(LPIPS) == pinned / LPIPS
    assert found.place("inception-v3-fid.safetensors") == Skipped(
        "the folder of weights has no inception-v3-fid.safetensors"
    )


@pytest.mark.parametrize("line", ["{} *{}", "{}  ./{}"])
def test_other_forms_of_sha256sum(pinned: Path, line: str) -> None:
    digests = open_weights(pinned).digests
    text = "".join(line.format(digest, name) + "\n" for name, digest in digests.items())
    (pinned / SUMS).write_text(text, encoding="utf-8")
    assert open_weights(pinned).digests == digests


def test_a_folder_without_a_list_is_refused(pinned: Path) -> None:
    (pinned / SUMS).unlink()
    with pytest.raises(InputError, match="sha256sum"):
        open_weights(pinned)
    with pytest.raises(InputError, match="sha256sum"):
        open_weights(pinned / "missing")


def test_a_changed_file_is_refused(pinned: Path) -> None:
    (pinned / LPIPS).write_bytes(b"Weights")
    with pytest.raises(IntegrityError, match="SHA-256 differs"):
        open_weights(pinned)


def test_a_file_that_is_not_in_the_list_is_refused(pinned: Path) -> None:
    (pinned / "clip" / "model.safetensors").write_bytes(b"more")
    with pytest.raises(IntegrityError, match=r"clip/model\.safetensors is not pinned"):
        open_weights(pinned)


@pytest.mark.parametrize(
    "text", ["abc  lpips", f"{'0' * 64}  ../up\n", f"{'0' * 64}  /root\n", f"{'G' * 64}  a\n", "\n"]
)
def test_a_damaged_list_is_refused(pinned: Path, text: str) -> None:
    (pinned / SUMS).write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"SHA256SUMS:1 is not a SHA-256"):
        open_weights(pinned)
