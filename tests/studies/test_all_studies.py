"""Every study as its users meet it: run by papermill, opened with mistakes, scrubbed in JupyterLab, its page read offline.

A new study is a new row of STUDIES. What only one study promises stands in its own file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image
from shared.browser import changed_by, choose, run_study_in_lab, shown, there_and_back
from shared.groups import group_of
from shared.studies import check_figure, code_cells, run_job, run_opening

from maskalign_lab.base import paths
from maskalign_lab.workbench.jobs import run_study
from maskalign_lab.workbench.study_parameters import study_parameters

# ---- what a person does with the controls of a study, beyond its slider


def other_runs(page):
    choose(page, "reg-shapes")


def other_sides(page):
    """Two networks that stand the other way round, another image, and another token; then what stands further below."""
    choose(page, "square")
    _, before = choose(page, "sit-shapes")
    x, y = page.evaluate(PLACE)
    page.mouse.move(x - 2, y)
    _, after = changed_by(page, lambda: page.mouse.click(x, y))
    assert len(before) == 8 and before == after  # maps stay, the token and its curve change
    another_teacher(page)
    a_cell_opens_its_tokens(page)
    my_picture(page)


def another_teacher(page):
    """Another teacher of SiT on the left of the grid's pairs."""
    page.locator(".js-plotly-plot").nth(1).scroll_into_view_if_needed()
    words, maps = choose(page, "SiT / random", number=1)
    assert "SiT / random: marked" in words and "REPA / permuted: marked" in words and len(maps) == 6


def a_cell_opens_its_tokens(page):
    """A click near a corner of the heat map over depth and time shows the tokens behind that cell."""
    page.locator(".js-plotly-plot").nth(2).scroll_into_view_if_needed()
    before, (heat, tokens) = shown(page, 2)
    x, y = page.evaluate(PLACE, [2, 0.05, 0.05])
    page.mouse.move(x - 2, y)
    after, (same, others) = changed_by(page, lambda: page.mouse.click(x, y), 2)
    assert same == heat and others != tokens and "noised, t = 0.00" in after
    assert "teacher's token in block 1" in after and "teacher's token in block 1" not in before


def my_picture(page):
    """A picture of one's own through the lens of study 01: a scrubber under the button, named by the file."""
    button = page.get_by_role("button", name="Your picture: the pull")
    button.scroll_into_view_if_needed()
    with page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files({"name": "desk.png", "mimeType": "image/png", "buffer": slope()})
    plot = page.locator(".js-plotly-plot").nth(3)
    plot.wait_for(timeout=60_000)
    assert any("desk.png" in word for word in shown(page, 3)[0])


def slope() -> bytes:
    """A picture that is no square."""
    file = BytesIO()
    Image.fromarray(np.uint8(np.mgrid[:60, :80].sum(0)[..., None] + [0, 60, 100])).save(file, "png")
    return file.getvalue()


def other_targets(page):
    """Another prediction, another loss and patch, and the toy in another dimension."""
    choose(page, "v")
    choose(page, "x, 8")
    page.locator(".js-plotly-plot").nth(1).scroll_into_view_if_needed()
    choose(page, "16", number=1)


def other_classes(page):
    choose(page, "no label")


PLACE = """given => { const [number, across, down] = given || [0, 0.8, 0.8];
  const plot = document.querySelectorAll('.js-plotly-plot')[number];
  const map = plot._fullData.find(trace => trace.type === 'heatmap'), box = plot.getBoundingClientRect();
  const axes = [map.xaxis, map.yaxis].map(name => plot._fullLayout[name[0] + 'axis' + name.slice(1)]);
  return [box.x + axes[0]._offset + across * axes[0]._length, box.y + axes[1]._offset + down * axes[1]._length] }"""


def grey(page) -> int:
    """Tokens of the first map without a value."""
    return sum(value is None for row in shown(page)[1][0] for value in row)


def other_tokens(page):
    """Dropped tokens are grey; a larger share of them, and another token whose sources are shown."""
    assert grey(page) == 16  # a quarter of 64
    choose(page, "50%")
    assert grey(page) == 32
    x, y = page.evaluate(PLACE)
    page.mouse.move(x - 2, y)
    changed_by(page, lambda: page.mouse.click(x, y))


def other_arms(page):
    choose(page, "coarse to fine")


def other_networks(page):
    """Another network, and another target of it."""
    words, _ = choose(page, "SiT")
    assert "SiT, v" in words
    words, _ = choose(page, "x")
    assert "SiT, x" in words


def other_quantities(page):
    """Another course below the clouds."""
    choose(page, "PSNR of the pictures")


def other_shares(page):
    """The steps of images with fewer tokens, and another quantity below them."""
    choose(page, "16")
    choose(page, "host's share")


# ---- the studies


@dataclass(frozen=True)
class Study:
    name: str  # of the notebook
    figures: tuple[str, ...]  # that a job writes, without the number in front
    times: tuple[str, str]  # where the slider stands in JupyterLab, and one step to the right
    explore: Callable[[Any], None]  # the other controls, on the page in JupyterLab
    mistakes: tuple[tuple[dict[str, Any], str], ...]  # parameters that the opening refuses, and what it says
    preset: str = "laptop"  # in JupyterLab
    place: str = "t = "  # what stands in front of a time in the figure
    also: tuple[str, ...] = ()  # what is shown there beside the scrubber: words of cells

    @property
    def number(self) -> str:
        return self.name[:2]


def smoke(**overrides: Any) -> dict[str, Any]:
    return {"preset": "smoke", **overrides}


STUDIES = [
    Study(
        "01_gradient_norms",
        ("position_probability", "filmstrip", "unevenness", "positions", "arms"),
        ("0.50", "0.60"),
        other_runs,
        (
            ({"run": "repa-shaeps"}, "no run 'repa-shaeps'"),
            (smoke(dataset="shpaes"), "Did you mean 'shapes'"),
            (smoke(overrides="method.depth=9"), "depth 9 is outside the network"),
            (smoke(overrides="network.patch_size=8"), "grid"),
            (smoke(overrides="method.dpeth=2"), "Did you mean 'method.depth'"),
        ),
    ),
    Study(
        "02_position_preference",
        tuple("filmstrip parts agreement wrt causes layers over_depth conflict space depth".split()),
        ("0.50", "0.60"),
        other_sides,
        (
            ({"run": "repa-shaeps"}, "no run 'repa-shaeps'"),
            (smoke(dataset="shpaes"), "Did you mean 'shapes'"),
            ({"tables": "casues"}, "Did you mean 'causes'"),
            (smoke(overrides="method.depth=9"), "depth 9 is outside the network"),
            (smoke(overrides="method.dpeth=2"), "Did you mean 'method.depth'"),
        ),
        also=('"pair"', '"depth"', "upload_cell("),
    ),
    Study(
        "03_prediction_targets",
        tuple("filmstrip by_size width per_t rank spectrum toy toy_excess toy_diagram jit_parts".split()),
        ("0.50", "0.65"),
        other_targets,
        (
            (smoke(overrides="objective.clmap=0.1"), "Did you mean 'objective.clamp'"),
            (smoke(overrides="objective.clamp=0"), "set objective.clamp"),
            ({"run": "reg-shapes"}, "needs a class token"),
        ),
        also=("player(",),
    ),
    Study(
        "04_reg",
        tuple(
            "class_over_t attention exchange_grid exchange_class exchange_pixels likeness directions following".split()
        )
        + ("description_over_t", "transfer", "filmstrip", "arms", "course", "shape"),
        ("0.50", "0.75"),
        other_classes,
        (
            (smoke(run="sit-shapes"), "no class token; take a run of method reg"),
            (smoke(overrides="data.teacher=oracle"), "looks at sampled images through the teacher"),
        ),
        preset="smoke",  # with laptop it takes a minute and a half
    ),
    Study(
        "05_maskalign",
        ("filmstrip", "arms", "preference", "influence", "courses", "paper", "gap"),
        ("0.50", "1.00"),
        other_tokens,
        (
            (smoke(overrides="method.mask_ratio=0.5"), "Did you mean"),
            (smoke(overrides="data.teacher=timm:vit_wee_patch16_reg1_gap_256?random"), "class token"),
            (smoke(arms="headlin"), "Did you mean 'headline'"),
            ({"run": "maskaling-shapes"}, "Did you mean 'maskalign-shapes'"),
        ),
        preset="smoke",  # with laptop it takes a minute and a half
    ),
    Study(
        "06_ahpa",
        tuple("filmstrip contents weights skill traces oracle arms per_t larger_arms larger_weights".split()),
        ("0.50", "0.60"),
        other_arms,
        (
            (smoke(overrides="method.tua=0.1"), "Did you mean 'method.tau'"),
            (smoke(overrides="data.autoencoder=tinny"), "Did you mean 'tiny'"),
            (smoke(overrides="method.levels=down.0,middle"), "middle"),
            ({"run": "repa-shapes"}, "expected ahpa"),
        ),
    ),
    Study(
        "07_rae",
        tuple("filmstrip one_image noise decoders arms".split()),
        ("0.50", "0.59"),
        other_networks,
        (
            (smoke(overrides="network.head_wdith=32"), "Did you mean 'network.head_width'"),
            (smoke(arms="haed"), "Did you mean 'head'"),
            ({"run": "ditdh-shaeps"}, "no run 'ditdh-shaeps'"),
            ({"run": "sit-shapes"}, "sees pixels, and a film of study 07 decodes latents"),
        ),
        preset="smoke",
    ),
    Study(
        "08_dsd",
        ("collapse", "denoising", "toy"),
        ("136", "178"),
        other_quantities,
        (
            (smoke(overrides="method.gradeint=none"), "Did you mean 'method.gradient'"),
            (smoke(overrides="network.trunks=4"), "trunks=4: expected 1"),
            (smoke(arms="setps"), "Did you mean 'steps'"),
            ({"run": "sit-shapes"}, "dsd"),
        ),
        place="step ",
    ),
    Study(
        "09_full_scale",
        ("parts", "roofline", "faults"),
        ("96", "192"),
        other_shares,
        (
            ({"run": "sit-shaeps"}, "no run 'sit-shaeps'"),
            ({"gpu": "H20"}, "Did you mean 'H200'"),
            ({"share": 30.0}, "expected a share of the peak"),
            ({"price": -1.0}, "expected at least 0"),
            (smoke(overrides="network.wdith=32"), "Did you mean 'network.width'"),
        ),
        place="width ",
    ),
]
every_study = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.number)


def test_no_study_is_forgotten():
    assert [study.name for study in STUDIES] == sorted(path.stem for path in paths.notebooks().glob("[0-9]*.ipynb"))


def test_the_tests_of_a_study_go_to_one_worker(request):
    """So that its smoke run is executed once: here, and in the files of the study."""
    ours = {group_of(item.nodeid) for item in request.session.items if item.nodeid.startswith("tests/studies/test_all")}
    assert ours <= {f"study {study.number}" for study in STUDIES} | {"test_all_studies"}
    assert group_of("tests/studies/test_study_03_findings.py::test_text[16 px]") == "study 03"
    assert group_of("tests/studies/test_all_studies.py::test_figures[03-by_size]") == "study 03"
    assert group_of("tests/base/test_seeding.py::test_keys[03]") == "test_seeding"


# ---- run by papermill


@every_study
def test_smoke_runs_end_to_end(study, smoke_job):
    """Every cell has run, without a word in red; the page has at most 1 MB for each slider and asks the network for nothing."""
    job = smoke_job(study.number)
    assert job.status == "ok", job.error
    executed = nbformat.read(job.path(".ipynb"), as_version=4)
    assert "widgets" not in executed.metadata
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert [output.text for cell in code for output in cell.outputs if output.get("name") == "stderr"] == []
    page = job.path(".html").read_text(encoding="utf-8")
    films = page.count('<div class="film">')
    assert len(page) < 1_000_000 * films and (job.path(".html").parent / "plotly.min.js").exists()
    assert not re.findall(r"""(?:src|href)=["']https?://[^"']+\.(?:js|css|woff2?)""", page)


@pytest.mark.parametrize(
    ("study", "figure"),
    [pytest.param(study, name, id=f"{study.number}-{name}") for study in STUDIES for name in study.figures],
)
def test_figures_are_small_and_traceable(study, figure, smoke_job):
    check_figure(smoke_job(study.number), study.name, f"{study.number}_{figure}")


@pytest.mark.slow
@every_study
def test_laptop_runs_end_to_end(study, tmp_path, own_folders):
    job = run_job(study.number, {"preset": "laptop"}, tmp_path / "job")
    assert job.status == "ok", job.error


# ---- its beginning, and mistakes


@every_study
def test_a_study_opens_by_one_call_and_its_scrubber_comes_by_the_third_code_cell(study):
    """After a few imports and the tagged parameters."""
    imports, parameters, opening = code_cells(study.number)[:3]
    assert "parameters" in parameters.metadata.get("tags", [])
    assert "open_study(**check_parameters())" in opening.source and "show(scrubber" in opening.source
    assert max(len(cell.source.splitlines()) for cell in (imports, opening)) <= 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preest": "smoke"}, "Did you mean 'preset'"),
        ({"preset": "smkoe"}, "Did you mean 'smoke'"),
        ({"seed": "zero"}, "expected int, got str"),
    ],
)
@every_study
def test_bad_parameters_are_refused_before_a_kernel_starts(study, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_study(study.number, given, tmp_path / "job")
    assert not (tmp_path / "job").exists()


@every_study
def test_a_lost_tag_is_refused(study, tmp_path):
    book = nbformat.read(paths.notebooks() / f"{study.name}.ipynb", as_version=4)
    for cell in book.cells:
        cell.metadata.pop("tags", None)
    nbformat.write(book, tmp_path / "untagged.ipynb")
    with pytest.raises(ValueError, match="tag"):
        study_parameters(tmp_path / "untagged.ipynb")


@pytest.mark.parametrize(
    ("study", "given", "message"),
    [
        pytest.param(study, given, message, id=f"{study.number}-{message}")
        for study in STUDIES
        for given, message in study.mistakes
    ],
)
def test_mistakes_fail_with_a_clear_error_before_the_scrubber(study, given, message, own_folders):
    """In `test_study_01` a job shows how such an error ends it."""
    with pytest.raises(Exception) as error:
        run_opening(study.number, given)
    assert message in str(error.value)


# ---- in a browser


@pytest.mark.browser
@every_study
def test_it_is_run_and_scrubbed_in_jupyterlab(study, smoke_job, page, lab):
    if study.preset == "smoke":
        smoke_job(study.number)  # JupyterLab finds its runs trained
    run_study_in_lab(page, lab, study.name, study.preset, study.also)
    there_and_back(page, *study.times, study.place)
    study.explore(page)
    assert not page.errors


OUTPUT = "() => document.querySelector('.film .film-controls output').textContent"


@pytest.mark.browser
@every_study
def test_the_page_works_from_disk_without_a_network(study, smoke_job, offline_page):
    offline_page.goto(smoke_job(study.number).path(".html").as_uri())
    offline_page.locator(".film.live .js-plotly-plot").first.wait_for(timeout=20_000)
    before = offline_page.evaluate(OUTPUT)
    offline_page.locator(".film input[type=range]").first.focus()
    offline_page.keyboard.press("ArrowRight")
    offline_page.wait_for_function(f"before => ({OUTPUT})() !== before", arg=before, timeout=5_000)
    assert not offline_page.errors and not offline_page.requests
