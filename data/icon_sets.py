"""Open sets of drawings, as npm packages of Iconify's: what each drawing shows, of which kind it is, and under which licence.

A package (`npm pack @iconify-json/NAME` gives its .tgz) holds `icons.json` with the bodies of SVGs by name, `info.json` with title,
author and licence, mostly `metadata.json` with categories, and `package.json` with its version. The sets name the same things differently:
`Names` brings them together under one name.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILES = ("icons.json", "info.json", "metadata.json", "package.json")
REFERENCE = ("noto", "twemoji", "fluent-emoji-flat")  # whose names are Unicode's newest ones, and whose categories count first
CATEGORIES = {
    "animals": ("Animals & Nature", "Animals Nature", "Nature"),
    "food": ("Food & Drink", "Food Drink", "Food"),
    "activities": ("Activities", "Activity"),
    "objects": ("Objects",),
    "travel": ("Travel & Places", "Travel Places", "Travel", "Places"),
    "smileys": ("Smileys & Emotion",),
    "people": ("People & Body", "Smiley People", "People"),
    "symbols": ("Symbols", "Modifiers"),
    "flags": ("Flags",),
}
_CATEGORY = {title: category for category, titles in CATEGORIES.items() for title in titles}
DEFAULT_CATEGORIES = ("animals", "food", "activities", "objects", "travel", "smileys")
LEFT_OUT = re.compile(
    r"oclock|thirty$|skin-tone|button|keycap|-flag|flag-|banknote|^(no|non|letter)-|-arrows?$|-(suit|moon-face)$|^chart-|mailbox"
)

# fxemoji writes words together, after Unicode's old names, and calls faces what the others call whole animals
FXEMOJI = {
    **{name: f"{name}-face" for name in ("cat", "dog", "mouse", "pig", "tiger")},
    **{f"{name}side": name for name in ("cat", "dog", "mouse", "pig", "tiger", "leopard")},
    "bunny": "rabbit-face", "bunnyside": "rabbit", "dragonhead": "dragon-face", "dragonside": "dragon", "sheep": "ewe",
    "hampster": "hamster", "evergreen": "evergreen-tree", "aubergine": "eggplant", "present": "wrapped-gift", "tie": "necktie",
    "spurtingwhale": "spouting-whale", "pigsnout": "pig-nose", "earofmaize": "ear-of-corn", "earofrice": "sheaf-of-rice",
    "chilipepper": "hot-pepper", "sliceofpizza": "pizza", "electrictorch": "flashlight", "europeancastle": "castle",
    "housebuilding": "house", "steamlocomotive": "locomotive", "racecar": "racing-car", "moyai": "moai", "lock": "locked",
    "billiards": "pool-8-ball", "bactriancamel": "two-hump-camel", "dromedarycamel": "camel", "doveofpeace": "dove", "bath": "",
    "frontfacingchick": "front-facing-baby-chick", "leaffluttering": "leaf-fluttering-in-wind", "bolt": "high-voltage", "seat": "",
    "bullhorn": "megaphone", "megaphone": "", "darksunglasses": "sunglasses", "daggerknife": "dagger",
    "hocho": "kitchen-knife", "loveletter": "love-letter", "tennisball": "tennis", "schoolsatchel": "backpack", "wave": "water-wave",
    "stormcloud": "cloud-with-lightning", "raincloud": "cloud-with-rain", "snowcloud": "cloud-with-snow", "whitesun": "", "flag": "",
    "wolfface": "wolf", "pandaface": "panda", "izakayalantern": "red-paper-lantern", "helmet": "",
    "sakebottleandcup": "sake", "fatherchristmas": "santa-claus",
}  # fmt: skip
RENAMED = {  # what two sets call by one name, or one set by an old one
    "emojione": {"dromedary-camel": "camel"},
}
SYNONYMS = {
    "automobile": "car", "hot-beverage": "cup of coffee", "lady-beetle": "ladybird", "honeybee": "bee", "ear-of-corn": "corn cob",
    "sauropod": "dinosaur", "t-rex": "tyrannosaurus", "jack-o-lantern": "pumpkin", "eggplant": "aubergine", "doughnut": "donut",
    "front-facing-baby-chick": "chick", "deciduous-tree": "tree", "evergreen-tree": "fir tree", "hot-pepper": "chili pepper",
    "soft-ice-cream": "ice cream cone", "television": "tv", "spouting-whale": "whale", "two-hump-camel": "bactrian camel",
    "rabbit-face": "bunny face", "evergreen": "fir", "locomotive": "steam engine", "soccer-ball": "football", "wrapped-gift": "present",
    "light-bulb": "lamp", "high-voltage": "lightning", "kitchen-knife": "knife", "water-wave": "wave", "red-apple": "apple",
    "pistol": "gun", "mobile-phone": "phone", "spiral-shell": "seashell", "four-leaf-clover": "clover", "ringed-planet": "planet saturn",
    "snowman-without-snow": "snowman", "tropical-drink": "cocktail", "delivery-truck": "truck", "racing-car": "race car",
    "flying-saucer": "ufo", "hot-dog": "hotdog", "sailboat": "sailing boat", "red-heart": "heart", "pile-of-poo": "poo",
    "baby-chick": "little chick", "ewe": "sheep", "bouquet": "bunch of flowers", "bell-pepper": "pepper", "teddy-bear": "teddy",
}  # fmt: skip


@dataclass(frozen=True)
class IconSet:
    """A set: its bodies of SVGs by name, and what it states of itself."""

    name: str
    version: str
    licence: str
    title: str
    author: str
    url: str
    icons: dict[str, dict] = field(repr=False)
    aliases: dict[str, str] = field(repr=False)
    categories: dict[str, str] = field(repr=False)

    @property
    def share_alike(self) -> bool:
        return "-SA" in self.licence.upper()

    def about(self) -> dict[str, str]:
        """For a manifest, or a model card."""
        return {name: getattr(self, name) for name in ("name", "version", "licence", "title", "author", "url")}


@dataclass(frozen=True)
class Drawing:
    """One SVG. name: of the thing, Unicode's, words joined by dashes."""

    name: str
    category: str
    set: str
    icon: str
    svg: str = field(repr=False)


def read_set(path: Path) -> IconSet:
    """The set that a package holds. Raises ValueError for a file that is no such package."""
    try:
        with tarfile.open(path) as tar:
            found = {Path(item.name).name: item for item in tar.getmembers() if item.isfile() and item.name.count("/") == 1}
            files = {name: json.loads(tar.extractfile(found[name]).read()) for name in FILES if name in found}  # type: ignore[union-attr]
        icons, info, version = files["icons.json"], files["info.json"], files["package.json"]["version"]
        side = {name: icons.get(name, default) for name, default in (("width", 16), ("height", 16), ("left", 0), ("top", 0))}
        return IconSet(
            name=icons["prefix"], version=version, licence=info["license"]["spdx"], title=info["name"], author=info["author"]["name"],
            url=info["author"]["url"], icons={name: {**side, **icon} for name, icon in icons["icons"].items()},
            aliases={name: alias["parent"] for name, alias in icons.get("aliases", {}).items() if set(alias) == {"parent"}},
            categories={name: _CATEGORY[title] for title, names in files.get("metadata.json", {}).get("categories", {}).items()
                        for name in names if title in _CATEGORY},
        )  # fmt: skip
    except (tarfile.TarError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"'{path}' is no package of icons ({type(error).__name__}: {error}): npm pack @iconify-json/NAME gives one"
        ) from error


def read_sets(folder: Path, names: Sequence[str] | None = None) -> tuple[list[IconSet], list[str]]:
    """The sets of a folder of packages, by name, and the names of those left out: those that ask to share alike, unless `names` has them.

    Raises: FileNotFoundError where there are none; ValueError for a broken package, two of one set, or names that are not there.
    """
    paths = sorted(folder.glob("*.tgz"))
    if not paths:
        raise FileNotFoundError(f"--packages '{folder}' holds no .tgz, wanted what npm pack @iconify-json/NAME gives")
    found = sorted(map(read_set, paths), key=lambda each: each.name)
    if twice := [name for name, count in Counter(each.name for each in found).items() if count > 1]:
        raise ValueError(f"--packages '{folder}' holds two packages of {', '.join(twice)}: remove one")
    known = [each.name for each in found]
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"--sets names {', '.join(unknown)}, which --packages '{folder}' does not hold: it has {', '.join(known)}")
    used = [each for each in found if (each.name in names if names else not each.share_alike)]
    if not used:
        raise ValueError(f"--packages '{folder}' holds none but share-alike sets ({', '.join(known)}): name what is wanted with --sets")
    return used, [each.name for each in found if each.share_alike and each not in used]


class Names:
    """One name for the things that the sets draw."""

    def __init__(self, sets: Sequence[IconSet]):
        ordered = sorted(sets, key=lambda each: (REFERENCE.index(each.name) if each.name in REFERENCE else len(REFERENCE), each.name))
        self.known = {name for each in ordered if each.name in REFERENCE for name in each.icons}
        self.joined: dict[str, str] = {}
        for each in ordered:
            for name in each.icons if each.name != "fxemoji" else ():
                self.joined.setdefault(name.replace("-", ""), name)
        self.aliases: dict[str, str] = {}  # of an old name to one that the newest sets know
        for each in ordered:
            for alias, parent in each.aliases.items():
                for old, new in ((alias, parent), (parent, alias)):
                    if old not in self.known and new in self.known:
                        self.aliases.setdefault(old, new)
        self.categories: dict[str, str] = {}
        for each in ordered:
            for icon, category in each.categories.items():
                if known := self(each, icon):
                    self.categories.setdefault(known, category)

    def __call__(self, of: IconSet, icon: str) -> str | None:
        """The name of an icon; None for one that is to be left out."""
        if of.name == "fxemoji":
            icon = FXEMOJI.get(icon, icon)
            icon = self.joined.get(icon.replace("-", ""), icon)
            return self.aliases.get(icon, icon) or None
        icon = RENAMED.get(of.name, {}).get(icon, icon)
        if icon not in self.known and (plain := re.sub(r"-\d$", "", icon)) != icon and icon not in of.aliases:
            icon = plain  # streamline draws some things twice
        return self.aliases.get(icon, icon)


def drawings(sets: Sequence[IconSet]) -> list[Drawing]:
    """All drawings of the sets whose category is known, in an order that depends on nothing else."""
    names, found = Names(sets), []
    for each in sets:
        for icon, body in sorted(each.icons.items()):
            name = names(each, icon)
            if name and name in names.categories and not body.get("hidden"):
                found.append(Drawing(name, names.categories[name], each.name, icon, svg_of(body)))
    return found


def svg_of(icon: dict) -> str:
    """The SVG of an icon's body."""
    box = " ".join(str(icon[name]) for name in ("left", "top", "width", "height"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="{icon["width"]}" height="{icon["height"]}">{icon["body"]}</svg>'
    )


def read_names(path: Path) -> list[str]:
    """The names of a file, one a line, words joined by dashes or spaces; # begins a comment. Raises ValueError where it holds none."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not (names := ["-".join(line.split()) for line in lines if line]):
        raise ValueError(f"--names '{path}' holds no names, wanted one a line")
    return names


def choose(
    found: Sequence[Drawing], names: Sequence[str] | None = None, categories: Sequence[str] | None = None, min_drawings: int = 1
) -> list[Drawing]:
    """The drawings of these names, and of these categories (unless names are given: DEFAULT_CATEGORIES, without LEFT_OUT), of things that
    are drawn often enough. Raises ValueError for names that nothing bears, and where nothing is left."""
    known = {each.name for each in found}
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"names without any drawing: {', '.join(unknown[:10])}" + (f" and {len(unknown) - 10} more" * (len(unknown) > 10)))
    if names is not None:
        found = [each for each in found if each.name in set(names)]
    else:
        categories = categories or DEFAULT_CATEGORIES
        found = [each for each in found if not LEFT_OUT.search(each.name)]
    if categories:
        found = [each for each in found if each.category in categories]
    counts = Counter(each.name for each in found)
    if not (found := [each for each in found if counts[each.name] >= min_drawings]):
        raise ValueError(f"no drawing is left: no thing of these names and categories is drawn {min_drawings} times")
    return list(found)
