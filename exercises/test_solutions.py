"""Every solution runs, on tiny settings, and says what its exercise says where that is cheap to check."""

import functools
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded

import pytest
import torch

import solutions  # it puts the folder of passn.py on the path
import passn

ROOT = Path(passn.__file__).parent
README = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
NUMBERS = [*solutions.SOLUTIONS]
BOTH = ["cross-entropy", "limited N=64"]
RUN = {"task": "multiply", "loss": "limited", "N": 64, "seed": 10, "label": "limited N=64",
       "config": {}, "num_samples": None, "baselines": {}, "tries": ["one"]}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Every task with a tiny model, few problems and two epochs, all runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        small = {"epochs": 2, "evaluations": 2, "batch_size": 2, "n_layer": 1, "n_head": 2, "n_embd": 16}
        few = small | {"num_train": 6, "num_test": 20}
        for task in (*passn.TASKS.values(), solutions.Smoothed, solutions.SampledSearch):
            patch.setattr(task, "settings", task.settings | (few if "num_train" in task.settings else small))
        patch.setattr(passn, "TASKS", dict(passn.TASKS))  # solutions add to them
        patch.setattr(passn, "LOSSES", dict(passn.LOSSES))
        patch.setattr(passn, "draw", lambda *_: None)  # to save time
        patch.setattr(passn, "save_figure", lambda *_: None)
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


def refused(number, out, capsys, *flags):
    """The one line on standard error, after checking that it is one and that the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        solutions.main([*number.split(), "--out", str(out), *flags])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    return output.err


def make_needed_runs(number, folder, capsys, seeds=1):
    """Run the command that a solution asks for where it lacks runs. Returns the command, without the folder."""
    command = re.search(r"first run (.*)", refused(number, folder, capsys, "--math-dir", str(folder)))[1]
    arguments = shlex.split(command.replace("DIR", str(folder)).replace("--seeds 3", f"--seeds {seeds}"))[2:]
    assert passn.main(arguments) == 0
    capsys.readouterr()
    return command.split(" --out ")[0]


def test_when_to_stop(folder, capsys):
    make_needed_runs("1", folder, capsys)
    rows = solve("1", folder, capsys)
    assert len(rows.pop("epoch 2")) == 3 and rows.pop("epoch 0") and rows.pop("epoch 1")
    assert [*rows] == [f"{label}, seed 10" for label in BOTH]
    assert all(best >= at_end and epoch in (0, 1, 2) for best, _, epoch, at_end, _ in rows.values())


def test_the_estimator(tmp_path, capsys):
    record = {"epoch": 0, "confidence": 0, "p": [[0.001, 0.005, 0.02, 0.3] * 50]}
    (tmp_path / "multiply-limited-N=64-seed10.json").write_text(json.dumps(RUN | {"history": [record]}))
    values = solve("2", tmp_path, capsys)
    for n in (64, 128, 512):
        (unbiased, scatter), (naive, _) = values[f"{n} samples, unbiased"], values[f"{n} samples, c/n for p"]
        assert abs(unbiased - values["exact"][0]) < scatter and naive < values["exact"][0] - 0.5 / n


@pytest.mark.parametrize("number, labels", [
    ("3", [f"{label}{more}" for more in ("", ", epochs=4", ", n_embd=32", ", n_embd=128") for label in BOTH]
     + [f"limited N=64{more}" for more in (", pass_over=0.0", ", eps=1e-08", ", eps=1e-08, pass_over=0.0")]),
    ("11", ["cross-entropy"]
     + [f"cross-entropy, {more}" for more in ("weight_decay=0.3", "weight_decay=1.0", "weight_decay=3.0", "n_embd=32",
                                              "smoothing=0.01", "smoothing=0.03", "smoothing=0.1",
                                              "penalty=0.1", "penalty=0.3", "penalty=1.0")]
     + ["limited N=64", "limited N=64, n_embd=32"]),
    ("12", ["cross-entropy", "limited N=8", "limited N=64", "limited N=512", "from1 N=64", "from64 N=64"]),
    ("13", ["cross-entropy", "limited N=64", "reward N=1", "reward N=64", "maxrl N=8", "maxrl N=64", "grpo N=1"])])
def test_training_is_compared(number, labels, folder, capsys, monkeypatch):
    rows = solve(number, folder, capsys)
    assert [*rows] == labels and all(len(values) == 9 for values in rows.values())
    monkeypatch.delattr(passn, "train")  # what is there is not trained again
    assert solve(number, folder, capsys) == rows


def test_the_four_corners(tmp_path, capsys):
    assert f"{make_needed_runs('4', tmp_path, capsys)}\n" in README
    values = solve("4", tmp_path, capsys)
    log_p = torch.tensor(values["log p"])
    p, factor = log_p.exp(), passn.overconfidence_factor(log_p, 64)
    for name, weights in (("ce, N = 1", p**0), ("limited, N = 64", factor), ("reward, N = 1", p),
                          ("reward, N = 64", passn.pass_at_n(p, 64) * factor)):
        assert values[f"weights by {name}"] == pytest.approx(weights.tolist(), abs=1e-3)
    assert len(values["reward N=64"]) == 9
    assert len({*(untrained for label, (untrained, *_) in values.items() if label.startswith("with pass@64"))}) == 1


def test_the_frontier(folder, capsys, monkeypatch):
    drawn = {}
    for _ in "123":  # it names three commands, each where its runs are missing
        assert f"{make_needed_runs('5', folder, capsys)}\n" in README
    monkeypatch.setattr(passn, "draw", lambda rows, N: rows)
    monkeypatch.setattr(passn, "save_figure", lambda rows, path: drawn.update({path.name: rows}))
    solutions.main(["5", "--out", str(folder)])
    text = capsys.readouterr().out
    assert [*drawn] == ["frontier-1.png", "frontier-2.png", "frontier-3.png"] and text.count("minus the others") == 12
    assert [[row[0]["N"] for row in rows] for rows in drawn.values()] == [passn.COLUMNS] * 3
    at_512 = [passn.pass_at(run, 512)[-1, 0] for row in drawn["frontier-3.png"] for run in row]
    assert "N = 8 minus the others at n = 8: " in text
    assert text.splitlines()[-1].endswith(f"{at_512[3] - at_512[2]:.3f} ± 0.000")


def test_how_many_different_proofs(folder, capsys):
    rows = solve("6", folder, capsys)
    assert len(rows) == 9 and rows["search, untrained"][1] > 1
    assert all(different <= right for *_, right, different in rows.values())


def test_the_effective_number_is_that_of_all_proofs_one_by_one():
    torch.manual_seed(3)
    problems = solutions.toy_tasks.Search(10, num_train=1, num_test=6)
    model = problems.new_model(passn.GPT, 2, 4, 16)
    table, policy = problems.test, solutions.toy_tasks.log_policy(model, problems.test).exp()

    @functools.cache
    def proofs(row, depth):  # the probability of each
        if row < 0 or depth == 0:
            return [1.0] if row == solutions.toy_tasks.PROVED else []
        pairs = enumerate(table.subgoals[row].tolist())
        return [policy[row, tactic].item() * one * other for tactic, (first, second) in pairs
                for one in proofs(first, depth - 1) for other in proofs(second, depth - 1)]

    tries, effective = solutions.right_tries(problems, model)
    for row, number in zip(table.theorems.tolist(), effective.tolist(), strict=True):
        p = proofs(row, solutions.toy_tasks.MAX_DEPTH)
        assert number == pytest.approx(sum(p) ** 2 / sum(one**2 for one in p))
    expected = 64 * solutions.toy_tasks.proof_p(policy, table).sum().item()
    assert sum(map(len, tries)) == pytest.approx(expected, abs=4 * expected**0.5)


@pytest.mark.parametrize("share, beta", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.5)])
def test_smoothing_and_the_penalty_change_the_gradient_alone(share, beta):
    problems, batch = solutions.Smoothed(0, smoothing=share, penalty=beta), torch.arange(5)
    model = problems.new_model(passn.GPT, 2, 4, 16)
    (prompts, answers), log_p = (part[:5] for part in problems.train), problems.log_p(model, batch)
    texts = torch.cat([prompts, answers[:, :-1]], dim=1)
    logits = model(texts)[:, -answers.shape[1]:]
    loss = torch.nn.functional.cross_entropy(logits.mT, answers, label_smoothing=share, reduction="sum")
    loss = loss - beta * torch.distributions.Categorical(logits=logits).entropy().sum()
    gradients = [torch.autograd.grad(value, [*model.parameters()]) for value in (-log_p.sum(), loss)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(log_p, model.log_p(prompts, answers))


def test_the_guesser(folder, capsys):
    values = solve("7", folder, capsys)
    assert all(best >= other for best, other in zip(values["optimal"], values["by frequency"]))
    assert [*values.values()][-1][-1] == 7  # of 7 answers


def test_which_n_for_which_theorem(folder, capsys):
    for _ in "12":
        assert f"{make_needed_runs('8', folder, capsys)}\n" in README
    rows = solve("8", folder, capsys)
    assert [*rows] == [*BOTH, "limited N=4, per_step=True", "ensemble of them all", "blind search"]
    solved = [solutions.toy_tasks.solve(theorem) for theorem in solutions.toy_tasks.draw_theorems(10, 6, 20)[1]]
    short = [1 - (1 - blind) ** 64 for proof, blind in solved if len(proof) < 7]
    assert rows["blind search"][0] == pytest.approx(sum(short) / len(short), abs=1e-3)
    *members, ensemble, _ = rows.values()
    for value, *of_members in zip(ensemble, *members, strict=True):
        assert not value < min(of_members) - 1e-3  # nan where there is no theorem of that length


def test_how_many_attempts(folder, capsys):
    rows = solve("9", folder, capsys)
    runs = ["reward N=1", "sampled N=1", "reward N=64", "sampled N=64"]
    assert [*rows] == ["64 attempts", "256 attempts", "1024 attempts", *runs]
    cosines = [rows[f"{number} attempts"] for number in (64, 256, 1024)]
    assert cosines == sorted(cosines) and cosines[-1][0] > 0.95 and all(of_mean > one for one, of_mean in cosines)
    run = json.loads((folder / "sampled-search-sampled-N=64-seed10.json").read_text())
    exact = json.loads((folder / "search-reward-N=64-seed10.json").read_text())
    assert run["history"][0]["p"] == exact["history"][0]["p"]  # exact, as measured
    assert run["history"][-1]["p"] != run["history"][0]["p"] and run["baselines"] == exact["baselines"]


def test_sampled_attempts_succeed_with_probability_p():
    problems, theorems = solutions.SampledSearch(10, num_tries=4000), torch.arange(6)
    torch.manual_seed(0)
    model = problems.new_model(passn.GPT, 2, 4, 16)
    with torch.no_grad():
        log_p, (is_right, log_pi) = problems.log_p(model, theorems), problems.sample_tries(model, theorems)
    assert is_right.double().mean(dim=1).tolist() == pytest.approx(log_p.exp().tolist(), abs=0.015)
    distinct = [log_pi[i, is_right[i]].unique().exp().sum().item() for i in theorems]  # each proof once
    assert distinct == pytest.approx(log_p.exp().tolist(), abs=0.015)


def test_the_scale_of_the_factors(folder, capsys):
    rows = solve("10", folder, capsys)
    half = {name: values[1] for name, values in rows.items() if len(values) == 2}
    for name, u in {"limited": 1.27, "focal160": 1.32, "stop1": 1, "stop2": 2, "stop4": 4}.items():
        assert half[name] == pytest.approx(u / 64, abs=1e-3)
    assert 2 / 64 < half["focal64"] < 4 / 64 < 8 / 64 < half["focal8"]
    assert {"limited N=64, pass_over=0.0", *(f"{name} N=64" for name in half)} < {*rows} and len(half) == 7


def test_which_answers_win_on_math(folder, capsys):
    assert f"{make_needed_runs('14', folder, capsys, seeds=2)}\n" in README
    real = json.loads((folder / "math-cross-entropy-seed10.json").read_text()) | {"baselines": {}}

    def save(name, label, *epochs, size=20, **changes):
        history = [real["history"][0] | {"p": [[p] * size, [0.5] * size]} for p in epochs]
        (folder / f"math-{name}.json").write_text(json.dumps(real | {"label": label, "history": history} | changes))

    save("cross-entropy-seed10", "cross-entropy", 0.05, 0.01)
    save("cross-entropy-seed11", "cross-entropy", 0.01, 0.03, 0.01, seed=11)
    save("cross-entropy-a", "cross-entropy, a", 0, config={"a": 1})  # comes first, by its settings
    save("z", "z", 0.02, loss="z")  # its difference comes last
    save("lm-z", "lm z", 0, task="math-lm", loss="z")
    rows = solve("14", folder, capsys)
    assert [*rows] == ["test problems", "math, cross-entropy, a", "math, cross-entropy", "cross-entropy's best epoch",
                       "math, limited N=64", "minus cross-entropy's best", "± standard error",
                       "math, z", "math-lm, lm z"]
    assert rows["test problems"] == [20, 20]
    assert rows["math, cross-entropy"] == pytest.approx([1 - 0.99**64] * 2, abs=1e-3)
    assert rows["minus cross-entropy's best"] == pytest.approx([(0.95**64 + 0.97**64) / 2 - 0.98**64] * 2, abs=1e-3)
    save("lm-other", "other", 0, size=19, task="math-lm")
    assert "other on math-lm with other problems" in refused("14", folder, capsys, "--math-dir", str(folder))


def test_bad_arguments_and_damaged_runs_are_named(tmp_path, capsys):
    for exercise in ("999", "word", "", "0", "-1", "1.0"):
        assert "python exercises/solutions.py 3" in refused(exercise, tmp_path, capsys)
    assert "--o" in refused("1", tmp_path, capsys, "--o", "x") and "2" in refused("1 2", tmp_path, capsys)
    assert "no MATH problems" in refused("7", tmp_path, capsys, "--math-dir", str(tmp_path))
    name = "multiply-limited-N=64-seed10.json"
    for content in ("{", "{}", "[]", "null", json.dumps(RUN | {"history": []})):
        (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit):
            solutions.main(["2", "--out", str(tmp_path)])
        left_out, missing = capsys.readouterr().err.splitlines()
        assert name in left_out and "first run python passn.py --loss limited --seed 10" in missing


def test_ctrl_c_gets_one_line(monkeypatch, capsys):
    monkeypatch.setitem(solutions.SOLUTIONS, "1", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        solutions.main(["1"])
    assert stop.value.code == 130 and capsys.readouterr().err.strip().count("\n") == 0


def test_as_a_program_it_exits_with_2_and_names_the_command_for_missing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [solutions.__file__, "1", "--out", str(tmp_path)])
    monkeypatch.setattr(solutions, "main", lambda _: runpy.run_path(solutions.__file__, run_name="__main__"))
    assert "first run python passn.py --seed 10 --seeds 3" in refused("1", tmp_path, capsys)


def test_every_exercise_has_its_solution_and_every_command_parses():
    headings = re.findall(r"^### (\d+)\. ", README, re.M)
    assert headings == NUMBERS == [str(number) for number in range(1, len(NUMBERS) + 1)]
    assert README.count("<details>") == README.count("</details>") == len(NUMBERS)
    commands = re.findall(r"^ *(python .+)$|`(python [^`]+)`", README, re.M)
    assert len(commands) >= 10
    for command in map("".join, commands):
        _, script, *arguments = shlex.split(command)
        assert (ROOT / script).is_file() and (script != "exercises/solutions.py" or arguments[0] in NUMBERS), command
        if script == "passn.py":
            passn.parse_arguments(arguments)
