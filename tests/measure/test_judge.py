"""The judge: its folder is whole, its card is true, and its figures order what is worse and what is not."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from maskalign_lab import cli, network_commands
from maskalign_lab.base import devices
from maskalign_lab.base.paths import data
from maskalign_lab.base.seeding import generator
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.diffusion.sampling import SamplerConfig
from maskalign_lab.measure import judge_card, judge_training, metrics
from maskalign_lab.measure.judge import ATTRIBUTES, load_judge, pack_judge, real_pair, soften, to_columns
from maskalign_lab.runs import evaluation
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import Run, load_run, train
from maskalign_lab.studies.prediction_targets.arms import sheet

SHIPPED = data() / "judge" / "shapes"
SMALL = judge_training.JudgeConfig(
    steps=30, batch_size=32, warmup=5, n=200, channels=(8, 8, 16, 16), precision="float32"
)
N = 1000


@pytest.fixture(scope="module")
def judge():
    return load_judge("shapes")


@pytest.fixture(scope="module")
def card():
    return json.loads((SHIPPED / "card.json").read_text())


def stream(seed: int, n: int = N, **options):
    """Pictures that neither the judge nor its card has seen."""
    return load_dataset("shapes", split="validation", n=n, seed=seed, **options)


@pytest.fixture(scope="module")
def real(judge):
    return metrics.read(judge, stream(3003).images())


@pytest.fixture(scope="module")
def other():
    return stream(4004)


# ---- what ships


def test_the_card_belongs_to_the_weights(judge, card):
    assert judge.digest == card["weights"] and (SHIPPED / "judge.safetensors").stat().st_size < 3_000_000
    assert (SHIPPED / "card.md").read_text() == judge_card.card_text(card)
    assert card["pictures"] == card["config"]["n"] or card["config"]["n"] is None
    assert card["command"].startswith("maskalign-lab judge shapes") and card["licence"] == "Apache-2.0"


def test_the_judge_knows_its_trade(judge, card, real, other):
    """On pictures of two further seeds: as accurate as the card says."""
    assert card["accuracy"]["held out"] >= 0.97
    labels = torch.from_numpy(stream(3003).labels)
    found = metrics.judge_accuracy(judge, real, labels)
    assert found.low <= card["accuracy"]["held out"] <= found.high
    errors = judge_card.attribute_errors(metrics.read(judge, other.images()), other)
    for name, row in errors.items():
        assert row["error"] == pytest.approx(card["attribute errors"][name]["error"], rel=0.15), name
        assert row["error"] < 0.5 * row["blind guess"] or name in ("scale", "rotation")


@pytest.mark.slow
def test_the_judge_was_trained_on_what_the_generator_makes(card):
    config = judge_training.JudgeConfig(**{**card["config"], "channels": tuple(card["config"]["channels"])})
    assert judge_training.training_images("shapes", config).digest == card["dataset_digest"]


# ---- real beside real, and beside worse


def test_real_pictures_lie_at_the_floor(judge, real, other, card):
    found = metrics.judged(judge, real, other.images(), torch.from_numpy(other.labels))
    floor = card["floors"]["1000"]
    assert found["frechet"] == pytest.approx(floor["frechet"], rel=0.35)
    assert abs(found["kernel"]) < 2 * found["kernel deviation"]


def softened(images, times):
    for _ in range(times):
        images = soften(images)
    return images


def noisy(images, deviation):
    return images + deviation * torch.randn(images.shape, generator=generator(0, 0, "corrupt"))


@pytest.mark.parametrize("corrupt, amounts", [(softened, (0, 1, 2, 4)), (noisy, (0, 0.05, 0.1, 0.3))])
def test_worse_pictures_are_further_away(judge, real, other, corrupt, amounts):
    sets = [metrics.read(judge, corrupt(other.images(slice(0, 500)), amount)) for amount in amounts]
    frechet = [metrics.frechet_distance(judge, real, each) for each in sets]
    kernel = [metrics.kernel_distance(judge, real, each)[0] for each in sets]
    for row in (frechet, kernel):
        assert all(a < b for a, b in zip(row, row[1:])), row
    assert frechet[-1] > 1.5 * frechet[0] and kernel[-1] > 0.003  # beyond the floor, not by a hair


def test_the_grain_sees_slight_noise_and_softness(judge, real, other, card):
    """What the features hardly see stands far above the floor here, and the class is read all the same."""
    images, labels = other.images(), torch.from_numpy(other.labels)
    floor = card["floors"]["1000"]["attributes"]["grain"]
    for spoilt in (soften(images), noisy(images, 0.1)):
        reading = metrics.read(judge, spoilt)
        assert metrics.attribute_distances(judge, real, reading)["grain"] > 5 * floor
        assert metrics.judge_accuracy(judge, reading, labels).value > 0.97


def test_missing_classes_are_further_away(judge, real, other):
    """Equal numbers, fewer classes: the distances see a dropped mode, the accuracy does not."""
    reading, labels = metrics.read(judge, other.images()), torch.from_numpy(other.labels)
    sets = [(labels >= missing).nonzero()[:, 0][:650] for missing in (0, 1, 3)]
    frechet = [metrics.frechet_distance(judge, real, reading.rows(rows)) for rows in sets]
    kernel = [metrics.kernel_distance(judge, real, reading.rows(rows))[0] for rows in sets]
    assert frechet[0] < frechet[1] < frechet[2] and kernel[0] < kernel[1] < kernel[2]
    assert metrics.judge_accuracy(judge, reading.rows(sets[2]), labels[sets[2]]).value > 0.95


def test_shuffled_labels_are_chance(judge, real):
    labels = torch.from_numpy(stream(3003).labels)
    shuffled = labels[torch.randperm(N, generator=generator(0, 0, "shuffle"))]
    assert metrics.judge_accuracy(judge, real, shuffled).high < 0.15


def test_a_moved_placement_shows_in_x_and_not_in_y(judge, real, card):
    found = metrics.attribute_distances(judge, real, stream(4004, placement="left").images())
    floor = card["floors"]["1000"]["attributes"]
    assert found["x"] > 10 * floor["x"]
    for name in ("y", "scale", "hue", "lightness"):
        assert found[name] < 4 * floor[name] + 0.2 * found["x"], name
    assert found["x"] > 5 * found["y"]


def test_order_does_not_matter(judge, real, other):
    order = torch.randperm(N, generator=generator(0, 0, "order"))
    reading, labels = metrics.read(judge, other.images()), torch.from_numpy(other.labels)
    found = [metrics.judged(judge, real, reading.rows(rows), labels[rows]) for rows in (torch.arange(N), order)]
    for name in ("frechet", "accuracy", "accuracy by class", "attributes"):
        assert found[0][name] == found[1][name]
    assert abs(found[0]["kernel"] - found[1]["kernel"]) < found[0]["kernel deviation"]


# ---- what is refused


def test_a_judge_of_other_pictures_is_refused():
    with pytest.raises(ValueError, match="'shapes' at 32 pixels, not of 'digits' at 32"):
        load_judge("digits", folder=SHIPPED)
    with pytest.raises(ValueError, match="at 64"):
        load_judge("shapes", 64, folder=SHIPPED)


def test_weights_of_another_judge_are_refused(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "judge")
    content = bytearray((folder / "judge.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "judge.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="its card is of"):
        load_judge("shapes", folder=folder)


def test_a_missing_judge_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="maskalign-lab judge digits --out"):
        load_judge("digits")
    assert not list(tmp_path.iterdir())


def test_other_classes_are_refused(judge):
    shapes = stream(3003, 20)
    evaluation.check_classes(judge, shapes)
    with pytest.raises(ValueError, match="maskalign-lab judge shapes"):
        evaluation.check_classes(judge, replace(shapes, classes=shapes.classes[::-1]))


# ---- training


def test_losses_fall_and_the_global_state_stays():
    pictures, before = load_dataset("shapes", n=200), torch.random.get_rng_state()
    rows = [step.losses for step in judge_training.judge_steps(pictures, SMALL, "cpu")]
    for name in ("class", "attributes"):
        assert sum(float(row[name]) for row in rows[-5:]) < 0.98 * sum(float(row[name]) for row in rows[:5])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_is_repeatable():
    pictures, threads = load_dataset("shapes", n=64), torch.get_num_threads()
    torch.set_num_threads(1)  # sums that threads share may differ in their last bit
    files = []
    for _ in range(2):
        *_, last = judge_training.judge_steps(pictures, replace(SMALL, steps=3), "cpu")
        files.append(pack_judge(last.model))
        torch.rand(10)
    torch.set_num_threads(threads)
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return judge_training.train_judge("digits", tmp_path_factory.mktemp("out") / "digits", SMALL, "cpu", 0)


def test_a_judge_of_classes_alone(digits):
    """Data without attributes and without other seeds: halves of the held-out pictures are compared."""
    judge, card = load_judge("digits", folder=digits), json.loads((digits / "card.json").read_text())
    reading = metrics.read(judge, load_dataset("digits", n=10).images())
    assert reading.logits.shape == (10, 10) and set(reading.attributes) == {"grain"}
    assert list(card["floors"]) == ["148"] and not card["attribute errors"]
    assert "blind guess" not in (digits / "card.md").read_text()
    assert sorted(path.name for path in digits.iterdir()) == ["card.json", "card.md", "judge.safetensors"]


def test_pairs_share_nothing():
    for spec, n in (("shapes", 300), ("digits", 300)):
        pair = real_pair(spec, n=n)
        trained = judge_training.training_images(spec, judge_training.JudgeConfig(n=500))
        sets = [{picture.tobytes() for picture in part.pixels} for part in (*pair, trained)]
        assert len(pair[0]) == len(pair[1]) and not sets[0] & sets[1] and not (sets[0] | sets[1]) & sets[2]


def test_hue_goes_round():
    attributes = {name: np.zeros(3) for name in ATTRIBUTES} | {"hue": np.array([0.0, 0.01, 0.99])}
    columns = to_columns(attributes)
    assert (columns[1] - columns[2]).norm() < 0.2
    assert np.allclose(judge_card.gaps("hue", np.array([0.99]), np.array([0.01])), 0.02)


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = make_recipe("sit", "smoke", overrides="training.steps=2 data.n=64 network.depth=1")
    return load_run(train(recipe, tmp_path_factory.mktemp("runs") / "short", "cpu", 0))


@pytest.fixture
def few_held_out(monkeypatch):
    """The loss of a run is taken over a few images."""
    images = Run.images
    monkeypatch.setattr(Run, "images", lambda self, split, n=100: images(self, split, n))


def test_a_measured_run(few_held_out, run, card):
    config = SamplerConfig(steps=2)
    found = evaluation.measure(run, 60, config, print_every=0)
    assert found == evaluation.measure(run, 60, config, print_every=0) == json.loads(json.dumps(found))
    assert found["judge"] == card["weights"] and found["samples"]["pictures"] == found["floor"]["pictures"] == 60
    assert len(found["validation loss"]["per bin of t"]) == 10
    assert found["samples"]["frechet"] > 2 * found["floor"]["frechet"]  # two steps of training make no shapes
    assert found["samples"]["accuracy"] < 0.5 < 0.9 < found["floor"]["accuracy"]
    assert "guidance 1" in evaluation.measured_text(found)


def test_a_run_is_measured_beside_its_own_variant(few_held_out, run, judge):
    """A placement law moves the real pictures too, so that the floor stays a floor."""
    recipe = replace(run.recipe, data=replace(run.recipe.data, variant="left"))
    found = evaluation.measure(replace(run, recipe=recipe), 60, SamplerConfig("euler", steps=1), print_every=0)
    pair = real_pair("shapes", n=60, placement="left")
    assert max(part.attributes["x"].max() for part in pair) < 0.5 and found["variant"] == "left"
    expected = metrics.judged(judge, *(part.images() for part in pair), torch.from_numpy(pair[1].labels))
    assert found["floor"] == expected


def test_a_short_measurement_draws_the_first_samples_of_a_long_one(run):
    config, labels = SamplerConfig("euler", steps=1), metrics.balanced_labels(260, 10)
    (short,), long = (list(evaluation.sample_batches(run, labels[:n], config)) for n in (250, 260))
    assert torch.equal(short, long[0]) and len(long[1]) == 10
    assert not torch.equal(long[1], short[:10])  # another batch, another noise


def test_who_asks_for_the_ends_of_samples_gets_those_that_were_judged(run):
    ends, config = [], SamplerConfig("euler", 1, precision="float32")
    assert evaluation.judge_samples(run, 20, config, ends) == evaluation.judge_samples(run, 20, config)
    (images,) = evaluation.sample_batches(run, metrics.balanced_labels(20, 10), config)
    assert torch.equal(evaluation.final_images(run, ends[0]), images) and len(ends) == 1


def test_a_measurement_is_in_float32_or_tells_what_it_is_in(run, monkeypatch):
    """Whatever the machine is best at: rows of a table are compared across machines."""
    monkeypatch.setattr(devices, "native_bfloat16", lambda device: True)
    monkeypatch.setattr(evaluation, "loss_of", lambda *given: {"per bin of t": []})
    used, draw = [], evaluation.sample
    monkeypatch.setattr(evaluation, "sample", lambda *given: used.append(given[3].precision) or draw(*given))
    evaluation.judge_samples(run, 20)
    sheet(run, 2)
    found = evaluation.measure(run, 20, print_every=0)
    assert found["sampler"]["precision"] == "float32" and ", float32, " in evaluation.measured_text(found)
    assert set(used) == {"float32"}
    found = evaluation.measure(run, 20, SamplerConfig("euler", 1, precision="auto"), print_every=0)
    assert found["sampler"]["precision"] == used[-1] == "bfloat16"


def test_the_commands(few_held_out, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    assert network_commands.TrainJudge("shapes").steps == judge_training.JudgeConfig().steps
    assert cli.main(["measure", str(run.path), "--n", "20", "--steps", "1", "--guidance", "1.5"]) == 0
    (file,) = (tmp_path / "runs" / "measured").iterdir()
    assert json.loads(file.read_text())["sampler"]["guidance"] == 1.5 and "guidance-1.5" in file.name
    capsys.readouterr()
    folder = train(make_recipe("sit", "smoke", "digits", overrides="training.steps=1"), tmp_path / "d", "cpu", 0)
    assert cli.main(["measure", str(folder)]) == 2
    assert "maskalign-lab judge digits" in capsys.readouterr().err
