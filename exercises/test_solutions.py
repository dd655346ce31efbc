"""Every solution runs, on tiny settings, and says what its exercise says where that is cheap to check."""

import functools
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded

import matplotlib
import pytest

import solutions  # it puts the folder of passn.py on the path
import passn
import toy_tasks

matplotlib.use("agg")
ROOT = Path(passn.__file__).parent
README = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
NUMBERS = [*solutions.SOLUTIONS]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Every task with a tiny model, few problems and two epochs, all runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        small = {"epochs": 2, "evaluations": 2, "n_layer": 1, "n_head": 2, "n_embd": 16}
        for name in ("multiply", "prove", "search", "math"):
            patch.setitem(passn.SETTINGS, name, passn.SETTINGS[name] | small)
        for name in ("multiply", "prove", "search"):
            few = functools.partial(getattr(toy_tasks, name), num_train=6, num_test=20)
            patch.setitem(passn.TASKS, name, few)
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(passn, "LOSSES", dict(passn.LOSSES))  # solutions add to it
        patch.setattr(passn, "draw", lambda *_: None)  # to save time
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A folder of runs, and of MATH."""
    folder = tmp_path_factory.mktemp("runs")
    problems = [json.dumps({"problem": f"What is {n}?", "solution": f"\\boxed{{{n % 7}}}"}) for n in range(20)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(problems))
    return folder


def solve(number, folder, capsys):
    """The table that a solution prints: {label: its numbers}."""
    solutions.main([number, "--out", str(folder), "--math-dir", str(folder)])
    rows = [re.split(r"  +", text) for text in capsys.readouterr().out.splitlines()]
    return {label: [*map(float, cells)] for label, *cells in rows if label and re.fullmatch(r"-?[\d.]+|nan", cells[0])}


def refused(arguments, capsys):
    """The one line on standard error, after checking that it is one and that the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        solutions.main(arguments)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    return output.err


def make_needed_runs(number, folder, capsys):
    """Run the command that a solution asks for, with one seed, where it lacks runs."""
    message = refused([number, "--out", str(folder)], capsys)
    command = re.search(r"first run python passn.py (.*)", message)[1]
    assert passn.main(shlex.split(command.replace("--seeds 3", "--seeds 1"))) == 0
    capsys.readouterr()


# ---- run and read ----------------------------------------------------------------------------------------


def test_reading_multiply(folder, capsys):
    make_needed_runs("1", folder, capsys)
    epochs = solve("1", folder, capsys)
    assert [*epochs] == ["epoch 0", "epoch 1", "epoch 2"] and len(epochs["epoch 2"]) == 3
    choices = solve("2", folder, capsys)
    assert [*choices] == ["cross-entropy, seed 10", "limited N=64, seed 10"]
    for best, _, epoch, at_end, _ in choices.values():
        assert best >= at_end and epoch in (0, 1, 2)


def test_the_estimator(folder, capsys):
    path = folder / "estimator" / "multiply-limited-N64-seed10.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"problems": {"p": [0.001, 0.005, 0.02, 0.3] * 50}}))
    values = solve("3", path.parent, capsys)
    exact = values["exact"][0]
    for n in (64, 128, 512):
        (unbiased, scatter), (naive, _) = values[f"{n} samples, unbiased"], values[f"{n} samples, c/n for p"]
        assert abs(unbiased - exact) < scatter and naive < exact - 0.5 / n


def test_which_n(folder, capsys):
    make_needed_runs("4", folder, capsys)
    rows = solve("4", folder, capsys)
    assert [*rows] == ["cross-entropy", "limited N=8", "limited N=64", "limited N=512"]
    assert all(0 <= mean <= 1 and 0 <= behind <= 1 for mean, behind in rows.values())


def test_what_the_reward_loss_gives_up(folder, capsys):
    values = solve("5", folder, capsys)
    assert values["weights by ce"] == [0.2] * 5
    assert values["weights by limited"][0] == 0.2 and values["weights by reward"][0] == 0
    assert max(values["weights by reward"]) == values["weights by reward"][3]
    assert len(values["reward N=64"]) == 8


def test_the_guesser(folder, capsys):
    values = solve("6", folder, capsys)
    assert all(best >= other for best, other in zip(values["optimal"], values["by frequency"]))
    assert [*values.values()][-1][-1] == 7  # of 7 answers


def test_which_n_for_which_theorem(folder, capsys):
    make_needed_runs("7", folder, capsys)
    rows = solve("7", folder, capsys)
    labels = [*rows]
    assert len(labels) == 5 and "limited N=4, per_step=True" in labels and labels[-1] == "blind search"
    assert all(len(values) == 4 for values in rows.values())
    members = [rows[label] for label in labels[:3]]
    for i, value in enumerate(rows["ensemble of them all"]):
        of_members = [member[i] for member in members]
        assert not value < min(of_members) - 1e-3  # nan where there is no theorem of that length


def test_how_many_attempts(folder, capsys):
    rows = solve("8", folder, capsys)
    cosines = [cosine for cosine, _ in rows.values()]
    assert [*rows] == ["64 attempts", "256 attempts", "1024 attempts"]
    assert cosines == sorted(cosines) and cosines[-1] > 0.95 and all(of_mean > one for one, of_mean in rows.values())


# ---- change a few lines ----------------------------------------------------------------------------------


def test_no_network_at_all(folder, capsys):
    rows = solve("9", folder, capsys)
    (start, _), (ce, limited) = rows["step 0"], rows["step 500"]
    assert ce < 0.3 * start and limited > start


def test_the_scale_of_the_factors(folder, capsys):
    rows = solve("10", folder, capsys)
    half = {name: values[1] for name, values in rows.items() if len(values) == 2}
    for name, at in (("limited", 1.27), ("focal160", 1.32), ("stop1", 1), ("stop2", 2), ("stop4", 4)):
        assert half[name] == pytest.approx(at / 64, abs=1e-3)
    assert 2 / 64 < half["focal64"] < 4 / 64 < 8 / 64 < half["focal8"]
    assert {"limited N=64, pass_over=0.0", *(f"{name} N=64" for name in half)} < {*rows} and len(half) == 7


@pytest.mark.parametrize("number, labels", [
    ("11", ["limited N=64", "limited N=64, pass_over=0.0", "limited N=64, eps=1e-08",
            "limited N=64, eps=1e-08, pass_over=0.0"]),
    ("12", ["cross-entropy", "limited N=64", "cross-entropy, epochs=4", "limited N=64, epochs=4"]),
    ("13", ["cross-entropy, n_embd=32", "limited N=64, n_embd=32",
            "cross-entropy, n_embd=64", "limited N=64, n_embd=64",
            "cross-entropy, n_embd=128", "limited N=64, n_embd=128"]),
    ("14", ["cross-entropy", "limited N=8", "limited N=64", "limited N=512", "from1 N=64", "from64 N=64"])])
def test_training_is_compared(number, labels, folder, capsys):
    rows = solve(number, folder, capsys)
    assert [*rows] == labels and all(len(values) == 8 for values in rows.values())


def test_which_answers_win_on_math(folder, capsys):
    assert "first run python passn.py --task math" in refused(["15", "--out", str(folder), "--math-dir", str(folder)], capsys)
    assert passn.main(["--task", "math", "--math-dir", str(folder), "--out", str(folder), "--seeds", "2"]) == 0
    capsys.readouterr()
    rows = solve("15", folder, capsys)
    assert [*rows] == ["test problems", "math, cross-entropy", "cross-entropy's best epoch", "math, limited N=64",
                       "minus cross-entropy's best", "± standard error"] and rows["test problems"] == [20, 20]
    _, _, (best, _), (limited, _), (difference, _), _ = rows.values()
    assert difference == pytest.approx(limited - best, abs=2e-3)


def test_what_is_there_is_not_trained_again(folder, capsys, monkeypatch):
    rows = solve("11", folder, capsys)
    monkeypatch.delattr(passn, "train")
    assert solve("11", folder, capsys) == rows


# ---- refusals, and the text ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["999"], ["word"], [], ["0"], ["-1"], ["1.0"]])
def test_what_is_no_exercise_gets_one_line(arguments, capsys):
    assert "python exercises/solutions.py 3" in refused(arguments, capsys)


def test_bad_flags_and_damaged_runs_get_one_line(tmp_path, capsys):
    assert "--o" in refused(["1", "--o", "x"], capsys) and "2" in refused(["1", "2"], capsys)
    assert "no MATH problems" in refused(["6", "--math-dir", str(tmp_path)], capsys)
    for content in ("{", "{}"):
        (tmp_path / "multiply-ce-N1-seed10.json").write_text(content)
        with pytest.raises(SystemExit) as stop:
            solutions.main(["1", "--out", str(tmp_path)])
        assert stop.value.code == 2 and "remove it" in capsys.readouterr().err


def test_as_a_program_it_exits_with_2_and_names_the_command_for_missing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [solutions.__file__, "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(solutions.__file__, run_name="__main__")
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert "first run python passn.py --seed 10 --seeds 3" in said.err


def test_every_exercise_has_its_solution():
    headings = re.findall(r"^### (\d+)\. ", README, re.M)
    assert headings == NUMBERS == [str(number) for number in range(1, len(NUMBERS) + 1)]
    assert README.count("<details>") == README.count("</details>") == len(NUMBERS)


def test_every_command_of_the_readme_parses():
    commands = re.findall(r"^ *(python .+)$|`(python [^`]+)`", README, re.M)
    assert len(commands) >= 10
    for command in map("".join, commands):
        _, script, *arguments = shlex.split(command)
        assert (ROOT / script).is_file(), command
        if script == "passn.py":
            passn.parse_arguments(arguments)
        else:
            assert script != "exercises/solutions.py" or arguments[0] in NUMBERS, command
