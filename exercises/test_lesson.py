"""The lesson: its checks against brute force, mistakes as students write them, the notebook empty and filled in."""

import inspect
import math
import os
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx

import answers
import check
from check import CHECKS, verdict

HERE = Path(check.__file__).parent
NOTEBOOK = HERE / "lesson.ipynb"
IN_NOTEBOOK = ["pass_at_n", "estimate_pass_at_n", "log_p_of", "limited_loss", "overconfidence_factor", "weighted_loss",
               "reward_weight"]
STUB = re.compile(r'def (\w+)\((.*)\):\n    """.+"""\n    \.\.\.\n')
parametrize = pytest.mark.parametrize

# ==== what is right: brute force ==========================================================================


def test_exact_pass_and_factor():
    for p, N in product((0.125, 0.5, 0.75), (1, 2, 5)):
        outcomes = product((p, 1 - p), repeat=N)  # p for a right try
        solved = sum(math.prod(tries) for tries, right in zip(outcomes, product((1, 0), repeat=N)) if any(right))
        assert check.exact_pass(p, N) == approx(solved)
        up, down = (-math.log(check.exact_pass(p * math.exp(h), N)) for h in (1e-5, -1e-5))
        assert check.exact_factor(p, N) == approx((down - up) / 2e-5, rel=1e-6)
        up, down = (check.exact_pass(p * math.exp(h), N) for h in (1e-5, -1e-5))
        [[weight]] = CHECKS["reward_weight"].exact(torch.tensor([p]), N)
        assert weight == approx((up - down) / 2e-5, rel=1e-6)


def test_exact_estimate():
    for n in range(1, 8):
        for c, N in product(range(n + 1), range(1, n + 1)):
            sets = [min(chosen) < c for chosen in combinations(range(n), N)]  # the first c samples are right
            assert check.exact_estimate(n, c, N) == approx([sum(sets) / len(sets)])


def test_exact_losses():
    logits, labels = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 5, 2, 2])
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    gradient, = torch.autograd.grad(log_p.sum(), logits)
    values, gradients = check.exact_log_p(logits.detach(), labels)
    assert values == approx(log_p.tolist()) and np.array(gradients) == approx(gradient.numpy())
    for N in (1, 3, 20):
        log_p = torch.tensor([-0.1, -2.0, -5.0], dtype=torch.float64, requires_grad=True)
        loss = -torch.log(1 - (1 - log_p.exp()) ** N).mean()
        gradient, = torch.autograd.grad(loss, log_p)
        value, slopes = check.exact_limited_loss(log_p.detach(), N)
        assert value == approx(loss.item()) and slopes == approx(gradient.tolist())
        value, slopes = check.exact_weighted_loss(log_p.detach(), N)
        assert value == approx(sum(g * x for g, x in zip(gradient.tolist(), log_p.tolist())))
        assert slopes == approx(gradient.tolist())


def test_exact_policy_makes_all_gains_equal():
    for p in ([0.4, 0.3, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.3]):
        for N in (2, 5, 100):
            [q] = check.exact_optimal_policy(torch.tensor(p, dtype=torch.float64), N)
            gains = [a * (1 - b) ** (N - 1) for a, b in zip(p, q)]
            kept = [gain for gain, b in zip(gains, q) if b > 0]
            assert sum(q) == approx(1) and min(q) >= 0 and kept == approx([max(gains)] * len(kept))


def test_exact_number_and_proofs():
    p = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    same = sum(a * b for (i, a), (j, b) in product(enumerate(p / p.sum()), repeat=2) if i == j)
    assert check.exact_effective_number(p) == approx([1 / same.item()])

    def proofs(state, policy, depth):  # the probability of each
        if depth:
            for probability, goals in policy[state].values():
                for parts in product(*([*proofs(goal, policy, depth - 1)] for goal in goals)):
                    yield probability * math.prod(parts)

    for depth in range(7):
        assert check.exact_proof_p("T", check.STATES, depth) == approx([sum(proofs("T", check.STATES, depth))])
        assert check.exact_proof_p("A", check.CIRCLE, depth) == approx([sum(proofs("A", check.CIRCLE, depth))])


def test_exact_losses_of_ones_own():
    log_p = torch.tensor([-0.2, -1.0, -4.0], dtype=torch.float64, requires_grad=True)
    p = log_p.exp()
    losses = {"focal_loss": ((3,), -((1 - p) ** 3 * log_p)), "maxrl_loss": ((5,), sum((1 - p) ** k / k for k in range(1, 6))),
              "grpo_loss": ((), -2 * p.sqrt().asin()), "hard_stop": ((8, 2), -log_p.clamp(max=math.log(2 / 8)))}
    for name, (arguments, values) in losses.items():
        slopes, = torch.autograd.grad(values.mean(), log_p, retain_graph=True)
        *value, gradient = CHECKS[name].exact(log_p.detach(), *arguments)
        assert gradient == approx(slopes.tolist()) and value == approx([values.mean().item()][:len(value)])
    logits = torch.randn(2, 5, dtype=torch.float64)
    assert check.entropy(logits) == approx(torch.distributions.Categorical(logits=logits).entropy())


def test_the_gradient_of_pass_at_n_and_what_a_baseline_does_to_it():
    for n, N, p in CHECKS["advantages"].inputs:
        theta = math.log(p / (1 - p))
        up, down = (1 - (1 - 1 / (1 + math.exp(-theta - h))) ** N for h in (1e-5, -1e-5))
        [exact] = CHECKS["advantages"].exact(n, N, p)
        assert exact == approx((up - down) / 2e-5, rel=1e-6)
        subtracted, words = CHECKS["advantages"].mistakes[0]
        assert "1 - 1/n + (N - 1) p / ((1 - p) n)" in words
        [biased] = check.expected_gradient("", subtracted, n, N, p)
        assert biased == approx(exact * (1 - 1 / n + (N - 1) * p / ((1 - p) * n)), rel=1e-5)


# ==== what students write =================================================================================


@parametrize("name", CHECKS)
def test_answers_are_right(name):
    assert verdict(getattr(answers, name), name) == "right"


def test_what_is_right_in_another_way():
    def with_a_fair_baseline(rewards, N):  # what the other n - 1 tries alone give
        weights, n = answers.advantages(rewards, N), rewards.shape[1]
        others = [answers.advantages(rewards[:, [j for j in range(n) if j != i]], N).mean(dim=1) for i in range(n)]
        return weights - torch.stack(others, dim=1)

    def as_lists(p, N):
        return [float(q) for q in answers.optimal_policy(p, N)]

    def as_product(n, c, N):
        return 1.0 if n - c < N else 1 - np.prod(1 - N / np.arange(n - c + 1, n + 1))

    assert verdict(with_a_fair_baseline, "advantages") == "right"
    assert verdict(as_lists, "optimal_policy") == "right"
    assert verdict(as_product, "estimate_pass_at_n") == "right"
    assert verdict(lambda p, N: -torch.expm1(N * torch.log1p(-torch.as_tensor(p))), "pass_at_n") == "right"


@parametrize("name", CHECKS)
def test_every_named_mistake_gets_its_own_words(name):
    for mistake, words in CHECKS[name].mistakes:
        assert verdict(mistake, name) == words


MISTAKES = r"""
pass_at_n(p, N): min(1, N * p) | should be 0.51
pass_at_n(p, N): N * p | expect among N
pass_at_n(p, N): 1 - p ** N | not all tries are right
pass_at_n(p, N): 1 - math.prod([p] * N) | not all tries are right
pass_at_n(p, N): math.pow(1 - p, N) | all N tries fail
pass_at_n(p, N): 1 - math.pow(1 - p, N) | right, but not everywhere: pass_at_n([0, 0.2, 1], 4) fails
pass_at_n(p, N): -math.expm1(N * math.log1p(-p)) | p may be 1
pass_at_n(p, N): 1 - (1 - p) ^ N | TypeError
estimate_pass_at_n(n, c, N): 1 - (1 - c / n) ** N | c / n for p
estimate_pass_at_n(n, c, N): pass_at_n(c / n, N) | c / n for p
estimate_pass_at_n(n, c, N): 1 - math.comb(c, N) / math.comb(n, N) | C(c, N)
estimate_pass_at_n(n, c, N): 1 - math.comb(c - n, N) / math.comb(n, N) | ValueError
estimate_pass_at_n(n, c, N): math.comb(n - c, N) / math.comb(n, N) | one minus that
estimate_pass_at_n(n, c, N): 1 - factorial(n - c) / factorial(n - c - N) * factorial(n - N) / factorial(n) | n - c < N
estimate_pass_at_n(n, c, N): 1 - math.prod((n - c - j) / (n - j) for j in range(N)) | right
estimate_pass_at_n(n, c, N): 1 - float(math.comb(n - c, N)) / float(math.comb(n, N)) | too large for a float
log_p_of(logits, labels): F.cross_entropy(logits, labels) | no mean, and no minus
log_p_of(logits, labels): F.cross_entropy(logits, labels, reduction="none") | Change the sign
log_p_of(logits, labels): F.softmax(logits, -1).gather(1, labels[:, None]).squeeze(1) | The logarithm is missing
log_p_of(logits, labels): F.softmax(logits, -1).gather(1, labels[:, None]).squeeze(1).log() | right, but
log_p_of(logits, labels): (logits.exp() / logits.exp().sum(1, True))[range(len(labels)), labels].log() | right, but
log_p_of(logits, labels): F.log_softmax(logits, dim=0).gather(1, labels[:, None]).squeeze(1) | dim=0
log_p_of(logits, labels): F.log_softmax(logits, dim=1)[:, labels] | every label from every row
log_p_of(logits, labels): F.log_softmax(logits, dim=1).gather(1, labels[:, None]) | has the shape (3, 1)
log_p_of(logits, labels): logits.gather(1, labels[:, None])[:, 0] | the labels' logits
log_p_of(logits, labels): torch.tensor(F.log_softmax(logits, dim=1)[range(len(labels)), labels].tolist()) | no gradient
limited_loss(log_p, N): -torch.log((1 - (1 - log_p.exp()) ** N).mean()) | before the logarithm
limited_loss(log_p, N): -torch.log(1 - (1 - log_p.exp()) ** N).mean() | right, but not everywhere: limited_loss([-20
limited_loss(log_p, N): -torch.log(1 - (1 - log_p.exp()) ** N + 1e-9).mean() | right, but
limited_loss(log_p, N): -torch.log(1 - (1 - log_p.double().exp()) ** N).mean() | right
limited_loss(log_p, N): torch.log(1 - (1 - log_p.exp()) ** N).mean() | the sign
limited_loss(log_p, N): -torch.log(1 - (1 - log_p.exp()) ** N).sum() | Take the mean
limited_loss(log_p, N): -torch.log(1 - (1 - log_p.exp()) ** N) | for each problem
limited_loss(log_p, N): -torch.log(log_p.exp() ** N).mean() | all N tries be right
limited_loss(log_p, N): -torch.log(1 - (1 - log_p) ** N).mean() | is nan, and should be
limited_loss(log_p, N): -(1 - (1 - log_p.exp()) ** N).mean() | The logarithm is missing
limited_loss(log_p, N): (-torch.log(1 - (1 - log_p.exp()) ** N).mean()).item() | no gradient
limited_loss(log_p, N): sum(-math.log(1 - (1 - math.exp(x)) ** N) for x in log_p) / len(log_p) | no gradient
overconfidence_factor(p, N): p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N) | the factor N
overconfidence_factor(p, N): N * p * (1 - p) ** N / (1 - (1 - p) ** N) | exponent
overconfidence_factor(p, N): N * p * (1 - p) ** (N - 1) | the denominator
overconfidence_factor(p, N): N * (1 - p) ** (N - 1) / (1 - (1 - p) ** N) | the factor p
overconfidence_factor(p, N): N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N) | right, but not everywhere
overconfidence_factor(p, N): N * p * ((N - 1) * torch.log1p(-p)).exp() / (1 - (1 - p) ** N) | N = 1, F is 1
weighted_loss(log_p, N): -(answers.overconfidence_factor(log_p.exp(), N) * log_p).mean() | detach it
weighted_loss(log_p, N): (answers.overconfidence_factor(log_p.exp(), N).detach() * log_p).mean() | the sign
weighted_loss(log_p, N): -(answers.overconfidence_factor(log_p.exp(), N).detach() * log_p).sum() | Take the mean
weighted_loss(log_p, N): -(answers.overconfidence_factor(log_p.exp(), N) * log_p.detach()).mean() | its gradient is
weighted_loss(log_p, N): -(answers.overconfidence_factor(log_p.exp(), N) * log_p).detach().mean() | no gradient
weighted_loss(log_p, N): answers.limited_loss(log_p, N) | limited_loss itself
reward_weight(p, N): N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N) | this is F
reward_weight(p, N): N * (1 - p) ** (N - 1) | the factor p
reward_weight(p, N): p * (1 - p) ** (N - 1) | the factor N
advantages(rewards, N): rewards - rewards.mean(dim=1, keepdim=True) | should be
advantages(rewards, N): (rewards - rewards.mean(1, True)) / rewards.std(1, keepdim=True) | standard deviation of 0
advantages(rewards, N): (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4) | GRPO
advantages(rewards, N): rewards / rewards.shape[1] | pass@1
advantages(rewards, N): rewards | the rewards
advantages(rewards, N): rewards * N / rewards.shape[1] * (1 - rewards.mean(1, True)) ** (N - 1) | c / n for p
advantages(rewards, N): rewards.shape[1] * answers.advantages(rewards, N) | n times too large
advantages(rewards, N): answers.advantages(rewards, N).mean() | each try needs a weight
optimal_policy(p, N): p / p.sum() | cross-entropy tends
optimal_policy(p, N): F.one_hot(p.argmax(), len(p)) | likeliest answer
optimal_policy(p, N): torch.softmax(p, 0) | should be
optimal_policy(p, N): (p ** (1 / N)) / (p ** (1 / N)).sum() | a temperature
effective_number(p): 1 / p.square().sum() | not normalized
effective_number(p): math.exp(-sum(x * math.log(x) for x in (p / p.sum()).tolist() if x)) | entropy
effective_number(p): torch.count_nonzero(p) | however rare
effective_number(p): 3.0 | But effective_number([0.1, 0.1, 0.1]) is right
proof_p(s, P, d): d and sum(q * sum(proof_p(g, P, d - 1) for g in goals) for q, goals in P[s].values()) | 0 for every
proof_p(s, P, d): d and max(q * prod(proof_p(g, P, d - 1) for g in goals) for q, goals in P[s].values()) | best tactic
proof_p(s, P, d): sum(q * prod(proof_p(g, P, d) for g in goals) for q, goals in P[s].values()) | depth does nothing
proof_p(s, P, d): proof_p(s, P, d) | RecursionError: it calls itself without end
focal_loss(log_p, gamma): -((1 - log_p.exp()) ** gamma * log_p).mean() | right
focal_loss(log_p, gamma): F.binary_cross_entropy(log_p.exp(), torch.ones_like(log_p)) | should be
focal_loss(log_p, gamma): -((1 - log_p.exp()).detach() ** gamma * log_p).mean() | goes through it, too
hard_stop(log_p, N, k): -torch.where(log_p.exp() < k / N, log_p, 0.0).mean() | right
hard_stop(log_p, N, k): -log_p[log_p.exp() < k / N].sum() / len(log_p) | right
hard_stop(log_p, N, k): -log_p[log_p.exp() < k / N].sum() / max(1, (log_p.exp() < k / N).sum()) | the last one left
hard_stop(log_p, N, k): -log_p.clamp(min=math.log(k / N)).mean() | the wrong ones pull
hard_stop(log_p, N, k): -log_p.clamp(max=k / N).mean() | compares log p
smoothed_log_p(logits, labels, share): -F.cross_entropy(logits, labels, label_smoothing=share) | mean over the batch
smoothed_log_p(logits, labels, share): F.cross_entropy(logits, labels, label_smoothing=share, reduction="none") | the sign
penalized_log_p(x, y, b): b * torch.distributions.Categorical(logits=x).entropy() - F.cross_entropy(x, y, reduction="none") | right
penalized_log_p(x, y, b): -F.cross_entropy(x, y, reduction="none") + b * (x.softmax(1) * x.log_softmax(1)).sum(1) | sign of the entropy
maxrl_loss(log_p, N): sum((1 - log_p.exp()) ** k / k for k in range(1, N)).mean() | the term k = N
maxrl_loss(log_p, N): sum(((1 - log_p.exp()) ** k).mean() for k in range(1, N + 1)) | divided by k
grpo_loss(log_p): -2 * torch.asin(log_p.exp() ** 0.5).mean() | right
grpo_loss(log_p): 2 * torch.acos(log_p.exp() ** 0.5).mean() | should be
"""


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of some
@parametrize("line", MISTAKES.strip().splitlines())
def test_mistakes_as_students_write_them(line):
    head, body = line.split(": ", 1)
    body, words = body.rsplit(" | ", 1)
    name = head.split("(")[0]
    scope = {"math": math, "factorial": math.factorial, "prod": math.prod, "torch": torch, "F": F, "answers": answers,
             "pass_at_n": answers.pass_at_n}
    exec(f"def {head}:\n    return {body}", scope)
    told = verdict(scope[name], name)
    assert told == words if words == "right" else words in told, told
    assert "\n" not in told


def test_what_is_not_written_what_fails_and_what_never_ends(monkeypatch, capsys):
    monkeypatch.setattr(check, "SECONDS", 0.3)

    def empty(p, N):
        """What it gives."""
        ...

    def dots(p, N):
        return ...

    def later(p, N):
        raise NotImplementedError

    def no_return(p, N):
        value = 1 - (1 - p) ** N  # noqa

    def endless(p, N):
        while True:
            try:
                p += 0
            except Exception:
                pass

    def leaves(p, N):
        sys.exit()

    def divides(p, N):
        return 1 / 0

    def words(p, N):
        return "0.3 or so"

    for f in (empty, dots, later):
        assert verdict(f, "pass_at_n") == "not written yet"
    before = threading.active_count()
    line = inspect.getsourcelines(divides)[1] + 1
    for f, part in ((no_return, "returns nothing"), (endless, "takes more than 0.3 seconds"), (leaves, "SystemExit"),
                    (divides, f"ZeroDivisionError: division by zero, in line {line}: return 1 / 0"),
                    (words, "should be a number"), (lambda p: p, "TypeError"), (answers.proof_p, "TypeError")):
        told = verdict(f, "pass_at_n")
        assert told.startswith("pass_at_n(0.3, 1) ") and part in told
    for _ in range(100):
        time.sleep(0.02 * (threading.active_count() > before))
    assert threading.active_count() == before  # the endless loop was ended
    assert check.check(answers.pass_at_n) is None
    check.check(answers.pass_at_n(0.1, 2))
    check.check(empty)
    assert check.use(answers.pass_at_n) is answers.pass_at_n
    empty.__name__ = "pass_at_n"
    assert check.use(empty) is answers.pass_at_n
    right, number, other, instead = capsys.readouterr().out.splitlines()
    assert right == "pass_at_n: right" and "the function itself" in number and "no check for empty" in other
    assert instead == "pass_at_n is not right yet: here the one from answers.py stands in for it"


# ==== in a terminal =======================================================================================

RIGHT = "def pass_at_n(p, N):\n    return 1 - (1 - p) ** N\n"
EMPTY = "def reward_weight(p, N):\n    ...\n"
WRONG = "def effective_number(p):\n    return 1 / (p**2).sum()\n"


@parametrize("source, status, lines", [
    (RIGHT, 0, ["pass_at_n: right", "1 of 17 functions are right; not in the file: estimate_pass_at_n, log_p_of"]),
    (EMPTY + RIGHT, 0, ["pass_at_n: right", "reward_weight: not written yet", "1 of 17"]),
    (EMPTY, 1, ["reward_weight: not written yet", "0 of 17"]),
    (RIGHT + WRONG, 1, ["pass_at_n: right", "effective_number: p is not normalized", "1 of 17"]),
    ("from answers import pass_at_n\nimport passn", 1, ["0 of 17"])])  # what is imported is not judged
def test_a_file_is_judged(source, status, lines, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert check.main([str(path)]) == status
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines) and all(map(str.startswith, printed, lines)), printed


def test_bad_files_get_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "wrong.py").write_text("x = (\n")
    (tmp_path / "fails.py").write_text("import math\n\nx = math.sqrt(-1)\n")
    for arguments, part in (([], "give one Python file"), (["a.py", "b.py"], "give one"),
                            (["lesson.ipynb"], "give one"),
                            ([str(tmp_path / "none.py")], "FileNotFoundError"),
                            ([str(tmp_path / "wrong.py")], "SyntaxError"),
                            ([str(tmp_path / "fails.py")], "in line 3: x = math.sqrt(-1)")):
        assert check.main(arguments) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and part in output.err


def test_ctrl_c_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr(check, "verdict", Mock(side_effect=KeyboardInterrupt))
    assert check.main([answers.__file__]) == 130
    assert capsys.readouterr().err == "check.py: interrupted\n"


def test_the_answers_pass_as_a_program():
    done = subprocess.run([sys.executable, HERE / "check.py", HERE / "answers.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": right\n") == len(CHECKS) == 17 and done.stderr == ""


# ==== the notebook ========================================================================================


def read():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    return notebook


def printed(notebook, folder, epochs):
    """What the notebook prints, run from the top with few epochs, and how many pictures it draws."""
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient").NotebookClient
    first = next(cell for cell in notebook.cells if "EPOCHS = " in cell.source)
    first.source, count = re.subn(r"EPOCHS = \d+", f"EPOCHS = {epochs}", first.source)
    assert count == 1
    client(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    streams = [output for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    return "".join(stream.text for stream in streams), len(pictures)


def test_the_notebook_is_committed_empty_and_its_functions_are_those_of_the_answers():
    notebook = read()
    stubs = {}
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if stub := STUB.match(cell.source):
            stubs[stub[1]] = stub[2]
            assert cell.source.endswith(f"\n\n\ncheck({stub[1]})")
    assert [*stubs] == IN_NOTEBOOK
    for name, arguments in stubs.items():
        assert f"({arguments})" == str(inspect.signature(getattr(answers, name)))


def test_the_notebook_runs_with_empty_cells():
    text, pictures = printed(read(), HERE, epochs=1)
    assert pictures == 9 and text.count(": not written yet") == text.count("stands in for it") == len(IN_NOTEBOOK)


def test_the_notebook_runs_with_the_answers():
    notebook = read()
    for cell in notebook.cells:
        if stub := STUB.match(cell.source):
            cell.source = cell.source.replace(stub[0], inspect.getsource(getattr(answers, stub[1])))
    text, pictures = printed(notebook, HERE.parent, epochs=1)  # from the other folder it may be opened in
    assert pictures == 9 and "stands in" not in text
    assert re.findall(r"(\w+): right\n", text) == IN_NOTEBOOK
    step_0, _, step_10, _, limited = map(float, re.findall(r"step +\d+: pass@64 = ([\d.]+)", text))
    assert step_0 == approx(0.474, abs=1e-3) and step_10 < 0.5 * step_0 and limited > step_0  # as the text says
