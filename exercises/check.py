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
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

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
        print(f"check takes the function itself, as in check(pass_at_n), and got {f!r}")
    elif name not in CHECKS:
        print(f"there is no check for {name or f!r}, but there is one for {', '.join(CHECKS)}")
    else:
        print(f"{name}: {verdict(f, name)}")


def use(f, instead):
    """f, if it is right wherever numbers are moderate; otherwise what is to stand in for it, saying so."""
    if verdict(f, f.__name__).startswith("right"):
        return f
    print(f"{f.__name__} is not right yet, so passn's own stands in for it")
    return instead


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
    return all(np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-3, atol=1e-6) and np.isfinite(a).all()
               for a, b in zip(results, others, strict=True))


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


def attempt(call, f, *args, where=None):
    """f(*args), in a thread of its own, so that a loop without end can be left. Raises Wrong for whatever goes wrong, with
    the line of it in the file `where`, usually that of f."""
    outcome = []

    def run():
        try:
            outcome.append((f(*args), None))
        except BaseException as error:  # even exit()
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not outcome:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        raise Wrong(f"{call} takes more than {SECONDS} seconds: does a loop never end?")
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
    except (TypeError, ValueError):
        raise Wrong(f"{call} is {value!r:.60}, and should be a number or a tensor") from None
    return array.reshape(()) if array.size == 1 and array.ndim == 1 else array


def result_of(call, f, *args):
    return [as_array(call, attempt(call, f, *copy.deepcopy(args)))]


def with_gradient(call, f, x, *args):
    """The result, and the gradient of its sum with respect to x: 0 where none arrives."""
    x = x.clone().requires_grad_()
    value, gradient = attempt(call, f, x, *args), None
    if isinstance(value, torch.Tensor) and value.requires_grad:
        gradient, = torch.autograd.grad(value.sum(), x, allow_unused=True)
    return [as_array(call, value), as_array(call, torch.zeros_like(x) if gradient is None else gradient)]


def expected_gradient(call, f, n, N, p):
    """The mean of Σ_i w_i d/dθ log π(try i) over all outcomes of n tries. A try is right with probability p = sigmoid(θ); so
    d/dθ log π is 1 - p for a right try and -p for a wrong one."""
    rewards = torch.tensor([*product((0.0, 1.0), repeat=n)])
    weights = as_array(call, attempt(call, f, rewards.clone(), N))
    if weights.shape != rewards.shape:
        raise Wrong(f"for rewards of the shape {(*rewards.shape,)} it gives {weights.shape}: each try needs a weight")
    if not np.isfinite(weights).all():
        raise Wrong("it gives nan or infinity for some rewards: is there a standard deviation of 0, with all tries alike?")
    right = rewards.numpy() == 1
    probability = np.where(right, p, 1 - p).prod(axis=1)
    return [as_array(call, probability @ (weights * np.where(right, 1 - p, -p)).sum(axis=1))]


# ==== 3. The lesson's functions ===========================================================================


def logs(*p):
    return torch.tensor(p).log()


def of_each(function, p, N):
    """function(p, N) of every p, in p's shape."""
    return np.reshape([function(each, N) for each in np.ravel(p).tolist()], np.shape(p))


def exact_pass(p, N):
    return float(1 - (1 - Fraction(p)) ** N)


def exact_factor(p, N):
    p = Fraction(p)
    return float(N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N))


def exact_estimate(n, c, N):
    """Of all sets of N samples, the share that has a right one: one minus (n - c) … (n - c - N + 1) / n … (n - N + 1)."""
    all_fail = Fraction(1)
    for j in range(N):
        all_fail *= Fraction(max(n - c - j, 0), n - j)
    return [float(1 - all_fail)]


CHECKS["pass_at_n"] = Check(
    "pass_at_n({}, {})", lambda p, N: [of_each(exact_pass, p, N)],
    inputs=[(0.3, 1), (0.3, 2), (0.05, 8), (0.5, 3)],
    mistakes=[
        (lambda p, N: N * p,
         "this is N * p, the right tries to expect among N, which may be more than 1. With what probability do all N fail?"),
        (lambda p, N: 1 - p**N,
         "this is 1 - p^N, the probability that not all tries are right. One try fails with probability 1 - p"),
        (lambda p, N: p**N, "this is p^N, the probability that all N tries are right. One right try is enough"),
        (lambda p, N: (1 - p) ** N, "this is the probability that all N tries fail. pass@N is one minus that"),
        (lambda p, N: N * p * (1 - p) ** (N - 1),
         "this is the probability that exactly one try is right. At least one is asked for"),
        (lambda p, N: 1 - N * (1 - p),
         "this is 1 - N (1 - p). That N independent tries fail has the product of their probabilities, not the sum"),
        (lambda p, N: p, "this is p, whatever N is")],
    hard=[((1.0, 8), "p may be 1"), ((0.0, 8), "p may be 0"),
          ((torch.tensor([0.0, 0.2, 1.0]), 4), "p may be a tensor: plain operators, or torch's functions, can do both")])

CHECKS["estimate_pass_at_n"] = Check(
    "estimate_pass_at_n({}, {}, {})", exact_estimate,
    inputs=[(5, 2, 1), (5, 2, 2), (6, 1, 3), (10, 3, 4)],
    mistakes=[
        (lambda n, c, N: 1 - (1 - c / n) ** N,
         "this puts c / n for p, which draws the N tries from the n samples with replacement. It is biased: too low. "
         "Draw without replacement, C(n, N) sets in all"),
        (lambda n, c, N: 1 - math.comb(c, N) / math.comb(n, N),
         "this uses C(c, N), where all N are right. The sets that fail are those of wrong samples only, and n - c are wrong"),
        (lambda n, c, N: math.comb(n - c, N) / math.comb(n, N),
         "this is the share of sets in which all N fail. The estimate is one minus that"),
        (lambda n, c, N: math.comb(c, N) / math.comb(n, N),
         "this is the share of sets in which all N are right. One right sample is enough"),
        (lambda n, c, N: c * math.comb(n - c, N - 1) / math.comb(n, N),
         "this is the share of sets with exactly one right sample. At least one is asked for"),
        (lambda n, c, N: N * c / n, "this is N c / n, the right samples to expect among N, which may be more than 1"),
        (lambda n, c, N: c / n, "this is c / n, whatever N is: an estimate of pass@1")],
    hard=[((4, 2, 3), "With n - c < N, every set of N has a right sample: the estimate is 1"),
          ((4, 0, 2), "Without a right sample it is 0"),
          ((2000, 3, 700), "Floats end at 1e308, and C(2000, 700) does not. math.comb gives whole numbers of any size, and "
           "dividing them is exact; or multiply the factors 1 - N / (n - j)")])


def exact_log_p(logits, labels):
    """log p = x_label - log Σ exp x, with the largest x taken out of the sum; its gradient is 1 at the label, minus p."""
    values, gradients = [], []
    for row, label in zip(logits.double().tolist(), labels.tolist()):
        log_sum = max(row) + math.log(sum(math.exp(x - max(row)) for x in row))
        values.append(row[label] - log_sum)
        gradients.append([(i == label) - math.exp(x - log_sum) for i, x in enumerate(row)])
    return [values, gradients]


CHECKS["log_p_of"] = Check(
    "log_p_of({}, {})", exact_log_p,
    inputs=[(torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]]), torch.tensor([0, 1])),
            (torch.tensor([[0.0, 1.0], [2.0, -1.0], [1.0, 1.5]]), torch.tensor([1, 0, 0]))],
    mistakes=[
        (lambda x, y: x.softmax(1)[range(len(y)), y], "this is p. The logarithm is missing"),
        (lambda x, y: -x.log_softmax(1)[range(len(y)), y], "this is -log p, cross-entropy: change the sign"),
        (lambda x, y: x.log_softmax(0)[range(len(y)), y],
         "this is a softmax over the batch, dim=0. The answers to a problem share its probability: they stand in a row, dim=1"),
        (lambda x, y: x[range(len(y)), y],
         "these are the labels' logits. Logits become log-probabilities when the log of the sum of their exponentials is "
         "subtracted: log_softmax"),
        (lambda x, y: x.log_softmax(1)[range(len(y)), y].mean(), "this is the mean over the batch. Leave one log p a problem"),
        (lambda x, y: -x.log_softmax(1)[range(len(y)), y].mean(),
         "this is the mean of -log p, which F.cross_entropy gives by default. Leave one log p a problem, and change the sign"),
        (lambda x, y: x.log_softmax(1), "these are the log-probabilities of all answers. Take the label's from each row"),
        (lambda x, y: x.log_softmax(1)[:, y],
         "indexing with [:, labels] takes every label from every row. Use gather, or [range(len(labels)), labels]"),
        (lambda x, y: x.log_softmax(1).max(dim=1).values,
         "this is log p of the model's likeliest answer, not of the label"),
        (lambda x, y: x.detach().log_softmax(1)[range(len(y)), y],
         "the values are right, but no gradient gets back to the logits. detach(), item(), tolist(), torch.tensor(…) and "
         "numpy cut it off")],
    hard=[((torch.tensor([[200.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0])),
           "exp(200) is infinite in float32, and so is the logarithm of a softmax that has become 0. log_softmax does without both")],
    observe=with_gradient)


def exact_limited_loss(log_p, N):
    p = [math.exp(x) for x in log_p.tolist()]
    value = sum(-math.log(exact_pass(each, N)) for each in p) / len(p)
    return [value, [-exact_factor(each, N) / len(p) for each in p]]


def exact_weighted_loss(log_p, N):
    """The same gradient. The value is Σ -F log p / B, which is the gradient times log p, summed."""
    gradient = exact_limited_loss(log_p, N)[1]
    return [sum(g * x for g, x in zip(gradient, log_p.tolist())), gradient]


def pass_of(log_p, N):
    return 1 - (1 - log_p.exp()) ** N


def factor_of(log_p, N):
    p = log_p.exp()
    return N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N)


SOME = [(logs(0.3, 0.1, 0.6), 1), (logs(0.3, 0.1, 0.6), 2), (logs(0.02, 0.2, 0.05), 8)]
CUT = ("the value is right, but no gradient gets back to log_p, so nothing can be trained with it. detach() of all, item(), "
       "torch.tensor(…) and math's functions cut it off")

CHECKS["limited_loss"] = Check(
    "limited_loss({}, {})", exact_limited_loss, SOME,
    mistakes=[
        (lambda x, N: -pass_of(x, N).mean().log(),
         "the mean is taken before the logarithm: this is -log of the mean of pass@N. First the log of each, then the mean"),
        (lambda x, N: pass_of(x, N).log().mean(), "the sign: a loss is minimized, so it is minus the log of pass@N"),
        (lambda x, N: -pass_of(x, N).log().sum(), "this is the sum over the batch. Take the mean"),
        (lambda x, N: -pass_of(x, N).log(), "this is a loss for each problem. Take their mean"),
        (lambda x, N: -(N * x).mean(), "this is -log p^N, N times cross-entropy: it asks that all N tries be right"),
        (lambda x, N: -pass_of(x, N).mean(),
         "this is minus the mean of pass@N, without the logarithm: another loss, which comes at the end of the lesson"),
        (lambda x, N: -(N * torch.log(1 - x.exp())).mean(),
         "this is minus the log of the probability that all N tries fail. pass@N is one minus that probability"),
        (lambda x, N: -torch.log(1 - x.exp() ** N).mean(),
         "this has 1 - p^N, the probability that not all tries are right. One try fails with probability 1 - p"),
        (lambda x, N: -x.mean(), "this is cross-entropy: N does nothing"),
        (lambda x, N: -pass_of(x, N).log().mean().detach(), CUT)],
    hard=[((torch.tensor([-20.0, -1.0]), 8),
           "With log p = -20 in float32, 1 - p is rounded to 1. Compute in float64, log_p.double(), or use torch.log1p for "
           "log(1 - p) and torch.expm1 for (1 - p)^N - 1")],
    observe=with_gradient)

CHECKS["overconfidence_factor"] = Check(
    "overconfidence_factor({}, {})", lambda p, N: [of_each(exact_factor, p, N)],
    inputs=[(torch.tensor([0.3, 0.1, 0.6]).double(), N) for N in (1, 2, 8)],
    mistakes=[
        (lambda p, N: p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N),
         "the factor N is missing: the derivative of (1 - p)^N is -N (1 - p)^(N - 1)"),
        (lambda p, N: N * p * (1 - p) ** N / (1 - (1 - p) ** N),
         "the exponent is N - 1, not N: the derivative of a power has one less. With N = 1, F is 1"),
        (lambda p, N: N * p * (1 - p) ** (N - 1),
         "the denominator is missing: this is the derivative of pass@N with respect to log p. The loss is the log of pass@N"),
        (lambda p, N: N * (1 - p) ** (N - 1) / (1 - (1 - p) ** N),
         "the factor p is missing: this is the derivative with respect to p. With respect to log p, dp = p d log p"),
        (lambda p, N: -N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N),
         "the sign: F is minus the derivative of the loss, and so positive"),
        (lambda p, N: N * p / (1 - (1 - p) ** N),
         "(1 - p)^(N - 1) is missing: the probability that the other N - 1 tries fail"),
        (lambda p, N: (1 - p) ** (N - 1), "this is (1 - p)^(N - 1) alone. The loss is a log, so divide by pass@N"),
        (lambda p, N: N * p / torch.expm1(N * p), "this is u / (e^u - 1), which is near F where p is small. Write F itself")],
    hard=[((torch.tensor([0.2, 1.0]).double(), 8), "With p = 1 and N > 1, F is 0"),
          ((torch.tensor([0.2, 1.0]).double(), 1), "With N = 1, F is 1 for every p"),
          ((torch.tensor([0.2, 1e-20]).double(), 8),
           "1 - p is rounded to 1, so it is 0 / 0. Write the denominator as -torch.expm1(N * torch.log1p(-p))")])

CHECKS["weighted_loss"] = Check(
    "weighted_loss({}, {})", exact_weighted_loss, SOME,
    mistakes=[
        (lambda x, N: -(factor_of(x, N) * x).mean(),
         "the value is right, the gradient is not: it goes through F as well. F is to be a mere weight, so detach it"),
        (lambda x, N: (factor_of(x, N).detach() * x).mean(), "the sign: cross-entropy is minus log p"),
        (lambda x, N: -(factor_of(x, N).detach() * x).sum(), "this is the sum over the batch. Take the mean"),
        (lambda x, N: -(factor_of(x, N).detach() * x), "this is a loss for each problem. Take their mean"),
        (lambda x, N: -(factor_of(x, N) * x).mean().detach(), CUT),
        (lambda x, N: -x.mean(), "this is cross-entropy: F is missing"),
        (lambda x, N: -(factor_of(x, N).detach() * x).sum() / factor_of(x, N).sum().detach(),
         "this divides by the sum of F, as weighted means do. Then what is solved no longer makes the gradient smaller: "
         "divide by the number of problems"),
        (lambda x, N: -(factor_of(x, N) * pass_of(x, N)).detach().mul(x).mean(),
         "the weight is that of the mean of pass@N, without a logarithm. F is it divided by pass@N"),
        (lambda x, N: -pass_of(x, N).log().mean(),
         "this is limited_loss itself. Now write cross-entropy, -log p, with F as each problem's weight")],
    hard=[((torch.tensor([-20.0, -1.0]), 8), "Is F nan there? Compute it in float64, or with torch.log1p and torch.expm1")],
    observe=with_gradient)

CHECKS["reward_weight"] = Check(
    "reward_weight({}, {})", lambda p, N: [of_each(exact_factor, p, N) * of_each(exact_pass, p, N)],
    inputs=[(torch.tensor([0.3, 0.1, 0.6]).double(), N) for N in (1, 2, 8)],
    mistakes=[
        (lambda p, N: N * p * (1 - p) ** (N - 1) / (1 - (1 - p) ** N),
         "this is F, the weight under the mean of log pass@N. Here is no logarithm, and so no denominator"),
        (lambda p, N: N * (1 - p) ** (N - 1),
         "the factor p is missing: this is the derivative with respect to p. With respect to log p, dp = p d log p"),
        (lambda p, N: p * (1 - p) ** (N - 1), "the factor N is missing"),
        (lambda p, N: N * p * (1 - p) ** N, "the exponent is N - 1, not N: with N = 1 the weight is p"),
        (lambda p, N: -N * p * (1 - p) ** (N - 1), "the sign: pass@N grows with p, and it is to be made larger"),
        (lambda p, N: 1 - (1 - p) ** N, "this is pass@N itself. Its derivative with respect to log p is asked for"),
        (lambda p, N: p, "this is p, the weight for N = 1, whatever N is")])

# ==== 4. The exercises' functions =========================================================================


def group_weights(rewards, N):
    """N/n C(n - c, N - 1) / C(n - 1, N - 1) for right tries, 0 for wrong ones."""
    n = rewards.shape[1]
    each = [math.comb(n - int(c), N - 1) / math.comb(n - 1, N - 1) * N / n for c in rewards.sum(dim=1)]
    return rewards * torch.tensor(each)[:, None]


def centred(rewards):
    return rewards - rewards.mean(dim=1, keepdim=True)


def standardized(rewards, unbiased):
    return centred(rewards) / (rewards.std(dim=1, keepdim=True, unbiased=unbiased) + 1e-6)


def plugged_in(rewards, N):
    n = rewards.shape[1]
    return rewards * N / n * (1 - rewards.mean(dim=1, keepdim=True)) ** (N - 1)


DEVIATION = ("the weights are divided by the group's standard deviation. That is another weight for each number of right "
             "tries, so the mean is no longer the gradient of pass@N")

CHECKS["advantages"] = Check(
    "the mean of the estimate with n = {}, N = {} and p = {}", lambda n, N, p: [N * p * (1 - p) ** N],
    inputs=[(n, N, p) for n, N in ((4, 1), (4, 2), (5, 3)) for p in (0.1, 0.3, 0.8)],
    mistakes=[
        (lambda r, N: centred(group_weights(r, N)),
         "the group's mean is subtracted. It holds the try's own weight, so this baseline biases the gradient: it is "
         "multiplied by 1 - 1/n + (N - 1) p / ((1 - p) n). Subtract the mean of the other tries, or nothing"),
        *((lambda r, N, unbiased=unbiased: standardized(group_weights(r, N), unbiased), DEVIATION) for unbiased in (True, False)),
        *((lambda r, N, unbiased=unbiased: standardized(r, unbiased),
           "these are GRPO's advantages: the group's mean subtracted, the standard deviation divided by, and no N")
          for unbiased in (True, False)),
        (plugged_in,
         "this puts c / n for p in N (1 - p)^(N - 1) / n. That is biased: the share c / n has the try itself in it. Count "
         "sets of N - 1 other tries, C(n - c, N - 1) of C(n - 1, N - 1), in which all fail"),
        (lambda r, N: r.shape[1] * group_weights(r, N),
         "this is n times the gradient: the factor 1 / n is missing. (Right if you take the mean over tries, not the sum)"),
        (lambda r, N: group_weights(r, N) / N, "the factor N is missing"),
        (lambda r, N: r / r.shape[1], "these are the weights for pass@1, 1 / n for each right try, whatever N is"),
        (lambda r, N: r, "these are the rewards themselves: n times the weights for pass@1, whatever N is"),
        (lambda r, N: centred(r) / r.shape[1], "these are the weights for pass@1 minus the group's mean, whatever N is"),
        (lambda r, N: -group_weights(r, N), "the sign: right tries are to become likelier, so their weights are positive")],
    observe=expected_gradient)


def exact_optimal_policy(p, N):
    """If the k likeliest are kept, (λ / p_i)^(1/(N-1)) = (k - 1) r_i / Σ r with r = p^(-1/(N-1)), since the q_i sum to 1. As many
    are kept as get something."""
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
TEMPERATURE = ("this is p to a power, normalized: a temperature. It makes p flatter, but gives nothing up. The best q makes "
               "p_i (1 - q_i)^(N - 1) the same for every answer that is kept")

CHECKS["optimal_policy"] = Check(
    "optimal_policy({}, {})", exact_optimal_policy, [(MIXED, N) for N in (2, 3, 8)],
    mistakes=[
        (lambda p, N: p, "this is p itself, where cross-entropy tends, whatever N is"),
        (lambda p, N: (p == p.max()).double(), "this puts all on the likeliest answer: best for N = 1 only"),
        (lambda p, N: torch.ones_like(p) / len(p), "this gives the same to every answer, likely or not"),
        (all_kept, "some q are negative: an answer that would get less than 0 is given up, and λ found for the others"),
        (lambda p, N: all_kept(p, N).clamp(min=0),
         "q sums to more than 1: when negative q are set to 0, λ has to be found anew for the others"),
        (lambda p, N: all_kept(p, N).clamp(min=0) / all_kept(p, N).clamp(min=0).sum(),
         "q is clipped at 0 and then divided by its sum. That is a policy, but not the best: find λ for those that are kept"),
        (lambda p, N: torch.tensor(sorted(exact_optimal_policy(p, N)[0], reverse=True)),
         "these are the right numbers, but sorted. Give each answer its own, in the order of p"),
        (lambda p, N: p ** (1 / N) / (p ** (1 / N)).sum(), TEMPERATURE),
        (lambda p, N: p ** (1 / (N - 1)) / (p ** (1 / (N - 1))).sum() if N > 2 else p, TEMPERATURE)],
    hard=[((MIXED, 1), "With N = 1, 1/(N - 1) is a division by 0. All belongs on the likeliest answer")])


def entropy_exponential(p):
    return torch.exp(-torch.xlogy(p, p).sum())


CHECKS["effective_number"] = Check(
    "effective_number({})", lambda p: [float(sum(map(Fraction, p.tolist())) ** 2 / sum(Fraction(x) ** 2 for x in p.tolist()))],
    inputs=[(torch.tensor(p).double(),) for p in ([0.1, 0.1, 0.1], [0.4, 0.2, 0.1], [0.3, 0.0, 0.01, 0.05])],
    mistakes=[
        (lambda p: 1 / (p**2).sum(),
         "p is not normalized: it sums to the probability that a try is right, not to 1. Divide by the sum first"),
        (lambda p: entropy_exponential(p / p.sum()),
         "this is the exponential of the entropy: another effective number, which counts rare proofs for more"),
        (entropy_exponential, "this is the exponential of an entropy, of a p that does not sum to 1"),
        (lambda p: (p > 0).sum(), "this counts the proofs that are possible at all, however rare"),
        (lambda p: (p**2).sum() / p.sum() ** 2, "this is the inverse: three proofs alike are to count as 3"),
        (lambda p: p.sum() / (p**2).sum(), "the sum is to be squared: otherwise twice all p would give half the number"),
        (lambda p: p.sum() / p.max(), "this is the sum divided by the likeliest: it does not see how the others are spread")])


def exact_proof_p(theorem, policy, depth):
    """From the bottom up: with one more level each time, from that of all states with one less."""
    p = dict.fromkeys(policy, Fraction(0))
    for _ in range(depth):
        p = {state: sum(Fraction(probability) * math.prod(p[goal] for goal in goals)
                        for probability, goals in tactics.values()) for state, tactics in policy.items()}
    return [float(p[theorem])]


def prover(of_tactics=sum, of_goals=math.prod, last=0):
    """A search, right as it stands, to make mistakes in."""
    def p_of(theorem, policy, depth):
        tried = ((probability, [p_of(goal, policy, depth - 1) for goal in goals])
                 for probability, goals in policy[theorem].values())
        return 0.0 if depth == last else of_tactics([probability * of_goals(goals) for probability, goals in tried])

    return p_of


def one_if_empty(of_goals):
    return lambda goals: of_goals(goals) if goals else 1.0


STATES = {"T": {"split": (0.5, ["L", "R"]), "close": (0.2, [])}, "L": {"close": (0.4, []), "use": (0.5, ["R"])},
          "R": {"close": (0.3, []), "use": (0.6, ["S"])}, "S": {"close": (0.9, [])}}
CIRCLE = {"A": {"again": (0.5, ["A"]), "close": (0.25, [])}}

CHECKS["proof_p"] = Check(
    "proof_p({}, {}, {})", exact_proof_p, [("T", STATES, depth) for depth in (1, 2, 3, 9)] + [("L", STATES, 2)],
    mistakes=[
        (lambda theorem, policy, depth: 0.0,
         "this is 0 for every theorem. A tactic that leaves no subgoal closes the goal: a product over nothing is 1 (a sum is 0), "
         "and only where depth is used up, 0 is right"),
        (prover(of_goals=one_if_empty(sum)), "the subgoals' p are added. All of them have to be proved: multiply"),
        (prover(of_goals=one_if_empty(min)), "this takes the hardest subgoal only. All of them have to be proved: multiply"),
        (prover(of_goals=one_if_empty(lambda goals: goals[0])),
         "this takes the first subgoal only. All of them have to be proved: multiply"),
        (prover(of_tactics=max), "this takes the best tactic. An attempt may choose any: add over the tactics"),
        (prover(last=99), "depth does nothing: with depth = 1 only a tactic that leaves no subgoal can end the proof"),
        (prover(last=-1), "this goes one level too deep: with depth = 0 no tactic can be applied, and p is 0"),
        (prover(last=1), "this stops one level too early: with depth = 1 one tactic can still be applied"),
        (prover(of_goals=lambda goals: 1.0), "this adds the tactics' probabilities, whatever subgoals they leave"),
        (prover(of_tactics=lambda p: sum(p) / len(p)), "this is the mean over the tactics. Add: their probabilities are weights already")],
    hard=[(("A", CIRCLE, 6), "States may come back to themselves: depth has to go down with each tactic")])

# ==== 5. In a terminal ====================================================================================


def run_file(path):
    sys.path[:0] = [str(path.parent), str(Path(__file__).resolve().parents[1])]  # where it may import from
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv):
    """Judge the functions in a file. Returns the exit status."""
    if len(argv) != 1 or not argv[0].endswith(".py"):
        print("check.py: give one Python file, as in: python exercises/check.py my_file.py", file=sys.stderr)
        return 2
    path = Path(argv[0]).resolve()
    try:
        module = attempt(argv[0], run_file, path, where=str(path))
    except Wrong as wrong:
        print(f"check.py: {wrong}", file=sys.stderr)
        return 2
    names = [name for name in CHECKS if getattr(getattr(module, name, None), "__module__", "") == module.__name__]
    verdicts = {name: verdict(getattr(module, name), name) for name in names}
    for name, words in verdicts.items():
        print(f"{name}: {words}")
    count = Counter(verdicts.values())
    print(f"{count['right']} of {len(CHECKS)} functions are right. Not in the file: {', '.join(CHECKS.keys() - {*names}) or 'none'}")
    return 0 if count["right"] + count["not written yet"] == len(names) and count["right"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
