"""Files of tasks are read as they are, and what is wrong in one is a sentence with file and line."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from mosaicbert_ds.data.tokenizer import load_tokenizer
from mosaicbert_ds.errors import DataError
from mosaicbert_ds.finetune.dataset import encode_split, labels_in, open_split, read_split
from mosaicbert_ds.finetune.hub import fetch_glue
from mosaicbert_ds.finetune.suite import glue_files
from mosaicbert_ds.finetune.tasks import GLUE, Task

SAMPLES = Path(__file__).resolve().parents[3] / "mosaicbert_ds" / "samples"
RTE, STSB, COLA, QQP = (GLUE[name] for name in ("rte", "stsb", "cola", "qqp"))
HEADER = "index\tsentence1\tsentence2\tlabel\n"
GOOD = "0\tA b.\tC d.\tentailment\n"


def _write(folder: Path, text: str | bytes, name: str = "dev.tsv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_quotes_crlf_a_bom_and_odd_separators_are_no_structure(tmp_path: Path) -> None:
    rows = f'{HEADER}0\t"A b.\tsaid "x\u2028y" and\x85z\tentailment\n1\tC\t\tnot_entailment'
    expected = [('"A b.', 'said "x\u2028y" and\x85z'), ("C", "")]
    for text in (rows, rows.replace("\n", "\r\n"), "\ufeff" + rows, rows + "\n"):
        found = read_split(RTE, _write(tmp_path, text), labelled=True)
        assert (found.texts, found.labels, found.num_broken) == (expected, [0, 1], 0)


BAD = {
    "a short row": (RTE, HEADER + GOOD + "1\tA b.\tentailment\n", "dev.tsv:3: 3 fields, but 4 columns"),
    "a tab in a field": (RTE, HEADER + "0\tA\tb\tC\tentailment\n", "dev.tsv:2: 5 fields, but 4 columns"),
    "a blank row": (RTE, HEADER + "\n" + GOOD, "dev.tsv:2: 1 fields"),
    "an unknown label": (
        RTE,
        HEADER + GOOD + "1\tA\tB\tneutral\n",
        "dev.tsv:3: label 'neutral' is unknown; allowed are entailment, not_entailment",
    ),
    "another header": (RTE, "index\tpremise\n0\tA\n", "dev.tsv:1: no column 'sentence1' in the header"),
    "no rows": (RTE, HEADER, "dev.tsv holds no rows"),
    "nothing": (RTE, "", "dev.tsv:1: no column 'sentence1' in the header; its columns are"),
    "not UTF-8": (RTE, (HEADER + GOOD).encode() + b"1\t\xff\tB\tentailment\n", "dev.tsv:3: not UTF-8"),
    "a score that is no number": (
        STSB,
        "sentence1\tsentence2\tscore\nA\tB\tgood\n",
        "dev.tsv:2: label 'good' is not allowed; give a number from 0 to 5",
    ),
    "a score out of range": (STSB, "sentence1\tsentence2\tscore\nA\tB\t5.1\n", "dev.tsv:2: label '5.1'"),
    "a score that is nan": (STSB, "sentence1\tsentence2\tscore\nA\tB\tnan\n", "dev.tsv:2: label 'nan'"),
    "a column twice": (RTE, HEADER.replace("index", "label"), "dev.tsv:1: two columns are named 'label'"),
    "CoLA without its columns": (COLA, "x\t1\tA b.\n", "dev.tsv:1: 3 fields, but 4 columns"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_malformed_file_is_one_sentence_with_file_and_line(fault: str, tmp_path: Path) -> None:
    task, text, said = BAD[fault]
    with pytest.raises(DataError) as caught:
        read_split(task, _write(tmp_path, text), labelled=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_or_dev_split_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"RTE/train\.tsv does not exist; --glue-dir takes"):
        glue_files(tmp_path, ["rte"])
    (tmp_path / "RTE").mkdir()
    _write(tmp_path / "RTE", HEADER + GOOD, "train.tsv")
    with pytest.raises(DataError, match=r"RTE/dev\.tsv does not exist"):
        glue_files(tmp_path, ["rte"])
    files = glue_files(SAMPLES / "glue", ["mnli"])["mnli"]
    assert list(files) == ["train", "dev_matched"], "mismatched and test files may be absent"


def test_broken_rows_of_qqp_are_counted_and_left_out(tmp_path: Path) -> None:
    text = "id\tquestion1\tquestion2\tis_duplicate\n0\tA\tB\t1\n1\tbroken\nC\tD\n2\tE\tF\t0\n"
    found = read_split(QQP, _write(tmp_path, text), labelled=True)
    assert (found.texts, found.labels, found.num_broken) == ([("A", "B"), ("E", "F")], [1, 0], 2)
    with pytest.raises(
        DataError, match=r"test\.tsv:3: 2 fields"
    ):  # else answers would not stand at their index
        read_split(QQP, _write(tmp_path, text, "test.tsv"), labelled=False)


def test_csv_and_jsonl_of_a_user_are_read_with_their_quotes_and_types(tmp_path: Path) -> None:
    task = Task(
        name="t", title="t", text_columns=("text",), label_column="y", labels=("1", "two"), metrics=()
    )
    table = _write(tmp_path, 'y,text\r\n1,"a, ""b""\nc"\r\ntwo,d\r\n\r\n', "a.csv")
    lines = _write(tmp_path, '{"text": "a", "y": 1}\n\n{"y": "two", "text": "b"}\n', "a.jsonl")
    assert read_split(task, table, True).texts == [('a, "b"\nc',), ("d",)]
    assert read_split(task, lines, True).labels == [0, 1]
    assert labels_in(table, "y") == labels_in(lines, "y") == ("1", "two")
    for text, name, said in (
        ('y,text\n1,"a\n', "b.csv", "b.csv:2: not valid CSV"),
        ('y,text\n1,"a\nb"\n2,c\n', "c.csv", "c.csv:4: label '2' is unknown"),
        ('{"text": "a", "y": 1}\n{"text": "a"}\n', "b.jsonl", "b.jsonl:2: no text or number in field 'y'"),
        ('{"text": null, "y": 1}\n', "c.jsonl", "c.jsonl:1: no text or number in field 'text'"),
        ('{"text": "a", "y": NaN}\n', "g.jsonl", "g.jsonl:1: no text or number in field 'y'"),
        ("[1]\n", "d.jsonl", "d.jsonl:1: not a JSON object"),
        ('{"text": "a\\ud800", "y": 1}\n', "f.jsonl", "f.jsonl:1: half a surrogate pair in field 'text'"),
        ("x", "e.txt", "e.txt is no .tsv, .csv, .jsonl"),
    ):
        with pytest.raises(DataError, match=said):
            read_split(task, _write(tmp_path, text, name), labelled=True)
    for text, said in (
        ("y,text\n1,a\n", "d.csv: column 'y' holds only 1; a classification has two"),
        ("y,text\n", "d.csv: column 'y' holds no label"),
        ("y;text\n1;a\n", "d.csv:1: no column 'y' in the header; .* y;text; columns are separated by commas"),
        ("y,text\n1,a\n,b\n2,c\n", "d.csv:3: no label in column 'y'"),
        ("y,text\n1,a\n2,b\n1.0,c\n", "d.csv: labels '1' and '1.0' in column 'y' differ in nothing but how"),
        ('y,text\nyes,a\n"yes ",b\nno,c\n', "labels 'yes' and 'yes ' in column 'y' differ in nothing but"),
    ):
        with pytest.raises(DataError, match=said):
            labels_in(_write(tmp_path, text, "d.csv"), "y")
    long = "word " * 100_000  # beyond what Python's csv takes unasked
    assert read_split(task, _write(tmp_path, f"y,text\n1,{long}\n", "long.csv"), True).texts == [(long,)]
    many = replace(task, labels=tuple(str(i / 100) for i in range(500)))
    with pytest.raises(DataError, match=r"'9\.99' is unknown; .* 490 more; numbers need --kind") as caught:
        read_split(many, _write(tmp_path, "y,text\n9.99,a\n", "many.csv"), True)
    assert len(str(caught.value)) < 300


def test_the_sample_files_of_all_tasks_are_read_whole() -> None:
    for name, files in glue_files(SAMPLES / "glue", list(GLUE)).items():
        for split, path in files.items():
            rows = read_split(GLUE[name], path, labelled=True)
            assert len(rows.texts) == len(rows.labels) == (200 if split == "train" else 100)


def test_rows_are_tokenised_as_hugging_face_does_and_only_once(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer, path = load_tokenizer(models["tokenizer"]), SAMPLES / "glue" / "RTE" / "dev.tsv"
    folder = encode_split(RTE, path, True, tokenizer, 40, tmp_path / "cache")
    split, rows = open_split(folder), read_split(RTE, path, labelled=True)
    hugging_face = AutoTokenizer.from_pretrained(models["tokenizer"])
    for row, (first, second) in enumerate(rows.texts):
        expected = hugging_face(first, second, truncation=True, max_length=40, return_token_type_ids=True)
        low, high = split.offsets[row], split.offsets[row + 1]
        assert split.tokens[low:high].tolist() == expected["input_ids"]
        types = (np.arange(high - low) >= split.second[row]).astype(int).tolist()
        assert types == expected["token_type_ids"]
    assert split.lengths.max() == 40, "some were cut"
    assert split.labels.tolist() == rows.labels

    stamp = (folder / "tokens.npy").stat().st_mtime_ns
    assert encode_split(RTE, path, True, tokenizer, 40, tmp_path / "cache") == folder
    assert (folder / "tokens.npy").stat().st_mtime_ns == stamp
    other = replace(RTE, labels=RTE.labels[::-1])
    changed = _write(tmp_path, path.read_bytes() + b"1000\tA\tB\tentailment\n")
    keys = {
        encode_split(*arguments, tmp_path / "cache")
        for arguments in (
            (RTE, path, True, tokenizer, 40),
            (RTE, path, True, tokenizer, 41),
            (RTE, path, False, tokenizer, 40),
            (other, path, True, tokenizer, 40),
            (RTE, changed, True, tokenizer, 40),
        )
    }
    assert len(keys) == 5, "another length, label order or file is another cache entry"


def test_the_hub_gives_the_same_rows_as_the_official_files(tmp_path: Path) -> None:
    """A local repository laid out as nyu-mll/glue is."""
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["not_equivalent", "equivalent"]),
        }
    )
    texts = {"sentence1": ["A", "B"], "sentence2": ["C", "D"]}
    repository = tmp_path / "glue"
    for split, labels in (("train", [1, 0]), ("validation", [0, 1]), ("test", [-1, -1])):
        (repository / "mrpc").mkdir(parents=True, exist_ok=True)
        data = datasets.Dataset.from_dict({**texts, "label": labels}, features=features)
        data.to_parquet(repository / "mrpc" / f"{split}-0.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: mrpc\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: mrpc/{s}-*\n" for s in ("train", "validation", "test"))
        + "---\n"
    )
    files = fetch_glue(f"hf:{repository}", ["mrpc"], tmp_path / "fetched")["mrpc"]
    assert read_split(GLUE["mrpc"], files["train"], True).labels == [1, 0]
    assert read_split(GLUE["mrpc"], files["dev"], True).texts == [("A", "C"), ("B", "D")]
    assert "label" not in json.loads(files["test"].read_text().splitlines()[0])
    with pytest.raises(DataError, match="cannot be opened for rte train"):
        fetch_glue(f"hf:{repository}", ["rte"], tmp_path / "fetched")
    with pytest.raises(DataError, match="cannot be opened for mrpc train"):  # not the rows of the first
        fetch_glue(f"hf:{repository}-2", ["mrpc"], tmp_path / "fetched")
