"""Is what you wrote right? A check for each function that lesson.ipynb and the exercises ask for.

In a notebook, check(pass_at_n) prints one line. In a terminal,

    python exercises/check.py my_file.py

prints one for each of these functions in the file. The exit status is 0 only if all that is written there is right.
What is right is computed in another way than you are asked to: by exact fractions, closed forms and enumeration.
"""

import copy
import ctypes
import importlib.util
import math
import sys
import threading
import traceback
from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

SECONDS = 5  # that a call may take
CHECKS = {}  # filled below: {the function's name: its Check}

# ==== 1. How a function is judged =========================================================================


class Check(NamedTuple):
    says: str  # how a call is shown to the student
    exact: object  # from the arguments to the right results: a value and, where it is checked, the gradient
    inputs: list  # arguments that any right function can do
    mistakes: list  # pairs: a wrong function, and what to tell whoever gets its results
    hard: list = []  # pairs: arguments that a careless function cannot do, and a hint
    observe: object = None  # calls the function and gives its results in the form of `exact`


class Wrong(Exception):
    """What to tell the student."""


def check(f):
    """Print whether f is right, or what is wrong with it."""
    name = getattr(f, "__name__", "")
    if not callable(f):
        print(f"check takes the function itself, as in check(pass_at_n), and got {f!r:.60}")
    elif name not in CHECKS:
        print(f"there is no check for {name}. Write def, and one of these names: {', '.join(CHECKS)}")
    else:
        print(f"{name}: {verdict(f, name)}")


def use(f):
    """f, if it is right; otherwise the function of that name in answers.py, saying so."""
    if f.__name__ not in CHECKS or verdict(f, f.__name__) == "right":
        return f
    print(f"{f.__name__} is not right yet: here the one from answers.py stands in for it")
    return getattr(importlib.import_module("answers"), f.__name__)


def verdict(f, name):
    """"right", "right, but …", "not written yet", or what is wrong."""
    own = CHECKS[name]
    try:
        seen = [look(own, f, args) for args in own.inputs]
    except Wrong as wrong:
        return str(wrong)
    exact = [own.exact(*args) for args in own.inputs]
    if not all(map(alike, seen, exact)):
        for mistake, words in own.mistakes:
            if all(alike(look(own, mistake, args), results) for args, results in zip(own.inputs, seen)):
                return words
        return first_difference(own, seen, exact)
    for args, hint in own.hard:
        try:
            results, expected = look(own, f, args), own.exact(*args)
            problem = "" if alike(results, expected) else difference(own, args, results, expected)
        except Wrong as wrong:
            problem = str(wrong)
        if problem:
            return f"right, but not everywhere: {problem}. {hint}"
    return "right"


def look(own, f, args):
    return (own.observe or result_of)(said(own, args), f, *args)


def said(own, args):
    return own.says.format(*map(text, args))


def text(value):
    """A number, a tensor or whatever it is, as short as the student can read it."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = np.asarray(value, dtype=np.float64)
        return f"{value:.4g}" if value.ndim == 0 else "[" + ", ".join(map(text, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def alike(results, others):
    """Whether two lists of arrays agree. Numbers that are not finite agree with nothing."""
    def close(a, b):
        return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-3, atol=1e-6)

    return all(np.isfinite(a).all() for a in results) and all(map(close, results, others))


def first_difference(own, seen, exact):
    """Which call is wrong, and which is right, if any."""
    cases = [*zip(own.inputs, seen, exact)]
    wrong = next(case for case in cases if not alike(*case[1:]))
    good = [said(own, args) for args, *both in cases if alike(*both)]
    return difference(own, *wrong) + (f". But {good[0]} is right" if good else "")


def difference(own, args, results, exact):
    call = said(own, args)
    if np.shape(results[0]) != np.shape(exact[0]):
        return f"{call} has the shape {np.shape(results[0])}, and should have {np.shape(exact[0])}"
    if not alike(results[:1], exact[:1]):
        return f"{call} is {text(results[0])}, and should be {text(np.asarray(exact[0]))}"
    return f"the value of {call} is right, but its gradient is {text(results[1])}, and should be {text(exact[1])}"


# ==== 2. How a function is called =========================================================================


def attempt(call, f, *args, where=None, seconds=None):
    """f(*args), in a thread of its own, so that a loop without end can be left. Raises Wrong for whatever goes
    wrong, with its line in the file `where`, usually that of f."""
    seconds = seconds or SECONDS
    outcome = []

    def run():
        try:
            outcome.append((f(*args), None))
        except BaseException as error:  # even exit()
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        raise Wrong(f"{call} takes more than {seconds} seconds: does a loop never end?")
    value, error = outcome[0]
    is_empty = error is None and value is None and len(code_of(f, "co_code")) <= len(empty.__code__.co_code)
    if is_empty or value is ... or isinstance(error, NotImplementedError):
        raise Wrong("not written yet")
    if error is not None:
        raise Wrong(f"{call} fails: {explain(error, where or code_of(f, 'co_filename'))}")
    if value is None:
        raise Wrong(f"{call} returns nothing: is the line with return missing?")
    return value


def empty():
    """As an empty cell has it."""
    ...


def code_of(f, part):
    return getattr(getattr(f, "__code__", None), part, "")


def explain(error, where):
    """The error, and where in the student's code it came up, in one line."""
    what = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
    if isinstance(error, RecursionError):
        what = "RecursionError: it calls itself without end"
    places = [place for place in traceback.extract_tb(error.__traceback__) if place.filename == where]
    return f"{what}, in line {places[-1].lineno}: {places[-1].line}" if places else what


def as_array(call, value):
    try:
        value = value.detach().cpu() if isinstance(value, torch.Tensor) else value
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{call} is {value!r:.60}, and should be a number or a tensor") from None
    return array.reshape(()) if array.size == 1 and array.ndim == 1 else array


def result_of(call, f, *args):
    return [as_array(call, attempt(call, f, *copy.deepcopy(args)))]


def with_gradient(call, f, x, *args):
    """The result, and the gradient of its sum with respect to x: 0 where none arrives."""
    x = x.clone().requires_grad_()
    value, gradient = attempt(call, f, x, *args), None
    if isinstance(value, torch.Tensor) and value.requires_grad:
        gradient, = attempt(f"the gradient of {call}", partial(torch.autograd.grad, allow_unused=True), value.sum(), x)
    return [as_array(call, value), as_array(call, torch.zeros_like(x) if gradient is None else gradient)]


def expected_gradient(call, f, n, N, p):
    """The mean of Σ_i w_i d/dθ log π(try i) over all outcomes of n tries, each right with probability
    p = sigmoid(θ): then d/dθ log π is 1 - p for a right try and -p for a wrong one. Unbiased, it is d/dθ pass@N,
    which is N p (1 - p)^N."""
    rewards = torch.tensor([*product((0.0, 1.0), repeat=n)])
    weights = as_array(call, attempt(call, f, rewards.clone(), N))
    if weights.shape != rewards.shape:
        raise Wrong(f"rewards of the shape {(*rewards.shape,)} give {weights.shape}: each try needs a weight")
    if not np.isfinite(weights).all():
        raise Wrong("some weights are not finite: is there a standard deviation of 0, where all tries are alike?")
    right = rewards.numpy() == 1
    probability = np.where(right, p, 1 - p).prod(axis=1)
    return [as_array(call, probability @ (weights * np.where(right, 1 - p, -p)).sum(axis=1))]


# ==== 3. The lesson's functions ===========================================================================


def of_each(function, p, N):
    """function(p, N) of every p, in p's shape."""
    return np.reshape([function(each, N) for each in np.ravel(p).tolist()], np.shape(p))


def normalized(p):
    return p / p.sum()


def exact_pass(p, N):
    return float(1 - (1 - Fraction(p)) ** N)


def exact_factor(p, N):
    p = Fraction(p)
    return float(N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N))


CHECKS["pass_at_n"] = Check(
    "pass_at_n({}, {})", lambda p, N: [of_each(exact_pass, p, N)],
    inputs=[(0.3, 1), (0.3, 2), (0.05, 8), (0.5, 3)],
    mistakes=[
        (lambda p, N: N * p,
         "this is N * p, the right tries to expect among N. It may "
         "be more than 1. How probable is it that all N fail?"),
        (lambda p, N: 1 - p**N,
         "this is 1 - p^N, the probability that not all tries are right. One try fails with probability 1 - p"),
        (lambda p, N: p**N, "this is p^N, the probability that all N tries are right. One right try is enough"),
        (lambda p, N: (1 - p) ** N, "this is the probability that all N tries fail. pass@N is one minus that"),
        (lambda p, N: N * p * (1 - p) ** (N - 1),
         "this is the probability that exactly one try is right. At least one is asked for"),
        (lambda p, N: 1 - N * (1 - p),
         "this is 1 - N (1 - p). All N tries fail with the product of their probabilities to fail, not the sum"),
        (lambda p, N: p, "this is p, whatever N is")],
    hard=[((1.0, 8), "p may be 1"),
          ((0.0, 8), "p may be 0"),
          ((torch.tensor([0.0, 0.2, 1.0]), 4), "p may be a tensor; plain operators take both")])


def exact_estimate(n, c, N):
    """1 - (n - c) … (n - c - N + 1) / (n … (n - N + 1)): not all of N draws without replacement fail."""
    all_fail = Fraction(1)
    for j in range(N):
        all_fail *= Fraction(max(n - c - j, 0), n - j)
    return [float(1 - all_fail)]


CHECKS["estimate_pass_at_n"] = Check(
    "estimate_pass_at_n({}, {}, {})", exact_estimate,
    inputs=[(5, 2, 1), (5, 2, 2), (6, 1, 3), (10, 3, 4)],
    mistakes=[
        (lambda n, c, N: 1 - (1 - c / n) ** N,
         "this puts c / n for p, as if N tries were drawn with replacement. It "
         "is too low on average: count the sets of N different samples"),
        (lambda n, c, N: 1 - math.comb(c, N) / math.comb(n, N),
         "this has C(c, N), the sets in which all are right. The "
         "sets that fail are chosen from the n - c wrong samples"),
        (lambda n, c, N: math.comb(n - c, N) / math.comb(n, N),
         "this is the share of sets in which all N fail. The estimate is one minus that"),
        (lambda n, c, N: math.comb(c, N) / math.comb(n, N),
         "this is the share of sets in which all N are right. One right sample is enough"),
        (lambda n, c, N: c * math.comb(n - c, N - 1) / math.comb(n, N),
         "this is the share of sets with exactly one right sample. At least one is asked for"),
        (lambda n, c, N: N * c / n, "this is N c / n, the right samples to expect among N. It may be more than 1"),
        (lambda n, c, N: c / n, "this is c / n, whatever N is: an estimate of pass@1")],
    hard=[((4, 2, 3), "Where n - c < N, every set of N has a right sample, and the estimate is 1"),
          ((4, 0, 2), "Without a right sample it is 0"),
          ((2000, 3, 700), "C(2000, 700) is too large for a float. math.comb gives whole numbers of any size, and the "
                           "quotient of two of them is right; or multiply the factors 1 - N / (n - j) for j < c")])


def exact_log_p(logits, labels):
    """log p = x_label - log Σ exp x, the largest x taken out of the sum. Its gradient is 1 at the label, minus p."""
    values, gradients = [], []
    for row, label in zip(logits.double().tolist(), labels.tolist()):
        log_sum = max(row) + math.log(sum(math.exp(x - max(row)) for x in row))
        values.append(row[label] - log_sum)
        gradients.append([(i == label) - math.exp(x - log_sum) for i, x in enumerate(row)])
    return [values, gradients]


def at(values, labels):
    return values[range(len(labels)), labels]


TALL = torch.tensor([[0.0, 1.0], [2.0, -1.0], [1.0, 1.5]])
WIDE = torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]])
LARGE = torch.tensor([[200.0, 0.0], [0.0, 1.0]])
CUT = ("the value is right, but no gradient gets back, so nothing can be trained with it. "
       "detach(), item(), tolist(), numpy, torch.tensor(…) and the functions of math cut it off")

CHECKS["log_p_of"] = Check(
    "log_p_of({}, {})", exact_log_p,
    inputs=[(TALL, torch.tensor([1, 0, 0])), (WIDE, torch.tensor([0, 1]))],
    mistakes=[
        (lambda x, labels: at(x.softmax(1), labels), "this is p. The logarithm is missing"),
        (lambda x, labels: -at(x.log_softmax(1), labels), "this is -log p, which is cross-entropy. Change the sign"),
        (lambda x, labels: at(x.log_softmax(0), labels),
         "this is a softmax over the batch, dim=0. The answers to one problem stand in a row: dim=1"),
        (lambda x, labels: at(x, labels),
         "these are the labels' logits. For log-probabilities subtract the log of the sum of each row's exponentials"),
        (lambda x, labels: at(x.log_softmax(1), labels).mean(),
         "this is the mean over the batch. Give log p of each problem"),
        (lambda x, labels: -at(x.log_softmax(1), labels).mean(),
         "this is the mean of -log p, as F.cross_entropy gives it. Give log p of each problem: no mean, and no minus"),
        (lambda x, labels: x.log_softmax(1),
         "these are log-probabilities of all answers. Take the label's from each row"),
        (lambda x, labels: x.log_softmax(1)[:, labels],
         "[:, labels] takes every label from every row. Use gather, or [range(len(labels)), labels]"),
        (lambda x, labels: x.log_softmax(1).max(dim=1).values,
         "this is log p of the model's likeliest answer, not of the label"),
        (lambda x, labels: at(x.log_softmax(1), labels).detach(), CUT)],
    hard=[((LARGE, torch.tensor([1, 0])),
           "In float32 exp(200) is infinite, and a softmax of e^-200 is 0. log_softmax gets round both")],
    observe=with_gradient)


def exact_limited_loss(log_p, N):
    p = [math.exp(x) for x in log_p.tolist()]
    value = sum(-math.log(exact_pass(each, N)) for each in p) / len(p)
    return [value, [-exact_factor(each, N) / len(p) for each in p]]


def exact_weighted_loss(log_p, N):
    """The same gradient, -F / B. The value, the mean of -F log p, is the gradient times log p, summed."""
    gradient = exact_limited_loss(log_p, N)[1]
    return [sum(g * x for g, x in zip(gradient, log_p.tolist())), gradient]


def pass_of(log_p, N):
    return 1 - (1 - log_p.exp()) ** N


def reward_of(p, N):
    return N * p * (1 - p) ** (N - 1)


def factor_of(log_p, N):
    return reward_of(log_p.exp(), N) / pass_of(log_p, N)


def weigh(log_p, weights):
    return -(weights.detach() * log_p)


FEW = torch.tensor([0.3, 0.1, 0.6]).log()
MORE = torch.tensor([0.02, 0.2, 0.05]).log()
TINY = torch.tensor([-20.0, -1.0])

CHECKS["limited_loss"] = Check(
    "limited_loss({}, {})", exact_limited_loss,
    inputs=[(FEW, 1), (FEW, 2), (MORE, 8)],
    mistakes=[
        (lambda log_p, N: -pass_of(log_p, N).mean().log(),
         "the mean is taken before the logarithm: this is -log of "
         "the mean of pass@N. First the log of each, then the mean"),
        (lambda log_p, N: pass_of(log_p, N).log().mean(),
         "the sign: a loss is made smaller, so it is minus the log of pass@N"),
        (lambda log_p, N: -pass_of(log_p, N).log().sum(), "this is the sum over the batch. Take the mean"),
        (lambda log_p, N: -pass_of(log_p, N).log(), "this is a loss for each problem. Take the mean"),
        (lambda log_p, N: -(N * log_p).mean(),
         "this is -log p^N, which is N times cross-entropy: it asks that all N tries be right"),
        (lambda log_p, N: -pass_of(log_p, N).mean(),
         "this is minus the mean of pass@N. The logarithm is missing"),
        (lambda log_p, N: -(N * torch.log(1 - log_p.exp())).mean(),
         "this is minus the log of (1 - p)^N, the probability that all tries fail. pass@N is one minus that"),
        (lambda log_p, N: -torch.log(1 - log_p.exp() ** N).mean(),
         "this has 1 - p^N, the probability that not all tries are right. One try fails with probability 1 - p"),
        (lambda log_p, N: -log_p.mean(), "this is cross-entropy, whatever N is"),
        (lambda log_p, N: -pass_of(log_p, N).log().mean().detach(), CUT)],
    hard=[((TINY, 8), "Where log p = -20 in float32, 1 - p is rounded to 1. Compute in float64, from "
                      "log_p.double(), or with torch.log1p, for log(1 - p), and torch.expm1, for (1 - p)^N - 1")],
    observe=with_gradient)

SURE, SMALL = torch.tensor([0.2, 1.0]).double(), torch.tensor([0.2, 1e-20]).double()
USUAL = [(torch.tensor([0.3, 0.1, 0.6]).double(), N) for N in (1, 2, 8)]

CHECKS["overconfidence_factor"] = Check(
    "overconfidence_factor({}, {})", lambda p, N: [of_each(exact_factor, p, N)],
    inputs=USUAL,
    mistakes=[
        (lambda p, N: factor_of(p.log(), N) / N,
         "the factor N is missing: the derivative of (1 - p)^N is -N (1 - p)^(N - 1)"),
        (lambda p, N: factor_of(p.log(), N) * (1 - p),
         "the exponent is N - 1, not N: the derivative of a power has one less. For N = 1, F is 1"),
        (reward_of,
         "the denominator is missing: this is the derivative of "
         "pass@N, and the loss is the log of it, so divide by pass@N"),
        (lambda p, N: factor_of(p.log(), N) / p,
         "the factor p is missing: this is the derivative with respect to p. For log p use dp = p d log p"),
        (lambda p, N: -factor_of(p.log(), N),
         "the sign: F is minus the derivative of the loss, and so it is positive"),
        (lambda p, N: N * p / pass_of(p.log(), N),
         "(1 - p)^(N - 1) is missing, the probability that the other N - 1 tries fail"),
        (lambda p, N: (1 - p) ** (N - 1), "this is (1 - p)^(N - 1) alone: N p over pass@N is missing"),
        (lambda p, N: N * p / torch.expm1(N * p),
         "this is u / (e^u - 1), which is near F for small p. Write F itself")],
    hard=[((SURE, 8), "For p = 1 and N > 1, F is 0"),
          ((SURE, 1), "For N = 1, F is 1 for every p"),
          ((SMALL, 8), "1 - p is rounded to 1, and the denominator is 0. "
                       "Write it as -torch.expm1(N * torch.log1p(-p))")])

CHECKS["weighted_loss"] = Check(
    "weighted_loss({}, {})", exact_weighted_loss,
    inputs=[(FEW, 1), (FEW, 2), (MORE, 8)],
    mistakes=[
        (lambda log_p, N: -(factor_of(log_p, N) * log_p).mean(),
         "the value is right, but the gradient goes through F as well. F is to be a mere weight: detach it"),
        (lambda log_p, N: -weigh(log_p, factor_of(log_p, N)).mean(), "the sign: cross-entropy is minus log p"),
        (lambda log_p, N: weigh(log_p, factor_of(log_p, N)).sum(), "this is the sum over the batch. Take the mean"),
        (lambda log_p, N: weigh(log_p, factor_of(log_p, N)), "this is a loss for each problem. Take the mean"),
        (lambda log_p, N: weigh(log_p, factor_of(log_p, N)).mean().detach(), CUT),
        (lambda log_p, N: -log_p.mean(), "this is cross-entropy. F is missing"),
        (lambda log_p, N: weigh(log_p, normalized(factor_of(log_p, N))).sum(),
         "this is divided by the sum of F, as in a weighted mean. Then solved "
         "problems make the gradient no smaller: divide by the number of problems"),
        (lambda log_p, N: weigh(log_p, reward_of(log_p.exp(), N)).mean(),
         "the weight is the derivative of pass@N. F is that divided by pass@N"),
        (lambda log_p, N: -pass_of(log_p, N).log().mean(),
         "this is limited_loss itself. Write cross-entropy, with F as each problem's weight")],
    hard=[((TINY, 8), "Is F right there? Compute it in float64, or with torch.log1p and torch.expm1")],
    observe=with_gradient)

CHECKS["reward_weight"] = Check(
    "reward_weight({}, {})", lambda p, N: [of_each(exact_factor, p, N) * of_each(exact_pass, p, N)],
    inputs=USUAL,
    mistakes=[
        (lambda p, N: factor_of(p.log(), N),
         "this is F, the weight under the log of pass@N. Without the logarithm there is no denominator"),
        (lambda p, N: reward_of(p, N) / p,
         "the factor p is missing: this is the derivative with respect to p. For log p use dp = p d log p"),
        (lambda p, N: reward_of(p, N) / N,
         "the factor N is missing: the derivative of (1 - p)^N is -N (1 - p)^(N - 1)"),
        (lambda p, N: reward_of(p, N) * (1 - p), "the exponent is N - 1, not N. For N = 1 the weight is p"),
        (lambda p, N: -reward_of(p, N), "the sign: pass@N grows with log p, so its derivative is positive"),
        (lambda p, N: pass_of(p.log(), N),
         "this is pass@N itself. Its derivative with respect to log p is asked for"),
        (lambda p, N: p, "this is p, the weight for N = 1, whatever N is")])

# ==== 4. The exercises' functions =========================================================================


def fair(rewards, N):
    """N/n C(n - c, N - 1) / C(n - 1, N - 1) for right tries, 0 for wrong ones."""
    n, counts = rewards.shape[1], rewards.sum(dim=1).int().tolist()
    sets = torch.tensor([math.comb(n - c, N - 1) for c in counts])
    return rewards * sets[:, None] * N / n / math.comb(n - 1, N - 1)


def mean(rewards):
    return rewards.mean(dim=1, keepdim=True)


def mean_of_others(rewards):
    n = rewards.shape[1]
    return (mean(rewards) * n - rewards) / (n - 1)


def standardized(rewards, unbiased):
    return (rewards - mean(rewards)) / (rewards.std(dim=1, keepdim=True, unbiased=unbiased) + 1e-6)


DEVIATION = ("the weights are divided by the group's standard deviation. That changes how much groups with "
             "many right tries count against those with few, so the mean is not the gradient of pass@N")
GRPO = ("these are GRPO's advantages, the rewards minus their mean over their standard "
        "deviation, whatever N is. Both the mean and the deviation bias the gradient")

GROUPS = ((4, 1), (4, 2), (5, 3))  # n and N

CHECKS["advantages"] = Check(
    "the mean of the estimate for n = {}, N = {}, p = {}", lambda n, N, p: [N * p * (1 - p) ** N],
    inputs=[(*sizes, p) for sizes in GROUPS for p in (0.1, 0.3, 0.8)],
    mistakes=[
        (lambda rewards, N: fair(rewards, N) - mean(fair(rewards, N)),
         "the group's mean is subtracted. The try's own weight is in that mean, so the gradient is multiplied by "
         "1 - 1/n + (N - 1) p / ((1 - p) n). Subtract nothing, or what the other tries alone give"),
        (lambda rewards, N: fair(rewards, N) - mean_of_others(fair(rewards, N)),
         "the mean of the other tries' weights is subtracted. For N > 1 those weights depend on this try too, through "
         "c, so it biases the gradient. Subtract nothing, or what the other tries alone give"),
        (lambda rewards, N: standardized(fair(rewards, N), True), DEVIATION),
        (lambda rewards, N: standardized(fair(rewards, N), False), DEVIATION),
        (lambda rewards, N: standardized(rewards, True), GRPO),
        (lambda rewards, N: standardized(rewards, False), GRPO),
        (lambda rewards, N: rewards * (1 - mean(rewards)) ** (N - 1) * N / rewards.shape[1],
         "this puts c / n for p in N (1 - p)^(N - 1) / n, which is biased: the try "
         "itself is in c / n. Of all sets of N - 1 other tries, count those that fail"),
        (lambda rewards, N: fair(rewards, N) * rewards.shape[1],
         "this is n times too large: 1 / n is missing. (It is right "
         "if you then take the mean over tries, not the sum)"),
        (lambda rewards, N: fair(rewards, N) / N, "the factor N is missing"),
        (lambda rewards, N: rewards / rewards.shape[1], "these are the weights for pass@1, 1 / n, whatever N is"),
        (lambda rewards, N: rewards, "these are the rewards: n times the weights for pass@1, whatever N is"),
        (lambda rewards, N: (rewards - mean(rewards)) / rewards.shape[1],
         "these are the weights for pass@1 minus the group's mean, whatever N is"),
        (lambda rewards, N: -fair(rewards, N), "the sign: right tries are to become likelier")],
    observe=expected_gradient)


def exact_optimal_policy(p, N):
    """With k answers kept, 1 - q_i = (λ / p_i)^(1/(N-1)) = (k - 1) r_i / Σ r, r = p^(-1/(N-1)), since the q_i sum to
    1. The right k is the largest with which each of the k likeliest gets something."""
    p = p.tolist()
    if N == 1:
        return [[float(each == max(p)) for each in p]]
    r = [each ** (-1 / (N - 1)) for each in p]
    for k in range(len(p), 0, -1):
        kept = sorted(r)[:k]
        if (k - 1) * kept[-1] < sum(kept):
            return [[max(0, 1 - (k - 1) * each / sum(kept)) for each in r]]


def all_kept(p, N):
    r = p ** (-1 / (N - 1))
    return 1 - (len(p) - 1) * r / r.sum()


MIXED = torch.tensor([0.15, 0.5, 0.05, 0.3]).double()
TEMPERATURE = ("this is p to a power, normalized: a temperature. It is flatter, but the "
               "best q makes p_i (1 - q_i)^(N - 1) the same for all answers that it keeps")

CHECKS["optimal_policy"] = Check(
    "optimal_policy({}, {})", exact_optimal_policy,
    inputs=[(MIXED, N) for N in (2, 3, 8)],
    mistakes=[
        (lambda p, N: p, "this is p itself, where cross-entropy tends, whatever N is"),
        (lambda p, N: (p == p.max()).double(), "this puts all on the likeliest answer, which is best for N = 1 only"),
        (lambda p, N: torch.full_like(p, 1 / len(p)), "this gives the same to every answer, likely or not"),
        (all_kept,
         "some q are negative. An answer that would get less than 0 gets 0, and λ is found anew for the others"),
        (lambda p, N: all_kept(p, N).clamp(min=0),
         "q sums to more than 1. Where negative q are set to 0, λ is found anew for the others"),
        (lambda p, N: normalized(all_kept(p, N).clamp(min=0)),
         "negative q are set to 0 and the others divided by their sum. The best policy finds λ anew for the others"),
        (lambda p, N: torch.tensor(sorted(exact_optimal_policy(p, N)[0], reverse=True)),
         "the numbers are right, but sorted. Give each answer its own, in the order of p"),
        (lambda p, N: normalized(p ** (1 / N)), TEMPERATURE),
        (lambda p, N: normalized(p ** (1 / (N - 1))), TEMPERATURE)],
    hard=[((MIXED, 1), "For N = 1, 1/(N - 1) is a division by 0. All belongs on the likeliest answer")])


def exact_effective_number(p):
    p = [Fraction(each) for each in p.tolist()]
    return [float(sum(p) ** 2 / sum(each**2 for each in p))]


def exp_entropy(p):
    return torch.exp(-torch.xlogy(p, p).sum())


ALIKE, TWO = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([0.4, 0.2])
UNLIKE = torch.tensor([0.3, 0.0, 0.01, 0.05])

CHECKS["effective_number"] = Check(
    "effective_number({})", exact_effective_number,
    inputs=[(ALIKE,), (TWO,), (UNLIKE,)],
    mistakes=[
        (lambda p: 1 / (p**2).sum(),
         "p is not normalized: it sums to the probability of any proof. Divide by the sum first"),
        (lambda p: exp_entropy(normalized(p)),
         "this is the exponential of the entropy. That is an effective number too, but counts rare proofs for more"),
        (exp_entropy, "this is the exponential of an entropy, and of a p that does not sum to 1"),
        (lambda p: (p > 0).sum(), "this counts all proofs that are possible, however rare"),
        (lambda p: (p**2).sum() / p.sum() ** 2, "this is the inverse. Three proofs alike count as 3"),
        (lambda p: p.sum() / (p**2).sum(),
         "the sum is to be squared. Otherwise the number depends on the scale of p"),
        (lambda p: p.sum() / p.max(),
         "this is the sum over the largest, which does not see how the others are spread")])


def exact_proof_p(theorem, policy, depth):
    """From the bottom up: p of all states with one level more, from that of all states with one less."""
    p = dict.fromkeys(policy, Fraction(0))
    for _ in range(depth):
        branches = {state: [(Fraction(chance), goals) for chance, goals in tactics.values()]
                    for state, tactics in policy.items()}
        p = {state: sum(chance * math.prod(p[goal] for goal in goals) for chance, goals in branches[state])
             for state in policy}
    return [float(p[theorem])]


def prover(of_tactics=sum, of_goals=math.prod, last=0):
    """A search, right as it stands, to make mistakes in."""
    def p_of(theorem, policy, depth):
        if depth == last:
            return 0.0
        chances = [chance * of_goals([p_of(goal, policy, depth - 1) for goal in goals])
                   for chance, goals in policy[theorem].values()]
        return of_tactics(chances)

    return p_of


def or_one(of_goals):
    """1 where there is no subgoal."""
    return lambda goals: of_goals(goals) if goals else 1.0


STATES = {
    "T": {"split": (0.5, ["L", "R"]), "close": (0.2, [])},
    "L": {"close": (0.4, []), "use": (0.5, ["R"])},
    "R": {"close": (0.3, []), "use": (0.6, ["S"])},
    "S": {"close": (0.9, [])},
}
CIRCLE = {"A": {"again": (0.5, ["A"]), "close": (0.25, [])}}

CHECKS["proof_p"] = Check(
    "proof_p({}, {}, {})", exact_proof_p,
    inputs=[("T", STATES, 1), ("T", STATES, 2), ("T", STATES, 3), ("T", STATES, 9)],
    mistakes=[
        (lambda *_: 0.0,
         "this is 0 for every theorem. A tactic that leaves no subgoal closes the goal, "
         "and its factor is 1: a product over nothing is 1, a sum over nothing 0"),
        (prover(of_goals=or_one(sum)), "the subgoals' p are added. All have to be proved: multiply"),
        (prover(of_goals=or_one(min)), "this takes the hardest subgoal alone. All have to be proved: multiply"),
        (prover(of_goals=or_one(lambda goals: goals[0])),
         "this takes the first subgoal alone. All have to be proved: multiply"),
        (prover(of_goals=or_one(lambda goals: 1.0)),
         "this adds the tactics' probabilities, whatever subgoals they leave"),
        (prover(of_tactics=max), "this takes the best tactic alone. An attempt may choose any: add"),
        (prover(of_tactics=lambda chances: sum(chances) / len(chances)),
         "this is the mean over the tactics. Add: they are weighted by their probabilities already"),
        (prover(last=99), "depth does nothing. With depth = 1, only a tactic that leaves no subgoal ends the proof"),
        (prover(last=-1), "this goes one level too deep. With depth = 0 no tactic can be applied, and p is 0"),
        (prover(last=1), "this stops one level too early. With depth = 1 one tactic can be applied")],
    hard=[(("A", CIRCLE, 6), "A state may come back to itself. Does depth go down with every tactic?")])

# ==== 5. Losses of one's own ==============================================================================


def with_slopes(value, slope):
    """What is right for a loss that is a mean over the batch, from each example's value and derivative: functions of log p."""
    def exact(log_p, *args):
        xs = log_p.tolist()
        return [sum(value(x, *args) for x in xs) / len(xs), [slope(x, *args) / len(xs) for x in xs]]

    return exact


def gradient_alone(call, f, x, *args):
    return with_gradient(call, f, x, *args)[1:]


def focal(log_p, gamma):
    return -((1 - log_p.exp()) ** gamma * log_p)


def below(log_p, bound):
    return log_p.exp() < bound


def stopped(log_p, is_pulling):
    return -(is_pulling * log_p)


SUM = "this is the sum over the batch. Take the mean"
EACH = "this is a loss for each problem. Take the mean"
SIGN = "the sign: a loss is made smaller as p grows"

CHECKS["focal_loss"] = Check(
    "focal_loss({}, {})",
    with_slopes(lambda x, g: -((1 - math.exp(x)) ** g) * x,
                lambda x, g: (1 - math.exp(x)) ** (g - 1) * (math.exp(x) * (g * x + 1) - 1)),
    inputs=[(FEW, 1), (FEW, 2), (MORE, 8)],
    mistakes=[
        (lambda log_p, g: -focal(log_p, g).mean(), SIGN),
        (lambda log_p, g: focal(log_p, g).sum(), SUM),
        (lambda log_p, g: focal(log_p, g), EACH),
        (lambda log_p, g: -(log_p.exp() ** g * log_p).mean(),
         "this has p^γ, which pulls most where p is large. Focal loss has (1 - p)^γ"),
        (lambda log_p, g: weigh(log_p, (1 - log_p.exp()) ** g).mean(),
         "the value is right, but (1 - p)^γ is detached: in focal loss the gradient goes through it, too"),
        (lambda log_p, g: -(g * (1 - log_p.exp()) * log_p).mean(), "this has γ (1 - p): γ is an exponent"),
        (lambda log_p, g: focal(log_p, g).mean().detach(), CUT)],
    observe=with_gradient)

def exact_stop(log_p, N, k):
    pulling = [x < math.log(k / N) for x in log_p.tolist()]
    return [[-is_pulling / len(pulling) for is_pulling in pulling]]


CHECKS["hard_stop"] = Check(
    "the gradient of hard_stop({}, {}, {})", exact_stop,
    inputs=[(FEW, 8, 1), (MORE, 8, 1), (MORE, 64, 2), (FEW, 8, 2)],
    mistakes=[
        (lambda log_p, N, k: -stopped(log_p, below(log_p, k / N)).mean(), SIGN),
        (lambda log_p, N, k: stopped(log_p, below(log_p, k / N)).sum(), SUM),
        (lambda log_p, N, k: stopped(log_p, log_p.exp() > k / N).mean(),
         "the wrong ones pull: those with p below k / N should, the others should stop"),
        (lambda log_p, N, k: stopped(log_p, below(log_p, 1 / N)).mean(), "this stops at 1 / N, whatever k is"),
        (lambda log_p, N, k: stopped(log_p, log_p < k / N).mean(),
         "this compares log p with k / N, and log p is always below it: compare p, or take the log of k / N"),
        (lambda log_p, N, k: stopped(log_p, pulling := below(log_p, k / N)).sum() / max(1, pulling.sum()),
         "this is the mean over the examples that pull. Take it over the batch, or the last one left pulls as hard as all")],
    observe=gradient_alone)


def smoothed(logits, labels, share):
    log_ps = logits.log_softmax(dim=1)
    return (1 - share) * at(log_ps, labels) + share * log_ps.mean(dim=1)


def with_all_gradients(function):
    """What is right, from a function of logits in float64."""
    def exact(logits, labels, *args):
        logits = logits.double().requires_grad_()
        values = function(logits, labels, *args)
        return [values.detach(), torch.autograd.grad(values.sum(), logits)[0]]

    return exact


def entropy(logits, dim=1):
    """log Σ e^x - Σ p x, another form of -Σ p log p."""
    return logits.logsumexp(dim) - (logits.softmax(dim) * logits).sum(dim)


LOGITS = (TALL, torch.tensor([1, 0, 0])), (WIDE, torch.tensor([0, 1]))

CHECKS["smoothed_log_p"] = Check(
    "smoothed_log_p({}, {}, {})",
    with_all_gradients(lambda x, y, s: -cross_entropy(x, y, reduction="none", label_smoothing=s)),
    inputs=[(*both, share) for both in LOGITS for share in (0.0, 0.1, 0.3)],
    mistakes=[
        (lambda x, y, s: -smoothed(x, y, s), "the sign: it stands in the place of log p, which a loss takes minus"),
        (lambda x, y, s: smoothed(x, y, s).mean(), "this is the mean over the batch. Give each problem's own"),
        (lambda x, y, s: smoothed(x, y, s) + s * at(x.log_softmax(1), y),
         "the share is added, but not taken from the label: that keeps 1 - share"),
        (lambda x, y, s: smoothed(x, y, s) + s * (x.shape[1] - 1) * x.log_softmax(1).mean(1),
         "this has the sum over all tokens. Take the mean"),
        (lambda x, y, s: torch.log((1 - s) * at(x.softmax(1), y) + s / x.shape[1]),
         "this is the log of a smoothed p. Smoothing mixes the logarithms: it is the labels that are smoothed, not the model"),
        (lambda x, y, s: at(x.log_softmax(1), y), "this is log p, whatever the share is")],
    observe=with_gradient)

CHECKS["penalized_log_p"] = Check(
    "penalized_log_p({}, {}, {})", with_all_gradients(lambda x, y, beta: at(x.log_softmax(1), y) + beta * entropy(x)),
    inputs=[(*both, beta) for both in LOGITS for beta in (0.0, 0.5, 2.0)],
    mistakes=[
        (lambda x, y, beta: at(x.log_softmax(1), y) - beta * entropy(x),
         "the sign of the entropy: it is large where the model is unsure, and that is to be rewarded"),
        (lambda x, y, beta: -at(x.log_softmax(1), y) - beta * entropy(x),
         "the sign: it stands in the place of log p, which a loss takes minus"),
        (lambda x, y, beta: (at(x.log_softmax(1), y) + beta * entropy(x)).mean(),
         "this is the mean over the batch. Give each problem's own"),
        (lambda x, y, beta: at(x.log_softmax(1), y) + beta * entropy(x.detach()),
         "the value is right, but no gradient goes through the entropy, so it changes nothing"),
        (lambda x, y, beta: at(x.log_softmax(1), y) - beta * x.log_softmax(1).mean(1),
         "this has the mean of -log p over all tokens. The entropy weighs each by its probability: -Σ p log p"),
        (lambda x, y, beta: at(x.log_softmax(1), y), "this is log p, whatever β is")],
    observe=with_gradient)


def terms(log_p, N):
    fail = 1 - log_p.exp()
    return sum(fail**k / k for k in range(1, N + 1))


CHECKS["maxrl_loss"] = Check(
    "maxrl_loss({}, {})",
    with_slopes(lambda x, N: sum((-math.expm1(x)) ** k / k for k in range(1, N + 1)),
                lambda x, N: -exact_pass(math.exp(x), N)),  # p Σ (1 - p)^(k-1) = pass@N
    inputs=[(FEW, 2), (FEW, 3), (MORE, 8)],
    mistakes=[
        (lambda log_p, N: -terms(log_p, N).mean(), SIGN),
        (lambda log_p, N: terms(log_p, N).sum(), SUM),
        (lambda log_p, N: terms(log_p, N), EACH),
        (lambda log_p, N: terms(log_p, N - 1).mean(), "the term k = N is missing: range(1, N) ends before N"),
        (lambda log_p, N: sum((1 - log_p.exp()) ** k for k in range(1, N + 1)).mean(), "each term is to be divided by k"),
        (lambda log_p, N: sum(log_p.exp() ** k / k for k in range(1, N + 1)).mean(), "this has p^k. A try fails with 1 - p"),
        (lambda log_p, N: -log_p.mean(), "this is cross-entropy, where the sum tends for large N")],
    observe=with_gradient)

CHECKS["grpo_loss"] = Check(
    "grpo_loss({})",
    with_slopes(lambda x: -2 * math.asin(math.exp(x / 2)), lambda x: -1 / math.sqrt(math.expm1(-x))),
    inputs=[(FEW,), (MORE,)],
    mistakes=[
        (lambda log_p: 2 * log_p.exp().sqrt().asin().mean(), SIGN),
        (lambda log_p: -2 * log_p.exp().sqrt().asin().sum(), SUM),
        (lambda log_p: -2 * log_p.exp().sqrt().asin(), EACH),
        (lambda log_p: -log_p.exp().sqrt().asin().mean(), "the factor 2 is missing"),
        (lambda log_p: -2 * log_p.exp().asin().mean(), "the root is missing: asin √p")],
    observe=with_gradient)

# ==== 6. In a terminal ====================================================================================


def run_file(path):
    sys.path[:0] = [str(path.parent), str(Path(__file__).resolve().parents[1])]  # where it may import from
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv):
    """Judge the functions in a file. Returns the exit status."""
    sys.stdout.reconfigure(errors="replace")  # some consoles cannot print λ
    if len(argv) != 1 or not argv[0].endswith(".py"):
        print("check.py: give one Python file, as in: python exercises/check.py my_file.py", file=sys.stderr)
        return 2
    path = Path(argv[0]).resolve()
    try:
        module = attempt(argv[0], run_file, path, where=str(path), seconds=60)
        names = [name for name in CHECKS if getattr(getattr(module, name, None), "__module__", "") == module.__name__]
        verdicts = {name: verdict(getattr(module, name), name) for name in names}
    except Wrong as wrong:
        print(f"check.py: {wrong}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("check.py: interrupted", file=sys.stderr)
        return 130
    for name, words in verdicts.items():
        print(f"{name}: {words}")
    count, missing = Counter(verdicts.values()), [name for name in CHECKS if name not in names]
    print(f"{count['right']} of {len(CHECKS)} functions are right; not in the file: {', '.join(missing) or 'none'}")
    return 0 if count["right"] and count["right"] + count["not written yet"] == len(names) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
