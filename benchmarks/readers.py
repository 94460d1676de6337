"""Do people read what the judges read? A blind reading of anagrams by several readers, and how they agree with each other and the judges.

    python benchmarks/readers.py draw NAME=DIR/MODEL NAME=DIR/MODEL ... --data DIR --out STUDY
    python benchmarks/readers.py score STUDY --answers READER.csv READER.csv READER.csv

DIR/MODEL is what `eqldm.evaluate --metrics anagram --judge A B ...` left of a method. `draw` takes --num-pictures pictures that need an
anagram, equally many of each method. Within a method half are of those that no judge reads right in both views, a quarter each of those
that some and that all do, as far as there are enough. Among them are --num-real real letters of --data, upright and turned: a reader who
does not read these reads nothing. Each view of a picture is an item of its own, and all items are shuffled.

STUDY/sheets/*.png show the items by number. A reader writes a CSV of `item,letter`: the letter that the item shows, A to Z, or - where it
shows none. STUDY/key.csv says what each item is, with what each judge read, in the order of their names; readers must not see it.
Readers may be people or models; of one model asked several times the agreement is that of one reader with itself.

`score` prints the tables. Agreement is on the items that were drawn, among which hits are more frequent than among all that a method draws.
Rates and the calibration are weighted back to all of the methods' pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from eqldm.command import error_line, whole
from eqldm.evaluation.pictures import open_pictures
from reading_scores import score
from reading_sheets import Method, draw
from steps import script


def main() -> None:
    parser = script(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="make the sheets and the key")
    drawing.add_argument("methods", nargs="+", metavar="NAME=DIR/MODEL")
    drawing.add_argument("--num-pictures", type=whole(1, 10**6), default=200)
    drawing.add_argument("--data", type=Path, required=True, help="glyph shards: real letters are the controls")
    drawing.add_argument("--num-real", type=whole(0, 10**4), default=20, help="real letters, each upright and turned")
    drawing.add_argument("--num-seeds", type=whole(1, 10**4), default=1, help="that the evaluation was given")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--out", type=Path, required=True)
    scoring = commands.add_parser("score", help="print the tables")
    scoring.add_argument("study", type=Path)
    scoring.add_argument("--answers", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    try:
        if args.command == "score":
            print(score(args.study, args.answers), end="")
            return
        if odd := [text for text in args.methods if not all(text.partition("="))]:
            raise ValueError(f"got '{odd[0]}', wanted NAME=DIR/MODEL")
        methods = dict(text.split("=", 1) for text in args.methods)
        if len(methods) < len(args.methods):
            raise ValueError(f"{len(args.methods)} methods have {len(methods)} names: give each its own")
        opened = {name: Method.open(Path(folder), args.num_seeds) for name, folder in methods.items()}
        size = opened[next(iter(opened))].pictures.shape[-1]
        real = open_pictures(str(args.data), size, 10**6)
        draw(opened, args.num_pictures, args.out, args.seed, real, args.num_real)
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    main()
