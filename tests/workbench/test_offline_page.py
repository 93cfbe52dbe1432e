"""Offline pages: everything inside, equations drawn, films with a fallback."""

import json
import re

import pytest
from nbformat import read, write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from shared.clone import ROOT

from maskalign_lab.workbench import offline_page
from maskalign_lab.workbench.offline_page import Exporter, mathml, write_page

NOTEBOOKS = ROOT / "nbs"

TEX = r"""
g_i = \lVert \partial \mathcal{L}_\text{align} / \partial h_i \rVert_2
\frac{\sqrt{1 - c^2}}{\|z\|}
\operatorname{sim}(z_i, y_i) = \hat z_i^\top \hat y_i
\sum_{i=1}^{N} \mathbb{1}[g_i \ge q_{0.9}]
\mathbf{x} \in \mathbb{R}^{n \times d}
\left\lVert J^\top \left(\hat y - c\,\hat z\right)\right\rVert
x_t = (1 - t)\, x + t\, \varepsilon, \qquad v = \varepsilon - x
\ell_i=-\cos\big(r_i,h_\phi(h_i)\big),\qquad g_i=\Big\|\frac{\partial}{\partial h_i}\sum_j \ell_j\Big\|_2
\mathbb{E}_{t \sim \mathcal{U}(0, 1)} \bigl[ \lambda \cdot \overline{\nabla_\theta} \bigr] \approx 21\times
\begin{cases} 1 & t < 0.5 \\ 0 & \text{otherwise} \end{cases}
""".strip().splitlines()


def page_of(folder, *cells):
    write(new_notebook(cells=list(cells)), folder / "book.ipynb")
    return write_page(folder / "book.ipynb", folder / "pages" / "book.html").read_text(encoding="utf-8")


def film_cell(folder, saved=True):
    film = {
        "label": "t </script>",
        "labels": ["<0>", "1"],
        "default": 1,
        "plot": {"data": [], "layout": {}, "frames": []},
    }
    if saved:
        (folder / "film.json").write_text(json.dumps(film))
    note = {"maskalign_lab": {"scrubber": "film.json"}}
    data = {"image/png": "iVBORw0KGgo=", "text/plain": "filmstrip"}
    return new_code_cell("show(film)", outputs=[new_output("display_data", data=data, metadata=note)])


@pytest.mark.parametrize("tex", TEX)
def test_equations_are_translated_whole(tex):
    found = mathml(tex)
    assert found.startswith("<math") and "\\" not in found and "&</mi>" not in found


@pytest.mark.parametrize("name", ["aligned", "align", "align*"])
def test_aligned_equations_become_tables(name):
    found = mathml(rf"\begin{{{name}}} a &= b \\ c &= d \end{{{name}}}", "block")
    assert found.count("<mtr>") == 2 and 'display="block"' in found


def test_markdown_with_equations_code_and_prices():
    text = Exporter().markdown2html("Of $x_t$, `$x_t$` and\n\n$$a < b$$\n\n| $\\alpha$ |\n|---|\n| 1 |")
    assert text.count("<math") == 3 and "<code>$x_t$</code>" in text and "<table>" in text


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda path: path.stem)
def test_every_equation_of_the_notebooks_is_translated(notebook, monkeypatch):
    failed, translate = [], offline_page.mathml

    def checked(tex, display="inline"):
        found = translate(tex, display)
        failed.extend([] if found.startswith("<math") else [tex])
        return found

    monkeypatch.setattr(offline_page, "mathml", checked)
    for cell in read(notebook, 4).cells:
        if cell.cell_type == "markdown":
            Exporter().markdown2html(cell.source)
    assert not failed


def test_a_page_holds_everything(tmp_path):
    text = page_of(
        tmp_path, new_markdown_cell("# The *title* <b>\n\n$x_t$"), new_code_cell("1 + 1"), film_cell(tmp_path)
    )
    loads = re.findall(r"""(?:src|href)=["']([^"']*)|@import|url\(([^)]*)""", text)
    assert [a for a, _ in loads if not a.startswith("data:")] == ["plotly.min.js"]
    assert "mathjax" not in text.lower() and "require.js" not in text and "mermaid" not in text
    assert (tmp_path / "pages" / "plotly.min.js").stat().st_size > 1_000_000


def test_a_page_without_films_has_no_script(tmp_path):
    text = page_of(tmp_path, new_markdown_cell("# Title"))
    assert "<script" not in text and not (tmp_path / "pages" / "plotly.min.js").exists()
    assert "<title>Title</title>" in text


def test_a_film_takes_the_place_of_its_strip_and_keeps_it_as_a_fallback(tmp_path):
    text = page_of(tmp_path, film_cell(tmp_path))
    assert text.count('class="film"') == 1 and text.count("data:image/png;base64,iVBORw0KGgo=") == 1
    assert "t &lt;/script&gt; <input" in text and "<output>1</output>" in text
    data = re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data)["labels"] == ["<0>", "1"]


def test_a_missing_film_is_told_and_its_strip_shown(tmp_path):
    with pytest.warns(UserWarning, match="film.json is missing"):
        text = page_of(tmp_path, film_cell(tmp_path, saved=False))
    assert 'class="film"' not in text and "data:image/png" in text


def test_notes_to_nbdev_and_hidden_cells_are_left_out(tmp_path):
    text = page_of(tmp_path, new_code_cell("#| export\nvisible = 1"), new_code_cell("#| hide\nhidden = 1"))
    assert "visible" in text and "#|" not in text and "hidden" not in text


def test_a_page_does_not_change_its_notebook(tmp_path):
    write(new_notebook(cells=[film_cell(tmp_path)]), tmp_path / "book.ipynb")
    before = (tmp_path / "book.ipynb").read_bytes()
    write_page(str(tmp_path / "book.ipynb"), str(tmp_path / "book.html"))
    assert (tmp_path / "book.ipynb").read_bytes() == before


def test_failed_cells_and_long_tables_are_shown(tmp_path):
    error = new_output("error", ename="ValueError", evalue="bad", traceback=["ValueError: bad < worse"])
    text = page_of(tmp_path, new_code_cell("1 / 0", outputs=[error]))
    assert "bad &lt; worse" in text and "output_error" in text
