"""How reports write metrics: their numbers, which way is better, and which question they answer."""

from __future__ import annotations

UP = set("psnr ssim read_right ambigramability best_of precision recall clip_score alignment concealment aligned_share".split())
DOWN = set("lpips rfid fid kid error loss ratio".split())
NEITHER = {"fit/spectral_loss"}
TO_ONE = {"texture", "contrast", "latent_std"}
APART = ("trivial", "equal")  # populations of `lookalikes`
OF_JUDGES = "judges"  # in a metric's name what one of several judges reads follows it
QUESTION_TITLES = {
    "reconstruction": "Reconstruction: how well does the autoencoder reconstruct?",
    "equivariance": "Equivariance: do the latents turn with the picture?",
    "fit": "Fit: does the UNet know these latents?",
    "generation": "Generation: does it draw what it is asked for, as well as real pictures?",
    "anagram": "Anagrams: does it read as both?",
    "components": "Components: does each part read as its own?",
}


def direction(name: str) -> str:
    """Of a metric: ↑ higher is better, ↓ lower, →1 near one, or nothing where neither is better (`_data`: of real pictures)."""
    parts = [] if name in NEITHER or name.endswith("_data") else name.split("/")
    for part in reversed(parts):
        part = "_".join(word for word in part.split("_") if word not in ("upright", "turned"))
        if any(f"_{word}_" in f"_{part}_" for word in TO_ONE):
            return "→1"
        if any(f"_{word}_" in f"_{part}_" for word in DOWN):
            return "↓"
        if any(f"_{word}_" in f"_{part}_" for word in UP):
            return "↑"
    return ""


def question_of(name: str) -> str:
    """The question that a metric answers, as results name it: `fit`, `anagram/rotate_180`, `components/hybrid:0.06`."""
    return "/".join(name.split("/")[: 2 if name.startswith(("anagram/", "components/")) else 1])


def stands_apart(name: str) -> bool:
    """Whether a metric is of pictures beside those that a question is about, such as pairs of letters that need no anagram, or is what one
    of several judges reads of them."""
    return any(f"/{part}/" in name for part in (*APART, OF_JUDGES))


def number(value: float | None) -> str:
    """Three significant figures, or a dash for what was not computed."""
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def file_name(title: str) -> str:
    """Of an anagram's views, of components, or of a question on them, in file names."""
    return title.replace("/", "_").replace(":", "-").replace("@", "+").replace(",", "_")
