"""Labelled tables: every file format, the form in which data sets are downloaded, and one rule for each column."""

import csv
import json
import re
from importlib import util
from pathlib import Path

import pytest

from gpt_fast.data import labels, tables
from gpt_fast.data.reading import files, nested, rows
from gpt_fast.data.tables import TableOptions
from gpt_fast.training import table_examples, tasks


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(folder: Path, name: str, content: str | bytes, options: TableOptions = tables.DEFAULT) -> tables.Table:
    return tables.read_table(write(folder, {name: content}) / name, options=options)


def load(path: Path, task: str, options: rows.RowOptions = rows.DEFAULT, **columns) -> tuple:
    """The table of a task, the names of its classes and each row's target."""
    chosen = tasks.task_settings(
        task, columns.pop("text", None), columns.pop("pair", None), columns.pop("label", None),
        columns.pop("numbers", False), **columns,
    )  # fmt: skip
    table = table_examples.read_task_table(path, chosen, options=options)
    names = table_examples.label_names(table, chosen)
    return table, names, table_examples.targets(table, chosen, names)


# --- formats ---

FORMS = {
    "t.csv": '\ufefftext,label,more\r\n"a, ""b""\nc",x,1\r\n日本,y,2\r\n',
    "t.tsv": 'more\ttext\tlabel\n1\t"a, ""b""\nc"\tx\n2\t日本\ty\n',
    "t.jsonl": '{"text": "a, \\"b\\"\\nc", "label": "x"}\n\n{"label": "y", "text": "日本", "more": [1]}\n',
    "t.json": '\ufeff[{"text": "a, \\"b\\"\\nc", "label": "x"},\n {"label": "y", "text": "日本", "more": [1]}]\n',
    "lines.json": '{"text": "a, \\"b\\"\\nc", "label": "x"}\n{"label": "y", "text": "日本", "more": [1]}\n',
    "data.json": '{"data": [{"text": "a, \\"b\\"\\nc", "label": "x"}, {"label": "y", "text": "日本"}]}',
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_in_every_text_format(tmp_path, name):
    """Quotes, line ends in a field, a byte order mark, a blank line, an array, lines in a .json."""
    table = read(tmp_path, name, FORMS[name])
    assert table.texts == ['a, "b"\nc', "日本"]
    assert table.labels == ["x", "y"]


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra hf is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra hf is not installed")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path):
    """Rows beyond a batch of the reader, integer labels, a list column; a row is named by its number."""
    path = write_parquet(tmp_path / "t.parquet", {"text": [f"t{i}" for i in range(3000)], "label": [0, 1, 2] * 1000})
    table, names, targets = load(path, "classification")
    assert (len(table), names, targets[:4], table.place(2999)) == (3000, ["0", "1", "2"], [0, 1, 2, 0], "row 3000")
    path = write_parquet(tmp_path / "none.parquet", {"text": ["a", "b", "c"], "label": [0, None, 1]})
    with pytest.raises(ValueError, match=r"none\.parquet, row 2: column 'label' holds None"):
        tables.read_table(path)
    with pytest.raises(ValueError, match=r"broken\.parquet: damaged, or no parquet table"):
        read(tmp_path, "broken.parquet", path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "damage",
    [lambda b: b.replace(b"caf", b"ca\xff"), lambda b: b[:-20] + b"\xff" * 12 + b[-8:]],
    ids=["text", "footer"],
)
def test_a_damaged_parquet_is_named(tmp_path, damage):
    """The error names the file, although pyarrow raises errors of several types, most of them without the name."""
    path = write_parquet(tmp_path / "t.parquet", {"text": ["cafe", "tea"], "label": [0, 1]})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t\.parquet: damaged, or no parquet table"):
        tables.read_table(path)


@pytest.mark.parametrize("level", ["paragraphs", "qas", "answers"])
def test_a_damaged_squad_is_named(tmp_path, level):
    content = re.sub(rf'"{level}": \[', f'"{level}": [5, ', json.dumps(SQUAD), count=1)
    write(tmp_path, {"t.json": content.replace("[5, ]", "[5]")})
    with pytest.raises(ValueError, match=rf"t\.json: {level} of SQuAD's form is \[5"):
        load(tmp_path / "t.json", "question-answering", label="answers")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    write(tmp_path, {"t.parquet": b"PAR1"})
    find = util.find_spec
    monkeypatch.setattr(files, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    with pytest.raises(ValueError, match=r"t\.parquet: needs pyarrow; pip install gpt-fast\[hf\]"):
        tables.read_table(tmp_path / "t.parquet")


def test_a_field_longer_than_csvs_limit(tmp_path):
    assert len(read(tmp_path, "t.csv", "text,label\n" + "a" * 200_000 + ",x\n").texts[0]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.txt",
            "text,label\na,b\n",
            "t.txt: ends in '.txt'; expected a table ending in .csv, .tsv, .jsonl, .json, .parquet",
        ),
        ("t.csv", "", "t.csv: empty"),
        ("t.csv", "text,label\n", "t.csv: empty"),
        ("t.csv", "text,lable\na,b\n", "t.csv, line 2: no column 'label' (did you mean 'lable'?); it has 'text'"),
        ("t.csv", "text,label\na,b\nc\n", "t.csv, line 3: 1 fields under a header of 2; --skip-ragged"),
        ("t.csv", "text,label\na,\n", "t.csv, line 2: column 'label' holds ''"),
        ("t.csv", 'text,label\n"a,b\n', "t.csv, line 2: unexpected end of data"),
        ("t.csv", b"text,label\na,b\ncaf\xe9,b\n", "t.csv, line 3: not UTF-8 (byte 3 of the line"),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "caf\xe9"}\n', "t.jsonl, line 2: not UTF-8 (byte 13"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "t.jsonl, line 2: not JSON"),
        ("t.jsonl", '["a", 1]\n', "t.jsonl, line 1: a list; expected an object"),
        ("t.jsonl", '{"text": 5, "label": 1}\n', "t.jsonl, line 1: column 'text' holds 5"),
        ("t.jsonl", '{"text": "a", "label": null}\n', "t.jsonl, line 1: column 'label' holds None"),
        ("t.jsonl", '{"text": "a", "label": {}}\n', "t.jsonl, line 1: column 'label' holds {}; expected a label"),
        ("t.json", '[{"text": "a",\n "label": }]', "t.json, row 1: not JSON"),
        ("t.json", '[{"text": "a", "label": 1}, 5]', "t.json, row 2: a number; expected an object with named fields"),
        ("t.json", '"text"', "t.json: a text; expected an array of objects"),
        ("t.json", "[" * 100_000, "t.json, row 1: not JSON that can be read, nested too deeply"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, name, content)


def test_missing_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        tables.read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "text,label,label\na,1,x\n"),
        ("t.tsv", "label\ttext\tlabel\n1\ta\tx\n"),
        ("t.jsonl", '{"text": "a", "label": 1, "label": 2}\n'),
        ("t.json", '[{"label": 1, "text": "a", "label": 2}]'),
    ],
)
def test_two_columns_of_one_name_are_refused(tmp_path, name, content):
    """Before, the last one won and the other was dropped."""
    with pytest.raises(ValueError, match=r"'label'.*expected a name for each"):
        read(tmp_path, name, content)


# --- quotes in a .tsv ---

LONE = 'text\tlabel\n"so it begins\t1\nfine\t0\nit ends"\t1\n5" pipe\t0\n'


def test_a_lone_quote_swallows_no_row_of_a_tsv(tmp_path):
    """Before, three rows were read as one. GLUE's files are written without quoting."""
    table = read(tmp_path, "t.tsv", LONE)
    assert table.texts == ['"so it begins', "fine", 'it ends"', '5" pipe']
    assert table.labels == ["1", "0", "1", "0"]
    assert table.notes == [f'{tmp_path}/t.tsv: read without quoting, 4 rows (with " as quotes: 2 rows)']


@pytest.mark.parametrize(
    "quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC], ids=["min", "all", "text"]
)
@pytest.mark.parametrize(
    "texts",
    [["a\tb", "c"], ["a\nb\n\nc", "d"], ['say "yes"', "no"], ["", 'a\n"x"\nb']],
    ids=["tab", "lines", "quotes", "both"],
)
def test_a_tsv_that_a_csv_writer_quoted(tmp_path, texts, quoting):
    with (tmp_path / "t.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n")
        writer.writerows([["text", "label"], *zip(texts, [1, 2.5], strict=True)])
    table = tables.read_table(tmp_path / "t.tsv")
    assert (table.texts, table.labels) == (texts, ["1", "2.5"])
    assert 'read with " as quotes, 2 rows' in table.notes[0]


@pytest.mark.parametrize("line", ['"fine"\t1', '"a" and "b"\t0', '"\t1', 'a ""\t1', '""\t0'])
def test_a_tsv_whose_quotes_are_text(tmp_path, line):
    """No csv writer writes such a field, so its quotes belong to the text, beside whatever other rows."""
    table = read(tmp_path, "t.tsv", f"text\tlabel\nplain\t0\n{line}\nlast\t1\n")
    assert table.texts == ["plain", line.split("\t")[0], "last"]


def test_a_ragged_row_is_no_proof_of_quoting(tmp_path):
    """One line lacks a field, and quotes would swallow it together with four whole rows."""
    content = 'text\tlabel\n"a\t1\nb\t0\nragged\nc\t1\nd"\t0\ne\t1\n'
    with pytest.raises(ValueError, match=r"line 4: 1 fields under a header of 2"):
        read(tmp_path, "t.tsv", content)
    table = read(tmp_path, "t.tsv", content, TableOptions(skip_ragged=True))
    assert table.texts == ['"a', "b", "c", 'd"', "e"]
    assert table.notes[1:] == [f"{tmp_path}/t.tsv: skipped 1 rows with another number of fields: line 4"]


def test_a_tsv_with_as_many_whole_as_broken_lines_is_refused(tmp_path):
    """Tabs inside a quoted field of several lines: both readings lose something, so the first broken line is named."""
    with pytest.raises(ValueError, match="line 3: 1 fields under a header of 2"):
        read(tmp_path, "t.tsv", 'text\tlabel\nx\t1\n"a\nb\tc\nd"\t0\n')


# --- labels ---

COLUMNS = {
    "integers by value": (["10", "9", "1"], ["1", "9", "10"], "1, 9, 10 (3 integers, sorted by value)"),
    "consecutive": (["2", "0", "1"], ["0", "1", "2"], "integers 0..2, sorted by value"),
    "two spellings of a number": (["1", "1.0", "0"], ["0", "1"], "integers 0..1, sorted by value"),
    "halves": (["1.5", "1", "10"], ["1", "1.5", "10"], "1, 1.5, 10 (3 numbers, sorted by value)"),
    "plus and minus": (["-1", "1", "-1.0"], ["-1", "1"], "-1, 1 (2 integers, sorted by value)"),
    "spaces": (["pos", "pos ", " neg"], ["neg", "pos"], "neg, pos (2 texts, sorted)"),
    "codes": (["007", "07a", "12"], ["007", "07a", "12"], "007, 07a, 12 (3 texts, sorted)"),
    "signs": (["-", "+", "-"], ["+", "-"], "+, - (2 texts, sorted)"),
}


@pytest.mark.parametrize("case", COLUMNS)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_one_rule_for_a_column_of_labels(tmp_path, case, suffix):
    """The same classes and targets from text and from JSON strings."""
    column, expected, rule = COLUMNS[case]
    lines = ["text,label", *(f"t,{label}" for label in column)]
    if suffix == "jsonl":
        lines = [json.dumps({"text": "t", "label": label}) for label in column]
    write(tmp_path, {f"t.{suffix}": "\n".join(lines) + "\n"})
    table, names, targets = load(tmp_path / f"t.{suffix}", "classification")
    assert names == expected
    assert [names[int(i)] for i in targets] == [
        label.strip() if label.strip() in expected else str(int(float(label))) for label in column
    ]
    assert labels.class_rule(names, listed=False) == rule


def test_numbers_of_json_and_of_text_are_one_class(tmp_path):
    content = "".join(json.dumps({"text": "t", "label": label}) + "\n" for label in (1, 1.0, "1", "1.0", 0))
    write(tmp_path, {"t.jsonl": content})
    _, names, targets = load(tmp_path / "t.jsonl", "classification")
    assert (names, targets) == (["0", "1"], [1, 1, 1, 1, 0])


UNCLEAR = {
    "case": (["Pos", "neg", "pos"], "holds 'Pos' (line 2) and 'pos' (line 4), which may be one class or two"),
    "a number in words": (["1", "1.0", "many"], "holds '1' (line 2) and '1.0' (line 3), which may be one class or two"),
    "codes": (["07", "7", "8"], "holds '07' (line 2) and '7' (line 3), which may be one class or two"),
    "minus one": (["0", "-1", "1", "-1"], "holds -1 in 2 rows (line 3, line 5), which may be a class or mark rows"),
    "a dash": (["yes", "-", "no"], "holds - in 1 rows (line 3), which may be a class or mark rows without a label"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_a_column_with_two_readings_is_refused(tmp_path, case):
    column, message = UNCLEAR[case]
    write(tmp_path, {"t.csv": "\n".join(["text,label", *(f"t,{label}" for label in column)]) + "\n"})
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path / "t.csv", "classification")
    _, names, targets = load(tmp_path / "t.csv", "classification", labels=",".join(dict.fromkeys(column)))
    assert [names[int(i)] for i in targets] == column


@pytest.mark.parametrize("blank", ["", "  ", "NaN", "nan"])
def test_a_blank_label_is_no_class(tmp_path, blank):
    """Before, spaces and NaN were classes."""
    write(tmp_path, {"t.csv": f"text,label\na,x\nb,{blank}\nc,y\nd,{blank}\n"})
    with pytest.raises(ValueError, match=r"t\.csv, line 3, line 5: column 'label' holds .*expected a label \(2 rows"):
        load(tmp_path / "t.csv", "classification")
    table, names, targets = load(tmp_path / "t.csv", "classification", skip_labels=("",))
    assert (table.texts, names, targets) == (["a", "c"], ["x", "y"], [0, 1])
    assert table.notes == [f"{tmp_path}/t.csv: skipped 2 rows by their label: line 3, line 5"]


def test_labels_to_skip_in_any_spelling(tmp_path):
    write(tmp_path, {"t.csv": "text,label\na,0\nb,-1\nc,1\nd,-1.0\n"})
    table, names, _ = load(tmp_path / "t.csv", "classification", skip_labels=("-1",))
    assert (table.texts, names) == (["a", "c"], ["0", "1"])


def test_labels_that_the_user_lists(tmp_path):
    """Their order is the user's, and any other label is an error that names its rows."""
    write(tmp_path, {"t.csv": "text,label\na,good\nb,bad\nc,odd\n"})
    with pytest.raises(ValueError, match=r"t\.csv, line 4: unknown label 'odd'.*--skip-label=odd"):
        load(tmp_path / "t.csv", "classification", labels="good,bad")
    _, names, targets = load(tmp_path / "t.csv", "classification", labels="good, bad", skip_labels=("odd",))
    assert (names, targets) == (["good", "bad"], [0, 1])
    for listed in ("good", "good,good"):
        with pytest.raises(ValueError, match="expected two classes or more, each once"):
            tasks.task_settings("classification", None, None, None, False, labels=listed)


def test_held_out_rows_keep_their_lines_and_classes(tmp_path):
    """The rule is decided before rows are held out, and a row is named by its line in the file after the split."""
    write(tmp_path, {"t.csv": "text,label\n" + "".join(f"t{i},{i % 2}{'.0' * (i % 3 == 0)}\n" for i in range(40))})
    task = tasks.task_settings("classification", None, None, None, False)
    train, valid, _ = table_examples.read_tables(tmp_path / "t.csv", None, task, seed=3)
    assert len(valid) == 4
    for table in (train, valid):
        assert set(table.labels) == {"0", "1"}
        assert table.places == [f"line {int(text[1:]) + 2}" for text in table.texts]
    assert train.notes == [f"{tmp_path}/t.csv: column 'label': 0.0 is 0, 1.0 is 1"]


# --- answers of a multiple choice ---

ANSWERS = {
    "texts": (["z", "x"], "text", [2, 0]),
    "letters": (["B", "c"], "letters", [1, 2]),
    "numbers": (["0", "2.0"], "0", [0, 2]),
}


def choices(folder: Path, answers: list[str], *options: str) -> Path:
    each = options or ("x", "y", "z")
    lines = [",".join(["question", "a", "b", "c", "answer"]), *(",".join(["q", *each, answer]) for answer in answers)]
    write(folder, {"t.csv": "\n".join(lines) + "\n"})
    return folder / "t.csv"


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_are_named_in_one_way(tmp_path, case):
    column, reading, expected = ANSWERS[case]
    table, _, targets = load(choices(tmp_path, column), "multiple-choice", pair="a,b,c")
    assert targets == expected
    assert labels.answer_reading("t", table.labels, table.more, table.place) == reading


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        (["z", "x", "B"], (), "line 4: unknown label 'B'; expected an answer's text as in 2 of 3 rows"),
        (["0", "1", "x"], (), "line 4: unknown label 'x'; expected a number that counts from 0 as in 2 of 3"),
        (["1", "2"], (), "line 2: answer '1' may be a number that counts from 0 or a number that counts from 1"),
        (["2", "3", "1"], (), "line 3: answer '3' of 3 counts from 1; expected numbers that count from 0, or"),
        (["0", "3"], (), "line 3: unknown label '3'; expected a number that counts from 0 as in 1 of 2 rows"),
        (["2", "1"], ("1", "2", "3"), "line 2: answer '2' may be an answer's text or a number that counts from 0"),
        (["b", "a"], ("b", "a", "c"), "line 2: answer 'b' may be an answer's text or a letter"),
    ],
)  # fmt: skip
def test_answers_with_two_readings_are_refused(tmp_path, column, options, message):
    """Before, one row was read by its text and the next by its position, and answers counted from 1 were shifted."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load(choices(tmp_path, column, *options), "multiple-choice", pair="a,b,c")


def test_answers_by_an_option(tmp_path):
    path = choices(tmp_path, ["1", "2"])
    for reading, expected in (("0", [1, 2]), ("1", [0, 1])):
        assert load(path, "multiple-choice", pair="a,b,c", answers=reading)[2] == expected
    with pytest.raises(
        ValueError, match="line 2: unknown label '1'; expected a letter of 3 choices, as --answers letters"
    ):
        load(path, "multiple-choice", pair="a,b,c", answers="letters")
    with pytest.raises(ValueError, match="--answers 2: expected one of text, letters, 0, 1, for multiple-choice"):
        load(path, "multiple-choice", pair="a,b,c", answers="2")


def test_evaluation_reads_answers_as_training_did(tmp_path):
    """A table of its own, from which either reading would be possible."""
    path = choices(tmp_path, ["0", "1", "2", *"012" * 4])
    task = tasks.task_settings("multiple-choice", None, "a,b,c", None, False)
    train, _, task = table_examples.read_tables(path, path, task, seed=0)
    names = table_examples.label_names(train, task)
    assert table_examples.label_rule(names, task) == "answers: a number that counts from 0, of 3 choices"
    few = table_examples.read_task_table(choices(tmp_path, ["1", "2"]), task)
    assert table_examples.targets(few, task, names) == [1, 2]


# --- data sets as they are downloaded ---


def test_glue_cola_has_no_header(tmp_path):
    write(tmp_path, {"train.tsv": 'gj04\t1\t\tThey drank "it.\ngj04\t0\t*\tThey drank the pub.\n'})
    with pytest.raises(ValueError, match="no column 'sentence'.*--columns the columns of a file without a header"):
        load(tmp_path / "train.tsv", "classification", text="sentence")
    options = rows.row_options("source,label,star,sentence", skip_ragged=False)
    table, names, targets = load(tmp_path / "train.tsv", "classification", options, text="sentence")
    assert (table.texts, names, targets) == (['They drank "it.', "They drank the pub."], ["0", "1"], [1, 0])
    write(tmp_path, {"t.jsonl": "{}"})
    with pytest.raises(ValueError, match="names its columns itself"):
        load(tmp_path / "t.jsonl", "classification", options)


GLUE = {
    "SST-2": ("classification", "sentence\tlabel\n", ['a " film\t1', "dull\t0"], {"text": "sentence"}, [1, 0]),
    "MRPC": (
        "similarity", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        ['1\t7\t8\t"He said\tHe said', "0\t9\t1\ta\tb"],
        {"text": "#1 String", "pair": "#2 String", "label": "Quality"}, [1, 0],
    ),
    "QQP": (
        "similarity", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n", ["0\t1\t2\ta\tb\t0", "1\t3\t4\tc\td\t1"],
        {"text": "question1", "pair": "question2", "label": "is_duplicate"}, [0, 1],
    ),
    "STS-B": (
        "similarity", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
        ["0\tnews\tf\t2012\t1\tn\tn\ta\tb\t5.000", '1\tnews\tf\t2012\t1\tn\tn\t"a\tb\t0.800'],
        {"label": "score", "numbers": True}, [5.0, 0.8],
    ),
    "MNLI": (
        "entailment", "index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label\n",
        ["0\tx\ta\tb\tneutral\tneutral", "1\ty\tc\td\tneutral\tentailment"],
        {"text": "sentence1", "pair": "sentence2", "label": "gold_label"}, [1, 0],
    ),
    "QNLI": (
        "entailment", "index\tquestion\tsentence\tlabel\n", ["0\ta\tb\tentailment", "1\tc\td\tnot_entailment"],
        {"text": "sentence", "pair": "question"}, [0, 1],
    ),
    "RTE, WNLI": (
        "entailment", "index\tsentence1\tsentence2\tlabel\n", ["0\ta\tb\t1", "1\tc\td\t0"],
        {"text": "sentence1", "pair": "sentence2"}, [1, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_glue(tmp_path, name):
    """Each file with the header that it is downloaded with, and the options that the guide gives for it."""
    task, header, lines, columns, expected = GLUE[name]
    write(tmp_path, {"train.tsv": header + "".join(line + "\n" for line in lines)})
    table, _, targets = load(tmp_path / "train.tsv", task, **columns)
    assert len(table) == 2
    assert targets == expected


def test_snli(tmp_path):
    """Rows on which the annotators did not agree have the label -, and the parses are further columns."""
    labelled = [("neutral", "a", "b"), ("-", "c", "d"), ("entailment", "e", "f")]
    lines = [
        {"gold_label": label, "sentence1": one, "sentence2": two, "captionID": "1"} for label, one, two in labelled
    ]
    write(tmp_path, {"snli_1.0_train.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
    columns = {"text": "sentence1", "pair": "sentence2", "label": "gold_label"}
    with pytest.raises(ValueError, match=r"holds - in 1 rows \(line 2\).*--skip-label=-"):
        load(tmp_path / "snli_1.0_train.jsonl", "entailment", **columns)
    table, names, targets = load(tmp_path / "snli_1.0_train.jsonl", "entailment", **columns, skip_labels=("-",))
    assert (table.texts, names, targets) == (["a", "e"], ["entailment", "neutral"], [1, 0])


QUESTIONS = [
    {"id": "1", "question": "Who?", "answers": [{"text": text, "answer_start": 0} for text in ("a fox", "fox")]},
    {"id": "2", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "x"}]},
]  # fmt: skip
SQUAD = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "It is a fox.", "qas": QUESTIONS}]}]}


def test_squad(tmp_path):
    """The nested form and Hugging Face's copy give the same rows. A question without an answer has an empty one."""
    write(tmp_path, {"train-v2.0.json": json.dumps(SQUAD)})
    answers = [{"text": ["a fox", "fox"], "answer_start": [0, 0]}, {"text": [], "answer_start": []}]
    copy = {"context": ["It is a fox."] * 2, "question": ["Who?", "Why?"], "answers": answers}
    for path in (tmp_path / "train-v2.0.json", write_parquet(tmp_path / "squad.parquet", copy)):
        table, _, _ = load(path, "question-answering", label="answers")
        assert table.texts == ["It is a fox."] * 2
        assert table.more == [("Who?",), ("Why?",)]
        assert table.labels == ["a fox", ""]
        assert table.notes == [f"{path}: 1 rows have no answer, which is an empty text: row 2"]


def test_a_blank_answer_in_a_plain_column_is_refused(tmp_path):
    write(tmp_path, {"t.csv": "prompt,answer\na,b\nc,\n"})
    with pytest.raises(ValueError, match=r"line 3: column 'answer' holds ''; expected a label \(1 rows have none"):
        load(tmp_path / "t.csv", "generation")


def test_answers_to_be_written_keep_their_spaces(tmp_path):
    write(tmp_path, {"t.jsonl": json.dumps({"prompt": "a", "answer": " b\n"}) + "\n"})
    assert load(tmp_path / "t.jsonl", "generation")[0].labels == [" b\n"]


RACE = {
    "id": "high1.txt", "article": "A fox.", "questions": ["Who?", "Where?"], "answers": ["B", "A"],
    "options": [["a dog", "a fox", "a cat", "a man"], ["here", "there", "away", "home"]],
}  # fmt: skip


def test_race(tmp_path):
    """An article with its questions becomes a row for each; the text of a row is article and question."""
    write(tmp_path, {"race.jsonl": json.dumps(RACE) + "\n"})
    table, names, targets = load(tmp_path / "race.jsonl", "multiple-choice", text="article,question", pair="options")
    assert table.texts == ["A fox.\nWho?", "A fox.\nWhere?"]
    assert (names, targets) == (["A", "B", "C", "D"], [1, 0])
    assert table.place(1) == "line 1, question 2"


def arc(key: str, marks: str, texts: list[str]) -> dict:
    choices = [{"text": text, "label": mark} for text, mark in zip(texts, marks, strict=True)]
    return {"id": "x", "question": {"stem": "Which?", "choices": choices}, "answerKey": key}


def test_arc(tmp_path):
    """Keys are letters in most rows and numbers from 1 in some; a few rows have another number of choices."""
    lines = [arc("B", "ABCD", list("wxyz")), arc("4", "1234", list("wxyz")), arc("A", "ABC", list("wxy"))]
    write(tmp_path, {"ARC-Easy-Train.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
    path = tmp_path / "ARC-Easy-Train.jsonl"
    with pytest.raises(ValueError, match=r"line 3: 3 choices; expected 4 in every row \(--skip-ragged"):
        load(path, "multiple-choice")
    table, _, targets = load(path, "multiple-choice", rows.RowOptions(skip_ragged=True), answers="0")
    assert (table.texts, targets) == (["Which?"] * 2, [1, 3])
    assert table.notes == [f"{path}: skipped 1 rows without 4 choices: line 3"]
    copy = {
        "question": ["Which?"], "choices": [{"text": list("wxyz"), "label": list("ABCD")}], "answerKey": ["C"],
    }  # fmt: skip
    assert load(write_parquet(tmp_path / "arc.parquet", copy), "multiple-choice", answers="0")[2] == [2]


@pytest.mark.parametrize("choices", [None, [], ["w", "x"], [{"text": "w"}]], ids=str)
def test_a_question_without_arcs_choices_is_left_alone(choices):
    row = {"question": {"stem": "Which?", "choices": choices}, "answerKey": "A"}
    assert list(nested.unnested("row 1", row)) == [("row 1", row)]


def test_nested_values_are_written_as_json(tmp_path):
    tables.write_rows(tmp_path / "t.csv", [{"question": "q", "choices": ["a", "é"], "n": 1}])
    assert (tmp_path / "t.csv").read_text() == 'question,choices,n\nq,"[""a"", ""é""]",1\n'
