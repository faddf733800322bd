"""Tables show what lists hold beside accuracy, with the best of each column and a line for every term."""

from html import escape

from genatt_dist.evaluation.metrics import CUTOFFS, DEFINITIONS
from genatt_dist.evaluation.metrics_tables import metrics_section, metrics_table
from genatt_dist.evaluation.report_data import METRICS, Model

NAMES = ["mrr"] + [f"{name}@{k}" for name in DEFINITIONS if name != "mrr" for k in CUTOFFS]


def model(label: str, value: float) -> Model:
    return Model(label, "#000", dict.fromkeys(NAMES, value), {}, {})


def test_every_metric_has_a_name_and_a_definition() -> None:
    assert list(METRICS) == list(DEFINITIONS)


def test_the_best_is_the_largest_but_of_gini_the_smallest() -> None:
    header, rows = metrics_table([model("low", 0.1), model("high", 0.2)])
    assert header[1:4] == ["Recall@5", "Recall@10", "Recall@20"]
    assert {"CC@10", "F@10", "ILD@10", "Gini@10", "Novelty@10", "MRR"} <= set(header)
    for column, name in enumerate(header[1:], start=1):
        assert [row[column][1] for row in rows] == ([True, False] if name.startswith("Gini") else [False, True])


def test_the_page_has_lists_apart_from_accuracy_and_explains_both() -> None:
    page = metrics_section({}, [model("one", 0.1)])
    accuracy, rest = page.split("What the lists hold")
    lists, terms = rest.split("Definitions")
    assert "NDCG@20" in accuracy
    assert "ILD" not in accuracy
    assert "ILD@20" in lists
    assert "NDCG" not in lists
    assert all(escape(text) in terms for text in DEFINITIONS.values())
    assert "What the lists hold" not in metrics_section({}, [Model("old", "#000", {"ndcg@10": 0.1}, {}, {})])
