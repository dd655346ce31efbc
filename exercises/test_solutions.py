"""Every experiment runs, on tiny settings, and says what its exercise says where that is cheap to check."""

import json
import os
import re
import shlex
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
TINY = {"epochs": 2, "evaluations": 2, "batch_size": 2, "n_layer": 1, "n_head": 2, "n_embd": 16, "start_epochs": 1}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Every task with a tiny model, few problems and two epochs, all runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for task in (*passn.TASKS.values(), solutions.FixedWeights, solutions.Averaged):
            few = {"num_train": 6, "num_test": 20} if "num_train" in task.settings else {}
            patch.setattr(task, "settings", task.settings | TINY | few)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of runs, and of MATH: the answers 0 to 5, 5 the rarest in training and alone in the test."""
    folder = tmp_path_factory.mktemp("runs")
    for split, numbers in (("train", range(20)), ("test", [5] * 20)):
        problems = [json.dumps({"problem": f"What is {n}?", "solution": f"\\boxed{{{n % 6}}}"}) for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(problems))
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


def test_the_estimator_is_unbiased_and_c_over_n_is_low(tmp_path, capsys):
    record = {"epoch": 0, "confidence": 0, "p": [[0.001, 0.005, 0.02, 0.3] * 50]}
    run = {"task": "multiply", "loss": "limited", "N": 64, "seed": 10, "label": "", "config": {}, "num_samples": None,
           "baselines": {}, "tries": ["one"], "history": [record]}
    (tmp_path / "multiply-1.json").write_text(json.dumps(run))
    values = solve("2", tmp_path, capsys)
    for n in (64, 128, 512):
        (unbiased, scatter), (naive, _) = values[f"{n} samples, unbiased"], values[f"{n} samples, c/n for p"]
        assert abs(unbiased - values["exact"][0]) < scatter and naive < values["exact"][0] - 0.5 / n


def test_fixed_weights_are_p_before_training_and_change_the_gradient_alone():
    problems, batch = solutions.FixedWeights(10), torch.tensor([4, 1])
    torch.manual_seed(0)
    model = problems.new_model(passn.GPT, 1, 2, 16)
    p = Search.log_p(problems, model, range(6)).exp().tolist()
    problems.refresh(model, 0)
    for parameter in model.parameters():
        parameter.data *= 2
    problems.refresh(model, 1)
    log_p = Search.log_p(problems, model, batch)
    expected = torch.tensor([p[4], p[1]]) * 6 / sum(p) * log_p
    torch.testing.assert_close(problems.log_p(model, batch), expected, check_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(problems.log_p(model, batch), log_p)


def test_the_average_follows_the_weights():
    problems, batch = solutions.Averaged(10), torch.arange(6)
    model = problems.new_model(passn.GPT, 1, 2, 16)
    weights = []
    for _ in range(3):
        weights.append(model.head.weight.detach().clone())
        problems.log_p(model, batch)
        model.head.weight.data += 1
    expected = 0.99 * (0.99 * weights[0] + 0.01 * weights[1]) + 0.01 * weights[2]
    torch.testing.assert_close(problems.average.module.head.weight, expected)
    assert torch.equal(problems.measure(model)[0], Multiply.measure(problems, problems.average.module)[0])


def test_quarters_and_training_theorems(folder, capsys):
    rows = solve("11", folder, capsys)
    run = json.loads((folder / "search-reward-N=1-seed10.json").read_text())
    first = np.sort(run["history"][0]["p"][0])
    expected = [passn.pass_at_n(quarter, 64).mean().item() for quarter in first.reshape(4, 5)]
    assert rows["before training"] == pytest.approx(expected, abs=1e-3)
    training = np.array([run["history"][i]["all_train_p"] for i in (0, -1)])
    expected = [*passn.pass_at_n(training, 64).mean(dim=1).tolist(), *(training > 0.5).mean(axis=1)]
    assert rows["reward N=1"] == pytest.approx(expected, abs=1e-3)


def test_which_answers_win_on_math(folder, capsys):
    where = ["--math-dir", str(folder)]
    passn.main(["--task", "math", "--seed", "10", "--out", str(folder), *where])
    capsys.readouterr()
    rows = solve("14", folder, capsys, *where)
    policy = passn.optimal_policy([4, 4, 3, 3, 3, 3], 64)
    assert rows["best of the blind"][0] == pytest.approx(1 - (1 - policy[-1]) ** 64, abs=1e-3)
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


@pytest.mark.parametrize("arguments, hint", [("99", "choose"), ("", "exercise"), ("8 --mine no.py", "no.py"),
                                             ("1 --o x", "--o"), ("14 --math-dir no", "no MATH problems in no")])
def test_bad_arguments_get_one_line(arguments, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        solutions.main(arguments.split())
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1


def test_ctrl_c_gets_one_line(monkeypatch, capsys):
    monkeypatch.setitem(solutions.SOLUTIONS, "1", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        solutions.main(["1"])
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_every_exercise_is_there_and_every_command_parses():
    headings = re.findall(r"^### (\d+)\. ", README, re.M)
    assert headings == [*map(str, range(1, 15))] and {*NUMBERS} < {*headings}
    assert README.count("<details>") == README.count("</details>") == 14
    commands = re.findall(r"^ *(python .+)$|`(python [^`]+)`", README, re.M)
    for command in map("".join, commands):
        _, script, *arguments = shlex.split(command)
        assert (ROOT / script).is_file(), command
        if script == "passn.py":
            passn.parse_arguments(arguments)
        if script.endswith("solutions.py"):
            assert arguments[0] in NUMBERS
    assert len(commands) >= 7
