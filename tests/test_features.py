"""Features and the distances on them: the same as the libraries' own on the same pictures; other files are refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eqldm.data.samples import from_bytes
from eqldm.evaluation.features import inception_features, judge_features, timm_features
from eqldm.evaluation.judge import Judge
from eqldm.evaluation.quality import fid, kid, precision_recall


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Random weights of the real network, in the form of the real file."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:  # to be made, it must be given a file
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        torch.save({}, path)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


def pictures(seed: int, count: int = 8) -> torch.Tensor:
    """uint8 [N, 3, 32, 32]."""
    patches = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 4), np.uint8)
    return torch.from_numpy(patches).repeat_interleave(8, -1).repeat_interleave(8, -2)


@pytest.mark.slow
def test_distances_are_those_of_torch_fidelity(inception, tmp_path):
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        for k, x in enumerate(pictures(seed)):
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(folders[-1] / f"{k:03d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[1]), input2=str(folders[0]), cuda=False, fid=True, kid=True, prc=True, verbose=False, kid_subset_size=8,
        kid_subsets=1, feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception), batch_size=8, cache=False,
        save_cpu_ram=True,
    )  # fmt: skip
    features = inception_features(inception)
    real, fake = (features.extract(from_bytes(pictures(seed))) for seed in (0, 1))
    assert features.name == "inception" and real.shape == (8, 2048)
    assert float(kid(real, fake)) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert float(fid(real, fake)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert precision_recall(real, fake) == (theirs["precision"], theirs["recall"])


def test_no_inception_weights_says_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Inception weights at '.*weights-inception.*': get https://.*or give --inception FILE"):
        inception_features()


def test_precision_and_recall_by_hand():
    """Four of five sampled points among the real ones, of which they reach half."""
    real = torch.tensor([[0.0], [1], [2], [3], [100], [101], [102], [103]])
    fake = torch.tensor([[0.5], [1.5], [2.5], [3.5], [1000]])
    precision, recall = precision_recall(real, fake)
    assert (precision, recall) == (pytest.approx(0.8), pytest.approx(1.0))  # the outlier's ball holds all
    precision, recall = precision_recall(real, fake[:4])
    assert (precision, recall) == (1.0, 0.5)


def test_timm_backbones(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", pretrained=False)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    features = timm_features("resnet10t", tmp_path / "weights.safetensors")
    x = from_bytes(pictures(0, 2))
    found = features.extract(x)
    assert features.name == "resnet10t" and found.shape == (2, 512) and not found.requires_grad
    # by timm's own transform for evaluation
    network.reset_classifier(0)
    config = timm.data.resolve_model_data_config(network)
    config["crop_pct"] = 1.0
    transform = timm.data.create_transform(**config, is_training=False)
    pils = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pictures(0, 2)]
    with torch.no_grad():
        expected = network.eval()(torch.stack([transform(pil) for pil in pils]))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)  # theirs resizes 8 bits
    assert timm_features("resnet10t", tmp_path / "weights.pth").hash == features.hash


def test_the_judges_features():
    judge = Judge.open()
    features = judge_features(judge)
    x = from_bytes(pictures(0, 3))
    torch.testing.assert_close(features.extract(x), judge.features(x))
    assert features.name == "judge" and len(features.hash) == 16


class Shout:
    def __reduce__(self):
        return (print, ("run",))


def test_what_is_refused(tmp_path, capsys):
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Shout()))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for call, message in (
        (lambda: inception_features(tmp_path / "code.pth"), "no file of weights alone, and is not opened"),
        (lambda: inception_features(tmp_path / "other.pth"), "holds no weights of torch-fidelity's InceptionV3"),
        (lambda: inception_features(tmp_path / "list.pth"), "holds no weights by name"),
        (lambda: timm_features("resnet10t", tmp_path / "other.pth"), "holds no weights of timm's 'resnet10t'"),
        (lambda: timm_features("resnet10", tmp_path / "other.pth"), "timm knows no model 'resnet10'; near: resnet10"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="no weights of 'resnet10t' at '.*none.pth'"):
        timm_features("resnet10t", tmp_path / "none.pth")
    assert "run" not in capsys.readouterr().out
