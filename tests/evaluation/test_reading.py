"""Data sets in every layout that they are distributed in; what is broken is one line with its place."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

from ki_ds.errors import UserError
from ki_ds.evaluation.reading import read_glue, read_set
from ki_ds.evaluation.tasks import GLUE, Example
from tests.tiny import ROOT

SHARED = Path(os.environ.get("KI_DS_SHARED", ROOT.parent / "shared")) / "data/downstream"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="downstream sets (KI_DS_SHARED) are not there")


def write(path, *lines, bom="", end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((bom + "".join(line + end for line in lines)).encode())


def row(*cells):
    return "\t".join(cells)


HEADINGS = {
    "sst2": ("sentence", "label"),
    "mrpc": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "stsb": (
        *("index", "genre", "filename", "year", "old_index", "source1", "source2"),
        *("sentence1", "sentence2", "score"),
    ),
    "qqp": ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    "mnli": (
        *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
        *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"),
    ),
    "qnli": ("index", "question", "sentence", "label"),
    "rte": ("index", "sentence1", "sentence2", "label"),
}


def glue_folder(root):
    """GLUE's download with a row of each class (or two grades) in train and dev, and a test part without labels."""
    for name, task in GLUE.items():
        folder = root / task.folders[0]
        labels = task.labels or ("0.5", "4.25")
        for part in ("train", "dev"):
            if name == "cola":
                write(folder / f"{part}.tsv", *(row("gj04", label, "", f'a "{part} text') for label in labels))
                continue
            first, second, last = task.columns
            lines = []
            for label in labels:
                cells = {first: f'a "{part} text', second: "and \x1fanother", last: label}
                lines.append(row(*(cells.get(column, "7") for column in HEADINGS[name])))
            files = [f"{part}.tsv"] if (name, part) != ("mnli", "dev") else ["dev_matched.tsv", "dev_mismatched.tsv"]
            for file in files:
                write(folder / file, row(*HEADINGS[name]), *lines)
        without = [column for column in HEADINGS.get(name, ("index", "sentence")) if column != task.columns[2]]
        write(folder / "test.tsv", row(*without), row(*without))
    return root


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("inside", [True, False])
def test_glues_own_files(tmp_path, name, inside):
    glue_folder(tmp_path)
    task = GLUE[name]
    data = read_glue(name, str(tmp_path if inside else tmp_path / task.folders[0]))
    others = {"mismatched"} if name == "mnli" else set()
    assert data.parts.keys() == {"train", "valid"} | others
    assert data.notes == ("test.tsv has no labels and is not used",) or name == "mnli"
    labels = [0.5, 4.25] if task.labels is None else list(range(len(task.labels)))
    pair = "and \x1fanother" if task.columns[1] else None
    assert data.parts["train"] == [Example('a "train text', pair, label) for label in labels]
    assert data.parts["valid"] == [Example('a "dev text', pair, label) for label in labels]
    assert data.scored_part == "valid"


def test_the_layouts_of_first_releases(tmp_path):
    for file in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        write(tmp_path / f"cola/{file}.tsv", row("clc95", "0", "*", file), row("clc95", "1", "", file))
    cola = read_glue("cola", str(tmp_path))
    assert [e.text for e in cola.parts["valid"]] == ["in_domain_dev"] * 2 + ["out_of_domain_dev"] * 2
    for part in ("train", "val", "test"):
        lines = [row(*HEADINGS["mrpc"]), row("1", "3", "4", "one", "two"), row("0", "3", "4", "three", "four")]
        write(tmp_path / f"mrpc/msr-para-{part}.tsv", *lines, bom="\ufeff", end="\r\n")
        write(tmp_path / f"sts/2015.{part}.tsv", row("3.00", "a", "b"), row("", "c", "d"), row("1.5", "e", "f"))
    mrpc = read_glue("mrpc", str(tmp_path))
    assert mrpc.parts["test"] == [Example("one", "two", 1), Example("three", "four", 0)]
    assert mrpc.scored_part == "test"
    graded = read_glue("stsb", str(tmp_path))
    assert graded.parts["test"] == [Example("a", "b", 3.0), Example("e", "f", 1.5)]
    assert "2015.test.tsv: left out 1 pairs without a grade" in graded.notes
    assert graded.labels is None


def test_short_rows_are_left_out_of_qqp_alone(tmp_path):
    glue_folder(tmp_path)
    for name in ("qqp", "qnli"):
        path = tmp_path / GLUE[name].folders[0] / "train.tsv"
        path.write_text(path.read_text() + "1\t2\n")
    assert "train.tsv: left out 1 rows with too few columns" in read_glue("qqp", str(tmp_path)).notes
    with pytest.raises(UserError, match=r"train\.tsv line 4 has 2 columns, at least 4 are needed"):
        read_glue("qnli", str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "dev.tsv").unlink(), r"has no valid part of RTE \(dev\.tsv, "),
        (lambda f: write(f / "train.tsv", row(*HEADINGS["rte"])), "the train part of rte is empty"),
        (lambda f: write(f / "train.tsv"), r"train\.tsv has no heading with sentence1, sentence2"),
        (lambda f: write(f / "dev.tsv", row("index", "sentence1", "sentence2")), "dev.tsv has no column 'label'"),
        (
            lambda f: write(f / "dev.tsv", row(*HEADINGS["rte"]), row("0", "a", "b", "maybe")),
            r"dev\.tsv line 2: label 'maybe' is none of not_entailment, entailment",
        ),
        (lambda f: (f / "dev.tsv").write_bytes(b"\xff\xfe\x00"), r"dev\.tsv is no UTF-8 text"),
        (
            lambda f: write(f / "train.tsv", row(*HEADINGS["rte"]), row("0", "", "", "entailment")),
            "the train part of rte has an example without text",
        ),
    ],
)
def test_broken_glue_files_are_one_line(tmp_path, change, message):
    change(glue_folder(tmp_path) / "RTE")
    with pytest.raises(UserError, match=message) as caught:
        read_glue("rte", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_folders_without_the_task(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_glue("rte", str(tmp_path / "no"))
    (tmp_path / "QQP").mkdir()
    with pytest.raises(UserError, match=r"has no RTE \(RTE/train\.tsv\); it has qqp"):
        read_glue("rte", str(tmp_path))


def test_a_grade_that_is_no_number(tmp_path):
    write(tmp_path / "sts/2015.train.tsv", row("good", "a", "b"))
    write(tmp_path / "sts/2015.val.tsv", row("1", "a", "b"))
    with pytest.raises(UserError, match=r"2015\.train\.tsv line 1: grade 'good' is no number"):
        read_glue("stsb", str(tmp_path))


class TestHub:
    """The package datasets is there or not; the hub is never asked."""

    def loaded(self, monkeypatch, name, **splits):
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(*args):
            asked.append(args)
            return splits

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return read_glue(name, "hub"), asked

    def rows(self, classes, **columns):
        datasets = pytest.importorskip("datasets")
        label = datasets.ClassLabel(names=classes) if classes else datasets.Value("float32")
        kinds = {name: datasets.Value("string") for name in columns} | {"label": label}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    def test_classes_go_by_their_names(self, monkeypatch):
        classes = ["entailment", "not_entailment"]  # the hub's order; files of GLUE have the words
        part = self.rows(classes, sentence1=["a", "b"], sentence2=["c", "d"], label=[0, 1])
        unlabelled = self.rows(classes, sentence1=["a"], sentence2=["c"], label=[-1])
        data, asked = self.loaded(monkeypatch, "rte", train=part, validation=part, test=unlabelled)
        assert asked == [("nyu-mll/glue", "rte")]
        assert data.parts["train"] == [Example("a", "c", 1), Example("b", "d", 0)]
        assert data.parts.keys() == {"train", "valid"}
        assert data.notes == ("the hub's test part has no labels and is not used",)

    def test_words_of_two_classes(self, monkeypatch):
        part = self.rows(["unacceptable", "acceptable"], sentence=["a", "b"], label=[0, 1])
        data, _ = self.loaded(monkeypatch, "cola", train=part, validation=part)
        assert data.parts["valid"] == [Example("a", None, 0), Example("b", None, 1)]

    def test_grades_and_mnli(self, monkeypatch):
        part = self.rows(None, sentence1=["a", "b"], sentence2=["c", "d"], label=[2.5, 0.0])
        data, _ = self.loaded(monkeypatch, "stsb", train=part, validation=part)
        assert data.parts["train"][0] == Example("a", "c", 2.5)
        classes = ["entailment", "neutral", "contradiction"]
        part = self.rows(classes, premise=["a", "b"], hypothesis=["c", "d"], label=[2, 0])
        splits = {"train": part, "validation_matched": part, "validation_mismatched": part}
        data, _ = self.loaded(monkeypatch, "mnli", **splits)
        assert data.parts.keys() == {"train", "valid", "mismatched"}
        assert data.parts["mismatched"][0] == Example("a", "c", 2)

    def test_what_cannot_be_had_is_one_line(self, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def load_dataset(*_args):
            raise ConnectionError("no network\nsecond line")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(UserError, match=r"glue rte cannot be loaded \(no network\); name a folder with --data"):
            read_glue("rte", "hub")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match="--data hub needs the package datasets"):
            read_glue("rte", "hub")
        monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))


# --- sets of classes --------------------------------------------------------------------------------------------


def lines(*pairs, **more):
    return [json.dumps({"text": text, "label": label, "metadata": [], **more}) for text, label in pairs]


def set_folder(folder):
    write(folder / "train.jsonl", *lines(("one", "b"), ("two", "a"), ("three", "b")))
    write(folder / "dev.jsonl", *lines(("four", "a")), "")
    write(folder / "test.jsonl", *lines(("five", "b")))
    return folder


def test_json_lines(tmp_path):
    data = read_set(str(set_folder(tmp_path / "citation_intent")))
    assert (data.name, data.labels) == ("citation_intent", ("a", "b"))
    assert data.parts["train"] == [Example("one", None, 1), Example("two", None, 0), Example("three", None, 1)]
    assert data.scored_part == "test"
    assert data.metrics[0] == "macro_f1"
    assert data.seeds == 10
    assert read_set(str(set_folder(tmp_path / "chemprot"))).metrics[0] == "micro_f1"
    assert read_set(str(tmp_path / "chemprot"), "matthews").metrics[0] == "matthews"


def test_pairs_numbers_and_other_names_of_the_parts(tmp_path):
    write(tmp_path / "train.jsonl", *lines(("one", 0), ("two", 1), text_pair="x"))
    write(tmp_path / "validation.jsonl", *lines(("three", 1), text_pair="y\u2028z"))
    data = read_set(str(tmp_path))
    assert data.parts["valid"] == [Example("three", "y\u2028z", 1)]
    assert data.scored_part == "valid"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dev.jsonl", lines(("x", "c")), r"dev\.jsonl line 1: label 'c' is none of a, b"),
        ("test.jsonl", [*lines(("x", "a")), "{"], r"test\.jsonl line 2 is no JSON"),
        ("train.jsonl", ["[1]"], r"train\.jsonl line 1 is a list, not an object"),
        ("train.jsonl", ['{"text": "x"}'], r"train\.jsonl line 1 has no 'label'"),
        ("train.jsonl", ['{"label": "x"}'], r"train\.jsonl line 1 has no 'text'"),
        ("train.jsonl", ['{"text": 3, "label": "x"}'], r"train\.jsonl line 1: text='3' is a int, not text"),
        ("train.jsonl", ['{"text": "x", "label": ["y"]}'], r"line 1: label=.* is a list, not text"),
        ("dev.jsonl", [], "the valid part of .* is empty"),
        ("train.jsonl", lines(("x", "a")), "has the one label 'a'; there is nothing to learn"),
        ("dev.jsonl", None, r"has no dev\.jsonl; a set needs"),
        ("train.jsonl", None, r"has no train\.jsonl; a set needs"),
        ("train.jsonl", lines(("", "a"), ("x", "b")), "has an example without text"),
    ],
)
def test_broken_sets_are_one_line(tmp_path, file, content, message):
    folder = set_folder(tmp_path / "set")
    if content is None:
        (folder / file).unlink()
    else:
        write(folder / file, *content)
    with pytest.raises(UserError, match=message) as caught:
        read_set(str(folder))
    assert "\n" not in str(caught.value)


def test_pubmedqa(tmp_path):
    question = {"QUESTION": "Is it?", "CONTEXTS": ["One.", "Two."], "LONG_ANSWER": "It is."}
    questions = {str(i): question | {"final_decision": ("yes", "no", "maybe")[i % 3]} for i in range(40)}
    (tmp_path / "ori_pqal.json").write_text(json.dumps(questions))
    truth = {str(i): questions[str(i)]["final_decision"] for i in range(20)}
    (tmp_path / "test_ground_truth.json").write_text(json.dumps(truth))
    data = read_set(str(tmp_path))
    assert {part: len(examples) for part, examples in data.parts.items()} == {"train": 18, "valid": 2, "test": 20}
    assert data.parts["test"][1] == Example("Is it?", "One. Two.", data.labels.index("no"))
    assert data.metrics[0] == "accuracy"
    assert read_set(str(tmp_path)).sha256() == data.sha256()
    del questions["30"]["CONTEXTS"]
    (tmp_path / "ori_pqal.json").write_text(json.dumps(questions))
    with pytest.raises(UserError, match="question 30 lacks QUESTION, CONTEXTS or final_decision"):
        read_set(str(tmp_path))


@shared
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cola", {"train": 8551, "valid": 1043}),
        ("mrpc", {"train": 3576, "valid": 500, "test": 1725}),
        ("rte", {"train": 2490, "valid": 277}),
        ("sst2", {"train": 60614, "valid": 6735, "test": 872}),
        ("stsb", {"train": 3000, "valid": 750, "test": 6750}),
    ],
)
def test_the_shared_tasks(name, sizes):
    data = read_glue(name, str(SHARED))
    assert {part: len(examples) for part, examples in data.parts.items()} == sizes


@shared
@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        ("chemprot", 13, {"train": 4169, "valid": 2427, "test": 3469}),
        ("citation_intent", 6, {"train": 1688, "valid": 114, "test": 139}),
        ("pubmedqa", 3, {"train": 450, "valid": 50, "test": 500}),
    ],
)
def test_the_shared_sets(name, classes, sizes):
    data = read_set(str(SHARED / name))
    assert len(data.labels) == classes
    assert {part: len(examples) for part, examples in data.parts.items()} == sizes
