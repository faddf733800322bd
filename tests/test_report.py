"""The report: one page that needs no network, holds every number, and survives runs that wrote little."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from genatt_dist.evaluation import report_data
from genatt_dist.evaluation.plots import Plot
from genatt_dist.evaluation.report import metrics_table, print_table, write_report
from genatt_dist.evaluation.report_data import read_models

METRICS = [f"{name}@{k}" for name in ("recall", "ndcg", "coverage") for k in (5, 10, 20)] + ["mrr"]
SCORES = {"popularity": 0.02, "dot_product": 0.05, "variational": 0.055, "diffusion": 0.06}


class Page(HTMLParser):
    """Collects what a page would load, its visible text and its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [f"{tag}: {values[name]}" for name in ("src", "href", "srcset", "data") if values.get(name)]
        self.ids += [values["id"]] if values.get("id") else []
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        in_code = self.open and self.open[-1] in ("script", "style")
        (self.scripts if in_code else self.text).append(data)

    def constant(self, name: str) -> Any:
        """What a constant of the page's script holds."""
        data = next(text for text in self.scripts if text.startswith("const PLOTS = "))
        return json.JSONDecoder().raw_decode(data, data.index(f"const {name} = ") + len(f"const {name} = "))[0]

    @property
    def plots(self) -> list:
        return self.constant("PLOTS")


def make_entry(name: str) -> dict:
    scores = {metric: SCORES[name] * (1 + 0.1 * index) for index, metric in enumerate(METRICS)}
    entry: dict = {"name": name, "seed": 0, "valid": {"ndcg@10": SCORES[name] * 1.1}, "test": scores}
    if name != "popularity":
        entry["train"] = {
            "seconds": 61.5, "epochs": 12, "sequences_per_second": 1162.0, "world_size": 2,
            "launcher": "torchrun", "table": "sharded", "zero_stage": 2,
        }  # fmt: skip
    return entry


def make_report(*names: str) -> dict:
    return {
        "dataset": {"name": "ml-100k", "users": 943, "items": 1349, "interactions": 99287},
        "protocol": {"split": "leave-one-out", "ranking": "full", "max_len": 50},
        "models": [make_entry(name) for name in names],
    }


def make_run(path: Path, name: str, epochs: int = 12, steps: int = 100) -> Path:
    """A run directory as the trainer leaves it, with a line half written when it was killed."""
    path.mkdir(parents=True)
    lines = []
    for epoch in range(1, epochs + 1):
        for step in range((epoch - 1) * steps, epoch * steps, 2):
            wave = 0.15 * math.sin(step * 1.7)
            generative = 0.0 if name == "dot_product" else 1.2 * math.exp(-step / 300) + 0.3 + wave / 5
            line = {
                "kind": "train",
                "epoch": epoch,
                "step": step,
                "loss": 4.3 - 5 * SCORES[name] + 3 * math.exp(-step / 400) + wave,
            }
            lines.append({**line, "generative_loss": generative, "learning_rate": 1e-3, "sequences_per_second": 1162.0})
        learnt = 1.1 * SCORES[name] * (1 - math.exp(-epoch / 4))
        line = {"kind": "valid", "epoch": epoch, "step": epoch * steps, "recall@10": 2 * learnt, "ndcg@10": learnt}
        for block in range(2):
            line[f"attention_entropy/block{block}"] = 0.95 - 0.03 * epoch * (1 + 0.3 * block) * SCORES[name] / 0.05
            if name != "dot_product":
                line[f"total_variation/block{block}"] = 0.2 - 0.005 * epoch + 0.02 * block
                line[f"kl_mean/block{block}"] = 0.05 + 0.4 / epoch + 0.1 * block
                line[f"kl_per_dimension/block{block}"] = [0.01 * dimension for dimension in range(8)]
        lines.append(line)
        if name == "variational" and epoch == 3:
            lines.append({"kind": "warning", "step": 300, "sign": "determinism", "text": "determinism <in block 1>"})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "epo')
    environment = {"python": "3.11.7", "packages": {"torch": "2.13.0", "ray": "2.60.0"}, "gpus": [], "threads": 2}
    (path / "environment.json").write_text(json.dumps(environment | {"run": name}))
    return path


def make_maps(run: Path, users: int = 2, size: int = 4, samples: int = 4) -> Path:
    """A maps file as `genatt evaluate` leaves it; every weight is even."""
    even = [round(1e4 / (row + 1)) for row in range(size) for _ in range(row + 1)]
    one = {"block": 0, "head": 0, "entropy": 1.0, "total_variation": 0.1 if samples else None}
    user = {
        "older": 0, "item_ids": list(range(size)), "titles": ["<b>&"] * size, "target_id": 9, "target_title": "T",
        "maps": [{**one, "mean": even, "samples": [even] * samples}],
    }  # fmt: skip
    content = {"split": "test", "step": 9, "unit": 1e-4, "num_samples": 32}
    content["users"] = [{"user_id": number, **user} for number in range(users)]
    (run / "maps-test.json").write_text(json.dumps(content))
    return run


@pytest.fixture
def complete(tmp_path: Path) -> Page:
    runs = {name: make_run(tmp_path / name, name) for name in SCORES if name != "popularity"}
    write_report(make_report(*SCORES), runs, tmp_path / "out")
    return Page((tmp_path / "out" / "report.html").read_text())


def test_page_loads_nothing(complete: Page) -> None:
    assert complete.loads == []
    assert not any("@import" in text or re.search(r"url\(\s*['\"]?https?:", text) for text in complete.scripts[:1])


def test_json_file_is_the_report(tmp_path: Path) -> None:
    report = make_report(*SCORES)
    write_report(report, {}, tmp_path / "new" / "out")
    assert json.loads((tmp_path / "new" / "out" / "report.json").read_text()) == report


def test_page_shows_every_metric_of_every_model(complete: Page) -> None:
    text = " ".join(complete.text)
    for name in SCORES:
        for value in make_entry(name)["test"].values():
            assert f"{value:.4f}" in text
    for part in ("ml-100k", "943 users", "99,287", "leave-one-out", "3.00×", "torchrun", "packages.torch", "2.13.0"):
        assert part in text


def test_every_plot_has_a_place_and_a_reading(complete: Page) -> None:
    titles = [
        text for text in complete.text if text.startswith(("Training loss", "Generative", "Validation", "Attention"))
    ]
    assert len(titles) == 4
    assert "KL of each latent dimension" in complete.text
    assert complete.ids == [f"plot{index}" for index in range(len(complete.plots))]
    for traces, layout in complete.plots:
        assert traces
        assert {"xaxis", "yaxis"} <= layout.keys()


def test_popularity_is_a_dashed_level_among_validation_curves(complete: Page) -> None:
    curves = next(traces for traces, layout in complete.plots if layout["yaxis"]["title"]["text"] == "NDCG@10")
    level = next(trace for trace in curves if trace["name"] == "popularity")
    assert level["line"]["dash"] == "dash"
    assert level["y"] == pytest.approx([0.022, 0.022])
    assert level["x"] == [1, 12]


def test_generative_loss_is_drawn_only_where_there_is_one(complete: Page) -> None:
    traces = next(t for t, layout in complete.plots if layout["yaxis"]["title"]["text"] == "generative loss")
    assert [trace["name"] for trace in traces] == ["variational", "diffusion"]


def test_latent_dimensions_are_ordered_by_their_kl(complete: Page) -> None:
    bars = next(t for t, layout in complete.plots if layout["xaxis"]["title"]["text"] == "latent dimension")
    names = [f"{name}, block {block}" for name in ("variational", "diffusion") for block in range(2)]
    assert [trace["name"] for trace in bars] == names
    assert bars[0]["y"] == [0.01 * dimension for dimension in reversed(range(8))]


def test_warnings_are_listed_with_their_model(complete: Page) -> None:
    at = complete.text.index("determinism <in block 1>")
    assert complete.text[at - 2 : at] == ["variational", "step 300"]


def test_a_run_without_warnings_says_so(tmp_path: Path) -> None:
    write_report(make_report("diffusion"), {"diffusion": make_run(tmp_path / "run", "diffusion")}, tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "No run showed a failure sign" in text


def test_maps_are_shown_with_their_controls(tmp_path: Path) -> None:
    runs = {name: make_maps(make_run(tmp_path / name, name), samples=4 * (name == "diffusion")) for name in SCORES}
    write_report(make_report(*SCORES), runs, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert {"maps", "map-model", "map-user", "map-block", "map-facts"} <= set(page.ids)
    shown = page.constant("MAPS")
    assert [model["label"] for model in shown] == ["popularity", "dot product", "variational", "diffusion"]
    assert [len(model["users"]) for model in shown] == [2] * 4
    assert shown[3]["users"][1] == json.loads((runs["diffusion"] / "maps-test.json").read_text())["users"][1]
    assert page.loads == []


@pytest.mark.parametrize(
    ("room", "models", "users"), [(24.5, 4, 6), (23.5, 4, 5), (4.5, 4, 1), (3.5, 3, 1), (0.5, 0, 0)]
)
def test_as_many_maps_are_shown_as_a_page_has_room_for(
    room: float, models: int, users: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """room: in users, of which each model has six."""
    runs = {}
    for name in SCORES:
        (tmp_path / name).mkdir()
        runs[name] = make_maps(tmp_path / name, users=6)
    user = json.loads((runs["diffusion"] / "maps-test.json").read_text())["users"][0]
    monkeypatch.setattr(report_data, "MAPS_SIZE", room * len(json.dumps(user, separators=(",", ":"))))
    shown = report_data.chosen_maps(report_data.read_models(make_report(*SCORES), runs))
    assert [len(model["users"]) for model in shown] == [users] * models


def test_a_run_whose_attention_has_no_map_shows_none(tmp_path: Path) -> None:
    run = make_maps(make_run(tmp_path / "run", "diffusion"))
    content = json.loads((run / "maps-test.json").read_text())
    for user in content["users"]:
        user["maps"] = []
    (run / "maps-test.json").write_text(json.dumps(content))
    write_report(make_report("diffusion"), {"diffusion": run}, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.constant("MAPS") is None
    assert "maps" not in page.ids


def test_rows_of_the_steps_benchmark_are_drawn_by_their_own_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("steps_plots")
    module.steps_plots = lambda rows: [Plot(f"{len(rows)} rows", "read so", [{"y": [1]}], {}), Plot("none", "", [], {})]
    monkeypatch.setitem(sys.modules, "genatt_dist.evaluation.steps_plots", module)
    report = make_report("popularity") | {"steps": [{"mode": "training"}] * 3}
    write_report(report, {}, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "3 rows" in page.text
    assert "none" not in page.text
    assert page.ids == [f"plot{index}" for index in range(len(page.plots))]
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == report["steps"]


def test_long_logs_are_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "diffusion", epochs=2, steps=5000)
    write_report(make_report("diffusion"), {"diffusion": run}, tmp_path)
    traces, _ = Page((tmp_path / "report.html").read_text()).plots[0]
    assert 200 < len(traces[0]["x"]) <= 400


@pytest.mark.parametrize("names", [(), ("popularity",), ("popularity", "diffusion")])
def test_reports_without_runs_are_pages_too(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "empty").mkdir()
    write_report(make_report(*names), {"diffusion": tmp_path / "empty"}, tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "943 users" in text
    assert "Training loss" not in text


def test_missing_and_nan_metrics_are_dashes(tmp_path: Path) -> None:
    report = make_report("popularity", "diffusion")
    report["models"][0]["test"]["mrr"] = math.nan
    del report["models"][1]["test"]["ndcg@10"]
    write_report(report, {}, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.text.count("–") == 3  # the two, and the ratio
    assert "NaN" not in page.scripts[-1]
    assert json.loads((tmp_path / "report.json").read_text())["models"][0]["test"]["mrr"] is None


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    report = make_report("popularity", "diffusion")
    report["dataset"]["name"] = report["models"][1]["name"] = "</script><script>alert(1)</script>"
    write_report(report, {}, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in html
    assert "<script>alert(1)</script>" in " ".join(Page(html).text)


def test_models_at_several_seeds_are_told_apart(tmp_path: Path) -> None:
    report = make_report("popularity", "diffusion", "diffusion")
    report["models"][2]["seed"] = 1
    write_report(report, {}, tmp_path)
    assert "diffusion (seed 1)" in Page((tmp_path / "report.html").read_text()).text


def test_paired_comparisons_are_shown_by_family_and_metric(tmp_path: Path) -> None:
    report = make_report("dot_product", "variational")
    row = {
        "arm": "variational", "against": "dot_product", "value": 0.055, "reference": 0.05, "difference": 0.005,
        "relative": 0.1, "standard_error": 0.001, "low": 0.003, "high": 0.007, "p": 0.0123, "p_holm": 0.0246,
    }  # fmt: skip
    other = row | {"relative": None, "difference": -0.0021, "p": 0.4321, "p_holm": 0.8642}
    report["comparisons"] = {
        "split": "test",
        "metrics": ["recall@10", "ndcg@10"],
        "bootstrap": {"resamples": 10_000, "confidence": 0.95, "seed": 0},
        "correction": "Holm, over the tests of a family on one metric",
        "families": [
            {"question": "every arm against dot product", "rows": [other | {"metric": "recall@10"},
                                                                   row | {"metric": "ndcg@10"}]},
            {"question": "no arm against none", "rows": []},
        ],
    }  # fmt: skip
    write_report(report, {}, tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "Paired comparisons" in text
    shown = text[text.index("every arm against dot product") :]
    for part in ("+0.0050", "+10.0%", "+0.0030, +0.0070", "0.0123", "0.0246", "-0.0021", "0.8642", "10,000"):
        assert part in shown
    assert shown.index("+0.0050") < shown.index("-0.0021")  # NDCG@10 comes first
    assert "no arm against none" not in text
    write_report(make_report("dot_product"), {}, tmp_path)
    assert "Paired comparisons" not in (tmp_path / "report.html").read_text()


def test_noise_of_a_metric_is_of_the_users_evaluated(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "diffusion")
    report = make_report("diffusion")
    report["models"][0]["seed"] = 17
    report["models"][0]["test"]["recall@10"] = 0.1
    write_report(report, {"diffusion": run}, tmp_path)
    assert "standard error" not in (tmp_path / "report.html").read_text()  # how many were evaluated is not known
    (run / "evaluation-test.json").write_text('{"users": 900}')
    write_report(report, {"diffusion": run}, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "900 users evaluated the standard error of a Recall@10 of 0.100 is about 0.0100" in " ".join(page.text)
    assert "unpaired" in " ".join(page.text)
    assert "17" in page.text


def test_a_report_that_cannot_be_drawn_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_report(make_report("diffusion") | {"steps": [{"mode": "training"}]}, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_best_of_a_column_is_marked() -> None:
    header, rows = metrics_table(read_models(make_report(*SCORES), {}))
    assert header[:2] == ["model", "Recall@5"]
    assert header[-1] == "× popularity"
    for row in rows:
        assert all(best == (row[0][0] == "diffusion") for _, best in row[1:])


def test_console_table_holds_the_numbers() -> None:
    console = Console(record=True, width=80)
    print_table(make_report(*SCORES), console)
    text = console.export_text()
    assert "3.00×" in text
    assert "dot product" in text
