"""Lists of people as data sets publish them."""

from pathlib import Path

from partialfc.writing import read_text

_MOST_BYTES = 1 << 30


def read_people(path: Path) -> list[str]:
    """Return the names of a list of people, each once, in its order.

    A name a line, or LFW's ``people.txt``, ``peopleDevTrain.txt`` and ``peopleDevTest.txt``: how
    many there are (in ``people.txt`` how many folds, then that for each of them), then a line
    ``name<TAB>images`` for each.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it has no name, or not as many as it says; the message names it.
    """
    text = read_text(path, most=_MOST_BYTES).removeprefix("\ufeff")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any("\t" in line for line in lines):
        counts = [int(line) for line in lines if "\t" not in line and line.isdecimal()]
        names = [line.split("\t")[0].strip() for line in lines if "\t" in line]
        said = counts if len(counts) < 2 else counts[1:]
        whole = len(names) + len(counts) == len(lines) and (not said or sum(said) == len(names))
        if not whole or (len(counts) > 1 and counts[0] != len(said)):
            raise ValueError(
                f"{path}: its counts are {counts}, and it has {len(names)} lines of a name, a tab "
                f"and a number, {len(lines)} in all. Is it whole?"
            )
        lines = names
    if not lines:
        raise ValueError(f"{path}: it names nobody; it must have a name a line.")
    return list(dict.fromkeys(lines))
