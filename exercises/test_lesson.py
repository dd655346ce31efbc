"""The lesson: its checks against exact arithmetic, answers as students write them, and the notebook filled in."""

import json
import linecache
import math
import re
import subprocess
import sys
from fractions import Fraction
from inspect import getsource
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx

import answers
import check

HERE = Path(check.__file__).parent
P = 0.125, 0.5, 0.75
parametrize = pytest.mark.parametrize


def right(name, *args):
    return check.written(*check.CHECKS[name][:2])(*args)


def test_pass_at_n_its_derivatives_and_its_estimate_are_exact():
    for p, N in product(map(Fraction, P), (1, 2, 5, 64)):
        fail = (1 - p) ** (N - 1)
        solved = 1 - (1 - p) * fail
        for name, exact in (("pass_at_n", solved), ("reward_weight", N * p * fail),
                            ("overconfidence_factor", N * p * fail / solved)):
            assert right(name, float(p), N) == approx(float(exact))
    for c, N in product(range(8), range(1, 8)):
        sets = [min(chosen) < c for chosen in combinations(range(7), N)]  # the first c of 7 samples are right
        assert right("estimate_pass_at_n", 7, c, N) == approx(sum(sets) / len(sets))


@parametrize("name, args, of_p", [
    ("limited_loss", [8], lambda p: -math.log(1 - (1 - p) ** 8)),
    ("power_loss", [8, 0.5], lambda p: -2 * math.sqrt(1 - (1 - p) ** 8)),
    ("hard_stop", [8, 2], lambda p: -math.log(p) if p < 0.25 else 0),
    ("maxrl_loss", [3], lambda p: 1 - p + (1 - p) ** 2 / 2 + (1 - p) ** 3 / 3),
    ("grpo_loss", [], lambda p: 2 * math.acos(math.sqrt(p)) - math.pi)])
def test_losses_are_means(name, args, of_p):
    assert right(name, torch.tensor(P).log(), *args).item() == approx(sum(map(of_p, P)) / 3)


def test_gradients_of_log_p_and_of_losses_with_weights():
    x = torch.tensor([1.0, 3.0, -2.0], requires_grad=True)
    right("log_p_of", x[None], torch.tensor([1])).backward()
    assert x.grad.tolist() == approx((torch.tensor([0.0, 1.0, 0.0]) - x.softmax(0)).tolist(), abs=1e-6)
    factors = [right("overconfidence_factor", p, 8) for p in P]
    for name, weights, other in (("limited_loss", factors, 8), ("weighted_loss", factors, 8),
                                 ("fixed_weights_loss", [0.6, 0.9, 1.5], torch.tensor([2.0, 3.0, 5.0]))):
        log_p = torch.tensor(P).log().requires_grad_()
        right(name, log_p, other).backward()
        assert (-3 * log_p.grad).tolist() == approx(weights, rel=1e-5)


@parametrize("n, N, p", [(3, 2, 0.3), (4, 3, 0.6)])
def test_advantages_are_unbiased_over_all_outcomes(n, N, p):
    outcomes = torch.tensor([*product((0.0, 1.0), repeat=n)])
    chances = (outcomes * p + (1 - outcomes) * (1 - p)).prod(dim=1)
    mean = chances @ (check.weights(outcomes, N) * (outcomes - p)).sum(dim=1)
    assert mean.item() == approx(N * p * (1 - p) ** N)
    assert [*check.mean_gradient(check.weights, n, N, p).values()] == [0, approx(mean.item())]


def test_the_best_policy_makes_all_gains_equal():
    f = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert right("optimal_policy", f, 1).tolist() == approx([1, 0, 0, 0], abs=1e-4)
    for N in (2, 5, 100):
        q = right("optimal_policy", f, N)
        gains = f * (1 - q) ** (N - 1)
        assert q.sum() == approx(1) and gains[q > 0].tolist() == approx([gains.max().item()] * int((q > 0).sum()))


TYPED = r"""
pass_at_n(p, N): 1-(1-p)^N | in your line 2, return 1-(1-p)^N: TypeError: unsupported operand type(s) for ^
pass_at_n(p, N): 1-(1-torch.tensor(p))^N | write **
pass_at_n(p, N): 1 - (1 - p) ** min(N, 8) | pass_at_n(0.01, 64) is 0.07726, and should be 0.4744
pass_at_n(p, N): str(1 - (1 - p) ** N) | should be a number or a tensor
pass_at_n(p, N): None | end with return
pass_at_n(p, N): 1 - (1 - np.array(p)) ** N | gives a ndarray. For a tensor, give a tensor
pass_at_n(p): p | takes 1 positional argument
pass_at_n(p, N): 1 - math.prod([1 - p] * N) ; sum(p * (1 - p) ** k for k in range(N)) | right
pass_at_n(p, N): torch.tensor(1 - np.power(1 - np.array(p), N)) ; -torch.expm1(N * torch.log1p(-torch.as_tensor(p))) | right
estimate_pass_at_n(n, c, N): 1 - comb(n - c, N) / comb(n, N) | name 'comb' is not defined. Names need their module
estimate_pass_at_n(n, c, N): sum(min(s) < c for s in combinations(range(n), N)) / math.comb(n, N) | math.comb counts
estimate_pass_at_n(n, c, N): 1 - math.prod((n - c - j) / (n - j) for j in range(N)) | right
estimate_pass_at_n(n, c, N): 1.0 if n - c < N else 1 - np.prod(1 - N / np.arange(n - c + 1, n + 1)) | right
estimate_pass_at_n(n, c, N): 1 - Fraction(math.comb(n - c, N), math.comb(n, N)) | right
log_p_of(x, y): y.zero_() + x.log_softmax(1)[:, 0] | should be
log_p_of(x, y): F.cross_entropy(x, y) | torch.nn.functional
log_p_of(x, y): x.log_softmax(1)[range(len(y)), y].detach() | No gradient gets back
log_p_of(x, y): x.softmax(1)[range(len(y)), y].log() | right, except for log_p_of([[0, 200],
log_p_of(x, y): torch.stack([row.log_softmax(0)[i] for row, i in zip(x, y)]) ; x.log_softmax(1)[y >= 0, y] | right
log_p_of(x, y): (torch.nn.functional.one_hot(y, x.shape[1]) * x).sum(1) - x.logsumexp(1) | right
log_p_of(x, y): torch.einsum("ij,ij->i", x.log_softmax(1), torch.eye(x.shape[1])[y]) | right
log_p_of(x, y): torch.distributions.Categorical(logits=x).log_prob(y) ; x.log_softmax(1).gather(1, y[:, None])[:, 0] | right
log_p_of(x, y): x.sub_(x.logsumexp(1, True).detach())[range(len(y)), y] | the gradient of log_p_of
log_p_of(x, y): -torch.nn.NLLLoss(reduction="none")(x.log_softmax(1), y) | right
limited_loss(log_p, N): -torch.log(1 - (1 - log_p.exp()) ** N).mean() | right, except for limited_loss([-20, -1], 8)
limited_loss(log_p, N): -torch.log(1 - (1 - log_p.exp()) ** min(N, 8)).mean() | 64) is
limited_loss(log_p, N): -torch.log(1 - (1 - log_p.exp()) ** N).mean().item() | No gradient gets back
limited_loss(log_p, N): sum(-torch.log(1 - (1 - x.exp()) ** N) for x in log_p.double()) / len(log_p) | right
limited_loss(log_p, N): -torch.log(-torch.expm1(N * torch.log1p(-log_p.exp()))).mean(0, keepdim=True) | right
overconfidence_factor(p, N): torch.autograd.grad(-torch.log(1 - (1 - p) ** N).sum(), p)[0] | on paper
overconfidence_factor(p, N): torch.tensor([answers.overconfidence_factor(x, N) for x in p.tolist()]) | right
weighted_loss(x, N): -x.double() @ answers.overconfidence_factor(x.double().exp(), N).detach() / len(x) | right
reward_weight(p, N): p * sum((1 - p) ** (N - 1) for _ in range(N)) ; N * p * torch.exp((N - 1) * torch.log1p(-p)) | right
advantages(r, N): answers.advantages(r, N) - answers.advantages(r, N).mean() | other groups (rows)
advantages(r, N): (r - r.mean(1, True)) / r.std(1, keepdim=True) | division by 0
advantages(r, N): answers.advantages(r, N).sum() | Each try needs a weight
advantages(r, N): torch.where(r == 1, answers.advantages(r, N), 0) ; fair(r, N) | right
advantages(r, N): torch.tensor([answers.advantages(row[None], N)[0].tolist() for row in r]) | right
optimal_policy(p, N): 1 / (N - 1) * (N - 1) * answers.optimal_policy(p, N) | right, except for
optimal_policy(p, N): torch.tensor([float(q) for q in answers.optimal_policy(p, N)]) | right
hard_stop(x, N, k): -torch.where(x.exp() < k / N, x, 0.0).mean() ; -x[x.exp() < k / N].sum() / len(x) | right
power_loss(x, N, power): -((power * torch.log(1 - (1 - x.double().exp()) ** N)).exp() / power).mean() | right
fixed_weights_loss(x, p): -torch.dot(p / p.sum(), x) ; -sum(w * y for w, y in zip(p.tolist(), x)) / p.sum() | right
maxrl_loss(x, N): torch.stack([(1 - x.exp()) ** k / k for k in range(1, N + 1)]).sum(0).mean() | right
grpo_loss(x): 2 * torch.acos(x.exp().clamp(max=1 - 1e-6) ** 0.5).mean() - math.pi | right
"""


def fair(rewards, N):
    """Advantages less what the other tries alone give: unbiased, too."""
    others = [answers.advantages(rewards[:, torch.arange(rewards.shape[1]) != i], N).mean(dim=1)
              for i in range(rewards.shape[1])]
    return answers.advantages(rewards, N) - torch.stack(others, dim=1)


def judged(head, code):
    source = f"def {head}:\n    return {code}\n"
    linecache.cache["cell"] = len(source), None, source.splitlines(), "cell"  # as Jupyter does
    scope = vars(check) | globals()
    exec(compile(source, "cell", "exec"), scope)
    name = head.split("(")[0]
    return check.verdict(scope[name], name)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of some
@parametrize("line", TYPED.strip().splitlines())
def test_what_students_type(line):
    head, codes, words = re.fullmatch(r"(.+?\)): (.+) \| (.+)", line).groups()
    for code in codes.split(" ; "):
        assert words in judged(head, code) and (words != "right" or judged(head, code) == words), judged(head, code)


@parametrize("name", check.CHECKS)
def test_the_answer_is_right_and_each_mistake_has_its_hint(name):
    arguments, _, _, mistakes = check.CHECKS[name]
    assert check.verdict(getattr(answers, name), name) == "right"
    for code, hint in mistakes.items():
        assert judged(f"{name}({arguments})", code).endswith(hint)
