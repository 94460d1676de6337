"""Folds: the latents become A z + b, reconstructions stay, and a stock VAE folder holds the result."""

from __future__ import annotations

import pytest
import torch

from eqldm.autoencoder.fold import alignment, fold_channels, fold_map, latent_matrix, main, normalisation
from eqldm.data.samples import PictureSamples
from eqldm.model_folder import decode, encode, load_vae, save_model_folder
from eqldm.views import D4, patch_permute

VAES = {
    "stock": {},
    "scaled and shifted": {"scaling_factor": 0.18215, "shift_factor": 0.1},
    "without quant convs": {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.5, "shift_factor": -0.2},
}


def random_map(kind: str, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A well-conditioned channel map, float64."""
    generator = torch.Generator().manual_seed(7)
    offset = torch.randn(channels, generator=generator, dtype=torch.float64)
    if kind == "diagonal":
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        return torch.diag(signs * (0.5 + torch.rand(channels, generator=generator, dtype=torch.float64))), offset
    turned, _ = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))
    return turned @ torch.diag(torch.linspace(0.5, 2, channels, dtype=torch.float64)), offset


def map_channels(matrix: torch.Tensor, offset: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix.to(z), z) + offset.to(z)[:, None, None]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def samples(make_picture_shards, tmp_path_factory) -> PictureSamples:
    return PictureSamples(make_picture_shards(tmp_path_factory.mktemp("shards")))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("changes", VAES.values(), ids=VAES)
@torch.no_grad()
def test_latents_are_mapped_and_reconstructions_stay(make_tiny_vae, x, changes, kind):
    vae, (matrix, offset) = make_tiny_vae(**changes), random_map(kind)
    z, y = encode(vae, x), decode(vae, encode(vae, x))
    fold_map(vae, matrix, offset)
    torch.testing.assert_close(encode(vae, x), map_channels(matrix, offset, z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(vae, encode(vae, x)), y, rtol=1e-5, atol=1e-5)
    assert vae.config.scaling_factor == 1 and vae.config.shift_factor is None
    torch.testing.assert_close(encode(vae, x), vae.encode(x).latent_dist.mean, rtol=0, atol=0)  # as stock pipelines see it


@pytest.mark.parametrize("changes", VAES.values(), ids=VAES)
@torch.no_grad()
def test_a_diagonal_fold_scales_the_posterior_exactly(make_tiny_vae, x, changes):
    vae, (matrix, offset) = make_tiny_vae(**changes), random_map("diagonal")
    std = vae.encode(x).latent_dist.std * vae.config.scaling_factor
    fold_map(vae, matrix, offset)
    torch.testing.assert_close(vae.encode(x).latent_dist.std, matrix.diag().abs().float()[:, None, None] * std)


@torch.no_grad()
def test_a_turn_of_the_channels_leaves_equal_variances_as_they_are(make_tiny_vae, x):
    vae = make_tiny_vae()
    vae.quant_conv.weight[4:] = 0  # equal variances in all channels: a turn must leave them equal
    vae.quant_conv.bias[4:] = -3.0
    matrix, offset = random_map("full")
    fold_map(vae, torch.linalg.qr(matrix).Q, offset)
    expected = torch.full((2, 4, 8, 8), -3.0) + 2 * torch.log(torch.tensor(0.18215))
    torch.testing.assert_close(vae.encode(x).latent_dist.logvar, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", VAES.values(), ids=VAES)
@torch.no_grad()
def test_normalisation_gives_zero_mean_and_unit_std(make_tiny_vae, samples, changes):
    vae = make_tiny_vae(**changes)
    fold_channels(vae, samples, num_images=24)
    latents = latent_matrix(vae, samples, 24, batch_size=7)
    assert latents.shape == (24 * 8 * 8, 4) and latents.dtype == torch.float64
    torch.testing.assert_close(latents.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std(0, unbiased=False), torch.ones(4).double(), rtol=1e-5, atol=0)


def test_statistics_are_of_the_first_pictures_only(tiny_vae, samples):
    few = latent_matrix(tiny_vae, samples, 3)
    torch.testing.assert_close(few, latent_matrix(tiny_vae, samples, 1000)[: len(few)])
    assert len(few) == 3 * 64


def test_what_is_not_finite_has_no_statistics(tiny_pictures, make_tiny_vae):
    for value in (torch.nan, torch.inf):
        latents = torch.randn(50, 4, dtype=torch.float64)
        spoilt = latents.clone()
        spoilt[7, 2] = value
        for call in (lambda: normalisation(spoilt), lambda: normalisation(spoilt, True), lambda: alignment(latents, spoilt)):  # noqa: B023
            with pytest.raises(ValueError, match="hold NaN or infinity"):
                call()
    vae = make_tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity for picture '000000000' of .* its weights are broken .'quant_conv.bias'"):
        latent_matrix(vae, PictureSamples(tiny_pictures), 8)


def test_a_constant_channel_is_refused():
    latents = torch.randn(50, 4).double()
    latents[:, 2] = 0.3
    with pytest.raises(ValueError, match=r"latent channels \[2\] are constant"):
        normalisation(latents)


def white(count: int, channels: int = 4) -> torch.Tensor:
    """Latents with zero mean, unit variance and no correlation, exactly."""
    z = torch.randn(count, channels, generator=torch.Generator().manual_seed(0)).double()
    return torch.linalg.qr(z - z.mean(0)).Q * count**0.5


def turn(channels: int = 4) -> torch.Tensor:
    return torch.linalg.qr(random_map("full", channels)[0]).Q


def test_alignment_recovers_a_turn_a_scale_and_an_offset():
    z, (_, offset) = white(200), random_map("full")
    stretched = z * torch.tensor([3.0, 1, 0.5, 7]) + 2
    matrix, shift = alignment(stretched, 1.5 * z @ turn().T + offset)
    torch.testing.assert_close(stretched @ matrix.T + shift, 1.5 * z @ turn().T + offset)


def test_no_turn_of_the_normalised_latents_is_nearer_and_none_is_shrunk():
    generator = torch.Generator().manual_seed(1)
    z = white(400) @ random_map("full")[0].T
    wanted = z @ torch.randn(4, 4, generator=generator).double() + torch.randn(400, 4, generator=generator).double()
    wanted[:, 2] = wanted[:, 1]  # least squares would be singular
    matrix, offset = alignment(z, wanted)
    normalised = matrix @ torch.diag(z.std(0, unbiased=False))
    scales = torch.linalg.svdvals(normalised)
    torch.testing.assert_close(scales, scales[0].expand(4))
    distance = (z @ matrix.T + offset - wanted).square().mean()
    for seed in range(20):
        spin = 0.1 * torch.randn(4, 4, generator=generator.manual_seed(seed)).double()
        other = torch.linalg.matrix_exp(spin - spin.T)
        turned = (z @ matrix.T + offset - wanted.mean(0)) @ other.T + wanted.mean(0)
        assert (turned - wanted).square().mean() > distance


def test_constant_latents_have_no_alignment():
    with pytest.raises(ValueError, match="latents to align to are constant"):
        alignment(white(50), torch.full((50, 4), 0.3).double())
    with pytest.raises(ValueError, match=r"channels \[3\] are constant"):
        alignment(white(50) * torch.tensor([1.0, 1, 1, 0]), white(50))


def test_alignment_of_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(9, 4\) and \(9, 8\) differ"):
        alignment(torch.randn(9, 4), torch.randn(9, 8))


@torch.no_grad()
def test_folding_an_alignment_comes_near_the_other_vaes_latents(make_tiny_vae, samples, x):
    old, new = make_tiny_vae(scaling_factor=0.3), make_tiny_vae(scaling_factor=0.3)
    fold_map(new, turn(), random_map("full")[1])
    y = decode(new, encode(new, x))
    wanted, before = encode(old, x), encode(new, x)
    fold_channels(new, samples, 24, align_to=old)
    assert (encode(new, x) - wanted).square().mean() < 0.1 * (before - wanted).square().mean()
    torch.testing.assert_close(decode(new, encode(new, x)), y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_fold_commutes_with_views(tiny_vae, make_tiny_vae, x):
    z = encode(tiny_vae, x)
    folded, (matrix, offset) = make_tiny_vae(), random_map("full")
    fold_map(folded, matrix, offset)
    for view in (*D4, patch_permute(4)):
        torch.testing.assert_close(map_channels(matrix, offset, view(z)), view(encode(folded, x)), rtol=1e-5, atol=1e-5)
        turned = decode(folded, view(encode(folded, x)))
        torch.testing.assert_close(turned, decode(tiny_vae, view(z)), rtol=1e-4, atol=1e-5)  # the same error as before


@pytest.mark.parametrize("changes", VAES.values(), ids=VAES)
@torch.no_grad()
def test_a_folded_vae_is_the_same_after_saving_and_loading(make_tiny_vae, x, tmp_path, changes):
    vae = make_tiny_vae(**changes)
    fold_map(vae, *random_map("full"))
    loaded = load_vae(save_model_folder(tmp_path / "model", vae=vae))
    assert loaded.config.use_quant_conv and loaded.config.use_post_quant_conv
    assert loaded.config.scaling_factor == 1 and loaded.config.shift_factor is None
    z = encode(vae, x)
    assert torch.equal(encode(loaded, x), z) and torch.equal(decode(loaded, z), decode(vae, z))


def test_the_command_folds_a_folder(tiny_vae, make_picture_shards, tmp_path, monkeypatch, capsys):
    save_model_folder(tmp_path / "in", vae=tiny_vae)
    shards = make_picture_shards(tmp_path / "shards", count=4)
    monkeypatch.setattr("sys.argv", ["fold", str(tmp_path / "in"), "--data", str(shards), "--out", str(tmp_path / "out")])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    latents = latent_matrix(load_vae(tmp_path / "out"), PictureSamples(shards), 4)
    torch.testing.assert_close(latents.std(0, unbiased=False), torch.ones(4).double(), rtol=1e-5, atol=0)
    monkeypatch.setattr("sys.argv", ["fold", str(tmp_path / "nowhere"), "--data", str(shards), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: model folder .* does not exist"):
        main()


@pytest.mark.gpu
@torch.no_grad()
def test_a_fold_works_where_the_vae_lies(make_tiny_vae, samples, x):
    vae = make_tiny_vae(**VAES["without quant convs"]).cuda()
    y = decode(vae, encode(vae, x.cuda()))
    fold_channels(vae, samples, 24)
    torch.testing.assert_close(decode(vae, encode(vae, x.cuda())), y, rtol=1e-3, atol=1e-3)


def test_keep_origin_commutes_with_negate(tiny_vae):
    torch.manual_seed(0)
    latents = torch.randn(500, 4, dtype=torch.float64) * 3 + 2
    matrix, offset = normalisation(latents, keep_origin=True)
    assert not offset.any()
    assert torch.allclose((latents @ matrix.T).square().mean(0), torch.ones(4, dtype=torch.float64))
    aligned, offset = alignment(latents, latents @ matrix.T @ turn().T, keep_origin=True)
    assert not offset.any() and torch.allclose(aligned, turn() @ matrix)

    z = torch.randn(2, 4, 8, 8)
    before = decode(tiny_vae, -z)
    scaled = torch.einsum("ij,bjhw->bihw", matrix.float(), z)
    fold_map(tiny_vae, matrix, offset)
    with torch.no_grad():
        assert torch.allclose(decode(tiny_vae, -scaled), before, atol=1e-4)


def test_main_deletes_nothing_but_a_model(make_tiny_vae, samples, tmp_path, monkeypatch):
    """Seen before: `--out FOLDER` was replaced with all that lay in it, whatever that was."""
    model = save_model_folder(tmp_path / "model", vae=make_tiny_vae())
    (tmp_path / "precious").mkdir()
    for file in (tmp_path / "precious" / "thesis.tex", tmp_path / "file"):
        file.write_text("years of work")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")

    def fold(out: str) -> None:
        monkeypatch.setattr("sys.argv", ["fold", str(model), "--data", str(samples.shards.folder), "--out", str(tmp_path / out)])
        main()

    for out in ("precious", "file", "dangling", "model"):
        with pytest.raises(SystemExit, match="^error: --out '.*(is no model folder: it would be deleted|is the model to read)"):
            fold(out)
    for out in ("precious", "file", "dangling"):
        with pytest.raises(ValueError, match="it would be deleted"):
            save_model_folder(tmp_path / out, vae=make_tiny_vae())
    assert {path.name for path in tmp_path.iterdir()} == {"model", "precious", "file", "dangling"}
    assert (tmp_path / "precious" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "years of work"
