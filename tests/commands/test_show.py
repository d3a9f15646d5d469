"""partialfc show: who is in a pack by name, and distributions that a long tail does not flatten."""

import numpy as np
import pytest
from PIL import Image

from partialfc.__main__ import main
from partialfc.commands import show
from partialfc.data.names import names_path
from partialfc.data.packs.pack import open_pack
from tests.support.images import face

PEOPLE = {"Ann": 1, "Bo": 2, "Cy [$x_1$]": 40, "Di": 1, "Ed": 3}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    for number, (name, count) in enumerate(PEOPLE.items()):
        (folder / "photos" / name).mkdir(parents=True)
        for image in range(count):
            path = folder / "photos" / name / f"{image:02d}.png"
            Image.fromarray(face(number, image, 16)).save(path)
    words = ["pack", folder / "photos", folder / "people.rec", "--size", "16", "--workers", "1"]
    assert main([str(word) for word in words]) == 0
    return open_pack(folder / "people.rec")


def test_people_are_shown_by_name_and_number(pack, tmp_path, capsys):
    assert show.main([str(pack.path), "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "most images Cy [$x_1$] (2) 40, Ed (4) 3, Bo (1) 2" in shown
    assert "names in people.identities.json" in shown
    contents = show.read(pack)
    faces = show.draw_faces(pack, contents)
    words = [text.get_text() for axes in faces.axes for text in axes.texts]
    assert words == ["Bo (1)", "Cy [$x_1$] (2)", "Ed (4)"], "those with several images"
    names = names_path(pack.path)
    hidden = names.rename(tmp_path / "hidden.json")
    assert show.read(pack).called(2) == "2", "somebody else's pack has numbers alone"
    hidden.rename(names)


def test_a_long_tail_is_drawn_on_logarithmic_axes_that_say_so(pack):
    each, per, _ = show.draw_labels(pack, show.read(pack)).axes
    assert (each.get_yscale(), per.get_xscale(), per.get_yscale()) == ("log",) * 3
    assert "log scale" in each.get_ylabel()
    assert "log scale" in per.get_xlabel()
    assert sum(bar.get_height() for bar in per.patches) == len(PEOPLE), "each is in a bin"
    even = show.Contents(np.arange(4).repeat(3), np.full(12, 900), np.full(4, 3))
    each, per, _ = show.draw_labels(pack, even).axes
    assert (each.get_yscale(), per.get_xscale(), per.get_yscale()) == ("linear",) * 3
    assert "log" not in per.get_xlabel()
    assert [text.get_text() for text in per.get_legend().get_texts()] == ["median 3"]
