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
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import combinations, islice, product
from math import comb, inf, log, nan, prod
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
from toy_tasks import END, PAD, TACTICS, TASKS, solve

torch.set_num_threads(1)  # more gain nothing here, and wait for others
ROOT = Path(passn.__file__).parent
parametrize = pytest.mark.parametrize
TINY = {"epochs": 2, "evaluations": 2, "batch_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 16}
FEW = {"num_train": 10, "num_test": 3, "num_traces": 4}


def few(name, **more):
    """Settings of a task for a tiny model and few problems."""
    usual = SETTINGS | TASKS[name].settings
    return {key: value for key, value in (TINY | FEW | more).items() if key in usual}


def gradient_of(value, parameters):
    parts = torch.autograd.grad(value, [*parameters], retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def cases(table):
    """The pairs (what is right, case) of a text with lines "what is right: case | case"."""
    lines = [line.partition(": ") for line in table.strip().splitlines()]
    return [(right, case) for right, _, row in lines for case in row.split(" | ")]


# ==== 1. The paper in five tests ==========================================================================
#
# One oracle for pass@N, the losses, F and their gradients: decimal arithmetic of many digits.

NS = [1, 2, 8, 64, 1_000_000]
LOG_PS = [-2000, -200, -50.001, -50, -49.9, -20, -9, -4.1, -1, log(0.5), -0.1, -1e-3, -1e-6, 0]


def exact(log_p, N):
    """pass@N, L_N = -log pass@N, and F = N p (1 - p)^(N-1) / pass@N."""
    with localcontext(prec=1000, Emin=-10**9, Emax=10**9):
        p = Decimal(log_p).exp()
        fail = (1 - p) ** (N - 1) if N > 1 else Decimal(1)
        success = 1 - fail * (1 - p)
        return float(success), float(-success.ln()), float(N * p * fail / success)


@parametrize("N", NS)
def test_pass_at_n_is_exact(N):
    ps = ["0", "1e-12", "1e-6", "0.015625", "0.5", "0.999999", "1"]
    with localcontext(prec=60):
        want = [float(1 - (1 - Decimal(p)) ** N) for p in ps]
    assert pass_at_n([*map(float, ps)], N).tolist() == approx(want, rel=1e-12, abs=0)


@parametrize("N", NS)
def test_losses_are_exact_and_their_gradients_are_the_weights(N):
    """That of the limited loss is F times that of cross-entropy, also at p = 1 and where p underflows."""
    rounded = torch.tensor(LOG_PS)  # to float32, so that both precisions have the same p
    success, loss, factor = np.transpose([exact(x, N) for x in rounded.tolist()])
    for dtype, rel in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        log_p = rounded.to(dtype).requires_grad_()
        each, reward = dco_loss(log_p, N), reward_loss(log_p, N)
        F = overconfidence_factor(log_p.detach(), N)
        assert each.dtype == reward.dtype == F.dtype == dtype and reward.shape == ()
        assert each.tolist() == approx(loss, rel=rel, abs=1e-37)
        assert F.tolist() == approx(factor, rel=rel, abs=1e-37)
        assert reward.item() == approx(-success.mean(), rel=rel)
        pull = -gradient_of(each.sum(), [log_p])
        assert pull.tolist() == approx(factor, rel=10 * rel, abs=1e-30)
        pull = -gradient_of(reward * len(log_p), [log_p])
        assert pull.tolist() == approx(success * factor, rel=10 * rel, abs=1e-12)


def test_one_try_is_cross_entropy_and_an_n_for_each_example():
    logits, labels = torch.randn(50, 10), torch.randint(10, (50,))
    log_p = logits.log_softmax(dim=1)[torch.arange(50), labels]
    assert_close(LOSSES["ce"](log_p, 64), cross_entropy(logits, labels))
    assert torch.equal(dco_loss(log_p, 1), -log_p)
    assert (overconfidence_factor(log_p, 1) == 1).all()
    N = torch.tensor([1, 64, 8])
    for function in (dco_loss, overconfidence_factor):
        one_by_one = [*map(function, log_p[:3, None], N.tolist())]
        assert torch.equal(function(log_p[:3], N), torch.cat(one_by_one))


@parametrize("power", [1, 0.5, 0])
@parametrize("N", [2, 8, 64, 100_000])
def test_no_policy_beats_the_one_that_a_loss_tends_to(N, power):
    """Every answer in use has the same marginal gain, and one that gets nothing would gain less."""
    pick = np.random.default_rng(N)
    for f in (pick.dirichlet(np.ones(10)), pick.dirichlet(np.full(200, 0.05)), [5, 3, 2, 1]):
        q = optimal_policy(f, N, power)
        assert q.sum() == approx(1) and q.min() >= 0
        success = np.maximum(1 - (1 - q) ** N, 1e-300)
        gain = f * (1 - q) ** (N - 1) * success ** (power - 1)
        used = q > 1e-9
        assert gain[used] == approx(gain[used].max(), rel=1e-3)
        assert power < 1 or np.all(gain[~used] <= gain[used].max())


def test_the_effect_in_miniature():
    """Cross-entropy's pass@64 falls as it grows confident; the limited loss's stays, and ends above all of it."""
    small = {"num_train": 300, "num_test": 300, "epochs": 50, "evaluations": 5, "batch_size": 25, "n_layer": 1,
             "learning_rate": 3e-3}
    ce, limited = (train("multiply", loss, 64, **small)[0] for loss in ("ce", "limited"))
    ce_64, limited_64 = pass_at(ce, 64)[:, 0], pass_at(limited, 64)[:, 0]
    assert ce_64[-1] < 0.7 * max(ce_64)
    assert limited_64[-1] > max(ce_64) and limited_64[-1] > 0.85 * max(limited_64)
    assert limited["history"][-1]["confidence"] < 0.5 * ce["history"][-1]["confidence"]


# ==== 2. The other numbers ================================================================================


def test_pass_at_n_takes_rounding_errors_and_keeps_nan():
    assert pass_at_n(torch.tensor([-1e-7, 1 + 1e-7]), 1_000_000).tolist() == [0, 1]
    values = pass_at_n([nan, 0.5], [8, 2])
    assert values[0].isnan() and values[1] == 0.75 and pass_at_n([], 8).tolist() == []


@parametrize("n, c, N", [(12, 3, 5), (8, 8, 3), (8, 0, 3), (8, 1, 8), (1, 1, 1), (300, 255, 64)])
def test_estimates_are_those_of_fractions(n, c, N):
    estimate = 1 - Fraction(comb(n - c, N), comb(n, N))
    weight = Fraction(N, n) * Fraction(comb(n - c, N - 1), comb(n - 1, N - 1)) * (c > 0)
    assert estimate_pass_at_n(n, c, N).item() == approx(float(estimate), rel=1e-12)
    assert pass_at_n_weights(n, c, N).item() == approx(float(weight), rel=1e-11)


@parametrize("n, N", [(1, 1), (4, 1), (5, 3), (6, 6), (300, 64)])
def test_estimates_are_unbiased(n, N):
    """Over all outcomes of n tries: that of pass@N, and that of its gradient for log p, N p (1 - p)^(N-1)."""
    p, c = 0.07, torch.arange(n + 1)
    chance = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    mean = lambda values: np.dot(chance, values.numpy())
    assert mean(estimate_pass_at_n(n, c, N)) == approx(1 - (1 - p) ** N)
    assert mean(c * pass_at_n_weights(n, c, N)) == approx(N * p * (1 - p) ** (N - 1))


class Column:
    """What numpy takes for an array and torch does not, as a filtered column of pandas."""
    def __array__(self, dtype=None, copy=None):
        return np.array([10, 20], dtype=dtype)


@parametrize("function", [estimate_pass_at_n, pass_at_n_weights])
def test_counts_of_any_kind_and_a_number_for_each_problem(function):
    n, N, c = [10, 20, 40], [1, 4, 40], torch.tensor([2, 5, 0], dtype=torch.uint8)
    one_by_one = [*map(function, n, c.tolist(), N)]
    assert torch.equal(function(torch.tensor(n), c, N), torch.stack(one_by_one))
    assert function(8, c[:, None], [4, 5]).shape == (3, 2) and function(7, [], 3).shape == (0,)
    assert torch.equal(function(Column(), [2, 5], 4), function(n[:2], c[:2], 4))


x = torch.tensor([-1.0])
REFUSED = """
probability: pass_at_n(1.1, 8) | pass_at_n(-0.1, 8)
1 or more: pass_at_n(0.5, 0) | pass_at_n(0.5, nan) | pass_at_n_weights(8, 1, 0) | dco_loss(x, 0.5)
1 or more: overconfidence_factor(x, nan) | optimal_policy([0.5, 0.5], 0)
draw at least: estimate_pass_at_n(10, 1, 11) | pass_at_n_weights(8, 1, 64)
num_correct: estimate_pass_at_n(10, 11, 2) | estimate_pass_at_n(10, -1, 2) | estimate_pass_at_n(10.5, 1, 2)
num_correct: pass_at_n_weights(5, 0.5, 2) | pass_at_n_weights(5, -1, 2)
sign: dco_loss(-x, 64) | overconfidence_factor(-x, 64) | reward_loss(-x, 8)
floating: dco_loss(x.long(), 64)
not all 0: optimal_policy([0.0, 0.0], 8) | limited_policy([0.5, -0.1], 8) | limited_policy([0.5, nan], 8)
N = : train("multiply", "limited", "8") | train("multiply", "limited", None) | train("multiply", "limited", 2.5)
seed = -1: train("multiply", "ce", seed=-1)
epochs = : train("multiply", epochs=0) | train("multiply", epochs=1.5)
 = : train("multiply", eps=nan) | train("multiply", learning_rate="1e-3") | train("prove", per_step="False")
below 1: train("multiply", pass_over=1)
90 training examples: train("multiply", num_train=90)
4095 problems: TASKS["multiply"](0, num_train=4000)
num_train = '8': TASKS["multiply"](0, num_train="8")"""


@parametrize("hint, call", cases(REFUSED))
def test_what_cannot_be_is_refused(hint, call):
    with pytest.raises(ValueError, match=hint):
        eval(call)


def test_policies_at_their_limits_and_confidence():
    f = [0.5, 0.3, 0.2, 0]
    assert optimal_policy(f, 1) == approx([1, 0, 0, 0], abs=1e-5)
    assert optimal_policy([2, 2, 1], 1) == approx([0.5, 0.5, 0], abs=1e-5)
    assert optimal_policy(f, 1_000_000) == approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-5)
    assert limited_policy([50, 30, 20, 0], 1) == approx(f, abs=1e-7)  # of any scale
    want = 0.6 * (1 - 0.7**4) + 0.4 * (1 - 0.3**4)  # of two candidates the favourite has .3
    assert passn.confident_pass_at_n(0.3, 4, 0.6, 2).item() == approx(want)


# ==== 3. The model ========================================================================================


def small_model(vocab_size=7, block_size=12, n_layer=3, n_embd=32):
    """Random weights, large enough that the answers are far from uniform."""
    torch.manual_seed(0)
    model = GPT(vocab_size, block_size, n_layer, 2, n_embd)
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
    model, tokens = small_model(), torch.randint(7, (5, 12))
    plain, last = plain_logits(model, tokens), model.read(tokens, 4)[0]
    past, pieces = None, []
    for piece in tokens.split([5, 3, 1, 3], dim=1):
        logits, past = model.read(piece, 0, past)
        pieces.append(logits)
    assert_close(model(tokens), plain, rtol=0, atol=1e-5)
    assert_close(last, plain[:, -4:], rtol=0, atol=1e-5)
    assert_close(torch.cat(pieces, dim=1), plain, rtol=0, atol=1e-5)
    ours, theirs = (gradient_of(logits.square().sum(), model.parameters()) for logits in (last, plain[:, -4:]))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


@torch.no_grad()
def test_p_at_a_temperature_and_the_greedy_answer():
    """The likeliest token after the likeliest token; behind END comes padding, which does not count in p."""
    model, prompts, T = small_model(), torch.randint(2, 7, (40, 5)), torch.tensor([1.0, 2.5])
    answers = model.sample(prompts, 3, temperature=0)
    assert torch.equal(model.sample(prompts, 3, 0, number=2), answers.repeat_interleave(2, dim=0))
    log_p = model.log_p(prompts, answers, T.tolist())
    assert_close(model.log_p(prompts, answers), log_p[0])
    for prompt, answer, want in zip(prompts, answers, log_p.T):
        tokens, sum_of_logs = prompt, torch.zeros(2)
        while len(tokens) < 8 and END not in tokens[5:]:
            logits = model(tokens[None])[0, -1]
            tokens = torch.cat([tokens, logits.argmax()[None]])
            sum_of_logs += (logits / T[:, None]).log_softmax(dim=1)[:, tokens[-1]] * (tokens[-1] != PAD)
        padding = answer[len(tokens) - 5:]
        assert torch.equal(torch.cat([tokens[5:], 0 * padding]), answer)
        assert_close(sum_of_logs, want, rtol=1e-4, atol=1e-4)
    assert (answers == PAD).any() and model.sample(prompts[:0], 3).shape == (0, 3)


def test_the_first_weights():
    model = GPT(40, 40)
    assert model.head.weight.std().item() == approx(0.03, rel=0.1)
    assert (model.blocks[0].query.bias == 0).all()


# ==== 4. The tasks ========================================================================================
#
# Three tests of the interface for all, then what is special to each.


def small_task(name, folder, **more):
    """A task with few problems, and a small model for it."""
    for split in ("train", "test"):
        lines = [json.dumps({"problem": f"What is {n}?", "solution": rf"\boxed{{{n % 3}}}"}) for n in range(9)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    task = TASKS[name](0, **{"math_dir": str(folder)} | FEW | more)
    return task, task.new_model(GPT, 1, 2, 16)


@parametrize("name", [*TASKS])
def test_p_is_the_share_of_right_tries_and_the_confidence_that_of_the_greedy_one(name, tmp_path):
    draws, (task, model) = 3000, small_task(name, tmp_path)
    if name in ("multiply", "cot", "math"):  # else p is too small to be seen
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss = -model.log_p(*task.train).mean() - model.log_p(*task.test).mean()
            loss.backward()
            optimizer.step()
    task.num_samples = task.num_samples and draws
    with torch.no_grad():
        p, confidence = task.measure(model)
        shown = task.show_tries(model, draws)
    assert p.shape == (len(task.temperatures), len(confidence)) and len(shown) == 3
    for at_1, sure, (problem, num_right, tries) in zip(p[0].tolist(), confidence.tolist(), shown):
        assert num_right / draws == approx(at_1, abs=4.5 * (at_1 / draws) ** 0.5 + 1e-3)
        right = re.split("[?=:]", problem)[-1]
        assert num_right == (draws - tries.count("no proof") if "⊢" in problem else tries.count(right))
        commonest = Counter(tries).most_common(1)[0][1] / draws
        assert 0 < sure <= commonest + 0.03 or "no proof" in tries


@torch.no_grad()
@parametrize("name", [*TASKS])
def test_hot_tries_are_those_of_a_model_with_smaller_logits(name, tmp_path):
    task, model = small_task(name, tmp_path)
    task.temperatures, task.num_samples = (1.0, 4.0), task.num_samples and 4000
    for parameter in model.parameters():
        parameter *= 4
    p, _ = task.measure(model)
    model.head.weight /= 4
    hot, _ = task.measure(model)
    assert_close(p[1], hot[0], rtol=1e-4, atol=0.03 if name == "cot" else 0)
    assert (p[1] / p[0] - 1).abs().max() > 0.1 or name == "cot"


@parametrize("name", [*TASKS])
def test_equal_seeds_give_equal_runs_and_leave_the_callers_random_numbers(name, tmp_path):
    small_task(name, tmp_path)  # which writes the folder
    loss, runs = TASKS[name].axes["loss"][-1], []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        run, _ = train(name, loss, 4, seed, tmp_path, **few(name, math_dir=str(tmp_path)))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)  # whatever else is drawn
        runs.append(without_times(run))
    assert runs[0] == runs[1] and runs[0]["history"] != runs[2]["history"]
    assert pass_at(runs[0], 2).shape == (3, len(runs[0]["temperatures"]))
    (row,) = passn.load_runs(tmp_path, name, {0, 1})
    assert [run["seed"] for run in row] == [0, 1]


def without_times(run):
    for record in run["history"]:
        assert 0 <= record.pop("seconds") < 60
    return run


@parametrize("name", ["multiply", "cot"])
def test_products_are_right_and_no_pair_of_factors_comes_twice(name):
    task, pairs, orders = TASKS[name](3, num_train=700, num_test=500), set(), Counter()
    prompts, answers = (map(task.text, torch.cat(both)) for both in zip(task.train, task.test))
    for prompt, answer in zip(prompts, answers):
        a, b = map(int, re.findall(r"\d\d", prompt))
        pairs.add(frozenset((a, b)))
        parts = [a * (b - b % 10), a * (b % 10)]
        work, _, total = answer.rpartition("=")
        assert int(total) == a * b
        assert name == "multiply" or sorted(map(int, work.split("+"))) == sorted(parts)
        orders[a > b, work[:4] == f"{parts[0]:04d}"] += 1
    assert len(pairs) == 1200 and min(orders.values()) > 200 and len(orders) == (4 if name == "cot" else 2)
    assert len(TASKS["multiply"]().train[0]) == 2000


def test_a_traces_p_is_the_given_one_and_the_share_of_other_right_ones(tmp_path):
    """Of four sampled traces one is the given one, one is another that is right, and two are wrong."""
    task, model = small_task("cot", tmp_path)
    prompts, given = task.train
    other, wrong = given.clone(), given.clone()
    other[:, 0], wrong[:, -1] = (other[:, 0] + 1) % 16, (wrong[:, -1] + 1) % 16
    draws = iter([[given, other, wrong, wrong], [given] * 4])
    sampler = SimpleNamespace(sample=lambda *_: torch.stack(next(draws), dim=1).flatten(0, 1))
    batch = torch.tensor([3, 1, 4])
    p_given = model.log_p(prompts[batch], given[batch])
    for epoch, share in ((0, 0.25), (1, 0.25), (2, 0)):  # sampled anew in every second epoch
        task.refresh(sampler, epoch)
        log_p = task.log_p(model, batch)
        assert_close(log_p.exp(), p_given.exp() + share)
        assert_close(gradient_of(log_p.sum(), model.parameters()), gradient_of(p_given.sum(), model.parameters()))


def test_a_steps_p_is_that_of_its_theorem_and_pulls_on_the_step(tmp_path):
    task, model = small_task("prove", tmp_path)
    batch, (theorem, row, tactic) = torch.arange(task.size), task.steps.T
    policy = toy_tasks.log_policy(model, task.table)
    steps = policy[row, tactic]
    task.refresh(model, 0)
    log_p = task.log_p(model, batch)
    assert_close(log_p, toy_tasks.proof_p(policy.exp(), task.table)[theorem].log())
    assert_close(gradient_of(log_p.sum(), model.parameters()), gradient_of(steps.sum(), model.parameters()))
    with torch.no_grad():
        assert_close(task.log_p(model, batch), log_p)
    task.per_step = True
    assert_close(task.log_p(model, batch), steps)


# ==== 5. Theorems and proofs ==============================================================================


def small_theorem(pick):
    def formula(depth):
        return pick.choice("ab") if depth == 0 or pick.random() < 0.4 else (formula(depth - 1), formula(depth - 1))
    return tuple(dict.fromkeys(formula(2) for _ in range(2))), formula(2)


def derivable(hypotheses, goal):
    """Natural deduction by brute force: all sequents over the theorem's subformulas, until nothing new follows."""
    def parts(formula):
        return {formula} if isinstance(formula, str) else {formula}.union(*map(parts, formula))
    universe = set().union(*map(parts, (*hypotheses, goal)))
    contexts = {frozenset({*hypotheses, *c}) for n in range(len(universe) + 1) for c in combinations(universe, n)}
    known = {(c, formula) for c in contexts for formula in c}
    implications = [(c, f, *f) for c in contexts for f in universe if not isinstance(f, str)]
    while True:
        new = {(c, f) for c, f, premise, conclusion in implications if (c | {premise}, conclusion) in known}
        new |= {(c, conclusion) for c, f, premise, conclusion in implications if {(c, f), (c, premise)} <= known}
        if new <= known:
            return (frozenset(hypotheses), goal) in known
        known |= new


def test_the_kernel_proves_what_can_be_derived_and_nothing_else():
    """And what is provable has no countermodel by truth table."""
    pick, counts = random.Random(1), Counter()
    peirce = (), ((("a", "b"), "a"), "a")  # true by truth table, but not provable without the excluded middle
    for theorem in [peirce, *(small_theorem(pick) for _ in range(200))]:
        provable = derivable(*theorem)
        assert (solve(theorem, 12)[0] != []) == provable, theorem
        worlds = ~toy_tasks.truth(theorem[1])
        for hypothesis in theorem[0]:
            worlds &= toy_tasks.truth(hypothesis)
        assert not (provable and worlds)
        counts[provable] += 1
    assert min(counts.values()) > 40 and not derivable(*peirce)
    assert toy_tasks.apply_tactic((("a",), ("a", "b")), "i") == ((("a",), "b"),)  # no hypothesis comes twice


def all_proofs(state, chance_of, depth=toy_tasks.MAX_DEPTH):
    """Every proof of a state as its probability and its number of tactics, by enumeration."""
    for tactic, left in toy_tasks.tactics(state).items() if depth else ():
        for parts in product(*(all_proofs(part, chance_of, depth - 1) for part in left)):
            chances, steps = zip(*parts) if parts else ((), ())
            yield chance_of(state, tactic) * prod(chances), 1 + sum(steps)


@pytest.fixture(scope="module")
def proofs():
    """Twelve theorems, a table of them all, and the logits of a random policy."""
    theorems, _ = toy_tasks.draw_theorems(5, 12, 0)
    table = toy_tasks.join(map(toy_tasks.table_of, theorems))
    torch.manual_seed(0)
    return theorems, table, 2 * torch.randn(len(table.goals), len(TACTICS), dtype=torch.float64)


def policy_of(table, logits):
    does_not_apply = table.subgoals[..., 0] == toy_tasks.NO_TACTIC
    return logits.masked_fill(does_not_apply, -inf).softmax(dim=-1)


def test_p_its_gradient_and_the_shortest_proof_are_those_of_all_proofs_one_by_one(proofs):
    """Where a theorem's proofs are few. Blind search and the surest attempt come from the same recursion."""
    theorems, table, logits = proofs
    leaf, checked = logits.clone().requires_grad_(), 0
    policy, uniform = policy_of(table, leaf), policy_of(table, 0 * logits)
    blind = [solve(theorem)[1] for theorem in theorems]
    assert toy_tasks.proof_p(uniform, table).tolist() == approx(blind)
    surest = one_hot(uniform.argmax(dim=1), len(TACTICS)).double()
    assert toy_tasks.proof_p(surest, table, failure=1.0).tolist() == [1.0] * 12
    for theorem, p, start in zip(theorems, toy_tasks.proof_p(policy, table), table.theorems.tolist()):
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


def proves(state, proof):
    """Whether nested tuples, such as ("D", ("A",), ("i", ("B",))), are a proof, by the kernel."""
    subgoals = toy_tasks.apply_tactic(state, proof[0])
    return len(subgoals) == len(proof) - 1 and all(map(proves, subgoals, proof[1:]))


def test_attempts_succeed_as_often_as_they_should_and_prove(proofs):
    theorems, table, logits = proofs
    policy, found = policy_of(table, logits), 0
    for theorem, row, p in zip(theorems, table.theorems.tolist(), toy_tasks.proof_p(policy, table).tolist()):
        tries = [toy_tasks.attempt(policy, table, row) for _ in range(500)]
        assert 1 - tries.count(None) / 500 == approx(p, abs=4.5 * (p / 500) ** 0.5)
        for text in {*tries} - {None}:  # "D(A, i(B))"
            nested = re.sub(r"(\w)(\(?)", lambda m: f"('{m[1]}', " + ")" * (not m[2]), text)
            assert proves(theorem, eval(nested))
            found += 1
    assert found > 1


def test_a_state_reads_the_same_alone_and_beside_others(proofs):
    """Sets of hypotheses are read once, for all their goals; the model sees all of a state."""
    _, table, _ = proofs
    rows = torch.tensor([5, 0, 5, 40])
    model = small_model(len(toy_tasks.PROOF_VOCAB), toy_tasks.MAX_HYPOTHESES + toy_tasks.MAX_GOAL, 2)
    texts = torch.cat([table.hypotheses[table.set_of], table.goals], dim=1)
    whole = policy_of(table, model(texts)[:, -1, 2:2 + len(TACTICS)].double())
    for some in (slice(None), rows):
        assert_close(toy_tasks.log_policy(model, table, some).exp(), whole[some], rtol=1e-4, atol=1e-5)
    text = toy_tasks.hypotheses_text(((("a", "b"), ("c", "d")), "a"))
    assert text == "(a→b)→c→d A  a B  "
    assert toy_tasks.padded(toy_tasks.without_spaces(text), 11) == ["<pad>"] * 2 + [*"(ab)cdAaB"]


def test_theorems_are_hard_distinct_and_the_same_for_the_same_seed():
    drawn = toy_tasks.draw_theorems(3, 15, 5)
    toy_tasks.draw_theorems.cache_clear()
    assert drawn == toy_tasks.draw_theorems(3, 15, 5) != toy_tasks.draw_theorems(4, 15, 5)
    blind = [solve(theorem)[1] for theorem in drawn[0] + drawn[1]]
    assert 0 < min(blind) and max(blind) <= toy_tasks.MAX_BLIND
    forms = {(frozenset(hypotheses), goal) for hypotheses, goal in drawn[0] + drawn[1]}
    assert len(forms) == 20 and max(len(hypotheses) for hypotheses, _ in forms) == 8
    assert TASKS["search"](3, num_train=15, num_test=5).baselines(None) == {"blind search": blind[15:]}


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
5: \boxed{5}. Now \boxed is a word | \boxed{5}_6
17: \boxed {17}
None: \boxed{512}\,i | $\boxed{5},000$ | $\frac{\boxed{3}}{4}$ | $\frac{3}{\boxed{4}}$ | $-\boxed{5}$ | \boxed{5}.5
None: -$\boxed{5}$ | $1,\boxed{500}$ | $\boxed{5}{,}000$ | $\boxed{3}\frac12$ | $\boxed{3} \times 10^3$ | $\sqrt{\boxed{5}}$
None: $35\boxed{680}$ | $2/\boxed{3}$ | $\boxed{3}/4$ | $\boxed{2}\sqrt{3}$ | $\boxed{2}\pi$
45: \boxed{45}^\circ
21: \boxed{21}\text{ cm}
19: \boxed{19}x^3
6: $\boxed{6}$ in all
12: $x=\boxed{12}, y=3$"""


@parametrize("integer, solution", cases(BOXES))
def test_the_answer_is_what_all_boxes_hold_and_does_not_go_on_outside(integer, solution):
    assert str(toy_tasks.integer_answer(solution)) == integer


def problems(**answers):
    return [{"problem": question, "solution": f"It is $\\boxed{{{answer}}}$."} for question, answer in answers.items()]


MATH = {
    "train": problems(**{"What is $1+1$?": 2, "What is $2+3$?": 5, "Find $x$ in $x=2$.": 2, "[asy] a picture": 3,
                         "word " * 65: 4, "A half?": r"\frac12"}),
    "test": problems(**{"What is $3-1$?": 2, "What is $-3-4$?": -7, "Unheard of: 2+3?": 5})}


def test_math_keeps_short_questions_and_reads_all_releases_alike(tmp_path, monkeypatch):
    """Files whose names begin with a dot are no data; ~ is the home folder."""
    for split, examples in MATH.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, examples)) + "\n")
        files = {f"algebra/{i}.json": json.dumps(example, indent=4) for i, example in enumerate(examples, 1)}
        for name, text in (files | {"algebra/._1.json": "no data", ".old/1.json": "no data"}).items():
            path = tmp_path / "release" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    load_dataset = lambda name, subject, split: MATH[split] if subject == "algebra" else []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HOME", str(tmp_path))
    task, *others = (TASKS["math"](0, math_dir=folder) for folder in (str(tmp_path), "~/release", ""))
    assert [*map(task.text, task.train[1])] == ["2", "5", "2"]
    assert [*map(task.text, task.test[1])] == ["2", "-7", "5"]
    assert task.text(task.train[0][0]) == "Whatis$1+1$?" and "<unk>" in task.text(task.test[0][2])
    assert task.train[1][0].tolist()[1:] == [END, PAD, PAD, PAD] and task.train[0][0, 0] == PAD
    by_frequency, best = task.baselines(optimal_policy).values()  # 2 is right in 2/3, 5 in 1/3, -7 never
    q = optimal_policy([2, 1], 64)
    assert by_frequency == approx([2 / 3, 0, 1 / 3]) and best == approx([q[0], 0, q[1]])
    for other in others:
        assert all(map(torch.equal, (*task.train, *task.test), (*other.train, *other.test)))


@parametrize("content, hint", [("{", "train.jsonl"), ("[]", "train.jsonl"), ("", "no MATH"), (json.dumps(MATH["train"][3]), "no short")])
def test_what_is_not_math_is_refused(content, hint, tmp_path):
    (tmp_path / "train.jsonl").write_text(content)
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
    for loss, seed, changes in (("limited", 0, {}), ("limited", 0, {"pass_over": 0.0}), ("reward", 0, {}),
                                ("ce", 0, {}), ("ce", 1, {})):
        seen.clear()
        run, _ = train("multiply", loss, 64, seed, **sizes, **changes)
        assert len(seen) == run["history"][-1]["updates"] and {*map(len, seen)} == {20}
        orders.append([*seen])
    passed, *others = orders
    assert len(passed) == 9 and all(i % 2 for batch in passed for i in batch)
    assert [*map(len, others)] == [19] * 4 and others[0] == others[1] == others[2] != others[3]
    assert sorted(others[0][0]) != others[0][0]


def test_an_example_that_is_no_longer_solved_pulls_again(monkeypatch):
    p = iter([0.9] * 20 + [1e-3] * 1000)
    seen = p_is(monkeypatch, lambda batch: torch.full((len(batch),), next(p)))
    train("multiply", "limited", 64, **few("multiply", epochs=20))
    assert 0 < len(seen) < 40


def test_a_run_is_as_described(tmp_path):
    changes = few("multiply", num_train=600, evaluations=3, epochs=5, batch_size=50)
    run, model = train("multiply", "limited", 50, 0, tmp_path / "new", weight_decay=1, **changes)
    (path,) = (tmp_path / "new").iterdir()
    assert json.loads(path.read_text()) == json.loads(json.dumps(run)) and path.stat().st_size < 1e6
    assert re.fullmatch("multiply-limited-N=50-epochs=5-.*num_test=3-seed0.json", path.name)
    assert run["label"].startswith("limited N=50, epochs=5, evaluations=3, ")
    assert {*run} == {"task", "loss", "N", "seed", "label", "config", "num_samples", "temperatures", "history",
                      "baselines", "tries"}
    assert run["config"].keys() == (SETTINGS | TASKS["multiply"].settings).keys()
    assert [record["epoch"] for record in run["history"]] == [0, 2, 4, 5]
    last, task = run["history"][-1], TASKS["multiply"](0, **changes)
    p = model.log_p(*task.test, (1.0, 2.5)).exp().tolist()
    assert [last["p"][0], last["p"][-1]] == [approx(values, rel=1e-5) for values in p]
    log_p = model.log_p(*task.train)[:500].detach()  # of at most 500 training examples
    assert last["train_p"] == approx(log_p.exp().mean().item(), rel=1e-4)
    assert last["loss"] == approx(dco_loss(log_p, 50).mean().item(), rel=1e-4)


def test_the_tries_shown_are_the_trained_models():
    run, _ = train("multiply", "ce", **few("multiply", epochs=60, learning_rate=1e-2, batch_size=2))
    assert max(Counter(tries).most_common(1)[0][1] for _, _, tries in run["tries"]) > 10


OTHER = {"epochs": 3, "evaluations": 1, "batch_size": 7, "learning_rate": 1e-2, "weight_decay": 0.5, "eps": 1e-8,
         "n_layer": 2, "n_head": 4, "n_embd": 32, "num_train": 15, "num_test": 9}


@parametrize("name, changes", [("multiply", OTHER), ("prove", {"per_step": True})])
def test_every_setting_does_something(name, changes):
    usual = few(name, eps=1.0)
    run = without_times(train(name, "limited", 8, **usual)[0])
    for setting, value in changes.items():
        other = without_times(train(name, "limited", 8, **usual | {setting: value})[0])
        assert other["history"] != run["history"] and other["label"] != run["label"], setting


def test_the_learning_rate_rises_over_a_twentieth_of_training_and_falls_to_a_tenth():
    rates = [passn.schedule(i / 1000) for i in range(1001)]
    peak = rates.index(max(rates))
    assert (rates[0], rates[peak], peak, rates[-1]) == approx((0.01, 1, 50, 0.1), rel=0.02)


# ==== 8. What the reader is shown: from runs made by hand =================================================
#
# Two epochs, two temperatures and two test problems, so that every number can be worked out on paper.


def run_by_hand(loss="ce", N=1, seed=0, p=((0.5, 0.0), (0.25, 0.25)), confidence=(0.1, 0.7), **more):
    """p at temperature 1 in both epochs; at temperature 2 it is (.5, .25) in both."""
    history = [{"epoch": 10 * i, "confidence": confidence[i], "p": [p[i], (0.5, 0.25)]} for i in (0, 1)]
    return {"task": "multiply", "loss": loss, "N": N, "seed": seed, "label": f"{loss} N={N}", "config": {},
            "num_samples": None, "history": history, "baselines": {"a guesser": [0.5, 0.0]},
            "tries": [["1*1=0001", 2, ["0001", "0007", "0001"]]]} | more


@pytest.fixture
def rows():
    """Cross-entropy with two seeds, the limited loss with one. pass@1, pass@2 of p = .25: .25, .4375; .5: .5, .75."""
    ce = run_by_hand(), run_by_hand(seed=1, p=((0.0, 0.0), (0.5, 0.5)), confidence=(0.1, 0.9))
    tries = [["1*1=0001", 0, ["0003", "0005", "0005"]]]
    return [[*ce], [run_by_hand("limited", 2, p=((0.0, 0.0), (1.0, 0.5)), tries=tries)]]


def test_the_table_and_the_tries(rows, capsys):
    """The tries are those of one seed."""
    passn.print_table(rows, 2)
    rows.append([run_by_hand("reward", seed=7, tries=[["a problem of another seed", 0, ["9"]]])])
    passn.print_tries(rows)
    assert capsys.readouterr().out == """\
            seeds     pass@1     pass@2     pass@8 confidence     best@2   & best T
ce N=1          2  .375±.125  .594±.156  .948±.048  .800±.100  .594±.156  .672±.078
limited N=2     1       .750       .875       .998       .700       .875       .875
a guesser       2  .250±.000  .375±.000  .498±.000
64 tries at the first three test problems, and how often the commonest came:
1*1=0001
  ce N=1: 2 right, 2 different; 0001 (2), 0007 (1)
  limited N=2: 0 right, 2 different; 0005 (2), 0003 (1)
"""


def test_the_figure(rows):
    figure, n = passn.draw(rows, 2), 2 ** np.arange(10)
    ce, limited = ((1 - 0.75**n) + (1 - 0.5**n)) / 2, (1 + (1 - 0.5**n)) / 2
    want = {
        "pass@2 on test problems": [[0.1875, 0.59375], [0, 0.875], [0.59375] * 2, [0.671875] * 2, [0.375] * 2],
        "pass@1": [[0.125, 0.375], [0, 0.75]],
        "confidence (dotted: 1/2)": [[0.8], [0.7], [0.5, 0.5]],
        "pass@n at the end / the best": [ce / limited, limited / limited]}
    drawn = {axis.get_title(): [[*line.get_ydata()] for line in axis.lines] for axis in figure.axes}
    assert drawn == {title: [approx([*ys]) for ys in lines] for title, lines in want.items()}
    large = figure.axes[0]
    assert [[*line.get_xdata()] for line in large.lines[:2]] == [[0, 10]] * 2
    bars = [bar[1][1] - bar[0][1] for bar in large.collections[0].get_segments()]
    assert bars == approx([2 * 0.1875, 2 * 0.15625])  # ± a standard error
    names = sorted((text.get_position()[1], text.get_text(), text.get_color()) for text in large.texts)
    heights, labels, colors = zip(*names)
    assert labels == ("a guesser", "ce N=1", "ce N=1: best epoch", "the same, and best temperature", "limited N=2")
    assert colors[0] == colors[2] == "grey" and min(np.diff(heights)) > 0.059  # none over another
    assert colors[1] == passn.COLORS["ce"] + "ff" and colors[4].startswith(passn.COLORS["limited"])


def test_the_theory():
    one, many, policies, confidence = passn.draw_theory(8).axes
    p = np.array(one.lines[0].get_xdata())
    mean = 8 * p * (1 - p) ** 7
    formulas = 1 + 0 * p, p, mean / (1 - (1 - p) ** 8), mean
    for line, formula in zip((*one.lines, *many.lines), formulas, strict=True):
        assert line.get_ydata() == approx(formula, rel=1e-6, abs=1e-9)
    f, limited, best = (line.get_ydata() for line in policies.lines)
    assert f.sum() == approx(1) and f[0] / f[9] == approx(10**1.2)
    assert limited == approx(limited_policy(f, 8)) and best == approx(optimal_policy(f, 8))
    for line in confidence.lines:
        assert line.get_markevery() == [np.argmax(line.get_ydata())]


def put(folder, name, run):
    (folder / f"multiply-{name}.json").write_text(run if isinstance(run, str) else json.dumps(run))


def test_rows_differ_in_more_than_the_seed(tmp_path):
    three = run_by_hand(baselines={})
    for record in three["history"]:
        record["p"] = [[0.5, 0.0, 0.0]] * 2  # three test problems
    others = [{"seed": 1}, {"seed": 2}, {"config": {"eps": 0.5}}, {"task": "prove"}, {"loss": "limited", "N": 64},
              {"loss": "limited", "N": 8}]
    for i, run in enumerate([run_by_hand(), three, *(run_by_hand(**change) for change in others)]):
        put(tmp_path, i, run)
    rows = passn.load_runs(tmp_path, "multiply", {0, 1})
    assert sorted(map(len, rows)) == [1, 1, 1, 1, 2]
    assert [row[0]["label"] for row in rows] == ["ce N=1"] * 3 + ["limited N=8", "limited N=64"]


@parametrize("damage", ["{", "[]", "null", {"history": []}, {"tries": []}, {"N": 0}, {"num_samples": 0},
                        {"confidence": ("x", 1)}, {"p": ((0, 2), (0, 0))}, {"p": ((0, nan), (0, 0))}])
def test_a_damaged_file_is_named_and_costs_no_other(damage, tmp_path, capsys):
    put(tmp_path, "bad", damage if isinstance(damage, str) else run_by_hand(**damage))
    put(tmp_path, "good", run_by_hand())
    os.mkfifo(tmp_path / "multiply-pipe.json")
    assert len(passn.load_runs(tmp_path, "multiply", {0})) == 1
    assert capsys.readouterr().err.count("multiply-bad.json") == 1


def test_shares_of_samples_are_estimates_and_too_few_are_nan():
    run = run_by_hand(num_samples=8)
    assert pass_at(run, 4)[0, 0] == approx(estimate_pass_at_n(8, [4, 0], 4).mean().item())
    assert pass_at(run, 8)[0, 0] == 0.5 and np.isnan(pass_at(run, 9)).all()


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
does nothing: --loss ce --pass-over 0.2 | --loss ce --N 8 | --frontier --loss ce | --task prove --loss ce --per-step
below 1: --pass-over 1
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


@parametrize("name", [*TASKS])
def test_every_setting_is_a_flag_with_its_comment_for_a_help(name, capsys):
    settings = SETTINGS | TASKS[name].settings
    for setting, usual in settings.items():
        value = [] if usual is False else [str(usual / 2 or 0.5) if isinstance(usual, float) else f"{usual}2"]
        options = ["--task", name, "--loss", *LOSSES, f"--{setting.replace('_', '-')}", *value]
        _, jobs = passn.parse_arguments(options)
        assert any(job[setting] != usual for job in jobs), setting
        assert {type(job[setting]) for job in jobs} == {type(usual)}
    with pytest.raises(SystemExit, match="0"):
        passn.main(["--task", name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default: ") == len(settings | passn.OPTIONS) and "blocks of the model (default: 2)" in text


def test_what_is_shown_has_the_commands_seeds_and_what_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    command = [*SMALL, "--out", str(tmp_path), "--seed"]
    assert passn.main([*command, "0", "--loss", "limited"]) == passn.main([*command, "1", "--loss", "ce"]) == 0
    monkeypatch.setitem(LOSSES, "limited", lambda log_p, N: nan * log_p.sum())
    capsys.readouterr()
    assert passn.main([*command, "1", "--tries", "10"]) == 2
    said = capsys.readouterr()
    assert said.err.count("limited N=64, seed 1: diverged: try a smaller") == 1
    assert "cross-entropy" in said.out and "limited" not in said.out and "best@10" in said.out
    assert (tmp_path / "multiply.png").stat().st_size > 10_000
    (tmp_path / "multiply.png").unlink()
    (tmp_path / "multiply.png").mkdir()  # a figure that cannot be written
    with pytest.raises(SystemExit, match="2"):
        passn.main([*command, "1", "--loss", "ce"])
    said = capsys.readouterr()
    assert "best@64" in said.out and "64 tries" in said.out and "Is a directory" in said.err.splitlines()[-1]


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


def workers(program):
    """Their process ids."""
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_alive(pid):
    return Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.fixture
def program(tmp_path):
    """passn.py with two runs of many epochs."""
    command = [sys.executable, ROOT / "passn.py", *SMALL, "--epochs", "100000", "--out", tmp_path]
    if not Path("/proc").exists() or os.cpu_count() == 1:
        pytest.skip("needs two cores and /proc")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        yield process
        process.kill()


@parametrize("when", ["starting", "training"])
def test_ctrl_c_is_one_line_and_ends_every_process(program, when, tmp_path):
    """As a terminal sends it, to all processes."""
    until(lambda: len(workers(program) if when == "starting" else [*tmp_path.glob("*.partial")]) == 2)
    both = workers(program)
    os.killpg(program.pid, signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    lines = [line for line in re.split(r"[\r\n]", errors) if line.strip() and "it/s" not in line and "s/it" not in line]
    assert program.returncode == 130 and len(lines) == 1 and "interrupted: in --out are" in lines[0]
    until(lambda: not any(map(is_alive, both)))


def test_workers_end_with_their_parent_and_not_with_each_other(program, tmp_path):
    until(lambda: len([*tmp_path.glob("*.partial")]) == 2)
    first, second = workers(program)
    os.kill(first, signal.SIGKILL)
    until(lambda: not is_alive(first))
    time.sleep(0.5)
    assert is_alive(second) and program.poll() is None
    program.kill()
    until(lambda: not is_alive(second))


def test_a_program_that_cannot_be_started_again_or_has_no_standard_error_trains_here(tmp_path):
    script = f"import passn; passn.main({[*SMALL, '--out', str(tmp_path), '--seeds', '2']})"
    command = f"'{sys.executable}' - 2>&-"
    done = subprocess.run(command, input=script, stdout=subprocess.PIPE, text=True, cwd=ROOT, shell=True)
    assert done.returncode == 0 and "best@64" in done.stdout and len([*tmp_path.glob("*.json")]) == 4


# ==== 10. The README ======================================================================================


def test_the_readmes_links_resolve_and_its_commands_parse():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    commands = {*re.findall(r"python passn\.py( --[^`#]*?)?(?=`| ```| python| #)", " ".join(text.split()))}
    for command in commands:
        if "--help" not in command and "TASK" not in command:
            passn.parse_arguments(command.replace("DIR", ".").split())
    assert len(commands) > 5
