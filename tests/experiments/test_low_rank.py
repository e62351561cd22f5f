"""The table of low ranks: what is trained in which order, and what is told."""

from experiments.low_rank import DIAGONAL, FULL, RATIOS, TERMS, TUNED, said_of, show, waves


def test_teachers_come_first_and_each_student_has_one_of_its_seed():
    first, then = waves(2)
    assert {training.name for training in first} == {DIAGONAL, FULL} and len(first) == 4
    assert len(then) == len(set(then)) == 2 * (len(RATIOS) * len(TERMS) + 1)
    assert [training.ratio for training in then if training.terms == TUNED] == [1.0, 1.0]
    assert {training.seed for training in then} == {training.seed for training in first}


def test_the_table_has_a_column_of_each_term_and_fewer_bytes_for_each_ratio(capsys):
    found = {training: 0.9 + training.seed / 100 for wave in waves(2) for training in wave}
    lines = show(found, "digits").splitlines()
    assert len(lines) == 2 + 3 + len(RATIOS) and lines[-1].count("90.5 ± 1.0") == len(TERMS)
    assert lines[2].count("90.5 ± 1.0") == 1 and "labels alone" in capsys.readouterr().out
    kilobytes = [float(line.split("|")[2].split()[0]) for line in lines[3:]]
    assert kilobytes == sorted(kilobytes, reverse=True) and kilobytes[-1] < 0.6 * kilobytes[0]
    assert said_of({"ratio": 0.5, "terms": "all", "seed": 0, "accuracy": 0.5}) == "0.50, all: 50.0%"
