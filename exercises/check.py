"""Is what you wrote right? A check for each function that lesson.ipynb and the exercises ask for.

In a notebook, check(pass_at_n) prints one line. In a terminal,

    python exercises/check.py my_file.py

prints one for each of these functions in the file; the exit status is 0 if all are right, 1 if one is wrong, and 2 if
there is nothing to judge. A loop without end is left with the notebook's stop button, or with Ctrl-C."""

import math
import random
import runpy
import sys
import timeit
import traceback
from pathlib import Path

import numpy as np
import torch

import answers
from answers import advantages as weights, overconfidence_factor as factor, pass_at_n

CHECKS = {}  # {name: (its arguments, what is right, cases to try it on, {what students write instead: a hint})}
EDGES = {}  # {name: (arguments where a right formula may lose all its digits, a hint)}

# ==== 1. How a function is judged =========================================================================


class Wrong(RuntimeError):
    """What to tell the student. (Autograd's own errors are RuntimeErrors, too.)"""


def check(f):
    """Print whether f is right, or what is wrong with it."""
    name = getattr(f, "__name__", None)
    others = f"check takes one of these functions, as in check(pass_at_n): {', '.join(CHECKS)}"
    print(f"{name}: {verdict(f, name)}" if name in CHECKS else others)


def use(f):
    """f, if it is right. If not, the function of that name in answers.py, so that the lesson can go on."""
    if verdict(f, f.__name__).startswith("right"):
        return f
    print(f"{f.__name__} is not right yet: here the one from answers.py stands in for it")
    return getattr(answers, f.__name__)


def verdict(f, name):
    """What to tell about f. It begins with "right" where f can be used."""
    arguments, right, cases, mistakes = CHECKS[name]
    try:
        for args in cases:
            if args is MANY_SETS:
                refuse_to_list_sets(f)
            got, want = results(f, name, args), results(written(arguments, right), name, args)
            if not alike(got, want):
                hints = [mistakes[code] for code in mistakes if agree(f, code, name, map(in_float64, cases))]
                return difference(got, want, hints)
    except RuntimeError as wrong:
        return str(wrong)
    args, note = EDGES.get(name, (cases[0], ""))
    is_right = alike(tried(f, name, args), results(written(arguments, right), name, args))
    return "right" if is_right else f"right, except for {called(name, args)}. {note}"


def written(arguments, code):
    """The function that is written as code. It computes in float64."""
    f = eval(f"lambda {arguments}: {code}", globals())
    return lambda *args: f(*in_float64(args))


def in_float64(args):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]


def agree(f, code, name, cases):
    """Whether a function gives what the code gives, wherever it does not fail."""
    other = written(CHECKS[name][0], code)
    seen = ((tried(f, name, args), tried(other, name, args)) for args in cases)
    return all(alike(*pair) for pair in seen if pair[0])


def tried(f, name, args):
    try:
        return results(f, name, args)
    except RuntimeError:
        return {}


def alike(got, want):
    """Whether two dictionaries of arrays agree."""
    return got.keys() == want.keys() and all(map(close, got.values(), want.values()))


def close(a, b):
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True)


def difference(got, want, hints):
    """The first thing that is wrong, and why, if that is known."""
    words = next(words for words in want if not close(got[words], want[words]))
    ours, right = got[words], want[words]
    line = f"{words} is {text(ours)}, and should be {text(right)}"
    if ours.shape != right.shape:
        line = f"{words} has the shape {ours.shape}, and should have {right.shape}"
    if ours.ndim == 0 < right.ndim:
        hints.append("Give one number for each problem: no mean, no sum")
    if ours.shape == right.shape and close(ours, -right):
        hints.append("The sign is wrong")
    if "gradient" in words and not ours.any():
        hints.append("No gradient gets back: detach(), item(), numpy, torch.tensor(...) or math cut it off")
    if not np.isfinite(ours).all():
        hints.append("Is there a division by 0, or the logarithm of 0 or of a negative number?")
    return ". ".join([line, *hints[:1]])

# ==== 2. How a function is called =========================================================================


def results(f, name, args):
    """What f gives: {words: array}. Raises Wrong where that is no number, or f fails."""
    if name == "advantages":
        return mean_gradient(f, *args)
    words = called(name, args)
    if not name.endswith(("log_p_of", "_loss", "_stop")):
        return {words: call(f, name, args)[1]}
    x = args[0].clone().requires_grad_()
    value, array = call(f, name, (x, *args[1:]))
    if torch.is_tensor(value) and value.requires_grad:
        value.sum().backward()
    gradient = np.zeros(x.shape) if x.grad is None else x.grad.double().numpy()
    if name == "hard_stop":
        array *= 0  # what has stopped may have any value, as long as it does not pull
    return {words: array, f"the gradient of {words}": gradient}


def call(f, name, args):
    """f(*args), and the same as an array. The arguments are copies: what f does to them is its own affair."""
    words = called(name, args)
    try:
        value = f(*(arg.clone() if torch.is_tensor(arg) else arg for arg in args))
    except (Exception, SystemExit) as error:
        file = getattr(getattr(f, "__code__", None), "co_filename", "")
        raise Wrong(f"{words} fails, {explain(error, file)}") from None
    if value is None or value is ...:
        raise Wrong(f"{words} gives nothing. Is it written, and does it end with return?")
    if torch.is_tensor(args[0]) and isinstance(value, (list, tuple, np.ndarray)):
        raise Wrong(f"{words} gives a {type(value).__name__}. For a tensor, give a tensor: torch.tensor(...)")
    try:
        array = np.asarray(value.detach() if torch.is_tensor(value) else value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        array = np.array(None)
    if array.dtype == object or isinstance(value, str):
        raise Wrong(f"{words} is {value!r:.60}, and should be a number or a tensor")
    return value, array.squeeze() if array.shape == (1,) else array


def explain(error, file):
    """The line of the student's file at fault, Python's message, and what it means here."""
    lines = [line for line in traceback.extract_tb(error.__traceback__) if line.filename == file]
    where = [f"in your line {line.lineno}, {line.line}" for line in lines[-1:]]
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    hints = [hint for part, hint in ERRORS.items() if part in what]
    return ". ".join([": ".join([*where, what]), *hints])


ERRORS = {
    "for ^": "^ is not a power in Python: write **",
    "bitwise_xor": "^ is not a power in Python: write **",
    "is not defined": "Names need their module: math.comb, torch.log, torch.nn.functional.softmax",
    "does not require grad": "Differentiate on paper, or call requires_grad_() first",
}


def called(name, args):
    return f"{name}({', '.join(map(text, args))})"


def text(value):
    """A number, or a tensor in square brackets, with four digits."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return f"[{', '.join(map(text, value))}]" if isinstance(value, list) else f"{value:.4g}"

# ==== 3. What is right, and what students write ===========================================================

PICK = random.Random()  # so that no list of answers passes for a function
THREE = torch.tensor([0.3, 0.1, 0.6]).double()
DRAWN = torch.tensor([PICK.uniform(0.02, 0.9) for _ in range(3)]).double()
MIXED = torch.tensor([0.15, 0.5, 0.05, 0.3]).double()
WIDE = torch.tensor([[PICK.gauss(0, 2) for _ in range(64)] for _ in range(2)])
TALL = torch.tensor([[0.0, 1.0], [2.0, -1.0], [1.0, 1.5]])
TINY = torch.tensor([-20.0, -1.0])
FLOAT64 = "1 - p is rounded to 1 in float32: begin with log_p.double(), which is float64"
MANY_SETS = 66, 1, 64  # of C(66, 64) = 2,145 sets


CHECKS["pass_at_n"] = (
    "p, N", "pass_at_n(p, N)",
    [(0.3, 1), (0.3, 2), (0.05, 8), (0.01, 64), (PICK.random(), 3), (0.0, 8), (1.0, 8), (MIXED, 4)],
    {"N * p": "N p counts right tries, and may be above 1. How probable is it that all N fail?",
     "1 - p ** N": "p^N is that all N are right. One try fails with probability 1 - p",
     "(1 - p) ** N": "This is that all N fail: pass@N is one minus that",
     "p ** N": "This is that all N are right. One right try is enough",
     "N * p * (1 - p) ** (N - 1)": "This is that exactly one try is right. At least one is asked for"})

CHECKS["estimate_pass_at_n"] = (
    "n, c, N", "1 - math.comb(n - c, N) / math.comb(n, N)",
    [(5, 2, 1), (5, 2, 2), (10, 3, 4), (4, 2, 3), (4, 0, 2), (9, PICK.randint(1, 5), 3), MANY_SETS],
    {"1 - (1 - c / n) ** N": "c / n for p draws with replacement, and is too low: count sets of N samples",
     "1 - math.comb(c, N) / math.comb(n, N)": "C(c, N) counts sets that are all right. Which sets are all wrong?",
     "math.comb(n - c, N) / math.comb(n, N)": "This is the share of sets in which all N fail",
     "math.comb(c, N) / math.comb(n, N)": "In these sets all samples are right. One is enough",
     "math.comb(n - 1, N - 1) / math.comb(n, N)": "This is N / n, whatever c is"})


def refuse_to_list_sets(f):
    """To go through all 184,756 sets takes a thousand times as long as to count them. In the lesson there are more."""
    seconds = timeit.repeat(lambda: call(f, "estimate_pass_at_n", (20, 3, 10)), number=1, repeat=3)
    if min(seconds) > 0.003:
        raise Wrong("this goes through the sets one by one. Of 256 samples there are 1e61 sets: math.comb counts them")


CHECKS["log_p_of"] = (
    "x, labels", "x.log_softmax(1)[range(len(labels)), labels]",
    [(TALL, torch.tensor([1, 0, 0])), (WIDE[:, :3], torch.tensor([0, 1])), (WIDE, torch.tensor([40, 9]))],
    {"x.softmax(1)[range(len(labels)), labels]": "This is p. The logarithm is missing",
     "x[range(len(labels)), labels]": "These are logits. Their log_softmax gives log-probabilities",
     "x.log_softmax(0)[range(len(labels)), labels]": "This is a softmax over the batch. Over a row it is dim=1",
     "x.log_softmax(1)[labels]": "[labels] takes whole rows. Each row's label: [range(len(labels)), labels]",
     "x.log_softmax(1)[:, labels]": "[:, labels] takes every label from every row: [range(len(labels)), labels]"})
EDGES["log_p_of"] = (200 * TALL, torch.tensor([1, 0, 0])), "exp(200) is infinite. log_softmax gets round that"


def mean_loss(arguments, each, others, mistakes):
    """The check of a loss, a mean over the batch of log p, with every one of the other arguments."""
    cases = [(p.log().float(), *args) for p in (THREE, DRAWN) for args in others]
    usual = {f"({each}).sum()": "This is the sum over the batch. Take the mean",
             each: "This is a loss for each problem. Take the mean"}
    return f"log_p{arguments}", f"({each}).mean()", cases, mistakes | usual


CHECKS["limited_loss"] = mean_loss(
    ", N", "-torch.log(pass_at_n(log_p.exp(), N))", [(1,), (2,), (8,), (64,)],
    {"-torch.log(pass_at_n(log_p.exp(), N).mean())": "Take the mean after the logarithm, not before",
     "-pass_at_n(log_p.exp(), N).mean()": "This is minus the mean of pass@N. The logarithm is missing",
     "-(N * torch.log(1 - log_p.exp())).mean()": "(1 - p)^N is that all N fail. pass@N is one minus that",
     "-torch.log(pass_at_n(log_p, N)).mean()": "This takes log p for p: p = log_p.exp() first",
     "-(N * log_p).mean()": "This asks that all N tries be right. One is enough"})
EDGES["limited_loss"] = (TINY, 8), FLOAT64

AT_P = [(THREE, 1), (THREE, 2), (THREE, 8), (DRAWN, 8), (DRAWN, 64), (torch.tensor([1e-6, 1.0]).double(), 8)]
NO_P = "The factor p is missing: this is d/dp, and dp = p d log p"
NO_N = "The factor N is missing: the derivative of (1 - p)^N is -N (1 - p)^(N - 1)"
ONE_LESS = "The exponent is N - 1, not N: a derivative has one less"

CHECKS["overconfidence_factor"] = (
    "p, N", "factor(p, N)", AT_P,
    {"factor(p, N) / p": NO_P,
     "factor(p, N) / N": NO_N,
     "factor(p, N) * (1 - p)": ONE_LESS,
     "N * p / pass_at_n(p, N)": "(1 - p)^(N - 1) is missing: the derivative of a power keeps all but one",
     "factor(p, N) * pass_at_n(p, N)": "The denominator, pass@N, is missing: the loss is the log of pass@N"})

CHECKS["weighted_loss"] = mean_loss(
    ", N", "-factor(log_p.exp(), N).detach() * log_p", [(1,), (2,), (8,), (64,)],
    {"-(factor(log_p.exp(), N) * log_p).mean()": "The gradient goes through F, too. A mere weight is detached",
     "-torch.log(pass_at_n(log_p.exp(), N)).mean()": "This is limited_loss. Write cross-entropy, with F as a weight"})
EDGES["weighted_loss"] = (TINY, 8), FLOAT64

CHECKS["reward_weight"] = (
    "p, N", "N * p * (1 - p) ** (N - 1)", AT_P,
    {"factor(p, N)": "This is F, under the log of pass@N. Without the logarithm there is no denominator",
     "N * (1 - p) ** (N - 1)": NO_P,
     "p * (1 - p) ** (N - 1)": NO_N,
     "N * p * (1 - p) ** N": ONE_LESS,
     "pass_at_n(p, N)": "This is pass@N itself. Its derivative is asked for"})


def mean_gradient(f, n, N, p):
    """The mean of Σ_i w_i d/dθ log π(try i) over all outcomes of n tries, with p = sigmoid(θ). Unbiased, it is d/dθ
    pass@N = N p (1 - p)^N, whatever the baseline. One outcome stands for all with as many right tries."""
    rewards = torch.ones(n + 1, n).tril(-1).roll(1, dims=1)  # row c has c right tries
    together = call(f, "advantages", (rewards, N))[1]
    if together.shape != rewards.shape:
        raise Wrong(f"rewards of the shape {(*rewards.shape,)} give {together.shape}. Each try needs a weight")
    alone = np.concatenate([call(f, "advantages", (group, N))[1].reshape(1, -1) for group in rewards.split(1)])
    slopes = (alone * (rewards.numpy() - p)).sum(axis=1)
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * slopes[c] for c in range(n + 1))
    return {"what other groups (rows) add to a group's weights": abs(together - alone).max(),
            f"the gradient of pass@{N}, by your weights for {n} tries with p = {p:.3g}, on average,": np.array(mean)}


CHECKS["advantages"] = (
    "rewards, N", "weights(rewards, N)",
    [(4, 1, 0.3), (4, 2, 0.1), (4, 2, 0.8), (5, 3, PICK.uniform(0.1, 0.9)), (65, 64, 0.02)],
    {"weights(rewards, N) - weights(rewards, N).mean(1, keepdim=True)":
        "The group's mean is subtracted, and the try itself is in it. Subtract nothing, or what others alone give",
     "N / rewards.shape[1] * rewards * (1 - rewards.mean(1, keepdim=True)) ** (N - 1)":
        "This puts c / n for p, and the try itself is in c / n. Of sets of N - 1 other tries, count those that fail",
     "rewards - rewards.mean(1, keepdim=True)":
        "This is n times what pass@1 needs, whatever N is, and the try itself is in the mean",
     "weights(rewards, N) * rewards.shape[1]": "This is n times too large"})


def keep(p, N, k):
    """With k answers kept, 1 - q_i = (λ / p_i)^(1/(N-1)) = (k - 1) r_i / Σ r, r = p^(-1/(N-1)): their sum is 1."""
    r = p ** (-1 / max(N - 1, 0.03))  # N = 1, nearly
    return 1 - (k - 1) * r / r.sort().values[:k].sum()


def optimal_policy(p, N):
    for k in range(len(p), 0, -1):  # the right k is the largest with which all k get something
        q = keep(p, N, k).clamp(min=0)
        if (q > 0).sum() == k:
            return q


CHECKS["optimal_policy"] = (
    "p, N", "optimal_policy(p, N)", [(MIXED, 2), (MIXED, 3), (MIXED, 8), (MIXED, 64), (DRAWN / DRAWN.sum(), 4)],
    {"keep(p, N, len(p))": "Some q are negative. Such an answer gets 0, and λ is found anew for the others",
     "keep(p, N, len(p)).clamp(min=0)": "q sums to more than 1. Without the answers that get 0, find λ anew"})
EDGES["optimal_policy"] = (MIXED, 1), "With one try, all belongs on the likeliest answer"

CHECKS["hard_stop"] = mean_loss(
    ", N, k", "-torch.where(log_p.exp() < k / N, log_p, 0)", [(8, 1), (8, 4), (64, 2), (64, 10)],
    {"-torch.where(log_p.exp() > k / N, log_p, 0).mean()": "The wrong ones pull: those with p below k / N should",
     "-torch.where(log_p < k / N, log_p, 0).mean()": "This compares log p with k / N. Compare p",
     "-log_p[log_p.exp() < k / N].mean()":
        "This is the mean over those that pull. Take it over the batch, or the last one left pulls as hard as all"})

CHECKS["power_loss"] = mean_loss(
    ", N, power", "-pass_at_n(log_p.exp(), N) ** power / power", [(1, 1), (1, 0.5), (8, 0.5), (64, 0.25)],
    {"-(pass_at_n(log_p.exp(), N) ** power).mean()": "Divide by the power"})
EDGES["power_loss"] = (TINY, 8, 0.5), FLOAT64

CHECKS["maxrl_loss"] = mean_loss(
    ", N", "sum((1 - log_p.exp()) ** k / k for k in range(1, N + 1))", [(2,), (3,), (8,), (64,)],
    {"sum((1 - log_p.exp()) ** k / k for k in range(1, N)).mean()": "The term k = N is missing: range(1, N + 1)"})

CHECKS["grpo_loss"] = mean_loss(
    ", N", "-2 * torch.asin(log_p.exp().clamp(max=1 - 1e-6).sqrt())", [(1,), (64,)],
    {"-torch.asin(log_p.exp().sqrt()).mean()": "The factor 2 is missing"})
EDGES["grpo_loss"] = (torch.tensor([0.0, -1.0]), 1), "The slope is infinite at p = 1: clamp p to just below 1"

# ==== 4. In a terminal ====================================================================================


def main(argv):
    """Judge the functions in a file. Returns the exit status."""
    sys.stdout.reconfigure(errors="replace")  # some consoles cannot print λ
    if len(argv) != 1 or not argv[0].endswith(".py"):
        print("check.py: give one Python file, as in: python exercises/check.py my_file.py", file=sys.stderr)
        return 2
    path = Path(argv[0]).resolve()
    sys.path[:0] = [str(path.parent), str(Path(__file__).resolve().parents[1])]  # where it may import from
    try:
        module = runpy.run_path(str(path), run_name="judged")
    except (Exception, SystemExit) as error:
        print(f"check.py: {argv[0]} cannot be run: {explain(error, str(path))}", file=sys.stderr)
        return 2
    is_right = []
    for name, f in module.items():
        if name in CHECKS and getattr(f, "__module__", "") == "judged":  # not what is imported
            words = verdict(f, name)
            print(f"{name}: {words}")
            is_right.append(words.startswith("right"))
    if not is_right:
        print(f"check.py: in {argv[0]} is none of the functions {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    return 0 if all(is_right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
