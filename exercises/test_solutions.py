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

ROOT = Path(passn.__file__).parent
README = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
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
    """A folder of runs, and of MATH: the answer 0 is frequent in training, 1 less so, and 5 rare."""
    folder = tmp_path_factory.mktemp("runs")
    for split, numbers in (("train", [0] * 31 + [1] * 6 + [5] * 3), ("test", [0, 1, 5] * 7)):
        lines = [json.dumps({"problem": f"{split} {i}", "solution": f"\\boxed{{{n}}}"}) for i, n in enumerate(numbers)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def solve(number, folder, capsys, *flags):
    """The tables that a solution prints: {label: its numbers}."""
    solutions.main([number, "--out", str(folder), *flags])
    rows = [re.split(r"  +", text) for text in capsys.readouterr().out.splitlines()]
    return {label: [float(cell.split("±")[0]) for cell in cells]
            for label, *cells in rows if cells and re.match(r"[-+]?[\d.]+|nan", cells[0])}


@pytest.mark.parametrize("number", [number for number in NUMBERS if number != "14"])
def test_what_is_there_is_not_trained_again(number, folder, capsys, monkeypatch):
    rows = solve(number, folder, capsys)
    assert len(rows) > 2 and {*map(len, rows.values())} <= {1, 2, 3, 4}
    monkeypatch.delattr(passn, "train")
    assert solve(number, folder, capsys) == rows


def test_the_estimator_is_unbiased_and_c_over_n_is_low(folder, capsys, monkeypatch):
    monkeypatch.setattr(solutions, "runs", lambda *_: [{"history": [{"p": [[0.001, 0.005, 0.02, 0.3] * 50]}]}])
    values = solve("2", folder, capsys)
    for n in (64, 128, 512):
        (unbiased, scatter), (naive, _) = values[f"{n} samples, unbiased"], values[f"{n} samples, c/n for p"]
        assert abs(unbiased - values["exact"][0]) < scatter and naive < values["exact"][0] - 0.5 / n


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


def test_quarters_and_training_theorems(folder, capsys):
    rows = solve("11", folder, capsys)
    run = json.loads((folder / "search-reward-N=1-seed10.json").read_text())
    first = np.sort(run["history"][0]["p"][0])
    expected = [passn.pass_at_n(quarter, 64).mean().item() for quarter in first.reshape(4, 2)]
    assert rows["before training"] == pytest.approx(expected, abs=1e-3)
    training = np.array([run["history"][i]["all_train_p"] for i in (0, -1)])
    expected = [*passn.pass_at_n(training, 64).mean(dim=1).tolist(), *(training > 0.5).mean(axis=1)]
    assert rows["reward N=1"] == pytest.approx(expected, abs=1e-3)


def test_which_answers_win_on_math(folder, capsys):
    where = ["--math-dir", str(folder)]
    passn.main(["--task", "math", "--seed", "10", "--out", str(folder), *where])
    capsys.readouterr()
    rows = solve("14", folder, capsys, *where)
    frequent, middle, rare = passn.pass_at_n(passn.optimal_policy([31, 6, 3], 64), 64).tolist()
    mean = (frequent + middle + rare) / 3
    assert rows["best of the blind"] == pytest.approx([mean, rare, middle, frequent], abs=1e-3)
    best, end = rows["math cross-entropy, best epoch"][0], rows["math limited N=64"][0]
    assert rows["minus cross-entropy's best epoch"][0] == pytest.approx(end - best, abs=2e-3)


def test_students_functions_are_used_and_their_runs_kept_apart(tmp_path, folder, capsys):
    mine = tmp_path / "my_file.py"
    mine.write_text("def hard_stop(log_p, N, k):\n    return -2 * log_p.mean()\n")
    solve("8", folder, capsys)
    rows = solve("8", folder, capsys, "--mine", str(mine))
    assert [*rows][2:] == [f"my-hard_stop-{k} N=64" for k in (1, 2, 4)]
    files = [folder / f"multiply-{who}hard_stop-4-N=64-seed10.json" for who in ("my-", "")]
    my_loss, loss = (json.loads(file.read_text())["history"][0]["loss"] for file in files)
    assert my_loss == pytest.approx(2 * loss)


@pytest.mark.parametrize("arguments, status, hint", [
    ("99", 2, "choose"), ("", 2, "exercise"), ("8 --mine no.py", 2, "no.py"), ("1 --o x", 2, "--o"),
    ("14 --math-dir no", 2, "no MATH problems in no"), ("1", 130, "are kept")])
def test_bad_arguments_and_ctrl_c_get_one_line(arguments, status, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(solutions.SOLUTIONS, "1", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=str(status)):
        solutions.main(arguments.split())
    error = capsys.readouterr().err.strip()
    assert hint in error and "\n" not in error


def test_every_exercise_has_its_answer_and_every_experiment_its_exercise():
    headings = re.findall(r"^### (\d+)\. ", README, re.M)
    assert headings == [*map(str, range(1, 15))] and {*NUMBERS} < {*headings}
    assert README.count("<details>") == README.count("</details>") == 14
    assert {*re.findall(r"solutions\.py (\d+)", README)} <= {*NUMBERS}
