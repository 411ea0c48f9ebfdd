"""benchmarks/fer2013.py: the figures and the page, from the logits of runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fer2013
import fer2013_page as page
import fer2013_scores as results

ROOT = Path(__file__).parent.parent
N, K = 60, 3
COST = {"1": 1.0, "2": 2.0, "5": 4.0, "10": 8.0, "plain": 1.5}


def a_run(folder: Path, site: str, seed: int) -> results.Run:
    """Return a run with the file it would leave, and logits that are better than chance."""
    rng = np.random.default_rng([seed, len(site)])
    labels = {split: rng.integers(0, K, N) for split in ("val", "test")}
    counts = {"views": 1, "mirrored": 2, "cropped": 10} if site == "none" else {"views": 10}
    arrays = {f"{split}_labels": np.random.default_rng(seed).integers(0, K, N) for split in labels}
    for split in labels:
        for way, count in counts.items():
            hint = np.eye(K)[arrays[f"{split}_labels"]][:, None] * 1.5
            arrays[f"{split}_{way}"] = (hint + rng.normal(0, 1.5, (N, count, K))).astype(np.float16)
    config = {
        "after": site,
        "seed": seed,
        "recipe": "toy",
        "width": 8,
        "epochs": 2,
        "batch": 16,
        "fast": False,
        "data": "/some/where/fer2013.csv",
    }
    told = {
        "config": config, "outputs": ["a", "b", "c"], "gmacs": COST, "curve": [{"faces_per_second": 10.0}],
        "parameters": 5, "train_mib": 1.0, "seconds": 60.0, "commit": "abc", "epochs": None,
        "versions": {"torch": "2", "device": "cpu"},
        "data": {"faces": {"train": 9, "val": N, "test": N}, "names": {"test": "PrivateTest", "val": "PublicTest"}},
    }  # fmt: skip
    np.savez_compressed(folder / f"toy-{site}-{seed}.npz", copies=np.arange(N) < 6, told=json.dumps(told), **arrays)
    return results.Run(folder / f"toy-{site}-{seed}.npz")


def right(run: results.Run, views: list[int], split: str = "test", way: str = "views") -> np.ndarray:
    """Return (n,) whether the mean of some views is largest at the label, with numpy and a loop."""
    rows, labels = run.arrays[f"{split}_{way}"].numpy().astype(float), run.arrays[f"{split}_labels"].numpy()
    return np.array([np.argmax(row[views].mean(0)) == label for row, label in zip(rows, labels, strict=True)])


@pytest.fixture
def runs(tmp_path):
    return [a_run(tmp_path, site, seed) for site in ("none", "layer1", "layer1=hflip,layer3=five") for seed in (0, 1)]


@pytest.fixture
def stored(tmp_path, runs, monkeypatch):
    """Store the figures of those runs in a temporary folder, and return them as the page reads them."""
    for module in (results, page):
        monkeypatch.setattr(module, "STORED", tmp_path / "fer2013.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(page, "FIGURES", tmp_path)
    results.store("small", runs)
    return json.loads((tmp_path / "fer2013.json").read_text())["small"]


def test_accuracies_match_a_manual_count(runs, stored):
    for run, found in zip(runs, stored, strict=True):
        rows = {(row["way"], row["vote"]): row for row in found["rows"]}
        if run.site == "none":
            wanted = {"plain": ([0], "views", 1.5), "averaged with the mirror image": ([0, 1], "mirrored", 3.0)}
            wanted["ten crops of the input"] = (list(range(10)), "cropped", 8.0)
        else:
            wanted = {"centre": ([4], "views", 1.0), "centre + mirror": ([4, 9], "views", 2.0)}
            wanted |= {"five crops": ([0, 1, 2, 3, 4], "views", 4.0), "ten views": (list(range(10)), "views", 8.0)}
        for way, (views, array, cost) in wanted.items():
            row, hits = rows[way, "soft"], right(run, views, way=array)
            assert row["accuracy"] == pytest.approx(hits.mean())
            assert row["without_copies"] == pytest.approx(hits[6:].mean())
            assert row["gmacs"] == cost
        assert found["faces"] == N
        assert found["copies"] == 6
        assert "some" not in json.dumps(found["config"])


def test_runs_that_come_later_are_added(tmp_path, stored):
    """Add a third seed alone, and one of the first again: nothing is lost or duplicated."""
    (tmp_path / "more").mkdir()
    again = [a_run(tmp_path / "more", site, seed) for site, seed in (("none", 2), ("layer1", 2), ("layer1", 0))]
    results.store("small", again)
    found = json.loads((tmp_path / "fer2013.json").read_text())["small"]
    assert sorted(run["run"] for run in found) == sorted(
        f"toy-{site}-{seed}" for site in ("none", "layer1", "layer1=hflip,layer3=five") for seed in (0, 1, 2)
        if (site, seed) != ("layer1=hflip,layer3=five", 2)
    )  # fmt: skip
    assert found[: len(stored) - 1] == [run for run in stored if run["run"] != "toy-layer1-0"]


def test_the_test_against_the_plain_network_of_the_same_seed(runs, stored):
    plain, voting = runs[1], runs[3]
    assert (plain.told["config"]["seed"], voting.told["config"]["seed"]) == (1, 1)
    row = next(row for row in stored[3]["rows"] if row["way"] == "ten views" and row["vote"] == "soft")
    ours, theirs = right(voting, list(range(10))), right(plain, [0])
    assert row["against"]["plain"]["won"] == (ours & ~theirs).sum()
    assert row["against"]["plain"]["lost"] == (~ours & theirs).sum()
    mirrored = right(plain, [0, 1], way="mirrored")
    assert row["against"]["averaged with the mirror image"]["won"] == (ours & ~mirrored).sum()


def test_until_sure_is_chosen_on_validation_faces_alone(runs, stored):
    """Cost and votes lie between those of two and ten views; other test logits do not move the threshold."""
    for run, found in zip(runs[2:], stored[2:], strict=True):
        row = next(row for row in found["rows"] if row["way"] == "until sure")
        logits = run.logits("test")
        two = logits[:, [4, 9]].mean(1)
        share = 1 - (row["gmacs"] - 2.0) / 6.5  # eight views of 0.75 each, and the front, 0.5, again
        count = round(share * N)
        assert share * N == pytest.approx(count)
        surest = two.softmax(1).amax(1).argsort(descending=True)
        hits = right(run, list(range(10)))
        hits[surest[:count].numpy()] = right(run, [4, 9])[surest[:count].numpy()]
        assert row["accuracy"] == pytest.approx(hits.mean())


def test_the_confidence_does_not_depend_on_the_test_labels(runs):
    """The cost shows how many stop: other test labels do not change it, other validation labels do."""
    moved = []
    for run in runs[2:]:
        costs = []
        for name in ("test_labels", "val_labels", "copies"):
            other = copy.copy(run)
            other.arrays = {**run.arrays, name: 0 * run.arrays[name]}
            costs.append(other.ways()["until sure"][0])
        assert costs[0] == costs[2] == run.ways()["until sure"][0]
        moved.append(costs[1] != costs[0])
    assert any(moved)


def test_views_are_added_by_validation_and_counted_on_test(runs, stored):
    run, found = runs[2], stored[2]["greedy"]
    taken: list[int] = []
    for size in range(10):
        scores = {v: right(run, [*taken, v], "val").mean() for v in range(10) if v not in taken}
        taken.append(max(scores, key=scores.__getitem__))
        assert found["accuracy"][size] == pytest.approx(right(run, taken).mean())
    assert found["order"] == taken


def test_the_calibration_error_matches_its_formula(runs, stored):
    """The mean over faces of the gap between their bin's confidence and accuracy (Naeini et al. 2015)."""
    probs = torch.softmax(runs[2].logits("test").mean(1), 1).double().numpy()
    sure, hits = probs.max(1), right(runs[2], list(range(10)))
    bins = np.minimum((sure * 10).astype(int), 9)
    gaps = [abs(sure[bins == b].sum() - hits[bins == b].sum()) for b in range(10)]
    assert stored[2]["calibration"]["soft vote"]["ece"] == pytest.approx(sum(gaps) / N, abs=1e-5)
    assert sum(one["faces"] for one in stored[2]["calibration"]["soft vote"]["bins"]) == N
    assert set(stored[0]["calibration"]) == {"one view"}


@pytest.mark.slow
def test_the_page_holds_every_network_and_its_pictures(stored, tmp_path):
    page.write()
    text = (tmp_path / "results.md").read_text()
    rows = {(row["way"], row["vote"]): row for row in stored[2]["rows"]}
    assert f"| ten views after layer1 | ten views | soft | 8.000 | {_mean(stored[2:4], 'ten views')} |" in text
    assert rows["ten views", "hard"]["vote"] == "hard"
    assert "Not run yet (`python benchmarks/fer2013.py train full`)" in text
    for stem in ("cost", "views", "reliability"):
        assert (tmp_path / f"fer2013_{stem}.svg").stat().st_size > 5000
        assert f"figures/fer2013_{stem}.svg" in text


@pytest.mark.slow
def test_the_results_page_matches_the_stored_figures(tmp_path, monkeypatch):
    stored, written = json.loads(results.STORED.read_text()), page.PAGE.read_text()
    monkeypatch.setattr(page, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(page, "FIGURES", tmp_path)
    page.write()
    assert (tmp_path / "results.md").read_text() == written
    beyond = " ".join((ROOT / "docs" / "beyond.md").read_text().split())
    for site in ("none", "layer1", "layer1=hflip,layer3=five"):
        runs = [run for run in stored["small"] if run["config"]["after"] == site]
        assert _mean(runs, "plain" if site == "none" else "ten views") in beyond
        assert len(runs) == 3


def test_the_figures_in_the_text_match_the_stored_ones():
    """Another seed changes them, and then the sentences must change too."""
    full = json.loads(results.STORED.read_text())["full"]
    runs = {site: [run for run in full if run["config"]["after"] == site and run["config"]["recipe"] == "fer2013"]
            for site in ("none", "layer1", "layer1=hflip,layer3=five")}  # fmt: skip
    plain, mirror = _mean(runs["none"], "plain"), _mean(runs["none"], "averaged with the mirror image")
    ten, plan = _mean(runs["layer1"], "ten views"), _mean(runs["layer1=hflip,layer3=five"], "ten views")
    wanted = {"docs/beyond.md": (plain, mirror, ten, plan), "docs/method.md": (plain, mirror, ten)}
    wanted["examples/fer48/README.md"] = wanted["docs/beyond.md"]
    exact = {way: np.mean([row["accuracy"] for run in runs[site] for row in run["rows"] if (row["way"], row["vote"])
                           == (way, "soft")]) for site, way in
             (("none", "plain"), ("none", "averaged with the mirror image"), ("layer1", "ten views"))}  # fmt: skip
    ahead = [100 * (exact["ten views"] - exact[way]) for way in ("plain", "averaged with the mirror image")]
    wanted["docs/method.md"] += (
        f"{ahead[0]:.1f} points ahead of the plain network and {ahead[1]:.1f} ahead of that network averaged",
    )
    for file, figures in wanted.items():
        text = " ".join((ROOT / file).read_text().split())
        assert not [one for one in figures if one not in text], file
    seeds = {len(found) for found in runs.values()}
    assert seeds == {2}, "README.md, docs and SAID in fer2013_page.py speak of two seeds"


def _mean(found: list[dict], way: str) -> str:
    values = [row["accuracy"] for run in found for row in run["rows"] if row["way"] == way and row["vote"] == "soft"]
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"


@pytest.mark.slow
def test_runs_are_trained_once_and_kept_whole(tmp_path, monkeypatch, capsys):
    line = "--recipe toy --width 4 --batch 32 --limit 64 --epochs 1 --device cpu --sites none layer3 --seeds 0"
    monkeypatch.setitem(fer2013.LISTS, "small", [line])
    fer2013.train("small", "toy", 1e6, tmp_path)
    files = sorted(tmp_path.glob("*.npz"))
    assert [file.name for file in files] == ["toy-layer3-0.npz", "toy-none-0.npz"]
    run = results.Run(files[0])
    assert run.logits("val").shape == run.logits("test").shape == (64, 10, 7)
    with np.load(tmp_path / "toy" / "layer3-0" / "logits.npz") as own:
        assert np.allclose(own["logits"], run.logits("test").numpy(), atol=2e-3)
        assert np.array_equal(own["labels"], run.labels.numpy())
    assert results.Run(files[1]).logits("test", "cropped").shape == (64, 10, 7)
    capsys.readouterr()
    fer2013.train("small", "toy", 1e6, tmp_path)
    assert capsys.readouterr().out == ""
    files[0].unlink()
    fer2013.train("small", "toy", 1e6, tmp_path, frozenset({"toy-layer3-0"}))
    with fer2013.lock(tmp_path / "toy-layer3-0.lock"):  # another process has it
        fer2013.train("small", "toy", 1e6, tmp_path)
    assert capsys.readouterr().out == ""
    assert not files[0].exists()
    fer2013.train("small", "toy", -1.0, tmp_path)
    assert "toy-layer3-0 and what follows are left for the next call" in capsys.readouterr().out
    assert not files[0].exists()
