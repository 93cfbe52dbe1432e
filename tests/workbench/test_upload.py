"""An upload without a browser: what the handler makes of a file, and what is read when it cannot."""

import html
from datetime import datetime

import ipywidgets as w

from maskalign_lab.workbench import upload
from maskalign_lab.workbench.upload import Upload, offer_upload


def choose(given: Upload, name: str, content: bytes) -> None:
    """What the browser does when a file is chosen."""
    told = {"type": "image/png", "size": len(content), "last_modified": datetime(2026, 1, 1)}
    given.button.value = ({"name": name, "content": memoryview(content), **told},)


def make(name, content):
    if content == b"":
        raise ValueError(f"<{name}> is empty")
    if content == b"boom":
        raise KeyError("lost")
    return w.VBox([w.Label(f"{name}: {content.decode()}")])


def test_a_file_becomes_a_widget_and_the_next_takes_its_place():
    given = Upload(make)
    assert given.box.children == (given.button, given.error, given.shown) and not given.button.multiple
    choose(given, "one.png", b"first")
    (one,) = given.shown.children
    choose(given, "two.png", b"second")
    (two,) = given.shown.children
    assert two.children[0].value == "two.png: second" and given.error.value == ""
    assert one.comm is None and one.children[0].comm is None, "what was shown before is closed"


def test_a_mistake_is_told_without_a_traceback_and_forgotten():
    given = Upload(make)
    choose(given, "one.png", b"first")
    choose(given, "empty.png", b"")
    assert "<empty.png> is empty" in html.unescape(given.error.value) and "&lt;empty" in given.error.value
    assert "line" not in given.error.value and given.shown.children == ()
    choose(given, "two.png", b"second")
    assert given.error.value == "" and len(given.shown.children) == 1


def test_any_other_error_says_where_it_happened():
    given = Upload(make)
    choose(given, "bad.png", b"boom")
    told = html.unescape(given.error.value)
    assert "KeyError" in told and "bad.png" in told and "test_upload.py" in told


def test_nobody_is_offered_a_button_that_cannot_be_pressed(capsys, monkeypatch):
    offer_upload(make, "Your cat")
    assert capsys.readouterr().out == "In Jupyter, run this cell for a button: Your cat.\n"
    shown = []
    monkeypatch.setattr(upload, "watched", lambda: True)
    monkeypatch.setattr(upload, "display", shown.append)
    offer_upload(make, "Your cat")
    assert shown[0].children[0].description == "Your cat" and shown[0].children[0].accept == ".jpg,.jpeg,.png"
