"""Every experiment runs, on tiny settings, and says what its exercise says where that is cheap to check."""

import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded

import numpy as np
import pytest
import torch

import solutions  # it puts the folder of passn.py on the path
import passn
from toy_tasks import Multiply, Search

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
NUMBERS = [*solutions.SOLUTIONS]
TINY = {"epochs": 1, "evaluations": 1, "batch_size": 2, "n_layer": 1, "n_head": 2, "n_embd": 16, "start_epochs": 1}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Every task with a tiny model, few problems and two epochs, all runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for task in (*passn.TASKS.values(), solutions.FixedWeights, solutions.Averaged):
            few = {"num_train": 6, "num_test": 8} if "num_train" in task.settings else {}
            patch.setattr(task, "settings", task.settings | TINY | few)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of runs, and of MATH: in training the answer 0 is often seen, 1 less often, and 5 rarely."""
    folder = tmp_path_factory.mktemp("runs")
    for split, numbers in (("train", [0] * 31 + [1] * 30 + [5] * 5), ("test", [0, 1, 5] * 7)):
        lines = [json.dumps({"problem": f"{split} {i}", "solution": f"\\boxed{{{n}}}"}) for i, n in enumerate(numbers)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def table(text):
    """{label: its numbers}, of what a solution prints."""
    rows = {line[:34].strip(): line[34:].split() for line in text.splitlines()}
    return {label: [float(cell.split("±")[0]) for cell in cells]
            for label, cells in rows.items() if cells and re.fullmatch(r"[-+]?[\d.]+(±[\d.]+)?", cells[0])}


def solve(number, folder, capsys, *flags):
    solutions.main([number, "--out", str(folder), *flags])
    return table(capsys.readouterr().out)


@pytest.mark.parametrize("number", [number for number in NUMBERS if number != "14"])
def test_what_is_there_is_not_trained_again_and_the_rows_are_those_of_the_readme(number, folder, capsys, monkeypatch):
    rows = solve(number, folder, capsys, "--math-dir", str(folder))
    printed = table(re.search(rf"### {number}\. .*?```\n(.*?)```", README, re.S)[1])
    ours, theirs = ([re.sub(r"epochs?\W\d+", "", label) for label in labels] for labels in (rows, printed))
    assert [*dict.fromkeys(ours)] == [*dict.fromkeys(theirs)] and {*map(len, rows.values())} <= {1, 2, 3, 4}
    monkeypatch.delattr(passn, "train")
    assert solve(number, folder, capsys, "--math-dir", str(folder)) == rows


def by_hand(args, loss, N=64, task="multiply", with_training=False, **changes):
    """A row of a run. Its p in three epochs is 1, 3 and 2 times its own; at another temperature half as much again."""
    own = {"ce": 0.002, "limited": 0.005, "root": 0.006}.get(loss, 0.003 / N) + 0.001 * len(changes)
    history = [{"epoch": i, "confidence": k * own / 2, "p": [[k * own] * 4, [1.5 * k * own] * 4],
                "all_train_p": [k * own / 4, 0.3]} for i, k in enumerate((1, 3, 2))]
    return [{"label": loss, "num_samples": None, "history": history}]


def test_tables_and_figure_of_runs_by_hand(folder, capsys, monkeypatch):
    """Numbers are printed with three digits, so their differences may be off by more than a half."""
    drawn = []
    monkeypatch.setattr(passn, "save_figure", lambda figure, _: drawn.extend(figure.axes))
    monkeypatch.setattr(solutions, "runs", by_hand)
    first, second, sixth, seventh, tenth, eleventh = (solve(number, folder, capsys) for number in "1 2 6 7 10 11".split())
    same = lambda values: pytest.approx(values, abs=6e-4)
    at = lambda p, n=64: 1 - (1 - p) ** n
    assert first["ce"] == same([at(0.006), at(0.009), at(0.004), at(0.006)])
    assert first["epoch 1"] == same([0.006, at(0.006), 0.003])
    for n in (64, 128, 512):
        (unbiased, scatter), (naive, _) = second[f"{n} samples, unbiased"], second[f"{n} samples, c/n for p"]
        assert abs(unbiased - second["exact"][0]) < scatter and naive < second["exact"][0] - 0.1 / n
    assert sixth["root minus limited"] == same([at(0.012, n) - at(0.01, n) for n in (1, 8, 64)])
    assert sixth["limited, passing over minus not"] == same([at(0.01, n) - at(0.012, n) for n in (1, 8, 64)])
    assert sixth["root, passing over minus not"] == same([at(0.012, n) - at(0.014, n) for n in (1, 8, 64)])
    assert seventh["multiply"] == same([at(0.0015) / 2 + 0.5, at(0.006), at(0.01)])
    assert np.max([line.get_ydata() for line in drawn[1].lines], axis=0) == pytest.approx(1)
    assert [line.get_markevery() for line in drawn[1].lines] == [[0], [3], [6], [9]] and "3 ep" in drawn[1].get_title()
    assert eleventh["after imitation"] == same([0.004, at(0.004), at(0.012), 0.002])
    assert eleventh["after imitation, N=1"] == same([at(0.001) / 2 + 0.5, at(0.002) / 2 + 0.5, 0, 0])


def test_fixed_weights_are_p_before_training_and_change_the_gradient_alone():
    problems, batch = solutions.FixedWeights(10), torch.tensor([4, 1])
    model = problems.new_model(passn.GPT, 1, 2, 16)
    p = Search.log_p(problems, model, range(6)).exp()
    problems.refresh(model, 0)
    for parameter in model.parameters():
        parameter.data *= 2
    problems.refresh(model, 1)
    log_p = Search.log_p(problems, model, batch)
    torch.testing.assert_close(problems.log_p(model, batch), p[batch] / p.mean() * log_p)
    with torch.no_grad():
        torch.testing.assert_close(problems.log_p(model, batch), log_p)


def test_the_average_follows_the_weights():
    problems = solutions.Averaged(10)
    model = problems.new_model(passn.GPT, 1, 2, 16)
    for value in (1, 2, 4):
        model.ln.bias.data.fill_(value)
        problems.log_p(model, torch.arange(6))
    average = problems.average.module
    assert average.ln.bias[0].item() == pytest.approx(0.99 * (0.99 * 1 + 0.01 * 2) + 0.01 * 4)
    assert torch.equal(problems.measure(model)[0], Multiply.measure(problems, average)[0])


def test_quarters_and_all_training_problems(folder, capsys):
    rows, _ = solve("11", folder, capsys), solve("7", folder, capsys)
    histories = [json.loads((folder / f"{name}-seed10.json").read_text())["history"]
                 for name in ("search-reward-N=1", "multiply-cross-entropy")]
    first = np.sort(histories[0][0]["p"][0])
    expected = [passn.pass_at_n(quarter, 64).mean().item() for quarter in first.reshape(4, 2)]
    assert rows["before training"] == pytest.approx(expected, abs=1e-3)
    assert [len(history[0]["all_train_p"]) for history in histories] == [6, 6]


def test_which_answers_win_on_math(folder, tmp_path, capsys):
    where = ["--math-dir", str(folder)]
    passn.main(["--task", "math", "--seed", "10", "--out", str(tmp_path), *where])
    capsys.readouterr()
    rows = solve("14", tmp_path, capsys, *where)
    best = passn.pass_at_n(passn.optimal_policy([31, 30, 5], 64), 64).tolist()
    assert rows["best of the blind"] == pytest.approx([np.mean(best), *best[::-1]], abs=1e-3)
    run = json.loads((tmp_path / "math-cross-entropy-seed10.json").read_text())
    assert rows["math cross-entropy, best epoch"][0] == pytest.approx(max(passn.pass_at(run, 64)[:, 0]), abs=1e-3)
    best, end = rows["math cross-entropy, best epoch"][0], rows["math limited N=64"][0]
    assert rows["minus cross-entropy's best epoch"][0] == pytest.approx(end - best, abs=2e-3)


def test_students_functions_are_used_and_their_runs_kept_apart(tmp_path, folder, capsys):
    mine = tmp_path / "my_file.py"
    mine.write_text("def hard_stop(log_p, N, k):\n    return -2 * log_p.mean()\n")
    solve("8", folder, capsys)
    rows = solve("8", folder, capsys, "--mine", str(mine))
    assert [*rows][2:] == [f"my-hard_stop-{k} N=64" for k in (1, 2, 4)]
    files = [folder / f"multiply-{who}hard_stop-4-N=64-seed10.json" for who in ("my-", "")]
    my_record, record = (json.loads(file.read_text())["history"][0] for file in files)
    assert my_record["loss"] == pytest.approx(2 * record["loss"]) and "all_train_p" not in record


@pytest.mark.parametrize("arguments, status, hint", [
    ("99", 2, "choose"), ("", 2, "exercise"), ("8 --mine no.py", 2, "no.py"), ("1 --o x", 2, "--o"),
    ("8 --mine bad.py", 2, "SyntaxError: "), ("14 --math-dir no", 2, "no MATH problems in no"),
    ("1 --seeds 0", 2, "from 1 on"), ("1", 130, "are kept")])
def test_bad_arguments_and_ctrl_c_get_one_line(arguments, status, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(solutions.SOLUTIONS, "1", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text("x = (")
    with pytest.raises(SystemExit, match=str(status)):
        solutions.main(arguments.split())
    error = capsys.readouterr().err.strip()
    assert hint in error and "\n" not in error


def test_every_exercise_has_its_answer_and_every_experiment_its_exercise():
    headings = re.findall(r"^### (\d+)\. ", README, re.M)
    assert headings == [*map(str, range(1, 15))] and {*NUMBERS} < {*headings}
    assert README.count("<details>") == README.count("</details>") == 14
    assert {*re.findall(r"solutions\.py (\d+)", README)} <= {*NUMBERS}
