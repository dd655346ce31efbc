"""Tests against trusted references: exact arithmetic, brute force, sampling, runs made by hand, and the effect itself
in miniature. They open with the paper in five tests; then come the numbers, the model, the tasks, and what one sees."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import chain, combinations, islice, product
from math import comb, inf, nan, prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx
from torch.nn.functional import cross_entropy, one_hot
from torch.testing import assert_close

import passn
import toy_tasks
from passn import (GPT, LOSSES, SETTINGS, dco_loss, estimate_pass_at_n, limited_policy, optimal_policy,
                   overconfidence_factor, pass_at, pass_at_n, pass_at_n_weights, reward_loss, train)
from toy_tasks import END, PAD, TACTICS, TASKS, apply_tactic, draw_theorems, log_policy, proof_p, solve

torch.set_num_threads(1)  # more gain nothing here, and wait for others
ROOT = Path(passn.__file__).parent
parametrize = pytest.mark.parametrize
for_each_task = parametrize("name", [*TASKS])
TINY = {"epochs": 2, "evaluations": 2, "batch_size": 3, "n_layer": 1, "n_head": 2, "n_embd": 16}
FEW = {"num_train": 6, "num_test": 3, "num_traces": 4, "start_epochs": 1}


def few(name, **more):
    """Settings of a task for a tiny model and few problems."""
    usual = SETTINGS | TASKS[name].settings
    return {key: value for key, value in (TINY | FEW | more).items() if key in usual}


def gradient_of(values, parameters):
    parts = torch.autograd.grad(values.sum(), [*parameters], retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def cases(table):
    """The pairs (what is right, case) of a text with lines "what is right: case | case"."""
    lines = [line.partition(": ") for line in table.strip().splitlines()]
    return [(right, case) for right, _, row in lines for case in row.split(" | ")]


# ==== 1. The paper in five tests ==========================================================================
#
# One oracle for pass@N, the losses, F and their gradients: decimal arithmetic of many digits.

NS = [1, 2, 8, 64, 1_000_000]
LOG_PS = "-2000 -200 -50.125 -50 -49.875 -20 -9 -4.125 -1 -0.6875 -0.125 -0.0009765625 -9.5367431640625e-07 0"


def exact(p, N):
    """pass@N, L_N = -log pass@N, and F = N p (1 - p)^(N-1) / pass@N."""
    with localcontext(prec=1000, Emin=-10**9, Emax=10**9):
        fail = (1 - p) ** (N - 1) if N > 1 else Decimal(1)
        success = 1 - fail * (1 - p)
        return float(success), float(-success.ln()), float(N * p * fail / success)


@parametrize("p", [1e-12, 1e-6, 0.015625, 0.5, 0.999999, 1])
def test_pass_at_n_is_exact(p):
    for N in NS:
        success, _, _ = exact(Decimal(p), N)
        assert pass_at_n(p, N).item() == approx(success, rel=1e-12)


@parametrize("N", NS)
def test_losses_are_exact_and_their_gradients_are_the_weights(N):
    """That of the limited loss is F times that of cross-entropy, also at p = 1 and where p underflows."""
    log_ps = [*map(float, LOG_PS.split())]  # float32 has them, too
    rows = [exact(Decimal(x).exp(), N) for x in log_ps]
    want = torch.tensor(rows, dtype=torch.float64).T
    for dtype, rel in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        log_p = torch.tensor(log_ps, dtype=dtype, requires_grad=True)
        success, loss, factor = want.to(dtype)
        each = dco_loss(log_p, N)
        assert_close(each, loss, rtol=rel, atol=1e-37)
        assert_close(overconfidence_factor(log_p, N), factor, rtol=rel, atol=1e-37)
        assert_close(-gradient_of(each, [log_p]), factor, rtol=10 * rel, atol=1e-30)
        for name, power in (("reward", 1), ("root", 0.5)):
            mean = LOSSES[name](log_p, N)
            assert_close(mean, -(success**power / power).mean(), rtol=rel, atol=0)
            pull = -gradient_of(mean, [log_p]) * len(log_ps)
            assert_close(pull, success**power * factor, rtol=10 * rel, atol=1e-12)


def test_cross_entropy_is_the_usual_one_and_n_may_differ_between_examples():
    logits, labels = torch.randn(3, 10), torch.tensor([4, 2, 7])
    N = torch.tensor([1, 64, 8])
    log_p = -cross_entropy(logits, labels, reduction="none")
    assert_close(LOSSES["ce"](log_p, 64), cross_entropy(logits, labels))
    for function in (dco_loss, overconfidence_factor):
        one_by_one = [*map(function, log_p, N.tolist())]
        assert torch.equal(function(log_p, N), torch.stack(one_by_one))


@parametrize("power", [1, 0.5, 0])
@parametrize("N", [2, 8, 64, 100_000])
def test_no_policy_beats_the_one_that_a_loss_tends_to(N, power):
    """Every answer in use has the same marginal gain, and one that gets nothing would gain less."""
    pick = np.random.default_rng(N)
    for num_answers, evenness in ((4, 9), (10, 1), (200, 0.05)):
        f = pick.dirichlet([evenness] * num_answers)
        q = optimal_policy(f, N, power)
        assert q.sum() == approx(1) and q.min() >= 0
        success = np.maximum(1 - (1 - q) ** N, 1e-300)
        gain = f * (1 - q) ** (N - 1) * success ** (power - 1)
        used = q > 1e-9
        assert gain[used] == approx(gain[used].max(), rel=1e-3)
        assert power < 1 or np.all(gain[~used] <= gain[used].max())


def test_the_effect_in_miniature():
    """Cross-entropy's pass@64 falls as it grows confident; the limited loss's stays, far less confident."""
    small = {"num_train": 200, "num_test": 200, "epochs": 50, "evaluations": 4, "batch_size": 40, "n_layer": 1,
             "learning_rate": 6e-3}
    ce, limited = (train("multiply", loss, 64, **small)[0] for loss in ("ce", "limited"))
    ce_64 = pass_at(ce, 64)[:, 0]
    limited_64 = pass_at(limited, 64)[:, 0]
    assert ce_64[-1] < 0.7 * max(ce_64)
    assert limited_64[-1] > 0.85 * max(limited_64)
    assert limited_64[-1] > 1.4 * ce_64[-1]
    assert limited["history"][-1]["confidence"] < 0.5 * ce["history"][-1]["confidence"]


# ==== 2. The other numbers ================================================================================


@parametrize("n, N", [(1, 1), (4, 1), (5, 3), (6, 6), (300, 64)])
def test_estimates_are_those_of_fractions_and_unbiased(n, N):
    """Over all outcomes of n tries: that of pass@N, and that of its gradient for log p, N p (1 - p)^(N-1)."""
    p, c = 0.07, range(n + 1)
    estimates, weights = estimate_pass_at_n(n, c, N), pass_at_n_weights(n, c, N)
    solved = [1 - Fraction(comb(n - k, N), comb(n, N)) for k in c]
    weight = [Fraction(comb(n - k, N - 1), comb(n, N)) for k in c[1:]]
    assert estimates.tolist() == approx([*map(float, solved)], rel=1e-12)
    assert weights.tolist() == approx([0, *map(float, weight)], rel=1e-11)
    chance = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in c]
    assert chance @ estimates.numpy() == approx(1 - (1 - p) ** N)
    pulls = c * weights.numpy()
    assert chance @ pulls == approx(N * p * (1 - p) ** (N - 1))


column = SimpleNamespace(__array__=lambda *_, **__: np.array([10, 20, 40]))  # no sequence, as one of pandas
VALUES = """
[0, 1]: pass_at_n([-1e-7, 1 + 1e-7], 1_000_000)
[nan, 0.75]: pass_at_n([nan, 0.5], [8, 2])
[]: pass_at_n([], 8) | estimate_pass_at_n(7, [], 3) | pass_at_n_weights(7, [], 3)
[0.2, 1 - 1365 / 4845, 0]: estimate_pass_at_n(column, torch.tensor([2, 5, 0], dtype=torch.uint8), [1, 4, 40])
[0.1, 455 / 4845, 0]: pass_at_n_weights([10, 20, 40], [2, 5, 0], torch.tensor([1, 4, 40]))
[[1 / 8] * 3] * 2: pass_at_n_weights(8, [[2], [5]], [1, 1, 1])
[0.5, 0.5, 0]: optimal_policy([2, 2, 1], 1)
[1 / 3, 1 / 3, 1 / 3, 0]: optimal_policy([5, 3, 2, 0], 1_000_000)
[0.5, 0.3, 0.2, 0]: limited_policy([50, 30, 20, 0], 1)
0.6 * (1 - 0.7**4) + 0.4 * (1 - 0.3**4): passn.confident_pass_at_n(0.3, N=4, a=0.6, K=2)
[0.01, 0.1]: np.vectorize(passn.schedule)([0, 1])
0.05: max(np.arange(0, 1, 0.01), key=passn.schedule)"""


@parametrize("value, call", cases(VALUES))
def test_what_can_be_worked_out_on_paper(value, call):
    np.testing.assert_allclose(eval(call), eval(value), atol=1e-5)


x = torch.tensor([-1.0])
REFUSED = """
probability: pass_at_n(1.1, 8) | pass_at_n(-0.1, 8)
1 or more: pass_at_n(0.5, nan) | pass_at_n_weights(8, 1, 0) | dco_loss(x, 0.5) | optimal_policy([0.5, 0.5], 0)
draw at least: estimate_pass_at_n(10, 1, 11) | pass_at_n_weights(8, 1, 64)
num_correct: estimate_pass_at_n(10, 11, 2) | estimate_pass_at_n(10, -1, 2) | estimate_pass_at_n(10.5, 1, 2)
num_correct: pass_at_n_weights(5, 0.5, 2) | pass_at_n_weights(5, -1, 2)
sign: dco_loss(-x, 64) | overconfidence_factor(-x, 64)
floating: dco_loss(x.long(), 64)
not all 0: optimal_policy([0.0, 0.0], 8) | limited_policy([0.5, -0.1], 8) | limited_policy([0.5, nan], 8)
N = : train("multiply", N="8") | train("multiply", N=None) | train("multiply", N=2.5)
seed = -1: train("multiply", seed=-1)
epochs = : train("multiply", epochs=0) | train("multiply", epochs=1.5)
 = : train("multiply", eps=nan) | train("multiply", learning_rate="1e-3") | train("prove", per_step="False")
below 1: train("multiply", pass_over=1)
90 training examples: train("multiply", num_train=90)
4095 problems: TASKS["multiply"](0, num_train=4000)
num_train = '8': TASKS["multiply"](0, num_train="8")
no MATH: TASKS["math"](0, math_dir="/nowhere")"""


@parametrize("hint, call", cases(REFUSED))
def test_what_cannot_be_is_refused(hint, call):
    with pytest.raises(ValueError, match=hint):
        eval(call)


# ==== 3. The model ========================================================================================


def small_model(vocab_size=7, block_size=12, n_layer=3, n_embd=32):
    """Random weights, large enough that the answers are far from uniform."""
    torch.manual_seed(0)
    model = GPT(vocab_size, block_size, n_layer, 2, n_embd)
    assert (model.blocks[0].query.bias == 0).all()
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() == 2 else 1
    return model


def plain_logits(model, tokens):
    """The same model, as one would write it down."""
    x = model.token_embedding(tokens) + model.position_embedding.weight
    causal = torch.full((12, 12), -inf).triu(1)
    for block in model.blocks:
        normed = block.ln_1(x)
        qkv = block.query(normed), *block.key_value(normed).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in qkv)
        weights = (q @ k.mT / 4 + causal).softmax(dim=-1)
        x = x + block.projection((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return model.head(model.ln(x))


def test_logits_and_gradients_are_those_of_a_plain_gpt():
    """All logits at once, the last ones alone, and piece by piece with what is past kept."""
    assert GPT(40, 40).head.weight.std().item() == approx(0.03, rel=0.1)
    model, tokens = small_model(), torch.randint(7, (5, 12))
    plain, last = plain_logits(model, tokens), model.read(tokens, 4)[0]
    past, pieces = None, []
    for piece in tokens.split([5, 3, 1, 3], dim=1):
        logits, past = model.read(piece, 0, past)
        pieces.append(logits)
    assert_close(model(tokens), plain, rtol=0, atol=1e-5)
    assert_close(last, plain[:, -4:], rtol=0, atol=1e-5)
    assert_close(torch.cat(pieces, dim=1), plain, rtol=0, atol=1e-5)
    ours = gradient_of(last.square(), model.parameters())
    theirs = gradient_of(plain[:, -4:].square(), model.parameters())
    assert_close(ours / ours.max(), theirs / ours.max(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_p_at_a_temperature_and_the_greedy_answer():
    """The likeliest token after the likeliest token; behind END comes padding, which does not count in p."""
    model, T = small_model(), torch.tensor([[1.0], [2.5]])
    prompts = torch.randint(2, 7, (40, 5))
    texts, log_p = prompts, torch.zeros(2, 40)
    for _ in range(3):
        logits = model(texts)[:, -1]
        is_over = (texts == END).any(dim=1)
        tokens = logits.argmax(dim=1).masked_fill(is_over, PAD)
        log_ps = (logits / T[..., None]).log_softmax(dim=2)[:, range(40), tokens]
        log_p += log_ps * (tokens != PAD)
        texts = torch.cat([texts, tokens[:, None]], dim=1)
    answers = model.sample(prompts, 3, temperature=0)
    assert torch.equal(answers, texts[:, 5:]) and (answers == END).any()
    assert_close(model.log_p(prompts, answers, (1.0, 2.5)), log_p, rtol=1e-4, atol=1e-4)
    assert_close(model.log_p(prompts, answers), log_p[0], rtol=1e-4, atol=1e-4)
    twice = model.sample(prompts, 3, temperature=0, number=2)
    assert torch.equal(twice, answers.repeat_interleave(2, dim=0))
    assert model.sample(prompts[:0], 3).shape == (0, 3)


# ==== 4. The tasks ========================================================================================
#
# Three tests of the interface for all, then what is special to each.

MATH = {"train": r"""
{"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$."}
{"problem": "What is $2+3$?", "solution": "It is $\\boxed{5}$."}
{"problem": "Find $x$ in $x=2$.", "solution": "It is $\\boxed{2}$."}
{"problem": "[asy] a picture", "solution": "It is $\\boxed{3}$."}
{"problem": "What is 1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1?", "solution": "\\boxed{32}"}
{"problem": "What is a half?", "solution": "It is $\\boxed{\\frac12}$."}""", "test": r"""
{"problem": "What is $3-1$?", "solution": "It is $\\boxed{2}$."}
{"problem": "What is $-3-4$?", "solution": "It is $\\boxed{-7}$."}
{"problem": "Unheard of: 2+3?", "solution": "It is $\\boxed{5}$."}"""}


def small_task(name, folder):
    """A task with few problems, and a small model for it."""
    for split, lines in MATH.items():
        (folder / f"{split}.jsonl").write_text(lines)
    torch.manual_seed(0)
    task = TASKS[name](0, math_dir=str(folder), **FEW)
    return task, task.new_model(GPT, 1, 2, 16)


@for_each_task
def test_p_is_the_share_of_right_tries_at_any_temperature_and_confidence_that_of_the_greedy_one(name, tmp_path):
    """Hot tries are those of a model with smaller logits."""
    draws, (task, model) = 500, small_task(name, tmp_path)
    for parameter in model.parameters():
        parameter.data *= 4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60 if name in ("multiply", "cot", "math") else 0):  # else p is too small to be seen
        optimizer.zero_grad()
        log_p = torch.cat([model.log_p(*task.train), model.log_p(*task.test)])
        LOSSES["ce"](log_p, 1).backward()
        optimizer.step()
    task.num_samples = task.num_samples and draws
    p, confidence = task.measure(model)
    shown = task.show_tries(model, draws)
    assert len(shown) == 3
    for at_1, sure, (problem, num_right, tries) in zip(p[0].tolist(), confidence.tolist(), shown):
        assert num_right / draws == approx(at_1, abs=4.5 * (at_1 / draws) ** 0.5 + 1e-3)
        right = re.split("[?=:]", problem)[-1]
        assert num_right == (draws - tries.count("no proof") if "⊢" in problem else tries.count(right))
        commonest = Counter(tries).most_common(1)[0][1] / draws
        assert 0 < sure <= commonest + 0.03 or "no proof" in tries
    model.head.weight.data /= task.temperatures[-1]
    hot, _ = task.measure(model)
    assert_close(p[-1], hot[0], rtol=1e-4, atol=0.05 if name == "cot" else 1e-9)


@for_each_task
def test_equal_seeds_give_equal_runs_and_leave_the_callers_random_numbers(name, tmp_path, monkeypatch):
    small_task(name, tmp_path)  # which writes the folder
    monkeypatch.setattr(time, "perf_counter", lambda: 0)
    loss, runs, weights = TASKS[name].axes["loss"][-1], [], []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        run, model = train(name, loss, 4, seed, tmp_path, **few(name, math_dir=str(tmp_path)))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)  # whatever else is drawn
        runs.append(run)
        weights.append(model.head.weight)
    assert runs[0] == runs[1]
    assert runs[0]["history"] != runs[2]["history"]
    assert (weights[2] - weights[0]).std() > 0.03  # which training for so short cannot do
    assert pass_at(run, 2).shape == (3, len(run["temperatures"]))
    (row,) = passn.load_runs(tmp_path, name, {0, 1})
    assert [run["seed"] for run in row] == [0, 1]


@parametrize("name", ["multiply", "cot"])
def test_products_are_right_and_no_pair_of_factors_comes_twice(name):
    task, pairs, orders = TASKS[name](3, num_train=700, num_test=500), set(), Counter()
    texts = [torch.cat(part, dim=1) for part in (task.train, task.test)]
    for text in map(task.text, torch.cat(texts)):
        a, b, *work, total = map(int, re.findall(r"\d+", text))
        parts = [a * (b - b % 10), a * (b % 10)]
        assert total == a * b
        assert sorted(work) == (sorted(parts) if name == "cot" else [])
        pairs.add(frozenset((a, b)))
        orders[a > b, work == parts] += 1
    assert len(pairs) == 1200 and len(orders) == (4 if name == "cot" else 2)
    assert min(orders.values()) > 200


def test_fine_tuning_is_on_other_problems_and_tests_the_same():
    before, task = TASKS["multiply"](3, num_test=500), TASKS["finetune"](3, num_test=500)
    for part, same in zip(task.test, before.test):
        assert torch.equal(part, same)
    pairs = [frozenset(re.findall(r"\d+", task.text(prompt))) for prompt in (*before.train[0], *task.train[0])]
    assert len({*pairs}) == 3000


def test_a_traces_p_is_the_given_one_and_the_share_of_other_right_ones(tmp_path):
    """Of four sampled traces one is the given one, one is another that is right, and two are wrong."""
    task, model = small_task("cot", tmp_path)
    prompts, given = task.train
    other, wrong, worse = given.clone(), given.clone(), given.clone()
    for traces, place in (other, 0), (wrong, -1), (worse, -4):
        traces[:, place] = (traces[:, place] + 1) % 16
    draws = iter([[given, other, wrong, worse], [given] * 4])
    sample = lambda *_: torch.stack(next(draws), dim=1).flatten(0, 1)
    batch = torch.tensor([3, 1, 4])
    p_given = model.log_p(prompts[batch], given[batch])
    for epoch, share in ((0, 0.25), (1, 0.25), (2, 0)):  # sampled anew in every second epoch
        task.refresh(SimpleNamespace(sample=sample), epoch)
        log_p = task.log_p(model, batch)
        assert_close(log_p.exp(), p_given.exp() + share)
        assert_close(gradient_of(log_p, model.parameters()), gradient_of(p_given, model.parameters()))


def test_a_steps_p_is_that_of_its_theorem_and_pulls_on_the_step(tmp_path):
    task, model = small_task("prove", tmp_path)
    batch, (theorem, row, tactic) = torch.arange(task.size), task.steps.T
    policy = log_policy(model, task.table)
    steps = policy[row, tactic]
    task.refresh(model, 0)
    log_p = task.log_p(model, batch)
    assert_close(log_p, proof_p(policy.exp(), task.table)[theorem].log())
    assert_close(gradient_of(log_p, model.parameters()), gradient_of(steps, model.parameters()))
    with torch.no_grad():
        assert_close(task.log_p(model, batch), log_p)
    task.per_step = True
    assert_close(task.log_p(model, batch), steps)


# ==== 5. Theorems and proofs ==============================================================================


def derivable(hypotheses, goal):
    """Natural deduction by brute force: all sequents over the theorem's subformulas, until nothing new follows."""
    def parts(formula):
        return {formula} if isinstance(formula, str) else {formula}.union(*map(parts, formula))

    def follows(context, formula):
        by_intro = isinstance(formula, tuple) and (context | {formula[0]}, formula[1]) in known
        by_apply = any({(context, premise), (context, (premise, formula))} <= known for premise in universe)
        return formula in context or by_intro or by_apply

    universe = set().union(*map(parts, (*hypotheses, goal)))
    subsets = chain(*(combinations(universe, n) for n in range(len(universe) + 1)))
    contexts = {frozenset(hypotheses).union(subset) for subset in subsets}
    known, size = set(), -1
    while len(known) > size:
        size = len(known)
        known |= {sequent for sequent in product(contexts, universe) if follows(*sequent)}
    return (frozenset(hypotheses), goal) in known


def test_the_kernel_proves_what_can_be_derived_and_nothing_else():
    """And what is provable has no countermodel by truth table."""
    pick, counts, formulas = random.Random(1), Counter(), ["a", "b"]
    for _ in range(2):
        formulas += product(formulas, repeat=2)
    for _ in range(100):
        first, second, goal = pick.choices(formulas, k=3)
        provable = derivable((first, second), goal)
        assert (solve(((first, second), goal), 12)[0] != []) == provable
        counterexamples = toy_tasks.truth(first) & toy_tasks.truth(second) & ~toy_tasks.truth(goal)
        assert not (provable and counterexamples)
        counts[provable] += 1
    assert min(counts.values()) > 20
    peirce = ((("a", "b"), "a"), "a")  # true by truth table, but not provable without the excluded middle
    assert solve(((), peirce), 12)[0] == []
    assert not derivable((), peirce)
    chain_of_five = "a", ("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")
    goals = "e", ("a", "e"), ("a", ("a", "e"))
    proofs = [solve((chain_of_five, goal))[0] for goal in goals]
    assert [*map(len, proofs)] == [5, 6, 0]  # no more than six on a branch
    assert apply_tactic((("a",), ("a", "b")), "i") == ((("a",), "b"),)  # no hypothesis comes twice


def all_proofs(state, chance_of, depth=toy_tasks.MAX_DEPTH):
    """Every proof of a state as its probability and its number of tactics, by enumeration."""
    for tactic, left in toy_tasks.tactics(state).items() if depth else ():
        for parts in product(*(all_proofs(part, chance_of, depth - 1) for part in left)):
            chances, steps = zip(*parts) if parts else ((), ())
            yield chance_of(state, tactic) * prod(chances), 1 + sum(steps)


@pytest.fixture(scope="module")
def proofs():
    """Twelve theorems, a table of them all, and the logits of a random policy."""
    theorems, _ = draw_theorems(5, 12, 0)
    table = toy_tasks.join(map(toy_tasks.table_of, theorems))
    torch.manual_seed(0)
    logits = 2 * torch.randn(len(table.goals), len(TACTICS))
    return theorems, table, logits.double()


def policy_of(table, logits):
    does_not_apply = table.subgoals[..., 0] == toy_tasks.NO_TACTIC
    return logits.masked_fill(does_not_apply, -inf).softmax(dim=-1)


def test_p_its_gradient_and_the_shortest_proof_are_those_of_all_proofs_one_by_one(proofs):
    """Where a theorem's proofs are few. Blind search and the surest attempt come from the same recursion."""
    theorems, table, logits = proofs
    leaf, checked = logits.clone().requires_grad_(), 0
    policy, uniform = policy_of(table, leaf), policy_of(table, 0 * logits)
    blind = [solve(theorem)[1] for theorem in theorems]
    assert proof_p(uniform, table).tolist() == approx(blind)
    surest = one_hot(uniform.argmax(dim=1), len(TACTICS)).double()
    assert proof_p(surest, table, failure=1.0).tolist() == [1.0] * 12
    for theorem, p, start in zip(theorems, proof_p(policy, table), table.theorems.tolist()):
        row = {state: i for i, state in enumerate(toy_tasks.reachable(theorem), start)}
        every = all_proofs(theorem, lambda state, tactic: policy[row[state], TACTICS.index(tactic)])
        chances, steps = zip(*islice(every, 1000))
        if len(steps) < 1000:
            checked += 1
            assert_close(p, sum(chances))
            assert_close(gradient_of(p, [leaf]), gradient_of(sum(chances), [leaf]))
            shortest, _ = solve(theorem)
            assert len(shortest) == min(steps) and shortest[0][0] == theorem
            assert all(tactic in toy_tasks.tactics(state) for state, tactic in shortest)
    assert checked >= 6


def written(state, letters):
    """The proof that the next tactics of an iterator make, by the kernel, as a text such as "D(A, i(B))"."""
    tactic = next(letters)
    subproofs = [written(subgoal, letters) for subgoal in apply_tactic(state, tactic)]
    return tactic + (f"({', '.join(subproofs)})" if subproofs else "")


def test_attempts_succeed_as_often_as_they_should_and_prove(proofs, monkeypatch):
    theorems, table, logits = proofs
    policy, found = policy_of(table, logits), set()
    likeliest, places = proof_p(policy, table).topk(3)
    for p, i in zip(likeliest.tolist(), places):
        tries = [toy_tasks.attempt(policy, table, table.theorems[i]) for _ in range(500)]
        assert 1 - tries.count(None) / 500 == approx(p, abs=4.5 * (p / 500) ** 0.5)
        for proof in {*tries} - {None}:
            assert written(theorems[i], iter(re.findall(r"\w", proof))) == proof
            found.add(proof)
    assert len(found) > 1
    choices = iter("BBBBBA" + "BBBBBBA")  # A proves; B, a→a, leaves the same to prove; seven tactics are too many
    monkeypatch.setattr(toy_tasks, "choose", lambda p: torch.tensor(TACTICS.index(next(choices))))
    table = toy_tasks.table_of((("a", ("a", "a")), "a"))
    tries = [toy_tasks.attempt(policy, table, 0) for _ in range(2)]
    assert tries == ["B(B(B(B(B(A)))))", None]


def test_a_state_reads_the_same_alone_and_beside_others(proofs):
    """Sets of hypotheses are read once, for all their goals; the model sees all of a state."""
    _, table, _ = proofs
    model = small_model(len(toy_tasks.PROOF_VOCAB), toy_tasks.MAX_HYPOTHESES + toy_tasks.MAX_GOAL, 2)
    texts = torch.cat([table.hypotheses[table.set_of], table.goals], dim=1)
    whole = policy_of(table, model(texts)[:, -1, 2:2 + len(TACTICS)].double())
    for rows in (slice(None), torch.tensor([5, 0, 5, 40])):
        assert_close(log_policy(model, table, rows).exp(), whole[rows], rtol=1e-4, atol=1e-5)
    text = toy_tasks.hypotheses_text(((("a", "b"), ("c", "d")), "a"))
    assert text == "(a→b)→c→d A  a B  "


def test_theorems_are_hard_distinct_and_the_same_for_the_same_seed():
    train, test = draw_theorems(3, 9, 3)
    draw_theorems.cache_clear()
    assert draw_theorems(3, 9, 3) == (train, test)
    assert draw_theorems(4, 1, 0)[0] != train[:1]
    blind = [solve(theorem)[1] for theorem in train + test]
    assert 0 < min(blind) and max(blind) <= toy_tasks.MAX_BLIND
    forms = {(frozenset(hypotheses), goal) for hypotheses, goal in train + test}
    assert len(forms) == 12 and max(len(hypotheses) for hypotheses, _ in forms) == 8
    task = TASKS["search"](3, num_train=9, num_test=3)
    assert task.baselines(None) == {"blind search": blind[9:]}


# ==== 6. MATH =============================================================================================

BOXES = r"""
-12: $\boxed{-12}$ is it
2: first \boxed{2}, then \fbox{2}.
None: first \boxed{1}, then \boxed{2} | \boxed{5} or \boxed{\frac{1}{2}} | \boxed{28} or \boxed{28_9}
7: $\boxed{007}$ | $\boxed{7.}$
-7: so $\boxed -7 $
None: $\boxed{\frac{1}{\sqrt{2}}}$ | $\boxed{1000}$ | \boxed | $\boxed{3.5}$ | $\boxed{3 | $\boxed 3.5$ | \boxed{.3}
None: $\boxed 5,000$ | $\boxed 3 + 4$ | \boxed{1{,}008} | \boxedx{3}
11: \boxed{$11$}
9: $\boxed 9$.
4: \fbox{4}
5: \boxed{5}. Now \boxed is a word | \boxed{5}_6
17: \boxed {17}
None: \boxed{512}\,i | $\boxed{5},000$ | $\frac{\boxed{3}}{4}$ | $\frac{3}{\boxed{4}}$ | $-\boxed{5}$ | \boxed{5}.5
None: -$\boxed{5}$ | $1,\boxed{500}$ | $\boxed{5}{,}000$ | $\boxed{3}\frac12$
None: $\boxed{3} \times 10^3$ | $\sqrt{\boxed{5}}$
None: $35\boxed{680}$ | $2/\boxed{3}$ | $\boxed{3}/4$ | $\boxed{2}\sqrt{3}$ | $\boxed{2}\pi$
45: \boxed{45}^\circ
21: \boxed{21}\text{ cm}
19: \boxed{19}x^3
6: $\boxed{6}$ in all
12: $x=\boxed{12}, y=3$"""


@parametrize("integer, solution", cases(BOXES))
def test_the_answer_is_what_all_boxes_hold_and_does_not_go_on_outside(integer, solution):
    assert str(toy_tasks.integer_answer(solution)) == integer


MATH_READ = """
Whatis$1+1$? 2 | Whatis$2+3$? 5 | <unk>$x$<unk>$x<unk>2$<unk> 2
Whatis$3-1$? 2 | Whatis$-3-4$? -7 | <unk><unk><unk>2+3? 5"""


def test_math_keeps_short_questions_and_reads_all_releases_alike(tmp_path, monkeypatch):
    """Files whose names begin with a dot are no data; ~ is the home folder."""
    small_task("math", tmp_path)  # which writes train.jsonl and test.jsonl
    examples = {}
    for split, lines in MATH.items():
        examples[split] = [*map(json.loads, lines.strip().split("\n"))]
        files = {f"algebra/{i}.json": json.dumps(example, indent=4) for i, example in enumerate(examples[split])}
        for name, text in (files | {"algebra/._1.json": "no data", ".old/1.json": "no data"}).items():
            path = tmp_path / "release" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    load_dataset = lambda name, subject, split: examples[split] if subject == "algebra" else []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (str(tmp_path), "~/release", ""):
        task = TASKS["math"](0, math_dir=folder)
        read = [[f"{task.text(prompt)} {task.text(answer)}" for prompt, answer in zip(*part)]
                for part in (task.train, task.test)]
        assert "\n".join(map(" | ".join, read)) == MATH_READ.strip()
    prompts, answers = task.train
    assert prompts[0, 0] == PAD
    assert answers[0, 1:].tolist() == [END, PAD, PAD, PAD]
    by_frequency, best = task.baselines(optimal_policy).values()  # 2 is right in 2/3, 5 in 1/3, -7 never
    five, two = sorted(optimal_policy([2, 1], 64))
    assert by_frequency + best == approx([2 / 3, 0, 1 / 3, two, 0, five])
    bad = "train.jsonl: { | []\nno short: " + MATH["train"].split("\n")[-1]
    for hint, line in cases(bad):
        (tmp_path / "train.jsonl").write_text(line)
        with pytest.raises(ValueError, match=hint):
            TASKS["math"](0, math_dir=str(tmp_path))


# ==== 7. Training =========================================================================================


def p_is(monkeypatch, p_of):
    """Let p of training examples be a function of their numbers. Returns the batches that pull."""
    seen = []

    def log_p(self, model, batch):
        if torch.is_grad_enabled():
            seen.append(batch.tolist())
        return p_of(batch).log() + 0 * model.head.weight.sum()

    monkeypatch.setattr(toy_tasks.Task, "log_p", log_p)
    return seen


def test_solved_examples_are_passed_over_and_batches_are_full(monkeypatch):
    """F(64, p) falls below 0.1 between p = 3.4/64 and 3.8/64. Where half of the examples are beyond, half as many
    updates are made; what is left of an epoch waits for the next. The order is the seed's, whatever the loss."""
    seen = p_is(monkeypatch, lambda batch: torch.where(batch % 2 == 0, 3.8 / 64, 3.4 / 64))
    sizes, orders = few("multiply", num_train=95, batch_size=20, epochs=4), []
    for loss, changes in (("limited", {}), ("root", {}), ("limited", {"pass_over": 0.0}),
                          ("reward", {}), ("ce", {"seed": 1})):
        seen.clear()
        run, _ = train("multiply", loss, **sizes, **changes)
        assert len(seen) == run["history"][-1]["updates"]
        assert {*map(len, seen)} == {20}
        orders.append([*seen])
    passed, root, limited, reward, other_seed = orders
    assert len(passed) == 9 and root == passed
    assert all(i % 2 for batch in passed for i in batch)
    assert limited == reward and len(reward) == len(other_seed) == 19
    assert sorted(reward[0]) != reward[0] != other_seed[0]


def test_an_example_that_is_no_longer_solved_pulls_again(monkeypatch):
    p = iter([0.9] * 20 + [1e-3] * 1000)
    seen = p_is(monkeypatch, lambda batch: torch.full((len(batch),), next(p)))
    train("multiply", "limited", 64, **few("multiply", epochs=20))
    assert 0 < len(seen) < 40


def test_a_run_is_as_described(tmp_path, monkeypatch):
    """The tries are those of the trained model."""
    marks = lambda self, model, number: [number, model.head.weight.sum().item()]
    monkeypatch.setattr(toy_tasks.Task, "show_tries", marks)
    progress = []
    monkeypatch.setattr(passn, "schedule", lambda share: progress.append(share) or 1)
    changes = few("multiply", num_train=600, evaluations=3, epochs=5, batch_size=50)
    run, model = train("multiply", "limited", 50, 0, tmp_path / "new", weight_decay=1, **changes)
    (path,) = (tmp_path / "new").iterdir()
    assert json.loads(path.read_text()) == json.loads(json.dumps(run))
    assert re.fullmatch("multiply-limited-N=50-epochs=5-.*num_test=3-seed0.json", path.name)
    assert " ".join(run) == "task loss N seed label config num_samples temperatures history baselines tries"
    assert run["config"].keys() == (SETTINGS | TASKS["multiply"].settings).keys()
    assert run["tries"] == marks(None, model, 64)
    assert progress == approx(np.arange(60) / 60)
    assert [record["epoch"] for record in run["history"]] == [0, 2, 4, 5]
    last, task = run["history"][-1], TASKS["multiply"](0, **changes)
    p, confidence = task.measure(model)
    assert_close(torch.tensor(last["p"]), p, rtol=1e-5, atol=0)
    assert last["confidence"] == approx(confidence.mean().item(), rel=1e-4)
    log_p = model.log_p(*task.train)[::4]
    assert last["train_p"] == approx(log_p.exp().mean().item(), rel=1e-4)
    assert last["loss"] == approx(dco_loss(log_p, 50).mean().item(), rel=1e-4)


@parametrize("name, start, num_train", [("finetune", "multiply", 200), ("search", "prove", 20)])
def test_a_model_starts_as_cross_entropy_leaves_it(name, start, num_train, monkeypatch):
    """It has seen none of the test problems, whatever their number, and all else is as usual."""
    monkeypatch.setitem(TASKS[start].settings, "num_train", num_train)
    changes = few(name, num_test=4, start=start, start_epochs=3)
    shape = {key: changes[key] for key in ("n_layer", "n_head", "n_embd", "num_test")}
    first, _ = train(start, "ce", seed=3, epochs=3, evaluations=1, **shape)
    run, _ = train(name, "limited", 8, seed=3, **changes)
    assert run["history"][0]["p"] == first["history"][-1]["p"] and run["config"]["start"] == start
    with pytest.raises(ValueError, match="the model of cot does not fit"):
        train(name, **changes | {"start": "cot"})


OTHER = {"epochs": 3, "evaluations": 1, "batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.5, "eps": 1e-8,
         "n_layer": 2, "n_head": 4, "n_embd": 32, "num_train": 15, "num_test": 9}


@parametrize("name, changes", [("multiply", OTHER), ("prove", {"per_step": True})])
def test_every_setting_does_something(name, changes, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 0)
    usual = few(name, eps=1.0)
    run, _ = train(name, "limited", 8, **usual)
    for setting, value in changes.items():
        other, _ = train(name, "limited", 8, **usual | {setting: value})
        assert other["history"] != run["history"] and other["label"] != run["label"], setting


# ==== 8. What the reader is shown: from runs made by hand =================================================
#
# Two epochs, two temperatures and two test problems, so that every number can be worked out on paper.

RUN = json.loads("""
{"task": "multiply", "loss": "ce", "N": 1, "seed": 0, "label": "ce N=1", "config": {}, "num_samples": null,
 "history": [{"epoch": 0, "confidence": 0.1, "p": [[0.5, 0], [0.5, 0.5]]},
             {"epoch": 10, "confidence": 0.7, "p": [[0.25, 0.25], [0.5, 0.25]]}],
 "baselines": {"a guesser": [0.5, 0]}, "tries": [["1*1=0001", 2, ["0001", "0007", "0001"]]]}""")
OTHER_SEED = RUN | json.loads("""
{"seed": 1, "tries": [["a problem of another seed", 0, ["9"]]],
 "history": [{"epoch": 0, "confidence": 0.1, "p": [[0, 0], [0.5, 0.25]]},
             {"epoch": 10, "confidence": 0.9, "p": [[0.5, 0.5], [0.5, 0.25]]}]}""")
LIMITED = RUN | json.loads("""
{"loss": "limited", "N": 2, "label": "limited N=2", "tries": [["1*1=0001", 0, ["0003", "0005", "0005"]]],
 "history": [{"epoch": 0, "confidence": 0.1, "p": [[0, 0], [0.5, 0.25]]},
             {"epoch": 10, "confidence": 0.7, "p": [[1, 0.5], [0.5, 0.25]]}]}""")
ROWS = [[RUN, OTHER_SEED], [LIMITED]]


def test_the_table_and_the_tries(capsys):
    """The guesser's seeds are those of the row with the most; the tries are those of one seed."""
    passn.print_table(ROWS[::-1], 2)
    passn.print_tries(ROWS)
    assert capsys.readouterr().out == """\
            seeds     pass@1     pass@2     pass@8 confidence     best@2   & best T
limited N=2     1       .750       .875       .998       .700       .875       .875
ce N=1          2  .375±.125  .594±.156  .948±.048  .800±.100  .594±.156  .750±.000
a guesser       2  .250±.000  .375±.000  .498±.000
64 tries at the first three test problems, and how often the commonest came:
1*1=0001
  ce N=1: 2 right, 2 different; 0001 (2), 0007 (1)
  limited N=2: 0 right, 2 different; 0005 (2), 0003 (1)
"""


DRAWN = """
pass@2 on test problems: #D55E00ff .19 .59 | #0072B280 0 .88 | grey .59 .59 | grey .75 .75 | grey .38 .38
pass@1: #D55E00ff .12 .38 | #0072B280 0 .75
confidence (dotted: 1/2): #D55E00ff .8 | #0072B280 .7 | grey .5 .5
pass@n at the end / the best: #D55E00ff .5 .68 .84 .95 .99 1 1 1 1 1 | #0072B280 1 1 1 1 1 1 1 1 1 1
names: .88 limited N=2 | .75 the same, and best temperature | .59 ce N=1: best epoch | .53 ce N=1 | .38 a guesser
errors: .19 .16
epochs: 0 10
dots: 1 2"""


def test_the_figure():
    figure, n = passn.draw(ROWS, 2), 2 ** np.arange(10)
    text = lambda values: " ".join(f"{value:.2g}".removeprefix("0") or "0" for value in values)
    drawn = [[f"{line.get_color()} {text(line.get_ydata())}" for line in axis.lines] for axis in figure.axes]
    titles = [axis.get_title() for axis in figure.axes]
    first, *_, last = figure.axes
    names = [f"{text(name.get_position()[1:])} {name.get_text()}" for name in first.texts]
    bars = np.diff(first.collections[0].get_segments(), axis=1)[:, 0, 1] / 2
    dots = [n[line.get_markevery()][0] for line in last.lines]
    epochs = first.lines[0].get_xdata()
    drawn += [names, *([text(values)] for values in (bars, epochs, dots))]
    parts = zip([*titles, "names", "errors", "epochs", "dots"], drawn, strict=True)
    assert [f"{title}: {' | '.join(part)}" for title, part in parts] == DRAWN.strip().splitlines()


def test_the_theory():
    one, many, policies, confidence = passn.draw_theory(8).axes
    p = np.array(one.lines[0].get_xdata())
    mean = 8 * p * (1 - p) ** 7
    solved = 1 - (1 - p) ** 8
    formulas = 1 + 0 * p, p**0.5, p, mean / solved, mean / solved**0.5, mean
    for line, formula in zip((*one.lines, *many.lines), formulas, strict=True):
        assert line.get_ydata() == approx(formula, rel=1e-6, abs=1e-9)
    f, limited, root, best = (line.get_ydata() for line in policies.lines)
    assert f.sum() == approx(1)
    assert f[0] / f[9] == approx(10**1.2)
    assert limited == approx(limited_policy(f, 8)) and best == approx(optimal_policy(f, 8))
    assert root == approx(optimal_policy(f, 8, 0.5))
    for line in confidence.lines:
        assert line.get_markevery() == [np.argmax(line.get_ydata())]


def put(folder, table):
    """A file for each part of a text: the run by hand with these changes, or what stands there if it is none."""
    for i, part in enumerate(re.split(r" \| |\n", table)):
        text = json.dumps(RUN | json.loads(part)) if part.endswith("}") else part
        (folder / f"multiply-{i}.json").write_text(text)


def test_rows_differ_in_more_than_the_seed(tmp_path):
    put(tmp_path, """\
{"loss": "reward", "N": 8} | {"seed": 0} | {"seed": 1} | {"seed": 2} | {"config": {"eps": 0.5}} | {"task": "prove"}
{"history": [{"epoch": 0, "confidence": 0.1, "p": [[0, 0, 0]]}], "baselines": {}}
{"loss": "limited", "N": 64} | {"loss": "limited", "N": 8}""")
    rows = passn.load_runs(tmp_path, "multiply", {0, 1})
    shown = [f"{row[0]['loss']} {row[0]['N']}: {len(row)}" for row in rows]
    assert shown == ["ce 1: 1", "ce 1: 2", "ce 1: 1", "limited 8: 1", "limited 64: 1", "reward 8: 1"]


def test_a_damaged_file_is_named_and_costs_no_other(tmp_path, capsys):
    put(tmp_path, """\
{ | [] | null | {"history": []} | {"tries": []} | {"N": 0} | {"num_samples": 0}
{"history": [{"epoch": "x", "confidence": 0.1, "p": [[0]]}]}
{"history": [{"epoch": 0, "confidence": 0.1, "p": [[2]]}]}
{"history": [{"epoch": 0, "confidence": 0.1, "p": [[NaN]]}]} | {"seed": 0}""")
    os.mkfifo(tmp_path / "multiply-pipe.json")
    assert passn.load_runs(tmp_path, "multiply", {0}) == [[RUN]]
    named = re.findall(r"multiply-(\w+).json", capsys.readouterr().err)
    assert sorted(named) == [*"0123456789"]


def test_shares_of_samples_are_estimates_and_too_few_are_nan():
    run = RUN | {"num_samples": 8}
    want = estimate_pass_at_n(8, [4, 0], 4).mean().item(), 0.5, nan
    estimates = [pass_at(run, N)[0, 0] for N in (4, 8, 9)]
    assert estimates == approx(want, nan_ok=True)


# ==== 9. The command line =================================================================================

SMALL = "--epochs 2 --evaluations 2 --n-layer 1 --n-head 2 --n-embd 16 --num-train 100 --num-test 9".split()
RUNS = """
ce 1, limited 64: --seed 3
limited 64: --loss limited --N 64
ce 1, ce 1: --loss ce --seeds 2
ce 1, limited 8, limited 64, limited 512: --frontier
ce 1, limited 64, reward 1, reward 64: --loss limited reward --N 1 64
reward 1, reward 64: --task search"""
BAD = """
from 1: --N 0 | --epochs 0 | --seeds 0 | --seeds 99999999999 | --tries 0
from 0: --weight-decay nan | --seed -1
invalid choice: --loss x | --task x
arguments. --n: --nonsense | --num-traces 8
does nothing: --loss ce --pass-over 0.2 | --loss ce --N 8 | --frontier --loss ce | --start-epochs 5
does nothing: --task prove --loss ce --per-step
below 1: --pass-over 1
is no task: --start x
--theory trains nothing: --theory --tries 8 | --theory --frontier | --theory --N 1 | --theory --task search
Not a directory: --out passn.py/x"""


@parametrize("pairs, options", cases(RUNS))
def test_every_pair_is_a_run_and_cross_entropy_comes_once(pairs, options):
    _, jobs = passn.parse_arguments(options.split())
    assert ", ".join(f"{job['loss']} {job['N']}" for job in jobs) == pairs


@parametrize("hint, options", cases(BAD))
def test_bad_arguments_get_one_line(hint, options, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        passn.main(options.split())
    error = capsys.readouterr().err
    assert re.search(hint, error) and error.count("\n") == 1


@for_each_task
def test_every_setting_is_a_flag_with_its_comment_for_a_help(name, capsys):
    settings = SETTINGS | TASKS[name].settings
    for setting, usual in settings.items():
        value = f"{usual / 2 or 0.5}" if isinstance(usual, float) else "" if usual is False else f"{usual}2"
        value = "search" if setting == "start" else value
        options = f"--task {name} --start cot --loss ce limited reward --{setting.replace('_', '-')} {value}"
        _, jobs = passn.parse_arguments(options.split())
        changed = {job[setting] for job in jobs} - {usual}
        assert [*map(type, changed)] == [type(usual)], setting
    with pytest.raises(SystemExit, match="0"):
        passn.main(["--task", name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default: ") == len(settings | passn.OPTIONS)
    assert "blocks of the model (default: 2)" in text


def test_what_is_shown_has_the_commands_seeds_and_what_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    command = [*SMALL, "--out", str(tmp_path), "--seed"]
    assert passn.main([*command, "0", "--loss", "limited"]) == 0
    monkeypatch.setitem(LOSSES, "limited", lambda log_p, N: nan * log_p.sum())
    (tmp_path / "multiply.png").rename(tmp_path / "good.png")
    assert (tmp_path / "good.png").stat().st_size > 10_000
    (tmp_path / "multiply.png").mkdir()  # a figure that cannot be written
    with pytest.raises(SystemExit, match="2"):
        passn.main([*command, "1", "--loss", "ce", "limited", "--tries", "10"])
    said = capsys.readouterr()
    assert said.err.count("limited N=64, seed 1: diverged: try a smaller") == 1
    assert "Is a directory" in said.err.splitlines()[-1]
    shown = said.out[said.out.index("best@10"):]
    assert "cross-entropy" in shown and "64 tries" in shown and "limited" not in shown
    (tmp_path / "multiply.png").rmdir()
    assert passn.main([*command, "1"]) == 2


def until(condition):
    assert any(condition() or time.sleep(0.1) for _ in range(600))


def workers(program):
    """Their process ids."""
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def has_ended(pid):
    return not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """passn.py, started twice side by side, each with two runs of many epochs."""
    if not Path("/proc").exists() or os.cpu_count() == 1:
        pytest.skip("needs two cores and /proc")
    command = [sys.executable, ROOT / "passn.py", *SMALL, "--epochs", "100000", "--out"]
    started = [subprocess.Popen([*command, tmp_path_factory.mktemp("out")], stderr=subprocess.PIPE, text=True,
                                start_new_session=True) for _ in range(2)]
    yield started
    for program in started:
        with suppress(ProcessLookupError):  # it has ended, with all its workers
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


def test_ctrl_c_is_one_line_and_ends_every_process(programs):
    """As a terminal sends it, to all processes, while the workers start."""
    program = programs[0]
    until(lambda: len(workers(program)) == 2)
    both = workers(program)
    os.killpg(program.pid, signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 130
    assert errors.count("\n") == 2 and "\ninterrupted: in --out are" in errors
    until(lambda: all(map(has_ended, both)))


def test_workers_end_with_their_parent_and_not_with_each_other(programs):
    program = programs[1]
    until(lambda: len(workers(program)) == 2)
    first, second = workers(program)
    os.kill(first, signal.SIGKILL)
    until(lambda: has_ended(first))
    time.sleep(0.5)
    assert program.poll() is None and not has_ended(second)
    program.kill()
    until(lambda: has_ended(second))


def test_main_trains_here_unless_told_otherwise_and_without_standard_error(tmp_path, monkeypatch, capsys):
    """What calls it, such as a script from standard input, may not be there to be started again."""
    monkeypatch.setattr(passn.multiprocessing, "get_context", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert passn.main([*SMALL, "--out", str(tmp_path), "--loss", "ce", "--seeds", "2"]) == 0
    assert "best@64" in capsys.readouterr().out
    assert len([*tmp_path.glob("*.json")]) == 2


# ==== 10. The texts =======================================================================================


@parametrize("path, number", [("README.md", 7), ("exercises/README.md", 2), ("exercises/TEACHER.md", 0)])
def test_links_resolve_and_commands_parse(path, number):
    text = (ROOT / path).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(r"python (\w[\w/]+\.py)", text):
        assert any((folder / link).exists() for folder in (ROOT, (ROOT / path).parent)) or "my_" in link, link
    commands = {*re.findall(r"python passn\.py( --[^`#]*?)?(?=`| ```| python| #)", " ".join(text.split()))}
    for command in commands:
        if "--help" not in command and "TASK" not in command:
            passn.parse_arguments(command.replace("DIR", ".").split())
    assert len(commands) == number
