"""The lesson: its checks against exact arithmetic, what students type, the notebook filled in; and the one page."""

import json
import linecache
import math
import re
import runpy
import sys
import warnings
from fractions import Fraction
from inspect import getsource
from itertools import combinations, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from pytest import approx
from torch.testing import assert_close

import answers
import check
from check import CHECKS, verdict, written

HERE = Path(answers.__file__).parent
sys.path.insert(0, str(HERE.parent))
import passn

plt.switch_backend("agg")


def right(name, *args):
    return written(*CHECKS[name][:2])(*args)


def test_pass_at_n_its_derivatives_and_its_estimate():
    for p, N in product(map(Fraction, (0.125, 0.5, 0.75)), (1, 2, 5, 64)):
        fail = (1 - p) ** (N - 1)
        weight, solved = N * p * fail, 1 - (1 - p) * fail
        assert right("pass_at_n", float(p), N) == approx(float(solved))
        assert right("reward_weight", float(p), N) == approx(float(weight))
        assert right("overconfidence_factor", float(p), N) == approx(float(weight / solved))
    for c, N in product(range(8), range(1, 8)):
        sets = [min(chosen) < c for chosen in combinations(range(7), N)]  # the first c of 7 samples are right
        assert right("estimate_pass_at_n", 7, c, N) == approx(sum(sets) / len(sets))
    for n, N, p in CHECKS["advantages"][2]:
        others, gradient = check.mean_gradient(answers.advantages, n, N, p).values()
        assert others == 0 and gradient == approx(N * p * (1 - p) ** N)


TYPED = r"""
pass_at_n(p, N): 1-(1-p)^N | in your line 2, return 1-(1-p)^N: TypeError: unsupported operand type(s) for ^
pass_at_n(p, N): 1 - (1 - p) ** min(N, 8) ; 1.003 - (1 - p) ** N | , and should be 0.
pass_at_n(p, N): str(1 - (1 - p) ** N) | pass_at_n(0.3, 1) is '0.3
pass_at_n(p, N): None | end with return
pass_at_n(p, N): 1 - (1 - np.asarray(p)) ** N | gives a ndarray. For a tensor, give a tensor
pass_at_n(p, N): 1 - math.prod([1 - p] * N) ; sum(p * (1 - p) ** k for k in range(N)) | right
pass_at_n(p, N): torch.tensor(1 - np.power(1 - np.asarray(p), N)) ; 1 - torch.pow(1 - torch.as_tensor(p), N) | right
estimate_pass_at_n(n, c, N): 1 - comb(n - c, N) / comb(n, N) | name 'comb' is not defined. Names need their module
estimate_pass_at_n(n, c, N): sum(min(s) < c for s in combinations(range(n), N)) / math.comb(n, N) | math.comb counts
estimate_pass_at_n(n, c, N): 1 - math.prod(Fraction(n - c - j, n - j) for j in range(N)) | right
overconfidence_factor(p, N): -answers.overconfidence_factor(p, N) | The sign is wrong
log_p_of(x, y): y.zero_() + x.log_softmax(1)[:, 0] | should be
log_p_of(x, y): x.log_softmax(1)[range(len(y)), y].detach() | No gradient gets back
log_p_of(x, y): x.softmax(1)[range(len(y)), y].log() | right, except for log_p_of([[0, 200],
log_p_of(x, y): torch.stack([row.log_softmax(0)[i] for row, i in zip(x, y)]) ; x.log_softmax(1)[y >= 0, y] | right
log_p_of(x, y): torch.einsum("ij,ij->i", x.log_softmax(1), torch.eye(x.shape[1])[y]) | right
log_p_of(x, y): torch.distributions.Categorical(logits=x).log_prob(y) ; x[y >= 0, y] - x.logsumexp(1) | right
limited_loss(x, N): -torch.log(1 - (1 - x.exp()) ** N).mean() | right, except for limited_loss([-20, -1], 8)
limited_loss(x, N): sum(-torch.log(1 - (1 - y.exp()) ** N) for y in x.double()) / len(x) | right
limited_loss(x, N): -torch.log(-torch.expm1(N * torch.log1p(-x.exp()))).mean(0, keepdim=True) | right
overconfidence_factor(p, N): torch.autograd.grad(-torch.log(1 - (1 - p) ** N).sum(), p)[0] | on paper
overconfidence_factor(p, N): torch.tensor([answers.overconfidence_factor(x, N) for x in p.tolist()]) | right
weighted_loss(x, N): -x.double() @ answers.overconfidence_factor(x.double().exp(), N).detach() / len(x) | right
reward_weight(p, N): p * sum((1 - p) ** (N - 1) for _ in range(N)) ; N * p * (1 - p).pow(N - 1) | right
advantages(r, N): answers.advantages(r, N) - answers.advantages(r, N).mean() | other groups (rows)
advantages(r, N): answers.advantages(r, N).sum() | Each try needs a weight
advantages(r, N): torch.where(r == 1, answers.advantages(r, N), 0) ; answers.advantages(r, N) - 0.5 | right
optimal_policy(p, N): 1 / (N - 1) * (N - 1) * answers.optimal_policy(p, N) | right, except for
hard_stop(x, N, k): -torch.where(x.exp() < k / N, x, 0.0).mean() ; -x[x.exp() < k / N].sum() / len(x) | right
power_loss(x, N, power): -((power * torch.log(1 - (1 - x.double().exp()) ** N)).exp() / power).mean() | right
maxrl_loss(x, N): torch.stack([(1 - x.exp()) ** k / k for k in range(1, N + 1)]).sum(0).mean() | right
grpo_loss(x, N): 2 * torch.acos(x.exp().clamp(max=1 - 1e-6) ** 0.5).mean() - math.pi | right
"""
LINES = TYPED.strip().splitlines()
for name, (arguments, _, _, mistakes) in CHECKS.items():
    answer = {f"answers.{name}({arguments})": "right"}
    LINES += [f"{name}({arguments}): {code} | {words}" for code, words in (answer | mistakes).items()]


@pytest.mark.parametrize("line", LINES)
def test_what_students_type(line):
    head, name, codes, words = re.fullmatch(r"((\w+)\(.+?\)): (.+) \| (.+)", line).groups()
    for code in codes.split(" ; "):
        source = f"def {head}:\n    return {code}\n"
        linecache.cache["cell"] = len(source), None, source.splitlines(), "cell"  # as Jupyter does
        scope = vars(check) | globals()
        exec(compile(source, "cell", "exec"), scope)
        told = verdict(scope[name], name)
        assert words in told and (words != "right" or told == words), told


PASS = "def pass_at_n(p, N):\n    return 1 - (1 - p) ** N\n"
CLASS = "from __future__ import annotations\n@__import__('dataclasses').dataclass\nclass A:\n    x: int\n"


@pytest.mark.parametrize("source, status, words", [
    (CLASS + PASS, 0, "pass_at_n: right\n"),
    (f"from answers import *\n{PASS}def reward_weight(p, N): ...", 1, "pass_at_n: right\nreward_weight: rew"),
    ("x = (", 2, "SyntaxError: '(' was never closed (mine.py, line 1)"), ("exit()", 2, "SystemExit"),
    ("x = 1 / 0", 2, "x = 1 / 0: ZeroDivisionError"), ("from answers import *", 2, "none of the functions pass_at_n")])
def test_a_file_is_judged(source, status, words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(source)
    assert check.main([f"{tmp_path}/mine.py"]) == status and check.main([]) == check.main(["none.py"]) == 2
    out, err = capsys.readouterr()
    assert words in out + err and err.count("\n") == 2 + (status == 2)


def test_the_notebook_is_as_jupyter_saves_it_and_runs(tmp_path, monkeypatch, capsys):
    """With all answers filled in but one, cell by cell in this process."""
    text = (HERE / "lesson.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert text.count('"outputs": []') == len(cells) and max(map(len, "\n".join(cells).splitlines())) <= 88
    warnings.simplefilter("error")  # Jupyter shows it in a red box
    few = {"epochs": 1, "start_epochs": 1, "num_train": 100, "num_test": 20, "n_layer": 1, "n_embd": 16}
    monkeypatch.setattr(passn.TASKS["finetune"], "settings", passn.TASKS["finetune"].settings | few)
    monkeypatch.setitem(passn.LOSSES, "limited", None)  # which a cell replaces
    monkeypatch.syspath_prepend(HERE)  # as the first cell does, and as it was at the end
    monkeypatch.chdir(tmp_path)
    scope, num_figures = {}, 0
    for source in cells:
        stub = re.match(r'def (\w+)\(.*\n    """[^"]+"""\n    \.\.\.\n', source)
        is_filled = stub and stub[1] != "weighted_loss"
        exec(source.replace(stub[0], getsource(getattr(answers, stub[1]))) if is_filled else source, scope)
        num_figures += len(plt.get_fignums())
        plt.close("all")
    scope["fine_tune"]("limited", 8)
    printed, errors = capsys.readouterr()
    assert errors == "" and num_figures == 9
    assert printed.count(": right\n") == 6 and printed.count("stands in") == 1 and "read from lesson_runs" in printed


def test_the_page_does_what_passn_does(monkeypatch, capsys):
    assert "passn" not in (HERE / "one_page.py").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["one_page.py", "--epochs", "5"])
    page = runpy.run_path(str(HERE / "one_page.py"))
    test, log_p_of_next = page["test"], torch.no_grad()(page["log_p_of_next"])
    rows = torch.cat([page["train"], test]).tolist()
    texts = ["".join("0123456789*="[token] for token in row) for row in rows]
    assert all(eval(text[:5]) == int(text[6:]) for text in texts)
    assert len({tuple(sorted(text[:5].split("*"))) for text in texts}) == 3000  # none twice, not even swapped
    assert_close(log_p_of_next(test[:, :4]), log_p_of_next(test)[:, :4])  # no place looks ahead
    p, confidence, own = 1.0, 1.0, test[:, :6]
    for i in range(6, 10):
        p = p * log_p_of_next(test)[range(1000), i - 1, test[:, i]].exp()
        chance, digit = log_p_of_next(own)[:, -1].exp().max(dim=1)
        confidence, own = confidence * chance, torch.cat([own, digit[:, None]], dim=1)
    values = p.mean(), passn.pass_at_n(p, 64).mean(), confidence.mean()
    assert capsys.readouterr().out == "epoch 5 pass@1 %.3f pass@64 %.3f confidence %.3f\n" % values
    assert values[1] > 0.1 and page["loss_of"] is page["limited"]
    log_p = torch.tensor([-60.0, -10.0, -3.0, -0.1, 0.0], requires_grad=True)
    assert_close(page["pass_at_n"](log_p.exp().double(), 64), passn.pass_at_n(log_p.exp(), 64))
    for loss, N in ("cross_entropy", 1), ("limited", 8), ("limited", 64):
        ours, right = page[loss](log_p, N).float(), passn.dco_loss(log_p, N).mean()
        assert_close(ours, right)
        assert_close(*(torch.autograd.grad(one, log_p)[0] for one in (ours, right)))
